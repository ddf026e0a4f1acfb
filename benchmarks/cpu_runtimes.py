"""Decoding and prompts on a CPU: torch, ONNX Runtime and llama.cpp, every format, in one run.

    python benchmarks/cpu_runtimes.py [--model tiny | --random gdn2_1.3B] [--formats fp32 int8 int4 fp8] [--record]

ONNX Runtime runs each export with its stock operators and with the operator's library (`gdn2-edge export onnx
--build-op`, built here if it is not there); llama.cpp joins in where a llama_cpp that knows GDN-2 is installed, with
GGUF types of as many bits. Correctness first: an ONNX export's logits must be near torch's of the same checkpoint, a
GGUF file's own prompt and single steps must agree. Then all take turns, a few tokens each, so that a slow minute of the
machine meets them all. `share` is what a token cannot avoid to move, over its time, of the rate at which this machine
reads memory: the median of one look a round, between the models' turns. One format is in memory at a time. At 1.3B
shapes fp32 needs 16 GB and 10 GB of disk for a while, int8 half.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from random_checkpoint import write_random
from record import append, summary

from gdn2_edge.bench.correctness import check
from gdn2_edge.bench.machine import read_rate
from gdn2_edge.bench.traffic import Export, StoredWeights, traffic
from gdn2_edge.checkpoint.gguf_file import open_gguf
from gdn2_edge.checkpoint.onnx_file import open_export
from gdn2_edge.checkpoint.reader import open_checkpoint
from gdn2_edge.export.gguf import export_gguf
from gdn2_edge.export.onnx import export_onnx
from gdn2_edge.export.onnx.build_op import build_op
from gdn2_edge.loading import load, model_path
from gdn2_edge.quantize import quantize_checkpoint
from gdn2_edge.quantize.recipe import Recipe
from gdn2_edge.runtime import Runtime
from gdn2_edge.runtimes import onnx as onnx_runtime

NAME = "cpu_runtimes"
TOKENS, PROMPT = 6, 128
TURN_SECONDS = 0.2  # between two turns: until the threads of the one before have given up waiting for more
# Of the size of the logits: quantized products round their inputs to 8 bits in ONNX Runtime.
TOLERANCES = {"fp32": 1e-4, "int8": 0.05, "int4": 0.05, "fp8": 1e-3}
RANDOM_TIMES = 5  # random weights amplify every rounding: torch's own bf16 activations are off by 0.06 at 1.3B shapes
GGUF_TYPES = {"fp32": ("f32",), "int8": ("q8_0",), "int4": ("q4_0", "q4_k_m"), "fp8": ()}
LEAST_GAIN = 2.0  # of decoding the default model in int8 over torch's int8

Row = dict[str, Any]


def main() -> int:
    """Make the folders, check, time in turns, print, record; 1 if something is wrong or a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--random", metavar="NAME", help="random weights of a published size, instead of a model")
    parser.add_argument("--formats", nargs="+", choices=TOLERANCES, default=list(TOLERANCES))
    parser.add_argument("--rounds", type=int, default=7, help=f"of {TOKENS} tokens and a prompt each, at least 2")
    parser.add_argument("--prompt-tokens", type=int, default=PROMPT)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--record", action="store_true", help=f"add a line to benchmarks/results/{NAME}.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    build_op()
    what, rows = args.random or args.model, dict[str, Row]()
    print(f"{what}, {args.threads} threads")
    print(f"{'ms':26} {'a token':>8} {'p20':>8} {'p80':>8} {'share':>6} {'of GB/s':>8} {args.prompt_tokens:>8} tokens")
    with tempfile.TemporaryDirectory() as folder:
        source = model_path(args.model) if not args.random else Path(folder) / "source"
        if args.random:
            write_random(source, args.random)
        for format in args.formats:
            with tempfile.TemporaryDirectory(dir=folder) as work:
                tolerance = TOLERANCES[format] * (RANDOM_TIMES if args.random else 1)
                models = open_models(source, format, Path(work))
                found, rates = measure(models, tolerance, args.rounds, args.prompt_tokens)
                bytes_moved = {name: moved(model) for name, model in models.items()}
            del models
            rows |= {name: {**row, "bytes": bytes_moved[name], "read_rate": rates} for name, row in found.items()}
            for name, row in found.items():
                one, many = row["decode_ms"], row["prefill_ms"]
                share = bytes_moved[name] / (1e-3 * one["median"]) / rates["median"]
                line = f"{name:26} {one['median']:>8.2f} {one['p20']:>8.2f} {one['p80']:>8.2f} {share:>6.0%}"
                line += f" {rates['median'] / 1e9:>8.1f}"
                print(f"{line} {many['median']:>15.1f}", flush=True)
    if args.record:
        facts = {"what": what, "prompt_tokens": args.prompt_tokens}
        versions = {"onnxruntime": onnx_runtime.onnxruntime.__version__, "llama_cpp": llama_cpp_version()}
        append(NAME, {**facts, **versions, "rows": rows})
    if what != "tiny" or "torch int8" not in rows:
        return 0
    gain = rows["torch int8"]["decode_ms"]["median"] / rows["onnx int8, library"]["decode_ms"]["median"]
    print(f"ONNX Runtime with the library decodes int8 {gain:.1f} times as fast as torch, expected {LEAST_GAIN:g}")
    return int(gain < LEAST_GAIN)


