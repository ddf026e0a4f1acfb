"""y = W x for one sequence: what a decode step spends nearly all of its time in, limited by reading W.

Each program owns consecutive rows of W and works on BLOCK_N of them at a time. Its first rows are asked for before the
kernel waits for the one before it, and later rows while earlier ones are multiplied, so that the memory is always busy.
Nothing but a load makes a thread wait until all rows are done: the loop over tiles is unrolled, and what threads have
summed of a row meets once, at the end.

bf16, fp16, fp32 and fp8 weights become fp32 in registers and meet the fp32 values of the input. int8 and int4 codes
meet the bytes of its 16-bit fixed point: four products an instruction, whose sums are exact; that takes
1.3 instructions a weight, where converting and multiplying takes 2.5 or more. See activation.py for the forms of an
input. Each thread loads what its weights meet: an exchange through shared memory would cost more than the products.

An RMSNorm is divided between two kernels: the writer of x multiplies by the norm's weight and leaves a partial sum of
x^2, the reader multiplies its results (or, for norms within heads, its inputs) by the factor.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from gdn2_edge.kernels.triton.activation import (
    BOTH_FORMS,
    Activation,
    Forms,
    load_planes,
    load_values_of,
    write_activation,
)
from gdn2_edge.kernels.triton.launch import Gpu, let_next_start, pdl_options, register_options, wait_for_previous
from gdn2_edge.kernels.triton.stored import WEIGHTS_PER_WORD, dot4, stored, weights_per_word, word_values
from gdn2_edge.weights import Weight


class Config(NamedTuple):
    """How `gemv` is cut: tiles a program, rows a tile, channels a chunk, warps, tiles asked for ahead.

    registers: the most a thread may have; 0: as many as the compiler likes. in_turn: threads add up each tile before
    the next one, which keeps the compiler from asking for all tiles at once.
    """

    tiles: int
    block_n: int
    block_k: int
    num_warps: int
    ahead: int
    registers: int = 0
    in_turn: bool = False


# Measured on an H100 as whole steps of the 1.3B model: for wide outputs, for "glu", for "add" with few and with many
# input channels (o_proj and w3).
CONFIGS = {
    "int8": (
        Config(3, 4, 512, 4, 1),
        Config(2, 8, 512, 4, 1, in_turn=True),
        Config(2, 4, 2048, 4, 2),
        Config(2, 4, 1024, 4, 1, in_turn=True),
    ),
    "int4": (
        Config(5, 8, 1024, 8, 1),
        Config(4, 4, 1024, 4, 1, in_turn=True),
        Config(2, 8, 2048, 4, 2, registers=128),
        Config(2, 4, 4096, 4, 1, in_turn=True),
    ),
    "fp8": (
        Config(4, 4, 512, 4, 1),
        Config(2, 4, 512, 4, 1),
        Config(1, 8, 1024, 8, 1, registers=80),
        Config(4, 2, 4096, 8, 2, registers=128),
    ),
    "bf16": (
        Config(6, 4, 256, 4, 2),
        Config(2, 4, 256, 4, 1),
        Config(2, 4, 1024, 4, 2, registers=128),
        Config(4, 2, 2048, 8, 1, registers=128),
    ),
    "fp32": (Config(2, 2, 256, 4, 2), Config(2, 4, 256, 8, 1), Config(2, 4, 512, 4, 2), Config(2, 4, 1024, 8, 2)),
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
    "FORMAT_2", "GROUP_2", "TILES_2", "BLOCK_N_2", "BLOCK_K_2", "AHEAD_2", "IN_TURN_2",
)  # fmt: skip


def split_for(*readers: Weight) -> int:
    """How the values of an activation lie best for the parts of a matrix; see `Activation`."""
    formats = [stored(weight)[0] for weight in readers]
    return max((WEIGHTS_PER_WORD[format] for format in formats if not format.startswith("int")), default=1)


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
        cut = (*config_2[:3], config_2.ahead, config_2.in_turn)
        pair = dict(zip(PAIR_ARGUMENTS, (*places, format_2, group_2, *cut), strict=True))
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
        SPLIT=x.split,
        VALUES=o.split if forms.values else 0,
        PLANES=forms.planes,
        OUTPUT=output,
        HEAD=channels // heads,
        PARTS=parts,
        SQUARES=triton.next_power_of_2(x.squares.numel()),
        TILES=config.tiles,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        AHEAD=config.ahead,
        IN_TURN=config.in_turn,
        ASM=gpu.asm,
        HARDWARE_FP8=gpu.hardware_fp8,
        PDL=gpu.pdl,
        **pair,
        num_warps=config.num_warps,
        **register_options(gpu.asm, config.registers),
        **pdl_options(gpu.pdl),
    )


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
    SPLIT: tl.constexpr,  # of the input's values
    VALUES: tl.constexpr,  # the split of the output's values; 0: not written
    PLANES: tl.constexpr,
    OUTPUT: tl.constexpr,  # "store" y; "add" it to the residual stream in p_y; "glu": silu(y_i) * y_(i + N)
    HEAD: tl.constexpr,
    PARTS: tl.constexpr,
    SQUARES: tl.constexpr,  # a power of two, at least num_squares
    TILES: tl.constexpr,  # a program's
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    AHEAD: tl.constexpr,  # tiles that are loaded before the first is used
    IN_TURN: tl.constexpr,  # sums of a tile are taken before the next
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
    IN_TURN_2: tl.constexpr,
):
    """One or two matrices, whose rows are divided between the programs."""
    if FORMAT_2 is None or tl.program_id(0) < programs:
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
            SPLIT,
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
            IN_TURN,
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
            SPLIT,
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
            IN_TURN_2,
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
    SPLIT: tl.constexpr,  # of the input's values
    VALUES: tl.constexpr,  # the split of the output's values; 0: not written
    PLANES: tl.constexpr,
    OUTPUT: tl.constexpr,  # "store" y; "add" it to the residual stream in p_y; "glu": silu(y_i) * y_(i + N)
    HEAD: tl.constexpr,
    PARTS: tl.constexpr,
    SQUARES: tl.constexpr,  # a power of two, at least num_squares
    TILES: tl.constexpr,  # a program's
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    AHEAD: tl.constexpr,  # tiles that are loaded before the first is used
    IN_TURN: tl.constexpr,  # sums of a tile are taken before the next
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

    let_next_start(PDL)
    wait_for_previous(PDL)
    if FORMAT == "int8" or FORMAT == "int4":
        x = load_planes(
            p_high, p_low, p_unit, p_squares, eps, K, FORMAT, NORM, HEAD, PARTS, BLOCK_N, BLOCK_K, CHUNKS, ASM
        )
    else:
        x = load_values_of(p_values, p_squares, eps, K, SPLIT, FORMAT, NORM, HEAD, PARTS, BLOCK_N, BLOCK_K, CHUNKS)
    o_part = tl.arange(0, SQUARES)
    squares = tl.load(p_squares + o_part, o_part < num_squares, 0.0) if NORM == "rms" else 0.0
    before = tl.load(p_y + o_n, mask, 0.0) if OUTPUT == "add" else 0.0

    # Each thread keeps its own sums until all tiles are done: threads that meet wait for each other's loads.
    parts, up_parts = (), ()
    for t in tl.static_range(TILES):  # unrolled: handing a tile on to the next turn would wait for its loads
        if t + AHEAD < TILES:
            first = start + (t + AHEAD) * BLOCK_N
            w = w + _load_tile(p_w, p_scale, first, end, N, K, FORMAT, GROUP, HALVES, BLOCK_N, BLOCK_K, CHUNKS)
        part = _product(w, x, TENSORS * t, FORMAT, BLOCK_N, BLOCK_K, CHUNKS, ASM, HARDWARE_FP8)
        parts = parts + (tl.sum(part, 0) if IN_TURN else part,)
        if OUTPUT == "glu":
            part = _product(w, x, TENSORS * t + TENSORS // 2, FORMAT, BLOCK_N, BLOCK_K, CHUNKS, ASM, HARDWARE_FP8)
            up_parts = up_parts + (tl.sum(part, 0) if IN_TURN else part,)

    factor = tl.rsqrt(tl.sum(squares) / K + eps) if NORM == "rms" else 1.0
    y = _side_by_side(parts, TILES, TILE_COUNT)
    if OUTPUT == "glu":
        y = tl.join(y, _side_by_side(up_parts, TILES, TILE_COUNT))
    if not IN_TURN:
        y = tl.sum(y, 0)
    if OUTPUT == "glu":
        y, up = y.split()
        up = tl.trans(up.reshape(BLOCK_N, TILE_COUNT))
    y = tl.trans(y.reshape(BLOCK_N, TILE_COUNT))
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
        out = y * gain
        write_activation(p_out_values, p_out_high, p_out_low, p_out_unit, out, start, end, N, ROWS, VALUES, PLANES)


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
    """Stored weights of up to BLOCK_N rows as int32 words [vectors, BLOCK_N, 4], CHUNKS for each half.

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
            inside = (o_v < K // VECTOR)[:, None] & mask[None, :]
            o_w = o_v[:, None, None] * 4 + tl.arange(0, 4)[None, None, :]
            words = tl.load(p_words + row[None, :, None] * (K // VECTOR * 4) + o_w, inside[:, :, None], 0)
            if FORMAT == "int4":
                o_g = row[None, :] * (K // GROUP) + (o_v // (GROUP // VECTOR))[:, None]
                tile = tile + (words, tl.load(p_scale + o_g, inside, 0.0))
            else:
                tile = tile + (words,)
    return tile


@triton.jit
def _side_by_side(parts, TILES: tl.constexpr, TILE_COUNT: tl.constexpr):
    """Tensors as one with further dimensions of 2, whose last is the lowest bit of a tensor's place in the tuple."""
    for _ in tl.static_range(TILE_COUNT - TILES):
        parts = parts + (parts[0] * 0.0,)
    for level in tl.static_range(1, 5):
        if TILE_COUNT >> level > 0:
            pairs = ()
            for i in tl.static_range(TILE_COUNT >> level):
                pairs = pairs + (tl.join(parts[i], parts[i + (TILE_COUNT >> level)]),)
            parts = pairs
    return parts[0]


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
    """Codes times x (int4: with scales) for the tile in w from FIRST on: fp32 [vectors, BLOCK_N], a thread's own."""
    PER_WORD: tl.constexpr = weights_per_word(FORMAT)
    VECTORS: tl.constexpr = BLOCK_K // (4 * PER_WORD)
    if FORMAT == "int8":
        y = tl.zeros((VECTORS, BLOCK_N, 4), tl.float32)
        for i in tl.static_range(CHUNKS):
            codes = w[FIRST + i]
            zero = tl.zeros(codes.shape, tl.int32)
            high = dot4(codes, x[3 * i], zero, ASM, True, True)
            low = dot4(codes, x[3 * i + 1], zero, ASM, True, False)
            y += (high * 256 + low).to(tl.float32) * x[3 * i + 2]
        return tl.sum(y, 2)
    elif FORMAT == "int4":
        y = tl.zeros((VECTORS, BLOCK_N), tl.float32)
        for i in tl.static_range(CHUNKS):
            words = w[FIRST + 2 * i]
            even = words & 0x0F0F0F0F
            odd = (words >> 4) & 0x0F0F0F0F
            zero = tl.zeros(words.shape, tl.int32)
            high = dot4(even, x[6 * i], zero, ASM, False, True)
            high = dot4(odd, x[6 * i + 1], high, ASM, False, True)
            low = dot4(even, x[6 * i + 2], zero, ASM, False, False)
            low = dot4(odd, x[6 * i + 3], low, ASM, False, False)
            total = tl.sum((high * 256 + low).to(tl.float32) * x[6 * i + 4], 2)
            y += (total - x[6 * i + 5]) * w[FIRST + 2 * i + 1].to(tl.float32)
        return y
    else:
        y = tl.zeros((VECTORS, BLOCK_N, 4), tl.float32)
        for i in tl.static_range(CHUNKS):
            values = word_values(w[FIRST + i], FORMAT, HARDWARE_FP8)
            for j in tl.static_range(PER_WORD):
                y += values[j] * x[PER_WORD * i + j]
        return tl.sum(y, 2)
