"""The products that torch has for low bits on a CPU but does not document: all of them are in this file.

Each is tried once, on numbers that would show a wrong result, before it is used; where it is missing, wrong or slow
by construction, the caller's exact path is taken. Seen with torch 2.13: without VNNI instructions `_int_mm`
saturates its 16-bit sums and is wrong, so the trial uses the largest codes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from gdn2_edge.weights import Int4, Int8, unpack_int4

# Above this many rows torch's bf16 x int8 product loses to expanding the weight a tile at a time.
INT8PACK_MAX_ROWS = 8
# Where this does not divide in_features, torch 2.13's bf16 x int8 product reads beyond its rows and crashes, and
# `_int_mm` misreads a matrix of one column.
INT8_IN_FEATURES_MULTIPLE = 16
INT8_MAX_IN_FEATURES = 1 << 17  # times 127 * 127, the largest sum that an int32 holds


def _private(name: str) -> Callable[..., Tensor]:
    """A private function of torch, which its type stubs do not list."""
    function: Callable[..., Tensor] = getattr(torch, name)
    return function


def int8_product(x: Tensor, weight: Int8) -> Tensor | None:
    """x W^T on a CPU, or None where torch has no good product.

    With VNNI or AMX: x becomes 16-bit fixed point, a scale for each row, as two int8 halves; two integer products
    are summed exactly, so that the result of a row does not depend on the other rows or on any order. Otherwise, for
    a few rows: torch's product of bf16 and int8, with x and the result rounded to bf16.

    Args:
        x: [M, in_features].
    Returns:
        [M, out_features] fp32.
    """
    if x.shape[1] % INT8_IN_FEATURES_MULTIPLE or x.shape[1] > INT8_MAX_IN_FEATURES:
        return None
    if has_int_mm():
        x = x.float()
        step = x.abs().amax(-1, keepdim=True).clamp_min_(1e-30) / 32_512  # 127 * 256: both halves fit in int8
        fixed = (x / step).round_().to(torch.int16)
        low = fixed.view(torch.int8)[..., 0::2]
        high = (fixed + 128).view(torch.int8)[..., 1::2]
        product = _private("_int_mm")(torch.cat([high, low]), weight.data.t())
        high_sum, low_sum = product.float().chunk(2)
        return high_sum.mul_(256.0).add_(low_sum).mul_(step).mul_(weight.scale.view(-1))
    if x.shape[0] <= INT8PACK_MAX_ROWS and has_int8pack():
        one = torch.ones(weight.shape[0], dtype=torch.bfloat16)
        y = _private("_weight_int8pack_mm")(x.bfloat16(), weight.data, one)
        return y.float().mul_(weight.scale.view(-1))
    return None


@cache
def has_int_mm() -> bool:
    """Whether `_int_mm` is exact here and runs on integer dot-product instructions."""
    try:
        supported: bool = torch.cpu._is_vnni_supported()
        a = torch.tensor([[127, -128]], dtype=torch.int8).repeat(2, 64)
        b = torch.full((64, 128), -127, dtype=torch.int8)
        exact = a.double() @ b.double().t()
        return supported and torch.equal(_private("_int_mm")(a, b.t()).double(), exact)
    except (AttributeError, RuntimeError):
        return False


@cache
def has_int8pack() -> bool:
    """Whether torch's bf16 x int8 product gives the expected numbers here."""
    try:
        x, w = torch.ones(1, 64, dtype=torch.bfloat16), torch.full((64, 64), 2, dtype=torch.int8)
        y = _private("_weight_int8pack_mm")(x, w, torch.ones(64, dtype=torch.bfloat16))
        return bool((y == 128).all())
    except (AttributeError, RuntimeError):
        return False


@dataclass(frozen=True)
class Int4Blocked:
    """An `Int4` in the block order of torch's CPU product; `scale_and_zero` is [groups, out_features, 2] bf16."""

    name: str
    data: Tensor
    scale_and_zero: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.data.shape[0], self.data.shape[1] * 2)

    @property
    def group_size(self) -> int:
        return self.shape[1] // self.scale_and_zero.shape[0]

    def rows(self, index: Tensor | slice) -> Tensor:
        one_and_zero = torch.tensor([1.0, 0.0], dtype=torch.bfloat16).expand_as(self.scale_and_zero).contiguous()
        codes = int4_product(torch.eye(self.shape[1]), replace(self, scale_and_zero=one_and_zero)).t()
        scale = self.scale_and_zero[..., 0].t().float().repeat_interleave(self.group_size, -1)
        return (codes * scale)[index]

    def tensors(self) -> dict[str, Tensor]:
        return {"_blocked": self.data, "_scale_and_zero": self.scale_and_zero}


BLOCK_ROWS = 64


def block_int4(weight: Int4) -> Int4 | Int4Blocked:
    """`weight` in the order that `int4_product` reads; unchanged where its shape does not fit."""
    out_features, _ = weight.shape
    if out_features % BLOCK_ROWS or weight.group_size not in (32, 64, 128, 256):
        return weight
    step = BLOCK_ROWS * 16  # bounds the int32 codes that the packing wants
    blocks = [
        _private("_convert_weight_to_int4pack_for_cpu")(unpack_int4(weight.data[i : i + step]).int() + 8, 1)
        for i in range(0, out_features, step)
    ]
    scale = weight.scale.t()
    return Int4Blocked(weight.name, torch.cat(blocks), torch.stack([scale, torch.zeros_like(scale)], -1).contiguous())


def int4_product(x: Tensor, weight: Int4Blocked) -> Tensor:
    """x W^T with x and the result rounded to bf16: [M, I] -> [M, O] fp32."""
    product = _private("_weight_int4pack_mm_for_cpu")
    return product(x.bfloat16(), weight.data, weight.group_size, weight.scale_and_zero).float()


@cache
def has_int4() -> bool:
    """Whether torch's CPU int4 product gives the expected numbers here."""
    try:
        codes = (torch.arange(64 * 64, dtype=torch.int32) % 16).view(64, 64)
        packed = _private("_convert_weight_to_int4pack_for_cpu")(codes, 1)
        scale = torch.stack([torch.full((2, 64), 0.5), torch.zeros(2, 64)], -1).bfloat16()
        x = torch.eye(64, dtype=torch.bfloat16)
        y = _private("_weight_int4pack_mm_for_cpu")(x, packed, 32, scale)
        return torch.equal(y.float(), (codes.t().float() - 8) * 0.5)
    except (AttributeError, RuntimeError):
        return False
