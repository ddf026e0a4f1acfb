"""One token of a GDN-2 mixer between its projections, against the verbs it stands for, step after step."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import triton
from stored_weights import make_weight
from torch import Tensor

from gdn2_edge.kernels.triton.activation import Activation, make_activation
from gdn2_edge.kernels.triton.launch import OFFSET_FLOATS, gpu_of, pdl_options
from gdn2_edge.kernels.triton.recurrence import decode_kernel
from gdn2_edge.kernels.triton.stored import stored
from gdn2_edge.torch_ops import TorchOps
from gdn2_edge.weights import Dense

OPS = TorchOps()
EPS = 1e-5
UNIT = OFFSET_FLOATS.value
STEPS = 5
# fp32 sums of up to 128 products in another order, through a norm, gates and five tokens; values are of size 1.
TOLERANCE = 2e-5
PLANE_TOLERANCE = 2**-15  # of the largest of 8 neighbours: 16-bit fixed point
# numpy's, in the interpreter: what is not finite is meant to go through.
pytestmark = pytest.mark.filterwarnings("ignore:.*(overflow|invalid value|slice) encountered:RuntimeWarning")


@dataclass(frozen=True)
class Case:
    H: int
    HV: int
    K: int
    V: int
    block_v: int
    f_format: str = "fp32"
    g_format: str = "fp32"
    gate: str = "silu"
    conv: int = 4
    erase_scale: float = 1.0
    batch: int = 1
    steps: int = STEPS

    @property
    def keys(self) -> int:
        return self.H * self.K

    @property
    def values(self) -> int:
        return self.HV * self.V


CASES = [
    Case(H=1, HV=2, K=8, V=24, block_v=8, erase_scale=2.0, batch=2, steps=3),
    Case(H=2, HV=2, K=16, V=8, block_v=8, conv=2, gate="sigmoid"),
    Case(H=1, HV=1, K=24, V=64, block_v=32, f_format="int8", g_format="int8", erase_scale=2.0),
    Case(H=2, HV=4, K=20, V=32, block_v=32, f_format="bf16", g_format="int4 g32", gate="sigmoid", steps=2),
    Case(H=1, HV=2, K=64, V=32, block_v=32, f_format="int4 g32", g_format="fp16", conv=2, steps=3),
    Case(H=1, HV=1, K=32, V=40, block_v=8, f_format="fp8", g_format="fp8", conv=3, batch=2, steps=2),
    Case(H=1, HV=1, K=128, V=128, block_v=32, f_format="int4 g64", g_format="int4 g128", steps=2),
]


class Run:
    """The states of a case inside one buffer of NaN, two places for each sequence; and the reference's own."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        self.random = torch.Generator().manual_seed(case.K + case.V)
        self.channels = 2 * case.keys + case.values
        self.conv_floats = self.channels * (case.conv - 1)
        self.s_floats = case.HV * case.K * case.V
        # A layer's part of a state, with something before it, between its tensors and after it.
        self.conv_offset = 16
        self.s_offset = self.conv_offset + -(-self.conv_floats // 16) * 16 + 16
        self.block_floats = self.s_offset + -(-self.s_floats // 16) * 16 + 16
        places = 2 * case.batch
        self.base = torch.full(((places + 1) * self.block_floats,), torch.nan, device=device)
        order = torch.randperm(places, generator=self.random)
        offsets = (order * self.block_floats + 32) // UNIT
        self.source, self.target = (part.to(device) for part in offsets.view(2, -1))
        self.conv = self.normal(case.batch, self.channels, case.conv - 1)
        self.S = self.normal(case.batch, case.HV, case.K, case.V)
        for b in range(case.batch):
            conv, S = self.views(self.source[b])
            conv.copy_(self.conv[b])
            S.copy_(self.S[b])

        self.filters = Dense("conv", self.normal(self.channels, 1, case.conv))
        self.f = make_weight(case.f_format, case.keys, case.V, torch.device("cpu"), seed=1)
        self.g = make_weight(case.g_format, case.values, case.V, torch.device("cpu"), seed=2)
        self.g_bias = Dense("g_bias", self.normal(case.values))
        self.A_log = Dense("A_log", self.normal(case.H))
        # From decays that keep next to nothing to some that keep all but a millionth.
        self.dt_bias = Dense("dt_bias", torch.linspace(-14, 3, case.keys))
        self.o_norm = Dense("o_norm", self.normal(case.V))

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.random)

    def inputs(self) -> Tensor:
        """q, k, v, b, w, f, g of each sequence, in a buffer whose rows are wider."""
        case = self.case
        y = self.normal(case.batch, 3 * case.keys + 2 * case.values + 2 * case.V)
        y[:, -2 * case.V :] *= 0.3
        return torch.cat([y, torch.full((case.batch, 5), torch.nan)], 1)

    def views(self, offset: Tensor) -> tuple[Tensor, Tensor]:
        """The convolution's inputs and S of the state at an offset."""
        case, start = self.case, int(offset) * UNIT
        conv = self.base[start + self.conv_offset :][: self.conv_floats].view(self.channels, case.conv - 1)
        return conv, self.base[start + self.s_offset :][: self.s_floats].view(case.HV, case.K, case.V)

    def reference(self, y: Tensor) -> Tensor:
        """The verbs of `forward.gdn2`, on the reference's state: [B, HV, V]."""
        c = self.case
        y = y[:, None, : 3 * c.keys + 2 * c.values + 2 * c.V]
        qkv, b, w, f, g = OPS.split(y, (2 * c.keys + c.values, c.keys, c.values, c.V, c.V))
        qkv, self.conv = OPS.short_conv(qkv, self.filters, self.conv)
        q, k, v = OPS.split(qkv, (c.keys, c.keys, c.values))
        q, k, v = OPS.l2_norm(OPS.heads(q, c.H)), OPS.l2_norm(OPS.heads(k, c.H)), OPS.heads(v, c.HV)
        f, g = (f @ self.f.rows(slice(None)).T), (g @ self.g.rows(slice(None)).T) + self.g_bias.data
        decay = OPS.decay(OPS.heads(f, c.H), self.A_log, self.dt_bias)
        erase, write = OPS.sigmoid(OPS.heads(b, c.H), c.erase_scale), OPS.sigmoid(OPS.heads(w, c.HV))
        o, self.S = OPS.gated_delta_rule2(q, k, v, decay, erase, write, self.S)
        return OPS.gate(OPS.rms_norm(o, self.o_norm, EPS), OPS.heads(g, c.HV), c.gate)[:, 0]

    def ours(self, y: Tensor, values: int = 1, planes: bool = True) -> Activation:
        """One launch, whose output comes from buffers that nobody wrote. Planes are for one sequence only."""
        c = self.case
        planes = planes and c.batch == 1
        parts, padded = triton.cdiv(c.V, c.block_v), triton.next_power_of_2(c.K)
        out = make_activation(c.batch * c.values, (c.batch * c.HV, parts), self.device)
        for buffer in (out.values, out.unit, out.squares):
            buffer.fill_(torch.nan)
        out.high.fill_(99)
        vectors = torch.full((c.batch, c.HV, parts, 2, c.block_v), torch.nan, device=self.device)
        on_device = [weight.data.to(self.device) for weight in (self.g_bias, self.A_log, self.dt_bias, self.o_norm)]
        (f_format, *f), (g_format, *g) = stored(self.f), stored(self.g)
        f, g = ([x.to(self.device) if isinstance(x, Tensor) else x for x in w] for w in (f, g))
        gpu = gpu_of(self.device)
        decode_kernel[(parts, c.HV, c.batch)](
            y.to(self.device), self.base, self.source, self.target, self.conv_offset, self.s_offset,
            self.filters.data.to(self.device), *f[:2], *g[:2], *on_device,
            out.values, out.high, out.low, out.unit, out.squares, vectors,
            y.stride(0), c.K**-0.5, c.erase_scale,
            H=c.H, HV=c.HV, K=c.K, V=c.V, RANK=c.V, CONV=c.conv, K_2=padded, RANK_2=triton.next_power_of_2(c.V),
            BLOCK_V=c.block_v, F_FORMAT=f_format, F_GROUP=f[2], G_FORMAT=g_format, G_GROUP=g[2], GATE=c.gate,
            VALUES=values, PLANES=planes, ASM=gpu.asm, HARDWARE_FP8=gpu.hardware_fp8,
            PDL=gpu.pdl, **pdl_options(gpu.pdl),
        )  # fmt: skip
        return out


def normalised(out: Activation, values: Tensor, case: Case) -> Tensor:
    """What the reader makes of an output: each head times its RMS factor, [B, HV, V]."""
    factor = torch.rsqrt(out.squares.double().sum(1) / case.V + EPS).cpu()
    return values.cpu().double().view(case.batch, case.HV, case.V) * factor.view(case.batch, case.HV, 1)


def planes_of(out: Activation) -> Tensor:
    return ((out.high.double() * 256 + out.low.double()).view(-1, 8) * out.unit.double()[:, None]).flatten()


def only_targets_differ(run: Run, before: Tensor) -> bool:
    """Whether the buffer is as before, bit for bit, but for the states after the token; and those hold no NaN."""
    after, run.base = run.base, before
    expected = before.clone()
    for b in range(run.case.batch):
        run.base = expected
        places = run.views(run.target[b])
        run.base = after
        for place, written in zip(places, run.views(run.target[b]), strict=True):
            if written.isnan().any():
                return False
            place.copy_(written)
    return torch.equal(after.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_step_after_step(case: Case, device: torch.device) -> None:
    run = Run(case, device)
    for _ in range(case.steps):
        for b in range(case.batch):
            for place in run.views(run.target[b]):
                place.fill_(torch.nan)
        y, before = run.inputs(), run.base.clone()
        out, expected = run.ours(y), run.reference(y).double()
        assert only_targets_differ(run, before)
        found = normalised(out, out.values, case)
        assert (found - expected).abs().max() < TOLERANCE
        if case.batch == 1:
            largest = found.view(-1, 8).abs().amax(1, keepdim=True)
            fixed_point = normalised(out, planes_of(out), case)
            assert ((fixed_point - found).view(-1, 8).abs() <= PLANE_TOLERANCE * largest).all()
        for b in range(case.batch):
            conv, S = run.views(run.target[b])
            assert torch.equal(conv.cpu(), run.conv[b])
            assert (S.cpu() - run.S[b]).abs().max() < TOLERANCE
        run.source, run.target = run.target, run.source


SMALL = Case(H=1, HV=2, K=16, V=16, block_v=8)


def test_again_gives_the_same_bits(device: torch.device) -> None:
    """A step that was abandoned can be done again: the state before it is whole."""
    run = Run(SMALL, device)
    y = run.inputs()
    first, base = run.ours(y), run.base.clone()
    again = run.ours(y)
    for name in ("values", "high", "low", "unit", "squares"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert torch.equal(run.base.view(torch.int32), base.view(torch.int32))


def test_a_sequence_does_not_depend_on_the_other(device: torch.device) -> None:
    run = Run(replace(SMALL, batch=2), device)
    y = run.inputs()
    first = run.ours(y)
    y[1], (conv, S) = 7 * y[1], run.views(run.source[1])
    conv.mul_(-3)
    S.fill_(torch.nan)
    second = run.ours(y)
    half = SMALL.values
    assert torch.equal(first.values[:half], second.values[:half])
    assert second.values[half:].isnan().all()


@pytest.mark.parametrize(("values", "planes"), [(1, False), (4, False), (0, True)])
def test_only_the_form_that_is_asked_for(values: int, planes: bool, device: torch.device) -> None:
    y = Run(SMALL, device).inputs()
    both, one = Run(SMALL, device).ours(y), Run(SMALL, device).ours(y, values, planes)
    in_order = one.values.view(max(values, 1), -1).t().flatten()
    assert torch.equal(in_order, both.values) if values else in_order.isnan().all()
    assert torch.equal(planes_of(one), planes_of(both)) if planes else one.unit.isnan().all()
    assert torch.equal(one.squares, both.squares)


@pytest.mark.parametrize("place", ["q", "k", "v", "b", "w", "f", "g"])
def test_a_nan_reaches_the_output(place: str, device: torch.device) -> None:
    run, c = Run(SMALL, device), SMALL
    sizes = {"q": c.keys, "k": c.keys, "v": c.values, "b": c.keys, "w": c.values, "f": c.V, "g": c.V}
    start = sum(list(sizes.values())[: list(sizes).index(place)])
    y = run.inputs()
    y[0, start + 3] = torch.nan
    out = run.ours(y)
    found = torch.stack([out.values.cpu(), planes_of(out).float().cpu()])
    assert found.isnan().any(1).all()
    if place not in "vw":  # those are of one value channel alone
        assert found.isnan().all()


def test_decay_without_input(device: torch.device) -> None:
    """Without a key the state only decays, by factors from 0 to all but a millionth, right to two last places."""
    run = Run(Case(H=1, HV=1, K=64, V=8, block_v=8), device)
    run.views(run.source[0])[0].zero_()
    run.views(run.source[0])[1].fill_(1.0)
    run.dt_bias = Dense("dt_bias", torch.linspace(-16, 100, 64))
    run.ours(torch.zeros_like(run.inputs()))
    rate = run.A_log.data.double().exp()
    expected = torch.exp(-rate * torch.nn.functional.softplus(run.dt_bias.data.double()))
    found = run.views(run.target[0])[1][0].cpu().double()
    assert ((found - expected[:, None]).abs() <= 2.5e-7 + 1e-6 * (1 - expected[:, None])).all()
