"""The folder of an ONNX export, opened without reading its weights and without onnx. Every file is hostile.

Walks the bytes of model.onnx as far as it must to say what is checked before a runtime sees them: whose model this is,
that every tensor has the bytes its shape asks for, and that no tensor lies anywhere but in the file beside it.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

from gdn2_edge.checkpoint.files import read_json
from gdn2_edge.checkpoint.reader import CONFIG_EXTRAS
from gdn2_edge.errors import CheckpointError, SpecError
from gdn2_edge.onnx_names import DATA_FILE, EXPORT_FORMATS, MODEL_FILE
from gdn2_edge.spec import MODEL_TYPE, ModelSpec, spec_from_fields

# Bits of an element by the number of its type in onnx.proto (TensorProto.DataType).
BITS = {
    **dict.fromkeys((21, 22, 23), 4),
    **dict.fromkeys((2, 3, 9, 17, 18, 19, 20, 24), 8),
    **dict.fromkeys((4, 5, 10, 16), 16),
    **dict.fromkeys((1, 6, 12), 32),
    **dict.fromkeys((7, 11, 13), 64),
}
# Where tensors can be: message -> field number -> message inside (onnx.proto). All else is stepped over.
INSIDE = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Training": {1: "Graph", 2: "Graph"},
    "Function": {7: "Node", 11: "Attribute"},
    "Graph": {1: "Node", 5: "Tensor", 15: "Sparse"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "Sparse", 23: "Sparse"},
    "Sparse": {1: "Tensor", 2: "Tensor"},
}
METADATA, INITIALIZER = 14, 5  # fields of Model and of Graph
MAX_METADATA_BYTES, MAX_DEPTH, MAX_DIMS = 1 << 20, 16, 16


@dataclass(frozen=True)
class OnnxExport:
    """What an export says of itself, checked. `sizes`: bytes of each weight of the graph by name."""

    path: Path
    spec: ModelSpec
    fingerprint: str
    format: str
    portable: bool
    sizes: dict[str, int]


def is_export(path: Path) -> bool:
    """Whether a path is a folder with an ONNX model, and not with a checkpoint's weights."""
    return (path / MODEL_FILE).is_file() and not any(path.glob("*.safetensors"))


def open_export(folder: Path) -> OnnxExport:
    """Open a folder that `gdn2-edge export onnx` made; no weight is read.

    Raises:
        CheckpointError: damaged, not made by us, its config.json is another model's, or it names files elsewhere.
        SpecError: config.json does not hold a spec.
    """
    config = read_json(folder / "config.json")
    if config.get("model_type") != MODEL_TYPE:
        raise CheckpointError(
            f"{folder}: config.json says model_type {str(config.get('model_type'))[:40]!r}, expected {MODEL_TYPE!r}."
        )
    spec = spec_from_fields({k: v for k, v in config.items() if k not in CONFIG_EXTRAS}, "config.json")
    metadata, sizes = _Walk(folder).read()
    if "gdn2.spec" not in metadata:
        raise CheckpointError(
            f"{folder}: {MODEL_FILE} says nothing about a GDN-2 model, so it was not written by gdn2-edge export onnx."
        )
    try:
        written = spec_from_fields(json.loads(metadata["gdn2.spec"]), MODEL_FILE)
    except (ValueError, RecursionError, SpecError):
        raise CheckpointError(f"{folder}: the spec in {MODEL_FILE} is not valid. Export it again.") from None
    fingerprint = metadata.get("gdn2.fingerprint", "")
    for what, same in (("spec", written == spec), ("fingerprint", fingerprint == config.get("fingerprint", ""))):
        if not same:
            raise CheckpointError(
                f"{folder}: {MODEL_FILE} and config.json have another {what}; they are not of one export. "
                "Export the model again."
            )
    format = metadata.get("gdn2.format", "")
    if format not in EXPORT_FORMATS:
        raise CheckpointError(
            f"{folder}: {MODEL_FILE} says its format is {format[:20]!r}, expected {', '.join(EXPORT_FORMATS)}."
        )
    return OnnxExport(
        folder,
        spec,
        fingerprint,
        format,
        metadata.get("gdn2.portable") == "true",
        sizes,
    )


