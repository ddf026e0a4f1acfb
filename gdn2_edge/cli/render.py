"""How the commands print: tables and progress for people, JSON for programs."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text


def print_json(value: dict[str, Any]) -> None:
    """One JSON object on stdout."""
    print(json.dumps(value, indent=1))


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A table on stdout; numbers stand right, words left. Cells are plain text, without markup."""
    table = Table(
        title=Text(printable(title)) if title else None,
        title_justify="left",
        box=None,
        pad_edge=False,
        header_style="bold",
        show_header=any(columns),
    )
    for i, column in enumerate(columns):
        words = i == 0 or column in ("format", "note", "")
        table.add_column(column, justify="left" if words else "right", no_wrap=i == 0)
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    width = None if sys.stdout.isatty() else 120
    Console(width=width, highlight=False, soft_wrap=False).print(table)


def printable(text: str) -> str:
    """Text from a model or a file without the control characters that would steer a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)


def megabytes(size: int) -> str:
    """A size in bytes, for people."""
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size:,} bytes"


@contextlib.contextmanager
def progress(
    label: str, quiet: bool, unit: Literal["bytes", "tokens"] = "bytes"
) -> Iterator[Callable[[int, int, str], None] | None]:
    """A bar on stderr for `(done, in all, name)`, both in `unit`; nothing where stderr is no terminal."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn(label),
        BarColumn(),
        DownloadColumn() if unit == "bytes" else MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[name]}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=None, name="")
        yield lambda done, total, name: bar.update(task, completed=done, total=total, name=name)


@contextlib.contextmanager
def stages(quiet: bool) -> Iterator[Callable[[str], None]]:
    """One line on stderr for each stage; nothing moves while a stage is timed. Ctrl-C leaves at once."""

    def show(stage: str) -> None:
        if not quiet and sys.stderr.isatty():
            print(f"{stage} ...", file=sys.stderr)

    try:
        yield show
    except KeyboardInterrupt:
        print("\nStopped; nothing was kept.", file=sys.stderr)
        raise typer.Exit(130) from None


@contextlib.contextmanager
def resumable(command: str) -> Iterator[None]:
    """Say what Ctrl-C left behind: the finished part, which the same command continues."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"\nStopped. What is finished is kept: run the same {command} again to go on.", file=sys.stderr)
        raise typer.Exit(130) from None
