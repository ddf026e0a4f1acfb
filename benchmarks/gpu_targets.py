"""Every kernel of a model, compiled for GPUs that are not here; what it takes of them; and predicted speeds.

    python benchmarks/gpu_targets.py [--formats int8 int4 ...] [--targets sm_86 gfx1100 ...] [--uses token] [--write]

Fails where a kernel does not compile or wants more shared memory than a program may have. Nothing is run. `--write`
makes docs/gpu_targets.md of it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import torch
import triton
from ahead_of_time import TARGETS, Launch, Resources, Target, compile_launch, pretending, record

from gdn2_edge.bench.random_weights import RandomWeights, random_weights
from gdn2_edge.bench.traffic import traffic
from gdn2_edge.forward import forward
from gdn2_edge.model import WeightReader
from gdn2_edge.ops import ModelWeights
from gdn2_edge.spec import ModelSpec
from gdn2_edge.state import initial_state
from gdn2_edge.triton_model import TritonModel
from gdn2_edge.triton_ops import DecodeStep
from gdn2_edge.weights import Dense, Int4, Weight, layout_of

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "gpu_targets.md"
RECORDS = ROOT / "benchmarks" / "results" / "decode.jsonl"
GROUP_SIZE = 64
FORMATS = ("bf16", "int8", "fp8", "int4")
BATCHES = (4, 64)  # few rows and many a product
PROMPTS = (8, 200)  # token by token with stored weights, and in chunks with expanded ones

# Cards of the predictions: gigabytes a second (NVIDIA's and AMD's product pages) and the target they are.
CARDS = {
    "RTX 3060 12GB": (360, "sm_86"),
    "RTX 4090": (1008, "sm_89"),
    "RTX 5090": (1792, "sm_120"),
    "RX 7900 XTX": (960, "gfx1100"),
}
REFERENCE_CARD = "H100"
ASSUMED_SHARE = 0.75  # of the data sheet's rate; only until there is a record
# Between two kernels of a graph that cannot overlap, an assumption: before sm_90, and on AMD.
GAP_SECONDS = {False: 1.5e-6, True: 4e-6}


class Placeholder:
    """Random weights' names, layouts and shapes on a device, without values."""

    def __init__(self, source: RandomWeights, device: torch.device) -> None:
        self.source, self.device = source, device
        self.spec, self.path, self.fingerprint = source.spec, source.path, ""

    def weight(self, name: str) -> Weight:
        shape = self.spec.tensor_shapes()[name]
        infos = self.source.stored(name)
        stored = {key: torch.empty(info.shape, dtype=info.dtype, device=self.device) for key, info in infos.items()}
        layout = layout_of(name, stored, shape)
        if issubclass(layout, Dense):
            return Dense(name, stored[""])
        return layout(name, stored["_packed" if layout is Int4 else ""], stored["_scale"])


def source_of(config: str, format: str) -> RandomWeights:
    """The names and layouts of a model in a format."""
    return random_weights(config, format, GROUP_SIZE if format == "int4" else None)


def token_launches(spec: ModelSpec, weights: ModelWeights, device: torch.device, batch: int = 1) -> list[Launch]:
    """Of a step for `batch` sequences that also chooses the next token."""
    step = DecodeStep(spec, weights, torch.zeros(16, device=device), batch)
    return record(lambda: step.launch(choose=True))


def batch_launches(spec: ModelSpec, weights: ModelWeights, device: torch.device) -> list[Launch]:
    """Of steps for several sequences."""
    return [launch for batch in BATCHES for launch in token_launches(spec, weights, device, batch)]


def prompt_launches(spec: ModelSpec, weights: ModelWeights, device: torch.device) -> list[Launch]:
    """Of short and long prompts, in bf16."""
    model = TritonModel(spec, weights, device, torch.bfloat16)

    def run() -> None:
        for T in PROMPTS:
            tokens = torch.zeros(1, T, dtype=torch.int64, device=device)
            forward(model.ops, spec, weights, tokens, initial_state(spec, 1, device))

    return record(run)


