"""One greedy decoding step of a recurrent model as others would run it, on the same weights.

`PlainStep` is plain torch with the state changed in place, alone, under torch.compile, or captured in a CUDA graph, for
bf16 and for 8-bit weights with one scale a row; `FlaStep` has the layers of flash-linear-attention. Each has `token`
[1] int64, which a step reads and replaces by its choice, `logits` [1, vocab] and `reset`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdn2_edge.bench.random_weights import RandomWeights
from gdn2_edge.model import WeightReader
from gdn2_edge.ops import Gdn2Layer
from gdn2_edge.spec import ModelSpec
from gdn2_edge.weights import Dense, Fp8, Int8, Weight

Matrix = tuple[Tensor, Tensor | None]  # data [O, I], and for 8 bits a scale [O]


class Sizes(NamedTuple):
    """Of `ModelSpec`, in a form that torch.compile takes for constants."""

    heads: int
    v_heads: int
    key: int
    value: int
    rank: int
    eps: float
    erase_scale: float
    silu_gate: bool


def linear(x: Tensor, matrix: Matrix) -> Tensor:
    """x W^T in x's dtype; a compiler is expected to convert 8-bit weights as it reads them."""
    data, scale = matrix
    return F.linear(x, data) if scale is None else F.linear(x, data.to(x.dtype)) * scale


