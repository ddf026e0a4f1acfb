"""`OnnxOps`: the verbs of `ops.py` as nodes of a graph.

A value is always [B, T, channels]; that it has heads is remembered, and only verbs that need them reshape. Activations
flow in fp32, or in fp16 with norms, gates, convolution and recurrence in fp32, as in `TorchOps`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from onnx import TensorProto
from torch import Tensor

from gdn2_edge.export.onnx.functions import OPERATOR
from gdn2_edge.export.onnx.graph import GDN2_DOMAIN, MICROSOFT, Graph
from gdn2_edge.export.onnx.products import dense, embedding, product
from gdn2_edge.export.onnx.weights import Deferred
from gdn2_edge.ops import BlockBody, Layer
from gdn2_edge.spec import ModelSpec, OutputGate
from gdn2_edge.state import LayerState
from gdn2_edge.weights import Weight

FLOAT, FLOAT16 = TensorProto.FLOAT, TensorProto.FLOAT16
L2_EPS = 1e-6


@dataclass(frozen=True)
class Value:
    """A value of the graph: its name and element type, and its number of heads where it has any."""

    name: str
    type: int = FLOAT
    heads: int = 0


class OnnxOps:
    """Verbs that record nodes; see `Ops` for what each means.

    Args:
        graph: what grows.
        spec: sizes of the model.
        type: of the activations, FLOAT or FLOAT16.
        portable: standard operators only.
    """

    def __init__(self, graph: Graph, spec: ModelSpec, type: int, portable: bool) -> None:
        self.graph, self.spec, self.type, self.portable = graph, spec, type, portable
        self._layer = 0
        self._made: dict[str, tuple[str, ...]] = {}

    def embed(self, tokens: Value, weight: Weight) -> Value:
        return self._cast(Value(*embedding(self.graph, tokens.name, _deferred(weight), self.type)), self.type)

    def linear(self, x: Value, weight: Weight, bias: Weight | None = None) -> Value:
        x = self._cast(x, self.type)
        outputs = [product(self.graph, x.name, run, self.type, self.portable) for run in _deferred(weight).runs()]
        y = outputs[0] if len(outputs) == 1 else self.graph.node("Concat", *outputs, axis=-1)
        if bias is not None:
            y = self.graph.node("Add", y, self._vector(bias, self.type))
        return Value(y, self.type)

    def rms_norm(self, x: Value, weight: Weight, eps: float) -> Value:
        return self._normalized(self._cast(x), self._vector(weight), eps)

    def l2_norm(self, x: Value) -> Value:
        # x / sqrt(sum(x^2) + eps) is an RMSNorm with eps / K, times 1 / sqrt(K).
        K = self.spec.head_k_dim
        scale = self.graph.initializer("l2_norm.scale", FLOAT, (K,), partial(torch.full, (K,), K**-0.5))
        return self._normalized(x, scale, L2_EPS / K)

    def add(self, x: Value, y: Value) -> Value:
        type = self.type if FLOAT16 in (x.type, y.type) else FLOAT
        return Value(self.graph.node("Add", self._cast(x, type).name, self._cast(y, type).name), type)

    def gate(self, x: Value, y: Value, kind: OutputGate) -> Value:
        y = self._cast(y)
        gate = self.graph.node("Sigmoid", y.name)
        if kind == "silu":
            gate = self.graph.node("Mul", y.name, gate)
        return replace(x, name=self.graph.node("Mul", self._cast(x).name, gate), type=FLOAT)

    def sigmoid(self, x: Value, scale: float = 1.0) -> Value:
        x = self._cast(x)
        y = self.graph.node("Sigmoid", x.name)
        if scale != 1.0:
            y = self.graph.node("Mul", y, self.graph.constant(scale, FLOAT))
        return replace(x, name=y)

    def decay(self, x: Value, A_log: Weight, dt_bias: Weight) -> Value:
        channels = dt_bias.shape[0]
        make = partial(_negative_rate, A_log, channels)
        rate = self.graph.initializer(A_log.name + ".negative_rate", FLOAT, (channels,), make)
        g = self.graph.node("Softplus", self.graph.node("Add", self._cast(x).name, self._vector(dt_bias)))
        return replace(x, name=self.graph.node("Mul", g, rate), type=FLOAT)

    def heads(self, x: Value, n: int) -> Value:
        return replace(x, heads=n)

    def merge(self, x: Value) -> Value:
        return replace(x, heads=0)

    def split(self, x: Value, sizes: tuple[int, ...]) -> tuple[Value, ...]:
        names = self.graph.nodes_of("Split", x.name, self.graph.constant(sizes), outputs=len(sizes), axis=-1)
        return tuple(Value(name, x.type) for name in names)

    def short_conv(self, x: Value, weight: Weight, tail: Value) -> tuple[Value, Value]:
        channels_first = self.graph.node("Transpose", self._cast(x).name, perm=[0, 2, 1])
        filters = self._vector(weight)
        if self.portable:
            inputs = self.graph.node("Concat", tail.name, channels_first, axis=2)
            y = self.graph.node("Conv", inputs, filters, group=weight.shape[0])
            y = self.graph.node("Mul", y, self.graph.node("Sigmoid", y))
            start, end, axis = (self.graph.constant([n]) for n in (1 - self.spec.conv_size, 2**31 - 1, 2))
            new_tail = self.graph.node("Slice", inputs, start, end, axis)
        else:
            y, new_tail = self.graph.nodes_of(
                "CausalConvWithState",
                *(channels_first, filters, "", tail.name),
                outputs=2,
                domain=MICROSOFT,
                activation="silu",
            )
        return Value(self.graph.node("Transpose", y, perm=[0, 2, 1])), Value(new_tail)

    def gated_delta_rule2(
        self, q: Value, k: Value, v: Value, g: Value, b: Value, w: Value, S: Value
    ) -> tuple[Value, Value]:
        inputs = [self._cast(x).name for x in (q, k, v, g, b, w)]
        o, state = self.graph.nodes_of(
            OPERATOR,
            *(*inputs, S.name),
            outputs=2,
            domain=GDN2_DOMAIN,
            num_heads=self.spec.num_heads,
            num_v_heads=self.spec.num_v_heads,
        )
        return Value(o, FLOAT, self.spec.num_v_heads), Value(state)

    def rope(self, x: Value, position: Value, base: float) -> Value:
        cos, sin = self._shared(f"rope/{base}", partial(self._angles, position, base))
        first, second = self.graph.nodes_of("Split", self._by_head(self._cast(x)), outputs=2, axis=-1, num_outputs=2)
        rotated = self.graph.node(
            "Concat",
            self.graph.node("Sub", self._times(first, cos), self._times(second, sin)),
            self.graph.node("Add", self._times(first, sin), self._times(second, cos)),
            axis=-1,
        )
        return Value(self._merged(rotated), FLOAT, x.heads)

    def window_attention(
        self, q: Value, k: Value, v: Value, ring_k: Value, ring_v: Value, position: Value
    ) -> tuple[Value, Value, Value]:
        bias, source = self._shared("window", partial(self._window, position))
        graph, D, groups = self.graph, self.spec.attention_head_dim, q.heads // k.heads
        all_k, all_v = (
            graph.node("Concat", ring.name, self._by_head(self._cast(x)), axis=1)  # [B, window + T, HK, D]
            for ring, x in ((ring_k, k), (ring_v, v))
        )
        # The queries of a group of heads are rows of one matrix: [B, HK, groups * T, D].
        grouped = graph.node("Reshape", q.name, graph.constant([0, 0, k.heads, groups, D]))
        grouped = graph.node("Transpose", grouped, perm=[0, 2, 3, 1, 4])  # [B, HK, groups, T, D]
        scaled = self._times(grouped, graph.constant(D**-0.5, FLOAT))
        keys = graph.node("Unsqueeze", graph.node("Transpose", all_k, perm=[0, 2, 3, 1]), graph.constant([2]))
        values = graph.node("Unsqueeze", graph.node("Transpose", all_v, perm=[0, 2, 1, 3]), graph.constant([2]))
        scores = graph.node("Add", graph.node("MatMul", scaled, keys), bias)  # [B, HK, groups, T, window + T]
        o = graph.node("MatMul", graph.node("Softmax", scores, axis=-1), values)
        o = graph.node("Transpose", o, perm=[0, 3, 1, 2, 4])
        o = graph.node("Reshape", o, graph.constant([0, 0, q.heads * D]))
        new_k, new_v = (graph.node("GatherND", x, source, batch_dims=1) for x in (all_k, all_v))
        return Value(o, FLOAT, q.heads), Value(new_k), Value(new_v)

    def advance(self, position: Value, tokens: Value) -> Value:
        return position

    def block(
        self,
        body: BlockBody[Value],
        spec: ModelSpec,
        layer: Layer,
        x: Value,
        state: LayerState[Value],
        position: Value,
    ) -> tuple[Value, LayerState[Value]]:
        scope, self.graph.scope = self.graph.scope, f"layers.{self._layer}/"
        self._layer += 1
        done = body(self, spec, layer, x, state, position)
        self.graph.scope = scope
        return done

    def _angles(self, position: Value, base: float) -> tuple[str, ...]:
        """cos and sin [B, T, 1, D / 2] of the rotary angles.

        In fp64 and in turns, whose whole part is dropped before fp32: exact far out, and no fp64 sine is needed, which
        not every runtime has.
        """
        graph, D = self.graph, self.spec.attention_head_dim
        channels = torch.arange(0, D, 2, dtype=torch.float64) / D
        turns_a_token = graph.constant((base**-channels / (2 * math.pi)).tolist(), TensorProto.DOUBLE)
        steps = graph.node("Cast", graph.node("Unsqueeze", position.name, graph.constant([2])), to=TensorProto.DOUBLE)
        turns = self._times(steps, turns_a_token)
        turns = graph.node("Sub", turns, graph.node("Floor", turns))
        # Half a turn back: between -pi and pi fp32 is finer. Both signs change, see the negation below.
        half, circle = (graph.constant(x, TensorProto.DOUBLE) for x in (0.5, 2 * math.pi))
        angles = self._times(graph.node("Sub", turns, half), circle)
        angles = graph.node("Unsqueeze", graph.node("Cast", angles, to=FLOAT), graph.constant([2]))
        return tuple(graph.node("Neg", graph.node(function, angles)) for function in ("Cos", "Sin"))

    def _window(self, position: Value) -> tuple[str, ...]:
        """What all attention layers share: the mask as a bias [B, 1, 1, T, window + T], and which of the window + T
        keys each slot of the new ring takes [B, window, 1].
        """
        graph, window = self.graph, self.spec.window
        size, zero, one = graph.constant(window), graph.constant(0), graph.constant(1)
        slots = graph.initializer("window.slots", TensorProto.INT64, (1, window), partial(_slots, window))
        axis, queries = graph.constant([1]), position.name
        start = graph.node("Slice", queries, graph.constant([0]), graph.constant([1]), axis)
        end = graph.node("Slice", queries, graph.constant([-1]), graph.constant([2**31 - 1]), axis)

        def held(last: str) -> str:
            """The position in each slot once `last` was written; negative while it is empty."""
            return graph.node("Sub", last, graph.node("Mod", graph.node("Sub", last, slots), size))

        keys = graph.node("Concat", held(graph.node("Sub", start, one)), queries, axis=1)
        keys = graph.node("Unsqueeze", keys, axis)
        rows = graph.node("Unsqueeze", queries, graph.constant([2]))
        seen = graph.node(
            "And",
            graph.node("GreaterOrEqual", keys, zero),
            graph.node(
                "And",
                graph.node("LessOrEqual", keys, rows),
                graph.node("Greater", keys, graph.node("Sub", rows, size)),
            ),
        )
        bias = graph.node("Where", seen, graph.constant(0.0, FLOAT), graph.constant(-math.inf, FLOAT))
        now = held(end)
        moved = graph.node("Add", graph.node("Sub", now, start), size)
        source = graph.node("Where", graph.node("GreaterOrEqual", now, start), moved, slots)
        return (
            graph.node("Unsqueeze", bias, graph.constant([1, 2])),
            graph.node("Unsqueeze", source, graph.constant([2])),
        )

    def _shared(self, key: str, make: Callable[[], tuple[str, ...]]) -> tuple[str, ...]:
        """Values that do not depend on the layer, made once, outside of the layers."""
        if key not in self._made:
            scope, self.graph.scope = self.graph.scope, f"{key}/"
            self._made[key] = make()
            self.graph.scope = scope
        return self._made[key]

    def _times(self, x: str, y: str) -> str:
        return self.graph.node("Mul", x, y)

    def as_fp32(self, x: Value) -> Value:
        """The value in fp32."""
        return self._cast(x)

    def _cast(self, x: Value, type: int = FLOAT) -> Value:
        return x if x.type == type else replace(x, name=self.graph.node("Cast", x.name, to=type), type=type)

    def _vector(self, weight: Weight, type: int = FLOAT) -> str:
        name = weight.name if type == FLOAT else weight.name + "_fp16"
        return dense(self.graph, name, weight.shape, _deferred(weight).load, type)

    def _normalized(self, x: Value, scale: str, eps: float) -> Value:
        name = self._by_head(x) if x.heads else x.name
        name = self.graph.node("RMSNormalization", name, scale, axis=-1, epsilon=eps)
        return replace(x, name=self._merged(name) if x.heads else name)

    def _by_head(self, x: Value) -> str:
        """[B, T, heads * C] -> [B, T, heads, C]."""
        return self.graph.node("Reshape", x.name, self.graph.constant([0, 0, x.heads, -1]))

    def _merged(self, name: str) -> str:
        """[B, T, heads, C] -> [B, T, heads * C]."""
        return self.graph.node("Reshape", name, self.graph.constant([0, 0, -1]))


def _deferred(weight: Weight) -> Deferred:
    if not isinstance(weight, Deferred):
        raise TypeError(f"{weight.name} is a {type(weight).__name__}, and not read from a checkpoint when written")
    return weight


def _slots(window: int) -> Tensor:
    return torch.arange(window)[None]


def _negative_rate(A_log: Weight, channels: int) -> Tensor:
    """-exp(A_log), repeated for the channels of each head."""
    rate = -A_log.rows(slice(None)).exp()
    return rate.repeat_interleave(channels // len(rate))
