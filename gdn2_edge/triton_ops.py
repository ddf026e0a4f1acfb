"""GDN-2 on a GPU: `DecodeStep`, one token as a fixed list of fused kernels.

`DecodeStep` is the same model as `forward.py`. It knows the layers, the spec and where a sequence's state lies in
memory; the kernels know none of them. It allocates everything it writes when it is made, so that its launches can be
captured in a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from gdn2_edge.kernels.triton import attention, batch_recurrence, gemm, launch, recurrence, rows, sample
from gdn2_edge.kernels.triton.activation import BOTH_FORMS, Activation, Forms, make_activation
from gdn2_edge.kernels.triton.gemv import gemv, num_programs, split_for
from gdn2_edge.kernels.triton.launch import Gpu, cdiv, gpu_of, next_power_of_2, pdl_options, register_options
from gdn2_edge.kernels.triton.low_rank import low_rank_pair
from gdn2_edge.kernels.triton.stored import WEIGHTS_PER_WORD, stored
from gdn2_edge.ops import AttentionLayer, Gdn2Layer, Layer, ModelWeights
from gdn2_edge.spec import ModelSpec
from gdn2_edge.state import Gdn2State, LayerState, State, WindowState
from gdn2_edge.weights import Int4, Int8, Joined, Weight

OFFSET_FLOATS: int = launch.OFFSET_FLOATS.value
EMBED_BLOCK = 128
# The recurrence of many sequences: value channels of a program, which are fewer where there were too few programs, and
# rows it takes at once, fewer than threads: the compiler then leaves the state where each thread has loaded it.
MAX_BLOCK_V, MIN_STATE_PROGRAMS, STATE_ROWS = 64, 512, 64
# Of a mixer's threads, two programs a multiprocessor. Left alone, NVIDIA's assembler saves some, and so puts off loads.
MIXER_REGISTERS = 128


@dataclass(frozen=True)
class StateLayout:
    """Where the tensors of a state lie in one flat fp32 block, in floats; rings, written in place, in another.

    offsets: by the tensor's name without its layer, one for each layer ("conv", "S", "ring_k", "ring_v").
    """

    offsets: tuple[dict[str, int], ...]
    shapes: tuple[dict[str, tuple[int, ...]], ...]
    block_floats: int
    ring_floats: int

    @staticmethod
    def of(spec: ModelSpec) -> StateLayout:
        """The layout for a model."""
        offsets: list[dict[str, int]] = []
        shapes: list[dict[str, tuple[int, ...]]] = []
        sizes = {"block": 0, "ring": 0}
        all_shapes = spec.state_shapes(1)
        for i in range(spec.num_layers):
            prefix = f"layers.{i}."
            here = {name.removeprefix(prefix): s[1:] for name, s in all_shapes.items() if name.startswith(prefix)}
            places: dict[str, int] = {}
            for name, shape in here.items():
                kind = "ring" if name.startswith("ring") else "block"
                places[name] = sizes[kind]
                sizes[kind] += -(-prod(shape) // OFFSET_FLOATS) * OFFSET_FLOATS
            offsets.append(places)
            shapes.append(here)
        return StateLayout(
            tuple(offsets), tuple(shapes), max(sizes["block"], OFFSET_FLOATS), max(sizes["ring"], OFFSET_FLOATS)
        )

    def views(self, position: Tensor, block: Tensor, ring: Tensor) -> State[Tensor]:
        """The state in `block` [B, block_floats] and `ring` [B, ring_floats], sharing their memory."""
        layers: list[LayerState[Tensor]] = []
        for places, shapes in zip(self.offsets, self.shapes, strict=True):
            views = {}
            for name, place in places.items():
                memory = ring if name.startswith("ring") else block
                views[name] = memory[:, place : place + prod(shapes[name])].unflatten(1, shapes[name])
            layers.append(WindowState(**views) if "ring_k" in views else Gdn2State(**views))
        return State(position, tuple(layers))


def unsupported(spec: ModelSpec, weights: ModelWeights) -> str:
    """Why the fused step cannot run a model, in words; empty if it can."""
    for layer in weights.layers:
        for weight in (*_parts(layer.in_proj), layer.o_proj, layer.mlp.w12, layer.mlp.w3):
            if why := _unsuited(weight):
                return why
        if isinstance(layer, Gdn2Layer) and spec.head_v_dim % 8:
            return f"head_v_dim is {spec.head_v_dim}, expected a multiple of 8"
    if spec.attention_head_dim % 8:
        return f"head_dim is {spec.attention_head_dim}, expected a multiple of 8"
    if spec.hidden_size % 8 or spec.intermediate_size % 8:
        return f"hidden_size {spec.hidden_size} or intermediate_size {spec.intermediate_size} is no multiple of 8"
    return next((why for part in _parts(weights.lm_head) if (why := _unsuited(part))), "")


def _unsuited(weight: Weight) -> str:
    if isinstance(weight, Joined):
        return f"{weight.name} has parts of several formats"
    vector = 4 * WEIGHTS_PER_WORD[stored(weight)[0]]
    if weight.shape[1] % vector:
        return f"{weight.name} has {weight.shape[1]} inputs, expected a multiple of {vector}"
    return ""


def _parts(weight: Weight) -> tuple[Weight, ...]:
    return weight.parts if isinstance(weight, Joined) else (weight,)


def _forms(*readers: Weight) -> Forms:
    integers = [isinstance(part, Int8 | Int4) for weight in readers for part in _parts(weight)]
    return Forms(values=not all(integers), planes=any(integers))


class DecodeStep:
    """The launches of one token for each of `batch` sequences; dtype is of rows between products, with several.

    Attributes, all in device memory, written by whoever starts a step and read by its kernels:
        token: int64 [B], to be fed.
        position: int64 [B], tokens before it; grows by one.
        source, target, spare: int64 [B], states before and after the token and the one to be written next, as offsets
            from `base` in units of 16 floats; they change places at the end of a step.
        ring: int64 [B], the same for the rings.
        options, recent: of the sampling, see `kernels.triton.sample`.
    And `logits` fp32 [B, V], which the step writes; with `choose` it also replaces `token` by the next one and leaves
    it in `chosen` int64 [R, B], where that is set: row position % R of the position after this step.
    """

    def __init__(
        self, spec: ModelSpec, weights: ModelWeights, base: Tensor, batch: int, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        device = base.device
        self.spec, self.weights, self.base, self.batch = spec, weights, base, batch
        self.layout = StateLayout.of(spec)
        self.gpu: Gpu = gpu_of(device)

        def integers(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        def floats(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.control = integers(6, batch)
        self.token, self.position, self.source, self.target, self.spare, self.ring = self.control
        self.options = integers(batch, sample.COLUMNS)
        self.recent = torch.full((batch, sample.MAX_WINDOW), -1, dtype=torch.int64, device=device)
        self.chosen: Tensor | None = None
        self.logits = floats(batch, spec.vocab_size)
        self.sample_scratch = sample.make_scratch(batch, spec.vocab_size, device)

        hidden, ff = spec.hidden_size, spec.intermediate_size
        widest = max(layer.in_proj.shape[0] for layer in weights.layers)
        self.x = floats(batch, hidden)
        self.y = floats(batch * widest)
        self.block_v = _block_v(spec, batch)
        parts = cdiv(spec.head_v_dim, self.block_v)
        single = batch == 1
        readers = [*(layer.in_proj for layer in weights.layers), weights.lm_head]
        self.inputs = [make_activation(hidden, (-(-hidden // EMBED_BLOCK),), device, split_for(*_parts(readers[0])))]
        self.after_mixer, self.after_glu = [], []
        for layer, reader in zip(weights.layers, readers[1:], strict=True) if single else ():
            mixers, adders = (num_programs(w, "add", self.gpu) for w in (layer.o_proj, layer.mlp.w3))
            self.after_mixer.append(make_activation(hidden, (mixers,), device, split_for(*_parts(layer.mlp.w12))))
            self.after_glu.append(make_activation(ff, (1,), device, split_for(*_parts(layer.mlp.w3))))
            self.inputs.append(make_activation(hidden, (adders,), device, split_for(*_parts(reader))))
        self.mixed = make_activation(spec.value_dim * batch, (spec.num_v_heads * batch, parts), device)
        if single:
            self.mixer_vectors = floats(spec.num_v_heads, parts, 2, self.block_v)
        if spec.kv_heads:
            q_dim, D = spec.q_heads * spec.attention_head_dim, spec.attention_head_dim
            self.attended = make_activation(q_dim * batch, (1, 1), device)
            self.angles = floats(batch, D // 2, 2)
            shape = attention.scratch_shape(
                batch,
                q_heads=spec.q_heads,
                kv_heads=spec.kv_heads,
                head_dim=D,
                window=spec.window,
                multiprocessors=self.gpu.multiprocessors,
            )
            self.attention_scratch = floats(*shape)
            places = [place for here in self.layout.offsets for name, place in here.items() if name.startswith("ring")]
            self.rings = torch.tensor(places, device=device)
            self.kept_slots = floats(batch, len(places), spec.kv_heads * D)
        if not single:
            # fp32 rows where fp32 is asked for, and in the interpreter, which multiplies no bf16.
            half = torch.float32 if dtype == torch.float32 or device.type != "cuda" else torch.bfloat16
            self.f, self.g = floats(batch, spec.key_dim), floats(batch, spec.value_dim)
            self.mixer_keys = floats(batch, spec.num_v_heads, 4, spec.head_k_dim)
            self.mixer_channels = floats(batch, spec.num_v_heads, 2, spec.head_v_dim)
            self.mixer_products = floats(batch, spec.num_v_heads)
            self.h = floats(batch, hidden, dtype=half)
            self.h_mixed = floats(batch, max(spec.value_dim, spec.q_heads * spec.attention_head_dim), dtype=half)
            self.h_glu = floats(batch, ff, dtype=half)
            self.product_scratch = gemm.product_scratch(device)
            # Of what h holds from the embedding on: a norm before each mixer, each MLP and the head.
            parts = [cdiv(hidden, EMBED_BLOCK)]
            for layer in weights.layers:
                parts += [gemm.num_tiles(self.h, layer.o_proj), gemm.num_tiles(self.h, layer.mlp.w3)]
            self.norms = [gemm.Norm(floats(batch, n), spec.norm_eps) for n in parts]
        self.vectors = {id(w): w.rows(slice(None)) for w in _small(weights)}

    def launch(self, choose: bool) -> None:
        """Run the step; with `choose` also sample the next token."""
        self._embed()
        for i, layer in enumerate(self.weights.layers):
            self._layer(i, layer)
        if self.batch == 1:
            self._gemv(self.inputs[-1], self.weights.lm_head, "rms", "store", y=self.logits[0])
        else:
            self._product(self.h, self.weights.lm_head, self.logits, norm=self.norms[-1])
        tables = sample.Tables(self.source, self.target, self.spare)
        if choose:
            sample.sample(
                self.logits, self.position, self.options, self.recent, self.token, self.sample_scratch,
                chosen=self.chosen, tables=tables, pdl=self.gpu.pdl,
            )  # fmt: skip
        else:
            self._run(rows.advance_kernel, (self.batch,), self.position, *tables, num_warps=1)

    def take_back(self, ring: Tensor, position: Tensor) -> None:
        """Undo what the last step wrote into the rings [B, ring_floats], being at position [B], on the CPU."""
        row = self.kept_slots.shape[2]
        for b, slot in enumerate((position % self.spec.window).tolist()):
            for i, place in enumerate(self.rings.tolist()):
                ring[b, place + slot * row :][:row] = self.kept_slots[b, i]

    def _embed(self) -> None:
        """The residual stream of each sequence's token."""
        weight, out, is_single = self.weights.embed, self.inputs[0], self.batch == 1
        format, codes, scale, group = stored(weight)
        first = self.weights.layers[0]
        forms = _forms(first.in_proj) if is_single else Forms(True, False)
        split = out.split if is_single else 1
        hidden = self.spec.hidden_size
        # The only kernel that waits for the step before to be over: what others read early is then complete.
        rows.embed_kernel[(cdiv(hidden, EMBED_BLOCK), self.batch)](
            self.token,
            codes,
            scale,
            self.vectors[id(first.norm)],
            self.x,
            out.values if is_single else self.h,
            out.high,
            out.low,
            out.unit,
            out.squares if is_single else self.norms[0].squares,
            D=hidden,
            BLOCK=EMBED_BLOCK,
            FORMAT=format,
            GROUP=group,
            VALUES=split if forms.values else 0,
            PLANES=forms.planes,
            HARDWARE_FP8=self.gpu.hardware_fp8,
            PDL=False,
        )
        if self.spec.kv_heads:
            attention.rotary_angles(self.position, self.spec.rope_base, self.angles, pdl=self.gpu.pdl)
            attention.keep_slots(
                self.position, self.base, self.ring, self.rings, self.kept_slots,
                window=self.spec.window, pdl=self.gpu.pdl,
            )  # fmt: skip

    def _layer(self, i: int, layer: Layer) -> None:
        weights = self.weights
        is_last = i + 1 == len(weights.layers)
        next_norm = weights.ln_f if is_last else weights.layers[i + 1].norm
        next_readers = weights.lm_head if is_last else weights.layers[i + 1].in_proj
        is_gdn2 = isinstance(layer, Gdn2Layer)
        mlp_norm, next_norm_values = self.vectors[id(layer.mlp.norm)], self.vectors[id(next_norm)]
        if self.batch == 1:
            x, mlp = self.x[0], layer.mlp
            self._gemv(self.inputs[i], layer.in_proj, "rms", "store", y=self.y)
            mixed = self._mix(i, layer, _forms(layer.o_proj))
            self._gemv(
                mixed, layer.o_proj, "heads" if is_gdn2 else "none", "add",
                y=x, gain=mlp_norm, out=self.after_mixer[i], forms=_forms(mlp.w12),
            )  # fmt: skip
            self._gemv(self.after_mixer[i], mlp.w12, "rms", "glu", out=self.after_glu[i], forms=_forms(mlp.w3))
            self._gemv(
                self.after_glu[i], mlp.w3, "none", "add",
                y=x, gain=next_norm_values, out=self.inputs[i + 1], forms=_forms(next_readers),
            )  # fmt: skip
            return
        before, between, after = self.norms[2 * i : 2 * i + 3]
        self._product(self.h, layer.in_proj, self._y(layer), norm=before)
        h_mixed = self._mix_rows(i, layer)
        then = gemm.Next(mlp_norm, self.h, between.squares)
        self._product(h_mixed, layer.o_proj, self.x, residual=self.x, then=then)
        self._product(self.h, layer.mlp.w12, self.h_glu, glu=True, norm=between)
        then = gemm.Next(next_norm_values, self.h, after.squares)
        self._product(self.h_glu, layer.mlp.w3, self.x, residual=self.x, then=then)

    def _mix(self, i: int, layer: Layer, forms: Forms) -> Activation:
        """What stands between the two projections of a mixer, for one sequence."""
        spec, places = self.spec, self.layout.offsets[i]
        split = split_for(*_parts(layer.o_proj))
        if isinstance(layer, AttentionLayer):
            return self._attend(i, layer, forms, split)
        f_format, f, f_scale, f_group = stored(layer.f_proj)
        g_format, g, g_scale, g_group = stored(layer.g_proj)
        out, rank = replace(self.mixed, split=split), spec.head_v_dim
        self._run(
            recurrence.decode_kernel,
            (cdiv(spec.head_v_dim, self.block_v), spec.num_v_heads, self.batch),
            self.y,
            self.base,
            self.source,
            self.target,
            places["conv"],
            places["S"],
            self.vectors[id(layer.conv)],
            f,
            f_scale,
            g,
            g_scale,
            self.vectors[id(layer.g_bias)],
            self.vectors[id(layer.A_log)],
            self.vectors[id(layer.dt_bias)],
            self.vectors[id(layer.o_norm)],
            out.values,
            out.high,
            out.low,
            out.unit,
            out.squares,
            self.mixer_vectors,
            layer.in_proj.shape[0],
            spec.head_k_dim**-0.5,
            spec.erase_scale,
            H=spec.num_heads,
            HV=spec.num_v_heads,
            K=spec.head_k_dim,
            V=spec.head_v_dim,
            RANK=rank,
            CONV=spec.conv_size,
            K_2=next_power_of_2(spec.head_k_dim),
            RANK_2=next_power_of_2(rank),
            BLOCK_V=self.block_v,
            F_FORMAT=f_format,
            F_GROUP=f_group,
            G_FORMAT=g_format,
            G_GROUP=g_group,
            GATE=spec.output_gate,
            VALUES=out.split if forms.values else 0,
            PLANES=forms.planes,
            ASM=self.gpu.asm,
            HARDWARE_FP8=self.gpu.hardware_fp8,
            num_warps=8,
            **register_options(self.gpu.asm, MIXER_REGISTERS),
        )
        return out

    def _attend(self, i: int, layer: AttentionLayer, forms: Forms, split: int) -> Activation:
        """Window attention between its two projections, for one sequence or many."""
        spec, places = self.spec, self.layout.offsets[i]
        attention.window_decode(
            self._y(layer),
            self.position,
            self.angles,
            self.base,
            self.ring,
            places["ring_k"],
            places["ring_v"],
            self.attended.values.view(self.batch, -1),
            self.attention_scratch,
            q_heads=spec.q_heads,
            kv_heads=spec.kv_heads,
            head_dim=spec.attention_head_dim,
            window=spec.window,
            split=split,
            planes=self.attended if forms.planes else None,
            pdl=self.gpu.pdl,
        )
        return replace(self.attended, split=split)

    def _mix_rows(self, i: int, layer: Layer) -> Tensor:
        """The same for many sequences: rows [B, inputs of o_proj]."""
        spec, places, width = self.spec, self.layout.offsets[i], layer.o_proj.shape[1]
        rows_out = self.h_mixed.flatten()[: self.batch * width].view(self.batch, width)
        if isinstance(layer, AttentionLayer):
            self._head_rows(self._attend(i, layer, Forms(True, False), split=1), rows_out, heads=1, norm=False)
            return rows_out
        y, heads, K, V = self._y(layer), spec.num_v_heads, spec.head_k_dim, spec.head_v_dim
        ranks = 3 * spec.key_dim + 2 * spec.value_dim  # where the inputs of the gates' second matrices begin
        low_rank_pair(y[:, ranks:], layer.f_proj, layer.g_proj, self.f, self.g, pdl=self.gpu.pdl)
        self._run(
            batch_recurrence.vectors_kernel,
            (heads, self.batch),
            y,
            self.base,
            self.source,
            self.target,
            places["conv"],
            self.vectors[id(layer.conv)],
            self.f,
            self.g,
            self.vectors[id(layer.g_bias)],
            self.vectors[id(layer.A_log)],
            self.vectors[id(layer.dt_bias)],
            self.vectors[id(layer.o_norm)],
            self.mixer_keys,
            self.mixer_channels,
            self.mixer_products,
            y.shape[1],
            K**-0.5,
            spec.erase_scale,
            H=spec.num_heads,
            HV=heads,
            K=K,
            V=V,
            CONV=spec.conv_size,
            K_2=next_power_of_2(K),
            V_2=next_power_of_2(V),
            GATE=spec.output_gate,
        )
        is_whole = self.block_v >= V
        self._run(
            batch_recurrence.state_kernel,
            (cdiv(V, self.block_v), heads, self.batch),
            self.base,
            self.source,
            self.target,
            places["S"],
            self.mixer_keys,
            self.mixer_channels,
            self.mixer_products,
            rows_out if is_whole else self.mixed.values,
            self.mixed.squares,
            spec.norm_eps,
            HV=heads,
            K=K,
            V=V,
            K_2=next_power_of_2(K),
            BLOCK_K=min(STATE_ROWS, next_power_of_2(K)),
            BLOCK_V=self.block_v,
        )
        if not is_whole:
            self._head_rows(self.mixed, rows_out, heads, norm=True)
        return rows_out

    def _head_rows(self, mixed: Activation, out: Tensor, heads: int, norm: bool) -> None:
        head = out.shape[1] // heads
        self._run(
            rows.head_rows_kernel,
            (heads, self.batch),
            mixed.values,
            mixed.squares,
            out,
            self.spec.norm_eps,
            HEADS=heads,
            HEAD=head,
            HEAD_2=next_power_of_2(head),
            PARTS=mixed.squares.shape[1],
            NORM=norm,
        )

    def _y(self, layer: Layer) -> Tensor:
        """Results of a layer's in_proj, [B, rows]."""
        rows = layer.in_proj.shape[0]
        return self.y[: self.batch * rows].view(self.batch, rows)

    def _gemv(
        self,
        x: Activation,
        weight: Weight,
        norm: str,
        output: str,
        *,
        y: Tensor | None = None,
        gain: Tensor | None = None,
        out: Activation | None = None,
        forms: Forms = BOTH_FORMS,
    ) -> None:
        parts, start = _parts(weight), 0
        for i in range(0, len(parts), 2):  # more than one part only where results are stored
            pair = parts[i : i + 2]
            here = y if y is None or output != "store" else y[start:]
            gemv(
                x, *pair, norm=norm, eps=self.spec.norm_eps, output=output, gpu=self.gpu,
                y=here, gain=gain, out=out, forms=forms,
            )  # fmt: skip
            start += sum(part.shape[0] for part in pair)

    def _product(
        self,
        x: Tensor,
        weight: Weight,
        out: Tensor,
        *,
        glu: bool = False,
        residual: Tensor | None = None,
        norm: gemm.Norm | None = None,
        then: gemm.Next | None = None,
    ) -> None:
        scratch, pdl = self.product_scratch, self.gpu.pdl
        gemm.product(x, weight, out, glu=glu, residual=residual, norm=norm, then=then, scratch=scratch, pdl=pdl)

    def _run(self, kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int = 4, **constants: Any) -> None:
        kernel[grid](*args, **constants, PDL=self.gpu.pdl, num_warps=num_warps, **pdl_options(self.gpu.pdl))


def _block_v(spec: ModelSpec, batch: int) -> int:
    """Value channels of a program of the recurrence."""
    if batch == 1:
        return 16 if spec.head_v_dim % 16 == 0 else 8
    block: int = min(MAX_BLOCK_V, next_power_of_2(spec.head_v_dim))
    while block > 8 and batch * spec.num_v_heads * cdiv(spec.head_v_dim, block) < MIN_STATE_PROGRAMS:
        block //= 2
    return block


def _small(weights: ModelWeights) -> list[Weight]:
    """Norms, biases, filters: what the kernels read as fp32 vectors."""
    vectors = [weights.ln_f]
    for layer in weights.layers:
        vectors += [layer.norm, layer.mlp.norm]
        if isinstance(layer, Gdn2Layer):
            vectors += [layer.conv, layer.g_bias, layer.A_log, layer.dt_bias, layer.o_norm]
    return vectors
