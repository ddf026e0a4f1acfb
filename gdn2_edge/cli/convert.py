"""`gdn2-edge convert`: a checkpoint that people hold, into a gdn2-edge folder."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from gdn2_edge.cli.render import megabytes, print_json, progress, resumable


def convert(
    src: Annotated[str, typer.Argument(metavar="SRC", help="A .pth file, a safetensors file or folder.")],
    out: Annotated[str, typer.Option(metavar="DIR", help="The folder to make.")],
    config: Annotated[
        str | None,
        typer.Option(metavar="NAME|FILE", help="A published name (gdn2_1.3B, ...) or JSON with the spec's fields."),
    ] = None,
    output_gate: Annotated[str | None, typer.Option(help="silu or sigmoid, where the source does not say.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="FILE|DIR", help="tokenizer.json or a sentencepiece model.")
    ] = None,
    chat_template: Annotated[str | None, typer.Option(metavar="FILE", help="A jinja chat template.")] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16 for matrices; as stored if not given.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace DIR if gdn2-edge made it.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Convert a checkpoint into a gdn2-edge folder, tensor by tensor."""
    from gdn2_edge.convert import convert_checkpoint

    with resumable("convert"), progress("Converting", quiet) as show:
        done = convert_checkpoint(
            src,
            out,
            config=config,
            output_gate=output_gate,
            tokenizer=tokenizer,
            chat_template=chat_template,
            dtype=dtype,
            force=force,
            progress=show,
        )
    if json:
        print_json(asdict(done))
    else:
        print(
            f"{done.out}: {done.parameters:,} parameters, {megabytes(done.nbytes)}, fingerprint {done.fingerprint[:12]}"
        )
