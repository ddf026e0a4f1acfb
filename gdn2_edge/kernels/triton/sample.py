"""Choosing the next token on the device, inside a captured graph. Knows logits, token ids and plain numbers; no text,
no `Sampling`.

Everything that may change between two tokens lies in device memory (`write_options`), so nothing is captured again.

The first kernel writes each score as an integer of the same order, and two levels of a tree above them: a node holds
the highest of its 16 children. Nodes and ids are compared by 64-bit keys, the score above the complement of the index,
so no two are equal and of equal scores the lowest index comes first. The best 64 of a level lie among the children of
the best 64 nodes above it: any other node has 64 nodes before it, and so has each of its children. The second kernel
goes down the tree, one program a sequence. By the time it runs again other kernels have had the instruction cache, so
it is short and made of loops.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn2_edge.kernels.triton.draw import drawn_rank, uniform_number
from gdn2_edge.kernels.triton.launch import let_next_start, pdl_options, wait_for_previous
from gdn2_edge.kernels.triton.rows import advance

MAX_TOP_K = 64
MAX_WINDOW = 64
MAX_VOCABULARY = 2**19  # the roots are the children of the nodes that a search starts from

# Columns of the options, each 8 bytes: integers, then the bits of fp64 numbers.
COLUMNS = 8
STRIDE = tl.constexpr(COLUMNS)
SEED, ROW, TOP_K, WINDOW = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
TEMPERATURE, TOP_P, MIN_P, PENALTY = tl.constexpr(4), tl.constexpr(5), tl.constexpr(6), tl.constexpr(7)

ARITY = tl.constexpr(16)
ROOT = tl.constexpr(16 * 16)  # ids below a root
TREE = tl.constexpr(16 * 16 + 16 + 1)  # scores for each root
BLOCK = tl.constexpr(4 * 16 * 16)  # ids a program of the first kernel
KEEP = tl.constexpr(MAX_TOP_K)
SLOTS = tl.constexpr(2 * MAX_TOP_K)  # a search may end at any number from KEEP to SLOTS, so a few rounds do

NO_KEY = tl.constexpr(-(2**63))  # below every key
NO_ORDER = tl.constexpr(-(2**31))  # below -inf
LOWEST, HIGHEST = tl.constexpr(-0x7F800001), tl.constexpr(0x7F800000)  # -inf and inf; NaN is above
INDEX_MASK = tl.constexpr(0x7FFFFFFF)
NOWHERE = tl.constexpr(2**20)  # a node after all others, with children after all others


class Tables(NamedTuple):
    """Which states a step of each sequence has read and written and the one that is free, int64 [B]."""

    source: Tensor
    target: Tensor
    spare: Tensor


class Scratch(NamedTuple):
    """For each sequence: tree, int32 scores in the order ids, nodes, roots; best, int64, the best key of each program;
    slots, int64, where threads of a program hand keys to one another.
    """

    tree: Tensor
    best: Tensor
    slots: Tensor


def fits(vocabulary: int, top_k: int, temperature: float, repetition_penalty: float, repetition_window: int) -> bool:
    """Whether `sample` can do it; all else about sampling it always can."""
    return (
        vocabulary <= MAX_VOCABULARY
        and (temperature == 0 or 1 <= top_k <= MAX_TOP_K)
        and (repetition_penalty == 1 or repetition_window <= MAX_WINDOW)
    )


def write_options(
    row: Tensor,
    *,
    seed: int,
    row_index: int,
    top_k: int,
    repetition_window: int,
    temperature: float,
    top_p: float,
    min_p: float,
    repetition_penalty: float,
) -> None:
    """Write one sequence's options into `row` [COLUMNS] int64 on the CPU; `row_index` is its row for the noise."""
    row[:4] = torch.tensor([seed, row_index, top_k, repetition_window], dtype=torch.int64)
    row.view(torch.float64)[4:] = torch.tensor([temperature, top_p, min_p, repetition_penalty], dtype=torch.float64)


