"""Gated DeltaNet-2, written once (arXiv 2605.22791).

A layer is ``x += mixer(norm(x)); x += mlp(norm(x))``. The mixer of a gdn2 layer keeps a matrix S for each head,
which at every token forgets by channels (decay g), erases along the key (gate b) and writes along the value
(gate w); the mixer of a sliding_attention layer is softmax attention over the last tokens. Everything a model
remembers is in the state that goes in and comes out. Nothing here knows a shape, a dtype or a device.
"""

from __future__ import annotations

from typing import TypeVar

from gdn2_edge.ops import AttentionLayer, Gdn2Layer, Layer, Mlp, ModelWeights, Ops
from gdn2_edge.spec import ModelSpec
from gdn2_edge.state import Gdn2State, LayerState, State, WindowState

V = TypeVar("V")


def forward(ops: Ops[V], spec: ModelSpec, weights: ModelWeights, tokens: V, state: State[V]) -> tuple[V, State[V]]:
    """All layers over T more tokens of each sequence.

    Args:
        tokens: [B, T] ids.
        state: what the sequences remember so far.
    Returns:
        hidden values [B, T, hidden_size] for `head`, and the new state.
    """
    x = ops.embed(tokens, weights.embed)
    layers = []
    for layer, layer_state in zip(weights.layers, state.layers, strict=True):
        x, layer_state = ops.block(block, spec, layer, x, layer_state, state.position)
        layers.append(layer_state)
    return x, State(ops.advance(state.position, tokens), tuple(layers))


def head(ops: Ops[V], spec: ModelSpec, weights: ModelWeights, x: V) -> V:
    """Hidden values -> logits [B, T, vocab_size]."""
    return ops.linear(ops.rms_norm(x, weights.ln_f, spec.norm_eps), weights.lm_head)


def block(
    ops: Ops[V], spec: ModelSpec, layer: Layer, x: V, state: LayerState[V], position: V
) -> tuple[V, LayerState[V]]:
    """One layer: mixer, then MLP, each added to the residual stream x."""
    h = ops.rms_norm(x, layer.norm, spec.norm_eps)
    new: LayerState[V]
    if isinstance(layer, Gdn2Layer) and isinstance(state, Gdn2State):
        y, new = gdn2(ops, spec, layer, h, state)
    elif isinstance(layer, AttentionLayer) and isinstance(state, WindowState):
        y, new = sliding_attention(ops, spec, layer, h, state, position)
    else:
        raise TypeError(f"{type(state).__name__} is not the state of a {type(layer).__name__}")
    x = ops.add(x, y)
    return ops.add(x, mlp(ops, spec, layer.mlp, ops.rms_norm(x, layer.mlp.norm, spec.norm_eps))), new


def gdn2(ops: Ops[V], spec: ModelSpec, layer: Gdn2Layer, x: V, state: Gdn2State[V]) -> tuple[V, Gdn2State[V]]:
    """The Gated DeltaNet-2 mixer."""
    H, HV, key, value, rank = spec.num_heads, spec.num_v_heads, spec.key_dim, spec.value_dim, spec.head_v_dim
    qkv, b, w, f, g = ops.split(ops.linear(x, layer.in_proj), (2 * key + value, key, value, rank, rank))

    qkv, conv = ops.short_conv(qkv, layer.conv, state.conv)
    q, k, v = ops.split(qkv, (key, key, value))
    q, k, v = ops.l2_norm(ops.heads(q, H)), ops.l2_norm(ops.heads(k, H)), ops.heads(v, HV)

    decay = ops.decay(ops.heads(ops.linear(f, layer.f_proj), H), layer.A_log, layer.dt_bias)
    erase = ops.sigmoid(ops.heads(b, H), spec.erase_scale)
    write = ops.sigmoid(ops.heads(w, HV))
    o, S = ops.gated_delta_rule2(q, k, v, decay, erase, write, state.S)

    output_gate = ops.heads(ops.linear(g, layer.g_proj, layer.g_bias), HV)
    o = ops.gate(ops.rms_norm(o, layer.o_norm, spec.norm_eps), output_gate, spec.output_gate)
    return ops.linear(ops.merge(o), layer.o_proj), Gdn2State(conv, S)


def sliding_attention(
    ops: Ops[V], spec: ModelSpec, layer: AttentionLayer, x: V, state: WindowState[V], position: V
) -> tuple[V, WindowState[V]]:
    """Softmax attention over the last `sliding_window` tokens, keys kept in a ring of that size."""
    q_dim, kv_dim = spec.q_heads * spec.attention_head_dim, spec.kv_heads * spec.attention_head_dim
    q, k, v = ops.split(ops.linear(x, layer.in_proj), (q_dim, kv_dim, kv_dim))
    q = ops.rope(ops.heads(q, spec.q_heads), position, spec.rope_base)
    k = ops.rope(ops.heads(k, spec.kv_heads), position, spec.rope_base)
    v = ops.heads(v, spec.kv_heads)
    o, ring_k, ring_v = ops.window_attention(q, k, v, state.ring_k, state.ring_v, position)
    return ops.linear(ops.merge(o), layer.o_proj), WindowState(ring_k, ring_v)


def mlp(ops: Ops[V], spec: ModelSpec, layer: Mlp, x: V) -> V:
    """SwiGLU: w3(silu(w1 x) * (w2 x))."""
    gate, up = ops.split(ops.linear(x, layer.w12), (spec.intermediate_size, spec.intermediate_size))
    return ops.linear(ops.gate(up, gate, "silu"), layer.w3)
