"""What a GDN-2 model is made of: sizes, layer pattern, gates. Plain numbers; knows no tensors and no files.

The field names are those of ``config.json``. ``tensor_shapes`` is the one list of the tensors a model has;
converting, loading and inspecting all check against it.
"""

from __future__ import annotations

from math import prod
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from gdn2_edge.errors import SpecError

MODEL_TYPE = "gdn2"  # what config.json calls it

LayerType = Literal["gdn2", "sliding_attention"]
OutputGate = Literal["silu", "sigmoid"]

Count = Annotated[int, Field(ge=1, le=65_536)]


class ModelSpec(BaseModel):
    """Every size and choice of a GDN-2 model.

    A ``gdn2`` layer has ``num_heads`` heads for q, k, the decay and the erase gate, and ``num_v_heads`` (a
    multiple of it) for v, the write gate and the output. A ``sliding_attention`` layer has
    ``num_attention_heads`` query heads over ``num_key_value_heads`` key heads of ``head_dim`` and sees
    ``sliding_window`` tokens, itself included.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    vocab_size: Annotated[int, Field(ge=1, le=4_194_304)]
    hidden_size: Count
    intermediate_size: Annotated[int, Field(ge=1, le=1_048_576)]
    layer_types: Annotated[tuple[LayerType, ...], Field(min_length=1, max_length=1024, strict=False)]
    num_heads: Count
    num_v_heads: Count
    head_k_dim: Annotated[int, Field(ge=1, le=1024)]
    head_v_dim: Annotated[int, Field(ge=1, le=1024)]
    conv_size: Annotated[int, Field(ge=2, le=64)] = 4
    norm_eps: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    output_gate: OutputGate
    allow_neg_eigval: bool = False
    num_attention_heads: Count | None = None
    num_key_value_heads: Count | None = None
    head_dim: Annotated[int, Field(ge=2, le=1024, multiple_of=2)] | None = None
    sliding_window: Annotated[int, Field(ge=1, le=1_048_576)] | None = None
    rope_theta: Annotated[float, Field(gt=1, lt=1e12)] | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> ModelSpec:
        if self.num_v_heads % self.num_heads:
            raise ValueError(f"num_v_heads is {self.num_v_heads}, expected a multiple of num_heads = {self.num_heads}")
        attention = {name: getattr(self, name) for name in ATTENTION_FIELDS}
        missing = [name for name, value in attention.items() if value is None]
        if "sliding_attention" in self.layer_types:
            if missing:
                raise ValueError(f"sliding_attention layers also need {', '.join(missing)}")
            if self.q_heads % self.kv_heads:
                raise ValueError(
                    f"num_attention_heads is {self.q_heads}, "
                    f"expected a multiple of num_key_value_heads = {self.kv_heads}"
                )
        elif len(missing) < len(attention):
            given = [name for name in attention if name not in missing]
            raise ValueError(f"{', '.join(given)} given, but no layer in layer_types is sliding_attention")
        return self

    @property
    def num_layers(self) -> int:
        return len(self.layer_types)

    @property
    def erase_scale(self) -> float:
        """Factor on the erase gate: 2 lets the transition have negative eigenvalues."""
        return 2.0 if self.allow_neg_eigval else 1.0

    @property
    def key_dim(self) -> int:
        """Channels of q, k, the erase gate and the decay of one gdn2 layer."""
        return self.num_heads * self.head_k_dim

    @property
    def value_dim(self) -> int:
        """Channels of v, the write gate and the output gate of one gdn2 layer."""
        return self.num_v_heads * self.head_v_dim

    @property
    def q_heads(self) -> int:
        return self.num_attention_heads or 0

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or 0

    @property
    def attention_head_dim(self) -> int:
        return self.head_dim or 0

    @property
    def window(self) -> int:
        return self.sliding_window or 0

    @property
    def rope_base(self) -> float:
        return self.rope_theta or 10_000.0

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name -> shape of every tensor, in the order in which a step reads them."""
        shapes: dict[str, tuple[int, ...]] = {"embed.weight": (self.vocab_size, self.hidden_size)}
        for i, kind in enumerate(self.layer_types):
            layer = self._gdn2_shapes() if kind == "gdn2" else self._attention_shapes()
            shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
        shapes["ln_f.weight"] = (self.hidden_size,)
        shapes["lm_head.weight"] = (self.vocab_size, self.hidden_size)
        return shapes

    def _gdn2_shapes(self) -> dict[str, tuple[int, ...]]:
        d, k, v, rank = self.hidden_size, self.key_dim, self.value_dim, self.head_v_dim
        return {
            "norm_1.weight": (d,),
            "q_proj.weight": (k, d),
            "k_proj.weight": (k, d),
            "v_proj.weight": (v, d),
            "b_proj.weight": (k, d),
            "w_proj.weight": (v, d),
            "f_proj.0.weight": (rank, d),
            "g_proj.0.weight": (rank, d),
            "q_conv1d.weight": (k, 1, self.conv_size),
            "k_conv1d.weight": (k, 1, self.conv_size),
            "v_conv1d.weight": (v, 1, self.conv_size),
            "f_proj.1.weight": (k, rank),
            "A_log": (self.num_heads,),
            "dt_bias": (k,),
            "g_proj.1.weight": (v, rank),
            "g_proj.1.bias": (v,),
            "o_norm.weight": (self.head_v_dim,),
            "o_proj.weight": (d, v),
            **self._mlp_shapes(),
        }

    def _attention_shapes(self) -> dict[str, tuple[int, ...]]:
        d, q, kv = (
            self.hidden_size,
            self.q_heads * self.attention_head_dim,
            self.kv_heads * self.attention_head_dim,
        )
        return {
            "norm_1.weight": (d,),
            "q_proj.weight": (q, d),
            "k_proj.weight": (kv, d),
            "v_proj.weight": (kv, d),
            "o_proj.weight": (d, q),
            **self._mlp_shapes(),
        }

    def _mlp_shapes(self) -> dict[str, tuple[int, ...]]:
        d, f = self.hidden_size, self.intermediate_size
        return {"norm_2.weight": (d,), "w1.weight": (f, d), "w2.weight": (f, d), "w3.weight": (d, f)}

    def state_shapes(self, batch: int = 1) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every state tensor for `batch` sequences; the same at any length."""
        shapes: dict[str, tuple[int, ...]] = {"position": (batch,)}
        for i, kind in enumerate(self.layer_types):
            if kind == "gdn2":
                channels = 2 * self.key_dim + self.value_dim
                shapes[f"layers.{i}.conv"] = (batch, channels, self.conv_size - 1)
                shapes[f"layers.{i}.S"] = (batch, self.num_v_heads, self.head_k_dim, self.head_v_dim)
            else:
                ring = (batch, self.window, self.kv_heads, self.attention_head_dim)
                shapes |= {f"layers.{i}.ring_k": ring, f"layers.{i}.ring_v": ring}
        return shapes

    def state_bytes(self) -> int:
        """Of one sequence's state: int64 positions, all else fp32."""
        return sum(prod(shape) * (8 if name == "position" else 4) for name, shape in self.state_shapes().items())

    def num_parameters(self) -> int:
        return sum(prod(shape) for shape in self.tensor_shapes().values())

    def to_json(self) -> dict[str, Any]:
        """The fields as config.json holds them; absent attention fields are left out."""
        return self.model_dump(mode="json", exclude_none=True)


