# Sourced by scripts/demo, scripts/test and .ci/run, with `root` set to the checkout. POSIX sh.
# Makes .venv in the checkout and installs the package into it. Everything said goes to stderr.

venv="$root/.venv"
# The version the figures in the README were made with. pyproject.toml says which others will do.
torch_version=2.13.0

say() { printf '%s\n' "$*" >&2; }
fail() { say "error: $*"; exit 1; }

# A Python of 3.10 or later, on this machine: prints how to call it.
find_python() {
    found=
    for candidate in python3 python python3.13 python3.12 python3.11 python3.10; do
        # Also passes over Windows' python3, which only opens a shop.
        version=$("$candidate" -c 'import platform; print(platform.python_version())' 2>/dev/null) || continue
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
        found="${found:+$found, }$candidate is $version"
    done
    [ -n "$found" ] && fail "gdn2-edge needs Python 3.10 or later; here $found. Install a newer one beside it."
    fail "gdn2-edge needs Python 3.10 or later, and neither python3 nor python was found. Install it from https://www.python.org/downloads/"
}

# The venv's programs lie in Scripts on Windows, in bin elsewhere.
set_bin() {
    bin="$venv/bin"
    if [ -d "$venv/Scripts" ]; then bin="$venv/Scripts"; fi
}

has_nvidia_card() {
    command -v nvidia-smi >/dev/null 2>&1 || [ -e /proc/driver/nvidia ] || [ -e /usr/lib/wsl/lib/nvidia-smi ]
}

# What an installation depends on. Sources are not in it: they are installed editable.
fingerprint() { { cat "$root/pyproject.toml"; printf '%s\n' "$root"; } | cksum; }

is_installed() { [ "$(cat "$venv/installed-$1" 2>/dev/null)" = "$(fingerprint)" ]; }

pip_install() { "$bin/python" -m pip -qq --disable-pip-version-check install "$@"; }

# On Linux the usual torch brings gigabytes of CUDA with it. Without an NVIDIA card its CPU build comes from
# PyTorch's own index. GDN2_EDGE_TORCH_INDEX names another index, or, set but empty, pip's usual one.
install_torch() {
    if "$bin/python" -c 'import importlib.metadata as m; m.version("torch")' 2>/dev/null; then return; fi
    index=${GDN2_EDGE_TORCH_INDEX-unset}
    size="about 200 MB or less (CPU build)"
    if [ "$index" = unset ]; then
        index=
        if [ "$(uname -s)" = Linux ]; then
            if has_nvidia_card; then
                size="several GB (CUDA build, for the NVIDIA card here)"
            else
                index=https://download.pytorch.org/whl/cpu
            fi
        fi
    elif [ -n "$index" ]; then
        size="a size that depends on GDN2_EDGE_TORCH_INDEX, which is set to $index"
    else
        size="about 200 MB, or several GB where pip's usual index has the CUDA build (Linux)"
    fi
    say "    torch $torch_version: a download of $size"
    if [ -n "$index" ]; then
        # The question may take seconds where the index cannot be reached; the download itself is not hurried.
        if "$bin/python" -m pip --disable-pip-version-check --timeout 5 --retries 0 \
            index versions torch --index-url "$index" 2>/dev/null | grep -F "$torch_version" >/dev/null; then
            pip_install --timeout 60 --retries 0 --no-deps --index-url "$index" "torch==$torch_version" ||
                fail "torch did not arrive from $index: run this again, or set GDN2_EDGE_TORCH_INDEX to another index."
            return
        fi
        say "    $index does not answer, or has no torch $torch_version for this Python."
        say "    Taking torch from pip's usual index; on Linux that may be the CUDA build, several GB."
    fi
    pip_install "torch==$torch_version"
}

# prepare [EXTRA...]: leaves a .venv with the package and these extras in it, and sets `bin`.
# Runs at once when there is nothing to do. A .venv that this script did not finish is made again.
prepare() {
    set_bin
    missing=
    for extra in base "$@"; do
        is_installed "$extra" || missing="${missing:+$missing,}$extra"
    done
    if [ -z "$missing" ] && [ ! -e "$venv/unfinished" ] && "$bin/python" -c '' 2>/dev/null; then return; fi

    if [ -e "$venv/unfinished" ]; then
        say "    .venv was left half-made: making it again"
        rm -rf "$venv"
    elif [ -d "$venv" ] && ! "$bin/python" -c 'import sys, pip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        fail "$venv is there, but has no working Python 3.10 or later with pip. Remove it and run this again."
    fi
    if [ ! -d "$venv" ]; then
        python=$(find_python) || exit 1
        mkdir -p "$venv"
        : >"$venv/unfinished"
        "$python" -m venv "$venv" >&2 ||
            fail "$python cannot make a virtual environment. On Debian and Ubuntu: apt install python3-venv"
        set_bin
    fi

    # Editable: nothing is copied, and after `git pull` the new code runs without another installation.
    extras=$(printf '%s,' "$@")
    extras=${extras%,}
    say "    .venv will take about 1 GB of disk (CUDA: several). Downloads, unless pip has them cached:"
    install_torch
    case ",$extras," in
        *,dev,*) say "    all other packages, the developers' tools with them: about 100 MB" ;;
        *) say "    all other packages: about 50 MB" ;;
    esac
    pip_install -e "$root${extras:+[$extras]}" || fail "pip could not install the package: see above."
    for extra in base "$@"; do
        fingerprint >"$venv/installed-$extra"
    done
    rm -f "$venv/unfinished"
}
