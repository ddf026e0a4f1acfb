"""`LlamaCppModel`: a GGUF file, run by a llama-cpp-python that knows GDN-2. llama_cpp is imported here only.

llama.cpp keeps states inside a context, and has one for each sequence there. So one `LlamaState` lives in the context;
any other is a copy of what llama.cpp gives out, and comes back to life when it is used.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import operator
import os
import re
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gdn2_edge.checkpoint.gguf_file import GgufFile, open_gguf
from gdn2_edge.errors import BackendError, CheckpointError, SessionError
from gdn2_edge.integrations.build_llama_cpp import PATCHED_VERSION
from gdn2_edge.runtime import Runtime, check_tokens
from gdn2_edge.state import LLAMA_CPP_BLOCK, MAX_POSITION, State

try:
    import llama_cpp
except Exception as failure:  # its libraries are loaded with it, and fail in their own ways
    raise BackendError(
        f"llama_cpp is installed, but it cannot be loaded ({' '.join(str(failure).split())[:200]}). Make one for this "
        "computer and install it: gdn2-edge llama-cpp build."
    ) from None

BATCH_TOKENS = 512  # of all sequences in one call
F32 = 0  # ggml's number: keys and values of attention as the other runtimes keep them
ERROR = 4  # of an entry of llama.cpp's log
HEAD_BYTES = 4096  # of an exported state, before its data: what made it, and its digest
CELL_BYTES = 64  # that llama.cpp writes beside the keys and values of a token, at most


# llama.cpp's log: what went wrong lately.
_said: deque[str] = deque(maxlen=4)


@functools.cache
def _listen() -> Any:
    """llama.cpp calls what this returns for as long as the process lives."""

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def hear(level: int, text: bytes, _: Any) -> None:
        if level == ERROR:
            _said.append(text.decode(errors="replace"))

    return hear


def _reason() -> str:
    """In one line what llama.cpp last complained about."""
    said = " ".join("".join(_said).split())[:300]
    _said.clear()
    return said


class LlamaState(State[Tensor]):
    """The memory of B sequences: alive in a context, or else as `copies`, llama.cpp's own bytes for each sequence."""

    copies: list[bytes] | None

    def __init__(self, position: Tensor, copies: list[bytes] | None) -> None:
        for name, value in (("position", position), ("layers", ()), ("copies", copies)):
            object.__setattr__(self, name, value)


