"""One token of one sequence: this package's runtime and its peers, on the same shapes and weights, in one run.

    python benchmarks/run.py [--config gdn2_1.3B] [--only runtime chain ...] [--record]

Parts: `runtime` is what `load` gives, through its public calls; `start` how long the default model takes from `load` to
its first token in a new process, where no kernel has been compiled and where all are in Triton's cache; `eager` is
plain torch operations; `graph` the same kind of step with its state in place, captured in a CUDA graph; `compile` that
step under torch.compile and captured; `fla` flash-linear-attention's layers, where installed; `chain` a Triton product
a matrix and nothing else. Each is checked against the plain fp32 computation before it is timed. On a CPU nothing is
captured and `chain` is left out; with attention layers only `runtime`, `start` and `eager` run.
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from peers import FlaStep, PlainStep, capture, with_sigmoid_gate
from record import append, summary

from gdn2_edge.bench import GPU_PROMPT_TOKENS, PROMPT_TOKENS, bench, measure_decode
from gdn2_edge.bench.correctness import CHECK_TOKENS, ROUNDED_TOLERANCE, check, distance, plain_logits, random_ids
from gdn2_edge.bench.machine import datasheet_rate, device_name, read_rate
from gdn2_edge.bench.random_weights import RandomWeights, random_weights
from gdn2_edge.bench.traffic import traffic
from gdn2_edge.model import WeightReader, load_model, pick_device

NAME = "decode"
# The mode with all of inductor's tuning but its own graphs, and for bf16 also the one that calls cuBLAS.
COMPILE_MODES = {
    "bf16": ("default", "max-autotune-no-cudagraphs"),
    "int8": ("max-autotune-no-cudagraphs",),
    "fp8": ("max-autotune-no-cudagraphs",),
}
PREFILL_ROUNDS = 8
CHAIN_TOLERANCE = 1e-5  # fp32 sums of exact products
# Imports are not counted, nor the start of CUDA.
FIRST_TOKEN = """
import time, torch, gdn2_edge.loading, gdn2_edge.triton_model
from gdn2_edge.generate.session import Session
torch.zeros(1, device="cuda")
begun = time.perf_counter()
next(iter(Session(gdn2_edge.load("tiny", "cuda")).send("Hello!")))
print(time.perf_counter() - begun)
"""
BEGUN = time.perf_counter()

Row = dict[str, Any]


class Run:
    """The parts, and what they have in common: sizes, device, how many tokens."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.config, self.tokens, self.formats = args.config, args.tokens, args.formats
        self.prompts, self.group_size, self.seed = args.prompt_tokens, args.group_size, args.seed
        self.context, self.batch = args.context, args.batch
        self.device = pick_device(args.device)
        self.cuda = self.device.type == "cuda"
        self.hybrid = "sliding_attention" in self.source("bf16").spec.layer_types

    def source(self, format: str) -> RandomWeights:
        """Random weights of the run's sizes."""
        group_size = self.group_size if format == "int4" else None
        return random_weights(self.config, format, group_size, self.seed, self.device)

    def runtime(self) -> Iterator[Row]:
        """What `load` gives, in every format."""
        for format in self.formats:
            say(f"runtime, {format}")
            source = self.source(format)
            report = bench(
                source,
                str(self.device),
                tokens=self.tokens,
                prompt_tokens=self.prompts,
                context=self.context,
                batch=self.batch,
            )
            decode, band = report.decode, report.bandwidth
            moved = band.bytes_per_token.total
            if report.batch is not None:
                of_all = moved + (self.batch - 1) * (moved - band.bytes_per_token.weights)
                name = f"runtime, {self.batch} sequences"
                yield row(name, format, asdict(report.batch.milliseconds_per_token), None, of_all)
            yield row("runtime", format, asdict(decode.milliseconds_per_token), decode.graph_milliseconds, moved) | {
                "runtime": report.runtime,
                "launches_per_token": decode.launches_per_token,
                "check": asdict(report.check),
                "prefill": {p.tokens: asdict(p.milliseconds) for p in report.prefill},
                "memory_bytes": report.memory_bytes,
                "first_token_seconds": report.first_token_seconds,
                "read_rate": 1e9 * band.read_gigabytes_per_second,
            }

    def start(self) -> Iterator[Row]:
        """`load` and a first token in processes of their own, with an empty and with a filled kernel cache."""
        if not self.cuda:
            say("start: left out, only GPUs have kernels to compile")
            return
        with tempfile.TemporaryDirectory() as cache:
            for name in ("start, nothing compiled", "start, kernels in the cache"):
                say(name)
                environment = os.environ | {"TRITON_CACHE_DIR": cache}
                found = subprocess.run(
                    [sys.executable, "-c", FIRST_TOKEN], env=environment, check=True, capture_output=True, text=True
                )
                milliseconds = 1e3 * float(found.stdout)
                yield row(name, "bf16", dict.fromkeys(("median", "p20", "p80"), milliseconds), None, 0)

    def eager(self) -> Iterator[Row]:
        """`Model` on torch operations with bf16 activations."""
        say("eager, bf16")
        source = self.source("bf16")
        model = load_model(source, str(self.device), torch.bfloat16)
        check(model, source, self.device)
        decode = measure_decode(model, min(self.tokens, 100))
        yield row("torch eager", "bf16", asdict(decode.milliseconds_per_token), None, moved_by(source))

    def graph(self) -> Iterator[Row]:
        """The plain step, captured and not compiled."""
        say("graph, bf16")
        source = self.source("bf16")
        yield self.time_step("torch + graph", "bf16", PlainStep(source, self.device), source)

    def compile(self) -> Iterator[Row]:
        """The plain step under torch.compile."""
        for format in self.formats:
            for mode in COMPILE_MODES.get(format, ()):
                say(f"compile, {format}, {mode} (compiling takes a while)")
                torch.compiler.reset()
                source = self.source(format)
                name = f"torch.compile {mode.removesuffix('-no-cudagraphs')}"
                yield self.time_step(name, format, PlainStep(source, self.device, mode), source)

    def fla(self) -> Iterator[Row]:
        """fla's layers, not captured: its cache changes hands at every step."""
        source = with_sigmoid_gate(self.source("bf16"))
        try:
            peer = FlaStep(source, self.device)
        except ImportError as error:
            say(f"fla: left out ({error})")
            return
        say("fla, bf16")
        seen = self.time_step("fla layers, eager", "bf16", peer, source, in_place=False)
        yield seen | {"prefill": {length: self.feed_milliseconds(peer, length) for length in self.prompt_lengths()}}

    def chain(self) -> Iterator[Row]:
        """A Triton product a matrix."""
        if not self.cuda:
            say("chain: left out, it needs a GPU")
            return
        from gemv_chain import LAUNCHES, GemvChain

        for format in self.formats:
            if format not in COMPILE_MODES:
                continue
            say(f"chain, {format}")
            weights = WeightReader(self.source(format), self.device, lambda weight: weight).model()
            chain, best = GemvChain(weights, self.device), None
            for chain.launch in LAUNCHES:
                run = capture(chain.step)
                if not (error := chain.largest_error()) <= CHAIN_TOLERANCE:
                    raise ArithmeticError(f"products are off by {error:.2g} with {chain.launch}")
                milliseconds = graph_milliseconds(run, self.tokens)
                if best is None or milliseconds < best[0]:
                    best = milliseconds, chain.launch
            yield row("Triton products only", format, None, best[0], chain.num_bytes) | {
                "launches_per_token": len(chain.matrices),
                "launch": best[1],
            }

    def prompt_lengths(self) -> Sequence[int]:
        """Those asked for, or those of `bench`."""
        return self.prompts or (GPU_PROMPT_TOKENS if self.cuda else PROMPT_TOKENS)

    def feed_milliseconds(self, peer: FlaStep, length: int) -> dict[str, float]:
        """A prompt of one sequence from nothing, until the host has its last logits."""
        ids = random_ids(peer.embed.shape[0], 1, length).to(self.device)
        milliseconds = []
        for _ in range(2 + PREFILL_ROUNDS):  # the first two compile and tune
            peer.reset()
            begun = time.perf_counter()
            peer.feed(ids)
            peer.logits.cpu()
            milliseconds.append(1e3 * (time.perf_counter() - begun))
        return summary(milliseconds[2:])

    def time_step(
        self, name: str, format: str, peer: PlainStep | FlaStep, source: RandomWeights, in_place: bool = True
    ) -> Row:
        """Capture a peer's step where that can be done, compare its logits, time it with every id seen by the host."""
        captured = self.cuda and in_place
        step = capture(peer.step) if captured else peer.step
        ids = random_ids(source.spec.vocab_size, 1, CHECK_TOKENS)
        peer.reset()
        logits = []
        for i in range(CHECK_TOKENS):
            peer.token.copy_(ids[:, i])
            step()
            logits.append(peer.logits[0].clone())
        error = distance(torch.stack(logits), plain_logits(source, ids, self.device)[0])
        if not error <= ROUNDED_TOLERANCE:
            raise ArithmeticError(f"logits are off by {error:.2g} of their spread")
        milliseconds = []
        for _ in range(self.tokens):
            begun = time.perf_counter()
            step()
            peer.token.tolist()
            milliseconds.append(1e3 * (time.perf_counter() - begun))
        alone = graph_milliseconds(step, self.tokens) if captured else None
        return row(name, format, summary(milliseconds), alone, moved_by(source)) | {"error": error}


