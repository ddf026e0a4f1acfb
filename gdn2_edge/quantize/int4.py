"""int4: groups of 32, 64 or 128 along a row, symmetric codes -8..7, a bf16 scale each, found by a clip search."""

from __future__ import annotations

import torch
from torch import Tensor

from gdn2_edge.weights import Int4, pack_int4

# Scales tried, as a fraction of the one that reaches the group's largest value; the least squared error wins.
CLIP_FRACTIONS = tuple(1.0 - 0.025 * i for i in range(17))


def encode_int4(name: str, values: Tensor, group_size: int) -> Int4:
    """For each group the scale, among `CLIP_FRACTIONS` of max|group| / 7, with the least squared rounding error.

    values: fp32 [O, I], I a multiple of `group_size`.
    """
    groups = values.unflatten(1, (-1, group_size))
    largest = groups.abs().amax(-1) / 7
    largest = torch.where(largest > 0, largest, 1.0)
    best_error = torch.full_like(largest, torch.inf)
    best_scale = largest
    for fraction in CLIP_FRACTIONS:
        scale = (largest * fraction).bfloat16().float()
        rounded = _codes(groups, scale).mul_(scale.unsqueeze(-1))
        error = rounded.sub_(groups).square_().sum(-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
    codes = _codes(groups, best_scale).flatten(1)
    return Int4(name, pack_int4(codes.to(torch.int8)), best_scale.bfloat16())


def _codes(groups: Tensor, scale: Tensor) -> Tensor:
    return (groups / scale.unsqueeze(-1)).round_().clamp_(-8, 7)
