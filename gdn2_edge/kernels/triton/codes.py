"""Stored codes to numbers that tensor cores take, two neighbours at a time.

Knows the codes of int8, fp8 (e4m3) and int4; all their values are exact in bf16 and in fp16. Scales are the caller's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Each of the three takes two neighbouring weights and gives two bf16, the first in the low half: 2, 2 and 1.5
# instructions a weight on sm_90. The compiler's own conversions take more than twice as many, some at a quarter of the
# rate. fma, because sm_80 adds and multiplies pairs of bf16 in no other way.
#
# int8: under the byte 0x43 the low 7 bits of a code read as 128 + bits, and its sign bit alone as 128, or 256 if set.
INT8_PTX = tl.constexpr("""{
.reg .b32 code, bits, sign, one;
mov.b32 one, 0x3F803F80;
cvt.u32.u16 code, $1;
prmt.b32 code, code, 0, 0x4140;
lop3.b32 bits, code, 0x007F007F, 0x43004300, 0xEA;
lop3.b32 sign, code, 0x00800080, 0xC300C300, 0xEA;
fma.rn.bf16x2 $0, bits, one, sign;
}""")
# fp8: sign-extended to 16 bits and shifted to bf16's places, a code reads as value * 2^-120, subnormals too.
FP8_PTX = tl.constexpr("""{
.reg .b32 code, scale, zero;
mov.b32 scale, 0x7B807B80;
mov.b32 zero, 0x80008000;
cvt.u32.u16 code, $1;
prmt.b32 code, code, 0, 0x9180;
shl.b32 code, code, 4;
and.b32 code, code, 0x87F087F0;
fma.rn.bf16x2 $0, code, scale, zero;
}""")
# int4: the product puts the byte's high code 16 bits above its low one; under 0x43 a code reads as 128 + code.
INT4_PTX = tl.constexpr("""{
.reg .b32 code, one, offset;
mov.b32 one, 0x3F803F80;
mov.b32 offset, 0xC308C308;
mul.lo.u32 code, $1, 0x1001;
lop3.b32 code, code, 0x000F000F, 0x43004300, 0xEA;
fma.rn.bf16x2 $0, code, one, offset;
}""")


def pairs(format: str, codes: Tensor) -> Tensor:
    """Codes as `stored.stored` gives them, viewed as `pair_values` takes them: [N, K / 2]. Dense values stay."""
    view = {"int8": torch.int16, "fp8": torch.int16, "int4": torch.int8}.get(format)
    return codes if view is None else codes.view(view)


@triton.jit
def fp8_values(byte):
    """fp32 values of e4m3 codes 0..255: with their bits in fp16's places they read as value / 256, subnormals too."""
    bits = ((byte & 0x80) << 8) | ((byte & 0x7F) << 7)
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0


@triton.jit
def pair_values(b_pairs, FORMAT: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """Values without scale, DTYPE [N, K], of pairs of codes [N, K / 2].

    PTX takes NVIDIA's packed instructions, of sm_80 and later, and DTYPE must be bf16.
    """
    if PTX:
        if FORMAT == "int4":
            byte = b_pairs.to(tl.uint8, bitcast=True).to(tl.uint32)
            both = tl.inline_asm_elementwise(INT4_PTX, "=r,r", [byte], dtype=tl.int32, is_pure=True, pack=1)
        elif FORMAT == "int8":
            both = tl.inline_asm_elementwise(INT8_PTX, "=r,h", [b_pairs], dtype=tl.int32, is_pure=True, pack=1)
        else:
            both = tl.inline_asm_elementwise(FP8_PTX, "=r,h", [b_pairs], dtype=tl.int32, is_pure=True, pack=1)
        low = (both & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True)
        high = (both >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    else:
        wide = b_pairs.to(tl.int32)
        if FORMAT == "int4":
            low, high = ((wide & 15) - 8).to(tl.float32), (((wide >> 4) & 15) - 8).to(tl.float32)
        elif FORMAT == "int8":
            low, high = ((wide << 24) >> 24).to(tl.float32), (wide >> 8).to(tl.float32)
        else:
            low, high = fp8_values(wide & 0xFF), fp8_values((wide >> 8) & 0xFF)
        low, high = low.to(DTYPE), high.to(DTYPE)
    return tl.join(low, high).reshape(b_pairs.shape[0], b_pairs.shape[1] * 2)
