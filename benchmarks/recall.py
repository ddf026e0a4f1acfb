"""Told a random code, corrected, asked: three processes, and a session file for each of 100 codes.

    python benchmarks/recall.py [--model tiny] [--digits 4] [--codes 100] [--record]

Each visit is one process, three in all, that opens every session file, says one thing, saves and ends; the greedy
answer to the question is counted right when it holds the corrected code, old when it holds the first one. Nothing but
the session files passes from one process to the next.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

VISITS = ("Remember that my door code is {first}.", "Correction: My door code is {second}.", "What is my door code?")
SEED = 1


def codes(count: int, digits: int) -> list[tuple[str, str]]:
    """Pairs of different codes."""
    r = random.Random(SEED)
    low, high = 10 ** (digits - 1), 10**digits - 1
    return [(str(a), str(b)) for a, b in (r.sample(range(low, high + 1), 2) for _ in range(count))]


def visit(number: int, folder: Path, model: str, pairs: list[tuple[str, str]]) -> list[str]:
    """One process's work: say the visit's words in every session; the answers."""
    from gdn2_edge import Sampling, Session, load

    runtime, answers = load(model), []
    fresh = Session(runtime, sampling=Sampling(temperature=0, repetition_penalty=1.05))
    for i, (first, second) in enumerate(pairs):
        file = folder / f"{i}.session"
        session = Session.load(file, runtime, fresh.tokenizer) if number else fresh.fork()
        answers.append("".join(session.send(VISITS[number].format(first=first, second=second), 48)))
        session.save(file)
    return answers


def main() -> int:
    """Parse, run, report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--digits", type=int, default=4)
    parser.add_argument("--codes", type=int, default=100)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--visit", type=int, help="used by this script: do one visit in this process")
    parser.add_argument("--folder", type=Path, help="used by this script")
    args = parser.parse_args()
    pairs = codes(args.codes, args.digits)
    if args.visit is not None:
        print(json.dumps(visit(args.visit, args.folder, args.model, pairs)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        for number in range(len(VISITS)):
            command = [sys.executable, __file__, *sys.argv[1:], "--visit", str(number), "--folder", folder]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
    answers = json.loads(done.stdout)
    right = sum(second in answer for (_, second), answer in zip(pairs, answers, strict=True))
    old = sum(first in answer for (first, _), answer in zip(pairs, answers, strict=True))
    print(f"{args.model}: {args.codes} codes of {args.digits} digits: {right} right, {old} times the old one")
    if args.record:
        from record import append

        result = {"model": args.model, "digits": args.digits, "codes": args.codes, "right": right, "old": old}
        append("recall", {**result, "visits": VISITS, "seed": SEED})
    return 0 if right >= 0.9 * args.codes and old <= 0.05 * args.codes else 1


if __name__ == "__main__":
    sys.exit(main())
