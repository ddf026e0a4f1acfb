"""What a checkpoint is, from its headers alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from gdn2_edge.checkpoint.gguf_file import GgufFile
from gdn2_edge.checkpoint.onnx_file import OnnxExport
from gdn2_edge.checkpoint.reader import KIND_WORDS, Checkpoint

PARTS = ("embedding", "mixers", "mlp", "norms", "head")


@dataclass(frozen=True)
class Part:
    """Size of one part of a model."""

    parameters: int
    bytes: int


@dataclass(frozen=True)
class Summary:
    """Sizes in bytes. `bytes_per_token`: what one decoding step moves, weights read once and the state both ways."""

    path: str
    kind: str
    fingerprint: str | None
    spec: dict[str, Any]
    formats: dict[str, int]
    parts: dict[str, Part]
    parameters: int
    bytes: int
    bits_per_weight: float
    bytes_per_token: int
    state_bytes: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def summarize(checkpoint: Checkpoint) -> Summary:
    """Sizes by part and format, and what a token costs; reads no weight."""
    parts = dict.fromkeys(PARTS, Part(0, 0))
    formats: dict[str, int] = {}
    embedding_bytes = 0
    for name, shape in checkpoint.spec.tensor_shapes().items():
        stored = checkpoint.stored(name)
        size = sum(info.nbytes for info in stored.values())
        part, count = _part(name), prod(shape)
        parts[part] = Part(parts[part].parameters + count, parts[part].bytes + size)
        dtype = "int4" if "_packed" in stored else str(stored[""].dtype).removeprefix("torch.")
        formats[dtype] = formats.get(dtype, 0) + count
        if name == "embed.weight":
            embedding_bytes = size
    total = sum(part.bytes for part in parts.values())
    spec = checkpoint.spec
    state_bytes = spec.state_bytes()
    return Summary(
        path=str(checkpoint.path),
        kind=KIND_WORDS[checkpoint.kind],
        fingerprint=checkpoint.fingerprint or None,
        spec=spec.to_json(),
        formats=formats,
        parts=parts,
        parameters=spec.num_parameters(),
        bytes=total,
        bits_per_weight=8 * total / spec.num_parameters(),
        bytes_per_token=total - embedding_bytes + embedding_bytes // spec.vocab_size + 2 * state_bytes,
        state_bytes=state_bytes,
    )


def summarize_export(export: OnnxExport | GgufFile) -> Summary:
    """The same of an export, whose weights are one part."""
    spec, state_bytes, total = export.spec, export.spec.state_bytes(), sum(export.sizes.values())
    embedding = sum(size for name, size in export.sizes.items() if name.startswith(("embed.", "token_embd.")))
    return Summary(
        path=str(export.path),
        kind="GGUF file for llama.cpp" if isinstance(export, GgufFile) else "ONNX export",
        fingerprint=export.fingerprint or None,
        spec=spec.to_json(),
        formats={export.format: spec.num_parameters()},
        parts={"weights": Part(spec.num_parameters(), total)},
        parameters=spec.num_parameters(),
        bytes=total,
        bits_per_weight=8 * total / spec.num_parameters(),
        bytes_per_token=total - embedding + embedding // spec.vocab_size + 2 * state_bytes,
        state_bytes=state_bytes,
    )


def _part(name: str) -> str:
    tail = name.split(".")[-2] if "." in name else name
    if name == "embed.weight":
        return "embedding"
    if name == "lm_head.weight":
        return "head"
    if tail in ("norm_1", "norm_2", "ln_f"):
        return "norms"
    return "mlp" if tail in ("w1", "w2", "w3") else "mixers"
