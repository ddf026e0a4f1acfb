"""Products with every layout, on every path there is, against fp64 on the weights' own exact values."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from gdn2_edge.kernels import linear as linear_module
from gdn2_edge.kernels import torch_private
from gdn2_edge.kernels.linear import linear, prepare
from gdn2_edge.kernels.torch_private import BF16_INT8_MAX_ROWS, Int4Blocked, Int8Packed
from gdn2_edge.quantize.fp8 import encode_fp8
from gdn2_edge.quantize.int4 import encode_int4
from gdn2_edge.quantize.int8 import encode_int8
from gdn2_edge.weights import Dense, Int4, Joined, Weight, num_bytes

# Errors are measured against sum |x w|, which no cancellation makes small. fp32 sums of up to 6208 terms with exact
# weights: each term is off by 2^-24, partial sums by a few times that.
EXACT = 1e-6
# x, and then the result, rounded to bf16 with its 8 bits: 2^-8 each at most, and the sums between are fp32.
BF16 = 2.1 * 2**-8
# x as 16-bit fixed point of its row: half a step of max|x| / 32512, against max|x| * sum |w|; then fp32 as above.
FIXED_POINT = 1.1 / 65_024

PATHS: dict[str, tuple[str, ...]] = {
    "as this machine is": (),
    "without integer products": ("has_int8",),
    "without int8 products": ("has_int8", "has_bf16_int8"),
    "without int4": ("has_int4",),
}
CALLS = {
    "ops.onednn.qlinear_pointwise": "has_int8",
    "_weight_int8pack_mm": "has_bf16_int8",
    "_weight_int4pack_mm_for_cpu": "has_int4",
}


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@cache
def make(layout: str, out_features: int, in_features: int, seed: int = 0) -> Weight:
    values = randn(out_features, in_features, seed=seed)
    values *= randn(out_features, 1, seed=seed + 1).exp()  # rows of different sizes
    match layout:
        case "int8":
            return encode_int8("w", values)
        case "fp8":
            return encode_fp8("w", values)
        case "int4 of 32" | "int4 of 64" | "int4 of 128":
            return encode_int4("w", values, int(layout.split()[-1]))
        case "mixed":
            cut = max(4, out_features // 4)
            values = values.expand(max(4 * cut, out_features), -1)
            return Joined(
                "w",
                (
                    encode_int8("a", values[:cut]),
                    Dense("b", values[cut : 2 * cut].bfloat16()),
                    encode_int4("c", values[2 * cut : 3 * cut], 32),
                    Dense("d", values[3 * cut :]),
                    make("int4 of 64", 64, in_features, seed + 2),
                    encode_fp8("e", values[:1]),
                ),
            )
    return Dense("w", values.to({"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[layout]))


def error_limit(x: Tensor, weight: Weight) -> Tensor:
    """[M, O]: how far the path that is there may be from fp64."""
    if isinstance(weight, Joined):
        return torch.cat([error_limit(x, part) for part in weight.parts], -1)
    x, values = x.double().abs(), weight.rows(slice(None)).double().abs().t()
    terms = x @ values
    if isinstance(prepare(weight), Int4Blocked):
        return BF16 * terms
    if isinstance(prepare(weight), Int8Packed):
        return FIXED_POINT * x.amax(-1, keepdim=True) * values.sum(0) + EXACT * terms
    if type(weight).__name__ == "Int8" and torch_private.has_bf16_int8() and len(x) <= BF16_INT8_MAX_ROWS:
        return BF16 * terms
    return EXACT * terms


def assert_product(x: Tensor, weight: Weight, bias: Weight | None = None) -> None:
    expected = x.double() @ weight.rows(slice(None)).double().t()
    if bias is not None:
        expected = expected + bias.rows(slice(None)).double()
    found = linear(x, prepare(weight), bias)
    assert found.dtype == x.dtype
    limit = error_limit(x, weight) + EXACT * expected.abs()
    if x.dtype == torch.bfloat16:
        limit = limit + BF16 * (limit + expected.abs() + (expected - (bias.rows(slice(None)) if bias else 0)).abs())
    excess = ((found.double() - expected).abs() - limit).max()
    assert excess <= 0, f"{excess} above the limit"


@pytest.fixture(params=PATHS.values(), ids=PATHS.keys())
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    for name in request.param:
        monkeypatch.setattr(torch_private, name, lambda: False)
    return request.param


LAYOUTS = ["fp32", "bf16", "fp16", "int8", "fp8", "int4 of 32", "int4 of 64", "int4 of 128", "mixed"]
SHAPES = [(64, 128), (65, 128), (97, 256), (1, 128), (64, 6272)]


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_product(layout: str, shape: tuple[int, int], x_dtype: torch.dtype, path: Any) -> None:
    weight = make(layout, *shape)
    bias = Dense("bias", 3 * randn(weight.shape[0], seed=7))
    for rows in (1, BF16_INT8_MAX_ROWS + 1, 16):
        x = randn(rows, shape[1], seed=rows).to(x_dtype)
        assert_product(x, weight)
        assert_product(x, weight, bias)


@pytest.mark.parametrize("in_features", [1, 3, 8, 24, 33, 65, 200])
@pytest.mark.parametrize("layout", ["fp32", "bf16", "int8", "fp8"])
def test_any_width(layout: str, in_features: int, path: Any) -> None:
    # Seen with torch 2.13: int8 products of a width that 16 does not divide read other memory, or crash.
    for out_features in (1, 65):
        for rows in (1, 9):
            assert_product(randn(rows, in_features, seed=rows), make(layout, out_features, in_features))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_leading_axes_are_kept(layout: str) -> None:
    weight = prepare(make(layout, 64, 128))
    x = randn(2, 3, 128, seed=1)
    found = linear(x, weight)
    assert found.shape == (2, 3, weight.shape[0])
    assert torch.equal(found.view(6, -1), linear(x.view(6, 128), weight))


@pytest.mark.parametrize("layout", ["bf16", "fp8", "int8", "int4 of 32"])
def test_tiles_cover_every_row(layout: str, path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_module, "TILE_BYTES", 4 * 128 * 10)  # ten rows, so 97 rows end in a part of a tile
    for out_features in (9, 10, 97):
        assert_product(randn(12, 128, seed=3), make(layout, out_features, 128))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_large_activations_and_outliers(layout: str, path: Any) -> None:
    x = randn(3, 128, seed=5)
    x[0] *= 1e30
    x[1, 17] = 3e4
    x[2] *= 1e-20
    assert_product(x, make(layout, 64, 128))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_zeros(layout: str, path: Any) -> None:
    weight = make(layout, 64, 128)
    x = randn(3, 128, seed=5)
    x[1] = 0
    found = linear(x, prepare(weight))
    assert (found[1] == 0).all()
    assert (found[0] != 0).any()


@pytest.mark.parametrize("layout", ["int8", "int4 of 32", "bf16"])
def test_a_weight_row_of_zeros(layout: str, path: Any) -> None:
    values = randn(64, 128, seed=0)
    values[5] = 0
    encoded = {
        "int8": encode_int8("w", values),
        "int4 of 32": encode_int4("w", values, 32),
        "bf16": Dense("w", values.bfloat16()),
    }
    found = linear(randn(2, 128, seed=1), prepare(encoded[layout]))
    assert (found[:, 5] == 0).all()
    assert (found[:, 6] != 0).all()


@pytest.mark.parametrize("layout", ["int8", "fp8", "int4 of 32", "bf16", "fp32"])
def test_nan_and_infinity_are_not_hidden(layout: str, path: Any) -> None:
    weight = prepare(make(layout, 64, 128))
    for bad in (torch.nan, torch.inf):
        x = randn(3, 128, seed=1)
        x[1, 3] = bad
        found = linear(x, weight)
        assert not torch.isfinite(found[1]).any()
        assert torch.isfinite(found[[0, 2]]).all()


@pytest.mark.skipif(not torch_private.has_int8(), reason="this CPU has no integer dot products")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_an_int8_row_does_not_depend_on_the_others(shape: tuple[int, int]) -> None:
    weight = prepare(make("int8", *shape))
    x = randn(16, shape[1], seed=2)
    x[3] *= 1e4
    whole = linear(x, weight)
    for row in range(16):
        assert torch.equal(linear(x[row : row + 1], weight), whole[row : row + 1])
    assert torch.equal(linear(x.flip(0), weight), whole.flip(0))


@pytest.mark.parametrize(("function", "trial"), CALLS.items())
@pytest.mark.parametrize("is_there", [True, False])
def test_a_private_product_is_used_where_its_trial_passed(
    function: str, trial: str, is_there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_there and not getattr(torch_private, trial)():
        pytest.skip(f"torch has no good {function} here")
    called = []
    real = torch_private._private
    monkeypatch.setattr(torch_private, "_private", lambda name: called.append(name) or real(name))
    for name in CALLS.values():
        monkeypatch.setattr(torch_private, name, lambda name=name: is_there and name == trial)
    layout = "int4 of 32" if trial == "has_int4" else "int8"
    linear(randn(1, 128, seed=0), prepare(make(layout, 64, 128)))
    assert (function in called) == is_there
    assert is_there or called == []


@pytest.mark.parametrize("trial", CALLS.values())
def test_a_trial_refuses_what_is_missing_or_wrong(trial: str, monkeypatch: pytest.MonkeyPatch) -> None:
    try_it = getattr(torch_private, trial).__wrapped__
    real = torch_private._private

    def missing(name: str) -> Any:
        raise AttributeError(name)

    def failing(name: str) -> Any:
        def fail(*args: Any) -> Tensor:
            raise RuntimeError("not built for this CPU")

        return fail

    def wrong(name: str) -> Any:
        return real(name) if "convert" in name or "prepack" in name else lambda *args: real(name)(*args) + 1

    for replacement in (missing, failing, wrong):
        monkeypatch.setattr(torch_private, "_private", replacement)
        assert try_it() is False


@pytest.mark.skipif(not torch_private.has_int4(), reason="torch has no int4 product here")
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_blocked_int4_holds_the_same_values(group_size: int) -> None:
    weight = make(f"int4 of {group_size}", 1088, 256)  # more rows than are packed at a time
    blocked = prepare(weight)
    assert isinstance(blocked, Int4Blocked)
    assert isinstance(weight, Int4)
    assert (blocked.shape, blocked.group_size) == (weight.shape, group_size)
    for index in (slice(None), slice(60, 70), torch.tensor([1087, 0])):
        assert torch.equal(blocked.rows(index), weight.rows(index))
    # The product wants a zero point beside each scale.
    assert num_bytes(blocked) == weight.data.nbytes + 2 * weight.scale.nbytes


@pytest.mark.parametrize("out_features", [1, 63, 65, 96])
def test_int4_stays_as_it_is_where_blocks_do_not_fit(out_features: int) -> None:
    weight = make("int4 of 32", out_features, 128)
    assert prepare(weight) is weight


@pytest.mark.skipif(not torch_private.has_int8(), reason="this CPU has no integer dot products")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packed_int8_holds_the_same_values_in_as_many_bytes(shape: tuple[int, int]) -> None:
    weight = make("int8", *shape)
    packed = prepare(weight)
    assert isinstance(packed, Int8Packed)
    assert packed.shape == weight.shape
    assert torch.equal(packed.rows(slice(None)), weight.rows(slice(None)))
    # oneDNN pads to blocks and keeps a sum for each row
    assert num_bytes(packed) <= 1.05 * num_bytes(weight) + 64 * (sum(shape) + 64)


def test_prepare_leaves_other_layouts() -> None:
    for layout in ("fp32", "bf16", "fp8"):
        weight = make(layout, 64, 128)
        assert prepare(weight) is weight
