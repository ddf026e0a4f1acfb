"""What stands before and after the gated delta rule in a prompt, each in one pass over memory.

`prepare` makes of the results of a mixer's projection what `chunk` and `fused_recurrent` take: convolution, norms and
gates. `gated_norm` makes of their outputs what the last projection reads. Arithmetic is fp32, that of the gates' second
matrices too.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn2_edge.kernels.triton.launch import let_next_start, pdl_options, wait_for_previous
from gdn2_edge.kernels.triton.low_rank import LowRank, low_rank
from gdn2_edge.kernels.triton.mixer import sigmoid, silu, softplus
from gdn2_edge.weights import Weight

# Tokens a program takes of one head: 16 values a thread for 128 channels.
BLOCK_T = 16
NUM_WARPS = 4


class Prepared(NamedTuple):
    """Arguments of `chunk_gated_delta_rule2`, and the inputs of the convolution that the next token needs.

    fp32 for fp32 activations. Otherwise q, k, b and w, whose sizes are bounded, are fp16, and v is bf16.
    """

    q: Tensor  # [B, T, H, K]
    k: Tensor  # [B, T, H, K]
    v: Tensor  # [B, T, HV, V]
    g: Tensor  # [B, T, H, K], fp32
    b: Tensor  # [B, T, H, K]
    w: Tensor  # [B, T, HV, V]
    tail: Tensor  # [B, 2 H K + HV V, CONV - 1], fp32


@triton.jit
def _short_conv(p_y, p_tail, p_conv, first, o_c, mask_c, T, y_stride, CONV: tl.constexpr, BLOCK_T: tl.constexpr):
    """silu of the causal convolution at BLOCK_T tokens from `first` on and channels o_c: [BLOCK_T, channels]."""
    total = tl.zeros((BLOCK_T, o_c.shape[0]), tl.float32)
    for i in tl.static_range(CONV):
        o_t = first + tl.arange(0, BLOCK_T) - (CONV - 1) + i
        mask = ((o_t >= 0) & (o_t < T))[:, None] & mask_c[None, :]
        x = tl.load(p_y + o_t.to(tl.int64)[:, None] * y_stride + o_c[None, :], mask, 0.0).to(tl.float32)
        if first < CONV - 1:  # before the first token stands what is left of earlier ones
            o_tail = o_c[None, :] * (CONV - 1) + (o_t + CONV - 1)[:, None]
            x += tl.load(p_tail + o_tail, (o_t < 0)[:, None] & mask_c[None, :], 0.0)
        total += x * tl.load(p_conv + o_c * CONV + i, mask_c, 0.0)[None, :]
    return silu(total)


@triton.jit
def _keep_tail(p_y, p_tail, p_new_tail, count, o_c, mask_c, y_stride, CONV: tl.constexpr):
    """The last CONV - 1 inputs of channels o_c after `count` tokens."""
    for i in tl.static_range(CONV - 1):
        t = count - (CONV - 1) + i + tl.zeros(o_c.shape, tl.int32)
        x = tl.load(p_y + t.to(tl.int64) * y_stride + o_c, mask_c & (t >= 0), 0.0).to(tl.float32)
        x += tl.load(p_tail + o_c * (CONV - 1) + (t + CONV - 1), mask_c & (t < 0), 0.0)
        tl.store(p_new_tail + o_c * (CONV - 1) + i, x, mask_c)


@triton.jit
def _l2_norm(x):
    return x * tl.rsqrt(tl.sum(x * x, 1) + 1e-6)[:, None]


@triton.jit(do_not_specialize=["T"])
def prepare_kernel(
    p_y,
    p_f,  # see `LowRank`
    p_f_scale,
    p_tail,
    p_conv,
    p_A_log,
    p_dt_bias,
    p_count,  # int64 [1] or None
    p_q,  # q, k and b one after the other
    p_g,
    p_v,
    p_w,
    p_new_tail,
    T,
    y_stride,
    tail_stride,
    erase_scale,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    K_2: tl.constexpr,
    V_2: tl.constexpr,
    CONV: tl.constexpr,
    F_RANK: tl.constexpr,
    F_FORMAT: tl.constexpr,
    F_GROUP: tl.constexpr,
    F_SPLIT_X: tl.constexpr,
    F_IEEE: tl.constexpr,
    F_PTX: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (T / BLOCK_T, H + HV, B): a key head's q, k, b and g, or a value head's v and w."""
    first, i_head, i_b = tl.program_id(0) * BLOCK_T, tl.program_id(1), tl.program_id(2).to(tl.int64)
    KEYS: tl.constexpr = H * K
    VALUES: tl.constexpr = HV * V
    CHANNELS: tl.constexpr = 2 * KEYS + VALUES
    RANKS: tl.constexpr = CHANNELS + KEYS + VALUES
    wait_for_previous(PDL)
    let_next_start(PDL)
    count = T
    if p_count is not None:
        count = tl.load(p_count).to(tl.int32)
    o_t = first + tl.arange(0, BLOCK_T)
    is_token = (o_t < T)[:, None]
    is_counted = (o_t < count)[:, None]
    row = i_b * T + o_t.to(tl.int64)[:, None]
    p_y += i_b * T * y_stride
    p_rows = p_y + o_t.to(tl.int64)[:, None] * y_stride
    p_tail += i_b * tail_stride
    p_new_tail += i_b * (CHANNELS * (CONV - 1))
    # No name has a tile in both branches: the compiler would want them of one shape.
    if i_head < H:
        o_k = tl.arange(0, K_2)
        o_q, mask_k = i_head * K + o_k, o_k < K
        mask_tk = is_token & mask_k[None, :]
        o_tk = row * KEYS + o_q[None, :]
        size = tl.num_programs(2).to(tl.int64) * T * KEYS
        q = _l2_norm(_short_conv(p_y, p_tail, p_conv, first, o_q, mask_k, T, y_stride, CONV, BLOCK_T))
        tl.store(p_q + o_tk, q.to(p_q.dtype.element_ty), mask_tk)
        k = _l2_norm(_short_conv(p_y, p_tail, p_conv, first, KEYS + o_q, mask_k, T, y_stride, CONV, BLOCK_T))
        tl.store(p_q + size + o_tk, tl.where(is_counted, k, 0.0).to(p_q.dtype.element_ty), mask_tk)
        b = tl.load(p_rows + CHANNELS + o_q[None, :], mask_tk, 0.0).to(tl.float32)
        tl.store(p_q + 2 * size + o_tk, (sigmoid(b, False) * erase_scale).to(p_q.dtype.element_ty), mask_tk)
        p_in, is_in = p_y + o_t.to(tl.int64) * y_stride + RANKS, o_t < T
        f = low_rank(p_f, p_f_scale, o_q, mask_k, p_in, is_in, F_RANK, F_FORMAT, F_GROUP, F_SPLIT_X, F_IEEE, F_PTX)
        f = tl.trans(f) + tl.load(p_dt_bias + o_q, mask_k, 0.0)[None, :]
        g = -tl.exp(tl.load(p_A_log + i_head)) * softplus(f)
        tl.store(p_g + o_tk, tl.where(is_counted, g, 0.0), mask_tk)
        if first == 0:
            _keep_tail(p_y, p_tail, p_new_tail, count, o_q, mask_k, y_stride, CONV)
            _keep_tail(p_y, p_tail, p_new_tail, count, KEYS + o_q, mask_k, y_stride, CONV)
    else:
        o_v = tl.arange(0, V_2)
        o_value, mask_v = (i_head - H) * V + o_v, o_v < V
        mask_tv = is_token & mask_v[None, :]
        o_tv = row * VALUES + o_value[None, :]
        v = _short_conv(p_y, p_tail, p_conv, first, 2 * KEYS + o_value, mask_v, T, y_stride, CONV, BLOCK_T)
        tl.store(p_v + o_tv, v.to(p_v.dtype.element_ty), mask_tv)
        w = tl.load(p_rows + CHANNELS + KEYS + o_value[None, :], mask_tv, 0.0).to(tl.float32)
        w = sigmoid(w, False)
        tl.store(p_w + o_tv, tl.where(is_counted, w, 0.0).to(p_w.dtype.element_ty), mask_tv)
        if first == 0:
            _keep_tail(p_y, p_tail, p_new_tail, count, 2 * KEYS + o_value, mask_v, y_stride, CONV)


