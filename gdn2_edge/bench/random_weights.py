"""A model of a given size with random weights in a stored format, made on a device and never written to a file.

It shows speed and memory, nothing of quality. Stands in for a `Checkpoint` where weights and their sizes are asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import get_args
from zlib import crc32

import torch
from torch import Tensor

from gdn2_edge.checkpoint.files import TensorInfo
from gdn2_edge.checkpoint.reader import CONFIG_EXTRAS
from gdn2_edge.convert import spec_overrides
from gdn2_edge.errors import FormatError
from gdn2_edge.quantize import encode, stored_infos
from gdn2_edge.quantize.recipe import Format, Planned, make_recipe, plan
from gdn2_edge.spec import ModelSpec, spec_from_fields
from gdn2_edge.weights import Weight

FLOATS: dict[str, Format] = {"bf16": "bf16", "fp32": "fp32"}  # what a recipe for fewer bits does not offer


@dataclass(frozen=True)
class RandomWeights:
    """The same `seed` and device give the same weights. `path` is a name, there is no such file."""

    path: Path
    spec: ModelSpec
    planned: tuple[Planned, ...]
    device: torch.device
    seed: int = 0

    @property
    def fingerprint(self) -> str:
        return ""

    @cached_property
    def _entries(self) -> dict[str, Planned]:
        return {entry.name: entry for entry in self.planned}

    def stored(self, name: str) -> dict[str, TensorInfo]:
        """Suffix -> dtype and shape of the stored tensors of one canonical tensor."""
        return {key.removeprefix(name): info for key, info in stored_infos(self._entries[name]).items()}

    def weight(self, name: str) -> Weight:
        """One canonical tensor in its stored layout, made anew at each call."""
        entry = self._entries[name]
        generator = torch.Generator(self.device).manual_seed(crc32(f"{self.seed} {name}".encode()))
        return encode(entry, random_tensor(name, entry.shape, generator))


def random_weights(
    config: str, format: str = "bf16", group_size: int | None = None, seed: int = 0, device: str | torch.device = "cpu"
) -> RandomWeights:
    """Random weights of a model.

    Args:
        config: a published name (`NAMED_CONFIGS`) or a JSON file with the spec's fields, as our config.json.
        format: bf16, fp32, int8, fp8 or int4; which tensors of a quantized model stay in another is as for `quantize`.
        group_size: for int4.
        seed: 0 to 2^31 - 1.
        device: where the weights are made.
    Raises:
        SpecError: the configuration is unknown or incomplete.
        FormatError: the format or group size is unknown.
    """
    fields = {name: value for name, value in spec_overrides(config, None).items() if name not in CONFIG_EXTRAS}
    spec = spec_from_fields(fields, config)
    if group_size is not None and format != "int4":
        raise FormatError(f"a group size is for int4; {format} has none.")
    if format not in get_args(Format):
        raise FormatError(f"format is {format!r}, expected one of {', '.join(get_args(Format))}.")
    planned: list[Planned]
    if format in FLOATS:
        matrices = FLOATS[format]
        planned = [Planned(n, s, matrices if len(s) == 2 else "fp32") for n, s in spec.tensor_shapes().items()]
    else:
        size = {} if group_size is None else {"group_size": group_size}
        planned = plan(make_recipe({"format": format, **size}, "random weights"), spec)
    label = f"random {config} {format}" + (f" g{group_size}" if group_size else "")
    return RandomWeights(Path(label), spec, tuple(planned), torch.device(device), seed)


def random_tensor(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """fp32 values on the generator's device.

    Matrices and filters keep the size of what goes through them, so activations stay finite in any depth and width.
    A_log and dt_bias give a decay of some 50 tokens, norms are 1 and biases 0.
    """
    device = generator.device
    if len(shape) > 1:
        values = torch.empty(shape, device=device).normal_(generator=generator)
        return values.mul_(shape[-1] ** -0.5)
    if name.endswith("dt_bias"):
        return torch.full(shape, -4.0, device=device)
    return torch.full(shape, 0.0 if name.endswith(("A_log", "bias")) else 1.0, device=device)
