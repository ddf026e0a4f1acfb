"""Choosing the next token from logits. Knows token ids and positions; no text, no model."""

from __future__ import annotations

import torch
from torch import Tensor

from gdn2_edge.errors import BackendError
from gdn2_edge.sampling import Sampling


class Sampler:
    """`Sampling` with the recently chosen tokens of each sequence: `recent` [B, window] int64, -1 where none.

    Greedy ties go to the lowest id. Noise is a function of (seed, row, position) alone, so a conversation that is
    continued from a file draws what it would have drawn.
    """

    def __init__(self, sampling: Sampling, batch: int = 1, recent: Tensor | None = None) -> None:
        self.sampling = sampling
        window = sampling.repetition_window
        self.recent = torch.full((batch, window), -1, dtype=torch.int64)
        if recent is not None and window:
            kept = recent[:, -window:]
            self.recent[:, window - kept.shape[1] :] = kept

    def __call__(self, logits: Tensor, position: Tensor) -> Tensor:
        """logits [B, V] fp32, position [B] (tokens fed so far) -> tokens [B] int64.

        Raises:
            BackendError: the logits are not finite, as with damaged weights.
        """
        if not torch.isfinite(logits.amax(-1)).all():
            raise BackendError("The model's logits are not finite: its weights are damaged or hold NaN.")
        scores = self._penalised(logits)
        token = scores.argmax(-1) if self.sampling.temperature == 0 else self._draw(scores, position)
        self.record(token)
        return token

    def record(self, token: Tensor) -> None:
        """Tokens [B] were chosen, here or by a runtime that chooses as `__call__` would."""
        if self.sampling.repetition_window:
            self.recent = torch.cat([self.recent[:, 1:], token.cpu()[:, None]], 1)

    def _penalised(self, logits: Tensor) -> Tensor:
        if self.sampling.repetition_penalty == 1 or not self.sampling.repetition_window:
            return logits
        recent, penalty = self.recent.to(logits.device), self.sampling.repetition_penalty
        batch, vocab = logits.shape
        ids = torch.where(recent >= 0, recent, vocab)  # one column more, for none
        chosen = logits.new_zeros(batch, vocab + 1, dtype=torch.bool).scatter(1, ids, True)[:, :-1]
        return torch.where(chosen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)

    def _draw(self, scores: Tensor, position: Tensor) -> Tensor:
        s = self.sampling
        kept = min(s.top_k or scores.shape[-1], scores.shape[-1])
        values, ids = torch.sort(scores, dim=-1, descending=True, stable=True)
        # In fp64 and from 0 downwards, so that no temperature overflows.
        probabilities = torch.softmax((values - values[:, :1])[:, :kept].double() / s.temperature, -1)
        before = probabilities.cumsum(-1) - probabilities
        dropped = (before >= s.top_p) | (probabilities < s.min_p * probabilities[:, :1])
        cumulative = probabilities.masked_fill(dropped, 0).cumsum(-1)
        uniform = [_uniform(s.seed, row, int(p)) for row, p in enumerate(position.tolist())]
        target = torch.tensor(uniform, dtype=torch.float64, device=scores.device) * cumulative[:, -1]
        choice = torch.searchsorted(cumulative, target[:, None], right=True).clamp_(max=kept - 1)
        return ids.gather(1, choice)[:, 0]


_MASK = (1 << 64) - 1


def _uniform(seed: int, row: int, position: int) -> float:
    """A number in [0, 1) from three integers, by the finalizer of splitmix64."""
    state = 0
    for word in (seed, row, position):
        state = (state + word + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return (state >> 11) / (1 << 53)
