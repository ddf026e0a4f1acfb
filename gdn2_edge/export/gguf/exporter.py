"""From a checkpoint to a GGUF file: plan, then one tensor after the other."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from gdn2_edge.checkpoint.files import card_field, check_apart, companions
from gdn2_edge.checkpoint.gguf_file import is_gguf
from gdn2_edge.checkpoint.reader import Checkpoint, open_checkpoint
from gdn2_edge.checkpoint.writer import new_file
from gdn2_edge.errors import CheckpointError
from gdn2_edge.export.gguf.quants import K_TYPES, encode, k_quantizer, mix_of, num_bytes, type_of
from gdn2_edge.export.gguf.tokenizer import tokenizer_keys
from gdn2_edge.gguf_names import Entry, Value, entries, sizes
from gdn2_edge.spec import MODEL_TYPE
from gdn2_edge.weights import Weight

Progress = Callable[[int, int, str], None]
CHUNK_VALUES = 4 << 20  # made at a time, in fp32
MAX_NUMBER = 1 << 31  # of what a sampler is told
METADATA_ROOM = 64 << 20  # a tokenizer, and the names of the tensors


@dataclass(frozen=True)
class Report:
    """What an export made, or would make. `types`: how many tensors have each; `notes`: a tensor -> why its type."""

    source: str
    out: str
    type: str
    fingerprint: str | None
    parameters: int
    bytes: int
    bits_per_weight: float
    tokenizer: str
    types: dict[str, int]
    notes: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Planned:
    """A tensor and how it is stored."""

    entry: Entry
    type: Type
    note: str

    @property
    def nbytes(self) -> int:
        return num_bytes(self.entry.shape, self.type)


def export_checkpoint(
    src: Path, out: Path, type: str, *, dry_run: bool = False, progress: Progress | None = None
) -> Report:
    """Write the file `out` with weights, sizes, tokenizer and chat template of the checkpoint `src`.

    Args:
        src: a folder that `gdn2-edge convert` or `quantize` made. Quantized weights are expanded first.
        out: the file to make.
        type: of the matrices: f32, f16, bf16, q8_0, q5_0, q4_0 or q4_k_m.
        dry_run: plan and check, write nothing.
        progress: called with (bytes done, bytes in all, tensor name).
    Raises:
        CheckpointError: `src` is no such folder, `out` exists or cannot be written, llama.cpp has no such tokenizer.
        SpecError: llama.cpp has no such heads.
        FormatError: there is no such type.
        BackendError: K-quants are asked for, and there is no llama_cpp to make them.
    """
    type = type.lower()
    mix = mix_of(type)
    check_apart(src, out)
    if out.exists() or out.is_symlink():
        raise CheckpointError(f"{out} exists. Choose another --out.")
    above = next(folder for folder in out.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise CheckpointError(f"{above} is {'not writable' if above.is_dir() else 'no folder'}. Choose another --out.")
    if is_gguf(src):
        raise CheckpointError(f"{src} is a GGUF file already. Give the gdn2-edge folder that it was made from.")
    checkpoint = None if src.is_file() else open_checkpoint(src)
    if checkpoint is None or checkpoint.kind != "gdn2":
        raise CheckpointError(f"{src} is no folder of gdn2-edge. First make one: gdn2-edge convert {src} --out DIR.")
    planned = [Planned(entry, *type_of(entry, mix)) for entry in entries(checkpoint.spec)]
    if any(one.type in K_TYPES for one in planned):
        k_quantizer()
    keys = _keys(checkpoint, type, int(mix.file_type))
    report = Report(
        source=str(src),
        out=str(out),
        type=type,
        fingerprint=checkpoint.fingerprint or None,
        parameters=checkpoint.spec.num_parameters(),
        bytes=sum(one.nbytes for one in planned),
        bits_per_weight=8 * sum(one.nbytes for one in planned) / checkpoint.spec.num_parameters(),
        tokenizer=str(keys.get("tokenizer.ggml.pre", keys["tokenizer.ggml.model"])),
        types=dict(Counter(one.type.name for one in planned)),
        notes={one.entry.name: one.note for one in planned if one.note},
    )
    if not dry_run:
        with new_file(out) as temporary:
            free, needed = shutil.disk_usage(temporary.parent).free, report.bytes + METADATA_ROOM
            if free < needed:
                raise CheckpointError(f"{out.parent}: {free >> 20} MiB are free, {needed >> 20} MiB are needed.")
            _write(temporary, keys, planned, checkpoint, progress)
    return report


def _keys(checkpoint: Checkpoint, type: str, file_type: int) -> dict[str, Value]:
    spec, files = checkpoint.spec, companions(checkpoint.path)
    told = _generation_config(files)
    keys: dict[str, Value] = {
        "general.type": "model",
        "general.name": checkpoint.path.resolve().name,
        "general.description": str(told.get("description") or ""),
        "general.license": card_field(files, "license"),
        "general.size_label": gguf.size_label(spec.num_parameters(), spec.num_parameters(), 0, 0),
        "general.quantized_by": f"gdn2-edge {_version()}",
        "general.file_type": file_type,
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
    }
    if language := card_field(files, "language"):
        keys["general.languages"] = [language]
    for ours, name in SAMPLING.items():
        value = 0.0 if ours == "temperature" and told.get("do_sample") is False else told.get(ours)
        if isinstance(value, int | float) and not isinstance(value, bool):
            if not 0 <= value < MAX_NUMBER:
                raise CheckpointError(f"generation_config.json says {ours} = {value!s:.40}, which no sampler takes.")
            keys[f"general.sampling.{name}"] = int(value) if name == "top_k" else float(value)
    keys |= sizes(spec)
    keys |= {
        f"{MODEL_TYPE}.spec": json.dumps(spec.to_json()),
        f"{MODEL_TYPE}.fingerprint": checkpoint.fingerprint,
        f"{MODEL_TYPE}.type": type,
        f"{MODEL_TYPE}.generation_config": json.dumps(told) if told else "",
    }
    keys |= tokenizer_keys(files, spec.vocab_size)
    for name, value in keys.items():
        texts = value if isinstance(value, list) else [value]
        if not all(_is_text(text) for text in texts if isinstance(text, str)):
            raise CheckpointError(f"{checkpoint.path}: {name} would be no Unicode text (half a surrogate pair).")
    return {name: value for name, value in keys.items() if value != ""}


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


SAMPLING = {
    "temperature": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}


def _generation_config(files: dict[str, bytes]) -> dict[str, Any]:
    try:
        told = json.loads(files.get("generation_config.json", b"{}"))
    except (ValueError, RecursionError):
        told = None
    if not isinstance(told, dict):
        raise CheckpointError("generation_config.json is not valid JSON of an object.")
    return told


def _write(
    path: Path, keys: dict[str, Value], planned: list[Planned], checkpoint: Checkpoint, progress: Progress | None
) -> None:
    """The whole file. Of the weights, one tensor is in memory at a time."""
    writer = gguf.GGUFWriter(path, MODEL_TYPE)
    for name, value in keys.items():
        _add(writer, name, value)
    for one in planned:
        writer.add_tensor_info(one.entry.name, one.entry.shape, np.dtype(np.float32), one.nbytes, one.type)
    total, done = sum(one.nbytes for one in planned), 0
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for one in planned:
            if progress:
                progress(done, total, one.entry.name)
            writer.write_tensor_data(_encoded(one, checkpoint))
            done += one.nbytes
    finally:
        writer.close()
    if progress:
        progress(total, total, "")


def _add(writer: gguf.GGUFWriter, name: str, value: Value) -> None:
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    else:
        writer.add_array(name, value)


def _encoded(one: Planned, checkpoint: Checkpoint) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The bytes of one tensor, made a few rows at a time."""
    made, at = np.empty(one.nbytes, np.uint8), 0
    for source in one.entry.sources:
        for rows in _rows(checkpoint.weight(source), one.entry):
            part = encode(rows, one.type, source)
            made[at : at + part.nbytes] = part
            at += part.nbytes
    if at != made.nbytes:
        raise CheckpointError(f"{one.entry.name} came out as {at} bytes, planned were {made.nbytes}.")
    return made


def _rows(weight: Weight, entry: Entry) -> Iterator[Tensor]:
    """The values of a weight as the file has them, fp32, a few rows at a time."""
    size = entry.shape[-1]
    step = max(1, CHUNK_VALUES // size) if entry.is_matrix else weight.shape[0]
    for start in range(0, weight.shape[0], step):
        rows = weight.rows(slice(start, start + step))
        if entry.name.endswith("ssm_a"):
            rows = -rows.exp()
        yield rows.reshape(-1, size) if len(entry.shape) == 2 else rows


def _version() -> str:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version("gdn2-edge")
    return "unknown"
