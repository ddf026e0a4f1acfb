"""Quantizing: what lies in the files, how good it is, what a recipe decides, and the model that comes out."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gdn2_edge.checkpoint import writer
from gdn2_edge.checkpoint.reader import open_checkpoint
from gdn2_edge.convert import convert_checkpoint
from gdn2_edge.errors import CheckpointError, FormatError
from gdn2_edge.kernels import torch_private
from gdn2_edge.model import load_model
from gdn2_edge.quantize import int4 as int4_module
from gdn2_edge.quantize import quantize_checkpoint
from gdn2_edge.quantize.fp8 import encode_fp8
from gdn2_edge.quantize.int4 import encode_int4
from gdn2_edge.quantize.int8 import encode_int8
from gdn2_edge.quantize.recipe import Recipe, load_recipe, plan
from gdn2_edge.spec import NAMED_CONFIGS, spec_from_fields

GOLDEN = Path(__file__).parents[1] / "golden"
FORMATS = ["int8", "fp8", "int4"]

# The relative error of one normal row, by its format's steps: int8 max/127/sqrt(12) with max about 3.3 sigma is
# 0.0075; e4m3 has 4 bits, 0.026; int4 in groups of 32 to 128 is 0.09 to 0.12.
EXPECTED_ERROR = {"int8": (0.004, 0.012), "fp8": (0.02, 0.03), "int4": (0.06, 0.13)}
# One rounding of a scale or a value to fp32.
FP32 = 2e-7
# One rounding of a scale to bf16, and of the largest value to its code, which the search keeps.
BF16 = 2**-8

# 192 and 128 divide by 64, 192 not by 128, and 80, the inputs of o_proj, not by 32.
SPEC = spec_from_fields(
    {
        "vocab_size": 50,
        "hidden_size": 128,
        "intermediate_size": 192,
        "layer_types": ["gdn2", "sliding_attention"],
        "num_heads": 2,
        "num_v_heads": 2,
        "head_k_dim": 32,
        "head_v_dim": 40,
        "output_gate": "silu",
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "sliding_window": 7,
        "rope_theta": 10_000.0,
    },
    "test",
)


def write_model(folder: Path, tensors: dict[str, Tensor], spec: Any = SPEC) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "gdn2", **spec.to_json()}))
    return folder


def make_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in SPEC.tensor_shapes().items():
        tensors[name] = torch.randn(shape, generator=generator)
        if len(shape) == 2:
            tensors[name] = (tensors[name] * torch.rand(shape[0], 1, generator=generator)).bfloat16()
    return tensors


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = write_model(tmp_path / "source", make_tensors())
    (folder / "LICENSE").write_text("free")
    return folder


# The files, read with numpy and nothing else


def numpy_tensors(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """A safetensors file by its own description: 8 bytes of length, a JSON header, then the data."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        first, last = (8 + length + offset for offset in entry["data_offsets"])
        dtype = {"F32": "<f4", "I32": "<i4", "I64": "<i8", "I8": "i1", "BF16": "<u2", "F8_E4M3": "u1"}[entry["dtype"]]
        array = np.frombuffer(data[first:last], dtype).reshape(entry["shape"])
        if entry["dtype"] == "BF16":  # the upper half of fp32
            array = (array.astype("<u4") << 16).view("<f4")
        if entry["dtype"] == "F8_E4M3":  # sign, 4 bits of exponent with bias 7, 3 of fraction; no infinities
            sign, exponent, fraction = array >> 7, (array >> 3) & 15, array & 7
            assert not ((exponent == 15) & (fraction == 7)).any()  # NaN
            normal = (1 + fraction / 8) * 2.0 ** (exponent.astype(int) - 7)
            array = np.where(exponent == 0, fraction / 8 * 2.0**-6, normal) * np.where(sign, -1.0, 1.0)
        found[name] = array
    return found


