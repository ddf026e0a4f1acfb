"""Stored layouts: their values are exact, joining keeps them, and what is no layout is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gdn2_edge.errors import CheckpointError
from gdn2_edge.weights import (
    Dense,
    Fp8,
    Int4,
    Int8,
    Joined,
    Weight,
    fp8_values,
    join,
    num_bytes,
    pack_int4,
    unpack_int4,
    weight_from_tensors,
)

ROWS, COLUMNS = 7, 64
FP8_NAN_CODES = (0x7F, 0xFF)


def codes(low: int, high: int, seed: int = 0, rows: int = ROWS) -> Tensor:
    return torch.randint(low, high + 1, (rows, COLUMNS), generator=torch.Generator().manual_seed(seed))


def scales(columns: int, seed: int = 1, rows: int = ROWS) -> Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) + 0.1


def fp8_codes(seed: int = 0) -> Tensor:
    drawn = codes(0, 255, seed).to(torch.uint8)
    return drawn.where((drawn & 0x7F) != 0x7F, 0).view(torch.float8_e4m3fn)


def dense(dtype: torch.dtype, seed: int = 0) -> Dense:
    return Dense("w", scales(COLUMNS, seed).to(dtype))


def int8(seed: int = 0) -> Int8:
    return Int8("w", codes(-127, 127, seed).to(torch.int8), scales(1, seed))


def fp8(seed: int = 0) -> Fp8:
    return Fp8("w", fp8_codes(seed), scales(1, seed))


def int4(group_size: int, seed: int = 0) -> Int4:
    return Int4("w", pack_int4(codes(-8, 7, seed)), scales(COLUMNS // group_size, seed).bfloat16())


LAYOUTS: dict[str, Weight] = {
    "fp32": dense(torch.float32),
    "bf16": dense(torch.bfloat16),
    "fp16": dense(torch.float16),
    "int8": int8(),
    "fp8": fp8(),
    "int4 of 32": int4(32),
    "int4 of 64": int4(64),
}


def definition(weight: Weight) -> Tensor:
    """The values by the classes' docstrings, in fp64, rounded once to fp32."""
    match weight:
        case Dense(data=data):
            values = data.double()
        case Int8(data=data, scale=scale) | Fp8(data=data, scale=scale):
            values = data.double() * scale.double()
        case Int4(data=data, scale=scale):
            nibbles = (data.long()[..., None] >> (4 * torch.arange(8))) & 15
            group = COLUMNS // scale.shape[1]
            values = (nibbles.flatten(1) - 8).double() * scale.double()[:, torch.arange(COLUMNS) // group]
        case _:
            raise TypeError(type(weight))
    return values.float()


INDICES: dict[str, Any] = {
    "all": slice(None),
    "a slice": slice(2, 5),
    "ids": torch.tensor([[6, 0], [0, 3]]),
    "one id": torch.tensor(4),
}


@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES.keys())
@pytest.mark.parametrize("weight", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_rows_are_exact(weight: Weight, index: Any) -> None:
    assert weight.shape == (ROWS, COLUMNS)
    rows = weight.rows(index)
    assert rows.dtype == torch.float32
    assert torch.equal(rows, definition(weight)[index])


def test_every_fp8_code_is_exact() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    numbers = every[[i not in FP8_NAN_CODES for i in range(256)]]
    found, expected = fp8_values(numbers), numbers.view(torch.float8_e4m3fn).float()
    assert torch.equal(found, expected)
    assert torch.equal(found.signbit(), expected.signbit())  # -0 too
    assert fp8_values(torch.tensor(FP8_NAN_CODES, dtype=torch.uint8)).tolist() == [480.0, -480.0]


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
def test_int4_codes_pack_and_unpack(dtype: torch.dtype) -> None:
    values = codes(-8, 7).to(dtype)
    packed = pack_int4(values)
    assert packed.dtype == torch.int32
    assert packed.shape == (ROWS, COLUMNS // 8)
    assert torch.equal(unpack_int4(packed), values.to(torch.int8))
    assert torch.equal(unpack_int4(packed.t().contiguous().t()[2:3]), values[2:3].to(torch.int8))


def test_the_first_int4_code_is_in_the_lowest_bits() -> None:
    assert pack_int4(torch.tensor([[-7, -8, -8, -8, -8, -8, -8, 7]])).item() == 0xF0000001 - 2**32


@pytest.mark.parametrize("make", [lambda s: dense(torch.bfloat16, s), int8, fp8, lambda s: int4(32, s)])
def test_equal_layouts_are_joined_in_one_buffer(make: Any) -> None:
    parts = [make(0), make(1), make(2)]
    whole = join("a+b+c", parts)
    assert type(whole) is type(parts[0])
    assert whole.name == "a+b+c"
    assert whole.shape == (3 * ROWS, COLUMNS)
    assert torch.equal(whole.rows(slice(None)), torch.cat([p.rows(slice(None)) for p in parts]))


def test_one_part_stays_itself() -> None:
    weight = int8()
    assert join("other", [weight]) is weight


def test_different_layouts_are_kept_side_by_side() -> None:
    parts = [int8(0), int8(1), int4(32), int4(64), dense(torch.float32), dense(torch.bfloat16), int8(2)]
    whole = join("all", parts)
    assert isinstance(whole, Joined)
    assert [type(p).__name__ for p in whole.parts] == ["Int8", "Int4", "Int4", "Dense", "Dense", "Int8"]
    assert whole.shape == (7 * ROWS, COLUMNS)
    expected = torch.cat([p.rows(slice(None)) for p in parts])
    for index in (slice(None), slice(ROWS - 1, 3 * ROWS), torch.tensor([40, 0, 13])):
        assert torch.equal(whole.rows(index), expected[index])
    assert num_bytes(whole) == sum(map(num_bytes, parts))


@pytest.mark.parametrize(
    ("name", "nbytes"),
    [
        ("fp32", ROWS * COLUMNS * 4),
        ("bf16", ROWS * COLUMNS * 2),
        ("int8", ROWS * (COLUMNS + 4)),
        ("fp8", ROWS * (COLUMNS + 4)),
    ],
)
def test_num_bytes(name: str, nbytes: int) -> None:
    assert num_bytes(LAYOUTS[name]) == nbytes


@pytest.mark.parametrize("weight", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_stored_tensors_come_back(weight: Weight) -> None:
    again = weight_from_tensors("w", weight.tensors(), weight.shape)
    assert type(again) is type(weight)
    assert torch.equal(again.rows(slice(None)), weight.rows(slice(None)))


def changed(weight: Weight, **tensors: Tensor | None) -> dict[str, Tensor]:
    """The stored tensors, some replaced or (None) left out; `data` stands for the suffix "" ."""
    renamed = {"" if name == "data" else name: tensor for name, tensor in tensors.items()}
    return {name: t for name, t in {**weight.tensors(), **renamed}.items() if t is not None}


BF16 = torch.bfloat16
BAD: dict[str, tuple[dict[str, Tensor], tuple[int, ...], str]] = {
    "nothing": ({}, (7, 64), "w is not a known weight format"),
    "integers without a scale": (changed(int8(), _scale=None), (7, 64), "w int8 is not a known weight format"),
    "fp64": (changed(dense(torch.float64)), (7, 64), "float64 is not a known"),
    "another shape": (changed(int8()), (7, 65), r"w is \(7, 64\), the spec says \(7, 65\)"),
    "too few rows": (changed(int8()), (8, 64), r"w_scale is \(7, 1\)"),
    "a scale of another dtype": (changed(int8(), _scale=scales(1).to(BF16)), (7, 64), "bfloat16, expected"),
    "a scale of another shape": (changed(fp8(), _scale=scales(2)), (7, 64), r"w_scale is \(7, 2\)"),
    "a scale that is NaN": (changed(fp8(), _scale=scales(1) * torch.nan), (7, 64), "not finite"),
    "codes without a shape": (changed(int4(32), _shape=None), (7, 64), "not a known"),
    "another shape inside": (changed(int4(32), _shape=torch.tensor([7, 60])), (7, 64), r"says \[7, 60\]"),
    "groups that do not divide": (changed(int4(32), _scale=scales(3).to(BF16)), (7, 64), "does not divide"),
    "no groups": (changed(int4(32), _scale=scales(2)[:, :0].to(BF16)), (7, 64), "does not divide"),
    "packed in one dimension": (
        changed(int4(32), _packed=torch.zeros(7, dtype=torch.int32)),
        (7, 64),
        r"w_packed is \(7,\)",
    ),
    "too few codes": (changed(int4(32), _packed=pack_int4(codes(-8, 7))[:, :4]), (7, 64), r"w_packed is \(7, 4\)"),
    "a quantized vector": (
        {"": torch.zeros(7, dtype=torch.int8), "_scale": torch.ones(7, 1)},
        (7,),
        r"quantized, but \(7,\) is no matrix",
    ),
    "a quantized filter": (
        {"": torch.zeros(7, 1, 4, dtype=torch.int8), "_scale": torch.ones(7, 1)},
        (7, 1, 4),
        "is no matrix",
    ),
}


@pytest.mark.parametrize(("stored", "shape", "message"), BAD.values(), ids=BAD.keys())
def test_what_is_no_layout_is_refused(stored: dict[str, Tensor], shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        weight_from_tensors("w", stored, shape)
