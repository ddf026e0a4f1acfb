"""A checkpoint of a published size with random weights, for benchmarks and slow tests."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from gdn2_edge.bench.random_weights import random_tensor
from gdn2_edge.checkpoint.files import TensorInfo
from gdn2_edge.checkpoint.writer import Job, write_checkpoint
from gdn2_edge.spec import NAMED_CONFIGS, spec_from_fields


def write_random(out: Path, config: str, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write our folder for a name of `NAMED_CONFIGS`; matrices in `dtype`, vectors and filters in fp32."""
    spec = spec_from_fields(NAMED_CONFIGS[config], config)
    generator = torch.Generator().manual_seed(0)

    def job(name: str, shape: tuple[int, ...]) -> Job:
        kind = dtype if len(shape) == 2 else torch.float32
        return Job(
            name,
            {name: TensorInfo(kind, shape)},
            lambda: {name: random_tensor(name, shape, generator).to(kind)},
        )

    jobs = [job(name, shape) for name, shape in spec.tensor_shapes().items()]
    write_checkpoint(out, spec, jobs, identity={"random": config}, config={}, files={})


def write_random_training_file(out: Path, config: str) -> None:
    """Write an NVlabs .pth of a published size: fp32, every tensor in memory at once."""
    spec = spec_from_fields(NAMED_CONFIGS[config], config)
    generator = torch.Generator().manual_seed(0)
    model = {nvlabs_name(n): random_tensor(n, s, generator) for n, s in spec.tensor_shapes().items()}
    torch.save({"model": model, "optimizer": None, "hparams": {}, "iter_num": 1, "step_count": 1}, out)


def nvlabs_name(name: str) -> str:
    """The key of a gdn2 layer's tensor in an NVlabs training file."""
    if name == "embed.weight":
        return "transformer.wte.weight"
    if name == "ln_f.weight":
        return "transformer.ln_f.weight"
    if not name.startswith("layers."):
        return name
    _, layer, rest = name.split(".", 2)
    part = "" if rest.startswith("norm_") else "mlp.swiglu." if rest in SWIGLU else "attn."
    return f"transformer.h.{layer}.{part}{rest}"


SWIGLU = ("w1.weight", "w2.weight", "w3.weight")

if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[2] not in NAMED_CONFIGS:
        sys.exit(f"usage: random_checkpoint.py OUT.pth|DIR NAME   (names: {', '.join(NAMED_CONFIGS)})")
    target = Path(sys.argv[1])
    (write_random_training_file if target.suffix == ".pth" else write_random)(target, sys.argv[2])
