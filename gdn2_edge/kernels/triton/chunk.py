"""The gated delta rule of GDN-2 over many tokens on a GPU, a chunk at a time, in two kernels.

The equations are those of `gdn2_edge.kernels.chunk`. `chunk_factors` computes what does not depend on the state, every
chunk at once; `_scan` walks from chunk to chunk with the state in registers:

    u   = values - erase S
    o   = queries S + pairs u
    S  <- decay * S + keys^T u

The products have fp16 operands where the inputs have 16 bits; the state itself stays fp32. So that fp16 holds the
values and the state, each column is divided by the largest value in it or in the state before: columns do not know of
each other, so that this only scales the column's results, which are multiplied back. A state that only ever adds up
stays within fp16 for the tokens of a segment.

This module knows nothing of layers, and keeps no gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn2_edge.kernels.triton.chunk_factors import LEAST_TILE, TINY, chunk_factors, precision


@dataclass(frozen=True)
class _Tiles:
    """Sizes of tiles, powers of two, and how the two kernels are launched."""

    chunk: int  # tokens
    block_k: int  # channels of keys at a time in `_factors`
    block_v: int  # columns of the state a program of `_scan` holds
    factors: dict[str, int]
    scan: dict[str, int]


# Measured on an H100 at 64 to 16384 tokens. Larger tiles, whose products Triton 3.6 gives to units of sm_90 that read
# shared memory (64 rows by 4 warps), came out wrong there.
TILES = _Tiles(32, 64, 16, {"num_warps": 2, "num_stages": 2}, {"num_warps": 4, "num_stages": 3})
# For fp32, for heads beyond 128 channels and for AMD, where there is no room for a chunk's factors and the next ones.
TIGHT = _Tiles(32, 32, 16, {"num_warps": 4, "num_stages": 1}, {"num_warps": 8, "num_stages": 1})
# Bounds the memory of a long prefill (22 KB a token for 16 heads of 128) and how far a state can grow in fp16.
SEGMENT_TOKENS = 16384


@triton.jit(do_not_specialize=["first", "T", "N"])
def _scan(
    p_queries,
    p_keys,
    p_erase,
    p_pairs,
    p_decay,
    p_values,
    p_top,
    p_S,
    p_S_new,
    p_o,
    first,
    T,
    N,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    KP: tl.constexpr,
    VP: tl.constexpr,
    C: tl.constexpr,
    BV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """N chunks of a block of columns of one value head, in order: outputs, and the state after them."""
    i_v, i_bhv = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_b, i_hv = i_bhv // HV, i_bhv % HV
    i_chunk = (i_b * H + i_hv // (HV // H)) * N
    o_c, o_k, o_v = tl.arange(0, C), tl.arange(0, KP), i_v * BV + tl.arange(0, BV)
    o_cc = o_c[:, None] * C + o_c[None, :]
    o_ck = o_c[:, None] * KP + o_k[None, :]
    o_cv = o_c[:, None] * VP + o_v[None, :]
    o_tv = o_c[:, None] * (HV * V) + o_v[None, :]
    p_S += i_bhv * (K * V)
    p_S_new += i_bhv * (K * V)
    p_top += i_bhv * N * VP
    p_values += i_bhv * N * (C * VP)
    p_o += ((i_b * T + first) * HV + i_hv) * V
    o_S = o_k[:, None] * V + o_v[None, :]
    mask_S = (o_k < K)[:, None] & (o_v < V)[None, :]
    b_S = tl.load(p_S + o_S, mask_S, 0.0)
    b_top = tl.maximum(tl.max(tl.abs(b_S), 0), TINY)
    for i_c in range(0, N, C):
        b_tops = tl.load(p_top + (i_c + o_c)[:, None] * VP + o_v[None, :], mask=(i_c + o_c < N)[:, None], other=0.0)
        b_top = tl.maximum(b_top, tl.max(b_tops, 0))
    b_unit = 1.0 / b_top
    b_S *= b_unit[None, :]
    for i_c in range(N):
        b_erase = tl.load(p_erase + (i_chunk + i_c) * (C * KP) + o_ck)
        b_queries = tl.load(p_queries + (i_chunk + i_c) * (C * KP) + o_ck)
        b_keys = tl.load(p_keys + (i_chunk + i_c) * (C * KP) + o_ck)
        b_Q = tl.load(p_pairs + (i_chunk + i_c) * (C * C) + o_cc)
        b_decay = tl.load(p_decay + (i_chunk + i_c) * KP + o_k)
        b_values = tl.load(p_values + i_c * (C * VP) + o_cv).to(tl.float32)
        b_values *= (tl.load(p_top + i_c * VP + o_v) * b_unit)[None, :]
        b_S16 = b_S.to(b_erase.dtype)
        b_u = (b_values - tl.dot(b_erase, b_S16, input_precision=PRECISION)).to(b_erase.dtype)
        b_o = tl.dot(b_queries, b_S16, input_precision=PRECISION)
        b_o = tl.dot(b_Q, b_u, b_o, input_precision=PRECISION) * b_top[None, :]
        b_S = tl.dot(tl.trans(b_keys), b_u, b_S * b_decay[:, None], input_precision=PRECISION)
        mask_o = (first + i_c * C + o_c < T)[:, None] & (o_v < V)[None, :]
        tl.store(p_o + i_c * (C * HV * V) + o_tv, b_o, mask_o)
    tl.store(p_S_new + o_S, b_S * b_top[None, :], mask=mask_S)


@torch.no_grad()
def chunk_gated_delta_rule2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    b: Tensor,
    w: Tensor,
    S: Tensor,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs of T tokens and the state after them; the same contract as `gdn2_edge.kernels.chunk`.

    Args:
        q: Queries [B, T, H, K], L2-normalised; fp32, bf16 or fp16 like k, v, b and w.
        k: Keys [B, T, H, K], L2-normalised.
        v: Values [B, T, HV, V]; HV is a multiple of H, and key head h serves HV / H value heads in a row.
        g: Log decay per key channel [B, T, H, K], fp32, at most 0.
        b: Erase gate on the key axis [B, T, H, K].
        w: Write gate on the value axis [B, T, HV, V].
        S: State before the first token [B, HV, K, V], fp32; it is left as it was.
        scale: Factor on the outputs; K ** -0.5 by default.

    Returns:
        o [B, T, HV, V] and the new state [B, HV, K, V], both fp32.

    Source: Gated DeltaNet-2, arXiv 2605.22791, equations 18 to 25, with halving in place of its sub-blocks.
    """
    B, T, H, K = k.shape
    HV, V = v.shape[2:]
    is_fp32 = k.dtype == torch.float32
    tiles = _tiles(K, is_fp32)
    BV = min(tiles.block_v, max(LEAST_TILE, triton.next_power_of_2(V)))
    inputs = [x.contiguous() for x in (q, k, v, g, b, w)]
    o = torch.empty(B, T, HV, V, dtype=torch.float32, device=k.device)
    S, S_new = S.contiguous(), torch.empty_like(S, memory_format=torch.contiguous_format)
    for first in range(0, T, SEGMENT_TOKENS):
        N = triton.cdiv(min(T - first, SEGMENT_TOKENS), tiles.chunk)
        factors = chunk_factors(
            *inputs,
            first=first,
            N=N,
            C=tiles.chunk,
            BK=tiles.block_k,
            BV=BV,
            scale=K**-0.5 if scale is None else scale,
            options=tiles.factors,
        )
        KP, VP = factors.keys.shape[-1], factors.values.shape[-1]
        _scan[VP // BV, B * HV](
            *(*factors, S_new if first else S, S_new, o, first, T, N),
            **{"H": H, "HV": HV, "K": K, "V": V, "KP": KP, "VP": VP, "C": tiles.chunk, "BV": BV},
            PRECISION=precision(is_fp32),
            **tiles.scan,
        )
        del factors  # before the next segment's are made
    return o, S_new


def _tiles(K: int, is_fp32: bool) -> _Tiles:
    return TIGHT if is_fp32 or K > 128 or torch.version.hip else TILES
