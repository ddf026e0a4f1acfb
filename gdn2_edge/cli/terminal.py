"""A talk in a terminal: what chat's lines mean, how an answer is shown, and how Ctrl-C ends it."""

from __future__ import annotations

import contextlib
import shutil
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from gdn2_edge.cli.render import megabytes, printable
from gdn2_edge.errors import Gdn2EdgeError, SessionError

if TYPE_CHECKING:
    from gdn2_edge.generate.session import Session
    from gdn2_edge.runtime import Runtime
    from gdn2_edge.sampling import Sampling

HELP = """\
/help            this list
/save FILE       keep the session in a file, now and after every answer
/load FILE       go on with a session from a file
/undo            take the last turn back
/reset           forget everything
/stats           tokens, state, model
/quit            leave (Ctrl-D too)
Ctrl-C stops an answer; Alt-Enter begins a new line."""
UNKNOWN_MODEL = (
    "This checkpoint says nothing of what it can do. Like every GDN-2 model it keeps the conversation in a memory of "
    "fixed size: it forgets what lies far back, and what it says may be wrong."
)


@dataclass
class Talk:
    """A session, the file that keeps it and is held by `lock`, the sampling options that were asked for."""

    session: Session
    file: Path | None
    options: dict[str, Any]
    lock: contextlib.ExitStack
    max_tokens: int = 512
    quiet: bool = False
    seconds: float = 0.0

    def answer(self, text: str) -> Iterator[str]:
        """The pieces of an answer; Ctrl-C ends it, and what was said is kept. A turn that fails is not."""
        first, fed, failed = 0.0, self.session.position, False
        try:
            with _interruptible() as interrupted:
                for piece in self.session.send(text, self.max_tokens, interrupted):
                    first = first or time.perf_counter()
                    yield piece
            if interrupted() and self.session.position == fed:
                yield "[stopped before the first word; nothing was kept of this turn]"
        except Gdn2EdgeError:
            failed = True
            raise
        finally:
            self.seconds = time.perf_counter() - first if first else 0.0
            if self.file and self.session.position != fed and not failed:
                self.session.save(self.file)

    def close(self) -> None:
        """Let go of the session file."""
        self.lock.close()

    def holds(self, file: Path) -> bool:
        return self.file is not None and file.resolve() == self.file.resolve()

    @contextlib.contextmanager
    def moving_to(self, file: Path) -> Iterator[None]:
        """From here on `file` keeps the session and is held instead of the old one, if the block ends well."""
        from gdn2_edge.generate.session import exclusive

        with contextlib.ExitStack() as new:
            if not self.holds(file):
                new.enter_context(exclusive(file))
            yield
            if not self.holds(file):
                self.lock.close()
                self.lock, self.file = new.pop_all(), file

    def stats(self) -> dict[str, Any]:
        spoken = self.session.answer_tokens
        return {
            "model": str(self.session.runtime.path),
            "runtime": self.session.runtime.name,
            "answer_tokens": spoken,
            "tokens_per_second": round(max(spoken - 1, 0) / self.seconds, 1) if self.seconds else None,
            "tokens_fed": self.session.position,
            "state_bytes": self.session.state_bytes,
        }


def with_options(base: Sampling, options: dict[str, Any]) -> Sampling:
    """`base` with the options of the command line in their places; BadParameter names one out of range."""
    from pydantic import ValidationError

    try:
        return type(base).model_validate({**base.model_dump(), **options})
    except ValidationError as error:
        first = error.errors()[0]
        name = "--" + str(first["loc"][0]).replace("_", "-")
        raise typer.BadParameter(f"{name} is {first['input']}: {first['msg'].lower()}.") from None


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C is a wish that the answer ends; a second one is a KeyboardInterrupt."""
    wishes: list[int] = []

    def wish(signum: int, frame: object) -> None:
        if wishes:
            raise KeyboardInterrupt
        wishes.append(signum)

    before = signal.signal(signal.SIGINT, wish)
    try:
        yield lambda: bool(wishes)
    finally:
        signal.signal(signal.SIGINT, before)


def print_answer(talk: Talk, text: str) -> None:
    """An answer on stdout as it comes, what it took on stderr."""
    for piece in talk.answer(text):
        print(printable(piece), end="", flush=True)
    print(flush=True)
    if not talk.quiet:
        stats = talk.stats()
        speed = f"{stats['tokens_per_second']} tokens/s, " if stats["tokens_per_second"] else ""
        line = f"[{speed}{stats['tokens_fed']:,} tokens fed, state {megabytes(stats['state_bytes'])}]"
        print(f"\033[2m{line}\033[0m" if sys.stderr.isatty() else line, file=sys.stderr)


def converse(talk: Talk) -> None:
    """Read lines and answer them until /quit or Ctrl-D."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings

    bindings = KeyBindings()
    bindings.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    line: PromptSession[str] = PromptSession(history=_history(), key_bindings=bindings)
    _greet(talk)
    while True:
        try:
            text = line.prompt("> ").strip()
        except KeyboardInterrupt:
            continue
        except EOFError:
            break
        if text in ("/quit", "/exit"):
            break
        try:
            if text.startswith("/"):
                _command(talk, text)
            elif text:
                print_answer(talk, text)
        except KeyboardInterrupt:
            print()
        except Gdn2EdgeError as error:
            print(printable(f"error: {error}"), file=sys.stderr)
    if talk.file is None and talk.session.position and not talk.quiet:
        print("This session was not kept; /save FILE or --session FILE keeps one.", file=sys.stderr)


