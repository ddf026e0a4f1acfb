"""Perplexity and comparisons: against plain cross entropy, against distributions known in advance, and by hand."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from jinja2 import Environment
from tokenizers import Tokenizer
from torch import Tensor

from gdn2_edge import cli
from gdn2_edge import evaluate as module
from gdn2_edge.errors import CheckpointError, Gdn2EdgeError
from gdn2_edge.evaluate import PIECE_TOKENS, check_same_tokens, evaluate, read_documents, token_ids
from gdn2_edge.generate.text import ChatTokenizer, open_text
from gdn2_edge.loading import load, model_path
from gdn2_edge.model import Model
from gdn2_edge.quantize import quantize_checkpoint
from gdn2_edge.quantize.recipe import Recipe
from gdn2_edge.runtime import Runtime
from gdn2_edge.state import State

CHATS = Path(__file__).parents[1] / "benchmarks" / "data" / "heldout_chat.jsonl"
# fp32 sums of logits in other pieces, in nats a token.
TOLERANCE = 2e-6


class Constant(Runtime):
    """The same logits after every token."""

    def __init__(self, logits: Tensor) -> None:
        self.logits, self.fed = logits, [0]

    def initial_state(self, batch: int = 1) -> State[Tensor]:
        return State(torch.zeros(batch, dtype=torch.int64), ())

    def forward(self, tokens: Tensor, state: State[Tensor] | None = None) -> tuple[Tensor, State[Tensor]]:
        state = self.initial_state() if state is None else state
        self.fed.append(tokens.shape[1])
        return self.logits.expand(*tokens.shape, -1), State(state.position + tokens.shape[1], ())

    def prefill(self, tokens: Tensor, state: State[Tensor]) -> tuple[Tensor, State[Tensor]]:
        raise NotImplementedError

    def import_state(self, tensors: dict[str, Tensor]) -> State[Tensor]:
        raise NotImplementedError


@pytest.fixture(scope="module")
def documents() -> list[list[int]]:
    text = open_text(model_path("tiny"))
    chats = [token_ids(chat, text) for chat in read_documents(CHATS)[:4]]
    assert min(map(len, chats)) > 20
    long = [token for chat in chats for token in chat][: PIECE_TOKENS + 70]
    assert len(long) == PIECE_TOKENS + 70
    return [chats[0][:50], long, [5], [], chats[1][:2]]


def test_the_loss_is_cross_entropy(tiny: Model, documents: list[list[int]]) -> None:
    expected = []
    for ids in map(torch.tensor, documents):
        if len(ids) > 1:
            logits, _ = tiny.forward(ids[None, :-1])
            expected.append(F.cross_entropy(logits[0].double(), ids[1:], reduction="none"))
    *_, found = evaluate(tiny, documents)
    assert (found.documents, found.tokens, found.against) == (3, 49 + PIECE_TOKENS + 69 + 1, None)
    assert found.loss.mean == pytest.approx(float(torch.cat(expected).mean()), abs=TOLERANCE)
    assert found.perplexity == math.exp(found.loss.mean)


def test_what_is_known_grows_piece_by_piece(tiny: Model, documents: list[list[int]]) -> None:
    seen = list(evaluate(tiny, documents))
    assert [step.tokens for step in seen] == [49, 49 + PIECE_TOKENS, 118 + PIECE_TOKENS, 119 + PIECE_TOKENS]
    assert [step.documents for step in seen] == [1, 2, 2, 3]
    assert seen[0].loss.half_width is None
    assert list(evaluate(tiny, [[1], []])) == []


def test_known_distributions() -> None:
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.5, 0.25])
    ids = [[0, 1, 1, 2], [2, 0]]  # the predicted ones: 1, 1, 2 and 0
    *_, found = evaluate(Constant(q.log() + 3), ids, Constant(p.log()))
    losses = [-math.log(x) for x in (0.5, 0.5, 0.25, 0.25)]
    assert found.loss.mean == pytest.approx(sum(losses) / 4)
    # Two pieces of 3 and 1 tokens: a ratio of sums, its error from what each piece is off by.
    mean = sum(losses) / 4
    off = [sum(losses[:3]) - 3 * mean, losses[3] - mean]
    assert found.loss.half_width == pytest.approx(1.96 * math.sqrt(2 * sum(x * x for x in off)) / 4)
    assert found.against is not None
    assert found.against.kl.mean == pytest.approx(0.25 * math.log(2))
    assert found.against.kl.half_width == pytest.approx(0, abs=1e-7)
    assert found.against.top1.mean == 0
    theirs = [-math.log(x) for x in (0.25, 0.25, 0.25, 0.5)]
    assert found.against.perplexity == pytest.approx(math.exp(sum(theirs) / 4))
    assert found.against.change.mean == pytest.approx((sum(losses) - sum(theirs)) / 4)
    ratio = found.perplexity / found.against.perplexity
    assert found.against.change_percent.mean == pytest.approx(100 * (ratio - 1))


def test_only_tokens_with_a_next_one_are_fed() -> None:
    model = Constant(torch.zeros(7))
    list(evaluate(model, [[1] * (2 * PIECE_TOKENS + 1), [1] * (PIECE_TOKENS + 1), [1] * 3]))
    assert model.fed[1:] == [PIECE_TOKENS, PIECE_TOKENS, PIECE_TOKENS, 2]


def test_a_model_beside_itself_and_beside_fewer_bits(tiny: Model, documents: list[list[int]], tmp_path: Path) -> None:
    quantize_checkpoint(tiny.path, tmp_path / "int4", Recipe(format="int4"))
    *_, same = evaluate(tiny, documents, tiny)
    *_, other = evaluate(load(tmp_path / "int4", "cpu"), documents, tiny)
    assert same.against is not None
    assert other.against is not None
    assert same.against.top1.mean == 1
    assert abs(same.against.kl.mean) + abs(same.against.change.mean) < TOLERANCE
    assert other.against.top1.mean < 1
    assert 0.005 < other.against.kl.mean < 0.5
    assert other.against.loss.mean == pytest.approx(same.loss.mean)


def test_a_chat_is_read_as_its_template_writes_it() -> None:
    path = model_path("tiny")
    text, plain = open_text(path), Tokenizer.from_file(str(path / "tokenizer.json"))
    template = Environment().from_string((path / "chat_template.jinja").read_text(encoding="utf-8"))
    for chat in [c for c in read_documents(CHATS) if len(c.messages or ()) > 3][:5]:
        messages = [message.model_dump() for message in chat.messages or []]
        written = plain.encode(template.render(messages=messages), add_special_tokens=False).ids
        found = token_ids(chat, text)
        assert found == written[: len(found)]
        assert set(written[len(found) :]) & text.stop_ids  # only the end of the last turn is left out


def test_a_text_begins_as_the_model_wants_it(tmp_path: Path) -> None:
    path = model_path("tiny")
    (tmp_path / "x.txt").write_text("Once upon a time", encoding="utf-8")
    [document] = read_documents(tmp_path / "x.txt")
    text = open_text(path)
    assert token_ids(document, text) == text.encode("Once upon a time")
    begun = ChatTokenizer(
        (path / "tokenizer.json").read_text(encoding="utf-8"), None, text.config.model_copy(update={"bos_token_id": 3})
    )
    assert token_ids(document, begun) == [3, *text.encode("Once upon a time")]
    with pytest.raises(CheckpointError, match="chat_template"):
        token_ids(read_documents(CHATS)[0], begun)


def lines(*values: Any) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.txt", b"caf\xe9", "x.txt: byte 3 is not UTF-8"),
        ("x.txt", b" \n", "x.txt is empty"),
        ("x.jsonl", b"\n\n", "x.jsonl is empty"),
        ("x.jsonl", b'{"text": "a"}\n{', "x.jsonl, line 2: Invalid JSON"),
        ("x.jsonl", lines({"text": "a"}, {"text": 3}), "line 2: text: Input should be a valid string"),
        ("x.jsonl", lines({}), "neither a text nor messages"),
        ("x.jsonl", lines([1]), "line 1: Input should be an object"),
        ("x.jsonl", lines({"text": "a", "messages": []}), "a text and messages"),
        ("x.jsonl", lines({"messages": []}), "the roles are none"),
        ("x.jsonl", lines({"messages": [{"role": "assistant", "content": "a"}]}), "the roles are assistant; expected"),
        ("x.jsonl", lines({"messages": [{"role": "user", "content": "a"}] * 2}), "the roles are user, user"),
        ("x.jsonl", lines({"messages": [{"role": "tool", "content": "a"}]}), "messages.0.role: Input should be"),
        ("x.jsonl", lines({"messages": [{"role": "user", "content": ["a"]}]}), "messages.0.content: Input should be"),
    ],
)
def test_files_that_are_no_texts(name: str, content: bytes | str, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(Gdn2EdgeError) as found:
        read_documents(tmp_path / name)
    assert words in str(found.value)


def test_documents_of_all_kinds(tmp_path: Path) -> None:
    messages = [{"role": r, "content": r} for r in ("system", "user", "assistant", "user")]
    (tmp_path / "x.jsonl").write_text(lines({"text": "a\nb", "id": 7}, {"messages": messages}) + "\n", encoding="utf-8")
    first, second = read_documents(tmp_path / "x.jsonl")
    assert (first.text, first.messages, second.text) == ("a\nb", None, None)
    assert [message.role for message in second.messages or []] == [m["role"] for m in messages]


def test_other_tokens_cannot_be_compared(tiny: Model, tmp_path: Path) -> None:
    quantize_checkpoint(tiny.path, tmp_path / "q", Recipe(format="int8"))
    chats = read_documents(CHATS)[:2]
    check_same_tokens(tiny, load(tmp_path / "q", "cpu"), chats)
    tokenizer = json.loads((tmp_path / "q" / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:100]
    (tmp_path / "q" / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(Gdn2EdgeError, match="different tokens"):
        check_same_tokens(tiny, load(tmp_path / "q", "cpu"), chats)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def command(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gdn2-edge", "eval", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    return command


@pytest.fixture
def two_chats(tmp_path: Path) -> Path:
    file = tmp_path / "two.jsonl"
    file.write_text("\n".join(CHATS.read_text(encoding="utf-8").split("\n")[:2]), encoding="utf-8")
    return file


def test_the_command(run: Any, two_chats: Path, tmp_path: Path) -> None:
    arguments = ("tiny", str(two_chats), "--max-tokens", "30", "--device", "cpu")
    code, out, err = run(*arguments)
    assert (code, err) == (0, "")
    assert "58 tokens of 2 documents" in out
    assert "against" not in out
    quantize_checkpoint(model_path("tiny"), tmp_path / "int8", Recipe(format="int8"))
    code, out, err = run(*arguments, "--against", str(tmp_path / "int8"), "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["complete"] is True
    assert (found["documents"], found["tokens"]) == (2, 58)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]["mean"]))
    assert 0 < found["against"]["kl"]["mean"] < 0.01
    code, out, _ = run(*arguments, "--against", str(tmp_path / "int8"))
    assert code == 0
    for words in ("KL divergence", "same likeliest token", "change of perplexity", str(tmp_path / "int8")):
        assert words in " ".join(out.split())


def test_ctrl_c_prints_what_is_known(run: Any, two_chats: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any) -> Any:
        yield next(evaluate(*arguments))
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "evaluate", interrupted)
    code, out, err = run("tiny", str(two_chats), "--max-tokens", "30", "--json", "--device", "cpu")
    assert code == 130
    assert err.strip() == "Stopped after 29 of 58 tokens."
    assert json.loads(out)["complete"] is False


def test_the_command_refuses(run: Any, two_chats: Path, tmp_path: Path) -> None:
    assert run("tiny", str(tmp_path / "no.txt")) == (
        1,
        "",
        f"error: {tmp_path / 'no.txt'}: No such file or directory.\n",
    )
    code, _, err = run("tiny", str(two_chats), "--dtype", "fp64")
    assert code == 2
    assert "--dtype is 'fp64'" in err
    (tmp_path / "one.txt").write_text("a", encoding="utf-8")
    code, _, err = run("tiny", str(tmp_path / "one.txt"), "--device", "cpu")
    assert code == 1
    assert "no document has two tokens" in err
    code, _, err = run("tiny", str(two_chats), "--against", str(tmp_path / "nowhere"))
    assert code == 1
    assert "nowhere" in err
