"""One step of window attention against the verbs it stands for, token by token, over more than two windows."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from gdn2_edge.kernels.triton.attention import count_splits, rotary_angles, scratch_shape, window_decode
from gdn2_edge.torch_ops import TorchOps

BASE = 10000.0
OPS = TorchOps()
# fp32 sums of at most 100 slots and 64 channels in another order; values are of size 1.
OUTPUT_TOLERANCE = 5e-6
# Two products and a sum, of values up to 5, rounded once less on a GPU.
ROTATION_TOLERANCE = 1e-6
# Scores of 10 ** 4 are right to 10 ** -3, and so are their exponentials.
LARGE_SCORE_TOLERANCE = 1e-2
# cos and sin of the same fp64 angle, rounded to fp32: half a last place each.
ANGLE_TOLERANCE = 6e-8


@dataclass(frozen=True)
class Case:
    window: int
    groups: int
    head_dim: int
    splits: int
    starts: tuple[int, ...]  # the first position of each sequence
    kv_heads: int = 1
    stride: int = 1  # in the interpreter, which is slow, only every so many-th step is ours

    @property
    def q_heads(self) -> int:
        return self.groups * self.kv_heads

    @property
    def width(self) -> int:
        return (self.q_heads + 2 * self.kv_heads) * self.head_dim


CASES = [
    Case(window=1, groups=2, head_dim=8, splits=1, starts=(0, 1, 2**40)),
    Case(window=5, groups=1, head_dim=16, splits=2, starts=(0,), kv_heads=2),
    Case(window=5, groups=4, head_dim=8, splits=2, starts=(3, 0, 11), stride=3),
    Case(window=48, groups=2, head_dim=64, splits=2, starts=(0,), kv_heads=2, stride=19),
    Case(window=48, groups=3, head_dim=10, splits=5, starts=(2**53 - 120,), stride=25),
    Case(window=64, groups=4, head_dim=16, splits=1, starts=(1,), stride=13),
    Case(window=64, groups=1, head_dim=64, splits=3, starts=(0, 64), stride=29),
    Case(window=100, groups=1, head_dim=8, splits=3, starts=(0,), stride=19),
]


class Run:
    """The rings of a case: ours inside a buffer of NaN, at odd places; the reference's in tensors."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        self.random = torch.Generator().manual_seed(case.window)
        batch, ring = len(case.starts), case.window * case.kv_heads * case.head_dim
        self.position = torch.tensor(case.starts)
        self.k_ring, self.v_ring = 48, 48 + ring + 20
        stride = (self.v_ring + ring) // 16 + 3
        self.offset = torch.arange(batch - 1, -1, -1) * stride + 2  # the last sequence lies first
        self.base = torch.full((16 * stride * (batch + 1),), float("nan"))
        shape = (case.window, case.kv_heads, case.head_dim)
        self.ring_k, self.ring_v = torch.zeros(batch, *shape), torch.zeros(batch, *shape)
        for row, start in enumerate(case.starts):
            held = min(start, case.window)
            for ring_of_row, ours in zip((self.ring_k[row], self.ring_v[row]), self.rings(row), strict=True):
                ring_of_row[:held] = torch.randn(held, *shape[1:], generator=self.random)
                ours[:held] = ring_of_row[:held]
        self.base = self.base.to(device)
        self.scratch_shape = (batch, case.q_heads, case.splits, case.head_dim + 4)

    def rings(self, row: int) -> tuple[Tensor, Tensor]:
        shape = (self.case.window, self.case.kv_heads, self.case.head_dim)
        starts = [int(self.offset[row]) * 16 + ring for ring in (self.k_ring, self.v_ring)]
        k, v = (self.base[start : start + shape[0] * shape[1] * shape[2]].view(shape) for start in starts)
        return k, v

    def take_over(self) -> None:
        """The newest rows of the reference's rings into ours."""
        for row, slot in enumerate((self.position % self.case.window).tolist()):
            for ring_of_row, ours in zip((self.ring_k[row], self.ring_v[row]), self.rings(row), strict=True):
                ours[slot] = ring_of_row[slot]

    def inputs(self) -> Tensor:
        return torch.randn(len(self.case.starts), self.case.width, generator=self.random)

    def ours(self, qkv: Tensor, split: int = 1) -> Tensor:
        case = self.case
        position = self.position.to(self.device)
        angles = torch.full((len(position), case.head_dim // 2, 2), float("nan"), device=self.device)
        out = torch.full((len(position), case.q_heads * case.head_dim), float("nan"), device=self.device)
        rotary_angles(position, BASE, angles)
        window_decode(
            qkv.to(self.device),
            position,
            angles,
            self.base,
            self.offset.to(self.device),
            self.k_ring,
            self.v_ring,
            out,
            torch.full(self.scratch_shape, float("nan"), device=self.device),
            q_heads=case.q_heads,
            kv_heads=case.kv_heads,
            head_dim=case.head_dim,
            window=case.window,
            split=split,
        )
        return out.cpu()

    def reference(self, qkv: Tensor) -> Tensor:
        q_dim, kv_dim = self.case.q_heads * self.case.head_dim, self.case.kv_heads * self.case.head_dim
        q, k, v = OPS.split(qkv[:, None], (q_dim, kv_dim, kv_dim))
        q = OPS.rope(OPS.heads(q, self.case.q_heads), self.position, BASE)
        k = OPS.rope(OPS.heads(k, self.case.kv_heads), self.position, BASE)
        v = OPS.heads(v, self.case.kv_heads)
        o, self.ring_k, self.ring_v = OPS.window_attention(q, k, v, self.ring_k, self.ring_v, self.position)
        return OPS.merge(o)[:, 0]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_steps_over_two_windows(case: Case, device: torch.device) -> None:
    run = Run(case, device)
    for step in range(2 * case.window + 3):
        qkv = run.inputs()
        expected = run.reference(qkv)
        if device.type == "cpu" and step % case.stride:
            run.take_over()
        else:
            torch.testing.assert_close(run.ours(qkv), expected, rtol=0, atol=OUTPUT_TOLERANCE)
        run.position += 1
    for row in range(len(case.starts)):
        ours_k, ours_v = (ring.cpu() for ring in run.rings(row))
        torch.testing.assert_close(ours_k, run.ring_k[row], rtol=0, atol=ROTATION_TOLERANCE)
        assert torch.equal(ours_v, run.ring_v[row])
    written = run.base.isfinite().sum()
    assert written == run.ring_k.numel() + run.ring_v.numel()  # and nothing between the rings


def test_again_gives_the_same_bits(device: torch.device) -> None:
    run = Run(Case(window=20, groups=2, head_dim=16, splits=2, starts=(0, 19, 33)), device)
    for _ in range(2):
        qkv = run.inputs()
        first, rings = run.ours(qkv), run.base.clone()
        assert torch.equal(run.ours(qkv), first)
        assert torch.equal(run.base.view(torch.int32), rings.view(torch.int32))
        run.position += 1


def test_the_order_of_values(device: torch.device) -> None:
    run = Run(Case(window=20, groups=2, head_dim=16, splits=2, starts=(5,)), device)
    qkv = run.inputs()
    assert torch.equal(run.ours(qkv, split=4).view(4, -1).t().flatten(), run.ours(qkv)[0])


def test_a_sequence_does_not_depend_on_its_batch(device: torch.device) -> None:
    together = Run(Case(window=12, groups=2, head_dim=8, splits=2, starts=(0, 5, 40)), device)
    alone = Run(Case(window=12, groups=2, head_dim=8, splits=2, starts=(0,)), device)
    for _ in range(3):
        qkv = together.inputs()
        assert torch.equal(together.ours(qkv)[:1], alone.ours(qkv[:1]))
        together.position += 1
        alone.position += 1


def test_large_scores(device: torch.device) -> None:
    run = Run(Case(window=12, groups=1, head_dim=16, splits=2, starts=(10,)), device)
    for _ in range(4):
        qkv = run.inputs()
        qkv[:, :32] *= 100  # scores of thousands: one slot takes nearly all, and exp must not overflow
        expected = run.reference(qkv)
        torch.testing.assert_close(run.ours(qkv), expected, rtol=0, atol=LARGE_SCORE_TOLERANCE)
        run.position += 1


@pytest.mark.parametrize("half", [4, 5, 64])
def test_angles_far_out(half: int, device: torch.device) -> None:
    position = torch.tensor([0, 1, 2047, 2**24 + 1, 2**40, 2**40 + 1, 2**53 - 1, 2**53])
    table = torch.full((len(position), half, 2), float("nan"), device=device)
    rotary_angles(position.to(device), BASE, table)
    channels = torch.arange(half, dtype=torch.float64) * 2 / (2 * half)
    angles = position.double()[:, None] * BASE**-channels
    expected = torch.stack([angles.cos(), angles.sin()], -1)
    torch.testing.assert_close(table.cpu().double(), expected, rtol=0, atol=ANGLE_TOLERANCE)


@pytest.mark.parametrize("multiprocessors", [1, 28, 132, 170])
@pytest.mark.parametrize("heads", [1, 18, 132, 2304])
@pytest.mark.parametrize("window", [1, 127, 2048, 32768])
def test_splits(window: int, heads: int, multiprocessors: int) -> None:
    splits = count_splits(window, heads, multiprocessors)
    assert 1 <= splits <= 64
    assert splits == 1 or window // splits >= 32
    assert splits == 1 or splits * heads <= 8 * multiprocessors


def test_one_sequence_fills_the_gpu() -> None:
    assert scratch_shape(1, q_heads=18, kv_heads=18, head_dim=128, window=2048, multiprocessors=132) == (1, 18, 22, 132)
