"""W x for the second matrices of gates, of a few rows x.

`low_rank` does it within the kernel that goes on with the result; `low_rank_pair` is a kernel of its own, for both
gates.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from gdn2_edge.kernels.triton.codes import pair_values, pairs
from gdn2_edge.kernels.triton.gemm import arithmetic, multiply, prefetch_rows
from gdn2_edge.kernels.triton.launch import let_next_start, pdl_options, wait_for_previous
from gdn2_edge.kernels.triton.stored import stored
from gdn2_edge.weights import Weight

BLOCK_N, BLOCK_M = 64, 16  # rows of W and of x a program
TILE_BYTES = tl.constexpr(32 << 10)  # of W in shared memory, expanded


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
        """All but the tensors."""
        names = ("RANK", "FORMAT", "GROUP", "SPLIT_X", "IEEE", "PTX")
        return {prefix + name: value for name, value in zip(names, self[2:], strict=True)}


@triton.jit
def low_rank(
    p_weight,
    p_scale,
    row,
    m_row,
    p_x,
    m_x,
    RANK: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT_X: tl.constexpr,
    IEEE: tl.constexpr,
    PTX: tl.constexpr,
):
    """Rows `row` [N] of W times x, whose rows are at the pointers p_x [M]: fp32 [N, M], from the exact values of W."""
    CODED: tl.constexpr = FORMAT == "int4" or FORMAT == "int8" or FORMAT == "fp8"
    PER_ELEMENT: tl.constexpr = 2 if CODED else 1
    LARGEST: tl.constexpr = (TILE_BYTES // 4 if IEEE else TILE_BYTES // 2) // row.shape[0]
    PART: tl.constexpr = max(16, min(GROUP if GROUP > 0 else triton.next_power_of_2(RANK), LARGEST))
    p_row = p_weight + row.to(tl.int64) * (RANK // PER_ELEMENT)
    total = tl.zeros((row.shape[0], p_x.shape[0]), tl.float32)
    for first in tl.range(0, RANK, PART, num_stages=1):
        k = first + tl.arange(0, PART)
        e = first // PER_ELEMENT + tl.arange(0, PART // PER_ELEMENT)
        w = tl.load(p_row[:, None] + e[None, :], m_row[:, None] & (e < RANK // PER_ELEMENT)[None, :], 0)
        x = tl.load(p_x[:, None] + k[None, :], m_x[:, None] & (k < RANK)[None, :], 0.0)
        if CODED:
            w = pair_values(w, FORMAT, tl.bfloat16 if SPLIT_X else x.dtype, PTX)
        if GROUP > 0:
            scale = tl.load(p_scale + row * (RANK // GROUP) + first // GROUP, m_row, 0.0).to(tl.float32)
            total += multiply(w, x, tl.zeros(total.shape, tl.float32), SPLIT_X, IEEE) * scale[:, None]
        else:
            total = multiply(w, x, total, SPLIT_X, IEEE)
    if CODED and GROUP == 0:
        total *= tl.load(p_scale + row, m_row, 0.0)[:, None]
    return total


@triton.jit
def prefetch_low_rank(p_weight, row, m_row, RANK: tl.constexpr, FORMAT: tl.constexpr, PDL: tl.constexpr):
    """Ask for the rows of W into the L2, while the kernel before still runs."""
    CODED: tl.constexpr = FORMAT == "int4" or FORMAT == "int8" or FORMAT == "fp8"
    ELEMENTS: tl.constexpr = RANK // (2 if CODED else 1)
    NUM_BYTES: tl.constexpr = ELEMENTS * (p_weight.dtype.element_ty.primitive_bitwidth // 8)
    if PDL and NUM_BYTES % 16 == 0:
        prefetch_rows(p_weight + tl.where(m_row, row, 0).to(tl.int64) * ELEMENTS, NUM_BYTES)


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
        prefetch_low_rank(p_f, o_f, o_f < F_N, F_RANK, F_FORMAT, PDL)
        wait_for_previous(PDL)
        let_next_start(PDL)
        y_f = low_rank(
            p_f, p_f_scale, o_f, o_f < F_N, p_row, o_m < M, F_RANK, F_FORMAT, F_GROUP, F_SPLIT_X, F_IEEE, F_PTX
        )
        tl.store(p_y_f + o_m[None, :] * F_N + o_f[:, None], y_f, (o_m < M)[None, :] & (o_f < F_N)[:, None])
    else:
        o_g = (i_n - F_TILES) * BLOCK_N + tl.arange(0, BLOCK_N)
        prefetch_low_rank(p_g, o_g, o_g < G_N, G_RANK, G_FORMAT, PDL)
        wait_for_previous(PDL)
        let_next_start(PDL)
        p_row += F_RANK
        y_g = low_rank(
            p_g, p_g_scale, o_g, o_g < G_N, p_row, o_m < M, G_RANK, G_FORMAT, G_GROUP, G_SPLIT_X, G_IEEE, G_PTX
        )
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
