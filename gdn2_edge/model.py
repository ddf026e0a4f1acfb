"""`Model`: the torch runtime. Weights of a checkpoint on a device, and the calls that feed tokens to a state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from gdn2_edge.checkpoint.reader import open_checkpoint
from gdn2_edge.errors import BackendError
from gdn2_edge.forward import forward, head
from gdn2_edge.kernels.linear import prepare
from gdn2_edge.ops import AttentionLayer, Gdn2Layer, Layer, Mlp, ModelWeights
from gdn2_edge.runtime import Runtime, check_tokens
from gdn2_edge.spec import ModelSpec
from gdn2_edge.state import State, check_state, initial_state
from gdn2_edge.torch_ops import TorchOps
from gdn2_edge.weights import Dense, Fp8, Int4, Int8, Joined, Weight, join, num_bytes

# Longer prompts go through the layers in pieces of this many tokens, which bounds the memory of the activations.
PREFILL_TOKENS = 1024


class Model(Runtime):
    """A GDN-2 model on torch. Made by `load`; see `Runtime` for the calls that every runtime has."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: ModelWeights,
        device: torch.device,
        dtype: torch.dtype,
        fingerprint: str = "",
        path: Path = Path(),
    ) -> None:
        self.spec = spec
        self.weights = weights
        self.fingerprint = fingerprint
        self.path = path
        self.device = device
        self.ops = TorchOps(dtype)
        self.name = f"torch {torch.__version__} on {device}, {str(dtype)[6:]} activations"

    def initial_state(self, batch: int = 1) -> State[Tensor]:
        return initial_state(self.spec, batch, self.device)

    @torch.inference_mode()
    def forward(self, tokens: Tensor, state: State[Tensor] | None = None) -> tuple[Tensor, State[Tensor]]:
        tokens = self._checked(tokens, state)
        state = self.initial_state(tokens.shape[0]) if state is None else state
        logits = []
        for piece in self._pieces(tokens):
            x, state = forward(self.ops, self.spec, self.weights, piece, state)
            logits.append(head(self.ops, self.spec, self.weights, x).float())
        return torch.cat(logits, 1), state

    @torch.inference_mode()
    def prefill(self, tokens: Tensor, state: State[Tensor]) -> tuple[Tensor, State[Tensor]]:
        for piece in self._pieces(self._checked(tokens, state)):
            x, state = forward(self.ops, self.spec, self.weights, piece, state)
        return head(self.ops, self.spec, self.weights, x[:, -1:])[:, 0].float(), state

    @torch.inference_mode()
    def import_state(self, tensors: dict[str, Tensor]) -> State[Tensor]:
        check_state(self.spec, tensors, "state")
        return check_state(self.spec, {name: t.to(self.device, copy=True) for name, t in tensors.items()}, "state")

    @property
    def weight_bytes(self) -> int:
        """Bytes of memory that the weights take."""
        return sum(num_bytes(weight) for weight in _leaves(self.weights))

    def _pieces(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Tokens [B, T] in pieces that go through the layers one after the other."""
        return tuple(tokens.split(PREFILL_TOKENS, 1))

    def _checked(self, tokens: Tensor, state: State[Tensor] | None) -> Tensor:
        check_tokens(self.spec, tokens, state)
        return tokens.to(self.device)


class WeightSource(Protocol):
    """Weights by canonical name: a `Checkpoint`, or what stands in for one."""

    @property
    def spec(self) -> ModelSpec: ...
    @property
    def path(self) -> Path: ...
    @property
    def fingerprint(self) -> str: ...
    def weight(self, name: str) -> Weight:
        """One tensor in its stored layout."""


def load_model(source: Path | WeightSource, device: str = "auto", dtype: torch.dtype | None = None) -> Model:
    """Read a checkpoint folder into a `Model`.

    Args:
        source: a folder that `gdn2-edge convert` or `quantize` made, anything else `open_checkpoint` opens, or
            what it opened.
        device: "cpu", "cuda", "cuda:N", or "auto" (a GPU if there is one).
        dtype: of the activations; None is fp32 on a CPU and bf16 on a GPU. Weights stay as they are stored.
    Raises:
        CheckpointError, SpecError: the checkpoint does not fit together.
        BackendError: the device is not there.
    """
    where = pick_device(device)
    if isinstance(source, Path):
        source = open_checkpoint(source)
    if dtype is None:
        dtype = torch.float32 if where.type == "cpu" else torch.bfloat16
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise BackendError(f"dtype is {dtype!r}, expected torch.float32, torch.bfloat16 or torch.float16.")
    weights = WeightReader(source, where).model()
    return Model(source.spec, weights, where, dtype, source.fingerprint, source.path)


def pick_device(device: str) -> torch.device:
    """The torch device for a name; "auto" is a GPU if there is one.

    Raises:
        BackendError: no such device here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise BackendError(f"device {device!r} is unknown, expected auto, cpu, cuda or cuda:N.") from None
    if found.type not in ("cpu", "cuda"):
        raise BackendError(f"device {device!r} is not supported, expected auto, cpu, cuda or cuda:N.")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise BackendError(
            f"device {device!r} is not here: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA GPUs. "
            "Use --device cpu, or install a CUDA build of torch."
        )
    return found


@dataclass(frozen=True)
class WeightReader:
    """Weights on a device, in memory of their own: the file may change or go while the model runs.

    `ready` makes of a matrix what products are done with.
    """

    source: WeightSource
    device: torch.device
    ready: Callable[[Weight], Weight] = prepare

    def model(self) -> ModelWeights:
        return ModelWeights(
            embed=self._get("embed.weight"),
            layers=tuple(self.layer(i) for i in range(self.source.spec.num_layers)),
            ln_f=self.vector("ln_f.weight"),
            lm_head=self.product("lm_head.weight"),
        )

    def layer(self, i: int) -> Layer:
        own = f"layers.{i}."
        mlp = Mlp(
            self.vector(own + "norm_2.weight"),
            self.product(own + "w1.weight", own + "w2.weight"),
            self.product(own + "w3.weight"),
        )
        norm, o_proj = self.vector(own + "norm_1.weight"), self.product(own + "o_proj.weight")
        inputs = [own + f"{name}_proj.weight" for name in "qkv"]
        if self.source.spec.layer_types[i] == "sliding_attention":
            return AttentionLayer(norm, self.product(*inputs), o_proj, mlp)
        inputs += [own + name for name in ("b_proj.weight", "w_proj.weight", "f_proj.0.weight", "g_proj.0.weight")]
        return Gdn2Layer(
            norm=norm,
            in_proj=self.product(*inputs),
            conv=self.vector(*(own + f"{name}_conv1d.weight" for name in "qkv")),
            f_proj=self.product(own + "f_proj.1.weight"),
            g_proj=self.product(own + "g_proj.1.weight"),
            g_bias=self.vector(own + "g_proj.1.bias"),
            A_log=self.vector(own + "A_log"),
            dt_bias=self.vector(own + "dt_bias"),
            o_norm=self.vector(own + "o_norm.weight"),
            o_proj=o_proj,
            mlp=mlp,
        )

    def product(self, *names: str) -> Weight:
        """A matrix, or the rows of several that read the same input."""
        return self.ready(self._get(*names))

    def vector(self, *names: str) -> Weight:
        """A vector or filters, in fp32."""
        weight = self._get(*names)
        return Dense(weight.name, weight.rows(slice(None)))

    def _get(self, *names: str) -> Weight:
        weights = [self.source.weight(name) for name in names]
        return _moved(join(names[0] if len(names) == 1 else "+".join(names), weights), self.device, weights)


def _moved(weight: Weight, device: torch.device, in_file: list[Weight]) -> Weight:
    """The weight on a device; those that still lie in their file are copied."""
    copy = any(weight is one for one in in_file)
    match weight:
        case Dense(name, data):
            return Dense(name, data.to(device, copy=copy))
        case Int8(name, data, scale) | Fp8(name, data, scale) | Int4(name, data, scale):
            return type(weight)(name, data.to(device, copy=copy), scale.to(device, copy=copy))
        case Joined(name, parts):
            return Joined(name, tuple(_moved(part, device, in_file) for part in parts))
    raise TypeError(f"{type(weight).__name__} is not a stored layout")


def _leaves(weights: ModelWeights) -> list[Weight]:
    leaves = [weights.embed, weights.ln_f, weights.lm_head]
    for layer in weights.layers:
        fields = {**vars(layer), **vars(layer.mlp)}
        leaves += [weight for name, weight in fields.items() if name != "mlp"]
    return leaves
