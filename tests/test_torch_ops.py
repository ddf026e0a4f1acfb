"""The verbs of `TorchOps` against their formulas, and one layer against fla's own."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from gdn2_edge.forward import gdn2
from gdn2_edge.ops import Gdn2Layer, Mlp
from gdn2_edge.spec import ModelSpec, spec_from_fields
from gdn2_edge.state import Gdn2State
from gdn2_edge.torch_ops import TorchOps
from gdn2_edge.weights import Dense, Weight, join

GOLDEN = Path(__file__).parent / "golden" / "sigmoid-golden.safetensors"
# Over the golden's standard deviation; see test_model.py. fla's fp32 kernel itself is below this of the equations.
GOLDEN_TOLERANCE = 5e-5
# A handful of fp32 operations on numbers near 1, against fp64.
FP32 = 2e-6
# Softmax attention in fp32: up to 150 weighted values of size 3.
ATTENTION = 1e-5

OPS = TorchOps()


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def near(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Equal within tolerance * (1 + |expected|)."""
    return bool(((found.double() - expected.double()).abs() <= tolerance * (1 + expected.double().abs())).all())


def dense(values: Tensor) -> Dense:
    return Dense("w", values)


# Gates, norms, decay


def test_norms() -> None:
    x, weight = 3 * randn(2, 5, 4, 8), randn(8, seed=1)
    y = x.double()
    rms = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    assert near(OPS.rms_norm(x, dense(weight), 1e-5), rms, FP32)
    l2 = y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    assert near(OPS.l2_norm(x), l2, FP32)
    assert (OPS.l2_norm(torch.zeros(1, 8)) == 0).all()


@pytest.mark.parametrize("kind", ["silu", "sigmoid"])
def test_gate(kind: Any) -> None:
    x, y = randn(2, 3, 4), 5 * randn(2, 3, 4, seed=1)
    factor = 1 / (1 + (-y.double()).exp())
    expected = x.double() * factor * (y.double() if kind == "silu" else 1)
    assert near(OPS.gate(x, y, kind), expected, FP32)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_sigmoid_in_fp32_whatever_comes_in(scale: float) -> None:
    x = (5 * randn(2, 3, 4)).bfloat16()
    found = OPS.sigmoid(x, scale)
    assert found.dtype == torch.float32
    assert near(found, scale / (1 + (-x.double()).exp()), FP32)


def test_decay() -> None:
    x, A_log, dt_bias = 20 * randn(2, 3, 4, 8), randn(4, seed=1), randn(32, seed=2)
    x[0, 0, 0, 0] = 200.0  # softplus(x) = x far out, and no overflow
    x[0, 0, 0, 1] = -200.0
    z = x.double() + dt_bias.double().view(4, 8)
    softplus = torch.logaddexp(z, torch.zeros_like(z))
    expected = -A_log.double().exp()[:, None] * softplus
    found = OPS.decay(x, dense(A_log), dense(dt_bias))
    assert near(found, expected, FP32)
    assert (found <= 0).all()


def test_heads_merge_and_split_are_views_of_each_other() -> None:
    x = randn(2, 3, 12)
    heads = OPS.heads(x, 3)
    assert torch.equal(heads[:, :, 1], x[..., 4:8])
    assert torch.equal(OPS.merge(heads), x)
    first, second = OPS.split(x, (5, 7))
    assert torch.equal(torch.cat([first, second], -1), x)


# Short convolution

CUTS: dict[str, list[int]] = {
    "whole": [0, 23],
    "token by token": list(range(24)),
    "shorter than the filter": [0, 1, 3, 5, 8, 23],
    "in two": [0, 12, 23],
}


def short_conv(x: Tensor, filters: Tensor, cuts: list[int]) -> tuple[Tensor, Tensor]:
    tail, pieces = torch.zeros(x.shape[0], x.shape[2], filters.shape[2] - 1), []
    for start, end in pairwise(cuts):
        y, tail = OPS.short_conv(x[:, start:end], dense(filters), tail)
        pieces.append(y)
    return torch.cat(pieces, 1), tail


@pytest.mark.parametrize("size", [2, 4, 7])
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS.keys())
def test_short_conv_is_the_same_however_it_is_split(cuts: list[int], size: int) -> None:
    x, filters = randn(2, 23, 6), randn(6, 1, size, seed=1)
    found, tail = short_conv(x, filters, cuts)
    padded = F.pad(x.double(), (0, 0, size - 1, 0))
    plain = sum(padded[:, i : i + 23] * filters[:, 0, i].double() for i in range(size))
    assert isinstance(plain, Tensor)
    assert near(found, F.silu(plain), FP32)
    assert torch.equal(tail, x.transpose(1, 2)[:, :, 23 - (size - 1) :])


