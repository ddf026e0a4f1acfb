"""Weights as data: one small class a storage layout, each able to give its exact values in fp32.

A matrix is [out_features, in_features]. The tensor names and shapes are those of compressed-tensors
(https://github.com/vllm-project/compressed-tensors), so that safetensors and numpy are enough to read a file.
The classes know no model and do no products; `gdn2_edge.kernels.linear` multiplies with them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gdn2_edge.errors import CheckpointError

FP8_MAX = 448.0
NIBBLES_PER_INT32 = 8


class Weight(Protocol):
    """What every layout offers. `name` is the canonical name of the tensor, or of the joined rows."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    def rows(self, index: Tensor | slice) -> Tensor:
        """The exact values of some rows, fp32 [..., in_features]."""

    def tensors(self) -> dict[str, Tensor]:
        """Stored suffix -> tensor, as a checkpoint holds them."""


@dataclass(frozen=True)
class Dense:
    """fp32, bf16 or fp16 values as they are; vectors and convolution filters too."""

    name: str
    data: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.data.shape)

    def rows(self, index: Tensor | slice) -> Tensor:
        return self.data[index].float()

    def tensors(self) -> dict[str, Tensor]:
        return {"": self.data}


@dataclass(frozen=True)
class Int8:
    """value = data * scale; data int8 [O, I] in -127..127, scale fp32 [O, 1]."""

    name: str
    data: Tensor
    scale: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.data.shape)

    def rows(self, index: Tensor | slice) -> Tensor:
        return self.data[index].float() * self.scale[index]

    def tensors(self) -> dict[str, Tensor]:
        return {"": self.data, "_scale": self.scale}


@dataclass(frozen=True)
class Fp8:
    """value = data * scale; data float8_e4m3fn [O, I], scale fp32 [O, 1]."""

    name: str
    data: Tensor
    scale: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.data.shape)

    def rows(self, index: Tensor | slice) -> Tensor:
        return fp8_values(self.data.view(torch.uint8)[index]) * self.scale[index]

    def tensors(self) -> dict[str, Tensor]:
        return {"": self.data, "_scale": self.scale}


@dataclass(frozen=True)
class Int4:
    """value = (code - 8) * scale of its group; eight 4-bit codes an int32, lowest bits first.

    data int32 [O, I / 8]; scale bf16 [O, I / group_size].
    """

    name: str
    data: Tensor
    scale: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.data.shape[0], self.data.shape[1] * NIBBLES_PER_INT32)

    @property
    def group_size(self) -> int:
        return self.shape[1] // self.scale.shape[1]

    def rows(self, index: Tensor | slice) -> Tensor:
        codes = unpack_int4(self.data[index])
        scale = self.scale[index].float().repeat_interleave(self.group_size, -1)
        return codes.float().mul_(scale)

    def tensors(self) -> dict[str, Tensor]:
        return {"_packed": self.data, "_scale": self.scale, "_shape": torch.tensor(self.shape)}


@dataclass(frozen=True)
class Joined:
    """Rows that are read together, one matrix under another; the parts may have different layouts."""

    name: str
    parts: tuple[Weight, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(part.shape[0] for part in self.parts), self.parts[0].shape[1])

    def rows(self, index: Tensor | slice) -> Tensor:
        return torch.cat([part.rows(slice(None)) for part in self.parts])[index]

    def tensors(self) -> dict[str, Tensor]:
        return {}


def join(name: str, parts: Sequence[Weight]) -> Weight:
    """One weight with the rows of all `parts`; one buffer for each run of parts with the same layout."""
    merged: list[Weight] = []
    run: list[Weight] = []
    for part in parts:
        if run and _layout(part) != _layout(run[0]):
            merged.append(_stack(name, run))
            run = []
        run.append(part)
    merged.append(_stack(name, run))
    return merged[0] if len(merged) == 1 else Joined(name, tuple(merged))


def _layout(weight: Weight) -> tuple[object, ...]:
    return (type(weight), *((t.dtype, t.shape[1:]) for t in weight.tensors().values()))


def _stack(name: str, run: Sequence[Weight]) -> Weight:
    first = run[0]
    if len(run) == 1:
        return first
    if isinstance(first, Dense):
        return Dense(name, torch.cat([w.data for w in run if isinstance(w, Dense)]))
    for layout in (Int8, Fp8, Int4):
        if isinstance(first, layout):
            same = [w for w in run if isinstance(w, layout)]
            return layout(name, torch.cat([w.data for w in same]), torch.cat([w.scale for w in same]))
    return Joined(name, tuple(run))


def num_bytes(weight: Weight) -> int:
    """Bytes of memory the weight's own tensors take."""
    parts = weight.parts if isinstance(weight, Joined) else (weight,)
    return sum(tensor.nbytes for part in parts for tensor in part.tensors().values())


def pack_int4(codes: Tensor) -> Tensor:
    """Codes -8..7 [O, I] (any integer dtype, I a multiple of 8) -> int32 [O, I / 8]."""
    unsigned = (codes.to(torch.int16) + 8).to(torch.uint8)
    pairs = unsigned[..., 0::2] | (unsigned[..., 1::2] << 4)
    return pairs.contiguous().view(torch.int32)


