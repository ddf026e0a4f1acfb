"""The generation loop, with a runtime that only counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gdn2_edge.generate.engine import PIECE_TOKENS, Step, generate
from gdn2_edge.generate.sampler import Sampler
from gdn2_edge.runtime import Runtime, Sample
from gdn2_edge.sampling import Sampling
from gdn2_edge.state import State

VOCABULARY = 1000


class Counting(Runtime):
    """After token n comes n + 1. Keeps what it was fed."""

    def __init__(self) -> None:
        self.fed: list[list[int]] = []

    def initial_state(self, batch: int = 1) -> State[Tensor]:
        return State(torch.zeros(batch, dtype=torch.int64), ())

    def forward(self, tokens: Tensor, state: State[Tensor] | None = None) -> tuple[Tensor, State[Tensor]]:
        raise NotImplementedError

    def prefill(self, tokens: Tensor, state: State[Tensor]) -> tuple[Tensor, State[Tensor]]:
        assert tokens.dtype == torch.int64
        self.fed.append(tokens[0].tolist())
        logits = torch.zeros(1, VOCABULARY)
        logits[0, (int(tokens[0, -1]) + 1) % VOCABULARY] = 1
        return logits, State(state.position + tokens.shape[1], ())

    def step(self, token: Tensor, state: State[Tensor]) -> tuple[Tensor, State[Tensor]]:
        return self.prefill(token[:, None], state)

    def generate_step(self, token: Tensor, state: State[Tensor], sampling: Sample) -> tuple[Tensor, State[Tensor]]:
        logits, state = self.step(token, state)
        return sampling(logits, state.position), state

    def clone(self, state: State[Tensor]) -> State[Tensor]:
        raise NotImplementedError

    def export_state(self, state: State[Tensor]) -> dict[str, Tensor]:
        raise NotImplementedError

    def import_state(self, tensors: dict[str, Tensor]) -> State[Tensor]:
        raise NotImplementedError


def run(
    prompt: list[int], *, stop: set[int] | None = None, max_tokens: int = 5, **options: Any
) -> tuple[list[Step], Counting]:
    runtime = Counting()
    sampler = Sampler(Sampling(temperature=0))
    stops = frozenset(stop or ())
    return list(generate(runtime, prompt, runtime.initial_state(), sampler, stops, max_tokens, **options)), runtime


def tokens(steps: list[Step]) -> list[int | None]:
    return [step.token for step in steps]


def positions(steps: list[Step]) -> list[int]:
    return [int(step.state.position) for step in steps]


def after(calls: int) -> Callable[[], bool]:
    """Says no so many times, then yes."""
    answers = iter([False] * calls)
    return lambda: next(answers, True)


def test_the_last_token_is_not_fed() -> None:
    steps, runtime = run([3, 4, 5], max_tokens=4)
    assert tokens(steps) == [6, 7, 8, 9]
    assert runtime.fed == [[3, 4, 5], [6], [7], [8]]
    assert positions(steps) == [3, 4, 5, 6]  # the state before each token


def test_a_stop_token_ends_it_and_is_not_fed() -> None:
    steps, runtime = run([3], stop={6, 700})
    assert tokens(steps) == [4, 5, None]
    assert runtime.fed == [[3], [4], [5]]
    assert positions(steps) == [1, 2, 3]


def test_a_stop_token_may_come_first() -> None:
    steps, runtime = run([3], stop={4})
    assert tokens(steps) == [None]
    assert runtime.fed == [[3]]


def test_a_stop_token_in_the_prompt_is_only_read() -> None:
    steps, _ = run([4, 3], stop={4}, max_tokens=1)
    assert tokens(steps) == [None]
    assert tokens(run([4], stop={4}, max_tokens=2)[0]) == [5, 6]


@pytest.mark.parametrize("max_tokens", [0, 1, 2, 7])
def test_max_tokens(max_tokens: int) -> None:
    steps, runtime = run([3], max_tokens=max_tokens)
    assert tokens(steps) == list(range(4, 4 + max_tokens))
    assert len(runtime.fed) == max(1, max_tokens)


@pytest.mark.parametrize("length", [1, PIECE_TOKENS - 1, PIECE_TOKENS, PIECE_TOKENS + 1, 2 * PIECE_TOKENS + 3])
def test_a_prompt_is_fed_in_pieces(length: int) -> None:
    prompt = [i % VOCABULARY for i in range(length)]
    steps, runtime = run(prompt, max_tokens=1)
    assert [token for piece in runtime.fed for token in piece] == prompt
    assert all(len(piece) == PIECE_TOKENS for piece in runtime.fed[:-1])
    assert len(runtime.fed) == -(-length // PIECE_TOKENS)
    assert tokens(steps) == [(prompt[-1] + 1) % VOCABULARY]
    assert positions(steps) == [length]


@pytest.mark.parametrize("pieces", [0, 1, 2])
def test_interrupted_during_a_long_prompt(pieces: int) -> None:
    steps, runtime = run([1] * (3 * PIECE_TOKENS), interrupted=after(pieces))
    assert steps == []
    assert len(runtime.fed) == pieces


def test_interrupted_while_writing() -> None:
    steps, runtime = run([3], max_tokens=100, interrupted=after(1 + 2))  # the prompt, two tokens
    assert tokens(steps) == [4, 5, 6]
    assert runtime.fed == [[3], [4], [5]]  # what was shown last is not fed, as at any other end


def test_nothing_is_computed_before_it_is_asked_for() -> None:
    runtime = Counting()
    loop = generate(runtime, [3], runtime.initial_state(), Sampler(Sampling(temperature=0)), frozenset(), 9)
    assert runtime.fed == []
    next(loop)
    assert runtime.fed == [[3]]
    next(loop)
    assert runtime.fed == [[3], [4]]


def test_the_sampler_sees_the_position() -> None:
    seen: list[int] = []

    class Watching(Sampler):
        def __call__(self, logits: Tensor, position: Tensor) -> Tensor:
            seen.append(int(position))
            return super().__call__(logits, position)

    runtime = Counting()
    list(generate(runtime, [3, 4], runtime.initial_state(), Watching(Sampling(temperature=0)), frozenset(), 3))
    assert seen == [2, 3, 4]
