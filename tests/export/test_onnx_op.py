"""The compiled operator against the reference in float64, in a graph of nothing but the operator."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize, softplus

from gdn2_edge.errors import BackendError
from gdn2_edge.export.onnx import build_op as building
from gdn2_edge.export.onnx.build_op import build_op, find_compiler
from gdn2_edge.kernels.reference import recurrent_gated_delta_rule2

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

TensorProto, helper = onnx.TensorProto, onnx.helper
Failed = (ort.capi.onnxruntime_pybind11_state.InvalidArgument, ort.capi.onnxruntime_pybind11_state.RuntimeException)

# float32 sums of up to 256 terms of size 1, in another order.
TOLERANCE = 3e-6
# An output of size up to 4 is rounded once: half a unit in the last of 11 and of 8 bits.
OUTPUT_TOLERANCES = {TensorProto.FLOAT: TOLERANCE, TensorProto.FLOAT16: 4 * 2**-12, TensorProto.BFLOAT16: 4 * 2**-9}
TORCH_TYPES = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
}
INPUTS = ("q", "k", "v", "g", "b", "w")
# Chosen when the library runs; or fixed when it is compiled, so that every width is tested on every processor.
WIDTHS = ("chosen", "4", "16")

Array = NDArray[Any]


@pytest.fixture(scope="session")
def compiler() -> str:
    """A command for $CXX."""
    try:
        return subprocess.list2cmdline(find_compiler())
    except BackendError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def library(compiler: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_op(tmp_path_factory.mktemp("op"))


@pytest.fixture(scope="session", params=WIDTHS)
def any_library(request: pytest.FixtureRequest, compiler: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library with vectors of some width."""
    if request.param == "chosen":
        path: Path = request.getfixturevalue("library")
        return path
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", f"{compiler} -DGDN2_LANES={request.param}")
        return build_op(tmp_path_factory.mktemp("op"))


def make_inputs(B: int, T: int, H: int, HV: int, K: int, V: int, seed: int = 0) -> dict[str, Tensor]:
    """Arguments of the reference by name, float64."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {
        "q": normalize(randn(B, T, H, K), dim=-1),
        "k": normalize(randn(B, T, H, K), dim=-1),
        "v": randn(B, T, HV, V),
        "g": -softplus(randn(B, T, H, K) - 3),
        "b": randn(B, T, H, K).sigmoid(),
        "w": randn(B, T, HV, V).sigmoid(),
        "S": randn(B, HV, K, V),
    }


def make_model(type: int, dims: dict[str, list[Any]], **attributes: Any) -> bytes:
    """The operator with inputs and outputs in float, cast to and from `type` around it."""
    nodes = [helper.make_node("Cast", [n], [f"{n}_cast"], to=type) for n in INPUTS]
    names = [*(f"{n}_cast" for n in INPUTS), "past_state"]
    nodes.append(
        helper.make_node("GatedDeltaRule2", names, ["o_cast", "present_state"], domain="ai.gdn2", **attributes)
    )
    nodes.append(helper.make_node("Cast", ["o_cast"], ["o"], to=TensorProto.FLOAT))

    def value(name: str) -> Any:
        rank = 4 if "state" in name else 3
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, dims.get(name, [None] * rank))

    graph = helper.make_graph(
        nodes, "op", [value(n) for n in (*INPUTS, "past_state")], [value("o"), value("present_state")]
    )
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("ai.gdn2", 1)]
    return bytes(helper.make_model(graph, opset_imports=imports, ir_version=10).SerializeToString())


def make_session(
    library: Path,
    type: int = TensorProto.FLOAT,
    threads: int = 1,
    dims: dict[str, list[Any]] | None = None,
    **attributes: Any,
) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.register_custom_ops_library(str(library))
    return ort.InferenceSession(make_model(type, dims or {}, **attributes), options, providers=["CPUExecutionProvider"])


def feeds(inputs: dict[str, Tensor]) -> dict[str, Array]:
    packed = {n: inputs[n].flatten(2).float().numpy() for n in INPUTS}
    return {**packed, "past_state": inputs["S"].float().numpy()}


def run(session: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The outputs, o [B, T, HV, V]."""
    o, state = session.run(None, feeds(inputs))
    return torch.from_numpy(o).reshape(inputs["v"].shape), torch.from_numpy(state)


