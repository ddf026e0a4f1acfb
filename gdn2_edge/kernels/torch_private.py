"""The products that torch has for low bits on a CPU but does not document: all of them are in this file.

Each is tried once, on numbers that would show a wrong result, before it is used; where it is missing, wrong or slow
by construction, the caller's exact path is taken. Seen with torch 2.13: oneDNN's int8 products are exact with AMX,
AVX512-VNNI and AVX-VNNI; without those instructions they saturate 16-bit sums and are wrong, so the trial uses the
largest codes. Activations go in as uint8 with a zero point: as int8 they take a path 100 times slower without AMX.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from operator import attrgetter

import torch
from torch import Tensor

from gdn2_edge.weights import Int4, Int8, unpack_int4

MAX_IN_FEATURES = 1 << 16  # times 255 * 127: what an int32 sum holds
ZERO_POINT = 128
# Above this many rows torch's bf16 x int8 product loses to expanding the weight a tile at a time; where 16 does not
# divide in_features, torch 2.13's reads beyond its rows and crashes.
BF16_INT8_MAX_ROWS = 8
BF16_INT8_MULTIPLE = 16


def _private(name: str) -> Callable[..., Tensor]:
    """A private function of torch by its dotted name; AttributeError where this build has none (oneDNN: x86 only)."""
    function: Callable[..., Tensor] = attrgetter(name)(torch)
    return function


@dataclass(frozen=True)
class Int8Packed:
    """An `Int8` in oneDNN's own order, which costs no reordering at each product; scale and zero_point are [O]."""

    name: str
    data: Tensor
    scale: Tensor
    zero_point: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.data.shape[1], self.data.shape[0])

    def rows(self, index: Tensor | slice) -> Tensor:
        return _integer_product(torch.eye(self.shape[1], dtype=torch.uint8) + ZERO_POINT, self).t()[index]

    def tensors(self) -> dict[str, Tensor]:
        return {"_packed": self.data, "_scale": self.scale, "_zero_point": self.zero_point}


def pack_int8(weight: Int8) -> Int8 | Int8Packed:
    """`weight` in the order that `int8_product` reads; unchanged where torch has no exact integer product here."""
    if weight.shape[1] > MAX_IN_FEATURES or not has_int8():
        return weight
    return _packed(weight)


def _packed(weight: Int8) -> Int8Packed:
    data = _private("ops.onednn.qlinear_prepack")(weight.data, None)
    zero_point = torch.zeros(weight.shape[0], dtype=torch.int64)
    return Int8Packed(weight.name, data, weight.scale.flatten(), zero_point)


def int8_product(x: Tensor, weight: Int8Packed) -> Tensor:
    """x W^T in integers: [M, in_features] -> [M, out_features] fp32.

    x becomes 16-bit fixed point, a scale for each row, as two 8-bit halves; the two integer products are exact, so
    the result of a row does not depend on the other rows or on any order.
    """
    x = x.float()
    step = x.abs().amax(-1, keepdim=True).clamp_min_(1e-30) / 32_512  # 127 * 256: both halves fit in 8 bits
    fixed = (x / step).round_().to(torch.int16)  # = 256 high + low, both in -128..127
    low = fixed.view(torch.uint8)[..., 0::2]
    high = (fixed + 128).view(torch.uint8)[..., 1::2]
    halves = torch.cat([high, low]).bitwise_xor_(ZERO_POINT)  # adds the zero point to a two's complement byte
    high_sum, low_sum = _integer_product(halves, weight).chunk(2)
    return torch.add(low_sum, high_sum, alpha=256.0).mul_(step)


def _integer_product(x: Tensor, weight: Int8Packed) -> Tensor:
    """x - 128, for uint8 x [M, I], times the weight: fp32 [M, O]. The sums of codes are exact integers."""
    product, w = _private("ops.onednn.qlinear_pointwise"), weight
    return product(x, 1.0, ZERO_POINT, w.data, w.scale, w.zero_point, None, 1.0, 0, torch.float32, "none", [], "")


@cache
def has_int8() -> bool:
    """Whether oneDNN's int8 product is here and exact: it is where the CPU has integer dot products."""
    try:
        x = torch.tensor([[255, 0, 255, 255]], dtype=torch.uint8).repeat(2, 32)
        codes = torch.tensor([[-127], [127]], dtype=torch.int8).repeat(32, 128)
        packed = _packed(Int8("", codes, torch.ones(64, 1)))
        expected = (x.double() - ZERO_POINT) @ codes.double().t()
        return torch.equal(_integer_product(x, packed).double(), expected)
    except (AttributeError, RuntimeError):
        return False


def bf16_int8_product(x: Tensor, weight: Int8) -> Tensor | None:
    """x W^T for a few rows, x and the result rounded to bf16: [M, I] -> [M, O] fp32; None where torch cannot."""
    if x.shape[0] > BF16_INT8_MAX_ROWS or x.shape[1] % BF16_INT8_MULTIPLE or not has_bf16_int8():
        return None
    one = torch.ones(weight.shape[0], dtype=torch.bfloat16)
    return _private("_weight_int8pack_mm")(x.bfloat16(), weight.data, one).float().mul_(weight.scale.view(-1))


@cache
def has_bf16_int8() -> bool:
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
    if out_features % BLOCK_ROWS or weight.group_size not in (32, 64, 128, 256) or not has_int4():
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
