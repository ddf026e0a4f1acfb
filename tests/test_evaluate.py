"""Perplexity and comparisons: against plain cross entropy, against distributions known in advance, and by hand."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from itertools import islice
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
from gdn2_edge.evaluate import (
    PIECE_TOKENS,
    Comparison,
    Estimate,
    Evaluation,
    check_same_ids,
    evaluate,
    read_documents,
    read_ids,
    token_ids,
)
from gdn2_edge.generate.text import ChatTokenizer, open_text
from gdn2_edge.loading import load, model_path
from gdn2_edge.model import Model
from gdn2_edge.quantize import quantize_checkpoint
from gdn2_edge.quantize.recipe import Recipe
from gdn2_edge.runtime import Runtime
from gdn2_edge.state import State

command = sys.modules["gdn2_edge.cli.evaluate"]  # the package has the function of that name
CHATS = Path(__file__).parents[1] / "benchmarks" / "data" / "heldout_chat.jsonl"
# fp32 sums of logits in other pieces, in nats a token.
TOLERANCE = 2e-6


class Constant(Runtime):
    """The same logits after every token."""

    def __init__(self, logits: Tensor) -> None:
        self.logits, self.path = logits, Path("constant")
        self.fed: list[int] = []

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
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.125, 0.5, 0.375])
    ids = [[0, 1, 1, 2], [2, 0]] * 10  # the predicted ones: 1, 1, 2 and 0
    *_, found = evaluate(Constant(q.log() + 3), ids, Constant(p.log()))
    assert (found.documents, found.tokens) == (20, 40)
    losses = [-math.log(x) for x in (0.5, 0.5, 0.375, 0.125)]
    mean = sum(losses) / 4
    assert found.loss.mean == pytest.approx(mean)
    # Pieces of 3 and 1 tokens: a ratio of sums, its error from what each piece is off by.
    off = [sum(losses[:3]) - 3 * mean, losses[3] - mean]
    assert found.loss.half_width == pytest.approx(1.96 * math.sqrt(20 / 19 * 10 * sum(x * x for x in off)) / 40)
    against = found.against
    assert against is not None
    assert against.kl.mean == pytest.approx(0.5 * math.log(4) + 0.25 * math.log(0.5) + 0.25 * math.log(2 / 3))
    assert against.kl.half_width == pytest.approx(0, abs=1e-7)
    assert against.top1.mean == 0
    theirs = [-math.log(x) for x in (0.25, 0.25, 0.25, 0.5)]
    assert against.perplexity == pytest.approx(math.exp(sum(theirs) / 4))
    changes = [x - y for x, y in zip(losses, theirs, strict=True)]
    change = sum(changes) / 4
    assert against.change.mean == pytest.approx(change)
    assert against.change_percent.mean == pytest.approx(100 * (math.exp(change) - 1))
    off = [sum(changes[:3]) - 3 * change, changes[3] - change]
    width = 1.96 * math.sqrt(20 / 19 * 10 * sum(x * x for x in off)) / 40
    assert against.change_percent.half_width == pytest.approx(100 * math.exp(change) * width)
    values = found.to_json()
    assert values["perplexity"] == found.perplexity == math.exp(found.loss.mean)
    assert values["against"]["perplexity"] == against.perplexity
    assert values["against"]["change_percent"] == {
        "mean": against.change_percent.mean,
        "half_width": against.change_percent.half_width,
    }


def test_few_pieces_have_no_interval() -> None:
    steps = list(evaluate(Constant(torch.tensor([1.0, 2.0])), [[0, 1]] * 20, Constant(torch.zeros(2))))
    assert [step.loss.half_width is None for step in steps] == [True] * 19 + [False]
    assert steps[18].against is not None
    assert steps[18].against.change_percent.half_width is None


def test_a_model_that_is_sure_and_wrong() -> None:
    *_, found = evaluate(Constant(torch.tensor([1e4, 0.0])), [[0, 1]])
    assert found.loss.mean == 1e4
    assert 1e300 < found.perplexity < math.inf
    assert "Infinity" not in json.dumps(found.to_json())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_no_numbers(value: float) -> None:
    good, bad = Constant(torch.zeros(2)), Constant(torch.tensor([0.0, value]))
    for models in ((bad,), (good, bad)):
        with pytest.raises(Gdn2EdgeError, match="not finite"):
            list(evaluate(models[0], [[0, 1]], *models[1:]))


def test_only_tokens_with_a_next_one_are_fed() -> None:
    model = Constant(torch.zeros(7))
    list(evaluate(model, [[1] * (2 * PIECE_TOKENS + 1), [1] * (PIECE_TOKENS + 1), [1] * 3]))
    assert model.fed == [PIECE_TOKENS, PIECE_TOKENS, PIECE_TOKENS, 2]


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
    (tmp_path / "x.txt").write_text("\ufeffOnce upon a time", encoding="utf-8")  # some editors begin with this
    [document] = read_documents(tmp_path / "x.txt")
    text = open_text(path)
    assert token_ids(document, text) == text.encode("Once upon a time")
    tokenizer = (path / "tokenizer.json").read_text(encoding="utf-8")
    for bos in (0, 3):
        begun = ChatTokenizer(tokenizer, None, text.config.model_copy(update={"bos_token_id": bos}))
        assert token_ids(document, begun) == [bos, *text.encode("Once upon a time")]
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


@pytest.fixture(scope="module")
def other_merges(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default model in int8 with a tokenizer that knows fewer words."""
    folder = tmp_path_factory.mktemp("merges") / "q"
    quantize_checkpoint(model_path("tiny"), folder, Recipe(format="int8"))
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:100]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return folder