def test_short_conv_leaves_the_old_tail() -> None:
    tail = randn(1, 6, 3)
    kept = tail.clone()
    for length in (1, 5):
        _, new = OPS.short_conv(randn(1, length, 6, seed=1), dense(randn(6, 1, 4, seed=2)), tail)
        assert torch.equal(tail, kept)
        new.fill_(7)
        assert torch.equal(tail, kept)


# Rotary positions


@pytest.mark.parametrize("base", [10_000.0, 500_000.0])
def test_rope_is_exact_a_million_tokens_out(base: float) -> None:
    x, position = randn(3, 5, 3, 16), torch.tensor([10**6, 3, 2**24 + 1])  # the last is no fp32 number
    found = OPS.rope(x, position, base)
    for row in range(3):
        for t in range(5):
            angles = (int(position[row]) + t) * torch.tensor([base ** (-i / 8) for i in range(8)], dtype=torch.float64)
            z = torch.complex(x[row, t, :, :8].double(), x[row, t, :, 8:].double()) * torch.polar(
                torch.ones_like(angles), angles
            )
            assert near(found[row, t], torch.cat([z.real, z.imag], -1), FP32)


def test_rope_scores_depend_on_distance_only() -> None:
    q, k = randn(1, 1, 1, 16), randn(1, 1, 1, 16, seed=1)

    def score(i: int, j: int) -> float:
        return float((OPS.rope(q, torch.tensor([i]), 1e4) * OPS.rope(k, torch.tensor([j]), 1e4)).sum())

    assert score(10**6 + 7, 10**6) == pytest.approx(score(7, 0), abs=1e-5)
    assert abs(score(8, 0) - score(7, 0)) > 1e-3


# Window attention

Q_HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8


def naive_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Token by token in fp64: query head h reads key head h // 2, each token the last `window` tokens."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.zeros_like(q)
    for row in range(q.shape[0]):
        for t in range(q.shape[1]):
            first = max(0, t - window + 1)
            for head in range(Q_HEADS):
                kv = head // (Q_HEADS // KV_HEADS)
                scores = k[row, first : t + 1, kv] @ q[row, t, head] * HEAD_DIM**-0.5
                out[row, t, head] = scores.softmax(0) @ v[row, first : t + 1, kv]
    return out


def rings(batch: int, window: int) -> tuple[Tensor, Tensor]:
    shape = (batch, window, KV_HEADS, HEAD_DIM)
    return torch.zeros(shape), torch.zeros(shape)


def attend(qkv: tuple[Tensor, ...], window: int, cuts: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv
    ring_k, ring_v = rings(q.shape[0], window)
    outs = []
    for start, end in pairwise(cuts):
        position = torch.full((q.shape[0],), start)
        piece = slice(start, end)
        out, ring_k, ring_v = OPS.window_attention(q[:, piece], k[:, piece], v[:, piece], ring_k, ring_v, position)
        outs.append(out)
    return torch.cat(outs, 1), ring_k, ring_v


def make_qkv(batch: int, length: int, seed: int = 0) -> tuple[Tensor, ...]:
    return tuple(randn(batch, length, n, HEAD_DIM, seed=seed + i) for i, n in enumerate((Q_HEADS, KV_HEADS, KV_HEADS)))


def splits(length: int) -> list[list[int]]:
    ragged = sorted({0, length, *(t for t in (1, 2, 4, 5, 47, 48, 49, 51, 97) if t < length)})
    return [[0, length], list(range(length + 1)), ragged]


@pytest.mark.parametrize("window", [1, 3, 48])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 47, 48, 49, 100])
def test_window_attention(length: int, window: int) -> None:
    qkv = make_qkv(2, length)
    expected = naive_attention(*qkv, window)
    held = [[t for t in range(length) if t % window == slot][-1:] for slot in range(window)]
    for cuts in splits(length):
        out, ring_k, ring_v = attend(qkv, window, cuts)
        assert near(out, expected, ATTENTION)
        for ring, source in ((ring_k, qkv[1]), (ring_v, qkv[2])):
            for slot, token in enumerate(held):
                assert torch.equal(ring[:, slot], source[:, token[0]] if token else torch.zeros_like(ring[:, slot]))


