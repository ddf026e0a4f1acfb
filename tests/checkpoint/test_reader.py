"""Opening checkpoints of every kind: the same model under all names, sizes from shapes, questions by name."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from gdn2_edge.checkpoint.reader import Checkpoint, open_checkpoint
from gdn2_edge.errors import CheckpointError, SpecError
from gdn2_edge.spec import NAMED_CONFIGS, ModelSpec, spec_from_fields

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 56,
    "num_heads": 2,
    "num_v_heads": 4,
    "head_k_dim": 8,
    "head_v_dim": 6,
    "conv_size": 3,
    "output_gate": "silu",
}
ATTENTION: dict[str, Any] = {
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "sliding_window": 5,
    "rope_theta": 10_000.0,
}
PURE = spec_from_fields({**SIZES, "layer_types": ["gdn2"] * 3}, "test")
HYBRID = spec_from_fields({**SIZES, **ATTENTION, "layer_types": ["sliding_attention", "gdn2"]}, "test")
ASKED = {"sliding_window": 5, "head_dim": 10}

FLA_NAMES = {
    "norm_1.weight": "attn_norm.weight",
    "norm_2.weight": "mlp_norm.weight",
    "w1.weight": "mlp.gate_proj.weight",
    "w2.weight": "mlp.up_proj.weight",
    "w3.weight": "mlp.down_proj.weight",
}


def tensors_of(spec: ModelSpec) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in spec.tensor_shapes().items()}


def fuse(q: Tensor, k: Tensor, v: Tensor, groups: int) -> Tensor:
    """For each query group its q heads, then k, then v."""
    parts = zip(q.chunk(groups), k.chunk(groups), v.chunk(groups), strict=True)
    return torch.cat([rows for part in parts for rows in part])


def lit_gpt(tensors: dict[str, Tensor], spec: ModelSpec) -> dict[str, Tensor]:
    """The tensors under the names of NVlabs' training files."""
    top = {"embed.weight": "transformer.wte.weight", "ln_f.weight": "transformer.ln_f.weight"}
    named = {}
    for name, tensor in tensors.items():
        if not name.startswith("layers."):
            named[top.get(name, name)] = tensor
            continue
        _, i, rest = name.split(".", 2)
        if spec.layer_types[int(i)] == "sliding_attention" and "_proj" in rest:
            q, k, v = (tensors[f"layers.{i}.{n}_proj.weight"] for n in "qkv")
            named[f"transformer.h.{i}.attn.attn.weight"] = fuse(q, k, v, spec.kv_heads)
            named[f"transformer.h.{i}.attn.proj.weight"] = tensors[f"layers.{i}.o_proj.weight"]
            continue
        outer = (
            "" if rest.startswith("norm_") else "mlp.swiglu." if rest.startswith("w") and rest[1].isdigit() else "attn."
        )
        named[f"transformer.h.{i}.{outer}{rest}"] = tensor
    return named


def fla(tensors: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """The tensors as a state dict around fla's layers has them."""
    top = {"embed.weight": f"{prefix}embeddings.weight", "ln_f.weight": f"{prefix}norm.weight"}
    named = {}
    for name, tensor in tensors.items():
        if name.startswith("layers."):
            _, i, rest = name.split(".", 2)
            named[f"{prefix}layers.{i}.{FLA_NAMES.get(rest, f'attn.{rest}')}"] = tensor
        else:
            named[top.get(name, name)] = tensor
    return named


def assert_same_model(checkpoint: Checkpoint, spec: ModelSpec, tensors: dict[str, Tensor]) -> None:
    assert checkpoint.spec == spec
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.weight(name).rows(slice(None)), tensor), name
        assert checkpoint.stored(name)[""].shape == tuple(tensor.shape)


# The same model under all names


def test_nvlabs_training_file(tmp_path: Path) -> None:
    tensors = tensors_of(PURE)
    saved = {"model": lit_gpt(tensors, PURE), "optimizer": None, "hparams": {"x": 1}, "iter_num": 3, "step_count": 1}
    torch.save(saved, tmp_path / "x-model-ckpt.pth")
    checkpoint = open_checkpoint(tmp_path / "x-model-ckpt.pth")
    assert checkpoint.kind == "nvlabs"
    assert_same_model(checkpoint, PURE, tensors)


