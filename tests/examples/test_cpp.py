"""examples/cpp, compiled, against torch: recurrent and hybrid models, with and without the operator's library."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("onnx", reason="the extra onnx is not installed")
pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")

import onnxruntime
import torch

from gdn2_edge.convert import convert_checkpoint
from gdn2_edge.errors import BackendError
from gdn2_edge.export.onnx import build_op as building
from gdn2_edge.export.onnx import export_onnx
from gdn2_edge.generate.text import open_text
from gdn2_edge.model import Model, load_model

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
TOKENS = 24
OPTIONS = ("-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="how to link is written for Linux")


@pytest.fixture(scope="module")
def compiler() -> list[str]:
    try:
        command = building.find_compiler()
    except BackendError as error:
        pytest.skip(str(error))
    # build_op calls ziglang's C compiler, because its operator needs no C++ library.
    return [word if word != "cc" else "c++" for word in command]


@pytest.fixture(scope="module")
def program(compiler: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example as its README compiles it."""
    folder = tmp_path_factory.mktemp("cpp")
    runtime = folder / "libonnxruntime.so.1"
    runtime.symlink_to(*Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*"))
    source = ROOT / "examples" / "cpp" / "decode.cpp"
    arguments = ("-I", building.SOURCE, source, runtime, "-Wl,-rpath,$ORIGIN", "-o", folder / "decode")
    done = subprocess.run([*compiler, *OPTIONS, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "decode"


@pytest.fixture(scope="module")
def library(compiler: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return building.build_op(tmp_path_factory.mktemp("op"))


@pytest.fixture(scope="module")
def exported_tiny(tiny: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "tiny"
    export_onnx(tiny.path, folder)
    return folder


def run(program: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, timeout=120)


def decoded(program: Path, *arguments: object) -> list[int]:
    done = run(program, *arguments)
    assert done.returncode == 0, done.stderr
    return [int(line) for line in done.stdout.split()]


def greedy(model: Model, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    logits, state = model.prefill(ids, model.initial_state())
    chosen = [int(logits.argmax())]
    while len(chosen) < TOKENS:
        logits, state = model.step(torch.tensor(chosen[-1:]), state)
        chosen.append(int(logits.argmax()))
    return chosen


def test_the_default_model_answers_as_on_torch(program: Path, library: Path, tiny: Model, exported_tiny: Path) -> None:
    prompt = open_text(tiny.path).opening("My name is Ada. What is my name?")
    expected = greedy(tiny, prompt)
    assert decoded(program, exported_tiny, TOKENS, *prompt) == expected
    assert decoded(program, "--op", library, exported_tiny, TOKENS, *prompt) == expected


def test_a_hybrid_model_beyond_its_window(program: Path, tmp_path: Path) -> None:
    convert_checkpoint(GOLDEN / "hybrid-model-ckpt.pth", tmp_path / "hybrid", config=str(GOLDEN / "hybrid.json"))
    model = load_model(tmp_path / "hybrid", "cpu", torch.float32)
    export_onnx(model.path, tmp_path / "exported")
    assert model.spec.sliding_window is not None
    prompt = [(7 * i) % model.spec.vocab_size for i in range(model.spec.sliding_window + 5)]
    assert decoded(program, tmp_path / "exported", TOKENS, *prompt) == greedy(model, prompt)


def test_what_goes_wrong_is_said(program: Path, exported_tiny: Path, tmp_path: Path) -> None:
    for arguments, code, words in (
        ((), 2, "usage: decode"),
        ((exported_tiny, 3), 2, "usage: decode"),
        ((exported_tiny, "three", 5), 2, "three is not a number"),
        ((tmp_path / "nothing", 3, 5), 1, "nothing/model.onnx"),
        (("--op", tmp_path / "nothing.so", exported_tiny, 3, 5), 1, "nothing.so"),
        ((exported_tiny, 3, 10**9), 1, "out of data bounds"),
    ):
        done = run(program, *arguments)
        assert done.returncode == code
        assert words in done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert not done.stdout
