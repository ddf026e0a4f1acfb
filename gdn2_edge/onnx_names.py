"""What the inputs and outputs of an exported ONNX model are called. Needs neither onnx nor a runtime.

The names are those that transformers.js and onnxruntime-genai take; layers without a state of a kind are left out of
its numbering, not renumbered.
"""

from __future__ import annotations

from gdn2_edge.spec import ModelSpec

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
EXPORT_FORMATS = ("fp32", "fp16", "int8", "int4", "fp8")
TOKENS, POSITIONS, LOGITS = "input_ids", "position_ids", "logits"


def has_positions(spec: ModelSpec) -> bool:
    """Whether the graph asks for `position_ids`: only attention looks at them."""
    return "sliding_attention" in spec.layer_types


def state_names(spec: ModelSpec) -> dict[str, tuple[str, str]]:
    """Name of a state tensor (see `ModelSpec.state_shapes`, without `position`) -> its input and its output."""
    names = {}
    for i, kind in enumerate(spec.layer_types):
        if kind == "gdn2":
            names[f"layers.{i}.conv"] = (f"past_conv.{i}", f"present_conv.{i}")
            names[f"layers.{i}.S"] = (f"past_recurrent.{i}", f"present_recurrent.{i}")
        else:
            names[f"layers.{i}.ring_k"] = (f"past_key_values.{i}.key", f"present.{i}.key")
            names[f"layers.{i}.ring_v"] = (f"past_key_values.{i}.value", f"present.{i}.value")
    return names
