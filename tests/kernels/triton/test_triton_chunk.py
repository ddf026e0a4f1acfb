"""The two prefills of the gated delta rule, in chunks and token by token, against the reference in float64."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize, softplus

from gdn2_edge.kernels.reference import recurrent_gated_delta_rule2 as reference
from gdn2_edge.kernels.triton import chunk as chunk_module
from gdn2_edge.kernels.triton.chunk import TIGHT, TILES, chunk_gated_delta_rule2
from gdn2_edge.kernels.triton.fused_recurrent import recurrent_gated_delta_rule2

Rule = Callable[..., tuple[Tensor, Tensor]]
CHUNK: Rule = chunk_gated_delta_rule2
RECURRENT: Rule = recurrent_gated_delta_rule2
RULES = pytest.mark.parametrize("rule", [CHUNK, RECURRENT], ids=["chunk", "recurrent"])

# Errors are norms, relative to the norm of what is expected.
# The token loop has fp32 sums in another order: 5e-7 is seen.
LOOP = 2e-6
# The chunks' products of fp32 are three of tf32 on a GPU, which keep 20 bits or more, a few of them in a row.
CHUNK_FLOAT32 = 1e-5
# Their products of 16-bit inputs have fp16 operands, rounded to 11 bits a few times in a row: 4e-4 to 6e-4 is seen.
CHUNK_HALF = 1.5e-3
# B, T, H, HV, K, V; few tokens for the token loop, which is slow in the interpreter.
CHUNK_SHAPES = [
    (1, 1, 2, 2, 16, 16),
    (2, 33, 1, 2, 48, 48),
    (1, 63, 1, 1, 64, 32),
    (1, 64, 1, 1, 32, 64),
    (2, 65, 1, 1, 24, 40),
    (1, 100, 1, 3, 80, 16),
    (1, 130, 2, 2, 32, 24),
    (1, 70, 1, 1, 256, 20),
]
RECURRENT_SHAPES = [(1, 1, 2, 2, 16, 16), (2, 13, 2, 4, 48, 12), (1, 5, 1, 1, 256, 20)]
SHAPES = pytest.mark.parametrize(
    ("rule", "shape"),
    [*((CHUNK, shape) for shape in CHUNK_SHAPES), *((RECURRENT, shape) for shape in RECURRENT_SHAPES)],
    ids=lambda x: x if isinstance(x, str) else str(x) if isinstance(x, tuple) else x.__name__,
)


@pytest.fixture(autouse=True)
def loops_of_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before 3.9, triton's interpreter cannot count up to an argument under numpy 2.4 and later."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_index(tensor: type, scope: object) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_index)


def make_inputs(*shape: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random arguments of the rule by name: gates over all of (0, 1), decay mild with a strong tail."""
    B, T, H, HV, K, V = shape
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    inputs = {
        "q": normalize(randn(B, T, H, K), dim=-1),
        "k": normalize(randn(B, T, H, K), dim=-1),
        "v": randn(B, T, HV, V),
        "b": randn(B, T, H, K).mul(2).sigmoid(),
        "w": randn(B, T, HV, V).mul(2).sigmoid(),
    }
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    return inputs | {"g": -softplus(3 * randn(B, T, H, K) - 3), "S": randn(B, HV, K, V)}


