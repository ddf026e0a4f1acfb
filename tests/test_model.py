"""The torch runtime against goldens of the published implementation and of fla, and its own laws."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from gdn2_edge.convert import convert_checkpoint
from gdn2_edge.errors import BackendError, SessionError
from gdn2_edge.loading import load
from gdn2_edge.model import Model, load_model
from gdn2_edge.state import State
from gdn2_edge.torch_ops import TorchOps

GOLDEN = Path(__file__).parent / "golden"
# Largest difference over the golden's standard deviation. A plain fp64 reading of the equations is at 1.4e-5, the
# distance of the golden's own fp32 kernels; fp32 code adds about as much again.
GOLDEN_TOLERANCE = 5e-5
# bf16 weights of a trained model, fp32 activations; only the order of sums differs.
SPLIT_TOLERANCE = 2e-5


def spread(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.std())


@pytest.fixture(scope="module", params=["recurrent", "hybrid"])
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("golden") / request.param
    config = str(GOLDEN / "hybrid.json") if request.param == "hybrid" else None
    convert_checkpoint(GOLDEN / f"{request.param}-model-ckpt.pth", folder, config=config)
    values = load_file(GOLDEN / f"{request.param}-golden.safetensors")
    return load_model(folder, "cpu", torch.float32), values


def run_split(model: Model, ids: Tensor, cuts: list[int]) -> tuple[Tensor, State[Tensor]]:
    state, logits = None, []
    for start, end in pairwise(cuts):
        piece, state = model.forward(ids[:, start:end], state)
        logits.append(piece)
    assert state is not None
    return torch.cat(logits, 1), state


CUTS = {
    "whole": [0, 192],
    "in two": [0, 100, 192],
    "anywhere": [0, 1, 2, 7, 60, 61, 130, 192],
    "around the window": [0, 47, 48, 49, 96, 191, 192],
    "token by token": list(range(193)),
}


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS.keys())
def test_logits_meet_the_golden(golden: Any, cuts: list[int]) -> None:
    model, values = golden
    logits, _ = run_split(model, values["input_ids"].long(), cuts)
    assert logits.dtype == torch.float32
    assert spread(logits, values["logits"]) < GOLDEN_TOLERANCE


class Tap(TorchOps):
    """Keeps what each block gives out."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks: list[Tensor] = []

    def block(self, *args: Any) -> Any:
        x, state = super().block(*args)
        self.blocks.append(x)
        return x, state


def test_every_block_meets_the_golden(golden: Any) -> None:
    model, values = golden
    tap, ops = Tap(), model.ops
    model.ops = tap
    try:
        model.forward(values["input_ids"].long())
    finally:
        model.ops = ops
    expected = [values[f"block.{i}"] for i in range(model.spec.num_layers)]
    assert len(tap.blocks) == len(expected)
    for found, block in zip(tap.blocks, expected, strict=True):
        assert spread(found[0, : block.shape[0]], block) < GOLDEN_TOLERANCE


def test_prefill_and_step_are_forward(golden: Any) -> None:
    model, values = golden
    ids = values["input_ids"].long()
    logits, state = model.forward(ids[:, :70])
    last, prefilled = model.prefill(ids[:, :70], model.initial_state(2))
    assert spread(last, logits[:, -1]) < SPLIT_TOLERANCE
    for name, tensor in state.named().items():
        assert torch.equal(tensor, prefilled.named()[name]), name
    stepped, _ = model.step(ids[:, 70], prefilled)
    whole, _ = model.forward(ids[:, :71])
    assert spread(stepped, whole[:, -1]) < GOLDEN_TOLERANCE


def test_a_row_does_not_depend_on_the_others(golden: Any) -> None:
    model, values = golden
    ids = values["input_ids"].long()
    both, _ = model.forward(ids)
    for row in (0, 1):
        alone, _ = model.forward(ids[row : row + 1])
        assert spread(alone, both[row : row + 1]) < SPLIT_TOLERANCE


def test_state_has_the_same_size_at_any_length(golden: Any) -> None:
    model, values = golden
    ids = values["input_ids"].long()
    _, short = model.forward(ids[:, :1])
    _, long = model.forward(ids.repeat(1, 12))
    shapes = {name: tuple(t.shape) for name, t in short.named().items()}
    assert shapes == model.spec.state_shapes(2) == {name: tuple(t.shape) for name, t in long.named().items()}
    assert long.position.tolist() == [12 * 192] * 2


