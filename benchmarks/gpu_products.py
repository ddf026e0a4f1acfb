"""Products of few to many rows with stored weights on a GPU, against the rate at which its memory can be read.

    python benchmarks/gpu_products.py [--formats int8 int4] [--rows 1 16 64 128] [--tune] [--record]

The shapes are those of one step of the 1.3B model. Correctness first: every format and number of rows against fp64.
Then each product is launched over so many copies of its weight that none is left in the L2, in one CUDA graph. The last
column is a step's products together: 18 layers and the head. --tune times other tiles than those of `gemm.TILES`.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator

import torch
from record import append, summary
from torch import Tensor
from triton.runtime.errors import OutOfResources

from gdn2_edge.bench.machine import read_rate
from gdn2_edge.kernels.triton import gemm
from gdn2_edge.kernels.triton.gemm import Scratch, Tile, product, product_scratch
from gdn2_edge.weights import Dense, Fp8, Int4, Int8, Weight, num_bytes

SHAPES = {"in_proj": (10496, 2304), "o_proj": (2304, 2048), "w12": (12416, 2304), "w3": (2304, 6208)}
HEAD = (32000, 2304)
LAYERS = 18
FORMATS = ("bf16", "int8", "fp8", "int4")  # int4 in groups of 64, as the recipes make it
COPIES_BYTES = 256 << 20  # several times the largest L2
LAUNCHES, REPLAYS = 20, 15
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
    """The largest error of a product with each shape, against sum |x w|."""
    worst = 0.0
    scratch = product_scratch(torch.device("cuda"))
    for N, K in SHAPES.values():
        weight = make(format, N, K)
        x = torch.randn(rows, K, dtype=torch.bfloat16, device="cuda")
        out = torch.full((rows, N), torch.nan, device="cuda")
        product(x, weight, out, scratch=scratch, pdl=pdl)
        values = weight.rows(slice(None)).double().t()
        error = (out - x.double() @ values).abs() / (x.double().abs() @ values.abs())
        worst = max(worst, float(error.nan_to_num(torch.inf).max()))
    return worst


def measure(format: str, rows: int, scratch: Scratch, pdl: bool) -> tuple[list[float], list[int]]:
    """Seconds and bytes of the weight, of one product with each shape."""
    times, sizes = [], []
    for N, K in (*SHAPES.values(), HEAD):
        first = make(format, N, K)
        copies = max(LAUNCHES, COPIES_BYTES // num_bytes(first))
        weights = [first, *(make(format, N, K) for _ in range(copies - 1))]
        x = torch.randn(rows, K, dtype=torch.bfloat16, device="cuda")
        out = torch.empty(rows, N, device="cuda")

        def run(x: Tensor = x, weights: list[Weight] = weights, out: Tensor = out) -> None:
            for weight in weights:
                product(x, weight, out, scratch=scratch, pdl=pdl)

        times.append(graph_seconds(run) / copies)
        sizes.append(num_bytes(first))
        del weights, run
    return times, sizes


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
    """Tiles with as many stages as 96 KB hold, and the number of programs up to which K is split."""
    for block_n, block_k, programs in itertools.product((32, 64, 128, 256), (64, 128, 256), (1, 160, 320)):
        weight_bytes = block_n * block_k * {"bf16": 16, "int4": 4}.get(format, 8) // 8
        stages = min(8, (96 << 10) // (weight_bytes + 2 * block_m * block_k))
        if stages >= 3 and (block_n > 32 or block_m == 16) and (block_n < 256 or block_m > 16):
            yield Tile(block_n, block_k, 4 if block_n <= 64 else 8, stages), programs


def tune(formats: list[str], all_rows: list[int], pdl: bool) -> None:
    """Print what a step's products take with other tiles, the best ten for each format and number of rows."""
    scratch = Scratch(torch.empty(320 * 256 * 128, device="cuda"), torch.zeros(320, dtype=torch.int32, device="cuda"))
    for format, rows in itertools.product(formats, all_rows):
        block_m = min(gemm.MAX_BLOCK_M, max(16, 1 << (rows - 1).bit_length()))
        found = []
        for tile, programs in candidates(format, block_m):
            gemm.TILES[format][block_m], gemm.MAX_PROGRAMS = tile, programs
            try:
                times, _ = measure(format, rows, scratch, pdl)
            except OutOfResources:
                continue
            found.append((step_sum(times), tile, programs, times))
        print(f"{format} M={rows}: step in ms, tile, programs, microseconds of each shape")
        for step, tile, programs, times in sorted(found)[:10]:
            print(f"  {step * 1e3:.3f}", tuple(tile), programs, *(f"{t * 1e6:.1f}" for t in times), flush=True)


if __name__ == "__main__":
    sys.exit(main())
