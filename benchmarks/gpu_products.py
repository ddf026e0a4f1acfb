"""Products of few to many rows with stored weights on a GPU, against the rate at which its memory can be read.

    python benchmarks/gpu_products.py [--formats int8 int4] [--rows 1 16 64 128] [--tune] [--record]

The shapes are those of one step of the 1.3B model, with what a step asks of each: norms, residuals, SwiGLU. Correctness
first: every format and number of rows against fp64. Then each product is launched over so many copies of its weight
that none is left in the L2, in one CUDA graph. The last column is a step's products together: 18 layers and the head.
--tune times other tiles than those of `gemm.TILES`, which are compiled by all cores first.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from record import append, summary
from triton.runtime.errors import OutOfResources

from gdn2_edge.bench.machine import read_rate
from gdn2_edge.kernels.triton import gemm
from gdn2_edge.kernels.triton.gemm import Next, Norm, Scratch, Tile, product, product_scratch
from gdn2_edge.weights import Dense, Fp8, Int4, Int8, Weight, num_bytes

SHAPES = {"in_proj": (10496, 2304), "o_proj": (2304, 2048), "w12": (12416, 2304), "w3": (2304, 6208)}
HEAD = (32000, 2304)
HIDDEN = 2304
LAYERS = 18
FORMATS = ("bf16", "int8", "fp8", "int4")  # int4 in groups of 64, as the recipes make it
COPIES_BYTES = 256 << 20  # several times the largest L2
LAUNCHES, REPLAYS = 20, 15
TUNED_WARPS = (1056, 2112)
TOLERANCE = 1e-4  # of sum |x w|: cuts of fp32 sums of up to 6208 terms in tensor cores


def main() -> int:
    """Parse, check, time, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 16, 64, 128])
    parser.add_argument("--no-pdl", action="store_true", help="start each launch after the one before has ended")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("There is no GPU here.")
        return 1
    pdl = not args.no_pdl and torch.version.hip is None and torch.cuda.get_device_capability() >= (9, 0)
    for format, rows in itertools.product(args.formats, args.rows):
        if (error := worst_error(format, rows, pdl)) > TOLERANCE:
            print(f"{format}, {rows} rows: off by {error:.2g}")
            return 1
    print(f"{torch.cuda.get_device_name()}, dependent launches: {pdl}")
    if args.tune:
        tune(args.formats, args.rows, pdl)
        return 0
    rate = read_rate(torch.device("cuda"))
    print(f"memory is read at {rate / 1e9:.0f} GB/s; below: microseconds (share of that rate)")
    print(f"{'':12}", *(f"{name:>14}" for name in (*SHAPES, "head", "step, ms")))
    scratch = product_scratch(torch.device("cuda"))
    for format, rows in itertools.product(args.formats, args.rows):
        times, sizes = measure(format, rows, scratch, pdl)
        cells = [f"{t * 1e6:7.1f} ({size / t / rate:4.0%})" for t, size in zip(times, sizes, strict=True)]
        step, floor = step_sum(times), step_sum(sizes) / rate
        print(f"{format:5} M={rows:<4}", *(f"{cell:>14}" for cell in cells), f"{step * 1e3:7.3f} ({floor / step:4.0%})")
        if args.record:
            shapes = {name: t * 1e6 for name, t in zip((*SHAPES, "head"), times, strict=True)}
            facts = {"gpu": torch.cuda.get_device_name(), "format": format, "rows": rows, "pdl": pdl}
            figures = {"microseconds": shapes, "step_ms": step * 1e3, "read_gb_per_second": rate / 1e9}
            append("gpu_products", {**facts, **figures})
    return 0


