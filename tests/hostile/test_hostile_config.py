"""config.json, and the file of --config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import inputs
import pytest
from inputs import CONFIG, HYBRID_PTH, INF, NAN, RECURRENT_PTH, Refused, Words

CONFIG_TEXTS = {
    "no JSON": (b"{", "config.json is not valid JSON"),
    "empty": (b"", "config.json is not valid JSON"),
    "not UTF-8": (b'{"model_type": "\xff"}', "config.json is not valid JSON"),
    "a list": (b"[]", "holds a list, expected an object"),
    "a number of 5000 digits": (b'{"model_type": "gdn2", "vocab_size": ' + b"9" * 5000 + b"}", "not valid JSON"),
    "nested deeply": (b'{"a":' * 100_000, "config.json is not valid JSON"),
    "17 MB": (b" " * (17 << 20) + b"{}", "bytes, expected at most"),
}


@pytest.mark.parametrize("name", CONFIG_TEXTS)
def test_config_text(name: str, models: Path, tmp_path: Path, refused_by_all: Refused) -> None:
    folder = inputs.copied(models / "dense", tmp_path / "model")
    content, words = CONFIG_TEXTS[name]
    inputs.replaced(folder / CONFIG, content)
    refused_by_all(folder, words)


CONFIG_FIELDS: dict[str, tuple[dict[str, Any], Words]] = {
    "another type": ({"model_type": "llama"}, ("'llama'", "expected 'gdn2'")),
    "a type that is a list": ({"model_type": ["gdn2"]}, "expected 'gdn2'"),
    "missing": ({"head_k_dim": None}, "head_k_dim is missing"),
    "unknown": ({"num_experts": 8}, "num_experts is not a known field"),
    "hidden_size 10^12": ({"hidden_size": 10**12}, ("'1000000000000'", "less than or equal to 65536")),
    "hidden_size of 4000 digits": ({"hidden_size": 10**4000}, "hidden_size is"),
    "hidden_size as large as allowed": ({"hidden_size": 65_536}, "the spec says (320, 65536)"),
    "vocab_size 0": ({"vocab_size": 0}, ("vocab_size is '0'", "greater than or equal to 1")),
    "vocab_size -1": ({"vocab_size": -1}, "vocab_size is '-1'"),
    "vocab_size one more": ({"vocab_size": 321}, "embed.weight is (320, 128), the spec says (321, 128)"),
    "num_heads text": ({"num_heads": "3"}, "num_heads is '3', expected a valid integer"),
    "num_heads 3.0": ({"num_heads": 3.0}, "num_heads is '3.0', expected a valid integer"),
    "num_heads NaN": ({"num_heads": NAN}, "num_heads is 'nan'"),
    "num_heads true": ({"num_heads": True}, "num_heads is 'True', expected a valid integer"),
    "num_heads 0": ({"num_heads": 0}, "num_heads is '0'"),
    "num_heads a dict": ({"num_heads": {"a\nb": 1}}, "num_heads is"),
    "num_v_heads no multiple": ({"num_v_heads": 4}, "num_v_heads is 4, expected a multiple of num_heads = 3"),
    "norm_eps NaN": ({"norm_eps": NAN}, "norm_eps is 'nan'"),
    "norm_eps infinite": ({"norm_eps": INF}, "norm_eps is 'inf'"),
    "norm_eps 0": ({"norm_eps": 0}, "norm_eps is '0'"),
    "allow_neg_eigval 1": ({"allow_neg_eigval": 1}, "allow_neg_eigval is '1', expected a valid boolean"),
    "output_gate": ({"output_gate": "relu"}, "output_gate is 'relu', expected 'silu' or 'sigmoid'"),
    "no layers": ({"layer_types": []}, "layer_types"),
    "unknown layers": ({"layer_types": ["mamba"] * 3}, "'mamba', expected 'gdn2' or 'sliding_attention'"),
    "a million layers": ({"layer_types": ["gdn2"] * 1_000_000}, "layer_types"),
    "layers that are a text": ({"layer_types": "gdn2"}, "layer_types is 'gdn2'"),
    "one layer more": ({"layer_types": ["gdn2"] * 4}, "layers.3.norm_1.weight is missing"),
    "one layer less": ({"layer_types": ["gdn2"] * 2}, "is not part of the model"),
    "window without attention": ({"sliding_window": 48}, "no layer in layer_types is sliding_attention"),
    "attention without window": ({"layer_types": ["gdn2", "sliding_attention"]}, "also need num_attention_heads"),
}


@pytest.mark.parametrize("name", CONFIG_FIELDS)
def test_config_field(name: str, models: Path, tmp_path: Path, refused_by_all: Refused) -> None:
    folder = inputs.copied(models / "dense", tmp_path / "model")
    changes, words = CONFIG_FIELDS[name]
    inputs.with_config(folder, **changes)
    refused_by_all(folder, words)


def test_config_missing(models: Path, tmp_path: Path, refused_by_all: Refused) -> None:
    folder = inputs.copied(models / "int4", tmp_path / "model")
    (folder / CONFIG).unlink()
    refused_by_all(folder, "quantized tensors without our config.json")


ATTENTION_FIELDS: dict[str, tuple[dict[str, Any], Words]] = {
    "query heads 0": ({"num_attention_heads": 0}, "num_attention_heads is '0'"),
    "query heads no multiple": ({"num_attention_heads": 3}, "num_attention_heads is 3, expected a multiple of"),
    "query heads 10^12": ({"num_attention_heads": 10**12}, "less than or equal to 65536"),
    "key heads of another shape": ({"num_key_value_heads": 4}, "k_proj.weight is (64, 128), the spec says (128, 128)"),
    "head_dim odd": ({"head_dim": 33}, "head_dim is '33', expected a multiple of 2"),
    "head_dim of another shape": ({"head_dim": 64}, "the spec says (256, 128)"),
    "rope_theta negative": ({"rope_theta": -1.0}, "rope_theta is '-1.0'"),
    "rope_theta NaN": ({"rope_theta": NAN}, "rope_theta is 'nan'"),
    "window missing": ({"sliding_window": None}, "sliding_attention layers also need sliding_window"),
    "window 0": ({"sliding_window": 0}, "sliding_window is '0'"),
    "window 10^9": ({"sliding_window": 10**9}, "sliding_window is '1000000000'"),
}


@pytest.mark.parametrize("name", ATTENTION_FIELDS)
def test_config_of_attention(name: str, models: Path, tmp_path: Path, refused_by_all: Refused) -> None:
    folder = inputs.copied(models / "hybrid", tmp_path / "model")
    changes, words = ATTENTION_FIELDS[name]
    inputs.with_config(folder, **changes)
    refused_by_all(folder, words)


CONFIG_FILES: dict[str, tuple[Any, Words]] = {
    "nothing of this name": (None, ("neither a file nor one of", "gdn2_1.3B")),
    "no JSON": ("{", "is not valid JSON"),
    "a list": ([1], "holds a list, expected an object"),
    "another width": ({"hidden_size": 256}, "shapes say hidden_size = 128, the configuration says 256"),
    "layers that are a number": ({"layer_types": 3}, "the configuration says 3"),
    "window without attention": ({"sliding_window": 48}, "no layer in layer_types is sliding_attention"),
    "heads that are a list": ({"num_attention_heads": [4]}, "num_attention_heads"),
    "an unknown field": ({"num_experts": 8}, "num_experts is not a known field"),
    "another gate": ({"output_gate": "relu"}, "the configuration says relu"),
    "a gate that is a list": ({"output_gate": ["silu"]}, "the configuration says"),
}


@pytest.mark.parametrize("name", CONFIG_FILES)
def test_config_option(name: str, tmp_path: Path, refused: Refused) -> None:
    content, words = CONFIG_FILES[name]
    if content is not None:
        inputs.replaced(tmp_path / "spec.json", content)
    refused("convert", RECURRENT_PTH, "--config", tmp_path / "spec.json", "--out", tmp_path / "out", words=words)
    refused("inspect", RECURRENT_PTH, "--config", tmp_path / "spec.json", words=words)


def test_published_config_of_another_model(tmp_path: Path, refused: Refused) -> None:
    words = ("shapes say", "the configuration says")
    refused("convert", RECURRENT_PTH, "--config", "gdn2_1.3B", "--out", tmp_path / "out", words=words)


def test_hybrid_without_config(tmp_path: Path, refused: Refused) -> None:
    words = ("does not say sliding_window, num_attention_heads", "--config NAME|FILE")
    refused("convert", HYBRID_PTH, "--out", tmp_path / "out", words=words)
