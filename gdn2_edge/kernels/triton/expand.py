"""A whole weight as plain numbers in a buffer: for long prompts, which a plain matrix product then multiplies.

Knows the layouts of `gdn2_edge.weights` and nothing of what the buffer is for. Limited by memory: each weight is read
once as it is stored and written once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gdn2_edge.kernels.triton.codes import pair_values, pairs
from gdn2_edge.kernels.triton.stored import stored
from gdn2_edge.weights import Dense, Joined, Weight

ROWS, COLUMNS = 8, 512  # of one program of 8 warps: 16 weights a thread


@triton.jit
def expand_kernel(
    p_pairs,
    p_scale,
    p_out,
    N,
    K,
    out_stride,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """out[N, K] = codes * scale in fp32, rounded once; grid (K / COLUMNS, N / ROWS). GROUP 0: a scale a row."""
    i_k = tl.program_id(0)
    o_n = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    o_pair = i_k * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
    o_k = i_k * COLUMNS + tl.arange(0, COLUMNS)
    is_row = (o_n < N)[:, None]
    row = o_n.to(tl.int64)[:, None]
    b_pairs = tl.load(p_pairs + row * (K // 2) + o_pair[None, :], is_row & (o_pair < K // 2)[None, :], 0)
    values = pair_values(b_pairs, FORMAT, tl.float32, False)
    if GROUP > 0:
        GROUPS: tl.constexpr = COLUMNS // GROUP
        o_group = i_k * GROUPS + tl.arange(0, GROUPS)
        is_group = is_row & (o_group < K // GROUP)[None, :]
        scale = tl.load(p_scale + row * (K // GROUP) + o_group[None, :], is_group, 0.0).to(tl.float32)
        values = (values.reshape(ROWS, GROUPS, GROUP) * scale[:, :, None]).reshape(ROWS, COLUMNS)
    else:
        values *= tl.load(p_scale + o_n, o_n < N, 0.0)[:, None]
    values = values.to(p_out.dtype.element_ty)
    tl.store(p_out + row * out_stride + o_k[None, :], values, is_row & (o_k < K)[None, :])


def expand(weight: Weight, out: Tensor) -> None:
    """out = the exact values of `weight`, rounded once to out's dtype.

    Args:
        weight: [N, K] in any layout, K even.
        out: [N, K], fp32, bf16 or fp16, rows contiguous.

    Raises:
        BackendError: the weight is in a layout that GPUs have no kernel for.
    """
    if isinstance(weight, Joined):
        start = 0
        for part in weight.parts:
            expand(part, out[start : start + part.shape[0]])
            start += part.shape[0]
        return
    if isinstance(weight, Dense):
        out.copy_(weight.data)
        return
    format, codes, scale, group = stored(weight)
    N, K = weight.shape
    grid = (triton.cdiv(K, COLUMNS), triton.cdiv(N, ROWS))
    expand_kernel[grid](
        pairs(format, codes),
        scale,
        out,
        N,
        K,
        out.stride(0),
        FORMAT=format,
        GROUP=group,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        num_warps=8,
    )
