"""One token through the gated delta rule: everything between the two projections of a GDN-2 mixer.

A program owns a block of value channels of one value head of one sequence. It reads its part of the state from one
place and writes it to another, so that a step can be repeated or abandoned: the state before it stays whole.
Sequences are found through tables of offsets from one base pointer, in units of 16 floats.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gdn2_edge.kernels.triton.activation import write_activation
from gdn2_edge.kernels.triton.launch import OFFSET_FLOATS, let_next_start, wait_for_previous
from gdn2_edge.kernels.triton.stored import load_words, words_times


@triton.jit
def decode_kernel(
    p_y,  # fp32 [B, y_stride]: q, k, v, b, w, f, g of each sequence
    p_base,  # fp32
    p_source,  # int64 [B], offset of the state before this token
    p_target,  # int64 [B], of the state after it
    conv_offset,  # of this layer in a state, floats: [2 H K + HV V, CONV - 1]
    s_offset,  # [HV, K, V]
    p_conv,  # fp32 [2 H K + HV V, CONV]
    p_f,
    p_f_scale,
    p_g,
    p_g_scale,
    p_g_bias,  # fp32 [HV V]
    p_A_log,  # fp32 [H]
    p_dt_bias,  # fp32 [H K]
    p_o_norm,  # fp32 [V]
    p_values,  # the output times o_norm and gate, [B, HV V], as planes for one sequence only; the norm's factor is due
    p_high,
    p_low,
    p_unit,
    p_squares,  # fp32 [B, HV, V / BLOCK_V]
    p_vectors,  # fp32 [B, HV, V / BLOCK_V, 4, K_2], a program's own
    y_stride,
    scale,
    erase_scale,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    RANK: tl.constexpr,
    CONV: tl.constexpr,
    K_2: tl.constexpr,
    RANK_2: tl.constexpr,
    BLOCK_V: tl.constexpr,
    F_FORMAT: tl.constexpr,
    F_GROUP: tl.constexpr,
    G_FORMAT: tl.constexpr,
    G_GROUP: tl.constexpr,
    GATE: tl.constexpr,  # "silu" or "sigmoid"
    VALUES: tl.constexpr,
    PLANES: tl.constexpr,
    HARDWARE_FP8: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (V / BLOCK_V, HV, B). The equation is that of kernels/reference.py."""
    i_v, i_hv, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_h = i_hv // (HV // H)
    o_k = tl.arange(0, K_2)
    o_v = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
    m_k, m_v = o_k < K, o_v < V
    p_before = p_base + tl.load(p_source + i_b) * OFFSET_FLOATS
    p_after = p_base + tl.load(p_target + i_b) * OFFSET_FLOATS

    # Weights, and the state, which no kernel of this step has written.
    o_s = s_offset + i_hv * K * V + o_k[:, None] * V + o_v[None, :]
    m_s = m_k[:, None] & m_v[None, :]
    S = tl.load(p_before + o_s, m_s, 0.0)
    rows = i_h * K + o_k
    o_value = i_hv * V + o_v
    f, f_scale = load_words(p_f, p_f_scale, rows, m_k, RANK, RANK_2, F_FORMAT, F_GROUP)
    g, g_scale = load_words(p_g, p_g_scale, o_value, m_v, RANK, RANK_2, G_FORMAT, G_GROUP)
    g_bias = tl.load(p_g_bias + o_value, m_v, 0.0)
    dt_bias = tl.load(p_dt_bias + rows, m_k, 0.0)
    rate = tl.exp(tl.load(p_A_log + i_h))
    o_norm = tl.load(p_o_norm + o_v, m_v, 0.0)
    KEYS: tl.constexpr = H * K
    VALUE_DIM: tl.constexpr = HV * V
    PARTS: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    p_tail = p_before + conv_offset
    q_past = _past(p_conv, p_tail, rows, m_k, CONV)
    k_past = _past(p_conv, p_tail, KEYS + rows, m_k, CONV)
    v_past = _past(p_conv, p_tail, 2 * KEYS + o_value, m_v, CONV)
    p_newest = p_conv + CONV - 1
    q_newest = tl.load(p_newest + rows * CONV, m_k, 0.0)
    k_newest = tl.load(p_newest + (KEYS + rows) * CONV, m_k, 0.0)
    v_newest = tl.load(p_newest + (2 * KEYS + o_value) * CONV, m_v, 0.0)

    wait_for_previous(PDL)
    let_next_start(PDL)
    p_y += i_b.to(tl.int64) * y_stride
    p_gates = p_y + 2 * KEYS + VALUE_DIM
    p_ranks = p_gates + KEYS + VALUE_DIM
    new_q = tl.load(p_y + rows, m_k, 0.0)
    new_k = tl.load(p_y + KEYS + rows, m_k, 0.0)
    new_v = tl.load(p_y + 2 * KEYS + o_value, m_v, 0.0)
    erase = _sigmoid(tl.load(p_gates + rows, m_k, 0.0)) * erase_scale
    write = _sigmoid(tl.load(p_gates + KEYS + o_value, m_v, 0.0))
    decay = words_times(f, f_scale, p_ranks, RANK, RANK_2, F_FORMAT, HARDWARE_FP8) + dt_bias
    decay = tl.exp(-rate * _softplus(decay))
    gate = words_times(g, g_scale, p_ranks + RANK, RANK, RANK_2, G_FORMAT, HARDWARE_FP8) + g_bias
    gate = _sigmoid(gate) * (gate if GATE == "silu" else 1.0) * o_norm

    q = _silu(new_q * q_newest + q_past)
    k = _silu(new_k * k_newest + k_past)
    q_squares, k_squares, q_k = tl.reduce((q * q, k * k, q * k), 0, _add_triples)
    q_factor, k_factor = tl.rsqrt(q_squares + 1e-6) * scale, tl.rsqrt(k_squares + 1e-6)
    q *= q_factor
    k *= k_factor
    q_k *= q_factor * k_factor
    v = _silu(new_v * v_newest + v_past) * write

    # What is a number for each row of S goes through memory: each thread then reads what it needs, once. Left to the
    # compiler, every thread would also compute it.
    p_vectors += ((i_b * HV + i_hv) * PARTS + i_v) * (4 * K_2)
    tl.store(p_vectors + o_k, decay)
    tl.store(p_vectors + K_2 + o_k, erase * k)
    tl.store(p_vectors + 2 * K_2 + o_k, k)
    tl.store(p_vectors + 3 * K_2 + o_k, q)
    tl.debug_barrier()

    # o = q^T (S + k u^T) = q^T S + (q^T k) u, so that both sums over the keys are taken at once.
    o_row = o_k[:, None]
    S *= tl.load(p_vectors + o_row)
    erased = tl.load(p_vectors + K_2 + o_row) * S
    kept = tl.load(p_vectors + 3 * K_2 + o_row) * S
    erased, o = tl.reduce((erased, kept), 0, _add_pairs)
    u = v - erased
    S += tl.load(p_vectors + 2 * K_2 + o_row) * u[None, :]
    o += q_k * u
    tl.store(p_after + o_s, S, m_s)
    tl.store(p_squares + (i_b * HV + i_hv) * PARTS + i_v, tl.sum(o * o))
    p_values += i_b * VALUE_DIM
    write_activation(p_values, p_high, p_low, p_unit, o * gate, o_value, m_v, VALUE_DIM, BLOCK_V, VALUES, PLANES)

    # The first program of a key head moves the inputs of q and k on.
    p_after += conv_offset
    m_first = o_k < tl.where((i_v == 0) & (i_hv % (HV // H) == 0), K, 0)
    _move_on(p_tail, p_after, rows, new_q, m_first, CONV)
    _move_on(p_tail, p_after, KEYS + rows, new_k, m_first, CONV)
    _move_on(p_tail, p_after, 2 * KEYS + o_value, new_v, m_v, CONV)


@triton.jit
def _past(p_conv, p_tail, o, mask, CONV: tl.constexpr):
    """What the last CONV - 1 inputs add to the convolution at channels o."""
    total = tl.zeros(o.shape, tl.float32)
    for i in tl.static_range(CONV - 1):
        total += tl.load(p_tail + o * (CONV - 1) + i, mask, 0.0) * tl.load(p_conv + o * CONV + i, mask, 0.0)
    return total


@triton.jit
def _move_on(p_tail, p_after, o, new, mask, CONV: tl.constexpr):
    """The inputs that the next token finds: all but the oldest, and the new one."""
    for i in tl.static_range(CONV - 2):
        tl.store(p_after + o * (CONV - 1) + i, tl.load(p_tail + o * (CONV - 1) + i + 1, mask, 0.0), mask)
    tl.store(p_after + o * (CONV - 1) + CONV - 2, new, mask)


@triton.jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def _add_triples(a, b, c, d, e, f):
    return a + d, b + e, c + f


@triton.jit
def _silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _softplus(x):
    """log(1 + exp(x)), also where it is nearly 0, which the slowest decays are."""
    e = tl.exp(-tl.abs(x))
    series = e * (1.0 - e * (0.5 - e * (0.3333333333 - e * 0.25)))
    return tl.maximum(x, 0.0) + tl.where(e < 0.01, series, tl.log(1.0 + e))
