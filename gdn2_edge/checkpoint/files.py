"""Tensors in files, opened without reading them: safetensors shards and torch's .pth. Every file is hostile.

No class is built from a name in a file, nothing outside the file's own folder is opened, and a shape is believed
only when the file is large enough to hold it.
"""

from __future__ import annotations

import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gdn2_edge.errors import CheckpointError
from gdn2_edge.onnx_names import MODEL_FILE

INDEX_NAME = "model.safetensors.index.json"
MAX_JSON_BYTES = 16 << 20

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}


@dataclass(frozen=True)
class TensorInfo:
    """What a header says about one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class TensorFile(Protocol):
    """Named tensors that are read one at a time."""

    @property
    def path(self) -> Path: ...
    @property
    def infos(self) -> Mapping[str, TensorInfo]: ...
    def read(self, name: str) -> Tensor:
        """The tensor, mapped from the file where the format allows it."""


def open_tensors(path: Path) -> TensorFile:
    """Open a folder of safetensors, one safetensors file, or a .pth/.pt/.bin file.

    Raises:
        CheckpointError: there is no such file, or it is not what its name says.
    """
    if path.is_dir():
        return SafetensorsFiles(path, _shards(path))
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file or folder.")
    if path.suffix == ".safetensors":
        return SafetensorsFiles(path, [path])
    if path.suffix in (".pth", ".pt", ".bin", ".ckpt"):
        return TorchFile(path)
    raise CheckpointError(f"{path.name}: expected a folder, a .safetensors file or a .pth file.")


def read_file(path: Path, limit: int) -> bytes:
    """The bytes of a file.

    Raises:
        CheckpointError: missing, larger than `limit`, not to be read, or no file: a pipe or a device has no end.
    """
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise CheckpointError(f"{path} is not a file.")
        if size > limit:
            raise CheckpointError(f"{path.name} is {size} bytes, expected at most {limit}.")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a small file.

    Raises:
        CheckpointError: missing, too large, not JSON, or not an object.
    """
    try:
        value = json.loads(read_file(path, MAX_JSON_BYTES))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name} is not valid JSON: {str(error)[:120]}.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path.name} holds a {type(value).__name__}, expected an object.")
    return value


def _shards(folder: Path) -> list[Path]:
    index = folder / INDEX_NAME
    if not index.exists():
        found = sorted(folder.glob("*.safetensors"))
        if not found and (folder / MODEL_FILE).exists():
            raise CheckpointError(
                f"{folder} is an ONNX export, which chat and bench run; this needs the checkpoint it was made from."
            )
        if not found:
            raise CheckpointError(f"{folder}: there is no .safetensors file in this folder.")
        return found
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{INDEX_NAME} has no weight_map of tensor names to file names.")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or name in ("", ".", "..") or "\\" in name:
            raise CheckpointError(f"{INDEX_NAME} names {name!r}, expected a file in the same folder.")
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: {name} is missing; {INDEX_NAME} names it.")
        if (folder / name).resolve().parent != folder.resolve():
            raise CheckpointError(f"{folder}: {name} is a link to another folder; copy the file here.")
    return [folder / name for name in names]


class SafetensorsFiles:
    """One or several safetensors files; their header is checked against their size when they are opened."""

    def __init__(self, path: Path, files: list[Path]) -> None:
        self.path = path
        self.infos: dict[str, TensorInfo] = {}
        self._handles: dict[str, Any] = {}
        for file in files:
            if not file.is_file():
                raise CheckpointError(f"{file} is not a file.")
            try:
                handle = safe_open(file, framework="pt")
                names = list(handle.keys())
            except (SafetensorError, OSError, MemoryError, ValueError) as error:
                raise CheckpointError(
                    f"{file.name} is not a whole safetensors file ({str(error)[:100]}). Was it copied completely?"
                ) from None
            for name in names:
                if name in self.infos:
                    raise CheckpointError(f"{path}: tensor {name} is in more than one file.")
                piece = handle.get_slice(name)
                dtype = DTYPES.get(piece.get_dtype())
                if dtype is None:
                    raise CheckpointError(
                        f"{file.name}: {name} has dtype {piece.get_dtype()}, which no GDN-2 file has."
                    )
                self.infos[name] = TensorInfo(dtype, tuple(piece.get_shape()))
                self._handles[name] = handle

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self._handles[name].get_tensor(name)
        return tensor


