"""Drawing one of a sequence's best scores, as `generate.sampler` draws it. Knows scores and numbers; no tokens."""

from __future__ import annotations

import triton
import triton.language as tl

GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
FIRST_FACTOR = tl.constexpr(0xBF58476D1CE4E5B9)
SECOND_FACTOR = tl.constexpr(0x94D049BB133111EB)


@triton.jit
def drawn_rank(b_score, uniform, temperature, kept, top_p, min_p):
    """The rank of the drawn score, among the first `kept` of b_score [N] fp32 in falling order; the rest is fp64.

    Nothing but the order of the sums and the last bits of exp may differ from the sampler.
    """
    o_rank = tl.arange(0, b_score.numel)
    b_score = tl.where(o_rank < kept, b_score, float("-inf"))
    # From 0 downwards, so that no temperature overflows.
    b_weight = tl.exp((b_score - tl.max(b_score, axis=0)).to(tl.float64) / temperature)
    b_probability = b_weight / tl.sum(b_weight, axis=0)
    b_before = tl.cumsum(b_probability, axis=0) - b_probability
    is_dropped = (b_before >= top_p) | (b_probability < min_p * tl.max(b_probability, axis=0))
    b_cumulative = tl.cumsum(tl.where(is_dropped, 0.0, b_probability), axis=0)
    target = uniform * tl.max(b_cumulative, axis=0)
    return tl.minimum(tl.sum((b_cumulative <= target).to(tl.int32), axis=0), kept - 1)


@triton.jit
def uniform_number(seed, row, position):
    """A number in [0, 1), fp64, from three integers."""
    state = _mix(seed.to(tl.uint64))
    state = _mix(state + row.to(tl.uint64))
    state = _mix(state + position.to(tl.uint64))
    return (state >> 11).to(tl.float64) * (1.0 / 2**53)


@triton.jit
def _mix(state):
    """The finalizer of splitmix64."""
    state += GOLDEN
    state = (state ^ (state >> 30)) * FIRST_FACTOR
    state = (state ^ (state >> 27)) * SECOND_FACTOR
    return state ^ (state >> 31)
