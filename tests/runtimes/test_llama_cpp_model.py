"""GGUF files on llama.cpp as a runtime: goldens, states, sessions, and what is refused (just test-llama)."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from gdn2_edge.bench import bench
from gdn2_edge.convert import convert_checkpoint
from gdn2_edge.errors import BackendError, CheckpointError, SessionError
from gdn2_edge.evaluate import evaluate, read_documents, read_ids
from gdn2_edge.export.gguf import export_gguf
from gdn2_edge.generate.session import Session
from gdn2_edge.generate.text import open_text
from gdn2_edge.loading import load, model_path
from gdn2_edge.quantize import quantize_checkpoint
from gdn2_edge.quantize.recipe import Recipe
from gdn2_edge.sampling import Sampling

pytestmark = pytest.mark.llama

GOLDEN = Path(__file__).parents[1] / "golden"
CHATS = Path(__file__).parents[2] / "benchmarks" / "data" / "heldout_chat.jsonl"
# Largest difference over the golden's standard deviation. fp32 sums in another order are at 2e-5.
TOLERANCE = 1e-4
GREEDY = Sampling(temperature=0, repetition_window=0)
QUESTION = "My name is Ada. What is my name?"


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    """ggml's threads spin: on a busy machine two are many times slower than one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["recurrent", "hybrid"])
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor, Tensor]:
    folder = tmp_path_factory.mktemp("golden") / request.param
    config = str(GOLDEN / "hybrid.json") if request.param == "hybrid" else None
    convert_checkpoint(GOLDEN / f"{request.param}-model-ckpt.pth", folder, config=config)
    export_gguf(folder, folder.with_suffix(".gguf"), "f32")
    values = load_file(GOLDEN / f"{request.param}-golden.safetensors")
    return folder.with_suffix(".gguf"), values["input_ids"].long(), values["logits"].float()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    export_gguf(model_path("tiny"), path, "q8_0")
    return path


def spread(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.std())


@pytest.mark.parametrize("cuts", [[0, 192], [0, 1, 2, 61, 192], list(range(193))], ids=["whole", "split", "steps"])
def test_goldens_of_two_sequences(golden: tuple[Path, Tensor, Tensor], cuts: list[int]) -> None:
    path, ids, expected = golden
    runtime = load(path)
    state = runtime.initial_state(2)
    for start, end in pairwise(cuts):
        logits, state = runtime.prefill(ids[:, start:end], state)
        assert spread(logits, expected[:, end - 1]) < TOLERANCE
    assert state.position.tolist() == [192, 192]


def test_logits_of_every_token(golden: tuple[Path, Tensor, Tensor]) -> None:
    path, ids, expected = golden
    runtime = load(path)
    first, state = runtime.forward(ids[:, :70])
    second, state = runtime.forward(ids[:, 70:], state)
    assert spread(torch.cat([first, second], 1), expected) < TOLERANCE
    assert state.position.tolist() == [192, 192]


# A type's divergence from the model in bf16 beside that of our own format of as many bits. llama.cpp rounds the inputs
# of products too, which at 8 bits costs about as much as the weights do.
@pytest.mark.parametrize(("type", "own"), [("q8_0", "int8"), ("q5_0", "int4"), ("q4_0", "int4"), ("q4_k_m", "int4")])
def test_types_lose_what_our_own_formats_lose(type: str, own: str, tmp_path: Path) -> None:
    source = model_path("tiny")
    exact, ids = load(source, "cpu"), read_ids(open_text(source), read_documents(CHATS)[:5], 200)
    export_gguf(source, tmp_path / "x.gguf", type)
    quantize_checkpoint(source, tmp_path / "own", Recipe(format=own))
    divergences = []
    for path in (tmp_path / "x.gguf", tmp_path / "own"):
        *_, found = evaluate(load(path), ids, exact)
        assert found.against is not None
        divergences.append(found.against.kl.mean)
    assert divergences[0] < 2 * divergences[1]
    assert type != "q5_0" or divergences[0] < divergences[1] / 2


def test_a_state_is_cloned_kept_and_brought_back(golden: tuple[Path, Tensor, Tensor]) -> None:
    path, ids, expected = golden
    runtime = load(path)
    _, state = runtime.prefill(ids[:1, :100], runtime.initial_state())
    twin, kept = runtime.clone(state), runtime.export_state(state)
    _, elsewhere = runtime.prefill(ids[1:, :70], runtime.initial_state())  # the first one leaves the context
    assert spread(runtime.prefill(ids[:1, 100:], twin)[0], expected[:1, -1]) < TOLERANCE
    assert spread(runtime.prefill(ids[1:, 70:], elsewhere)[0], expected[1:, -1]) < TOLERANCE
    for model in (runtime, load(path)):
        assert spread(model.prefill(ids[:1, 100:], model.import_state(kept))[0], expected[:1, -1]) < TOLERANCE


