"""Chats that the default model never saw, as (user, assistant) turns."""

from __future__ import annotations

import re
from pathlib import Path

from gdn2_edge.generate.text import ChatTokenizer

FILE = Path(__file__).parent / "data" / "heldout_chat.txt"
_MESSAGE = re.compile(r"<\|(system|user|assistant)\|>(.*?)<\|end\|>", re.DOTALL)


def chats() -> list[str]:
    """Whole chats as the default model's template writes them."""
    return FILE.read_text(encoding="utf-8").split("\n\x1e\n")


def turns() -> list[tuple[str, str]]:
    """Every question with its answer, in order."""
    found = []
    for chat in chats():
        messages = [(role, text) for role, text in _MESSAGE.findall(chat) if role != "system"]
        found += [(messages[i][1], messages[i + 1][1]) for i in range(0, len(messages) - 1, 2)]
    return found


def conversation(text: ChatTokenizer, chat: str) -> list[int]:
    """The ids of a whole chat, fed as a session feeds it."""
    messages = _MESSAGE.findall(chat)
    system = messages.pop(0)[1] if messages[0][0] == "system" else None
    ids: list[int] = []
    for i, (role, words) in enumerate(messages):
        if role == "assistant":
            ids += text.encode(words)
        else:
            ids += text.opening(words, system) if i == 0 else text.continuation(words)
    return ids
