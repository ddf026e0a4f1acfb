"""A `tokenizer.json` as llama.cpp's tokenizer, where that gives the same ids for every text; else a refusal.

llama.cpp has its own code for each tokenizer that it knows, chosen by `tokenizer.ggml.pre`. Here a tokenizer is
compared with those by what it does, not by a name or a checksum.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from gguf import TokenType

from gdn2_edge.errors import CheckpointError
from gdn2_edge.gguf_names import Value

SPACE = "▁"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
MAX_STOPS = 3  # end of sequence, of turn, of message

WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA_3 = rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{WORDS}|\p{{N}}{{1,3}}|{REST}"
QWEN_2 = rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{WORDS}|\p{{N}}|{REST}"
GPT_2 = ("ByteLevel", True)
PLAIN_BYTES = ("ByteLevel", False)
# What cuts a text before merges -> llama.cpp's name for it, with ignore_merges false and true.
CUTS: dict[tuple[object, ...], dict[bool, str]] = {
    (GPT_2,): {False: "gpt-2"},
    (("Digits", True), GPT_2): {False: "smollm"},
    (("Split", LLAMA_3, "Isolated"), PLAIN_BYTES): {False: "smaug-bpe", True: "llama-bpe"},
    (("Split", QWEN_2, "Isolated"), PLAIN_BYTES): {False: "qwen2"},
}
TO_SPACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
TO_PREFIX = [
    {"type": "Metaspace", "replacement": mark, "prepend_scheme": scheme, "split": False}
    for mark, scheme in ((" ", "first"), (SPACE, "never"))
]
# How a sentencepiece model marks spaces: (normalizer, pre-tokenizer, a space in front of the text).
SPACES: list[tuple[list[Any], list[Any], bool]] = [
    ([{"type": "Prepend", "prepend": SPACE}, TO_SPACE], [], True),
    ([TO_SPACE], TO_PREFIX, True),
    ([TO_SPACE], [], False),
    ([], TO_PREFIX[1:], False),
]


def tokenizer_keys(files: Mapping[str, bytes], vocab_size: int) -> dict[str, Value]:
    """The keys of tokenizer and chat template.

    Args:
        files: of the checkpoint by name; `tokenizer.json`, `chat_template.jinja` and `generation_config.json` count.
        vocab_size: rows of the embedding. Ids that no token has become unused tokens.
    Raises:
        CheckpointError: the tokenizer is damaged, or not one that llama.cpp has.
    """
    keys: dict[str, Value] = {}
    if "chat_template.jinja" in files:
        keys["tokenizer.chat_template"] = _text(files, "chat_template.jinja")
    if "tokenizer.json" not in files:
        return {"tokenizer.ggml.model": "none"} | keys
    text = _text(files, "tokenizer.json")
    try:
        found = _Tokenizer(json.loads(text), vocab_size)
        model = found.byte_level() if found.is_byte_level else found.sentencepiece()
        model |= found.special(*_special_ids(files, vocab_size))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        if isinstance(error, RecursionError | json.JSONDecodeError):
            raise CheckpointError(f"tokenizer.json is not valid JSON: {str(error)[:120]}.") from None
        raise CheckpointError(f"tokenizer.json is not a file of the tokenizers package ({error!r:.120}).") from None
    model |= {"tokenizer.ggml.tokens": found.tokens, "tokenizer.ggml.token_type": found.types}
    return model | {"tokenizer.huggingface.json": text} | keys


class _Tokenizer:
    """The parts of a tokenizer.json, compared with what llama.cpp does."""

    def __init__(self, data: dict[str, Any], vocab_size: int) -> None:
        self.data, self.model = data, data["model"]
        kind = self.model.get("type")
        if kind != "BPE":
            raise _unlike(f"its model is {str(kind)[:40]!r}, not BPE")
        for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if self.model.get(name):
                raise _unlike(f"its BPE has a {name}")
        self.added = {token["id"]: token for token in data.get("added_tokens") or []}
        for token in self.added.values():
            if any(token.get(name) for name in ("lstrip", "rstrip", "single_word")):
                raise _unlike(f"its token {token['content'][:40]!r} takes spaces around it or whole words only")
        vocab: dict[str, int] = {**self.model["vocab"], **{token["content"]: i for i, token in self.added.items()}}
        by_id = {i: name for name, i in vocab.items()}
        if len(by_id) != len(vocab):
            raise _unlike("two of its tokens have one id")
        if any(i not in range(vocab_size) for i in by_id):
            raise CheckpointError(
                f"tokenizer.json has token ids from {min(by_id)} to {max(by_id)}, the model has {vocab_size}."
            )
        unused = {i: f"[PAD{i}]" for i in range(vocab_size) if i not in by_id}
        if taken := vocab.keys() & set(unused.values()):
            raise _unlike(f"its token {min(taken)!r} has the name of an unused one")
        if not all(isinstance(name, str) for name in vocab):
            raise TypeError("a token that is no text")
        self.vocab = vocab
        self.tokens = [by_id.get(i) or unused[i] for i in range(vocab_size)]
        self.types = [int(self._type(i)) for i in range(vocab_size)]
        self.merges = [tuple(pair.split(" ", 1) if isinstance(pair, str) else pair) for pair in self.model["merges"]]
        if not all(len(pair) == 2 and all(isinstance(part, str) for part in pair) for pair in self.merges):
            raise TypeError("a merge that is no pair of texts")

    @property
    def is_byte_level(self) -> bool:
        return (self.data.get("decoder") or {}).get("type") == "ByteLevel"

    def _type(self, i: int) -> TokenType:
        name = self.tokens[i]
        if i in self.added:
            special = self.added[i]["special"]
            unknown = name == self.model.get("unk_token")
            return TokenType.UNKNOWN if unknown else TokenType.CONTROL if special else TokenType.USER_DEFINED
        if name not in self.vocab:
            return TokenType.UNUSED
        return TokenType.BYTE if self.model.get("byte_fallback") and name in BYTES else TokenType.NORMAL

    def byte_level(self) -> dict[str, Value]:
        """A BPE over bytes, as of GPT-2 and most since."""
        normalizer = self._steps("normalizer", "normalizers")
        cuts = CUTS.get(tuple(_cut(step) for step in self._steps("pre_tokenizer", "pretokenizers")), {})
        pre = cuts.get(bool(self.model.get("ignore_merges")))
        if pre is None:
            raise _unlike("its pre_tokenizer is none that llama.cpp has by name")
        # llama.cpp normalizes nothing. Qwen's files say NFC, and it takes them so.
        if normalizer and (pre, normalizer) != ("qwen2", [{"type": "NFC"}]):
            raise _unlike("its normalizer changes the text")
        if any(" " in left + right for left, right in self.merges):
            raise _unlike("a merge has a space in it")
        return {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": pre,
            "tokenizer.ggml.merges": [" ".join(pair) for pair in self.merges],
        }

    def sentencepiece(self) -> dict[str, Value]:
        """A BPE of sentencepiece, as of Llama 2: merges become scores."""
        steps = self._steps("normalizer", "normalizers"), self._steps("pre_tokenizer", "pretokenizers")
        prefix = next((prefix for *known, prefix in SPACES if list(steps) == known), None)
        if prefix is None:
            raise _unlike("its normalizer and pre_tokenizer are none that llama.cpp has by name")
        if not self.model.get("byte_fallback") or not self.vocab.keys() >= set(BYTES):
            raise _unlike("it has no tokens for single bytes")
        if self.model.get("ignore_merges"):
            raise _unlike("it ignores merges")
        if any(SPACE in token["content"] for token in self.added.values()):
            raise _unlike(f"an added token has {SPACE!r} in it")
        return {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.scores": self._scores(),
            "tokenizer.ggml.add_space_prefix": prefix,
        }

    def _scores(self) -> list[float]:
        """A score for each token, such that merging by best score is merging in the order of the merges.

        llama.cpp merges any two neighbours that make a token, so that every such pair must be among the merges; and
        takes the token with the best score first, so that the merges that make one token must stand together.
        """
        rank: dict[str, int] = {}
        last = ""
        for left, right in self.merges:
            if left + right != last and left + right in rank:
                raise _unlike("the merges that make one token do not stand together")
            last = left + right
            rank.setdefault(last, len(rank))
        pairs = set(self.merges)
        normal = {name for name, i in self.vocab.items() if self.types[i] == TokenType.NORMAL}
        for name in self.tokens:
            for cut in range(1, len(name)):
                pair = (name[:cut], name[cut:])
                if pair not in pairs and all(part in normal or len(part) == 1 for part in pair):
                    raise _unlike(f"it has no merge of {pair[0]!r} and {pair[1]!r}")
        return [-float(rank[name]) if name in rank else -float(len(rank)) for name in self.tokens]

    def special(self, stops: list[int], begin: int | None) -> dict[str, Value]:
        """Which tokens end and begin a text. llama.cpp takes token 11, or 1 and 2, for those that no key names."""
        if not stops:
            controls = [i for i, kind in enumerate(self.types) if kind == TokenType.CONTROL]
            if not controls:
                raise _unlike("neither it nor generation_config.json has a token that ends a text")
            stops = controls[:1]
        names = ("eos", "eot", "eom")
        keys: dict[str, Value] = {f"tokenizer.ggml.{name}_token_id": i for name, i in zip(names, stops, strict=False)}
        keys["tokenizer.ggml.bos_token_id"] = stops[-1] if begin is None else begin
        unknown = self.vocab.get(self.model.get("unk_token") or "")
        if unknown is not None:
            keys["tokenizer.ggml.unknown_token_id"] = unknown
        return keys | {"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_eos_token": False}

    def _steps(self, name: str, inner: str) -> list[Any]:
        """A normalizer or pre-tokenizer as the list of its steps."""
        step = self.data.get(name)
        steps = step[inner] if step and step.get("type") == "Sequence" else [step] if step else []
        # What says nothing about the ids.
        return [{key: value for key, value in one.items() if key != "trim_offsets"} for one in steps]


def _cut(step: dict[str, Any]) -> tuple[object, ...]:
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": bool(regex)}:
            return ("ByteLevel", regex)
        case {"type": "Digits", "individual_digits": bool(individual)}:
            return ("Digits", individual)
        case {"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": str(behavior), "invert": False}:
            return ("Split", regex, behavior)
    return (str(step.get("type")),)


def _special_ids(files: Mapping[str, bytes], vocab_size: int) -> tuple[list[int], int | None]:
    """The ids that end a text, and the one that begins it, as generation_config.json has them."""
    name = "generation_config.json"
    try:
        config = json.loads(_text(files, name)) if name in files else {}
        stops, begin = config.get("eos_token_id"), config.get("bos_token_id")
    except (ValueError, AttributeError, RecursionError):
        raise CheckpointError(f"{name} is not valid JSON of an object.") from None
    stops = stops if isinstance(stops, list) else [] if stops is None else [stops]
    for i in (*stops, *([] if begin is None else [begin])):
        if type(i) is not int or not 0 <= i < vocab_size:
            raise CheckpointError(f"{name} names token {str(i)[:40]}, the model has {vocab_size}.")
    if len(stops) > MAX_STOPS:
        raise CheckpointError(f"{name} names {len(stops)} tokens that end a text, llama.cpp takes {MAX_STOPS}.")
    return stops, begin


def _text(files: Mapping[str, bytes], name: str) -> str:
    try:
        return files[name].decode()
    except UnicodeDecodeError:
        raise CheckpointError(f"{name} is not UTF-8 text.") from None


def _unlike(why: str) -> CheckpointError:
    return CheckpointError(
        f"llama.cpp cannot represent this tokenizer: {why}. Take tokenizer.json out of the folder for a file that "
        "reads token ids only."
    )
