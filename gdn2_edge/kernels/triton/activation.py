"""What flows between the kernels of a step for one sequence: values, and the same values as 16-bit fixed point.

Fixed point: blocks of 8 channels share a unit, x = (256 high + low) unit with a signed and an unsigned byte, in two
planes. Written by whoever computes x, so that no reader has to find a largest value first. It rounds to 2^-16 of the
largest of 8 neighbours, finer than fp16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn2_edge.kernels.triton.stored import dot4, weights_per_word

UNIT_BLOCK = tl.constexpr(8)


class Forms(NamedTuple):
    """Which forms of an activation its readers need: values for float weights, planes for integer ones."""

    values: bool
    planes: bool


BOTH_FORMS = Forms(True, True)


@dataclass(frozen=True)
class Activation:
    """What one kernel writes and the next reads, for K channels of one sequence.

    values: fp32 [split, K / split], channel c at [c % split, c // split]. high: int8 [K]. low: uint8 [K]. unit: fp32
    [K / 8]. squares: fp32, partial sums of squares before the norm's weight; [programs of the writer], or
    [heads, parts] where the norm is within heads. split: the weights that 32 bits of the reader's matrix hold, so that
    what meets the first, second .. weights of four words lies in 16 bytes; 1: values are in order.
    """

    values: Tensor
    high: Tensor
    low: Tensor
    unit: Tensor
    squares: Tensor
    split: int = 1


def make_activation(channels: int, squares: tuple[int, ...], device: torch.device, split: int = 1) -> Activation:
    """Buffers for an activation of `channels` (a multiple of 8)."""
    return Activation(
        values=torch.zeros(channels, device=device),
        high=torch.zeros(channels, dtype=torch.int8, device=device),
        low=torch.zeros(channels, dtype=torch.uint8, device=device),
        unit=torch.zeros(channels // 8, device=device),
        squares=torch.zeros(squares, device=device),
        split=split,
    )


@triton.jit
def write_activation(
    p_values,
    p_high,
    p_low,
    p_unit,
    x,
    start,
    end,
    channels,
    ROWS: tl.constexpr,
    VALUES: tl.constexpr,
    PLANES: tl.constexpr,
):
    """Write x [ROWS] for those of `channels` from `start` on and below `end`, all multiples of 8.

    VALUES and PLANES say which of the two forms a reader needs; VALUES is their split, or 0.
    """
    if VALUES > 0:
        o = start + tl.arange(0, ROWS)
        tl.store(p_values + place(o, channels, VALUES), x, o < end)
    if PLANES:
        _write_planes(p_high, p_low, p_unit, x, start, end, ROWS)


@triton.jit
def place(o, channels, SPLIT: tl.constexpr):
    """Where the values of channels o are."""
    if SPLIT == 1:
        return o
    else:
        return (o % SPLIT) * (channels // SPLIT) + o // SPLIT


@triton.jit
def _write_planes(p_high, p_low, p_unit, x, start, end, ROWS: tl.constexpr):
    BLOCKS: tl.constexpr = ROWS // UNIT_BLOCK
    WORDS: tl.constexpr = ROWS // 4
    blocks = x.reshape(BLOCKS, UNIT_BLOCK)
    # Without their signs, floats are in the order of their bits, and NaN is the largest: it goes on through the unit.
    largest = tl.max(blocks.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1).to(tl.float32, bitcast=True)
    unit = largest * (1.0 / 32767.0)
    inverse = 1.0 / tl.where(unit > 0, unit, 1.0)
    q = tl.floor(blocks * inverse[:, None] + 0.5).to(tl.int32).reshape(WORDS, 4)
    # Four bytes a word: the threads that hold them can store them.
    shift = (tl.arange(0, 4) * 8)[None, :]
    o = start // 4 + tl.arange(0, WORDS)
    inside = o * 4 < end
    tl.store(p_high.to(tl.pointer_type(tl.int32)) + o, tl.sum(((q >> 8) & 255) << shift, 1), inside)
    tl.store(p_low.to(tl.pointer_type(tl.int32)) + o, tl.sum((q & 255) << shift, 1), inside)
    tl.store(p_unit + o // 2, unit[:, None].broadcast_to(BLOCKS, 2).reshape(WORDS), inside)


@triton.jit
def _head_factor(p_squares, head, mask, eps, HEAD: tl.constexpr, PARTS: tl.constexpr):
    """The RMS factor of each head of a tensor of head indices."""
    squares = tl.zeros(head.shape, tl.float32)
    for i in tl.static_range(PARTS):
        squares += tl.load(p_squares + head * PARTS + i, mask, 0.0)
    return tl.rsqrt(squares / HEAD + eps)


@triton.jit
def load_values_of(
    p_values,
    p_squares,
    eps,
    K: tl.constexpr,
    SPLIT: tl.constexpr,
    FORMAT: tl.constexpr,
    NORM: tl.constexpr,
    HEAD: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """The input, fp32, for each chunk and weight of a word a tensor [vectors, BLOCK_N, 4], the same for all rows.

    It has the rows of a tile of weights so that the compiler gives both one layout: each thread then loads what its
    weights meet, 16 bytes at once, and nothing goes through shared memory.
    """
    PER_WORD: tl.constexpr = weights_per_word(FORMAT)
    VECTORS: tl.constexpr = BLOCK_K // (4 * PER_WORD)
    IN_HEAD: tl.constexpr = HEAD % (4 * PER_WORD) == 0  # a vector lies within a head
    no_row = tl.zeros((1, BLOCK_N, 1), tl.int32)
    chunks = ()
    for i in tl.static_range(CHUNKS):
        o_v = i * VECTORS + tl.arange(0, VECTORS)[:, None, None]
        o_w = o_v * 4 + tl.arange(0, 4)[None, None, :] + no_row
        mask = (o_v < K // (4 * PER_WORD)) & (no_row == 0)
        factor = 1.0
        if NORM == "heads":
            o_first = (o_v + no_row) * (4 * PER_WORD) if IN_HEAD else o_w * PER_WORD
            factor = _head_factor(p_squares, o_first // HEAD, mask, eps, HEAD, PARTS)
        for j in tl.static_range(PER_WORD):
            o = o_w + j * (K // PER_WORD) if SPLIT == PER_WORD else place(o_w * PER_WORD + j, K, SPLIT)
            chunks = chunks + (tl.load(p_values + o, mask, 0.0) * factor,)
    return chunks


@triton.jit
def load_planes(
    p_high,
    p_low,
    p_unit,
    p_squares,
    eps,
    K: tl.constexpr,
    FORMAT: tl.constexpr,
    NORM: tl.constexpr,
    HEAD: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNKS: tl.constexpr,
    ASM: tl.constexpr,
):
    """The input in fixed point, arranged as the codes of a word of weights are.

    A chunk for int8 takes three tensors [vectors of 16, BLOCK_N, 4], the same for all rows (see `load_values_of`): high
    bytes, low bytes, unit. For int4 six: high bytes that meet even and odd codes, low bytes of both, unit [vectors of
    32, BLOCK_N, 4], and what codes of 8, which stand for 0, add up to [vectors, BLOCK_N].
    """
    p_high_words = p_high.to(tl.pointer_type(tl.int32 if FORMAT == "int8" else tl.int64))
    p_low_words = p_low.to(tl.pointer_type(tl.int32 if FORMAT == "int8" else tl.int64))
    VECTOR: tl.constexpr = 4 * weights_per_word(FORMAT)
    IN_HEAD: tl.constexpr = HEAD % VECTOR == 0
    no_row = tl.zeros((1, BLOCK_N, 1), tl.int32)
    chunks = ()
    for i in tl.static_range(CHUNKS):
        o_v = i * (BLOCK_K // VECTOR) + tl.arange(0, BLOCK_K // VECTOR)[:, None, None]
        o_w = o_v * 4 + tl.arange(0, 4)[None, None, :] + no_row
        mask = (o_v < K // VECTOR) & (no_row == 0)
        high = tl.load(p_high_words + o_w, mask, 0)
        low = tl.load(p_low_words + o_w, mask, 0)
        unit = tl.load(p_unit + o_w * (VECTOR // 4) // UNIT_BLOCK, mask, 0.0)
        if NORM == "heads":
            o_first = (o_v + no_row) * VECTOR if IN_HEAD else o_w * (VECTOR // 4)
            unit *= _head_factor(p_squares, o_first // HEAD, mask, eps, HEAD, PARTS)
        if FORMAT == "int8":
            chunks = chunks + (high, low, unit)
        else:
            high_even, high_odd = _even_and_odd(high, ASM)
            low_even, low_odd = _even_and_odd(low, ASM)
            eights = tl.full(high_even.shape, 0x08080808, tl.int32)
            zero = tl.zeros(high_even.shape, tl.int32)
            high = dot4(eights, high_odd, dot4(eights, high_even, zero, ASM, False, True), ASM, False, True)
            low = dot4(eights, low_odd, dot4(eights, low_even, zero, ASM, False, False), ASM, False, False)
            offset = tl.sum((high * 256 + low).to(tl.float32) * unit, 2)
            chunks = chunks + (high_even, high_odd, low_even, low_odd, unit, offset)
    return chunks


@triton.jit
def _even_and_odd(words, ASM: tl.constexpr):
    """Bytes 0, 2, 4, 6 and bytes 1, 3, 5, 7 of int64 words, each as int32."""
    first, second = words.to(tl.int32), (words >> 32).to(tl.int32)
    if ASM:
        even = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, 0x6420;", "=r,r,r", [first, second], dtype=tl.int32, is_pure=True, pack=1
        )
        odd = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, 0x7531;", "=r,r,r", [first, second], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        even = (first & 255) | ((first >> 8) & 0xFF00) | ((second & 255) << 16) | ((second & 0xFF0000) << 8)
        odd = ((first >> 8) & 255) | ((first >> 16) & 0xFF00)
        odd = odd | ((second << 8) & 0xFF0000) | (second & -0x1000000)
    return even, odd