class LlamaCppModel(Runtime):
    """A GDN-2 model on llama.cpp. Made by `load`; see `Runtime` for the calls that every runtime has.

    A state is given out in llama.cpp's own form, which means nothing to another runtime or another build of it.
    """

    def __init__(self, file: GgufFile, device: str = "auto") -> None:
        self.spec, self.path, self.format = file.spec, file.path, file.format
        self._texts = file.texts
        # A state of one type of weights means nothing to another's.
        self.fingerprint = file.fingerprint and hashlib.sha256(f"{file.fingerprint} {file.format}".encode()).hexdigest()
        self.build = f"llama-cpp-python {llama_cpp.__version__}"
        self._context: Any = None
        self._batch: Any = None
        self._free: Callable[[], Any] = lambda: None  # what is there of them
        self._sequences = 0
        self._alive: weakref.ref[LlamaState] | None = None
        llama_cpp.llama_log_set(_listen(), None)
        llama_cpp.llama_backend_init()
        if not (named := re.fullmatch(r"auto|cpu|cuda(?::(\d{1,3}))?", device)):
            raise BackendError(f"device {device!r} is unknown, expected auto, cpu, cuda or cuda:N.")
        offload = device != "cpu" and bool(llama_cpp.llama_supports_gpu_offload())
        if device not in ("auto", "cpu") and not offload:
            raise BackendError(
                f"device {device!r} is not here: this llama.cpp was built for the CPU alone. Use --device cpu, or "
                "build it for the GPU: gdn2-edge llama-cpp build -DGGML_CUDA=ON."
            )
        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers = -1 if offload else 0
        if offload and named[1]:
            options.main_gpu, options.split_mode = int(named[1]), llama_cpp.LLAMA_SPLIT_MODE_NONE
        self._model = llama_cpp.llama_model_load_from_file(os.fsencode(file.path), options)
        if not self._model:
            raise CheckpointError(f"{file.path}: llama.cpp cannot load it ({_reason()}).")
        weakref.finalize(self, llama_cpp.llama_model_free, self._model)
        if (
            words := llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        ) != file.spec.vocab_size:
            raise CheckpointError(
                f"{file.path}: its vocabulary has {words} words, its spec says {file.spec.vocab_size}."
            )
        self._threads = torch.get_num_threads()
        self._offload = offload
        self._open(1)
        _said.clear()
        self.name = f"llama.cpp ({self.build}), {file.format} GGUF" + (", layers on the GPU" if offload else "")

    @property
    def text_files(self) -> Mapping[str, bytes]:
        return self._texts

    def initial_state(self, batch: int = 1) -> State[Tensor]:
        return LlamaState(torch.zeros(batch, dtype=torch.int64), [b""] * batch)

    @torch.inference_mode()
    def forward(self, tokens: Tensor, state: State[Tensor] | None = None) -> tuple[Tensor, State[Tensor]]:
        return self._feed(tokens, state, every=True)

    @torch.inference_mode()
    def prefill(self, tokens: Tensor, state: State[Tensor]) -> tuple[Tensor, State[Tensor]]:
        logits, state = self._feed(tokens, state, every=False)
        return logits[:, -1], state

    def clone(self, state: State[Tensor]) -> State[Tensor]:
        return LlamaState(state.position.clone(), self._copies(state))

    def export_state(self, state: State[Tensor]) -> dict[str, Tensor]:
        """Positions, and `llama_cpp` uint8 [n]: what made it and its digest in JSON, then llama.cpp's own bytes."""
        copies = self._copies(state)
        data = b"".join(copies)
        head = {"build": self.build, "sizes": [len(c) for c in copies], "sha256": hashlib.sha256(data).hexdigest()}
        block = bytearray(json.dumps(head).encode().ljust(HEAD_BYTES) + data)
        return {"position": state.position.clone(), LLAMA_CPP_BLOCK: torch.frombuffer(block, dtype=torch.uint8)}

    def import_state(self, tensors: dict[str, Tensor]) -> State[Tensor]:
        if set(tensors) != {"position", LLAMA_CPP_BLOCK}:
            raise SessionError(
                "state: it was kept by another runtime, and llama.cpp has a form of its own. Go on with the runtime "
                "that kept it."
            )
        position, block = tensors["position"], tensors[LLAMA_CPP_BLOCK]
        if position.ndim != 1 or position.dtype != torch.int64 or block.ndim != 1 or block.dtype != torch.uint8:
            raise SessionError("state: its positions or its block of llama.cpp's are damaged.")
        if not all(0 <= p <= MAX_POSITION for p in position.tolist()):
            raise SessionError(f"state: position is {position.tolist()[:4]}, expected 0 to {MAX_POSITION}.")
        raw = block.numpy().tobytes()
        data = raw[HEAD_BYTES:]
        try:
            head = json.loads(raw[:HEAD_BYTES])
            build, sizes, digest = head["build"], [operator.index(size) for size in head["sizes"]], head["sha256"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise SessionError("state: the head of its block of llama.cpp's is damaged.") from None
        if build != self.build:
            raise SessionError(
                f"state: it was kept by {str(build)[:60]}, this is {self.build}. Each build has a form of its own."
            )
        whole = len(sizes) == len(position) and sum(sizes) == len(data) and min(sizes, default=0) >= 0
        if not whole or hashlib.sha256(data).hexdigest() != digest:
            raise SessionError("state: its block of llama.cpp's is damaged.")
        ends = np.cumsum([0, *sizes]).tolist()
        copies = [data[start:end] for start, end in pairwise(ends)]
        made = LlamaState(position.clone(), copies)
        self._enter(made)  # llama.cpp looks at it now
        return made

    @property
    def state_names(self) -> frozenset[str]:
        return frozenset(("position", LLAMA_CPP_BLOCK))

    @property
    def state_bytes(self) -> int:
        """As the spec says, and what llama.cpp writes beside it."""
        cells = self.spec.window + BATCH_TOKENS if self.spec.kv_heads else 0
        kept = 2 * 4 * self.spec.kv_heads * self.spec.attention_head_dim * BATCH_TOKENS if cells else 0
        layers = len(self.spec.layer_types)
        return super().state_bytes + HEAD_BYTES + CELL_BYTES * cells + layers * (kept + HEAD_BYTES)

    def _feed(self, tokens: Tensor, state: State[Tensor] | None, every: bool) -> tuple[Tensor, State[Tensor]]:
        """Logits after every token [B, T, V] or after the last ones alone [B, 1, V], and the new state."""
        check_tokens(self.spec, tokens, state)
        B, T = tokens.shape
        state = self.initial_state(B) if state is None else state
        self._enter(state)
        self._alive = None  # until all is fed
        position, logits = state.position, []
        piece = max(1, BATCH_TOKENS // B)
        for start in range(0, T, piece):
            n = min(piece, T - start)
            wanted = n if every else int(start + n == T)
            logits.append(self._decode(tokens[:, start : start + n], position, wanted))
            position = position + n
        made = LlamaState(position, None)
        self._alive = weakref.ref(made)
        return torch.cat(logits, 1), made

    def _decode(self, tokens: Tensor, position: Tensor, wanted: int) -> Tensor:
        """Feed tokens [B, T] at positions from [B] on; logits after the `wanted` last ones [B, wanted, V]."""
        B, T = tokens.shape
        batch, n = self._batch, 0
        for b, (row, start) in enumerate(zip(tokens.tolist(), position.tolist(), strict=True)):
            for i, token in enumerate(row):
                batch.token[n], batch.pos[n], batch.n_seq_id[n], batch.seq_id[n][0] = token, start + i, 1, b
                batch.logits[n] = i >= T - wanted
                n += 1
        batch.n_tokens = n
        if code := llama_cpp.llama_decode(self._context, batch):
            raise BackendError(f"llama.cpp failed ({_reason() or f'llama_decode gave {code}'}).")
        logits = torch.empty((B, wanted, self.spec.vocab_size))
        for b, i in product(range(B), range(wanted)):
            found = llama_cpp.llama_get_logits_ith(self._context, b * T + T - wanted + i)
            logits[b, i] = torch.from_numpy(np.ctypeslib.as_array(found, (self.spec.vocab_size,)))
        return logits

    def _enter(self, state: State[Tensor]) -> None:
        """Make a state the one that lives in the context."""
        if not isinstance(state, LlamaState):
            raise SessionError("state: it is another runtime's. Begin with initial_state or import_state.")
        if self._living() is state:
            return
        copies = self._copies(state)
        self._leave()
        if len(copies) > self._sequences:
            self._open(len(copies))
        memory = llama_cpp.llama_get_memory(self._context)
        llama_cpp.llama_memory_clear(memory, True)
        for sequence, (data, position) in enumerate(zip(copies, state.position.tolist(), strict=True)):
            if not data:
                continue
            raw = (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
            read = llama_cpp.llama_state_seq_set_data(self._context, raw, len(data), sequence)
            if read != len(data) or llama_cpp.llama_memory_seq_pos_max(memory, sequence) != position - 1:
                raise SessionError(f"state: llama.cpp cannot read it ({_reason() or 'it is of another model'}).")
        self._alive = weakref.ref(state)

    def _leave(self) -> None:
        """Whoever still needs the state in the context gets a copy."""
        if (living := self._living()) is not None:
            object.__setattr__(living, "copies", self._copies(living))
        self._alive = None

    def _living(self) -> LlamaState | None:
        return self._alive() if self._alive is not None else None

    def _copies(self, state: State[Tensor]) -> list[bytes]:
        if not isinstance(state, LlamaState):
            raise SessionError("state: it is another runtime's. Begin with initial_state or import_state.")
        if self._living() is state:
            return [self._copy(sequence) for sequence in range(len(state.position))]
        if state.copies is None:
            raise SessionError("state: a call has consumed it. Clone a state to keep it.")
        return state.copies

    def _copy(self, sequence: int) -> bytes:
        size = llama_cpp.llama_state_seq_get_size(self._context, sequence)
        data = (ctypes.c_uint8 * size)()
        return bytes(data[: llama_cpp.llama_state_seq_get_data(self._context, data, size, sequence)])

    def _open(self, sequences: int) -> None:
        """A context for so many sequences; nothing lives in it."""
        self._free()
        self._sequences = 0
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = sequences * ((self.spec.window if self.spec.kv_heads else 0) + BATCH_TOKENS)
        options.n_batch = options.n_ubatch = max(BATCH_TOKENS, sequences)
        options.n_seq_max = sequences
        options.n_threads = options.n_threads_batch = self._threads
        options.type_k = options.type_v = F32
        options.flash_attn_type = 0
        options.swa_full = False
        options.offload_kqv = options.op_offload = self._offload
        self._context = llama_cpp.llama_init_from_model(self._model, options)
        if not self._context:
            raise BackendError(f"llama.cpp cannot make a context of {sequences} sequences ({_reason()}).")
        self._batch = llama_cpp.llama_batch_init(options.n_batch, 0, 1)
        self._free = weakref.finalize(self, _free, self._context, self._batch)
        self._sequences = sequences


def load_llama_cpp(path: Path, device: str = "auto") -> LlamaCppModel:
    """Open a GGUF file.

    Args:
        device: "cpu", "cuda" or "cuda:N" (any GPU that llama.cpp was built for), or "auto": that if there is one.
    Raises:
        CheckpointError, SpecError: the file is damaged, or not one of ours.
        BackendError: the llama_cpp that is installed does not know GDN-2, or the device is not there.
    """
    file = open_gguf(path)
    if llama_cpp.__version__ != PATCHED_VERSION:
        raise BackendError(
            f"the installed llama-cpp-python {llama_cpp.__version__} does not know GDN-2. Make one that does and "
            "install it: gdn2-edge llama-cpp build."
        )
    return LlamaCppModel(file, device)


def _free(context: Any, batch: Any) -> None:
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
