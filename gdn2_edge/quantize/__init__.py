"""Quantizing a checkpoint: plan everything, then one tensor in memory at a time. No model is built, no GPU needed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gdn2_edge.checkpoint.files import TensorInfo, check_apart, companions, identity
from gdn2_edge.checkpoint.reader import Checkpoint, open_checkpoint
from gdn2_edge.checkpoint.writer import Job, Progress, check_target, write_checkpoint
from gdn2_edge.errors import FormatError
from gdn2_edge.quantize.fp8 import encode_fp8
from gdn2_edge.quantize.int4 import encode_int4
from gdn2_edge.quantize.int8 import encode_int8
from gdn2_edge.quantize.recipe import Planned, Recipe, plan
from gdn2_edge.weights import NIBBLES_PER_INT32, Dense, Weight, check_finite

# Rows are encoded this many values at a time, which bounds the memory of the search.
CHUNK_VALUES = 1 << 22


@dataclass(frozen=True)
class TensorReport:
    """`relative_error` = |values - stored| / |values| (Frobenius norms)."""

    name: str
    format: str
    group_size: int
    bytes_before: int
    bytes_after: int
    relative_error: float | None
    note: str


@dataclass(frozen=True)
class Report:
    """What a quantization did, or (without errors and fingerprint) what it would do."""

    source: str
    out: str
    fingerprint: str | None
    parameters: int
    bytes_before: int
    bytes_after: int
    tensors: tuple[TensorReport, ...]

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes_after / self.parameters

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "bits_per_weight": self.bits_per_weight}


def quantize_checkpoint(
    src: str | Path,
    dst: str | Path,
    recipe: Recipe,
    *,
    dry_run: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Quantize the checkpoint `src` into a new folder `dst`.

    Args:
        src: a path: any checkpoint that `open_checkpoint` opens without further words, in fp32, bf16 or fp16.
        dst: the folder to make; a run that was interrupted is continued.
        recipe: which format for which tensor.
        dry_run: plan and check only.
        force: replace `dst` if gdn2-edge made it.
        progress: called with (bytes done, bytes in all, tensor name).
    Raises:
        CheckpointError: unreadable source, values that are not finite, a target that cannot be written.
        FormatError: the recipe does not fit, or the source is already quantized.
    """
    src, dst = Path(src), Path(dst)
    check_apart(src, dst)
    check_target(dst, force)
    checkpoint = open_checkpoint(src)
    planned = plan(recipe, checkpoint.spec)
    for entry in planned:
        if set(checkpoint.stored(entry.name)) != {""} or not checkpoint.stored(entry.name)[""].dtype.is_floating_point:
            raise FormatError(f"{src}: {entry.name} is already quantized. Quantize from the original checkpoint.")
    jobs, errors = [], dict[str, float]()
    for entry in planned:
        stored = stored_infos(entry)
        jobs.append(Job(entry.name, stored, _maker(checkpoint, entry, errors)))
    fingerprint = None
    if not dry_run:
        fingerprint = write_checkpoint(
            dst,
            checkpoint.spec,
            jobs,
            identity={"source": identity(src), "recipe": recipe.model_dump(mode="json")},
            config={"quantization_config": quantization_config(planned)},
            files=companions(src),
            notes=errors,
            force=force,
            progress=progress,
        )
    tensors = tuple(
        TensorReport(
            entry.name,
            entry.format,
            entry.group_size,
            sum(info.nbytes for info in checkpoint.stored(entry.name).values()),
            job.nbytes,
            errors.get(entry.name),
            entry.note,
        )
        for entry, job in zip(planned, jobs, strict=True)
    )
    return Report(
        str(src),
        str(dst),
        fingerprint,
        checkpoint.spec.num_parameters(),
        sum(t.bytes_before for t in tensors),
        sum(t.bytes_after for t in tensors),
        tensors,
    )


def _maker(checkpoint: Checkpoint, entry: Planned, errors: dict[str, float]) -> Any:
    def make() -> dict[str, Tensor]:
        source = checkpoint.weight(entry.name)
        if not isinstance(source, Dense):
            raise FormatError(f"{entry.name} is already quantized.")
        check_finite(entry.name, source.data)
        pieces, wrong, whole = [], 0.0, 0.0
        rows = max(1, CHUNK_VALUES // max(1, prod(entry.shape[1:])))
        for start in range(0, entry.shape[0], rows):
            values = source.rows(slice(start, start + rows))
            piece = encode(entry, values)
            wrong += float((piece.rows(slice(None)) - values).double().square().sum())
            whole += float(values.double().square().sum())
            pieces.append(piece.tensors())
        errors[entry.name] = (wrong / whole) ** 0.5 if whole else 0.0
        joined = {suffix: torch.cat([p[suffix] for p in pieces]) for suffix in pieces[0] if suffix != "_shape"}
        if "_shape" in pieces[0]:
            joined["_shape"] = torch.tensor(entry.shape)
        return {entry.name + suffix: tensor for suffix, tensor in joined.items()}

    return make


def encode(entry: Planned, values: Tensor) -> Weight:
    """Some rows of a tensor in their planned format. values fp32 [rows, ...]."""
    match entry.format:
        case "int8":
            return encode_int8(entry.name, values)
        case "fp8":
            return encode_fp8(entry.name, values)
        case "int4":
            return encode_int4(entry.name, values, entry.group_size)
        case "bf16":
            return Dense(entry.name, values.bfloat16())
        case "fp32":
            return Dense(entry.name, values)


def stored_infos(entry: Planned) -> dict[str, TensorInfo]:
    """Stored name -> dtype and shape of the tensors that `encode` makes of a whole tensor."""
    shape, name = entry.shape, entry.name
    match entry.format:
        case "int8" | "fp8":
            dtype = torch.int8 if entry.format == "int8" else torch.float8_e4m3fn
            return {
                name: TensorInfo(dtype, shape),
                f"{name}_scale": TensorInfo(torch.float32, (shape[0], 1)),
            }
        case "int4":
            return {
                f"{name}_packed": TensorInfo(torch.int32, (shape[0], shape[1] // NIBBLES_PER_INT32)),
                f"{name}_scale": TensorInfo(torch.bfloat16, (shape[0], shape[1] // entry.group_size)),
                f"{name}_shape": TensorInfo(torch.int64, (2,)),
            }
    return {name: TensorInfo(torch.bfloat16 if entry.format == "bf16" else torch.float32, shape)}


_SCHEMES: dict[str, tuple[str, dict[str, Any]]] = {
    "int8": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
    "fp8": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "int4": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group"}),
}


def quantization_config(planned: list[Planned]) -> dict[str, Any]:
    """The plan in compressed-tensors' words: one group for each scheme, the modules left alone under `ignore`."""
    groups: dict[tuple[str, int], list[str]] = {}
    ignore = []
    for entry in planned:
        module = entry.name.removesuffix(".weight")
        if entry.format in _SCHEMES:
            groups.setdefault((entry.format, entry.group_size), []).append(module)
        elif len(entry.shape) == 2:
            ignore.append(module)
    config_groups, formats = {}, set()
    for i, ((format, group_size), targets) in enumerate(groups.items()):
        name, scheme = _SCHEMES[format]
        formats.add(name)
        weights = {**scheme, "symmetric": True, **({"group_size": group_size} if group_size else {})}
        config_groups[f"group_{i}"] = {"targets": targets, "weights": weights, "format": name}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": config_groups,
        "ignore": ignore,
    }
