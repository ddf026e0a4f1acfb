"""Weights that are read when they are written: what `forward.py` gets while a graph is recorded.

Knows stored layouts and checkpoints; not onnx.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor

from gdn2_edge.checkpoint.files import TensorInfo
from gdn2_edge.model import WeightReader, WeightSource
from gdn2_edge.weights import Dense, Fp8, Int4, Int8, Weight, join, layout_of

Layout = type[Dense] | type[Int8] | type[Fp8] | type[Int4]
FORMATS: dict[Layout, str] = {Dense: "fp32", Int8: "int8", Fp8: "fp8", Int4: "int4"}


class Source(WeightSource, Protocol):
    """A checkpoint, or the plan of one."""

    def stored(self, name: str) -> dict[str, TensorInfo]:
        """Suffix -> dtype and shape of the stored tensors of one canonical tensor."""


@dataclass(frozen=True)
class Run:
    """Rows of one or several tensors, one under another, that are all stored in the same layout."""

    name: str
    layout: Layout
    shape: tuple[int, ...]
    group_size: int
    load: Callable[[], Weight]


@dataclass(frozen=True)
class Deferred:
    """A weight known by layout and shape alone; its values are read anew whenever they are asked for."""

    name: str
    source: Source
    names: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        shapes = self.source.spec.tensor_shapes()
        return (sum(shapes[name][0] for name in self.names), *shapes[self.names[0]][1:])

    def rows(self, index: Tensor | slice) -> Tensor:
        return self.load().rows(index)

    def tensors(self) -> dict[str, Tensor]:
        return self.load().tensors()

    def load(self) -> Weight:
        """The weight itself."""
        return _load(self.source, self.name, self.names)

    def runs(self) -> tuple[Run, ...]:
        """The rows in order, a run for each change of the layout."""
        shapes = self.source.spec.tensor_shapes()

        def stored_as(name: str) -> tuple[Layout, int]:
            infos = self.source.stored(name)
            layout = layout_of(name, infos, shapes[name])
            return layout, shapes[name][1] // infos["_scale"].shape[1] if layout is Int4 else 0

        runs = []
        for (layout, group_size), group in groupby(self.names, stored_as):
            names = tuple(group)
            shape = (sum(shapes[name][0] for name in names), *shapes[names[0]][1:])
            name = names[0] if len(names) == 1 else _joined_name(names)
            runs.append(Run(name, layout, shape, group_size, partial(_load, self.source, name, names)))
        return tuple(runs)


def _load(source: Source, name: str, names: tuple[str, ...]) -> Weight:
    return join(name, [source.weight(one) for one in names])


def _joined_name(names: tuple[str, ...]) -> str:
    """layers.0.q_proj.weight, layers.0.k_proj.weight -> layers.0.q_proj+k_proj.weight."""
    first, last = names[0].rsplit(".", 1)[0], names[0].rsplit(".", 1)[1]
    prefix = ".".join(names[0].split(".")[:2]) + "."
    middle = "+".join(name.removeprefix(prefix).removesuffix("." + last) for name in names)
    return f"{prefix}{middle}.{last}" if first.startswith("layers.") else "+".join(names)


def _as_it_is(weight: Weight) -> Weight:
    return weight


@dataclass(frozen=True)
class DeferredReader(WeightReader):
    """The tree of weights of a model, none of them read."""

    source: Source
    device: torch.device = field(default_factory=partial(torch.device, "cpu"))
    ready: Callable[[Weight], Weight] = _as_it_is

    def vector(self, *names: str) -> Weight:
        return self._get(*names)

    def _get(self, *names: str) -> Weight:
        return Deferred(names[0] if len(names) == 1 else _joined_name(names), self.source, names)


def stored_format(source: Source) -> str:
    """The format of the matrices: the quantized one that holds most of them, int4 if there is any; else "fp32"."""
    sizes = {"int4": 0, "int8": 0, "fp8": 0, "fp32": 0}
    for name, shape in source.spec.tensor_shapes().items():
        if len(shape) == 2:
            sizes[FORMATS[layout_of(name, source.stored(name), shape)]] += shape[0] * shape[1]
    if sizes["int4"]:
        return "int4"
    return max(("int8", "fp8"), key=lambda format: sizes[format]) if sizes["int8"] or sizes["fp8"] else "fp32"
