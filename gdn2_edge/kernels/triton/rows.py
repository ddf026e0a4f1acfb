"""What stands between the products of a step besides the mixers: the embedding, norms and gates of rows, the advance.

`embed` opens a step for one sequence or many. The other row kernels serve batches and prompts, whose products read
rows of the activations' type; a single sequence has their work inside its products (see gemv.py).
"""

from __future__ import annotations

import triton
import triton.language as tl

from gdn2_edge.kernels.triton.activation import write_activation
from gdn2_edge.kernels.triton.launch import let_next_start, wait_for_previous
from gdn2_edge.kernels.triton.stored import load_values


@triton.jit
def embed_kernel(
    p_token,  # int64 [B]
    p_w,
    p_scale,
    p_gain,  # fp32 [D], of the first norm
    p_x,  # fp32 [B, D], the residual stream
    p_values,  # x times gain, [B, D], and as planes for one sequence only
    p_high,
    p_low,
    p_unit,
    p_squares,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    VALUES: tl.constexpr,
    PLANES: tl.constexpr,
    HARDWARE_FP8: tl.constexpr,
    PDL: tl.constexpr,
):
    """x = the row of each token, the first norm's input, and its sums of squares [B, D / BLOCK]."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = o < D
    gain = tl.load(p_gain + o, mask, 0.0)
    wait_for_previous(PDL)
    let_next_start(PDL)
    i_b = tl.program_id(1)
    token = tl.load(p_token + i_b) + tl.zeros((1, 1), tl.int64)
    x = load_values(p_w, p_scale, token, o[None, :], token >= 0, mask[None, :], D, FORMAT, GROUP, HARDWARE_FP8)
    x = x.reshape(BLOCK)
    tl.store(p_x + i_b * D + o, x, mask)
    tl.store(p_squares + i_b * tl.num_programs(0) + tl.program_id(0), tl.sum(x * x))
    start = tl.program_id(0) * BLOCK
    write_activation(p_values + i_b * D, p_high, p_low, p_unit, x * gain, start, D, D, BLOCK, VALUES, PLANES)


@triton.jit
def rms_rows_kernel(p_x, p_gain, p_out, eps, D: tl.constexpr, D_2: tl.constexpr, PDL: tl.constexpr):
    """out [B, D] = RMSNorm(x [B, D] fp32) * gain, in out's type."""
    o = tl.arange(0, D_2)
    mask = o < D
    gain = tl.load(p_gain + o, mask, 0.0)
    wait_for_previous(PDL)
    let_next_start(PDL)
    i_b = tl.program_id(0).to(tl.int64)
    x = tl.load(p_x + i_b * D + o, mask, 0.0)
    x *= tl.rsqrt(tl.sum(x * x) / D + eps) * gain
    tl.store(p_out + i_b * D + o, x.to(p_out.dtype.element_ty), mask)


@triton.jit
def add_rows_kernel(
    p_x, p_y, p_sum, p_gain, p_out, eps, D: tl.constexpr, D_2: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr
):
    """sum [B, D] = x fp32 + y of any type; with NORM also out = RMSNorm(sum) * gain, in out's type."""
    o = tl.arange(0, D_2)
    mask = o < D
    wait_for_previous(PDL)
    let_next_start(PDL)
    i_b = tl.program_id(0).to(tl.int64)
    x = tl.load(p_x + i_b * D + o, mask, 0.0) + tl.load(p_y + i_b * D + o, mask, 0.0).to(tl.float32)
    tl.store(p_sum + i_b * D + o, x, mask)
    if NORM:
        x *= tl.rsqrt(tl.sum(x * x) / D + eps) * tl.load(p_gain + o, mask, 0.0)
        tl.store(p_out + i_b * D + o, x.to(p_out.dtype.element_ty), mask)


@triton.jit
def fp8_rows_kernel(p_x, p_out, p_scale, D: tl.constexpr, D_2: tl.constexpr, PDL: tl.constexpr):
    """out [B, D] in e4m3 and scale fp32 [B], out * scale = x; the largest of a row becomes 448. sm_89 and later.

    A NaN or an infinity goes on through the scale.
    """
    o = tl.arange(0, D_2)
    mask = o < D
    wait_for_previous(PDL)
    let_next_start(PDL)
    i_b = tl.program_id(0).to(tl.int64)
    x = tl.load(p_x + i_b * D + o, mask, 0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x)) * (1.0 / 448.0), 1e-30) + 0.0 * tl.sum(x)
    tl.store(p_scale + i_b, scale)
    tl.store(p_out + i_b * D + o, (x / scale).to(tl.float8e4nv), mask)


@triton.jit
def head_rows_kernel(
    p_values,
    p_squares,
    p_out,
    eps,
    HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_2: tl.constexpr,
    PARTS: tl.constexpr,
    NORM: tl.constexpr,
    PDL: tl.constexpr,
):
    """out [B, HEADS, HEAD] = values; with NORM times the RMS factor of each head, from squares [B, HEADS, PARTS]."""
    wait_for_previous(PDL)
    let_next_start(PDL)
    row = tl.program_id(1) * HEADS + tl.program_id(0)
    o = tl.arange(0, HEAD_2)
    x = tl.load(p_values + row * HEAD + o, o < HEAD, 0.0)
    if NORM:
        squares = tl.load(p_squares + row * PARTS)
        for i in tl.static_range(1, PARTS):
            squares += tl.load(p_squares + row * PARTS + i)
        x *= tl.rsqrt(squares / HEAD + eps)
    tl.store(p_out + row * HEAD + o, x.to(p_out.dtype.element_ty), o < HEAD)


@triton.jit
def glu_rows_kernel(p_y, p_out, F: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """out [B, F] = silu(y[:, :F]) * y[:, F:], y of any type; grid (B, F / BLOCK)."""
    wait_for_previous(PDL)
    let_next_start(PDL)
    i_b = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = o < F
    p_y += i_b * (2 * F)
    y = tl.load(p_y + o, mask, 0.0).to(tl.float32)
    x = y / (1.0 + tl.exp(-y)) * tl.load(p_y + F + o, mask, 0.0).to(tl.float32)
    tl.store(p_out + i_b * F + o, x.to(p_out.dtype.element_ty), mask)


@triton.jit
def advance(p_position, p_source, p_target, p_spare, i_b):
    """A token more is fed: what was just written is read next, and what was read is the last to be written over."""
    tl.store(p_position + i_b, tl.load(p_position + i_b) + 1)
    source, target, spare = tl.load(p_source + i_b), tl.load(p_target + i_b), tl.load(p_spare + i_b)
    tl.store(p_source + i_b, target)
    tl.store(p_target + i_b, spare)
    tl.store(p_spare + i_b, source)


@triton.jit
def advance_kernel(p_position, p_source, p_target, p_spare, PDL: tl.constexpr):
    """`advance` for each sequence; grid (B,)."""
    wait_for_previous(PDL)
    let_next_start(PDL)
    advance(p_position, p_source, p_target, p_spare, tl.program_id(0))
