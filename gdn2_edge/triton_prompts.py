"""`TritonOps`: the verbs for prompts on a GPU, a layer in few launches; `PromptStep`, a short prompt as one graph.

The residual stream is fp32, what products read is in the activations' dtype, states are as everywhere. Kernels know
none of the layers; this file knows no weights beyond their layouts and no files.
"""

from __future__ import annotations

from copy import copy
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from gdn2_edge.forward import forward, head, sliding_attention
from gdn2_edge.kernels.triton import gemm, rows
from gdn2_edge.kernels.triton.chunk import chunk_gated_delta_rule2
from gdn2_edge.kernels.triton.expand import expand
from gdn2_edge.kernels.triton.fused_recurrent import recurrent_gated_delta_rule2
from gdn2_edge.kernels.triton.launch import cdiv, gpu_of, next_power_of_2, pdl_options
from gdn2_edge.kernels.triton.prompt import gated_norm, prepare
from gdn2_edge.ops import BlockBody, Gdn2Layer, Layer, Mlp, ModelWeights
from gdn2_edge.spec import ModelSpec
from gdn2_edge.state import Gdn2State, LayerState, WindowState
from gdn2_edge.torch_ops import TorchOps
from gdn2_edge.triton_ops import StateLayout
from gdn2_edge.weights import Dense, Fp8, Weight

# Up to so many tokens a product reads the stored weights; beyond, they are expanded once and multiplied by cuBLAS.
FEW_ROWS = 128
# From so many tokens on the chunked form of the recurrence is taken.
CHUNK_MIN_TOKENS = 64
GLU_BLOCK, GLU_WARPS = 1024, 4


