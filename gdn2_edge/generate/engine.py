"""The generation loop, over token ids only: feed a prompt, then sample, feed, sample, until a stop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gdn2_edge.errors import BackendError
from gdn2_edge.generate.sampler import Sampler
from gdn2_edge.runtime import Runtime
from gdn2_edge.state import State

# A prompt is fed in pieces of this many tokens; between two pieces `interrupted` is asked.
PIECE_TOKENS = 512


@dataclass(frozen=True)
class Step:
    """`token` was chosen and is not fed yet (None: a stop token, which never is); `state` is the one before it."""

    token: int | None
    state: State[Tensor]


def generate(
    runtime: Runtime,
    prompt: Sequence[int],
    state: State[Tensor],
    sampler: Sampler,
    stop_ids: frozenset[int],
    max_tokens: int,
    interrupted: Callable[[], bool] = lambda: False,
) -> Iterator[Step]:
    """Continue one sequence.

    Args:
        prompt: the ids to feed first, at least one.
        state: is consumed.
        stop_ids: the loop ends when one of them is chosen.
        max_tokens: and after this many tokens.
        interrupted: and when this says so. Before the first token that yields nothing at all.
    Raises:
        BackendError: the prompt is empty, or see `Sampler`.
    Yields:
        one `Step` for each token, and a last one with `token=None` where a stop token was chosen.
    """
    if not prompt:
        raise BackendError("there is nothing to continue: the prompt has no tokens.")
    for start in range(0, len(prompt), PIECE_TOKENS):
        if interrupted():
            return
        piece = torch.tensor([prompt[start : start + PIECE_TOKENS]])
        logits, state = runtime.prefill(piece, state)
    token = sampler(logits, state.position)
    for count in range(max_tokens):
        if int(token) in stop_ids:
            yield Step(None, state)
            return
        yield Step(int(token), state)
        if count + 1 == max_tokens or interrupted():
            return
        token, state = runtime.generate_step(token, state, sampler)
