"""SentencePiece `.model` files as tokenizers' `tokenizer.json`.

Knows both formats; the text that a model reads, and what is a turn of a conversation, are known elsewhere.
"""

from __future__ import annotations

import base64
import importlib
import json
from pathlib import Path
from typing import Any

from gdn2_edge.errors import CheckpointError

MAX_BYTES = 64 << 20
MAX_PIECE_CHARACTERS = 512  # every split of a piece is looked at; sentencepiece's own default is 16
SPACE = "▁"

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
UNIGRAM, BPE = 1, 2

# Below every normal score, so that no text is encoded as a piece that sentencepiece never matches.
UNREACHABLE = -1000.0


def tokenizer_from_sentencepiece(path: Path) -> str:
    """The text of a `tokenizer.json` that encodes and decodes as the sentencepiece model does.

    Nothing is added around a text (no BOS, no EOS). Control and unknown pieces become special tokens.

    Args:
        path: A BPE or unigram `.model` file.

    Raises:
        CheckpointError: the file is no such model, uses what tokenizers cannot express, or the packages that
            read it are missing.

    Source: `sentencepiece_model.proto`, `normalizer.cc` and `bpe_model.cc` of google/sentencepiece.
    """
    proto = _model(path)
    types = [piece.type for piece in proto.pieces]
    names = [piece.piece for piece in proto.pieces]
    _check(path.name, proto, types, names)
    unknown = types.index(UNKNOWN)
    if proto.trainer_spec.model_type == BPE:
        model = {
            "type": "BPE",
            "dropout": None,
            "unk_token": names[unknown],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": proto.trainer_spec.byte_fallback,
            "ignore_merges": False,
            "vocab": {name: token_id for token_id, name in enumerate(names)},
            "merges": _merges(proto),
        }
    else:
        lowest = min((piece.score for piece in proto.pieces if piece.type == NORMAL), default=0.0)
        model = {
            "type": "Unigram",
            "unk_id": unknown,
            "vocab": [
                [piece.piece, piece.score if piece.type in (NORMAL, USER_DEFINED) else lowest + UNREACHABLE]
                for piece in proto.pieces
            ],
            "byte_fallback": proto.trainer_spec.byte_fallback,
        }
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": token_id,
                "content": name,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                # A piece of spaces is matched where the normalizer has written them.
                "normalized": kind == USER_DEFINED and SPACE in name,
                "special": kind != USER_DEFINED,
            }
            for token_id, (name, kind) in enumerate(zip(names, types, strict=True))
            if kind in (UNKNOWN, CONTROL, USER_DEFINED)
        ],
        "normalizer": _normalizer(proto.normalizer_spec),
        "pre_tokenizer": _pre_tokenizer(proto.normalizer_spec),
        "post_processor": None,
        "decoder": _decoder(proto),
        "model": model,
    }
    text = json.dumps(tokenizer, ensure_ascii=False)
    _try(path.name, text)
    return text


def _model(path: Path) -> Any:
    try:
        protos = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
        message = importlib.import_module("google.protobuf.message")
    except ImportError:
        raise CheckpointError(
            f'{path.name}: reading a sentencepiece model needs: pip install "gdn2-edge[sentencepiece]"'
        ) from None
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise CheckpointError(f"{path.name} is {size} bytes, expected at most {MAX_BYTES}.")
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from None
    proto = protos.ModelProto()
    try:
        proto.ParseFromString(data)
    except (message.DecodeError, ValueError, RecursionError):
        raise CheckpointError(f"{path.name} is not a sentencepiece model.") from None
    if not proto.pieces or not proto.HasField("trainer_spec"):
        raise CheckpointError(f"{path.name} is not a sentencepiece model.")
    return proto


def _check(name: str, proto: Any, types: list[int], pieces: list[str]) -> None:
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    problem = None
    if trainer.model_type not in (UNIGRAM, BPE):
        problem = "is neither a BPE nor a unigram model"
    elif trainer.treat_whitespace_as_suffix or not normalizer.escape_whitespaces:
        problem = "marks spaces in a way that tokenizers cannot (whitespace as suffix, or not escaped)"
    elif proto.denormalizer_spec.precompiled_charsmap:
        problem = "changes the text that it decodes (denormalizer), which tokenizers cannot"
    elif types.count(UNKNOWN) != 1:
        problem = f"has {types.count(UNKNOWN)} unknown pieces, expected one"
    elif len(set(pieces)) != len(pieces) or not all(pieces):
        problem = "has empty or repeated pieces"
    elif max(map(len, pieces)) > MAX_PIECE_CHARACTERS:
        problem = f"has a piece of {max(map(len, pieces))} characters, expected at most {MAX_PIECE_CHARACTERS}"
    elif UNUSED in types and trainer.model_type == BPE:
        problem = "is a BPE model with unused pieces, which tokenizers cannot split again"
    elif trainer.byte_fallback and types.count(BYTE) != 256:
        problem = f"has {types.count(BYTE)} byte pieces, expected 256"
    if problem:
        raise CheckpointError(f"{name} {problem}.")


def _merges(proto: Any) -> list[list[str]]:
    """Every pair of pieces that makes a piece, best score first: sentencepiece stores scores only."""
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == NORMAL}
    ranked = sorted(scores, key=lambda piece: -scores[piece])
    return [
        [piece[:cut], piece[cut:]]
        for piece in ranked
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]


def _normalizer(spec: Any) -> dict[str, Any]:
    steps: list[dict[str, Any]] = []
    if spec.precompiled_charsmap:
        charsmap = base64.b64encode(spec.precompiled_charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if spec.remove_extra_whitespaces:
        # A space in front of the text stays where it is about to become the dummy prefix.
        ends = rf"[ {SPACE}]+\z" if spec.add_dummy_prefix else rf"\A +|[ {SPACE}]+\z"
        steps.append({"type": "Replace", "pattern": {"Regex": ends}, "content": ""})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    if not (spec.remove_extra_whitespaces and spec.add_dummy_prefix):
        steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    return {"type": "Sequence", "normalizers": steps}


def _pre_tokenizer(spec: Any) -> dict[str, Any] | None:
    """The dummy prefix: a space in front of the whole text, not of every part between special tokens.

    Metaspace adds its mark, here " ", where the text does not start with it. Where sentencepiece keeps extra
    spaces it adds one even so: there, the text's own spaces are "▁" by now. The second turns " " into "▁".
    """
    if not spec.add_dummy_prefix:
        return None
    steps = [
        {"type": "Metaspace", "replacement": mark, "prepend_scheme": scheme, "split": False}
        for mark, scheme in ((" ", "first"), (SPACE, "never"))
    ]
    return {"type": "Sequence", "pretokenizers": steps}


def _decoder(proto: Any) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}]
    if proto.trainer_spec.byte_fallback:
        steps.append({"type": "ByteFallback"})
    steps.append({"type": "Fuse"})
    if proto.normalizer_spec.add_dummy_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _try(name: str, text: str) -> None:
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_str(text)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in Rust is no Exception
        reason = " ".join(str(error).split())[:100]
        raise CheckpointError(f"{name} cannot be made a tokenizer.json ({reason}).") from None
