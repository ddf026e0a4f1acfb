"""`gdn2-edge chat`: talk to a model; its memory is a state of constant size that a file keeps."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from gdn2_edge.cli.options import Device, Dtype, RuntimeName, activations
from gdn2_edge.cli.render import print_json
from gdn2_edge.cli.terminal import Talk, converse, print_answer, with_options
from gdn2_edge.errors import SessionError


def chat(
    path: Annotated[
        str,
        typer.Argument(metavar="[PATH]", help="A checkpoint folder, an export, or the name of a model."),
    ] = "tiny",
    session: Annotated[
        str | None, typer.Option(metavar="FILE", help="Go on with this session, and keep it there.")
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="A system message for a new session.")] = None,
    once: Annotated[str | None, typer.Option(metavar="TEXT", help="Answer this and leave.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep the k most likely tokens; 0 keeps all.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep the most likely tokens up to this probability.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Drop tokens less likely than this times the best.")] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="1 is none; above 1.1 spoils copied numbers.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same conversation.")] = None,
    device: Device = "auto",
    dtype: Dtype = None,
    runtime: RuntimeName = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print one answer as JSON (with --once or a pipe).")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print answers only.")] = False,
) -> None:
    """Chat with a model. A prompt from a pipe is answered once."""
    prompt = once
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read().strip()
        if not prompt:
            raise typer.BadParameter("standard input is no terminal and holds no prompt. Give --once TEXT.")
    if once is not None and not once.strip():
        raise typer.BadParameter("--once is empty.")
    if json and prompt is None:
        raise typer.BadParameter("--json needs --once TEXT or a prompt from a pipe.")
    given = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
    }
    options = {name: value for name, value in given.items() if value is not None}
    talk = _open(path, session, system, options, device, dtype, runtime)
    talk.max_tokens, talk.quiet = max_tokens, quiet
    with contextlib.closing(talk):
        if prompt is None:
            converse(talk)
        elif json:
            answer = "".join(talk.answer(prompt))
            print_json({"answer": answer, **talk.stats()})
        else:
            print_answer(talk, prompt)


def _open(
    path: str,
    file: str | None,
    system: str | None,
    options: dict[str, Any],
    device: str,
    dtype: str | None,
    runtime: str,
) -> Talk:
    from gdn2_edge.generate.session import Session, exclusive
    from gdn2_edge.loading import load

    activation_dtype = activations(dtype)
    kept = Path(file) if file is not None else None
    with contextlib.ExitStack() as lock:
        if kept:
            lock.enter_context(exclusive(kept))
        model = load(path, device, activation_dtype, runtime)
        if kept and kept.exists():
            if system is not None:
                raise SessionError(f"{kept} has begun already: --system is for a new session. Leave it out.")
            session = Session.load(kept, model)
        else:
            session = Session(model, system=system)
        session.sampling = with_options(session.sampling, options)
        return Talk(session, kept, options, lock.pop_all())
