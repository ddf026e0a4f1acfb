"""Every word is read once."""

from __future__ import annotations

import pytest
import torch

from gdn2_edge.kernels.triton.read import BLOCK, STEPS, sum_words


@pytest.mark.parametrize("count", [1, BLOCK, BLOCK * STEPS - 1, BLOCK * STEPS, 2 * BLOCK * STEPS + 5])
def test_sum_words(count: int, device: torch.device) -> None:
    words = torch.randint(-1000, 1000, (count,), dtype=torch.int32, device=device)
    sums = sum_words(words)
    stretches = words.split(BLOCK * STEPS)
    assert sums.tolist() == [int(stretch.sum()) for stretch in stretches]
