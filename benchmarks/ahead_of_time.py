"""Compiling this package's kernels for GPUs that are not here, from the launches the package itself makes.

`record` runs the package's own code on tensors without memory that claim to be on a certain GPU, and keeps what it
launches; `compile_launch` compiles one launch as Triton would at run time and says what it takes of the GPU. Needs no
GPU, and triton without its interpreter.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch.overrides import TorchFunctionMode
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from gdn2_edge.kernels.triton import attention

KB = 1024


@dataclass(frozen=True)
class Target:
    """A kind of GPU. `shared_bytes`: of one program. `multiprocessors`: of a common card, some sizes depend on it."""

    arch: int | str
    shared_bytes: int
    multiprocessors: int

    @property
    def is_amd(self) -> bool:
        return isinstance(self.arch, str)

    @property
    def name(self) -> str:
        return str(self.arch) if self.is_amd else f"sm_{self.arch}"

    @property
    def gpu_target(self) -> GPUTarget:
        if self.is_amd:
            return GPUTarget("hip", self.arch, 64 if str(self.arch).startswith("gfx9") else 32)
        return GPUTarget("cuda", self.arch, 32)


TARGETS = {
    target.name: target
    for target in (
        Target(80, 163 * KB, 108),  # A100
        Target(86, 99 * KB, 28),  # RTX 3060
        Target(89, 99 * KB, 128),  # RTX 4090
        Target(90, 227 * KB, 132),  # H100
        Target(100, 227 * KB, 148),  # B200
        Target(120, 99 * KB, 170),  # RTX 5090
        Target("gfx1100", 64 * KB, 48),  # RX 7900 XTX
        Target("gfx1201", 64 * KB, 32),  # RX 9070 XT
        Target("gfx942", 64 * KB, 304),  # MI300X
    )
}


@dataclass(frozen=True)
class Launch:
    """A kernel with all that its compilation depends on."""

    kernel: JITFunction
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]  # arguments that 16 divides
    options: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        return self.kernel.__name__.removeprefix("_")

    def constant(self, name: str) -> Any:
        return dict(self.constants).get(name)


@dataclass(frozen=True)
class Resources:
    """What a launch takes: registers a thread, bytes of them that are spilled to memory, shared memory a program."""

    registers: int
    spilled_bytes: int
    shared_bytes: int


class _ElsewhereMode(TorchFunctionMode):
    """Tensors of a CUDA device are made without memory, and say that they are there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == Tensor.device.__get__:
            return _CUDA if args[0].is_meta else func(args[0])
        if func == Tensor.is_cuda.__get__:
            return args[0].is_meta
        return func(*map(_elsewhere, args), **{key: _elsewhere(value) for key, value in (kwargs or {}).items()})


_CUDA = torch.device("cuda", 0)


def _elsewhere(argument: Any) -> Any:
    return torch.device("meta") if isinstance(argument, torch.device) and argument.type == "cuda" else argument


@contextmanager
def pretending(target: Target) -> Iterator[torch.device]:
    """Tensors on the device that this gives are on the target, as far as this package looks; they hold nothing."""
    capability = target.arch if isinstance(target.arch, int) else 0
    properties = SimpleNamespace(
        major=capability // 10,
        minor=capability % 10,
        multi_processor_count=target.multiprocessors,
    )
    caches = [attention._frequencies]
    with (
        mock.patch.object(torch.cuda, "get_device_properties", return_value=properties),
        mock.patch.object(torch.version, "hip", "6.4" if target.is_amd else None),
        _ElsewhereMode(),
    ):
        for cache in caches:
            cache.cache_clear()
        yield _CUDA
        for cache in caches:
            cache.cache_clear()


def record(run: Callable[[], None]) -> list[Launch]:
    """The launches that `run` makes, in order."""
    launches: list[Launch] = []

    def keep(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(_launch(kernel, args, kwargs))

    with mock.patch.object(JITFunction, "run", keep):
        run()
    return launches


def _launch(kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    names = [parameter.name for parameter in kernel.params]
    options = {name: value for name, value in kwargs.items() if name not in names}
    values = dict(zip(names, args, strict=False)) | {name: kwargs[name] for name in names if name in kwargs}
    signature, constants, aligned = {}, {}, []
    for parameter in kernel.params:
        value, is_free = values.get(parameter.name, parameter.default), not parameter.do_not_specialize
        is_one = type(value) is int and value == 1 and is_free
        if parameter.is_constexpr or value is None or is_one:
            constants[parameter.name] = value
            signature[parameter.name] = "constexpr"
            continue
        signature[parameter.name] = _type(value)
        if is_free and not parameter.do_not_specialize_on_alignment and _is_aligned(value):
            aligned.append(parameter.name)
    parts = (tuple(part.items()) for part in (signature, constants))
    return Launch(kernel, *parts, tuple(aligned), tuple(sorted(options.items())))


_TYPES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return "*" + _TYPES[value.dtype]
    if isinstance(value, bool):
        return "u1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


def _is_aligned(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.storage_offset() * value.itemsize % 16 == 0
    return type(value) is int and value % 16 == 0


def compile_launch(launch: Launch, target: Target) -> Resources:
    """Compile for the target. Raises what the compiler raises."""
    place = {name: i for i, name in enumerate(launch.kernel.arg_names)}
    source = triton.compiler.ASTSource(
        launch.kernel,
        dict(launch.signature),
        {(place[name],): value for name, value in launch.constants},
        {(place[name],): [["tt.divisibility", 16]] for name in launch.aligned},
    )
    compiled = triton.compile(source, target=target.gpu_target, options=dict(launch.options))
    if target.is_amd:
        return _amd_resources(compiled.asm["amdgcn"], compiled.metadata.shared)
    return _nvidia_resources(compiled.asm["cubin"], compiled.metadata.shared)


def _amd_resources(assembly: str, shared_bytes: int) -> Resources:
    count = {name: int(n) for name, n in re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", assembly)}
    return Resources(count["vgpr_count"], 4 * count.get("vgpr_spill_count", 0), shared_bytes)


def _nvidia_resources(cubin: bytes, shared_bytes: int) -> Resources:
    """By NVIDIA's own reader of binaries. STACK counts what is spilled."""
    tool = Path(triton.__path__[0], "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        shown = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {name: int(n) for name, n in re.findall(r"\b(REG|STACK):(\d+)", shown)}
    return Resources(found["REG"], found["STACK"], shared_bytes)
