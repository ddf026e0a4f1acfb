"""Keys of other people's files, read as ours."""

from __future__ import annotations

import pytest

from gdn2_edge.checkpoint.names import Source, canonical_sources
from gdn2_edge.errors import CheckpointError

MIXER = [
    *(f"{n}_proj.weight" for n in "qkvbwo"),
    *(f"{n}_proj.{i}.weight" for n in "fg" for i in (0, 1)),
    *(f"{n}_conv1d.weight" for n in "qkv"),
    *("g_proj.1.bias", "A_log", "dt_bias", "o_norm.weight"),
]
# Canonical name within a layer -> what stands in the file after the layer's number.
LIT_GPT = {
    **{name: f"attn.{name}" for name in MIXER},
    "norm_1.weight": "norm_1.weight",
    "norm_2.weight": "norm_2.weight",
    **{f"{w}.weight": f"mlp.swiglu.{w}.weight" for w in ("w1", "w2", "w3")},
}
FLA = {
    **{name: f"attn.{name}" for name in MIXER},
    "norm_1.weight": "attn_norm.weight",
    "norm_2.weight": "mlp_norm.weight",
    "w1.weight": "mlp.gate_proj.weight",
    "w2.weight": "mlp.up_proj.weight",
    "w3.weight": "mlp.down_proj.weight",
}
TRANSFORMERS = {
    **FLA,
    **{name: f"linear_attn.{name}" for name in MIXER},
    "norm_1.weight": "input_layernorm.weight",
    "norm_2.weight": "post_attention_layernorm.weight",
}
CANONICAL = {name: name for name in LIT_GPT}
STYLES = {
    "lit_gpt": ("transformer.h.", LIT_GPT, ("transformer.wte.weight", "transformer.ln_f.weight", "lm_head.weight")),
    "fla": ("layers.", FLA, ("embeddings.weight", "norm.weight", "lm_head.weight")),
    "fla in a model": ("model.layers.", FLA, ("model.embeddings.weight", "model.norm.weight", "lm_head.weight")),
    "fla deep in a module": (
        "module.backbone.blocks.",
        FLA,
        ("module.backbone.embedding.weight", "module.backbone.norm_f.weight", "module.lm_head.weight"),
    ),
    "transformers": (
        "model.layers.",
        TRANSFORMERS,
        ("model.embed_tokens.weight", "model.final_norm.weight", "lm_head.weight"),
    ),
    "ours": ("layers.", CANONICAL, ("embed.weight", "ln_f.weight", "lm_head.weight")),
}


@pytest.mark.parametrize(("prefix", "layer", "top"), STYLES.values(), ids=STYLES.keys())
def test_every_name_is_known(prefix: str, layer: dict[str, str], top: tuple[str, str, str]) -> None:
    expected = {f"layers.{i}.{name}": f"{prefix}{i}.{key}" for i in (0, 3, 17) for name, key in layer.items()}
    expected |= dict(zip(("embed.weight", "ln_f.weight", "lm_head.weight"), top, strict=True))
    found = canonical_sources(expected.values(), "file")
    assert found == {name: Source(key) for name, key in expected.items()}


def test_a_fused_attention_matrix_is_three() -> None:
    key = "transformer.h.5.attn.attn.weight"
    found = canonical_sources([key, "transformer.h.5.attn.proj.weight"], "file")
    assert found == {
        "layers.5.q_proj.weight": Source(key, "q"),
        "layers.5.k_proj.weight": Source(key, "k"),
        "layers.5.v_proj.weight": Source(key, "v"),
        "layers.5.o_proj.weight": Source("transformer.h.5.attn.proj.weight"),
    }


def test_unknown_keys_are_named() -> None:
    keys = [f"layers.0.attn.z{i}_proj.weight" for i in range(6)]
    with pytest.raises(CheckpointError) as caught:
        canonical_sources(["layers.0.attn.q_proj.weight", *reversed(keys)], "my.pth")
    message = str(caught.value)
    assert message.startswith("my.pth: keys that are not part of a GDN-2 model: ")
    assert all(key in message for key in keys[:4])
    assert "and 2 more" in message
    assert keys[4] not in message
    assert "q_proj" not in message


@pytest.mark.parametrize(
    "key",
    [
        "layers.0.attn.q_proj.bias",
        "layers.0.attn.q_proj",
        "layers.0.attn.xq_proj.weight",
        "layers.x.attn.q_proj.weight",
        "layers.0",
        "layers.10000.attn.q_proj.weight",
        "transformer.attn.q_proj.weight",
        "transformer.wpe.weight",
        "my_norm.weight",
        "optimizer.lr",
        "",
    ],
)
def test_a_key_that_only_looks_like_one(key: str) -> None:
    with pytest.raises(CheckpointError, match="not part of a GDN-2 model"):
        canonical_sources([key], "file")


@pytest.mark.parametrize(
    "keys",
    [
        ("layers.0.norm_1.weight", "layers.0.attn_norm.weight"),
        ("layers.0.attn.attn.weight", "layers.0.attn.k_proj.weight"),
        ("model.layers.2.attn.A_log", "ema.layers.2.attn.A_log"),
        ("embeddings.weight", "model.embed_tokens.weight"),
    ],
)
def test_two_keys_for_one_tensor_are_both_named(keys: tuple[str, str]) -> None:
    with pytest.raises(CheckpointError, match="are both") as caught:
        canonical_sources(keys, "file")
    assert all(key in str(caught.value) for key in keys)
