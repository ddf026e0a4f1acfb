"""The fused decode steps against the torch runtime: logits, tokens, states, and steps that were started too early.

Compiled and captured in graphs on a GPU, in Triton's interpreter elsewhere, which takes a tenth of a second a layer.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

pytest.importorskip("triton", reason="there is no triton for this system")

from gdn2_edge import triton_ops
from gdn2_edge.bench.random_weights import random_weights
from gdn2_edge.checkpoint.reader import open_checkpoint
from gdn2_edge.convert import convert_checkpoint
from gdn2_edge.errors import BackendError, SessionError
from gdn2_edge.generate.sampler import Sampler
from gdn2_edge.kernels.triton import sample as sampling_kernels
from gdn2_edge.model import Model, WeightReader, WeightSource
from gdn2_edge.sampling import Sampling
from gdn2_edge.state import State
from gdn2_edge.triton_model import Decoder, TritonModel, unsupported
from gdn2_edge.weights import Dense, Joined, Weight

GOLDEN = Path(__file__).parent / "golden"
GOLDEN_TOLERANCE = 5e-5  # as in test_model.py
# Largest difference over the standard deviation of the logits. Float weights: the order of fp32 sums. The others meet
# activations in fixed point, 2^-16 of the largest of 8.
FORMAT_TOLERANCE = {"fp32": 2e-5, "bf16": 2e-5, "fp8": 2e-5, "int8": 3e-4, "int4": 3e-4}
# Several sequences are bf16 rows in products on a GPU; in the interpreter they are fp32.
BATCH_TOLERANCE = 0.1 if torch.cuda.is_available() else 3e-4
TOLERANCE = 3e-4
# numpy's, in the interpreter: silu of -100 has an infinite exponential, and what is not finite is meant to go through.
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
    "output_gate": "silu",
}
WINDOW = 4
HYBRID = {
    **GDN2,
    "layer_types": ["gdn2", "sliding_attention"],
    "num_v_heads": 1,
    "output_gate": "sigmoid",
    "allow_neg_eigval": True,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "sliding_window": WINDOW,
    "rope_theta": 10000.0,
}
HISTORY = [3, 1, 4, 1, 5, 9]  # longer than the window


@pytest.fixture(scope="module")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


Make = Callable[..., TritonModel]


@pytest.fixture
def make(tmp_path: Path, device: torch.device) -> Make:
    """A `TritonModel` with random weights."""

    def make(fields: dict[str, Any] = HYBRID, format: str = "fp32") -> TritonModel:
        config = tmp_path / "config.json"
        config.write_text(json.dumps(fields))
        return fused(random_weights(str(config), format), device)

    return make


def fused(source: WeightSource, device: torch.device) -> TritonModel:
    weights = WeightReader(source, device, ready=lambda weight: weight).model()
    assert unsupported(source.spec, weights) == ""
    return TritonModel(source.spec, weights, device, torch.float32)


def exact(model: TritonModel) -> Model:
    """The torch runtime with the same weights' values, in fp32."""

    def dense(weight: Weight) -> Weight:
        return Dense(weight.name, weight.rows(slice(None)))

    weights = model.weights
    layers = tuple(
        replace(
            layer,
            **{name: dense(value) for name, value in vars(layer).items() if name != "mlp"},
            mlp=replace(layer.mlp, **{name: dense(value) for name, value in vars(layer.mlp).items()}),
        )
        for layer in weights.layers
    )
    plain = replace(
        weights, embed=dense(weights.embed), layers=layers, ln_f=dense(weights.ln_f), lm_head=dense(weights.lm_head)
    )
    return Model(model.spec, plain, model.device, torch.float32)


def ids(*tokens: int) -> Tensor:
    return torch.tensor(tokens)


def spread(found: Tensor, expected: Tensor) -> float:
    return float((found.cpu() - expected.cpu()).abs().max() / expected.std())


def logits_after(model: Model, tokens: list[int]) -> Tensor:
    """Logits [1, V] of the torch runtime after these tokens from the beginning."""
    plain = exact(model)
    return plain.prefill(torch.tensor([tokens]), plain.initial_state())[0]


# Logits


@pytest.mark.parametrize(("name", "tokens"), [("recurrent", 2), ("hybrid", 2)])
def test_steps_meet_the_golden(name: str, tokens: int, tmp_path: Path, device: torch.device) -> None:
    config = str(GOLDEN / "hybrid.json") if name == "hybrid" else None
    convert_checkpoint(GOLDEN / f"{name}-model-ckpt.pth", tmp_path / name, config=config)
    golden = load_file(GOLDEN / f"{name}-golden.safetensors")
    model = fused(open_checkpoint(tmp_path / name), device)
    tokens = golden["input_ids"].shape[1] if device.type == "cuda" else tokens
    state, found = model.initial_state(), []
    for token in golden["input_ids"][:1, :tokens].long().T:
        logits, state = model.step(token, state)
        found.append(logits)
    expected = golden["logits"][:1, :tokens]
    worst = (torch.stack(found, 1).cpu() - expected).abs().max() / golden["logits"].std()
    assert float(worst) < GOLDEN_TOLERANCE


