"""What holds for every test: two threads, NaN in memory nobody wrote, GPU tests skipped without one."""

import os

# Asked for by torch's deterministic mode (below) on a GPU, before CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

torch.set_num_threads(2)
# In deterministic mode torch fills what torch.empty returns with NaN (integers: the largest value), so that a
# result that reads memory nobody wrote is wrong every time, not now and then.
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no NVIDIA GPU here")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
