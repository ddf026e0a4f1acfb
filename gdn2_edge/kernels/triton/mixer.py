"""What the kernels of a GDN-2 mixer have in common: a step of the convolution, the functions of gates, sums."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def past(p_conv, p_tail, p_tail_after, o, mask, m_move, CONV: tl.constexpr):
    """What the last CONV - 1 inputs add to the convolution at channels o, and the weights of the one to come.

    All inputs but the oldest are moved on to where the next token finds them.
    """
    total = tl.zeros(o.shape, tl.float32)
    for i in tl.static_range(CONV - 1):
        x = tl.load(p_tail + o * (CONV - 1) + i, mask, 0.0)
        total += x * tl.load(p_conv + o * CONV + i, mask, 0.0)
        if i > 0:
            tl.store(p_tail_after + o * (CONV - 1) + i - 1, x, m_move)
    return total, tl.load(p_conv + o * CONV + CONV - 1, mask, 0.0)


@triton.jit
def add_pairs(a, b, c, d):
    """Of two sums taken at once."""
    return a + c, b + d


@triton.jit
def add_triples(a, b, c, d, e, f):
    """Of three."""
    return a + d, b + e, c + f


@triton.jit
def sigmoid(x, ASM: tl.constexpr):
    """1 / (1 + exp(-x)); ASM: without what the usual instructions take for subnormal numbers: a third of them."""
    if ASM:
        return tl.inline_asm_elementwise(
            """{
            .reg .f32 e;
            mul.f32 e, $1, 0fBFB8AA3B;
            ex2.approx.ftz.f32 e, e;
            add.f32 e, e, 0f3F800000;
            rcp.approx.ftz.f32 $0, e;
            }""",
            "=f,f",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def silu(x):
    """x sigmoid(x)."""
    return x * sigmoid(x, False)


@triton.jit
def softplus(x):
    """log(1 + exp(x)), also where it is nearly 0, which the slowest decays are."""
    e = tl.exp(-tl.abs(x))
    series = e * (1.0 - e * (0.5 - e * (0.3333333333 - e * 0.25)))
    return tl.maximum(x, 0.0) + tl.where(e < 0.01, series, tl.log(1.0 + e))
