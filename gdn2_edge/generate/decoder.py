"""Text from token ids that come one at a time, never half a character."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Decoder:
    """Text from ids that come one at a time, never half a character.

    The pushed texts and `finish()`, joined, are what decoding all ids at once gives, for valid text. It keeps
    at most three bytes, whatever the ids are; tokenizers' own DecodeStream keeps every id while bytes stay
    invalid, and raises when an invalid byte follows a character.
    """

    def __init__(self, token_bytes: TokenBytes, after: Sequence[int] = ()) -> None:
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._started = False
        for token_id in after:
            self.push(token_id)

    def push(self, token_id: int) -> str:
        """The text that this id completes; "" inside a character and for control tokens."""
        data = self._token_bytes(token_id, self._started)
        if data is None:
            return ""
        self._started = True
        return self._utf8.decode(data)

    def finish(self) -> str:
        """U+FFFD if the ids ended inside a character, else ""."""
        return self._utf8.decode(b"", final=True)


TokenBytes = Callable[[int, bool], "bytes | None"]


def token_bytes_of(tokenizer: Tokenizer, decoder: object) -> TokenBytes:
    """What an id adds to a text as bytes, given whether the text has started; None for an id without text."""
    types = set(_types(decoder))
    added = tokenizer.get_added_tokens_decoder()
    control = {token_id for token_id, token in added.items() if token.special}
    alphabet = _byte_level_alphabet() if "ByteLevel" in types else {}
    # Decoders treat the start of a text apart: behind a plain word, a token decodes as everywhere else.
    words = (i for i in sorted(tokenizer.get_vocab().values()) if i not in control)
    word = next((i for i in words if tokenizer.decode([i]).isascii() and tokenizer.decode([i]).isalnum()), None)
    before = [] if word is None else [word]
    skip = len(tokenizer.decode(before))

    @lru_cache(maxsize=1 << 14)
    def token_bytes(token_id: int, started: bool) -> bytes | None:
        token = tokenizer.id_to_token(token_id) if token_id >= 0 else None
        if token is None or token_id in control:
            return None
        if "ByteLevel" in types:
            known = all(character in alphabet for character in token)
            return bytes(alphabet[character] for character in token) if known else token.encode()
        if "ByteFallback" in types and (byte := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token)):
            return bytes([int(byte[1], 16)])
        text = tokenizer.decode([*before, token_id])[skip:] if started else tokenizer.decode([token_id])
        return text.encode()

    return token_bytes


def _types(decoder: object) -> Iterator[str]:
    if isinstance(decoder, dict):
        yield str(decoder.get("type"))
        for inner in decoder.get("decoders") or ():
            yield from _types(inner)


def _byte_level_alphabet() -> dict[str, int]:
    """The byte behind each character of a byte-level vocabulary (GPT-2's): mostly its own."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}