@pytest.mark.parametrize("format", FORMAT_TOLERANCE)
def test_every_format_against_its_exact_values(format: str, make: Make) -> None:
    """After a prompt that fills the window."""
    model = make(HYBRID, format)
    plain = exact(model)
    _, state = plain.prefill(torch.tensor([HISTORY]), plain.initial_state())
    expected, after = plain.step(ids(2), plain.clone(state))
    found, ours = model.step(ids(2), state)
    assert spread(found, expected) < FORMAT_TOLERANCE[format]
    found_state = model.export_state(ours)
    for key, tensor in plain.export_state(after).items():
        torch.testing.assert_close(found_state[key], tensor, rtol=0, atol=10 * FORMAT_TOLERANCE[format])


@pytest.mark.parametrize(("fields", "programs"), [(HYBRID, 512), (GDN2, 1)], ids=["parts of heads", "whole heads"])
def test_three_sequences_are_each_their_own(
    fields: dict[str, Any], programs: int, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three rows of a step for four: as alone, within the rounding, and untouched by the others, bit for bit."""
    monkeypatch.setattr(triton_ops, "MIN_STATE_PROGRAMS", programs)
    model = make(fields, "int8")
    plain = exact(model)
    prompts = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3], [5, 8, 9, 7, 9]])
    _, state = plain.prefill(prompts, plain.initial_state(3))
    first, after = model.step(ids(7, 8, 9), model.clone(state))
    again, other = model.step(ids(7, 30, 9), model.clone(state))
    assert torch.equal(first[[0, 2]], again[[0, 2]])
    assert not torch.equal(first[1], again[1])
    for name, tensor in model.export_state(after).items():
        assert torch.equal(tensor[[0, 2]], model.export_state(other)[name][[0, 2]])
    expected, expected_state = plain.step(ids(7, 8, 9), state)
    assert spread(first, expected) < BATCH_TOLERANCE
    for name, tensor in plain.export_state(expected_state).items():
        torch.testing.assert_close(model.export_state(after)[name], tensor, rtol=0, atol=10 * BATCH_TOLERANCE)


# Chosen tokens


SAMPLINGS = {
    "greedy": Sampling(temperature=0),
    "greedy, penalised": Sampling(temperature=0, repetition_penalty=1.5, repetition_window=3),
    "sampled": Sampling(temperature=1.5, seed=7, repetition_penalty=1.2),
    "all tokens": Sampling(temperature=1.0, top_k=0, seed=3),  # which the GPU leaves to the host
}


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS.keys())
def test_the_tokens_of_the_sampler(sampling: Sampling, make: Make) -> None:
    model = make(GDN2)
    plain = exact(model)
    ours, theirs = Sampler(sampling), Sampler(sampling)
    state, expected_state = model.initial_state(), plain.initial_state()
    token = expected = ids(5)
    for _ in range(3):
        expected, expected_state = plain.generate_step(expected, expected_state, theirs)
        token, state = model.generate_step(token, state, ours)
        assert token.tolist() == expected.tolist()
        assert torch.equal(ours.recent, theirs.recent)
        assert state.position.tolist() == expected_state.position.tolist()


def test_tokens_of_three_sequences(make: Make) -> None:
    model = make(GDN2)
    sampling = Sampling(temperature=1.2, seed=11)
    ours, theirs = Sampler(sampling, 3), Sampler(sampling, 3)
    logits, expected_state = model.step(ids(5, 5, 40), model.initial_state(3))
    expected = theirs(logits.cpu(), expected_state.position)
    token, state = model.generate_step(ids(5, 5, 40), model.initial_state(3), ours)
    assert token.tolist() == expected.tolist()
    assert state.position.tolist() == [1, 1, 1]
    assert torch.equal(ours.recent, theirs.recent)


def test_tokens_of_sequences_at_different_positions(make: Make) -> None:
    """Each finds its own token on the host; states of prompts of 1, 5 and 3 tokens put together."""
    model = make()
    plain = exact(model)
    prompts = [[3], [1, 4, 1, 5, 9], [2, 6, 5]]
    states = [plain.prefill(torch.tensor([prompt]), plain.initial_state())[1] for prompt in prompts]
    exported = [plain.export_state(state) for state in states]
    together = {name: torch.cat([tensors[name] for tensors in exported]) for name in exported[0]}
    state, expected_state = model.import_state(together), plain.import_state(together)
    ours, theirs = (Sampler(Sampling(temperature=0, repetition_penalty=1.5), 3) for _ in range(2))
    token = expected = ids(7, 8, 9)
    for _ in range(4):
        token, state = model.generate_step(token, state, ours)
        expected, expected_state = plain.generate_step(expected, expected_state, theirs)
        assert token.tolist() == expected.tolist()
    assert state.position.tolist() == [5, 9, 7]


# Steps ahead


def begun(model: TritonModel) -> tuple[list[int], State[Tensor], Sampler]:
    """After one step with a step ahead that fits: the tokens fed, the next one last; their state; the sampler."""
    _, state = model.prefill(torch.tensor([HISTORY]), model.initial_state())
    sampler = Sampler(SAMPLINGS["sampled"])
    token, state = model.generate_step(ids(2), state, sampler)
    return [*HISTORY, 2, int(token)], state, sampler


def test_as_expected_ahead(make: Make) -> None:
    """The step that was started is the one asked for, twice over; a state that was cloned before stays its own."""
    model = make()
    fed, state, sampler = begun(model)
    kept, kept_sampler = model.clone(state), Sampler(sampler.sampling, recent=sampler.recent)
    tokens = []
    for _ in range(2):
        token, state = model.generate_step(ids(fed[-1] if not tokens else tokens[-1]), state, sampler)
        tokens.append(int(token))
    logits, _ = model.step(ids(tokens[-1]), state)
    assert spread(logits, logits_after(model, [*fed, *tokens])) < TOLERANCE
    again, _ = model.generate_step(ids(fed[-1]), kept, kept_sampler)
    assert int(again) == tokens[0]


def test_another_token_than_expected(make: Make) -> None:
    model = make()
    fed, state, sampler = begun(model)
    other = (fed[-1] + 1) % 48
    _, state = model.generate_step(ids(other), state, sampler)
    logits, _ = model.step(ids(7), state)
    assert spread(logits, logits_after(model, [*fed[:-1], other, 7])) < TOLERANCE


def test_another_sampling_than_expected(make: Make) -> None:
    model = make()
    fed, state, _ = begun(model)
    token, _ = model.generate_step(ids(fed[-1]), state, Sampler(Sampling(temperature=0)))
    assert int(token) == int(logits_after(model, fed).argmax())


def test_another_state_than_expected(make: Make) -> None:
    model = make()
    fed, _, sampler = begun(model)
    _, other = model.prefill(torch.tensor([[8, 8]]), model.initial_state())
    _, other = model.generate_step(ids(fed[-1]), other, sampler)
    logits, _ = model.step(ids(7), other)
    assert spread(logits, logits_after(model, [8, 8, fed[-1], 7])) < TOLERANCE


@pytest.mark.parametrize("clone", [False, True], ids=["itself", "a clone"])
def test_a_prompt_after_a_step_ahead(clone: bool, make: Make) -> None:
    """What the abandoned step wrote, in the ring too, was of no more use."""
    model = make()
    fed, state, _ = begun(model)
    state = model.clone(state) if clone else state
    logits, state = model.prefill(torch.tensor([[7, 8]]), state)
    assert spread(logits, logits_after(model, [*fed[:-1], 7, 8])) < TOLERANCE
    logits, _ = model.step(ids(9), state)
    assert spread(logits, logits_after(model, [*fed[:-1], 7, 8, 9])) < TOLERANCE


# States


def test_a_state_goes_to_the_torch_runtime_and_back(make: Make) -> None:
    model = make(HYBRID, "int8")
    plain = exact(model)
    fed, state, _ = begun(model)
    exported = model.export_state(state)
    assert {name: tuple(tensor.shape) for name, tensor in exported.items()} == model.spec.state_shapes(1)
    assert all(tensor.device.type == "cpu" for tensor in exported.values())
    imported = model.import_state(exported)
    exported_again = model.export_state(imported)
    assert all(torch.equal(tensor, exported_again[name]) for name, tensor in exported.items())
    expected = logits_after(model, [*fed[:-1], 7])
    assert spread(plain.step(ids(7), plain.import_state(exported))[0], expected) < TOLERANCE
    assert spread(model.step(ids(7), imported)[0], expected) < TOLERANCE
    del exported["layers.0.S"]
    with pytest.raises(SessionError, match=r"layers\.0\.S is missing"):
        model.import_state(exported)


def test_a_clone_is_independent(make: Make) -> None:
    model = make()
    fed, state, _ = begun(model)
    clone = model.clone(state)
    before = model.export_state(clone)
    _, state = model.step(ids(1), state)
    after = model.export_state(clone)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert spread(model.step(ids(7), clone)[0], logits_after(model, [*fed[:-1], 7])) < TOLERANCE


def test_a_step_leaves_the_state_before_it_whole(make: Make) -> None:
    """The same step again gives the same bits; in a ring it writes over what has just left the window."""
    model = make(HYBRID)
    _, state = model.prefill(torch.tensor([HISTORY]), model.initial_state())
    first, _ = model.step(ids(4), state)
    again, _ = model.step(ids(4), state)
    assert torch.equal(first, again)


@pytest.mark.parametrize("spec", [GDN2, HYBRID], ids=["gdn2", "hybrid"])
@pytest.mark.parametrize("which", [1, 2], ids=["the first step", "the one that was ahead"])
def test_a_failed_wait_leaves_the_state_before_it_whole(
    which: int, spec: dict[str, Any], make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rings too, where the step ahead has written over what the failed one needs."""
    model = make(spec)
    sampler = Sampler(SAMPLINGS["sampled"])
    _, state = model.prefill(torch.tensor([HISTORY]), model.initial_state())
    token = ids(3)
    if which == 2:
        token, state = model.generate_step(token, state, sampler)
    recent = sampler.recent.clone()

    def fail(*_: object) -> Tensor:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "wait", fail)
        with pytest.raises(KeyboardInterrupt):
            model.generate_step(token, state, sampler)
    assert torch.equal(sampler.recent, recent)
    fed = [*HISTORY, 3] if which == 1 else [*HISTORY, 3, int(token)]
    exact_logits = logits_after(model, fed)
    assert spread(model.step(token, model.clone(state))[0], exact_logits) < TOLERANCE
    expected = Sampler(sampler.sampling, recent=recent)(exact_logits.cpu(), torch.tensor([len(fed)]))
    chosen, _ = model.generate_step(token, state, sampler)
    assert chosen.tolist() == expected.tolist()


