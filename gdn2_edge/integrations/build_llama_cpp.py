"""Builds llama-cpp-python with llama.cpp patched to know GDN-2: fetch its source by pip, patch, `pip wheel`.

Everything lies in the user's cache under a digest of the source and the patch, so that a build that was interrupted
goes on where it was. cmake and ninja come with pip where they are missing; a C++ compiler must be there. Linux on
x86-64 is where it has run.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from gdn2_edge.errors import BackendError
from gdn2_edge.export.onnx.build_op import cache_folder
from gdn2_edge.integrations.patch import apply_patch

VERSION = "0.3.36"
SDIST = f"llama_cpp_python-{VERSION}.tar.gz"
SDIST_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
PATCH = Path(__file__).parent / "llama.cpp" / "gdn2.patch"
# `llama_cpp.__version__` of what is built here: how a program knows a patched package before it loads a model.
PATCHED_VERSION = f"{VERSION}+gdn2.1"
COMPILERS = ("c++", "g++", "clang++", "cl")
CMAKE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
STEP = re.compile(r"\[(\d+)/(\d+)\] (.*)")  # how ninja counts

Progress = Callable[[int, int, str], None]  # steps done, steps in all (0: not known), what is being done


def build_llama_cpp(
    out: Path | None = None, defines: Mapping[str, str] | None = None, progress: Progress | None = None
) -> Path:
    """The wheel of a patched llama-cpp-python for this computer.

    Args:
        out: folder for the wheel; the user's cache if not given. A wheel of the same name there is replaced.
        defines: options for cmake, as {"GGML_CUDA": "ON"}.
        progress: called with every step.

    Raises:
        BackendError: pip or a compiler is missing, the source does not arrive or is not the one that the patch is
            for, the build fails, or a file cannot be written.
    """
    defines = dict(defines or {})
    _check_tools(defines)
    show = progress or (lambda done, total, what: None)
    home = cache_folder() / "llama-cpp"
    try:
        patch = PATCH.read_text(encoding="utf-8")
        folder = home / hashlib.sha256(f"{SDIST_SHA256}{PATCHED_VERSION}{patch}".encode()).hexdigest()[:8]
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(home / "lock", timeout=0):
            show(0, 0, f"fetching llama-cpp-python {VERSION}")
            sdist = _fetch(home)
            show(0, 0, "patching")
            source = _patched_source(sdist, patch, folder)
            wheel = _wheel(source, folder, defines, show)
            target = (out or folder).absolute()
            target.mkdir(parents=True, exist_ok=True)
            partial = target / f".{wheel.name}.partial"
            shutil.copyfile(wheel, partial)
            os.replace(partial, target / wheel.name)
            shutil.rmtree(wheel.parent)
    except Timeout:
        raise BackendError(f"{home} is in use: another build is running") from None
    except OSError as error:
        raise BackendError(f"{error.filename or home} cannot be read or written ({error.strerror or error})") from error
    return target / wheel.name


def _check_tools(defines: Mapping[str, str]) -> None:
    for name in defines:
        if not CMAKE_NAME.fullmatch(name):
            raise BackendError(f"{name!r} is not the name of a cmake option, as GGML_CUDA is")
    if importlib.util.find_spec("pip") is None:
        raise BackendError(f"pip is not there, which fetches and builds: run {sys.executable} -m ensurepip")
    chosen = defines.get("CMAKE_CXX_COMPILER") or os.environ.get("CXX", "").strip()
    if chosen:
        if shutil.which(chosen) is None and shutil.which(chosen.split()[0]) is None:
            raise BackendError(f"the C++ compiler {chosen} is not found: install it or name another in CXX")
    elif not any(map(shutil.which, COMPILERS)) and _visual_studio() is None:
        raise BackendError(
            f"no C++ compiler is found ({', '.join(COMPILERS)} or $CXX), and llama.cpp must be compiled: install one "
            "(Debian, Ubuntu: apt install g++; macOS: xcode-select --install; Windows: Visual Studio's Build Tools)"
        )


def _visual_studio() -> Path | None:
    """Visual Studio's own finder, by which cmake finds its compiler without it being on the PATH."""
    finder = Path(os.environ.get("PROGRAMFILES(X86)", "")) / "Microsoft Visual Studio" / "Installer" / "vswhere.exe"
    return finder if sys.platform == "win32" and finder.is_file() else None