def graph_milliseconds(replay: Callable[[], None], tokens: int) -> float:
    """Time of a replay on the device, over many in a row."""
    replay()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(tokens):
        replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / tokens


def moved_by(source: RandomWeights) -> int:
    """Bytes of a step once attention's window, if any, is full."""
    return traffic(source, source.spec.window).total


def row(name: str, format: str, seen: dict[str, float] | None, alone: float | None, moved: int) -> Row:
    """One line of the table: milliseconds with every id seen by the host, and on the device alone."""
    return {"name": name, "format": format, "milliseconds": seen, "graph_milliseconds": alone, "bytes": moved}


def say(text: str) -> None:
    """A line of progress, with the seconds since the start."""
    print(f"[{time.perf_counter() - BEGUN:4.0f} s] {text}", file=sys.stderr, flush=True)


def print_table(rows: list[Row], rate: float) -> None:
    """Milliseconds a token and the share of the read rate that its bytes over this time are."""
    print(f"{'':34} {'format':7} {'ms/token':>9} {'p20':>8} {'p80':>8} {'device':>8} {'share':>6}")
    for found in rows:
        seen, alone = found["milliseconds"], found["graph_milliseconds"]
        times = [seen[key] if seen else None for key in ("median", "p20", "p80")] + [alone]
        shown = [f"{value:8.3f}" if value is not None else f"{'':8}" for value in times]
        share = found["bytes"] / (1e-3 * (seen["median"] if seen else alone)) / rate
        shown.append(f"{share:6.1%}" if share else "")
        print(f"{found['name']:34} {found['format']:7} {shown[0]:>9} {' '.join(shown[1:])}")
    fed = [found for found in rows if found.get("prefill")]
    if fed:
        lengths = list(fed[0]["prefill"])
        print(f"\n{'prompts, ms':34} {'format':7} {' '.join(f'{length:>9,}' for length in lengths)}")
    for found in fed:
        times = " ".join(f"{found['prefill'][length]['median']:9.2f}" for length in lengths)
        print(f"{found['name']:34} {found['format']:7} {times}")