def layer_step(n: Sizes, w: dict[str, Matrix], x: Tensor, S: Tensor, conv: Tensor) -> Tensor:
    """One layer on x [1, hidden] bf16; S [1, HV, K, V] and conv [1, C, conv_size - 1], both fp32, change in place."""

    def vector(name: str) -> Tensor:
        return w[name][0]

    def heads(t: Tensor, count: int) -> Tensor:
        t = t.float().view(1, count, -1)
        return t if count == n.v_heads else t.repeat_interleave(n.v_heads // count, 1)

    def unit(t: Tensor) -> Tensor:
        return t * torch.rsqrt(t.square().sum(-1, keepdim=True) + 1e-6)

    h = F.rms_norm(x.float(), x.shape[-1:], vector("norm"), n.eps).to(x.dtype)
    qkv, b, write, f, g = linear(h, w["in_proj"]).split((2 * n.key + n.value, n.key, n.value, n.rank, n.rank), -1)
    window = torch.cat([conv, qkv.float().unsqueeze(-1)], -1)
    q, k, v = F.silu((window * vector("conv").squeeze(1)).sum(-1)).split((n.key, n.key, n.value), -1)
    conv.copy_(window[..., 1:])
    q, k, v = unit(heads(q, n.heads)), unit(heads(k, n.heads)), heads(v, n.v_heads)
    rate = heads(vector("A_log").exp().repeat_interleave(n.key // n.heads), n.heads)
    decay = torch.exp(-rate * F.softplus(heads(linear(f, w["f_proj"]).float() + vector("dt_bias"), n.heads)))
    erase = n.erase_scale * torch.sigmoid(heads(b, n.heads))

    decayed = decay.unsqueeze(-1) * S
    u = torch.sigmoid(heads(write, n.v_heads)) * v - ((erase * k).unsqueeze(-1) * decayed).sum(-2)
    new = decayed + k.unsqueeze(-1) * u.unsqueeze(-2)
    S.copy_(new)
    o = F.rms_norm((q.unsqueeze(-1) * new).sum(-2) * q.shape[-1] ** -0.5, v.shape[-1:], vector("o_norm"), n.eps)
    gate = heads(linear(g, w["g_proj"]) + vector("g_bias"), n.v_heads)
    o = o * (F.silu(gate) if n.silu_gate else torch.sigmoid(gate))
    x = x + linear(o.flatten(1).to(x.dtype), w["o_proj"]).to(x.dtype)

    h = F.rms_norm(x.float(), x.shape[-1:], vector("norm_2"), n.eps).to(x.dtype)
    first, second = linear(h, w["w12"]).chunk(2, -1)
    return x + linear((F.silu(first) * second).to(x.dtype), w["w3"]).to(x.dtype)


def head_step(eps: float, norm: Tensor, lm_head: Matrix, x: Tensor) -> Tensor:
    """Logits [1, vocab] of x [1, hidden]."""
    return linear(F.rms_norm(x.float(), x.shape[-1:], norm, eps).to(x.dtype), lm_head).float()


class PlainStep:
    """A step in plain torch; `compiled` names a mode of torch.compile.

    A layer is compiled once and called for each: compiling all of them as one graph takes minutes and gains nothing,
    since no kernel spans two layers.
    """

    def __init__(self, source: RandomWeights, device: torch.device, compiled: str | None = None) -> None:
        spec = source.spec
        weights = WeightReader(source, device, lambda weight: weight).model()
        self.sizes = _sizes(spec)
        self.embed = weights.embed
        self.layers = [_layer_tensors(layer) for layer in weights.layers if isinstance(layer, Gdn2Layer)]
        self.norm, self.lm_head = _tensors(weights.ln_f)[0], _tensors(weights.lm_head)
        shapes = spec.state_shapes()
        self.state = [
            tuple(torch.zeros(shapes[f"layers.{i}.{name}"], device=device) for name in ("S", "conv"))
            for i in range(spec.num_layers)
        ]
        self.token = torch.zeros(1, dtype=torch.int64, device=device)
        self.logits = torch.zeros(1, spec.vocab_size, device=device)
        self.layer_step, self.head_step = _compiled(layer_step, compiled), _compiled(head_step, compiled)

    @torch.no_grad()
    def step(self) -> None:
        """Feed `token`, choose the next."""
        x = self.embed.rows(self.token).bfloat16()
        for layer, (S, conv) in zip(self.layers, self.state, strict=True):
            x = self.layer_step(self.sizes, layer, x, S, conv)
        self.logits.copy_(self.head_step(self.sizes.eps, self.norm, self.lm_head, x))
        self.token.copy_(self.logits.argmax(-1))

    def reset(self) -> None:
        """Forget everything."""
        for pair in self.state:
            for tensor in pair:
                tensor.zero_()


class FlaStep:
    """A step with flash-linear-attention's mixer, which gates its output by a sigmoid; the rest is plain torch.

    Raises:
        ImportError: it is not installed, or has no such layer.
    """

    def __init__(self, source: RandomWeights, device: torch.device) -> None:
        from fla.layers.gdn2 import GatedDeltaNet2
        from fla.models.utils import Cache

        self.new_cache = Cache
        spec = source.spec
        reader = WeightReader(source, device, lambda weight: weight)
        self.eps, self.embed = spec.norm_eps, source.weight("embed.weight")
        self.norm, self.lm_head = _tensors(reader.vector("ln_f.weight"))[0], _tensors(reader.product("lm_head.weight"))
        self.mlps, self.mixers = [], []
        for i in range(spec.num_layers):
            layer = reader.layer(i)
            self.mlps.append([_tensors(w) for w in (layer.norm, layer.mlp.norm, layer.mlp.w12, layer.mlp.w3)])
            mixer = GatedDeltaNet2(
                hidden_size=spec.hidden_size,
                expand_v=spec.head_v_dim / spec.head_k_dim,
                head_dim=spec.head_k_dim,
                num_heads=spec.num_heads,
                num_v_heads=spec.num_v_heads,
                allow_neg_eigval=spec.allow_neg_eigval,
                conv_size=spec.conv_size,
                layer_idx=i,
                norm_eps=spec.norm_eps,
            )
            own = f"layers.{i}."
            values = {name: source.weight(own + name).rows(slice(None)) for name in mixer.state_dict()}
            mixer.load_state_dict(values)
            self.mixers.append(_mixer_in_bf16(mixer.to(device)).eval())
        self.token = torch.zeros(1, dtype=torch.int64, device=device)
        self.logits = torch.zeros(1, spec.vocab_size, device=device)
        self.reset()

    @torch.no_grad()
    def feed(self, tokens: Tensor) -> None:
        """Feed tokens [1, T]; `logits` [1, V] of the last."""
        x = self.embed.rows(tokens).bfloat16()
        for (norm_1, norm_2, w12, w3), mixer in zip(self.mlps, self.mixers, strict=True):
            h = F.rms_norm(x.float(), x.shape[-1:], norm_1[0], self.eps).to(x.dtype)
            o, _, self.cache = mixer(h, past_key_values=self.cache, use_cache=True)
            x = x + o
            h = F.rms_norm(x.float(), x.shape[-1:], norm_2[0], self.eps).to(x.dtype)
            first, second = linear(h, w12).chunk(2, -1)
            x = x + linear(F.silu(first) * second, w3)
        self.logits = head_step(self.eps, self.norm, self.lm_head, x[:, -1])

    def step(self) -> None:
        """Feed `token`, choose the next."""
        self.feed(self.token[None])
        self.token = self.logits.argmax(-1)

    def reset(self) -> None:
        """Forget everything."""
        self.cache = self.new_cache()


def capture(step: Callable[[], None]) -> Callable[[], None]:
    """The step as a CUDA graph; what it changes must be in place. The state has moved on afterwards."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def with_sigmoid_gate(source: RandomWeights) -> RandomWeights:
    """The same weights in a model whose output gate is a sigmoid."""
    return dataclasses.replace(source, spec=source.spec.model_copy(update={"output_gate": "sigmoid"}))


def _compiled(function: Callable[..., Tensor], mode: str | None) -> Callable[..., Tensor]:
    return function if mode is None else torch.compile(function, fullgraph=True, dynamic=False, mode=mode)


def _sizes(spec: ModelSpec) -> Sizes:
    return Sizes(
        spec.num_heads,
        spec.num_v_heads,
        spec.key_dim,
        spec.value_dim,
        spec.head_v_dim,
        spec.norm_eps,
        spec.erase_scale,
        spec.output_gate == "silu",
    )


def _layer_tensors(layer: Gdn2Layer) -> dict[str, Matrix]:
    weights = {name: weight for name, weight in vars(layer).items() if name != "mlp"}
    weights |= {"norm_2": layer.mlp.norm, "w12": layer.mlp.w12, "w3": layer.mlp.w3}
    return {name: _tensors(weight) for name, weight in weights.items()}


def _tensors(weight: Weight) -> Matrix:
    match weight:
        case Dense(data=data):
            return data, None
        case Int8(data=data, scale=scale) | Fp8(data=data, scale=scale):
            return data, scale.flatten().bfloat16()
    raise ValueError(f"{weight.name} is a {type(weight).__name__}, this peer has bf16 and 8-bit weights only")


def _mixer_in_bf16(mixer: nn.Module) -> nn.Module:
    """The layer as it is used: matrices and filters in bf16, the decay's parameters in fp32."""
    for name, parameter in mixer.named_parameters():
        if name not in ("A_log", "dt_bias"):
            parameter.data = parameter.data.bfloat16()
    return mixer
