"""`gdn2-edge eval`: how well a model predicts a text, and how far it is from another one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gdn2_edge.cli.options import Device, Dtype, RuntimeName, activations
from gdn2_edge.cli.render import print_json, print_table, progress

if TYPE_CHECKING:
    from gdn2_edge.evaluate import Estimate, Evaluation


def evaluate(
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="A checkpoint folder, an export, or the name of a model (tiny).")
    ],
    text: Annotated[
        Path,
        typer.Argument(
            metavar="TEXT",
            help='A text, or a .jsonl file with {"text": ...} or {"messages": [...]} on each line.',
        ),
    ],
    against: Annotated[
        str | None, typer.Option(metavar="PATH", help="Also compare with this model, which must know the same tokens.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=2, help="Read at most so many tokens of each document.")] = None,
    device: Device = "auto",
    dtype: Dtype = None,
    runtime: RuntimeName = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Measure how well a model predicts a text: its perplexity.

    Each document begins with an empty memory, and every token after its first one counts, in chats the users' and the
    template's too. --against gives KL(its model || this model) and how often both have the same likeliest token; that
    model runs as it would without --device, --dtype and --runtime. Intervals are of 95 %, from 20 documents or pieces
    of 256 tokens on. Ctrl-C prints what is known by then.
    """
    from gdn2_edge import evaluate as library
    from gdn2_edge.errors import Gdn2EdgeError
    from gdn2_edge.generate.text import open_text
    from gdn2_edge.loading import load

    activation_dtype = activations(dtype)
    documents = library.read_documents(text)
    model = load(path, device, activation_dtype, runtime)
    reference = load(against) if against is not None else None
    ids = library.read_ids(open_text(model.text_files), documents, max_tokens)
    if reference is not None:
        library.check_same_ids(model, reference, ids, documents, max_tokens)
    total = sum(max(0, len(row) - 1) for row in ids)
    found, stopped = None, False
    with progress("Reading", quiet, unit="tokens") as show:
        try:
            for found in library.evaluate(model, ids, reference):
                if show:
                    show(found.tokens, total, f"perplexity {found.perplexity:,.2f}")
        except KeyboardInterrupt:
            stopped = True
    if stopped:
        print(f"\nStopped after {found.tokens if found else 0:,} of {total:,} tokens.", file=sys.stderr)
    elif found is None:
        raise Gdn2EdgeError(f"{text}: no document has two tokens, so there is nothing to predict.")
    if found is not None:
        names = {"model": f"{model.path}", "runtime": model.name}
        if reference is not None:
            names |= {"reference": f"{reference.path}", "reference_runtime": reference.name}
        if json:
            print_json({**names, "complete": not stopped, **found.to_json()})
        else:
            _print(names, found, total)
    if stopped:
        raise typer.Exit(130)


def _print(names: dict[str, str], found: Evaluation, total: int) -> None:
    documents = f"{found.documents:,} document{'s' * (found.documents != 1)}"
    part = f", stopped before {total:,}" if found.tokens < total else ""
    rows = [
        ["model", f"{names['model']}, {names['runtime']}"],
        ["predicted", f"{found.tokens:,} tokens of {documents}{part}"],
        ["perplexity", f"{found.perplexity:.4g} (loss {_interval(found.loss, 'nats a token')})"],
    ]
    if (other := found.against) is not None:
        rows += [
            ["against", f"{names['reference']}, {names['reference_runtime']}"],
            ["its perplexity", f"{other.perplexity:.4g} (loss {_interval(other.loss, 'nats a token')})"],
            ["change of perplexity", _interval(other.change_percent, "%")],
            ["KL divergence", _interval(other.kl, "nats a token")],
            ["same likeliest token", _interval(other.top1, "%", 100)],
        ]
    print_table("", ["", ""], rows)


def _interval(value: Estimate, unit: str, times: float = 1.0) -> str:
    """A mean with half of its 95 % interval."""
    width = "" if value.half_width is None else f" +- {times * value.half_width:.2g}"
    return f"{times * value.mean:.4g}{width} {unit}"
