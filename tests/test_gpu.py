"""On an NVIDIA GPU: goldens, stored formats and sessions in plain torch; fused steps that neither drift nor vary."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gdn2_edge.convert import convert_checkpoint
from gdn2_edge.generate.session import Session
from gdn2_edge.loading import MODEL_NAMES, load
from gdn2_edge.model import Model, load_model
from gdn2_edge.quantize import quantize_checkpoint
from gdn2_edge.quantize.recipe import Recipe
from gdn2_edge.sampling import Sampling
from gdn2_edge.state import Gdn2State

pytest.importorskip("triton", reason="there is no triton for this system")

from gdn2_edge.triton_model import TritonModel

pytestmark = pytest.mark.gpu
GOLDEN = Path(__file__).parent / "golden"
GOLDEN_TOLERANCE = 5e-5  # as in test_model.py
# int8 and int4 products on a CPU round activations to 16-bit fixed point and to bf16; a GPU's are exact here.
FORMAT_TOLERANCE = {"int8": 5e-3, "fp8": 5e-5, "int4": 0.3}
DRIFT_TOLERANCE = 2e-3  # of the spread; the reference itself sums in another order


@pytest.mark.parametrize("name", ["recurrent", "hybrid"])
def test_goldens_on_a_gpu(name: str, tmp_path: Path) -> None:
    config = str(GOLDEN / "hybrid.json") if name == "hybrid" else None
    convert_checkpoint(GOLDEN / f"{name}-model-ckpt.pth", tmp_path / name, config=config)
    golden = load_file(GOLDEN / f"{name}-golden.safetensors")
    ids, expected = golden["input_ids"].long(), golden["logits"]
    model = load_model(tmp_path / name, "cuda", torch.float32)
    for cuts in ([0, 192], [0, 1, 2, 60, 61, 130, 192], list(range(193))):
        state, pieces = None, []
        for start, end in pairwise(cuts):
            logits, state = model.forward(ids[:, start:end], state)
            pieces.append(logits.cpu())
        assert float((torch.cat(pieces, 1) - expected).abs().max() / expected.std()) < GOLDEN_TOLERANCE


@pytest.mark.parametrize("format", ["int8", "fp8", "int4"])
def test_formats_on_a_gpu(format: str, tmp_path: Path) -> None:
    convert_checkpoint(GOLDEN / "recurrent-model-ckpt.pth", tmp_path / "x")
    quantize_checkpoint(tmp_path / "x", tmp_path / format, Recipe(format=format))
    ids = load_file(GOLDEN / "recurrent-golden.safetensors")["input_ids"].long()
    on_gpu, _ = load_model(tmp_path / format, "cuda", torch.float32).forward(ids)
    on_cpu, _ = load_model(tmp_path / format, "cpu").forward(ids)
    assert float((on_gpu.cpu() - on_cpu).abs().max() / on_cpu.std()) < FORMAT_TOLERANCE[format]


def test_auto_takes_the_gpu_and_bf16() -> None:
    model = load("tiny")
    assert isinstance(model, TritonModel)
    assert model.device.type == "cuda"
    assert model.ops.dtype == torch.bfloat16
    answer = "".join(Session(model).send("My name is Ada. What is my name?", 24))
    assert "Ada" in answer


def test_4096_steps_stay_where_a_prompt_of_4096_tokens_ends(tiny: Model) -> None:
    """Drift: every step's rounding goes into the state that the next one reads."""
    fused = load(tiny.path, "cuda", torch.float32)
    assert isinstance(fused, TritonModel)
    ids = torch.randint(0, tiny.spec.vocab_size, (1, 4096), generator=torch.Generator().manual_seed(0))
    expected, end = load_model(tiny.path, "cuda", torch.float32).forward(ids)
    state, worst = fused.initial_state(), 0.0
    for t in range(ids.shape[1]):
        logits, state = fused.step(ids[:, t], state)
        worst = max(worst, float((logits - expected[:, t]).abs().max()))
    assert worst / float(expected.std()) < DRIFT_TOLERANCE
    for ours, theirs in zip(state.layers, end.layers, strict=True):
        assert isinstance(ours, Gdn2State)
        assert isinstance(theirs, Gdn2State)
        assert float((ours.S - theirs.S).norm() / theirs.S.norm()) < DRIFT_TOLERANCE


def test_greedy_repeats_bit_for_bit(tiny: Model) -> None:
    answers = []
    for _ in range(2):
        model = load(tiny.path, "cuda")
        session = Session(model, sampling=Sampling(temperature=0))
        answers.append("".join(session.send("Tell me about the weather.", 64)))
        answers.append(model.export_state(session._memory.state))
    assert answers[0] == answers[2]
    assert all(torch.equal(answers[1][name], answers[3][name]) for name in answers[1])


def test_a_session_moves_between_devices(tmp_path: Path, tiny: Model) -> None:
    greedy = Sampling(temperature=0)
    gpu = load_model(tiny.path, "cuda", torch.float32)
    for runtime, text in ((tiny, "Remember that my door code is 418."), (gpu, "Correction: My door code is 773.")):
        file = tmp_path / "s"
        session = Session.load(file, runtime) if file.exists() else Session(runtime, sampling=greedy)
        list(session.send(text, 24))
        session.save(file)
    assert "773" in "".join(Session.load(tmp_path / "s", tiny).send("What is my door code?", 24))


def test_fp8_activations_of_a_prompt_are_near_those_of_bf16(tmp_path: Path) -> None:
    quantize_checkpoint(MODEL_NAMES["tiny"], tmp_path / "fp8", Recipe(format="fp8"))
    tokens = torch.randint(0, 1000, (1, 300), generator=torch.Generator().manual_seed(0))
    exact, plain, rounded = (
        model.prefill(tokens, model.initial_state())[0].cpu()
        for model in (load(tmp_path / "fp8", "cuda", dtype) for dtype in (torch.float32, None, torch.float8_e4m3fn))
    )
    assert not torch.equal(plain, rounded)
    assert float((rounded - exact).norm() / exact.norm()) < 0.05
