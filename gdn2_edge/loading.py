"""`load`: from a path or a name to a runtime that is ready."""

from __future__ import annotations

from pathlib import Path

import torch

from gdn2_edge.errors import BackendError, CheckpointError
from gdn2_edge.model import WeightSource, load_model
from gdn2_edge.runtime import Runtime

MODEL_NAMES = {"tiny": Path(__file__).parent / "assets" / "tiny"}
RUNTIMES = ("auto", "torch")


def model_path(path_or_name: str | Path) -> Path:
    """The folder of a named model, or the path itself. A folder called like a model is ``./tiny``."""
    if isinstance(path_or_name, str) and path_or_name in MODEL_NAMES:
        return MODEL_NAMES[path_or_name]
    path = Path(path_or_name)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder, and no model has this name ({', '.join(MODEL_NAMES)}).")
    return path


def load(
    source: str | Path | WeightSource,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    runtime: str = "auto",
) -> Runtime:
    """Load a model.

    Args:
        source: a checkpoint folder, "tiny" for the model that comes with the package, or a `WeightSource`.
        device: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N".
        dtype: of the activations; None is fp32 on a CPU and bf16 on a GPU.
        runtime: "auto" or "torch".
    Returns:
        The runtime; for torch a `Model`.
    Raises:
        CheckpointError, SpecError: the checkpoint cannot be read or does not fit together.
        BackendError: the device or the runtime is not there.
    """
    if runtime not in RUNTIMES:
        raise BackendError(f"runtime {runtime!r} is unknown, expected one of {', '.join(RUNTIMES)}.")
    if isinstance(source, (str, Path)):
        source = model_path(source)
    return load_model(source, device, dtype)
