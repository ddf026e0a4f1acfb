"""Exported folders on ONNX Runtime: what torch computes, sessions that go both ways, and files that lie."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("onnx", reason="the extra onnx is not installed")
pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")

import onnx
import torch
from torch import Tensor

from gdn2_edge import cli
from gdn2_edge.bench import bench, machine
from gdn2_edge.checkpoint import onnx_file
from gdn2_edge.checkpoint.onnx_file import open_export
from gdn2_edge.convert import convert_checkpoint
from gdn2_edge.errors import BackendError, CheckpointError, Gdn2EdgeError, SessionError
from gdn2_edge.evaluate import evaluate
from gdn2_edge.export.onnx import build_op as building
from gdn2_edge.export.onnx import export_onnx, writer
from gdn2_edge.generate.session import Session
from gdn2_edge.loading import load, model_path
from gdn2_edge.model import Model, load_model
from gdn2_edge.onnx_names import DATA_FILE, MODEL_FILE
from gdn2_edge.runtimes import onnx as runtime_module
from gdn2_edge.runtimes.onnx import OnnxModel
from gdn2_edge.sampling import Sampling
from gdn2_edge.state import Gdn2State, State

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
GREEDY = Sampling(temperature=0, repetition_window=0)
# Largest difference over the standard deviation: the order of sums differs. States are sparse, with largest values of
# tens of standard deviations (see tests/export).
LOGITS_TOLERANCE, STATE_TOLERANCE = 2e-5, 8e-5
CUTS = ([0, 100], [0, 1, 2, 37, 100], list(range(101)))
QUESTION = "My name is Ada. What is my name?"


@pytest.fixture(autouse=True)
def _no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator library of whoever runs the tests has tests of its own."""
    monkeypatch.setattr(runtime_module, "find_op", lambda: None)


@pytest.fixture(scope="session")
def exported_tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "tiny"
    export_onnx(model_path("tiny"), folder)
    return folder


@pytest.fixture(scope="session")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("hybrid") / "hybrid"
    convert_checkpoint(GOLDEN / "hybrid-model-ckpt.pth", folder, config=str(GOLDEN / "hybrid.json"))
    return load_model(folder, "cpu", torch.float32)


@pytest.fixture(scope="session")
def exported_hybrid(hybrid: Model) -> Path:
    folder = hybrid.path.with_name("exported")
    export_onnx(hybrid.path, folder)
    return folder


@pytest.fixture
def broken(exported_hybrid: Path, tmp_path: Path) -> Path:
    """A copy of a small export, to be spoilt."""
    return Path(shutil.copytree(exported_hybrid, tmp_path / "broken"))


@pytest.fixture(params=["tiny", "hybrid"])
def pair(request: pytest.FixtureRequest) -> tuple[Model, OnnxModel]:
    """A model on torch and on ONNX Runtime."""
    model = load(request.getfixturevalue(f"exported_{request.param}"), "cpu")
    assert isinstance(model, OnnxModel)
    return request.getfixturevalue(request.param), model


