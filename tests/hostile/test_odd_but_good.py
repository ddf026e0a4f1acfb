"""What looks hostile and is not: it must work."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import inputs
import pytest
import torch
from inputs import RECURRENT_PTH, SESSION, TENSORS, Change
from safetensors.torch import load_file
from torch import Tensor

import gdn2_edge.checkpoint.writer
from gdn2_edge.cli import main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> Run:
    def command(*argv: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gdn2-edge", *map(str, argv)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), *capsys.readouterr()

    return command


def tied(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]


def parameters(tensors: dict[str, Tensor]) -> None:
    tensors.update({name: torch.nn.Parameter(tensor) for name, tensor in tensors.items()})


def transposed(tensors: dict[str, Tensor]) -> None:
    tensors.update({name: t.t().contiguous().t() for name, t in tensors.items() if t.ndim == 2})


def views(tensors: dict[str, Tensor]) -> None:
    tensors.update({name: torch.cat([t, t])[len(t) :] for name, t in tensors.items()})


@pytest.mark.parametrize("change", [tied, parameters, transposed, views])
def test_torch_files(change: Change, tmp_path: Path, run: Run) -> None:
    path = inputs.pth(tmp_path / "model.pth", change)
    code, _, said = run("convert", path, "--out", tmp_path / "out")
    assert code == 0, said
    expected = inputs.state_dict()
    change(expected)
    found = load_file(tmp_path / "out" / TENSORS)
    assert torch.equal(found["lm_head.weight"], expected["lm_head.weight"])
    assert torch.equal(found["layers.1.q_proj.weight"], expected["transformer.h.1.attn.q_proj.weight"])


def test_half_a_character(models: Path, tmp_path: Path, run: Run) -> None:
    said = [{"role": "user", "content": "\ud800"}]
    file = inputs.with_session(models / SESSION, tmp_path / "a.session", transcript=said)
    for _ in range(2):
        command = ["chat", models / "dense", "--once", "caf\udce9", "--max-tokens", 2, "--session", file, "--json"]
        code, answer, said_instead = run(*command)
        assert code == 0, said_instead
        assert json.loads(answer)["answer_tokens"] <= 2


def test_stopped_between_the_tensors_and_the_config(
    models: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    command = ["quantize", models / "dense", "--format", "int8", "--out", tmp_path / "out"]
    with monkeypatch.context() as patch:
        patch.setattr(gdn2_edge.checkpoint.writer, "_write_extras", stop)
        code, _, said = run(*command)
        assert (code, [path.name for path in tmp_path.iterdir()]) == (130, [".out.partial"])
        assert "run the same quantize again" in said
    code, shown, said = run(*command)
    assert code == 0, said
    assert "bits per weight" in shown
    assert (tmp_path / "out" / TENSORS).read_bytes() == (models / "int8" / TENSORS).read_bytes()


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"identity": 1, "shards": 7}'])
def test_damaged_record_of_an_earlier_run(content: bytes, tmp_path: Path, run: Run) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "progress.json").write_bytes(content)
    code, _, said = run("convert", RECURRENT_PTH, "--out", tmp_path / "out")
    assert code == 0, said
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
