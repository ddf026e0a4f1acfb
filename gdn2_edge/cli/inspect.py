"""`gdn2-edge inspect`: what a checkpoint is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from gdn2_edge.cli.render import megabytes, print_json, print_table


def inspect(
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="A checkpoint, an export, or the name of a model (tiny).")
    ],
    config: Annotated[str | None, typer.Option(help="As for convert, where the checkpoint does not say all.")] = None,
    output_gate: Annotated[str | None, typer.Option(help="silu or sigmoid, as for convert.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a checkpoint or an export is: sizes, formats, spec, state, tokenizer. No weights are loaded."""
    from gdn2_edge.checkpoint.gguf_file import is_gguf, open_gguf
    from gdn2_edge.checkpoint.onnx_file import is_export, open_export
    from gdn2_edge.checkpoint.reader import open_checkpoint
    from gdn2_edge.checkpoint.summary import summarize, summarize_export
    from gdn2_edge.convert import spec_overrides
    from gdn2_edge.generate.text import open_text
    from gdn2_edge.loading import model_path

    where = model_path(path)
    files: Path | Mapping[str, bytes] = where
    if is_gguf(where):
        export = open_gguf(where)
        summary, files = summarize_export(export), export.texts
    elif is_export(where):
        summary = summarize_export(open_export(where))
    else:
        summary = summarize(open_checkpoint(where, spec_overrides(config, output_gate)))
    tokenizer = None
    if (files / "tokenizer.json").is_file() if isinstance(files, Path) else "tokenizer.json" in files:
        text = open_text(files)
        tokenizer = {"tokens": text.vocab_size, "chat_template": text.turns is not None}
    if json:
        print_json({**summary.to_json(), "tokenizer": tokenizer})
        return
    rows = [[name, f"{part.parameters:,}", megabytes(part.bytes)] for name, part in summary.parts.items()]
    rows.append(["all", f"{summary.parameters:,}", megabytes(summary.bytes)])
    print(f"{summary.path}: {summary.kind}")
    print_table("", ["part", "parameters", "size"], rows)
    spec = dict(summary.spec)
    spec["layer_types"] = _pattern(spec["layer_types"])
    facts = {
        "formats": ", ".join(f"{count:,} {name}" for name, count in summary.formats.items()),
        "bits per weight": f"{summary.bits_per_weight:.2f}",
        "moved per token": f"{megabytes(summary.bytes_per_token)} (weights once, state read and written)",
        "state": f"{megabytes(summary.state_bytes)} at any length",
        "tokenizer": "none"
        if tokenizer is None
        else f"{tokenizer['tokens']:,} tokens"
        + (", chat template" if tokenizer["chat_template"] else ", no chat template"),
        "fingerprint": summary.fingerprint or "none until it is converted",
        **{name: str(value) for name, value in spec.items()},
    }
    print_table("", ["", ""], [[name, value] for name, value in facts.items()])


def _pattern(layer_types: list[str]) -> str:
    """Runs of equal layers: 18 x gdn2, or 9 x (gdn2, sliding_attention)."""
    for size in (1, 2, 3, 4):
        unit, times = layer_types[:size], len(layer_types) // size
        if unit * times == layer_types:
            return f"{times} x {unit[0]}" if size == 1 else f"{times} x ({', '.join(unit)})"
    return ", ".join(layer_types)
