"""Sampling against a plain reading of its settings: what is kept, how often it is drawn, and what decides it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from gdn2_edge.errors import BackendError
from gdn2_edge.generate.sampler import Sampler, _uniform
from gdn2_edge.sampling import Sampling

GREEDY = Sampling(temperature=0)
EVERYTHING = Sampling(temperature=1, top_k=0, top_p=1)
DRAWS = 6000
# Standard deviations of a chi-square above its mean. The seeds are fixed: a bad luck of one in 10^5 is not drawn anew.
CHI_SQUARE_DEVIATIONS = 4.0


def logits(vocabulary: int = 50, seed: int = 0) -> Tensor:
    return 2 * torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(seed))


def naive(scores: Tensor, s: Sampling) -> dict[int, float]:
    """Token -> probability of all that are kept, in plain Python."""
    values = [float(v) / s.temperature for v in scores.double()]
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))[: s.top_k or None]
    weights = [float(torch.tensor(values[i] - values[order[0]], dtype=torch.float64).exp()) for i in order]
    probabilities = [w / sum(weights) for w in weights]
    kept, before = {}, 0.0
    for token, p in zip(order, probabilities, strict=True):
        if before < s.top_p and p >= s.min_p * probabilities[0]:
            kept[token] = p
        before += p
    return {token: p / sum(kept.values()) for token, p in kept.items()}


def draw(scores: Tensor, sampling: Sampling, draws: int = DRAWS) -> Tensor:
    """Independent draws: as many rows."""
    sampler = Sampler(sampling, draws)
    return sampler(scores.expand(draws, -1), torch.zeros(draws, dtype=torch.int64))


SETTINGS = [
    {},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 1000},
    {"top_p": 0.5},
    {"top_p": 0.9},
    {"top_p": 1e-6},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"temperature": 0.3},
    {"temperature": 3.0},
    {"top_k": 12, "top_p": 0.8, "min_p": 0.1, "temperature": 1.4},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_what_is_kept_is_drawn_as_often_as_it_should_be(settings: dict[str, Any]) -> None:
    sampling = EVERYTHING.model_copy(update=settings)
    scores = logits()
    expected = naive(scores[0], sampling)
    counts = torch.bincount(draw(scores, sampling), minlength=50).tolist()
    assert sum(counts) == DRAWS
    assert all(counts[token] == 0 for token in range(50) if token not in expected)
    for token, p in expected.items():
        assert counts[token] > 0 or DRAWS * p < 12, f"token {token} of probability {p} is never drawn"
    common = {token: p for token, p in expected.items() if DRAWS * p >= 5}
    degrees = max(1, len(common) - 1)
    chi_square = sum((counts[token] - DRAWS * p) ** 2 / (DRAWS * p) for token, p in common.items())
    assert chi_square < degrees + CHI_SQUARE_DEVIATIONS * (2 * degrees) ** 0.5


def test_ties_at_the_edge_of_top_k_go_to_the_lowest_ids() -> None:
    scores = torch.zeros(1, 40)
    scores[0, 30] = 1.0
    found = draw(scores, EVERYTHING.model_copy(update={"top_k": 4}))
    assert set(found.tolist()) == {30, 0, 1, 2}


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-40, 5e-324])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    scores = 30 * logits()
    found = draw(scores, EVERYTHING.model_copy(update={"temperature": temperature}), 50)
    assert (found == scores.argmax()).all()


def test_greedy_ties_go_to_the_lowest_id() -> None:
    scores = torch.zeros(3, 1000)
    scores[1, [7, 500, 999]] = 2.0
    scores[2, 999] = 1.0
    assert Sampler(GREEDY, 3)(scores, torch.zeros(3, dtype=torch.int64)).tolist() == [0, 7, 999]


# What decides a draw


def sequence(seed: int, positions: range, row: int = 0, batch: int = 1) -> list[int]:
    sampler = Sampler(EVERYTHING.model_copy(update={"seed": seed}), batch)
    scores = logits().expand(batch, -1)
    return [int(sampler(scores, torch.full((batch,), p))[row]) for p in positions]


def test_a_seed_decides() -> None:
    assert sequence(1, range(40)) == sequence(1, range(40))
    assert sequence(1, range(40)) != sequence(2, range(40))
    assert sequence(2**63 - 1, range(40)) != sequence(0, range(40))


def test_a_row_does_not_depend_on_the_others() -> None:
    assert sequence(1, range(40)) == sequence(1, range(40), batch=3)
    assert sequence(1, range(40), row=1, batch=2) == sequence(1, range(40), row=1, batch=5)
    assert sequence(1, range(40), row=1, batch=2) != sequence(1, range(40), row=0, batch=2)


def test_a_position_decides_and_nothing_before_it() -> None:
    assert sequence(1, range(20, 40)) == sequence(1, range(40))[20:]
    assert len(set(sequence(1, range(40)))) > 5


def test_noise_is_uniform_over_seeds_rows_and_positions() -> None:
    for arguments in (
        [(i, 0, 0) for i in range(4000)],
        [(0, i, 0) for i in range(4000)],
        [(0, 0, i) for i in range(4000)],
    ):
        drawn = torch.tensor([_uniform(*a) for a in arguments], dtype=torch.float64)
        assert ((drawn >= 0) & (drawn < 1)).all()
        assert len(drawn.unique()) == 4000
        for values in (drawn, (drawn[1:] - drawn[:-1]) % 1):  # and neighbours have nothing to do with each other
            counts = torch.bincount((values * 20).long(), minlength=20).double()
            expected = len(values) / 20
            chi_square = float(((counts - expected) ** 2 / expected).sum())
            assert chi_square < 19 + CHI_SQUARE_DEVIATIONS * 38**0.5


# Repetition


def test_the_penalty_is_on_recent_tokens_only() -> None:
    scores = logits()
    scores[0, 3], scores[0, 4], scores[0, 5] = 2.0, -2.0, 0.0
    sampling = Sampling(repetition_penalty=1.25, repetition_window=4, temperature=0)
    recent = torch.tensor([[9, 3, 4, 5, 3]])  # 9 is too long ago
    found = Sampler(sampling, 1, recent)._penalised(scores)
    expected = scores.clone()
    expected[0, 3], expected[0, 4] = 1.6, -2.5
    assert torch.equal(found, expected)


def test_no_token_is_penalised_before_one_is_chosen() -> None:
    sampling = Sampling(repetition_penalty=2, temperature=0)
    for scores in (logits(), logits().abs() + 1, torch.ones(1, 4)):
        assert torch.equal(Sampler(sampling)._penalised(scores), scores)
    assert Sampler(sampling)(torch.ones(1, 4), torch.zeros(1)).item() == 0


def test_chosen_tokens_become_recent_and_are_forgotten() -> None:
    scores = torch.tensor([[2.0, 1.9, 1.8, 1.7]])
    sampler = Sampler(Sampling(repetition_penalty=1.5, repetition_window=2, temperature=0))
    chosen = [int(sampler(scores, torch.zeros(1))) for _ in range(6)]
    assert chosen == [0, 1, 2, 0, 1, 2]
    assert sampler.recent.tolist() == [[1, 2]]


def test_each_sequence_has_its_own_recent_tokens() -> None:
    sampler = Sampler(Sampling(repetition_penalty=2, repetition_window=3, temperature=0), 2)
    sampler(torch.tensor([[5.0, 4.0, 1.0], [1.0, 4.0, 5.0]]), torch.zeros(2))
    assert sampler.recent.tolist() == [[-1, -1, 0], [-1, -1, 2]]
    assert sampler(torch.tensor([[5.0, 4.0, 1.0]] * 2), torch.zeros(2)).tolist() == [1, 0]


@pytest.mark.parametrize(("given", "kept"), [(2, [-1, -1, 8, 9]), (6, [6, 7, 8, 9]), (4, [6, 7, 8, 9]), (0, [-1] * 4)])
def test_recent_tokens_are_taken_over(given: int, kept: list[int]) -> None:
    recent = torch.arange(10 - given, 10)[None]
    assert Sampler(Sampling(repetition_window=4), 1, recent).recent.tolist() == [kept]


def test_without_a_window_nothing_is_recent() -> None:
    sampler = Sampler(Sampling(repetition_penalty=2, repetition_window=0, temperature=0), 1, torch.tensor([[0]]))
    assert [int(sampler(torch.tensor([[2.0, 1.9]]), torch.zeros(1))) for _ in range(3)] == [0, 0, 0]
    assert sampler.recent.shape == (1, 0)


# What is refused


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("sampling", [GREEDY, EVERYTHING], ids=["greedy", "drawn"])
def test_logits_that_are_not_finite(sampling: Sampling, bad: float) -> None:
    scores = logits().repeat(2, 1)
    scores[1, 30] = bad
    with pytest.raises(BackendError, match="not finite"):
        Sampler(sampling, 2)(scores, torch.zeros(2))


@pytest.mark.parametrize(
    "field",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": 11},
        {"top_k": -1},
        {"top_p": 0},
        {"top_p": 1.1},
        {"min_p": -1},
        {"min_p": 1.1},
        {"repetition_penalty": 0.9},
        {"repetition_penalty": 2.1},
        {"repetition_window": -1},
        {"repetition_window": 4097},
        {"seed": -1},
        {"seed": 2**63},
        {"heat": 1},
    ],
    ids=str,
)
def test_settings_out_of_range(field: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Sampling(**field)
