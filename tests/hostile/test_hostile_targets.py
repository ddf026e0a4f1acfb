"""Recipes, options, and places that cannot be written: full, read-only, taken, or somebody else's."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import inputs
import pytest
from inputs import CONFIG, RECURRENT_PTH, SESSION, Refused, Words

RECIPES: dict[str, tuple[bytes | None, Words]] = {
    "none": (None, "no such recipe file"),
    "not TOML": (b"format = ", "is not valid TOML"),
    "not UTF-8": (b"format = '\xff'", "is not valid TOML"),
    "nested deeply": (b"a = " + b"[" * 100_000, "is not valid TOML"),
    "a number of 5000 digits": (b"group_size = " + b"9" * 5000, "is not valid TOML"),
    "empty": (b"", "format is missing"),
    "an unknown format": (b"format = 'int3'", ("format is 'int3'", "'fp8', 'int8' or 'int4'")),
    "an unknown field": (b"format = 'int8'\nbits = 3", "bits"),
    "a group of 48": (b"format = 'int4'\ngroup_size = 48", ("group_size is '48'", "32, 64 or 128")),
    "rules that are text": (b"format = 'int8'\nrules = 'all'", "rules is 'all'"),
    "a rule without a format": (b"format = 'int8'\n[[rules]]\ntensors = '*'", "rules.0.format is missing"),
    "a rule that matches nothing": (
        b"format = 'int8'\n[[rules]]\ntensors = 'layers.9.*'\nformat = 'bf16'",
        ("'layers.9.*' matches no matrix", "layers.0.b_proj.weight"),
    ),
    "a rule on a vector": (
        b"format = 'int8'\n[[rules]]\ntensors = '*.A_log'\nformat = 'bf16'",
        "'*.A_log' matches no matrix",
    ),
    "a pattern of many stars": (
        b"format = 'int8'\n[[rules]]\ntensors = '" + b"*a" * 200 + b"b'\nformat = 'bf16'",
        "matches no matrix",
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name: str, models: Path, tmp_path: Path, refused: Refused) -> None:
    content, words = RECIPES[name]
    if content is not None:
        (tmp_path / "recipe.toml").write_bytes(content)
    command = ["quantize", models / "dense", "--recipe", tmp_path / "recipe.toml", "--out", tmp_path / "out"]
    refused(*command, words=words)


@pytest.mark.parametrize("format", ["int8", "fp8", "int4"])
def test_quantized_twice(format: str, models: Path, tmp_path: Path, refused: Refused) -> None:
    words = "is already quantized. Quantize from the original checkpoint"
    refused("quantize", models / format, "--format", "int8", "--out", tmp_path / "out", words=words)
    words = "is quantized. Convert from the original checkpoint"
    refused("convert", models / format, "--out", tmp_path / "out", words=words)


TARGETS: dict[str, tuple[str, list[str], str]] = {
    "a folder that exists": ("folder", [], "exists. Choose another --out, or give --force"),
    "a file that exists": ("file", [], "exists. Choose another --out"),
    "a link to nothing": ("link", [], "exists. Choose another --out"),
    "a folder of somebody else": ("folder", ["--force"], "is not a folder that gdn2-edge made"),
    "a file, by force": ("file", ["--force"], "is not a folder that gdn2-edge made"),
    "a link, by force": ("link", ["--force"], "is not a folder that gdn2-edge made"),
    "the folder of a file": ("file/out", [], "Not a directory"),
    "the folder of a folder of a file": ("file/new/out", [], "Not a directory"),
    "a name that is too long": ("a" * 300, [], "name too long"),
    "a partial folder that is a link": ("linked", [], ".linked.partial is a link"),
    "this folder": (".", [], "exists"),
    "the folder above, which holds a source": ("..", [], "Choose another --out"),
}


@pytest.mark.skipif(sys.platform == "win32", reason="the words of a system, and links")
@pytest.mark.parametrize("name", TARGETS)
def test_target(name: str, models: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / CONFIG).write_text('{"model_type": "llama"}')
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / ".linked.partial").symlink_to("folder")
    out, more, words = TARGETS[name]
    refused("quantize", models / "dense", "--format", "int8", "--out", out, *more, words=words)
    refused("convert", RECURRENT_PTH, "--out", out, *more, words=words)


def test_failing_over_an_older_folder_keeps_it(models: Path, tmp_path: Path, refused: Refused) -> None:
    inputs.copied(models / "dense", tmp_path / "out")
    bad = inputs.with_tensors(
        inputs.copied(models / "dense", tmp_path / "bad"), inputs.filled("ln_f.weight", inputs.NAN)
    )
    refused("convert", bad, "--out", tmp_path / "out", "--force", words="ln_f.weight holds values")


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A small file system of its own, or a visible skip."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"no mount here: {error}")
    if done.returncode:
        pytest.skip(f"a file system cannot be mounted: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Writing beyond `size` fails, as on a disk that another program fills meanwhile."""
    resource = pytest.importorskip("resource", reason="no limit on the size of a file here")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk(models: Path, tmp_path: Path, refused: Refused) -> None:
    with mounted(tmp_path / "disk", "size=512k") as disk:
        words = ("0 MiB are free", "are needed")
        refused("convert", RECURRENT_PTH, "--out", disk / "new" / "out", words=words)
        refused("quantize", models / "dense", "--format", "int8", "--out", disk / "out", words=words, apart=True)


