"""`OnnxModel`: an exported folder, run by ONNX Runtime. onnxruntime is imported here only.

The state is torch's own tensors, so that sessions go from one runtime to the other. ONNX Runtime reads and writes their
memory where it is. A call reads one set of tensors and writes another, so whatever happens in its middle, the state
before it is whole.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from gdn2_edge.checkpoint.onnx_file import OnnxExport, open_export
from gdn2_edge.errors import BackendError, CheckpointError, SessionError
from gdn2_edge.export.onnx.build_op import find_op
from gdn2_edge.onnx_names import LOGITS, MODEL_FILE, POSITIONS, TOKENS, has_positions, state_names
from gdn2_edge.runtime import Runtime, check_tokens
from gdn2_edge.state import State, check_state, initial_state, state_dtype, state_from_named

# Tokens of all sequences in one call: a call computes the logits of every one of them, 64 MB with 32,000 words.
PIECE_TOKENS = 512
OLDEST = (1, 25, 1)  # has the operators of an export that is not --portable
CUDA, DIRECTML, CPU = "CUDAExecutionProvider", "DmlExecutionProvider", "CPUExecutionProvider"
ELEMENTS = {torch.float32: np.float32, torch.int64: np.int64}
RECORD_NODES = "session.record_ep_graph_assignment_info"


@dataclass(frozen=True)
class _Call:
    """A call of the graph whose inputs and outputs are bound to memory: fill in tokens and positions, then run it."""

    binding: onnxruntime.IOBinding
    tokens: Tensor
    positions: Tensor
    offsets: Tensor
    logits: Tensor


@dataclass
class _Turns:
    """Two sets of state tensors that take turns at being read and written, and the calls for one token, once made."""

    states: tuple[State[Tensor], State[Tensor]]
    steps: list[_Call | None] = field(default_factory=lambda: [None, None])


class OnnxModel(Runtime):
    """A GDN-2 model on ONNX Runtime. Made by `load`; see `Runtime` for the calls that every runtime has.

    Attributes:
        providers: of ONNX Runtime, in the order in which they are asked for each node.
        operators: the library of `gdn2-edge export onnx --build-op`, if it is in use.
    """

    def __init__(self, export: OnnxExport, device: str = "auto") -> None:
        self.spec = export.spec
        self.fingerprint = export.fingerprint
        self.path = export.path
        self.format = export.format
        self._check_version(export)
        self.session, self.operators = _open_session(export, device)
        self._check_signature()
        self.providers = tuple(self.session.get_providers())
        # States lie with the model if torch can be there, else in the CPU's memory, from where they are copied.
        on_gpu = self.providers[0] == CUDA and torch.cuda.is_available()
        self.device = torch.device("cuda", _index(device)) if on_gpu else torch.device("cpu")
        self.name = self._describe()
        self._last: tuple[_Turns, int, State[Tensor]] | None = None  # turns, which it was, and the state it made

    def initial_state(self, batch: int = 1) -> State[Tensor]:
        return initial_state(self.spec, batch, self.device)

    @torch.inference_mode()
    def forward(self, tokens: Tensor, state: State[Tensor] | None = None) -> tuple[Tensor, State[Tensor]]:
        state = self._checked(tokens, state)
        logits = []
        for piece in _pieces(tokens):
            some, state = self._run(piece, state)
            logits.append(some.clone())
        return torch.cat(logits, 1), state

    @torch.inference_mode()
    def prefill(self, tokens: Tensor, state: State[Tensor]) -> tuple[Tensor, State[Tensor]]:
        state = self._checked(tokens, state)
        for piece in _pieces(tokens):
            logits, state = self._run(piece, state)
        return logits[:, -1].clone(), state

    @torch.inference_mode()
    def import_state(self, tensors: dict[str, Tensor]) -> State[Tensor]:
        check_state(self.spec, tensors, "state")
        moved = {name: t.to(self.device, copy=True).contiguous() for name, t in tensors.items()}
        return check_state(self.spec, moved, "state")

    def _checked(self, tokens: Tensor, state: State[Tensor] | None) -> State[Tensor]:
        """The state, of tensors whose memory a graph may be given."""
        check_tokens(self.spec, tokens, state)
        if state is None:
            return self.initial_state(tokens.shape[0])
        if self._last is not None and self._last[2] is state:
            return state
        named, shapes = state.named(), self.spec.state_shapes(tokens.shape[0])
        for name, shape in shapes.items():
            found = named.get(name)
            if found is None or found.shape != shape or found.dtype != state_dtype(name):
                what = "missing" if found is None else f"{tuple(found.shape)} {found.dtype}"
                raise SessionError(
                    f"state: {name} is {what}, this model's state has {shape} {state_dtype(name)}. "
                    "Begin with initial_state or import_state."
                )
            if not found.is_contiguous() or found.device != self.device:
                raise SessionError(f"state: {name} is not contiguous on {self.device}. Pass it through import_state.")
        return state

    def _run(self, tokens: Tensor, state: State[Tensor]) -> tuple[Tensor, State[Tensor]]:
        """One call of the graph: logits [B, T, V] fp32 and the new state."""
        if self._last is not None and self._last[2] is state:
            # The last call's state comes back, so nobody needs the one before: its tensors are written now.
            turns, turn = self._last[0], 1 - self._last[1]
        else:
            turns, turn = _Turns((state, self._unwritten(tokens.shape[0]))), 0
        call = turns.steps[turn] if tokens.shape[1] == 1 else None
        if call is None:
            call = self._call(tokens.shape, turns.states[turn], turns.states[1 - turn])
            if tokens.shape[1] == 1:
                turns.steps[turn] = call
        call.tokens.copy_(tokens)
        torch.add(state.position[:, None], call.offsets, out=call.positions)
        try:
            if self.device.type == "cuda":
                torch.cuda.current_stream(self.device).synchronize()
            self.session.run_with_iobinding(call.binding)
            call.binding.synchronize_outputs()
        except Exception as error:
            raise BackendError(f"ONNX Runtime failed: {_reason(error)}.") from None
        made = State(state.position + tokens.shape[1], turns.states[1 - turn].layers)
        self._last = turns, turn, made
        return call.logits, made

    def _call(self, shape: torch.Size, before: State[Tensor], after: State[Tensor]) -> _Call:
        """A call for tokens [B, T] that reads one state and writes another, all bound."""
        B, T = shape
        tokens, positions = (torch.zeros(shape, dtype=torch.int64, device=self.device) for _ in range(2))
        logits = torch.empty((B, T, self.spec.vocab_size), device=self.device)
        inputs, outputs = {TOKENS: tokens}, {LOGITS: logits}
        if has_positions(self.spec):
            inputs[POSITIONS] = positions
        past, present = before.named(), after.named()
        for name, (source, target) in state_names(self.spec).items():
            inputs[source], outputs[target] = past[name], present[name]
        binding = self.session.io_binding()
        where = (self.device.type, self.device.index or 0)
        for name, t in inputs.items():
            binding.bind_input(name, *where, ELEMENTS[t.dtype], tuple(t.shape), t.data_ptr())
        for name, t in outputs.items():
            binding.bind_output(name, *where, ELEMENTS[t.dtype], tuple(t.shape), t.data_ptr())
        return _Call(binding, tokens, positions, torch.arange(T, device=self.device), logits)

    def _unwritten(self, batch: int) -> State[Tensor]:
        shapes = self.spec.state_shapes(batch)
        new = {name: torch.empty(shape, dtype=state_dtype(name), device=self.device) for name, shape in shapes.items()}
        return state_from_named(self.spec, new)

    def _check_version(self, export: OnnxExport) -> None:
        found = tuple(int(part) for part in re.findall(r"\d+", onnxruntime.__version__)[:3])
        if found < OLDEST and not export.portable:
            raise BackendError(
                f"{export.path} needs ONNX Runtime {'.'.join(map(str, OLDEST))} or later, this is "
                f"{onnxruntime.__version__}. Install a newer one, or export the model with --portable."
            )

    def _check_signature(self) -> None:
        """Inputs and outputs are those of the spec; the sizes of batch and sequence are free."""
        shapes = self.spec.state_shapes()
        inputs: dict[str, tuple[int, ...]] = {TOKENS: ()}
        outputs: dict[str, tuple[int, ...]] = {LOGITS: (self.spec.vocab_size,)}
        if has_positions(self.spec):
            inputs[POSITIONS] = ()
        for name, (before, after) in state_names(self.spec).items():
            inputs[before] = outputs[after] = shapes[name][1:]
        for kind, expected, found in (
            ("inputs", inputs, self.session.get_inputs()),
            ("outputs", outputs, self.session.get_outputs()),
        ):
            # Of `input_ids` [batch, sequence] nothing is fixed, of `logits` only the vocabulary.
            free = {name: 2 if name in (TOKENS, POSITIONS, LOGITS) else 1 for name in expected}
            sizes = {one.name: tuple(one.shape[free.get(one.name, 0) :]) for one in found}
            types = {one.type for one in found if one.name not in (TOKENS, POSITIONS)}
            if sizes != expected or types - {"tensor(float)"}:
                raise CheckpointError(
                    f"{self.path}: the {kind} of {MODEL_FILE} are not those of the model that config.json describes. "
                    "Export it again."
                )

    def _describe(self) -> str:
        providers = ", ".join(self.providers)
        how = f"operator library {self.operators.name}" if self.operators else "stock operators"
        fallen = ""
        if self.providers[0] != CPU and (names := _on_cpu(self.session)):
            fallen = f", {len(names)} nodes on the CPU: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
        return f"ONNX Runtime {onnxruntime.__version__} ({providers}), {self.format} export, {how}{fallen}"


def load_onnx(folder: Path, device: str = "auto") -> OnnxModel:
    """Open the folder of an export.

    Args:
        device: "cpu", "cuda", "cuda:N", or "auto" (a GPU that ONNX Runtime can use, if there is one).
    Raises:
        CheckpointError, SpecError: the folder is damaged or no export of ours.
        BackendError: ONNX Runtime is too old, or the device is not there.
    """
    return OnnxModel(open_export(folder), device)


def _open_session(export: OnnxExport, device: str) -> tuple[onnxruntime.InferenceSession, Path | None]:
    """A session on the device, and the operator library it uses."""
    there = onnxruntime.get_available_providers()
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", device):
        raise BackendError(f"device {device!r} is unknown, expected auto, cpu, cuda or cuda:N.")
    if device.startswith("cuda") and CUDA not in there:
        raise BackendError(
            f"device {device!r} is not here: this ONNX Runtime has only {', '.join(there)}. Use --device cpu, or have "
            'NVIDIA\'s instead: pip uninstall onnxruntime, then pip install "gdn2-edge[onnx-gpu]".'
        )
    wanted = [CUDA] if device.startswith("cuda") else [one for one in (CUDA, DIRECTML) if one in there][:1]
    if device != "cpu" and wanted:
        session = _session(export, [(wanted[0], {"device_id": _index(device)}), CPU], None)
        if wanted[0] in session.get_providers():
            return session, None
        if device != "auto":
            raise BackendError(
                f"ONNX Runtime cannot use device {device!r}: CUDA or cuDNN is missing, or the GPU is. Use --device cpu."
            )
    library = find_op()  # one that was built on this machine for this version; never another
    return _session(export, [CPU], library), library


def _session(
    export: OnnxExport, providers: list[str | tuple[str, dict[str, int]]], library: Path | None
) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # what goes wrong is raised
    if export.format == "fp8":  # else its weights become fp32 anew in every call
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if providers[0] != CPU:
        options.add_session_config_entry(RECORD_NODES, "1")
        options.enable_mem_pattern = providers[0][0] != DIRECTML  # which asks for that
    if library is not None:
        try:
            options.register_custom_ops_library(str(library))
        except Exception as error:
            raise BackendError(
                f"{library}: ONNX Runtime cannot load this operator library ({_reason(error)}). "
                "Delete it, or build it again: gdn2-edge export onnx --build-op."
            ) from None
    try:
        return onnxruntime.InferenceSession(export.path / MODEL_FILE, options, providers=providers)
    except Exception as error:
        raise CheckpointError(
            f"{export.path / MODEL_FILE}: ONNX Runtime {onnxruntime.__version__} cannot load it ({_reason(error)}). "
            "Export it again."
        ) from None


def _index(device: str) -> int:
    """Of the GPU: 1 for cuda:1, else 0."""
    return int(device.partition(":")[2] or 0)


def _on_cpu(session: onnxruntime.InferenceSession) -> list[str]:
    """Types of the nodes that a session with another provider runs on the CPU; empty where it does not say."""
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return []
    parts = [part for part in session.get_provider_graph_assignment_info() if part.ep_name == CPU]
    return sorted(node.op_type for part in parts for node in part.get_nodes())


def _pieces(tokens: Tensor) -> tuple[Tensor, ...]:
    return tuple(tokens.split(max(1, PIECE_TOKENS // tokens.shape[0]), 1))


def _reason(error: Exception) -> str:
    """ONNX Runtime's own words, in a line."""
    return " ".join(str(error).split()).removesuffix(".")[:300]
