"""Products of few to many rows with weights in their stored form, on tensor cores.

A tile of a weight is read as it is stored, decoded in registers to exact bf16 and multiplied; its scales come after, in
fp32. A program makes out^T = W x^T for a tile of W's rows, or a part of that sum over K: weights are the first operand
because sm_90 takes that one from registers, so what was decoded is never written to shared memory.

Knows the layouts of `gdn2_edge.weights`; knows nothing of what the rows are. How the sums are cut depends on the shapes
and the bucket of rows alone, so that a row's result depends on no other row, and repeats bit for bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn2_edge.errors import BackendError
from gdn2_edge.kernels.triton.codes import pair_values, pairs
from gdn2_edge.kernels.triton.launch import let_next_start, pdl_options, wait_for_previous
from gdn2_edge.kernels.triton.stored import stored
from gdn2_edge.weights import Joined, Weight


class Tile(NamedTuple):
    """How one program cuts its work; the rows of x it takes are the key in `TILES`."""

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# BLOCK_M -> Tile, measured on an H100. Each program reads all of x, 2 BLOCK_M / BLOCK_N bytes from the L2 a weight
# beside its own bits, but two programs with 64 rows of W on a multiprocessor keep it busier than one with 128. Shared
# memory stays below 99 KB.
_INT4 = {16: Tile(64, 128, 4, 6), 32: Tile(64, 128, 4, 4), 64: Tile(64, 128, 4, 4), 128: Tile(128, 64, 8, 4)}
_BYTE = {16: Tile(64, 128, 4, 6), 32: Tile(64, 128, 4, 4), 64: Tile(64, 128, 4, 4), 128: Tile(64, 128, 4, 2)}
_HALF = {16: Tile(64, 64, 4, 7), 32: Tile(64, 64, 4, 6), 64: Tile(64, 128, 4, 3), 128: Tile(64, 64, 4, 4)}
TILES = {"int4": _INT4, "int8": _BYTE, "fp8": _BYTE, "bf16": _HALF, "fp16": _HALF}
MAX_BLOCK_M = 128
SPLIT_X_TILE = Tile(64, 32, 4, 3)  # x and its three bf16 parts lie in shared memory together
IEEE_BLOCK_M, IEEE_TILE = 16, Tile(32, 16, 4, 2)  # fp32 by fp32, without tensor cores
AMD_MAX_BLOCK_M, AMD_TILE = 64, Tile(64, 64, 8, 2)  # 64 KB of shared memory, and no spilled registers

# K is cut in up to MAX_SPLITS parts: while there are not more warps than this, about 8 for each SM of a large GPU, and
# each part has MIN_STEPS of BLOCK_K.
MAX_WARPS = 1056
MAX_SPLITS = 8
MIN_STEPS = 8
# Bytes of each row of a program's weights that are fetched into the L2 while the kernel before still runs.
PREFETCH_BYTES = tl.constexpr(512)


class Scratch(NamedTuple):
    """Partial sums of products whose K is split; shared by products that follow each other on one stream."""

    partials: Tensor
    counts: Tensor


class Norm(NamedTuple):
    """The RMSNorm of x that is due: x has its gain already, not its factor. squares: fp32 [M, parts], sums to x^2."""

    squares: Tensor
    eps: float


class Next(NamedTuple):
    """What the norm after a product needs: gain fp32 [N] is given, rows = out * gain [M, N] and squares are written."""

    gain: Tensor
    rows: Tensor
    squares: Tensor  # fp32 [M, num_tiles(...)]


def product_scratch(device: torch.device) -> Scratch:
    """About 9 MB; `counts` are zero between products."""
    tiles = [(block_m, tile) for of_format in TILES.values() for block_m, tile in of_format.items()]
    tiles += [(MAX_BLOCK_M, SPLIT_X_TILE), (AMD_MAX_BLOCK_M, AMD_TILE), (IEEE_BLOCK_M, IEEE_TILE)]
    sums = [block_m * tile.block_n * (MAX_WARPS // tile.num_warps) for block_m, tile in tiles]
    return Scratch(
        torch.empty(max(sums), dtype=torch.float32, device=device),
        torch.zeros(MAX_WARPS, dtype=torch.int32, device=device),
    )


def splits_of(tiles: int, steps: int, num_warps: int) -> int:
    """In how many parts K is cut, for so many tiles of the output, steps of BLOCK_K and warps a program."""
    return max(1, min(MAX_SPLITS, MAX_WARPS // (tiles * num_warps), steps // MIN_STEPS))


@triton.jit
def prefetch_rows(p_rows, num_bytes):
    """Ask for num_bytes from each pointer of p_rows [N] on into the L2, both multiples of 16; sm_90 and later.

    A warp issues these one lane after another, so threads that hold a row a second time leave it out.
    """
    tl.inline_asm_elementwise(
        """{
        .reg .u32 thread;
        .reg .pred is_first;
        mov.u32 thread, %tid.x;
        setp.lt.u32 is_first, thread, $3;
        @is_first cp.async.bulk.prefetch.L2.global [$1], $2;
        mov.u32 $0, 0;
        }""",
        "=r,l,r,r",
        [p_rows.to(tl.int64), num_bytes, p_rows.shape[0]],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def dot(w, x, acc, IEEE: tl.constexpr):
    """acc + w x^T for w [N, K] and x [M, K]; IEEE: as fp32, without tensor cores."""
    if IEEE:
        return tl.dot(w.to(tl.float32), tl.trans(x.to(tl.float32)), acc, input_precision="ieee")
    else:
        return tl.dot(w, tl.trans(x), acc)


@triton.jit
def multiply(w, x, acc, SPLIT_X: tl.constexpr, IEEE: tl.constexpr):
    """acc + w x^T. SPLIT_X: w is bf16, and x is taken as three bf16, which hold 24 bits; the smallest goes first."""
    if SPLIT_X:
        rest = x.to(tl.float32)
        high = rest.to(tl.bfloat16)
        rest -= high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        rest -= middle.to(tl.float32)
        acc = dot(w, rest.to(tl.bfloat16), acc, IEEE)
        acc = dot(w, middle, acc, IEEE)
        return dot(w, high, acc, IEEE)
    else:
        return dot(w, x, acc, IEEE)


@triton.jit
def product_kernel(
    p_x,
    p_weight,
    p_scale,
    p_residual,
    p_out,
    p_partials,
    p_counts,
    p_squares,
    p_gain,
    p_next_rows,
    p_next_squares,
    M,
    N,
    k_units,
    x_stride,
    residual_stride,
    out_stride,
    squares_parts,
    eps,
    K_UNIT: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT_X: tl.constexpr,
    IEEE: tl.constexpr,
    GLU: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    NORM_PARTS: tl.constexpr,
    HAS_NEXT: tl.constexpr,
    SPLITS: tl.constexpr,
    EVEN_K: tl.constexpr,
    PTX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """out[M, N] = x W^T * scale + residual; grid (rows / BLOCK_M, tiles of W, SPLITS). See `Norm` and `Next`.

    GLU: W has 2 N rows, and out = silu(x W1^T) * (x W2^T), W2 below W1; a tile has as many rows of each. p_weight
    points to pairs of codes (see `codes`) or to dense values. GROUP weights of a row share a scale; it is 0 where all
    do. Of the programs of one tile each leaves its fp32 sum in p_partials and counts itself in p_counts, and the one
    that comes last adds the sums in the order of K.
    """
    K = k_units * K_UNIT  # a product, so that the compiler knows how rows are aligned
    CODED: tl.constexpr = FORMAT == "int4" or FORMAT == "int8" or FORMAT == "fp8"
    PER_ELEMENT: tl.constexpr = 2 if CODED else 1
    ELEMENT_BYTES: tl.constexpr = p_weight.dtype.element_ty.primitive_bitwidth // 8
    PART_K: tl.constexpr = min(BLOCK_K, GROUP) if GROUP > 0 else BLOCK_K  # what one dot takes
    PARTS: tl.constexpr = BLOCK_K // PART_K
    OUT_N: tl.constexpr = BLOCK_N // 2 if GLU else BLOCK_N
    row_elements = k_units * (K_UNIT // PER_ELEMENT)
    i_m, i_n, i_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    steps = tl.cdiv(K, BLOCK_K)
    first, last = i_s * steps // SPLITS, (i_s + 1) * steps // SPLITS

    o_n = i_n * OUT_N + tl.arange(0, OUT_N)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_e = tl.arange(0, PART_K // PER_ELEMENT)
    o_k = tl.arange(0, PART_K)
    row = tl.where(o_n < N, o_n, 0)
    if GLU:
        row = (row[None, :] + tl.arange(0, 2)[:, None] * N).reshape(BLOCK_N)
    p_row = p_weight + row.to(tl.int64) * row_elements
    start = first * (BLOCK_K // PER_ELEMENT)
    if PDL and PREFETCH_BYTES > 0 and K_UNIT // PER_ELEMENT * ELEMENT_BYTES % 16 == 0:
        num_bytes = (tl.minimum(last * (BLOCK_K // PER_ELEMENT), row_elements) - start) * ELEMENT_BYTES
        prefetch_rows(p_row + start, tl.minimum(num_bytes, PREFETCH_BYTES))
    if GROUP > 0:
        p_group = p_scale + row * (K // GROUP)
        scale = tl.load(p_group + first * BLOCK_K // GROUP)
    elif CODED:
        scale = tl.load(p_scale + row)
    wait_for_previous(PDL)

    p_w = p_row[:, None] + o_e[None, :]
    p_xs = p_x + o_m[:, None] * x_stride + o_k[None, :]
    is_row = (o_m < M)[:, None]
    if NORM_PARTS > 0:
        o_p = tl.arange(0, NORM_PARTS)[None, :]
        squares = tl.load(p_squares + o_m[:, None] * squares_parts + o_p, is_row & (o_p < squares_parts), 0.0)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for i in range(first * PARTS, last * PARTS, PARTS):
        for j in tl.static_range(PARTS):
            e = (i + j) * (PART_K // PER_ELEMENT)
            k = (i + j) * PART_K
            if EVEN_K:
                w = tl.load(p_w + e)
                x = tl.load(p_xs + k, mask=is_row, other=0.0)
            else:
                w = tl.load(p_w + e, mask=(e + o_e < row_elements)[None, :], other=0)
                x = tl.load(p_xs + k, mask=is_row & (k + o_k < K)[None, :], other=0.0)
            if CODED:
                w = pair_values(w, FORMAT, tl.bfloat16 if SPLIT_X else p_x.dtype.element_ty, PTX)
            if GROUP > 0:
                # One part ahead, by hand: the compiler does not pipeline loads this narrow.
                next_scale = tl.load(p_group + tl.minimum(k + PART_K, K - 1) // GROUP)
                total, acc = acc, tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            acc = multiply(w, x, acc, SPLIT_X, IEEE)
            if GROUP > 0:
                acc = total + acc * scale.to(tl.float32)[:, None]
                scale = next_scale

    # No earlier: programs of the next kernel that wait would take room from those of this one.
    let_next_start(PDL)
    is_last = True
    if SPLITS > 1:
        i_tile = i_n * tl.num_programs(0) + i_m
        o_tile = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        p_tile = p_partials + i_tile * (SPLITS * BLOCK_N * BLOCK_M) + o_tile
        tl.store(p_tile + i_s * (BLOCK_N * BLOCK_M), acc)
        tl.debug_barrier()  # every thread's part is written before the program is counted
        is_last = tl.atomic_add(p_counts + i_tile, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
        if is_last:
            acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for s in tl.static_range(SPLITS):
                acc += tl.load(p_tile + s * (BLOCK_N * BLOCK_M), cache_modifier=".cg")
            tl.store(p_counts + i_tile, 0)
    if is_last:
        if CODED and GROUP == 0:
            acc *= scale[:, None]
        if NORM_PARTS > 0:
            acc *= tl.rsqrt(tl.sum(squares, 1) / K + eps)[None, :]
        if GLU:
            gate, up = tl.permute(acc.reshape(2, OUT_N, BLOCK_M), (1, 2, 0)).split()
            y = gate / (1.0 + tl.exp(-gate)) * up
        else:
            y = acc
        is_inside = (o_m < M)[None, :] & (o_n < N)[:, None]
        if HAS_RESIDUAL:
            p_r = p_residual + o_m[None, :] * residual_stride + o_n[:, None]
            y += tl.load(p_r, mask=is_inside, other=0.0).to(tl.float32)
        tl.store(p_out + o_m[None, :] * out_stride + o_n[:, None], y.to(p_out.dtype.element_ty), mask=is_inside)
        if HAS_NEXT:
            y = tl.where(is_inside, y, 0.0)
            tl.store(p_next_squares + o_m * tl.num_programs(1) + i_n, tl.sum(y * y, 0), mask=o_m < M)
            y *= tl.load(p_gain + o_n, mask=o_n < N, other=0.0)[:, None]
            o_next = o_m[None, :] * N + o_n[:, None]
            tl.store(p_next_rows + o_next, y.to(p_next_rows.dtype.element_ty), mask=is_inside)


def num_tiles(x: Tensor, weight: Weight) -> int:
    """How many partial sums of squares of a row a product leaves to the next, see `Next`."""
    return triton.cdiv(weight.shape[0], _plan(x, weight).tile.block_n)


class Arithmetic(NamedTuple):
    """How inputs meet weights; constants of `multiply` and `pair_values`."""

    splits_x: bool
    ieee: bool
    ptx: bool


def arithmetic(x: Tensor, weight: Weight) -> Arithmetic:
    """For inputs of x's dtype on its device."""
    format, codes, scale, _ = stored(weight)
    is_direct = x.dtype == codes.dtype if scale is None else x.dtype != torch.float32
    splits_x = not is_direct and (scale is not None or format == "bf16")
    is_bf16 = splits_x or x.dtype == torch.bfloat16
    ieee = format == "fp32" or not (is_direct or splits_x)
    return Arithmetic(splits_x, ieee, x.is_cuda and torch.version.hip is None and is_bf16)


