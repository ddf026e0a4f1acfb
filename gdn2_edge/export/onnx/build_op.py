"""Compiles the kernel of `ai.gdn2::GatedDeltaRule2` in op/ to a library for ONNX Runtime on this computer's CPU.

Any compiler of C++17 will do; where there is none, the one in PyPI's `ziglang`. A library is kept in the user's cache
under a hash of everything that went into it, so that the compiler runs once. Knows nothing of onnx or onnxruntime.
Linux on x86-64 is where it has run; for macOS, Windows and ARM it has been compiled, but with cl not even that.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from gdn2_edge.errors import BackendError

SOURCE = Path(__file__).parent / "op"
MAIN = "gated_delta_rule2.cpp"
COMPILERS = ("c++", "g++", "clang++")
MSVC = "cl"  # comes last: it makes no code for AVX
# No exceptions and no C++ library, so that a C compiler's linker is enough. Nothing here lets a compiler change the
# order of sums or forget about NaN; a * b + c may be rounded once.
GNU_OPTIONS = (
    *("-std=c++17", "-O3", "-shared", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wno-psabi"),
)
MSVC_OPTIONS = ("/nologo", "/std:c++17", "/O2", "/LD", "/fp:precise")


def build_op(out: Path | None = None) -> Path:
    """The compiled library, for `SessionOptions.register_custom_ops_library`.

    The compiler is $CXX, else the first of c++, g++, clang++, ziglang's, cl. What it makes runs on every processor
    of its kind: faster instructions are chosen when the library is loaded (with cl they are not used at all).

    Args:
        out: folder for the library; the user's cache if not given.

    Raises:
        BackendError: there is no compiler, it failed, or the library cannot be written.
    """
    command = find_compiler()
    compiler = _compiler_digest(command)
    folder = (out if out is not None else _own_folder()).absolute()
    library = folder / library_name()
    stamp = _stamp_of(library)
    if _text(stamp) == f"{compiler} {_file_digest(library)}":
        return library
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".build-", dir=folder) as partial:
            made = Path(partial) / library.name
            _compile(command, made)
            stamp.unlink(missing_ok=True)
            os.replace(made, library)
            stamp.write_text(f"{compiler} {_file_digest(library)}", encoding="utf-8")
    except OSError as error:
        raise BackendError(
            f"{library} cannot be written ({error}): free the place or choose another with --out"
        ) from error
    except BackendError:
        if is_new:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
    return library


def find_op() -> Path | None:
    """The library that `build_op()` made of these very sources in the user's cache, if whole. Runs no compiler."""
    library = _own_folder() / library_name()
    words = (_text(_stamp_of(library)) or "").split()
    return library if len(words) == 2 and words[1] == _file_digest(library) else None


def _own_folder() -> Path:
    """In the user's cache, for these sources, options and this kind of computer."""
    facts = [platform.system(), platform.machine(), *GNU_OPTIONS, *MSVC_OPTIONS]
    state = hashlib.sha256("\0".join(facts).encode())
    for path in sorted(SOURCE.iterdir()):
        state.update(path.name.encode() + path.read_bytes())
    return cache_folder() / f"op-{state.hexdigest()[:16]}"


def _stamp_of(library: Path) -> Path:
    """Holds digests of the compiler and of the library it made: a damaged library is seen before it is loaded."""
    return library.with_name(f"{library.name}.built-from")


def _file_digest(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


def library_name() -> str:
    """What a shared library is called on this system."""
    return {"win32": "gdn2_onnx.dll", "darwin": "libgdn2_onnx.dylib"}.get(sys.platform, "libgdn2_onnx.so")


def cache_folder() -> Path:
    """This user's cache for what the package builds."""
    home = Path.home()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = home / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return base / "gdn2-edge"


def find_compiler() -> list[str]:
    """The beginning of a compiler's command line.

    Raises:
        BackendError: there is none, or the one that $CXX names is not there.
    """
    if chosen := os.environ.get("CXX", "").strip():
        # On Windows a path may hold spaces and backslashes and is taken whole.
        try:
            words = [chosen] if shutil.which(chosen) else shlex.split(chosen)
        except ValueError:
            words = [chosen]
        if (found := shutil.which(words[0])) is None:
            raise BackendError(f"CXX names the compiler {words[0]}, which is not found: install it or unset CXX")
        return [str(Path(found).absolute()), *words[1:]]
    for name in COMPILERS:
        if found := shutil.which(name):
            return [found]
    if importlib.util.find_spec("ziglang") is not None:
        # `cc`, not `c++`, which would build a C++ library first. Without -mcpu it compiles for this very processor.
        return [sys.executable, "-m", "ziglang", "cc", "-mcpu=baseline"]
    if found := shutil.which(MSVC):
        return [found]
    raise BackendError(
        f"no C++ compiler is found ({', '.join((*COMPILERS, MSVC))} or $CXX): install one, or run: pip install ziglang"
    )


def _compile(command: Sequence[str], library: Path) -> None:
    source = str(SOURCE / MAIN)
    if _is_msvc(command):
        arguments = [*MSVC_OPTIONS, source, f"/Fe:{library}", f"/Fo:{library.parent}{os.sep}"]
    else:
        position = () if sys.platform == "win32" else ("-fPIC",)
        arguments = [*GNU_OPTIONS, *position, source, "-o", str(library)]
    try:
        done = subprocess.run(
            [*command, *arguments], capture_output=True, text=True, errors="replace", cwd=library.parent
        )
    except OSError as error:
        raise BackendError(f"the compiler {command[0]} cannot be run ({error}): name another in CXX") from error
    if done.returncode or not library.is_file():
        said = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()
        reason = next((line for line in said if "error" in line and "ld returned" not in line), said[0])
        raise BackendError(
            f"{shlex.join(command)} could not compile {MAIN} ({reason.strip()}): "
            "name another compiler in CXX, or run: pip install ziglang"
        )


def _is_msvc(command: Sequence[str]) -> bool:
    return Path(command[0]).stem.lower() in ("cl", "clang-cl")


def _compiler_digest(command: Sequence[str]) -> str:
    """Of the compiler and its version; for a folder that the user chose, of the sources too."""
    # cl has no such option and prints its version with its complaint.
    try:
        version = subprocess.run([*command, "--version"], capture_output=True, errors="replace", text=True)
    except OSError as error:
        raise BackendError(f"the compiler {command[0]} cannot be run ({error}): name another in CXX") from error
    facts = [*command, version.stdout, version.stderr if _is_msvc(command) else "", _own_folder().name]
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:16]


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
