"""Products with the second matrices of gates against fp64 on the weights' own exact values."""

from __future__ import annotations

import pytest
import torch
from stored_weights import FORMATS, make_weight
from torch import Tensor

from gdn2_edge.kernels.triton.launch import gpu_of
from gdn2_edge.kernels.triton.low_rank import low_rank_pair
from gdn2_edge.weights import Weight

# Sums of at most 256 products, cut to 24 bits in tensor cores, as a share of the sum of their sizes.
TOLERANCE = 3e-6


def check(f: Weight, g: Weight, rows: int, dtype: torch.dtype, device: torch.device) -> None:
    """Inputs lie within larger rows, as they do in a model; every result is written."""
    ranks = f.shape[1], g.shape[1]
    x = torch.randn(rows, 8 + sum(ranks), generator=torch.Generator().manual_seed(1)).to(device, dtype)[:, 8:]
    y_f, y_g = (torch.full((rows, weight.shape[0]), torch.nan, device=device) for weight in (f, g))
    low_rank_pair(x, f, g, y_f, y_g, pdl=gpu_of(device).pdl)

    def near(y: Tensor, weight: Weight, inputs: Tensor) -> bool:
        inputs, values = inputs.double(), weight.rows(slice(None)).double().t()
        return bool(((y - inputs @ values).abs() <= TOLERANCE * (inputs.abs() @ values.abs())).all())

    assert near(y_f, f, x[:, : ranks[0]])
    assert near(y_g, g, x[:, ranks[0] :])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", FORMATS)
def test_every_format(format: str, dtype: torch.dtype, device: torch.device) -> None:
    check(make_weight(format, 24, 128, device), make_weight(format, 16, 128, device, seed=2), 5, dtype, device)


@pytest.mark.parametrize(
    ("rows", "f_format", "f_shape", "g_format", "g_shape"),
    [
        (37, "int8", (100, 24), "int4 g32", (130, 64)),
        (17, "int4 g32", (64, 96), "fp32", (200, 40)),
        (1, "bf16", (8, 8), "fp8", (8, 16)),
        (3, "int4 g64", (72, 256), "bf16", (40, 248)),
    ],
)
def test_shapes(
    rows: int, f_format: str, f_shape: tuple[int, int], g_format: str, g_shape: tuple[int, int], device: torch.device
) -> None:
    """Several programs along every side, matrices of different sizes and formats, inputs taken in parts."""
    f, g = make_weight(f_format, *f_shape, device), make_weight(g_format, *g_shape, device, seed=2)
    check(f, g, rows, torch.float32, device)