@pytest.mark.parametrize("asked", [ASKED, {"sliding_window": 5, "num_attention_heads": 6}], ids=["dim", "heads"])
def test_nvlabs_hybrid(asked: dict[str, Any], tmp_path: Path) -> None:
    tensors = tensors_of(HYBRID)
    torch.save(lit_gpt(tensors, HYBRID), tmp_path / "model.pth")
    assert_same_model(open_checkpoint(tmp_path / "model.pth", asked), HYBRID, tensors)


def test_fused_rows_by_hand(tmp_path: Path) -> None:
    tensors = lit_gpt(tensors_of(HYBRID), HYBRID)
    # Two query groups of three q heads, one k and one v; each head has ten rows. Every row holds its own number.
    fused = tensors["transformer.h.0.attn.attn.weight"]
    assert fused.shape == (2 * (3 + 1 + 1) * 10, 24)
    fused[:] = torch.arange(100.0)[:, None]
    torch.save(tensors, tmp_path / "model.pth")
    checkpoint = open_checkpoint(tmp_path / "model.pth", ASKED)
    rows = {n: checkpoint.weight(f"layers.0.{n}_proj.weight").rows(slice(None))[:, 0].int().tolist() for n in "qkv"}
    assert rows["q"] == [*range(30), *range(50, 80)]
    assert rows["k"] == [*range(30, 40), *range(80, 90)]
    assert rows["v"] == [*range(40, 50), *range(90, 100)]


@pytest.mark.parametrize("prefix", ["", "model.", "module.backbone."])
def test_fla_layers(prefix: str, tmp_path: Path) -> None:
    spec = PURE.model_copy(update={"output_gate": "sigmoid"})
    tensors = tensors_of(spec)
    save_file(fla(tensors, prefix), tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path / "model.safetensors", {"output_gate": "sigmoid"})
    assert checkpoint.kind == "fla"
    assert_same_model(checkpoint, spec, tensors)


def test_fla_hybrid_has_separate_q_k_v(tmp_path: Path) -> None:
    tensors = tensors_of(HYBRID)
    save_file(fla(tensors), tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path / "model.safetensors", {**ASKED, "output_gate": "silu"})
    assert_same_model(checkpoint, HYBRID, tensors)


@pytest.mark.parametrize("with_index", [True, False])
def test_sharded_folder(with_index: bool, tmp_path: Path) -> None:
    tensors = tensors_of(PURE)
    named = fla(tensors)
    keys = list(named)
    shards = {f"model-{i}.safetensors": keys[i::3] for i in range(3)}
    for shard, names in shards.items():
        save_file({name: named[name] for name in names}, tmp_path / shard)
    if with_index:
        save_file({"other": torch.ones(1)}, tmp_path / "not-in-the-index.safetensors")
        weight_map = {name: shard for shard, names in shards.items() for name in names}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same_model(open_checkpoint(tmp_path, {"output_gate": "silu"}), PURE, tensors)


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".ckpt", ".pth"])
@pytest.mark.parametrize("outer", [None, "model", "state_dict"])
def test_torch_files(suffix: str, outer: str | None, tmp_path: Path) -> None:
    tensors = tensors_of(PURE)
    named = lit_gpt(tensors, PURE)
    torch.save({outer: named} if outer else named, tmp_path / f"m{suffix}")
    assert_same_model(open_checkpoint(tmp_path / f"m{suffix}"), PURE, tensors)


def write_ours(folder: Path, spec: ModelSpec, tensors: dict[str, Tensor], **config: Any) -> None:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "gdn2", **spec.to_json(), **config}))


