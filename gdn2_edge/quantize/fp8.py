"""fp8 (e4m3, finite): one scale a row, the largest value of a row at 448, round to nearest even."""

from __future__ import annotations

import torch
from torch import Tensor

from gdn2_edge.weights import FP8_MAX, Fp8


def encode_fp8(name: str, values: Tensor) -> Fp8:
    """scale = max|row| / 448 (1 for a row of zeros); codes = values / scale as e4m3. values fp32 [O, I]."""
    scale = values.abs().amax(1, keepdim=True) / FP8_MAX
    scale = torch.where(scale > 0, scale, 1.0)
    return Fp8(name, (values / scale).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale)
