"""Files of torch.save: pickles that want more than tensors, and tensors that are none."""

from __future__ import annotations

import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import inputs
import pytest
import torch
from inputs import HYBRID_CONFIG, HYBRID_PTH, NAN, RECURRENT_PTH, Refused, Words, added, dropped
from torch import Tensor


def save_to(value: Any, **options: Any) -> Callable[[Path], object]:
    return lambda path: torch.save(value, path, **options)


def changed(change: inputs.Change, source: Path = RECURRENT_PTH) -> Callable[[Path], object]:
    return lambda path: inputs.pth(path, change, source)


def sliced(share: float) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(RECURRENT_PTH.read_bytes()[: int(RECURRENT_PTH.stat().st_size * share)])


def repacked(path: Path) -> None:
    """The same archive, compressed: a few bytes of it may become as many as they like."""
    with zipfile.ZipFile(RECURRENT_PTH) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))


def other_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "<w:document/>")


def set_to(name: str, make: Callable[[Tensor], Any]) -> inputs.Change:
    return lambda tensors: tensors.update({name: make(tensors[name])})


def two_spellings(tensors: dict[str, Tensor]) -> None:
    tensors["model.embed_tokens.weight"] = tensors["transformer.wte.weight"]


WTE = "transformer.wte.weight"
A_LOG = "transformer.h.0.attn.A_log"
NOT_TORCH = "is not a whole file of torch.save's zip format"
NOT_DENSE = "expected a dense tensor"
TORCH_FILES: dict[str, tuple[Callable[[Path], object], Words]] = {
    "a class of somebody's own": (save_to({"model": inputs.Custom()}), ("it could run code", "torch.save(")),
    "a whole model": (save_to(torch.nn.Linear(2, 2)), "it could run code"),
    "the old format": (
        save_to({"a": torch.zeros(2)}, _use_new_zipfile_serialization=False),
        NOT_TORCH,
    ),
    "cut to nothing": (sliced(0), NOT_TORCH),
    "cut early": (sliced(0.01), NOT_TORCH),
    "cut late": (sliced(0.999), NOT_TORCH),
    "text": (lambda path: path.write_text("hello"), NOT_TORCH),
    "another zip": (other_zip, NOT_TORCH),
    "compressed": (repacked, "compressed"),
    "a list": (save_to([torch.zeros(2)]), ("holds a list", "expected a state dict")),
    "a number": (save_to(3), "holds a int, expected a state dict"),
    "an empty dict": (save_to({}), "expected a state dict"),
    "an empty state dict": (save_to({"model": OrderedDict()}), "expected a state dict"),
    "keys that are numbers": (save_to({"model": {1: torch.zeros(2)}}), "a key is a int, expected the name"),
    "a petabyte of zeros": (save_to({"model": inputs.Zeros(10**15)}), "makes a bytearray"),
    "values that are text": (save_to({"model": {"a": "b"}}), ("a is a str", NOT_DENSE)),
    "10^15 elements of one": (
        changed(set_to(WTE, lambda t: torch.zeros(1).expand(10**6, 10**9))),
        ("claims", "holds 4"),
    ),
    "the right shape of one element": (changed(set_to(WTE, lambda t: torch.zeros(1).expand(320, 128))), "claims"),
    "sparse": (changed(set_to(WTE, lambda t: t.to_sparse())), NOT_DENSE),
    "quantized": (changed(set_to(WTE, lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8))), "qint8"),
    "complex": (changed(set_to(WTE, lambda t: t.to(torch.complex64))), "complex64"),
    "integers": (changed(set_to(WTE, lambda t: t.to(torch.int64))), "int64 is not a known weight format"),
    "on no device": (changed(set_to(WTE, lambda t: t.to("meta"))), NOT_DENSE),
    "a scalar": (changed(set_to(WTE, lambda t: t[0, 0].clone())), "embed.weight is ()"),
    "empty": (changed(set_to(WTE, lambda t: torch.zeros(0, 128))), "embed.weight is (0, 128)"),
    "NaN": (changed(set_to(WTE, lambda t: torch.full_like(t, NAN))), "not finite"),
    "missing": (changed(dropped(A_LOG)), "layers.0.A_log is missing"),
    "extra": (changed(added(extra=torch.zeros(1))), ("extra", "not part of a GDN-2 model")),
    "a name of two lines": (changed(added(**{"a\nb\r": torch.zeros(1)})), "not part of a GDN-2 model"),
    "two names of one tensor": (changed(two_spellings), "are both embed.weight"),
    "ten thousand layers": (
        changed(added(layers__9999__A_log=torch.zeros(3))),
        "there is a layer 9999, but no layer 3",
    ),
    "no GDN-2 layer": (save_to({"model": {"transformer.wte.weight": torch.zeros(4, 4)}}), "no layer has A_log"),
}


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation:UserWarning")
@pytest.mark.parametrize("name", TORCH_FILES)
def test_torch_file(name: str, tmp_path: Path, refused: Refused) -> None:
    build, words = TORCH_FILES[name]
    path = tmp_path / "model-ckpt.pth"
    build(path)
    refused("convert", path, "--out", tmp_path / "out", words=words)


@pytest.mark.parametrize("place", ["alone", "as the state dict", "among the tensors", "beside the tensors"])
def test_pickle_that_runs_code(place: str, tmp_path: Path, refused: Refused) -> None:
    bomb, path = inputs.RunsCode(tmp_path / "it ran"), tmp_path / "model-ckpt.pth"
    good = inputs.state_dict()
    torch.save(
        {
            "alone": bomb,
            "as the state dict": {"model": bomb},
            "among the tensors": {"model": good | {"transformer.extra": bomb}},
            "beside the tensors": {"model": good, "optimizer": bomb},
        }[place],
        path,
    )
    refused("convert", path, "--out", tmp_path / "out", words="it could run code", apart=place == "alone")
    refused("inspect", path, words="it could run code")
    assert not bomb.path.exists()


def test_fla_names_do_not_say_the_output_gate(tmp_path: Path, refused: Refused) -> None:
    path = tmp_path / "model.pth"
    torch.save(inputs.fla_names(inputs.state_dict()), path)
    words = ("does not say output_gate", "--output-gate silu|sigmoid")
    refused("convert", path, "--out", tmp_path / "out", words=words)


def test_fla_names_of_a_hybrid_with_scalars(tmp_path: Path, refused: Refused) -> None:
    path, tensors = tmp_path / "model.pth", inputs.fla_names(inputs.state_dict(HYBRID_PTH))
    fused = tensors.pop("model.layers.1.attn.attn.weight")
    for name in ("q", "k", "v"):
        tensors[f"model.layers.1.attn.{name}_proj.weight"] = fused[0, 0].clone()
    torch.save(tensors, path)
    command = ["convert", path, "--output-gate", "silu", "--config", HYBRID_CONFIG, "--out", tmp_path / "out"]
    refused(*command, words="layers.1.k_proj.weight is ()")
