"""The gated delta rule of GDN-2 on a GPU, token after token in one kernel: for prompts of up to some tens of tokens.

A program keeps a few columns of one head's state in registers and walks over the tokens. The columns do not know of
each other, so nothing is shared between programs. This module knows nothing of layers, and keeps no gradients.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# One warp a program: what is summed over K never leaves it. 16 heads of 128 columns are 256 programs.
BLOCK_V = 8
NUM_WARPS = 1
# Tokens whose inputs are on their way while one is computed.
PREFETCH_STAGES = 4


@triton.jit(do_not_specialize=["T"])
def _recurrent(
    p_q,
    p_k,
    p_v,
    p_g,
    p_b,
    p_w,
    p_S,
    p_S_new,
    p_o,
    T,
    scale,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    STAGES: tl.constexpr,
):
    """T tokens of BV columns of one value head; shapes as in `recurrent_gated_delta_rule2`."""
    i_v, i_bhv = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_b, i_hv = i_bhv // HV, i_bhv % HV
    i_h = i_hv // (HV // H)
    o_k, o_v = tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    mask_k, mask_v = o_k < K, o_v < V
    o_S = i_bhv * (K * V) + o_k[:, None] * V + o_v[None, :]
    mask_S = mask_k[:, None] & mask_v[None, :]
    b_S = tl.load(p_S + o_S, mask_S, 0.0)
    for t in tl.range(T, num_stages=STAGES):
        i_qk = ((i_b * T + t) * H + i_h) * K
        i_vo = ((i_b * T + t) * HV + i_hv) * V
        b_q = tl.load(p_q + i_qk + o_k, mask_k, 0.0).to(tl.float32)
        b_k = tl.load(p_k + i_qk + o_k, mask_k, 0.0).to(tl.float32)
        b_g = tl.load(p_g + i_qk + o_k, mask_k, 0.0).to(tl.float32)
        b_b = tl.load(p_b + i_qk + o_k, mask_k, 0.0).to(tl.float32)
        b_v = tl.load(p_v + i_vo + o_v, mask_v, 0.0).to(tl.float32)
        b_w = tl.load(p_w + i_vo + o_v, mask_v, 0.0).to(tl.float32)
        b_S *= tl.exp(b_g)[:, None]
        b_u = b_w * b_v - tl.sum(b_S * (b_b * b_k)[:, None], 0)
        # S^T q after the write is S^T q before it + (k^T q) u: the sums over K need not wait for each other.
        b_o = tl.sum(b_S * b_q[:, None], 0) + tl.sum(b_q * b_k) * b_u
        b_S += b_k[:, None] * b_u[None, :]
        tl.store(p_o + i_vo + o_v, scale * b_o, mask_v)
    tl.store(p_S_new + o_S, b_S, mask_S)


@torch.no_grad()
def recurrent_gated_delta_rule2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    b: Tensor,
    w: Tensor,
    S: Tensor,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs of T tokens and the state after them; the same contract as `chunk_gated_delta_rule2`.

    All arithmetic is fp32, whatever the inputs are.

    Args:
        q: Queries [B, T, H, K], L2-normalised; fp32, bf16 or fp16, as k, v, b and w.
        k: Keys [B, T, H, K], L2-normalised.
        v: Values [B, T, HV, V]; HV is a multiple of H, and key head h serves HV / H value heads in a row.
        g: Log decay per key channel [B, T, H, K], at most 0.
        b: Erase gate on the key axis [B, T, H, K].
        w: Write gate on the value axis [B, T, HV, V].
        S: State before the first token [B, HV, K, V], fp32; it is left as it was.
        scale: Factor on the outputs; K ** -0.5 by default.

    Returns:
        o [B, T, HV, V] and the new state [B, HV, K, V], both fp32.

    Source: Gated DeltaNet-2, arXiv 2605.22791.
    """
    B, T, H, K = k.shape
    HV, V = v.shape[2:]
    q, k, v, g, b, w, S = (x.contiguous() for x in (q, k, v, g, b, w, S))
    o = k.new_empty(B, T, HV, V, dtype=torch.float32)
    S_new = torch.empty_like(S)
    _recurrent[triton.cdiv(V, BLOCK_V), B * HV](
        *(q, k, v, g, b, w, S, S_new, o, T, K**-0.5 if scale is None else scale),
        H=H,
        HV=HV,
        K=K,
        V=V,
        BK=triton.next_power_of_2(K),
        BV=BLOCK_V,
        STAGES=PREFETCH_STAGES,
        num_warps=NUM_WARPS,
    )
    return o, S_new
