"""Prompts through Triton kernels against the verbs of torch: layers, goldens, pieces.

Compiled on a GPU, in Triton's interpreter elsewhere.
"""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

pytest.importorskip("triton", reason="there is no triton for this system")

from gdn2_edge import triton_model, triton_prompts
from gdn2_edge.bench.random_weights import random_weights
from gdn2_edge.checkpoint.reader import open_checkpoint
from gdn2_edge.convert import convert_checkpoint
from gdn2_edge.forward import block
from gdn2_edge.model import WeightReader, WeightSource
from gdn2_edge.state import LayerState, initial_state
from gdn2_edge.torch_ops import TorchOps
from gdn2_edge.triton_model import TritonModel

GOLDEN = Path(__file__).parent / "golden"
GOLDEN_TOLERANCE = 5e-5  # as in test_model.py
# Norm of the difference over that of the values: fp32 in another order; bf16 rounded in other places, and by the
# interpreter towards zero.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 0.02}
PIECES_TOLERANCE = 1e-5  # fp32 in another order, of norms too
pytestmark = pytest.mark.filterwarnings("ignore:.*(overflow|invalid value|slice) encountered:RuntimeWarning")

GDN2 = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 64,
    "layer_types": ["gdn2"],
    "num_heads": 1,
    "num_v_heads": 2,
    "head_k_dim": 16,
    "head_v_dim": 32,
    "conv_size": 2,
    "output_gate": "silu",
}
HYBRID = {
    **GDN2,
    "layer_types": ["gdn2", "sliding_attention"],
    "num_heads": 2,
    "conv_size": 4,
    "output_gate": "sigmoid",
    "allow_neg_eigval": True,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "sliding_window": 4,
    "rope_theta": 10000.0,
}


@pytest.fixture(scope="module")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fused(source: WeightSource, dtype: torch.dtype, device: torch.device) -> TritonModel:
    weights = WeightReader(source, device, ready=lambda weight: weight).model()
    return TritonModel(source.spec, weights, device, dtype)


def random_model(
    folder: Path, fields: dict[str, Any], format: str, dtype: torch.dtype, device: torch.device
) -> TritonModel:
    (folder / "config.json").write_text(json.dumps(fields))
    return fused(random_weights(str(folder / "config.json"), format), dtype, device)


