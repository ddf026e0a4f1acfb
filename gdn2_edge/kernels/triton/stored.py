"""Reading weights in their stored form inside a kernel, and integer products of four bytes at once.

Knows the layouts of `gdn2_edge.weights` by a `FORMAT` word: "fp32", "fp16", "bf16", "fp8", "int8" or "int4".
A kernel gets a matrix [N, K] as two pointers: its codes (fp8 as bytes; int4 as int32 words of eight codes) and its
scales (None where the format has none).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn2_edge.errors import BackendError
from gdn2_edge.weights import Dense, Fp8, Int4, Int8, Weight

WEIGHTS_PER_WORD = {"fp32": 1, "fp16": 2, "bf16": 2, "fp8": 4, "int8": 4, "int4": 8}
_DENSE = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def stored(weight: Weight) -> tuple[str, Tensor, Tensor | None, int]:
    """(FORMAT, codes, scales, group size) of an unjoined weight, as kernels take them; a scale a row is group 0."""
    match weight:
        case Dense(data=data):
            return _DENSE[data.dtype], data, None, 0
        case Int8(data=data, scale=scale):
            return "int8", data, scale, 0
        case Fp8(data=data, scale=scale):
            return "fp8", data.view(torch.uint8), scale, 0
        case Int4(data=data, scale=scale):
            return "int4", data, scale, weight.group_size
    raise BackendError(f"{weight.name}: {type(weight).__name__} has no GPU kernel.")


@triton.constexpr_function
def weights_per_word(FORMAT):
    """How many weights 32 bits hold."""
    return WEIGHTS_PER_WORD[FORMAT]


@triton.jit
def word_values(words, FORMAT: tl.constexpr, HARDWARE_FP8: tl.constexpr):
    """The fp32 values of the weights in int32 words, lowest bits first, without scales: a tuple of tensors."""
    if FORMAT == "fp32":
        return (words.to(tl.float32, bitcast=True),)
    elif FORMAT == "bf16":
        return (words << 16).to(tl.float32, bitcast=True), (words & -65536).to(tl.float32, bitcast=True)
    elif FORMAT == "fp16":
        return _halves(words)
    elif FORMAT == "int8":  # a byte under 0x4B reads as 2^23 + byte; converting integers runs at a quarter of the rate
        biased = words ^ -2139062144
        return _byte(biased), _byte(biased >> 8), _byte(biased >> 16), _byte(biased >> 24)
    elif FORMAT == "int4":
        return (
            ((words & 15) - 8).to(tl.float32),
            (((words >> 4) & 15) - 8).to(tl.float32),
            (((words >> 8) & 15) - 8).to(tl.float32),
            (((words >> 12) & 15) - 8).to(tl.float32),
            (((words >> 16) & 15) - 8).to(tl.float32),
            (((words >> 20) & 15) - 8).to(tl.float32),
            (((words >> 24) & 15) - 8).to(tl.float32),
            (((words >> 28) & 15) - 8).to(tl.float32),
        )
    elif HARDWARE_FP8:  # sm_89 and later convert two at once
        return tl.inline_asm_elementwise(
            """{
            .reg .b16 low, high, a, b, c, d;
            .reg .b32 first, second;
            mov.b32 {low, high}, $4;
            cvt.rn.f16x2.e4m3x2 first, low;
            cvt.rn.f16x2.e4m3x2 second, high;
            mov.b32 {a, b}, first;
            mov.b32 {c, d}, second;
            cvt.f32.f16 $0, a;
            cvt.f32.f16 $1, b;
            cvt.f32.f16 $2, c;
            cvt.f32.f16 $3, d;
            }""",
            "=f,=f,=f,=f,r",
            [words],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    else:  # the sign and the other bits of two bytes moved to fp16's places, which reads as value / 256
        even = (words & 0x00FF00FF) << 8
        odd = words & -16711936
        first, third = _halves(((even >> 1) & 0x3F803F80) | (even & -2147450880))
        second, fourth = _halves(((odd >> 1) & 0x3F803F80) | (odd & -2147450880))
        return first * 256.0, second * 256.0, third * 256.0, fourth * 256.0


@triton.jit
def _byte(biased):
    """The lowest byte of each word, less 128, in fp32."""
    return ((biased & 255) | 0x4B000000).to(tl.float32, bitcast=True) - 8388736.0


@triton.jit
def _halves(words):
    """The fp32 values of two fp16 in an int32 word."""
    low = words.to(tl.int16).to(tl.float16, bitcast=True)
    high = (words >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def dot4(a, b, c, ASM: tl.constexpr, A_SIGNED: tl.constexpr, B_SIGNED: tl.constexpr):
    """c + the sum of four products of bytes, signed or not; a and b hold four an int32."""
    if ASM:
        TYPES: tl.constexpr = (".s32" if A_SIGNED else ".u32") + (".s32" if B_SIGNED else ".u32")
        return tl.inline_asm_elementwise(
            "dp4a" + TYPES + " $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        for i in tl.static_range(4):
            first = (a << (24 - 8 * i)) >> 24 if A_SIGNED else (a >> (8 * i)) & 255
            second = (b << (24 - 8 * i)) >> 24 if B_SIGNED else (b >> (8 * i)) & 255
            c += first * second
        return c


@triton.jit
def load_values(
    p_w,
    p_scale,
    o_n,
    o_k,
    m_n,
    m_k,
    K: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    HARDWARE_FP8: tl.constexpr,
):
    """Exact fp32 values at rows o_n [N, 1] and columns o_k [1, M], 0 where masked: for single rows."""
    codes, scale = load_codes(p_w, p_scale, o_n, o_k, m_n, m_k, K, FORMAT, GROUP, HARDWARE_FP8)
    return codes * scale


@triton.jit
def load_codes(
    p_w,
    p_scale,
    o_n,
    o_k,
    m_n,
    m_k,
    K: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    HARDWARE_FP8: tl.constexpr,
):
    """The same values before a scale for the whole row, which int8 and fp8 have, and that scale [N, 1], else 1."""
    mask = m_n & m_k
    row = o_n.to(tl.int64)
    scale = tl.full(o_n.shape, 1.0, tl.float32)
    if FORMAT == "int8" or FORMAT == "fp8":
        codes = tl.load(p_w + row * K + o_k, mask, 0)
        scale = tl.load(p_scale + row, m_n, 0.0)
        if FORMAT == "int8":  # as in _byte; the exclusive or also adds 128
            bits = codes.to(tl.uint8, bitcast=True).to(tl.int32) ^ 0x4B000080
            values = bits.to(tl.float32, bitcast=True) - 8388736.0
        elif HARDWARE_FP8:
            values = codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)
        else:
            bits = codes.to(tl.int16)
            bits = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
            values = bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    elif FORMAT == "int4":
        words = tl.load(p_w + row * (K // 8) + o_k // 8, mask, 0)
        codes = (words >> ((o_k % 8) * 4)) & 15
        group_scale = tl.load(p_scale + row * (K // GROUP) + o_k // GROUP, mask, 0.0).to(tl.float32)
        values = (codes - 8).to(tl.float32) * group_scale
    else:
        values = tl.load(p_w + row * K + o_k, mask, 0.0).to(tl.float32)
    return values, scale
