"""ONNX: a model that ONNX Runtime runs anywhere, states in and out. Needs the extra `gdn2-edge[onnx]`.

onnx is imported here only, and nothing here runs a model.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from gdn2_edge.errors import BackendError

if TYPE_CHECKING:
    from gdn2_edge.export.onnx.exporter import Report


def export_onnx(*args: Any, **kwargs: Any) -> Report:
    """`export_checkpoint`, or a BackendError that says what to install."""
    if importlib.util.find_spec("onnx") is None:
        raise BackendError('the package onnx is not installed. Install it with: pip install "gdn2-edge[onnx]".')
    from gdn2_edge.export.onnx.exporter import export_checkpoint

    return export_checkpoint(*args, **kwargs)
