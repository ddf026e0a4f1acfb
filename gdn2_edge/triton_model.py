"""`TritonModel`: the torch runtime on a GPU, with decode steps in fused kernels that are captured as CUDA graphs.

A state at rest is one flat block of memory a sequence (see `StateLayout`). A step reads one block and writes another,
so whatever happens in its middle, the state before it is whole. While the host looks at a token the GPU already
computes the one after it; if the host then goes another way, that step is forgotten.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gdn2_edge.errors import BackendError
from gdn2_edge.kernels.triton import sample
from gdn2_edge.kernels.triton.launch import cannot_run as cannot_run
from gdn2_edge.kernels.triton.launch import count_launches
from gdn2_edge.model import Model
from gdn2_edge.ops import ModelWeights
from gdn2_edge.runtime import Sample
from gdn2_edge.sampling import Sampling
from gdn2_edge.spec import ModelSpec
from gdn2_edge.state import LayerState, State
from gdn2_edge.triton_ops import OFFSET_FLOATS, DecodeStep, StateLayout
from gdn2_edge.triton_ops import unsupported as unsupported
from gdn2_edge.triton_prompts import CHUNK_MIN_TOKENS, PromptStep, TritonOps

MAX_BATCH = 128
# Tokens of all sequences that go through the layers at once in long prompts: enough to keep a large GPU busy, and some
# 0.5 GB of activations at the sizes of the 1.3B model.
PIECE_TOKENS = 4096
# Pieces of one sequence that are captured; a shorter rest is filled up to the next size. Below the size from which
# launching is no longer what a prompt waits for.
CAPTURED_TOKENS = (16, 32, 64, 128, 256, 512)
LAUNCHED_MIN_TOKENS = 2048
TOKENS_KEPT = 3  # of each sequence, on the host; two steps run at most
NOT_FINITE = "The model's logits are not finite: its weights are damaged or hold NaN."


class BlockState(State[Tensor]):
    """A state in `block` [B, floats] and `ring` [B, floats]. Its tensors are views, made when they are asked for.

    `position` is on the CPU, where it is read.
    """

    def __init__(self, layout: StateLayout, position: Tensor, block: Tensor, ring: Tensor) -> None:
        for name, value in (("layout", layout), ("position", position), ("block", block), ("ring", ring)):
            object.__setattr__(self, name, value)

    layout: StateLayout
    block: Tensor
    ring: Tensor

    @property
    def layers(self) -> tuple[LayerState[Tensor], ...]:
        return self.layout.views(self.position, self.block, self.ring).layers


@dataclass
class Ahead:
    """A step that was started before it was asked for: it feeds `token` [B] to `state`."""

    token: Tensor
    state: BlockState
    sampling: Sample
    options: Sampling
    blocks: tuple[Tensor, Tensor, Tensor]  # source, target, spare of that step
    number: int


class Decoder:
    """A `DecodeStep` for one size of batch with its graphs, and the host's side of its tables."""

    def __init__(self, spec: ModelSpec, weights: ModelWeights, base: Tensor, batch: int, dtype: torch.dtype) -> None:
        self.step = DecodeStep(spec, weights, base, batch, dtype)
        self.batch = batch
        self.base = base
        is_gpu = base.is_cuda
        self.control = torch.zeros(6, batch, dtype=torch.int64, pin_memory=is_gpu)
        self.options = torch.zeros(batch, sample.COLUMNS, dtype=torch.int64, pin_memory=is_gpu)
        self.recent = torch.full((batch, sample.MAX_WINDOW), -1, dtype=torch.int64, pin_memory=is_gpu)
        # The GPU writes here itself: a copy between two graphs would keep the second one waiting.
        self.chosen = self.step.chosen = torch.zeros(TOKENS_KEPT, batch, dtype=torch.int64, pin_memory=is_gpu)
        self.events = [torch.cuda.Event() if is_gpu else None for _ in range(TOKENS_KEPT)]
        layout = self.step.layout
        self.scratch_block = torch.zeros(3, layout.block_floats, device=base.device)
        self.scratch_ring = torch.zeros(layout.ring_floats, device=base.device)
        self._graphs: dict[bool, Callable[[], None]] = {}
        self.launches = 0
        self.ahead: Ahead | None = None
        self.count = 0

    def begin(self, token: Tensor, state: BlockState, blocks: tuple[Tensor, Tensor, Tensor]) -> None:
        """Write the tables for a step that feeds token [B] to `state`."""
        self.ahead = None
        B = token.shape[0]
        self._synchronize()  # the copies below may still be read
        self.control[0, :B] = token
        self.control[1, :B] = state.position
        for row, tensor in enumerate((*blocks, state.ring), 2):
            self.control[row, :B] = torch.tensor([self._offset(tensor[b]) for b in range(B)])
        for b in range(B, self.batch):
            self.control[:, b] = 0
            for row in range(3):
                self.control[2 + row, b] = self._offset(self.scratch_block[row])
            self.control[5, b] = self._offset(self.scratch_ring)
        self.step.control.copy_(self.control, non_blocking=True)

    def write_sampling(self, sampling: Sample, batch: int) -> None:
        """Write the options and the tokens chosen lately."""
        s, window = sampling.sampling, sampling.recent.shape[1]
        self.recent.fill_(-1)
        kept = min(window, sample.MAX_WINDOW)
        if kept:
            self.recent[:batch, sample.MAX_WINDOW - kept :] = sampling.recent[:, window - kept :]
        for b in range(self.batch):
            sample.write_options(
                self.options[b],
                seed=s.seed,
                row_index=b,
                top_k=s.top_k,
                repetition_window=min(s.repetition_window, sample.MAX_WINDOW),
                temperature=s.temperature,
                top_p=s.top_p,
                min_p=s.min_p,
                repetition_penalty=s.repetition_penalty,
            )
        self.step.options.copy_(self.options, non_blocking=True)
        self.step.recent.copy_(self.recent, non_blocking=True)

    def run(self, choose: bool) -> int:
        """Start a step; the number of its event."""
        self._graph(choose)()
        number = self.count % TOKENS_KEPT
        self.count += 1
        if event := self.events[number]:
            event.record()
        return number

    def wait(self, number: int, position: Tensor) -> Tensor:
        """The tokens that the step with this event chose, on the CPU; position [B] after the step."""
        if event := self.events[number]:
            event.synchronize()
        return self.chosen.gather(0, position[None, :] % TOKENS_KEPT)[0]

    def _synchronize(self) -> None:
        if self.base.is_cuda:
            torch.cuda.current_stream(self.base.device).synchronize()

    def _offset(self, tensor: Tensor) -> int:
        return (tensor.data_ptr() - self.base.data_ptr()) // (4 * OFFSET_FLOATS)

    def _graph(self, choose: bool) -> Callable[[], None]:
        if choose not in self._graphs:
            if self.base.is_cuda:
                saved = self.step.control.clone(), self.step.recent.clone()
                self._on_scratch()
                launches = count_launches(lambda: self.step.launch(choose))  # compiles: a capture may only launch
                self.launches = max(self.launches, launches)
                torch.cuda.synchronize(self.base.device)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    self.step.launch(choose)
                self.step.control.copy_(saved[0])
                self.step.recent.copy_(saved[1])
                self._graphs[choose] = graph.replay
            else:
                self._graphs[choose] = lambda: self.step.launch(choose)
        return self._graphs[choose]

    def graph_milliseconds(self, steps: int) -> float:
        """Milliseconds a step on the scratch states, without the host between two steps, an attention window full."""
        run = self._graph(choose=True)
        self._on_scratch()
        self.step.position.fill_(self.step.spec.window)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        run()
        start.record()
        for _ in range(steps):
            run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / steps

    def _on_scratch(self) -> None:
        self.step.control.zero_()
        for row in range(3):
            self.step.control[2 + row].fill_(self._offset(self.scratch_block[row]))
        self.step.control[5].fill_(self._offset(self.scratch_ring))


