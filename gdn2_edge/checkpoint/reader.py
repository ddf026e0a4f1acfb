"""A checkpoint: its spec and its tensors under canonical names, wherever they came from."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from gdn2_edge.checkpoint.files import SafetensorsFiles, TensorFile, TensorInfo, open_tensors, read_json
from gdn2_edge.checkpoint.names import Source, canonical_sources
from gdn2_edge.errors import CheckpointError, SpecError
from gdn2_edge.spec import MODEL_TYPE, NAMED_CONFIGS, ModelSpec, spec_from_fields
from gdn2_edge.weights import Weight, layout_of, weight_from_tensors

Kind = Literal["gdn2", "nvlabs", "fla"]
KIND_WORDS = {
    "gdn2": "gdn2-edge folder",
    "nvlabs": "NVlabs training file",
    "fla": "state dict with fla's layer names",
}
STORED_SUFFIXES = ("_packed", "_scale", "_shape")
CONFIG_EXTRAS = ("model_type", "architectures", "dtype", "fingerprint", "made_by", "quantization_config", "onnx")


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. Weights are read one at a time by `weight`, mapped from the file.

    `config` holds what our config.json says beside the spec; it is empty for other people's files.
    """

    path: Path
    kind: Kind
    spec: ModelSpec
    file: TensorFile
    sources: dict[str, Source]
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        return str(self.config.get("fingerprint", ""))

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name -> shape of every tensor of the model."""
        return self.spec.tensor_shapes()

    def stored(self, name: str) -> dict[str, TensorInfo]:
        """Suffix -> dtype and shape of the stored tensors of one canonical tensor."""
        if name in self.sources:
            source = self.sources[name]
            info = self.file.infos[source.key]
            found = {"": TensorInfo(info.dtype, self.shapes[name]) if source.part else info}
        else:
            found = {}
        for suffix in STORED_SUFFIXES:
            if self.kind == "gdn2" and name + suffix in self.file.infos:
                found[suffix] = self.file.infos[name + suffix]
        return found

    def weight(self, name: str) -> Weight:
        """One canonical tensor in its stored layout.

        Raises:
            CheckpointError: its tensors are not of a known layout or not of the spec's shape.
        """
        tensors = {suffix: self._read(name, suffix) for suffix in self.stored(name)}
        return weight_from_tensors(name, tensors, self.shapes[name])

    def _read(self, name: str, suffix: str) -> Tensor:
        if suffix:
            return self.file.read(name + suffix)
        source = self.sources[name]
        tensor = self.file.read(source.key)
        return _attention_rows(self.spec, tensor, source.part) if source.part else tensor


def _attention_rows(spec: ModelSpec, fused: Tensor, part: str) -> Tensor:
    """The q, k or v rows of NVlabs' fused matrix: [groups, q heads of a group + k + v, head_dim, hidden]."""
    per_group = spec.q_heads // spec.kv_heads
    heads = fused.unflatten(0, (spec.kv_heads, per_group + 2, spec.attention_head_dim))
    rows: Tensor = {"q": heads[:, :per_group], "k": heads[:, per_group], "v": heads[:, per_group + 1]}[part]
    return rows.reshape(-1, fused.shape[1])


def open_checkpoint(path: Path, overrides: dict[str, Any] | None = None) -> Checkpoint:
    """Open a checkpoint of any kind and check every shape against its spec; no weight is read.

    Args:
        path: our folder, a folder or file of safetensors, or a .pth file.
        overrides: spec fields that the source does not say (see `infer_fields`).
    Raises:
        CheckpointError: unreadable, unknown or missing tensors, wrong shapes.
        SpecError: the spec is incomplete (the missing fields are named) or contradicts the tensors.
    """
    config = read_json(path / "config.json") if path.is_dir() and (path / "config.json").exists() else {}
    if config.get("model_type") == MODEL_TYPE:
        checkpoint = _open_ours(path, config, overrides or {})
    elif config and not overrides and path.is_dir() and "model_type" in config:
        raise CheckpointError(
            f"{path}: config.json says model_type {str(config['model_type'])[:40]!r}, expected {MODEL_TYPE!r}. "
            "For a state dict with fla's layer names give --config FILE with the spec's fields."
        )
    else:
        checkpoint = _open_foreign(path, overrides or {})
    _check_shapes(checkpoint)
    return checkpoint


