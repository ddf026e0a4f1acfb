"""Tokenizers, chat templates and session files: damaged, of another model, or steered by a stranger."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import inputs
import pytest
import torch
from filelock import FileLock
from inputs import INF, NAN, SESSION, Change, Refused, Words, added, dropped, filled, resized, retyped

TEXTS: dict[str, tuple[str, bytes | None, Words]] = {
    "no tokenizer": ("tokenizer.json", None, ("there is no tokenizer.json", "--tokenizer FILE")),
    "an empty tokenizer": ("tokenizer.json", b"", "tokenizer.json is not a tokenizer"),
    "a tokenizer that is no JSON": ("tokenizer.json", b"{", "tokenizer.json is not a tokenizer"),
    "a tokenizer that is not UTF-8": ("tokenizer.json", b"\xff", "tokenizer.json is not UTF-8"),
    "a tokenizer nested deeply": ("tokenizer.json", b"[" * 100_000, "tokenizer.json is not a tokenizer"),
    "an unknown tokenizer": ("tokenizer.json", b'{"model": {"type": "Best"}}', "tokenizer.json is not a tokenizer"),
    "no template": ("chat_template.jinja", None, ("no chat_template.jinja", "--chat-template FILE")),
    "a template that is not UTF-8": ("chat_template.jinja", b"\xff\xfe", "chat_template.jinja is not UTF-8"),
    "a template without an end": (
        "chat_template.jinja",
        b"{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "chat_template.jinja cannot be used: it was stopped",
    ),
    "a template that is no jinja": ("chat_template.jinja", b"{% for", "chat_template.jinja: "),
    "a template that reads files": (
        "chat_template.jinja",
        b"{{ ().__class__.__base__.__subclasses__() }}",
        "chat_template.jinja: ",
    ),
    "a template that fails": ("chat_template.jinja", b"{{ raise_exception('a\nb') }}", "chat_template.jinja: a b"),
    "a template that says nothing": ("chat_template.jinja", b"", "chat_template.jinja does not write each message"),
    "generation settings that are no JSON": ("generation_config.json", b"{", "generation_config.json"),
    "an end that is no token": ("generation_config.json", b'{"eos_token_id": 4000}', "names token 4000"),
    "a temperature of 10^9": ("generation_config.json", b'{"temperature": 1e9}', "temperature is not valid"),
}


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on a process's time here")
@pytest.mark.parametrize("name", TEXTS)
def test_text_of_a_model(name: str, models: Path, tmp_path: Path, refused: Refused) -> None:
    folder = inputs.copied(models / "dense", tmp_path / "model")
    file, content, words = TEXTS[name]
    (folder / file).unlink(missing_ok=True)
    if content is not None:
        (folder / file).write_bytes(content)
    refused("chat", folder, "--once", "hi", "--session", tmp_path / "a.session", words=words)


def test_tokenizer_larger_than_the_model(tmp_path: Path, refused: Refused) -> None:
    tokenizer = inputs.replaced(tmp_path / "tokenizer.json", inputs.tokenizer_json(more_tokens=61))
    words = ("tokenizer has 321 tokens, the model 320", "Does it belong to the model?")
    command = ["convert", inputs.RECURRENT_PTH, "--tokenizer", tokenizer, "--out", tmp_path / "out"]
    refused(*command, words=words)


TEXT_OPTIONS: dict[str, tuple[str, str, bytes | None, Words]] = {
    "no such tokenizer": ("--tokenizer", "tokenizer.json", None, "tokenizer.json: cannot be read"),
    "a damaged tokenizer": ("--tokenizer", "tokenizer.json", b"{}", "tokenizer.json is not a tokenizer"),
    "a damaged sentencepiece model": ("--tokenizer", "a.model", b"\x0a\xff\xff", "a.model is not a sentencepiece"),
    "an empty sentencepiece model": ("--tokenizer", "a.model", b"", "a.model is not a sentencepiece"),
    "no such template": ("--chat-template", "a.jinja", None, "a.jinja: cannot be read"),
    "a template of 2 MB": ("--chat-template", "a.jinja", b"x" * (2 << 20), "expected at most"),
}


@pytest.mark.parametrize("name", TEXT_OPTIONS)
def test_text_options(name: str, tmp_path: Path, refused: Refused) -> None:
    option, file, content, words = TEXT_OPTIONS[name]
    if content is not None:
        (tmp_path / file).write_bytes(content)
    refused("convert", inputs.RECURRENT_PTH, option, tmp_path / file, "--out", tmp_path / "out", words=words)


TOKENIZER_FOLDERS: dict[str, tuple[dict[str, Any], Words]] = {
    "nothing in it": ({}, "neither tokenizer.json nor tokenizer.model"),
    "half a character": (
        {"tokenizer.json": inputs.tokenizer_json(), "tokenizer_config.json": {"chat_template": "\ud800"}},
        "chat_template.jinja is not UTF-8",
    ),
    "no JSON": (
        {"tokenizer.json": inputs.tokenizer_json(), "tokenizer_config.json": b"{"},
        "tokenizer_config.json is not valid JSON",
    ),
    "a card of 2 MB": ({"tokenizer.json": inputs.tokenizer_json(), "README.md": b"x" * (2 << 20)}, "README.md is"),
}


@pytest.mark.parametrize("name", TOKENIZER_FOLDERS)
def test_tokenizer_folder(name: str, tmp_path: Path, refused: Refused) -> None:
    files, words = TOKENIZER_FOLDERS[name]
    (tmp_path / "text").mkdir()
    for file, content in files.items():
        inputs.replaced(tmp_path / "text" / file, content)
    command = ["convert", inputs.RECURRENT_PTH, "--tokenizer", tmp_path / "text", "--out", tmp_path / "out"]
    refused(*command, words=words)


def batch(rows: int) -> Change:
    return lambda tensors: tensors.update(
        {name: tensor.repeat(rows, *[1] * (tensor.ndim - 1)) for name, tensor in tensors.items()}
    )


SESSION_TENSORS: dict[str, tuple[Change, Words]] = {
    "no position": (dropped("position"), "position is missing"),
    "a tensor missing": (dropped("layers.1.S"), "layers.1.S is missing"),
    "a tensor more": (added(layers__3__S=torch.zeros(1)), "layers.3.S is not part of this model's state"),
    "another shape": (resized("layers.1.S", 1, 3, 32, 31), "layers.1.S is (1, 3, 32, 31)"),
    "another dtype": (retyped("layers.1.S", torch.float16), "torch.float16, this model's state has"),
    "NaN": (filled("layers.0.S", NAN), "layers.0.S holds values that are not finite"),
    "infinite": (filled("layers.2.conv", -INF), "layers.2.conv holds values that are not finite"),
    "a negative position": (filled("position", -1), "position is -1"),
    "a position at the end of int64": (filled("position", 2**63 - 1), "position is 9223372036854775807"),
    "a position that is a scalar": (resized("position"), "position is ()"),
    "two conversations": (batch(2), "position"),
    "no conversation": (batch(0), "position"),
}


@pytest.mark.parametrize("name", SESSION_TENSORS)
def test_session_tensors(name: str, models: Path, tmp_path: Path, refused: Refused) -> None:
    change, words = SESSION_TENSORS[name]
    file = inputs.with_session(models / SESSION, tmp_path / "a.session", change)
    refused("chat", models / "dense", "--once", "hi", "--session", file, words=words)


SESSION_STRINGS: dict[str, tuple[dict[str, Any], Words]] = {
    "another model": ({"model_fingerprint": "0" * 64}, ("belongs to the model 000000000000, this model is",)),
    "another version": ({"format_version": 2}, "format_version is not valid"),
    "an unknown field": ({"class": "os.system"}, "class is not valid"),
    "no JSON": ({"recent": b"[1, 2"}, "metadata is not valid JSON"),
    "JSON nested deeply": ({"recent": b"[" * 100_000}, "metadata is not valid JSON"),
    "tokens beyond the vocabulary": ({"recent": [320]}, "token ids outside the model's vocabulary of 320"),
    "tokens below it": ({"recent": [-2]}, "token ids outside the model's vocabulary of 320"),
    "a pending token below it": ({"pending": -1}, "token ids outside the model's vocabulary of 320"),
    "a pending token of 4000 digits": ({"pending": 10**4000}, "a.session"),
    "ten thousand recent tokens": ({"recent": [1] * 10_000}, "recent is not valid"),
    "a negative seed": ({"sampling": {"seed": -1}}, "sampling.seed is not valid"),
    "a temperature that is NaN": ({"sampling": {"temperature": NAN}}, "sampling.temperature is not valid"),
    "a role": ({"transcript": [{"role": "root", "content": ""}]}, "transcript.0.role is not valid"),
}


@pytest.mark.parametrize("name", SESSION_STRINGS)
def test_session_strings(name: str, models: Path, tmp_path: Path, refused: Refused) -> None:
    strings, words = SESSION_STRINGS[name]
    file = inputs.with_session(models / SESSION, tmp_path / "a.session", **strings)
    refused("chat", models / "dense", "--once", "hi", "--session", file, words=words)


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.999])
def test_session_cut_short(share: float, models: Path, tmp_path: Path, refused: Refused) -> None:
    whole = (models / SESSION).read_bytes()
    file = inputs.replaced(tmp_path / "a.session", whole[: int(len(whole) * share)])
    refused("chat", models / "dense", "--once", "hi", "--session", file, words="a.session is not a whole session file")


def test_session_of_another_model(models: Path, tmp_path: Path, refused: Refused) -> None:
    file = inputs.linked(models / SESSION, tmp_path / "a.session")
    for model in ("int8", "hybrid"):
        refused("chat", models / model, "--once", "hi", "--session", file, words="belongs to the model", apart=True)


def test_session_that_is_a_model(models: Path, tmp_path: Path, refused: Refused) -> None:
    inputs.linked(models / "dense" / inputs.TENSORS, tmp_path / "a.session")
    words = "a.session"
    refused("chat", models / "dense", "--once", "hi", "--session", tmp_path / "a.session", words=words)


def test_session_of_a_terabyte(models: Path, tmp_path: Path, refused: Refused) -> None:
    file = tmp_path / "a.session"
    with file.open("wb") as hole:
        try:
            hole.truncate(1 << 40)
        except OSError:
            pytest.skip("no files with holes here")
    words = ("has 1099511627776 bytes, a session of this model at most",)
    refused("chat", models / "dense", "--once", "hi", "--session", file, words=words)


PLACES = {
    "folder": "folder is a folder",
    ".": ". is a folder",
    "/": "/ is a folder",
    "no such folder/a.session": "a.session is in no folder",
    "file/a.session": "a.session is in no folder",
    "a" * 250: "a session cannot be kept here",
}


@pytest.mark.parametrize("place", PLACES)
def test_session_place(
    place: str, models: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    refused("chat", models / "dense", "--once", "hi", "--session", place, words=PLACES[place])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_session_that_is_a_pipe(models: Path, tmp_path: Path, refused: Refused) -> None:
    os.mkfifo(tmp_path / "a.session")
    words = "a.session"
    refused("chat", models / "dense", "--once", "hi", "--session", tmp_path / "a.session", words=words, apart=True)


def test_session_in_use(models: Path, tmp_path: Path, refused: Refused) -> None:
    file = inputs.linked(models / SESSION, tmp_path / "a.session")
    code = (
        "import sys, pathlib\nfrom gdn2_edge.generate.session import exclusive\n"
        "with exclusive(pathlib.Path(sys.argv[1])):\n    print('held', flush=True); sys.stdin.read()\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, file], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline().strip() == b"held"
        refused("chat", models / "dense", "--once", "hi", "--session", file, words="is in use by another process")
        refused("chat", models / "dense", "--once", "hi", "--session", file, words="is in use", apart=True)
        holder.communicate(b"")


def test_output_in_use(models: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "shard").write_text("another process's work")
    with FileLock(tmp_path / ".out.partial" / "lock"):
        command = ["quantize", models / "dense", "--format", "int8", "--out", tmp_path / "out"]
        refused(*command, words="another process is writing it", apart=True)


def test_system_message_for_a_session_that_has_begun(models: Path, tmp_path: Path, refused: Refused) -> None:
    file = inputs.linked(models / SESSION, tmp_path / "a.session")
    command = ["chat", models / "dense", "--once", "hi", "--session", file, "--system", "Be brief."]
    refused(*command, words="--system is for a new session")
