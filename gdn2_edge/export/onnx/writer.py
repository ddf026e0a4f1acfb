"""An ONNX model on disk: weights are made, written and dropped one at a time.

Up to `INLINE_BYTES` they lie in model.onnx itself; a message cannot be larger than 2 GB, so beyond that they lie in a
file beside it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import onnx
import torch
from onnx import TensorProto
from torch import Tensor

from gdn2_edge.errors import CheckpointError
from gdn2_edge.export.onnx.graph import Initializer
from gdn2_edge.onnx_names import DATA_FILE, MODEL_FILE

INLINE_BYTES = 1_500_000_000
# Windows maps files at multiples of 64 KiB. Small tensors are not mapped but read.
MAPPED_BYTES, MAPPED_ALIGNMENT, ALIGNMENT = 1 << 20, 1 << 16, 64
Progress = Callable[[int, int, str], None]


def uses_data_file(initializers: Sequence[Initializer]) -> bool:
    """Whether these weights go into a file of their own."""
    return sum(one.nbytes for one in initializers) > INLINE_BYTES


def write_model(
    model: onnx.ModelProto, initializers: Sequence[Initializer], folder: Path, progress: Progress | None = None
) -> None:
    """Write `model` with its weights into `folder` and let onnx check it, shapes and types included.

    Args:
        progress: called with (bytes done, bytes in all, tensor name).
    Raises:
        OSError: as the system gave it.
    """
    total, done = sum(one.nbytes for one in initializers), 0
    with contextlib.ExitStack() as files:
        data = files.enter_context(_durable(folder / DATA_FILE)) if uses_data_file(initializers) else None
        for one in initializers:
            if progress:
                progress(done, total, one.name)
            tensor = TensorProto(name=one.name, data_type=one.type, dims=one.shape)
            if data is None:
                tensor.raw_data = bytes(_bytes(one))
            else:
                alignment = MAPPED_ALIGNMENT if one.nbytes >= MAPPED_BYTES else ALIGNMENT
                data.write(bytes(-data.tell() % alignment))
                _point(tensor, data.tell(), one.nbytes)
                data.write(_bytes(one))
            model.graph.initializer.append(tensor)
            done += one.nbytes
    with _durable(folder / MODEL_FILE) as file:
        file.write(model.SerializeToString())
    onnx.checker.check_model(str(folder / MODEL_FILE), full_check=True)
    if progress:
        progress(total, total, "")


@contextlib.contextmanager
def _durable(path: Path) -> Iterator[BinaryIO]:
    """A new file whose bytes are on the disk when the block ends."""
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _point(tensor: TensorProto, offset: int, length: int) -> None:
    """Let a tensor's values lie in the data file."""
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", DATA_FILE), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)


def _bytes(one: Initializer) -> memoryview:
    tensor: Tensor = one.make()
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    if raw.nbytes != one.nbytes:
        raise CheckpointError(f"{one.name} came out as {raw.nbytes} bytes, planned were {one.nbytes}.")
    return raw
