"""Would one persistent kernel for a decoding step beat the chain of launches that gemv.py makes?

    python benchmarks/persistent_chain.py [--record]

The int8 products of the 1.3B model, each fed with what the one before it wrote, by the same code three times: launches
one after the other, launches that overlap (programmatic dependent launch), and one kernel with a barrier over the
whole GPU between two products, which asks for the first weights of the next one before it waits. Everything is checked
against fp64. Beside them the parts: empty launches, barriers alone, the persistent kernel without its barriers (which
gives wrong results). A barrier that waits too long gives up and says so, it cannot hang.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, wait
from functools import partial
from multiprocessing import get_context
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from gpu_products import HEAD, LAYERS, SHAPES, graph_seconds
from record import append
from torch import Tensor

from gdn2_edge.bench.machine import read_rate
from gdn2_edge.kernels.triton.launch import let_next_start, wait_for_previous
from gdn2_edge.kernels.triton.stored import dot4

STEPS = 4  # of one graph
TOLERANCE = 1e-4  # of a product's norm; its inputs and outputs have 16 bits
UNIT = tl.constexpr(4)  # channels that share a unit of fixed point: what one instruction multiplies


class Cut(NamedTuple):
    """Tiles a program of a chain takes, rows a tile, columns a chunk, tiles asked for ahead."""

    tiles: int
    block_n: int
    block_k: int
    ahead: int


class Design(NamedTuple):
    """A persistent kernel: programs on a multiprocessor, warps, whether it asks for weights before it arrives, cuts."""

    per_sm: int
    warps: int
    early: bool
    cuts: tuple[Cut, ...]


# in_proj, o_proj, w12, w3 and the head; of a chain as in gemv.py, where w12 counts in halves.
CHAIN = (Cut(4, 4, 512, 2), Cut(2, 4, 2048, 2), Cut(8, 4, 512, 2), Cut(4, 2, 2048, 1), Cut(4, 4, 512, 2))
CHAIN_WARPS = 4
ROWS, WIDE = Cut(0, 4, 512, 2), Cut(0, 4, 1024, 3)
TWO = (ROWS, ROWS, ROWS, Cut(0, 1, 2048, 2), ROWS)
THREE = tuple(cut._replace(ahead=1) if cut is ROWS else cut for cut in TWO)
ONE = (WIDE, WIDE, WIDE, Cut(0, 2, 4096, 2), WIDE)
DESIGNS = (Design(2, 4, False, TWO), Design(2, 4, True, TWO), Design(3, 4, False, THREE), Design(1, 8, False, ONE))

# The thread that polls gives up after so many tries, many times longer than a product takes.
POLLS = 1 << 14
WAIT_PTX = tl.constexpr(f"""{{
.reg .pred done;
.reg .s32 thread, count, tries;
mov.u32 thread, %tid.x;
setp.ne.s32 done, thread, 0;
@done bra END;
mov.s32 tries, 0;
POLL:
ld.acquire.gpu.global.s32 count, [$1];
setp.ge.s32 done, count, $2;
@done bra END;
add.s32 tries, tries, 1;
setp.lt.s32 done, tries, {POLLS};
@done bra POLL;
st.global.s32 [$1+128], 1;
END:
mov.s32 $0, 0;
}}""")


@triton.jit
def _arrive(p_barrier):
    """What this program wrote is seen by whoever waits for all programs."""
    tl.debug_barrier()
    tl.atomic_add(p_barrier, 1, sem="release", scope="gpu")


@triton.jit
def _wait(p_barrier, target):
    """Until so many programs have arrived since the launch."""
    address = p_barrier.to(tl.int64)
    tl.inline_asm_elementwise(WAIT_PTX, "=r,l,r", [address, target], dtype=tl.int32, is_pure=False, pack=1)
    tl.debug_barrier()


@triton.constexpr_function
def _matrix(matrices, j, wanted=True):
    return matrices[j] if wanted else None


# A matrix M: tuple of K, BLOCK_N, BLOCK_K, AHEAD, TILES (at least a program's, a power of two), and where its weights,
# outputs (and scales) and inputs begin in those of its layer.
@triton.jit
def _tile(p_w, p_scale, start, end, t, M: tl.constexpr):
    """Rows of W as int32 [BLOCK_N, vectors, 4], one tensor a chunk, then their scales [1, BLOCK_N]."""
    K: tl.constexpr = M[0]
    BLOCK_N: tl.constexpr = M[1]
    BLOCK_K: tl.constexpr = M[2]
    WEIGHTS_AT: tl.constexpr = M[5]
    OUT_AT: tl.constexpr = M[6]
    CHUNKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    o_n = start + t * BLOCK_N + tl.arange(0, BLOCK_N)
    o_word = tl.arange(0, 4)[None, None, :]
    row = o_n.to(tl.int64)[:, None, None] * (K // 4)
    p_words = (p_w + WEIGHTS_AT).to(tl.pointer_type(tl.int32))
    tile = ()
    for i in tl.static_range(CHUNKS):
        o_v = i * (BLOCK_K // 16) + tl.arange(0, BLOCK_K // 16)
        mask = ((o_n < end)[:, None] & (o_v < K // 16)[None, :])[:, :, None]
        tile += (tl.load(p_words + row + (o_v[None, :, None] * 4 + o_word), mask, 0),)
    tile += (tl.load(p_scale + OUT_AT + o_n, o_n < end, 0.0)[None, :],)
    return tile


@triton.jit
def _first_tiles(p_w, p_scale, start, end, M: tl.constexpr):
    AHEAD: tl.constexpr = M[3]
    w = ()
    for t in tl.static_range(AHEAD):
        w += _tile(p_w, p_scale, start, end, t, M)
    return w


@triton.jit
def _sums(w, x, FIRST: tl.constexpr, CHUNKS: tl.constexpr, ASM: tl.constexpr):
    """Of the products of a tile, over what one thread holds: fp32 [vectors, BLOCK_N]."""
    y = tl.zeros(x[2].shape, tl.float32)
    zero = tl.zeros(x[0].shape, tl.int32)
    for i in tl.static_range(CHUNKS):
        high = dot4(w[FIRST + i], x[3 * i], zero, ASM, True, True)
        low = dot4(w[FIRST + i], x[3 * i + 1], zero, ASM, True, False)
        y += (high * 256 + low).to(tl.float32) * x[3 * i + 2]
    return tl.trans(tl.sum(y, 2)) * w[FIRST + CHUNKS]


@triton.jit
def _multiply(
    p_high, p_low, p_unit, p_w, p_scale, start, end, w, p_next, p_next_scale, next_start, next_end,
    M: tl.constexpr,
    NEXT: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Rows start..end of one product, whose first tiles are in w. The first tiles of the next one, if NEXT is given."""
    K: tl.constexpr = M[0]
    BLOCK_N: tl.constexpr = M[1]
    BLOCK_K: tl.constexpr = M[2]
    AHEAD: tl.constexpr = M[3]
    CHUNKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    TILES: tl.constexpr = M[4]
    OUT_AT: tl.constexpr = M[6]
    IN_AT: tl.constexpr = M[7]
    ROWS: tl.constexpr = TILES * BLOCK_N
    no_row = tl.zeros((BLOCK_N, 1, 1), tl.int32)  # with the rows of weights: each thread loads what its weights meet
    x = ()
    for i in tl.static_range(CHUNKS):  # past the L1, which other multiprocessors' writes do not reach
        o_v = i * (BLOCK_K // 16) + tl.arange(0, BLOCK_K // 16)[None, :, None]
        o_w = o_v * 4 + tl.arange(0, 4)[None, None, :] + no_row
        inside = (o_v < K // 16) & (no_row == 0)
        for p in tl.static_range(2):
            p_words = (p_low if p else p_high).to(tl.pointer_type(tl.int32)) + IN_AT // 4
            x += (tl.load(p_words + o_w, inside, 0, cache_modifier=".cg"),)
        x += (tl.load(p_unit + IN_AT // UNIT + o_w, inside, 0.0, cache_modifier=".cg"),)
    o_n = start + tl.arange(0, ROWS)
    mask = o_n < end

    # Sums of each thread; they are added up over threads once, at the end.
    sums = tl.zeros((TILES, BLOCK_K // 16, BLOCK_N), tl.float32)
    o_tile = tl.arange(0, TILES)[:, None, None]
    last = tl.maximum(tl.cdiv(end - start, BLOCK_N * AHEAD) - 1, 0) * AHEAD
    for t in range(0, last, AHEAD):  # a tile is asked for into the registers of the one that was just used
        for i in tl.static_range(AHEAD):
            sums = tl.where(o_tile == t + i, _sums(w, x, 0, CHUNKS, ASM)[None, :, :], sums)
            w = w[CHUNKS + 1 :] + _tile(p_w, p_scale, start, end, t + i + AHEAD, M)
    for i in tl.static_range(AHEAD):
        sums = tl.where(o_tile == last + i, _sums(w, x, i * (CHUNKS + 1), CHUNKS, ASM)[None, :, :], sums)
    following = ()
    if NEXT is not None:
        following = _first_tiles(p_next, p_next_scale, next_start, next_end, NEXT)

    blocks = tl.sum(sums, 1).reshape(ROWS // UNIT, UNIT)
    unit = tl.max(tl.abs(blocks), 1) * (1.0 / 32767.0)
    q = tl.floor(blocks * (1.0 / tl.where(unit > 0, unit, 1.0))[:, None] + 0.5).to(tl.int32).reshape(ROWS)
    tl.store(p_high + OUT_AT + o_n, (q >> 8).to(tl.int8), mask)
    tl.store(p_low + OUT_AT + o_n, (q & 255).to(tl.uint8), mask)
    o_block = start // UNIT + tl.arange(0, ROWS // UNIT)
    tl.store(p_unit + OUT_AT // UNIT + o_block, unit, o_block < end // UNIT)
    return following


@triton.jit
def product_kernel(p_w, p_scale, p_high, p_low, p_unit, N, M: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr):
    """One product of a chain: int8 [N, K], fp32 [N]; all pointers are those of the layer."""
    start = tl.program_id(0) * ROWS
    end = tl.minimum(start + ROWS, N)
    w = _first_tiles(p_w, p_scale, start, end, M)
    wait_for_previous(PDL)
    let_next_start(PDL)
    _multiply(p_high, p_low, p_unit, p_w, p_scale, start, end, w, p_w, p_scale, 0, 0, M, None, True)


@triton.jit
def _share(N, i, PROGRAMS: tl.constexpr):
    """First row, and the one after the last, of share i: whole blocks of fixed point."""
    return (i * (N // UNIT) // PROGRAMS) * UNIT, ((i + 1) * (N // UNIT) // PROGRAMS) * UNIT


@triton.jit
def persistent_kernel(
    p_w, p_scale, p_high, p_low, p_unit, p_barrier, PROGRAMS: tl.constexpr, PER_SM: tl.constexpr, LAYERS: tl.constexpr,
    BYTES: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr, MATRICES: tl.constexpr, EARLY: tl.constexpr,
    BARRIERS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """All products. BYTES, CHANNELS: weights and activations of a layer. ROWS, MATRICES: of four and the head."""
    SMS: tl.constexpr = PROGRAMS // PER_SM
    i = tl.program_id(0) % SMS * PER_SM + tl.program_id(0) // SMS  # neighbours in one multiprocessor
    start, end = _share(ROWS[0], i, PROGRAMS)
    w = _first_tiles(p_w, p_scale, start, end, _matrix(MATRICES, 0))
    target = 0
    for layer in range(LAYERS):
        for j in tl.static_range(4):
            p_next, p_next_scale = p_w, p_scale
            rows = ROWS[(j + 1) % 4]
            if j == 3:
                p_next += BYTES
                p_next_scale += CHANNELS
                rows = tl.where(layer == LAYERS - 1, ROWS[4], ROWS[0])
            next_start, next_end = _share(rows, i, PROGRAMS)
            w = _multiply(
                p_high, p_low, p_unit, p_w, p_scale, start, end, w, p_next, p_next_scale, next_start, next_end,
                _matrix(MATRICES, j), _matrix(MATRICES, (j + 1) % 4, EARLY), ASM,
            )  # fmt: skip
            if BARRIERS:
                _arrive(p_barrier)
            if not EARLY:
                w = _first_tiles(p_next, p_next_scale, next_start, next_end, _matrix(MATRICES, (j + 1) % 4))
            if BARRIERS:
                target += PROGRAMS
                _wait(p_barrier, target)
            start, end = next_start, next_end
        p_w += BYTES
        p_scale += CHANNELS
        p_high += CHANNELS
        p_low += CHANNELS
        p_unit += CHANNELS // UNIT
    _multiply(p_high, p_low, p_unit, p_w, p_scale, start, end, w, p_w, p_scale, 0, 0, _matrix(MATRICES, 4), None, ASM)


@triton.jit
def barriers_kernel(p_barrier, COUNT: tl.constexpr):
    """Nothing but barriers."""
    target = 0
    for _ in range(COUNT):
        target += tl.num_programs(0)
        _arrive(p_barrier)
        _wait(p_barrier, target)


@triton.jit
def empty_kernel(PDL: tl.constexpr):
    """A launch of a chain that does nothing."""
    wait_for_previous(PDL)
    let_next_start(PDL)


class Products:
    """Random weights, and activations: x of a layer, then what in_proj, o_proj and w12 wrote; w3 writes the next x."""

    def __init__(self, device: torch.device, shapes: list[tuple[int, int]], layers: int) -> None:
        self.shapes, self.layers = shapes, layers
        (in_rows, width), (o_rows, _), (w12_rows, _), *_ = shapes
        sizes = [rows * columns for rows, columns in shapes]
        self.bytes, self.channels = sum(sizes[:4]), width + in_rows + o_rows + w12_rows
        self.weights_at = (0, sizes[0], sum(sizes[:2]), sum(sizes[:3]), 0)
        self.out_at = (width, width + in_rows, width + in_rows + o_rows, self.channels, width)
        self.in_at = (0, *self.out_at[:3], 0)
        channels = layers * self.channels + width + shapes[4][0]
        generator = torch.Generator(device).manual_seed(0)
        total = layers * self.bytes + sizes[4]
        self.weights = torch.randint(-127, 128, (total,), dtype=torch.int8, device=device, generator=generator)
        self.scale = torch.zeros(channels, device=device)
        self.high = torch.zeros(channels, dtype=torch.int8, device=device)
        self.low = torch.zeros(channels, dtype=torch.uint8, device=device)
        self.unit = torch.zeros(channels // UNIT.value, device=device)
        self.barrier = torch.zeros(64, dtype=torch.int32, device=device)  # the count; 128 bytes on: one gave up
        for layer, j in self.order():
            rows, columns = shapes[j]
            at = layer * self.channels + self.out_at[j]
            self.scale[at : at + rows] = 1 / (73 * columns**0.5)  # outputs are as large as inputs

    def order(self) -> list[tuple[int, int]]:
        """Layer and place in it of every product."""
        return [(layer, j) for layer in range(self.layers) for j in range(4)] + [(self.layers, 4)]

    def pointers(self, layer: int) -> tuple[Tensor, ...]:
        """Weights, scales and the three parts of activations from a layer on."""
        at = layer * self.channels
        weights = self.weights[layer * self.bytes :]
        return weights, self.scale[at:], self.high[at:], self.low[at:], self.unit[at // 4 :]

    def matrix(self, j: int, cut: Cut, tiles: int) -> tuple[int, ...]:
        """As kernels take it; tiles: the most that a program has."""
        places = (self.weights_at[j], self.out_at[j], self.in_at[j])
        return (self.shapes[j][1], *cut[1:], triton.next_power_of_2(triton.cdiv(tiles, cut.ahead) * cut.ahead), *places)

    def chain(self, pdl: bool) -> None:
        """A launch a product."""
        for layer, j in self.order():
            rows, cut = self.shapes[j][0], CHAIN[j]
            grid = (triton.cdiv(rows, cut.tiles * cut.block_n),)
            matrix = self.matrix(j, cut, cut.tiles)
            options = {"num_warps": CHAIN_WARPS, "launch_pdl": pdl}
            product_kernel[grid](*self.pointers(layer), rows, matrix, cut.tiles * cut.block_n, pdl, **options)

    def persistent(
        self, design: Design, programs: int, barriers: bool = True, asm: bool = True, compile_only: bool = False
    ) -> None:
        """One launch; without ASM for Triton's interpreter, one program without barriers."""
        matrices = []
        for j, cut in enumerate(design.cuts):
            most = triton.cdiv(self.shapes[j][0] // 4, programs) * 4
            matrices.append(self.matrix(j, cut, triton.cdiv(most, cut.block_n)))
        rows = tuple(rows for rows, _ in self.shapes)
        sizes = (programs, design.per_sm, self.layers, self.bytes, self.channels, rows)
        registers = min(255, 65536 // (32 * design.warps * design.per_sm) // 8 * 8)  # so that all programs fit
        options = {"num_warps": design.warps, "maxnreg": registers, "launch_cooperative_grid": True} if asm else {}
        self.barrier[:1].zero_()
        kernel = persistent_kernel
        launch = partial(kernel.warmup, grid=(programs,)) if compile_only else kernel[(programs,)]
        launch(*self.pointers(0), self.barrier, *sizes, tuple(matrices), design.early, barriers, asm, **options)

    def barriers(self, programs: int, warps: int) -> None:
        """As many as a step has."""
        self.barrier[:1].zero_()
        barriers_kernel[(programs,)](self.barrier, len(self.order()) - 1, num_warps=warps, launch_cooperative_grid=True)

    def values(self, at: int, count: int) -> Tensor:
        """Activations in fp64."""
        high, low = (plane[at : at + count].double() for plane in (self.high, self.low))
        return (256 * high + low) * self.unit[at // 4 : (at + count) // 4].double().repeat_interleave(4)

    def worst_error(self, run: Callable[[], None], seed: int) -> float:
        """Of all products after a run from a random input, |y - W x| / |W x|; buffers hold other numbers before."""
        generator = torch.Generator(self.weights.device).manual_seed(seed)
        self.high.random_(-128, 128, generator=generator)
        self.low.random_(0, 256, generator=generator)
        self.unit.uniform_(1e-4, 2e-4, generator=generator)
        run()
        worst = 0.0
        for layer, j in self.order():
            rows, columns = self.shapes[j]
            at, first = layer * self.channels, layer * self.bytes + self.weights_at[j]
            weight = self.weights[first : first + rows * columns].view(rows, columns).double()
            out = at + self.out_at[j]
            expected = weight @ self.values(at + self.in_at[j], columns) * self.scale[out : out + rows].double()
            error = (self.values(out, rows) - expected).norm() / expected.norm()
            worst = max(worst, float(error.nan_to_num(torch.inf)))
        return worst


def all_products() -> Products:
    """Those of the 1.3B model."""
    return Products(torch.device("cuda"), [*SHAPES.values(), HEAD], LAYERS)


def compile_persistent(design: Design, barriers: bool) -> None:
    """Into Triton's cache on disk, for other processes."""
    sms = torch.cuda.get_device_properties("cuda").multi_processor_count
    all_products().persistent(design, design.per_sm * sms, barriers, compile_only=True)


def compile_chain(pdl: bool) -> None:
    """The same, by running it."""
    all_products().chain(pdl)
    torch.cuda.synchronize()


def measure(run: Callable[[], None]) -> float:
    """Seconds of a run, several times in one CUDA graph; without a graph where it cannot be captured."""

    def steps() -> None:
        for _ in range(STEPS):
            run()

    try:
        return graph_seconds(steps) / STEPS
    except RuntimeError as problem:
        print(f"(no graph: {str(problem).splitlines()[0][:100]})")
        return float(triton.testing.do_bench(run, warmup=10, rep=100, return_mode="median")) / 1e3


def main() -> int:
    """Check, time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()
    if not torch.cuda.is_available() or torch.version.hip or torch.cuda.get_device_capability() < (9, 0):
        print("This needs an NVIDIA GPU of sm_90 or later.")
        return 1
    with ProcessPoolExecutor(min(10, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(compile_persistent, design, barriers) for design in DESIGNS for barriers in (True, False)]
        jobs += [pool.submit(compile_chain, pdl) for pdl in (False, True)]
        wait(jobs)  # what does not compile fails again below
    device = torch.device("cuda")
    sms, rate = torch.cuda.get_device_properties(device).multi_processor_count, read_rate(device)
    products = all_products()
    num_bytes = products.weights.nbytes + products.scale.nbytes
    count = len(products.order())

    def empty(pdl: bool) -> None:
        for _ in range(count):
            empty_kernel[(2 * sms,)](pdl, num_warps=4, launch_pdl=pdl)

    # What to time, and whether it computes the products, whether rightly.
    runs: dict[str, tuple[Callable[[], None], bool, bool]] = {
        "launches": (partial(products.chain, False), True, True),
        "dependent launches": (partial(products.chain, True), True, True),
    }
    for design in DESIGNS:
        programs = design.per_sm * sms
        name = f"persistent {design.per_sm} x {design.warps} warps, {'early' if design.early else 'late'}"
        runs[name] = (partial(products.persistent, design, programs), True, True)
        runs[f"{name}, no barriers"] = (partial(products.persistent, design, programs, barriers=False), True, False)
        runs[f"barriers alone {design.per_sm} x {design.warps} warps"] = (
            partial(products.barriers, programs, design.warps), False, False
        )  # fmt: skip
    runs["empty launches"] = (partial(empty, False), False, False)
    runs["empty dependent launches"] = (partial(empty, True), False, False)

    print(f"{torch.cuda.get_device_name()}, {num_bytes / 1e9:.4f} GB a step, read at {rate / 1e9:.0f} GB/s at best")
    print(f"{'':48}{'ms':>8}{'GB/s':>8}{'share':>8}{'error':>10}", flush=True)
    figures, failed = {}, False
    for name, (run, reads, is_right) in runs.items():
        products.barrier.zero_()
        try:
            error = max(products.worst_error(run, seed) for seed in (1, 2)) if is_right else 0.0
            run()
            gave_up = bool(products.barrier[32].item())
            seconds = float("nan") if gave_up else measure(run)
            gave_up = gave_up or bool(products.barrier[32].item())
        except Exception as problem:  # of one kernel: the others count without it
            failed = True
            print(f"{name:48} {type(problem).__name__}: {str(problem)[:200]}", flush=True)
            continue
        failed |= gave_up or error > TOLERANCE
        speed = f"{num_bytes / seconds / 1e9:8.0f}{num_bytes / seconds / rate:8.1%}" if reads else " " * 16
        shown = f"{error:10.1g}" if is_right else ""
        print(f"{name:48}{seconds * 1e3:8.4f}{speed}{shown}{'  a barrier gave up' if gave_up else ''}", flush=True)
        figures[name] = {"ms": seconds * 1e3, "error": error, "gave_up": gave_up}
    if args.record and not failed:
        append("persistent_chain", {"read_gb_per_second": rate / 1e9, "bytes": num_bytes, "runs": figures})
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
