"""What the documents say is what the program does: README's commands, the formats' decoder, the options."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gdn2_edge.cli import app
from gdn2_edge.quantize.int4 import encode_int4

ROOT = Path(__file__).parents[1]


def blocks(file: str, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```", (ROOT / file).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a reader of the README would be: with a training file, a tokenizer and a template at hand."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copy(ROOT / "tests" / "golden" / "recurrent-model-ckpt.pth", folder / "model-ckpt.pth")
    return folder


def environment() -> dict[str, str]:
    programs = str(Path(sys.executable).parent)
    return {**os.environ, "PATH": programs + os.pathsep + os.environ.get("PATH", ""), "OMP_NUM_THREADS": "1"}


def commands() -> list[str]:
    lines = [line for block in blocks("README.md", "sh") for line in block.splitlines()]
    return [line for line in lines if line.startswith(("gdn2-edge ", "echo "))]


def test_readme_has_commands() -> None:
    assert len(commands()) >= 6


@pytest.mark.skipif(sys.platform == "win32", reason="the README's commands are written for sh")
def test_commands_of_the_readme_run_in_order(folder: Path) -> None:
    for command in commands():
        if command == "gdn2-edge chat" or "llama-cpp build" in command or "chat tiny.gguf" in command:
            continue  # interactive: tests/cli/test_terminal.py; minutes of compiling: tests/integrations
        done = subprocess.run(
            command, shell=True, cwd=folder, env=environment(), capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        assert done.stdout.strip(), command


def test_python_of_the_readme_runs(folder: Path) -> None:
    for block in blocks("README.md", "python"):
        done = subprocess.run(
            [sys.executable, "-c", block], cwd=folder, env=environment(), capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{block}\n{done.stderr}"


def test_decoder_of_the_formats_page() -> None:
    scope: dict[str, object] = {}
    exec(blocks("docs/formats.md", "python")[0], scope)
    weight = encode_int4("w", torch.randn(6, 128), 32)
    found = scope["int4"](weight.data.numpy(), weight.scale.float().numpy())
    assert torch.equal(torch.from_numpy(found), weight.rows(slice(None)))


def test_links_of_the_documents_lead_somewhere() -> None:
    for file in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", file.read_text(encoding="utf-8")):
            assert (file.parent / target).exists(), f"{file.name}: {target}"


def test_every_option_is_on_the_command_line_page() -> None:
    # docs/cli.md is written by: typer gdn2_edge.cli utils docs --name gdn2-edge --title "Command line"
    from typer.main import get_command

    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    commands = dict(get_command(app).commands)
    for group in ("export", "llama-cpp"):
        commands |= {f"{group} {name}": command for name, command in commands.pop(group).commands.items()}
    for name, command in commands.items():
        section = re.split(r"\n##+ ", text.split(f"# `gdn2-edge {name}`\n")[1])[0]
        options = {option for parameter in command.params for option in parameter.opts if option.startswith("--")}
        documented = set(re.findall(r"^\* `(--[a-z-]+)", section, re.MULTILINE))
        assert documented == options | {"--help"}, name