class TritonOps(TorchOps):
    """Verbs on tensors of one GPU, for calls that follow each other on one stream.

    Args:
        dtype: of the activations.
        device: where all tensors are.
        weights: whose largest matrix the memory for expanded weights has room for; a larger one gets its own.
        fp8_products: of more than FEW_ROWS tokens with fp8 weights, each token's inputs rounded to e4m3 under a scale
            of their own. Cutting a prompt elsewhere then changes more than the last bits.
    """

    def __init__(
        self, dtype: torch.dtype, device: torch.device, weights: ModelWeights, fp8_products: bool = False
    ) -> None:
        super().__init__(dtype)
        self.fp8_products = fp8_products
        self.pdl = gpu_of(device).pdl
        self.count: Tensor | None = None
        matrices = [w for layer in weights.layers for w in (layer.in_proj, layer.o_proj, layer.mlp.w12, layer.mlp.w3)]
        largest = max((prod(w.shape) for w in matrices if not self._is_plain(w)), default=0)
        self._expanded = torch.empty(largest, dtype=dtype, device=device)
        self._scratch = gemm.product_scratch(device)

    def counting(self, count: Tensor) -> TritonOps:
        """The same verbs for shapes that are filled up: of each sequence's tokens the first count [1] int64 are real.

        What stands behind them changes no state; gdn2 layers only.
        """
        ops = copy(self)
        ops.count = count
        return ops

    def embed(self, tokens: Tensor, weight: Weight) -> Tensor:
        return weight.rows(tokens)

    def linear(self, x: Tensor, weight: Weight, bias: Weight | None = None) -> Tensor:
        out = self._product(x.reshape(-1, x.shape[-1]).to(self.dtype), weight)
        if bias is not None:
            out = (out + bias.rows(slice(None))).to(self.dtype)
        return out.view(*x.shape[:-1], weight.shape[0])

    def gated_delta_rule2(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, w: Tensor, S: Tensor
    ) -> tuple[Tensor, Tensor]:
        rule = recurrent_gated_delta_rule2 if q.shape[1] < CHUNK_MIN_TOKENS else chunk_gated_delta_rule2
        return rule(q, k, v, g, b, w, S)

    def advance(self, position: Tensor, tokens: Tensor) -> Tensor:
        return super().advance(position, tokens) if self.count is None else position + self.count

    def block(
        self,
        body: BlockBody[Tensor],
        spec: ModelSpec,
        layer: Layer,
        x: Tensor,
        state: LayerState[Tensor],
        position: Tensor,
    ) -> tuple[Tensor, LayerState[Tensor]]:
        stream = x.reshape(-1, x.shape[-1]).float().contiguous()
        h = self._norm(stream, layer.norm, spec.norm_eps)
        new: LayerState[Tensor]
        if isinstance(layer, Gdn2Layer) and isinstance(state, Gdn2State):
            y, new = self._gdn2(spec, layer, h.view(x.shape), state)
        elif not isinstance(layer, Gdn2Layer) and isinstance(state, WindowState):
            attended, new = sliding_attention(self, spec, layer, h.view(x.shape), state, position)
            y = attended.flatten(0, 1)
        else:
            return body(self, spec, layer, x, state, position)
        stream, h = self._add_norm(stream, y, layer.mlp.norm, spec.norm_eps)
        return self._add(stream, self._mlp(layer.mlp, h)).view(x.shape), new

    def _gdn2(
        self, spec: ModelSpec, layer: Gdn2Layer, h: Tensor, state: Gdn2State[Tensor]
    ) -> tuple[Tensor, Gdn2State[Tensor]]:
        """The mixer, [B, T, hidden] -> [B T, hidden]."""
        B, T, _ = h.shape
        y = self._product(h.flatten(0, 1), layer.in_proj)
        prepared = prepare(
            y.view(B, T, -1),
            layer.f_proj,
            state.conv,
            layer.conv.rows(slice(None)),
            layer.A_log.rows(slice(None)),
            layer.dt_bias.rows(slice(None)),
            heads=(spec.num_heads, spec.num_v_heads),
            dims=(spec.head_k_dim, spec.head_v_dim),
            erase_scale=spec.erase_scale,
            count=self.count,
            pdl=self.pdl,
        )
        o, S = self.gated_delta_rule2(*prepared[:-1], state.S)
        bias, gain = layer.g_bias.rows(slice(None)), layer.o_norm.rows(slice(None))
        x = y[:, -layer.g_proj.shape[1] :]
        o = gated_norm(o, x, layer.g_proj, bias, gain, spec.norm_eps, spec.output_gate, pdl=self.pdl)
        return self._product(o, layer.o_proj), Gdn2State(prepared.tail, S)

    def _mlp(self, mlp: Mlp, h: Tensor) -> Tensor:
        M, ff = h.shape[0], mlp.w3.shape[1]
        out = torch.empty(M, ff, dtype=self.dtype, device=h.device)
        if self._reads_stored(h, mlp.w12):
            gemm.product(h, mlp.w12, out, glu=True, scratch=self._scratch, pdl=self.pdl)
            return self._product(out, mlp.w3)
        y = self._product(h, mlp.w12)
        rows.glu_rows_kernel[M, cdiv(ff, GLU_BLOCK)](
            y, out, F=ff, BLOCK=GLU_BLOCK, PDL=self.pdl, num_warps=GLU_WARPS, **pdl_options(self.pdl)
        )
        return self._product(out, mlp.w3)

    def _norm(self, x: Tensor, gain: Weight, eps: float) -> Tensor:
        M, D = x.shape
        out = torch.empty(M, D, dtype=self.dtype, device=x.device)
        rows.rms_rows_kernel[(M,)](
            x, gain.rows(slice(None)), out, eps, D=D, D_2=next_power_of_2(D), PDL=self.pdl, **pdl_options(self.pdl)
        )
        return out

    def _add_norm(self, x: Tensor, y: Tensor, gain: Weight, eps: float) -> tuple[Tensor, Tensor]:
        """x + y, and its norm."""
        M, D = x.shape
        total, out = torch.empty_like(x), torch.empty_like(y)
        rows.add_rows_kernel[(M,)](
            *(x, y, total, gain.rows(slice(None)), out, eps),
            **{"D": D, "D_2": next_power_of_2(D), "NORM": True, "PDL": self.pdl},
            **pdl_options(self.pdl),
        )
        return total, out

    def _add(self, x: Tensor, y: Tensor) -> Tensor:
        M, D = x.shape
        total = torch.empty_like(x)
        rows.add_rows_kernel[(M,)](
            *(x, y, total, None, None, 0.0),
            **{"D": D, "D_2": next_power_of_2(D), "NORM": False, "PDL": self.pdl},
            **pdl_options(self.pdl),
        )
        return total

    def _product(self, x: Tensor, weight: Weight) -> Tensor:
        """x [M, K] of the activations' dtype -> x W^T [M, N]."""
        if isinstance(weight, Dense) and self._is_plain(weight):
            return F.linear(x, weight.data)
        if self._reads_stored(x, weight):
            out = torch.empty(x.shape[0], weight.shape[0], dtype=self.dtype, device=x.device)
            gemm.product(x, weight, out, scratch=self._scratch, pdl=self.pdl)
            return out
        if self.fp8_products and isinstance(weight, Fp8) and all(size % 16 == 0 for size in weight.shape):
            rows_8, scale = self._fp8_rows(x)
            weight_scale = weight.scale.view(1, -1)
            return torch._scaled_mm(rows_8, weight.data.t(), scale, weight_scale, out_dtype=self.dtype)
        size = prod(weight.shape)
        fits = size <= self._expanded.numel()
        memory = self._expanded if fits else torch.empty(size, dtype=self.dtype, device=x.device)
        values = memory[:size].view(weight.shape)
        expand(weight, values)
        return F.linear(x, values)

    def _fp8_rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [M, K] as e4m3 [M, K] and a scale for each row [M, 1]."""
        M, K = x.shape
        out = torch.empty(M, K, dtype=torch.float8_e4m3fn, device=x.device)
        scale = torch.empty(M, 1, device=x.device)
        rows.fp8_rows_kernel[(M,)](
            x, out, scale, D=K, D_2=next_power_of_2(K), PDL=self.pdl, num_warps=8, **pdl_options(self.pdl)
        )
        return out, scale

    def _reads_stored(self, x: Tensor, weight: Weight) -> bool:
        """Whether the product with rows x reads a weight as it is stored; otherwise cuBLAS multiplies its values."""
        return x.shape[0] <= FEW_ROWS and not self._is_plain(weight)

    def _is_plain(self, weight: Weight) -> bool:
        return isinstance(weight, Dense) and weight.data.dtype == self.dtype


class PromptStep:
    """Some tokens more of one sequence, captured in a CUDA graph for each size; models of gdn2 layers only.

    Attributes, all in device memory: `position` [1] and `block` [1, block_floats], the state, which a run moves on in
    place; and `logits` fp32 [1, V] of the last token fed.
    """

    def __init__(
        self, spec: ModelSpec, weights: ModelWeights, ops: TritonOps, layout: StateLayout, max_tokens: int
    ) -> None:
        device = weights.ln_f.rows(slice(None)).device
        self.spec, self.weights, self.layout = spec, weights, layout
        self.tokens = torch.zeros(1, max_tokens, dtype=torch.int64, device=device)
        self.count = torch.ones(1, dtype=torch.int64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.block = torch.zeros(1, layout.block_floats, device=device)
        self.ring = torch.zeros(1, layout.ring_floats, device=device)
        self.logits = torch.zeros(1, spec.vocab_size, device=device)
        self.ops = ops.counting(self.count)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def run(self, tokens: Tensor, size: int) -> Tensor:
        """Feed tokens [1, n], filled up to `size` tokens; `logits`, which the next run overwrites."""
        n = tokens.shape[1]
        self.tokens[:, :n].copy_(tokens)
        self.count.fill_(n)
        if graph := self._graphs.get(size):
            graph.replay()
            return self.logits
        self._launch(size)  # compiles: a capture may only launch
        if self._pool is not None:
            torch.cuda.synchronize(self.tokens.device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                self._launch(size)
            self._graphs[size] = graph
        return self.logits

    def _launch(self, size: int) -> None:
        state = self.layout.views(self.position, self.block, self.ring)
        x, new = forward(self.ops, self.spec, self.weights, self.tokens[:, :size], state)
        last = x.index_select(1, self.count - 1)
        self.logits.copy_(head(self.ops, self.spec, self.weights, last)[:, 0])
        for to, source in zip(state.layers, new.layers, strict=True):
            for name, view in vars(to).items():
                view.copy_(getattr(source, name))
        self.position.copy_(new.position)
