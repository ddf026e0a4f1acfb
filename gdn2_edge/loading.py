"""`load`: from a path or a name to a runtime that is ready."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from gdn2_edge.checkpoint.gguf_file import is_gguf
from gdn2_edge.checkpoint.onnx_file import is_export
from gdn2_edge.errors import BackendError, CheckpointError
from gdn2_edge.model import Model, WeightSource, load_model
from gdn2_edge.runtime import Runtime
from gdn2_edge.weights import Fp8

MODEL_NAMES = {"tiny": Path(__file__).parent / "assets" / "tiny"}
RUNTIMES = ("auto", "torch", "triton", "onnx", "llama-cpp")
# What `load` takes as dtype, by the names of the command line.
ACTIVATIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.float8_e4m3fn}


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
        source: a checkpoint folder, the folder of an ONNX export, a GGUF file, "tiny" for the model that comes with
            the package, or a `WeightSource`.
        device: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N".
        dtype: of the activations; None is fp32 on a CPU and bf16 on a GPU. torch.float8_e4m3fn: bf16, rounded to fp8
            for the products of long prompts with fp8 weights, on a GPU. An ONNX export has its own.
        runtime: "torch" computes with torch alone; "triton" decodes in fused kernels, on a GPU; "onnx" is for ONNX
            exports and "llama-cpp" for GGUF files; "auto" is these for those, and else triton where it can be, torch
            otherwise.
    Returns:
        The runtime: a `Model`, for triton a `TritonModel`, for exports an `OnnxModel` or a `LlamaCppModel`.
    Raises:
        CheckpointError, SpecError: the checkpoint cannot be read or does not fit together.
        BackendError: the device or the runtime is not there.
    """
    if runtime not in RUNTIMES:
        raise BackendError(f"runtime {runtime!r} is unknown, expected one of {', '.join(RUNTIMES)}.")
    if isinstance(source, (str, Path)):
        source = model_path(source)
    if runtime == "llama-cpp" or (isinstance(source, Path) and source.is_file()):
        return _gguf(source, device, dtype, runtime)
    if runtime == "onnx" or (isinstance(source, Path) and is_export(source)):
        return _exported(source, device, dtype, runtime)
    fp8_products = dtype == torch.float8_e4m3fn
    if fp8_products and runtime == "torch":
        raise BackendError("fp8 activations are for the triton runtime. Leave out the dtype, or the runtime.")
    model = load_model(source, device, torch.bfloat16 if fp8_products else dtype)
    if runtime == "torch" or (runtime == "auto" and model.device.type == "cpu" and not fp8_products):
        return model
    return _fused(model, runtime == "triton" or fp8_products, fp8_products)


def _gguf(source: Path | WeightSource, device: str, dtype: torch.dtype | None, runtime: str) -> Runtime:
    """The runtime of a GGUF file."""
    if not isinstance(source, Path) or not is_gguf(source):
        what = source if isinstance(source, Path) else source.path
        raise BackendError(
            f"{what} is no GGUF file. First make one: gdn2-edge export gguf FOLDER --type q8_0 --out FILE."
        )
    if runtime not in ("auto", "llama-cpp"):
        raise BackendError(f"{source} is a GGUF file, which the {runtime} runtime cannot run. Leave out --runtime.")
    if dtype is not None:
        raise BackendError(f"{source} is a GGUF file: the dtype was chosen with its --type. Leave out --dtype.")
    if importlib.util.find_spec("llama_cpp") is None:
        raise BackendError(
            "the package llama_cpp is not installed. The one that knows GDN-2 is made by: gdn2-edge llama-cpp build."
        )
    from gdn2_edge.runtimes.llama_cpp import load_llama_cpp

    return load_llama_cpp(source, device)


def _exported(source: Path | WeightSource, device: str, dtype: torch.dtype | None, runtime: str) -> Runtime:
    """The runtime of an ONNX export."""
    if not isinstance(source, Path) or not is_export(source):
        what = source if isinstance(source, Path) else source.path
        raise BackendError(f"{what} is no ONNX export. First make one: gdn2-edge export onnx {what} --out DIR.")
    if runtime not in ("auto", "onnx"):
        raise BackendError(f"{source} is an ONNX export, which the {runtime} runtime cannot run. Leave out --runtime.")
    if dtype is not None:
        raise BackendError(f"{source} is an ONNX export: the dtype was chosen with its --format. Leave out --dtype.")
    if importlib.util.find_spec("onnxruntime") is None:
        raise BackendError(
            'the package onnxruntime is not installed. Install it with: pip install "gdn2-edge[onnx]" (or '
            '"gdn2-edge[onnx-gpu]" for an NVIDIA GPU; one of the two, never both).'
        )
    from gdn2_edge.runtimes.onnx import load_onnx

    return load_onnx(source, device)


def _fused(model: Model, required: bool, fp8_products: bool) -> Model:
    """The model with fused kernels; where that cannot be and is not required, as it is, with a name that says why."""
    why = "" if model.device.type == "cuda" else f"it needs a GPU, and the device is {model.device}"
    if not why and model.device.index not in (None, torch.cuda.current_device()):
        why = "it runs on the first GPU that the process sees (CUDA_VISIBLE_DEVICES chooses which)"
    if not why and torch.version.hip is None and torch.cuda.get_device_capability(model.device) < (8, 0):
        why = "the GPU is older than compute capability 8.0"
    if not why and fp8_products:
        why = _no_fp8_products(model)
    if not why and importlib.util.find_spec("triton") is None:
        why = "the package triton is not installed (pip install triton)"
    if not why:
        # Only here: triton is a package of Linux GPUs, and takes a second to import.
        from gdn2_edge.triton_model import TritonModel, cannot_run, unsupported

        why = unsupported(model.spec, model.weights) or cannot_run(model.device)
        if not why:
            return TritonModel(
                model.spec, model.weights, model.device, model.ops.dtype, model.fingerprint, model.path, fp8_products
            )
    if required:
        raise BackendError(
            f"The triton runtime cannot run this: {why}. Use {'another dtype' if fp8_products else '--runtime torch'}."
        )
    model.name += f", without fused kernels: {why}"
    return model


def _no_fp8_products(model: Model) -> str:
    """Why activations cannot be fp8, in words; empty if they can."""
    if not any(isinstance(layer.mlp.w12, Fp8) for layer in model.weights.layers):
        return "fp8 activations meet fp8 weights, and this model has none (gdn2-edge quantize --format fp8)"
    if torch.version.hip is not None or torch.cuda.get_device_capability(model.device) < (8, 9):
        return "the GPU does not multiply fp8 (NVIDIA's from compute capability 8.9 on do)"
    return ""
