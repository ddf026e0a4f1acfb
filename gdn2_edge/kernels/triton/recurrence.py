"""One token through the gated delta rule: everything between the two projections of a GDN-2 mixer.

A program owns a block of value channels of one value head of one sequence. It reads its part of the state from one
place and writes it to another, so that a step can be repeated or abandoned: the state before it stays whole.
Sequences are found through tables of offsets from one base pointer, in units of 16 floats.

A step has little to do and much to wait for, so what counts is how many instructions follow one another. Loads of what
the kernel before writes all start at once; weights are converted before that; tensors with a row for each key share
one layout, so that no vector has to be passed between threads; and all sums over keys are taken by one reduction.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gdn2_edge.kernels.triton.activation import write_activation
from gdn2_edge.kernels.triton.launch import OFFSET_FLOATS, let_next_start, wait_for_previous
from gdn2_edge.kernels.triton.mixer import add_triples, past, sigmoid, softplus
from gdn2_edge.kernels.triton.stored import load_codes

# Columns of f that are multiplied at a time: few enough that a thread has the same rows of f and of the state.
F_BLOCK = tl.constexpr(16)


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
    p_vectors,  # fp32 [B, HV, V / BLOCK_V, 2, BLOCK_V], a program's own
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
    ASM: tl.constexpr,
    HARDWARE_FP8: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (V / BLOCK_V, HV, B). The equation is that of kernels/reference.py."""
    i_v, i_hv, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_h = i_hv // (HV // H)
    KEYS: tl.constexpr = H * K
    VALUE_DIM: tl.constexpr = HV * V
    PARTS: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    COLUMNS: tl.constexpr = min(F_BLOCK, RANK_2)
    o_k = tl.arange(0, K_2)
    o_part = tl.arange(0, BLOCK_V)
    o_rank = tl.arange(0, RANK_2)
    o_column = tl.arange(0, COLUMNS)
    o_v = i_v * BLOCK_V + o_part
    m_k, m_v, m_rank = o_k < K, o_v < V, o_rank < RANK
    p_before = p_base + tl.load(p_source + i_b) * OFFSET_FLOATS
    p_after = p_base + tl.load(p_target + i_b) * OFFSET_FLOATS

    # Weights, and the state, which no kernel of this step has written.
    o_s = s_offset + i_hv * K * V + o_k[:, None] * V + o_v[None, :]
    m_s = m_k[:, None] & m_v[None, :]
    S = tl.load(p_before + o_s, m_s, 0.0)
    rows = i_h * K + o_k
    o_value = i_hv * V + o_v
    f, f_scale = (), 1.0
    for i in tl.static_range(0, RANK_2, COLUMNS):
        o_r, m_r = (i + o_column)[None, :], (i + o_column < RANK)[None, :]
        part, f_scale = load_codes(
            p_f, p_f_scale, rows[:, None], o_r, m_k[:, None], m_r, RANK, F_FORMAT, F_GROUP, HARDWARE_FP8
        )
        f = f + (_now(part, ASM),)
    g, g_scale = load_codes(
        p_g, p_g_scale, o_value[:, None], o_rank[None, :], m_v[:, None], m_rank[None, :],
        RANK, G_FORMAT, G_GROUP, HARDWARE_FP8,
    )  # fmt: skip
    g_bias = tl.load(p_g_bias + o_value, m_v, 0.0)
    dt_bias = tl.load(p_dt_bias + rows, m_k, 0.0)
    rate = tl.exp(tl.load(p_A_log + i_h))
    o_norm = tl.load(p_o_norm + o_v, m_v, 0.0)
    # The first program of a key head moves the inputs of q and k on. No one reads the target any more.
    p_tail, p_tail_after = p_before + conv_offset, p_after + conv_offset
    m_first = o_k < tl.where((i_v == 0) & (i_hv % (HV // H) == 0), K, 0)
    q_past, q_newest = past(p_conv, p_tail, p_tail_after, rows, m_k, m_first, CONV)
    k_past, k_newest = past(p_conv, p_tail, p_tail_after, KEYS + rows, m_k, m_first, CONV)
    v_past, v_newest = past(p_conv, p_tail, p_tail_after, 2 * KEYS + o_value, m_v, m_v, CONV)

    let_next_start(PDL)
    wait_for_previous(PDL)
    p_y += i_b.to(tl.int64) * y_stride
    p_gates = p_y + 2 * KEYS + VALUE_DIM
    p_ranks = p_gates + KEYS + VALUE_DIM
    new_q = tl.load(p_y + rows, m_k, 0.0)
    new_k = tl.load(p_y + KEYS + rows, m_k, 0.0)
    new_v = tl.load(p_y + 2 * KEYS + o_value, m_v, 0.0)
    erase = tl.load(p_gates + rows, m_k, 0.0)
    write = tl.load(p_gates + KEYS + o_value, m_v, 0.0)
    # The inputs of f and g together, one a thread, which waits here for all of them. f_input then comes from the cache
    # nearby: a thread needs too much of it to have asked for all at once.
    o_both = tl.arange(0, 2 * RANK_2)
    both = tl.load(p_ranks + o_both // RANK_2 * RANK + o_both % RANK_2, o_both % RANK_2 < RANK, 0.0)
    _, g_input = both.reshape(2, RANK_2).permute(1, 0).split()
    f_input = ()
    for i in tl.static_range(0, RANK_2, COLUMNS):
        f_input = f_input + (tl.load(p_ranks + i + o_column, i + o_column < RANK, 0.0),)

    q, k = new_q * q_newest + q_past, new_k * k_newest + k_past
    q *= sigmoid(q, ASM)
    k *= sigmoid(k, ASM)
    erase = sigmoid(erase, ASM) * erase_scale * k
    decay = f[0] * f_input[0][None, :]
    for i in tl.static_range(1, RANK_2 // COLUMNS):
        decay += f[i] * f_input[i][None, :]
    decay = tl.exp(-rate * softplus(tl.sum(decay, 1) * tl.sum(f_scale, 1) + dt_bias))
    v = new_v * v_newest + v_past
    v *= sigmoid(v, ASM) * sigmoid(write, ASM)
    gate = tl.sum(g * g_input[None, :], 1) * tl.sum(g_scale, 1) + g_bias
    gate = sigmoid(gate, ASM) * (gate if GATE == "silu" else 1.0) * o_norm

    # A thread needs v and gate of several channels, but not at once: they go through memory while the keys are summed.
    # Left to the compiler, every thread would compute them all.
    p_vectors += ((i_b * HV + i_hv) * PARTS + i_v) * (2 * BLOCK_V)
    tl.store(p_vectors + o_part, v)
    tl.store(p_vectors + BLOCK_V + o_part, gate)
    tl.debug_barrier()
    v = tl.load(p_vectors + o_part)
    gate = tl.load(p_vectors + BLOCK_V + o_part)

    # o = q^T (S + k u^T) = q^T S + (q^T k) u. Here q and k are still due their norms: three more sums over the keys,
    # which stand in the first columns of a third operand.
    S *= decay[:, None]
    column = o_part[None, :]
    products = tl.where(column == 0, (q * q)[:, None], tl.where(column == 1, (k * k)[:, None], (q * k)[:, None]))
    erased, o, products = tl.reduce((erase[:, None] * S, q[:, None] * S, products), 0, add_triples)
    q_factor = tl.rsqrt(tl.sum(tl.where(o_part == 0, products, 0.0), 0) + 1e-6) * scale
    k_factor = tl.rsqrt(tl.sum(tl.where(o_part == 1, products, 0.0), 0) + 1e-6)
    q_k = tl.sum(tl.where(o_part == 2, products, 0.0), 0)
    u = (v - erased * k_factor) * k_factor
    S += k[:, None] * u[None, :]
    tl.store(p_after + o_s, S, m_s)
    o = (o + q_k * u) * q_factor
    tl.store(p_squares + (i_b * HV + i_hv) * PARTS + i_v, tl.sum(o * o, 0))
    p_values += i_b * VALUE_DIM
    start, end = i_hv * V + i_v * BLOCK_V, (i_hv + 1) * V
    write_activation(p_values, p_high, p_low, p_unit, o * gate, start, end, VALUE_DIM, BLOCK_V, VALUES, PLANES)

    p_tail_after += CONV - 2
    tl.store(p_tail_after + rows * (CONV - 1), new_q, m_first)
    tl.store(p_tail_after + (KEYS + rows) * (CONV - 1), new_k, m_first)
    tl.store(p_tail_after + (2 * KEYS + o_value) * (CONV - 1), new_v, m_v)


@triton.jit
def _now(x, ASM: tl.constexpr):
    """x, computed by here: compilers would put its conversion off until after the wait."""
    if ASM:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=False, pack=1)
    else:
        return x
