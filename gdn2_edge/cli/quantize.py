"""`gdn2-edge quantize`: a checkpoint in fewer bits."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gdn2_edge.cli.render import megabytes, print_json, print_table, progress, resumable

if TYPE_CHECKING:
    from gdn2_edge.quantize import Report


def quantize(
    src: Annotated[str, typer.Argument(metavar="SRC", help="A checkpoint, or the name of a model (tiny).")],
    out: Annotated[str, typer.Option(metavar="DIR", help="The folder to make.")],
    format: Annotated[str | None, typer.Option(help="int8, fp8 or int4.")] = None,
    group_size: Annotated[int | None, typer.Option(help="Weights that share a scale, for int4: 32, 64, 128.")] = None,
    recipe: Annotated[str | None, typer.Option(metavar="FILE", help="A TOML recipe: a format for each tensor.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Plan and check, write nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace DIR if gdn2-edge made it.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON: every tensor.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, and no plan.")] = False,
) -> None:
    """Quantize a checkpoint to int8, fp8 or int4, one tensor in memory at a time."""
    from gdn2_edge.loading import model_path
    from gdn2_edge.quantize import quantize_checkpoint
    from gdn2_edge.quantize.recipe import load_recipe, make_recipe

    if recipe is None and format is None:
        raise typer.BadParameter("give --format int8|fp8|int4, or --recipe FILE.")
    if recipe is not None:
        chosen = load_recipe(Path(recipe), format, group_size)
    else:
        chosen = make_recipe(
            {"format": format, **({} if group_size is None else {"group_size": group_size})}, "quantize"
        )
    if group_size is not None and chosen.format != "int4" and all(rule.format != "int4" for rule in chosen.rules):
        raise typer.BadParameter(f"--group-size is for int4; {chosen.format} has one scale a row.")
    path = model_path(src)
    plan = quantize_checkpoint(path, out, chosen, dry_run=True, force=force)
    if not (json or quiet):
        _print_plan(plan)
    if dry_run:
        if json:
            print_json(plan.to_json())
        return
    with resumable("quantize"), progress("Quantizing", quiet) as show:
        report = quantize_checkpoint(path, out, chosen, force=force, progress=show)
    if json:
        print_json(report.to_json())
        return
    said = (
        f"{report.out}: {megabytes(report.bytes_before)} -> {megabytes(report.bytes_after)}, "
        f"{report.bits_per_weight:.2f} bits per weight"
    )
    errors = {t.name: t.relative_error for t in report.tensors if t.relative_error is not None}
    if errors:  # none where an interrupted run had made all tensors
        worst = max(errors, key=lambda name: errors[name])
        said += f", largest relative error {errors[worst]:.2g} ({worst})"
    print(said)


def _print_plan(plan: Report) -> None:
    """A row for each kind of tensor and format."""
    rows: dict[tuple[str, ...], list[int]] = {}
    for tensor in plan.tensors:
        format = f"{tensor.format} g{tensor.group_size}" if tensor.group_size else tensor.format
        key = (re.sub(r"layers\.\d+", "layers.*", tensor.name), format, tensor.note)
        row = rows.setdefault(key, [0, 0, 0])
        row[0] += 1
        row[1] += tensor.bytes_before
        row[2] += tensor.bytes_after
    table = [
        [name, format, str(count), megabytes(before), megabytes(after), note]
        for (name, format, note), (count, before, after) in rows.items()
    ]
    table.append(
        [
            "all",
            "",
            "",
            megabytes(plan.bytes_before),
            megabytes(plan.bytes_after),
            f"{plan.bits_per_weight:.2f} bits per weight",
        ]
    )
    print_table("Plan", ["tensor", "format", "count", "before", "after", "note"], table)