def ids_of(model: Any, batch: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(0, model.spec.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def check_same(found: State[Tensor], expected: State[Tensor]) -> None:
    assert torch.equal(found.position, expected.position)
    for name, value in expected.named().items():
        if name != "position":
            assert float((found.named()[name] - value).abs().max() / value.std()) < STATE_TOLERANCE, name


@pytest.mark.parametrize("batch", [1, 3])
def test_logits_and_states_are_those_of_torch(pair: tuple[Model, OnnxModel], batch: int) -> None:
    torch_model, model = pair
    ids = ids_of(model, batch, 100)
    expected, state = torch_model.forward(ids)
    for cuts in CUTS:
        found, ours = [], model.initial_state(batch)
        for start, end in pairwise(cuts):
            logits, ours = model.forward(ids[:, start:end], ours)
            found.append(logits)
        assert float((torch.cat(found, 1) - expected).abs().max() / expected.std()) < LOGITS_TOLERANCE
        check_same(ours, state)


def test_prompts_and_steps_give_the_last_logits(pair: tuple[Model, OnnxModel], monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = pair
    ids = ids_of(model, 2, 30)
    expected, _ = model.forward(ids)
    monkeypatch.setattr(runtime_module, "PIECE_TOKENS", 14)  # 7 of each sequence
    logits, state = model.prefill(ids[:, :29], model.initial_state(2))
    assert float((logits - expected[:, 28]).abs().max() / expected.std()) < LOGITS_TOLERANCE
    logits, state = model.step(ids[:, 29], state)
    assert float((logits - expected[:, 29]).abs().max() / expected.std()) < LOGITS_TOLERANCE
    assert state.position.tolist() == [30, 30]


def test_a_state_before_a_call_is_whole_until_the_next(pair: tuple[Model, OnnxModel]) -> None:
    """What a session shows after Ctrl-C in the middle of a token: the state of the token before."""
    _, model = pair
    ids = ids_of(model, 1, 8)
    _, before = model.prefill(ids, model.initial_state())
    kept = model.export_state(before)
    model.step(ids[:, 0], before)
    first, _ = model.step(ids[:, 1], before)  # as if the call above had not come back
    for name, value in model.export_state(before).items():
        assert torch.equal(value, kept[name]), name
    second, _ = model.step(ids[:, 1], model.import_state(kept))
    assert torch.equal(first, second)


def test_clones_and_logits_are_independent(pair: tuple[Model, OnnxModel]) -> None:
    _, model = pair
    ids = ids_of(model, 1, 12)
    _, state = model.prefill(ids, model.initial_state())
    twin = model.clone(state)
    seen = []
    for i in range(6):
        logits, state = model.step(ids[:, i], state)
        seen.append((logits, logits.clone()))
    assert all(torch.equal(logits, copy) for logits, copy in seen)
    for i in range(6):
        logits, twin = model.step(ids[:, i], twin)
        assert torch.equal(logits, seen[i][0])
    for name, value in twin.named().items():
        assert torch.equal(state.named()[name], value), name


def test_sequences_of_another_number_follow_each_other(pair: tuple[Model, OnnxModel]) -> None:
    _, model = pair
    ids = ids_of(model, 3, 5)
    together, _ = model.prefill(ids, model.initial_state(3))
    for row in range(3):
        alone, _ = model.prefill(ids[row : row + 1], model.initial_state())
        assert float((alone - together[row]).abs().max() / together.std()) < LOGITS_TOLERANCE


def test_sessions_go_from_one_runtime_to_the_other(tiny: Model, exported_tiny: Path, tmp_path: Path) -> None:
    file, ours = tmp_path / "talk.session", load(exported_tiny, "cpu")

    def say(session: Session, text: str) -> str:
        return "".join(session.send(text, 60))

    alone = Session(tiny, sampling=GREEDY)
    Session(tiny, sampling=GREEDY).save(file)
    talk = [QUESTION, "Tell me a long story.", "What is my name?", "Where do I live?"]
    for turn, text in enumerate(talk):
        session = Session.load(file, (tiny, ours)[turn % 2])
        assert say(session, text) == say(alone, text)
        session.save(file)


def test_greedy_ids_are_those_of_torch(tiny: Model, exported_tiny: Path) -> None:
    ours, prompt, answers = load(exported_tiny, "cpu"), ids_of(tiny, 1, 20), []
    for model in (tiny, ours):
        logits, state = model.prefill(prompt, model.initial_state())
        ids = []
        for _ in range(60):
            ids.append(int(logits.argmax()))
            logits, state = model.step(torch.tensor(ids[-1:]), state)
        answers.append(ids)
    assert answers[0] == answers[1]


def test_evaluation_sees_torch_and_an_export_as_one(pair: tuple[Model, OnnxModel]) -> None:
    reference, model = pair
    *_, found = evaluate(model, ids_of(model, 3, 300).tolist(), reference)
    assert found.against is not None
    assert found.against.top1.mean > 0.998  # ties of untrained weights
    assert abs(found.against.kl.mean) < 1e-8


@pytest.mark.parametrize("format", ["fp16", "int8"])
def test_states_of_other_formats_are_fp32(hybrid: Model, format: str, tmp_path: Path) -> None:
    export_onnx(hybrid.path, tmp_path / "X", format)
    model = load(tmp_path / "X", "cpu")
    assert f"{format} export" in model.name
    logits, state = model.prefill(ids_of(model, 1, 9), model.initial_state())
    assert logits.dtype == torch.float32
    assert all(t.dtype == torch.float32 for name, t in state.named().items() if name != "position")


def test_weights_beside_the_model(hybrid: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "INLINE_BYTES", 1000)
    export_onnx(hybrid.path, tmp_path / "X")
    ids = ids_of(hybrid, 1, 9)
    found, expected = load(tmp_path / "X", "cpu").prefill(ids, hybrid.initial_state())[0], hybrid.forward(ids)[0][:, -1]
    assert float((found - expected).abs().max() / expected.std()) < LOGITS_TOLERANCE
    data = tmp_path / "X" / DATA_FILE
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"of {DATA_FILE}, which has"):
        load(tmp_path / "X", "cpu")
    data.rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=f"{DATA_FILE} is missing"):
        load(tmp_path / "X", "cpu")
    data.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="link to another folder"):
        load(tmp_path / "X", "cpu")


