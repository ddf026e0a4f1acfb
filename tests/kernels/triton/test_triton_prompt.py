"""What stands around the gated delta rule in a prompt, against the verbs of `TorchOps`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton
from stored_weights import make_weight
from torch import Tensor

from gdn2_edge.kernels.triton import rows
from gdn2_edge.kernels.triton.launch import gpu_of, pdl_options
from gdn2_edge.kernels.triton.prompt import Prepared, gated_norm, prepare
from gdn2_edge.ops import OutputGate
from gdn2_edge.torch_ops import TorchOps
from gdn2_edge.weights import Dense

EPS = 1e-5
TOLERANCE = 5e-6  # sums of a few fp32 products of values near 1, beside the largest; a GPU's exponentials
# One rounding to fp16 or bf16, beside the largest of all; to nearest on a GPU, towards zero in the interpreter.
ROUNDED = 2**-7
pytestmark = pytest.mark.filterwarnings("ignore:.*(overflow|invalid value) encountered:RuntimeWarning")  # numpy's


@dataclass(frozen=True)
class Shape:
    """Sizes of one mixer: sequences, tokens, heads of keys and values and their channels, taps, more rows of y."""

    B: int
    T: int
    H: int
    HV: int
    K: int
    V: int
    conv: int = 4
    rank: int = 8
    format: str = "fp32"  # of the second matrices of gates

    @property
    def keys(self) -> int:
        return self.H * self.K

    @property
    def values(self) -> int:
        return self.HV * self.V

    @property
    def channels(self) -> int:
        return 2 * self.keys + self.values


SHAPES = [
    Shape(1, 1, 1, 1, 16, 16),
    Shape(2, 2, 1, 2, 8, 24, conv=2),
    Shape(1, 3, 2, 2, 24, 8),
    Shape(2, 15, 2, 4, 20, 12),
    Shape(1, 16, 1, 1, 40, 40, conv=2),
    Shape(1, 17, 2, 2, 16, 32, conv=7),
    Shape(2, 33, 1, 2, 64, 16),
    Shape(1, 70, 1, 1, 128, 24),
    Shape(1, 18, 1, 2, 16, 16, rank=24, format="bf16"),
    Shape(1, 5, 2, 2, 24, 16, rank=32, format="int8"),
    Shape(2, 3, 1, 1, 16, 16, rank=64, format="fp8"),
    Shape(1, 4, 1, 1, 16, 16, rank=96, format="int4 g32"),
]


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(s: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Arguments of `prepare` by name; y and the tail lie in larger buffers, as they do in a model."""
    y = normal(s.B, s.T, s.channels + s.keys + s.values + 2 * s.rank) * 3
    y[..., :3] *= 1e-4  # small keys, where the norm's epsilon counts
    tail = normal(s.B, s.channels * (s.conv - 1) + 16, seed=2)[:, 16:].unflatten(1, (s.channels, s.conv - 1))
    given = {
        "y": y.to(dtype),
        "tail": tail,
        "conv": normal(s.channels, 1, s.conv, seed=4) / s.conv,
        "A_log": normal(s.H, seed=5),
        "dt_bias": normal(s.keys, seed=6) - 4,
    }
    f_proj = make_weight(s.format, s.keys, s.rank, device, seed=3)
    return {**{name: tensor.to(device) for name, tensor in given.items()}, "f_proj": f_proj}


def expected_of(s: Shape, given: dict[str, Any], erase_scale: float) -> Prepared:
    """The same by the verbs, in fp32."""
    ops = TorchOps()

    def dense(name: str) -> Dense:
        return Dense(name, given[name])

    qkv, b, w, x, _ = ops.split(given["y"].float(), (s.channels, s.keys, s.values, s.rank, s.rank))
    f = (x.double() @ given["f_proj"].rows(slice(None)).double().t()).float()
    qkv, tail = ops.short_conv(qkv, dense("conv"), given["tail"])
    q, k, v = ops.split(qkv, (s.keys, s.keys, s.values))
    return Prepared(
        ops.l2_norm(ops.heads(q, s.H)),
        ops.l2_norm(ops.heads(k, s.H)),
        ops.heads(v, s.HV),
        ops.decay(ops.heads(f, s.H), dense("A_log"), dense("dt_bias")),
        ops.sigmoid(ops.heads(b, s.H), erase_scale),
        ops.sigmoid(ops.heads(w, s.HV)),
        tail,
    )


def prepared(
    s: Shape, given: dict[str, Any], erase_scale: float, device: torch.device, count: Tensor | None = None
) -> Prepared:
    sizes = {"heads": (s.H, s.HV), "dims": (s.K, s.V)}
    return prepare(**given, **sizes, erase_scale=erase_scale, count=count, pdl=gpu_of(device).pdl)


