"""int8: one scale a row, codes -127..127, round to nearest."""

from __future__ import annotations

import torch
from torch import Tensor

from gdn2_edge.weights import Int8


def encode_int8(name: str, values: Tensor) -> Int8:
    """scale = max|row| / 127 (1 for a row of zeros); codes = round(values / scale). values fp32 [O, I]."""
    scale = values.abs().amax(1, keepdim=True) / 127
    scale = torch.where(scale > 0, scale, 1.0)
    return Int8(name, (values / scale).round_().clamp_(-127, 127).to(torch.int8), scale)
