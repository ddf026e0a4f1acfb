"""GGUF exports, read back with gguf's own reader: weights, sizes, tokenizer, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gguf", reason="the extra gguf is not installed")

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file, save_file
from torch import Tensor

from gdn2_edge.bench.random_weights import random_tensor
from gdn2_edge.checkpoint.reader import Checkpoint, open_checkpoint
from gdn2_edge.convert import convert_checkpoint
from gdn2_edge.errors import BackendError, CheckpointError, FormatError, Gdn2EdgeError, SpecError
from gdn2_edge.export.gguf import export_gguf, exporter
from gdn2_edge.export.gguf.quants import K_TYPES, MIXES, encode, k_quantizer, type_of
from gdn2_edge.gguf_names import Entry, sizes
from gdn2_edge.loading import model_path
from gdn2_edge.quantize import quantize_checkpoint
from gdn2_edge.quantize.recipe import make_recipe
from gdn2_edge.spec import ModelSpec, spec_from_fields

GOLDEN = Path(__file__).parents[1] / "golden"
TINY = model_path("tiny")
# Half a step of each type, over the largest value of a block. The scales are fp16, which adds 2^-11 of a value.
HALF_STEPS = {
    Type.F32: 0.0,
    Type.F16: 2**-11,
    Type.BF16: 2**-8,
    Type.Q8_0: 0.5 / 127,
    Type.Q5_0: 1 / 16,
    Type.Q4_0: 1 / 8,
}
SMALLEST_HALF = 2**-24
SCALE_ROUNDING = 2**-10
SMALL = {
    "vocab_size": 300,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_heads": 2,
    "num_v_heads": 4,
    "head_k_dim": 32,
    "head_v_dim": 64,
    "output_gate": "sigmoid",
    "allow_neg_eigval": True,
    "norm_eps": 1e-6,
}
ATTENTION = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 24,
    "rope_theta": 50_000.0,
}


def random_checkpoint(folder: Path, **changed: Any) -> Path:
    spec = ModelSpec(**{**SMALL, "layer_types": ("gdn2",), **changed})
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {name: random_tensor(name, shape, generator) for name, shape in spec.tensor_shapes().items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "gdn2", **spec.to_json()}))
    return folder


@pytest.fixture(scope="module", params=["recurrent", "hybrid", "grouped"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Goldens of both kinds; and grouped value heads, longer than the keys, between attention layers."""
    out: Path = tmp_path_factory.mktemp("gguf") / request.param
    if request.param == "grouped":
        return random_checkpoint(out, layer_types=("sliding_attention", "gdn2", "sliding_attention"), **ATTENTION)
    config = str(GOLDEN / "hybrid.json") if request.param == "hybrid" else None
    convert_checkpoint(GOLDEN / f"{request.param}-model-ckpt.pth", out, config=config)
    return out


