"""GGUF: one file that a llama.cpp with architecture gdn2 runs (docs/gguf.md). Needs the extra `gdn2-edge[gguf]`.

gguf is imported here only, and nothing here runs a model.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from gdn2_edge.errors import BackendError

if TYPE_CHECKING:
    from gdn2_edge.export.gguf.exporter import Report


def export_gguf(*args: Any, **kwargs: Any) -> Report:
    """`export_checkpoint`, or a BackendError that says what to install."""
    if importlib.util.find_spec("gguf") is None:
        raise BackendError('the package gguf is not installed. Install it with: pip install "gdn2-edge[gguf]".')
    from gdn2_edge.export.gguf.exporter import export_checkpoint

    return export_checkpoint(*args, **kwargs)
