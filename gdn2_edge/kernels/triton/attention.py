"""One decode step of sliding-window attention, between its two products: rotary, the ring, softmax, values.

Knows rings of keys and values that lie anywhere in one flat buffer, and that a row of `qkv` is q, then k, then v.
Not what a layer, a model or a sequence's state is.

The window is cut into parts, so that one sequence fills the GPU too. A program attends over one part for all query
heads of a key head and writes its maximum, sum and weighted values; a second kernel merges the parts in a fixed order.
The key and value of the token itself come from `qkv`: no program reads the slot that is being written.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn2_edge.kernels.triton.activation import Activation, write_activation
from gdn2_edge.kernels.triton.launch import OFFSET_FLOATS, let_next_start, pdl_options, wait_for_previous

# Bounds on the parts. Fewer than three programs a multiprocessor keep too little in flight; beyond eight, or below
# 32 slots, a part is mostly prologue; the merge holds one tile of all parts.
MIN_PROGRAMS_PER_SM, MAX_PROGRAMS_PER_SM = 3, 8
MIN_PART_SLOTS, MAX_SPLITS = 32, 64
# Floats of keys in a tile, by the number of query heads that share them. A program has as many of values, and the next
# tile's too, in flight: 32 KB for one head. Each head has accumulators as large as the tile, so with more of them it
# shrinks (registers at sm_90: 106, 79, 126, 127 for 1, 2, 4, 8), but not below one 16-byte load a thread.
ATTEND_WARPS = 4
TILE_FLOATS = {1: 2048, 2: 1024, 4: 1024}
MIN_TILE_FLOATS = 512
MERGE_WARPS = 8
# A partial result is D weighted values, a maximum and a sum, padded to keep the next one aligned to 16 bytes.
PARTIAL_EXTRA = 4
LOG2_E = tl.constexpr(1.4426950408889634)
# The maximum of no scores. Finite, so that differences of two of them are 0 and not NaN.
LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def _rotary_angles(p_position, p_frequency, p_table, HALF: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    i_batch = tl.program_id(0)
    let_next_start(PDL)
    o_pair = tl.arange(0, BLOCK)
    mask = o_pair < HALF
    b_frequency = tl.load(p_frequency + o_pair, mask=mask, other=0.0)
    wait_for_previous(PDL)
    b_angle = tl.load(p_position + i_batch).to(tl.float64) * b_frequency
    p_pair = p_table + (i_batch * HALF + o_pair) * 2
    tl.store(p_pair, tl.cos(b_angle).to(tl.float32), mask=mask)
    tl.store(p_pair + 1, tl.sin(b_angle).to(tl.float32), mask=mask)


@triton.jit
def _rotated(p_x, p_angle, o_d, mask, D: tl.constexpr):
    """x * cos + (its other half, the first half's negated) * sin, of heads with D channels that start at p_x."""
    is_first = o_d < D // 2
    p_pair = p_angle + tl.where(is_first, o_d, o_d - D // 2) * 2
    b_cos = tl.load(p_pair, mask=o_d < D, other=0.0)
    b_sin = tl.load(p_pair + 1, mask=o_d < D, other=0.0)
    b_x = tl.load(p_x + o_d, mask=mask, other=0.0)
    b_other = tl.load(p_x + tl.where(is_first, o_d + D // 2, o_d - D // 2), mask=mask, other=0.0)
    return b_x * b_cos + tl.where(is_first, -b_other, b_other) * b_sin


@triton.jit
def _held_rows(p_ring, o_slot, is_held, o_d, STRIDE: tl.constexpr, D: tl.constexpr):
    """Rows of a ring [1, BLOCK_N, BLOCK_D], zeros where nothing is held.

    Three dimensions, because the layout of the load is that of all that follows: each thread holds the same channels
    for every query head, and the loop needs no shared memory.
    """
    mask = is_held[None, :, None] & (o_d < D)[None, None, :]
    p_row = p_ring + o_slot[None, :, None] * STRIDE + o_d[None, None, :]
    return tl.load(p_row, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def _attend_part(
    p_qkv,
    p_position,
    p_angles,
    p_base,
    p_offset,
    p_partial,
    k_ring,
    v_ring,
    WINDOW: tl.constexpr,
    SPLITS: tl.constexpr,
    HK: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    PARTIAL: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    # Heads run fastest: programs that start together read neighbouring rows of the same slots.
    i_head, i_split, i_batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    let_next_start(PDL)
    o_g, o_n, o_d = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    position = tl.load(p_position + i_batch)
    newest = (position % WINDOW).to(tl.int32)
    PART: tl.constexpr = (WINDOW + SPLITS - 1) // SPLITS
    begin, part_end = i_split * WINDOW // SPLITS, (i_split + 1) * WINDOW // SPLITS
    is_owner = (newest >= begin) & (newest < part_end)
    # The tokens before this one fill slots 0 .. position - 1, or all; the newest slot's has just left the window.
    end = tl.minimum(part_end, tl.minimum(position, WINDOW).to(tl.int32))
    p_ring = p_base + tl.load(p_offset + i_batch) * OFFSET_FLOATS + i_head * D
    o_slot = begin + o_n
    is_held = (o_slot < end) & (o_slot != newest)
    b_k = _held_rows(p_ring + k_ring, o_slot, is_held, o_d, HK * D, D)
    b_v = _held_rows(p_ring + v_ring, o_slot, is_held, o_d, HK * D, D)

    wait_for_previous(PDL)
    p_row = p_qkv + i_batch * ((G + 2) * HK * D)
    p_angle = p_angles + i_batch * D
    mask_d = o_d < D
    mask_q = (o_g < G)[:, None] & mask_d[None, :]
    b_q = _rotated(p_row + (i_head * G + o_g[:, None]) * D, p_angle, o_d[None, :], mask_q, D) * (D**-0.5 * LOG2_E)
    b_new_k = _rotated(p_row + (G * HK + i_head) * D, p_angle, o_d, mask_d, D)
    b_new_v = tl.load(p_row + (G * HK + HK + i_head) * D + o_d, mask=mask_d, other=0.0)
    if is_owner:
        p_new = p_ring + newest * (HK * D) + o_d
        tl.store(p_new + k_ring, b_new_k, mask=mask_d)
        tl.store(p_new + v_ring, b_new_v, mask=mask_d)

    # Every row of the tile keeps a softmax of its own until the end; the owner's first one starts with this token.
    starts = (o_n == tl.where(is_owner, 0, -1))[None, :]
    b_max = tl.where(starts, tl.sum(b_q * b_new_k[None, :], 1)[:, None], LOWEST)
    b_sum = tl.where(starts, 1.0, tl.zeros([BLOCK_G, BLOCK_N], tl.float32))
    b_acc = b_sum[:, :, None] * b_new_v[None, None, :]
    if begin < end:
        for start in range(0, PART, BLOCK_N):
            o_next = begin + start + BLOCK_N + o_n
            is_next_held = (o_next < end) & (o_next != newest)
            b_next_k = _held_rows(p_ring + k_ring, o_next, is_next_held, o_d, HK * D, D)
            b_next_v = _held_rows(p_ring + v_ring, o_next, is_next_held, o_d, HK * D, D)
            b_s = tl.where(is_held[None, :], tl.sum(b_q[:, None, :] * b_k, 2), float("-inf"))
            b_new_max = tl.maximum(b_max, b_s)
            b_keep, b_p = tl.exp2(b_max - b_new_max), tl.exp2(b_s - b_new_max)
            b_sum = b_sum * b_keep + b_p
            b_acc = b_acc * b_keep[:, :, None] + b_p[:, :, None] * b_v
            b_max, b_k, b_v, is_held = b_new_max, b_next_k, b_next_v, is_next_held

    b_top = tl.max(b_max, 1)
    b_weight = tl.exp2(b_max - b_top[:, None])
    p_out = p_partial + (((i_batch * HK + i_head) * G + o_g) * SPLITS + i_split) * PARTIAL
    tl.store(p_out[:, None] + o_d[None, :], tl.sum(b_acc * b_weight[:, :, None], 1), mask=mask_q)
    tl.store(p_out + D, b_top, mask=o_g < G)
    tl.store(p_out + D + 1, tl.sum(b_sum * b_weight, 1), mask=o_g < G)


@triton.jit
def _merge_parts(
    p_partial,
    p_out,
    p_high,
    p_low,
    p_unit,
    SPLITS: tl.constexpr,
    D: tl.constexpr,
    PARTIAL: tl.constexpr,
    SPLIT: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    i_head = tl.program_id(0)
    let_next_start(PDL)
    wait_for_previous(PDL)
    o_s, o_d = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    mask_s, mask_d = o_s < SPLITS, o_d < D
    p_part = p_partial + (i_head * SPLITS + o_s) * PARTIAL
    b_max = tl.load(p_part + D, mask=mask_s, other=LOWEST)
    b_sum = tl.load(p_part + D + 1, mask=mask_s, other=0.0)
    b_acc = tl.load(p_part[:, None] + o_d[None, :], mask=mask_s[:, None] & mask_d[None, :], other=0.0)
    b_weight = tl.exp2(b_max - tl.max(b_max, 0))
    b_out = tl.sum(b_acc * b_weight[:, None], 0) / tl.sum(b_sum * b_weight, 0)
    start, channels = i_head * D, tl.num_programs(0) * D
    write_activation(p_out, p_high, p_low, p_unit, b_out, start, start + D, channels, BLOCK_D, SPLIT, PLANES)


@triton.jit
def _keep_slots(
    p_position,
    p_base,
    p_offset,
    p_rings,
    p_kept,
    WINDOW: tl.constexpr,
    ROW: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    i_ring, i_batch = tl.program_id(0), tl.program_id(1)
    wait_for_previous(PDL)
    let_next_start(PDL)
    slot = tl.load(p_position + i_batch) % WINDOW
    p_slot = p_base + tl.load(p_offset + i_batch) * OFFSET_FLOATS + tl.load(p_rings + i_ring) + slot * ROW
    p_kept += (i_batch * tl.num_programs(0) + i_ring) * ROW
    for start in range(0, ROW, BLOCK):
        o = start + tl.arange(0, BLOCK)
        tl.store(p_kept + o, tl.load(p_slot + o, mask=o < ROW, other=0.0), mask=o < ROW)


@cache
def _frequencies(base: float, half: int, device: torch.device) -> Tensor:
    # On the CPU whatever the device: far out, the last bit of a frequency is a visible angle, and every device must
    # turn the keys of a saved ring alike.
    return (base ** -(torch.arange(half, dtype=torch.float64) / half)).to(device)


def rotary_angles(position: Tensor, base: float, table: Tensor, *, pdl: bool = False) -> None:
    """table[b, i] = cos, sin of position[b] * base ** (-i / half), computed in fp64: exact up to position 2 ** 53.

    The first call for a base and size copies the frequencies to the device, so it must come before a graph's capture.

    Args:
        position: int64 [B], tokens before this one.
        base: rotary base.
        table: fp32 [B, half, 2], contiguous; half of a head's channels. Every layer of the step shares it.
    """
    batch, half, _ = table.shape
    frequency = _frequencies(base, half, table.device)
    block = triton.next_power_of_2(half)
    _rotary_angles[(batch,)](position, frequency, table, half, block, pdl, num_warps=1, **pdl_options(pdl))


def keep_slots(
    position: Tensor, base: Tensor, offset: Tensor, rings: Tensor, kept: Tensor, *, window: int, pdl: bool = False
) -> None:
    """What `window_decode` is about to write over in every ring: where a step must be taken back, it is needed again.

    Args:
        position: int64 [B], tokens before this one.
        base: fp32, flat; the rings [window, HK, D] of all sequences are in it.
        offset: int64 [B], as for `window_decode`.
        rings: int64 [rings], floats from there to each.
        kept: fp32 [B, rings, HK D], written.
    """
    batch, count, row = kept.shape
    block = min(1024, triton.next_power_of_2(row))
    _keep_slots[(count, batch)](
        position, base, offset, rings, kept, WINDOW=window, ROW=row, BLOCK=block, PDL=pdl, **pdl_options(pdl)
    )


def count_splits(window: int, heads: int, multiprocessors: int) -> int:
    """Parts of the window that leave the fewest slots to the busiest multiprocessor.

    Args:
        window: slots.
        heads: key heads of all sequences, B * HK.
    """
    most = max(min(window // MIN_PART_SLOTS, MAX_PROGRAMS_PER_SM * multiprocessors // heads, MAX_SPLITS), 1)
    least = min(-(-MIN_PROGRAMS_PER_SM * multiprocessors // heads), most)
    return min(range(least, most + 1), key=lambda n: -(-heads * n // multiprocessors) * -(-window // n))


def scratch_shape(
    batch: int, *, q_heads: int, kv_heads: int, head_dim: int, window: int, multiprocessors: int
) -> tuple[int, int, int, int]:
    """Shape of the fp32 `scratch` of `window_decode`: [B, HQ, splits, D + 4]. All layers may use the same."""
    return batch, q_heads, count_splits(window, batch * kv_heads, multiprocessors), head_dim + PARTIAL_EXTRA


def window_decode(
    qkv: Tensor,
    position: Tensor,
    angles: Tensor,
    base: Tensor,
    offset: Tensor,
    k_ring: int,
    v_ring: int,
    out: Tensor,
    scratch: Tensor,
    *,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    window: int,
    split: int = 1,
    planes: Activation | None = None,
    pdl: bool = False,
) -> None:
    """Softmax attention of one token over itself and the window - 1 before it; its k and v enter the rings.

    Ring slot = position % window, keys stored rotated, scale D ** -0.5; query head h reads key head h * HK // HQ. A
    step that is run again with the same position writes the same bits.

    With `pdl`, the slots already held, `position` and `offset` are read while earlier kernels still run: none of the
    step before this one may write them, and the first kernel of every step must be launched without it.

    Args:
        qkv: fp32 [B, (HQ + 2 HK) D]: heads of q, of k, of v, not yet rotated.
        position: int64 [B], tokens before this one.
        angles: fp32 [B, D / 2, 2], see `rotary_angles`.
        base: fp32, flat; the rings [window, HK, D] of all sequences are in it.
        offset: int64 [B], in units of 16 floats: where each sequence's own part of `base` starts.
        k_ring, v_ring: floats from there to this layer's rings.
        out: fp32 [B, HQ D], written.
        split: how `out` lies, for one sequence; see `Activation`.
        scratch: fp32 of `scratch_shape`, contiguous; its third size is the number of parts.
        head_dim: D, even; a multiple of 8 with `planes`.
        planes: where the output also goes as fixed point, for one sequence.
    """
    group, block_d = q_heads // kv_heads, triton.next_power_of_2(head_dim)
    batch, _, splits, partial = scratch.shape
    block_g = triton.next_power_of_2(group)
    block_n = max(1, TILE_FLOATS.get(block_g, MIN_TILE_FLOATS) // block_d)
    _attend_part[(kv_heads, splits, batch)](
        qkv,
        position,
        angles,
        base,
        offset,
        scratch,
        k_ring,
        v_ring,
        WINDOW=window,
        SPLITS=splits,
        HK=kv_heads,
        G=group,
        D=head_dim,
        PARTIAL=partial,
        BLOCK_G=block_g,
        BLOCK_N=block_n,
        BLOCK_D=block_d,
        PDL=pdl,
        num_warps=ATTEND_WARPS,
        **pdl_options(pdl),
    )
    block_s = triton.next_power_of_2(splits)
    _merge_parts[(batch * q_heads,)](
        scratch,
        out,
        None if planes is None else planes.high,
        None if planes is None else planes.low,
        None if planes is None else planes.unit,
        SPLITS=splits,
        D=head_dim,
        PARTIAL=partial,
        SPLIT=split,
        PLANES=planes is not None,
        BLOCK_S=block_s,
        BLOCK_D=block_d,
        PDL=pdl,
        num_warps=MERGE_WARPS,
        **pdl_options(pdl),
    )
