"""W x for the second matrices of gates, of a few rows x.

W [N, R] has few inputs, so a program loads all of the rows it needs at once, as they are stored and before x is there.
`load_low_rank` and `low_rank` do it within the kernel that goes on with the result; `low_rank_pair` is a kernel of its
own, for both gates.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from gdn2_edge.kernels.triton.codes import pair_values, pairs
from gdn2_edge.kernels.triton.gemm import arithmetic, multiply
from gdn2_edge.kernels.triton.launch import let_next_start, pdl_options, wait_for_previous
from gdn2_edge.kernels.triton.stored import stored
from gdn2_edge.weights import Weight

BLOCK_N, BLOCK_M = 64, 16  # rows of W and of x a program


class LowRank(NamedTuple):
    """Arguments of a kernel for a weight [N, R], R a multiple of 8, and inputs of one dtype: see `low_rank`."""

    p_weight: Tensor  # pairs of codes, or dense values
    p_scale: Tensor | None
    rank: int
    format: str
    group: int
    splits_x: bool
    ieee: bool
    ptx: bool

    @staticmethod
    def of(weight: Weight, x: Tensor) -> LowRank:
        """For inputs of x's dtype on its device."""
        format, codes, scale, group = stored(weight)
        splits_x, ieee, ptx = arithmetic(x, weight)
        is_fp32 = ieee or not x.is_cuda  # the interpreter multiplies no bf16
        return LowRank(pairs(format, codes), scale, weight.shape[1], format, group, splits_x, is_fp32, ptx)

    def constants(self, prefix: str) -> dict[str, Any]:
        """All but the tensors, for `load_low_rank` and `low_rank`."""
        names = ("RANK", "FORMAT", "GROUP", "SPLIT_X", "IEEE", "PTX")
        return {prefix + name: value for name, value in zip(names, self[2:], strict=True)}