class _Walk:
    """One pass over a model file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = self._own(MODEL_FILE)
        self.metadata: dict[str, str] = {}
        self.sizes: dict[str, int] = {}
        self.data_bytes: int | None = None  # of the file beside the model, once a tensor lies there

    def read(self) -> tuple[dict[str, str], dict[str, int]]:
        """The model's metadata, and the bytes of each weight."""
        try:
            with self.file.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                self._message("Model", memoryview(data), 0)
        except (OSError, ValueError, IndexError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is damaged or cut short"
            raise CheckpointError(
                f"{self.file}: cannot be read as an ONNX model ({reason}). Export it again."
            ) from None
        return self.metadata, self.sizes

    def _own(self, name: str) -> Path:
        """A file of the folder itself."""
        path = self.folder / name
        if not path.is_file():
            raise CheckpointError(f"{self.folder}: {name} is missing.")
        if path.resolve().parent != self.folder.resolve():
            raise CheckpointError(f"{self.folder}: {name} is a link to another folder; copy the file here.")
        return path

    def _message(self, kind: str, data: memoryview, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise ValueError("nested too deep")
        with data:
            for number, value in _fields(data):
                if not isinstance(value, memoryview):
                    continue
                inside = INSIDE[kind].get(number)
                if kind == "Model" and number == METADATA:
                    with value:
                        self.metadata |= [_pair(value)]
                elif inside == "Tensor":
                    name, size = self._tensor(value)
                    if kind == "Graph" and number == INITIALIZER:
                        self.sizes[name] = size
                elif inside is not None:
                    self._message(inside, value, depth + 1)
                else:
                    value.release()

    def _tensor(self, data: memoryview) -> tuple[str, int]:
        """Name and bytes of a tensor that has as many as its shape asks for."""
        name, type, dims, raw, external = "", 0, list[int](), -1, dict[str, str]()
        with data:
            room = len(data)
            for number, value in _fields(data):
                if isinstance(value, int):
                    dims += [value] if number == 1 else []
                    type = value if number == 2 else type
                    continue
                with value:
                    if number == 1:
                        dims += _varints(value)
                    elif number == 8:
                        name = _text(value)
                    elif number == 9:
                        raw = len(value)
                    elif number == 13:
                        external |= [_pair(value)]
        if len(dims) > MAX_DIMS:
            raise ValueError("a shape of too many sizes")
        if type not in BITS:
            raise CheckpointError(f"{self.file}: tensor {name[:80]!r} is of type {type}, which no export has.")
        size = (prod(dims) * BITS[type] + 7) // 8
        if external:
            self._check_external(name, size, external)
        elif size != raw if raw >= 0 else prod(dims) > room:
            raise CheckpointError(f"{self.file}: tensor {name[:80]!r} does not have the bytes of its shape {dims[:8]}.")
        return name, size

    def _check_external(self, name: str, size: int, external: dict[str, str]) -> None:
        """A tensor of another file: only of the one beside the model, and within it."""
        if (location := external.get("location", "")) != DATA_FILE:
            raise CheckpointError(
                f"{self.file}: tensor {name[:80]!r} lies in {location[:80]!r}, expected {DATA_FILE!r} beside the model."
            )
        if self.data_bytes is None:
            self.data_bytes = self._own(DATA_FILE).stat().st_size
        offset, length = int(external.get("offset", "0")), int(external.get("length", str(size)))
        if offset < 0 or length != size or offset + size > self.data_bytes:
            raise CheckpointError(
                f"{self.file}: tensor {name[:80]!r} wants {size} bytes from {offset} on of {DATA_FILE}, "
                f"which has {self.data_bytes}."
            )


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Field numbers and values of a protobuf message: bytes as a view, numbers as they are.

    Raises:
        ValueError, IndexError: it is no message.
    """
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        if key >> 32:  # protobuf would cut it to 32 bits, and see another field
            raise ValueError("a tag of more than 32 bits")
        wire = key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        length, at = _varint(data, at) if wire == 2 else ({1: 8, 5: 4}[wire] if wire in (1, 5) else -1, at)
        if length < 0 or at + length > len(data):
            raise ValueError("cut short")
        yield key >> 3, data[at : at + length]
        at += length


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("a number of more than 10 bytes")


def _varints(data: memoryview) -> list[int]:
    values, at = [], 0
    while at < len(data):
        value, at = _varint(data, at)
        values.append(value)
    return values


def _pair(data: memoryview) -> tuple[str, str]:
    """StringStringEntryProto: key and value."""
    if len(data) > MAX_METADATA_BYTES:
        raise ValueError("metadata is too long")
    found: dict[int, str] = {}
    for number, value in _fields(data):
        if isinstance(value, memoryview):
            with value:
                found[number] = _text(value)
    return found.get(1, ""), found.get(2, "")


def _text(data: memoryview) -> str:
    return bytes(data[:MAX_METADATA_BYTES]).decode()
