"""Reading memory and nothing else: what a rate of reading is measured with. Knows one flat tensor of 32-bit words."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# 16 words a thread in flight, and programs long enough that their start does not count.
BLOCK, STEPS, WARPS = 4096, 8, 8


@triton.jit
def sum_words_kernel(
    p_words,  # int32 [N]
    p_sums,  # int32 [programs]
    N,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    """One sum a program, of BLOCK * STEPS words."""
    i_program = tl.program_id(0).to(tl.int64)
    b_sum = tl.zeros([BLOCK], tl.int32)
    for step in tl.static_range(STEPS):
        o_word = (i_program * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        b_sum += tl.load(p_words + o_word, mask=o_word < N, other=0, eviction_policy="evict_first")
    tl.store(p_sums + i_program, tl.sum(b_sum, 0))


def sum_words(words: Tensor) -> Tensor:
    """Sums of stretches of int32 words [N]: int32 [N / (BLOCK * STEPS), rounded up], modulo 2^32."""
    programs = triton.cdiv(words.numel(), BLOCK * STEPS)
    sums = torch.empty(programs, dtype=torch.int32, device=words.device)
    sum_words_kernel[(programs,)](words, sums, words.numel(), BLOCK, STEPS, num_warps=WARPS)
    return sums
