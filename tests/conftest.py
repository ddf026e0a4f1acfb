"""What holds for every test: one thread, NaN in memory nobody wrote, GPU tests skipped without one."""

import os
import signal

# Asked for by torch's deterministic mode (below) on a GPU, before CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

# Kernels for GPUs run compiled on a GPU and, where there is none, in Triton's interpreter. Read when triton is
# imported, which the deterministic mode below does.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from gdn2_edge.loading import model_path
from gdn2_edge.model import Model, load_model

# A shell's background job ignores Ctrl-C, and so would the programs that tests start to interrupt them.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# More threads than free cores wait for each other: on a busy machine of two cores, two threads were 30 times slower
# than one. The models of the tests are small.
torch.set_num_threads(1)
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


@pytest.fixture(scope="session")
def tiny() -> Model:
    """The default model, once."""
    return load_model(model_path("tiny"), "cpu")