def prepare(
    y: Tensor,
    f_proj: Weight,
    tail: Tensor,
    conv: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    *,
    heads: tuple[int, int],
    dims: tuple[int, int],
    erase_scale: float,
    count: Tensor | None = None,
    pdl: bool = False,
) -> Prepared:
    """What the gated delta rule takes of T tokens of B sequences.

    Args:
        y: Projections [B, T, rows] of q, k, v, b and w, then the inputs of f_proj; fp32, bf16 or fp16.
        f_proj: The second matrix of the decay [H K, R].
        tail: Inputs of the convolution before the first token [B, 2 H K + HV V, CONV - 1], fp32, contiguous for
            each sequence; stays as it was.
        conv: Filters [2 H K + HV V, 1, CONV], fp32.
        A_log: [H], fp32.
        dt_bias: [H K], fp32.
        heads: H and HV.
        dims: K and V.
        erase_scale: Factor on the erase gate.
        count: int64 [1] in device memory, at least 1: tokens from here on fill the shape up and change no state.
        pdl: Start while the kernel before still runs; see `launch`.
    """
    (B, T, _), (H, HV), (K, V) = y.shape, heads, dims
    is_fp32 = y.dtype == torch.float32
    small, wide = (torch.float32, torch.float32) if is_fp32 else (torch.float16, torch.bfloat16)
    q, k, b = keys = torch.empty(3, B, T, H, K, dtype=small, device=y.device)
    g = torch.empty(B, T, H, K, dtype=torch.float32, device=y.device)
    v = torch.empty(B, T, HV, V, dtype=wide, device=y.device)
    w = torch.empty(B, T, HV, V, dtype=small, device=y.device)
    new_tail = torch.empty(tail.shape, dtype=torch.float32, device=y.device)
    f = LowRank.of(f_proj, y)
    prepare_kernel[triton.cdiv(T, BLOCK_T), H + HV, B](
        *(y, f.p_weight, f.p_scale, tail, conv, A_log, dt_bias, count, keys, g, v, w, new_tail),
        *(T, y.stride(1), tail.stride(0), float(erase_scale)),
        **f.constants("F_"),
        **{"H": H, "HV": HV, "K": K, "V": V, "CONV": conv.shape[-1], "BLOCK_T": BLOCK_T, "PDL": pdl},
        K_2=triton.next_power_of_2(K),
        V_2=triton.next_power_of_2(V),
        num_warps=NUM_WARPS,
        **pdl_options(pdl),
    )
    return Prepared(q, k, v, g, b, w, new_tail)