def make_scratch(batch: int, vocabulary: int, device: torch.device) -> Scratch:
    """What `sample` writes on its way, for up to `batch` sequences."""
    programs = triton.cdiv(vocabulary, BLOCK.value)
    return Scratch(
        tree=torch.empty(batch, programs * (BLOCK.value // ROOT.value) * TREE.value, dtype=torch.int32, device=device),
        best=torch.empty(batch, programs, dtype=torch.int64, device=device),
        slots=torch.empty(batch, SLOTS.value + KEEP.value, dtype=torch.int64, device=device),
    )


def sample(
    logits: Tensor,
    position: Tensor,
    options: Tensor,
    recent: Tensor,
    token: Tensor,
    scratch: Scratch,
    *,
    chosen: Tensor | None = None,
    tables: Tables | None = None,
    pdl: bool = False,
) -> None:
    """Choose a token for each sequence, into `token`, and append it to `recent`.

    It is the token that `generate.sampler.Sampler` chooses on a CPU unless a difference of 1e-14 in fp64 decides: the
    order of its sums and the last bits of exp are the device's.

    Args:
        logits: [B, V] fp32, V up to MAX_VOCABULARY.
        position: [B] int64, tokens fed so far.
        options: [B, COLUMNS] int64, see `write_options`.
        recent: [B, W] int64, W from 1 to 64: the last chosen tokens, oldest first, -1 where none.
        token: [B] int64; -1 where the logits are not finite (NaN or inf, or all -inf), and `recent` stays.
        chosen: [R, B] int64, also in pinned memory of the host: the token goes to row position % R as well.
        tables: the token that has just been fed is still to be counted: `position` grows by one before it is looked at,
            and the states change places, as `rows.advance` does it.
    """
    batch, vocabulary = logits.shape
    programs, window = triton.cdiv(vocabulary, BLOCK.value), recent.shape[1]
    shape = {"W": triton.next_power_of_2(window), "PDL": pdl, "num_warps": 4, **pdl_options(pdl)}
    tree_kernel[(programs, batch)](
        logits, options, recent, scratch.tree, scratch.best, logits.stride(0), vocabulary, window, **shape
    )
    choose_kernel[(batch,)](
        *scratch, position, *(tables or (None, None, None)), options, recent, token, chosen,
        vocabulary, programs, window,
        ADVANCE=tables is not None, CHOSEN=0 if chosen is None else chosen.shape[0],
        PROGRAMS=triton.next_power_of_2(programs), **shape,
    )  # fmt: skip


@triton.jit
def tree_kernel(
    p_logits, p_options, p_recent, p_tree, p_best, logits_stride, V, window, W: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK ids and the nodes above them, with scores after the repetition penalty. Grid (programs, B)."""
    i_block, i_row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    programs = tl.num_programs(0)
    wait_for_previous(PDL)
    let_next_start(PDL)
    o_id = i_block * BLOCK + tl.arange(0, BLOCK)
    b_score = tl.load(p_logits + i_row * logits_stride + o_id, mask=o_id < V, other=0.0)
    penalty = _number(p_options, i_row, PENALTY).to(tl.float32)
    if penalty != 1.0:
        o_recent = tl.arange(0, W)
        is_read = (o_recent < window) & (o_recent >= window - tl.load(p_options + i_row * STRIDE + WINDOW))
        o_bin = tl.load(p_recent + i_row * window + o_recent, mask=is_read, other=-1).to(tl.int32) - i_block * BLOCK
        was_chosen = tl.histogram(o_bin, BLOCK, mask=(o_bin >= 0) & (o_bin < BLOCK)) > 0
        # Rounded as torch rounds on a CPU, so that ties are the same.
        b_penalised = tl.where(b_score > 0, tl.div_rn(b_score, penalty), b_score * penalty)
        b_score = tl.where(was_chosen, b_penalised, b_score)
    b_order = tl.where(o_id < V, _order(b_score), NO_ORDER)
    b_node = tl.max(tl.reshape(b_order, [BLOCK // ARITY, ARITY]), axis=1)
    b_root = tl.max(tl.reshape(b_node, [BLOCK // ROOT, ARITY]), axis=1)
    roots = programs * (BLOCK // ROOT)
    p_tree += i_row * roots * TREE
    tl.store(p_tree + o_id, b_order)
    tl.store(p_tree + roots * ROOT + i_block * (BLOCK // ARITY) + tl.arange(0, BLOCK // ARITY), b_node)
    tl.store(p_tree + roots * (ROOT + ARITY) + i_block * (BLOCK // ROOT) + tl.arange(0, BLOCK // ROOT), b_root)
    tl.store(p_best + i_row * programs + i_block, tl.max(_key(b_order, o_id), axis=0))


@triton.jit
def choose_kernel(
    p_tree, p_best, p_slots, p_position, p_source, p_target, p_spare, p_options, p_recent, p_token, p_chosen,
    V, programs, window,
    ADVANCE: tl.constexpr, CHOSEN: tl.constexpr, PROGRAMS: tl.constexpr, W: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The token, and `recent` shifted by it; ADVANCE: see `sample`. Grid (B,)."""
    i_row = tl.program_id(0).to(tl.int64)
    wait_for_previous(PDL)
    let_next_start(PDL)
    position = tl.load(p_position + i_row) + (1 if ADVANCE else 0)
    o_recent = tl.arange(0, W)
    p_slot = p_recent + i_row * window + o_recent
    b_recent = tl.load(p_slot + 1, mask=o_recent + 1 < window, other=-1)
    o_best = tl.arange(0, PROGRAMS)
    best = tl.max(tl.load(p_best + i_row * programs + o_best, mask=o_best < programs, other=NO_KEY), axis=0)
    temperature = _number(p_options, i_row, TEMPERATURE)
    is_finite = ((best >> 32) > LOWEST) & ((best >> 32) < HIGHEST)
    token = tl.where(is_finite, _index(best), -1)
    if (temperature > 0) & is_finite:
        p_row = p_options + i_row * STRIDE
        kept = tl.minimum(tl.load(p_row + TOP_K), V).to(tl.int32)
        uniform = uniform_number(tl.load(p_row + SEED), tl.load(p_row + ROW), position)
        top_p, min_p = _number(p_options, i_row, TOP_P), _number(p_options, i_row, MIN_P)
        roots = programs * (BLOCK // ROOT)
        b_best = _best_ids(p_tree + i_row * roots * TREE, p_slots + i_row * (SLOTS + KEEP), roots)
        i_drawn = drawn_rank(_score(b_best), uniform, temperature, kept, top_p, min_p)
        token = tl.sum(tl.where(tl.arange(0, KEEP) == i_drawn, _index(b_best), 0), axis=0)
    tl.store(p_token + i_row, token)
    if CHOSEN > 0:
        tl.store(p_chosen + position % CHOSEN * tl.num_programs(0) + i_row, token)
    b_recent = tl.where(o_recent + 1 == window, token, b_recent)
    tl.debug_barrier()  # one thread reads where another writes
    tl.store(p_slot, b_recent, mask=o_recent < tl.where(is_finite, window, 0))
    if ADVANCE:
        advance(p_position, p_source, p_target, p_spare, i_row)


@triton.jit
def _best_ids(p_tree, p_slots, roots):
    """The keys of the KEEP best ids, in falling order."""
    o_slot = tl.arange(0, SLOTS)
    b_node = o_slot
    b_key = o_slot.to(tl.int64)
    size = roots
    p_level = p_tree + roots * (ROOT + ARITY)
    if roots <= SLOTS:  # then none of them need be left out
        size *= ARITY
        p_level -= size
    while size <= roots * ROOT:
        o_child = b_node[:, None] * ARITY + tl.arange(0, ARITY)[None, :]
        b_order = tl.load(p_level + o_child, mask=o_child < size, other=NO_ORDER)
        b_child = tl.reshape(_key(b_order, o_child), [SLOTS * ARITY])
        is_best = b_child >= _threshold(b_child)
        b_place = tl.cumsum(is_best.to(tl.int32), axis=0) - 1
        tl.debug_barrier()  # the slots of the level above have been read
        tl.store(p_slots + b_place, b_child, mask=is_best)
        tl.debug_barrier()
        is_filled = o_slot < tl.sum(is_best.to(tl.int32), axis=0)
        b_key = tl.load(p_slots + o_slot, mask=is_filled, other=NO_KEY)
        b_node = tl.where(is_filled, _index(b_key).to(tl.int32), NOWHERE + o_slot)
        size *= ARITY
        p_level -= size
    b_rank = tl.sum((b_key[:, None] > b_key[None, :]).to(tl.int32), axis=0)
    tl.store(p_slots + SLOTS + b_rank, b_key, mask=b_rank < KEEP)
    tl.debug_barrier()
    return tl.load(p_slots + SLOTS + tl.arange(0, KEEP))


@triton.jit
def _threshold(b_key):
    """A number that at least KEEP and at most SLOTS of N different keys reach, by bisection."""
    # The highest of every KEEP-th key are KEEP keys.
    low = tl.min(tl.max(tl.reshape(b_key, [b_key.numel // KEEP, KEEP]), axis=0), axis=0)
    high = tl.max(b_key, axis=0)
    count = tl.sum((b_key >= low).to(tl.int32), axis=0)
    while count > SLOTS:
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        reach = tl.sum((b_key >= middle).to(tl.int32), axis=0)
        is_low = reach >= KEEP
        low = tl.where(is_low, middle, low)
        high = tl.where(is_low, high, middle)
        count = tl.where(is_low, reach, count)
    return low


@triton.jit
def _number(p_options, i_row, COLUMN: tl.constexpr):
    return tl.load(p_options + i_row * STRIDE + COLUMN).to(tl.float64, bitcast=True)


@triton.jit
def _order(b_score):
    """int32 in the order of the scores (fp32), NaN above inf."""
    b_score = tl.where(b_score == 0, 0.0, b_score)  # -0 equals 0
    b_bits = b_score.to(tl.int32, bitcast=True)
    b_order = tl.where(b_bits < 0, b_bits ^ INDEX_MASK, b_bits)
    return tl.where(b_score != b_score, INDEX_MASK, b_order)


@triton.jit
def _key(b_order, o_index):
    return (b_order.to(tl.int64) << 32) | (o_index ^ INDEX_MASK).to(tl.int64)


@triton.jit
def _index(b_key):
    return (b_key & INDEX_MASK) ^ INDEX_MASK


@triton.jit
def _score(b_key):
    b_order = (b_key >> 32).to(tl.int32)
    return tl.where(b_order < 0, b_order ^ INDEX_MASK, b_order).to(tl.float32, bitcast=True)
