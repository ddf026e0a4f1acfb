"""Products of many rows and whole expanded weights against fp64 on the weights' own exact values."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from gdn2_edge.errors import BackendError
from gdn2_edge.kernels.torch_private import Int8Packed
from gdn2_edge.kernels.triton.expand import expand
from gdn2_edge.kernels.triton.gemm import Next, Norm, Scratch, num_tiles, product, product_scratch
from gdn2_edge.quantize.fp8 import encode_fp8
from gdn2_edge.quantize.int4 import encode_int4
from gdn2_edge.quantize.int8 import encode_int8
from gdn2_edge.weights import Dense, Fp8, Int4, Int8, Joined, Weight

LAYOUTS = ["bf16", "fp16", "fp32", "int8", "fp8", "int4 of 32", "int4 of 64", "int4 of 128"]
CODED = LAYOUTS[3:]
# Errors are measured against sum |x w|. Tensor cores cut fp32 sums to 24 bits, once for 8 terms at the least; the parts
# of a split sum and its scales are a few roundings more.
CUT = 2**-23
# One term alone: the three bf16 parts of x are added with a cut each, and the scale rounds once.
ONE_TERM = 4 * CUT
# The interpreter cuts fp32 to bf16, where a GPU rounds to nearest.
BF16_STORE = 2**-7 if not torch.cuda.is_available() else 2**-8


def error_limit(K: int) -> float:
    return (K / 8 + 10) * CUT


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@cache
def make(layout: str, N: int, K: int) -> Weight:
    values = randn(N, K, seed=N + K) * randn(N, 1, seed=1).exp()  # rows of different sizes
    if layout.startswith("int4"):
        return encode_int4("w", values, int(layout.split()[-1]))
    if layout in ("int8", "fp8"):
        return (encode_int8 if layout == "int8" else encode_fp8)("w", values)
    return Dense("w", values.to({"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[layout]))


def to(weight: Weight, device: torch.device) -> Weight:
    match weight:
        case Joined(name, parts):
            return Joined(name, tuple(to(part, device) for part in parts))
        case Dense(name, data):
            return Dense(name, data.to(device))
        case Int8(name, data, scale) | Fp8(name, data, scale) | Int4(name, data, scale):
            return type(weight)(name, data.to(device), scale.to(device))
    raise AssertionError


def nan(M: int, N: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full((M, N), torch.nan, dtype=dtype, device=device)


def check(x: Tensor, weight: Weight, device: torch.device, scratch: Scratch | None = None) -> None:
    """Every element is written and as near to the exact product as fp32 sums can be."""
    out = nan(x.shape[0], weight.shape[0], device)
    product(x.to(device), to(weight, device), out, scratch=scratch)
    x, values = x.double(), weight.rows(slice(None)).double().t()
    error = (out.cpu().double() - x @ values).abs()
    limit = error_limit(x.shape[1]) * (x.abs() @ values.abs())
    assert (error <= limit).all(), f"{(error / limit).max():.3g} times what is allowed"


@pytest.fixture(scope="module")
def scratch(device: torch.device) -> Scratch:
    return product_scratch(device)  # NaN before it is used, see tests/conftest.py


@pytest.mark.parametrize("layout", ["bf16", "int8", "fp8", "int4 of 64"])
@pytest.mark.parametrize("M", [1, 2, 15, 16, 17, 65])
def test_product_rows(layout: str, M: int, device: torch.device) -> None:
    check(randn(M, 384, seed=2).bfloat16(), make(layout, 70, 384), device)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("K", [64, 136, 2304])
def test_product_columns(layout: str, K: int, device: torch.device, scratch: Scratch) -> None:
    """Long rows are split; the counters are left as they were found."""
    if layout.startswith("int4") and K % int(layout.split()[-1]):
        pytest.skip("the group does not divide a row")
    check(randn(3, K, seed=3).bfloat16(), make(layout, 33, K), device, scratch)
    assert not scratch.counts.any()
    assert K < 2304 or not scratch.partials[0].isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_product_of_other_types(layout: str, dtype: torch.dtype, device: torch.device, scratch: Scratch) -> None:
    check(randn(5, 384, seed=4).to(dtype), make(layout, 70, 384), device, scratch)


@pytest.mark.parametrize("layout", ["bf16", *CODED])
def test_float32_is_not_rounded(layout: str, device: torch.device) -> None:
    """Rows of x with a single value: no sum hides what is lost of it."""
    x = torch.zeros(16, 128)
    x[torch.arange(16), torch.arange(16) * 7] = randn(16, seed=5)
    weight = make(layout, 64, 128)
    out = nan(16, 64, device)
    product(x.to(device), to(weight, device), out)
    exact = x.double() @ weight.rows(slice(None)).double().t()
    assert ((out.cpu().double() - exact).abs() <= ONE_TERM * exact.abs()).all()


def test_large_products(device: torch.device) -> None:
    """More rows than the largest bucket, and more tiles than a split would allow."""
    check(randn(200, 64, seed=6).bfloat16(), make("int8", 300, 64), device)


def test_joined_with_residual(device: torch.device, scratch: Scratch) -> None:
    parts = [make("int8", 40, 384), make("bf16", 7, 384), make("int4 of 64", 65, 384), make("fp8", 1, 384)]
    weight, x = Joined("w", tuple(parts)), randn(4, 384, seed=7).bfloat16()
    plain, both = nan(4, 113, device), nan(4, 113, device)
    residual = randn(4, 113, seed=8).to(device)
    product(x.to(device), to(weight, device), plain, scratch=scratch)
    product(x.to(device), to(weight, device), both, residual=residual, scratch=scratch)
    alone = nan(4, 65, device)
    product(x.to(device), to(parts[2], device), alone, scratch=scratch)
    assert torch.equal(plain[:, 47:112], alone)
    # The scale and the residual may be one fused multiply-add.
    assert ((both - (plain + residual)).abs() <= 2**-22 * (plain.abs() + residual.abs())).all()
    product(x.to(device), to(weight, device), residual, residual=residual, scratch=scratch)
    assert torch.equal(residual, both)


@pytest.mark.parametrize("layout", ["bf16", "int8", "int4 of 64"])
@pytest.mark.parametrize(("M", "K"), [(3, 2304), (17, 384)])
def test_a_norm_between_two_products(layout: str, M: int, K: int, device: torch.device, scratch: Scratch) -> None:
    """What one product leaves for the norm, and what the next makes of it."""
    first, second = to(make(layout, 192, K), device), to(make(layout, 70, 192), device)
    x, residual = randn(M, K, seed=10).bfloat16().to(device), randn(M, 192, seed=11).to(device)
    plain, out, gain = nan(M, 192, device), nan(M, 192, device), randn(192, seed=12).to(device)
    product(x, first, plain, residual=residual, scratch=scratch)
    then = Next(gain, nan(M, 192, device), nan(M, num_tiles(x, first), device))
    product(x, first, out, residual=residual, then=then, scratch=scratch)
    assert torch.equal(out, plain)
    assert torch.equal(then.rows, out * gain)
    squares = out.double().square().sum(1)
    torch.testing.assert_close(then.squares.double().sum(1), squares, rtol=1e-5, atol=0)
    rows = then.rows.bfloat16()
    unscaled, found = nan(M, 70, device), nan(M, 70, device)
    product(rows, second, unscaled, scratch=scratch)
    product(rows, second, found, norm=Norm(then.squares, 1e-5), scratch=scratch)
    expected = unscaled.double() * torch.rsqrt(squares / 192 + 1e-5)[:, None]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["bf16", "int8", "fp8", "int4 of 32"])
@pytest.mark.parametrize(("M", "F", "K"), [(3, 20, 384), (33, 100, 2304)])
def test_glu(layout: str, M: int, F: int, K: int, device: torch.device, scratch: Scratch) -> None:
    """Both halves of W meet in one program."""
    weight = to(make(layout, 2 * F, K), device)
    x = randn(M, K, seed=13).bfloat16().to(device) / K
    y, out = nan(M, 2 * F, device), nan(M, F, device)
    product(x, weight, y, scratch=scratch)
    product(x, weight, out, glu=True, scratch=scratch)
    first, second = y.double().chunk(2, 1)
    expected = torch.nn.functional.silu(first) * second
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


def test_bf16_out(device: torch.device) -> None:
    x, weight = randn(4, 384, seed=9).bfloat16().to(device), to(make("int8", 70, 384), device)
    exact, out = nan(4, 70, device), nan(4, 70, device, torch.bfloat16)
    product(x, weight, exact)
    product(x, weight, out)
    assert ((out.float() - exact).abs() <= BF16_STORE * exact.abs()).all()


@pytest.mark.parametrize("layout", ["bf16", "int8", "int4 of 64"])
def test_rows_are_independent_and_repeat(layout: str, device: torch.device, scratch: Scratch) -> None:
    """The same bits, whatever the other rows of the bucket are and wherever a row stands in it."""
    x, weight = randn(16, 2304, seed=10).bfloat16().to(device), to(make(layout, 33, 2304), device)
    outs = []
    for rows in (slice(0, 16), slice(0, 16), slice(3, 4), slice(2, 9)):
        out = nan(16, 33, device)
        product(x[rows], weight, out[rows], scratch=scratch)
        outs.append(out)
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0][3:4], outs[2][3:4])
    assert torch.equal(outs[0][2:9], outs[3][2:9])


def every_code(layout: str) -> Weight:
    """A weight that has each code at an even and at an odd place, scales 1; the NaN codes of fp8 left out."""
    codes = torch.arange(256, dtype=torch.uint8).view(4, 64)
    codes = torch.cat([codes, codes.roll(1, 1)], 1)
    if layout == "int8":
        return Int8("w", codes.view(torch.int8), torch.ones(4, 1))
    if layout == "fp8":
        codes[(codes & 0x7F) == 0x7F] = 0
        return Fp8("w", codes.view(torch.float8_e4m3fn), torch.ones(4, 1))
    return Int4("w", codes.view(torch.int32), torch.ones(4, 4, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["int8", "fp8", "int4"])
def test_every_code(layout: str, dtype: torch.dtype, device: torch.device) -> None:
    """On a GPU bf16 takes the packed instructions and fp16 the plain ones; both are exact."""
    weight = every_code(layout)
    N, K = weight.shape
    out = nan(K, N, device)
    product(torch.eye(K, dtype=dtype, device=device), to(weight, device), out)
    assert torch.equal(out.cpu().t(), weight.rows(slice(None)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 384), (17, 1152)])
def test_expand(layout: str, shape: tuple[int, int], device: torch.device) -> None:
    weight = make(layout, *shape)
    values = weight.rows(slice(None))
    out, rounded = nan(*shape, device), nan(*shape, device, torch.bfloat16)
    expand(to(weight, device), out)
    expand(to(weight, device), rounded)
    assert torch.equal(out.cpu(), values)
    if device.type == "cuda" or isinstance(weight, Dense):
        assert torch.equal(rounded.cpu(), values.bfloat16())
    assert ((rounded.cpu().float() - values).abs() <= BF16_STORE * values.abs()).all()


def test_expand_joined(device: torch.device) -> None:
    weight = Joined("w", (make("int8", 5, 128), make("bf16", 3, 128), every_code("fp8"), make("int4 of 32", 4, 128)))
    out = nan(16, 128, device)
    expand(to(weight, device), out)
    assert torch.equal(out.cpu(), weight.rows(slice(None)))


def test_no_kernel_for_other_layouts(device: torch.device) -> None:
    packed = Int8Packed("w", torch.zeros(64, 8, dtype=torch.int8), torch.ones(8), torch.zeros(8, dtype=torch.int64))
    with pytest.raises(BackendError, match="Int8Packed"):
        product(torch.zeros(1, 64, device=device), packed, nan(1, 8, device))