def test_our_folder(tmp_path: Path) -> None:
    tensors = tensors_of(HYBRID)
    write_ours(tmp_path, HYBRID, tensors, fingerprint="abc", made_by="me")
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.kind, checkpoint.fingerprint) == ("gdn2", "abc")
    assert checkpoint.config == {"model_type": "gdn2", "fingerprint": "abc", "made_by": "me"}
    assert_same_model(checkpoint, HYBRID, tensors)


# Sizes from shapes


@pytest.mark.parametrize(
    "change",
    [
        {"vocab_size": 77},
        {"hidden_size": 16},
        {"intermediate_size": 9},
        {"num_heads": 1},
        {"num_heads": 4},
        {"num_v_heads": 8},
        {"head_k_dim": 5},
        {"head_v_dim": 9},
        {"conv_size": 4},
        {"layer_types": ("gdn2",)},
    ],
    ids=str,
)
def test_every_size_is_read_from_shapes(change: dict[str, Any], tmp_path: Path) -> None:
    spec = PURE.model_copy(update=change)
    torch.save(lit_gpt(tensors_of(spec), spec), tmp_path / "model.pth")
    assert open_checkpoint(tmp_path / "model.pth").spec == spec


@pytest.mark.parametrize("layers", [["gdn2", "sliding_attention", "gdn2"], ["sliding_attention"] * 2 + ["gdn2"]])
def test_the_layer_pattern_is_read_from_shapes(layers: list[str], tmp_path: Path) -> None:
    spec = HYBRID.model_copy(update={"layer_types": tuple(layers)})
    torch.save(lit_gpt(tensors_of(spec), spec), tmp_path / "model.pth")
    assert open_checkpoint(tmp_path / "model.pth", ASKED).spec == spec


SWA_100M = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "layer_types": ["gdn2", "sliding_attention"] * 2,
    "num_heads": 4,
    "head_k_dim": 64,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
}


@pytest.mark.parametrize(("name", "sizes"), [("gdn2_12h_100M", {}), ("swa_gdn2_100M", SWA_100M)])
def test_published_names_say_the_rest(name: str, sizes: dict[str, Any], tmp_path: Path) -> None:
    fields = {**NAMED_CONFIGS[name], **sizes, "vocab_size": 8, "output_gate": "silu", "head_v_dim": 64}
    spec = spec_from_fields({**fields, "num_v_heads": fields["num_heads"]}, name)
    # Only headers are read: a file of the right length with nothing in it.
    meta = {key: torch.empty(shape, device="meta") for key, shape in spec.tensor_shapes().items()}
    header, end = {}, 0
    for key, tensor in lit_gpt(meta, spec).items():
        size = 2 * tensor.numel()
        header[key] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    assert open_checkpoint(tmp_path / "model.safetensors", dict(NAMED_CONFIGS[name])).spec == spec
    with pytest.raises(SpecError, match="shapes say hidden_size = 768, the configuration says 1024"):
        open_checkpoint(tmp_path / "model.safetensors", dict(NAMED_CONFIGS["gdn2_12h_305M"]))