def test_a_failed_step_leaves_the_state_as_it_was(golden: Any) -> None:
    model, values = golden
    ids = values["input_ids"].long()

    class Failing(TorchOps):
        calls = 0

        def linear(self, *args: Any) -> Any:
            self.calls += 1
            if self.calls == 9:
                raise KeyboardInterrupt
            return super().linear(*args)

    _, state = model.prefill(ids[:, :60], model.initial_state(2))
    expected, _ = model.step(ids[:, 60], model.clone(state))
    ops, model.ops = model.ops, Failing()
    try:
        with pytest.raises(KeyboardInterrupt):
            model.step(ids[:, 60], state)
    finally:
        model.ops = ops
    found, _ = model.step(ids[:, 60], state)
    assert torch.equal(found, expected)


def test_clone_is_independent(golden: Any) -> None:
    model, values = golden
    ids = values["input_ids"].long()
    _, state = model.prefill(ids[:, :60], model.initial_state(2))
    twin = model.clone(state)
    kept = {name: t.clone() for name, t in twin.named().items()}
    model.step(ids[:, 60], state)
    assert all(torch.equal(t, kept[name]) for name, t in twin.named().items())


def test_state_travels_as_named_tensors(golden: Any) -> None:
    model, values = golden
    _, state = model.prefill(values["input_ids"].long()[:, :50], model.initial_state(2))
    tensors = model.export_state(state)
    again = model.import_state(tensors)
    assert all(torch.equal(t, tensors[name]) for name, t in again.named().items())
    tensors["layers.0.S"] = tensors["layers.0.S"][:, :1]
    with pytest.raises(SessionError, match=r"layers\.0\.S is"):
        model.import_state(tensors)


def test_what_is_no_state_is_refused(golden: Any) -> None:
    model, _ = golden
    ids, good = torch.tensor([[1]]), model.initial_state()
    for bad, message in (
        ({}, "the state is a dict, expected a State"),
        (good.named(), "the state is a dict"),
        (
            State(torch.tensor(0), good.layers),
            r"position is \(\) torch.int64, expected a State whose position is int64",
        ),
        (State(torch.zeros(1), good.layers), r"position is \(1,\) torch.float32"),
        (State(0, good.layers), "position is a int"),
    ):
        for call in (
            lambda state: model.forward(ids, state),
            lambda state: model.prefill(ids, state),
            lambda state: model.step(ids[0], state),
            model.clone,
            model.export_state,
        ):
            with pytest.raises(SessionError, match=message):
                call(bad)


def test_bf16_activations_are_near(golden: Any) -> None:
    # bf16 has 8 bits: each product is off by up to 2^-9, and 3 to 4 layers of them add up to a few percent.
    model, values = golden
    low = Model(model.spec, model.weights, torch.device("cpu"), torch.bfloat16)
    logits, _ = low.forward(values["input_ids"].long())
    assert 1e-4 < spread(logits, values["logits"]) < 0.2


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.tensor([[320]]), "outside the vocabulary"),
        (torch.tensor([[-1]]), "outside the vocabulary"),
        (torch.tensor([1]), "expected int64"),
        (torch.zeros(1, 0, dtype=torch.int64), "both at least 1"),
        (torch.zeros(1, 1), "expected int64"),
        (torch.zeros(0, 1, dtype=torch.int64), "both at least 1"),
    ],
)
def test_bad_tokens_are_refused(golden: Any, tokens: Tensor, message: str) -> None:
    with pytest.raises(BackendError, match=message):
        golden[0].forward(tokens)


def test_a_state_of_another_batch_is_refused(golden: Any) -> None:
    model, _ = golden
    with pytest.raises(BackendError, match="the state is of 2 sequences, the tokens are of 1"):
        model.step(torch.tensor([1]), model.initial_state(2))


def test_devices_and_runtimes_that_are_not_here() -> None:
    with pytest.raises(BackendError, match="unknown, expected auto, cpu"):
        load("tiny", device="toaster")
    with pytest.raises(BackendError, match=r"it needs a GPU, and the device is cpu\. Use another dtype"):
        load("tiny", "cpu", torch.float8_e4m3fn)
    with pytest.raises(BackendError, match="fp8 activations are for the triton runtime"):
        load("tiny", "cpu", torch.float8_e4m3fn, "torch")
    with pytest.raises(BackendError, match="not supported"):
        load("tiny", device="meta")
    with pytest.raises(BackendError, match="sees"):
        load("tiny", device="cuda:99")
    with pytest.raises(BackendError, match="runtime 'warp'"):
        load("tiny", runtime="warp")
    with pytest.raises(BackendError, match=r"dtype is torch\.int8"):
        load("tiny", dtype=torch.int8)
