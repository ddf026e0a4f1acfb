"""How much faster the chunked prefill is than the token loop, on this machine's CPU.

Checks both against float64 first, then times them in turn, so that both meet the same disturbances. Exits 1
when a result is wrong or the ratio is under --minimum-ratio.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import torch
from record import append, machine, summary
from torch import Tensor
from torch.nn.functional import normalize, softplus

from gdn2_edge.kernels.chunk import chunk_gated_delta_rule2
from gdn2_edge.kernels.reference import recurrent_gated_delta_rule2

NAME = "chunk_vs_recurrent"
# Some 100 float32 roundings on outputs and states of size 1 to 10.
TOLERANCE = 4e-6
RULES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "recurrent": recurrent_gated_delta_rule2,
    "chunk": chunk_gated_delta_rule2,
}


def make_inputs(B: int, T: int, H: int, K: int, V: int) -> dict[str, Tensor]:
    """Arguments of the rule by name, float32: unit keys, half-open gates, mild decay."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "q": normalize(randn(B, T, H, K), dim=-1),
        "k": normalize(randn(B, T, H, K), dim=-1),
        "v": randn(B, T, H, V),
        "g": -softplus(randn(B, T, H, K) - 3),
        "b": randn(B, T, H, K).sigmoid(),
        "w": randn(B, T, H, V).sigmoid(),
        "S": randn(B, H, K, V),
    }


def largest_errors(inputs: dict[str, Tensor]) -> dict[str, float]:
    """Per rule, the largest error of an output or of the state against the token loop in float64."""
    expected = RULES["recurrent"](**{name: x.double() for name, x in inputs.items()})
    return {
        name: max((x - y).abs().max().item() for x, y in zip(rule(**inputs), expected, strict=True))
        for name, rule in RULES.items()
    }


def time_in_turn(inputs: dict[str, Tensor], pairs: int) -> dict[str, list[float]]:
    """Milliseconds of each call, the rules taking turns, after one call of each to warm up."""
    samples: dict[str, list[float]] = {name: [] for name in RULES}
    for i in range(pairs + 1):
        for name, rule in RULES.items():
            start = time.perf_counter()
            rule(**inputs)
            if i > 0:
                samples[name].append(1e3 * (time.perf_counter() - start))
    return samples


def main() -> int:
    """0, or 1 after saying on stderr what fell short."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--head-k-dim", type=int, default=64)
    parser.add_argument("--head-v-dim", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=30, help="times each rule is run")
    parser.add_argument("--minimum-ratio", type=float, default=15.0)
    parser.add_argument("--record", action="store_true", help=f"add a line to benchmarks/results/{NAME}.jsonl")
    args = parser.parse_args()

    shape = {"B": args.batch, "T": args.tokens, "H": args.heads, "K": args.head_k_dim, "V": args.head_v_dim}
    inputs = make_inputs(**shape)
    errors = largest_errors(inputs)
    for name, error in errors.items():
        if not error <= TOLERANCE:
            print(f"error: {name} is off by {error:.1e}, more than {TOLERANCE:.0e}", file=sys.stderr)
            return 1

    samples = time_in_turn(inputs, args.pairs)
    milliseconds = {name: summary(values) for name, values in samples.items()}
    ratio = summary([slow / fast for slow, fast in zip(samples["recurrent"], samples["chunk"], strict=True)])

    sizes = " ".join(f"{name}={size}" for name, size in shape.items())
    print(f"{sizes} float32, {machine()['threads']} threads")
    print(f"{'':10}  {'median':>9}  {'p20':>9}  {'p80':>9}  {'largest error':>13}")
    for name, row in milliseconds.items():
        times = "  ".join(f"{row[key]:6.2f} ms" for key in ("median", "p20", "p80"))
        print(f"{name:10}  {times}  {errors[name]:13.1e}")
    print(f"{'ratio':10}  {ratio['median']:9.1f}  {ratio['p20']:9.1f}  {ratio['p80']:9.1f}")

    if args.record:
        record = {"shape": shape, "dtype": "float32", "pairs": args.pairs, "milliseconds": milliseconds}
        append(NAME, {**record, "ratio": ratio, "largest_errors": errors})
    if ratio["median"] < args.minimum_ratio:
        print(f"error: the ratio is {ratio['median']:.1f}, expected {args.minimum_ratio:g}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
