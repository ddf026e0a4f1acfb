"""Decoding on a CPU, all formats in one run: memory of the weights and tokens per second.

    python benchmarks/cpu_decode.py [--model tiny | --random gdn2_1.3B] [--record]

Correctness first: each format's products must agree with its own values in fp64, to what bf16 rounds away. Then the
formats take turns, a few tokens each, so that a slow minute of the machine meets them all. bf16 is timed with bf16
activations, its fastest way, and with fp32 activations, its exact way.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch
from random_checkpoint import write_random
from record import append, summary

from gdn2_edge.loading import model_path
from gdn2_edge.model import Model, load_model
from gdn2_edge.quantize import quantize_checkpoint
from gdn2_edge.quantize.recipe import Recipe

TOKENS, ROUNDS = 6, 7
PREFILL = 128
PRODUCT_TOLERANCE = 6e-3  # bf16 rounds x and the result by up to 2^-9 each


def main() -> int:
    """Parse, run, report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--random", metavar="NAME", help="random weights of a published size, instead of a model")
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        if args.random:
            source = Path(folder) / "bf16"
            write_random(source, args.random)
        else:
            source = model_path(args.model)
        models = {
            "bf16": load_model(source, "cpu", torch.bfloat16),
            "bf16, fp32 activations": load_model(source, "cpu", torch.float32),
        }
        for name in ("int8", "fp8", "int4"):
            out = Path(folder) / name
            quantize_checkpoint(source, out, Recipe(format=name))
            models[name] = load_model(out, "cpu")
        return measure(models, args.random or args.model, args.record)


def product_error(model: Model) -> float:
    """Relative error of the products of the first layer, one row and many, against fp64."""
    layer, worst = model.weights.layers[0], 0.0
    for weight in (layer.in_proj, layer.o_proj, layer.mlp.w12, layer.mlp.w3):
        values = weight.rows(slice(None)).double()
        for rows in (1, 16):
            x = torch.randn(rows, values.shape[1], generator=torch.Generator().manual_seed(2))
            expected = x.double() @ values.t()
            found = model.ops.linear(x, weight).double()
            worst = max(worst, float((found - expected).norm() / expected.norm()))
    return worst


def measure(models: dict[str, Model], what: str, record: bool) -> int:
    """Check, time in turns, print, record; 1 where int8 misses its bars."""
    vocab = models["bf16"].spec.vocab_size
    ids = torch.randint(0, vocab, (1, PREFILL), generator=torch.Generator().manual_seed(1))
    states, decode, prefill = {}, {}, {}
    for name, model in models.items():
        if (error := product_error(model)) > PRODUCT_TOLERANCE:
            print(f"{name}: products are off by {error:.2g}")
            return 1
        _, states[name] = model.prefill(ids, model.initial_state())
        decode[name], prefill[name] = [], []
    token = ids[:, -1]
    for _ in range(ROUNDS):
        for name, model in models.items():
            for _ in range(TOKENS):
                begun = time.perf_counter()
                _, states[name] = model.step(token, states[name])
                decode[name].append(time.perf_counter() - begun)
            begun = time.perf_counter()
            model.prefill(ids, model.initial_state())
            prefill[name].append((time.perf_counter() - begun) / PREFILL)
    rows = {
        name: {
            "weight_bytes": model.weight_bytes,
            "memory_vs_bf16": model.weight_bytes / models["bf16"].weight_bytes,
            "seconds_per_token": summary(decode[name]),
            "tokens_per_second": 1 / summary(decode[name])["median"],
            "speed_vs_bf16": summary(decode["bf16"])["median"] / summary(decode[name])["median"],
            "prefill_tokens_per_second": 1 / summary(prefill[name])["median"],
        }
        for name, model in models.items()
    }
    print(f"{what}: {'format':24} {'weights':>10} {'memory':>7} {'tokens/s':>9} {'speed':>6} {'prefill/s':>9}")
    for name, row in rows.items():
        print(
            f"{'':{len(what)}}  {name:24} {row['weight_bytes'] / 1e6:>8.1f}MB {row['memory_vs_bf16']:>7.3f} "
            f"{row['tokens_per_second']:>9.2f} {row['speed_vs_bf16']:>6.2f} {row['prefill_tokens_per_second']:>9.1f}"
        )
    if record:
        append("cpu_decode", {"what": what, "tokens": TOKENS * ROUNDS, "formats": rows})
    missed = rows["int8"]["memory_vs_bf16"] > 0.56 or rows["int8"]["speed_vs_bf16"] < 1.3
    return 1 if missed and what != "tiny" else 0


if __name__ == "__main__":
    sys.exit(main())
