"""Products with the second matrices of gates against fp64 on the weights' own exact values."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from stored_weights import FORMATS, make_weight

from gdn2_edge.kernels.triton.low_rank import LowRank, load_low_rank, low_rank

# Sums of at most 128 products, cut to 24 bits in tensor cores, as a share of the sum of their sizes.
TOLERANCE = 3e-6


@triton.jit
def product_kernel(
    p_x,
    p_weight,
    p_scale,
    p_out,
    M,
    x_stride,
    N: tl.constexpr,
    N_2: tl.constexpr,
    RANK: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT_X: tl.constexpr,
    IEEE: tl.constexpr,
    PTX: tl.constexpr,
):
    o_n, o_m = tl.arange(0, N_2), tl.arange(0, 16)
    w = load_low_rank(p_weight, p_scale, o_n, o_n < N, RANK, FORMAT, GROUP)
    y = low_rank(w, p_x + o_m * x_stride, o_m < M, RANK, FORMAT, GROUP, SPLIT_X, IEEE, PTX)
    tl.store(p_out + o_m[None, :] * N + o_n[:, None], y, (o_m < M)[None, :] & (o_n < N)[:, None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("M", "N", "rank"), [(1, 16, 8), (5, 24, 32), (16, 40, 96), (16, 128, 128)])
def test_against_fp64(M: int, N: int, rank: int, format: str, dtype: torch.dtype, device: torch.device) -> None:
    if format.startswith("int4") and rank % int(format.rpartition("g")[2]):
        pytest.skip("the group does not divide a row")
    weight = make_weight(format, N, rank, device)
    x = torch.randn(M, rank + 8, generator=torch.Generator().manual_seed(1)).to(device, dtype)[:, 8:]
    out = torch.full((M, N), torch.nan, device=device)
    given = LowRank.of(weight, x)
    product_kernel[(1,)](
        *(x, given.p_weight, given.p_scale, out, M, x.stride(0)),
        **{"N": N, "N_2": triton.next_power_of_2(N)},
        **given.constants(""),
    )
    x, values = x.double(), weight.rows(slice(None)).double().t()
    assert ((out - x @ values).abs() <= TOLERANCE * (x.abs() @ values.abs())).all()
