"""Starting a kernel while the one before it still runs (programmatic dependent launch, sm_90 and later).

A kernel launched with `pdl_options(True)` may begin before the previous one of its stream has ended. Every program of
it must call `wait_for_previous` before it reads what an earlier kernel of the same step wrote, or writes anything;
after that call all earlier kernels are complete. What no kernel of the step writes (weights) may be read before it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton import cdiv as cdiv
from triton import next_power_of_2 as next_power_of_2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# Tables of states count in these, so that kernels know how addresses are aligned.
OFFSET_FLOATS = tl.constexpr(16)


@dataclass(frozen=True)
class Gpu:
    """What kernels may use on a device.

    asm: NVIDIA's instructions. hardware_fp8: its conversions of e4m3. pdl: programmatic dependent launch.
    """

    asm: bool
    hardware_fp8: bool
    pdl: bool
    multiprocessors: int
    is_interpreter: bool = False


def gpu_of(device: torch.device) -> Gpu:
    """What a device can do; a CPU is Triton's interpreter."""
    if device.type != "cuda":
        return Gpu(False, False, False, 1, is_interpreter=True)
    properties = torch.cuda.get_device_properties(device)
    capability = (properties.major, properties.minor)
    nvidia = torch.version.hip is None
    return Gpu(
        asm=nvidia,
        hardware_fp8=nvidia and capability >= (8, 9),
        pdl=nvidia and capability >= (9, 0),
        multiprocessors=properties.multi_processor_count,
    )


def pdl_options(pdl: bool) -> dict[str, Any]:
    """Keyword arguments of a launch; the interpreter and AMD know no such option."""
    return {"launch_pdl": True} if pdl else {}


def register_options(asm: bool, most: int) -> dict[str, Any]:
    """Keyword arguments of a launch whose threads may have so many registers (0: any number); not for AMD."""
    return {"maxnreg": most} if asm and most else {}


def count_launches(launch: Callable[[], None]) -> int:
    """Do it, and say how many kernels it launched."""
    count = 0

    def one_more(*_: Any) -> None:
        nonlocal count
        count += 1

    hook = triton.knobs.runtime.launch_enter_hook
    hook.add(one_more)
    try:
        launch()
    finally:
        hook.remove(one_more)
    return count


@triton.jit
def _nothing(p_x):
    tl.store(p_x, 0.0)


def cannot_run(device: torch.device) -> str:
    """Why no kernel can be built or run here, in words; empty if one can. Triton needs a C compiler, for example."""
    try:
        _nothing[(1,)](torch.ones(1, device=device))
    except Exception as error:  # Triton and its backends raise what they like
        return f"triton cannot run a kernel ({type(error).__name__}: {str(error).splitlines()[0][:200]})"
    return ""


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Block until the kernel before this one is complete and its writes can be seen."""
    if PDL:
        gdc_wait()


@triton.jit
def let_next_start(PDL: tl.constexpr):
    """The next kernel's programs may start as soon as every program of this one has come here, and there is room."""
    if PDL:
        gdc_launch_dependents()
