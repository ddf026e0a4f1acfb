"""An exported folder run by ONNX Runtime, as plainly as possible."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from gdn2_edge.onnx_names import LOGITS, MODEL_FILE, POSITIONS, TOKENS, has_positions, state_names
from gdn2_edge.spec import ModelSpec
from gdn2_edge.state import State, initial_state


class Exported:
    """The model of a folder, one thread."""

    def __init__(self, folder: Path, spec: ModelSpec, optimized: bool = True) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        if not optimized:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        self.spec = spec
        self.session = onnxruntime.InferenceSession(folder / MODEL_FILE, options, providers=["CPUExecutionProvider"])

    def run(self, ids: Tensor, state: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits of tokens [B, T], and the state by torch's names."""
        B, T = ids.shape
        state = dict(initial_state(self.spec, B).named()) if state is None else state
        names = state_names(self.spec)
        feeds = {TOKENS: ids.numpy()} | {past: state[name].numpy() for name, (past, _) in names.items()}
        if has_positions(self.spec):
            feeds[POSITIONS] = (state["position"][:, None] + torch.arange(T)).numpy()
        outputs = [LOGITS, *(present for _, present in names.values())]
        logits, *states = self.session.run(outputs, feeds)
        after = {name: _tensor(value) for name, value in zip(names, states, strict=True)}
        return _tensor(logits), {**after, "position": state["position"] + T}

    def run_split(self, ids: Tensor, cuts: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """The same in pieces."""
        state, logits = None, []
        for start, end in pairwise(cuts):
            piece, state = self.run(ids[:, start:end], state)
            logits.append(piece)
        assert state is not None
        return torch.cat(logits, 1), state


def _tensor(value: object) -> Tensor:
    return torch.from_numpy(np.asarray(value).copy())


def largest_differences(
    found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, State[Tensor]]
) -> dict[str, float]:
    """For logits and every state: the largest difference over the expected standard deviation."""
    pairs = {"logits": (found[0], expected[0])}
    pairs |= {name: (found[1][name], value) for name, value in expected[1].named().items() if name != "position"}
    return {name: float((a - b).abs().max() / b.std()) for name, (a, b) in pairs.items()}
