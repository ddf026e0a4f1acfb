"""Exports a model for the page beside this file: model/model.onnx, tokenizer.json and chat.json.

chat.json holds what the page needs to know and does not have to work out: the ids around a message, the ids that end
an answer, the state's tensors, and how a token is chosen.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from gdn2_edge.errors import CheckpointError, Gdn2EdgeError
from gdn2_edge.export.onnx import export_onnx
from gdn2_edge.generate.text import ChatTokenizer, open_text
from gdn2_edge.loading import model_path
from gdn2_edge.onnx_names import has_positions, state_names
from gdn2_edge.spec import ModelSpec

# A message's own ids must not depend on what stands around it; these are hard on a tokenizer.
PROBES = ("Hi", "", " a ", "\n\n", "007", "é 你好", "<|end|>", "it's {{ x }}", ".", "  two  spaces")


def prepare(source: Path, out: Path, format: str) -> None:
    """Write the folder `out`.

    Raises:
        Gdn2EdgeError: the model cannot be exported, or its chat template does not suit the page; nothing is written.
    """
    text = open_text(source)
    around = {"opening": _around(text, text.opening), "continuation": _around(text, text.continuation)}
    with tempfile.TemporaryDirectory(dir=out.absolute().parent) as scratch:
        made = Path(scratch) / "model"
        export_onnx(source, made, format)
        chat = {**around, **_facts(text, made)}
        (made / "chat.json").write_text(json.dumps(chat, indent=1) + "\n", encoding="utf-8")
        try:
            made.rename(out)
        except OSError as error:
            raise CheckpointError(
                f"{out} cannot be made ({error.strerror}); remove it, or give another --out."
            ) from None


def _around(text: ChatTokenizer, turn: Any) -> list[list[int]]:
    """The ids before and after a message, the same for all messages.

    Raises:
        CheckpointError: the template trims messages, or joins its words to theirs.
    """
    probe = text.encode(PROBES[0])
    ids = turn(PROBES[0])
    for start in range(len(ids)):
        before, after = ids[:start], ids[start + len(probe) :]
        if all(turn(p) == [*before, *text.encode(p), *after] for p in PROBES):
            return [before, after]
    raise CheckpointError("This page needs a chat template that writes a message as it is, between control tokens.")


def _facts(text: ChatTokenizer, folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    spec = ModelSpec.model_validate({name: config[name] for name in ModelSpec.model_fields if name in config})
    added = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    sampling = text.config.sampling()
    return {
        "fingerprint": config["fingerprint"],
        "stop_ids": sorted(text.stop_ids),
        # Names of tokens that are plain text in a message.
        "control": [token["content"] for token in added if text.encode(token["content"]) != [token["id"]]],
        "states": [
            {"input": into, "output": out_of, "shape": spec.state_shapes()[name]}
            for name, (into, out_of) in state_names(spec).items()
        ],
        "has_positions": has_positions(spec),
        "repetition_penalty": sampling.repetition_penalty,
        "repetition_window": sampling.repetition_window,
        "description": text.config.description,
        "example_prompts": text.config.example_prompts,
    }


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Export a model for the page.")
    parser.add_argument("source", nargs="?", default="tiny", help="a gdn2-edge folder, or tiny")
    parser.add_argument("--format", default="fp16", choices=["fp32", "fp16", "int8", "int4", "fp8"])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "model", help="the folder to make")
    options = parser.parse_args()
    if options.out.exists():
        print(f"error: {options.out} is there already; remove it, or give another --out.", file=sys.stderr)
        return 1
    try:
        prepare(model_path(options.source), options.out, options.format)
    except Gdn2EdgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{options.out} holds the model in {options.format}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