def _fetch(home: Path) -> Path:
    """The source distribution, from wherever pip is set up to get packages."""
    sdist = home / SDIST
    if sdist.is_file() and _digest(sdist) == SDIST_SHA256:
        return sdist
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=home) as partial:
        # pip refuses what has another digest before it runs anything of it.
        wanted = Path(partial) / "requirements.txt"
        wanted.write_text(f"llama-cpp-python=={VERSION} --hash=sha256:{SDIST_SHA256}\n", encoding="utf-8")
        options = ("--no-deps", "--no-binary", "llama-cpp-python", "--dest", partial, "--requirement", str(wanted))
        _run(_pip("download", *options), home / "fetch.log", "could not be fetched", lambda line: None)
        found = Path(partial) / SDIST
        if not found.is_file() or _digest(found) != SDIST_SHA256:
            raise BackendError(f"pip fetched something else than {SDIST} with the digest {SDIST_SHA256[:12]}...")
        os.replace(found, sdist)
    return sdist


def _digest(path: Path) -> str:
    state = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            state.update(block)
    return state.hexdigest()


def _patched_source(sdist: Path, patch: str, folder: Path) -> Path:
    source = folder / "source"
    if source.is_dir():
        return source
    with tempfile.TemporaryDirectory(prefix=".unpack-", dir=folder) as partial:
        with tarfile.open(sdist) as archive:
            # Python 3.10.0 to 3.10.11 have no filters; the digest has been checked.
            archive.extraction_filter = getattr(tarfile, "data_filter", lambda member, path: member)
            archive.extractall(partial)
        unpacked = Path(partial) / SDIST.removesuffix(".tar.gz")
        apply_patch(patch, unpacked / "vendor" / "llama.cpp", f"llama-cpp-python {VERSION}")
        init = unpacked / "llama_cpp" / "__init__.py"
        text = init.read_text(encoding="utf-8")
        init.write_text(text.replace(f'"{VERSION}"', f'"{PATCHED_VERSION}"'), encoding="utf-8", newline="\n")
        os.replace(unpacked, source)
    return source


def _wheel(source: Path, folder: Path, defines: Mapping[str, str], show: Progress) -> Path:
    """Runs cmake and the compiler. The build folder is kept, for each set of options its own."""
    options = sorted(f"{name}={value}" for name, value in defines.items())
    build = folder / f"build-{hashlib.sha256(chr(0).join(options).encode()).hexdigest()[:8]}"
    wheels = folder / "wheel"
    shutil.rmtree(wheels, ignore_errors=True)
    settings = [f"build-dir={build}", "cmake.verbose=false", *(f"cmake.define.{option}" for option in options)]

    def summarise(line: str) -> None:
        if found := STEP.match(line.strip()):
            show(int(found[1]), int(found[2]), found[3].rsplit("/", 1)[-1])

    show(0, 0, "configuring")
    command = _pip("wheel", "--verbose", "--no-deps", "--wheel-dir", str(wheels))
    command += [f"--config-settings={setting}" for setting in settings]
    _run([*command, str(source)], folder / "build.log", "could not be built", summarise)
    found = sorted(wheels.glob(f"llama_cpp_python-{PATCHED_VERSION}-*.whl"))
    if len(found) != 1:
        raise BackendError(f"pip made no wheel of llama-cpp-python {PATCHED_VERSION}: see {folder / 'build.log'}")
    return found[0]


def _pip(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]


def _run(command: Sequence[str], log: Path, failed: str, line_read: Callable[[str], None]) -> None:
    """Run to the end with all it says in `log`; it and what it started end with us."""
    with log.open("w", encoding="utf-8") as said, _started(command) as process:
        assert process.stdout is not None
        for line in process.stdout:
            said.write(line)
            line_read(line)
        status = process.wait()
    if status:
        lines = log.read_text(encoding="utf-8").splitlines()
        errors = [line for line in lines if re.search("error:|CMake Error", line, re.IGNORECASE)]
        reason = (errors or lines[-1:] or [f"exit code {status}"])[0].strip()
        raise BackendError(f"llama-cpp-python {VERSION} {failed} ({reason}): {log} has all that was said")


@contextlib.contextmanager
def _started(command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            # ninja removes the files it was writing when it is told to end.
            if os.name == "posix":
                os.killpg(process.pid, signal.SIGTERM)
            else:
                process.terminate()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()