class _Plan(NamedTuple):
    block_m: int
    tile: Tile
    arithmetic: Arithmetic


def _plan(x: Tensor, weight: Weight) -> _Plan:
    how = arithmetic(x, weight)
    is_amd = torch.version.hip is not None
    largest = IEEE_BLOCK_M if how.ieee else AMD_MAX_BLOCK_M if is_amd else MAX_BLOCK_M
    block_m = min(largest, max(16, triton.next_power_of_2(x.shape[0])))
    if how.ieee or how.splits_x or is_amd:
        tile = IEEE_TILE if how.ieee else AMD_TILE if is_amd else SPLIT_X_TILE
    else:
        tile = TILES[stored(weight)[0]][block_m]
    return _Plan(block_m, tile, how)


def product(
    x: Tensor,
    weight: Weight,
    out: Tensor,
    *,
    glu: bool = False,
    residual: Tensor | None = None,
    norm: Norm | None = None,
    then: Next | None = None,
    scratch: Scratch | None = None,
    pdl: bool = False,
) -> None:
    """out = x W^T + residual, summed in fp32 from the weight's exact values.

    Args:
        x: [M, K], bf16, fp16 or fp32, rows contiguous. fp32 is not rounded.
        weight: [N, K] in any layout, K a multiple of 8.
        out: [M, N], fp32 or bf16.
        glu: out [M, N / 2] = silu(x W1^T) * (x W2^T) instead, W2 below W1 in one layout.
        residual: [M, N], fp32 or bf16; may be `out` itself.
        norm: multiplies the product, before the residual.
        then: also written.
        scratch: of `product_scratch`; without it K is never split, and few rows of output leave SMs idle.
        pdl: start while the kernel before still runs; see `launch`.
    """
    if isinstance(weight, Joined):
        if glu:
            raise BackendError(f"{weight.name} has parts of several formats, expected one for a gated product.")
        start = 0
        for part in weight.parts:
            columns = slice(start, start + part.shape[0])
            rest = None if residual is None else residual[:, columns]
            product(x, part, out[:, columns], residual=rest, norm=norm, scratch=scratch, pdl=pdl)
            start += part.shape[0]
        return
    (M, K), N = x.shape, weight.shape[0] // (2 if glu else 1)
    format, codes, scale, group = stored(weight)
    block_m, tile, how = _plan(x, weight)
    grid = (triton.cdiv(M, block_m), triton.cdiv(N, tile.block_n // (2 if glu else 1)))
    splits = 1 if scratch is None else splits_of(grid[0] * grid[1], triton.cdiv(K, tile.block_k), tile.num_warps)
    k_unit = next(unit for unit in (32, 16, 8) if K % unit == 0)
    product_kernel[(*grid, splits)](
        x,
        pairs(format, codes),
        scale,
        residual,
        out,
        None if scratch is None or splits == 1 else scratch.partials,
        None if scratch is None or splits == 1 else scratch.counts,
        norm.squares if norm else None,
        *(then or (None, None, None)),
        M,
        N,
        K // k_unit,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        out.stride(0),
        norm.squares.shape[1] if norm else 0,
        norm.eps if norm else 0.0,
        K_UNIT=k_unit,
        FORMAT=format,
        GROUP=group,
        SPLIT_X=how.splits_x,
        IEEE=how.ieee or not x.is_cuda,  # the interpreter multiplies no bf16
        GLU=glu,
        HAS_RESIDUAL=residual is not None,
        NORM_PARTS=triton.next_power_of_2(norm.squares.shape[1]) if norm else 0,
        HAS_NEXT=then is not None,
        SPLITS=splits,
        EVEN_K=K % tile.block_k == 0,
        PTX=how.ptx,
        BLOCK_M=block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        PDL=pdl,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **pdl_options(pdl),
    )
