"""Tokenizers in GGUF: which are written and how, which are refused, and llama.cpp's ids against ours where it is."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gguf", reason="the extra gguf is not installed")

import gguf
from gguf import TokenType
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from gdn2_edge.checkpoint.sentencepiece import tokenizer_from_sentencepiece
from gdn2_edge.errors import CheckpointError
from gdn2_edge.evaluate import read_documents
from gdn2_edge.export.gguf.exporter import _add
from gdn2_edge.export.gguf.tokenizer import LLAMA_3, QWEN_2, tokenizer_keys
from gdn2_edge.generate.text import open_text
from gdn2_edge.loading import model_path

CHATS = read_documents(Path(__file__).parents[2] / "benchmarks" / "data" / "heldout_chat.jsonl")
HELD_OUT = [line for chat in CHATS for message in chat.messages or [] for line in message.content.split("\n")]
VOCAB_SIZE = 600
LETTERS = "ab zéÄß 1２½٣ \n\t\r'sST!?…“”—¿あ漢字한🙂\u200d\u00a0\u3000\x00<|end|>. ..  $€ don't I'LL x"


def texts() -> list[str]:
    """Held-out chats, and odd strings."""
    chance = random.Random(0)
    odd = ["".join(chance.choices(LETTERS, k=chance.randint(1, 60))) for _ in range(500)]
    return [*HELD_OUT[:200], *odd]


def split(regex: str) -> Any:
    cut = pre_tokenizers.Split(Regex(regex), "isolated")
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def trained(pre_tokenizer: Any, ignore_merges: bool = False, normalizer: Any = None) -> dict[str, Any]:
    """A byte-level tokenizer.json of 500 tokens."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<|endoftext|>", "<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(HELD_OUT[:300], trainer)
    return json.loads(tokenizer.to_str())


def digits() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level()])


def byte_level() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A tokenizer.json as convert makes it of a sentencepiece model of Llama's kind."""
    trainer = pytest.importorskip("sentencepiece", reason="the extra sentencepiece is not installed")
    folder = tmp_path_factory.mktemp("sentencepiece")
    trainer.SentencePieceTrainer.train(
        sentence_iterator=iter(HELD_OUT[:300]),
        model_prefix=str(folder / "m"),
        vocab_size=VOCAB_SIZE,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=0.99,
        minloglevel=2,
    )
    return json.loads(tokenizer_from_sentencepiece(folder / "m.model"))


def keys_of(tokenizer: dict[str, Any], vocab_size: int = VOCAB_SIZE, **config: Any) -> dict[str, Any]:
    files = {"tokenizer.json": json.dumps(tokenizer).encode(), "generation_config.json": json.dumps(config).encode()}
    return {name.removeprefix("tokenizer.ggml."): value for name, value in tokenizer_keys(files, vocab_size).items()}


BYTE_LEVELS: dict[str, Callable[[], dict[str, Any]]] = {
    "gpt-2": lambda: trained(byte_level()),
    "smollm": lambda: trained(digits()),
    "llama-bpe": lambda: trained(split(LLAMA_3), ignore_merges=True),
    "smaug-bpe": lambda: trained(split(LLAMA_3)),
    "qwen2": lambda: trained(split(QWEN_2), normalizer=normalizers.NFC()),
}


@pytest.mark.parametrize("pre", BYTE_LEVELS)
def test_byte_levels_by_name(pre: str) -> None:
    keys = keys_of(BYTE_LEVELS[pre](), eos_token_id=[1, 0])
    assert (keys["model"], keys["pre"]) == ("gpt2", pre)
    assert (keys["eos_token_id"], keys["eot_token_id"], keys["bos_token_id"]) == (1, 0, 0)
    assert len(keys["tokens"]) == len(set(keys["tokens"])) == len(keys["token_type"]) == VOCAB_SIZE
    assert keys["token_type"][:3] == [TokenType.CONTROL, TokenType.CONTROL, TokenType.NORMAL]
    assert keys["token_type"][500:] == [TokenType.UNUSED] * 100
    assert not keys["add_bos_token"]


def test_sentencepiece_merges_become_scores(sentencepiece: dict[str, Any]) -> None:
    keys = keys_of(sentencepiece, eos_token_id=2, bos_token_id=1)
    assert keys["model"] == "llama"
    assert keys["add_space_prefix"] is True
    assert (keys["eos_token_id"], keys["bos_token_id"], keys["unknown_token_id"]) == (2, 1, 0)
    score = dict(zip(keys["tokens"], keys["scores"], strict=True))
    merged = [score["".join(pair)] for pair in sentencepiece["model"]["merges"]]
    assert merged == sorted(merged, reverse=True)
    kinds = dict(zip(keys["tokens"], keys["token_type"], strict=True))
    assert kinds["<0x0A>"] == TokenType.BYTE
    assert [kinds[name] for name in ("<unk>", "<s>")] == [TokenType.UNKNOWN, TokenType.CONTROL]


