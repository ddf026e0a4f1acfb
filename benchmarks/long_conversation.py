"""A conversation of 100,000 tokens: memory and time per token stay flat; how far back a fact is recalled.

    python benchmarks/long_conversation.py [--tokens 100000] [--record]

The model answers questions of held-out chats, one after the other, in one session. After every turn resident memory
and the time of a decoding step are noted. The session is saved at 1,000 tokens and at the end, and the sizes of its
tensors are compared. Recall by distance is measured apart: a code is told, so many tokens of other chat follow, and it
is asked for. `--record` writes the record and draws docs/long_conversation.png from it.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from heldout import turns
from record import append, summary
from safetensors import safe_open

from gdn2_edge import Sampling, Session, load
from gdn2_edge.generate.engine import generate
from gdn2_edge.generate.sampler import Sampler

GREEDY = Sampling(temperature=0, repetition_penalty=1.05)
ANSWER_TOKENS = 32
DISTANCES = (0, 32, 64, 128, 256, 512, 1024, 2048)
CASES = 48
PLOT = Path(__file__).parents[1] / "docs" / "long_conversation.png"


def converse(session: Session, tokens: int, folder: Path) -> list[dict[str, float]]:
    """Talk until `tokens` are fed; a point after every turn."""
    points, process, saved = [], psutil.Process(), False
    for question, _ in itertools.cycle(turns()):
        steps, last = [], time.perf_counter()
        for piece in session.send(question, ANSWER_TOKENS):
            now = time.perf_counter()
            if piece:
                steps.append(now - last)
            last = now
        if len(steps) > 3:
            milliseconds = 1000 * statistics.median(steps[1:])
            memory = process.memory_info().rss / 1e6
            points.append({"tokens": session.position, "ms_per_token": milliseconds, "resident_mb": memory})
        if session.position >= 1000 and not saved:
            session.save(folder / "early.session")
            saved = True
        if session.position >= tokens:
            session.save(folder / "late.session")
            return points
    raise AssertionError


def tensor_sizes(file: Path) -> dict[str, list[int]]:
    """Name -> shape of the tensors of a session file."""
    with safe_open(file, framework="pt") as opened:
        return {name: opened.get_slice(name).get_shape() for name in opened.keys()}


def recall(session: Session) -> dict[int, float]:
    """Distance in tokens -> share of the codes that come back."""
    runtime, text, r = session.runtime, session.tokenizer, random.Random(2)
    fillers, found = turns(), {}
    for distance in DISTANCES:
        right = 0
        for _ in range(CASES):
            code, between = str(r.randint(100, 999)), list[int]()
            while len(between) < distance:
                question, answer = r.choice(fillers)
                between += text.continuation(question) + text.encode(answer)
            told = text.opening(f"Remember that my door code is {code}.") + text.encode("I will remember that.")
            ids = told + between + text.continuation("What is my door code?")
            steps = generate(runtime, ids, runtime.initial_state(), Sampler(GREEDY), text.stop_ids, 16)
            right += code in text.decode([step.token for step in steps if step.token is not None])
        found[distance] = right / CASES
    return found


def plot(record: dict[str, Any], path: Path) -> None:
    """Memory, time and recall in one picture."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    points = record["points"]
    x = [point["tokens"] for point in points]
    axes[0].plot(x, [point["resident_mb"] for point in points], color="#2a6f97")
    axes[0].set(title="Resident memory", xlabel="tokens of conversation", ylabel="MB", ylim=(0, None))
    axes[1].plot(x, [point["ms_per_token"] for point in points], ".", markersize=2, color="#2a6f97")
    top = 2.5 * statistics.median(point["ms_per_token"] for point in points)
    axes[1].set(title="Time per token", xlabel="tokens of conversation", ylabel="ms", ylim=(0, top))
    distances = [int(d) for d in record["recall"]]
    axes[2].plot([max(d, 16) for d in distances], [100 * v for v in record["recall"].values()], "o-", color="#c1121f")
    axes[2].set(title="A fact comes back", xlabel="tokens since it was told (0 drawn at 16)", ylabel="% of 48 codes")
    axes[2].set(ylim=(0, 104), xscale="log", xticks=[16, 64, 256, 1024], xticklabels=["0", "64", "256", "1024"])
    cpu, threads = record["cpu"], record["threads"]
    figure.suptitle(f"Default model, one session of {x[-1]:,} tokens ({cpu}, {threads} threads)", fontsize=10)
    figure.savefig(path, dpi=110)


def main() -> int:
    """Parse, run, report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()
    session = Session(load(args.model), sampling=GREEDY)
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        points = converse(session, args.tokens, Path(folder))
        seconds = time.perf_counter() - begun
        early, late = (Path(folder) / f"{name}.session" for name in ("early", "late"))
        same = tensor_sizes(early) == tensor_sizes(late)
        files = {"early": early.stat().st_size, "late": late.stat().st_size}
    tenth = max(1, len(points) // 10)
    first, last = points[tenth : 2 * tenth], points[-tenth:]
    flat = {
        name: statistics.median(p[name] for p in last) / statistics.median(p[name] for p in first)
        for name in ("resident_mb", "ms_per_token")
    }
    kept = points[:: max(1, len(points) // 400)]
    record = {
        "model": args.model,
        "tokens": session.position,
        "seconds": seconds,
        "same_tensor_sizes": same,
        "session_file_bytes": files,
        "last_tenth_over_second_tenth": flat,
        "ms_per_token": summary([p["ms_per_token"] for p in points]),
        "recall": recall(session),
        "points": [{name: round(value, 3) for name, value in point.items()} for point in kept],
    }
    print({name: value for name, value in record.items() if name != "points"})
    if args.record:
        append("long_conversation", record)
        from record import machine

        plot({**record, **machine()}, PLOT)
    return 0 if same and flat["resident_mb"] < 1.05 else 1


if __name__ == "__main__":
    torch.set_num_threads(2)
    sys.exit(main())
