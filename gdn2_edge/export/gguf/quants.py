"""ggml's types: which one a tensor takes under `--type`, and fp32 rows as its bytes."""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf import LlamaFileType as FileType
from torch import Tensor

from gdn2_edge.errors import BackendError, CheckpointError, FormatError
from gdn2_edge.gguf_names import Entry

HALF_MAX = 65504.0  # fp16, also of the scales of the quantized types


@dataclass(frozen=True)
class Mix:
    """What `--type` means: the type of most matrices, of the two ends of the model, and of its low-rank gates.

    The ends and the gates lose most by few bits and weigh little, as in our own recipe for int4.
    """

    file_type: FileType
    matrices: Type
    ends: Type
    gates: Type


MIXES = {
    "f32": Mix(FileType.ALL_F32, Type.F32, Type.F32, Type.F32),
    "f16": Mix(FileType.MOSTLY_F16, Type.F16, Type.F16, Type.F16),
    "bf16": Mix(FileType.MOSTLY_BF16, Type.BF16, Type.BF16, Type.BF16),
    "q8_0": Mix(FileType.MOSTLY_Q8_0, Type.Q8_0, Type.Q8_0, Type.Q8_0),
    "q5_0": Mix(FileType.MOSTLY_Q5_0, Type.Q5_0, Type.Q8_0, Type.Q8_0),
    "q4_0": Mix(FileType.MOSTLY_Q4_0, Type.Q4_0, Type.Q8_0, Type.Q8_0),
    "q4_k_m": Mix(FileType.MOSTLY_Q4_K_M, Type.Q4_K, Type.Q6_K, Type.Q8_0),
}
# A row that 256 does not divide, then one that 32 does not divide, as llama.cpp's own quantizer has it.
FALLBACKS = {Type.Q4_K: Type.Q5_0, Type.Q6_K: Type.Q8_0, Type.Q5_0: Type.F16, Type.Q4_0: Type.F16, Type.Q8_0: Type.F16}
K_TYPES = (Type.Q4_K, Type.Q6_K)


def mix_of(type: str) -> Mix:
    """Raises FormatError where there is no such type."""
    if type not in MIXES:
        raise FormatError(f"type {type!r} is unknown, expected one of {', '.join(MIXES)}.")
    return MIXES[type]


def type_of(entry: Entry, mix: Mix) -> tuple[Type, str]:
    """The type of one tensor, and why it is not the mix's, or an empty string."""
    if not entry.is_matrix:
        return Type.F32, ""
    if entry.name in ("token_embd.weight", "output.weight"):
        wanted = mix.ends
    else:
        wanted = mix.gates if ".ssm_f_" in entry.name or ".ssm_g_" in entry.name else mix.matrices
    found = wanted
    while entry.shape[1] % gguf.GGML_QUANT_SIZES[found][0]:
        found = FALLBACKS[found]
    if found is wanted:
        return found, ""
    return found, f"{found.name}: {gguf.GGML_QUANT_SIZES[wanted][0]} does not divide {entry.shape[1]}"


def num_bytes(shape: tuple[int, ...], type: Type) -> int:
    """Bytes of a tensor."""
    block, size = gguf.GGML_QUANT_SIZES[type]
    return prod(shape) // int(block) * int(size)


def encode(rows: Tensor, type: Type, name: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The bytes of fp32 rows [..., n].

    Raises:
        CheckpointError: a value that the type cannot hold.
        BackendError: see `k_quantizer`.
    """
    low, high = (float(end) for end in torch.aminmax(rows))
    limit = HALF_MAX if type not in (Type.F32, Type.BF16) else float("inf")
    if not (-limit <= low and high <= limit and abs(low) < float("inf") and abs(high) < float("inf")):
        raise CheckpointError(f"{name} holds values from {low:g} to {high:g}, which {type.name} cannot.")
    if type in (Type.F16, Type.BF16):
        half = rows.to(torch.float16 if type is Type.F16 else torch.bfloat16)
        return half.contiguous().view(torch.uint8).numpy().reshape(-1)
    values = rows.contiguous().numpy()
    if type in K_TYPES:
        return k_quantizer()(values, type)
    made: np.ndarray[Any, Any] = gguf.quants.quantize(values, type)
    return made.view(np.uint8).reshape(-1)


Quantizer = Callable[["np.ndarray[Any, Any]", Type], "np.ndarray[Any, np.dtype[np.uint8]]"]


@functools.cache
def k_quantizer() -> Quantizer:
    """llama.cpp's own quantizer, out of an installed llama_cpp: gguf has none for these types.

    Raises:
        BackendError: there is no llama_cpp, or not such a one.
    """
    try:
        folder = importlib.import_module("llama_cpp._ggml").libggml_base_path
        load = importlib.import_module("llama_cpp._ctypes_extensions").load_shared_library
        chunk = load("ggml-base", folder).ggml_quantize_chunk
    except (ImportError, OSError, AttributeError, RuntimeError) as error:
        found = "is not installed" if isinstance(error, ModuleNotFoundError) else "does not have it"
        raise BackendError(
            f"K-quants are made by ggml_quantize_chunk of the package llama_cpp, which {found}. "
            "Make one with `gdn2-edge llama-cpp build`, or choose --type q4_0, q5_0 or q8_0."
        ) from None
    threads = ThreadPoolExecutor()
    chunk.restype = ctypes.c_size_t
    chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]

    def quantize(values: np.ndarray[Any, Any], type: Type) -> np.ndarray[Any, np.dtype[np.uint8]]:
        rows, columns = values.shape
        out = np.empty(num_bytes(values.shape, type), np.uint8)
        step = -(-rows // (os.cpu_count() or 1))

        def make(first: int) -> int:
            count = min(step, rows - first)
            made: int = chunk(int(type), values.ctypes.data, out.ctypes.data, first * columns, count, columns, None)
            return made

        made = sum(threads.map(make, range(0, rows, step)))
        if made != out.nbytes:
            raise BackendError(f"ggml_quantize_chunk made {made} bytes of {type.name}, expected {out.nbytes}.")
        return out

    return quantize
