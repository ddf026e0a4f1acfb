"""What a chat template writes around messages.

A chat template is a program from a stranger. It runs once, in a process with limits, when a model's files are opened,
and it sees placeholders only: what it writes around them is kept, and the messages are put in later. So no message
can steer the template, and no template can stop a conversation.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from math import ceil
from typing import TYPE_CHECKING, Any

from gdn2_edge.errors import CheckpointError

if TYPE_CHECKING:
    from jinja2 import Environment, Template

TEMPLATE_NAME = "chat_template.jinja"
MAX_RENDERED_CHARACTERS = 1 << 20
TEMPLATE_MEMORY_BYTES = 512 << 20  # address space of the template's process, a tenth of it the interpreter's own
TEMPLATE_CPU_SECONDS = 3
TEMPLATE_WALL_SECONDS = 15  # a bound for systems without a CPU limit, and room for the start of a slow computer

# The child gets this process's import path as its arguments, and imports nothing but `sys` before it has it.
_CHILD = (
    "import sys; sys.path[:] = sys.argv[1:]; from gdn2_edge.generate.chat_template import render_in_child as r; r()"
)


def one_line(text: object) -> str:
    """At most 160 characters of it, printable and without a full stop, to go into a sentence."""
    line = " ".join(str(text).split())
    if not line and isinstance(text, BaseException):
        line = type(text).__name__
    return "".join(character for character in line[:160] if character.isprintable()).rstrip(".")


Trim = Callable[[str], str]
TRIMS: tuple[Trim, ...] = (str, str.strip, str.lstrip, str.rstrip)


@dataclass(frozen=True)
class Turn:
    """What a template writes around n messages (n + 1 texts), and how it trims each of them."""

    around: tuple[str, ...]
    trims: tuple[Trim, ...]


@dataclass(frozen=True)
class Turns:
    """All that a template writes: a start, one with a system message (or why not), and what follows."""

    opening: Turn
    opening_with_system: Turn | str
    continuation: Turn

    def written(self) -> Iterator[str]:
        for turn in (self.opening, self.opening_with_system, self.continuation):
            yield from () if isinstance(turn, str) else turn.around


# Digits survive a template's filters on letter case. The probe tells trimming from every other change.
U1, A1, U2, A2, U3, SYSTEM = (f"73109482650{n}" for n in range(6))
PROBE = " \n Ab <&> \"'\\ é\n\n{{ x }} \n "

CONVERSATIONS: dict[str, tuple[tuple[str, ...], bool]] = {  # roles and texts in turn, with a generation prompt?
    "opening": (("user", U1), True),
    "opening, probed": (("user", PROBE), True),
    "answered": (("user", U1, "assistant", A1), False),
    "second": (("user", U1, "assistant", A1, "user", U2), True),
    "second, probed": (("user", U1, "assistant", A1, "user", PROBE), True),
    "third": (("user", U1, "assistant", A1, "user", U2, "assistant", A2, "user", U3), True),
    "system": (("system", SYSTEM, "user", U1), True),
    "system, probed": (("system", PROBE, "user", U1), True),
    "system, user probed": (("system", SYSTEM, "user", PROBE), True),
    "system, second": (("system", SYSTEM, "user", U1, "assistant", A1, "user", U2), True),
}


def read_turns(template: str, tokens: dict[str, str]) -> Turns:
    """What the template writes around messages, from renderings of short conversations of placeholders.

    Args:
        tokens: The strings it knows as `bos_token` and the like.

    Raises:
        CheckpointError: the template fails, or does not suit a state that is fed once: it rewrites what it
            wrote before, changes messages, numbers the turns, or writes something before an answer that is
            neither in its generation prompt nor a space.
    """
    rendered = dict(zip(CONVERSATIONS, _render(template, list(CONVERSATIONS.values()), tokens), strict=True))
    opening = _around(rendered["opening"], U1)
    answered, second = _around(rendered["answered"], U1, A1), _around(rendered["second"], U1, A1, U2)
    third = _around(rendered["third"], U1, A1, U2, A2, U3)
    prompt, (before_answer, end, following) = opening[1], second[1:]
    rewritten = answered[:2] != second[:2] or not end.startswith(answered[2]) or third[:3] != second[:3]
    if rewritten or opening[0] != second[0]:
        raise CheckpointError(
            f"{TEMPLATE_NAME} rewrites earlier turns when the conversation goes on, but the model's state "
            "reads each turn once; give a template that only appends with `--chat-template FILE`."
        )
    space = before_answer[len(prompt) :]
    if not before_answer.startswith(prompt) or space.strip():
        raise CheckpointError(
            f"{TEMPLATE_NAME} writes {one_line(before_answer)!r} before an answer once it is given, but "
            f"{one_line(prompt)!r} to ask for it (add_generation_prompt), expected the same."
        )
    if third[3:] != (following + space, end, following):
        raise CheckpointError(f"{TEMPLATE_NAME} writes a third turn in another way than a second one.")
    history = second[0] + U1 + before_answer + A1
    return Turns(
        opening=Turn(opening, (_trim(rendered["opening, probed"], *opening),)),
        opening_with_system=_opening_with_system(rendered, second),
        continuation=Turn((end, following), (_trim(rendered["second, probed"], history + end, following),)),
    )


def _opening_with_system(rendered: dict[str, Rendering], second: tuple[str, ...]) -> Turn | str:
    try:
        before, between, prompt = around = _around(rendered["system"], SYSTEM, U1)
        of_system = _trim(rendered["system, probed"], before, between + U1 + prompt)
        of_user = _trim(rendered["system, user probed"], before + SYSTEM + between, prompt)
        later = _around(rendered["system, second"], SYSTEM, U1, A1, U2)
    except CheckpointError as error:
        return f"A system message cannot be used: {error}"
    if later != (before, between, *second[1:]) or not second[1].startswith(prompt):
        return f"A system message cannot be used: {TEMPLATE_NAME} rewrites it, or the turns around it, later on."
    return Turn(around, (of_system, of_user))


def _around(rendering: Rendering, *placeholders: str) -> tuple[str, ...]:
    """The texts before, between and after the placeholders."""
    if rendering.error:
        raise CheckpointError(f"{TEMPLATE_NAME}: {rendering.error}.")
    around, rest = [], rendering.text
    for placeholder in placeholders:
        before, found, rest = rest.partition(placeholder)
        if not found or rendering.text.count(placeholder) > 1:
            raise CheckpointError(f"{TEMPLATE_NAME} does not write each message once, whole and in order.")
        around.append(before)
    return (*around, rest)


def _trim(rendering: Rendering, before: str, after: str) -> Trim:
    """How the template trims the probe that it wrote between two texts."""
    if rendering.error:
        raise CheckpointError(f"{TEMPLATE_NAME}: {rendering.error}.")
    for trim in TRIMS:
        if rendering.text == before + trim(PROBE) + after:
            return trim
    raise CheckpointError(f"{TEMPLATE_NAME} changes the text of a message, beyond trimming the space around it.")


@dataclass(frozen=True)
class Rendering:
    """What a template wrote for one conversation, or why it did not."""

    text: str = ""
    error: str = ""


def _render(
    template: str, conversations: list[tuple[tuple[str, ...], bool]], tokens: dict[str, str]
) -> list[Rendering]:
    """The template's renderings, made in a process with limits on time, memory and output."""
    request = json.dumps({"template": template, "conversations": conversations, "tokens": tokens}).encode()
    try:
        done = subprocess.run(
            [sys.executable, "-c", _CHILD, *sys.path],
            input=request,
            capture_output=True,
            timeout=TEMPLATE_WALL_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise CheckpointError(f"{TEMPLATE_NAME} was not done after {TEMPLATE_WALL_SECONDS} seconds.") from None
    except OSError as error:
        raise CheckpointError(f"{TEMPLATE_NAME}: its process cannot be started ({error.strerror}).") from None
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        reason = one_line(done.stderr.decode(errors="replace")[-120:])
        if done.returncode < 0:
            reason = f"it was stopped after {TEMPLATE_CPU_SECONDS} seconds, or crashed its process"
        raise CheckpointError(f"{TEMPLATE_NAME} cannot be used: {reason}.") from None
    if "error" in answer:
        raise CheckpointError(f"{TEMPLATE_NAME}: {answer['error']}.")
    return [Rendering(**rendering) for rendering in answer["renderings"]]


def render_in_child() -> None:
    """The body of the template's process: a request on stdin, its renderings on stdout."""
    request = json.load(sys.stdin)
    environment = _environment()
    _limit_this_process()
    try:
        template = environment.from_string(request["template"])
    except Exception as error:
        answer: dict[str, Any] = {"error": _reason(error)}
    else:
        renderings = []
        for words, add_generation_prompt in request["conversations"]:
            messages = [{"role": role, "content": text} for role, text in zip(words[::2], words[1::2], strict=True)]
            variables = request["tokens"] | {
                "messages": messages,
                "add_generation_prompt": add_generation_prompt,
            }
            renderings.append(_rendering(template, variables))
        answer = {"renderings": renderings}
    sys.stdout.write(json.dumps(answer))


def _rendering(template: Template, variables: dict[str, Any]) -> dict[str, str]:
    text = ""
    try:
        for piece in template.generate(**variables, tools=None, documents=None):
            text += piece
            if len(text) > MAX_RENDERED_CHARACTERS:
                return {"error": f"it writes more than {MAX_RENDERED_CHARACTERS} characters"}
    except Exception as error:
        return {"error": _reason(error)}
    return {"text": text}


def _environment() -> Environment:
    """Jinja as transformers sets it up for chat templates (apply_chat_template)."""
    from jinja2 import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.nodes import Node
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what is trained on; here it is its body."""

        def __init__(self, environment: Environment) -> None:
            super().__init__(environment)
            self.tags = {"generation"}

        def parse(self, parser: Parser) -> list[Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: object, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    now = datetime.now()
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": now.strftime}
    environment.filters["tojson"] = tojson
    return environment


def _limit_this_process() -> None:
    # Windows has no such limits; there, the parent's clock is the bound.
    if sys.platform != "win32":
        import resource
        import time

        seconds = ceil(time.process_time()) + TEMPLATE_CPU_SECONDS
        for limit, value in (
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_CPU, seconds),
            (resource.RLIMIT_AS, TEMPLATE_MEMORY_BYTES),
        ):
            try:
                resource.setrlimit(limit, (value, value))
            except (ValueError, OSError):  # macOS refuses RLIMIT_AS, and a lower limit may be set already
                continue


def _reason(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return f"it needs more than {TEMPLATE_MEMORY_BYTES >> 20} MiB of memory"
    line = getattr(error, "lineno", None)
    return one_line(error) + (f" (line {line})" if line else "")
