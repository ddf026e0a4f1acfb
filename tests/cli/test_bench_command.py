"""`gdn2-edge bench` as a user types it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from gdn2_edge import cli
from gdn2_edge.bench import machine
from gdn2_edge.model import Model

CONFIG = str(Path(__file__).parents[1] / "bench.json")
SHORT = ("--tokens", "10", "--prompt-tokens", "8", "--device", "cpu")


@pytest.fixture(autouse=True)
def _small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "CPU_READ_BYTES", 1 << 20)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def command(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gdn2-edge", "bench", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    return command


def test_table_of_the_default_model(run) -> None:
    code, out, err = run(*SHORT, "--batch", "2")
    assert (code, err) == (0, "")
    for words in ("tiny", "checked: logits within", "a token of 2 sequences", "prompt of 8", "GB/s", "first token"):
        assert words in out


def test_json_of_random_weights(run) -> None:
    random = ("--random", "--config", CONFIG, "--format", "int4", "--group-size", "32", "--seed", "3")
    code, out, _ = run(*random, *SHORT, "--prompt-tokens", "70", "--json", "--quiet")
    assert code == 0
    report = json.loads(out)
    assert set(report) == {
        *("model", "runtime", "device", "torch", "check", "first_token_seconds", "decode", "bandwidth", "batch"),
        *("prefill", "memory_bytes"),
    }
    assert report["batch"] is None
    assert [p["tokens"] for p in report["prefill"]] == [8, 70]
    assert set(report["bandwidth"]["bytes_per_token"]) == {"weights", "state", "kv"}
    assert report["decode"]["tokens"] == 10
    assert report["bandwidth"]["share_of_read_rate"] > 0


def test_a_wrong_model_gets_no_table(run, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments):
        logits, state = Model.prefill(*arguments)
        return -logits, state

    monkeypatch.setattr(Model, "step", lambda self, token, state: wrong(self, token[:, None], state))
    code, out, err = run("--random", "--config", CONFIG, *SHORT)
    assert (code, out) == (1, "")
    assert err.startswith("error: torch")
    assert "nothing was timed" in err
    assert err.count("\n") == 1


def test_ctrl_c(run, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("gdn2_edge.bench.measure_decode", stop)
    code, out, err = run("--random", "--config", CONFIG, *SHORT)
    assert (code, out) == (130, "")
    assert "Stopped" in err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--random"], 2, "--random needs --config"),
        (["tiny", "--random", "--config", CONFIG], 2, "not both"),
        (["--config", CONFIG], 2, "--config is for --random"),
        (["--format", "int8"], 2, "--format is for --random"),
        (["--seed", "1"], 2, "--seed is for --random"),
        (["--dtype", "fp7"], 2, "--dtype"),
        (["--tokens", "1"], 2, "--tokens"),
        (["--prompt-tokens", "0"], 2, "--prompt-tokens"),
        (["--random", "--config", CONFIG, "--format", "int3"], 1, "format is 'int3'"),
        (["--random", "--config", CONFIG, "--group-size", "32"], 1, "a group size is for int4"),
        (["--random", "--config", "nothing"], 1, "neither a file nor one of"),
        (["nowhere"], 1, "no such file or folder"),
        (["--device", "tpu"], 1, "device 'tpu'"),
    ],
)
def test_what_cannot_be_is_one_sentence(run, arguments: list[str], code: int, message: str) -> None:
    found, out, err = run(*arguments)
    assert (found, out) == (code, "")
    assert message in err