def make(format: str, N: int, K: int) -> Weight:
    """Random codes, and scales that keep values near 1."""
    options = {"device": "cuda"}
    scale = torch.rand(N, 1, **options) / 64 + 1e-3
    if format == "bf16":
        return Dense("w", torch.randn(N, K, dtype=torch.bfloat16, **options))
    if format == "int8":
        return Int8("w", torch.randint(-127, 128, (N, K), dtype=torch.int8, **options), scale)
    if format == "fp8":
        codes = torch.randint(0, 127, (N, K), dtype=torch.uint8, **options)
        codes |= torch.randint(0, 2, (N, K), dtype=torch.uint8, **options) << 7
        return Fp8("w", codes.view(torch.float8_e4m3fn), scale)
    codes = torch.randint(-(2**31), 2**31, (N, K // 8), dtype=torch.int32, **options)
    return Int4("w", codes, (torch.rand(N, K // 64, **options) / 8).bfloat16())


def worst_error(format: str, rows: int, pdl: bool) -> float:
    """The largest error of a product with each shape, against sum |x w|, and with SwiGLU against the largest result."""
    worst = 0.0
    scratch = product_scratch(torch.device("cuda"))
    for name, (N, K) in SHAPES.items():
        weight = make(format, N, K)
        x = torch.randn(rows, K, dtype=torch.bfloat16, device="cuda") / K
        out = torch.full((rows, N), torch.nan, device="cuda")
        product(x, weight, out, scratch=scratch, pdl=pdl)
        values = weight.rows(slice(None)).double().t()
        error = (out - x.double() @ values).abs() / (x.double().abs() @ values.abs())
        worst = max(worst, float(error.nan_to_num(torch.inf).max()))
        if name == "w12":
            glued = torch.full((rows, N // 2), torch.nan, device="cuda")
            product(x, weight, glued, glu=True, scratch=scratch, pdl=pdl)
            gate, up = out.double().chunk(2, 1)
            exact = torch.nn.functional.silu(gate) * up
            error = (glued - exact).abs() / exact.abs().max()
            worst = max(worst, float(error.nan_to_num(torch.inf).max()))
    return worst


def measure(format: str, rows: int, scratch: Scratch, pdl: bool) -> tuple[list[float], list[int]]:
    """Seconds and bytes of the weight, of one product with each shape."""
    times, sizes = [], []
    for name, shape in (SHAPES | {"head": HEAD}).items():
        weights = copies_of(format, *shape)
        times.append(time_products(name, weights, rows, scratch, pdl))
        sizes.append(num_bytes(weights[0]))
        del weights
    return times, sizes


def copies_of(format: str, N: int, K: int) -> list[Weight]:
    """So many weights that the first has left the L2 when the last was read."""
    first = make(format, N, K)
    return [first, *(make(format, N, K) for _ in range(max(LAUNCHES, COPIES_BYTES // num_bytes(first)) - 1))]


def time_products(name: str, weights: list[Weight], rows: int, scratch: Scratch, pdl: bool) -> float:
    """Seconds of a product with one of the weights, when all of them follow each other."""
    N, K = weights[0].shape
    x = torch.randn(rows, K, dtype=torch.bfloat16, device="cuda")
    is_glu, adds = name == "w12", name in ("o_proj", "w3")
    out = torch.zeros(rows, N // 2 if is_glu else N, device="cuda", dtype=torch.bfloat16 if is_glu else torch.float32)
    tiles = gemm.num_tiles(x, weights[0])
    then = Next(torch.ones(N, device="cuda"), torch.empty_like(out, dtype=x.dtype), torch.empty(rows, tiles).cuda())
    options = {
        "glu": is_glu,
        "residual": out if adds else None,
        "norm": None if adds else Norm(torch.ones(rows, HIDDEN // 128, device="cuda"), 1e-6),
        "then": then if adds else None,
    }

    def run() -> None:
        for weight in weights:
            product(x, weight, out, **options, scratch=scratch, pdl=pdl)

    return graph_seconds(run) / len(weights)


def step_sum(parts: list[float] | list[int]) -> float:
    """Of all layers and the head."""
    return LAYERS * sum(parts[:-1]) + parts[-1]


def graph_seconds(run: Callable[[], None]) -> float:
    """Median time of `run` as one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    samples = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) / 1e3)
    return summary(samples)["median"]


def candidates(format: str, block_m: int) -> Iterator[tuple[Tile, int]]:
    """Tiles with as many stages as 96 KB hold, up to 6, and numbers of warps up to which K is split."""
    for tile in itertools.product((64, 128, 256), (64, 128), (4, 8)):
        block_n, block_k, num_warps = tile
        weight_bytes = block_n * block_k * {"bf16": 16, "int4": 4}.get(format, 8) // 8
        stages = min(6, (96 << 10) // (weight_bytes + 2 * block_m * block_k))
        sums = block_n * block_m // (32 * num_warps)  # of a thread
        if stages >= 2 and sums <= 64 and block_n >= 16 * num_warps:
            yield from ((Tile(*tile, stages), warps) for warps in TUNED_WARPS)


def tuning_scratch() -> Scratch:
    """For as many programs as candidates have."""
    most = max(TUNED_WARPS) // 4
    counts = torch.zeros(most, dtype=torch.int32, device="cuda")
    return Scratch(torch.empty(most * 256 * 128, device="cuda"), counts)


def try_tile(candidate: tuple[str, int, Tile, int], weights: list[list[Weight]], pdl: bool) -> list[float] | None:
    """Seconds of one product with each list of weights, or None where there is not enough shared memory."""
    format, rows, tile, warps = candidate
    gemm.TILES[format][block_m_of(rows)], gemm.MAX_WARPS = tile, warps
    scratch = tuning_scratch()
    names = (*SHAPES, "head")
    try:
        return [time_products(name, copies, rows, scratch, pdl) for name, copies in zip(names, weights, strict=True)]
    except OutOfResources:
        return None


def compile_tiles(candidates: list[tuple[str, int, Tile, int]], pdl: bool) -> None:
    """In a process of its own: leaves what it compiles in triton's cache on the disk."""
    for candidate in candidates:
        try_tile(candidate, [[make(candidate[0], N, K)] for N, K in (*SHAPES.values(), HEAD)], pdl)


def block_m_of(rows: int) -> int:
    """The rows of x of a program."""
    return min(gemm.MAX_BLOCK_M, max(16, 1 << (rows - 1).bit_length()))


def tune(formats: list[str], all_rows: list[int], pdl: bool) -> None:
    """Print what a step's products take with other tiles, the best five for each format and number of rows."""
    work = [
        (format, rows, tile, warps)
        for format, rows in itertools.product(formats, all_rows)
        for tile, warps in candidates(format, block_m_of(rows))
    ]
    jobs = max(1, (os.cpu_count() or 2) - 1)
    by_compilation = {(format, block_m_of(rows), *rest): (format, rows, *rest) for format, rows, *rest in work}
    distinct = list(by_compilation.values())
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for future in [pool.submit(compile_tiles, distinct[i::jobs], pdl) for i in range(jobs)]:
            future.result()
    for format in formats:
        weights = [copies_of(format, N, K) for N, K in (*SHAPES.values(), HEAD)]
        for rows in all_rows:
            timed = [(times, c) for c in work if c[:2] == (format, rows) and (times := try_tile(c, weights, pdl))]
            found = sorted((step_sum(times), tile, warps, times) for times, (_, _, tile, warps) in timed)
            print(f"{format} M={rows}: step in ms, tile, warps, microseconds of each shape")
            for step, tile, warps, times in found[:5]:
                print(f"  {step * 1e3:.3f}", tuple(tile), warps, *(f"{t * 1e6:.1f}" for t in times), flush=True)
            for i, name in enumerate((*SHAPES, "head")):
                best = sorted((times[i], tile, warps) for _, tile, warps, times in found)[:3]
                print(f"  {name}:", *(f"{t * 1e6:.1f} {tuple(tile)} {warps};" for t, tile, warps in best))
        del weights


if __name__ == "__main__":
    sys.exit(main())