def test_the_name_says_what_runs(pair: tuple[Model, OnnxModel]) -> None:
    assert "CPUExecutionProvider" in pair[1].name
    assert "fp32 export, stock operators" in pair[1].name
    assert pair[1].session.get_session_options().intra_op_num_threads == torch.get_num_threads()


def test_tokens_and_states_that_do_not_fit(pair: tuple[Model, OnnxModel]) -> None:
    _, model = pair
    ids, state = ids_of(model, 1, 3), model.initial_state()
    with pytest.raises(BackendError, match="outside the vocabulary"):
        model.prefill(ids + model.spec.vocab_size, state)
    with pytest.raises(BackendError, match="the state is of 2 sequences"):
        model.prefill(ids, model.initial_state(2))
    for bad in ({}, State(torch.tensor(0), state.layers)):
        for call in (model.forward, model.prefill):
            with pytest.raises(SessionError, match="expected a State whose position is int64"):
                call(ids, bad)
    first = state.layers[0]
    assert isinstance(first, Gdn2State)
    for S in (first.S[:, :, :-1].clone(), first.S.double(), first.S.mT):
        with pytest.raises(SessionError, match=r"state: layers\.0\.S is"):
            model.prefill(ids, State(state.position, (Gdn2State(first.conv, S), *state.layers[1:])))


# How an export is loaded


def test_load_finds_exports_and_refuses_what_cannot_apply(exported_hybrid: Path, hybrid: Model) -> None:
    assert isinstance(load(exported_hybrid, runtime="onnx"), OnnxModel)
    for runtime in ("torch", "triton"):
        with pytest.raises(BackendError, match=f"the {runtime} runtime cannot run"):
            load(exported_hybrid, runtime=runtime)
    with pytest.raises(BackendError, match="Leave out --dtype"):
        load(exported_hybrid, dtype=torch.float32)
    with pytest.raises(BackendError, match=r"no ONNX export\. First make one: gdn2-edge export onnx"):
        load(hybrid.path, runtime="onnx")
    with pytest.raises(BackendError, match=r"'cuda:1' is not here.*onnx-gpu"):
        load(exported_hybrid, "cuda:1")
    with pytest.raises(BackendError, match="'metal' is unknown"):
        load(exported_hybrid, "metal")


