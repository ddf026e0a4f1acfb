"""How a hostile input is tried: one command, in this process or its own, and everything that must hold afterwards."""

from __future__ import annotations

import hashlib
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from inputs import Refused, make_models

from gdn2_edge.cli import main

SECONDS = 30.0  # far more than any refusal takes, also where other tests run beside it
MEGABYTES = 400  # what a command may take beyond what it found; the good models here take 10
REGULAR_BYTES = 64 << 20  # larger files here are holes

COMMANDS: dict[str, Callable[[Path], list[Any]]] = {
    "inspect": lambda folder: [folder],
    "convert": lambda folder: [folder, "--out", folder.parent / "out"],
    "quantize": lambda folder: [folder, "--format", "int8", "--out", folder.parent / "out"],
    "chat": lambda folder: [folder, "--once", "hi"],
}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    make_models(root)
    return root


@pytest.fixture
def refused(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> Refused:
    """Runs a command that must fail well; returns what it said."""
    return lambda *command, words, code=1, apart=False: _refused(
        tmp_path,
        [str(word) for word in command],
        (words,) if isinstance(words, str) else words,
        code,
        _apart if apart else lambda argv: _here(argv, capsys, monkeypatch),
    )


@pytest.fixture
def refused_by_all(refused: Refused) -> Callable[..., None]:
    """The same for every command that opens a checkpoint."""

    def run(folder: Path, words: str | tuple[str, ...]) -> None:
        for command, arguments in COMMANDS.items():
            refused(command, *arguments(folder), words=words)

    return run


def _refused(
    folder: Path, command: list[str], words: tuple[str, ...], code: int, run: Callable[[list[str]], tuple[int, str]]
) -> str:
    before, peak = _contents(folder), _peak_megabytes(reset=True)
    begun = time.monotonic()
    found, said = run(command)
    seconds = time.monotonic() - begun
    assert found == code, said
    assert "Traceback" not in said
    assert not said.startswith("error: unexpected")
    for word in words:
        assert word in said
    if code == 1:
        assert said.startswith("error: ")
        assert said.endswith("\n")
        assert said.count("\n") == 1
        assert said[:-1].isprintable()
        assert len(said) < 1500
    assert _contents(folder) == before
    assert seconds < SECONDS
    assert _peak_megabytes() - peak < MEGABYTES
    return said


def _here(command: list[str], capsys: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["gdn2-edge", *command])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0), capsys.readouterr().err


def _apart(command: list[str]) -> tuple[int, str]:
    code = "from gdn2_edge.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *command], capture_output=True, text=True, encoding="utf-8", timeout=60
    )
    return done.returncode, done.stderr


def _contents(folder: Path) -> dict[str, object]:
    """Every name under the folder with what it is; files with their bytes."""
    found: dict[str, object] = {}
    for path in folder.rglob("*"):
        mode = path.lstat().st_mode
        content: object = stat.S_IFMT(mode)
        if stat.S_ISLNK(mode):
            content = path.readlink()
        elif stat.S_ISREG(mode):
            size = path.stat().st_size
            content = hashlib.sha256(path.read_bytes()).digest() if size <= REGULAR_BYTES else size
        found[str(path.relative_to(folder))] = content
    return found


def _peak_megabytes(reset: bool = False) -> float:
    """The most memory this process has had since the last reset; Linux counts it, elsewhere it is 0."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0.0
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024