def test_disk_that_fills_meanwhile(
    models: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    with mounted(tmp_path / "disk", "size=512k") as disk:
        monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1 << 40})())
        words = ("cannot be written", "No space left on device")
        refused("convert", RECURRENT_PTH, "--out", disk / "new" / "out", words=words)
        refused("quantize", models / "dense", "--format", "int8", "--out", disk / "out", words=words)


def test_disk_full_to_the_last_byte(models: Path, tmp_path: Path, refused: Refused) -> None:
    with mounted(tmp_path / "disk", "size=64k") as disk:
        with contextlib.suppress(OSError), (disk / "filling").open("wb", buffering=0) as file:
            while file.write(b"\0" * 4096):
                pass
        file = disk / "a.session"
        refused("convert", RECURRENT_PTH, "--out", disk / "out", words=str(disk))
        refused("chat", models / "dense", "--once", "hi", "--max-tokens", "2", "--session", file, words=str(disk))


@pytest.mark.parametrize("begun", [False, True])
def test_session_on_a_full_disk(begun: bool, models: Path, tmp_path: Path, refused: Refused) -> None:
    file = tmp_path / "a.session"
    if begun:
        inputs.linked(models / SESSION, file)
    with files_of_at_most(8192):
        words = ("a.session: the session cannot be written", "File too large")
        refused("chat", models / "dense", "--once", "hi", "--max-tokens", "2", "--session", file, words=words)


def test_files_that_cannot_grow(models: Path, tmp_path: Path, refused: Refused) -> None:
    with files_of_at_most(100_000):
        words = ("out: cannot be written", "File too large")
        refused("quantize", models / "dense", "--format", "fp8", "--out", tmp_path / "new" / "out", words=words)
        refused("convert", RECURRENT_PTH, "--out", tmp_path / "out", words=words)


def test_recipe_that_is_a_folder(tmp_path: Path, refused: Refused) -> None:
    words = "cannot be read"
    refused("quantize", "tiny", "--recipe", tmp_path, "--out", tmp_path / "out", words=words)


def test_read_only_disk(models: Path, tmp_path: Path, refused: Refused) -> None:
    with mounted(tmp_path / "disk", "size=1m,ro") as disk:
        words = "Read-only file system"
        refused("convert", RECURRENT_PTH, "--out", disk / "out", words=words)
        refused("quantize", models / "dense", "--format", "int8", "--out", disk / "a" / "b" / "out", words=words)
        file = disk / "a.session"
        refused("chat", models / "dense", "--once", "hi", "--session", file, words=str(disk))


