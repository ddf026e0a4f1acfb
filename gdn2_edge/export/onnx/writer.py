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
from onnx import TensorProto, helper
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
    """Let onnx check `model`, shapes and types included, and write it with its weights into `folder`.

    Args:
        progress: called with (bytes done, bytes in all, tensor name).
    Raises:
        OSError: as the system gave it.
    """
    _check(model, initializers)
    total, done, in_data_file = sum(one.nbytes for one in initializers), 0, uses_data_file(initializers)
    heads = _data_file_heads(initializers) if in_data_file else [_inline_head(one) for one in initializers]
    graph = model.graph.SerializeToString()
    rest = onnx.ModelProto()
    rest.CopyFrom(model)
    rest.ClearField("graph")
    length = len(graph) + sum(map(len, heads)) + (0 if in_data_file else total)
    with contextlib.ExitStack() as files:
        file = files.enter_context(_durable(folder / MODEL_FILE))
        values = files.enter_context(_durable(folder / DATA_FILE)) if in_data_file else file
        file.write(rest.SerializeToString() + _tag(onnx.ModelProto.GRAPH_FIELD_NUMBER, length) + graph)
        for one, head in zip(initializers, heads, strict=True):
            if progress:
                progress(done, total, one.name)
            file.write(head)
            if in_data_file:
                values.write(bytes(-values.tell() % _alignment(one)))
            values.write(_bytes(one))
            done += one.nbytes
    if progress:
        progress(total, total, "")


def _check(model: onnx.ModelProto, initializers: Sequence[Initializer]) -> None:
    """Let onnx check everything but the values of the weights, which it takes for inputs."""
    checked = onnx.ModelProto()
    checked.CopyFrom(model)
    checked.graph.input.extend(helper.make_tensor_value_info(one.name, one.type, one.shape) for one in initializers)
    onnx.checker.check_model(checked, full_check=True)


def _inline_head(one: Initializer) -> bytes:
    """A weight as a field of a graph, up to its values."""
    tensor: bytes = TensorProto(name=one.name, data_type=one.type, dims=one.shape).SerializeToString()
    tensor += _tag(TensorProto.RAW_DATA_FIELD_NUMBER, one.nbytes)
    return _tag(onnx.GraphProto.INITIALIZER_FIELD_NUMBER, len(tensor) + one.nbytes) + tensor


def _data_file_heads(initializers: Sequence[Initializer]) -> list[bytes]:
    """Weights as fields of a graph that say where in the data file their values lie."""
    heads, end = [], 0
    for one in initializers:
        end += -end % _alignment(one)
        tensor = TensorProto(name=one.name, data_type=one.type, dims=one.shape, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", DATA_FILE), ("offset", str(end)), ("length", str(one.nbytes))):
            tensor.external_data.add(key=key, value=value)
        message = tensor.SerializeToString()
        heads.append(_tag(onnx.GraphProto.INITIALIZER_FIELD_NUMBER, len(message)) + message)
        end += one.nbytes
    return heads


def _alignment(one: Initializer) -> int:
    return MAPPED_ALIGNMENT if one.nbytes >= MAPPED_BYTES else ALIGNMENT


def _tag(field: int, length: int) -> bytes:
    """What goes before `length` bytes of a field in protobuf's wire format."""
    numbers = []
    for number in (field << 3 | 2, length):
        while number > 127:
            numbers.append(number & 127 | 128)
            number >>= 7
        numbers.append(number)
    return bytes(numbers)


@contextlib.contextmanager
def _durable(path: Path) -> Iterator[BinaryIO]:
    """A new file whose bytes are on the disk when the block ends."""
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _bytes(one: Initializer) -> memoryview:
    tensor: Tensor = one.make()
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    if raw.nbytes != one.nbytes:
        raise CheckpointError(f"{one.name} came out as {raw.nbytes} bytes, planned were {one.nbytes}.")
    return raw
