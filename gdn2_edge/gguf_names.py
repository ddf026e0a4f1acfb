"""Names and shapes: which tensors and sizes of a model stand where in a GGUF file (docs/gguf.md). Reads no weight."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from gdn2_edge.errors import SpecError
from gdn2_edge.spec import MODEL_TYPE, ModelSpec

Value = str | int | float | bool | list[str] | list[int] | list[float]

# What llama.cpp takes for the most tokens of a conversation. The state has one size at any length; its own converter
# writes the same number for other recurrent models.
CONTEXT_LENGTH = 1 << 20
MAX_LAYERS = 512  # LLAMA_MAX_LAYERS

TOP = {"token_embd.weight": "embed.weight", "output_norm.weight": "ln_f.weight", "output.weight": "lm_head.weight"}
EVERY_LAYER = {
    "attn_norm.weight": ("norm_1.weight",),
    "ffn_norm.weight": ("norm_2.weight",),
    "ffn_gate.weight": ("w1.weight",),
    "ffn_up.weight": ("w2.weight",),
    "ffn_down.weight": ("w3.weight",),
}
LAYER: dict[str, dict[str, tuple[str, ...]]] = {
    "gdn2": {
        "attn_qkv.weight": ("q_proj.weight", "k_proj.weight", "v_proj.weight"),
        "ssm_conv1d.weight": ("q_conv1d.weight", "k_conv1d.weight", "v_conv1d.weight"),
        "ssm_beta.weight": ("b_proj.weight",),
        "ssm_write.weight": ("w_proj.weight",),
        "ssm_f_a.weight": ("f_proj.0.weight",),
        "ssm_f_b.weight": ("f_proj.1.weight",),
        "ssm_dt.bias": ("dt_bias",),
        "ssm_a": ("A_log",),
        "ssm_g_a.weight": ("g_proj.0.weight",),
        "ssm_g_b.weight": ("g_proj.1.weight",),
        "ssm_g_b.bias": ("g_proj.1.bias",),
        "ssm_norm.weight": ("o_norm.weight",),
        "ssm_out.weight": ("o_proj.weight",),
    },
    "sliding_attention": {
        "attn_q.weight": ("q_proj.weight",),
        "attn_k.weight": ("k_proj.weight",),
        "attn_v.weight": ("v_proj.weight",),
        "attn_output.weight": ("o_proj.weight",),
    },
}


@dataclass(frozen=True)
class Entry:
    """One tensor of the file: canonical tensors, one under another. ggml counts `shape` from its end."""

    name: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]

    @property
    def is_matrix(self) -> bool:
        """Whether it is a matrix that products read; filters and ssm_a, though of two sizes, stay fp32."""
        return len(self.shape) == 2 and not self.name.endswith(("ssm_conv1d.weight", "ssm_a"))


def entries(spec: ModelSpec) -> list[Entry]:
    """Every tensor of the file, in the order of its data."""
    shapes = spec.tensor_shapes()

    def entry(name: str, sources: tuple[str, ...]) -> Entry:
        first = shapes[sources[0]]
        if name.endswith("ssm_a"):
            return Entry(name, sources, (*first, 1))
        return Entry(name, sources, (sum(shapes[one][0] for one in sources), *(n for n in first[1:] if n > 1)))

    def layers() -> Iterator[Entry]:
        for i, kind in enumerate(spec.layer_types):
            for name, sources in (EVERY_LAYER | LAYER[kind]).items():
                yield entry(f"blk.{i}.{name}", tuple(f"layers.{i}.{source}" for source in sources))

    top = [entry(name, (source,)) for name, source in TOP.items()]
    return [top[0], *layers(), *top[1:]]


def sizes(spec: ModelSpec) -> dict[str, Value]:
    """The keys that say what the tensors are.

    Raises:
        SpecError: ggml's recurrence has no such heads, or llama.cpp no so many layers.
    """
    if spec.head_v_dim % spec.head_k_dim:
        raise SpecError(
            f"head_v_dim is {spec.head_v_dim} and head_k_dim {spec.head_k_dim}: llama.cpp's recurrence needs values "
            "that are a multiple of the keys. Export it to ONNX instead."
        )
    if spec.num_layers > MAX_LAYERS:
        raise SpecError(f"the model has {spec.num_layers} layers, llama.cpp takes at most {MAX_LAYERS}.")
    keys: dict[str, Value] = {
        "vocab_size": spec.vocab_size,
        "context_length": CONTEXT_LENGTH,
        "embedding_length": spec.hidden_size,
        "feed_forward_length": spec.intermediate_size,
        "block_count": spec.num_layers,
        "attention.layer_norm_rms_epsilon": spec.norm_eps,
        "attention.head_count": spec.q_heads,
        "attention.head_count_kv": [0 if kind == "gdn2" else spec.kv_heads for kind in spec.layer_types],
        "ssm.conv_kernel": spec.conv_size,
        "ssm.state_size": spec.head_k_dim,
        "ssm.group_count": spec.num_heads,
        "ssm.time_step_rank": spec.num_v_heads,
        "ssm.inner_size": spec.value_dim,
        "ssm.output_gate": spec.output_gate,
        "ssm.allow_neg_eigval": spec.allow_neg_eigval,
    }
    if spec.q_heads:
        keys |= {
            "attention.key_length": spec.attention_head_dim,
            "attention.value_length": spec.attention_head_dim,
            "attention.sliding_window": spec.window,
            "rope.dimension_count": spec.attention_head_dim,
            "rope.freq_base": spec.rope_base,
        }
    return {f"{MODEL_TYPE}.{name}": value for name, value in keys.items()}
