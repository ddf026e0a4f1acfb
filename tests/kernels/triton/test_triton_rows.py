"""What stands between the products of a step, against torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton
from stored_weights import FORMATS, make_weight
from torch import Tensor

from gdn2_edge.kernels.triton import rows
from gdn2_edge.kernels.triton.activation import make_activation
from gdn2_edge.kernels.triton.launch import gpu_of, pdl_options
from gdn2_edge.kernels.triton.stored import stored

EPS = 1e-5
TOLERANCE = 1e-6  # a few fp32 operations on values of size 1; relative, sums of at most 352 squares included
PLANE_TOLERANCE = 2**-15  # of the largest of 8 neighbours: 16-bit fixed point
BF16_TOLERANCE = 2**-7  # one rounding, to nearest on a GPU, towards zero in the interpreter
pytestmark = pytest.mark.filterwarnings("ignore:.*(overflow|invalid value) encountered:RuntimeWarning")  # numpy's


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def nans(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, torch.nan, device=device, dtype=dtype)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, device: torch.device, **constants: Any) -> None:
    pdl = gpu_of(device).pdl and kernel is not rows.embed_kernel
    kernel[grid](*args, **constants, PDL=pdl, **pdl_options(pdl))


def embed(
    format: str, channels: int, tokens: list[int], values: int, planes: bool, hardware_fp8: bool, device: torch.device
) -> None:
    weight, gain, B = make_weight(format, 11, channels, device), normal(channels), len(tokens)
    name, codes, scale, group = stored(weight)
    block = 128
    parts = triton.cdiv(channels, block)
    x = nans(B, channels, device=device)
    out = make_activation(channels * B, (B, parts), device)
    for buffer in (out.values, out.unit, out.squares):
        buffer.fill_(torch.nan)
    launch(
        rows.embed_kernel, (parts, B), torch.tensor(tokens, device=device), codes, scale, gain.to(device),
        x, out.values, out.high, out.low, out.unit, out.squares, device=device,
        D=channels, BLOCK=block, FORMAT=name, GROUP=group, VALUES=values, PLANES=planes, HARDWARE_FP8=hardware_fp8,
    )  # fmt: skip
    expected = weight.rows(torch.tensor(tokens, device=device))
    assert torch.equal(x, expected)
    gained = (expected.cpu() * gain).double()
    if values:
        found = out.values.view(B, values, -1).mT.flatten(1).cpu().double()
        torch.testing.assert_close(found, gained, rtol=TOLERANCE, atol=0)
    if planes:
        found = (out.high.double() * 256 + out.low.double()).view(-1, 8).cpu() * out.unit.double().cpu()[:, None]
        largest = gained.view(-1, 8).abs().amax(1, keepdim=True)
        assert ((found - gained.view(-1, 8)).abs() <= PLANE_TOLERANCE * largest).all()
    torch.testing.assert_close(out.squares.sum(1), expected.square().sum(1), rtol=1e-5, atol=0)
    assert values or out.values.isnan().all()
    assert planes or out.unit.isnan().all()


@pytest.mark.parametrize("format", FORMATS)
def test_embedding_of_one_sequence(format: str, device: torch.device) -> None:
    channels = 384 if format == "int4 g128" else 320
    ways = {False, gpu_of(device).hardware_fp8} if format == "fp8" else {False}
    for hardware in ways:
        embed(format, channels, [7], 1, True, hardware, device)
    embed(format, 128, [0], 4, False, False, device)
    embed(format, 128, [10], 0, True, False, device)


@pytest.mark.parametrize("format", ["bf16", "int8"])
def test_embeddings_of_many(format: str, device: torch.device) -> None:
    embed(format, 256, [10, 0, 3, 3, 7], 1, False, False, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [8, 96, 352])
def test_norm_of_rows(channels: int, dtype: torch.dtype, device: torch.device) -> None:
    x, gain = normal(3, channels) * torch.tensor([[1.0], [1e-4], [0.0]]), normal(channels)
    out = nans(3, channels, device=device, dtype=dtype)
    D_2 = triton.next_power_of_2(channels)
    launch(rows.rms_rows_kernel, (3,), x.to(device), gain.to(device), out, EPS, device=device, D=channels, D_2=D_2)
    expected = F.rms_norm(x.double(), (channels,), gain.double(), EPS)
    rtol = TOLERANCE if dtype == torch.float32 else BF16_TOLERANCE
    torch.testing.assert_close(out.cpu().double(), expected, rtol=rtol, atol=0)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(("heads", "head", "parts"), [(3, 24, 3), (1, 40, 1), (2, 64, 2)])
def test_norm_of_heads(heads: int, head: int, parts: int, norm: bool, device: torch.device) -> None:
    values, squares = normal(2, heads, head), normal(2, heads, parts).abs()
    values[1, 0, 3] = torch.nan  # stays in its place
    out = nans(2, heads, head, device=device)
    launch(
        rows.head_rows_kernel, (heads, 2), values.to(device), squares.to(device), out, EPS, device=device,
        HEADS=heads, HEAD=head, HEAD_2=triton.next_power_of_2(head), PARTS=parts, NORM=norm,
    )  # fmt: skip
    factor = torch.rsqrt(squares.double().sum(2, keepdim=True) / head + EPS) if norm else 1.0
    expected = values.double() * factor
    torch.testing.assert_close(out.cpu().double(), expected, rtol=TOLERANCE, atol=0, equal_nan=True)


@pytest.mark.parametrize("channels", [8, 96, 352])
def test_glu_of_rows(channels: int, device: torch.device) -> None:
    y = normal(3, 2 * channels)
    y[0, 0], y[0, 1], y[1, 2], y[2, channels + 5] = 200.0, -200.0, torch.nan, torch.nan
    out = nans(3, channels, device=device)
    launch(rows.glu_rows_kernel, (3, triton.cdiv(channels, 64)), y.to(device), out, device=device, F=channels, BLOCK=64)
    first, second = y.double().chunk(2, 1)
    # Of the size of the factors: the exponential of 4 has lost two bits of a factor of 4.
    torch.testing.assert_close(
        out.cpu().double(), F.silu(first) * second, rtol=4 * TOLERANCE, atol=1e-9, equal_nan=True
    )


@pytest.mark.parametrize("channels", [16, 96, 352])
def test_rows_in_fp8(channels: int, device: torch.device) -> None:
    if device.type == "cuda" and not gpu_of(device).hardware_fp8:
        pytest.skip("this GPU converts no fp8")
    x = normal(4, channels) * torch.tensor([[1.0], [1e-6], [3e4], [0.0]])
    out, scale = torch.empty(4, channels, dtype=torch.float8_e4m3fn, device=device), nans(4, device=device)
    D_2 = triton.next_power_of_2(channels)
    launch(rows.fp8_rows_kernel, (4,), x.to(device), out, scale, device=device, D=channels, D_2=D_2)
    values, scale = out.cpu().float(), scale.cpu()[:, None]
    assert values.abs().amax(1).tolist() == [448.0, 448.0, 448.0, 0.0]
    if device.type == "cuda":  # the interpreter loses what is carried into the exponent
        # Half a step of 3 bits, and of the subnormal ones.
        step = torch.maximum(x.abs() * 2.0**-3, scale * 2.0**-9)
        assert ((values * scale - x).abs() <= 0.5 * step * 1.001).all()
    x[1, 3] = torch.nan
    launch(
        rows.fp8_rows_kernel,
        (4,),
        x.to(device),
        out,
        scale := nans(4, device=device),
        device=device,
        D=channels,
        D_2=D_2,
    )
    assert scale.isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_advance(batch: int, device: torch.device) -> None:
    """Positions grow, and three places of a state change their roles; what stands after them stays."""
    random = torch.Generator().manual_seed(batch)
    tables = torch.randint(0, 2**40, (4, batch + 2), generator=random)
    position, source, target, spare = (row.to(device, copy=True) for row in tables)
    launch(rows.advance_kernel, (batch,), position, source, target, spare, device=device)
    expected = tables.clone()
    expected[0, :batch] += 1
    expected[1:, :batch] = tables[[2, 3, 1], :batch]
    assert torch.equal(torch.stack([position, source, target, spare]).cpu(), expected)
