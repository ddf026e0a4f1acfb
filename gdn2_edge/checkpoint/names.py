"""Key names of the checkpoints people hold, and ours.

A key is read from its end: the last components name the tensor, a number after ``layers``, ``h`` or ``blocks`` names
the layer, and whatever stands before that is the owner's own business.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from gdn2_edge.errors import CheckpointError

# Other spellings of a layer's tensors (NVlabs' lit_gpt, transformers' habits); fla's layer names are the canonical.
LAYER_ALIASES = {
    "attn.proj.weight": "o_proj.weight",
    "attn_norm.weight": "norm_1.weight",
    "input_layernorm.weight": "norm_1.weight",
    "mlp_norm.weight": "norm_2.weight",
    "post_attention_layernorm.weight": "norm_2.weight",
    "mlp.gate_proj.weight": "w1.weight",
    "mlp.up_proj.weight": "w2.weight",
    "mlp.down_proj.weight": "w3.weight",
}
LAYER_NAMES = {
    *(
        "norm_1.weight",
        "norm_2.weight",
        "w1.weight",
        "w2.weight",
        "w3.weight",
        "A_log",
        "dt_bias",
        "o_norm.weight",
    ),
    *(f"{n}_proj.weight" for n in "qkvbwo"),
    *(f"{n}_proj.{i}.weight" for n in "fg" for i in (0, 1)),
    *(f"{n}_conv1d.weight" for n in "qkv"),
    "g_proj.1.bias",
}
FUSED_ATTENTION = "attn.attn.weight"  # NVlabs: for each query group its q heads, then k, then v
TOP_NAMES = {
    "embed.weight": (
        "wte.weight",
        "embed.weight",
        "embed_tokens.weight",
        "embeddings.weight",
        "embedding.weight",
    ),
    "ln_f.weight": ("ln_f.weight", "norm.weight", "norm_f.weight", "final_norm.weight"),
    "lm_head.weight": ("lm_head.weight",),
}
_LAYER_KEY = re.compile(r"^(?:.*\.)?(?:layers|h|blocks)\.(\d{1,4})\.(.+)$")


@dataclass(frozen=True)
class Source:
    """Where a canonical tensor comes from: a key of the file, or the q, k or v rows of a fused one."""

    key: str
    part: Literal["", "q", "k", "v"] = ""


def canonical_sources(keys: Iterable[str], where: str) -> dict[str, Source]:
    """Canonical name -> source for every key of a checkpoint.

    Raises:
        CheckpointError: keys that no table knows, or two keys for one tensor.
    """
    sources: dict[str, Source] = {}
    unknown = []
    for key in keys:
        names = _canonical(key)
        if not names:
            unknown.append(key)
        for name, source in names.items():
            if name in sources:
                raise CheckpointError(f"{where}: {sources[name].key} and {key} are both {name}.")
            sources[name] = source
    if unknown:
        more = f" and {len(unknown) - 4} more" if len(unknown) > 4 else ""
        raise CheckpointError(
            f"{where}: keys that are not part of a GDN-2 model: {', '.join(sorted(unknown)[:4])}{more}. "
            "Expected the names of NVlabs' training files or of fla's GatedDeltaNet2 layer."
        )
    return sources


def _canonical(key: str) -> dict[str, Source]:
    if match := _LAYER_KEY.match(key):
        layer, rest = int(match[1]), match[2]
        if rest == FUSED_ATTENTION:
            return {f"layers.{layer}.{part}_proj.weight": Source(key, part) for part in ("q", "k", "v")}
        for tail in _tails(rest):
            name = LAYER_ALIASES.get(tail, tail)
            if name in LAYER_NAMES:
                return {f"layers.{layer}.{name}": Source(key)}
        return {}
    for name, spellings in TOP_NAMES.items():
        if any(tail in spellings for tail in _tails(key)):
            return {name: Source(key)}
    return {}


def _tails(key: str) -> list[str]:
    """The key, then the key without its first component, and so on."""
    parts = key.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]