def assert_near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    assert found.is_contiguous()
    largest = float(expected.abs().max())
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=tolerance * max(largest, 1e-3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_the_rule_takes(shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    given = inputs(shape, dtype, device)
    before = given["tail"].clone()
    erase_scale = 1.0 + (shape.T % 2)
    found = prepared(shape, given, erase_scale, device)
    for name, expected in expected_of(shape, given, erase_scale)._asdict().items():
        exact = dtype == torch.float32 or name in ("g", "tail")
        assert_near(getattr(found, name), expected, TOLERANCE if exact else ROUNDED)
    assert torch.equal(given["tail"], before)
    assert found.q.dtype == (torch.float32 if dtype == torch.float32 else torch.float16)
    assert found.v.dtype == dtype


@pytest.mark.parametrize("count", [1, 2, 16, 18, 21])
def test_tokens_that_fill_a_shape_up(count: int, device: torch.device) -> None:
    """They leave no trace in the rule's state, nor in the tail; those before them are what they are without."""
    shape = Shape(1, 21, 1, 2, 16, 24)
    given = inputs(shape, torch.float32, device)
    given["y"][:, count:] = torch.nan
    found = prepared(shape, given, 2.0, device, torch.tensor([count], device=device))
    short = Shape(1, count, 1, 2, 16, 24)
    alone = prepared(short, {**given, "y": given["y"][:, :count]}, 2.0, device)
    for name, expected in alone._asdict().items():
        here = getattr(found, name)
        assert torch.equal(here if name == "tail" else here[:, :count], expected), name
    for name in ("k", "g", "w"):
        assert (getattr(found, name)[:, count:] == 0).all()


@pytest.mark.parametrize("kind", ["silu", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("B", "T", "HV", "V", "format", "rank"),
    [(1, 1, 1, 16, "fp32", 8), (2, 9, 3, 24, "int8", 16), (1, 40, 2, 128, "int4 g64", 128)],
)
def test_gated_norm(
    B: int, T: int, HV: int, V: int, format: str, rank: int, dtype: torch.dtype, kind: OutputGate, device: torch.device
) -> None:
    o = (normal(B, T, HV, V) * torch.logspace(-4, 2, T)[:, None, None]).to(device)
    x = normal(B * T, rank + 8, seed=2).to(device, dtype)[:, 8:]  # the last columns of larger rows
    g_proj = make_weight(format, HV * V, rank, device)
    bias, gain = normal(HV * V, seed=3).to(device), normal(V, seed=4).to(device)
    found = gated_norm(o, x, g_proj, bias, gain, EPS, kind, pdl=gpu_of(device).pdl)
    ops = TorchOps()
    gate = (x.double() @ g_proj.rows(slice(None)).double().t()).float().view(B, T, HV * V) + bias
    expected = ops.gate(ops.rms_norm(o, Dense("o_norm", gain), EPS), ops.heads(gate, HV), kind)
    assert found.dtype == dtype
    assert_near(found, ops.merge(expected).flatten(0, 1), TOLERANCE if dtype == torch.float32 else ROUNDED)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "channels"), [(1, 8), (5, 96), (3, 352)])
def test_sum_and_norm_of_rows(tokens: int, channels: int, dtype: torch.dtype, norm: bool, device: torch.device) -> None:
    x, y = normal(tokens, channels).to(device), normal(tokens, channels, seed=2).to(device, dtype)
    gain = normal(channels, seed=3).to(device)
    total, out = torch.full_like(x, torch.nan), torch.full_like(y, torch.nan)
    pdl = gpu_of(device).pdl
    rows.add_rows_kernel[(tokens,)](
        *(x, y, total, gain if norm else None, out if norm else None, EPS),
        **{"D": channels, "D_2": triton.next_power_of_2(channels), "NORM": norm, "PDL": pdl},
        **pdl_options(pdl),
    )
    assert torch.equal(total, x + y.float())
    if norm:
        expected = F.rms_norm(total, (channels,), gain, EPS)
        assert_near(out, expected, TOLERANCE if dtype == torch.float32 else ROUNDED)


def test_glu_of_bf16_rows(device: torch.device) -> None:
    y = normal(3, 192).to(device, torch.bfloat16)
    out = torch.full((3, 96), torch.nan, device=device, dtype=torch.bfloat16)
    pdl = gpu_of(device).pdl
    rows.glu_rows_kernel[3, 2](y, out, F=96, BLOCK=64, PDL=pdl, **pdl_options(pdl))
    first, second = y.float().chunk(2, 1)
    assert_near(out, F.silu(first) * second, ROUNDED)
