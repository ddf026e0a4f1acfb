"""Converted sentencepiece models against sentencepiece itself."""

import io
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from gdn2_edge.checkpoint.sentencepiece import tokenizer_from_sentencepiece
from gdn2_edge.errors import CheckpointError
from gdn2_edge.generate.text import ChatTokenizer

spm = pytest.importorskip("sentencepiece", reason='needs: pip install "gdn2-edge[sentencepiece]"')

WORDS = re.findall(
    r"\S+",
    """the model keeps a state and reads each word once so that a long talk costs no more than a short one
    remember what was told take a correction forget on request Hello World numbers are 1 23 456 7890 in June
    < / > A x""",
)
CHARACTERS = "abchelo    \n\t<>/s0123é你😀▁.,ｈﬁ\u3000\xa0"

SETTINGS: dict[str, dict[str, Any]] = {
    "bpe like llama": {
        "model_type": "bpe",
        "vocab_size": 420,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "remove_extra_whitespaces": False,
        "control_symbols": ["<ctl>"],
        "user_defined_symbols": ["<ud>"],
    },
    "bpe by default": {"model_type": "bpe", "vocab_size": 150},
    "bpe without prefix": {
        "model_type": "bpe",
        "vocab_size": 420,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
    },
    "unigram by default": {"model_type": "unigram", "vocab_size": 110, "user_defined_symbols": ["<ud>"]},
    "unigram with bytes": {
        "model_type": "unigram",
        "vocab_size": 370,
        "byte_fallback": True,
        "normalization_rule_name": "nfkc",
        "control_symbols": ["<ctl>"],
    },
    "unigram without prefix": {
        "model_type": "unigram",
        "vocab_size": 110,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
    },
}

TEXTS = [
    *[
        "",
        " ",
        "    ",
        "hello",
        " hello",
        "   hello  world  ",
        "a\nb\n\n c",
        "\n",
        "tab\there",
        "1234 5,678",
        "x" * 60,
    ],
    *[
        "😀 ok 👩‍👩‍👧",
        "你好 world",
        "é e\u0301",
        "ﬁne ½ ①",
        "Ａｂ\u3000ｃ",
        "\u3000x\u3000",
        "\xa0x",
        "\u200b",
        "▁ a▁b",
    ],
    *["<s>", "</s> the", "<unk>", "<ctl> the", "<0x0A>", "the<ud>the", "a <ud>b"],
]


def train(**settings: Any) -> bytes:
    rng = random.Random(0)
    lines = [" ".join(rng.choices(WORDS, k=12)) for _ in range(400)]
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, minloglevel=2, hard_vocab_limit=False, **settings
    )
    return model.getvalue()


@pytest.fixture(scope="module", params=SETTINGS)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ChatTokenizer]:
    """A sentencepiece model and the tokenizer that was made of it."""
    data = train(**SETTINGS[request.param])
    path = tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model"
    path.write_bytes(data)
    return spm.SentencePieceProcessor(model_proto=data), ChatTokenizer(tokenizer_from_sentencepiece(path))


def samples() -> list[str]:
    rng = random.Random(1)
    noise = ["".join(rng.choices(CHARACTERS, k=rng.randrange(20))) for _ in range(1500)]
    prose = [" ".join(rng.choices(WORDS, k=8))[rng.randrange(5) :] for _ in range(500)]
    return [*TEXTS, *noise, *prose]


def test_ids_are_sentencepieces(both: tuple[Any, ChatTokenizer]) -> None:
    reference, text = both
    removes_spaces = reference.encode("the  the") == reference.encode("the the")
    assert text.vocab_size == reference.vocab_size()
    for sample in samples():
        if removes_spaces and " <ud>" in sample:
            continue  # a space before a user-defined piece: known to differ
        assert text.encode(sample) == reference.encode(sample), repr(sample)


def test_decoding_is_sentencepieces(both: tuple[Any, ChatTokenizer]) -> None:
    reference, text = both
    for sample in samples():
        ids = reference.encode(sample)
        if reference.unk_id() in ids or "▁" in sample:
            continue  # sentencepiece shows an unknown piece as " ⁇ "; ours has no text
        assert text.decode(ids) == reference.decode(ids), repr(sample)
        decoder = text.decoder()
        pushed = [decoder.push(token_id) for token_id in ids]
        assert "".join(pushed) == reference.decode(ids), repr(sample)
        assert not any("\ufffd" in piece for piece in pushed)


def test_control_pieces_are_special(tmp_path: Path) -> None:
    (tmp_path / "m.model").write_bytes(train(**SETTINGS["bpe like llama"]))
    added = json.loads(tokenizer_from_sentencepiece(tmp_path / "m.model"))["added_tokens"]
    assert {token["content"]: token["special"] for token in added} == {
        "<unk>": True,
        "<s>": True,
        "</s>": True,
        "<ctl>": True,
        "<ud>": False,
    }


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a sentencepiece model"),
        (b"not a model at all", "not a sentencepiece model"),
        (b"\x0a" * 5000, "not a sentencepiece model"),
        ((64 << 20) + 1, "expected at most"),
        (None, "cannot be read"),
    ],
)
def test_other_files_are_refused(content: bytes | int | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        with path.open("wb") as file:
            file.truncate(content)
    with pytest.raises(CheckpointError, match=words) as caught:
        tokenizer_from_sentencepiece(path)
    assert "\n" not in str(caught.value)


def damaged(data: bytes, **changes: Any) -> bytes:
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(data)
    for name, value in changes.items():
        if name == "charsmap":
            proto.normalizer_spec.precompiled_charsmap = value
        elif name == "piece":
            proto.pieces[-1].piece = value
        else:
            setattr(proto.trainer_spec, name, value)
    return bytes(proto.SerializeToString())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": 3}, "neither a BPE nor a unigram"),
        ({"treat_whitespace_as_suffix": True}, "marks spaces"),
        ({"piece": "<unk>"}, "repeated pieces"),
        ({"piece": "x" * 100_000}, "100000 characters"),
        ({"byte_fallback": True}, "0 byte pieces"),
        ({"charsmap": b"\xff\xff\xff\xff\x00"}, "cannot be made"),
    ],
)
def test_models_that_tokenizers_cannot_express(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    (tmp_path / "m.model").write_bytes(damaged(train(**SETTINGS["bpe by default"]), **changes))
    with pytest.raises(CheckpointError, match=words):
        tokenizer_from_sentencepiece(tmp_path / "m.model")


@pytest.mark.parametrize("missing", ["sentencepiece", "google.protobuf"])
def test_a_missing_package_names_its_extra(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n == missing or n.startswith((missing + ".", "sentencepiece."))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(CheckpointError, match=r'pip install "gdn2-edge\[sentencepiece\]"'):
        tokenizer_from_sentencepiece(tmp_path / "m.model")
