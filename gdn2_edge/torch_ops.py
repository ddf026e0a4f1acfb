"""`TorchOps`: the verbs of `ops.py` on torch tensors, on any device.

Activations flow in `dtype`; norms, gates, convolution, rotary angles and the recurrence are computed in fp32 or
better. No verb changes a state tensor in place except the rings, whose one overwritten slot has left the window:
a step that fails midway leaves the old state whole.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gdn2_edge.kernels.chunk import chunk_gated_delta_rule2
from gdn2_edge.kernels.linear import linear
from gdn2_edge.kernels.reference import recurrent_gated_delta_rule2
from gdn2_edge.ops import BlockBody, Layer
from gdn2_edge.spec import ModelSpec, OutputGate
from gdn2_edge.state import LayerState
from gdn2_edge.weights import Weight

# From this many tokens on the chunked form is faster than the token loop (benchmarks/chunk_vs_recurrent.py).
CHUNK_MIN_TOKENS = 4


class TorchOps:
    """Verbs on tensors; see `Ops` for what each means."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype

    def embed(self, tokens: Tensor, weight: Weight) -> Tensor:
        return weight.rows(tokens).to(self.dtype)

    def linear(self, x: Tensor, weight: Weight, bias: Weight | None = None) -> Tensor:
        return linear(x.to(self.dtype), weight, bias)

    def rms_norm(self, x: Tensor, weight: Weight, eps: float) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], _vector(weight), eps)

    def l2_norm(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y

    def gate(self, x: Tensor, y: Tensor, kind: OutputGate) -> Tensor:
        y = y.float()
        return x * (F.silu(y) if kind == "silu" else torch.sigmoid(y))

    def sigmoid(self, x: Tensor, scale: float = 1.0) -> Tensor:
        y = torch.sigmoid(x.float())
        return y if scale == 1.0 else y * scale

    def decay(self, x: Tensor, A_log: Weight, dt_bias: Weight) -> Tensor:
        rate = _vector(A_log).exp().unsqueeze(-1)
        return -rate * F.softplus(x.float() + _vector(dt_bias).view(x.shape[-2:]))

    def heads(self, x: Tensor, n: int) -> Tensor:
        return x.view(*x.shape[:-1], n, -1)

    def merge(self, x: Tensor) -> Tensor:
        return x.flatten(-2)

    def split(self, x: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
        return torch.split(x, list(sizes), -1)

    def short_conv(self, x: Tensor, weight: Weight, tail: Tensor) -> tuple[Tensor, Tensor]:
        inputs = torch.cat([tail, x.float().transpose(1, 2)], 2)
        filters = _vector(weight)
        if x.shape[1] == 1:
            y = (inputs * filters.squeeze(1)).sum(-1, keepdim=True)
        else:
            y = F.conv1d(inputs, filters, groups=inputs.shape[1])
        return F.silu(y).transpose(1, 2), inputs[:, :, -tail.shape[2] :].contiguous()

    def gated_delta_rule2(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, w: Tensor, S: Tensor
    ) -> tuple[Tensor, Tensor]:
        rule = recurrent_gated_delta_rule2 if q.shape[1] < CHUNK_MIN_TOKENS else chunk_gated_delta_rule2
        return rule(q, k, v, g, b, w, S)

    def rope(self, x: Tensor, position: Tensor, base: float) -> Tensor:
        steps = torch.arange(x.shape[1], device=x.device)
        channels = torch.arange(0, x.shape[-1], 2, dtype=torch.float64, device=x.device) / x.shape[-1]
        angles = (position[:, None] + steps).double()[..., None] * base**-channels  # fp64: exact far out
        cos, sin = angles.cos().float()[:, :, None], angles.sin().float()[:, :, None]
        first, second = x.float().chunk(2, -1)
        return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)

    def window_attention(
        self, q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, position: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        window, length = ring_k.shape[1], q.shape[1]
        slots = torch.arange(window, device=q.device)
        start = position[:, None]
        if length == 1:
            row = torch.arange(q.shape[0], device=q.device)
            ring_k[row, position % window], ring_v[row, position % window] = k[:, 0].float(), v[:, 0].float()
            held = start - (start - slots) % window
            return _attend(q, ring_k, ring_v, (held >= 0)[:, None]), ring_k, ring_v
        queries = start + torch.arange(length, device=q.device)
        last = start - 1
        held = last - (last - slots) % window  # the position in each slot; negative while it is empty
        keys = torch.cat([held, queries], 1)[:, None]
        seen = (keys >= 0) & (keys <= queries[..., None]) & (keys > queries[..., None] - window)
        all_k, all_v = torch.cat([ring_k, k.float()], 1), torch.cat([ring_v, v.float()], 1)
        out = _attend(q, all_k, all_v, seen)
        last = start + length - 1
        held = last - (last - slots) % window
        source = torch.where(held >= start, window + held - start, slots)[:, :, None, None].expand_as(ring_k)
        return out, all_k.gather(1, source), all_v.gather(1, source)

    def advance(self, position: Tensor, tokens: Tensor) -> Tensor:
        return position + tokens.shape[1]

    def block(
        self,
        body: BlockBody[Tensor],
        spec: ModelSpec,
        layer: Layer,
        x: Tensor,
        state: LayerState[Tensor],
        position: Tensor,
    ) -> tuple[Tensor, LayerState[Tensor]]:
        return body(self, spec, layer, x, state, position)


def _vector(weight: Weight) -> Tensor:
    return weight.rows(slice(None))


def _attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """q [B, T, HQ, D] over k, v [B, N, HK, D]; seen [B, T, N] says which keys each query sees."""
    groups = q.shape[2] // k.shape[2]
    k, v = (t.transpose(1, 2).repeat_interleave(groups, 1) for t in (k, v))
    o = F.scaled_dot_product_attention(q.float().transpose(1, 2), k, v, attn_mask=seen[:, None])
    return o.transpose(1, 2)
