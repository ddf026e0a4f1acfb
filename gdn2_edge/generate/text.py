"""Text to token ids and back, and the turns of a conversation.

Knows `tokenizer.json`, `chat_template.jinja` and `generation_config.json`; nothing of models.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gdn2_edge.checkpoint.files import read_file
from gdn2_edge.errors import CheckpointError
from gdn2_edge.generate.chat_template import TEMPLATE_NAME, Turn, Turns, one_line, read_turns
from gdn2_edge.generate.decoder import Decoder, token_bytes_of
from gdn2_edge.generate.generation_config import GENERATION_CONFIG_NAME, GenerationConfig, read_generation_config

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER_NAME = "tokenizer.json"
MAX_BYTES = {TOKENIZER_NAME: 64 << 20, TEMPLATE_NAME: 1 << 20, GENERATION_CONFIG_NAME: 1 << 20}


def open_text(files: Path | Mapping[str, bytes]) -> ChatTokenizer:
    """The tokenizer of a model folder, with its chat template and stop ids where the folder has them.

    Args:
        files: The folder, or its files by name: `tokenizer.json` and, optionally, `chat_template.jinja` and
            `generation_config.json`.

    Raises:
        CheckpointError: no tokenizer, a damaged or too large file, or a template that does not suit a model
            whose state is the conversation.
    """
    texts = {name: _text(files, name, most) for name, most in MAX_BYTES.items()}
    tokenizer, template = texts[TOKENIZER_NAME], texts[TEMPLATE_NAME]
    if tokenizer is None:
        where = f"{files}: there is" if isinstance(files, Path) else "There is"
        raise CheckpointError(
            f"{where} no {TOKENIZER_NAME}; make the folder with `gdn2-edge convert ... --tokenizer FILE`."
        )
    return ChatTokenizer(tokenizer, template, read_generation_config(texts[GENERATION_CONFIG_NAME] or "{}"))


class ChatTokenizer:
    """Turns text into ids and back, and messages into the ids that a state is fed with.

    The state holds everything up to the last token of an answer's text. The token that ends a turn is never
    fed by generation: it is the first id of the next `continuation`.

    Text from outside is always plain: "<|end|>" in a message is seven characters, never the token that ends a
    turn. Where the template writes the same string, it is that token.

    Args:
        tokenizer_json: The text of a `tokenizer.json`.
        template: The text of a chat template, None for a model that only completes text.
        config: What the model's makers say about its use.

    Attributes:
        stop_ids: The eos ids and the token that the template writes after an answer, if it writes one.
        vocab_size: One more than the highest id, added tokens included.
        turns: What the template writes around messages, None without one.
    """

    def __init__(
        self,
        tokenizer_json: str,
        template: str | None = None,
        config: GenerationConfig | None = None,
    ) -> None:
        self.config = config or GenerationConfig()
        eos_ids, bos_id = self.config.eos_ids, self.config.bos_token_id
        self._tokenizer = _tokenizer(tokenizer_json)
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        for token_id in (*eos_ids, *([] if bos_id is None else [bos_id])):
            if not 0 <= token_id < self.vocab_size:
                raise CheckpointError(
                    f"{GENERATION_CONFIG_NAME} names token {token_id}, but {TOKENIZER_NAME} has "
                    f"{self.vocab_size} tokens."
                )
        data = json.loads(self._tokenizer.to_str())
        self.turns: Turns | None = None
        if template is not None:
            # transformers passes the strings of tokenizer_config.json; these are the two that templates use.
            eos_id = eos_ids[0] if eos_ids else None
            self.turns = read_turns(template, {"bos_token": self._token(bos_id), "eos_token": self._token(eos_id)})
        written = "" if self.turns is None else "\0".join(self.turns.written())
        self._private_names = {
            token["content"]: f"<{secrets.token_hex(16)}>"
            for token in data["added_tokens"]
            if token["special"] or (token["content"] in written and not token["content"].isspace())
        }
        self._plain = _tokenizer(json.dumps(_renamed(data, self._private_names)))
        names = sorted(map(re.escape, self._private_names), key=len, reverse=True)
        self._control = re.compile("|".join(names) or r"(?!)")
        self._token_bytes = token_bytes_of(self._tokenizer, data.get("decoder"))
        self.stop_ids = frozenset(eos_ids) | self._end_of_turn()

    def encode(self, text: str) -> list[int]:
        """The ids of plain text: nothing is added, and no string in it is a control token."""
        # A lone surrogate (broken input from a terminal) has no UTF-8 form; it becomes U+FFFD.
        text = text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
        try:
            return list(self._plain.encode(text, add_special_tokens=False).ids)
        except Exception as error:  # a word-level vocabulary without an unknown token
            raise CheckpointError(f"{TOKENIZER_NAME} cannot encode this text: {one_line(error)}.") from None

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids. Control tokens, and ids beyond the vocabulary, have none."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def decoder(self, after: Sequence[int] = ()) -> Decoder:
        """Decodes ids that come one at a time.

        Args:
            after: Ids before the first one, when text goes on: a completion after its prompt. The last four
                are enough. Without them the first id starts a text, and a word's leading space is dropped
                where the tokenizer adds it to every text (SentencePiece); that is right for an answer.
        """
        return Decoder(self._token_bytes, after)

    def opening(self, user_text: str, system: str | None = None) -> list[int]:
        """The ids of a conversation's start, up to where the answer begins.

        Raises:
            CheckpointError: there is no chat template, or it has no place for a system message.
        """
        turns = self._turns()
        if system is None:
            return self.encode(self._fill(turns.opening, user_text))
        if isinstance(turns.opening_with_system, str):
            raise CheckpointError(turns.opening_with_system)
        return self.encode(self._fill(turns.opening_with_system, system, user_text))

    def continuation(self, user_text: str) -> list[int]:
        """The ids between the last token of an answer's text and the first of the next answer.

        They start with what ends a turn. `opening(u1) + a1 + continuation(u2)` is the whole conversation as
        the template writes it, read at once, where the tokenizer keeps the seam after a1. A space that the
        template writes before an answer is part of a1: the model makes it.

        Raises:
            CheckpointError: there is no chat template.
        """
        # A letter stands for the answer: this is not the start of a text, which some tokenizers mark.
        ids = self.encode("a" + self._fill(self._turns().continuation, user_text))
        answer = self.encode("a")
        if ids[: len(answer)] == answer:
            return ids[len(answer) :]
        return self.encode(self._fill(self._turns().continuation, user_text))

    def _turns(self) -> Turns:
        if self.turns is None:
            raise CheckpointError(
                f"there is no {TEMPLATE_NAME}, so this model completes text but does not chat; give one with "
                "`--chat-template FILE`."
            )
        return self.turns

    def _fill(self, turn: Turn, *messages: str) -> str:
        """The turn's text, its control tokens under their private names, the messages as they are."""
        around = [self._control.sub(lambda found: self._private_names[found[0]], text) for text in turn.around]
        inner = [trim(message) for trim, message in zip(turn.trims, messages, strict=True)]
        return around[0] + "".join(message + text for message, text in zip(inner, around[1:], strict=True))

    def _end_of_turn(self) -> frozenset[int]:
        after_answer = "" if self.turns is None else self.turns.continuation.around[0].lstrip()
        found = self._control.match(after_answer)
        token_id = self._tokenizer.token_to_id(found[0]) if found else None
        return frozenset() if token_id is None else frozenset([token_id])

    def _token(self, token_id: int | None) -> str:
        return "" if token_id is None else (self._tokenizer.id_to_token(token_id) or "")


