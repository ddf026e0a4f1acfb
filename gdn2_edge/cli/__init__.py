"""The command line. One file a command: options, one call of the library, print. Nothing heavy is imported here."""

from __future__ import annotations

import io
import sys
import traceback
from typing import Annotated, NoReturn

import typer

from gdn2_edge.cli.bench import bench
from gdn2_edge.cli.chat import chat
from gdn2_edge.cli.convert import convert
from gdn2_edge.cli.evaluate import evaluate
from gdn2_edge.cli.export import app as export
from gdn2_edge.cli.inspect import inspect
from gdn2_edge.cli.llama_cpp import app as llama_cpp
from gdn2_edge.cli.quantize import quantize
from gdn2_edge.errors import Gdn2EdgeError

app = typer.Typer(
    name="gdn2-edge",
    help="Quantize, run and chat with Gated DeltaNet-2 language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (chat, inspect, convert, quantize, bench):
    app.command()(command)
app.command("eval")(evaluate)
app.add_typer(export, name="export")
app.add_typer(llama_cpp, name="llama-cpp")

MESSAGE_ENDS = 600, 300  # characters shown of a message that is longer than both
_debug = False


def _show_version(wanted: bool) -> None:
    if wanted:
        from gdn2_edge import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options before a command."""
    global _debug
    _debug = debug


def main() -> NoReturn:
    """Run the command line: exit code 1 and one sentence for an error, 2 for wrong usage, 130 for Ctrl-C in work."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, io.StringIO())
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        app()
    except Exception as error:
        sys.exit(_report(error))
    sys.exit(0)


def _report(error: Exception) -> int:
    if _debug:
        traceback.print_exception(error)
    if isinstance(error, BrokenPipeError):
        sys.stderr.close()  # the reader has gone: there is nobody to tell
        return 1
    if isinstance(error, Gdn2EdgeError):
        message = str(error)
    elif isinstance(error, MemoryError) or any(words in str(error) for words in ("not enough memory", "out of memory")):
        message = "there is not enough memory for this. A smaller model or format needs less."
    elif isinstance(error, OSError) and error.strerror:
        message = f"{error.filename or 'a file'}: {error.strerror}."
    else:
        message = f"unexpected {type(error).__name__}: {error}. `gdn2-edge --debug ...` shows where."
    print(f"error: {_one_line(message)}", file=sys.stderr)
    return 1


def _one_line(message: str) -> str:
    """What a hostile file says of itself may hold line ends, control characters and megabytes; a terminal gets none."""
    first, last = MESSAGE_ENDS
    if len(message) > first + last:
        message = f"{message[:first]} ... {message[-last:]}"
    return "".join(character if character.isprintable() else "?" for character in " ".join(message.split()))
