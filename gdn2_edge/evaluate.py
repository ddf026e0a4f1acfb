"""How well a model predicts texts, and how far it is from another model, or from itself on another runtime.

A document is fed from its first token to its last, a piece at a time, and the state is carried from piece to piece:
what lies far back counts as far as the model remembers it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from gdn2_edge.errors import Gdn2EdgeError
from gdn2_edge.generate.text import ChatTokenizer, open_text
from gdn2_edge.runtime import Runtime
from gdn2_edge.state import State

# Tokens fed at once: bounds the logits that are held. Each piece is one sample of the intervals, taken as independent.
PIECE_TOKENS = 256
MIN_SAMPLES = 20  # with fewer, an interval that is called one of 95 % holds 90 % and less


@dataclass(frozen=True)
class Estimate:
    """A mean over tokens, and half of its 95 % interval: None where there are fewer than 20 pieces of text."""

    mean: float
    half_width: float | None


@dataclass(frozen=True)
class Comparison:
    """A model beside a reference that read the same tokens.

    Attributes:
        loss: of the reference, nats a token.
        change: of the loss, the model's less the reference's, nats a token.
        kl: KL(reference || model), nats a token.
        top1: share of places where both have the same likeliest token.
    """

    loss: Estimate
    change: Estimate
    kl: Estimate
    top1: Estimate

    @property
    def perplexity(self) -> float:
        """Of the reference."""
        return _exp(self.loss.mean)

    @property
    def change_percent(self) -> Estimate:
        """Of the perplexity, to first order in the interval."""
        width = self.change.half_width
        ratio = _exp(self.change.mean)
        return Estimate(100 * (ratio - 1), None if width is None else 100 * ratio * width)


@dataclass(frozen=True)
class Evaluation:
    """What is known after some documents.

    Attributes:
        documents: that were read, the last one perhaps in part.
        tokens: that were predicted: all but the first of each document.
        loss: nats a token.
        against: the comparison, where there is a reference.
    """

    documents: int
    tokens: int
    loss: Estimate
    against: Comparison | None

    @property
    def perplexity(self) -> float:
        return _exp(self.loss.mean)

    def to_json(self) -> dict[str, Any]:
        """Everything, as numbers."""
        found = {**asdict(self), "perplexity": self.perplexity}
        if self.against is not None:
            against = {**asdict(self.against), "perplexity": self.against.perplexity}
            found["against"] = {**against, "change_percent": asdict(self.against.change_percent)}
        return found


def _exp(nats: float) -> float:
    """e^nats, at most the largest number there is: a model can be that wrong."""
    return math.exp(min(nats, math.log(sys.float_info.max)))


class Message(BaseModel):
    """One message of a chat."""

    model_config = ConfigDict(extra="ignore")
    role: Literal["system", "user", "assistant"]
    content: str


class Document(BaseModel):
    """A line of a `.jsonl` file: a text, or the messages of a chat."""

    model_config = ConfigDict(extra="ignore")
    text: str | None = None
    messages: list[Message] | None = None


def read_documents(file: Path) -> list[Document]:
    """The documents of a file: the lines of a `.jsonl` file, or the whole of any other one.

    Raises:
        Gdn2EdgeError: the file is not UTF-8, is empty, or a line is neither a text nor a chat.
    """
    try:
        content = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise Gdn2EdgeError(f"{file}: byte {error.start} is not UTF-8, expected a text.") from None
    if not content.strip():
        raise Gdn2EdgeError(f"{file} is empty, expected a text to predict.")
    if file.suffix.lower() != ".jsonl":
        return [Document(text=content)]
    return [_document(line, f"{file}, line {i}") for i, line in enumerate(content.split("\n"), 1) if line.strip()]


def _document(line: str, where: str) -> Document:
    expected = '{"text": "..."} or {"messages": [{"role": "user", "content": "..."}, ...]}'
    try:
        document = Document.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise Gdn2EdgeError(f"{where}: {place and place + ': '}{first['msg']}. Expected {expected}.") from None
    if (document.text is None) == (document.messages is None):
        what = "neither a text nor messages" if document.text is None else "a text and messages"
        raise Gdn2EdgeError(f"{where}: it has {what}. Expected {expected}.")
    roles = [message.role for message in document.messages or []]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if document.messages is not None and (not turns or turns != (["user", "assistant"] * len(turns))[: len(turns)]):
        order = ", ".join(roles[:6]) or "none"
        raise Gdn2EdgeError(f"{where}: the roles are {order}; expected system or not, then user and assistant in turn.")
    return document


def token_ids(document: Document, text: ChatTokenizer) -> list[int]:
    """The ids of a document: a chat's as a session feeds them, a text's after the token that begins one, if any.

    Raises:
        CheckpointError: it is a chat and the model has no chat template, or none with a system message.
    """
    if document.messages is None:
        begin = text.config.bos_token_id
        return ([] if begin is None else [begin]) + text.encode(document.text or "")
    messages = list(document.messages)
    system = messages.pop(0).content if messages[0].role == "system" else None
    ids = text.opening(messages[0].content, system)
    for message in messages[1:]:
        ids += text.encode(message.content) if message.role == "assistant" else text.continuation(message.content)
    return ids


def read_ids(text: ChatTokenizer, documents: Sequence[Document], max_tokens: int | None = None) -> list[list[int]]:
    """What a model with this tokenizer is fed of each document, at most so many tokens."""
    return [token_ids(document, text)[:max_tokens] for document in documents]


def check_same_ids(
    model: Runtime,
    reference: Runtime,
    ids: list[list[int]],
    documents: Sequence[Document],
    max_tokens: int | None = None,
) -> None:
    """Raise Gdn2EdgeError unless the reference reads the documents as the same tokens of the same vocabulary."""
    if model.fingerprint and model.fingerprint == reference.fingerprint:
        return
    sizes, what = (model.spec.vocab_size, reference.spec.vocab_size), ""
    if sizes[0] != sizes[1]:
        what = f"have vocabularies of {sizes[0]:,} and {sizes[1]:,} tokens"
    elif read_ids(open_text(reference.text_files), documents, max_tokens) != ids:
        what = "read this text as different tokens"
    if what:
        raise Gdn2EdgeError(
            f"{model.path} and {reference.path} {what}, so what they predict cannot be compared. Evaluate each alone."
        )


@torch.inference_mode()
def evaluate(
    model: Runtime, documents: Sequence[Sequence[int]], reference: Runtime | None = None
) -> Iterator[Evaluation]:
    """Predict every token of the documents from those before it; each document begins with an empty memory.

    Args:
        model: what is evaluated.
        documents: token ids. Those of fewer than two tokens say nothing and are passed over.
        reference: what it is compared with; it must know the same tokens.

    Yields:
        What is known so far, after every piece of at most 256 tokens; the last one is the result.

    Raises:
        Gdn2EdgeError: a model gave logits that are not finite.
    """
    sums: list[Tensor] = []  # of every piece: tokens, losses, and those of the comparison
    read = 0
    for ids in documents:
        read += len(ids) > 1
        states: list[State[Tensor] | None] = [None, None]
        for start in range(0, len(ids) - 1, PIECE_TOKENS):
            piece = torch.tensor([ids[start : start + PIECE_TOKENS + 1]])
            found, states[0] = _predictions(model, piece, states[0])
            loss = _loss(found, piece)
            row = [torch.tensor(len(found)), loss]
            if reference is not None:
                exact, states[1] = _predictions(reference, piece, states[1])
                exact_loss = _loss(exact, piece)
                kl = (exact.exp() * (exact - found)).sum()
                same = (exact.argmax(-1) == found.argmax(-1)).sum()
                row += [exact_loss, loss - exact_loss, kl, same]
            sums.append(torch.stack([value.double() for value in row]))
            yield _evaluation(read, torch.stack(sums))


def _predictions(model: Runtime, piece: Tensor, state: State[Tensor] | None) -> tuple[Tensor, State[Tensor]]:
    """Log probabilities [T, V] fp64 of the tokens after each of piece [1, T + 1] but the last, which is not fed."""
    logits, state = model.forward(piece[:, :-1], state)
    if not torch.isfinite(logits).all():
        raise Gdn2EdgeError(f"{model.path}: the model gave logits that are not finite. Its weights may be damaged.")
    return logits[0].double().log_softmax(-1).cpu(), state


def _loss(predictions: Tensor, piece: Tensor) -> Tensor:
    return -predictions.gather(1, piece[0, 1:, None]).sum()


def _evaluation(documents: int, sums: Tensor) -> Evaluation:
    """From the sums of every piece [N, 2 or 6]."""
    tokens, values = sums[:, :1], sums[:, 1:]
    means = values.sum(0) / tokens.sum()
    N = len(sums)
    # Of a ratio of two sums over pieces.
    spread = ((values - means * tokens) ** 2).sum(0).sqrt() / tokens.sum()
    half = 1.96 * spread * math.sqrt(N / (N - 1)) if N >= MIN_SAMPLES else None
    found = [Estimate(float(m), None if half is None else float(half[i])) for i, m in enumerate(means)]
    return Evaluation(documents, int(tokens.sum()), found[0], Comparison(*found[1:]) if len(found) > 1 else None)