def edit(data: dict[str, Any], path: str, value: Any) -> None:
    *parts, last = path.split(".")
    for part in parts:
        data = data[part]
    data[last] = value


TOKEN = {"id": 500, "content": "<x>", "special": False, "lstrip": True, "rstrip": False, "single_word": False}


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("model.type", "WordPiece", "not BPE"),
        ("model.dropout", 0.1, "has a dropout"),
        ("model.ignore_merges", True, "pre_tokenizer is none that llama.cpp has"),
        ("pre_tokenizer", {"type": "Whitespace"}, "pre_tokenizer is none that llama.cpp has"),
        ("pre_tokenizer", None, "pre_tokenizer is none that llama.cpp has"),
        ("normalizer", {"type": "NFC"}, "normalizer changes the text"),
        ("normalizer", {"type": "Lowercase"}, "normalizer changes the text"),
        ("added_tokens", [TOKEN], "takes spaces around it"),
        ("added_tokens", [{**TOKEN, "lstrip": False, "id": 7}], "two of its tokens have one id"),
        ("added_tokens", [{**TOKEN, "lstrip": False, "id": VOCAB_SIZE}], f"the model has {VOCAB_SIZE}"),
        ("added_tokens", [{**TOKEN, "lstrip": False, "content": "[PAD501]"}], "name of an unused one"),
        ("added_tokens", [], "has a token that ends a text"),
        ("added_tokens", [{**TOKEN, "lstrip": False, "content": 5}], "not a file of the tokenizers package"),
        ("added_tokens", [{"id": 3}], "not a file of the tokenizers package"),
        ("model.merges", [["a"]], "not a file of the tokenizers package"),
        ("model.merges", [["a ", "b"]], "a merge has a space in it"),
        ("model.unk_token", ["a"], "not a file of the tokenizers package"),
        ("model", 3, "not a file of the tokenizers package"),
    ],
)
def test_byte_levels_that_llama_cpp_has_not(path: str, value: Any, words: str) -> None:
    data = trained(byte_level())
    edit(data, path, value)
    with pytest.raises(CheckpointError, match=words):
        keys_of(data)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: edit(data, "model.byte_fallback", False), "no tokens for single bytes"),
        (lambda data: edit(data, "normalizer", {"type": "NFKC"}), "normalizer and pre_tokenizer are none"),
        (lambda data: edit(data, "pre_tokenizer", {"type": "Metaspace"}), "normalizer and pre_tokenizer are none"),
        (lambda data: data["model"]["merges"].pop(), "it has no merge of"),
        (lambda data: data["model"]["merges"].append(data["model"]["merges"][0]), "do not stand together"),
    ],
)
def test_sentencepieces_that_llama_cpp_has_not(
    change: Callable[[dict[str, Any]], Any], words: str, sentencepiece: dict[str, Any]
) -> None:
    data = json.loads(json.dumps(sentencepiece))
    change(data)
    with pytest.raises(CheckpointError, match=words):
        keys_of(data)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"eos_token_id": VOCAB_SIZE}, "names token 600"),
        ({"eos_token_id": ["x"]}, "names token x"),
        ({"bos_token_id": True}, "names token True"),
        ({"eos_token_id": [0, 1, 2, 3]}, "llama.cpp takes 3"),
    ],
)
def test_special_tokens_that_are_not(config: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        keys_of(trained(byte_level()), **config)


def vocabulary(files: dict[str, bytes], vocab_size: int, path: Path) -> Any:
    """llama.cpp's tokenizer out of a file that has nothing else; of the architecture llama, which any build knows."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="no llama_cpp here")
    writer = gguf.GGUFWriter(path, "llama")
    sizes = {"context_length": 128, "embedding_length": 8, "block_count": 1, "feed_forward_length": 8}
    sizes |= {"attention.head_count": 1, "vocab_size": vocab_size, "attention.layer_norm_rms_epsilon": 1e-5}
    for name, value in {f"llama.{name}": value for name, value in sizes.items()}.items():
        _add(writer, name, value)
    for name, value in tokenizer_keys(files, vocab_size).items():
        _add(writer, name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return llama_cpp.Llama(str(path), vocab_only=True, verbose=False)


@pytest.mark.parametrize("name", ["tiny", "sentencepiece", "gpt-2", "smollm", "llama-bpe", "smaug-bpe", "qwen2"])
def test_ids_of_llama_cpp_are_ours(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    pytest.importorskip("llama_cpp", reason="no llama_cpp here")
    folder, vocab_size = model_path("tiny"), 8192
    files = {file: (folder / file).read_bytes() for file in ("tokenizer.json", "generation_config.json")}
    if name != "tiny":
        data = request.getfixturevalue(name) if name == "sentencepiece" else BYTE_LEVELS[name]()
        files, vocab_size = {"tokenizer.json": json.dumps(data).encode()}, VOCAB_SIZE
    ours, theirs = open_text(files), vocabulary(files, vocab_size, tmp_path / "x.gguf")
    for text in texts():
        assert theirs.tokenize(text.encode(), add_bos=False, special=False) == ours.encode(text), text
