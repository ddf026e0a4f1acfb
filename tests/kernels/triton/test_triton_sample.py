"""Sampling on the device against `Sampler` on the CPU: the same tokens, the same recent tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn2_edge.generate.sampler import Sampler, _uniform
from gdn2_edge.kernels.triton.draw import uniform_number
from gdn2_edge.kernels.triton.sample import COLUMNS, Tables, fits, make_scratch, sample, write_options
from gdn2_edge.sampling import Sampling

# A row that is drawn takes a tenth of a second in the interpreter.
ROUNDS = 50 if torch.cuda.is_available() else 1
GREEDY = Sampling(temperature=0)
SETTINGS = [
    {},
    {"top_k": 1, "repetition_penalty": 1.0},
    {"top_k": 64, "top_p": 1.0, "temperature": 3.0},
    {"top_k": 5, "temperature": 1.0},
    {"top_p": 0.5, "repetition_window": 7},
    {"min_p": 0.05, "temperature": 1.5, "repetition_window": 0},
    {"temperature": 0.0},
    {"top_k": 33, "top_p": 0.9, "min_p": 0.02, "temperature": 1.4, "seed": 2**63 - 1},
]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(batch: int, vocabulary: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(batch, vocabulary, generator=generator(seed))


def choose(
    logits: Tensor, position: Tensor, settings: list[Sampling], recent: Tensor, device: torch.device
) -> tuple[Tensor, Tensor]:
    """One `Sampling` a row: tokens, and `recent` after them."""
    batch, vocabulary = logits.shape
    options = torch.full((batch, COLUMNS), -1)
    for row, s in enumerate(settings):
        write_options(options[row], row_index=row, **s.model_dump())
    given = recent
    token, recent = torch.full((batch,), -7, device=device), recent.to(device, copy=True)
    scratch = make_scratch(batch, vocabulary, device)
    chosen = torch.full((3, batch), -9, pin_memory=device.type == "cuda")  # the host's memory
    sample(logits.to(device), position.to(device), options.to(device), recent, token, scratch, chosen=chosen)
    token, recent = token.cpu(), recent.cpu()
    rows = torch.arange(batch)
    assert torch.equal(chosen[position % 3, rows], token)
    assert (chosen == -9).sum() == 2 * batch
    assert_the_same_where_it_counts(logits, position, options, given, (token, recent), device)
    return token, recent


def assert_the_same_where_it_counts(
    logits: Tensor, position: Tensor, options: Tensor, given: Tensor, found: tuple[Tensor, Tensor], device: torch.device
) -> None:
    """Told the position before the last token and to count it: the same choice, and tables moved on."""
    batch, vocabulary = logits.shape
    token, recent, counted = (
        torch.full((batch,), -7, device=device),
        given.to(device, copy=True),
        position.to(device) - 1,
    )
    tables = torch.arange(3 * batch, device=device).view(3, batch)
    source, target, spare = (row.clone() for row in tables)
    chosen = torch.full((3, batch), -9, device=device)
    scratch = make_scratch(batch, vocabulary, device)
    places = Tables(source, target, spare)
    sample(logits.to(device), counted, options.to(device), recent, token, scratch, chosen=chosen, tables=places)
    assert torch.equal(token.cpu(), found[0])
    assert torch.equal(recent.cpu(), found[1])
    assert torch.equal(counted.cpu(), position)
    assert torch.equal(chosen.cpu()[position % 3, torch.arange(batch)], found[0])
    assert torch.equal(torch.stack(places), tables[[1, 2, 0]])


def expected(
    logits: Tensor, position: Tensor, settings: list[Sampling], recent: Tensor, window: int
) -> tuple[Tensor, Tensor]:
    """The same by `Sampler`, a row at a time."""
    batch, tokens = len(logits), []
    for row, s in enumerate(settings):
        token = Sampler(s, batch, recent)(logits, position)
        tokens.append(token[row])
    return torch.stack(tokens), torch.cat([recent, torch.stack(tokens)[:, None]], 1)[:, -window:]


def check(
    logits: Tensor, settings: list[Sampling], device: torch.device, recent: Tensor | None = None, first: int = 0
) -> Tensor:
    recent = torch.full((len(logits), 64), -1) if recent is None else recent
    position = torch.arange(first, first + len(logits))
    found = choose(logits, position, settings, recent, device)
    right = expected(logits, position, settings, recent, recent.shape[1])
    assert torch.equal(found[0], right[0])
    assert torch.equal(found[1], right[1])
    return found[0]


@pytest.mark.parametrize("vocabulary", [7, 100, 1024, 1025, 8192])
def test_the_same_token_as_the_sampler(vocabulary: int, device: torch.device) -> None:
    for i in range(ROUNDS):
        common = {"repetition_penalty": 1.3, "seed": 100 * i + vocabulary}
        settings = [Sampling(**(common | s)) for s in SETTINGS]
        recent = torch.randint(-1, vocabulary, (len(settings), 64), generator=generator(i))
        check(normal(len(settings), vocabulary, i), settings, device, recent, first=2**33 * i)


@pytest.mark.parametrize("vocabulary", [2**15, 2**15 + 1])
def test_the_root_of_a_large_vocabulary(vocabulary: int, device: torch.device) -> None:
    """Above 2^15 ids some roots are left out."""
    check(normal(1, vocabulary), [Sampling(temperature=2.0, top_k=64)], device)


@pytest.mark.parametrize("descending", [False, True])
def test_the_best_may_all_lie_in_one_place(descending: bool, device: torch.device) -> None:
    logits = normal(2, 3000).sort(-1, descending=descending).values
    check(logits, [Sampling(top_k=64, top_p=1, temperature=10, seed=s) for s in (1, 2)], device)


def test_the_best_may_all_lie_apart(device: torch.device) -> None:
    logits = normal(2, 64 * 40)
    logits[:, ::40] += 40 * torch.rand(2, 64, generator=generator(1))
    check(logits, [Sampling(top_k=64, top_p=1, temperature=10, seed=s) for s in (1, 2)], device)


# Ties


def test_ties_go_to_the_lowest_ids(device: torch.device) -> None:
    logits = torch.randint(-2, 3, (4, 1500), generator=generator(0)).float()
    logits[logits == 0] *= torch.tensor([-1.0, 1.0]).repeat(3000)[: int((logits == 0).sum())]
    logits[1:] = logits[1:].clamp(max=0)  # the best are 0 and -0
    logits[2] = 1.0
    check(logits, [GREEDY, *[Sampling(top_p=1, seed=s) for s in (3, 4, 5)]], device)


def test_greedy_ties_between_blocks_and_within(device: torch.device) -> None:
    logits = torch.zeros(4, 2000)
    logits[1, [7, 500, 1999]] = 2.0
    logits[2, 1999] = 1.0
    logits[3] = -3e38
    assert check(logits, [GREEDY] * 4, device).tolist() == [0, 7, 1999, 0]


def test_a_penalty_makes_ties_as_on_the_cpu(device: torch.device) -> None:
    """A quotient is the nearest float (7 times the float of 1 / 1.7 is not), so ids 5 and 9 tie."""
    logits = normal(2, 600).clamp(max=2)
    logits[0, [5, 9]] = torch.tensor([7.0, float(torch.tensor(7.0) / 1.7)])
    logits[1, [5, 9]] = torch.tensor([float(torch.tensor(7.0) / 1.7), 7.0])
    settings = Sampling(temperature=0, repetition_penalty=1.7)
    assert check(logits, [settings] * 2, device, torch.tensor([[5], [9]])).tolist() == [5, 5]


# Recent tokens


@pytest.mark.parametrize(("window", "width"), [(64, 64), (5, 5), (5, 64), (3, 7), (1, 1), (0, 4)])
def test_chosen_tokens_become_recent_and_are_forgotten(window: int, width: int, device: torch.device) -> None:
    settings = [Sampling(temperature=0, repetition_penalty=1.5, repetition_window=window)]
    logits, chosen = 0.1 * normal(1, 90).abs() + 2, []
    recent = torch.cat([torch.full((1, width), -1), logits.argsort(descending=True)[:, : max(0, width - 5)]], 1)
    recent = recent[:, -width:]
    for _ in range(min(width, 6) + 3):
        position = torch.zeros(1, dtype=torch.int64)
        right = expected(logits, position, settings, recent, width)
        token, recent = choose(logits, position, settings, recent, device)
        assert torch.equal(token, right[0])
        assert torch.equal(recent, right[1])
        chosen.append(int(token))
    assert len(set(chosen)) >= min(window + 1, 2)


def test_draws_follow_one_another(device: torch.device) -> None:
    settings = Sampling(repetition_penalty=1.8, repetition_window=6, top_k=10, seed=4)
    sampler, recent, logits = Sampler(settings), torch.full((1, 8), -1), normal(1, 40)
    for p in range(8):
        position = torch.tensor([p])
        token, recent = choose(logits, position, [settings], recent, device)
        assert torch.equal(token, sampler(logits, position))
        assert torch.equal(recent[:, -6:], sampler.recent)


# Rows


def test_rows_that_are_not_finite_do_not_disturb_others(device: torch.device) -> None:
    bad = [torch.nan, torch.inf, -torch.nan, -torch.inf]
    good, recent = normal(10, 1030), torch.randint(0, 1030, (10, 64), generator=generator(2))
    logits, settings = good.clone(), [Sampling(repetition_penalty=1.2), GREEDY] * 5
    for row, value in enumerate(bad * 2):
        logits[row, [3, 1029]] = value
    logits[[3, 7]] = -torch.inf
    position = torch.arange(10)
    token, after = choose(logits, position, settings, recent, device)
    right = expected(good, position, settings, recent, 64)
    assert token[:8].tolist() == [-1] * 8
    assert torch.equal(after[:8], recent[:8])
    assert torch.equal(token[8:], right[0][8:])
    assert torch.equal(after[8:], right[1][8:])


def test_minus_infinity_is_never_drawn(device: torch.device) -> None:
    logits = torch.full((3, 700), -torch.inf)
    logits[:, [40, 600, 699]] = torch.tensor([1.0, 2.0, 1.5])
    check(logits, [Sampling(temperature=5, top_p=1, seed=s) for s in range(3)], device)


def test_a_row_does_not_depend_on_its_place(device: torch.device) -> None:
    logits, settings, recent = normal(1, 300), [Sampling(seed=9, temperature=2)], torch.full((1, 64), -1)
    options = torch.empty(2, COLUMNS, dtype=torch.int64)
    for row in options:
        write_options(row, row_index=5, **settings[0].model_dump())
    token = torch.full((2,), -7, device=device)
    position = torch.full((2,), 11, device=device)
    recent = torch.full((2, 64), -1, device=device)
    scratch = make_scratch(2, 300, device)
    sample(logits.repeat(2, 1).to(device), position, options.to(device), recent, token, scratch)
    right = Sampler(settings[0], 6)(logits.expand(6, -1), torch.full((6,), 11))[5]
    assert token.tolist() == [int(right)] * 2


def test_a_tiny_temperature_is_greedy(device: torch.device) -> None:
    logits = normal(2, 100)
    settings = [Sampling(temperature=t) for t in (1e-30, 1e-300)]
    assert torch.equal(check(logits, settings, device), logits.argmax(-1))


# What decides a draw


@triton.jit
def uniform_kernel(p_seed, p_row, p_position, p_uniform, N: tl.constexpr):
    o = tl.arange(0, N)
    b_uniform = uniform_number(tl.load(p_seed + o), tl.load(p_row + o), tl.load(p_position + o))
    tl.store(p_uniform + o, b_uniform)


def test_noise_is_the_samplers(device: torch.device) -> None:
    words = torch.randint(0, 2**63 - 1, (3, 1024), generator=generator(0))
    words[:, :256] %= 1000
    words[:, 0], words[:, 1] = 0, 2**63 - 1
    found = torch.full((1024,), torch.nan, dtype=torch.float64, device=device)
    uniform_kernel[(1,)](*words.to(device), found, N=1024)
    assert found.tolist() == [_uniform(*w) for w in words.T.tolist()]


# What it can do


@pytest.mark.parametrize(
    ("settings", "can"),
    [
        ({}, True),
        ({"vocabulary": 2**19}, True),
        ({"vocabulary": 2**19 + 1}, False),
        ({"top_k": 64}, True),
        ({"top_k": 65}, False),
        ({"top_k": 0}, False),
        ({"top_k": 0, "temperature": 0}, True),
        ({"repetition_window": 65}, True),
        ({"repetition_window": 65, "repetition_penalty": 1.1}, False),
        ({"repetition_window": 64, "repetition_penalty": 1.1}, True),
        ({"repetition_window": 65, "repetition_penalty": 1.1, "temperature": 0}, False),
    ],
    ids=str,
)
def test_what_fits(settings: dict[str, Any], can: bool) -> None:
    vocabulary = settings.get("vocabulary", 32_000)
    s = Sampling(**{k: v for k, v in settings.items() if k != "vocabulary"})
    assert fits(vocabulary, s.top_k, s.temperature, s.repetition_penalty, s.repetition_window) is can
