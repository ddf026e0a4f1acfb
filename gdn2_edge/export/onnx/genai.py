"""What onnxruntime-genai wants beside model.onnx: it then runs the folder, with its own tokenizer and sampling."""

from __future__ import annotations

import json
from typing import Any

from gdn2_edge.onnx_names import LOGITS, MODEL_FILE, TOKENS
from gdn2_edge.spec import ModelSpec

# The one of its model types that has these states, and says in the file what they are called.
MODEL_TYPE = "qwen3_5_text"
MAX_LENGTH = 4096  # of a conversation, in its search; the model itself has no limit


def genai_files(spec: ModelSpec, files: dict[str, bytes]) -> dict[str, bytes]:
    """genai_config.json and tokenizer_config.json by name; none with attention layers, which it would grow a cache for.

    Args:
        files: what goes into the folder, by name: tokenizer.json, generation_config.json and chat_template.jinja are
            read, and without the first two there is nothing to say.
    """
    settings = _parsed(files.get("generation_config.json"))
    tokens = {entry["id"]: entry["content"] for entry in _parsed(files.get("tokenizer.json")).get("added_tokens", [])}
    ends = settings.get("eos_token_id", [])
    ends = ends if isinstance(ends, list) else [ends]
    if not tokens or not ends or "sliding_attention" in spec.layer_types:
        return {}
    config = {
        "model": {
            "type": MODEL_TYPE,
            "bos_token_id": settings.get("bos_token_id", ends[-1]),
            "eos_token_id": ends,
            "pad_token_id": ends[-1],
            "context_length": MAX_LENGTH,
            "vocab_size": spec.vocab_size,
            "decoder": {
                "filename": MODEL_FILE,
                "session_options": {"provider_options": []},
                "head_size": spec.head_k_dim,
                "hidden_size": spec.hidden_size,
                "num_attention_heads": spec.num_heads,
                "num_key_value_heads": spec.num_v_heads,
                "num_hidden_layers": spec.num_layers,
                "layer_types": ["linear_attention"] * spec.num_layers,
                "inputs": {
                    "input_ids": TOKENS,
                    "past_conv_names": "past_conv.%d",
                    "past_recurrent_names": "past_recurrent.%d",
                },
                "outputs": {
                    "logits": LOGITS,
                    "present_conv_names": "present_conv.%d",
                    "present_recurrent_names": "present_recurrent.%d",
                },
            },
        },
        "search": {
            "do_sample": settings.get("do_sample", False),
            "max_length": MAX_LENGTH,
            "num_beams": 1,
            "past_present_share_buffer": False,
            "repetition_penalty": settings.get("repetition_penalty", 1.0),
        },
    }
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "bos_token": None,
        "eos_token": tokens.get(ends[0]),
        "pad_token": tokens.get(ends[-1]),
        "chat_template": files.get("chat_template.jinja", b"").decode(),
    }
    return {"genai_config.json": _bytes(config), "tokenizer_config.json": _bytes(tokenizer)}


def _parsed(content: bytes | None) -> dict[str, Any]:
    found = json.loads(content) if content is not None else {}
    return found if isinstance(found, dict) else {}


def _bytes(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()
