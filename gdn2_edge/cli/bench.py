"""`gdn2-edge bench`: how fast a model runs here, and how far that is from the speed of the memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from gdn2_edge.cli.options import Device, Dtype, RuntimeName, activations
from gdn2_edge.cli.render import megabytes, print_json, print_table, stages

if TYPE_CHECKING:
    from gdn2_edge.bench import Decode, Report


def bench(
    path: Annotated[
        str | None,
        typer.Argument(metavar="[PATH]", help="A checkpoint folder, an export, or the name of a model (tiny)."),
    ] = None,
    random: Annotated[bool, typer.Option("--random", help="Random weights of the sizes in --config.")] = False,
    config: Annotated[
        str | None,
        typer.Option(metavar="NAME|FILE", help="A published name (gdn2_1.3B, ...) or JSON with the spec's fields."),
    ] = None,
    format: Annotated[str | None, typer.Option(help="Of random weights: bf16, fp32, int8, fp8 or int4.")] = None,
    group_size: Annotated[int | None, typer.Option(help="Weights that share a scale, for int4: 32, 64, 128.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**31 - 1, help="Of random weights.")] = None,
    tokens: Annotated[int, typer.Option(min=10, help="Tokens to decode.")] = 200,
    prompt_tokens: Annotated[
        list[int] | None,
        typer.Option(min=1, max=1 << 20, help="Length of a prompt to feed; may be given again.", show_default=False),
    ] = None,
    context: Annotated[
        int, typer.Option(min=1, max=1 << 20, help="Tokens before those that are timed: fills a window.")
    ] = 32,
    batch: Annotated[int, typer.Option(min=1, max=4096, help="Also decode so many sequences together.")] = 1,
    device: Device = "auto",
    dtype: Dtype = None,
    runtime: RuntimeName = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Measure how fast a model runs here.

    Its logits are checked first: a model that is wrong here gets no numbers.
    """
    if random and config is None:
        raise typer.BadParameter("--random needs --config NAME|FILE.")
    if random and path is not None:
        raise typer.BadParameter("give a PATH or --random, not both.")
    given = {"--config": config, "--format": format, "--group-size": group_size, "--seed": seed}
    if unused := [name for name, value in given.items() if value is not None and not random]:
        raise typer.BadParameter(f"{unused[0]} is for --random.")

    from gdn2_edge.bench import bench as measure
    from gdn2_edge.bench.random_weights import random_weights
    from gdn2_edge.model import pick_device

    activation_dtype = activations(dtype)
    with stages(quiet) as show:
        report = measure(
            random_weights(config, format or "bf16", group_size, seed or 0, pick_device(device))
            if config is not None
            else path or "tiny",
            device,
            activation_dtype,
            runtime,
            tokens=tokens,
            prompt_tokens=prompt_tokens,
            context=context,
            batch=batch,
            progress=show,
        )
    if json:
        print_json(report.to_json())
    else:
        _print(report)


def _print(report: Report) -> None:
    check, band = report.check, report.bandwidth
    print(f"{report.model}\n{report.runtime}, {report.device}")
    error = max(check.prefill_error, check.step_error)
    other = "logits within {} of the plain path's" if check.plain else "prompt's logits within {} of single steps'"
    print(f"checked: {other.format(f'{error:.1g}')} (at most {check.tolerance:g}), greedy ids repeat\n")
    rows = [_decode_row(report.decode)]
    if report.batch is not None:
        rows.append(_decode_row(report.batch))
    for prompt in report.prefill:
        ms = prompt.milliseconds
        speed = f"{prompt.tokens_per_second:,.0f}"
        rows.append([f"prompt of {prompt.tokens:,}", f"{ms.median:,.1f}", f"{ms.p20:,.1f}", f"{ms.p80:,.1f}", speed])
    print_table("", ["", "ms", "p20", "p80", "tokens/s"], rows)
    moved = band.bytes_per_token
    kv = f", {megabytes(moved.kv)} of attention's window" if moved.kv else ""
    facts = {
        "moved per token": f"{megabytes(moved.total)}: {megabytes(moved.weights)} of weights, "
        f"{megabytes(moved.state)} of state{kv}",
        "rate": f"{band.gigabytes_per_second:,.1f} GB/s, {band.share_of_read_rate:.0%} of the "
        f"{band.read_gigabytes_per_second:,.1f} GB/s that a plain sum reads here",
    }
    if band.share_of_datasheet is not None:
        facts["data sheet"] = f"{band.share_of_datasheet:.0%} of {band.datasheet_gigabytes_per_second:,.0f} GB/s"
    if report.decode.graph_milliseconds is not None:
        facts["on the device alone"] = f"{report.decode.graph_milliseconds:.3f} ms per token"
    if report.decode.launches_per_token is not None:
        facts["launches per token"] = str(report.decode.launches_per_token)
    facts["first token"] = f"{report.first_token_seconds:.2f} s after loading began"
    if report.memory_bytes is not None:
        facts["memory"] = megabytes(report.memory_bytes)
    print_table("", ["", ""], [[name, value] for name, value in facts.items()])


def _decode_row(decode: Decode) -> list[str]:
    ms, several = decode.milliseconds_per_token, decode.sequences > 1
    name = f"a token of {decode.sequences} sequences" if several else "a token"
    return [name, f"{ms.median:.3f}", f"{ms.p20:.3f}", f"{ms.p80:.3f}", f"{decode.tokens_per_second:,.1f}"]
