"""Measuring: nothing is timed that computes something else, and the bytes are those of the files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gdn2_edge.bench import bench, machine, measure_decode
from gdn2_edge.bench.correctness import EXACT_TOLERANCE, ROUNDED_TOLERANCE, check, plain_logits, random_ids
from gdn2_edge.bench.random_weights import RandomWeights, random_weights
from gdn2_edge.bench.traffic import traffic
from gdn2_edge.checkpoint.reader import open_checkpoint
from gdn2_edge.checkpoint.summary import summarize
from gdn2_edge.errors import BackendError, FormatError, SpecError
from gdn2_edge.model import Model, load_model
from gdn2_edge.state import State
from gdn2_edge.weights import Dense

CPU = torch.device("cpu")
CONFIG = Path(__file__).parent / "bench.json"
FORMATS = ("bf16", "fp32", "int8", "fp8", "int4")


def hybrid(format: str, seed: int = 0) -> RandomWeights:
    return random_weights(str(CONFIG), format, 32 if format == "int4" else None, seed)


@pytest.fixture(autouse=True)
def _small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "CPU_READ_BYTES", 1 << 20)


@pytest.mark.parametrize("format", FORMATS)
def test_random_weights_are_a_model_that_passes(format: str) -> None:
    source = hybrid(format)
    model = load_model(source, "cpu", torch.float32)
    logits, _ = model.forward(random_ids(source.spec.vocab_size, 1, 200))
    assert 0.5 < float(logits.std()) < 2
    found = check(model, source, CPU)
    assert found.tolerance == (ROUNDED_TOLERANCE if format in ("int8", "int4") else EXACT_TOLERANCE)
    assert max(found.prefill_error, found.step_error) <= found.tolerance


@pytest.mark.parametrize("format", FORMATS)
def test_random_weights_hold_what_they_say(format: str) -> None:
    source = hybrid(format)
    for name, shape in source.spec.tensor_shapes().items():
        weight, stored = source.weight(name), source.stored(name)
        assert weight.shape == shape
        tensors = weight.tensors()
        assert {k: (t.dtype, tuple(t.shape)) for k, t in tensors.items()} == {
            k: (info.dtype, info.shape) for k, info in stored.items()
        }
    name = "layers.0.q_proj.weight"
    assert torch.equal(source.weight(name).rows(slice(None)), source.weight(name).rows(slice(None)))
    assert not torch.equal(source.weight(name).rows(slice(None)), hybrid(format, 1).weight(name).rows(slice(None)))


def test_random_weights_refuse_what_they_cannot_be() -> None:
    with pytest.raises(FormatError, match="int3"):
        random_weights("gdn2_1.3B", "int3")
    with pytest.raises(FormatError, match="group size"):
        random_weights("gdn2_1.3B", "int8", 32)
    with pytest.raises(FormatError, match="33"):
        random_weights("gdn2_1.3B", "int4", 33)
    with pytest.raises(SpecError, match="vocab_size is missing"):
        random_weights("gdn2_12h_100M")


def test_plain_path_of_the_default_model(tiny: Model) -> None:
    ids = random_ids(tiny.spec.vocab_size, 2, 9)
    expected, _ = tiny.forward(ids)
    found = plain_logits(open_checkpoint(tiny.path), ids, CPU)
    assert float((found - expected).norm() / expected.norm()) < EXACT_TOLERANCE


class WrongSteps(Model):
    """Right in one prefill, wrong in steps: the state loses something between calls."""

    def step(self, token: Tensor, state: State[Tensor]) -> tuple[Tensor, State[Tensor]]:
        if int(state.position) == 20:
            state = self.initial_state()
        return super().step(token, state)


class Forgetful(Model):
    """Other ids at each call."""

    calls = 0

    def generate_step(self, token: Tensor, state: State[Tensor], sampling: Any) -> tuple[Tensor, State[Tensor]]:
        self.calls += 1
        token, state = super().generate_step(token, state, sampling)
        return token + (self.calls == 40), state


class NotANumber(Model):
    def step(self, token: Tensor, state: State[Tensor]) -> tuple[Tensor, State[Tensor]]:
        logits, state = super().step(token, state)
        return logits * torch.nan, state


@pytest.mark.parametrize(
    ("kind", "message"),
    [(WrongSteps, "logits by steps are off"), (NotANumber, "by steps are off by nan"), (Forgetful, "other ids")],
)
def test_a_broken_runtime_gets_no_numbers(
    kind: type[Model], message: str, tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = kind(tiny.spec, tiny.weights, tiny.device, torch.float32)
    monkeypatch.setattr("gdn2_edge.bench.load", lambda *_: broken)
    with pytest.raises(BackendError, match=message):
        bench(tiny.path, "cpu", tokens=10, prompt_tokens=[8])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_damaged_weight_gets_no_numbers(dtype: torch.dtype) -> None:
    source = hybrid("bf16")
    model = load_model(source, "cpu", dtype)
    check(model, source, CPU)
    layer = model.weights.layers[2]
    assert isinstance(layer.mlp.w3, Dense)
    mlp = replace(layer.mlp, w3=Dense("w3", layer.mlp.w3.data.roll(1, 1)))
    layers = (*model.weights.layers[:2], replace(layer, mlp=mlp), *model.weights.layers[3:])
    model.weights = replace(model.weights, layers=layers)
    with pytest.raises(BackendError, match="nothing was timed"):
        check(model, source, CPU)


def test_bytes_per_token(tiny: Model) -> None:
    checkpoint = open_checkpoint(tiny.path)
    summary = summarize(checkpoint)
    moved = traffic(checkpoint, position=7)
    assert moved.total == summary.bytes_per_token - 2 * 8  # the position itself is not counted
    assert moved.state == 2 * (summary.state_bytes - 8)
    assert traffic(checkpoint, 7, 3).state == 3 * moved.state
    source = hybrid("bf16")
    slot = 2 * 2 * 2 * 16 * 4  # two layers, keys and values, two heads of 16, fp32
    assert traffic(source, 0).kv == slot
    assert traffic(source, 10).kv == 11 * slot
    assert traffic(source, 10_000).kv == 49 * slot


def test_report() -> None:
    stages: list[str] = []
    report = bench(hybrid("int8"), "cpu", tokens=10, prompt_tokens=[8, 70], batch=3, progress=stages.append)
    assert stages[:3] == ["loading", "checking", "decoding 10 tokens"]
    assert report.decode.sequences == 1
    assert report.batch is not None
    assert report.batch.sequences == 3
    assert [p.tokens for p in report.prefill] == [8, 70]
    times = report.decode.milliseconds_per_token
    assert 0 < times.p20 <= times.median <= times.p80
    band = report.bandwidth
    assert band.gigabytes_per_second == pytest.approx(band.bytes_per_token.total / times.median / 1e6)
    assert band.share_of_read_rate == pytest.approx(band.gigabytes_per_second / band.read_gigabytes_per_second)
    assert report.model == f"random {CONFIG} int8"
    assert report.to_json()["decode"]["milliseconds_per_token"]["median"] == times.median


def test_what_a_runtime_says_of_itself_is_reported(tiny: Model) -> None:
    class Counted(Model):
        launches_per_token = 92

        def graph_milliseconds(self, tokens: int) -> float:
            return 0.5 if tokens == 10 else 0.0

    counted = Counted(tiny.spec, tiny.weights, tiny.device, torch.float32)
    decode = measure_decode(counted, 10)
    assert (decode.launches_per_token, decode.graph_milliseconds) == (92, 0.5)
    assert measure_decode(tiny, 10).launches_per_token is None


def test_decoding_starts_behind_its_context() -> None:
    model = load_model(hybrid("bf16"), "cpu")
    positions = [measure_decode(model, 3, context).first_position for context in (1, 50)]
    assert positions[1] - positions[0] == 49
    report = bench(hybrid("bf16"), "cpu", tokens=3, prompt_tokens=[2], context=50, batch=2)
    assert report.batch is not None
    assert report.batch.first_position == report.decode.first_position > 50


@pytest.mark.gpu
@pytest.mark.parametrize("format", ["bf16", "int8"])
def test_report_on_a_gpu(format: str) -> None:
    source = random_weights(str(CONFIG), format, device="cuda")
    report = bench(source, "cuda", tokens=20, prompt_tokens=[64])
    assert report.bandwidth.read_gigabytes_per_second > 100
    assert report.memory_bytes