def distance(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def random_state(state: LayerState[Tensor], seed: int) -> LayerState[Tensor]:
    random = torch.Generator().manual_seed(seed)
    return replace(
        state,
        **{name: torch.randn(t.shape, generator=random).to(t.device) for name, t in vars(state).items()},
    )


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(
    ("fields", "format", "batch", "tokens"),
    [
        (GDN2, "fp32", 1, 5),
        (GDN2, "bf16", 2, 1),
        (HYBRID, "bf16", 2, 6),
        (GDN2, "int8", 1, 66),  # expanded weights, the rule in chunks
        (HYBRID, "int4", 1, 18),
    ],
    ids=lambda value: "" if isinstance(value, dict) else str(value),
)
def test_layers_against_the_verbs(
    fields: dict[str, Any],
    format: str,
    batch: int,
    tokens: int,
    dtype: torch.dtype,
    tmp_path: Path,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(triton_prompts, "FEW_ROWS", 16)
    model = random_model(tmp_path, fields, format, dtype, device)
    position = torch.full((batch,), 11, device=device)
    state = initial_state(model.spec, batch, device)
    for i, (layer, fresh) in enumerate(zip(model.weights.layers, state.layers, strict=True)):
        layer_state = random_state(fresh, seed=i)
        x = torch.randn(batch, tokens, 32, generator=torch.Generator().manual_seed(9 + i)).to(device)
        kept = x.clone(), {name: t.clone() for name, t in vars(layer_state).items()}
        found, new = model.ops.block(block, model.spec, layer, x, layer_state, position)
        assert torch.equal(x, kept[0])
        if fields["layer_types"][i] == "gdn2":
            assert all(torch.equal(t, kept[1][name]) for name, t in vars(layer_state).items())
        given = replace(layer_state, **kept[1])
        expected, expected_new = block(TorchOps(dtype), model.spec, layer, x, given, position)
        assert found.dtype == torch.float32
        assert distance(found, expected) < TOLERANCES[dtype]
        for name, tensor in vars(expected_new).items():
            assert distance(getattr(new, name), tensor) < TOLERANCES[dtype], name


@pytest.mark.parametrize("name", ["recurrent", "hybrid"])
def test_golden_in_pieces(name: str, tmp_path: Path, device: torch.device) -> None:
    config = str(GOLDEN / "hybrid.json") if name == "hybrid" else None
    convert_checkpoint(GOLDEN / f"{name}-model-ckpt.pth", tmp_path / name, config=config)
    golden = load_file(GOLDEN / f"{name}-golden.safetensors")
    model = fused(open_checkpoint(tmp_path / name), torch.float32, device)
    # A sequence takes ten seconds in the interpreter.
    ids = golden["input_ids"].long() if device.type == "cuda" else golden["input_ids"][:1].long()
    cuts = [[0, 192], [0, 70, 71, 130, 192]] if device.type == "cuda" else [[0, 3, 68]]
    for places in cuts:
        state, pieces = None, []
        for start, end in pairwise(places):
            logits, state = model.forward(ids[:, start:end], state)
            pieces.append(logits.cpu())
        expected = golden["logits"][: len(ids), : places[-1]]
        worst = (torch.cat(pieces, 1) - expected).abs().max() / golden["logits"].std()
        assert float(worst) < GOLDEN_TOLERANCE


@pytest.mark.parametrize("lengths", [[2, 16, 3], [19]], ids=str)
def test_filled_up_pieces(
    lengths: list[int], tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits and states after prompts that fill no captured piece, one after the other, and after a step."""
    monkeypatch.setattr(triton_model, "CAPTURED_TOKENS", (4, 16))
    model = random_model(tmp_path, {**GDN2, "conv_size": 4}, "fp32", torch.float32, device)
    ids = torch.randint(0, 48, (1, sum(lengths) + 1), generator=torch.Generator().manual_seed(3))
    for _ in range(2 if device.type == "cuda" else 1):  # the second time from graphs
        state = model.initial_state()
        first = state
        for piece in ids[:, :-1].split(lengths, 1):
            before, logits, state = state, *model.prefill(piece, state)
        assert state.position.tolist() == [sum(lengths)]
        expected, expected_state = model.forward(ids[:, :-1], model.initial_state())
        assert distance(logits, expected[:, -1]) < PIECES_TOLERANCE
        for layer, expected_layer in zip(state.layers, expected_state.layers, strict=True):
            for name, tensor in vars(expected_layer).items():
                assert distance(getattr(layer, name), tensor) < PIECES_TOLERANCE, name
        again, _ = model.prefill(ids[:, sum(lengths[:-1]) : -1], before)
        assert distance(again, logits) < PIECES_TOLERANCE
        logits, _ = model.step(ids[:, -1], state)
        assert distance(logits, model.forward(ids)[0][:, -1]) < PIECES_TOLERANCE
        assert all((layer.S == 0).all() for layer in first.layers)


def test_long_prompts_are_launched_in_pieces(
    tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"CAPTURED_TOKENS": (4, 16), "PIECE_TOKENS": 16, "LAUNCHED_MIN_TOKENS": 8}.items():
        monkeypatch.setattr(triton_model, name, value)
    model = random_model(tmp_path, GDN2, "fp32", torch.float32, device)
    ids = torch.randint(0, 48, (1, 44), generator=torch.Generator().manual_seed(3))
    expected, _ = model.forward(ids)
    for tokens in (35, 44):
        logits, _ = model.prefill(ids[:, :tokens], model.initial_state())
        assert distance(logits, expected[:, tokens - 1]) < PIECES_TOLERANCE