USES: dict[str, Callable[[ModelSpec, ModelWeights, torch.device], list[Launch]]] = {
    "token": token_launches,
    "batch": batch_launches,
    "prompt": prompt_launches,
}


@dataclass(frozen=True)
class Compiled:
    """A kernel on a target: what it takes, or why it cannot be there."""

    name: str
    target: str
    resources: Resources | None
    error: str = ""


def compile_all(config: str, format: str, target_name: str, use: str) -> list[Compiled]:
    """Every launch of one use of a model on one target."""
    target, source = TARGETS[target_name], source_of(config, format)
    with pretending(target) as device:
        weights = WeightReader(Placeholder(source, device), device, ready=lambda weight: weight).model()
        launches = USES[use](source.spec, weights, device)
    return [compiled(launch, target) for launch in dict.fromkeys(launches)]


def compiled(launch: Launch, target: Target) -> Compiled:
    """What a launch takes, or what is wrong with it."""
    try:
        resources = compile_launch(launch, target)
    except Exception as error:  # Triton's compilers raise what they like
        return Compiled(name_of(launch), target.name, None, f"{type(error).__name__}: {str(error)[-300:]}")
    allowed = target.shared_bytes
    error = f"{resources.shared_bytes} bytes of shared memory" if resources.shared_bytes > allowed else ""
    return Compiled(name_of(launch), target.name, resources, error)


def name_of(launch: Launch) -> str:
    """The kernel and what tells its uses apart."""
    of = launch.constant
    match launch.name:
        case "gemv_kernel":
            second = f" and {of('FORMAT_2')}" if of("FORMAT_2") else ""
            return f"gemv {of('FORMAT')}{second}, {of('NORM')}, {of('OUTPUT')}, K {of('K')}"
        case "decode_kernel":
            return f"recurrence, gates {of('F_FORMAT')}"
        case "product_kernel":
            return f"product {of('FORMAT')}, {of('BLOCK_M')} rows" + (", K split" if of("SPLITS") > 1 else "")
    name = launch.name.removesuffix("_kernel").replace("_", " ")
    return f"{name} {of('FORMAT')}" if of("FORMAT") else name


def worst(found: list[Compiled]) -> dict[tuple[str, str], Resources]:
    """(name, target) -> the most that any launch of that name takes."""
    most: dict[tuple[str, str], Resources] = {}
    for one in found:
        if one.resources:
            before, key = most.get((one.name, one.target), Resources(0, 0, 0)), (one.name, one.target)
            pairs = zip(vars(before).values(), vars(one.resources).values(), strict=True)
            most[key] = Resources(*(max(pair) for pair in pairs))
    return most


def resource_table(found: list[Compiled], targets: list[str]) -> Iterator[str]:
    """Markdown; kernels that take little on every target are left out."""
    most = worst(found)
    yield "| kernel | " + " | ".join(targets) + " |"
    yield "| --- |" + " ---: |" * len(targets)
    for name in dict.fromkeys(one.name for one in found):
        row = [most.get((name, target)) for target in targets]
        if not any(r and (r.registers > 64 or r.spilled_bytes or r.shared_bytes > 16384) for r in row):
            continue
        yield f"| {name} | " + " | ".join(shown(resources) for resources in row) + " |"


def shown(resources: Resources | None) -> str:
    """A cell of the table."""
    if resources is None:
        return ""
    spilled = f" + {resources.spilled_bytes} B" if resources.spilled_bytes else ""
    shared = f", {resources.shared_bytes // 1024} KB" if resources.shared_bytes >= 1024 else ""
    return f"{resources.registers}{spilled}{shared}"


def measured_shares() -> tuple[dict[str, float], str]:
    """Format -> share of the data sheet's rate that decoding reached on the reference card, and where that is from."""
    shares: dict[str, float] = {}
    for line in RECORDS.read_text(encoding="utf-8").splitlines() if RECORDS.exists() else ():
        entry = json.loads(line)
        if REFERENCE_CARD not in entry["machine"].get("gpu", "") or not entry.get("datasheet_rate"):
            continue
        for row in entry["rows"]:
            if row["name"] == "runtime" and entry["config"] == "gdn2_1.3B":
                seconds = 1e-3 * row["milliseconds"]["median"]
                shares[row["format"]] = row["bytes"] / seconds / entry["datasheet_rate"]
    if shares:
        return shares, f"as measured on an {REFERENCE_CARD} ([record](../benchmarks/results/decode.jsonl))"
    return {}, f"assumed to be {ASSUMED_SHARE:.0%}, for there is no record of an {REFERENCE_CARD} yet"


