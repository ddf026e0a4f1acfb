"""One token of many sequences through the gated delta rule; for a single sequence see recurrence.py.

With many sequences the bytes of their states are what counts. `vectors_kernel` computes once what the channels of a
head share, and `state_kernel` does nothing but pass over the states, which it asks for before the vectors are there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gdn2_edge.kernels.triton.launch import OFFSET_FLOATS, let_next_start, wait_for_previous
from gdn2_edge.kernels.triton.mixer import add_pairs, add_triples, past, sigmoid, silu, softplus


@triton.jit
def vectors_kernel(
    p_y,  # fp32 [B, y_stride]: q, k, v, b, w of each sequence
    p_base,  # fp32
    p_source,  # int64 [B], offset of the state before this token
    p_target,  # int64 [B], of the state after it
    conv_offset,  # of this layer in a state, floats: [2 H K + HV V, CONV - 1]
    p_conv,  # fp32 [2 H K + HV V, CONV]
    p_f,  # fp32 [B, H K], of the second matrix of the decay
    p_g,  # fp32 [B, HV V], of the output gate's, without bias
    p_g_bias,  # fp32 [HV V]
    p_A_log,  # fp32 [H]
    p_dt_bias,  # fp32 [H K]
    p_o_norm,  # fp32 [V]
    p_keys,  # fp32 [B, HV, 4, K]: decay, erase * k, k, q
    p_channels,  # fp32 [B, HV, 2, V]: v * write, gate * o_norm
    p_q_k,  # fp32 [B, HV]
    y_stride,
    scale,
    erase_scale,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    CONV: tl.constexpr,
    K_2: tl.constexpr,
    V_2: tl.constexpr,
    GATE: tl.constexpr,  # "silu" or "sigmoid"
    PDL: tl.constexpr,
):
    """Grid (HV, B): convolutions, gates and norms of a head, and its conv tails moved on."""
    i_hv, i_b = tl.program_id(0), tl.program_id(1)
    i_h = i_hv // (HV // H)
    KEYS: tl.constexpr = H * K
    VALUES: tl.constexpr = HV * V
    o_k, o_v = tl.arange(0, K_2), tl.arange(0, V_2)
    m_k, m_v = o_k < K, o_v < V
    rows, values = i_h * K + o_k, i_hv * V + o_v
    p_before = p_base + tl.load(p_source + i_b) * OFFSET_FLOATS + conv_offset
    p_after = p_base + tl.load(p_target + i_b) * OFFSET_FLOATS + conv_offset

    # Weights, and the conv tails, which no kernel of this step has written.
    g_bias = tl.load(p_g_bias + values, m_v, 0.0)
    dt_bias = tl.load(p_dt_bias + rows, m_k, 0.0)
    rate = tl.exp(tl.load(p_A_log + i_h))
    o_norm = tl.load(p_o_norm + o_v, m_v, 0.0)
    # One program of a key head moves the inputs of q and k on. No one reads the target any more.
    m_first = o_k < tl.where(i_hv % (HV // H) == 0, K, 0)
    q_past, q_newest = past(p_conv, p_before, p_after, rows, m_k, m_first, CONV)
    k_past, k_newest = past(p_conv, p_before, p_after, KEYS + rows, m_k, m_first, CONV)
    v_past, v_newest = past(p_conv, p_before, p_after, 2 * KEYS + values, m_v, m_v, CONV)

    wait_for_previous(PDL)
    let_next_start(PDL)
    p_y += i_b.to(tl.int64) * y_stride
    p_gates = p_y + 2 * KEYS + VALUES
    new_q = tl.load(p_y + rows, m_k, 0.0)
    new_k = tl.load(p_y + KEYS + rows, m_k, 0.0)
    new_v = tl.load(p_y + 2 * KEYS + values, m_v, 0.0)
    erase = sigmoid(tl.load(p_gates + rows, m_k, 0.0), False) * erase_scale
    write = sigmoid(tl.load(p_gates + KEYS + values, m_v, 0.0), False)
    decay = tl.load(p_f + i_b * KEYS + rows, m_k, 0.0) + dt_bias
    gate = tl.load(p_g + i_b * VALUES + values, m_v, 0.0) + g_bias
    q = silu(new_q * q_newest + q_past)
    k = silu(new_k * k_newest + k_past)
    q_squares, k_squares, q_k = tl.reduce((q * q, k * k, q * k), 0, add_triples)
    q_factor, k_factor = tl.rsqrt(q_squares + 1e-6) * scale, tl.rsqrt(k_squares + 1e-6)
    k *= k_factor

    i_head = i_b * HV + i_hv
    p_keys += i_head * (4 * K) + o_k
    tl.store(p_keys, tl.exp(-rate * softplus(decay)), m_k)
    tl.store(p_keys + K, erase * k, m_k)
    tl.store(p_keys + 2 * K, k, m_k)
    tl.store(p_keys + 3 * K, q * q_factor, m_k)
    tl.store(p_q_k + i_head, q_k * (q_factor * k_factor))
    p_channels += i_head * (2 * V)
    tl.store(p_channels + o_v, silu(new_v * v_newest + v_past) * write, m_v)
    tl.store(p_channels + V + o_v, sigmoid(gate, False) * (gate if GATE == "silu" else 1.0) * o_norm, m_v)

    p_after += CONV - 2
    tl.store(p_after + rows * (CONV - 1), new_q, m_first)
    tl.store(p_after + (KEYS + rows) * (CONV - 1), new_k, m_first)
    tl.store(p_after + (2 * KEYS + values) * (CONV - 1), new_v, m_v)


@triton.jit
def state_kernel(
    p_base,
    p_source,
    p_target,
    s_offset,  # of this layer in a state, floats: [HV, K, V]
    p_keys,
    p_channels,
    p_q_k,
    p_out,  # [B, HV V]: the norm within heads, times o_norm and gate; with several parts a head without its factor
    p_squares,  # fp32 [B, HV, V / BLOCK_V], only with several parts
    eps,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    K_2: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (V / BLOCK_V, HV, B). The equation is that of kernels/reference.py."""
    i_v, i_hv, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_v = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
    m_v = o_v < V
    p_before = p_base + tl.load(p_source + i_b) * OFFSET_FLOATS + s_offset + i_hv * (K * V)
    p_after = p_base + tl.load(p_target + i_b) * OFFSET_FLOATS + s_offset + i_hv * (K * V)
    S = ()
    for i in tl.static_range(K_2 // BLOCK_K):  # no kernel of this step has written them
        o_k = i * BLOCK_K + tl.arange(0, BLOCK_K)[:, None]
        S = S + (tl.load(p_before + o_k * V + o_v[None, :], (o_k < K) & m_v[None, :], 0.0),)

    wait_for_previous(PDL)
    let_next_start(PDL)
    i_head = i_b * HV + i_hv
    p_keys += i_head * (4 * K)
    p_channels += i_head * (2 * V)
    v = tl.load(p_channels + o_v, m_v, 0.0)
    gate = tl.load(p_channels + V + o_v, m_v, 0.0)

    # o = q^T (S + k u^T) = q^T S + (q^T k) u, so that both sums over the keys are taken at once.
    kept = ()
    erased_sums = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    o_sums = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    for i in tl.static_range(K_2 // BLOCK_K):
        o_k = i * BLOCK_K + tl.arange(0, BLOCK_K)[:, None]
        part = S[i] * tl.load(p_keys + o_k, o_k < K, 0.0)
        erased_sums += tl.load(p_keys + K + o_k, o_k < K, 0.0) * part
        o_sums += tl.load(p_keys + 3 * K + o_k, o_k < K, 0.0) * part
        kept = kept + (part,)
    erased, o = tl.reduce((erased_sums, o_sums), 0, add_pairs)
    u = v - erased
    for i in tl.static_range(K_2 // BLOCK_K):
        o_k = i * BLOCK_K + tl.arange(0, BLOCK_K)[:, None]
        part = kept[i] + tl.load(p_keys + 2 * K + o_k, o_k < K, 0.0) * u[None, :]
        tl.store(p_after + o_k * V + o_v[None, :], part, (o_k < K) & m_v[None, :])
    o += tl.load(p_q_k + i_head) * u
    squares = tl.sum(o * o)
    o *= gate
    if BLOCK_V >= V:
        o *= tl.rsqrt(squares / V + eps)
    else:
        tl.store(p_squares + i_head * tl.num_programs(0) + i_v, squares)
    tl.store(p_out + i_head * V + o_v, o.to(p_out.dtype.element_ty), m_v)