def _history() -> Any:
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    folder = Path(typer.get_app_dir("gdn2-edge"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "history").touch(mode=0o600)
        return FileHistory(folder / "history")
    except OSError:
        return InMemoryHistory()


def _greet(talk: Talk) -> None:
    if talk.quiet:
        return
    about = talk.session.tokenizer.config
    width = min(100, shutil.get_terminal_size().columns)
    print(textwrap.fill(printable(about.description) or UNKNOWN_MODEL, width))
    if talk.session.position:
        print(f"Going on at {talk.session.position:,} tokens; state {megabytes(talk.session.state_bytes)}.")
    elif about.example_prompts:
        print(textwrap.fill(printable("Try: " + "  |  ".join(about.example_prompts)), width))
    print(f"{talk.session.runtime.name}. /help lists the commands.\n")
    if advice := faster_here(talk.session.runtime):
        print(f"{textwrap.fill(printable(advice), width, break_on_hyphens=False)}\n")


def faster_here(runtime: Runtime) -> str:
    """What would run this model faster with what is installed; empty where nothing would.

    On CPUs llama.cpp was the fastest of the three and torch the slowest (benchmarks/cpu_runtimes.py); on GPUs it is
    this package's own kernels.
    """
    from gdn2_edge.model import Model

    if not isinstance(runtime, Model) or runtime.device.type != "cpu":
        return ""
    from importlib.metadata import PackageNotFoundError, version
    from importlib.util import find_spec

    from gdn2_edge.integrations.build_llama_cpp import PATCHED_VERSION

    with contextlib.suppress(PackageNotFoundError):
        if version("llama_cpp_python") == PATCHED_VERSION and find_spec("gguf"):
            return (
                "llama.cpp is installed and is faster on this processor: "
                f"gdn2-edge export gguf {runtime.path} --type q8_0 --out model.gguf, then gdn2-edge chat model.gguf."
            )
    if find_spec("onnxruntime") and find_spec("onnx"):
        return (
            "ONNX Runtime is installed and is faster on this processor: "
            f"gdn2-edge export onnx {runtime.path} --format int8 --out model-onnx, then gdn2-edge chat model-onnx."
        )
    return ""


def _command(talk: Talk, text: str) -> None:
    from gdn2_edge.generate.session import Session

    name, _, argument = text.partition(" ")
    argument = argument.strip()
    if argument and name in ("/help", "/undo", "/reset", "/stats"):
        raise SessionError(f"{name} takes nothing after it, found {argument!r}.")
    match name:
        case "/help":
            print(HELP)
        case "/save" if argument or talk.file:
            file = Path(argument).expanduser() if argument else talk.file or Path()
            if not talk.holds(file) and file.exists():
                raise SessionError(f"{file} exists. Choose another name, or /load it.")
            with talk.moving_to(file):
                talk.session.save(file)
            print(f"{file}: {talk.session.position:,} tokens, state {megabytes(talk.session.state_bytes)}.")
        case "/load" if argument:
            file = Path(argument).expanduser()
            if talk.file is None and talk.session.position:
                raise SessionError("this conversation is kept nowhere. /save FILE keeps it, /reset forgets it.")
            with talk.moving_to(file):
                session = Session.load(file, talk.session.runtime, talk.session.tokenizer)
                session.sampling = with_options(session.sampling, talk.options)
                talk.session = session
            print(f"Going on at {talk.session.position:,} tokens.")
        case "/undo" | "/reset":
            talk.session.undo() if name == "/undo" else talk.session.reset()
            if talk.file:
                talk.session.save(talk.file)
            print(f"{talk.session.position:,} tokens in memory." if talk.session.position else "The memory is empty.")
        case "/stats":
            for key, value in talk.stats().items():
                print(f"{key.replace('_', ' '):18} {value}")
        case "/save" | "/load":
            raise SessionError(f"{name} needs a file name.")
        case _:
            raise SessionError(f"{name} is no command. /help lists them.")
