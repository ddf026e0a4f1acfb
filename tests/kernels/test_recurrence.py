"""The gated delta rule by its laws, and the chunked form against the token loop.

Ground truth: `recurrent_gated_delta_rule2` in float64; the loop itself is held to laws that do not use it.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize, softplus

from gdn2_edge.kernels import chunk as chunk_module
from gdn2_edge.kernels.chunk import chunk_gated_delta_rule2
from gdn2_edge.kernels.reference import recurrent_gated_delta_rule2

Inputs = dict[str, Tensor]
Rule = Callable[..., tuple[Tensor, Tensor]]

# Outputs and states are of size 1 to 10. In float64 only the order of additions differs: some 100 roundings.
EXACT = 1e-12
# In float32 some 100 roundings of 6e-8 partly cancel at that size: 1e-6 is seen, without decay, b up to 2.
FLOAT32 = 4e-6
# A reflection at every token forgets nothing and the entries of the inverse are 2: 1.2e-4 is seen.
FLOAT32_REFLECTION = 4e-4
# Rounding errors of earlier tokens are erased and decay with the state, so 4096 tokens are no worse than 100.
FLOAT32_DRIFT = 4e-6

RECURRENT: Rule = recurrent_gated_delta_rule2
CHUNK: Rule = chunk_gated_delta_rule2
RULES = pytest.mark.parametrize("rule", [RECURRENT, CHUNK], ids=["recurrent", "chunk"])
# B, T, H, HV, K, V
SHAPES = [
    (1, 1, 2, 2, 16, 16),
    (2, 15, 1, 1, 8, 24),
    (1, 16, 3, 3, 24, 8),
    (2, 17, 2, 4, 5, 7),
    (1, 63, 2, 2, 33, 21),
    (1, 64, 2, 2, 64, 64),
    (2, 65, 3, 6, 20, 12),
    (1, 100, 1, 3, 48, 40),
    (2, 200, 2, 2, 17, 33),
]


def make_inputs(*shape: int, dtype: torch.dtype = torch.float64) -> Inputs:
    """Random arguments of the rule by name: gates over all of (0, 1), decay mild with a strong tail."""
    B, T, H, HV, K, V = shape
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs = {
        "q": normalize(randn(B, T, H, K), dim=-1),
        "k": normalize(randn(B, T, H, K), dim=-1),
        "v": randn(B, T, HV, V),
        "g": -softplus(3 * randn(B, T, H, K) - 3),
        "b": randn(B, T, H, K).mul(2).sigmoid(),
        "w": randn(B, T, HV, V).mul(2).sigmoid(),
        "S": randn(B, HV, K, V),
    }
    return {name: x.to(dtype) for name, x in inputs.items()}


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return {name: x.to(dtype) for name, x in inputs.items()}


def tokens(inputs: Inputs, start: int, stop: int) -> Inputs:
    return {name: x if name == "S" else x[:, start:stop] for name, x in inputs.items()}


def assert_close(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], tolerance: float) -> None:
    for name, x, y in zip(("o", "S"), got, expected, strict=True):
        assert x.shape == y.shape
        assert torch.isfinite(x).all(), name
        error = (x.double() - y.double()).abs().max().item()
        assert error <= tolerance, f"{name} is off by {error:.2e}, more than {tolerance:.0e}"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("chunk_size", [1, 16, 32, 64])
def test_chunk_is_recurrent(shape: tuple[int, ...], chunk_size: int) -> None:
    inputs = make_inputs(*shape)
    expected = RECURRENT(**inputs)
    assert_close(CHUNK(**inputs, chunk_size=chunk_size), expected, EXACT)


@RULES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32_against_float64(rule: Rule, shape: tuple[int, ...]) -> None:
    inputs = make_inputs(*shape, dtype=torch.float32)
    expected = RECURRENT(**cast(inputs, torch.float64))
    got = rule(**inputs)
    assert {x.dtype for x in got} == {torch.float32}
    assert_close(got, expected, FLOAT32)


@RULES
@pytest.mark.parametrize("split", [1, 16, 63, 64, 65, 99])
def test_prefill_is_any_split(rule: Rule, split: int) -> None:
    inputs = make_inputs(2, 100, 2, 4, 12, 20)
    first, S = rule(**tokens(inputs, 0, split))
    second, S = rule(**{**tokens(inputs, split, 100), "S": S})
    assert_close((torch.cat((first, second), dim=1), S), rule(**inputs), EXACT)


@RULES
def test_shared_gate_is_kimi_delta_attention(rule: Rule) -> None:
    inputs = make_inputs(2, 70, 3, 3, 16, 24)
    B, T, H, K = inputs["k"].shape
    beta = torch.rand(B, T, H, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    inputs |= {"b": beta.expand(B, T, H, K), "w": beta.expand(B, T, H, 24)}

    def kda_step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
        """S <- (I - beta k k^T) Diag(exp g) S + beta k v^T with the matrix written out; one head."""
        S = (torch.eye(K, dtype=S.dtype) - beta * torch.outer(k, k)) @ torch.diag(g.exp()) @ S
        S = S + beta * torch.outer(k, v)
        return K**-0.5 * (S.T @ q), S

    o = torch.zeros(B, T, H, 24, dtype=torch.float64)
    S = inputs["S"].clone()
    for i in range(B):
        for h in range(H):
            for t in range(T):
                q, k, v, g = (inputs[name][i, t, h] for name in "qkvg")
                o[i, t, h], S[i, h] = kda_step(q, k, v, g, beta[i, t, h], S[i, h])
    assert_close(rule(**inputs), (o, S), EXACT)


@RULES
def test_gdn2_is_kda_in_another_basis(rule: Rule) -> None:
    inputs = make_inputs(2, 100, 2, 2, 16, 24)
    c = inputs["b"].sqrt()
    log_c = c.log()
    before = torch.cat((torch.zeros_like(log_c[:, :1]), log_c[:, :-1]), dim=1)
    in_basis = {
        "q": inputs["q"] / c,
        "k": inputs["k"] * c,
        "v": inputs["v"] * inputs["w"],
        "g": inputs["g"] + log_c - before,
        "b": torch.ones_like(inputs["b"]),
        "w": torch.ones_like(inputs["w"]),
        "S": inputs["S"],
    }
    o, S = rule(**in_basis)
    assert_close((o, S / c[:, -1, :, :, None]), RECURRENT(**inputs), EXACT)


@RULES
def test_closed_erase_gate_erases_nothing(rule: Rule) -> None:
    inputs = make_inputs(2, 70, 2, 2, 16, 24)
    inputs |= {"b": torch.zeros_like(inputs["b"]), "g": torch.zeros_like(inputs["g"])}
    _, S = rule(**inputs)
    written = torch.einsum("bthk,bthv->bhkv", inputs["k"], inputs["w"] * inputs["v"])
    torch.testing.assert_close(S, inputs["S"] + written, rtol=0, atol=EXACT)


@RULES
@pytest.mark.parametrize("T", [1, 16, 65])
def test_open_gates_overwrite_exactly(rule: Rule, T: int) -> None:
    inputs = make_inputs(2, T, 2, 2, 16, 24)
    inputs |= {name: torch.ones_like(inputs[name]) for name in "bw"} | {"g": torch.zeros_like(inputs["g"])}
    _, S = rule(**inputs)
    read = torch.einsum("bhkv,bhk->bhv", S, inputs["k"][:, -1])
    torch.testing.assert_close(read, inputs["v"][:, -1], rtol=0, atol=EXACT)


@RULES
def test_closed_gates_without_decay_keep_the_state(rule: Rule) -> None:
    inputs = make_inputs(1, 65, 2, 2, 16, 24, dtype=torch.float32)
    inputs |= {name: torch.zeros_like(inputs[name]) for name in "gbw"}
    _, S = rule(**inputs)
    assert torch.equal(S, inputs["S"])


@RULES
def test_grouped_heads_are_repeated_heads(rule: Rule) -> None:
    inputs = make_inputs(2, 65, 2, 6, 16, 24)
    repeated = inputs | {name: inputs[name].repeat_interleave(3, dim=2) for name in "qkgb"}
    assert_close(rule(**inputs), rule(**repeated), EXACT)


@RULES
def test_scale(rule: Rule) -> None:
    inputs = make_inputs(1, 20, 2, 2, 16, 24)
    o, S = rule(**inputs)
    assert_close(rule(**inputs, scale=1.0), (4 * o, S), EXACT)


def fill_g(value: float) -> Callable[[Tensor], Tensor]:
    return lambda g: torch.full_like(g, value)


def one_token(value: float) -> Callable[[Tensor], Tensor]:
    def decay(g: Tensor) -> Tensor:
        g = g.clone()
        g[:, 20] = value
        return g

    return decay


def mixture(g: Tensor) -> Tensor:
    choices = torch.tensor([0.0, -1e-4, -0.1, -3.0, -8.0, -65.0, -1e4], dtype=g.dtype)
    return choices[torch.randint(len(choices), g.shape, generator=torch.Generator().manual_seed(2))]


EXTREME_DECAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": fill_g(0.0),
    "-3 each, denormal after 30 tokens": fill_g(-3.0),
    "-513 over a chunk of 64": fill_g(-513 / 64),
    "-65 each": fill_g(-65.0),
    "-10000 each": fill_g(-1e4),
    "-infinity each": fill_g(float("-inf")),
    "-65 once": one_token(-65.0),
    "-10000 once": one_token(-1e4),
    "mixture": mixture,
}


@RULES
@pytest.mark.parametrize("decay", EXTREME_DECAYS.values(), ids=EXTREME_DECAYS.keys())
@pytest.mark.parametrize("gate", [1.0, 2.0], ids=["b to 1", "b to 2"])
def test_extreme_decay(rule: Rule, decay: Callable[[Tensor], Tensor], gate: float) -> None:
    inputs = make_inputs(1, 150, 2, 2, 32, 24, dtype=torch.float32)
    inputs |= {"g": decay(inputs["g"]), "b": gate * inputs["b"]}
    expected = RECURRENT(**cast(inputs, torch.float64))
    assert_close(rule(**inputs), expected, FLOAT32)


@RULES
def test_one_key_for_ever_with_the_strongest_gate(rule: Rule) -> None:
    """b = 2 on a repeated unit key reflects the state at every token: the worst triangular system."""
    inputs = make_inputs(1, 130, 1, 1, 16, 8, dtype=torch.float32)
    inputs |= {"k": inputs["k"][:, :1].expand_as(inputs["k"]), "g": torch.zeros_like(inputs["g"])}
    inputs |= {"b": torch.full_like(inputs["b"], 2.0)}
    expected = RECURRENT(**cast(inputs, torch.float64))
    assert_close(rule(**inputs), expected, FLOAT32_REFLECTION)


@RULES
@pytest.mark.parametrize("T", [1, 64, 70])
def test_arguments_are_left_as_they_were(rule: Rule, T: int) -> None:
    inputs = make_inputs(1, T, 2, 2, 16, 24, dtype=torch.float32)
    before = {name: x.clone() for name, x in inputs.items()}
    _, S = rule(**inputs)
    S.fill_(7.0)  # the new state shares no memory with the old one
    assert S.untyped_storage().nbytes() == S.nbytes  # nor keeps a larger buffer alive
    for name, x in inputs.items():
        assert torch.equal(x, before[name]), name


@RULES
def test_low_precision_is_computed_in_float32(rule: Rule) -> None:
    inputs = make_inputs(1, 40, 2, 2, 16, 24, dtype=torch.bfloat16)
    upcast = rule(**cast(inputs, torch.float32))
    got = rule(**inputs)
    assert {x.dtype for x in got} == {torch.float32}
    assert_close(got, upcast, 0.0)


def test_segments_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(2, 300, 2, 4, 16, 24)
    whole = CHUNK(**inputs)
    monkeypatch.setattr(chunk_module, "SEGMENT_BYTES", 1)  # a chunk each
    assert_close(CHUNK(**inputs), whole, EXACT)


def test_views_of_one_projection() -> None:
    """Arguments may be slices of a joined buffer, as the layer makes them."""
    inputs = make_inputs(2, 64, 2, 2, 16, 16)
    joined = torch.cat([inputs[name] for name in "qkvgbw"], dim=2)
    views = dict(zip("qkvgbw", torch.chunk(joined, 6, dim=2), strict=True))
    assert_close(CHUNK(**views, S=inputs["S"]), CHUNK(**inputs), 0.0)


@pytest.mark.parametrize("chunk_size", [0, 48, -32])
def test_chunk_size_is_a_power_of_two(chunk_size: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        CHUNK(**make_inputs(1, 4, 1, 1, 4, 4), chunk_size=chunk_size)


def test_drift_over_4096_steps() -> None:
    inputs = make_inputs(1, 4096, 2, 2, 32, 32, dtype=torch.float32)
    inputs["g"] = inputs["g"] * 0.01  # long memory: mild decay lets errors add up
    expected = RECURRENT(**cast(inputs, torch.float64))
    assert_close(RECURRENT(**inputs), expected, FLOAT32_DRIFT)
    assert_close(CHUNK(**inputs), expected, FLOAT32_DRIFT)
