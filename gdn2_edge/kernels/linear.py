"""Products with weights in their stored form: nothing is expanded but a tile that fits in a cache.

Knows the layouts of `gdn2_edge.weights` and which products this torch build does well on a CPU. The exact path,
which every layout and device has, expands `TILE_BYTES` of rows at a time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gdn2_edge.kernels import torch_private
from gdn2_edge.kernels.torch_private import Int4Blocked, Int8Packed
from gdn2_edge.weights import Dense, Int4, Int8, Joined, Weight

# fp32 bytes expanded at a time: at 2048 x 2304, 1 MiB was faster than 256 KiB and 4 MiB on a CPU with 2 MiB of L2.
TILE_BYTES = 1 << 20


def linear(x: Tensor, weight: Weight, bias: Weight | None = None) -> Tensor:
    """x W^T + bias.

    Args:
        x: [..., in_features], fp32, bf16 or fp16.
        weight: [out_features, in_features] in any layout.
        bias: [out_features].
    Returns:
        [..., out_features] in x's dtype.
    """
    y = _product(x.reshape(-1, x.shape[-1]), weight)
    if bias is not None:
        y = y + bias.rows(slice(None))
    return y.to(x.dtype).view(*x.shape[:-1], weight.shape[0])


def prepare(weight: Weight) -> Weight:
    """The layout this machine multiplies fastest, of the same values. int4 also gets a zero beside each scale."""
    if isinstance(weight, Joined):
        return Joined(weight.name, tuple(prepare(part) for part in weight.parts))
    if isinstance(weight, Int8) and weight.data.device.type == "cpu":
        return torch_private.pack_int8(weight)
    if isinstance(weight, Int4) and weight.data.device.type == "cpu":
        return torch_private.block_int4(weight)
    return weight


def _product(x: Tensor, weight: Weight) -> Tensor:
    """[M, I] x [O, I] -> [M, O]."""
    match weight:
        case Joined(parts=parts):
            return torch.cat([_product(x, part) for part in parts], -1)
        case Dense(data=data) if data.dtype == x.dtype:
            return F.linear(x, data)
        case Dense(data=data) if data.device.type != "cpu":
            return F.linear(x, data.to(x.dtype))
        case Int8Packed():
            return torch_private.int8_product(x, weight)
        case Int4Blocked():
            return torch_private.int4_product(x, weight)
        case Int8() if weight.data.device.type == "cpu":
            y = torch_private.bf16_int8_product(x, weight)
            return _by_tiles(x, weight) if y is None else y
    return _by_tiles(x, weight)


def _by_tiles(x: Tensor, weight: Weight) -> Tensor:
    """The product in fp32 with the weight's exact values, a tile of rows at a time."""
    x = x.float()
    out_features, in_features = weight.shape
    rows = max(1, TILE_BYTES // (4 * in_features))
    if rows >= out_features:
        return F.linear(x, weight.rows(slice(None)))
    y = x.new_empty(x.shape[0], out_features)
    for start in range(0, out_features, rows):
        tile = slice(start, min(start + rows, out_features))
        y[:, tile] = F.linear(x, weight.rows(tile))
    return y