def largest_error(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return (got.double() - expected).abs().max().item()


@pytest.mark.parametrize("T", [1, 2, 17, 65, 256])
@pytest.mark.parametrize(
    ("B", "H", "HV", "K", "V"),
    [(1, 2, 2, 128, 128), (3, 1, 3, 24, 40), (1, 2, 4, 13, 7), (3, 2, 2, 32, 100), (1, 1, 1, 1, 1), (1, 6, 6, 64, 64)],
)
def test_equals_the_reference(any_library: Path, B: int, T: int, H: int, HV: int, K: int, V: int) -> None:
    inputs = make_inputs(B, T, H, HV, K, V)
    o, state = run(make_session(any_library, num_heads=H, num_v_heads=HV), inputs)
    expected_o, expected_state = recurrent_gated_delta_rule2(**inputs)
    assert largest_error(o, expected_o) < TOLERANCE
    assert largest_error(state, expected_state) < TOLERANCE


@pytest.mark.parametrize("T", [1, 40])
@pytest.mark.parametrize("type", [TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_half_types(any_library: Path, type: int, T: int) -> None:
    inputs = make_inputs(2, T, 2, 4, 24, 40)
    inputs["v"][0, 0, 0, :3] = torch.tensor([3e-6, -6e-8, 5e-5])  # denormal in float16
    for n in INPUTS:
        inputs[n] = inputs[n].to(TORCH_TYPES[type]).double()
    o, state = run(make_session(any_library, type, num_heads=2, num_v_heads=4), inputs)
    expected_o, expected_state = recurrent_gated_delta_rule2(**inputs)
    assert largest_error(o, expected_o) < OUTPUT_TOLERANCES[type]
    assert largest_error(state, expected_state) < TOLERANCE


@pytest.mark.parametrize("type", [TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_half_types_round_as_torch_does(library: Path, type: int) -> None:
    # With q = k = e_1 and a state of zeros, o = scale * w * v exactly.
    values = torch.cat([torch.randn(999), 10.0 ** torch.arange(-9.0, 9.0), torch.tensor([65519.0, 65520.0, torch.inf])])
    values = torch.cat([values, -values]).to(TORCH_TYPES[type]).double()
    scale = 0.70312505
    one = torch.ones(1, 1, 1, 1)
    inputs = {"q": one, "k": one, "g": 0 * one, "b": one, "S": torch.zeros(1, 1, 1, len(values))}
    inputs |= {"v": values[None, None, None], "w": torch.ones(1, 1, 1, len(values))}
    o, _ = run(make_session(library, type, num_heads=1, scale=scale), inputs)
    expected = (values.float() * scale).to(TORCH_TYPES[type]).float().flatten()
    if type == TensorProto.BFLOAT16:  # a product of two floats may be denormal, which is 0 here
        expected[expected.abs() < 2**-126] = 0
    assert torch.equal(o.flatten(), expected)


@pytest.mark.parametrize("T", [1, 65])
@pytest.mark.parametrize("g", [-50.0, -87.0, -110.0, -1e30, 0.0, -torch.inf])
def test_extreme_decay(any_library: Path, T: int, g: float) -> None:
    inputs = make_inputs(1, T, 1, 2, 32, 40)
    inputs["g"][..., ::2] = g
    inputs["g"][..., 1::2] = 0
    o, state = run(make_session(any_library, num_heads=1, num_v_heads=2), inputs)
    expected_o, expected_state = recurrent_gated_delta_rule2(**inputs)
    assert largest_error(o, expected_o) < TOLERANCE
    assert largest_error(state, expected_state) < TOLERANCE


def test_numbers_too_small_become_zero_inside_only(library: Path) -> None:
    inputs = make_inputs(1, 1, 1, 1, 8, 8)
    inputs["S"][:] = 1e-40
    inputs["w"][:] = 0
    _, state = run(make_session(library, num_heads=1), inputs)
    assert state.abs().max() <= 1.0001e-40
    assert (np.full(4, 1e-40, np.float32) * np.float32(0.5)).all()  # this thread's mode is what it was


@pytest.mark.parametrize("splits", [[1] * 40, [7, 33], [16, 16, 8], [39, 1]])
def test_state_continues(any_library: Path, splits: list[int]) -> None:
    inputs = make_inputs(2, 40, 2, 2, 16, 32)
    session = make_session(any_library, num_heads=2)
    whole_o, whole_state = run(session, inputs)
    state, parts = inputs["S"], []
    for start, length in zip(np.cumsum([0, *splits[:-1]]), splits, strict=True):
        part = {n: x[:, start : start + length] for n, x in inputs.items() if n != "S"}
        o, state = run(session, {**part, "S": state})
        parts.append(o)
    assert largest_error(torch.cat(parts, 1), whole_o.double()) < TOLERANCE
    assert largest_error(state, whole_state.double()) < TOLERANCE


@pytest.mark.parametrize(("T", "H", "V"), [(1, 16, 128), (1, 1, 200), (70, 2, 100), (70, 16, 64)])
def test_threads_give_the_same_bits(library: Path, T: int, H: int, V: int) -> None:
    inputs = make_inputs(2, T, H, H, 64, V)
    one, two = (run(make_session(library, threads=threads, num_heads=H), inputs) for threads in (1, 2))
    assert all(torch.equal(x, y) for x, y in zip(one, two, strict=True))


@pytest.mark.parametrize("T", [1, 20])
def test_not_a_number_passes_through(any_library: Path, T: int) -> None:
    inputs = make_inputs(1, T, 2, 2, 16, 32)
    for n in (*INPUTS, "S"):
        bad = {m: x.clone() for m, x in inputs.items()}
        bad[n][0, -1, 1, 3] = torch.nan
        got, expected = run(make_session(any_library, num_heads=2), bad), recurrent_gated_delta_rule2(**bad)
        for x, y in zip(got, expected, strict=True):
            assert torch.equal(x.isnan(), y.isnan()), n


@pytest.mark.parametrize("T", [1, 20])
def test_state_in_place(library: Path, T: int) -> None:
    inputs = make_inputs(1, T, 2, 2, 32, 64)
    session = make_session(library, num_heads=2)
    expected_o, expected_state = run(session, inputs)
    binding = session.io_binding()
    arrays = feeds(inputs)
    state = ort.OrtValue.ortvalue_from_numpy(arrays.pop("past_state"))
    for n, x in arrays.items():
        binding.bind_cpu_input(n, x)
    binding.bind_ortvalue_input("past_state", state)
    binding.bind_output("o")
    binding.bind_ortvalue_output("present_state", state)
    session.run_with_iobinding(binding)
    assert np.array_equal(binding.get_outputs()[0].numpy(), expected_o.flatten(2).numpy())
    assert np.array_equal(state.numpy(), expected_state.numpy())


def test_scale(library: Path) -> None:
    inputs = make_inputs(1, 3, 1, 1, 16, 16)
    plain, zero, double = (
        run(make_session(library, num_heads=1, **given), inputs)[0] for given in ({}, {"scale": 0.0}, {"scale": 0.5})
    )
    assert torch.equal(plain, zero)
    assert largest_error(double, 2 * plain.double()) < TOLERANCE


def test_nothing_to_do(library: Path) -> None:
    session = make_session(library, num_heads=2)
    inputs = make_inputs(2, 0, 2, 2, 8, 8)
    _, state = run(session, inputs)
    assert torch.equal(state, inputs["S"].float())
    o, state = run(session, make_inputs(0, 5, 2, 2, 8, 8))
    assert o.shape == (0, 5, 2, 8)
    assert state.shape == (0, 2, 8, 8)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("past_state", (1, 2, 8, 5), r"past_state has shape \[1, 2, 8, 5\], expected \[1, 2, 8, 4\], which is \[batch"),
        ("past_state", (2, 8, 4), r"past_state has 3 dimensions, expected 4: \[batch, num_v_heads, K, V\]"),
        (
            "k",
            (1, 3, 15),
            r"k has shape \[1, 3, 15\], expected \[1, 3, 16\], which is \[batch, tokens, num_heads \* K\]",
        ),
        ("q", (1, 3, 17), r"q has shape \[1, 3, 17\], expected \[1, 3, 16\]"),
        ("q", (1, 3, 0), "q has 0 channels, expected num_heads = 2 times"),
        ("v", (1, 2, 8), r"v has shape \[1, 2, 8\], expected \[1, 3, 8\]"),
        ("w", (3, 8), "w has 2 dimensions, expected 3"),
    ],
)
def test_wrong_shape(library: Path, name: str, shape: tuple[int, ...], message: str) -> None:
    dims = {name: [None] * len(shape)}
    session = make_session(library, dims=dims, num_heads=2)
    arrays = feeds(make_inputs(1, 3, 2, 2, 8, 4))
    arrays[name] = np.zeros(shape, np.float32)
    with pytest.raises(Failed, match=f"GatedDeltaRule2: .*{message}"):
        session.run(None, arrays)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({}, "attribute num_heads is missing"),
        ({"num_heads": 2, "num_v_heads": 3}, "num_heads is 2 and num_v_heads 3"),
        ({"num_heads": 0}, "num_heads is 0"),
    ],
)
def test_wrong_attributes(library: Path, attributes: dict[str, int], message: str) -> None:
    with pytest.raises((*Failed, ort.capi.onnxruntime_pybind11_state.Fail), match=message):
        make_session(library, **attributes)


def test_shapes_are_inferred(library: Path) -> None:
    dims: dict[str, list[Any]] = {"v": ["batch", "sequence", 128], "past_state": ["batch", 2, 32, 64]}
    o, state = make_session(library, dims=dims, num_heads=2).get_outputs()
    assert o.shape == dims["v"]
    assert state.shape == dims["past_state"]


def test_ziglang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("ziglang") is None:
        pytest.skip("ziglang is not installed")
    monkeypatch.setattr(building, "COMPILERS", ())
    monkeypatch.delenv("CXX", raising=False)
    inputs = make_inputs(1, 20, 2, 2, 32, 64)
    o, _ = run(make_session(build_op(tmp_path), num_heads=2), inputs)
    assert largest_error(o, recurrent_gated_delta_rule2(**inputs)[0]) < TOLERANCE


def test_built_once(compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(building, "GNU_OPTIONS", (*building.GNU_OPTIONS, "-DGDN2_LANES=4"))
    first = build_op()
    built = first.stat().st_mtime_ns
    assert build_op() == first
    assert first.stat().st_mtime_ns == built
    monkeypatch.setattr(building, "GNU_OPTIONS", (*building.GNU_OPTIONS, "-O1"))
    assert build_op() != first
    assert first.name == building.library_name()
    assert sorted(p.name for p in first.parent.iterdir()) == [first.name, f"{first.name}.built-from"]


def test_another_source_replaces_the_library(compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "GNU_OPTIONS", (*building.GNU_OPTIONS, "-DGDN2_LANES=4"))
    path = build_op(tmp_path)
    stamp = path.with_name(f"{path.name}.built-from").read_text()
    monkeypatch.setattr(building, "GNU_OPTIONS", (*building.GNU_OPTIONS, "-O1"))
    assert build_op(tmp_path) == path
    assert path.with_name(f"{path.name}.built-from").read_text() != stamp


def test_a_damaged_library_is_built_again(compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(building, "GNU_OPTIONS", (*building.GNU_OPTIONS, "-DGDN2_LANES=4"))
    library = build_op()
    whole = library.read_bytes()
    assert building.find_op() == library
    library.write_bytes(whole[:5000])
    assert building.find_op() is None
    assert build_op() == library
    assert building.find_op() == library


def test_a_folder_beside_this_one(compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(building, "GNU_OPTIONS", (*building.GNU_OPTIONS, "-DGDN2_LANES=4"))
    assert build_op(Path("op")) == tmp_path / "op" / building.library_name()


def test_a_compiler_that_fails_leaves_nothing(compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "GNU_OPTIONS", ("--no-such-option",))
    with pytest.raises(BackendError, match="could not compile"):
        build_op(tmp_path / "op")
    assert not list(tmp_path.iterdir())


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(building.shutil, "which", lambda name: None)
    monkeypatch.setattr(building.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match="pip install ziglang"):
        build_op(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_compiler_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", f"{sys.executable} -v" if os.name != "nt" else sys.executable)
    assert find_compiler()[0] == sys.executable
    monkeypatch.setenv("CXX", "no such ' compiler")
    with pytest.raises(BackendError, match="is not found"):
        find_compiler()
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BackendError, match="no-such-compiler, which is not found"):
        find_compiler()


def test_compiler_fails(compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "GNU_OPTIONS", (*building.GNU_OPTIONS, "-DGDN2_LANES=banana"))
    with pytest.raises(
        BackendError, match=r"could not compile gated_delta_rule2\.cpp .*error.*: name another compiler"
    ):
        build_op(tmp_path)
    assert not list(tmp_path.iterdir())


def test_folder_cannot_be_written(compiler: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BackendError, match="cannot be written"):
        build_op(tmp_path / "file")
