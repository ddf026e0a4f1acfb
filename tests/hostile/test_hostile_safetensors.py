"""Safetensors files and their index: damaged, lying, or not what their name says."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import inputs
import pytest
from inputs import CONFIG, INDEX, RECURRENT_PTH, TENSORS, TINY, Refused, Words

Change = Callable[[Path], object]


def cut_to(share: float) -> Change:
    def change(folder: Path) -> None:
        whole = (folder / TENSORS).read_bytes()
        inputs.replaced(folder / TENSORS, whole[: int(len(whole) * share)])

    return change


def header(entries: bytes | dict[str, Any], data: bytes = b"", length: int | None = None) -> Change:
    return lambda folder: inputs.with_header(folder, entries, data, length)


def entry(begin: int, end: int, shape: tuple[int, ...] = (1,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def replaced_by_folder(folder: Path) -> None:
    (folder / TENSORS).unlink()
    (folder / TENSORS).mkdir()


NOT_WHOLE = f"{TENSORS} is not a whole safetensors file"
CONTAINERS: dict[str, tuple[Change, str]] = {
    "empty": (cut_to(0), NOT_WHOLE),
    "cut in its header": (cut_to(0.002), NOT_WHOLE),
    "cut in the middle": (cut_to(0.5), NOT_WHOLE),
    "cut near its end": (cut_to(0.9999), NOT_WHOLE),
    "too long": (lambda f: inputs.replaced(f / TENSORS, (f / TENSORS).read_bytes() + b"more"), NOT_WHOLE),
    "header of 2^63 bytes": (header(b"{}", length=2**63), NOT_WHOLE),
    "header of 2^64 - 1 bytes": (header(b"{}", length=2**64 - 1), NOT_WHOLE),
    "header of 2^40 bytes": (header(b"{}", length=2**40), NOT_WHOLE),
    "header of no bytes": (header(b"", length=0), NOT_WHOLE),
    "header without tensors": (header({}), "embed.weight is missing"),
    "header not JSON": (header(b"not JSON at all!"), NOT_WHOLE),
    "header not UTF-8": (header(b'{"\xff\xfe": 1}'), NOT_WHOLE),
    "header a list": (header(b"[1, 2, 3]"), NOT_WHOLE),
    "header nested deeply": (header(b"[" * 100_000), NOT_WHOLE),
    "offsets beyond the file": (header({"A_log": entry(0, 4 << 40, (1 << 40,))}), NOT_WHOLE),
    "offsets backwards": (header({"A_log": entry(4, 0)}, b"1234"), NOT_WHOLE),
    "offsets that overlap": (header({"a": entry(0, 4), "b": entry(2, 6)}, b"123456"), NOT_WHOLE),
    "offsets with a hole": (header({"a": entry(0, 4), "b": entry(8, 12)}, b"123456789012"), NOT_WHOLE),
    "offsets that are negative": (header({"a": entry(-4, 0)}, b"1234"), NOT_WHOLE),
    "shape that overflows": (header({"a": entry(0, 4, (2**32, 2**32, 2**32))}, b"1234"), NOT_WHOLE),
    "dtype unknown": (header({"a": entry(0, 4, dtype="F33")}, b"1234"), NOT_WHOLE),
    "dtype complex": (header({"a": entry(0, 8, dtype="C64")}, b"12345678"), "dtype C64"),
    "a pickle instead": (lambda f: inputs.replaced(f / TENSORS, RECURRENT_PTH.read_bytes()), NOT_WHOLE),
    "a folder instead": (replaced_by_folder, TENSORS),
    "a name of two lines": (header({"a\nb\x1b[2J": entry(0, 4)}, b"1234"), "not part of the model"),
    "a name of a million letters": (header({"a" * 1_000_000: entry(0, 4)}, b"1234"), "not part of the model"),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_safetensors(name: str, models: Path, tmp_path: Path, refused_by_all: Refused) -> None:
    folder = inputs.copied(models / "dense", tmp_path / "model")
    change, words = CONTAINERS[name]
    change(folder)
    refused_by_all(folder, words)


def test_safetensors_with_a_name_twice(models: Path, tmp_path: Path, refused_by_all: Refused) -> None:
    folder = inputs.copied(models / "dense", tmp_path / "model")
    first = json.dumps({"embed.weight": entry(0, 4)})[:-1]
    second = json.dumps({"embed.weight": entry(4, 8)})[1:]
    inputs.with_header(folder, f"{first}, {second}".encode(), b"12345678")
    refused_by_all(folder, TENSORS)


def test_default_model_cut_short(tmp_path: Path, refused: Refused) -> None:
    folder = inputs.copied(TINY, tmp_path / "tiny")
    cut_to(0.3)(folder)
    refused("chat", folder, "--once", "hi", words=(NOT_WHOLE, "Was it copied completely?"), apart=True)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
@pytest.mark.parametrize("name", [TENSORS, CONFIG, INDEX, "tokenizer.json"])
def test_a_pipe_in_the_place_of_a_file(name: str, models: Path, tmp_path: Path, refused: Refused) -> None:
    folder = inputs.copied(models / "dense", tmp_path / "model")
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    refused("chat", folder, "--once", "hi", words=name, apart=True)


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no /dev/zero here")
@pytest.mark.parametrize("name", [CONFIG, INDEX, "tokenizer.json", "chat_template.jinja"])
def test_a_file_without_end(name: str, models: Path, tmp_path: Path, refused: Refused) -> None:
    folder = inputs.copied(models / "dense", tmp_path / "model")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("/dev/zero")
    refused("chat", folder, "--once", "hi", words=name, apart=True)


def index(weight_map: Any) -> str:
    return json.dumps({"weight_map": weight_map})


INDEXES: dict[str, tuple[str, Words]] = {
    "a file above": (index({"embed.weight": "../other.safetensors"}), ("'../other.safetensors'", "same folder")),
    "a file of the system": (index({"embed.weight": "/etc/passwd"}), ("'/etc/passwd'", "same folder")),
    "a file behind a backslash": (index({"embed.weight": "..\\other"}), "expected a file in the same folder"),
    "the folder itself": (index({"embed.weight": "."}), "expected a file in the same folder"),
    "a file that is missing": (index({"embed.weight": "model-2.safetensors"}), "model-2.safetensors is missing"),
    "its config": (index({"embed.weight": CONFIG}), f"{CONFIG} is not a whole safetensors file"),
    "a name of two lines": (index({"embed.weight": "a\nb"}), "is missing"),
    "numbers": (index({"embed.weight": 7}), "no weight_map"),
    "no map": (json.dumps({"weight": {}}), "no weight_map"),
    "nothing": (index({}), "embed.weight is missing"),
    "a list": ("[]", ("holds a list", "expected an object")),
    "no JSON": ("{", "is not valid JSON"),
    "JSON nested deeply": ('{"weight_map":' + "[" * 200_000, "is not valid JSON"),
    "17 MB": (" " * (17 << 20) + "{}", ("bytes, expected at most",)),
}


@pytest.mark.parametrize("name", INDEXES)
def test_index_names(name: str, models: Path, tmp_path: Path, refused_by_all: Refused) -> None:
    folder = inputs.copied(models / "dense", tmp_path / "model")
    content, words = INDEXES[name]
    inputs.replaced(folder / INDEX, content)
    refused_by_all(folder, words)


def test_index_names_a_link_out_of_the_folder(models: Path, tmp_path: Path, refused_by_all: Refused) -> None:
    folder = inputs.copied(models / "dense", tmp_path / "model")
    (folder / TENSORS).unlink()
    (folder / "model-1.safetensors").symlink_to(models / "dense" / TENSORS)
    inputs.replaced(folder / INDEX, index({"embed.weight": "model-1.safetensors"}))
    refused_by_all(folder, "model-1.safetensors is a link to another folder")


def test_one_tensor_in_two_shards(models: Path, tmp_path: Path, refused_by_all: Refused) -> None:
    folder = inputs.copied(models / "dense", tmp_path / "model")
    inputs.linked(folder / TENSORS, folder / "model-2.safetensors")
    refused_by_all(folder, "is in more than one file")
