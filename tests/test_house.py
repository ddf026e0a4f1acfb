"""The rules of the house: lean imports, layers, the size of the tree, no paths of one machine."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "numpy", "tokenizers", "jinja2", "pydantic")


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")


def heavy_modules_after(code: str) -> str:
    """Runs the code in a fresh interpreter; returns those of HEAVY that it imported."""
    tail = f"\nimport sys; print('HEAVY', *(name for name in {HEAVY!r} if name in sys.modules))"
    done = run(sys.executable, "-c", code + tail)
    assert done.returncode == 0, done.stderr
    return done.stdout.rpartition("HEAVY")[2].strip()


def files_of_the_tree() -> list[Path]:
    """The files that git tracks, or would track."""
    if shutil.which("git") is None:
        pytest.skip("git is not here")
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    if listed.returncode:
        pytest.skip(f"not a git checkout: {listed.stderr.strip()}")
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def test_importing_the_package_is_lean() -> None:
    assert heavy_modules_after("import gdn2_edge") == ""


def command_names() -> list[str]:
    from typer.main import get_command

    from gdn2_edge.cli import app

    return sorted(getattr(get_command(app), "commands", {}))


def heavy_modules_after_help(*commands: list[str]) -> str:
    """Asks for the help of all these commands, one after the other, in one fresh interpreter."""
    return heavy_modules_after(
        "from gdn2_edge.cli import main\n"
        "import sys\n"
        f"for command in {commands!r}:\n"
        "    sys.argv = ['gdn2-edge', *command, '--help']\n"
        "    try:\n"
        "        main()\n"
        "    except SystemExit as end:\n"
        "        assert not end.code, (command, end.code)\n"
    )


def test_help_is_lean() -> None:
    assert heavy_modules_after_help([]) == ""


def test_help_of_every_command_is_lean() -> None:
    # typer itself imports pydantic to show the type of an argument, from 0.29 on or before.
    assert heavy_modules_after_help(["export", "onnx"], *([name] for name in command_names())) in ("", "pydantic")


def test_layers() -> None:
    done = run(sys.executable, "-c", "from importlinter.cli import lint_imports; exit(lint_imports())")
    assert done.returncode == 0, done.stdout + done.stderr


def test_tree_size() -> None:
    done = run(sys.executable, "scripts/tree-size")
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_paths_of_one_machine() -> None:
    pattern = re.compile(rb"(?<![\w.~:/-])/(?:work|root|home|Users)/\w")
    found = []
    for path in files_of_the_tree():
        data = path.read_bytes()
        if b"\0" in data[:8192]:
            continue
        found += [
            f"{path.relative_to(ROOT)}:{number}: {line.strip().decode(errors='replace')}"
            for number, line in enumerate(data.splitlines(), start=1)
            if pattern.search(line)
        ]
    assert not found, "\n".join(found)


def test_uninitialised_memory_is_nan() -> None:
    # The setting in conftest.py is global state: this fails when torch stops honouring it.
    assert torch.empty(1000).isnan().all()
