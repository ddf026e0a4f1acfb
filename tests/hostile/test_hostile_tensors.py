"""Tensors that do not fit the model that config.json describes, or hold what no model holds."""

from __future__ import annotations

from pathlib import Path

import inputs
import pytest
import torch
from inputs import INF, NAN, Change, Refused, added, dropped, filled, resized, retyped
from torch import Tensor

SHAPES = {
    "embed.weight": (321, 128),
    "lm_head.weight": (320, 127),
    "layers.0.norm_1.weight": (129,),
    "layers.0.q_proj.weight": (97, 128),
    "layers.0.v_proj.weight": (95, 128),
    "layers.1.b_proj.weight": (128, 96),
    "layers.1.w_proj.weight": (96 * 128,),
    "layers.1.f_proj.1.weight": (96, 31),
    "layers.1.q_conv1d.weight": (96, 4),
    "layers.2.v_conv1d.weight": (96, 1, 5),
    "layers.2.A_log": (),
    "layers.2.dt_bias": (0,),
    "layers.2.g_proj.1.bias": (96, 1),
    "layers.2.o_norm.weight": (33,),
    "layers.2.w3.weight": (320, 128),
    "ln_f.weight": (128, 128),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shape(name: str, models: Path, tmp_path: Path, refused_by_all: Refused) -> None:
    folder = inputs.copied(models / "dense", tmp_path / "model")
    inputs.with_tensors(folder, resized(name, *SHAPES[name]))
    refused_by_all(folder, f"{name} is {SHAPES[name]}, the spec says (")


MISFITS = {
    "missing": ("dense", dropped("layers.1.A_log"), "layers.1.A_log is missing"),
    "extra": ("dense", added(extra=torch.zeros(1)), "extra is not part of the model"),
    "extra layer": ("dense", added(layers__3__A_log=torch.zeros(3)), "layers.3.A_log is not part of the model"),
    "integers": ("dense", retyped("embed.weight", torch.int32), "embed.weight int32 is not a known weight format"),
    "doubles": ("dense", retyped("embed.weight", torch.float64), "float64 is not a known weight format"),
    "int8 without scale": ("int8", dropped("embed.weight_scale"), "is not a known weight format"),
    "scale without int8": ("int8", dropped("embed.weight"), "embed.weight_scale float32 is not a known"),
    "scale of another shape": (
        "int8",
        resized("embed.weight_scale", 320),
        "embed.weight_scale is (320,), the spec says (320, 1)",
    ),
    "scale of another dtype": ("int8", retyped("embed.weight_scale", torch.float16), "expected (320, 1) torch.float32"),
    "scale of a dense tensor": ("dense", added(embed__weight_scale=torch.zeros(320, 1)), "not a known weight format"),
    "int8 vector": (
        "dense",
        added(layers__0__A_log=torch.zeros(3, dtype=torch.int8), layers__0__A_log_scale=torch.ones(3, 1)),
        "layers.0.A_log",
    ),
    "int4 shape missing": ("int4", dropped("layers.0.q_proj.weight_shape"), "is not a known weight format"),
    "int4 shape of another size": ("int4", resized("layers.0.q_proj.weight_shape", 3), "q_proj.weight_shape"),
    "int4 too narrow": (
        "int4",
        resized("layers.0.q_proj.weight_packed", 96, 15),
        "q_proj.weight_packed is (96, 15), the spec says (96, 16)",
    ),
    "int4 flat": ("int4", resized("layers.0.q_proj.weight_packed", 96 * 16), "q_proj.weight"),
    "int4 scale of no groups": ("int4", resized("layers.0.q_proj.weight_scale", 96, 0), "q_proj.weight_scale"),
    "int4 scale of odd groups": ("int4", resized("layers.0.q_proj.weight_scale", 96, 3), "does not divide"),
    "int4 scale of tiny groups": ("int4", resized("layers.0.q_proj.weight_scale", 96, 128), "q_proj.weight_scale"),
    "fp8 without scale": ("fp8", dropped("embed.weight_scale"), "is not a known weight format"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_stored_tensors(name: str, models: Path, tmp_path: Path, refused_by_all: Refused) -> None:
    model, change, words = MISFITS[name]
    folder = inputs.copied(models / model, tmp_path / "model")
    inputs.with_tensors(folder, change)
    refused_by_all(folder, words)


def fp8_code(code: int) -> Change:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["embed.weight"].view(torch.uint8)[0, 0] = code

    return change


LIES = {
    "int4 shape": (
        "int4",
        lambda tensors: tensors["layers.0.q_proj.weight_shape"].fill_(2**40),
        "q_proj.weight_shape says",
    ),
    "int8 scale NaN": ("int8", filled("embed.weight_scale", NAN), "embed.weight_scale holds values that are not"),
    "fp8 scale infinite": ("fp8", filled("embed.weight_scale", INF), "embed.weight_scale holds values that are not"),
    "int4 scale NaN": ("int4", filled("layers.0.q_proj.weight_scale", NAN), "q_proj.weight_scale holds values"),
    "weights NaN": ("dense", filled("layers.1.o_proj.weight", NAN), "logits are not finite"),
    "fp8 code NaN": ("fp8", fp8_code(0x7F), "embed.weight holds values that are not finite"),
    "fp8 code -NaN": ("fp8", fp8_code(0xFF), "embed.weight holds values that are not finite"),
    "weights infinite": ("dense", filled("lm_head.weight", INF, 0), "logits are not finite"),
    "decay NaN": ("hybrid", filled("layers.0.A_log", NAN), "logits are not finite"),
    "attention NaN": ("hybrid", filled("layers.1.k_proj.weight", NAN), "logits are not finite"),
}


@pytest.mark.parametrize("name", LIES)
def test_values_when_chatting(name: str, models: Path, tmp_path: Path, refused: Refused) -> None:
    model, change, words = LIES[name]
    folder = inputs.copied(models / model, tmp_path / "model")
    inputs.with_tensors(folder, change)
    refused("chat", folder, "--once", "hi", "--session", tmp_path / "a.session", words=words)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("tensor", ["embed.weight", "layers.2.dt_bias", "lm_head.weight"])
def test_values_when_writing(value: float, tensor: str, models: Path, tmp_path: Path, refused: Refused) -> None:
    folder = inputs.copied(models / "dense", tmp_path / "model")
    inputs.with_tensors(folder, filled(tensor, value))
    words = f"{tensor} holds values that are not finite"
    refused("convert", folder, "--out", tmp_path / "new" / "deep" / "out", words=words)
    for format in ("int8", "fp8", "int4"):
        refused("quantize", folder, "--format", format, "--out", tmp_path / "new" / "out", words=words)


def test_values_too_large_for_the_dtype(models: Path, tmp_path: Path, refused: Refused) -> None:
    folder = inputs.copied(models / "dense", tmp_path / "model")
    inputs.with_tensors(folder, filled("embed.weight", 1e6))
    refused("convert", folder, "--dtype", "fp16", "--out", tmp_path / "out", words=("embed.weight", "fp16"))