class Read:
    """An exported file: `fields` by key, and canonical tensors, taken apart as docs/gguf.md says."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        self.fields = {name: field.contents() for name, field in reader.fields.items()}
        self.kinds = {name: [kind.name for kind in field.types] for name, field in reader.fields.items()}
        self.types = {tensor.name: tensor.tensor_type for tensor in reader.tensors}
        self.shapes = {tensor.name: tensor.shape.tolist() for tensor in reader.tensors}
        self._values = {t.name: gguf.dequantize(t.data, t.tensor_type).astype(np.float32) for t in reader.tensors}

    def values(self, name: str) -> Tensor:
        return torch.from_numpy(self._values[name])

    def model(self, spec: ModelSpec) -> dict[str, tuple[Tensor, Type]]:
        found: dict[str, tuple[Tensor, Type]] = {}

        def take(name: str, source: str) -> None:
            found[name] = (self.values(source), self.types[source])

        take("embed.weight", "token_embd.weight")
        take("ln_f.weight", "output_norm.weight")
        take("lm_head.weight", "output.weight")
        for i, kind in enumerate(spec.layer_types):
            ours, theirs = f"layers.{i}.", f"blk.{i}."
            names = {"norm_1": "attn_norm", "norm_2": "ffn_norm", "w1": "ffn_gate", "w2": "ffn_up", "w3": "ffn_down"}
            if kind == "gdn2":
                names |= {"b_proj": "ssm_beta", "w_proj": "ssm_write", "o_norm": "ssm_norm", "o_proj": "ssm_out"}
                names |= {"f_proj.0": "ssm_f_a", "f_proj.1": "ssm_f_b", "g_proj.0": "ssm_g_a", "g_proj.1": "ssm_g_b"}
                take(f"{ours}g_proj.1.bias", f"{theirs}ssm_g_b.bias")
                take(f"{ours}dt_bias", f"{theirs}ssm_dt.bias")
                decay = self.values(f"{theirs}ssm_a")
                assert decay.shape == (spec.num_heads, 1)
                found[f"{ours}A_log"] = ((-decay[:, 0]).log(), Type.F32)
                widths = [spec.key_dim, spec.key_dim, spec.value_dim]
                for stored, suffix in (("attn_qkv", "proj"), ("ssm_conv1d", "conv1d")):
                    parts = self.values(f"{theirs}{stored}.weight").split(widths)
                    for letter, part in zip("qkv", parts, strict=True):
                        values = part if suffix == "proj" else part[:, None]
                        found[f"{ours}{letter}_{suffix}.weight"] = (values, self.types[f"{theirs}{stored}.weight"])
            else:
                names |= {f"{letter}_proj": f"attn_{letter}" for letter in "qkv"} | {"o_proj": "attn_output"}
            for name, source in names.items():
                take(f"{ours}{name}.weight", f"{theirs}{source}.weight")
        return found


def export(folder: Path, out: Path, type: str = "f32", **options: Any) -> exporter.Report:
    return export_gguf(folder, out, type, **options)


def check_weights(read: Read, checkpoint: Checkpoint) -> None:
    found = read.model(checkpoint.spec)
    assert set(found) == set(checkpoint.shapes)
    for name, (values, type) in found.items():
        expected = checkpoint.weight(name).rows(slice(None))
        assert values.shape == expected.shape, name
        if name.endswith("A_log"):
            assert torch.allclose(values, expected, rtol=1e-6, atol=1e-6)
            continue
        block = gguf.GGML_QUANT_SIZES[type][0]
        blocks = expected.reshape(-1, block)
        largest = blocks.abs().amax(1, keepdim=True)
        allowed = HALF_STEPS[type] * largest
        if type is not Type.F32:
            allowed += SMALLEST_HALF + (SCALE_ROUNDING * largest if block > 1 else 0)
        assert ((values.reshape(-1, block) - blocks).abs() <= allowed).all(), name


@pytest.mark.parametrize("type", ["f32", "f16", "bf16", "q8_0", "q5_0", "q4_0"])
def test_weights_come_back_within_half_a_step(folder: Path, type: str, tmp_path: Path) -> None:
    report, checkpoint = export(folder, tmp_path / "x.gguf", type), open_checkpoint(folder)
    read = Read(tmp_path / "x.gguf")
    check_weights(read, checkpoint)
    assert report.types == {t.name: list(read.types.values()).count(t) for t in dict.fromkeys(read.types.values())}
    assert report.bytes <= (tmp_path / "x.gguf").stat().st_size
    vectors = {name for name, found in read.types.items() if found is Type.F32}
    assert {"output_norm.weight", "blk.0.attn_norm.weight"} <= vectors
    if "gdn2" in checkpoint.spec.layer_types[:1]:
        assert {"blk.0.ssm_conv1d.weight", "blk.0.ssm_a", "blk.0.ssm_g_b.bias"} <= vectors
        assert "blk.0.ssm_beta.weight" not in vectors or type == "f32"


def test_sizes_say_the_model(folder: Path, tmp_path: Path) -> None:
    export(folder, tmp_path / "x.gguf")
    read, spec = Read(tmp_path / "x.gguf"), open_checkpoint(folder).spec
    fields = {name.removeprefix("gdn2."): value for name, value in read.fields.items()}
    assert fields["general.architecture"] == "gdn2"
    assert spec_from_fields(json.loads(fields["spec"]), "gguf") == spec
    heads = fields["attention.head_count_kv"]
    assert [("gdn2" if n == 0 else "sliding_attention") for n in heads] == list(spec.layer_types)
    assert max(heads) == spec.kv_heads
    # llama.cpp's own sums: the two states of a layer.
    state, groups, inner = (fields[f"ssm.{name}"] for name in ("state_size", "group_count", "inner_size"))
    channels = inner + 2 * groups * state
    assert channels * (fields["ssm.conv_kernel"] - 1) == (2 * spec.key_dim + spec.value_dim) * 3
    assert state * inner == spec.num_v_heads * spec.head_k_dim * spec.head_v_dim
    assert fields["ssm.time_step_rank"] == spec.num_v_heads
    assert (fields["ssm.output_gate"], fields["ssm.allow_neg_eigval"]) == (spec.output_gate, spec.allow_neg_eigval)
    assert fields["attention.layer_norm_rms_epsilon"] == pytest.approx(spec.norm_eps)
    hybrid = {"attention.sliding_window": spec.sliding_window, "rope.freq_base": spec.rope_theta}
    hybrid |= {"rope.dimension_count": spec.head_dim, "attention.key_length": spec.head_dim}
    assert {name: fields.get(name) for name in hybrid} == hybrid
    assert fields["attention.head_count"] == spec.q_heads
    assert read.kinds["gdn2.attention.head_count_kv"] == ["ARRAY", "INT32"]
    assert read.kinds["gdn2.ssm.allow_neg_eigval"] == ["BOOL"]
    assert read.kinds["gdn2.block_count"] == ["UINT32"]
    assert fields["tokenizer.ggml.model"] == "none"
    widths = (read.shapes["token_embd.weight"], read.shapes["output.weight"])
    assert widths == ([spec.hidden_size, spec.vocab_size],) * 2


def test_what_the_default_model_says_of_itself(tmp_path: Path) -> None:
    report = export(TINY, tmp_path / "x.gguf", "q8_0")
    read, config = Read(tmp_path / "x.gguf"), json.loads((TINY / "generation_config.json").read_text())
    fields = read.fields
    expected = {
        "general.name": "tiny",
        "general.license": "apache-2.0",
        "general.languages": ["en"],
        "general.size_label": "24M",
        "general.file_type": 7,
        "general.description": config["description"],
        "general.sampling.temp": 0.0,
        "gdn2.fingerprint": report.fingerprint,
        "gdn2.type": "q8_0",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.eos_token_id": 4,
        "tokenizer.ggml.eot_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.huggingface.json": (TINY / "tokenizer.json").read_text(encoding="utf-8"),
        "tokenizer.chat_template": (TINY / "chat_template.jinja").read_text(encoding="utf-8"),
    }
    assert {name: fields[name] for name in expected} == expected
    assert fields["general.quantized_by"].startswith("gdn2-edge ")
    assert json.loads(fields["gdn2.generation_config"]) == config
    tokens = json.loads(expected["tokenizer.huggingface.json"])
    vocab = {name: i for i, name in enumerate(fields["tokenizer.ggml.tokens"])}
    assert vocab.items() >= tokens["model"]["vocab"].items()
    assert [pair.split(" ") for pair in fields["tokenizer.ggml.merges"]] == tokens["model"]["merges"]
    kinds = fields["tokenizer.ggml.token_type"]
    assert [i for i, kind in enumerate(kinds) if kind == gguf.TokenType.CONTROL] == [0, 1, 2, 3, 4]
    check_weights(read, open_checkpoint(TINY))


@pytest.mark.parametrize("format", ["int8", "int4", "fp8"])
def test_a_quantized_checkpoint_is_expanded(format: str, tmp_path: Path) -> None:
    quantize_checkpoint(random_checkpoint(tmp_path / "a"), tmp_path / "b", make_recipe({"format": format}, "test"))
    export(tmp_path / "b", tmp_path / "x.gguf")
    check_weights(Read(tmp_path / "x.gguf"), open_checkpoint(tmp_path / "b"))


def test_a_dry_run_plans_what_is_written(tmp_path: Path) -> None:
    source = random_checkpoint(tmp_path / "a")
    planned = export(source, tmp_path / "x.gguf", "q4_0", dry_run=True)
    assert not (tmp_path / "x.gguf").exists()
    assert export(source, tmp_path / "x.gguf", "q4_0") == planned


def test_progress_counts_the_bytes(tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    report = export(random_checkpoint(tmp_path / "a"), tmp_path / "new" / "x.gguf", progress=lambda *s: seen.append(s))
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    assert seen[-1] == (report.bytes, report.bytes, "")
    assert {total for _, total, _ in seen} == {report.bytes}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["x.gguf"]


def matrix(columns: int, name: str = "blk.0.ffn_down.weight") -> Entry:
    return Entry(name, (), (64, columns))


@pytest.mark.parametrize(
    ("type", "columns", "found"),
    [
        ("q4_k_m", 2304, Type.Q4_K),
        ("q4_k_m", 6208, Type.Q5_0),  # the 1.3B model's: 97 x 64
        ("q4_k_m", 100, Type.F16),
        ("q4_0", 6208, Type.Q4_0),
        ("q8_0", 100, Type.F16),
        ("bf16", 100, Type.BF16),
    ],
)
def test_the_type_follows_the_length_of_a_row(type: str, columns: int, found: Type) -> None:
    kind, note = type_of(matrix(columns), MIXES[type])
    assert kind is found
    assert bool(note) is (found not in (MIXES[type].matrices,))
    assert str(columns) in note or not note


def test_the_ends_and_the_gates_keep_more_bits() -> None:
    names = (
        "token_embd.weight",
        "output.weight",
        "blk.3.ssm_f_a.weight",
        "blk.3.ssm_g_b.weight",
        "blk.3.ssm_out.weight",
    )
    for type, expected in (("q4_k_m", "Q6_K Q6_K Q8_0 Q8_0 Q4_K"), ("q4_0", "Q8_0 Q8_0 Q8_0 Q8_0 Q4_0")):
        assert [type_of(matrix(512, name), MIXES[type])[0].name for name in names] == expected.split()


def test_rows_no_block_divides_stay_halves(tmp_path: Path) -> None:
    source = random_checkpoint(tmp_path / "a", intermediate_size=100)
    report = export(source, tmp_path / "x.gguf", "q4_0")
    assert report.notes == {"blk.0.ffn_down.weight": "F16: 32 does not divide 100"}
    check_weights(Read(tmp_path / "x.gguf"), open_checkpoint(source))


def test_k_quants_need_llama_cpp(tmp_path: Path) -> None:
    if importlib.util.find_spec("llama_cpp") is not None:
        pytest.skip("llama_cpp is here")
    source = random_checkpoint(tmp_path / "a", hidden_size=256)
    for dry_run in (True, False):
        with pytest.raises(BackendError, match="llama-cpp build"):
            export(source, tmp_path / "x.gguf", "q4_k_m", dry_run=dry_run)
    assert not (tmp_path / "x.gguf").exists()
    # Rows that 256 does not divide take other types, and need nobody.
    report = export(random_checkpoint(tmp_path / "b", num_v_heads=2), tmp_path / "y.gguf", "q4_k_m")
    assert set(report.types) == {"F32", "Q5_0", "Q8_0"}


@pytest.mark.parametrize("type", K_TYPES)
def test_k_quants_of_llama_cpp(type: Type) -> None:
    pytest.importorskip("llama_cpp", reason="no llama_cpp here")
    values = torch.randn(70, 512, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 1, 70)[:, None]
    found = gguf.dequantize(encode(values, type, "x").reshape(70, -1), type)
    error = np.abs(found - values.numpy()).max(1) / values.abs().amax(1).numpy()
    assert error.max() < {Type.Q4_K: 0.08, Type.Q6_K: 0.025}[type]  # a step is a 15th and a 63rd of the range
    assert k_quantizer() is k_quantizer()


def test_the_name_of_the_extra_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name))
    with pytest.raises(BackendError, match=r'pip install "gdn2-edge\[gguf\]"'):
        export(TINY, tmp_path / "x.gguf")


def nan(tensors: dict[str, Tensor]) -> None:
    tensors["layers.0.w1.weight"][3, 5] = float("nan")


def huge(tensors: dict[str, Tensor]) -> None:
    tensors["layers.0.w1.weight"][3, 5] = 1e6


@pytest.mark.parametrize(
    ("change", "type", "words"),
    [
        (nan, "f32", "w1.weight holds values"),
        (nan, "q4_0", "w1.weight holds values"),
        (huge, "f16", "which F16 cannot"),
    ],
)
def test_values_that_no_type_holds(
    change: Callable[[dict[str, Tensor]], None], type: str, words: str, tmp_path: Path
) -> None:
    source = random_checkpoint(tmp_path / "a")
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=words):
        export(source, tmp_path / "new" / "x.gguf", type)
    assert not (tmp_path / "new").exists()
    if change is huge:
        export(source, tmp_path / "x.gguf", "bf16")


def test_refusals_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = random_checkpoint(tmp_path / "a"), tmp_path / "new" / "x.gguf"

    def refused(error: type[Gdn2EdgeError], words: str, src: Path = source, type: str = "f32") -> None:
        with pytest.raises(error, match=words):
            export(src, out, type)
        assert not out.parent.exists()

    refused(FormatError, "expected one of f32, f16", type="q3_k")
    refused(CheckpointError, "no folder of gdn2-edge", GOLDEN / "recurrent-model-ckpt.pth")
    refused(CheckpointError, "no such file", tmp_path / "b")
    (tmp_path / "cut").mkdir()
    shutil.copy(source / "config.json", tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:-100])
    refused(CheckpointError, "not a whole safetensors file", tmp_path / "cut")
    refused(SpecError, "head_v_dim is 32", random_checkpoint(tmp_path / "k", head_k_dim=64, head_v_dim=32))
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
        refused(CheckpointError, "1 MiB are free, 64 MiB are needed")
    for name, content, words in (
        ("tokenizer.json", b"{", "tokenizer.json is not valid JSON"),
        ("tokenizer.json", b"[" * 100_000, "tokenizer.json is not valid JSON"),
        ("tokenizer.json", b"\xff", "not UTF-8"),
        ("tokenizer.json", b'{"model": 3}', "not a file of the tokenizers package"),
        ("generation_config.json", b"[]", "not valid JSON of an object"),
        ("generation_config.json", b'{"top_k": -1}', "which no sampler takes"),
        ("generation_config.json", b'{"temperature": 1e400}', "which no sampler takes"),
        ("generation_config.json", b'{"temperature": NaN}', "which no sampler takes"),
        ("generation_config.json", b'{"description": "\\ud800"}', "no Unicode text"),
    ):
        (source / name).write_bytes(content)
        refused(CheckpointError, words)
        (source / name).unlink()
    export(source, out)
    before = out.read_bytes()
    with pytest.raises(CheckpointError, match="exists"):
        export(source, out)
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("problem", "error"),
    [(KeyboardInterrupt(), KeyboardInterrupt), (OSError(28, "No space left on device"), CheckpointError)],
)
def test_a_full_disk_and_ctrl_c_leave_nothing(
    problem: BaseException, error: type[BaseException], tmp_path: Path
) -> None:
    out = tmp_path / "new" / "x.gguf"

    def stop(done: int, total: int, name: str) -> None:
        assert list(out.parent.iterdir())  # it has begun
        if done > total / 2:
            raise problem

    with pytest.raises(error):
        export(random_checkpoint(tmp_path / "a"), out, progress=stop)
    assert not out.parent.exists()


def test_more_layers_than_llama_cpp_takes() -> None:
    with pytest.raises(SpecError, match="513 layers"):
        sizes(ModelSpec(**SMALL, layer_types=("gdn2",) * 513))


CHILD = """
import resource, sys
from pathlib import Path
from gdn2_edge.export.gguf import export_gguf
export_gguf(Path(sys.argv[1]), Path(sys.argv[2]), "q4_0", dry_run=True)
held = int(next(l for l in open("/proc/self/status") if l.startswith("VmData")).split()[1]) << 10
resource.setrlimit(resource.RLIMIT_DATA, (held + (int(sys.argv[3]) << 20),) * 2)
export_gguf(Path(sys.argv[1]), Path(sys.argv[2]), "q4_0")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits what a process may take")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """260 MB, most of it two matrices of 117 MB, in 150: 31 for a matrix in Q8_0, and fp32 rows of 17 a few times."""
    spec = ModelSpec(**{**SMALL, "vocab_size": 57_000, "hidden_size": 512, "layer_types": ("gdn2",) * 8})
    folder = tmp_path / "a"
    folder.mkdir()
    header, at = {}, 0
    for name, shape in spec.tensor_shapes().items():
        size = 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)  # a hole: zeros that take no room
    (folder / "config.json").write_text(json.dumps({"model_type": "gdn2", **spec.to_json()}))

    def run(megabytes: int, out: str) -> subprocess.CompletedProcess[str]:
        mapped = at >> 20  # torch maps a file so that Linux counts it, read or not
        command = [sys.executable, "-c", CHILD, folder, tmp_path / out, str(mapped + megabytes)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    done = run(150, "x.gguf")
    assert done.returncode == 0, done.stderr
    assert run(40, "y.gguf").returncode != 0  # the limit is one


def test_gguf_dump_opens_it(folder: Path, tmp_path: Path) -> None:
    export(folder, tmp_path / "x.gguf", "q4_0")
    command = [sys.executable, "-m", "gguf.scripts.gguf_dump", "--json", tmp_path / "x.gguf"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["metadata"]["general.architecture"]["value"] == "gdn2"


READER = """
import { gguf, GGMLQuantizationType } from "@huggingface/gguf";
const { metadata, tensorInfos } = await gguf(process.argv[2], { allowLocalFile: true });
const types = tensorInfos.map((tensor) => [tensor.name, GGMLQuantizationType[tensor.dtype], tensor.shape.map(Number)]);
console.log(JSON.stringify({ metadata, types }, (_, value) => (typeof value === "bigint" ? Number(value) : value)));
"""


@pytest.mark.web
@pytest.mark.parametrize("type", ["f32", "q8_0", "q4_0"])
def test_the_reader_of_hugging_face_opens_it(folder: Path, type: str, tmp_path: Path) -> None:
    packages, node = Path(__file__).parents[2] / "examples" / "web" / "node_modules", shutil.which("node")
    if node is None or not (packages / "@huggingface" / "gguf").is_dir():
        pytest.skip("node is missing, or npm ci in examples/web was not run")
    export(folder, tmp_path / "x.gguf", type)
    (tmp_path / "node_modules").symlink_to(packages)
    (tmp_path / "read.mjs").write_text(READER, encoding="utf-8")
    done = subprocess.run(
        [node, tmp_path / "read.mjs", tmp_path / "x.gguf"], capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    found, ours = json.loads(done.stdout), Read(tmp_path / "x.gguf")
    assert found["metadata"]["general.architecture"] == "gdn2"
    assert {key: found["metadata"].get(key) for key in ours.fields if not key.startswith("GGUF.")} == {
        key: value for key, value in ours.fields.items() if not key.startswith("GGUF.")
    }
    assert found["types"] == [[name, type.name, ours.shapes[name]] for name, type in ours.types.items()]