def test_logits_that_are_not_finite(make: Make) -> None:
    """An error in one sentence; the model and every other state go on."""
    model = make(GDN2)
    _, good = model.step(ids(3), model.initial_state())
    bad = model.clone(good)
    with torch.inference_mode():
        bad.named()["layers.0.S"].fill_(torch.nan)
    with pytest.raises(BackendError, match="not finite"):
        model.generate_step(ids(4), bad, Sampler(Sampling(temperature=0)))
    token, _ = model.generate_step(ids(4), good, Sampler(Sampling(temperature=0)))
    assert int(token) == int(logits_after(model, [3, 4]).argmax())


# What is refused


def test_tokens_outside_the_vocabulary(make: Make) -> None:
    model = make(GDN2)
    sampler = Sampler(Sampling(temperature=0))
    for tokens in (ids(-1), ids(48)):
        with pytest.raises(BackendError, match="outside the vocabulary"):
            model.step(tokens, model.initial_state())
        with pytest.raises(BackendError, match="outside the vocabulary"):
            model.generate_step(tokens, model.initial_state(), sampler)
    with pytest.raises(BackendError, match="state is of 2 sequences"):
        model.step(ids(1), model.initial_state(2))
    with pytest.raises(BackendError, match=r"expected int64 \[B, T\]"):
        model.forward(torch.tensor(3))


