"""Weights as kernels read them, against the layouts' own exact values; every code, every place in a word."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import triton
import triton.language as tl
from stored_weights import FLOATS, FORMATS, make_weight
from torch import Tensor

from gdn2_edge.errors import BackendError
from gdn2_edge.kernels.triton.launch import gpu_of
from gdn2_edge.kernels.triton.stored import (
    WEIGHTS_PER_WORD,
    dot4,
    load_codes,
    load_values,
    stored,
    word_values,
)
from gdn2_edge.weights import Dense, Fp8, Int4, Joined, fp8_values, pack_int4

# fp32 sums of at most 160 products in another order, as a share of the sum of their sizes.
SUM_TOLERANCE = 1e-6
NAN_CODES = (0x7F, 0xFF)  # of e4m3, which no weight holds


def fp8_ways(device: torch.device) -> list[bool]:
    """By integers everywhere, and by the hardware where it can."""
    return [False, True] if gpu_of(device).hardware_fp8 else [False]


@triton.jit
def values_kernel(p_words, p_out, N: tl.constexpr, FORMAT: tl.constexpr, HARDWARE_FP8: tl.constexpr):
    o = tl.arange(0, N)
    values = word_values(tl.load(p_words + o), FORMAT, HARDWARE_FP8)
    for j in tl.static_range(len(values)):
        tl.store(p_out + o * len(values) + j, values[j])


def values_of(words: Tensor, format: str, device: torch.device, hardware_fp8: bool = False) -> Tensor:
    """The values of int32 words, a power of two of them, in order."""
    out = torch.full((words.numel() * WEIGHTS_PER_WORD[format],), torch.nan, device=device)
    values_kernel[(1,)](words.to(device), out, words.numel(), format, hardware_fp8)
    return out.cpu()


def test_every_finite_e4m3_code_in_every_place(device: torch.device) -> None:
    codes = torch.tensor([c for c in range(256) if c not in NAN_CODES] + [0, 0], dtype=torch.uint8)
    for place, hardware in product(range(4), fp8_ways(device)):
        shifted = codes.roll(place)
        found = values_of(shifted.view(torch.int32), "fp8", device, hardware)
        expected = shifted.view(torch.float8_e4m3fn).float()
        assert torch.equal(found.view(torch.int32), expected.view(torch.int32))  # the sign of a zero too


def test_every_int8_code_in_every_place(device: torch.device) -> None:
    codes = torch.arange(-128, 128).to(torch.int8)
    for place in range(4):
        shifted = codes.roll(place)
        assert torch.equal(values_of(shifted.view(torch.int32), "int8", device), shifted.float())


def test_every_int4_code_in_every_place(device: torch.device) -> None:
    for place in range(8):
        codes = (torch.arange(128) // 8 - 8).roll(place)[None]
        assert torch.equal(values_of(pack_int4(codes)[0], "int4", device), codes[0].float())


@pytest.mark.parametrize("format", FLOATS)
def test_floats_of_every_size(format: str, device: torch.device) -> None:
    exponents = torch.arange(-24, 15).float() if format == "fp16" else torch.arange(-126, 127).float()
    values = torch.cat([sign * factor * exponents.exp2() for sign in (-1, 1) for factor in (1.0, 1.3)])
    values = torch.cat([values, torch.zeros(2 * 1024 - len(values))])
    values[-3:] = torch.tensor([torch.inf, -torch.inf, -0.0])
    stored_values = values.to(FLOATS[format])
    found = values_of(stored_values.view(torch.int32), format, device)
    assert torch.equal(found.view(torch.int32), stored_values.float().view(torch.int32))


@triton.jit
def dot4_kernel(
    p_a, p_b, p_c, p_out, N: tl.constexpr, ASM: tl.constexpr, A_SIGNED: tl.constexpr, B_SIGNED: tl.constexpr
):
    o = tl.arange(0, N)
    tl.store(p_out + o, dot4(tl.load(p_a + o), tl.load(p_b + o), tl.load(p_c + o), ASM, A_SIGNED, B_SIGNED))


@pytest.mark.parametrize("b_signed", [True, False])
@pytest.mark.parametrize("a_signed", [True, False])
def test_dot4_of_extreme_bytes(a_signed: bool, b_signed: bool, device: torch.device) -> None:
    extremes = torch.tensor([-128, -127, -1, 0, 1, 127], dtype=torch.int8)
    a = extremes[torch.randint(0, 6, (256, 4), generator=torch.Generator().manual_seed(0))]
    b = extremes[torch.randint(0, 6, (256, 4), generator=torch.Generator().manual_seed(1))]
    a[:2], b[0], b[1] = -128, -128, 127
    c = torch.randint(-(2**28), 2**28, (256,), dtype=torch.int32)
    first = a.int() if a_signed else a.view(torch.uint8).int()
    second = b.int() if b_signed else b.view(torch.uint8).int()
    expected = (first * second).sum(1) + c
    words = [x.contiguous().view(torch.int32).flatten().to(device) for x in (a, b)]
    for asm in {False, gpu_of(device).asm}:
        out = torch.full((256,), -7, dtype=torch.int32, device=device)
        dot4_kernel[(1,)](*words, c.to(device), out, 256, asm, a_signed, b_signed)
        assert torch.equal(out.cpu(), expected.int())


def test_what_kernels_get_of_each_layout(device: torch.device) -> None:
    for format in FORMATS:
        weight = make_weight(format, 3, 128, device)
        name, codes, scale, group = stored(weight)
        assert name == format.partition(" ")[0]
        assert group == (weight.group_size if isinstance(weight, Int4) else 0)
        assert codes.shape[1] * codes.element_size() * 8 // 32 * WEIGHTS_PER_WORD[name] == 128
        assert (scale is None) == isinstance(weight, Dense)
    with pytest.raises(BackendError, match="Joined has no GPU kernel"):
        stored(Joined("x", (make_weight("fp32", 1, 8, device), make_weight("int8", 1, 8, device))))


@triton.jit
def rows_kernel(
    p_index,
    p_w,
    p_scale,
    p_x,
    p_values,
    p_product,
    N,
    N_2: tl.constexpr,
    K: tl.constexpr,
    K_2: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    HARDWARE_FP8: tl.constexpr,
):
    o_n, o_k = tl.arange(0, N_2), tl.arange(0, K_2)
    m_n, m_k = o_n < N, o_k < K
    rows = tl.load(p_index + o_n, m_n, 0)
    values = load_values(
        p_w, p_scale, rows[:, None], o_k[None, :], m_n[:, None], m_k[None, :], K, FORMAT, GROUP, HARDWARE_FP8
    )
    tl.store(p_values + o_n[:, None] * K_2 + o_k[None, :], values, m_n[:, None])
    codes, scale = load_codes(
        p_w, p_scale, rows[:, None], o_k[None, :], m_n[:, None], m_k[None, :], K, FORMAT, GROUP, HARDWARE_FP8
    )
    x = tl.load(p_x + o_k, m_k, 0.0)
    tl.store(p_product + o_n, tl.sum(codes * x[None, :], 1) * tl.sum(scale, 1), m_n)


@pytest.mark.parametrize("format", FORMATS)
def test_rows_of_small_matrices(format: str, device: torch.device) -> None:
    """Rows in any order, channels that are no power of two, values exact, products in fp32."""
    group = int(format.partition(" g")[2] or 8)
    for channels in sorted({group, 5 * group if group < 64 else 3 * group, 128}):
        weight = make_weight(format, 9, channels, device)
        name, codes, scale, group_size = stored(weight)
        index = torch.tensor([8, 0, 3, 3, 7])
        x = torch.randn(channels, generator=torch.Generator().manual_seed(1)).to(device)
        padded = triton.next_power_of_2(channels)
        for hardware in fp8_ways(device):
            values = torch.full((5, padded), torch.nan, device=device)
            products = torch.full((5,), torch.nan, device=device)
            rows_kernel[(1,)](
                index.to(device), codes, scale, x, values, products, 5,
                N_2=8, K=channels, K_2=padded, FORMAT=name, GROUP=group_size, HARDWARE_FP8=hardware,
            )  # fmt: skip
            expected = weight.rows(index.to(device))
            assert torch.equal(values[:, :channels], expected)
            assert torch.equal(values[:, channels:], torch.zeros_like(values[:, channels:]))  # as masked
            size = expected.double().abs() @ x.double().abs()
            assert ((products - expected.double() @ x.double()).abs() <= SUM_TOLERANCE * size).all()


def test_int4_codes_lie_lowest_first(device: torch.device) -> None:
    """Column k of a row holds code k % 16 - 8, and one scale a group; fp8 and int8 rows have one scale a row."""
    codes = (torch.arange(64) % 16 - 8).repeat(2, 1)
    scale = torch.tensor([[1.0, 2.0], [0.5, 4.0]]).bfloat16()
    weight = Int4("x", pack_int4(codes).to(device), scale.to(device))
    assert int(weight.data[0, 0]) & 0xFFFFFFFF == 0x76543210
    values = torch.full((2, 64), torch.nan, device=device)
    index = torch.arange(2, device=device)
    x = torch.zeros(64, device=device)
    products = torch.full((2,), torch.nan, device=device)
    rows_kernel[(1,)](
        index, weight.data, weight.scale, x, values, products, 2,
        N_2=2, K=64, K_2=64, FORMAT="int4", GROUP=32, HARDWARE_FP8=False,
    )  # fmt: skip
    assert torch.equal(values.cpu(), codes.float() * scale.float().repeat_interleave(32, 1))


def test_fp8_by_integers_is_the_layouts_decoding(device: torch.device) -> None:
    """Also of the two codes for NaN, which no checkpoint may hold: both read them as +-480."""
    codes = torch.arange(256, dtype=torch.uint8)
    found = values_of(codes.view(torch.int32), "fp8", device)
    assert torch.equal(found, fp8_values(codes))
    assert stored(Fp8("x", codes.view(torch.float8_e4m3fn)[None], torch.ones(1, 1)))[1].dtype == torch.uint8