ATTENTION_FIELDS = ("num_attention_heads", "num_key_value_heads", "head_dim", "sliding_window", "rope_theta")


def spec_from_fields(fields: dict[str, Any], source: str) -> ModelSpec:
    """ModelSpec from plain fields.

    Args:
        fields: the fields of `ModelSpec`, as JSON gives them.
        source: what the fields came from, for the error's sentence.
    Raises:
        SpecError: a field is missing, unknown, of the wrong type, out of range, or contradicts another.
    """
    try:
        return ModelSpec.model_validate(fields)
    except ValidationError as error:
        raise SpecError(f"{source}: {'; '.join(_sentence(e) for e in error.errors()[:4])}.") from None


def _sentence(error: Any) -> str:
    name = ".".join(str(part) for part in error["loc"])
    found = str(error.get("input"))[:60]
    match error["type"]:
        case "missing":
            return f"{name} is missing"
        case "extra_forbidden":
            return f"{name} is not a known field (known: {', '.join(ModelSpec.model_fields)})"
        case "value_error":
            return str(error["ctx"]["error"])
    expected = error["msg"].removeprefix("Input should be ")
    return f"{name} is {found!r}, expected {expected}"


_MODEL_1_3B = {
    "vocab_size": 32_000,
    "hidden_size": 2304,
    "num_heads": 16,
    "num_v_heads": 16,
    "head_k_dim": 128,
    "head_v_dim": 128,
    "output_gate": "silu",
}

# The published configurations: what a training file of that name does not say itself. Source: arXiv 2605.22791.
# The sizes of swa_gdn2_100M's layers are read from its shapes; only what shapes cannot say is given here.
NAMED_CONFIGS: dict[str, dict[str, Any]] = {
    "gdn2_1.3B": {**_MODEL_1_3B, "intermediate_size": 6208, "layer_types": ["gdn2"] * 18},
    "swa_gdn2_1.3B": {
        **_MODEL_1_3B,
        "intermediate_size": 6784,
        "layer_types": ["gdn2", "sliding_attention"] * 9,
        "num_attention_heads": 18,
        "num_key_value_heads": 18,
        "head_dim": 128,
        "sliding_window": 2048,
        "rope_theta": 10_000.0,
    },
    "gdn2_12h_100M": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "layer_types": ["gdn2"] * 12,
        "num_heads": 12,
        "head_k_dim": 64,
    },
    "swa_gdn2_100M": {"head_dim": 64, "sliding_window": 2048, "rope_theta": 10_000.0},
    "gdn2_12h_305M": {
        "hidden_size": 1024,
        "intermediate_size": 4352,
        "layer_types": ["gdn2"] * 12,
        "num_heads": 16,
        "head_k_dim": 64,
    },
}