# What is asked for, by name


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {},
            r"does not say output_gate, sliding_window, num_attention_heads\. Give --output-gate silu\|sigmoid and --c",
        ),
        ({"output_gate": "silu"}, r"does not say sliding_window, num_attention_heads\. Give --config NAME\|FILE \("),
        ({"output_gate": "silu", "head_dim": 10}, r"does not say sliding_window\."),
        ({"output_gate": "silu", "sliding_window": 5}, r"does not say num_attention_heads\."),
        (ASKED, r"does not say output_gate\. Give --output-gate silu\|sigmoid \(names: gdn2_1\.3B, "),
    ],
)
def test_what_shapes_cannot_say_is_asked_for(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_file(fla(tensors_of(HYBRID)), tmp_path / "model.safetensors")
    with pytest.raises(SpecError, match=message):
        open_checkpoint(tmp_path / "model.safetensors", given)


def test_defaults_of_the_format_may_be_overridden(tmp_path: Path) -> None:
    torch.save(lit_gpt(tensors_of(PURE), PURE), tmp_path / "model.pth")
    given = {"norm_eps": 1e-6, "allow_neg_eigval": True}
    assert open_checkpoint(tmp_path / "model.pth", given).spec == PURE.model_copy(update=given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"hidden_size": 32}, "say hidden_size = 24, the configuration says 32"),
        ({"num_heads": 4}, "say num_heads = 2, the configuration says 4"),
        ({"layer_types": ["gdn2"] * 2}, "layer_types"),
        ({"output_gate": "sigmoid"}, "output_gate = silu, the configuration says sigmoid"),
        ({"sliding_window": 5}, "sliding_window given, but no layer"),
        ({"colour": "blue"}, "colour is not a known field"),
    ],
)
def test_overrides_that_contradict(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    torch.save(lit_gpt(tensors_of(PURE), PURE), tmp_path / "model.pth")
    with pytest.raises(SpecError, match=message):
        open_checkpoint(tmp_path / "model.pth", given)


def test_head_counts_that_do_not_fit_the_fused_matrix(tmp_path: Path) -> None:
    torch.save(lit_gpt(tensors_of(HYBRID), HYBRID), tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=r"q_proj\.weight is \(100, 24\), the spec says \(90, 24\)"):
        open_checkpoint(
            tmp_path / "model.pth",
            {"sliding_window": 5, "head_dim": 10, "num_key_value_heads": 1, "num_attention_heads": 7},
        )


def test_overrides_of_our_own_folder_may_only_agree(tmp_path: Path) -> None:
    write_ours(tmp_path, PURE, tensors_of(PURE))
    assert open_checkpoint(tmp_path, {"hidden_size": 24, "layer_types": ["gdn2"] * 3}).spec == PURE
    with pytest.raises(SpecError, match=r"config\.json says output_gate = silu, sigmoid was given\. Leave it out"):
        open_checkpoint(tmp_path, {"output_gate": "sigmoid"})


def test_a_folder_of_another_kind_of_model(tmp_path: Path) -> None:
    save_file(fla(tensors_of(PURE)), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(CheckpointError, match=r"model_type 'llama', expected 'gdn2'\. .* --config FILE"):
        open_checkpoint(tmp_path)
    assert open_checkpoint(tmp_path, {"output_gate": "silu"}).spec == PURE


# What does not fit


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("layers.2.b_proj.weight", (16, 25), r"layers\.2\.b_proj\.weight is \(16, 25\), the spec says \(16, 24\)"),
        ("layers.1.g_proj.1.bias", (1, 24), r"g_proj\.1\.bias is \(1, 24\), the spec says \(24,\)"),
        ("lm_head.weight", (41, 24), r"lm_head\.weight is \(41, 24\)"),
        ("layers.1.A_log", None, "layers.1"),
        ("ln_f.weight", None, r"ln_f\.weight is missing"),
        ("layers.0.o_proj.weight", None, r"layers\.0\.o_proj\.weight is missing"),
        ("layers.0.o_norm.weight", None, r"layers\.0\.o_norm\.weight is missing"),
        ("embed.weight", None, r"embed\.weight is missing"),
    ],
)
def test_shapes_that_do_not_fit(name: str, shape: tuple[int, ...] | None, message: str, tmp_path: Path) -> None:
    tensors = tensors_of(PURE)
    tensors.pop(name)
    if shape:
        tensors[name] = torch.zeros(shape)
    torch.save(lit_gpt(tensors, PURE), tmp_path / "model.pth")
    with pytest.raises((CheckpointError, SpecError), match=message):
        open_checkpoint(tmp_path / "model.pth")


def test_a_tensor_that_our_config_does_not_describe(tmp_path: Path) -> None:
    write_ours(tmp_path, PURE, {**tensors_of(PURE), "layers.3.A_log": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"tensor layers\.3\.A_log is not part of the model"):
        open_checkpoint(tmp_path)


def test_quantized_tensors_need_our_config(tmp_path: Path) -> None:
    save_file({"layers.0.q_proj.weight_packed": torch.zeros(2, 2, dtype=torch.int32)}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=r"quantized tensors without our config\.json"):
        open_checkpoint(tmp_path / "m.safetensors")
