"""The bytes a decoding step moves, from sizes alone. Knows no machine and reads no weight."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Protocol

from gdn2_edge.checkpoint.files import TensorInfo
from gdn2_edge.checkpoint.gguf_file import GgufFile
from gdn2_edge.checkpoint.onnx_file import OnnxExport
from gdn2_edge.model import WeightSource

# Models in a form that this package only writes: their sizes are known, their weights stay with what runs them.
Export = OnnxExport | GgufFile


class StoredWeights(WeightSource, Protocol):
    """A `WeightSource` that knows what it holds without reading it: a `Checkpoint`, or random weights."""

    def stored(self, name: str) -> dict[str, TensorInfo]:
        """Suffix -> dtype and shape of the stored tensors of one canonical tensor."""


@dataclass(frozen=True)
class Traffic:
    """Bytes that one decoding step cannot avoid to move: the floor under its time.

    `weights`: every weight as it is stored, once, and of the embedding one row a sequence. `state`: recurrent states
    and convolution tails, read and written. `kv`: attention's filled slots read and one written.
    """

    weights: int
    state: int
    kv: int

    @property
    def total(self) -> int:
        return self.weights + self.state + self.kv


def traffic(source: StoredWeights | Export, position: int, batch: int = 1) -> Traffic:
    """What a step at this position moves for `batch` sequences."""
    spec = source.spec
    if isinstance(source, Export):
        sizes = source.sizes
    else:
        sizes = {name: sum(info.nbytes for info in source.stored(name).values()) for name in spec.tensor_shapes()}
    embedding = sum(size for name, size in sizes.items() if name.startswith(("embed.", "token_embd.")))
    weights = sum(sizes.values()) - embedding + batch * embedding // spec.vocab_size
    state = kv = 0
    for name, shape in spec.state_shapes(batch).items():
        if name.endswith(("ring_k", "ring_v")):
            kv += 4 * prod(shape) * (min(position, spec.window) + 1) // spec.window
        elif name != "position":
            state += 2 * 4 * prod(shape)
    return Traffic(weights, state, kv)
