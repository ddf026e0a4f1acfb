"""The prefill of one layer's gated delta rule on a GPU: in chunks, token by token, and by flash-linear-attention.

    python benchmarks/gpu_chunk.py [--tokens 16 512 16384] [--tune] [--record]

Correctness first: ours against float64, at several lengths. Then one call, of bf16 inputs and an fp32 state at the
shapes of the 1.3B model, is timed in two ways: `call` from Python, with what launching takes where that is longer, and
`graph` inside a CUDA graph, which is what the GPU itself takes. flash-linear-attention joins in where it is installed.
--tune times other tiles than `chunk.TILES`, first those of the factors, then those of the scan.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from record import append, summary
from torch import Tensor
from torch.nn.functional import normalize, softplus
from triton.runtime.errors import OutOfResources

from gdn2_edge.kernels.reference import recurrent_gated_delta_rule2 as reference
from gdn2_edge.kernels.triton import chunk
from gdn2_edge.kernels.triton.chunk import chunk_gated_delta_rule2
from gdn2_edge.kernels.triton.fused_recurrent import recurrent_gated_delta_rule2

try:
    from fla.ops.gdn2 import chunk_gdn2
except ImportError:
    chunk_gdn2 = None

NAME = "gpu_chunk"
Rule = Callable[..., tuple[Tensor, Tensor]]
TOKENS = (16, 32, 64, 128, 256, 512, 1024, 4096, 16384)
RECURRENT_MAX_TOKENS = 1024
TUNE_TOKENS = (512, 16384)
CHECKED_TOKENS = (1, 100, 1000)
# Norm of the error, relative. The chunks have fp16 operands and show 6e-4, the token loop computes in fp32.
TOLERANCES = {"chunk": 1.5e-3, "recurrent": 2e-6}
REPEATS, GRAPH_CALLS = 30, 5


def make_inputs(B: int, T: int, H: int, K: int, V: int) -> dict[str, Tensor]:
    """Arguments of the rule by name on the GPU, bf16 but for g and S: unit keys, half-open gates, mild decay."""
    generator = torch.Generator("cuda").manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    inputs = {
        "q": normalize(randn(B, T, H, K), dim=-1),
        "k": normalize(randn(B, T, H, K), dim=-1),
        "v": randn(B, T, H, V),
        "b": randn(B, T, H, K).sigmoid(),
        "w": randn(B, T, H, V).sigmoid(),
    }
    inputs = {name: x.bfloat16() for name, x in inputs.items()}
    return inputs | {"g": -softplus(randn(B, T, H, K) - 3), "S": randn(B, H, K, V)}


def flash_linear_attention(S: Tensor, **inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The same call of its chunk kernels."""
    return chunk_gdn2(**inputs, initial_state=S, output_final_state=True)


RULES: dict[str, Rule] = {"chunk": chunk_gated_delta_rule2, "recurrent": recurrent_gated_delta_rule2}
if chunk_gdn2 is not None:
    RULES["fla"] = flash_linear_attention


def largest_errors(*shape: int) -> dict[str, float]:
    """Per rule, the relative error of outputs or state against float64, whichever is larger, at any checked length."""
    errors = dict.fromkeys(RULES, 0.0)
    for T in CHECKED_TOKENS:
        inputs = make_inputs(shape[0], T, *shape[1:])
        expected = reference(**{name: x.double() for name, x in inputs.items()})
        for name, rule in RULES.items():
            for x, y in zip(rule(**inputs), expected, strict=True):
                error = float((x - y).norm() / y.norm())
                errors[name] = max(errors[name], error if error == error else torch.inf)
    return errors


def milliseconds(launch: Callable[[], object], calls: int = 1) -> dict[str, float]:
    """Median and percentiles of one of `calls` calls, between two events each time."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(REPEATS)]
    for start, end in events:
        start.record()
        launch()
        end.record()
    torch.cuda.synchronize()
    return summary([start.elapsed_time(end) / calls for start, end in events])


def in_graph(launch: Callable[[], object]) -> dict[str, float]:
    """The same inside a CUDA graph of several calls."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(GRAPH_CALLS):
            launch()
    graph.replay()
    return milliseconds(graph.replay, GRAPH_CALLS)