def prediction_table(config: str, formats: list[str], shares: dict[str, float]) -> Iterator[str]:
    """Markdown: tokens a second of one sequence."""
    yield "| card | GB/s | " + " | ".join(formats) + " |"
    yield "| --- | ---: |" + " ---: |" * len(formats)
    for card, (gigabytes_per_second, target_name) in CARDS.items():
        target, cells = TARGETS[target_name], []
        for format in formats:
            source = source_of(config, format)
            rate = 1e9 * gigabytes_per_second * shares.get(format, ASSUMED_SHARE)
            overlaps = not target.is_amd and int(target.arch) >= 90
            gap = 0.0 if overlaps else GAP_SECONDS[target.is_amd]
            seconds = traffic(source, source.spec.window).total / rate + gap * count_launches(source, target)
            cells.append(f"{1 / seconds:.0f}")
        yield f"| {card} | {gigabytes_per_second} | " + " | ".join(cells) + " |"


def count_launches(source: RandomWeights, target: Target) -> int:
    """Kernels of a step for one sequence."""
    with pretending(target) as device:
        weights = WeightReader(Placeholder(source, device), device, ready=lambda weight: weight).model()
        return len(token_launches(source.spec, weights, device))


def document(config: str, found: list[Compiled], targets: list[str], formats: list[str]) -> str:
    """docs/gpu_targets.md."""
    shares, origin = measured_shares()
    return "\n".join(
        [
            "# Other GPUs",
            "",
            "Made by `python benchmarks/gpu_targets.py --write`. **Nothing was run for this page**: kernels are",
            "compiled ahead of time, speeds are computed.",
            "None of the cards under the predictions was at hand, and no AMD card at all.",
            "",
            "## What kernels take",
            "Registers a thread, bytes of them that are spilled, shared memory of a program from 1 KB on;",
            f"for the sizes of {config}, by triton {triton.__version__}.",
            f"int4 is in groups of {GROUP_SIZE}. Kernels with little of all three are left out. "
            "Of several launches of one kernel the largest figures.",
            "",
            *resource_table(found, targets),
            "",
            "## Predicted tokens per second",
            "**Predictions, not measurements.** gdn2_1.3B, one sequence: the bytes of a step over the share of the "
            "data sheet's rate",
            f"that decoding reaches, {origin}.",
            f"Where a kernel cannot begin before the last one ends, each launch adds an assumed "
            f"{GAP_SECONDS[False] * 1e6:g} µs, and on AMD {GAP_SECONDS[True] * 1e6:g} µs.",
            "",
            *prediction_table("gdn2_1.3B", formats, shares),
            "",
        ]
    )


def main() -> int:
    """Compile, print, and write if asked to; 1 if something does not compile or fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="swa_gdn2_1.3B", help="a published name or a JSON file")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS))
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--uses", nargs="+", choices=USES, default=list(USES))
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--write", action="store_true", help=f"write {DOCUMENT.relative_to(ROOT)}")
    args = parser.parse_args()
    found: list[Compiled] = []
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        # Each use of each format, on all targets in turn.
        work = list(product(args.uses, args.formats, args.targets))
        futures = [pool.submit(compile_all, args.config, format, target, use) for use, format, target in work]
        for (use, format, target), future in zip(work, futures, strict=True):
            here = future.result()
            found += here
            print(f"{target}, {format}, {use}: {len(here)} kernels", file=sys.stderr, flush=True)
    failed = [one for one in found if one.error]
    print("\n".join(resource_table(found, args.targets)))
    for one in failed:
        print(f"failed: {one.name} on {one.target}: {one.error}")
    if args.write:
        DOCUMENT.write_text(document(args.config, found, args.targets, args.formats), encoding="utf-8")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