def test_a_conversation_has_no_end(golden: tuple[Path, Tensor, Tensor]) -> None:
    """Many times the window and the context."""
    path, _, _ = golden
    runtime, plain = load(path), load(path.with_suffix(""), dtype=torch.float32)
    ids = torch.randint(0, runtime.spec.vocab_size, (1, 4500), generator=torch.Generator().manual_seed(0))
    found, state = runtime.prefill(ids, runtime.initial_state())
    expected, _ = plain.prefill(ids, plain.initial_state())
    assert spread(found, expected) < TOLERANCE
    kept = runtime.export_state(state)
    assert sum(t.nbytes for t in kept.values()) <= runtime.state_bytes


def test_a_consumed_state_is_gone(tiny: Path) -> None:
    runtime = load(tiny)
    _, first = runtime.step(torch.tensor([1]), runtime.initial_state())
    runtime.step(torch.tensor([2]), first)
    with pytest.raises(SessionError, match="consumed"):
        runtime.step(torch.tensor([3]), first)


def test_a_session_goes_on_from_its_file(tiny: Path, tmp_path: Path) -> None:
    runtime, file = load(tiny), tmp_path / "s.safetensors"
    session = Session(runtime, sampling=GREEDY)
    "".join(session.send("My name is Ada."))
    session.save(file)
    whole = "".join(session.send("What is my name?"))
    assert "Ada" in whole
    assert "".join(Session.load(file, load(tiny)).send("What is my name?")) == whole
    session.undo()
    assert "".join(session.send("What is my name?")) == whole
    assert "".join(session.fork().send("What is my name?"))


def test_other_runtimes_say_whose_state_it_is(tiny: Path, tmp_path: Path) -> None:
    runtime, torchs = load(tiny), load("tiny")
    _, state = runtime.step(torch.tensor([1]), runtime.initial_state())
    with pytest.raises(SessionError, match=r"kept by llama\.cpp"):
        torchs.import_state(runtime.export_state(state))
    with pytest.raises(SessionError, match="kept by another runtime"):
        runtime.import_state(torchs.export_state(torchs.initial_state()))
    with pytest.raises(SessionError, match="another runtime's"):
        runtime.step(torch.tensor([1]), torchs.initial_state())


@pytest.mark.parametrize("damage", ["build", "digest", "head", "size", "position"])
def test_a_damaged_block_is_refused(damage: str, tiny: Path) -> None:
    runtime = load(tiny)
    _, state = runtime.step(torch.tensor([1]), runtime.initial_state())
    kept = runtime.export_state(state)
    block = kept["llama_cpp"]
    if damage == "build":
        kept["llama_cpp"] = torch.frombuffer(
            bytearray(block.numpy().tobytes().replace(b"gdn2.1", b"gdn2.9")), dtype=torch.uint8
        )
    elif damage == "digest":
        block[-100] ^= 1
    elif damage == "head":
        block[0] = 0
    elif damage == "size":
        kept["llama_cpp"] = block[:-1]
    else:
        kept["position"] += 1
    with pytest.raises(SessionError, match=r"kept by|damaged|cannot read"):
        runtime.import_state(kept)
    assert torch.isfinite(runtime.step(torch.tensor([1]), runtime.initial_state())[0]).all()


def test_bench(tiny: Path) -> None:
    report = bench(tiny, "cpu", tokens=10, prompt_tokens=[16], batch=2)
    assert "llama.cpp" in report.runtime
    assert not report.check.plain
    assert report.bandwidth.bytes_per_token.weights < tiny.stat().st_size


def test_a_llama_cpp_without_the_patch(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import llama_cpp

    monkeypatch.setattr(llama_cpp, "__version__", "0.3.36")
    with pytest.raises(BackendError, match=r"0\.3\.36 does not know GDN-2.*llama-cpp build"):
        load(tiny)


def test_damaged_weights_are_one_sentence(tiny: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.gguf"
    short.write_bytes(tiny.read_bytes()[:-50_000])
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        load(short)
    with pytest.raises(BackendError, match="built for the CPU alone"):
        load(tiny, "cuda")
