"""`gemv` in every format, norm and output against fp64, and the two forms of what it writes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from stored_weights import FORMATS, make_weight
from torch import Tensor

from gdn2_edge.kernels.triton import gemv as gemv_module
from gdn2_edge.kernels.triton.activation import Activation, Forms, make_activation
from gdn2_edge.kernels.triton.gemv import CONFIGS, Config, gemv, gemv_config, num_programs, split_for
from gdn2_edge.kernels.triton.launch import Gpu, gpu_of
from gdn2_edge.weights import Fp8, Int4, Weight

# numpy's, in the interpreter: silu of -100 has an infinite exponential, and what is not finite is meant to go through.
pytestmark = pytest.mark.filterwarnings("ignore:.*(overflow|invalid value|divide by zero) encountered:RuntimeWarning")
EPS = 1e-5
# Of a result of W x: fp32 sums, as a share of the sum of the products' sizes.
SUM_TOLERANCE = 1e-6
# Of what is made of it: the fp32 factor of a norm, silu.
NORM_TOLERANCE = 2e-6
# Fixed point in 16 bits: half a unit of 1 / 32767 of the largest of a block, and the rounding of the unit itself.
PLANE_TOLERANCE = 2**-15
BLOCK = 8

# Channels that are no power of two; what 16 bytes hold or a group has divides them.
CHANNELS = {
    "fp32": (36, 352),
    "fp16": (32, 360),
    "bf16": (40, 288),
    "fp8": (48, 352),
    "int8": (96, 288),
    "int4 g32": (96, 352),
    "int4 g64": (64, 320),
    "int4 g128": (128, 384),
}
# Heads of 8 channels or more: no vector of weights may be taken to lie within one.
HEADS = {36: 3, 352: 11, 32: 4, 360: 5, 40: 5, 288: 12, 48: 2, 96: 4, 64: 8, 320: 5, 128: 4, 384: 3}
# Tiles that end in the middle of a program's rows, chunks that end in the middle of a row, loads far ahead.
SMALL = {"store": Config(3, 2, 128, 4, 2), "add": Config(4, 2, 128, 4, 1), "glu": Config(3, 8, 256, 4, 2)}


def gpus(device: torch.device) -> list[Gpu]:
    """What the device can do; on a GPU also what every other can."""
    gpu = gpu_of(device)
    return [gpu] if gpu.is_interpreter else [gpu, replace(gpu, asm=False, hardware_fp8=False, pdl=False)]


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def empty_activation(channels: int, squares: tuple[int, ...], device: torch.device, split: int = 1) -> Activation:
    """Buffers that nobody wrote: NaN, and codes that give themselves away."""
    activation = make_activation(channels, squares, device, split)
    for buffer in (activation.values, activation.unit, activation.squares):
        buffer.fill_(torch.nan)
    activation.high.fill_(99)
    activation.low.fill_(99)
    return activation


def make_input(
    x: Tensor, squares: Tensor, forms: Forms, device: torch.device, split: int = 1
) -> tuple[Activation, Tensor]:
    """An activation that has only these forms, and the values it stands for in fp64."""
    activation = empty_activation(len(x), tuple(squares.shape), device, split)
    activation.squares.copy_(squares)
    if forms.values:
        activation.values.copy_(x.view(-1, split).t().flatten())
        return activation, x.double()
    blocks = x.view(-1, BLOCK)
    unit = blocks.abs().amax(1, keepdim=True) / 32767
    codes = torch.nan_to_num(blocks / torch.where(unit > 0, unit, 1)).round().int()
    activation.high.copy_((codes >> 8).flatten())
    activation.low.copy_((codes & 255).flatten())
    activation.unit.copy_(unit.flatten())
    return activation, (codes.double() * unit.double()).flatten()


def values_of(x: Activation) -> Tensor:
    """The values of an activation in the order of channels."""
    return x.values.view(x.split, -1).t().flatten().cpu()


def planes_of(x: Activation) -> Tensor:
    """The values that the planes and units of an activation stand for, fp64."""
    codes = x.high.double() * 256 + x.low.double()
    return (codes.view(-1, BLOCK) * x.unit.double()[:, None]).flatten().cpu()


def check_written(out: Activation, expected: Tensor, size: Tensor, forms: Forms) -> None:
    """Both forms hold `expected`, and a form that was not asked for holds what it held."""
    bound = NORM_TOLERANCE * size
    if forms.values:
        assert ((values_of(out).double() - expected).abs() <= bound).all()
    else:
        assert out.values.isnan().all()
    if forms.planes:
        largest = expected.view(-1, BLOCK).abs().amax(1).repeat_interleave(BLOCK)
        assert ((planes_of(out) - expected).abs() <= bound + PLANE_TOLERANCE * largest).all()
    else:
        assert out.unit.isnan().all()
        assert (out.high == 99).all()


def run(
    weight: Weight,
    norm: str,
    output: str,
    gpu: Gpu,
    device: torch.device,
    forms: Forms,
    parts: int = 3,
    splits: tuple[int, int] | None = None,
) -> None:
    """One call with random input against fp64. splits: of the input and the output."""
    split, out_split = splits or (split_for(weight), 4)
    rows, channels = weight.shape[0] // (2 if output == "glu" else 1), weight.shape[1]
    is_integer = weight.name.startswith("int")
    heads = HEADS[channels] if norm == "heads" else 1
    squares = normal(heads, parts).abs() * (channels / heads / parts) + 0.1
    x, exact = make_input(normal(channels, seed=2), squares, Forms(not is_integer, is_integer), device, split)
    if norm == "rms":
        exact = exact * torch.rsqrt(squares.double().sum() / channels + EPS)
    elif norm == "heads":
        factor = torch.rsqrt(squares.double().sum(1) / (channels // heads) + EPS)
        exact = exact * factor.repeat_interleave(channels // heads)
    values = weight.rows(slice(None)).cpu().double()
    # Codes of int4 are multiplied as 0 to 15.
    offset = 8 * weight.scale.cpu().double().repeat_interleave(weight.group_size, 1) if isinstance(weight, Int4) else 0
    product, size = values @ exact, (values.abs() + offset) @ exact.abs()

    gain = normal(rows, seed=3)
    residual = normal(rows, seed=4)
    y = residual.to(device, copy=True) if output == "add" else torch.full((rows,), torch.nan, device=device)
    out = None if output == "store" else empty_activation(rows, (num_programs(weight, output, gpu),), device, out_split)
    gemv(
        x, weight, norm=norm, eps=EPS, output=output, gpu=gpu, forms=forms, out=out,
        y=None if output == "glu" else y, gain=gain.to(device) if output == "add" else None,
    )  # fmt: skip
    tolerance = SUM_TOLERANCE if norm == "none" else NORM_TOLERANCE
    if output == "store":
        assert ((y.cpu().double() - product).abs() <= tolerance * size).all()
        return
    assert out is not None
    if output == "glu":
        first, second = product.split(rows)
        size = size[:rows] * second.abs() + first.abs() * size[rows:] + size[:rows] * size[rows:]
        check_written(out, F.silu(first) * second, size, forms)
        return
    product, size = product + residual, size + residual.abs()
    assert ((y.cpu().double() - product).abs() <= tolerance * size).all()
    check_written(out, product * gain, size * gain.abs(), forms)
    assert abs(float(out.squares.double().sum()) / float(product.square().sum()) - 1) < 1e-5


@pytest.mark.parametrize("output", ["store", "add", "glu"])
@pytest.mark.parametrize("norm", ["rms", "heads", "none"])
@pytest.mark.parametrize("format", FORMATS[:-2])  # larger groups of int4 below
def test_every_format_norm_and_output(format: str, norm: str, output: str, device: torch.device) -> None:
    rows = {"store": 67, "add": 72, "glu": 2 * 40}[output]
    for gpu in gpus(device):
        weight = make_weight(format, rows, CHANNELS[format][0], device)
        run(weight, norm, output, gpu, device, Forms(norm != "rms", norm != "none"))


@pytest.mark.parametrize(("norm", "output"), [("rms", "store"), ("heads", "add"), ("none", "glu")])
@pytest.mark.parametrize("format", FORMATS)
def test_tiles_and_chunks(
    format: str, norm: str, output: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gemv_module, "gemv_config", lambda *_: SMALL[output])
    rows = {"store": 9, "add": 8, "glu": 2 * 24}[output]
    for gpu in gpus(device):
        weight = make_weight(format, rows, CHANNELS[format][1], device)
        run(weight, norm, output, gpu, device, Forms(True, True))


@pytest.mark.parametrize(
    ("first", "second"),
    [("int4 g32", "int8"), ("fp8", "int4 g64"), ("bf16", "fp8"), ("int8", "fp32"), ("fp32", "fp16")],
)
def test_two_formats_in_one_launch(first: str, second: str, device: torch.device) -> None:
    """Each result is that of its matrix alone."""
    x, _ = make_input(normal(192), torch.ones(1, 2), Forms(False, True), device)
    x.values.copy_(normal(192))
    weights = make_weight(first, 70, 192, device), make_weight(second, 11, 192, device, seed=3)
    for gpu in gpus(device):
        both = torch.full((81,), torch.nan, device=device)
        alone = torch.full((81,), torch.nan, device=device)
        gemv(x, *weights, norm="rms", eps=EPS, output="store", gpu=gpu, y=both)
        gemv(x, weights[0], norm="rms", eps=EPS, output="store", gpu=gpu, y=alone[:70])
        gemv(x, weights[1], norm="rms", eps=EPS, output="store", gpu=gpu, y=alone[70:])
        bound = 1e-6 * alone.abs().max()  # other numbers of warps sum in another order
        assert ((both - alone).abs() <= bound).all()


@pytest.mark.gpu
@pytest.mark.parametrize("format", FORMATS)
def test_configurations_of_the_gpu(format: str, device: torch.device) -> None:
    """Sizes of a real model, where programs have all their tiles and the last has some of them."""
    for gpu in gpus(device):
        for rows, channels, norm, output in (
            (2304 + 4, 2304, "rms", "store"),
            (2304, 2048, "none", "add"),
            (2 * 1240, 2304, "rms", "glu"),
            (2312, 6144, "none", "add"),
        ):
            run(make_weight(format, rows, channels, device), norm, output, gpu, device, Forms(True, True))


@pytest.mark.parametrize("splits", [(1, 1), (2, 4), (4, 2)])
@pytest.mark.parametrize("format", ["fp32", "bf16", "fp8"])
def test_values_in_another_order(format: str, splits: tuple[int, int], device: torch.device) -> None:
    """Of matrices whose parts have different formats, one reads values that lie as the other likes them."""
    for gpu in gpus(device):
        weight = make_weight(format, 16, CHANNELS[format][0], device)
        for norm in ("rms", "heads"):
            run(weight, norm, "glu", gpu, device, Forms(True, False), splits=splits)


def test_every_code_of_fp8(device: torch.device) -> None:
    """Times values of one size each: subnormals are not flushed, nor is the largest value clipped."""
    codes = torch.tensor([code for code in range(256) if code & 127 != 127], dtype=torch.uint8)
    data = torch.zeros(len(codes), 64, dtype=torch.uint8)
    place = torch.arange(len(codes)) % 64
    data[torch.arange(len(codes)), place] = codes
    weight = Fp8("fp8", data.view(torch.float8_e4m3fn).to(device), torch.ones(len(codes), 1, device=device))
    x = torch.linspace(-20, 20, 64).exp2()
    for gpu in gpus(device):
        activation, _ = make_input(x, torch.ones(1, 1), Forms(True, False), device, split_for(weight))
        y = torch.full((len(codes),), torch.nan, device=device)
        gemv(activation, weight, norm="none", eps=EPS, output="store", gpu=gpu, y=y)
        assert torch.equal(y.cpu(), codes.view(torch.float8_e4m3fn).float() * x[place])


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_parts_of_squares(parts: int, device: torch.device) -> None:
    """However many programs left one."""
    for norm in ("rms", "heads"):
        run(make_weight("int8", 8, 96, device), norm, "store", gpu_of(device), device, Forms(True, True), parts)


@pytest.mark.parametrize("format", ["fp32", "bf16", "fp8", "int8", "int4 g32"])
@pytest.mark.parametrize("norm", ["rms", "heads", "none"])
def test_a_nan_reaches_every_result(format: str, norm: str, device: torch.device) -> None:
    channels = 96
    is_integer = format.startswith("int")
    x = normal(channels)
    x[37] = torch.nan
    weight = make_weight(format, 16, channels, device)
    activation, _ = make_input(x, torch.ones(4, 1), Forms(not is_integer, is_integer), device)
    y = torch.zeros(16, device=device)
    gemv(activation, weight, norm=norm, eps=EPS, output="store", gpu=gpu_of(device), y=y)
    assert y.isnan().all()


@pytest.mark.parametrize("format", ["fp32", "int8", "int4 g32"])
def test_a_nan_in_the_squares_reaches_every_result(format: str, device: torch.device) -> None:
    is_integer = format.startswith("int")
    squares = torch.tensor([[1.0], [torch.nan]])
    activation, _ = make_input(normal(64), squares, Forms(not is_integer, is_integer), device)
    weight = make_weight(format, 8, 64, device)
    for norm in ("rms", "heads"):
        y = torch.zeros(8, device=device)
        gemv(activation, weight, norm=norm, eps=EPS, output="store", gpu=gpu_of(device), y=y)
        assert y.isnan().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_written_to_its_block(bad: float, device: torch.device) -> None:
    """To both forms, and to no other block."""
    weight = make_weight("int8", 24, 32, device)
    activation, _ = make_input(torch.zeros(32), torch.ones(1, 1), Forms(False, True), device)
    y = normal(24).to(device)
    y[10] = bad
    out = empty_activation(24, (num_programs(weight, "add", gpu_of(device)),), device)
    gain = torch.ones(24, device=device)
    gemv(activation, weight, norm="rms", eps=EPS, output="add", gpu=gpu_of(device), y=y, gain=gain, out=out)
    assert not torch.isfinite(y[10])
    assert not torch.isfinite(out.squares).all()
    expected = y.cpu().double()
    found = planes_of(out)
    assert not torch.isfinite(out.values[10])
    assert not torch.isfinite(found[10])
    others = torch.arange(24) // BLOCK != 1
    assert torch.equal(out.values.cpu()[others], y.cpu()[others])
    assert ((found - expected)[others].abs() <= PLANE_TOLERANCE * expected[others].abs().max()).all()


@pytest.mark.parametrize("format", FORMATS)
def test_zeros(format: str, device: torch.device) -> None:
    """Zeros give zeros in both forms, though there is nothing to divide by."""
    channels = CHANNELS[format][0]
    is_integer = format.startswith("int")
    activation, _ = make_input(torch.zeros(channels), torch.zeros(1, 1), Forms(not is_integer, is_integer), device)
    weight = make_weight(format, 16, channels, device)
    out = empty_activation(8, (1,), device)
    gemv(activation, weight, norm="rms", eps=EPS, output="glu", gpu=gpu_of(device), out=out)
    for buffer in (out.values, out.unit, out.high, out.low):
        assert not buffer.any()


def test_planes_of_blocks_of_every_size(device: torch.device) -> None:
    """Each block has a unit of its own: the largest of 8 is 32767 units."""
    exponents = torch.linspace(-100, 50, 12).repeat_interleave(BLOCK)
    x = normal(96).clamp(-2, 2) * exponents.exp2()
    x[40:48] = 0
    x[7], x[8] = -x[:8].abs().max(), x[8:16].abs().max()
    weight = make_weight("int8", 96, 32, device)
    activation, _ = make_input(torch.zeros(32), torch.ones(1, 1), Forms(False, True), device)
    out = empty_activation(96, (num_programs(weight, "add", gpu_of(device)),), device)
    y, gain = x.to(device, copy=True), torch.ones(96, device=device)
    gemv(activation, weight, norm="none", eps=EPS, output="add", gpu=gpu_of(device), y=y, gain=gain, out=out)
    assert torch.equal(out.values.cpu(), x)
    largest = x.double().view(-1, BLOCK).abs().amax(1).repeat_interleave(BLOCK)
    assert ((planes_of(out) - x).abs() <= PLANE_TOLERANCE * largest).all()
    assert int((out.high.int() * 256 + out.low.int()).abs().max()) == 32767


def test_again_gives_the_same_bits(device: torch.device) -> None:
    for format in ("bf16", "int8", "int4 g32"):
        weight, is_integer = make_weight(format, 80, 96, device), format.startswith("int")
        results = []
        for _ in range(2):
            x, _ = make_input(normal(96), torch.ones(1, 2), Forms(not is_integer, is_integer), device)
            out = empty_activation(80, (num_programs(weight, "add", gpu_of(device)),), device)
            y, gain = normal(80).to(device), normal(80, seed=5).to(device)
            gemv(x, weight, norm="rms", eps=EPS, output="add", gpu=gpu_of(device), y=y, gain=gain, out=out)
            results.append([y, out.values, out.high, out.low, out.unit, out.squares])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_configurations_keep_blocks_whole() -> None:
    """A program that writes planes starts at a multiple of 8 rows; chunks hold whole vectors of 16 bytes."""
    gpu = Gpu(asm=True, hardware_fp8=True, pdl=True, multiprocessors=132)
    for format in CONFIGS:
        for channels in (32, 64, 96, 768, 2304, 6208):
            for output in ("store", "add", "glu"):
                config = gemv_config(format, channels, output, gpu)
                assert output == "store" or config.tiles * config.block_n % BLOCK == 0
                assert config.block_k & (config.block_k - 1) == 0
                assert config.block_k <= 2 * channels
                assert config.ahead >= 1