@pytest.mark.parametrize("length", [1, 2, 5, 60])
def test_sequences_at_different_positions(length: int) -> None:
    window, seen = 48, (0, 7, 131)
    qkvs = [make_qkv(1, n + length, seed=10 * n) for n in seen]
    states = [
        attend(tuple(t[:, :n] for t in qkv), window, [0, n])[1:] if n else rings(1, window)
        for n, qkv in zip(seen, qkvs, strict=True)
    ]
    ring_k, ring_v = (torch.cat(parts) for parts in zip(*states, strict=True))
    new = [torch.cat([t[:, n:] for n, t in zip(seen, ts, strict=True)]) for ts in zip(*qkvs, strict=True)]
    out, *_ = OPS.window_attention(new[0], new[1], new[2], ring_k, ring_v, torch.tensor(seen))
    for row, (n, qkv) in enumerate(zip(seen, qkvs, strict=True)):
        assert near(out[row : row + 1], naive_attention(*qkv, window)[:, n:], ATTENTION)


def test_many_tokens_leave_the_old_ring() -> None:
    qkv = make_qkv(1, 10)
    ring_k, ring_v = attend(qkv, 4, [0, 10])[1:]
    kept = ring_k.clone(), ring_v.clone()
    OPS.window_attention(*make_qkv(1, 3, seed=5), ring_k, ring_v, torch.tensor([10]))
    assert torch.equal(ring_k, kept[0])
    assert torch.equal(ring_v, kept[1])


# One layer against fla's, whose output gate is a sigmoid


def golden(case: str) -> tuple[ModelSpec, Gdn2Layer, dict[str, Tensor]]:
    with safe_open(GOLDEN, "pt") as file:
        arguments = json.loads(file.metadata()[case])
        tensors = {name: file.get_tensor(name) for name in file.keys() if name.startswith(case)}
    heads = arguments["num_heads"]
    spec = spec_from_fields(
        {
            "vocab_size": 1,
            "hidden_size": arguments["hidden_size"],
            "intermediate_size": 1,
            "layer_types": ["gdn2"],
            "num_heads": heads,
            "num_v_heads": arguments["num_v_heads"] or heads,
            "head_k_dim": arguments["head_dim"],
            "head_v_dim": int(arguments["head_dim"] * arguments["expand_v"]),
            "conv_size": arguments["conv_size"],
            "norm_eps": arguments["norm_eps"],
            "output_gate": "sigmoid",
            "allow_neg_eigval": arguments["allow_neg_eigval"],
        },
        case,
    )

    def get(*names: str) -> Weight:
        return join("+".join(names), [Dense(name, tensors[f"{case}.weights.{name}"]) for name in names])

    unused = Dense("unused", torch.ones(1))
    layer = Gdn2Layer(
        norm=unused,
        in_proj=get(*(f"{name}.weight" for name in (*(f"{n}_proj" for n in "qkvbw"), "f_proj.0", "g_proj.0"))),
        conv=get(*(f"{name}_conv1d.weight" for name in "qkv")),
        f_proj=get("f_proj.1.weight"),
        g_proj=get("g_proj.1.weight"),
        g_bias=get("g_proj.1.bias"),
        A_log=get("A_log"),
        dt_bias=get("dt_bias"),
        o_norm=get("o_norm.weight"),
        o_proj=get("o_proj.weight"),
        mlp=Mlp(unused, unused, unused),
    )
    return spec, layer, {name: tensors[f"{case}.{name}"] for name in "xyS"}


def run_layer(spec: ModelSpec, layer: Gdn2Layer, x: Tensor, cuts: list[int]) -> tuple[Tensor, Tensor]:
    shapes = spec.state_shapes(len(x))
    state = Gdn2State(torch.zeros(shapes["layers.0.conv"]), torch.zeros(shapes["layers.0.S"]))
    pieces = []
    for start, end in pairwise(cuts):
        y, state = gdn2(OPS, spec, layer, x[:, start:end], state)
        pieces.append(y)
    return torch.cat(pieces, 1), state.S


@pytest.mark.parametrize("cuts", [[0, 96], [0, 1, 2, 35, 96], list(range(97))], ids=["whole", "split", "stepped"])
@pytest.mark.parametrize("case", ["plain", "grouped"])
def test_a_layer_meets_flas(case: str, cuts: list[int]) -> None:
    spec, layer, values = golden(case)
    y, S = run_layer(spec, layer, values["x"], cuts)
    for found, expected in ((y, values["y"]), (S, values["S"])):
        assert float((found - expected).abs().max() / expected.std()) < GOLDEN_TOLERANCE


def test_the_other_output_gate_is_far_away() -> None:
    spec, layer, values = golden("plain")
    y, _ = run_layer(spec.model_copy(update={"output_gate": "silu"}), layer, values["x"], [0, 96])
    assert float((y - values["y"]).abs().max() / values["y"].std()) > 0.1
