"""Makes sigmoid-golden.safetensors: what flash-linear-attention's own GDN-2 layer computes.

    python tests/golden/make_sigmoid.py OUT           # needs fla and an NVIDIA GPU
    python tests/golden/make_sigmoid.py --check FILE  # needs neither

The file here was made with flash-linear-attention and fla-core 0.6.0 (MIT), torch 2.11.0+cu130, triton 3.6.0
and transformers 5.17.0 under Python 3.12 on one NVIDIA H100 80GB HBM3. Its metadata says the same, and the
arguments of both layers. fla tunes some kernels by timing them, so the last bits may differ from run to run.

fla's layer gates its output with sigmoid, where the paper uses SiLU. Everything is fp32 without tf32, and the
kernel is the token by token one (mode fused_recurrent): that of chunk mode multiplies matrices, which Triton
does in tf32 by default. The weights are random, wide enough that no gate is idle; A_log and dt_bias are as the
layer draws them.

For each case, `plain` and `grouped` (4 value heads over 2 heads, erase gate x 2): `CASE.weights.NAME` under
the layer's own names, the input `CASE.x` and the output `CASE.y` [B, T, hidden], and `CASE.S`, the state after
the last token, [B, value heads, K, V].

--check compares y and S with an fp64 reading of the equations on the CPU and fails above 5e-5 of their
spread.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from importlib.metadata import version
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

TOLERANCE = 5e-5
SEED = 20261124
TOKENS = 96  # over 64: up to there fla takes the recurrent kernel in any mode
COMMON = {
    "hidden_size": 64,
    "expand_v": 1.0,
    "num_heads": 2,
    "mode": "fused_recurrent",
    "use_short_conv": True,
    "conv_size": 4,
    "conv_bias": False,
    "layer_idx": 0,
    "norm_eps": 1e-5,
}
# name -> the layer's arguments, sequences. The second is smaller to keep the file below 400 kB.
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "plain": ({**COMMON, "head_dim": 32, "num_v_heads": None, "allow_neg_eigval": False}, 2),
    "grouped": ({**COMMON, "head_dim": 16, "num_v_heads": 4, "allow_neg_eigval": True}, 1),
}


def draw(layer: torch.nn.Module, generator: torch.Generator) -> None:
    """Draws all weights but A_log and dt_bias anew."""
    for name, weight in layer.named_parameters():
        if name in ("A_log", "dt_bias"):
            continue
        normal = torch.randn(weight.shape, generator=generator)
        if name == "o_norm.weight":
            weight.data = 1 + normal / 4
        elif name == "g_proj.1.bias":
            weight.data = normal
        elif "conv1d" in name:
            weight.data = normal / 2
        else:
            # For inputs of variance 1: outputs of variance 1 from the first of two matrices, else 4.
            wide = 1 if name.endswith("_proj.0.weight") else 2
            weight.data = normal * wide * weight.shape[1] ** -0.5


def make(out: str) -> None:
    # No kernel on this way has a matrix product, so this only makes sure.
    os.environ["TRITON_F32_DEFAULT"] = "ieee"
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False

    from fla.layers import GatedDeltaNet2
    from fla.models.utils import Cache

    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    tensors: dict[str, Tensor] = {}
    for case, (arguments, sequences) in CASES.items():
        layer = GatedDeltaNet2(**arguments)
        assert layer.o_norm.activation == "sigmoid", layer.o_norm
        draw(layer, generator)
        x = torch.randn(sequences, TOKENS, layer.hidden_size, generator=generator)
        layer = layer.float().eval().cuda()
        cache = Cache()
        with torch.no_grad():
            y, _, cache = layer(x.cuda(), past_key_values=cache, use_cache=True)
        tensors |= {f"{case}.weights.{name}": value for name, value in layer.state_dict().items()}
        tensors |= {f"{case}.x": x, f"{case}.y": y, f"{case}.S": cache[0]["recurrent_state"]}
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in tensors.values())

    packages = ("flash-linear-attention", "fla-core", "triton", "transformers")
    metadata = {name: version(name) for name in packages} | {
        "torch": torch.__version__,  # with the build, for CUDA's version
        "python": sys.version.split()[0],
        "gpu": torch.cuda.get_device_name(),
        "layer": "fla.layers.GatedDeltaNet2",
        "mode": "fused_recurrent",
        "output_gate": "sigmoid",
        "precision": "fp32, no tf32",
        "S": "[B, HV, K, V]",
        "seed": str(SEED),
    }
    metadata |= {case: json.dumps(arguments) for case, (arguments, _) in CASES.items()}
    save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, out, metadata)


def reading(
    weights: dict[str, Tensor], x: Tensor, *, heads: int, erase_scale: float, eps: float
) -> tuple[Tensor, Tensor]:
    """The layer as its equations say it, in fp64: the output and the last state."""
    w = {name: value.double() for name, value in weights.items()}
    x = x.double()
    batch, tokens, _ = x.shape
    V = len(w["o_norm.weight"])
    K = len(w["dt_bias"]) // heads

    def split(z: Tensor, size: int) -> Tensor:
        return z.reshape(batch, tokens, -1, size)

    def project(name: str, z: Tensor = x) -> Tensor:
        return z @ w[f"{name}.weight"].T

    def short_conv(name: str) -> Tensor:
        taps = w[f"{name}_conv1d.weight"][:, 0]  # [channels, size], the last one for the token itself
        size = taps.shape[1]
        padded = F.pad(project(f"{name}_proj"), (0, 0, size - 1, 0))
        return F.silu(torch.stack([padded[:, i : i + tokens] * taps[:, i] for i in range(size)]).sum(0))

    def unit(z: Tensor) -> Tensor:
        return z * ((z * z).sum(-1, keepdim=True) + 1e-6).rsqrt()

    q, k = (unit(split(short_conv(name), K)) for name in "qk")
    v = split(short_conv("v"), V)
    decay = split(F.softplus(project("f_proj.1", project("f_proj.0")) + w["dt_bias"]), K)
    g = -w["A_log"].exp()[:, None] * decay
    b = split(project("b_proj").sigmoid(), K) * erase_scale
    write = split(project("w_proj").sigmoid(), V)
    q, k, g, b = (z.repeat_interleave(v.shape[2] // heads, dim=2) for z in (q, k, g, b))

    S = x.new_zeros(batch, v.shape[2], K, V)
    outputs = []
    for t in range(tokens):
        S = g[:, t].exp()[..., None] * S
        erased = torch.einsum("bhk,bhkv->bhv", b[:, t] * k[:, t], S)
        S = S + k[:, t, :, :, None] * (write[:, t] * v[:, t] - erased)[:, :, None]
        outputs.append(K**-0.5 * torch.einsum("bhk,bhkv->bhv", q[:, t], S))
    o = torch.stack(outputs, 1)
    o = o * (o.square().mean(-1, keepdim=True) + eps).rsqrt() * w["o_norm.weight"]
    gate = project("g_proj.1", project("g_proj.0")) + w["g_proj.1.bias"]
    return project("o_proj", (o * split(gate, V).sigmoid()).flatten(2)), S


def check(file: str) -> bool:
    """Prints the largest difference of each output over its spread; True if all are small."""
    with safe_open(file, "pt") as golden:
        metadata = golden.metadata()
        tensors = {name: golden.get_tensor(name) for name in golden.keys()}
    good = True
    for case in CASES:
        arguments = json.loads(metadata[case])
        prefix = f"{case}.weights."
        found = reading(
            {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)},
            tensors[f"{case}.x"],
            heads=arguments["num_heads"],
            erase_scale=2.0 if arguments["allow_neg_eigval"] else 1.0,
            eps=arguments["norm_eps"],
        )
        for name, expected in zip("yS", found, strict=True):
            error = float((tensors[f"{case}.{name}"] - expected).abs().max() / expected.std())
            print(f"{case}.{name}: {error:.2e} of its spread {float(expected.std()):.3g}")
            good = good and error <= TOLERANCE  # False for NaN
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="the file to make, or to check")
    parser.add_argument("--check", action="store_true", help="compare FILE with the equations, make nothing")
    arguments = parser.parse_args()
    if arguments.check:
        return 0 if check(arguments.file) else 1
    make(arguments.file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
