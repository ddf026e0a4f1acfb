"""`gdn2-edge export gguf` as a user types it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("gguf", reason="the extra gguf is not installed")

from gdn2_edge import cli


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["gdn2-edge", "export", "gguf", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_a_dry_run_then_the_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "tiny.gguf"
    assert run(monkeypatch, "tiny", "--type", "q8_0", "--out", out, "--dry-run", "--json") == 0
    planned = json.loads(capsys.readouterr().out)
    assert not list(tmp_path.iterdir())
    assert run(monkeypatch, "tiny", "--type", "q8_0", "--out", out, "--json", "--quiet") == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == planned
    assert said.err == ""
    assert out.read_bytes()[:4] == b"GGUF"
    assert run(monkeypatch, "tiny", "--type", "q8_0", "--out", out) == 1
    assert "exists" in capsys.readouterr().err


def test_it_says_who_cannot_open_the_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(monkeypatch, "tiny", "--type", "q4_0", "--out", tmp_path / "x.gguf", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "would hold 23,643,056 parameters in q4_0" in said
    assert "Ollama and LM Studio cannot open it" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [["tiny"], ["tiny", "--type", "f32"], ["tiny", "--out", "x"]])
def test_what_must_be_said(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *arguments) == 2
    assert "Missing option" in capsys.readouterr().err
