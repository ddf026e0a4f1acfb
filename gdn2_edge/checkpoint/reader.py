"""A checkpoint: its spec and its tensors under canonical names, wherever they came from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from gdn2_edge.checkpoint.files import SafetensorsFiles, TensorFile, TensorInfo, open_tensors, read_json
from gdn2_edge.checkpoint.names import Source, canonical_sources
from gdn2_edge.errors import CheckpointError, SpecError
from gdn2_edge.spec import NAMED_CONFIGS, ModelSpec, spec_from_fields
from gdn2_edge.weights import Weight, weight_from_tensors

Kind = Literal["gdn2", "nvlabs", "fla"]
KIND_WORDS = {
    "gdn2": "gdn2-edge folder",
    "nvlabs": "NVlabs training file",
    "fla": "state dict with fla's layer names",
}
MODEL_TYPE = "gdn2"
STORED_SUFFIXES = ("_packed", "_scale", "_shape")
CONFIG_EXTRAS = ("model_type", "architectures", "dtype", "fingerprint", "made_by", "quantization_config")


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

    def stored(self, name: str) -> dict[str, TensorInfo]:
        """Suffix -> dtype and shape of the stored tensors of one canonical tensor."""
        if name in self.sources:
            source = self.sources[name]
            info = self.file.infos[source.key]
            found = {"": TensorInfo(info.dtype, self.spec.tensor_shapes()[name]) if source.part else info}
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
        return weight_from_tensors(name, tensors, self.spec.tensor_shapes()[name])

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
            raise SpecError(f"{path.name}: its shapes say {name} = {fields[name]}, the configuration says {value}.")
        fields[name] = value
    _infer_attention(fields, sources, file)
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
    shapes = {name: file.infos[source.key].shape for name, source in sources.items()}
    layers = 1 + max((int(name.split(".")[1]) for name in shapes if name.startswith("layers.")), default=-1)
    first = next((i for i in range(layers) if f"layers.{i}.A_log" in shapes), None)
    if first is None:
        raise CheckpointError(f"{where}: no layer has A_log, so there is no GDN-2 layer in it.")

    def size(name: str, axis: int) -> int:
        shape = shapes.get(name)
        if shape is None or len(shape) <= axis or shape[axis] < 1:
            raise CheckpointError(f"{where}: {name} is {'missing' if shape is None else shape}.")
        return shape[axis]

    layer = f"layers.{first}."
    num_heads, head_v_dim = size(layer + "A_log", 0), size(layer + "o_norm.weight", 0)
    fields: dict[str, Any] = {
        **FORMAT_DEFAULTS,
        "vocab_size": size("embed.weight", 0),
        "hidden_size": size("embed.weight", 1),
        "intermediate_size": size(layer + "w1.weight", 0),
        "layer_types": ["gdn2" if f"layers.{i}.A_log" in shapes else "sliding_attention" for i in range(layers)],
        "num_heads": num_heads,
        "num_v_heads": size(layer + "v_proj.weight", 0) // head_v_dim,
        "head_k_dim": size(layer + "dt_bias", 0) // num_heads,
        "head_v_dim": head_v_dim,
        "conv_size": size(layer + "q_conv1d.weight", 2),
    }
    if kind == "nvlabs":
        fields["output_gate"] = "silu"
    return fields


def _infer_attention(fields: dict[str, Any], sources: dict[str, Source], file: TensorFile) -> None:
    """Head counts of the attention layers, once head_dim or num_attention_heads is given; rope_theta by format."""
    if "sliding_attention" not in fields["layer_types"]:
        return
    layer = fields["layer_types"].index("sliding_attention")
    q, o = sources.get(f"layers.{layer}.q_proj.weight"), sources.get(f"layers.{layer}.o_proj.weight")
    if q is None or o is None or len(file.infos[o.key].shape) != 2:
        return
    q_dim = file.infos[o.key].shape[1]
    rows = file.infos[q.key].shape[0]
    k = sources.get(f"layers.{layer}.k_proj.weight")
    kv_dim = (rows - q_dim) // 2 if q.part else file.infos[k.key].shape[0] if k else 0
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
    spec, known = checkpoint.spec, checkpoint.spec.tensor_shapes()
    for name, source in checkpoint.sources.items():
        if name not in known:
            raise CheckpointError(f"{where}: {source.key} is not part of the model that the spec describes.")
    for name, shape in known.items():
        stored = checkpoint.stored(name)
        if not stored:
            raise CheckpointError(f"{where}: {name} is missing.")
        fused = name in checkpoint.sources and checkpoint.sources[name].part
        if fused:
            rows = (spec.q_heads + 2 * spec.kv_heads) * spec.attention_head_dim
            shape = (rows, spec.hidden_size)
            found = checkpoint.file.infos[checkpoint.sources[name].key].shape
        elif "" in stored:
            found = stored[""].shape
        else:
            continue  # packed: `weight` checks it against its own shape tensor
        if found != shape:
            raise CheckpointError(f"{where}: {name} is {found}, the spec says {shape}. Was a size changed?")
