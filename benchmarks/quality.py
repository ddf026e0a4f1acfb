"""What each format costs the default model: perplexity, KL divergence and top-1 agreement on held-out chats.

    python benchmarks/quality.py [--model tiny] [--chats 96] [--record]

Every format runs through its own products, as in a chat, against the same model in bf16 with fp32 activations. The
first 256 tokens of each chat count. The interval is 1.96 standard errors of the mean over chats.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from heldout import chats, conversation
from record import append

from gdn2_edge.generate.text import open_text
from gdn2_edge.loading import model_path
from gdn2_edge.model import Model, load_model
from gdn2_edge.quantize import quantize_checkpoint
from gdn2_edge.quantize.recipe import Recipe

TOKENS = 256
RECIPES = {
    "int8": Recipe(format="int8"),
    "fp8": Recipe(format="fp8"),
    "int4 g64": Recipe(format="int4", group_size=64),
    "int4 g32": Recipe(format="int4", group_size=32),
}


def log_probabilities(model: Model, ids: torch.Tensor) -> torch.Tensor:
    """[T - 1, vocab_size]: what the model expects after each token but the last."""
    logits, _ = model.forward(ids)
    return torch.log_softmax(logits[0, :-1].double(), -1)


def interval(values: list[float]) -> list[float]:
    """Mean and half width."""
    return [statistics.mean(values), 1.96 * statistics.stdev(values) / len(values) ** 0.5]


@torch.inference_mode()
def main() -> int:
    """Parse, run, report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--chats", type=int, default=96)
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()
    path = model_path(args.model)
    text = open_text(path)
    prompts = [torch.tensor([conversation(text, chat)[:TOKENS]]) for chat in chats()[: args.chats]]
    rows: dict[str, dict[str, object]] = {}
    with tempfile.TemporaryDirectory() as folder:
        models, bits = {"bf16": load_model(path, "cpu")}, {"bf16": 16.0}
        for name, recipe in RECIPES.items():
            report = quantize_checkpoint(path, Path(folder) / name, recipe)
            models[name], bits[name] = load_model(Path(folder) / name, "cpu"), report.bits_per_weight
    figures = {name: {"loss": [], "kl": [], "top1": []} for name in models}
    for ids in prompts:
        exact = log_probabilities(models["bf16"], ids)
        for name, model in models.items():
            found = log_probabilities(model, ids)
            figures[name]["loss"].append(float(-found.gather(1, ids[0, 1:, None]).mean()))
            figures[name]["kl"].append(float((exact.exp() * (exact - found)).sum(-1).mean()))
            figures[name]["top1"].append(float((exact.argmax(-1) == found.argmax(-1)).double().mean()))
    plain = figures["bf16"]["loss"]
    print(f"{'format':10} {'bits':>6} {'perplexity':>11} {'change':>16} {'KL':>18} {'top-1':>16}")
    for name, row in figures.items():
        change = interval([100 * (x - y) for x, y in zip(row["loss"], plain, strict=True)])  # per cent, to first order
        kl, top1 = interval(row["kl"]), interval([100 * x for x in row["top1"]])
        perplexity = float(torch.tensor(row["loss"]).mean().exp())
        rows[name] = {
            "bits_per_weight": bits[name],
            "perplexity": perplexity,
            "change_percent": change,
            "kl": kl,
            "top1_percent": top1,
        }
        print(
            f"{name:10} {bits[name]:6.2f} {perplexity:11.3f} {change[0]:+8.2f} +-{change[1]:.2f} % "
            f"{kl[0]:10.5f} +-{kl[1]:.5f} {top1[0]:8.2f} +-{top1[1]:.2f} %"
        )
    if args.record:
        tokens = sum(ids.shape[1] - 1 for ids in prompts)
        append("quality", {"model": args.model, "chats": len(prompts), "tokens": tokens, "formats": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