def measure(rule: Rule, inputs: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """`call` and `graph`, after the calls that compile, tune and warm up."""
    for _ in range(3):
        rule(**inputs)
    torch.cuda.synchronize()
    return {"call": milliseconds(lambda: rule(**inputs)), "graph": in_graph(lambda: rule(**inputs))}


def candidates() -> Iterator[chunk._Tiles]:
    """Other tiles: the factors' beside today's scan, then the scan's beside today's factors."""
    for block_k, num_warps, num_stages in itertools.product((32, 64, 128), (1, 2, 4), (1, 2)):
        options = {"num_warps": num_warps, "num_stages": num_stages}
        yield replace(chunk.TILES, block_k=block_k, factors=options)
    for block_v, num_warps, num_stages in itertools.product((16, 32, 64), (2, 4, 8), (2, 3, 4)):
        yield replace(chunk.TILES, block_v=block_v, scan={"num_warps": num_warps, "num_stages": num_stages})


def tune(*shape: int) -> None:
    """Print what a call takes with other tiles, fastest first for the longest prompt."""
    inputs = [make_inputs(shape[0], T, *shape[1:]) for T in TUNE_TOKENS]
    found = []
    for tiles in [chunk.TILES, *candidates()]:
        chunk._tiles = lambda *_, tiles=tiles: tiles
        try:
            times = [measure(chunk_gated_delta_rule2, x)["graph"]["median"] for x in inputs]
        except OutOfResources:
            continue
        found.append((times[::-1], tiles))
    print(f"ms in a graph at {TUNE_TOKENS[::-1]} tokens, tiles")
    for times, tiles in sorted(found, key=lambda row: row[0]):
        print(*(f"{t:7.4f}" for t in times), tiles, flush=True)


@torch.inference_mode()
def main() -> int:
    """0, or 1 after saying on stderr what was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--head-k-dim", type=int, default=128)
    parser.add_argument("--head-v-dim", type=int, default=128)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--tune", action="store_true", help="time other tiles instead")
    parser.add_argument("--record", action="store_true", help=f"add a line to benchmarks/results/{NAME}.jsonl")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: there is no GPU here", file=sys.stderr)
        return 1

    shape = (args.batch, args.heads, args.head_k_dim, args.head_v_dim)
    errors = largest_errors(*shape)
    for name, tolerance in TOLERANCES.items():
        if not errors[name] <= tolerance:
            print(f"error: {name} is off by {errors[name]:.1e}, more than {tolerance:.0e}", file=sys.stderr)
            return 1
    print(f"{torch.cuda.get_device_name()}, B H K V = {shape}, bf16. Relative errors:", end="")
    print(*(f"  {name} {error:.1e}" for name, error in errors.items()))
    if args.tune:
        tune(*shape)
        return 0

    print(f"ms a call {'(p20 - p80)':>33}, and in a graph")
    times: dict[int, dict[str, dict[str, dict[str, float]]]] = {}
    for T in args.tokens:
        inputs = make_inputs(shape[0], T, *shape[1:])
        rules = {name: rule for name, rule in RULES.items() if name != "recurrent" or T <= RECURRENT_MAX_TOKENS}
        times[T] = {name: measure(rule, inputs) for name, rule in rules.items()}
        for name, time in times[T].items():
            call, graph = time["call"], time["graph"]
            spread = f"({call['p20']:.4f} - {call['p80']:.4f})"
            print(f"{T:6} {name:10} {call['median']:8.4f} {spread:>20} {graph['median']:8.4f}", flush=True)
    if args.record:
        sizes = dict(zip(("B", "H", "K", "V"), shape, strict=True))
        append(NAME, {"shape": sizes, "dtype": "bfloat16", "largest_errors": errors, "milliseconds": times})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