def open_models(source: Path, format: str, folder: Path) -> dict[str, Runtime]:
    """What is timed: "torch int8", "onnx int8", "onnx int8, library" and "llama.cpp q8_0"."""
    checkpoint, export = source, folder / "onnx"
    if format != "fp32":
        checkpoint = folder / "checkpoint"
        quantize_checkpoint(source, checkpoint, Recipe(format=format))
    export_onnx(checkpoint, export)
    models = {f"torch {format}": load(checkpoint, "cpu", torch.float32)}
    find_op = onnx_runtime.find_op
    for name, find in ((f"onnx {format}", lambda: None), (f"onnx {format}, library", find_op)):
        onnx_runtime.find_op = find
        models[name] = load(export, "cpu")
    onnx_runtime.find_op = find_op
    for type in GGUF_TYPES[format] if llama_cpp_version() else ():
        export_gguf(source, folder / f"{type}.gguf", type)
        models[f"llama.cpp {type}"] = load(folder / f"{type}.gguf", "cpu")
    return models


def llama_cpp_version() -> str | None:
    """None where it is not installed."""
    if importlib.util.find_spec("llama_cpp") is None:
        return None
    import llama_cpp

    return str(llama_cpp.__version__)


def opened(model: Runtime) -> Export | StoredWeights:
    """What a model was loaded from."""
    if model.path.is_file():
        return open_gguf(model.path)
    return open_export(model.path) if isinstance(model, onnx_runtime.OnnxModel) else open_checkpoint(model.path)


def moved(model: Runtime) -> int:
    """Bytes that a token of one sequence cannot avoid to move."""
    return traffic(opened(model), model.spec.window).total


def measure(models: dict[str, Runtime], tolerance: float, rounds: int, prompt: int) -> tuple[dict[str, Row], Row]:
    """Name -> times of a token and of a prompt; and bytes a second that memory was read at in between.

    The first model's logits are what those of ONNX exports must be near to.
    """
    vocab = next(iter(models.values())).spec.vocab_size
    ids = torch.randint(0, vocab, (1, prompt), generator=torch.Generator().manual_seed(1))
    states, logits, decode, prefill = {}, {}, {}, {}
    for name, model in models.items():
        logits[name], states[name] = model.prefill(ids, model.initial_state())
        decode[name], prefill[name] = [], []
    expected = next(iter(logits.values()))
    for name, found in logits.items():
        if name.startswith("llama.cpp"):
            check(models[name], opened(models[name]), torch.device("cpu"))
            continue
        error = float((found - expected).norm() / expected.norm())
        if not error <= tolerance:
            sys.exit(f"{name}: logits are off by {error:.2g}, more than {tolerance:g}")
    token, rates = ids[:, -1], []
    for _ in range(rounds):
        rates.append(read_rate(torch.device("cpu")))
        for name, model in models.items():
            time.sleep(TURN_SECONDS)
            for _ in range(TOKENS):
                begun = time.perf_counter()
                _, states[name] = model.step(token, states[name])
                decode[name].append(1e3 * (time.perf_counter() - begun))
            begun = time.perf_counter()
            model.prefill(ids, model.initial_state())
            prefill[name].append(1e3 * (time.perf_counter() - begun))
    times = {name: {"decode_ms": summary(decode[name]), "prefill_ms": summary(prefill[name])} for name in models}
    return times, summary(rates)


if __name__ == "__main__":
    sys.exit(main())
