"""The machine under a measurement: its name, how fast it reads memory, how much of it is taken. Knows no model."""

from __future__ import annotations

import importlib.util
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

# GB/s of memory by the name CUDA gives a card. Source: NVIDIA's data sheets and product pages.
DATASHEET_GB_PER_SECOND = {
    "NVIDIA A100-SXM4-40GB": 1555,
    "NVIDIA A100-SXM4-80GB": 2039,
    "NVIDIA A100 80GB PCIe": 1935,
    "NVIDIA H100 80GB HBM3": 3350,
    "NVIDIA H100 PCIe": 2000,
    "NVIDIA H100 NVL": 3900,
    "NVIDIA H200": 4800,
    "NVIDIA L4": 300,
    "NVIDIA L40S": 864,
    "NVIDIA GeForce RTX 3060": 360,
    "NVIDIA GeForce RTX 3090": 936,
    "NVIDIA GeForce RTX 4060": 272,
    "NVIDIA GeForce RTX 4070": 504,
    "NVIDIA GeForce RTX 4080": 717,
    "NVIDIA GeForce RTX 4090": 1008,
    "NVIDIA GeForce RTX 5070": 672,
    "NVIDIA GeForce RTX 5080": 960,
    "NVIDIA GeForce RTX 5090": 1792,
}
GPU_READ_BYTES = 4 << 30
CPU_READ_BYTES = 1 << 30  # several times the last cache of a large server
READ_ROUNDS = 10


def read_rate(device: torch.device) -> float:
    """Bytes a second that this device reads from memory: the best of many sums over far more than its caches hold."""
    buffer = torch.ones(_buffer_bytes(device) // 4, device=device)
    seconds = [_seconds(read, buffer) for read in _readers(buffer) for _ in range(READ_ROUNDS)]
    return buffer.nbytes / min(seconds)


def _buffer_bytes(device: torch.device) -> int:
    if device.type == "cpu":
        return CPU_READ_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    return min(GPU_READ_BYTES, free // 2)


def _readers(buffer: Tensor) -> list[Callable[[Tensor], Tensor]]:
    if buffer.device.type == "cpu" or importlib.util.find_spec("triton") is None:
        return [torch.sum]
    from gdn2_edge.kernels.triton.read import sum_words

    def read_words(buffer: Tensor) -> Tensor:
        return sum_words(buffer.view(torch.int32))

    try:
        read_words(buffer)
    except Exception:  # whatever Triton's compiler lacks here: the other reader is good enough
        return [torch.sum]
    return [torch.sum, read_words]


def _seconds(read: Callable[[Tensor], Tensor], buffer: Tensor) -> float:
    if buffer.device.type == "cpu":
        begun = time.perf_counter()
        read(buffer)
        return time.perf_counter() - begun
    with torch.cuda.device(buffer.device):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        read(buffer)
        end.record()
        end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def datasheet_rate(device: torch.device) -> float | None:
    """Bytes a second that the maker says a known card reads."""
    if device.type != "cuda":
        return None
    rate = DATASHEET_GB_PER_SECOND.get(torch.cuda.get_device_name(device))
    return None if rate is None else rate * 1e9


def device_name(device: torch.device) -> str:
    """The card, or the processor and the threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def cpu_name() -> str:
    """The processor, as far as the system says."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def memory_in_use(device: torch.device) -> int | None:
    """Bytes: on a GPU the most that was allocated since the statistics were reset, else what the process holds now.

    None where the system does not say.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None