@pytest.mark.parametrize(
    ("fields", "format", "why"),
    [
        ({**GDN2, "head_v_dim": 12, "hidden_size": 48}, "fp32", "head_v_dim is 12"),
        ({**GDN2, "intermediate_size": 72}, "int8", "layers.0.w3.weight has 72 inputs, expected a multiple of 16"),
        ({**GDN2, "hidden_size": 36}, "fp32", "hidden_size 36"),
        (GDN2, "int4", ""),
        (HYBRID, "fp8", ""),
    ],
)
def test_what_fused_steps_cannot_do(fields: dict[str, Any], format: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(fields))
    source = random_weights(str(tmp_path / "config.json"), format)
    weights = WeightReader(source, torch.device("cpu"), ready=lambda weight: weight).model()
    assert unsupported(source.spec, weights).startswith(why)
    assert bool(why) == bool(unsupported(source.spec, weights))


def test_joined_rows_of_several_formats(tmp_path: Path) -> None:
    """In a projection that stores its results they are several products; elsewhere they are refused."""
    (tmp_path / "config.json").write_text(json.dumps(GDN2))
    source = random_weights(str(tmp_path / "config.json"), "int4")
    weights = WeightReader(source, torch.device("cpu"), ready=lambda weight: weight).model()
    layer = weights.layers[0]
    assert isinstance(layer.in_proj, Joined)
    assert unsupported(source.spec, weights) == ""
    parts = replace(layer, mlp=replace(layer.mlp, w12=Joined("w12", (layer.mlp.w12, layer.mlp.w12))))
    assert "w12 has parts of several formats" in unsupported(source.spec, replace(weights, layers=(parts,)))


def test_the_default_sampling_is_done_on_the_device() -> None:
    s = Sampling()
    assert sampling_kernels.fits(32_000, s.top_k, s.temperature, s.repetition_penalty, s.repetition_window)