class TritonModel(Model):
    """A GDN-2 model on a GPU. Made by `load`; see `Runtime` for the calls."""

    ops: TritonOps

    def __init__(
        self,
        spec: ModelSpec,
        weights: ModelWeights,
        device: torch.device,
        dtype: torch.dtype,
        fingerprint: str = "",
        path: Path = Path(),
        fp8_products: bool = False,
    ) -> None:
        super().__init__(spec, weights, device, dtype, fingerprint, path)
        self.ops = TritonOps(dtype, device, weights, fp8_products)
        self.layout = StateLayout.of(spec)
        self.name = f"triton on {device}, {'fp8' if fp8_products else str(dtype)[6:]} activations in prompts"
        self._base = torch.zeros(OFFSET_FLOATS, device=device)
        self._decoders: dict[int, Decoder] = {}
        self._prompts: PromptStep | None = None

    @torch.inference_mode()
    def initial_state(self, batch: int = 1) -> BlockState:
        block = torch.zeros(batch, self.layout.block_floats, device=self.device)
        ring = torch.zeros(batch, self.layout.ring_floats, device=self.device)
        return BlockState(self.layout, torch.zeros(batch, dtype=torch.int64), block, ring)

    @torch.inference_mode()
    def step(self, token: Tensor, state: State[Tensor]) -> tuple[Tensor, State[Tensor]]:
        self._checked(token[:, None], state)
        B = token.shape[0]
        if B > MAX_BATCH:
            return super().step(token, state)
        decoder, now = self._decoder(B), self._at_rest(state)
        new = torch.empty_like(now.block)
        decoder.begin(token, now, (now.block, new, new))
        decoder.run(choose=False)
        return decoder.step.logits[:B].clone(), self._state(now.position + 1, new, now.ring)

    @torch.inference_mode()
    def generate_step(self, token: Tensor, state: State[Tensor], sampling: Sample) -> tuple[Tensor, State[Tensor]]:
        s, B = sampling.sampling, token.shape[0]
        on_gpu = sample.fits(self.spec.vocab_size, s.top_k, s.temperature, s.repetition_penalty, s.repetition_window)
        if not on_gpu or B > MAX_BATCH or sampling.recent.shape[0] != B:
            return super().generate_step(token, state, sampling)
        decoder = self._decoder(B)
        ahead, decoder.ahead = decoder.ahead, None
        is_expected = ahead and ahead.state is state and ahead.sampling is sampling and ahead.options is s
        if ahead and is_expected and bool((token.cpu() == ahead.token).all()):
            now, blocks, number = ahead.state, ahead.blocks, ahead.number
        else:
            self._checked(token[:, None], state)
            now = self._at_rest(state)
            blocks = (now.block, torch.empty_like(now.block), torch.empty_like(now.block))
            decoder.begin(token.cpu(), now, blocks)
            decoder.write_sampling(sampling, B)
            number = decoder.run(choose=True)
        source, target, spare = blocks
        after = self._state(now.position + 1, target, now.ring)
        number_ahead = decoder.run(choose=True)
        try:
            chosen = decoder.wait(number, now.position + 1)
            if bool((chosen < 0).any()):
                raise BackendError(NOT_FINITE)
        except BaseException:
            if self.spec.kv_heads:  # the step ahead wrote a slot that this one needs if it is repeated
                decoder.step.take_back(now.ring, now.position + 1)
            raise
        decoder.ahead = Ahead(chosen, after, sampling, s, (target, spare, source), number_ahead)
        sampling.record(chosen)
        return chosen, after

    @torch.inference_mode()
    def forward(self, tokens: Tensor, state: State[Tensor] | None = None) -> tuple[Tensor, State[Tensor]]:
        self._checked(tokens, state)
        state = self.initial_state(tokens.shape[0]) if state is None else state
        return super().forward(tokens, self._functional(state))

    @torch.inference_mode()
    def prefill(self, tokens: Tensor, state: State[Tensor]) -> tuple[Tensor, State[Tensor]]:
        if tokens.ndim == 2 and tokens.shape[1] == 1 and tokens.shape[0] <= MAX_BATCH:
            return self.step(tokens[:, 0], state)
        on_device = self._checked(tokens, state)
        if tokens.shape[0] > 1 or self.spec.kv_heads:
            return super().prefill(tokens, self._functional(state))
        rest = tokens.shape[1] % PIECE_TOKENS
        launched = tokens.shape[1] - (rest if rest < LAUNCHED_MIN_TOKENS else 0)
        if launched:
            logits, state = super().prefill(tokens[:, :launched], self._functional(state))
        if launched < tokens.shape[1]:
            logits, state = self._captured_prefill(on_device[:, launched:], self._at_rest(state))
        return logits, state

    def _captured_prefill(self, tokens: Tensor, state: BlockState) -> tuple[Tensor, BlockState]:
        """`prefill` of one sequence in pieces that are captured once for each size."""
        if self._prompts is None:
            self._prompts = PromptStep(self.spec, self.weights, self.ops, self.layout, max(CAPTURED_TOKENS))
        prompts = self._prompts
        prompts.block.copy_(state.block)
        prompts.position.copy_(state.position)
        for piece in tokens.split(max(CAPTURED_TOKENS), 1):
            logits = prompts.run(piece, next(size for size in CAPTURED_TOKENS if size >= piece.shape[1]))
        position = state.position + tokens.shape[1]
        return logits.clone(), self._state(position, prompts.block.clone(), state.ring)

    def _pieces(self, tokens: Tensor) -> tuple[Tensor, ...]:
        return tuple(tokens.split(max(CHUNK_MIN_TOKENS, PIECE_TOKENS // tokens.shape[0]), 1))

    @torch.inference_mode()
    def clone(self, state: State[Tensor]) -> State[Tensor]:
        if isinstance(state, BlockState):
            return self._state(state.position.clone(), state.block.clone(), state.ring.clone())
        return super().clone(state)

    @property
    def launches_per_token(self) -> int | None:
        """Kernels in the graph of a step for one sequence, once it is captured."""
        decoder = self._decoders.get(1)
        return decoder.launches if decoder and decoder.launches else None

    @torch.inference_mode()
    def graph_milliseconds(self, tokens: int) -> float:
        """Milliseconds a token of the graph alone, one replay after another, on states nobody uses."""
        decoder = self._decoder(1)
        decoder.ahead = None
        return decoder.graph_milliseconds(tokens)

    def _decoder(self, batch: int) -> Decoder:
        """The decoder for this many sequences, or the next power of two."""
        bucket = 1 << (batch - 1).bit_length()
        if bucket not in self._decoders:
            self._decoders[bucket] = Decoder(self.spec, self.weights, self._base, bucket, self.ops.dtype)
        return self._decoders[bucket]

    def _state(self, position: Tensor, block: Tensor, ring: Tensor) -> BlockState:
        return BlockState(self.layout, position, block, ring)

    def _at_rest(self, state: State[Tensor]) -> BlockState:
        """The state in one block a sequence."""
        if isinstance(state, BlockState):
            return state
        made = self.initial_state(state.position.shape[0])
        at_rest = self._state(state.position.cpu(), made.block, made.ring)
        for to, source in zip(at_rest.layers, state.layers, strict=True):
            for name, view in vars(to).items():
                view.copy_(getattr(source, name))
        return at_rest

    def _functional(self, state: State[Tensor]) -> State[Tensor]:
        """The state as `forward.py` takes it: with its position on the device."""
        return State(state.position.to(self.device), state.layers)