def main() -> int:
    """Run the chosen parts; 1 if one of them failed, after the others have run."""
    parts = ("runtime", "start", "eager", "graph", "compile", "fla", "chain")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="gdn2_1.3B", help="a published name or a JSON file")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--formats", nargs="+", default=["bf16", "fp8", "int8", "int4"])
    parser.add_argument("--group-size", type=int, default=128, help="for int4")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--prompt-tokens", nargs="+", type=int, help="for runtime; by default as for gdn2-edge bench")
    parser.add_argument("--context", type=int, default=CHECK_TOKENS, help="tokens before those timed, for runtime")
    parser.add_argument("--batch", type=int, default=1, help="for runtime: also so many sequences at once")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true", help=f"add a line to benchmarks/results/{NAME}.jsonl")
    args = parser.parse_args()
    run, rows, failed = Run(args), [], []
    say(f"{device_name(run.device)}, torch {torch.__version__}, {args.config}")
    rate = read_rate(run.device)
    for part in args.only:
        if run.hybrid and part not in ("runtime", "start", "eager"):
            say(f"{part}: left out, it has recurrent layers only")
            continue
        try:
            rows += getattr(run, part)()
        except Exception as error:  # a peer that cannot run here must not cost the other parts their results
            traceback.print_exception(error)
            failed.append(f"{part}: {type(error).__name__}: {error}")
        gc.collect()
        if run.cuda:
            torch.cuda.empty_cache()
    say("done")
    rate = max([rate, *(found["read_rate"] for found in rows if "read_rate" in found)])
    sheet = datasheet_rate(run.device)
    against = f", {rate / sheet:.0%} of the data sheet" if sheet else ""
    print(f"\n{args.config} on {device_name(run.device)}: reads {rate / 1e9:,.0f} GB/s{against}")
    print_table(rows, rate)
    for line in failed:
        print(f"failed: {line[:300]}")
    if args.record:
        record = {"config": args.config, "tokens": args.tokens, "read_rate": rate, "datasheet_rate": sheet}
        append(NAME, {**record, "rows": rows, "failed": failed})
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