def _renamed(data: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """A tokenizer whose control tokens have other names, and that neither cuts, pads nor adds anything.

    Their own names stop being tokens: not as added tokens, not as words of the vocabulary, and by no merge.
    """

    def new(name: Any) -> Any:
        return names.get(name, name) if isinstance(name, str) else name

    added = [
        {**token, "content": new(token["content"]), "normalized": False, "single_word": False}
        if token["content"] in names
        else token
        for token in data["added_tokens"]
    ]
    model = dict(data["model"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {new(token): token_id for token, token_id in model["vocab"].items()}
    else:
        model["vocab"] = [[new(token), score] for token, score in model["vocab"]]
    if "unk_token" in model:
        model["unk_token"] = new(model["unk_token"])
    if "merges" in model:
        model["merges"] = [pair for pair in model["merges"] if not names.keys() & {*pair, "".join(pair)}]
    if "dropout" in model:
        model["dropout"] = None
    plain = {
        "added_tokens": added,
        "model": model,
        "post_processor": None,
        "truncation": None,
        "padding": None,
    }
    return data | plain


def _tokenizer(text: str) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(text)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in Rust is no Exception
        raise CheckpointError(
            f"{TOKENIZER_NAME} is not a tokenizer of the tokenizers package ({one_line(error)})."
        ) from None


def _text(files: Path | Mapping[str, bytes], name: str, most_bytes: int) -> str | None:
    """A file's text, None if there is no such file; it is not read when it is too large."""
    if isinstance(files, Path):
        if not (files / name).exists():
            return None
        data = read_file(files / name, most_bytes)
    elif name in files:
        data = files[name]
        if len(data) > most_bytes:
            raise CheckpointError(f"{name} is {len(data)} bytes, expected at most {most_bytes}.")
    else:
        return None
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise CheckpointError(f"{name} is not UTF-8 text.") from None
