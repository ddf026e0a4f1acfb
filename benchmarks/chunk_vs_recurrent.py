"""How much faster the chunked prefill is than two token loops, on this machine's CPU.

`reference_loop` is the package's own, already lean; `einsum_loop` writes the equations in their textbook form.
Checks all three against float64 first, then times them in turn, so that they meet the same disturbances.
Exits 1 when a result is wrong or the chunked form is too little faster than either loop.
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


def einsum_loop(q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, w: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs of T tokens and the state after them, for as many value heads as key heads."""
    scale = k.shape[-1] ** -0.5
    outputs = []
    for t in range(k.shape[1]):
        S = S * g[:, t, :, :, None].exp()
        erased = torch.einsum("bhkv,bhk->bhv", S, b[:, t] * k[:, t])
        S = S + torch.einsum("bhk,bhv->bhkv", k[:, t], w[:, t] * v[:, t] - erased)
        outputs.append(scale * torch.einsum("bhkv,bhk->bhv", S, q[:, t]))
    return torch.stack(outputs, dim=1), S


RULES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "reference_loop": recurrent_gated_delta_rule2,
    "einsum_loop": einsum_loop,
    "chunk": chunk_gated_delta_rule2,
}
# 15 is the aim, met with AVX-512 (16) and missed with AVX2 (14). Our own loop is leaner: it takes 9 to 11 times as
# long as chunks (each pass over memory and each launch counts at these sizes), and 6 only guards against getting worse.
MINIMUM_RATIOS = {"reference_loop": 6.0, "einsum_loop": 15.0}


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
    expected = RULES["reference_loop"](**{name: x.double() for name, x in inputs.items()})
    return {
        name: max((x - y).abs().max().item() for x, y in zip(rule(**inputs), expected, strict=True))
        for name, rule in RULES.items()
    }


def time_in_turn(inputs: dict[str, Tensor], pairs: int) -> dict[str, list[float]]:
    """Milliseconds of a call, the rules taking turns; a call counts when the one before it was the same rule's.

    That is how a model calls it, layer after layer. A first call after another rule's pays for new pages of memory.
    """
    samples: dict[str, list[float]] = {name: [] for name in RULES}
    for _ in range(pairs):
        for name, rule in RULES.items():
            rule(**inputs)
            rule(**inputs)
            start = time.perf_counter()
            rule(**inputs)
            samples[name].append(1e3 * (time.perf_counter() - start))
    return samples


@torch.inference_mode()
def main() -> int:
    """0, or 1 after saying on stderr what fell short."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--head-k-dim", type=int, default=64)
    parser.add_argument("--head-v-dim", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=30, help="times each rule is run")
    for name, minimum in MINIMUM_RATIOS.items():
        option = f"--minimum-{name.replace('_', '-')}"
        parser.add_argument(option, dest=name, type=float, default=minimum, help="least ratio to this loop")
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
    ratios = {
        name: summary([slow / fast for slow, fast in zip(samples[name], samples["chunk"], strict=True)])
        for name in MINIMUM_RATIOS
    }
    # Others' work only ever adds time, so the minima say what the code itself takes.
    ratios_of_minima = {name: min(samples[name]) / min(samples["chunk"]) for name in MINIMUM_RATIOS}

    sizes = " ".join(f"{name}={size}" for name, size in shape.items())
    print(f"{sizes} float32, {machine()['threads']} threads")
    print(f"{'':14}  {'median':>9}  {'p20':>9}  {'p80':>9}  {'largest error':>13}")
    for name, row in milliseconds.items():
        times = "  ".join(f"{row[key]:6.2f} ms" for key in ("median", "p20", "p80"))
        print(f"{name:14}  {times}  {errors[name]:13.1e}")
    for name, row in ratios.items():
        values = "  ".join(f"{row[key]:9.1f}" for key in ("median", "p20", "p80"))
        print(f"chunk is faster than {name} by\n{'':14}  {values}  of minima {ratios_of_minima[name]:.1f}")

    if args.record:
        record = {"shape": shape, "dtype": "float32", "pairs": args.pairs, "milliseconds": milliseconds}
        record |= {"ratios": ratios, "ratios_of_minima": ratios_of_minima, "largest_errors": errors}
        append(NAME, record)
    missed = False
    for name, row in ratios.items():
        minimum = getattr(args, name)
        if row["median"] < minimum:
            print(f"error: {name}: the ratio is {row['median']:.1f}, expected {minimum:g}", file=sys.stderr)
            missed = True
    return int(missed)


if __name__ == "__main__":
    raise SystemExit(main())