def test_missing_or_old_onnxruntime(exported_hybrid: Path, hybrid: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(BackendError, match=r'pip install "gdn2-edge\[onnx\]".*onnx-gpu'):
            load(exported_hybrid)
    monkeypatch.setattr(runtime_module.onnxruntime, "__version__", "1.24.4")
    with pytest.raises(BackendError, match=r"needs ONNX Runtime 1\.25\.1 or later, this is 1\.24\.4.*--portable"):
        load(exported_hybrid)
    portable = exported_hybrid.with_name("portable")
    export_onnx(hybrid.path, portable, portable=True)
    load(portable, "cpu")


def test_a_library_that_does_not_load(exported_hybrid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "operator.so"
    library.write_bytes(b"no library")
    monkeypatch.setattr(runtime_module, "find_op", lambda: library)
    with pytest.raises(BackendError, match=r"cannot load this operator library.*--build-op"):
        load(exported_hybrid, "cpu")


def test_the_library_of_this_machine(
    tiny: Model, exported_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "cache_folder", lambda: tmp_path)
    assert building.find_op() is None
    try:
        library = building.build_op()
    except BackendError as error:
        pytest.skip(str(error))
    assert building.find_op() == library
    monkeypatch.setattr(runtime_module, "find_op", building.find_op)
    model, ids = load(exported_tiny, "cpu"), ids_of(tiny, 2, 40)
    assert isinstance(model, OnnxModel)
    assert f"operator library {library.name}" in model.name
    expected, state = tiny.forward(ids)
    found, ours = model.forward(ids)
    assert float((found - expected).abs().max() / expected.std()) < LOGITS_TOLERANCE
    check_same(ours, state)
    library.with_name(f"{library.name}.built-from").write_text("of other sources")
    assert building.find_op() is None


def session_that_has(*providers: str, cpu_nodes: tuple[str, ...] = ()) -> Any:
    nodes = [SimpleNamespace(op_type=name) for name in cpu_nodes]
    part = SimpleNamespace(ep_name="CPUExecutionProvider", get_nodes=lambda: nodes)
    return SimpleNamespace(get_providers=lambda: providers, get_provider_graph_assignment_info=lambda: [part])


def test_a_gpu_is_asked_first_and_has_no_library(exported_hybrid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, Any]] = []

    def session(export: Any, providers: list[Any], library: Path | None) -> Any:
        asked.append((providers[0], library))
        return session_that_has("CPUExecutionProvider")  # a driver is missing

    there = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(runtime_module.onnxruntime, "get_available_providers", lambda: there)
    monkeypatch.setattr(runtime_module, "_session", session)
    monkeypatch.setattr(runtime_module, "find_op", lambda: Path("operator.so"))
    runtime_module._open_session(open_export(exported_hybrid), "auto")
    gpu = ("CUDAExecutionProvider", {"device_id": 0})
    assert asked == [(gpu, None), ("CPUExecutionProvider", Path("operator.so"))]
    with pytest.raises(BackendError, match="CUDA or cuDNN is missing"):
        runtime_module._open_session(open_export(exported_hybrid), "cuda")
    fallen = session_that_has("CUDAExecutionProvider", "CPUExecutionProvider", cpu_nodes=("Scan", "Gather"))
    assert runtime_module._on_cpu(fallen) == ["Gather", "Scan"]


# Files that lie


def edit(folder: Path, change: Callable[[onnx.ModelProto], object]) -> None:
    model = onnx.load(folder / MODEL_FILE)
    change(model)
    (folder / MODEL_FILE).write_bytes(model.SerializeToString())


def external(tensor: onnx.TensorProto, location: str, size: int) -> None:
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", str(size))):
        tensor.external_data.add(key=key, value=value)


def test_a_tag_that_protobuf_would_cut_is_refused() -> None:
    """Field 13 of a tensor, external_data, in 32 bits; another one in 64."""
    with pytest.raises(ValueError, match="32 bits"):
        list(onnx_file._fields(memoryview(b"\xea\x80\x80\x80\x10\x01a")))


@pytest.mark.parametrize("location", ["../secret", "sub/../../secret", "other.data", "", "~/secret"])
def test_a_tensor_elsewhere_is_never_read(broken: Path, location: str) -> None:
    (broken.parent / "secret").write_bytes(bytes(1 << 20))
    (broken / "other.data").write_bytes(bytes(1 << 20))

    def move(model: onnx.ModelProto) -> None:
        tensor = model.graph.initializer[-1]
        external(tensor, location, len(tensor.raw_data))

    edit(broken, move)
    with pytest.raises(CheckpointError, match=r"expected 'model\.onnx\.data' beside the model"):
        load(broken)


def test_a_tensor_elsewhere_inside_a_function_is_never_read(broken: Path) -> None:
    def move(model: onnx.ModelProto) -> None:
        node = next(node for node in model.functions[0].node if node.op_type == "Constant")
        external(node.attribute[0].t, "../secret", 8)

    edit(broken, move)
    with pytest.raises(CheckpointError, match=r"expected 'model\.onnx\.data' beside the model"):
        load(broken)


def test_a_shape_without_its_bytes(broken: Path) -> None:
    edit(broken, lambda model: model.graph.initializer[-1].dims.__setitem__(0, 1 << 40))
    with pytest.raises(CheckpointError, match="does not have the bytes of its shape"):
        load(broken)


def test_a_model_of_somebody_else(broken: Path) -> None:
    edit(broken, lambda model: model.ClearField("metadata_props"))
    with pytest.raises(CheckpointError, match="not written by gdn2-edge export onnx"):
        load(broken)


@pytest.mark.parametrize("field", ["gdn2.spec", "gdn2.fingerprint"])
def test_model_and_config_of_two_exports(broken: Path, field: str) -> None:
    def other(model: onnx.ModelProto) -> None:
        entry = next(entry for entry in model.metadata_props if entry.key == field)
        entry.value = entry.value.replace("e", "f") if field == "gdn2.fingerprint" else entry.value.replace("64", "32")

    edit(broken, other)
    with pytest.raises(CheckpointError, match=f"another {field.removeprefix('gdn2.')}"):
        load(broken)


def rename(model: onnx.ModelProto, old: str, new: str) -> None:
    for node in model.graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
        node.output[:] = [new if name == old else name for name in node.output]


def test_a_graph_with_other_inputs(broken: Path) -> None:
    def other(model: onnx.ModelProto) -> None:
        rename(model, "input_ids", "tokens")
        model.graph.input[0].name = "tokens"

    edit(broken, other)
    with pytest.raises(CheckpointError, match=r"inputs of model\.onnx are not those"):
        load(broken)


def test_a_graph_that_writes_more_than_it_says(broken: Path) -> None:
    def other(model: onnx.ModelProto) -> None:
        rename(model, "logits", "half")
        model.graph.node.append(onnx.helper.make_node("Concat", ["half", "half"], ["logits"], axis=1))

    edit(broken, other)
    model = load(broken, "cpu")
    with pytest.raises(BackendError, match=r"ONNX Runtime failed: .*Concat"):
        model.step(torch.tensor([1]), model.initial_state())


def test_a_graph_that_does_not_load(broken: Path) -> None:
    edit(broken, lambda model: setattr(model.graph.node[0], "op_type", "NoSuchOperator"))
    with pytest.raises(CheckpointError, match=r"ONNX Runtime .* cannot load it .*NoSuchOperator"):
        load(broken)


@pytest.mark.parametrize("content", ["", "[]", '{"model_type": "llama"}', '{"model_type": "gdn2"}'])
def test_a_config_of_something_else(broken: Path, content: str) -> None:
    (broken / "config.json").write_text(content)
    with pytest.raises(Gdn2EdgeError):
        load(broken)


def test_damaged_files_are_an_error_in_a_sentence(broken: Path) -> None:
    whole = (broken / MODEL_FILE).read_bytes()
    chance = random.Random(0)
    for trial in range(60):
        data = bytearray(whole)
        if trial % 2:
            del data[chance.randrange(len(data)) :]
        else:
            start = chance.randrange(len(data))
            del data[start : start + chance.randrange(1, 100)]
        (broken / MODEL_FILE).write_bytes(data)
        with pytest.raises(CheckpointError):
            open_export(broken)


def test_turned_bits_are_an_error_in_a_sentence_or_harmless(broken: Path) -> None:
    whole = (broken / MODEL_FILE).read_bytes()
    chance = random.Random(1)
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(20):
            data[chance.choice((chance.randrange(len(data)), -1 - chance.randrange(4000)))] ^= 1 << chance.randrange(8)
        (broken / MODEL_FILE).write_bytes(data)
        with contextlib.suppress(Gdn2EdgeError):
            open_export(broken)


# Commands


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def command(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gdn2-edge", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    return command


def test_chat_with_an_export(run: Any, exported_tiny: Path, tmp_path: Path) -> None:
    options = ("--once", QUESTION, "--temperature", "0", "--json")
    code, out, err = run("chat", exported_tiny, *options, "--session", tmp_path / "s")
    assert code == 0, err
    assert json.loads(out)["answer"] == json.loads(run("chat", "tiny", *options)[1])["answer"]
    code, _, err = run("chat", "tiny", "--once", "Hi.", "--session", tmp_path / "s")
    assert code == 0, err


def test_commands_for_checkpoints_say_what_an_export_is(run: Any, exported_tiny: Path, tmp_path: Path) -> None:
    code, _, err = run("quantize", exported_tiny, "--format", "int8", "--out", tmp_path / "q")
    assert code == 1
    assert "is an ONNX export" in err


def test_bench_measures_exports(exported_hybrid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "CPU_READ_BYTES", 1 << 20)
    report = bench(exported_hybrid, "cpu", tokens=10, prompt_tokens=[16], batch=2)
    assert report.runtime.startswith("ONNX Runtime")
    assert not report.check.plain
    assert max(report.check.prefill_error, report.check.step_error) < 1e-4
    sizes = open_export(exported_hybrid).sizes
    embedding = sizes["embed.weight"]
    rows = load(exported_hybrid).spec.vocab_size
    assert report.bandwidth.bytes_per_token.weights == sum(sizes.values()) - embedding + embedding // rows


def test_the_example_answers_as_chat_does(run: Any, exported_tiny: Path) -> None:
    example = ROOT / "examples" / "onnx_decode.py"
    done = subprocess.run([sys.executable, example, exported_tiny, QUESTION], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answer = json.loads(run("chat", "tiny", "--once", QUESTION, "--temperature", "0", "--json")[1])["answer"]
    assert done.stdout.strip() == answer.strip()
    assert len(example.read_text().splitlines()) < 40
