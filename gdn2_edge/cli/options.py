"""Options that several commands have, word for word."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch

Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[
    str | None, typer.Option(help="Activations: fp32, bf16, fp16 or fp8; by default what suits the device.")
]
RuntimeName = Annotated[
    str, typer.Option(help="auto, torch, triton (fused kernels, on a GPU), onnx or llama-cpp (exports).")
]


def activations(dtype: str | None) -> torch.dtype | None:
    """The dtype that --dtype names, None where it was left out; BadParameter for any other word."""
    from gdn2_edge.loading import ACTIVATIONS

    if dtype is not None and dtype not in ACTIVATIONS:
        raise typer.BadParameter(f"--dtype is {dtype!r}, expected one of {', '.join(ACTIVATIONS)}.")
    return None if dtype is None else ACTIVATIONS[dtype]
