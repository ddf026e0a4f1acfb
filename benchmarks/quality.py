"""What each format costs the default model on held-out chats: perplexity, KL divergence, top-1 agreement.

    python benchmarks/quality.py [--model tiny] [--chats 237] [--only int8 "onnx int8" ...] [--record]

Every format runs as in a chat. Our own formats and llama.cpp's are compared with the model in bf16 with fp32
activations, ONNX exports with the checkpoint they were made of, in torch. The first 256 tokens of each chat count. GGUF
types join in where a llama_cpp that knows GDN-2 is installed. Intervals are 1.96 standard errors.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from pathlib import Path
from typing import Any

from heldout import chats
from record import append

from gdn2_edge.evaluate import MIN_SAMPLES, Evaluation, evaluate, read_ids
from gdn2_edge.export.gguf import export_gguf
from gdn2_edge.export.onnx import export_onnx
from gdn2_edge.generate.text import open_text
from gdn2_edge.loading import load, model_path
from gdn2_edge.quantize import quantize_checkpoint
from gdn2_edge.quantize.recipe import Recipe
from gdn2_edge.runtime import Runtime

TOKENS = 256
RECIPES = {
    "int8": Recipe(format="int8"),
    "fp8": Recipe(format="fp8"),
    "int4 g64": Recipe(format="int4", group_size=64),
    "int4 g32": Recipe(format="int4", group_size=32),
}
ONNX = {"onnx int8": "int8", "onnx fp8": "fp8", "onnx int4": "int4 g64"}  # and what each is made of
GGUF = {f"gguf {type}": type for type in ("q8_0", "q5_0", "q4_0", "q4_k_m")}


def made(name: str, source: Path, folder: Path) -> tuple[Runtime, Runtime]:
    """The model of a row and what it is compared with."""
    if name in GGUF:
        export_gguf(source, folder / "model.gguf", GGUF[name])
        return load(folder / "model.gguf"), load(source, "cpu")
    quantize_checkpoint(source, folder / "quantized", RECIPES[ONNX.get(name, name)])
    quantized = load(folder / "quantized", "cpu")
    if name not in ONNX:
        return quantized, load(source, "cpu")
    export_onnx(folder / "quantized", folder / "onnx")
    return load(folder / "onnx", "cpu"), quantized


def main() -> int:
    """Parse, run, report."""
    names = [*RECIPES, *ONNX, *(GGUF if importlib.util.find_spec("llama_cpp") else ())]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--chats", type=int, help="all by default")
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()
    if args.chats is not None and args.chats < MIN_SAMPLES:
        parser.error(f"--chats is {args.chats}: intervals need {MIN_SAMPLES}")
    path = model_path(args.model)
    ids = read_ids(open_text(path), chats()[: args.chats], TOKENS)
    rows: dict[str, dict[str, Any]] = {}
    print(f"{'':12} {'MB':>6} {'perplexity':>10} {'change':>16} {'KL':>18} {'top-1':>16}")
    for name in args.only:
        with tempfile.TemporaryDirectory() as folder:
            model, reference = made(name, path, Path(folder))
            *_, found = evaluate(model, ids, reference)
            files = model.path.iterdir() if model.path.is_dir() else [model.path]
            size = sum(file.stat().st_size for file in files if file.suffix in (".safetensors", ".onnx", ".gguf"))
        print(f"{name:12} {size / 1e6:6.1f} {described(found)}", flush=True)
        rows[name] = {"runtime": model.name, "bytes": size, **found.to_json()}
    if plain := [row["against"]["perplexity"] for name, row in rows.items() if name not in ONNX]:
        print(f"bf16: perplexity {plain[0]:.3f}")
    if args.record:
        append("quality", {"model": args.model, "tokens_of_each_chat": TOKENS, "formats": rows})
    return 0


def described(found: Evaluation) -> str:
    """The figures of a line."""
    assert found.against is not None
    change, kl, top1 = found.against.change_percent, found.against.kl, found.against.top1
    return (
        f"{found.perplexity:10.3f} {change.mean:+8.2f} +-{change.half_width:.2f} % "
        f"{kl.mean:10.5f} +-{kl.half_width:.5f} {100 * top1.mean:8.2f} +-{100 * (top1.half_width or 0):.2f} %"
    )


if __name__ == "__main__":
    sys.exit(main())