def _open_ours(path: Path, config: dict[str, Any], overrides: dict[str, Any]) -> Checkpoint:
    fields = {key: value for key, value in config.items() if key not in CONFIG_EXTRAS}
    for name, value in overrides.items():
        if fields.get(name) != value:
            raise SpecError(f"{path}: config.json says {name} = {fields.get(name)}, {value} was given. Leave it out.")
    spec = spec_from_fields(fields, "config.json")
    file = open_tensors(path)
    known = spec.tensor_shapes()
    for key in file.infos:
        name = next((key.removesuffix(s) for s in STORED_SUFFIXES if key.endswith(s)), key)
        if key not in known and name not in known:
            raise CheckpointError(f"{path.name}: tensor {key} is not part of the model that config.json describes.")
    sources = {name: Source(name) for name in known if name in file.infos}
    extras = {key: value for key, value in config.items() if key in CONFIG_EXTRAS}
    return Checkpoint(path, "gdn2", spec, file, sources, extras)


def _open_foreign(path: Path, overrides: dict[str, Any]) -> Checkpoint:
    file = open_tensors(path)
    if isinstance(file, SafetensorsFiles) and any(key.endswith("_packed") for key in file.infos):
        raise CheckpointError(f"{path.name}: quantized tensors without our config.json beside them.")
    sources = canonical_sources(file.infos, path.name)
    kind: Kind = "nvlabs" if any(s.key.startswith("transformer.h.") for s in sources.values()) else "fla"
    fields = infer_fields(sources, file, kind, path.name)
    for name, value in overrides.items():
        if name in fields and fields[name] != value and name not in FORMAT_DEFAULTS:
            raise SpecError(
                f"{path.name}: its format and shapes say {name} = {fields[name]}, the configuration says {value}."
            )
        fields[name] = value
    _infer_attention(fields, sources, file, path.name)
    missing = [name for name in _needed(fields) if name not in fields]
    if missing:
        flags = {"output_gate": "--output-gate silu|sigmoid"}
        how = " and ".join(dict.fromkeys(flags.get(name, "--config NAME|FILE") for name in missing))
        raise SpecError(
            f"{path.name} does not say {', '.join(missing)}. Give {how} (names: {', '.join(NAMED_CONFIGS)}; "
            "a file is JSON with these fields)."
        )
    return Checkpoint(path, kind, spec_from_fields(fields, path.name), file, sources)


# What the published format means where its shapes are silent; a configuration may say otherwise.
FORMAT_DEFAULTS = {"norm_eps": 1e-5, "allow_neg_eigval": False}


def infer_fields(sources: dict[str, Source], file: TensorFile, kind: Kind, where: str) -> dict[str, Any]:
    """The spec fields that the shapes of a foreign checkpoint say, and for NVlabs files those their format says."""
    layer_types = _layer_types(sources, where)
    if "gdn2" not in layer_types:
        raise CheckpointError(f"{where}: no layer has A_log, so there is no GDN-2 layer in it.")

    def size(name: str, axis: int) -> int:
        return _size(sources, file, where, name, axis)

    layer = f"layers.{layer_types.index('gdn2')}."
    num_heads, head_v_dim = size(layer + "A_log", 0), size(layer + "o_norm.weight", 0)
    fields: dict[str, Any] = {
        **FORMAT_DEFAULTS,
        "vocab_size": size("embed.weight", 0),
        "hidden_size": size("embed.weight", 1),
        "intermediate_size": size(layer + "w1.weight", 0),
        "layer_types": layer_types,
        "num_heads": num_heads,
        "num_v_heads": size(layer + "v_proj.weight", 0) // head_v_dim,
        "head_k_dim": size(layer + "dt_bias", 0) // num_heads,
        "head_v_dim": head_v_dim,
        "conv_size": size(layer + "q_conv1d.weight", 2),
    }
    if kind == "nvlabs":
        fields["output_gate"] = "silu"
    return fields