class TorchFile:
    """A file that torch.save wrote, mapped and unpickled with `weights_only=True`; nothing else is ever tried."""

    def __init__(self, path: Path) -> None:
        self.path = path
        _check_archive(path)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError:
            raise CheckpointError(
                f"{path.name}: the pickle asks for more than tensors and plain values, so it is refused "
                "(it could run code). Save the state dict alone: torch.save(model.state_dict(), ...)."
            ) from None
        except Exception as error:  # torch.load raises almost anything on a damaged file
            reason = " ".join(str(error).split())[:100]
            raise CheckpointError(f"{path.name} is not a whole file of torch.save's zip format ({reason}).") from None
        self._tensors = _state_dict(loaded, path.name)
        self.infos = {name: TensorInfo(t.dtype, tuple(t.shape)) for name, t in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        return self._tensors[name]


def _check_archive(path: Path) -> None:
    """Refuse what takes memory that the file does not have: compressed parts, and bytes made by a pickle.

    torch.save compresses nothing. Of the few names that `weights_only=True` lets through, `bytearray` alone makes
    much from little, and no state dict needs it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            compressed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
            pickles = [] if compressed else [entry for entry in entries if entry.filename.endswith(".pkl")]
            makes_bytes = any(b"bytearray" in archive.read(entry) for entry in pickles)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise CheckpointError(f"{path.name} is not a whole file of torch.save's zip format ({error}).") from None
    if compressed or makes_bytes:
        what = "is a compressed archive" if compressed else "holds a pickle that makes a bytearray"
        raise CheckpointError(f"{path.name} {what}, expected what torch.save writes of a state dict.")


def _state_dict(loaded: object, where: str) -> dict[str, Tensor]:
    """The tensors of a training file ({"model": ...}), of {"state_dict": ...}, or of a bare state dict."""
    for key in ("model", "state_dict"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not loaded:
        raise CheckpointError(f"{where} holds a {type(loaded).__name__}, expected a state dict.")
    tensors = {}
    for name, value in loaded.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{where}: a key is a {type(name).__name__}, expected the name of a tensor.")
        if not isinstance(value, Tensor) or not _is_dense(value):
            kind = f"{str(value.layout)[6:]} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
            raise CheckpointError(f"{where}: {name[:60]} is a {kind}, expected a dense tensor.")
        held = value.untyped_storage().nbytes()
        if value.nbytes > held:
            raise CheckpointError(f"{where}: {name[:60]} claims {value.nbytes} bytes, the file holds {held} of it.")
        tensors[name] = value.detach()
    return tensors


def _is_dense(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized


# What else a checkpoint folder may hold and a new folder made from it keeps: name -> largest size believed.
COMPANIONS = {
    "tokenizer.json": 64 << 20,
    "chat_template.jinja": 1 << 20,
    "generation_config.json": 1 << 20,
    "README.md": 1 << 20,
    "LICENSE": 1 << 20,
}


def companions(path: Path) -> dict[str, bytes]:
    """Tokenizer, chat template, generation settings and model card of a folder; nothing for a single file."""
    found = {}
    for name, limit in COMPANIONS.items():
        file = path / name
        if path.is_dir() and file.is_file():
            found[name] = read_file(file, limit)
    return found


def card_field(files: Mapping[str, bytes], name: str) -> str:
    """A field of the model card's head, such as "license", where it is one word; else empty."""
    card = files.get("README.md", b"").decode(errors="replace")
    found = re.match(rf"---\n(?:.*\n)*?{name}: *(\S+) *\n(?:.*\n)*?---\n", card)
    return found[1] if found else ""


def check_apart(src: Path, dst: Path) -> None:
    """Raise CheckpointError if writing `dst` would replace `src` or add to it."""
    source, target = src.resolve(), dst.resolve()
    if target in (source, *source.parents):
        raise CheckpointError(f"{dst} is or holds the source {src}. Choose another --out.")
    if source in target.parents and source.is_dir():
        raise CheckpointError(f"{dst} is inside the source {src}. Choose another --out.")


def identity(path: Path) -> list[list[Any]]:
    """Names, sizes and times of the files of a checkpoint: what an interrupted conversion compares."""
    files = sorted(f for f in path.iterdir() if f.is_file()) if path.is_dir() else [path]
    return [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]
