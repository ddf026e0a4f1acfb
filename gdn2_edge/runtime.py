"""What every runtime can do with a state. Sessions, chat and evaluation see nothing but this."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from gdn2_edge.errors import BackendError, SessionError
from gdn2_edge.sampling import Sampling
from gdn2_edge.spec import ModelSpec
from gdn2_edge.state import State, check_state


class Sample(Protocol):
    """How the next token is chosen: logits [B, V] fp32 and positions [B] -> tokens [B] int64.

    A runtime that chooses on its own device goes by `sampling` and `recent` [B, window] (the tokens chosen lately, -1
    where none), and says with `record` what it chose.
    """

    sampling: Sampling
    recent: Tensor

    def __call__(self, logits: Tensor, position: Tensor) -> Tensor: ...
    def record(self, token: Tensor) -> None: ...


class Runtime(ABC):
    """A model that is ready to run. **A call consumes its state**: `clone` first to keep it.

    Attributes:
        spec: sizes of the model.
        fingerprint: sha256 of its weights and spec; a session belongs to one fingerprint.
        name: what runs it, for people.
        path: what it was loaded from.
        text_files: its tokenizer and chat template: the folder they are in, or the files by name.
    """

    spec: ModelSpec
    fingerprint: str
    name: str
    path: Path

    @property
    def text_files(self) -> Path | Mapping[str, bytes]:
        return self.path

    @property
    def state_names(self) -> frozenset[str]:
        """Of an exported state's tensors."""
        return frozenset(self.spec.state_shapes())

    @property
    def state_bytes(self) -> int:
        """Of one sequence's exported state, at most; it is the same at any length of a conversation."""
        return self.spec.state_bytes()

    @abstractmethod
    def initial_state(self, batch: int = 1) -> State[Tensor]:
        """The state of `batch` sequences before their first token."""

    @abstractmethod
    def forward(self, tokens: Tensor, state: State[Tensor] | None = None) -> tuple[Tensor, State[Tensor]]:
        """Logits of every token.

        Args:
            tokens: [B, T] int64 ids.
            state: what came before; None for the beginning. It is consumed.
        Returns:
            logits [B, T, vocab_size] fp32, and the state after the last token.
        """

    @abstractmethod
    def prefill(self, tokens: Tensor, state: State[Tensor]) -> tuple[Tensor, State[Tensor]]:
        """Feed tokens [B, T] (equal lengths): logits after the last one [B, V] fp32, and the new state."""

    def step(self, token: Tensor, state: State[Tensor]) -> tuple[Tensor, State[Tensor]]:
        """Feed one token [B] to each sequence: logits [B, V] fp32, and the new state."""
        return self.prefill(token[:, None], state)

    def generate_step(self, token: Tensor, state: State[Tensor], sampling: Sample) -> tuple[Tensor, State[Tensor]]:
        """Feed one token [B] and choose the next, with a `Sampler`: tokens [B], and the new state."""
        logits, state = self.step(token, state)
        return sampling(logits, state.position), state

    @torch.inference_mode()
    def clone(self, state: State[Tensor]) -> State[Tensor]:
        """An independent copy."""
        check_is_state(state)
        return check_state(self.spec, {name: t.clone() for name, t in state.named().items()}, "state")

    def export_state(self, state: State[Tensor]) -> dict[str, Tensor]:
        """The state as named CPU tensors, see `ModelSpec.state_shapes`."""
        check_is_state(state)
        return {name: tensor.to("cpu", copy=True) for name, tensor in state.named().items()}

    @abstractmethod
    def import_state(self, tensors: dict[str, Tensor]) -> State[Tensor]:
        """The inverse of `export_state`; raises SessionError where a tensor does not fit."""


def check_is_state(state: object) -> None:
    """Raise SessionError unless it is a state with a position for each sequence."""
    position = state.position if isinstance(state, State) else None
    if not isinstance(position, Tensor) or position.ndim != 1 or position.dtype != torch.int64:
        what = f"a {type(state).__name__}" if position is None else f"a State whose position is {_described(position)}"
        raise SessionError(
            f"the state is {what}, expected a State whose position is int64 [B]. "
            "Take what initial_state, import_state or the call before returned."
        )


def _described(value: object) -> str:
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def check_tokens(spec: ModelSpec, tokens: Tensor, state: State[Tensor] | None) -> None:
    """Raise unless tokens are ids [B, T] of the model's vocabulary for the state's sequences.

    Raises:
        BackendError: the tokens are not.
        SessionError: the state is none.
    """
    if tokens.ndim != 2 or tokens.numel() < 1 or tokens.dtype != torch.int64:
        raise BackendError(f"tokens are {tuple(tokens.shape)} {tokens.dtype}, expected int64 [B, T], both at least 1.")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= spec.vocab_size:
        raise BackendError(f"token ids {low}..{high} are outside the vocabulary 0..{spec.vocab_size - 1}.")
    if state is None:
        return
    check_is_state(state)
    if state.position.shape[0] != tokens.shape[0]:
        raise BackendError(f"the state is of {state.position.shape[0]} sequences, the tokens are of {tokens.shape[0]}.")
