"""A conversation that lasts: its memory is a recurrent state of constant size, kept in one safetensors file.

History is never read again. The state holds everything up to the last token of the last answer; each turn feeds only
what is new: the token that closes that answer, the user's text, and the words that open the next answer.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from gdn2_edge.checkpoint.writer import write_atomically
from gdn2_edge.errors import SessionError
from gdn2_edge.generate.engine import generate
from gdn2_edge.generate.sampler import Sampler
from gdn2_edge.generate.text import ChatTokenizer, open_text
from gdn2_edge.runtime import Runtime
from gdn2_edge.sampling import Sampling
from gdn2_edge.state import LLAMA_CPP_BLOCK, State

MESSAGE_BYTES = 64  # what a message takes beside its words
TRANSCRIPT_BYTES = 64 << 10  # the oldest messages are dropped first: the state is the memory, this is for reading
UNDO_TURNS = 8
METADATA_BYTES = 1 << 20


class Message(BaseModel):
    """One line of the transcript."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    role: Literal["system", "user", "assistant"]
    content: str


class Metadata(BaseModel):
    """What a session file says beside its tensors."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    format_version: Literal[1] = 1
    model_fingerprint: str
    system: str | None
    started: bool
    pending: int | None
    sampling: Sampling
    recent: Annotated[tuple[int, ...], Field(max_length=4096)]
    transcript: tuple[Message, ...]


@dataclass(frozen=True)
class Memory:
    """Everything a session is, at one moment.

    `pending` is the newest token of an answer that was cut short: shown, not fed yet. `started` says whether the
    opening of a conversation is in the state.
    """

    state: State[Tensor]
    recent: Tensor
    pending: int | None = None
    started: bool = False
    transcript: tuple[Message, ...] = ()


class Session:
    """A conversation with a model.

    Args:
        runtime: the model.
        tokenizer: its text side; None opens the one beside the model.
        system: a system message, fed with the first turn.
        sampling: how tokens are chosen; None takes what the model's generation_config.json suggests.
    Raises:
        CheckpointError: the model has no tokenizer or no chat template.
        SessionError: the system message is longer than 64 KiB.
    """

    def __init__(
        self,
        runtime: Runtime,
        tokenizer: ChatTokenizer | None = None,
        *,
        system: str | None = None,
        sampling: Sampling | None = None,
    ) -> None:
        self.runtime = runtime
        self.tokenizer = tokenizer or open_text(runtime.text_files)
        if system is not None and len(system.encode(errors="replace")) > TRANSCRIPT_BYTES:
            raise SessionError(f"The system message is longer than {TRANSCRIPT_BYTES} bytes.")
        self.system = system
        self.sampling = sampling or self.tokenizer.config.sampling()
        self._memory = self._beginning()
        self._earlier: list[Memory] = []
        self.answer_tokens = 0  # of the latest answer

    def _beginning(self) -> Memory:
        empty = torch.empty((1, 0), dtype=torch.int64)
        return Memory(self.runtime.initial_state(), empty)

    @property
    def position(self) -> int:
        """Tokens fed since the beginning."""
        return int(self._memory.state.position[0])

    @property
    def transcript(self) -> tuple[Message, ...]:
        """The latest messages, at most 64 KiB of them."""
        return self._memory.transcript

    @property
    def state_bytes(self) -> int:
        return self.runtime.state_bytes

    def send(self, text: str, max_tokens: int = 512, interrupted: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """Feed a user's turn and yield the answer in pieces of whole characters.

        The turn can be taken back with `undo`. Closing the iterator, or `interrupted`, ends the answer: what was
        shown is remembered. Where that happens before the first token, or an error is raised, the session is as it
        was before the call, or as of the last token shown.
        """
        before = self._memory
        prompt = self.tokenizer.continuation(text) if before.started else self.tokenizer.opening(text, self.system)
        if before.pending is not None:
            prompt = [before.pending, *prompt]
        sampler = Sampler(self.sampling, recent=before.recent)
        state = self.runtime.clone(before.state)
        said = [Message(role="user", content=text)]
        if not before.started and self.system is not None:
            said.insert(0, Message(role="system", content=self.system))
        decoder, answer = self.tokenizer.decoder(), ""
        self.answer_tokens = 0
        for step in generate(self.runtime, prompt, state, sampler, self.tokenizer.stop_ids, max_tokens, interrupted):
            if self._memory is before:
                self._earlier = [*self._earlier, before][-UNDO_TURNS:]
            if step.token is not None:
                self.answer_tokens += 1
            piece = decoder.push(step.token) if step.token is not None else ""
            answer += piece
            transcript = _capped((*before.transcript, *said, Message(role="assistant", content=answer)))
            self._memory = Memory(step.state, sampler.recent, step.token, True, transcript)
            if piece:
                yield piece
        if last := decoder.finish():
            yield last

    def undo(self) -> None:
        """Take the last turn back: the state, too, is as it was before it.

        Raises:
            SessionError: no turn to take back; at most the last 8 since the session was opened can be.
        """
        if not self._earlier:
            raise SessionError(f"Nothing to undo: the last {UNDO_TURNS} turns since the session was opened can be.")
        self._memory = self._earlier.pop()

    def reset(self) -> None:
        """Forget everything; `undo` brings it back."""
        self._earlier = [*self._earlier, self._memory][-UNDO_TURNS:]
        self._memory = self._beginning()

    def fork(self) -> Session:
        """An independent session that remembers the same."""
        twin = Session(self.runtime, self.tokenizer, system=self.system, sampling=self.sampling)
        twin._memory = replace(self._memory, state=self.runtime.clone(self._memory.state))
        return twin

    def save(self, path: str | Path) -> None:
        """Write the session to a file: the old one or the whole new one, whatever happens.

        Raises:
            SessionError: it cannot be written.
        """
        memory, path = self._memory, Path(path)
        if not self.runtime.fingerprint:
            raise SessionError(
                "This model has no fingerprint, so a session could not be told from another model's. "
                "Convert it first: gdn2-edge convert."
            )
        metadata = Metadata(
            model_fingerprint=self.runtime.fingerprint,
            system=self.system,
            started=memory.started,
            pending=memory.pending,
            sampling=self.sampling,
            recent=tuple(memory.recent[0].tolist()),
            transcript=memory.transcript,
        )
        strings = {name: json.dumps(value) for name, value in metadata.model_dump(mode="json").items()}
        try:
            write_atomically(path.resolve(), save(self.runtime.export_state(memory.state), strings))
        except OSError as error:
            raise SessionError(f"{path}: the session cannot be written ({error.strerror or error}).") from None

    @classmethod
    def load(
        cls,
        path: str | Path,
        runtime: Runtime,
        tokenizer: ChatTokenizer | None = None,
        *,
        sampling: Sampling | None = None,
    ) -> Session:
        """The session that `save` wrote, to be continued by the same model; nothing is read again.

        Args:
            sampling: replaces the saved options.
        Raises:
            SessionError: not a session file, damaged, or of another model.
        """
        path = Path(path)
        metadata, tensors = _read(path, runtime)
        session = cls(runtime, tokenizer, system=metadata.system, sampling=sampling or metadata.sampling)
        vocab_size = runtime.spec.vocab_size
        fed = () if metadata.pending is None else (metadata.pending,)
        if not all(-1 <= id < vocab_size for id in metadata.recent) or not all(0 <= id < vocab_size for id in fed):
            raise SessionError(f"{path.name}: token ids outside the model's vocabulary of {vocab_size}.")
        session._memory = Memory(
            runtime.import_state(tensors),
            torch.tensor(metadata.recent, dtype=torch.int64)[None],
            metadata.pending,
            metadata.started,
            metadata.transcript,
        )
        return session


def _read(path: Path, runtime: Runtime) -> tuple[Metadata, dict[str, Tensor]]:
    expected = runtime.state_bytes
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise SessionError(f"{path} is not a file.")
        if size > expected + METADATA_BYTES:
            raise SessionError(
                f"{path.name} has {size} bytes, a session of this model at most {expected + METADATA_BYTES}."
            )
        with safe_open(path, framework="pt") as file:
            strings = file.metadata() or {}
            if "model_fingerprint" not in strings:
                raise SessionError(f"{path.name} is a safetensors file, but not a session.")
            if LLAMA_CPP_BLOCK in runtime.state_names.symmetric_difference(file.keys()):
                by = "llama.cpp" if LLAMA_CPP_BLOCK in file.keys() else "another runtime than llama.cpp"
                raise SessionError(f"{path.name} was kept by {by}, in a form of its own. Go on with what kept it.")
            metadata = Metadata.model_validate({name: json.loads(value) for name, value in strings.items()})
            if metadata.model_fingerprint != runtime.fingerprint:
                raise SessionError(
                    f"{path.name} belongs to the model {metadata.model_fingerprint[:12]}, this model is "
                    f"{runtime.fingerprint[:12]}. A state means nothing to another model, or another quantization."
                )
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
            if "position" in tensors and tensors["position"].shape != (1,):
                raise SessionError(f"{path.name}: position is {tuple(tensors['position'].shape)}, expected (1,).")
    except FileNotFoundError:
        raise SessionError(f"{path}: no such session file.") from None
    except OSError as error:
        raise SessionError(f"{path}: cannot be read ({error.strerror or error}).") from None
    except SafetensorError as error:
        raise SessionError(f"{path.name} is not a whole session file ({str(error)[:80]}).") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise SessionError(
            f"{path.name}: its {'.'.join(map(str, first['loc']))} is not valid: {first['msg']}."
        ) from None
    except (ValueError, RecursionError):
        raise SessionError(f"{path.name}: its metadata is not valid JSON.") from None
    return metadata, tensors


def _capped(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The newest messages that fit; a single one that is longer keeps its end."""
    kept: list[Message] = []
    room = TRANSCRIPT_BYTES
    for message in reversed(messages):
        size = len(message.content.encode(errors="replace")) + MESSAGE_BYTES
        if size > room:
            if not kept:
                tail = message.content.encode(errors="replace")[-room:].decode(errors="ignore")
                kept.append(Message(role=message.role, content=tail))
            break
        kept.append(message)
        room -= size
    return tuple(reversed(kept))


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold a session file for this process.

    Raises:
        SessionError: another process holds it, or its folder cannot be written.
    """
    if path.is_dir() or not path.parent.is_dir():
        raise SessionError(f"{path} {'is a folder' if path.is_dir() else 'is in no folder'}, expected a session file.")
    real = path.resolve()  # a link and its file are one session
    lock = real.with_name(f".{real.name}.lock")
    held = FileLock(lock, timeout=0)
    try:
        held.acquire()
    except Timeout:
        raise SessionError(f"{path} is in use by another process.") from None
    except OSError as error:
        raise SessionError(f"{path.parent}: a session cannot be kept here ({error.strerror or error}).") from None
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        held.release()
