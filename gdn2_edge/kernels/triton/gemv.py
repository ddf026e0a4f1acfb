"""y = W x for one sequence: what a decode step spends nearly all of its time in, limited by reading W.

Each program owns consecutive rows of W and works on BLOCK_N of them at a time. Its first rows are asked for before the
kernel waits for the one before it, and later rows while earlier ones are multiplied, so that the memory is always busy.

What flows between kernels is an `Activation`: fp32 values, and the same values in blocks of 8 as 16-bit fixed point
with one unit a block, in two planes of signed bytes (x = (256 high + low) unit). bf16, fp16, fp32 and fp8 weights
become fp32 in registers and meet the values. int8 and int4 codes meet the planes: four products an instruction, whose
sums are exact; that takes 1.3 instructions a weight, where converting and multiplying takes 4 to 8. The rounding is to
2^-16 of the largest of 8 neighbours, finer than fp16.

An RMSNorm is divided between two kernels: the writer of x multiplies by the norm's weight and leaves a partial sum of
x^2, the reader multiplies its results (or, for norms within heads, its inputs) by the factor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn2_edge.kernels.triton.launch import Gpu, let_next_start, pdl_options, wait_for_previous
from gdn2_edge.kernels.triton.stored import dot4, stored, weights_per_word, word_values
from gdn2_edge.weights import Weight

UNIT_BLOCK = tl.constexpr(8)


class Forms(NamedTuple):
    """Which forms of an activation its readers need: values for float weights, planes for integer ones."""

    values: bool
    planes: bool


BOTH_FORMS = Forms(True, True)


@dataclass(frozen=True)
class Activation:
    """What one kernel writes and the next reads, for K channels of one sequence.

    values: fp32 [K]. high, low: int8 [K]. unit: fp32 [K / 8]. squares: fp32, partial sums of squares before the norm's
    weight; [programs of the writer], or [heads, parts] where the norm is within heads.
    """

    values: Tensor
    high: Tensor
    low: Tensor
    unit: Tensor
    squares: Tensor


def make_activation(channels: int, squares: tuple[int, ...], device: torch.device) -> Activation:
    """Buffers for an activation of `channels` (a multiple of 8)."""
    return Activation(
        values=torch.zeros(channels, device=device),
        high=torch.zeros(channels, dtype=torch.int8, device=device),
        low=torch.zeros(channels, dtype=torch.int8, device=device),
        unit=torch.zeros(channels // 8, device=device),
        squares=torch.zeros(squares, device=device),
    )


class Config(NamedTuple):
    """How `gemv` is cut: tiles a program, rows a tile, channels a chunk, warps, tiles asked for ahead."""

    tiles: int
    block_n: int
    block_k: int
    num_warps: int
    ahead: int


# Measured on an H100 with the matrices of the 1.3B model: for wide outputs, for "glu", and for "add" with few and with
# many input channels (o_proj and w3).
CONFIGS = {
    "int8": (Config(4, 4, 512, 4, 2), Config(4, 4, 512, 4, 1), Config(2, 4, 2048, 4, 2), Config(4, 2, 2048, 4, 1)),
    "int4": (Config(5, 8, 1024, 8, 1), Config(4, 4, 1024, 4, 1), Config(2, 4, 2048, 4, 2), Config(4, 2, 4096, 4, 2)),
    "fp8": (Config(5, 8, 512, 8, 1), Config(4, 4, 1024, 4, 1), Config(2, 4, 2048, 4, 2), Config(1, 8, 1024, 8, 1)),
    "bf16": (Config(2, 2, 512, 4, 2), Config(6, 4, 512, 8, 1), Config(2, 4, 1024, 4, 2), Config(2, 4, 2048, 8, 2)),
    "fp32": (Config(2, 2, 256, 4, 2), Config(6, 4, 256, 8, 1), Config(2, 4, 512, 4, 2), Config(2, 4, 1024, 8, 2)),
}
CONFIGS["fp16"] = CONFIGS["bf16"]
MANY_CHANNELS = 4096


def gemv_config(format: str, channels: int, output: str, gpu: Gpu) -> Config:
    """The launch configuration for a matrix with so many input channels."""
    most = triton.next_power_of_2(channels)
    if gpu.is_interpreter:  # where a program costs more than what it computes
        return Config(1, 64, most, 4, 1)
    store, glu, add, add_many = CONFIGS[format]
    config = {"store": store, "glu": glu, "add": add_many if channels > MANY_CHANNELS else add}[output]
    return config._replace(block_k=min(config.block_k, most))


PAIR_ARGUMENTS = (
    "p_w_2", "p_scale_2", "p_y_2", "N_2", "programs",
    "FORMAT_2", "GROUP_2", "TILES_2", "BLOCK_N_2", "BLOCK_K_2", "AHEAD_2",
)  # fmt: skip


def num_programs(weight: Weight, output: str, gpu: Gpu) -> int:
    """How many programs `gemv` starts, and partial sums of squares it leaves."""
    rows = weight.shape[0] // (2 if output == "glu" else 1)
    config = gemv_config(stored(weight)[0], weight.shape[1], output, gpu)
    return triton.cdiv(rows, config.tiles * config.block_n)


def gemv(
    x: Activation,
    weight: Weight,
    second: Weight | None = None,
    *,
    norm: str,
    eps: float,
    output: str,
    gpu: Gpu,
    y: Tensor | None = None,
    gain: Tensor | None = None,
    out: Activation | None = None,
    forms: Forms = BOTH_FORMS,
) -> None:
    """W x with what is due before and after it.

    Args:
        weight: [N, K], one layout; K a multiple of what 16 bytes hold, and N of 8 where the output is an activation.
        second: rows below those of `weight` in another layout, for "store".
        norm: "rms": x is due the RMS factor of all its channels; "heads": each head its own; "none".
        output: "store": y = W x. "add": y += W x, and out = y * gain. "glu": out = silu(W1 x) * (W2 x), W2 below W1.
        y: fp32 [N].
        gain: fp32 [N], the weight of the norm that follows.
        forms: of `out` that its reader needs.
    """
    format, codes, scale, group = stored(weight)
    rows, channels = weight.shape[0] // (2 if output == "glu" else 1), weight.shape[1]
    config = gemv_config(format, channels, output, gpu)
    heads, parts = x.squares.shape if norm == "heads" else (1, 1)
    o = out or x
    programs = triton.cdiv(rows, config.tiles * config.block_n)
    more, pair = 0, dict.fromkeys(PAIR_ARGUMENTS)
    if second is not None:
        format_2, codes_2, scale_2, group_2 = stored(second)
        config_2 = gemv_config(format_2, channels, output, gpu)
        lanes = config.num_warps / config_2.num_warps  # one launch has one number of warps
        config_2 = config_2._replace(block_n=max(1, int(config_2.block_n * lanes)))
        more = triton.cdiv(second.shape[0], config_2.tiles * config_2.block_n)
        places = (codes_2, scale_2, y[rows:], second.shape[0], programs)
        pair = dict(zip(PAIR_ARGUMENTS, (*places, format_2, group_2, *config_2[:3], config_2.ahead), strict=True))
    gemv_kernel[(programs + more,)](
        x.values,
        x.high,
        x.low,
        x.unit,
        x.squares,
        codes,
        scale,
        y,
        gain,
        o.values,
        o.high,
        o.low,
        o.unit,
        o.squares,
        rows,
        x.squares.numel(),
        eps,
        K=channels,
        FORMAT=format,
        GROUP=group,
        NORM=norm,
        VALUES=forms.values,
        PLANES=forms.planes,
        OUTPUT=output,
        HEAD=channels // heads,
        PARTS=parts,
        SQUARES=triton.next_power_of_2(x.squares.numel()),
        TILES=config.tiles,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        AHEAD=config.ahead,
        ASM=gpu.asm,
        HARDWARE_FP8=gpu.hardware_fp8,
        PDL=gpu.pdl,
        **pair,
        num_warps=config.num_warps,
        **pdl_options(gpu.pdl),
    )


@triton.jit
def write_activation(
    p_values, p_high, p_low, p_unit, x, o, mask, ROWS: tl.constexpr, VALUES: tl.constexpr, PLANES: tl.constexpr
):
    """Write x [ROWS], ROWS a multiple of 8, for the channels o [ROWS], which start at a multiple of 8.

    VALUES and PLANES say which of the two forms a reader needs.
    """
    if VALUES:
        tl.store(p_values + o, x, mask)
    if PLANES:
        _write_planes(p_high, p_low, p_unit, x, o, mask, ROWS)


@triton.jit
def _write_planes(p_high, p_low, p_unit, x, o, mask, ROWS: tl.constexpr):
    BLOCKS: tl.constexpr = ROWS // UNIT_BLOCK
    blocks = tl.where(mask, x, 0.0).reshape(BLOCKS, UNIT_BLOCK)
    # 127 * 256 and no more, or the high byte would reach 128. A NaN goes on through the unit.
    unit = tl.max(tl.abs(blocks), 1) * (1.0 / 32512.0)
    unit = tl.where(tl.sum((blocks != blocks).to(tl.int32), 1) > 0, float("nan"), unit)
    inverse = 1.0 / tl.where(unit > 0, unit, 1.0)
    q = tl.floor(blocks * inverse[:, None] + 0.5).to(tl.int32)
    high = (q + 128) >> 8
    low = q - high * 256
    o_block = o.reshape(BLOCKS, UNIT_BLOCK)
    inside = mask.reshape(BLOCKS, UNIT_BLOCK)
    tl.store(p_high + o_block, high.to(tl.int8), inside)
    tl.store(p_low + o_block, low.to(tl.int8), inside)
    tl.store(p_unit + tl.min(o_block, 1) // UNIT_BLOCK, unit, tl.max(inside.to(tl.int32), 1) > 0)


@triton.jit
def gemv_kernel(
    p_values,  # the input, see Activation
    p_high,
    p_low,
    p_unit,
    p_squares,
    p_w,
    p_scale,
    p_y,  # fp32, for "store" and "add"
    p_gain,  # fp32 [N], the weight of the norm that follows, for "add"
    p_out_values,  # the output as an Activation, for "add" and "glu"
    p_out_high,
    p_out_low,
    p_out_unit,
    p_out_squares,
    N,  # results: rows of W, or half of them for "glu"
    num_squares,
    eps,
    K: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    NORM: tl.constexpr,  # of the input: "rms", "heads" or "none"
    VALUES: tl.constexpr,
    PLANES: tl.constexpr,
    OUTPUT: tl.constexpr,  # "store" y; "add" it to the residual stream in p_y; "glu": silu(y_i) * y_(i + N)
    HEAD: tl.constexpr,
    PARTS: tl.constexpr,
    SQUARES: tl.constexpr,  # a power of two, at least num_squares
    TILES: tl.constexpr,  # a program's
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    AHEAD: tl.constexpr,  # tiles that are loaded before the first is used
    ASM: tl.constexpr,
    HARDWARE_FP8: tl.constexpr,
    PDL: tl.constexpr,
    # Of a second matrix with the same input, by the programs from `programs` on, for "store"; None: there is none.
    p_w_2,
    p_scale_2,
    p_y_2,
    N_2,
    programs,
    FORMAT_2: tl.constexpr,
    GROUP_2: tl.constexpr,
    TILES_2: tl.constexpr,
    BLOCK_N_2: tl.constexpr,
    BLOCK_K_2: tl.constexpr,
    AHEAD_2: tl.constexpr,
):
    """One or two matrices, whose rows are divided between the programs."""
    if FORMAT_2 is None:  # noqa: SIM114  known when this is compiled, and then all there is
        _program(
            tl.program_id(0),
            p_values,
            p_high,
            p_low,
            p_unit,
            p_squares,
            p_w,
            p_scale,
            p_y,
            p_gain,
            p_out_values,
            p_out_high,
            p_out_low,
            p_out_unit,
            p_out_squares,
            N,
            num_squares,
            eps,
            K,
            FORMAT,
            GROUP,
            NORM,
            VALUES,
            PLANES,
            OUTPUT,
            HEAD,
            PARTS,
            SQUARES,
            TILES,
            BLOCK_N,
            BLOCK_K,
            AHEAD,
            ASM,
            HARDWARE_FP8,
            PDL,
        )
    elif tl.program_id(0) < programs:
        _program(
            tl.program_id(0),
            p_values,
            p_high,
            p_low,
            p_unit,
            p_squares,
            p_w,
            p_scale,
            p_y,
            p_gain,
            p_out_values,
            p_out_high,
            p_out_low,
            p_out_unit,
            p_out_squares,
            N,
            num_squares,
            eps,
            K,
            FORMAT,
            GROUP,
            NORM,
            VALUES,
            PLANES,
            OUTPUT,
            HEAD,
            PARTS,
            SQUARES,
            TILES,
            BLOCK_N,
            BLOCK_K,
            AHEAD,
            ASM,
            HARDWARE_FP8,
            PDL,
        )
    else:
        _program(
            tl.program_id(0) - programs,
            p_values,
            p_high,
            p_low,
            p_unit,
            p_squares,
            p_w_2,
            p_scale_2,
            p_y_2,
            p_gain,
            p_out_values,
            p_out_high,
            p_out_low,
            p_out_unit,
            p_out_squares,
            N_2,
            num_squares,
            eps,
            K,
            FORMAT_2,
            GROUP_2,
            NORM,
            VALUES,
            PLANES,
            OUTPUT,
            HEAD,
            PARTS,
            SQUARES,
            TILES_2,
            BLOCK_N_2,
            BLOCK_K_2,
            AHEAD_2,
            ASM,
            HARDWARE_FP8,
            PDL,
        )


@triton.jit
def _program(
    i_program,
    p_values,  # the input, see Activation
    p_high,
    p_low,
    p_unit,
    p_squares,
    p_w,
    p_scale,
    p_y,  # fp32, for "store" and "add"
    p_gain,  # fp32 [N], the weight of the norm that follows, for "add"
    p_out_values,  # the output as an Activation, for "add" and "glu"
    p_out_high,
    p_out_low,
    p_out_unit,
    p_out_squares,
    N,  # results: rows of W, or half of them for "glu"
    num_squares,
    eps,
    K: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    NORM: tl.constexpr,  # of the input: "rms", "heads" or "none"
    VALUES: tl.constexpr,
    PLANES: tl.constexpr,
    OUTPUT: tl.constexpr,  # "store" y; "add" it to the residual stream in p_y; "glu": silu(y_i) * y_(i + N)
    HEAD: tl.constexpr,
    PARTS: tl.constexpr,
    SQUARES: tl.constexpr,  # a power of two, at least num_squares
    TILES: tl.constexpr,  # a program's
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    AHEAD: tl.constexpr,  # tiles that are loaded before the first is used
    ASM: tl.constexpr,
    HARDWARE_FP8: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program of a matrix; see `gemv` and the head of this file."""
    CHUNKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    HALVES: tl.constexpr = 2 if OUTPUT == "glu" else 1
    TENSORS: tl.constexpr = HALVES * CHUNKS * (2 if FORMAT == "int4" else 1)
    TILE_COUNT: tl.constexpr = triton.next_power_of_2(TILES)
    ROWS: tl.constexpr = TILE_COUNT * BLOCK_N
    start = i_program * (TILES * BLOCK_N)
    end = tl.minimum(start + TILES * BLOCK_N, N)

    # What no kernel writes is asked for first.
    w = ()
    for t in tl.static_range(AHEAD):
        first = start + t * BLOCK_N
        w = w + _load_tile(p_w, p_scale, first, end, N, K, FORMAT, GROUP, HALVES, BLOCK_N, BLOCK_K, CHUNKS)
    o_row = tl.arange(0, ROWS)
    o_n = start + o_row
    mask = o_n < end
    scaled: tl.constexpr = FORMAT == "int8" or FORMAT == "fp8"
    scale = tl.load(p_scale + o_n, mask, 0.0) if scaled else 1.0
    up_scale = tl.load(p_scale + o_n + N, mask, 0.0) if scaled and HALVES == 2 else 1.0
    gain = tl.load(p_gain + o_n, mask, 0.0) if OUTPUT == "add" else 1.0

    wait_for_previous(PDL)
    let_next_start(PDL)
    if FORMAT == "int8" or FORMAT == "int4":
        x = _load_planes(p_high, p_low, p_unit, p_squares, eps, K, FORMAT, NORM, HEAD, PARTS, BLOCK_K, CHUNKS, ASM)
    else:
        x = _load_values(p_values, p_squares, eps, K, FORMAT, NORM, HEAD, PARTS, BLOCK_K, CHUNKS)
    factor = 1.0
    if NORM == "rms":
        o_part = tl.arange(0, SQUARES)
        factor = tl.rsqrt(tl.sum(tl.load(p_squares + o_part, o_part < num_squares, 0.0)) / K + eps)
    before = tl.load(p_y + o_n, mask, 0.0) if OUTPUT == "add" else 0.0

    y = tl.zeros((TILE_COUNT, BLOCK_N), tl.float32)
    up = tl.zeros((TILE_COUNT, BLOCK_N), tl.float32)
    o_tile = tl.arange(0, TILE_COUNT)[:, None]
    for t in range(TILES):
        first = start + (t + AHEAD) * BLOCK_N
        w = w + _load_tile(p_w, p_scale, first, end, N, K, FORMAT, GROUP, HALVES, BLOCK_N, BLOCK_K, CHUNKS)
        y = tl.where(o_tile == t, _product(w, x, 0, FORMAT, BLOCK_N, BLOCK_K, CHUNKS, ASM, HARDWARE_FP8)[None, :], y)
        if OUTPUT == "glu":
            second = _product(w, x, TENSORS // 2, FORMAT, BLOCK_N, BLOCK_K, CHUNKS, ASM, HARDWARE_FP8)
            up = tl.where(o_tile == t, second[None, :], up)
        w = w[TENSORS:]

    y = y.reshape(ROWS) * (factor * scale)
    if OUTPUT == "store":
        tl.store(p_y + o_n, y, mask)
    else:
        if OUTPUT == "glu":
            y = y * (1.0 / (1.0 + tl.exp(-y))) * (up.reshape(ROWS) * (factor * up_scale))
        else:
            y += before
            tl.store(p_y + o_n, y, mask)
            tl.store(p_out_squares + i_program, tl.sum(tl.where(mask, y * y, 0.0)))
        write_activation(p_out_values, p_out_high, p_out_low, p_out_unit, y * gain, o_n, mask, ROWS, VALUES, PLANES)


@triton.jit
def _load_tile(
    p_w,
    p_scale,
    first,
    end,
    N,
    K: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    HALVES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Stored weights of up to BLOCK_N rows as int32 words [BLOCK_N, vectors, 4], CHUNKS for each half.

    A vector is 16 bytes, what a thread loads at once. For int4 each tensor is followed by the scales of its vectors.
    """
    VECTOR: tl.constexpr = 4 * weights_per_word(FORMAT)
    o_n = first + tl.arange(0, BLOCK_N)
    mask = o_n < end
    p_words = p_w.to(tl.pointer_type(tl.int32))
    tile = ()
    for half in tl.static_range(HALVES):
        row = (o_n + half * N).to(tl.int64)
        for i in tl.static_range(CHUNKS):
            o_v = i * (BLOCK_K // VECTOR) + tl.arange(0, BLOCK_K // VECTOR)
            inside = mask[:, None] & (o_v < K // VECTOR)[None, :]
            o_w = o_v[None, :, None] * 4 + tl.arange(0, 4)[None, None, :]
            words = tl.load(p_words + row[:, None, None] * (K // VECTOR * 4) + o_w, inside[:, :, None], 0)
            if FORMAT == "int4":
                o_g = row[:, None] * (K // GROUP) + (o_v // (GROUP // VECTOR))[None, :]
                tile = tile + (words, tl.load(p_scale + o_g, inside, 0.0))  # noqa: RUF005
            else:
                tile = tile + (words,)  # noqa: RUF005  Triton's tuples have no unpacking
    return tile


@triton.jit
def _product(
    w,
    x,
    FIRST: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNKS: tl.constexpr,
    ASM: tl.constexpr,
    HARDWARE_FP8: tl.constexpr,
):
    """Codes times x (int4: with scales) for the tile in w from FIRST on: fp32 [BLOCK_N]."""
    PER_WORD: tl.constexpr = weights_per_word(FORMAT)
    VECTORS: tl.constexpr = BLOCK_K // (4 * PER_WORD)
    if FORMAT == "int8":
        y = tl.zeros((BLOCK_N, VECTORS, 4), tl.float32)
        for i in tl.static_range(CHUNKS):
            codes = w[FIRST + i]
            zero = tl.zeros(codes.shape, tl.int32)
            high = dot4(codes, x[3 * i][None, :, :].broadcast_to(codes.shape), zero, ASM, True)
            low = dot4(codes, x[3 * i + 1][None, :, :].broadcast_to(codes.shape), zero, ASM, True)
            y += (high * 256 + low).to(tl.float32) * x[3 * i + 2][None, :, :]
        return tl.sum(tl.sum(y, 2), 1)
    elif FORMAT == "int4":
        y = tl.zeros((BLOCK_N, VECTORS), tl.float32)
        for i in tl.static_range(CHUNKS):
            words = w[FIRST + 2 * i]
            even = words & 0x0F0F0F0F
            odd = (words >> 4) & 0x0F0F0F0F
            zero = tl.zeros(words.shape, tl.int32)
            high = dot4(even, x[6 * i][None, :, :].broadcast_to(words.shape), zero, ASM, False)
            high = dot4(odd, x[6 * i + 1][None, :, :].broadcast_to(words.shape), high, ASM, False)
            low = dot4(even, x[6 * i + 2][None, :, :].broadcast_to(words.shape), zero, ASM, False)
            low = dot4(odd, x[6 * i + 3][None, :, :].broadcast_to(words.shape), low, ASM, False)
            total = tl.sum((high * 256 + low).to(tl.float32) * x[6 * i + 4][None, :, :], 2)
            y += (total - x[6 * i + 5][None, :]) * w[FIRST + 2 * i + 1].to(tl.float32)
        return tl.sum(y, 1)
    else:
        y = tl.zeros((BLOCK_N, VECTORS, 4), tl.float32)
        for i in tl.static_range(CHUNKS):
            values = word_values(w[FIRST + i], FORMAT, HARDWARE_FP8)
            for j in tl.static_range(PER_WORD):
                y += values[j] * x[PER_WORD * i + j][None, :, :]
        return tl.sum(tl.sum(y, 2), 1)


@triton.jit
def _head_factor(p_squares, head, mask, eps, HEAD: tl.constexpr, PARTS: tl.constexpr):
    """The RMS factor of each head of a tensor of head indices."""
    squares = tl.zeros(head.shape, tl.float32)
    for i in tl.static_range(PARTS):
        squares += tl.load(p_squares + head * PARTS + i, mask, 0.0)
    return tl.rsqrt(squares / HEAD + eps)


@triton.jit
def _load_values(
    p_values,
    p_squares,
    eps,
    K: tl.constexpr,
    FORMAT: tl.constexpr,
    NORM: tl.constexpr,
    HEAD: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """The input, fp32, as the weights of a word are: for each chunk and weight of a word a tensor [vectors, 4]."""
    PER_WORD: tl.constexpr = weights_per_word(FORMAT)
    VECTORS: tl.constexpr = BLOCK_K // (4 * PER_WORD)
    chunks = ()
    for i in tl.static_range(CHUNKS):
        o_v = i * VECTORS + tl.arange(0, VECTORS)
        o_w = o_v[:, None] * 4 + tl.arange(0, 4)[None, :]
        mask = (o_v < K // (4 * PER_WORD))[:, None]
        factor = 1.0
        if NORM == "heads":  # a vector lies within a head
            factor = _head_factor(p_squares, o_w * PER_WORD // HEAD, mask, eps, HEAD, PARTS)
        if PER_WORD == 1:
            chunks = chunks + (tl.load(p_values + o_w, mask, 0.0) * factor,)  # noqa: RUF005
        else:
            for j in tl.static_range(PER_WORD // 2):  # two at once: the compiler then keeps them in the thread
                pair = tl.load(p_values.to(tl.pointer_type(tl.int64)) + o_w * (PER_WORD // 2) + j, mask, 0)
                first = pair.to(tl.int32).to(tl.float32, bitcast=True)
                second = (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)
                chunks = chunks + (first * factor, second * factor)  # noqa: RUF005
    return chunks


@triton.jit
def _load_planes(
    p_high,
    p_low,
    p_unit,
    p_squares,
    eps,
    K: tl.constexpr,
    FORMAT: tl.constexpr,
    NORM: tl.constexpr,
    HEAD: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNKS: tl.constexpr,
    ASM: tl.constexpr,
):
    """The input in packed bytes, arranged as the codes of a word of weights are.

    A chunk for int8 takes three tensors [vectors of 16, 4]: high bytes, low bytes, unit. For int4 six: high bytes that
    meet even and odd codes, low bytes of both, unit [vectors of 32, 4], and what codes of 8, which stand for 0, add up
    to [vectors].
    """
    p_high_words = p_high.to(tl.pointer_type(tl.int32 if FORMAT == "int8" else tl.int64))
    p_low_words = p_low.to(tl.pointer_type(tl.int32 if FORMAT == "int8" else tl.int64))
    VECTOR: tl.constexpr = 4 * weights_per_word(FORMAT)
    chunks = ()
    for i in tl.static_range(CHUNKS):
        o_v = i * (BLOCK_K // VECTOR) + tl.arange(0, BLOCK_K // VECTOR)
        o_w = o_v[:, None] * 4 + tl.arange(0, 4)[None, :]
        mask = (o_v < K // VECTOR)[:, None]
        high = tl.load(p_high_words + o_w, mask, 0)
        low = tl.load(p_low_words + o_w, mask, 0)
        unit = tl.load(p_unit + o_w * (VECTOR // 4) // UNIT_BLOCK, mask, 0.0)
        if NORM == "heads":
            unit *= _head_factor(p_squares, o_w * (VECTOR // 4) // HEAD, mask, eps, HEAD, PARTS)
        if FORMAT == "int8":
            chunks = chunks + (high, low, unit)  # noqa: RUF005
        else:
            high_even, high_odd = _even_and_odd(high, ASM)
            low_even, low_odd = _even_and_odd(low, ASM)
            eights = tl.full(high_even.shape, 0x08080808, tl.int32)
            zero = tl.zeros(high_even.shape, tl.int32)
            high = dot4(eights, high_odd, dot4(eights, high_even, zero, ASM, False), ASM, False)
            low = dot4(eights, low_odd, dot4(eights, low_even, zero, ASM, False), ASM, False)
            offset = tl.sum((high * 256 + low).to(tl.float32) * unit, 1)
            chunks = chunks + (high_even, high_odd, low_even, low_odd, unit, offset)  # noqa: RUF005
    return chunks


@triton.jit
def _even_and_odd(words, ASM: tl.constexpr):
    """Bytes 0, 2, 4, 6 and bytes 1, 3, 5, 7 of int64 words, each as int32."""
    first, second = words.to(tl.int32), (words >> 32).to(tl.int32)
    if ASM:
        even = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, 0x6420;", "=r,r,r", [first, second], dtype=tl.int32, is_pure=True, pack=1
        )
        odd = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, 0x7531;", "=r,r,r", [first, second], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        even = (first & 255) | ((first >> 8) & 0xFF00) | ((second & 255) << 16) | ((second & 0xFF0000) << 8)
        odd = ((first >> 8) & 255) | ((first >> 16) & 0xFF00)
        odd = odd | ((second << 8) & 0xFF0000) | (second & -0x1000000)
    return even, odd
