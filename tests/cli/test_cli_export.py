"""`gdn2-edge export onnx` as a user types it: a folder, or the operator's library."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("onnx")

from gdn2_edge import cli
from gdn2_edge.errors import BackendError
from gdn2_edge.export.onnx.build_op import find_compiler


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["gdn2-edge", "export", "onnx", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_a_dry_run_says_what_would_be_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(monkeypatch, "tiny", "--out", tmp_path / "x", "--format", "int8", "--dry-run", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["format"] == "int8"
    assert "model.onnx" in report["files"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [[], ["tiny"], ["tiny", "--build-op"], ["--build-op", "--portable"]])
def test_what_does_not_go_together(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *arguments) == 2
    assert "--out" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_export_that_is_stopped_leaves_nothing(sent: signal.Signals, code: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gdn2_edge", "export", "onnx", "tiny", "--format", "int8"]
    with subprocess.Popen([*command, "--out", str(tmp_path / "new" / "x")], stderr=subprocess.PIPE) as process:
        while not list(tmp_path.glob("new/.x.*/quantized")) and not list(tmp_path.glob("new/.x.*/.quantized.partial")):
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(sent)
        _, said = process.communicate(timeout=60)
    assert process.returncode == code
    assert b"Traceback" not in said
    assert not list(tmp_path.iterdir())


def test_the_operators_library(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    try:
        find_compiler()
    except BackendError:
        pytest.skip("no C++ compiler here")
    assert run(monkeypatch, "--build-op", "--out", tmp_path / "op", "--json") == 0
    assert Path(json.loads(capsys.readouterr().out)["library"]).is_file()