def unpack_int4(packed: Tensor) -> Tensor:
    """The inverse of `pack_int4`: int32 [..., I / 8] -> int8 [..., I]."""
    pairs = packed.contiguous().view(torch.uint8)
    low, high = pairs & 15, pairs >> 4
    return torch.stack([low, high], -1).flatten(-2).to(torch.int8) - 8


def fp8_values(codes: Tensor) -> Tensor:
    """Exact fp32 values of e4m3 bytes (uint8, any shape).

    The sign and the seven other bits, shifted into fp16's places, read as value / 256; subnormals included. The
    two NaN codes read as +-480, so a writer must not store them. Far faster than `.to(float32)` on a CPU.
    """
    bits = codes.view(torch.int8).to(torch.int16)
    bits.bitwise_left_shift_(7).bitwise_and_(-0x4001)
    return bits.view(torch.float16).to(torch.float32).mul_(256.0)


class Stored(Protocol):
    """The dtype and shape of a stored tensor: the tensor itself, or what a header says of it."""

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


def layout_of(
    name: str, stored: Mapping[str, Stored], shape: tuple[int, ...]
) -> type[Dense] | type[Int8] | type[Fp8] | type[Int4]:
    """The class that holds a tensor of `shape` whose stored tensors (by suffix) are these; no value is read.

    Raises:
        CheckpointError: the suffixes, dtypes or shapes are not those of a known layout of a tensor of `shape`.
    """
    dtypes = {suffix: tensor.dtype for suffix, tensor in sorted(stored.items())}
    if "_scale" in stored and len(shape) != 2:
        raise CheckpointError(f"{name} is quantized, but {shape} is no matrix; vectors and filters stay as they are.")
    layout: type[Dense] | type[Int8] | type[Fp8] | type[Int4]
    scale = ((shape[0], 1), torch.float32)
    match list(dtypes.items()):
        case [("", (torch.float32 | torch.bfloat16 | torch.float16) as dtype)]:
            layout, expected = Dense, {"": (shape, dtype)}
        case [("", torch.int8), ("_scale", _)]:
            layout, expected = Int8, {"": (shape, torch.int8), "_scale": scale}
        case [("", torch.float8_e4m3fn), ("_scale", _)]:
            layout, expected = Fp8, {"": (shape, torch.float8_e4m3fn), "_scale": scale}
        case [("_packed", torch.int32), ("_scale", _), ("_shape", _)]:
            found = tuple(stored["_scale"].shape)
            if len(found) != 2 or found[1] < 1 or shape[1] % (found[1] * NIBBLES_PER_INT32):
                raise CheckpointError(f"{name}_scale is {found}, which does not divide {shape}.")
            layout = Int4
            expected = {
                "_packed": ((shape[0], shape[1] // NIBBLES_PER_INT32), torch.int32),
                "_scale": ((shape[0], found[1]), torch.bfloat16),
                "_shape": ((2,), torch.int64),
            }
        case _:
            formats = ", ".join(f"{name}{suffix} {str(dtype)[6:]}" for suffix, dtype in dtypes.items())
            raise CheckpointError(
                f"{formats or name} is not a known weight format (fp32, bf16, fp16, int8, fp8, int4)."
            )
    for suffix in reversed(dtypes):
        is_shape, is_dtype = tuple(stored[suffix].shape), dtypes[suffix]
        shape, dtype = expected[suffix]
        if is_dtype != dtype:
            raise CheckpointError(f"{name}{suffix} is {is_shape} {is_dtype}, expected {shape} {dtype}.")
        if is_shape != shape:
            raise CheckpointError(f"{name}{suffix} is {is_shape}, the spec says {shape}. Was a size changed?")
    return layout


def weight_from_tensors(name: str, stored: Mapping[str, Tensor], shape: tuple[int, ...]) -> Weight:
    """The weight `name` from its stored tensors (by suffix, see `Weight.tensors`).

    Raises:
        CheckpointError: see `layout_of`; or a scale is not finite, or the tensors are packed from another shape.
    """
    layout = layout_of(name, stored, shape)
    if issubclass(layout, Dense):
        return Dense(name, stored[""])
    if not torch.isfinite(stored["_scale"]).all():
        raise CheckpointError(f"{name}_scale holds values that are not finite.")
    # Of the bytes of an fp8 number 0x7F and 0xFF are NaN; they are the largest of their kind.
    if layout is Fp8 and (stored[""].view(torch.int8).max() == 0x7F or stored[""].view(torch.uint8).max() == 0xFF):
        raise CheckpointError(f"{name} holds values that are not finite.")
    if layout is Int4 and stored["_shape"].tolist() != list(shape):
        raise CheckpointError(f"{name}_shape says {stored['_shape'].tolist()}, the spec says {list(shape)}.")
    return layout(name, stored["_packed" if layout is Int4 else ""], stored["_scale"])


def check_finite(name: str, values: Tensor, why: str = "The checkpoint is damaged or diverged.") -> None:
    """Raise CheckpointError if any value is NaN or infinite."""
    low, high = torch.aminmax(values)
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise CheckpointError(f"{name} holds values that are not finite. {why}")