def _layer_types(sources: dict[str, Source], where: str) -> list[str]:
    """The kind of each layer: anything that attention does not have makes it a gdn2 layer."""
    layers: dict[int, str] = {}
    for name in sources:
        if name.startswith("layers."):
            _, i, tail = name.split(".", 2)
            if tail in ("A_log", "dt_bias", "o_norm.weight", "b_proj.weight", "w_proj.weight"):
                layers[int(i)] = "gdn2"
            else:
                layers.setdefault(int(i), "sliding_attention")
    if missing := sorted(set(range(len(layers))) - layers.keys()):
        raise CheckpointError(f"{where}: there is a layer {max(layers)}, but no layer {missing[0]}.")
    return [layers[i] for i in range(len(layers))]


def _size(sources: dict[str, Source], file: TensorFile, where: str, name: str, axis: int) -> int:
    """One side of a tensor whose shape is not known yet."""
    shape = file.infos[sources[name].key].shape if name in sources else None
    if shape is None or len(shape) <= axis or shape[axis] < 1:
        raise CheckpointError(f"{where}: {name} is {'missing' if shape is None else shape}.")
    return shape[axis]


def _infer_attention(fields: dict[str, Any], sources: dict[str, Source], file: TensorFile, where: str) -> None:
    """Head counts of the attention layers, once head_dim or num_attention_heads is given; rope_theta by format."""
    if "sliding_attention" not in fields["layer_types"]:
        return
    layer = f"layers.{fields['layer_types'].index('sliding_attention')}."
    q_dim = _size(sources, file, where, layer + "o_proj.weight", 1)
    kv_dim = _size(sources, file, where, layer + "k_proj.weight", 0)
    if sources[layer + "k_proj.weight"].part:  # the rows of q, k and v
        kv_dim = (kv_dim - q_dim) // 2
    if isinstance(heads := fields.get("num_attention_heads"), int) and heads > 0:
        fields.setdefault("head_dim", q_dim // heads)
    if isinstance(head_dim := fields.get("head_dim"), int) and head_dim > 0:
        fields.setdefault("num_attention_heads", q_dim // head_dim)
        fields.setdefault("num_key_value_heads", kv_dim // head_dim)
    fields.setdefault("rope_theta", 10_000.0)


def _needed(fields: dict[str, Any]) -> list[str]:
    hybrid = "sliding_attention" in fields["layer_types"]
    return ["output_gate", *(["sliding_window", "num_attention_heads"] if hybrid else [])]


def _check_shapes(checkpoint: Checkpoint) -> None:
    where = checkpoint.path.name
    spec, known = checkpoint.spec, checkpoint.shapes
    for name, source in checkpoint.sources.items():
        if name not in known:
            raise CheckpointError(f"{where}: {source.key} is not part of the model that the spec describes.")
    for name, shape in known.items():
        stored = checkpoint.stored(name)
        if not stored:
            raise CheckpointError(f"{where}: {name} is missing.")
        if name in checkpoint.sources and checkpoint.sources[name].part:
            stored = {"": checkpoint.file.infos[checkpoint.sources[name].key]}
            shape = ((spec.q_heads + 2 * spec.kv_heads) * spec.attention_head_dim, spec.hidden_size)
        try:
            layout_of(name, stored, shape)
        except CheckpointError as error:
            raise CheckpointError(f"{where}: {error}") from None
