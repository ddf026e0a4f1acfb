"""The recurrent state: everything a model remembers, in tensors whose size never grows.

Knows the spec's shapes. Not what a conversation, a file or a token is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from gdn2_edge.errors import SessionError
from gdn2_edge.spec import ModelSpec

V = TypeVar("V")

LLAMA_CPP_BLOCK = "llama_cpp"  # the tensor of a state that only llama.cpp can read
MAX_POSITION = 2**53  # the angles of attention are fp64, which counts exactly up to here


@dataclass(frozen=True)
class Gdn2State(Generic[V]):
    """One gdn2 layer: `conv` [B, 2 H K + HV V, conv_size - 1] inputs of q, k, v in that order; `S` [B, HV, K, V]."""

    conv: V
    S: V


@dataclass(frozen=True)
class WindowState(Generic[V]):
    """One sliding-attention layer: keys (rotated) and values [B, window, heads, head_dim]; slot = position % window."""

    ring_k: V
    ring_v: V


LayerState = Gdn2State[V] | WindowState[V]


@dataclass(frozen=True)
class State(Generic[V]):
    """All of it. `position` [B] int64 counts the tokens each sequence has seen; everything else is fp32."""

    position: V
    layers: tuple[LayerState[V], ...]

    def named(self) -> dict[str, V]:
        """Every value by the name a session file gives it."""
        values = {"position": self.position}
        for i, layer in enumerate(self.layers):
            values |= {f"layers.{i}.{name}": value for name, value in vars(layer).items()}
        return values


def state_from_named(spec: ModelSpec, values: dict[str, V]) -> State[V]:
    """The inverse of `State.named`; `values` holds exactly the names of `spec.state_shapes()`."""
    layers: list[LayerState[V]] = []
    for i, kind in enumerate(spec.layer_types):
        if kind == "gdn2":
            layers.append(Gdn2State(values[f"layers.{i}.conv"], values[f"layers.{i}.S"]))
        else:
            layers.append(WindowState(values[f"layers.{i}.ring_k"], values[f"layers.{i}.ring_v"]))
    return State(values["position"], tuple(layers))


def initial_state(spec: ModelSpec, batch: int = 1, device: torch.device | str = "cpu") -> State[Tensor]:
    """The state before the first token of `batch` sequences: zeros."""
    shapes = spec.state_shapes(batch)
    return state_from_named(
        spec,
        {name: torch.zeros(shape, dtype=state_dtype(name), device=device) for name, shape in shapes.items()},
    )


def state_dtype(name: str) -> torch.dtype:
    """The dtype of a state tensor by its name."""
    return torch.int64 if name == "position" else torch.float32


def check_state(spec: ModelSpec, tensors: dict[str, Tensor], source: str) -> State[Tensor]:
    """State from tensors that came from outside.

    Raises:
        SessionError: a tensor is missing, unknown, of another shape or dtype, or not finite.
    """
    batch = max(1, len(tensors["position"])) if "position" in tensors and tensors["position"].ndim == 1 else 1
    shapes = spec.state_shapes(batch)
    if LLAMA_CPP_BLOCK in tensors:
        raise SessionError(f"{source}: it was kept by llama.cpp, in a form that no other runtime reads. Go on there.")
    if different := sorted(shapes.keys() ^ tensors.keys()):
        what = "is missing" if different[0] in shapes else "is not part of this model's state"
        raise SessionError(f"{source}: tensor {different[0]} {what}.")
    for name, shape in shapes.items():
        found = tensors[name]
        if tuple(found.shape) != shape or found.dtype != state_dtype(name):
            raise SessionError(
                f"{source}: {name} is {tuple(found.shape)} {found.dtype}, this model's state has "
                f"{shape} {state_dtype(name)}."
            )
        if not torch.isfinite(found).all():
            raise SessionError(f"{source}: {name} holds values that are not finite.")
    for position in tensors["position"].tolist():
        if not 0 <= position <= MAX_POSITION:
            raise SessionError(f"{source}: position is {position}, expected 0 to {MAX_POSITION}.")
    return state_from_named(spec, tensors)