def test_other_tokens_cannot_be_compared(tiny: Model, other_merges: Path, tmp_path: Path) -> None:
    chats = read_documents(CHATS)[:2]
    ids, other = read_ids(open_text(tiny.path), chats, 40), load(other_merges, "cpu")
    assert [len(row) for row in ids] == [40, 40]
    quantize_checkpoint(tiny.path, tmp_path / "q", Recipe(format="int8"))
    check_same_ids(tiny, load(tmp_path / "q", "cpu"), ids, chats, 40)
    for fingerprints in (("a", "b"), ("", "")):  # a folder need not have one
        models = (load(tiny.path, "cpu"), load(other_merges, "cpu"))
        for model, fingerprint in zip(models, fingerprints, strict=True):
            model.fingerprint = fingerprint
        with pytest.raises(Gdn2EdgeError, match="different tokens"):
            check_same_ids(*models, ids, chats, 40)
    other.spec = other.spec.model_copy(update={"vocab_size": 9})
    with pytest.raises(Gdn2EdgeError, match="vocabularies of 8,192 and 9 tokens"):
        check_same_ids(tiny, other, ids, chats, 40)
    other.fingerprint = tiny.fingerprint
    check_same_ids(tiny, other, ids, chats, 40)  # the same weights: nothing is read


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


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    comparison = Comparison(Estimate(1.0, 0.1), Estimate(0.5, 0.01), Estimate(0.25, 0.02), Estimate(0.875, 0.125))
    found = Evaluation(3, 1234, Estimate(1.5, 0.2), comparison)
    names = {"model": "m [red]x[/]\x1b", "runtime": "r", "reference": "n", "reference_runtime": "s"}
    command._print(names, found, 1234)
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == [
        "model                 m [red]x[/]?, r",
        "predicted             1,234 tokens of 3 documents",
        "perplexity            4.482 (loss 1.5 +- 0.2 nats a token)",
        "against               n, s",
        "its perplexity        2.718 (loss 1 +- 0.1 nats a token)",
        "change of perplexity  64.87 +- 1.6 %",
        "KL divergence         0.25 +- 0.02 nats a token",
        "same likeliest token  87.5 +- 12 %",
    ]
    command._print(names, Evaluation(1, 1234, Estimate(1.5, None), None), 5000)
    assert "predicted   1,234 tokens of 1 document, stopped before 5,000" in capsys.readouterr().out


def test_options_reach_the_model(run: Any, two_chats: Path) -> None:
    arguments = ("tiny", str(two_chats), "--max-tokens", "3", "--device", "cpu", "--json")
    assert "bfloat16" in json.loads(run(*arguments, "--dtype", "bf16")[1])["runtime"]
    code, _, err = run(*arguments, "--runtime", "onnx")
    assert code == 1
    assert "no ONNX export" in err
    code, _, err = run("tiny", str(two_chats), "--device", "cuda:99")
    assert code == 1
    assert "cuda:99" in err


@pytest.mark.parametrize("pieces", [0, 1])
def test_ctrl_c_prints_what_is_known(pieces: int, run: Any, two_chats: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any) -> Any:
        yield from islice(evaluate(*arguments), pieces)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "evaluate", interrupted)
    code, out, err = run("tiny", str(two_chats), "--max-tokens", "30", "--json", "--device", "cpu")
    assert code == 130
    assert err.strip() == f"Stopped after {29 * pieces} of 58 tokens."
    assert (json.loads(out)["complete"] is False) if pieces else out == ""


def test_progress_ends_where_it_should(run: Any, two_chats: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    @contextlib.contextmanager
    def progress(label: str, quiet: bool, unit: str) -> Any:
        yield None if quiet else lambda *step: seen.append(step)

    monkeypatch.setattr(command, "progress", progress)
    for arguments in ((), ("--quiet",)):
        assert run("tiny", str(two_chats), "--max-tokens", "30", "--device", "cpu", *arguments)[0] == 0
    assert [step[:2] for step in seen] == [(29, 58), (58, 58)]


def test_the_command_refuses(run: Any, two_chats: Path, other_merges: Path, tmp_path: Path) -> None:
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
    for nothing in (str(tmp_path / "nowhere"), ""):
        code, _, err = run("tiny", str(two_chats), "--device", "cpu", "--against", nothing)
        assert code == 1
        assert f"error: {nothing}" in err
    code, _, err = run("tiny", str(two_chats), "--device", "cpu", "--against", str(other_merges))
    assert code == 1
    assert "different tokens" in err
