"""What the chunks of the gated delta rule need that does not depend on the state, every chunk at once.

For each chunk of C tokens and each head, with P(s, t) the product of exp(g_j) over s < j <= t:

    A[t, s] = (b_t * k_t)^T (P(s, t) * k_s)    s < t        D = (I + A)^-1
    pairs   = scale * q_t^T (P(s, t) * k_s)    s <= t       queries = scale * q * P(0, t)
    values  = D (w * v) / top                               keys    = k * P(t, C)
    erase   = D (b * k * P(0, t))                           decay   = P(0, C)

`gdn2_edge.kernels.triton.chunk` says what they are for. A, pairs and D are built by halving: a pair s < t is parted by
the middle of one block of 2m tokens, m = 1, 2, 4 .. C / 2, and there P(s, t) is a factor of s times a factor of t, both
at most 1. Their logarithms are sums of g over just the tokens between, a product of g with a matrix of zeros and ones:
nothing is subtracted, no exponent is positive, and a token that forgets everything gives clean zeros and costs no
digits of what follows.

With 16-bit inputs all products have fp16 operands: queries and keys are bounded, their norm is 1, and values are
divided by `top`, the largest of their column and chunk.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LEAST_TILE = 16  # what a tensor core takes
LOG2_E = tl.constexpr(1.4426950408889634)
# 2 to it is 0 in fp32, and fp16 holds it.
LOG2_OF_ZERO = tl.constexpr(-256.0)
TINY = tl.constexpr(1e-30)  # in place of a zero that would be divided by


class Factors(NamedTuple):
    """N chunks of C tokens; KP and VP are K and V padded with zeros. fp16, or fp32 where the inputs are."""

    queries: Tensor  # [B, H, N, C, KP]
    keys: Tensor  # [B, H, N, C, KP]
    erase: Tensor  # [B, H, N, C, KP]
    pairs: Tensor  # [B, H, N, C, C]
    decay: Tensor  # [B, H, N, KP], fp32
    values: Tensor  # [B, HV, N, C, VP]
    top: Tensor  # [B, HV, N, VP], fp32


@triton.jit
def _is_square(i, C: tl.constexpr):
    """Pairs (t, s) [C, C] that the middle of a block of 2m tokens parts, m = 2^i: t after it, s before it."""
    o_half = tl.arange(0, C) >> i
    return tl.where(o_half % 2 == 1, o_half, -1)[:, None] == (o_half ^ 1)[None, :]


@triton.jit
def _inverse(b_A, LEVELS: tl.constexpr, C: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """(I + A)^-1 for A below the diagonal [C, C]: blocks of 2m tokens from blocks of m, m = 1, 2, 4 .. C / 2."""
    o_c = tl.arange(0, C)
    b_D = tl.where(o_c[:, None] == o_c[None, :], 1.0, 0.0) - tl.where(_is_square(0, C), b_A, 0.0)
    for i in range(1, LEVELS):
        b_square = tl.where(_is_square(i, C), b_A, 0.0).to(DTYPE)
        b_X = tl.dot(b_D.to(DTYPE), b_square, input_precision=PRECISION).to(DTYPE)
        b_D -= tl.dot(b_X, b_D.to(DTYPE), input_precision=PRECISION)
    return b_D.to(DTYPE)


@triton.jit
def _load_token_block(p_q, p_k, p_b, p_g, o_qk, mask):
    """q, k, b * k and the logarithm of the decay to base 2, zeros outside the mask: no effect."""
    b_q = tl.load(p_q + o_qk, mask, 0.0).to(tl.float32)
    b_k = tl.load(p_k + o_qk, mask, 0.0).to(tl.float32)
    b_bk = tl.load(p_b + o_qk, mask, 0.0).to(tl.float32) * b_k
    b_g = tl.load(p_g + o_qk, mask, 0.0).to(tl.float32)
    return b_q, b_k, b_bk, tl.maximum(b_g * LOG2_E, LOG2_OF_ZERO)


@triton.jit(do_not_specialize=["first", "T"])
def _factors(
    p_q,
    p_k,
    p_v,
    p_g,
    p_b,
    p_w,
    p_counted,
    p_queries,
    p_keys,
    p_erase,
    p_pairs,
    p_decay,
    p_values,
    p_top,
    first,
    T,
    scale,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    KP: tl.constexpr,
    VP: tl.constexpr,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One chunk of one key head and its value heads; tensors as in `chunk_factors` and `Factors`."""
    i_c, i_bh, N = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    i_b, i_h = (i_bh // H).to(tl.int64), i_bh % H
    i_chunk = i_bh.to(tl.int64) * N + i_c
    i_t = first + i_c * C
    o_c = tl.arange(0, C)
    o_cc = o_c[:, None] * C + o_c[None, :]
    mask_t = (i_t + o_c < T)[:, None]
    i_qk = ((i_b * T + i_t) * H + i_h) * K
    p_q, p_k, p_b, p_g = p_q + i_qk, p_k + i_qk, p_b + i_qk, p_g + i_qk

    b_A = tl.zeros([C, C], tl.float32)
    b_Q = tl.zeros([C, C], tl.float32)
    for i_k in range(0, KP, BK):
        o_k = i_k + tl.arange(0, BK)
        o_qk, mask = o_c[:, None] * (H * K) + o_k[None, :], mask_t & (o_k < K)[None, :]
        b_q, b_k, b_bk, b_g = _load_token_block(p_q, p_k, p_b, p_g, o_qk, mask)
        b_Q += tl.where(o_c[:, None] == o_c[None, :], tl.sum(b_q * b_k, 1)[:, None], 0.0)
        b_q, b_k, b_bk, b_g = b_q.to(DTYPE), b_k.to(DTYPE), b_bk.to(DTYPE), b_g.to(DTYPE)
        for i in range(LEVELS):
            b_counted = tl.load(p_counted + i * C * C + o_cc)
            b_P = tl.exp2(tl.dot(b_counted, b_g, input_precision=PRECISION)).to(DTYPE)
            b_columns = tl.trans(b_k * b_P)
            is_square = _is_square(i, C)
            b_A += tl.where(is_square, tl.dot(b_bk * b_P, b_columns, input_precision=PRECISION), 0.0)
            b_Q += tl.where(is_square, tl.dot(b_q * b_P, b_columns, input_precision=PRECISION), 0.0)
    tl.store(p_pairs + i_chunk * (C * C) + o_cc, (scale * b_Q).to(DTYPE))
    b_D = _inverse(b_A, LEVELS, C, DTYPE, PRECISION)

    b_until = tl.load(p_counted + LEVELS * C * C + o_cc)
    b_after = tl.load(p_counted + (LEVELS + 1) * C * C + o_cc)
    for i_k in range(0, KP, BK):
        o_k = i_k + tl.arange(0, BK)
        o_qk, mask = o_c[:, None] * (H * K) + o_k[None, :], mask_t & (o_k < K)[None, :]
        b_q, b_k, b_bk, b_g = _load_token_block(p_q, p_k, p_b, p_g, o_qk, mask)
        tl.store(p_decay + i_chunk * KP + o_k, tl.exp2(tl.sum(b_g, 0)))
        o_ck = i_chunk * (C * KP) + o_c[:, None] * KP + o_k[None, :]
        b_P = tl.exp2(tl.dot(b_after, b_g.to(DTYPE), input_precision=PRECISION))
        tl.store(p_keys + o_ck, (b_k * b_P).to(DTYPE))
        b_P = tl.exp2(tl.dot(b_until, b_g.to(DTYPE), input_precision=PRECISION))
        tl.store(p_queries + o_ck, (scale * b_q * b_P).to(DTYPE))
        b_erase = tl.dot(b_D, (b_bk * b_P).to(DTYPE), input_precision=PRECISION)
        tl.store(p_erase + o_ck, b_erase.to(DTYPE))

    for i in range(HV // H):
        i_hv = i_h * (HV // H) + i
        i_v = ((i_b * T + i_t) * HV + i_hv) * V
        i_chunk_v = (i_b * HV + i_hv) * N + i_c
        for first_v in range(0, VP, BV):
            o_v = first_v + tl.arange(0, BV)
            o_tv = o_c[:, None] * (HV * V) + o_v[None, :]
            mask = mask_t & (o_v < V)[None, :]
            b_v = tl.load(p_v + i_v + o_tv, mask, 0.0).to(tl.float32)
            b_v *= tl.load(p_w + i_v + o_tv, mask, 0.0).to(tl.float32)
            b_top = tl.maximum(tl.max(tl.abs(b_v), 0), TINY)
            b_u = tl.dot(b_D, (b_v * (1.0 / b_top)).to(DTYPE), input_precision=PRECISION)
            tl.store(p_top + i_chunk_v * VP + o_v, b_top)
            tl.store(p_values + i_chunk_v * (C * VP) + o_c[:, None] * VP + o_v[None, :], b_u.to(DTYPE))


def chunk_factors(
    *inputs: Tensor, first: int, N: int, C: int, BK: int, BV: int, scale: float, options: dict[str, int]
) -> Factors:
    """The factors of N chunks from token `first` on.

    Args:
        inputs: q, k, v, g, b, w of `chunk_gated_delta_rule2`, contiguous.
        first: Where the chunks start.
        N: How many; the last may end beyond T.
        C: Tokens a chunk, a power of two.
        BK: Channels of keys at a time, a power of two.
        BV: Columns of values at a time, a power of two; VP is a multiple of it.
        scale: Factor on the outputs.
        options: How the kernel is launched.
    """
    B, T, H, K = inputs[1].shape
    HV, V = inputs[2].shape[2:]
    KP, VP = max(LEAST_TILE, triton.next_power_of_2(K)), triton.cdiv(V, BV) * BV
    device = inputs[1].device
    is_fp32 = inputs[1].dtype == torch.float32
    dtype = torch.float32 if is_fp32 else torch.float16
    factors = Factors(
        *(torch.empty(B, H, N, C, KP, dtype=dtype, device=device) for _ in range(3)),
        pairs=torch.empty(B, H, N, C, C, dtype=dtype, device=device),
        decay=torch.empty(B, H, N, KP, dtype=torch.float32, device=device),
        values=torch.empty(B, HV, N, C, VP, dtype=dtype, device=device),
        top=torch.empty(B, HV, N, VP, dtype=torch.float32, device=device),
    )
    _factors[N, B * H](
        *(*inputs, _counted(C, dtype, device), *factors, first, T, scale),
        **{"H": H, "HV": HV, "K": K, "V": V, "KP": KP, "VP": VP, "C": C, "LEVELS": C.bit_length() - 1},
        BK=min(BK, KP),
        BV=BV,
        DTYPE=tl.float32 if is_fp32 else tl.float16,
        PRECISION=precision(is_fp32),
        **options,
    )
    return factors


def precision(is_fp32: bool) -> str:
    """How fp32 operands are multiplied without losing bits: as three tf32 products, or as AMD's cards multiply fp32."""
    return "tf32x3" if is_fp32 and not torch.version.hip else "ieee"


@cache
def _counted(C: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Whose g make up the logarithm of each token's factor: zeros and ones [log2(C) + 2, C, C], row t for token t.

    For blocks of 2m tokens, m = 1, 2, 4 .. C / 2: in the second half those from the middle to t, in the first half
    those after t. Then for the whole chunk all until t, and all after t.
    """
    t, j = torch.arange(C)[:, None], torch.arange(C)
    halves = [((t >> i == j >> i) & ((t >> i) % 2 == (j <= t))) for i in range(C.bit_length() - 1)]
    return torch.stack([*halves, j <= t, j > t]).to(device, dtype)
