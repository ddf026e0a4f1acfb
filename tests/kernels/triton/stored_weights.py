"""Random weights in every stored layout, for the tests of kernels that read them."""

from __future__ import annotations

from dataclasses import replace

import torch

from gdn2_edge.quantize.fp8 import encode_fp8
from gdn2_edge.quantize.int4 import encode_int4
from gdn2_edge.quantize.int8 import encode_int8
from gdn2_edge.weights import Dense, Fp8, Int4, Int8, Weight

FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FORMATS = (*FLOATS, "fp8", "int8", "int4 g32", "int4 g64", "int4 g128")


def make_weight(format: str, rows: int, channels: int, device: torch.device, seed: int = 0) -> Weight:
    """Normal values [rows, channels] in a format of `FORMATS`; of int4 the channels are a multiple of the group."""
    values = torch.randn(rows, channels, generator=torch.Generator().manual_seed(seed))
    name, _, group = format.partition(" g")
    if name in FLOATS:
        return Dense(format, values.to(FLOATS[name]).to(device))
    if name == "int4":
        return moved(encode_int4(format, values, int(group)), device)
    return moved(encode_fp8(format, values) if name == "fp8" else encode_int8(format, values), device)


def moved(weight: Fp8 | Int4 | Int8, device: torch.device) -> Weight:
    return replace(weight, data=weight.data.to(device), scale=weight.scale.to(device))
