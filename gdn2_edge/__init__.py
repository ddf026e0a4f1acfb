"""gdn2-edge: quantize, run and chat with Gated DeltaNet-2 language models.

The names below are imported when they are first used, so that ``import gdn2_edge`` loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from gdn2_edge.convert import convert_checkpoint
    from gdn2_edge.errors import Gdn2EdgeError
    from gdn2_edge.generate.sampler import Sampler
    from gdn2_edge.generate.session import Session
    from gdn2_edge.loading import load
    from gdn2_edge.model import Model
    from gdn2_edge.quantize import quantize_checkpoint
    from gdn2_edge.quantize.recipe import Recipe
    from gdn2_edge.sampling import Sampling

_HOME = {
    "Gdn2EdgeError": "gdn2_edge.errors",
    "Model": "gdn2_edge.model",
    "Recipe": "gdn2_edge.quantize.recipe",
    "Sampler": "gdn2_edge.generate.sampler",
    "Sampling": "gdn2_edge.sampling",
    "Session": "gdn2_edge.generate.session",
    "convert_checkpoint": "gdn2_edge.convert",
    "load": "gdn2_edge.loading",
    "quantize_checkpoint": "gdn2_edge.quantize",
}

__all__ = [
    "Gdn2EdgeError",
    "Model",
    "Recipe",
    "Sampler",
    "Sampling",
    "Session",
    "__version__",
    "convert_checkpoint",
    "load",
    "quantize_checkpoint",
]


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
