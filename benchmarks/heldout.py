"""Chats that the default model never saw."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from gdn2_edge.evaluate import Document, read_documents

FILE = Path(__file__).parent / "data" / "heldout_chat.jsonl"


def chats() -> list[Document]:
    """In the order of the file."""
    return read_documents(FILE)


def turns() -> list[tuple[str, str]]:
    """Every question with its answer, in order."""
    messages = [pair for chat in chats() for pair in pairwise(chat.messages or [])]
    return [(question.content, answer.content) for question, answer in messages if question.role == "user"]
