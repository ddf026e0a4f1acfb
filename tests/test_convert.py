"""Converting into our folder: dtypes, what joins the weights, and our own folders again."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gdn2_edge.checkpoint.reader import open_checkpoint
from gdn2_edge.convert import DTYPES, convert_checkpoint, spec_overrides
from gdn2_edge.errors import CheckpointError, SpecError
from gdn2_edge.generate.text import open_text
from gdn2_edge.loading import model_path
from gdn2_edge.quantize import quantize_checkpoint
from gdn2_edge.quantize.recipe import Recipe
from gdn2_edge.spec import NAMED_CONFIGS, spec_from_fields

TINY = model_path("tiny")
SPEC = spec_from_fields(
    {
        "vocab_size": 8192,  # as many as the default model's tokenizer has
        "hidden_size": 8,
        "intermediate_size": 12,
        "layer_types": ["gdn2"],
        "num_heads": 1,
        "num_v_heads": 2,
        "head_k_dim": 4,
        "head_v_dim": 5,
        "output_gate": "silu",
    },
    "test",
)


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SPEC.tensor_shapes().items()}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.safetensors"
    save_file(tensors(), path)
    return path


def converted(source: Path, out: Path, **options: Any) -> dict[str, Tensor]:
    convert_checkpoint(source, out, **{"output_gate": "silu", **options})
    return load_file(out / "model.safetensors")


# Values and dtypes


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("asked", [None, *DTYPES])
def test_dtype_is_of_matrices(stored: str, asked: str | None, tmp_path: Path) -> None:
    save_file(tensors(DTYPES[stored]), tmp_path / "source.safetensors")
    found = converted(tmp_path / "source.safetensors", tmp_path / "out", dtype=asked)
    assert found.keys() == SPEC.tensor_shapes().keys()
    for name, tensor in tensors(DTYPES[stored]).items():
        wanted = DTYPES[asked or stored] if tensor.ndim == 2 else torch.float32
        assert found[name].dtype == wanted, name
        assert torch.equal(found[name], tensor.to(wanted)), name


def test_the_report_says_what_was_made(source: Path, tmp_path: Path) -> None:
    done = convert_checkpoint(source, tmp_path / "out", output_gate="silu", dtype="bf16")
    checkpoint = open_checkpoint(tmp_path / "out")
    assert (done.source, done.out, done.kind) == (str(source), str(tmp_path / "out"), "fla")
    assert done.parameters == SPEC.num_parameters() == sum(t.numel() for t in tensors().values())
    assert done.nbytes == sum(t.numel() * (2 if t.ndim == 2 else 4) for t in tensors().values())
    assert done.fingerprint == checkpoint.fingerprint
    assert checkpoint.spec == SPEC


def test_an_unknown_dtype(source: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="dtype is 'fp64', expected one of fp32, bf16, fp16"):
        convert_checkpoint(source, tmp_path / "out", output_gate="silu", dtype="fp64")
    assert not (tmp_path / "out").exists()


# Our own folders


def test_our_own_folder_is_copied_exactly(source: Path, tmp_path: Path) -> None:
    first = convert_checkpoint(source, tmp_path / "a", output_gate="silu", tokenizer=TINY)
    (tmp_path / "a" / "LICENSE").write_text("free")
    second = convert_checkpoint(tmp_path / "a", tmp_path / "b")
    assert second.kind == "gdn2"
    assert second.fingerprint == first.fingerprint
    assert {f.name: f.read_bytes() for f in (tmp_path / "a").iterdir()} == {
        f.name: f.read_bytes() for f in (tmp_path / "b").iterdir()
    }
    third = convert_checkpoint(tmp_path / "a", tmp_path / "c", dtype="bf16")
    assert third.fingerprint != first.fingerprint


def test_a_source_is_never_replaced(source: Path, tmp_path: Path) -> None:
    converted(source, tmp_path / "a")
    before = (tmp_path / "a" / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="is or holds the source"):
        convert_checkpoint(tmp_path / "a", tmp_path / "a", dtype="bf16", force=True)
    with pytest.raises(CheckpointError, match="is or holds the source"):
        quantize_checkpoint(tmp_path / "a", tmp_path / "b" / ".." / "a", Recipe(format="int8"), force=True)
    for inside in (tmp_path / "a" / "b", tmp_path / "a" / "b" / "c"):
        with pytest.raises(CheckpointError, match="is inside the source"):
            convert_checkpoint(tmp_path / "a", inside)
        with pytest.raises(CheckpointError, match="is inside the source"):
            quantize_checkpoint(tmp_path / "a", inside, Recipe(format="int8"))
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == before


def test_a_quantized_folder_is_refused(source: Path, tmp_path: Path) -> None:
    converted(source, tmp_path / "a")
    quantize_checkpoint(tmp_path / "a", tmp_path / "q", Recipe(format="int8"))
    with pytest.raises(CheckpointError, match=r"is quantized\. Convert from the original checkpoint"):
        convert_checkpoint(tmp_path / "q", tmp_path / "b")
    assert not (tmp_path / "b").exists()


# Tokenizer and template


TOKENIZER, TEMPLATE = (TINY / "tokenizer.json").read_bytes(), (TINY / "chat_template.jinja").read_bytes()
GENERATION = (TINY / "generation_config.json").read_bytes()
OTHER_TEMPLATE = (
    b"{% for m in messages %}[{{ m.role }}]{{ m.content }}<|end|>{% endfor %}"
    b"{% if add_generation_prompt %}[assistant]{% endif %}"
)


def text_files(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.name not in ("model.safetensors", "config.json")}


def test_without_a_tokenizer_there_is_none(source: Path, tmp_path: Path) -> None:
    converted(source, tmp_path / "out")
    assert text_files(tmp_path / "out") == {}


def test_tokenizer_from_a_file(source: Path, tmp_path: Path) -> None:
    converted(source, tmp_path / "out", tokenizer=TINY / "tokenizer.json")
    assert text_files(tmp_path / "out") == {"tokenizer.json": TOKENIZER}


def test_tokenizer_from_a_folder_brings_its_template(source: Path, tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    for name, content in {
        "tokenizer.json": TOKENIZER,
        "chat_template.jinja": TEMPLATE,
        "generation_config.json": GENERATION,
        "README.md": b"of another model",
        "LICENSE": b"of another model",
    }.items():
        (tokenizer / name).write_bytes(content)
    converted(source, tmp_path / "out", tokenizer=tokenizer)
    assert text_files(tmp_path / "out") == {
        "tokenizer.json": TOKENIZER,
        "chat_template.jinja": TEMPLATE,
        "generation_config.json": GENERATION,
    }
    assert open_text(tmp_path / "out").turns is not None


def test_a_template_inside_tokenizer_config(source: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_bytes(TOKENIZER)
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE.decode()}))
    converted(source, tmp_path / "out", tokenizer=tmp_path / "tokenizer")
    assert text_files(tmp_path / "out") == {"tokenizer.json": TOKENIZER, "chat_template.jinja": TEMPLATE}
    (tmp_path / "tokenizer" / "chat_template.jinja").write_bytes(OTHER_TEMPLATE)  # a file of its own comes first
    converted(source, tmp_path / "again", tokenizer=tmp_path / "tokenizer")
    assert text_files(tmp_path / "again")["chat_template.jinja"] == OTHER_TEMPLATE


def test_a_template_that_is_given_comes_first(source: Path, tmp_path: Path) -> None:
    (tmp_path / "other.jinja").write_bytes(OTHER_TEMPLATE)
    converted(source, tmp_path / "out", tokenizer=TINY, chat_template=tmp_path / "other.jinja")
    assert text_files(tmp_path / "out")["chat_template.jinja"] == OTHER_TEMPLATE
    # and over a folder of ours that has one
    convert_checkpoint(tmp_path / "out", tmp_path / "again", chat_template=TINY / "chat_template.jinja")
    assert text_files(tmp_path / "again")["chat_template.jinja"] == TEMPLATE


@pytest.mark.parametrize("as_folder", [True, False])
def test_a_sentencepiece_model_becomes_a_tokenizer(as_folder: bool, source: Path, tmp_path: Path) -> None:
    spm = pytest.importorskip("sentencepiece", reason='needs: pip install "gdn2-edge[sentencepiece]"')
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(["the state is the memory", "a talk is fed once"] * 40),
        model_writer=model,
        vocab_size=60,
        model_type="bpe",
        minloglevel=2,
    )
    (tmp_path / "t").mkdir()
    path = tmp_path / "t" / "tokenizer.model"
    path.write_bytes(model.getvalue())
    converted(source, tmp_path / "out", tokenizer=path.parent if as_folder else path)
    text = open_text(tmp_path / "out")
    reference = spm.SentencePieceProcessor(model_proto=model.getvalue())
    assert text.vocab_size == 60
    assert text.encode("the talk is a memory") == reference.encode("the talk is a memory")


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    spec = SPEC.model_copy(update={"vocab_size": 8191})
    save_file({name: torch.zeros(shape) for name, shape in spec.tensor_shapes().items()}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=r"has 8192 tokens, the model 8191\. Does it belong"):
        convert_checkpoint(tmp_path / "m.safetensors", tmp_path / "out", output_gate="silu", tokenizer=TINY)


def test_a_folder_without_a_tokenizer(source: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        convert_checkpoint(source, tmp_path / "out", output_gate="silu", tokenizer=tmp_path)


# Configurations


def test_a_published_name_gives_its_fields() -> None:
    assert spec_overrides("gdn2_1.3B") == NAMED_CONFIGS["gdn2_1.3B"]
    assert spec_overrides("gdn2_1.3B", "silu") == NAMED_CONFIGS["gdn2_1.3B"]
    assert spec_overrides(None, "sigmoid") == {"output_gate": "sigmoid"}
    assert spec_overrides(None) == {}
    spec_overrides("gdn2_12h_100M", "silu")
    assert "output_gate" not in NAMED_CONFIGS["gdn2_12h_100M"]  # the table is not changed


def test_a_configuration_from_a_file(source: Path, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(json.dumps({"model_type": "gdn2", "norm_eps": 1e-6, "output_gate": "sigmoid"}))
    converted(source, tmp_path / "out", config=str(tmp_path / "c.json"), output_gate=None)
    spec = open_checkpoint(tmp_path / "out").spec
    assert (spec.norm_eps, spec.output_gate) == (1e-6, "sigmoid")


def test_configurations_that_contradict(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="--config says output_gate silu, --output-gate says sigmoid"):
        spec_overrides("gdn2_1.3B", "sigmoid")
    with pytest.raises(SpecError, match=r"neither a file nor one of gdn2_1\.3B, "):
        spec_overrides("gdn2_7B")
