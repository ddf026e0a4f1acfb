"""The bare products of a decoding step in Triton: one launch a matrix, nothing fused, no state, no norms.

What is lost here against the speed of the memory is lost at launch boundaries and in converting weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn2_edge.ops import Gdn2Layer, ModelWeights
from gdn2_edge.weights import Dense, Fp8, Int8, Weight


class Launch(NamedTuple):
    """Rows a program, columns it takes at a time, warps."""

    rows: int
    columns: int
    warps: int


# Tried in turn on the whole chain; the fastest counts.
LAUNCHES = (Launch(4, 512, 4), Launch(4, 1024, 4), Launch(8, 1024, 8), Launch(16, 256, 4))


@triton.jit
def gemv_kernel(
    p_x,  # fp32 [K]
    p_w,  # [N, K]
    p_scale,  # fp32 [N] or None
    p_y,  # fp32 [N]
    N,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y = (W x) * scale."""
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    b_sum = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for start in range(0, K, BLOCK_K):
        o_k = start + tl.arange(0, BLOCK_K)
        b_x = tl.load(p_x + o_k, mask=o_k < K, other=0.0)
        mask = (o_n < N)[:, None] & (o_k < K)[None, :]
        b_w = tl.load(p_w + o_n[:, None] * K + o_k[None, :], mask=mask, other=0.0, eviction_policy="evict_first")
        b_sum += b_w.to(tl.float32) * b_x[None, :]
    b_y = tl.sum(b_sum, 1)
    if p_scale is not None:
        b_y *= tl.load(p_scale + o_n, mask=o_n < N)
    tl.store(p_y + o_n, b_y, mask=o_n < N)


class GemvChain:
    """The large matrices of recurrent layers and the head, one after the other on the same random inputs."""

    def __init__(self, weights: ModelWeights, device: torch.device) -> None:
        matrices: list[Weight] = []
        for layer in weights.layers:
            if isinstance(layer, Gdn2Layer):
                matrices += [layer.in_proj, layer.o_proj, layer.mlp.w12, layer.mlp.w3]
        self.matrices = [*matrices, weights.lm_head]
        generator = torch.Generator(device).manual_seed(0)
        sizes = {weight.shape[1] for weight in self.matrices}
        self.inputs = {size: torch.randn(size, device=device, generator=generator) for size in sizes}
        self.outputs = [torch.empty(weight.shape[0], device=device) for weight in self.matrices]
        self.stored = [_stored(weight) for weight in self.matrices]
        self.launch = LAUNCHES[0]

    @property
    def num_bytes(self) -> int:
        """What one run reads."""
        return sum(data.nbytes + (0 if scale is None else scale.nbytes) for data, scale in self.stored)

    def step(self) -> None:
        """Every product once."""
        rows, columns, warps = self.launch
        for (data, scale), y in zip(self.stored, self.outputs, strict=True):
            N, K = data.shape
            grid = (triton.cdiv(N, rows),)
            gemv_kernel[grid](self.inputs[K], data, scale, y, N, K, rows, columns, num_warps=warps)

    def largest_error(self, which: Sequence[int] = (0, 1, 2, 3, -1)) -> float:
        """Of these products, after a step: |y - W x| / |W x|."""
        errors = []
        for i in which:
            weight = self.matrices[i]
            expected = weight.rows(slice(None)).double() @ self.inputs[weight.shape[1]].double()
            errors.append(float((self.outputs[i].double() - expected).norm() / expected.norm()))
        return max(errors)


def _stored(weight: Weight) -> tuple[Tensor, Tensor | None]:
    match weight:
        case Dense(data=data):
            return data, None
        case Int8(data=data, scale=scale) | Fp8(data=data, scale=scale):
            return data, scale
    raise ValueError(f"{weight.name} is a {type(weight).__name__}, this chain has bf16, int8 and fp8 only")
