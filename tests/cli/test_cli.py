"""The commands as a user types them, in this process; what they print and how they end."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gdn2_edge import cli
from gdn2_edge.cli.terminal import Talk, _command, faster_here
from gdn2_edge.errors import SessionError
from gdn2_edge.export.onnx import export_onnx
from gdn2_edge.generate.session import Session
from gdn2_edge.loading import load, model_path
from gdn2_edge.model import Model, load_model

GOLDEN = Path(__file__).parents[1] / "golden"


class Ran:
    """What one command did."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def command(*arguments: str | Path) -> Ran:
        monkeypatch.setattr(sys, "argv", ["gdn2-edge", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        captured = capsys.readouterr()
        return Ran(int(end.value.code or 0), captured.out, captured.err)

    return command


def test_inspect(run) -> None:
    done = run("inspect", "tiny")
    assert done.code == 0
    assert "23,643,056" in done.out
    assert "8 x gdn2" in done.out
    assert "chat template" in done.out


def test_inspect_json_loads_no_weights(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gdn2_edge.checkpoint.files.SafetensorsFiles.read", None)
    facts = json.loads(run("inspect", "tiny", "--json").out)
    assert facts["parameters"] == 23_643_056
    assert sum(part["parameters"] for part in facts["parts"].values()) == facts["parameters"]
    assert facts["state_bytes"] == 8 * (6 * 64 * 64 + 3 * 6 * 64 * 3) * 4 + 8
    assert facts["tokenizer"] == {"tokens": 8192, "chat_template": True}


def test_inspect_of_exports(run, tmp_path: Path) -> None:
    pytest.importorskip("onnx", reason="the extra onnx is not installed")
    pytest.importorskip("gguf", reason="the extra gguf is not installed")
    run("export", "onnx", "tiny", "--out", tmp_path / "onnx")
    run("export", "gguf", "tiny", "--type", "q8_0", "--out", tmp_path / "tiny.gguf")
    whole = json.loads(run("inspect", "tiny", "--json").out)
    for path, kind in ((tmp_path / "onnx", "ONNX export"), (tmp_path / "tiny.gguf", "GGUF file for llama.cpp")):
        facts = json.loads(run("inspect", path, "--json").out)
        assert facts["kind"] == kind
        assert all(facts[name] == whole[name] for name in ("spec", "tokenizer", "state_bytes", "parameters"))
    assert 8.5 < facts["bits_per_weight"] < 8.6


def test_advice_of_what_is_faster_here(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    assert "gdn2-edge export " in faster_here(load("tiny", "cpu"))
    export_onnx(model_path("tiny"), tmp_path / "onnx")
    assert faster_here(load(tmp_path / "onnx", "cpu")) == ""


def test_a_talk_loses_no_conversation_to_a_command(tiny: Model, tmp_path: Path) -> None:
    earlier = Session(tiny)
    list(earlier.send("Hello!", 3))
    earlier.save(tmp_path / "earlier.session")
    talk = Talk(Session(tiny), None, {}, contextlib.ExitStack(), max_tokens=3)
    list(talk.answer("My code is 418."))
    fed = talk.session.position
    for line, words in (
        (f"/load {tmp_path / 'earlier.session'}", "kept nowhere. /save FILE"),
        ("/undo all", "/undo takes nothing after it, found 'all'"),
        ("/reset now", "/reset takes nothing"),
        ("/load", "/load needs a file name"),
    ):
        with pytest.raises(SessionError, match=re.escape(words)):
            _command(talk, line)
        assert talk.session.position == fed
    _command(talk, f"/save {tmp_path / 'kept.session'}")
    _command(talk, f"/load {tmp_path / 'earlier.session'}")
    assert talk.session.position == earlier.position
    talk.close()


def test_inspect_says_what_a_training_file_does_not(run) -> None:
    done = run("inspect", GOLDEN / "hybrid-model-ckpt.pth")
    assert done.code == 1
    assert "does not say sliding_window, num_attention_heads" in done.err
    done = run("inspect", GOLDEN / "hybrid-model-ckpt.pth", "--config", GOLDEN / "hybrid.json")
    assert done.code == 0
    assert "2 x (gdn2, sliding_attention)" in done.out


def test_convert_with_nothing_else_said_meets_the_golden(run, tmp_path: Path) -> None:
    done = run("convert", GOLDEN / "recurrent-model-ckpt.pth", "--out", tmp_path / "X")
    assert done.code == 0
    assert "719,785 parameters" in done.out
    golden = load_file(GOLDEN / "recurrent-golden.safetensors")
    logits, _ = load_model(tmp_path / "X", dtype=torch.float32).forward(golden["input_ids"].long())
    assert float((logits - golden["logits"]).abs().max() / golden["logits"].std()) < 5e-5


def test_a_plan_is_of_what_can_be_written(run, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "notes.txt").touch()
    for options in ((), ("--dry-run",)):
        done = run("quantize", "tiny", "--format", "int8", "--out", tmp_path / "there", *options)
        assert (done.code, done.out) == (1, "")
        assert "there exists. Choose another --out" in done.err
    done = run("quantize", "tiny", "--format", "int8", "--out", tmp_path / "there", "--force", "--dry-run")
    assert "not a folder that gdn2-edge made" in done.err


def test_quantize_prints_a_plan_and_a_report(run, tmp_path: Path) -> None:
    out = tmp_path / "tiny-int4"
    done = run("quantize", "tiny", "--format", "int4", "--group-size", "128", "--out", out, "--dry-run")
    assert done.code == 0
    assert "int4 g128" in done.out
    assert "kept at int8" in done.out
    assert not out.exists()
    done = run("quantize", "tiny", "--format", "int4", "--out", out, "--json")
    report = json.loads(done.out)
    assert report["bits_per_weight"] == pytest.approx(8 * report["bytes_after"] / report["parameters"])
    assert all(t["relative_error"] < 0.15 for t in report["tensors"])
    assert run("quantize", "tiny", "--format", "int4", "--out", out).err.startswith(f"error: {out} exists.")
    assert run("quantize", "tiny", "--format", "int8", "--out", out, "--force", "--quiet").code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantize", "tiny", "--out", "x"], "--format"),
        (["quantize", "tiny", "--out", "x", "--format", "int8", "--group-size", "32"], "--group-size is for int4"),
        (["chat", "--temperature", "-1", "--once", "x"], "--temperature"),
        (["chat", "--dtype", "fp7", "--once", "x"], "--dtype"),
        (["chat", "--max-tokens", "0", "--once", "x"], "max-tokens"),
        (["chat", "--json"], "--json needs"),
        (["chat", "--no-such-option"], "No such option"),
        (["fly"], "No such command"),
    ],
)
def test_wrong_usage_exits_with_2(run, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    done = run(*arguments)
    assert done.code == 2
    assert message in done.err


def test_chat_once(run) -> None:
    done = run("chat", "--once", "My name is Ada. What is my name?")
    assert done.code == 0
    assert "Ada" in done.out
    assert "tokens/s" in done.err
    assert "state 0.9 MB" in done.err
    quiet = run("chat", "--once", "My name is Ada. What is my name?", "--quiet")
    assert (quiet.out, quiet.err) == (done.out, "")


def test_chat_json(run) -> None:
    facts = json.loads(run("chat", "--once", "My name is Ada. What is my name?", "--json").out)
    assert "Ada" in facts["answer"]
    assert facts["answer_tokens"] > 1
    assert facts["state_bytes"] < 1e6


def test_chat_keeps_a_session(run, tmp_path: Path) -> None:
    file = tmp_path / "ada.session"
    assert run("chat", "--session", file, "--once", "My name is Ada.").code == 0
    assert "Ada" in run("chat", "--session", file, "--once", "What is my name?").out
    assert [path.name for path in tmp_path.iterdir()] == ["ada.session"]
    done = run("chat", "--session", file, "--system", "Be brief.", "--once", "x")
    assert done.code == 1
    assert "--system is for a new session" in done.err


def test_chat_in_three_processes_and_from_a_pipe(tmp_path: Path) -> None:
    def chat(prompt: str) -> str:
        command = [sys.executable, "-m", "gdn2_edge", "chat", "--session", str(tmp_path / "s"), "--quiet"]
        done = subprocess.run(command, input=prompt, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    chat("Remember that my door code is 418.")
    chat("Correction: My door code is 773.")
    answer = chat("What is my door code?")
    assert "773" in answer
    assert "418" not in answer


def test_an_empty_pipe_is_wrong_usage() -> None:
    command = [sys.executable, "-m", "gdn2_edge", "chat"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "holds no prompt" in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_the_program_is_still_imported(sent: signal.Signals, code: int, tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text(f"import os, time\nos.kill(os.getpid(), {int(sent)})\ntime.sleep(30)\n")
    search = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "gdn2_edge", "--version"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": search}, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")


def test_version_and_debug(run) -> None:
    assert run("--version").out.strip() == "0.1.0"
    plain, debug = run("inspect", "nowhere"), run("--debug", "inspect", "nowhere")
    assert plain.err.count("\n") == 1
    assert "Traceback" in debug.err
