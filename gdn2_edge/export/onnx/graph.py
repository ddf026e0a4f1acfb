"""A graph that grows node by node. Knows onnx's messages; not what a model is.

Weights are promises: name, type, shape, and how to make the values once the file is written, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper
from torch import Tensor

OPSET = 23  # the first with RMSNormalization
IR_VERSION = 11
MICROSOFT = "com.microsoft"
GDN2_DOMAIN = "ai.gdn2"
BITS: dict[int, int] = {
    TensorProto.INT64: 64,
    TensorProto.FLOAT: 32,
    TensorProto.FLOAT16: 16,
    TensorProto.INT8: 8,
    TensorProto.UINT8: 8,
    TensorProto.FLOAT8E4M3FN: 8,
    TensorProto.INT4: 4,
}


@dataclass(frozen=True)
class Initializer:
    """A weight of the graph; `make` gives a tensor whose memory is the file's bytes."""

    name: str
    type: int
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return (prod(self.shape) * BITS[self.type] + 7) // 8


class Graph:
    """Nodes, weights and small constants, all under stable names; `scope` goes before the names that follow."""

    def __init__(self, scope: str = "") -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, Initializer] = {}
        self.constants: dict[str, onnx.TensorProto] = {}
        self.scope = scope
        self._counts: dict[str, int] = {}

    def node(self, op: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """Add a node with one output; returns the output's name."""
        return self.nodes_of(op, *inputs, outputs=1, domain=domain, **attributes)[0]

    def nodes_of(self, op: str, *inputs: str, outputs: int, domain: str = "", **attributes: Any) -> tuple[str, ...]:
        """Add a node with several outputs; returns their names."""
        count = self._counts.get(self.scope + op, 0)
        self._counts[self.scope + op] = count + 1
        name = f"{self.scope}{op}_{count}"
        names = (name,) if outputs == 1 else tuple(f"{name}_{i}" for i in range(outputs))
        self.nodes.append(helper.make_node(op, list(inputs), list(names), name, domain=domain, **attributes))
        return names

    def constant(self, values: Sequence[int] | int | float, type: int = TensorProto.INT64) -> str:
        """A small constant; the same one for the same values."""
        array = np.asarray(values, helper.tensor_dtype_to_np_dtype(type))
        text = "_".join(map(str, array.reshape(-1).tolist()))
        name = f"const.{TensorProto.DataType.Name(type).lower()}.{'x'.join(map(str, array.shape)) or 'scalar'}.{text}"
        if name not in self.constants:
            self.constants[name] = helper.make_tensor(name, type, array.shape, array.tobytes(), raw=True)
        return name

    def initializer(self, name: str, type: int, shape: tuple[int, ...], make: Callable[[], Tensor]) -> str:
        """A weight to be written with the file; returns its name."""
        self.initializers.setdefault(name, Initializer(name, type, shape, make))
        return name

    def rename(self, names: dict[str, str]) -> None:
        """Give values other names."""
        for node in self.nodes:
            node.input[:] = [names.get(name, name) for name in node.input]
            node.output[:] = [names.get(name, name) for name in node.output]