def test_unwritable_folder(models: Path, tmp_path: Path, refused: Refused) -> None:
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o555)
    if os.access(folder, os.W_OK):
        pytest.skip("this user writes everywhere")
    refused("convert", RECURRENT_PTH, "--out", folder / "out", words="Permission denied")
    refused("chat", models / "dense", "--once", "hi", "--session", folder / "a.session", words="Permission denied")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc here")
def test_folder_that_nobody_can_write(models: Path, refused: Refused) -> None:
    refused("convert", RECURRENT_PTH, "--out", "/proc/self/out", words="/proc/self/out: cannot be written")
    refused("chat", models / "dense", "--once", "hi", "--session", "/proc/self/a.session", words="/proc/self")


OPTIONS: dict[str, tuple[list[Any], int, Words]] = {
    "no such model": (["chat", "no/such/model", "--once", "hi"], 1, ("no such file or folder", "(tiny)")),
    "no such checkpoint": (["convert", "no.pth", "--out", "out"], 1, "no such file or folder"),
    "a checkpoint of a name too long": (["inspect", "a" * 5000], 1, "name too long"),
    "a checkpoint of another kind": (["convert", inputs.GOLDEN / "README.md", "--out", "out"], 1, "expected a folder"),
    "an empty folder": (["inspect", "."], 1, "there is no .safetensors file"),
    "an unknown device": (["chat", "--once", "hi", "--device", "tpu9"], 1, "device 'tpu9' is unknown"),
    "an unsupported device": (["chat", "--once", "hi", "--device", "meta"], 1, "device 'meta' is not supported"),
    "a device that is not here": (["chat", "--once", "hi", "--device", "cuda:99"], 1, "device 'cuda:99' is not here"),
    "an unknown runtime": (["chat", "--once", "hi", "--runtime", "abacus"], 1, "runtime 'abacus' is unknown"),
    "an unknown gate": (["convert", RECURRENT_PTH, "--output-gate", "relu", "--out", "out"], 1, "says relu"),
    "an unknown dtype to convert to": (["convert", RECURRENT_PTH, "--dtype", "int3", "--out", "out"], 1, "'int3'"),
    "an unknown dtype to run in": (["chat", "--once", "hi", "--dtype", "int3"], 2, "'int3'"),
    "a negative temperature": (["chat", "--once", "hi", "--temperature", "-1"], 2, "--temperature is -1.0"),
    "a temperature that is NaN": (["chat", "--once", "hi", "--temperature", "nan"], 2, "--temperature is nan"),
    "a probability of 2": (["chat", "--once", "hi", "--top-p", "2"], 2, "--top-p is 2.0"),
    "a penalty of 9": (["chat", "--once", "hi", "--repetition-penalty", "9"], 2, "--repetition-penalty is 9.0"),
    "a seed of 2^64": (["chat", "--once", "hi", "--seed", str(2**64)], 2, "--seed is 18446744073709551616"),
    "no tokens": (["chat", "--once", "hi", "--max-tokens", "0"], 2, "--max-tokens"),
    "a group of 48": (["quantize", "tiny", "--format", "int4", "--group-size", "48", "--out", "out"], 1, "group_size"),
    "a group for int8": (["quantize", "tiny", "--format", "int8", "--group-size", "64", "--out", "out"], 2, "int4"),
    "an unknown format": (["quantize", "tiny", "--format", "int3", "--out", "out"], 1, "'int3'"),
    "no format": (["quantize", "tiny", "--out", "out"], 2, "--recipe FILE"),
    "no target": (["convert", RECURRENT_PTH], 2, "--out"),
    "an unknown command": (["serve"], 2, "serve"),
    "an unknown option": (["chat", "--best"], 2, "--best"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command, code, words = OPTIONS[name]
    refused(*command, code=code, words=words)