def largest_error(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> float:
    """Of outputs and state: the norm of the error, relative to what is expected."""
    errors = []
    for x, y in zip(got, expected, strict=True):
        assert x.shape == y.shape
        assert x.dtype == torch.float32
        errors.append(float((x.cpu() - y).norm() / y.norm().clamp(min=1e-30)))
    return max(errors) if all(error == error for error in errors) else torch.nan


def tolerance_of(rule: Rule, dtype: torch.dtype) -> float:
    if rule == RECURRENT:
        return LOOP
    return CHUNK_FLOAT32 if dtype == torch.float32 else CHUNK_HALF


def error_of(rule: Rule, inputs: dict[str, Tensor], device: torch.device, **options: float) -> float:
    expected = reference(**{name: x.double() for name, x in inputs.items()}, **options)
    return largest_error(rule(**{name: x.to(device) for name, x in inputs.items()}, **options), expected)


@SHAPES
def test_fp32(rule: Rule, shape: tuple[int, ...], device: torch.device) -> None:
    assert error_of(rule, make_inputs(*shape), device) < tolerance_of(rule, torch.float32)


@SHAPES
def test_bf16(rule: Rule, shape: tuple[int, ...], device: torch.device) -> None:
    assert error_of(rule, make_inputs(*shape, dtype=torch.bfloat16), device) < tolerance_of(rule, torch.bfloat16)


@RULES
def test_fp16(rule: Rule, device: torch.device) -> None:
    inputs = make_inputs(1, 5, 1, 1, 16, 16, dtype=torch.float16)
    assert error_of(rule, inputs, device) < tolerance_of(rule, torch.float16)


@pytest.mark.parametrize("tiles", [TILES, TIGHT], ids=["usual", "tight"])
def test_tiles(tiles: chunk_module._Tiles, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk_module, "_tiles", lambda *_: tiles)
    assert error_of(CHUNK, make_inputs(1, 130, 1, 2, 64, 48, dtype=torch.bfloat16), device) < CHUNK_HALF


@RULES
def test_any_split_is_the_whole(rule: Rule, device: torch.device) -> None:
    T = 100 if rule == CHUNK else 7
    inputs = make_inputs(1, T, 1, 1, 32, 16)
    expected = reference(**{name: x.double() for name, x in inputs.items()})
    inputs = {name: x.to(device) for name, x in inputs.items()}
    for cut in (1, T // 3, T - 1):
        outputs, S = [], inputs["S"]
        for part in (slice(cut), slice(cut, None)):
            o, S = rule(**{name: x[:, part] for name, x in inputs.items() if name != "S"}, S=S)
            outputs.append(o)
        assert largest_error((torch.cat(outputs, 1), S), expected) < tolerance_of(rule, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_segments(dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk_module, "SEGMENT_TOKENS", 64)
    assert error_of(CHUNK, make_inputs(2, 150, 1, 2, 32, 16, dtype=dtype), device) < tolerance_of(CHUNK, dtype)


@RULES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_extreme_decay(rule: Rule, dtype: torch.dtype, device: torch.device) -> None:
    """Tokens and channels that forget everything, some that forget nothing, and -500 and more over each chunk."""
    inputs = make_inputs(1, 130, 1, 1, 32, 8, dtype=dtype)
    g = inputs["g"]
    g[:, 1:60] = -torch.rand(59, 1, 32) * 10
    g[:, 3::20] = -65.0
    g[:, 5::7] = 0.0
    g[:, 7:90, :, :8] = 0.0
    g[:, 20, :, 5] = -1e5
    g[:, 100, :, 9:20] = -torch.inf
    if rule == RECURRENT:
        inputs = {name: x if name == "S" else x[:, :25] for name, x in inputs.items()}
    assert error_of(rule, inputs, device) < tolerance_of(rule, dtype)


@RULES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("keys", ["random", "alike"])
def test_without_erasing_or_decay(rule: Rule, dtype: torch.dtype, keys: str, device: torch.device) -> None:
    """The state only ever adds up, at worst all in one direction."""
    inputs = make_inputs(1, 100 if rule == CHUNK else 5, 1, 1, 32, 8, dtype=dtype)
    inputs["b"].zero_()
    inputs["g"].zero_()
    inputs["v"].abs_()
    if keys == "alike":
        inputs["k"] = inputs["k"][:, :1].expand_as(inputs["k"])
    assert error_of(rule, inputs, device) < tolerance_of(rule, dtype)


@RULES
def test_full_overwrite(rule: Rule, device: torch.device) -> None:
    """One unit key, b = 1, no decay: what is read is what was written last."""
    inputs = make_inputs(1, 70 if rule == CHUNK else 5, 1, 1, 16, 16)
    inputs["k"] = torch.zeros_like(inputs["k"])
    inputs["k"][..., 3] = 1.0
    inputs["q"] = inputs["k"]
    inputs["b"].fill_(1.0)
    inputs["g"].zero_()
    o, _ = rule(**{name: x.to(device) for name, x in inputs.items()}, scale=1.0)
    tolerance = tolerance_of(rule, torch.float32)
    torch.testing.assert_close(o.cpu(), inputs["w"] * inputs["v"], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("factor", [1e-20, 1e4, 1e20])
def test_values_of_any_size(factor: float, device: torch.device) -> None:
    inputs = make_inputs(1, 80, 1, 1, 32, 16, dtype=torch.bfloat16)
    inputs["v"] *= factor
    inputs["S"] *= factor
    inputs["v"][..., 5] = 0.0  # a column of zeros
    inputs["S"][..., 5] = 0.0
    inputs["v"][:, 3, :, 7] *= 1000.0  # a token unlike the others
    assert error_of(CHUNK, inputs, device) < CHUNK_HALF


@RULES
def test_scale(rule: Rule, device: torch.device) -> None:
    assert error_of(rule, make_inputs(1, 6, 1, 1, 16, 16), device, scale=0.7) < tolerance_of(rule, torch.float32)


@RULES
def test_arguments_are_left_alone_and_results_repeat(rule: Rule, device: torch.device) -> None:
    inputs = make_inputs(1, 70 if rule == CHUNK else 5, 1, 1, 32, 32, dtype=torch.bfloat16)
    inputs = {name: x.to(device) for name, x in inputs.items()}
    before = {name: x.clone() for name, x in inputs.items()}
    first, second = rule(**inputs), rule(**inputs)
    assert all(torch.equal(inputs[name], x) for name, x in before.items())
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
