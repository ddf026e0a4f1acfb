"""`gdn2-edge export`: a model for other programs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from gdn2_edge.cli.render import megabytes, print_json, progress, stages

app = typer.Typer(help="Write a model for other programs.", no_args_is_help=True)


@app.callback()
def export() -> None:
    """Write a model for other programs."""


@app.command()
def onnx(
    src: Annotated[
        str | None, typer.Argument(metavar="[SRC]", help="A gdn2-edge folder, or the name of a model (tiny).")
    ] = None,
    out: Annotated[str | None, typer.Option(metavar="DIR", help="The folder to make.")] = None,
    format: Annotated[
        str | None,
        typer.Option(help="fp32, fp16, int8, int4 or fp8; as stored if not given. The last three quantize."),
    ] = None,
    portable: Annotated[bool, typer.Option("--portable", help="Standard operators only; slower.")] = False,
    build_op: Annotated[
        bool,
        typer.Option("--build-op", help="No export: compile the operator's library for this computer (into --out)."),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Plan and check, write nothing.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Export a checkpoint to ONNX: a folder with model.onnx, tokenizer and chat template.

    Or, with --build-op, make the library that lets ONNX Runtime decode faster on this computer's CPU.
    """
    if build_op:
        if src is not None or format is not None or portable or dry_run:
            raise typer.BadParameter("--build-op exports nothing: it goes with --out, --json and --quiet alone.")
        _build_op(Path(out) if out is not None else None, json, quiet)
        return
    if src is None or out is None:
        raise typer.BadParameter("give what to export and where: SRC --out DIR.")
    from gdn2_edge.export.onnx import export_onnx
    from gdn2_edge.loading import model_path

    try:
        with progress("Exporting", quiet) as show:
            done = export_onnx(
                model_path(src),
                Path(out),
                format,
                portable=portable,
                dry_run=dry_run,
                progress=None if dry_run else show,
            )
    except KeyboardInterrupt:
        typer.echo("\nStopped; nothing was kept.", err=True)
        raise typer.Exit(130) from None
    if json:
        print_json(done.to_json())
        return
    verb = "would hold" if dry_run else "holds"
    print(
        f"{done.out} {verb} {', '.join(done.files)}: {done.parameters:,} parameters in {done.format}, "
        f"{megabytes(done.bytes)}, {done.nodes} nodes, operators of {', '.join(done.domains)}"
    )


def _build_op(out: Path | None, json: bool, quiet: bool) -> None:
    from gdn2_edge.export.onnx.build_op import build_op

    with stages(quiet) as show:
        show("Compiling")
        library = build_op(out)
    if json:
        print_json({"library": str(library)})
        return
    used = "gdn2-edge chat and bench use it from now on." if out is None else "gdn2-edge uses one built without --out."
    print(f"{library}\n{used} Your program: SessionOptions.register_custom_ops_library.")


@app.command()
def gguf(
    src: Annotated[str, typer.Argument(metavar="SRC", help="A gdn2-edge folder, or the name of a model (tiny).")],
    type: Annotated[str, typer.Option(help="Of the matrices: f32, f16, bf16, q8_0, q5_0, q4_0 or q4_k_m.")],
    out: Annotated[str, typer.Option(metavar="FILE", help="The file to make.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Plan and check, write nothing.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Export a checkpoint to GGUF: one file for llama.cpp, which must know the architecture gdn2.

    A stock llama.cpp does not, nor do Ollama and LM Studio yet.
    """
    from gdn2_edge.export.gguf import export_gguf
    from gdn2_edge.loading import model_path

    try:
        with progress("Exporting", quiet) as show:
            done = export_gguf(model_path(src), Path(out), type, dry_run=dry_run, progress=None if dry_run else show)
    except KeyboardInterrupt:
        typer.echo("\nStopped; nothing was kept.", err=True)
        raise typer.Exit(130) from None
    if json:
        print_json(done.to_json())
        return
    verb = "would hold" if dry_run else "holds"
    types = ", ".join(f"{count} {name}" for name, count in done.types.items())
    print(
        f"{done.out} {verb} {done.parameters:,} parameters in {done.type}, {megabytes(done.bytes)}, "
        f"{done.bits_per_weight:.2f} bits per weight; tensors: {types}; tokenizer: {done.tokenizer}"
    )
    for note, count in Counter(done.notes.values()).items():
        print(f"  {count} tensors in {note}")
    print("Stock Ollama and LM Studio cannot open it until llama.cpp takes the patch for gdn2 (docs/gguf.md).")
