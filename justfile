# `just` alone lists these. All use the .venv that `just setup` makes.
set positional-arguments

bin := if os() == "windows" { ".venv/Scripts" } else { ".venv/bin" }

_list:
    @just --list --unsorted

# make .venv with everything a developer needs, and install the pre-commit hooks
setup:
    sh -euc 'root=$PWD; . scripts/common.sh; prepare test dev; "$bin/pre-commit" install'

# ruff, import layers, size of the tree
lint:
    {{bin}}/ruff check .
    {{bin}}/ruff format --check .
    {{bin}}/lint-imports
    {{bin}}/python scripts/tree-size

# mypy, strict
type:
    {{bin}}/mypy

# the tests that CI runs
test *ARGS:
    sh scripts/test "$@"

# those that take minutes or gigabytes
test-slow *ARGS:
    sh scripts/test -m slow "$@"

# those that need an NVIDIA GPU, and those of the kernels, which there run compiled
test-gpu *ARGS:
    sh scripts/test tests/test_gpu.py tests/test_triton_model.py tests/kernels/triton "$@"

# examples/web in a browser, and GGUF files in JavaScript; needs npm, and Chromium (or once: .venv/bin/playwright install chromium)
test-web *ARGS:
    sh -euc 'root=$PWD; . scripts/common.sh; prepare test test-web; npm ci --prefix examples/web; "$bin/python" -m pytest -m web "$@"' test-web "$@"

# llama.cpp with GDN-2; builds llama-cpp-python first, minutes the first time
test-llama *ARGS:
    sh -euc 'root=$PWD; . scripts/common.sh; prepare test; "$bin/gdn2-edge" llama-cpp build --wheel .venv/llama-cpp; "$bin/python" -m pip install -qq "$(ls .venv/llama-cpp/llama_cpp_python-*.whl)[server]"; "$bin/python" -m pytest -m llama "$@"' test-llama "$@"

# only the comparisons with outputs of other implementations
golden *ARGS:
    sh scripts/test -k golden "$@"

# a benchmark by name, as in: just bench recall --record
bench NAME *ARGS:
    shift; {{bin}}/python "benchmarks/{{NAME}}.py" "$@"

# quantize the default model and chat with it
demo *ARGS:
    sh scripts/demo "$@"