@triton.jit(do_not_specialize=["M"])
def gated_norm_kernel(
    p_o,
    p_in,
    p_g,  # see `LowRank`
    p_g_scale,
    p_bias,
    p_gain,
    p_out,
    M,
    in_stride,
    eps,
    HV: tl.constexpr,
    V: tl.constexpr,
    V_2: tl.constexpr,
    G_RANK: tl.constexpr,
    G_FORMAT: tl.constexpr,
    G_GROUP: tl.constexpr,
    G_SPLIT_X: tl.constexpr,
    G_IEEE: tl.constexpr,
    G_PTX: tl.constexpr,
    GATE: tl.constexpr,  # "silu" or "sigmoid"
    BLOCK_T: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (M / BLOCK_T, HV)."""
    wait_for_previous(PDL)
    let_next_start(PDL)
    i_head = tl.program_id(1)
    o_m = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_v = tl.arange(0, V_2)
    mask_v = o_v < V
    mask = (o_m < M)[:, None] & mask_v[None, :]
    o = o_m.to(tl.int64)[:, None] * (HV * V) + i_head * V + o_v[None, :]
    x = tl.load(p_o + o, mask, 0.0)
    x *= tl.rsqrt(tl.sum(x * x, 1) / V + eps)[:, None] * tl.load(p_gain + o_v, mask_v, 0.0)[None, :]
    p_in, row = p_in + o_m.to(tl.int64) * in_stride, i_head * V + o_v
    gate = low_rank(p_g, p_g_scale, row, mask_v, p_in, o_m < M, G_RANK, G_FORMAT, G_GROUP, G_SPLIT_X, G_IEEE, G_PTX)
    gate = tl.trans(gate) + tl.load(p_bias + i_head * V + o_v, mask_v, 0.0)[None, :]
    x *= sigmoid(gate, False) * (gate if GATE == "silu" else 1.0)
    tl.store(p_out + o, x.to(p_out.dtype.element_ty), mask)


def gated_norm(
    o: Tensor, x: Tensor, g_proj: Weight, bias: Tensor, gain: Tensor, eps: float, kind: str, pdl: bool = False
) -> Tensor:
    """RMSNorm of each head of o, times silu or sigmoid of g_proj x + bias: [B T, HV V] in x's dtype.

    Args:
        o: Outputs of the gated delta rule [B, T, HV, V], fp32.
        x: Inputs of g_proj [B T, R], fp32, bf16 or fp16; rows may lie apart.
        g_proj: The second matrix of the output gate [HV V, R].
        bias: [HV V], fp32.
        gain: Of the norm [V], fp32.
        eps: Of the norm.
        kind: "silu" or "sigmoid".
        pdl: As in `prepare`.
    """
    B, T, HV, V = o.shape
    out = torch.empty(B * T, HV * V, dtype=x.dtype, device=x.device)
    g = LowRank.of(g_proj, x)
    gated_norm_kernel[triton.cdiv(B * T, BLOCK_T), HV](
        *(o, x, g.p_weight, g.p_scale, bias, gain, out, B * T, x.stride(0), eps),
        **g.constants("G_"),
        **{"HV": HV, "V": V, "V_2": triton.next_power_of_2(V), "GATE": kind, "BLOCK_T": BLOCK_T, "PDL": pdl},
        num_warps=NUM_WARPS,
        **pdl_options(pdl),
    )
    return out
