"""`gdn2-edge llama-cpp`: a llama-cpp-python that knows GDN-2."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from gdn2_edge.cli.render import print_json, resumable

app = typer.Typer(help="A llama-cpp-python that knows GDN-2.", no_args_is_help=True)


@app.callback()
def llama_cpp() -> None:
    """A llama-cpp-python that knows GDN-2."""


@app.command()
def build(
    wheel: Annotated[
        str | None, typer.Option(metavar="DIR", help="The folder for the wheel; this user's cache if not given.")
    ] = None,
    define: Annotated[
        list[str] | None,
        typer.Option("-D", metavar="NAME=VALUE", help="An option for cmake, as -DGGML_CUDA=ON; may be repeated."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Fetch llama-cpp-python's source with pip, teach its llama.cpp GDN-2, and compile it to a wheel for this computer.

    It takes minutes and needs a C++ compiler. What is compiled is kept: an interrupted build goes on where it was.
    """
    defines: dict[str, str] = {}
    for option in define or []:
        name, equals, value = option.partition("=")
        if not (name and equals):
            raise typer.BadParameter(f"-D{option} is not of the form -DNAME=VALUE.")
        defines[name] = value
    from gdn2_edge.integrations.build_llama_cpp import PATCHED_VERSION, build_llama_cpp

    with resumable("llama-cpp build"), _steps(quiet) as show:
        made = build_llama_cpp(Path(wheel) if wheel is not None else None, defines, show)
    install = f'pip install "{made}"'
    if json:
        print_json({"wheel": str(made), "version": PATCHED_VERSION, "install": install})
        return
    print(f"{made}\nllama-cpp-python {PATCHED_VERSION}. To install it: {install}")


@contextlib.contextmanager
def _steps(quiet: bool) -> Iterator[Callable[[int, int, str], None] | None]:
    """A bar on stderr for `(steps done, steps in all, what is being done)`; nothing where stderr is no terminal."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TimeElapsedColumn(), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total, what: bar.update(task, completed=done, total=total or None, description=what)