def numpy_values(stored: dict[str, np.ndarray[Any, Any]], name: str) -> np.ndarray[Any, Any]:
    """One tensor's values in fp64, as compressed-tensors defines them."""
    if f"{name}_packed" in stored:
        packed, scale = stored[f"{name}_packed"], stored[f"{name}_scale"].astype("f8")
        rows, columns = stored[f"{name}_shape"]
        codes = ((packed[:, :, None] >> (4 * np.arange(8))) & 15).reshape(rows, columns) - 8
        return codes * np.repeat(scale, columns // scale.shape[1], axis=1)
    values = stored[name].astype("f8")
    return values * stored[f"{name}_scale"].astype("f8") if f"{name}_scale" in stored else values


@pytest.mark.parametrize("format", FORMATS)
def test_stored_names_dtypes_and_shapes(format: Any, source: Path, tmp_path: Path) -> None:
    quantize_checkpoint(source, tmp_path / "out", Recipe(format=format))
    stored = load_file(tmp_path / "out" / "model.safetensors")
    expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for entry in plan(Recipe(format=format), SPEC):
        name, shape = entry.name, entry.shape
        if len(shape) != 2:
            expected[name] = torch.float32, shape
        elif entry.format == "int4":
            expected[f"{name}_packed"] = torch.int32, (shape[0], shape[1] // 8)
            expected[f"{name}_scale"] = torch.bfloat16, (shape[0], shape[1] // 64)
            expected[f"{name}_shape"] = torch.int64, (2,)
            assert stored[f"{name}_shape"].tolist() == list(shape)
        else:
            expected[name] = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}[entry.format], shape
            expected[f"{name}_scale"] = torch.float32, (shape[0], 1)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in stored.items()} == expected


@pytest.mark.parametrize("format", FORMATS)
def test_numpy_reads_the_same_values_and_the_reported_errors(format: Any, source: Path, tmp_path: Path) -> None:
    report = quantize_checkpoint(source, tmp_path / "out", Recipe(format=format))
    stored = numpy_tensors(tmp_path / "out" / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path / "out")
    original = make_tensors()
    assert [tensor.name for tensor in report.tensors] == list(SPEC.tensor_shapes())
    for tensor in report.tensors:
        values = numpy_values(stored, tensor.name)
        rows = checkpoint.weight(tensor.name).rows(slice(None)).double().numpy()
        assert np.abs(values - rows).max() <= FP32 * np.abs(values).max()
        before = original[tensor.name].double().numpy()
        error = float(np.linalg.norm(values - before) / np.linalg.norm(before))
        assert tensor.relative_error == pytest.approx(error, rel=1e-4, abs=1e-9)
        low, high = EXPECTED_ERROR.get(tensor.format, (0.0, 0.0))
        assert low <= error <= high, (tensor.name, tensor.format)


def test_sizes_in_the_report(source: Path, tmp_path: Path) -> None:
    report = quantize_checkpoint(source, tmp_path / "out", Recipe(format="int4"))
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert report.bytes_before == sum(t.nbytes for t in make_tensors().values())
    assert report.bytes_after == sum(t.nbytes for t in stored.values())
    assert report.parameters == SPEC.num_parameters()
    assert report.bits_per_weight == 8 * report.bytes_after / report.parameters
    assert report.fingerprint == open_checkpoint(tmp_path / "out").fingerprint
    assert json.loads(json.dumps(report.to_json()))["bits_per_weight"] == report.bits_per_weight
    assert (tmp_path / "out" / "LICENSE").read_text() == "free"


# Encoders


def normal(rows: int = 40, columns: int = 256) -> Tensor:
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    return values * torch.arange(1, rows + 1)[:, None]


Encoder = Callable[[Tensor], Any]
ENCODERS: dict[str, Encoder] = {
    "int8": lambda v: encode_int8("w", v),
    "fp8": lambda v: encode_fp8("w", v),
    "int4 of 32": lambda v: encode_int4("w", v, 32),
    "int4 of 64": lambda v: encode_int4("w", v, 64),
    "int4 of 128": lambda v: encode_int4("w", v, 128),
}


def row_errors(encoder: Encoder, values: Tensor) -> Tensor:
    return (encoder(values).rows(slice(None)) - values).double().norm(dim=1) / values.double().norm(dim=1)


def test_finer_formats_are_better_in_every_row() -> None:
    errors = [row_errors(encoder, normal()) for encoder in ENCODERS.values()]
    assert (errors[0] < errors[1]).all()
    assert (errors[1] < errors[2]).all()
    assert [float(e.mean()) for e in errors] == sorted(float(e.mean()) for e in errors)


@pytest.mark.parametrize(("format", "steps"), [("int8", 127), ("int4 of 32", 7)])
def test_every_value_is_rounded_to_its_nearest_code(format: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int4_module, "CLIP_FRACTIONS", (1.0,))
    values = normal(columns=32)
    step = values.abs().amax(1, keepdim=True) / steps
    half = step * (0.5 + steps * (BF16 if format != "int8" else FP32))  # and the rounding of the scale itself
    assert ((ENCODERS[format](values).rows(slice(None)) - values).abs() <= half).all()


@pytest.mark.parametrize("encoder", ENCODERS.values(), ids=ENCODERS.keys())
def test_a_row_is_encoded_alone(encoder: Encoder) -> None:
    values = normal()
    whole = encoder(values).rows(slice(None))
    for row in (0, 17, 39):
        assert torch.equal(encoder(values[row : row + 1]).rows(slice(None)), whole[row : row + 1])


@pytest.mark.parametrize("encoder", ENCODERS.values(), ids=ENCODERS.keys())
def test_a_row_of_zeros_stays_zero(encoder: Encoder) -> None:
    values = normal(3)
    values[1] = 0
    weight = encoder(values)
    assert (weight.rows(slice(None))[1] == 0).all()
    assert torch.isfinite(weight.scale.float()).all()
    assert (weight.scale > 0).all()


@pytest.mark.parametrize("constant", [1.0, -3.3, 1e-20, 1e20])
@pytest.mark.parametrize("name", ENCODERS)
def test_a_constant_row_is_kept(name: str, constant: float) -> None:
    found = ENCODERS[name](torch.full((2, 128), constant)).rows(slice(None))
    tolerance = BF16 if name.startswith("int4") else FP32
    assert ((found - constant).abs() <= tolerance * abs(constant)).all()


@pytest.mark.parametrize("encoder", ENCODERS.values(), ids=ENCODERS.keys())
@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e37])
def test_the_smallest_and_largest_numbers(encoder: Encoder, size: float) -> None:
    values = torch.full((1, 128), size)
    values[0, ::2] = 0
    found = encoder(values).rows(slice(None))
    assert torch.isfinite(found).all()
    assert (found[0, ::2] == 0).all()
    assert (found <= 1.1 * values + 1e-44).all()  # the smallest scales have few bits left


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_the_clip_search_is_never_worse_than_plain_rounding(group_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = normal()
    values[::3] **= 3  # heavy tails
    searched = encode_int4("w", values, group_size).rows(slice(None))
    monkeypatch.setattr(int4_module, "CLIP_FRACTIONS", (1.0,))
    plain = encode_int4("w", values, group_size).rows(slice(None))

    def group_errors(found: Tensor) -> Tensor:
        return (found - values).double().square().unflatten(1, (-1, group_size)).sum(-1)

    assert (group_errors(searched) <= group_errors(plain) * (1 + FP32)).all()
    assert group_errors(searched).sum() < 0.98 * group_errors(plain).sum()


def test_all_sixteen_codes_of_int4_are_used() -> None:
    values = torch.arange(-8.0, 8.0).repeat(1, 2)  # the scale is 7 / 8 of the one that takes 8 to code 7
    assert torch.equal(encode_int4("w", values, 32).rows(slice(None)), values)


def test_chunks_of_rows_give_the_same_as_all_at_once(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for format in ("int8", "int4"):
        whole = quantize_checkpoint(source, tmp_path / f"{format} whole", Recipe(format=format))
        monkeypatch.setattr("gdn2_edge.quantize.CHUNK_VALUES", 1000)
        pieces = quantize_checkpoint(source, tmp_path / f"{format} pieces", Recipe(format=format))
        monkeypatch.undo()
        assert pieces.fingerprint == whole.fingerprint
        for one, other in zip(pieces.tensors, whole.tensors, strict=True):
            assert one.relative_error == pytest.approx(other.relative_error, rel=1e-9)


# Recipes and plans


def planned(recipe: Recipe, spec: Any = SPEC) -> dict[str, tuple[str, int, str]]:
    return {entry.name: (entry.format, entry.group_size, entry.note) for entry in plan(recipe, spec)}


def test_the_group_that_6208_divides_by_is_named() -> None:
    spec = spec_from_fields(NAMED_CONFIGS["gdn2_1.3B"], "gdn2_1.3B")
    found = planned(Recipe(format="int4", group_size=128), spec)
    assert found["layers.0.w3.weight"] == ("int4", 64, "group 64: 128 does not divide 6208")
    assert found["layers.0.w1.weight"] == ("int4", 128, "")
    assert found["layers.0.b_proj.weight"] == ("int4", 128, "")
    found = planned(Recipe(format="int4", group_size=64), spec)
    assert {note for _, _, note in found.values()} == {"", "kept at int8"}


def test_what_no_group_divides_is_int8_and_says_so() -> None:
    found = planned(Recipe(format="int4"))
    assert found["layers.0.o_proj.weight"] == ("int8", 0, "int8: no group of 32 or more divides 80")
    assert found["layers.1.o_proj.weight"] == ("int4", 64, "")


def test_what_int4_leaves_at_int8() -> None:
    found = planned(Recipe(format="int4"))
    kept = {name for name, entry in found.items() if entry == ("int8", 0, "kept at int8")}
    gates = {f"layers.0.{n}_proj.{i}.weight" for n in "fg" for i in (0, 1)}
    assert kept == {"embed.weight", "lm_head.weight", *gates}


@pytest.mark.parametrize("format", FORMATS)
def test_vectors_and_filters_stay_fp32(format: Any) -> None:
    rules = [{"tensors": "*", "format": "bf16"}]
    for recipe in (Recipe(format=format), Recipe.model_validate({"format": format, "rules": rules})):
        found = planned(recipe)
        for name, shape in SPEC.tensor_shapes().items():
            assert (found[name][0] == "fp32") == (len(shape) != 2)


def test_the_first_rule_that_matches_wins() -> None:
    rules = [
        {"tensors": "*.b_proj.weight", "format": "bf16"},
        {"tensors": "layers.0.*", "format": "fp8"},
        {"tensors": "layers.0.q_proj.weight", "format": "fp32"},
        {"tensors": "embed.weight", "format": "int4"},
    ]
    found = planned(Recipe.model_validate({"format": "int4", "rules": rules}))
    assert found["layers.0.b_proj.weight"] == ("bf16", 0, "kept at bf16")
    assert found["layers.0.q_proj.weight"] == ("fp8", 0, "kept at fp8")
    assert found["layers.0.f_proj.0.weight"] == ("fp8", 0, "kept at fp8")  # before int4's own exceptions
    assert found["layers.1.q_proj.weight"] == ("int4", 64, "")
    assert found["embed.weight"] == ("int4", 64, "")
    assert found["lm_head.weight"] == ("int8", 0, "kept at int8")


def test_int4_in_an_int8_recipe() -> None:
    rules = [{"tensors": "*.w?.weight", "format": "int4"}, {"tensors": "*.o_proj.weight", "format": "int4"}]
    found = planned(Recipe.model_validate({"format": "int8", "rules": rules, "group_size": 128}))
    assert found["layers.0.w1.weight"] == ("int4", 128, "kept at int4")
    assert found["layers.0.w3.weight"] == ("int4", 64, "group 64: 128 does not divide 192")
    assert found["layers.0.o_proj.weight"] == ("int8", 0, "int8: no group of 32 or more divides 80")
    assert found["embed.weight"] == ("int8", 0, "")


@pytest.mark.parametrize("pattern", ["layers.9.*", "*.norm_1.weight", "A_log", "q_proj"])
def test_a_rule_that_matches_no_matrix(pattern: str) -> None:
    recipe = Recipe.model_validate({"format": "int8", "rules": [{"tensors": pattern, "format": "bf16"}]})
    with pytest.raises(FormatError, match="matches no matrix"):
        plan(recipe, SPEC)


def test_a_recipe_file_and_what_replaces_it(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text('format = "int4"\ngroup_size = 32\n[[rules]]\ntensors = "*.b_proj.weight"\nformat = "bf16"\n')
    assert load_recipe(path).group_size == 32
    assert load_recipe(path).rules[0].format == "bf16"
    replaced = load_recipe(path, "fp8", 64)
    assert (replaced.format, replaced.group_size, replaced.rules) == ("fp8", 64, load_recipe(path).rules)


# Quantizing a folder


def test_a_dry_run_writes_nothing(source: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    dry = quantize_checkpoint(source, tmp_path / "deep" / "out", Recipe(format="int4"), dry_run=True)
    assert sorted(tmp_path.rglob("*")) == before
    assert dry.fingerprint is None
    done = quantize_checkpoint(source, tmp_path / "deep" / "out", Recipe(format="int4"))
    assert (dry.bytes_before, dry.bytes_after) == (done.bytes_before, done.bytes_after)
    for planned_tensor, tensor in zip(dry.tensors, done.tensors, strict=True):
        assert planned_tensor.relative_error is None
        assert (planned_tensor.format, planned_tensor.bytes_after) == (tensor.format, tensor.bytes_after)


def test_config_in_compressed_tensors_words(source: Path, tmp_path: Path) -> None:
    rules = [{"tensors": "*.b_proj.weight", "format": "bf16"}]
    recipe = Recipe.model_validate({"format": "int4", "group_size": 128, "rules": rules})
    quantize_checkpoint(source, tmp_path / "out", recipe)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["format"]) == ("compressed-tensors", "mixed-precision")
    assert config["ignore"] == ["layers.0.b_proj"]
    groups = {
        (group["format"], group["weights"].get("group_size")): (group["targets"], group["weights"])
        for group in config["config_groups"].values()
    }
    assert groups.keys() == {("int-quantized", None), ("pack-quantized", 128), ("pack-quantized", 64)}
    targets, weights = groups["pack-quantized", 64]
    assert targets == ["layers.0.w3", "layers.1.o_proj", "layers.1.w3"]
    assert weights == {"num_bits": 4, "type": "int", "strategy": "group", "symmetric": True, "group_size": 64}
    targets, weights = groups["int-quantized", None]
    assert weights == {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
    everything = [target for targets, _ in groups.values() for target in targets] + config["ignore"]
    matrices = [n.removesuffix(".weight") for n, shape in SPEC.tensor_shapes().items() if len(shape) == 2]
    assert sorted(everything) == sorted(matrices)


@pytest.mark.parametrize(
    ("format", "name", "kind"), [("int8", "int-quantized", "int"), ("fp8", "float-quantized", "float")]
)
def test_config_of_one_format(format: Any, name: str, kind: str, source: Path, tmp_path: Path) -> None:
    quantize_checkpoint(source, tmp_path / "out", Recipe(format=format))
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    (group,) = config["config_groups"].values()
    assert (config["format"], group["format"], group["weights"]["type"], config["ignore"]) == (name, name, kind, [])


def test_quantizing_twice_is_refused(source: Path, tmp_path: Path) -> None:
    for format in ("int8", "int4"):
        quantize_checkpoint(source, tmp_path / format, Recipe(format=format))
        with pytest.raises(FormatError, match=r"embed\.weight is already quantized\. Quantize from the original"):
            quantize_checkpoint(tmp_path / format, tmp_path / "out", Recipe(format="fp8"))


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    tensors = make_tensors()
    tensors["layers.1.w2.weight"][3, 5] = torch.inf
    source = write_model(tmp_path / "source", tensors)
    with pytest.raises(CheckpointError, match=r"layers\.1\.w2\.weight holds values that are not finite"):
        quantize_checkpoint(source, tmp_path / "out", Recipe(format="int8"))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_interrupted_run_goes_on(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "SHARD_BYTES", 20_000)
    at_once = quantize_checkpoint(source, tmp_path / "at once", Recipe(format="int4"))

    def interrupt(done: int, total: int, name: str) -> None:
        if name == "layers.1.norm_1.weight":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, tmp_path / "out", Recipe(format="int4"), progress=interrupt)
    again = quantize_checkpoint(source, tmp_path / "out", Recipe(format="int4"))
    assert again.fingerprint == at_once.fingerprint
    assert {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()} == {
        f.name: f.read_bytes() for f in (tmp_path / "at once").iterdir()
    }
    errors = [tensor.relative_error for tensor in again.tensors]
    assert errors == [tensor.relative_error for tensor in at_once.tensors]  # those of the first run too
    assert len(list((tmp_path / "out").glob("*.safetensors"))) >= 3


def test_another_recipe_starts_over(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "SHARD_BYTES", 20_000)

    def interrupt(done: int, total: int, name: str) -> None:
        if name == "layers.1.norm_1.weight":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, tmp_path / "out", Recipe(format="int4"), progress=interrupt)
    done = quantize_checkpoint(source, tmp_path / "out", Recipe(format="int4", group_size=32))
    assert all(tensor.relative_error is not None for tensor in done.tensors)


# The quantized model


# The logits of stored codes against those of the same values in fp32, over their spread: root mean square, and the
# largest of 120,000. About twice what was measured.
# One order of sums or another, as for any fp32 model (test_model.py).
EXACT = (2e-5, 5e-5)
# int8 with activations in 16 bits of their row's largest: 3e-5 a product, some twenty products in a row.
FIXED_POINT = (5e-4, 5e-3)
# Products with activations and results in bf16.
BF16_PRODUCTS = (2e-2, 0.25)


@pytest.fixture(scope="module", params=["recurrent", "hybrid"])
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("golden") / request.param
    config = str(GOLDEN / "hybrid.json") if request.param == "hybrid" else None
    convert_checkpoint(GOLDEN / f"{request.param}-model-ckpt.pth", folder, config=config)
    return folder, load_file(GOLDEN / f"{request.param}-golden.safetensors")


def distances(found: Tensor, expected: Tensor) -> tuple[float, float]:
    difference = (found - expected).double() / expected.std()
    return float(difference.square().mean().sqrt()), float(difference.abs().max())


def limits(format: str, rows: int) -> tuple[float, float]:
    """What the products that this machine has for a format allow."""
    if format == "int4" and torch_private.has_int4():
        return BF16_PRODUCTS
    if format in ("int8", "int4"):  # int4 keeps some matrices at int8
        if torch_private.has_int8():
            return FIXED_POINT
        if torch_private.has_bf16_int8() and rows <= torch_private.BF16_INT8_MAX_ROWS:
            return BF16_PRODUCTS
    return EXACT


@pytest.fixture(scope="module")
def models(golden: tuple[Path, dict[str, Tensor]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The golden model in each format, and (as "FORMAT fp32") the same values as fp32."""
    folder, found = tmp_path_factory.mktemp("quantized"), {}
    for format in FORMATS:
        found[format] = folder / format
        quantize_checkpoint(golden[0], found[format], Recipe(format=format))
        checkpoint = open_checkpoint(found[format])
        values = {n: checkpoint.weight(n).rows(slice(None)).contiguous() for n in checkpoint.spec.tensor_shapes()}
        found[f"{format} fp32"] = write_model(folder / f"{format} fp32", values, checkpoint.spec)
    return found


PATHS = {
    "as this machine is": (),
    "without integer products": ("has_int8",),
    "with exact products only": ("has_int8", "has_bf16_int8", "has_int4"),
}


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
@pytest.mark.parametrize("format", FORMATS)
def test_a_quantized_model_is_the_model_of_its_values(
    format: str,
    path: tuple[str, ...],
    golden: tuple[Path, dict[str, Tensor]],
    models: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in path:
        monkeypatch.setattr(torch_private, name, lambda: False)
    ids = golden[1]["input_ids"].long()
    expected, _ = load_model(models[f"{format} fp32"], "cpu").forward(ids)
    model = load_model(models[format], "cpu")
    logits, _ = model.forward(ids)
    state, steps = model.initial_state(2), []
    for t in range(40):
        step, state = model.step(ids[:, t], state)
        steps.append(step)
    for found, wanted, rows in ((logits, expected, ids.numel()), (torch.stack(steps, 1), expected[:, :40], len(ids))):
        mean, largest = distances(found, wanted)
        assert mean < limits(format, rows)[0]
        assert largest < limits(format, rows)[1]


def test_finer_formats_are_nearer_to_the_golden(
    golden: tuple[Path, dict[str, Tensor]], models: dict[str, Path]
) -> None:
    ids, logits = golden[1]["input_ids"].long(), golden[1]["logits"]
    errors = [distances(load_model(models[f], "cpu").forward(ids)[0], logits)[0] for f in ("int8", "fp8", "int4")]
    # Random weights have no slack: int8 is off by 4 to 6 % here.
    assert errors[0] < 0.1
    assert 2 * errors[0] < errors[1]
    assert 1.5 * errors[1] < errors[2] < 1


@pytest.mark.parametrize("format", FORMATS)
def test_weights_take_the_memory_they_say(
    format: str, golden: tuple[Path, dict[str, Tensor]], models: dict[str, Path]
) -> None:
    assert load_model(models[format], "cpu").weight_bytes < 0.5 * load_model(golden[0], "cpu").weight_bytes
