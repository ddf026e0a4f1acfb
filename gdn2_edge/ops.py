"""The verbs GDN-2 is written in.

`forward.py` says what the model is, once, in these verbs; a backend says what a value `V` is and how each verb is
done: `TorchOps` computes tensors, an exporter may record graph nodes. A verb never shows a shape, dtype or device
to `forward.py`, and one token or many is decided inside the verb.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from gdn2_edge.spec import ModelSpec, OutputGate
from gdn2_edge.state import LayerState
from gdn2_edge.weights import Weight

V = TypeVar("V")


@dataclass(frozen=True)
class Mlp:
    """`w12`: the rows of w1 and w2, which read the same input; `w3`: the way back."""

    norm: Weight
    w12: Weight
    w3: Weight


@dataclass(frozen=True)
class Gdn2Layer:
    """Weights of one gdn2 layer. `in_proj`: the rows of q, k, v, b, w, f.0, g.0; `conv`: filters of q, k, v."""

    norm: Weight
    in_proj: Weight
    conv: Weight
    f_proj: Weight
    g_proj: Weight
    g_bias: Weight
    A_log: Weight
    dt_bias: Weight
    o_norm: Weight
    o_proj: Weight
    mlp: Mlp


@dataclass(frozen=True)
class AttentionLayer:
    """Weights of one sliding-attention layer. `in_proj`: the rows of q, k, v."""

    norm: Weight
    in_proj: Weight
    o_proj: Weight
    mlp: Mlp


Layer = Gdn2Layer | AttentionLayer


@dataclass(frozen=True)
class ModelWeights:
    """Every weight of a model."""

    embed: Weight
    layers: tuple[Layer, ...]
    ln_f: Weight
    lm_head: Weight


BlockBody = Callable[..., tuple[V, LayerState[V]]]


class Ops(Protocol[V]):
    """B sequences, T tokens, H heads, K and V channels a head. Shapes are what a tensor backend has there."""

    def embed(self, tokens: V, weight: Weight) -> V:
        """[B, T] ids -> [B, T, hidden]."""

    def linear(self, x: V, weight: Weight, bias: Weight | None = None) -> V:
        """x W^T + bias: [B, T, in] -> [B, T, out]."""

    def rms_norm(self, x: V, weight: Weight, eps: float) -> V:
        """x / sqrt(mean(x^2) + eps) * weight over the last axis."""

    def l2_norm(self, x: V) -> V:
        """x / sqrt(sum(x^2) + 1e-6) over the last axis."""

    def add(self, x: V, y: V) -> V:
        """x + y."""

    def gate(self, x: V, y: V, kind: OutputGate) -> V:
        """x * silu(y), or x * sigmoid(y)."""

    def sigmoid(self, x: V, scale: float = 1.0) -> V:
        """scale * sigmoid(x)."""

    def decay(self, x: V, A_log: Weight, dt_bias: Weight) -> V:
        """The log decay g = -exp(A_log)[head] * softplus(x + dt_bias): [B, T, H, K] -> the same, <= 0."""

    def heads(self, x: V, n: int) -> V:
        """[B, T, n * C] -> [B, T, n, C]."""

    def merge(self, x: V) -> V:
        """[B, T, n, C] -> [B, T, n * C]."""

    def split(self, x: V, sizes: tuple[int, ...]) -> tuple[V, ...]:
        """Pieces of the last axis."""

    def short_conv(self, x: V, weight: Weight, tail: V) -> tuple[V, V]:
        """silu of the depthwise causal convolution, and the new tail: the last inputs [B, C, conv_size - 1]."""

    def gated_delta_rule2(self, q: V, k: V, v: V, g: V, b: V, w: V, S: V) -> tuple[V, V]:
        """The recurrence of `kernels/reference.py`: outputs [B, T, HV, V] and the new S."""

    def rope(self, x: V, position: V, base: float) -> V:
        """Rotate the two halves of each head by its token's absolute position, which starts at `position` [B]."""

    def window_attention(self, q: V, k: V, v: V, ring_k: V, ring_v: V, position: V) -> tuple[V, V, V]:
        """Softmax attention of each token over the last `window` tokens, and the new rings."""

    def advance(self, position: V, tokens: V) -> V:
        """position + T."""

    def block(
        self, body: BlockBody[V], spec: ModelSpec, layer: Layer, x: V, state: LayerState[V], position: V
    ) -> tuple[V, LayerState[V]]:
        """One whole layer. A backend that fuses overrides this; the others call `body(self, ...)`."""