@triton.jit
def load_low_rank(p_weight, p_scale, row, mask, RANK: tl.constexpr, FORMAT: tl.constexpr, GROUP: tl.constexpr):
    """The stored rows `row` [N] of W: codes and scale of each part of its inputs that has a scale of its own."""
    CODED: tl.constexpr = FORMAT == "int4" or FORMAT == "int8" or FORMAT == "fp8"
    PER_ELEMENT: tl.constexpr = 2 if CODED else 1
    PART: tl.constexpr = GROUP if GROUP > 0 else max(16, triton.next_power_of_2(RANK))
    o_e = tl.arange(0, PART // PER_ELEMENT)
    w = ()
    for i in tl.static_range((RANK + PART - 1) // PART):
        e = i * (PART // PER_ELEMENT) + o_e
        p_row = p_weight + row[:, None].to(tl.int64) * (RANK // PER_ELEMENT)
        codes = tl.load(p_row + e[None, :], mask[:, None] & (e < RANK // PER_ELEMENT)[None, :], 0)
        if GROUP > 0:
            w = w + (codes, tl.load(p_scale + row * (RANK // GROUP) + i, mask, 0.0).to(tl.float32))
        elif CODED:
            w = w + (codes, tl.load(p_scale + row, mask, 0.0))
        else:
            w = w + (codes, 1.0)
    return w


@triton.jit
def low_rank(
    w,
    p_x,
    mask,
    RANK: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT_X: tl.constexpr,
    IEEE: tl.constexpr,
    PTX: tl.constexpr,
):
    """W x for rows x at the pointers p_x [M], fp32 [N, M], from the weight's exact values; w is of `load_low_rank`."""
    CODED: tl.constexpr = FORMAT == "int4" or FORMAT == "int8" or FORMAT == "fp8"
    PART: tl.constexpr = GROUP if GROUP > 0 else max(16, triton.next_power_of_2(RANK))
    total = tl.zeros((w[0].shape[0], p_x.shape[0]), tl.float32)
    for i in tl.static_range((RANK + PART - 1) // PART):
        k = i * PART + tl.arange(0, PART)
        x = tl.load(p_x[:, None] + k[None, :], mask[:, None] & (k < RANK)[None, :], 0.0)
        values = w[2 * i]
        if CODED:
            values = pair_values(values, FORMAT, tl.bfloat16 if SPLIT_X else x.dtype, PTX)
            part = multiply(values, x, tl.zeros(total.shape, tl.float32), SPLIT_X, IEEE)
            total += part * w[2 * i + 1][:, None]
        else:
            total = multiply(values, x, total, SPLIT_X, IEEE)
    return total


@triton.jit
def low_rank_kernel(
    p_x,
    p_f,
    p_f_scale,
    p_g,
    p_g_scale,
    p_y_f,
    p_y_g,
    M,
    x_stride,
    F_N: tl.constexpr,
    F_RANK: tl.constexpr,
    F_FORMAT: tl.constexpr,
    F_GROUP: tl.constexpr,
    F_SPLIT_X: tl.constexpr,
    F_IEEE: tl.constexpr,
    F_PTX: tl.constexpr,
    G_N: tl.constexpr,
    G_RANK: tl.constexpr,
    G_FORMAT: tl.constexpr,
    G_GROUP: tl.constexpr,
    G_SPLIT_X: tl.constexpr,
    G_IEEE: tl.constexpr,
    G_PTX: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (tiles of F, then of G; M / BLOCK_M): the inputs of G stand behind those of F."""
    F_TILES: tl.constexpr = (F_N + BLOCK_N - 1) // BLOCK_N
    i_n = tl.program_id(0)
    o_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    p_row = p_x + o_m.to(tl.int64) * x_stride
    if i_n < F_TILES:
        o_f = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
        f = load_low_rank(p_f, p_f_scale, o_f, o_f < F_N, F_RANK, F_FORMAT, F_GROUP)
        wait_for_previous(PDL)
        let_next_start(PDL)
        y_f = low_rank(f, p_row, o_m < M, F_RANK, F_FORMAT, F_GROUP, F_SPLIT_X, F_IEEE, F_PTX)
        tl.store(p_y_f + o_m[None, :] * F_N + o_f[:, None], y_f, (o_m < M)[None, :] & (o_f < F_N)[:, None])
    else:
        o_g = (i_n - F_TILES) * BLOCK_N + tl.arange(0, BLOCK_N)
        g = load_low_rank(p_g, p_g_scale, o_g, o_g < G_N, G_RANK, G_FORMAT, G_GROUP)
        wait_for_previous(PDL)
        let_next_start(PDL)
        y_g = low_rank(g, p_row + F_RANK, o_m < M, G_RANK, G_FORMAT, G_GROUP, G_SPLIT_X, G_IEEE, G_PTX)
        tl.store(p_y_g + o_m[None, :] * G_N + o_g[:, None], y_g, (o_m < M)[None, :] & (o_g < G_N)[:, None])


def low_rank_pair(x: Tensor, f: Weight, g: Weight, y_f: Tensor, y_g: Tensor, *, pdl: bool = False) -> None:
    """y_f = F x and y_g = G x, from the weights' exact values.

    Args:
        x: [M, R_f + R_g], the inputs of F, then those of G; fp32, bf16 or fp16, rows may lie apart.
        f: [N_f, R_f].
        g: [N_g, R_g].
        y_f: fp32 [M, N_f], written.
        y_g: fp32 [M, N_g], written.
        pdl: start while the kernel before still runs; see `launch`.
    """
    first, second = LowRank.of(f, x), LowRank.of(g, x)
    tiles = triton.cdiv(f.shape[0], BLOCK_N) + triton.cdiv(g.shape[0], BLOCK_N)
    low_rank_kernel[tiles, triton.cdiv(x.shape[0], BLOCK_M)](
        *(x, first.p_weight, first.p_scale, second.p_weight, second.p_scale, y_f, y_g, x.shape[0], x.stride(0)),
        F_N=f.shape[0],
        **first.constants("F_"),
        G_N=g.shape[0],
        **second.constants("G_"),
        **{"BLOCK_N": BLOCK_N, "BLOCK_M": BLOCK_M, "PDL": pdl, "num_warps": 4},
        **pdl_options(pdl),
    )
