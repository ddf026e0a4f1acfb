"""Hostile inputs, built from good ones: small models, and the ways to spoil their files.

A file is never changed where it lies, it is replaced: the copies of a model are hard links.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from gdn2_edge.convert import convert_checkpoint
from gdn2_edge.generate.session import Session
from gdn2_edge.loading import MODEL_NAMES, load
from gdn2_edge.quantize import quantize_checkpoint
from gdn2_edge.quantize.recipe import make_recipe

GOLDEN = Path(__file__).parents[1] / "golden"
RECURRENT_PTH = GOLDEN / "recurrent-model-ckpt.pth"
HYBRID_PTH = GOLDEN / "hybrid-model-ckpt.pth"
HYBRID_CONFIG = GOLDEN / "hybrid.json"
TINY = MODEL_NAMES["tiny"]
TENSORS, CONFIG = "model.safetensors", "config.json"
INDEX = "model.safetensors.index.json"
SESSION = "good.session"

NAN, INF = float("nan"), float("inf")

Words = str | tuple[str, ...]  # what a refusal must say
Refused = Callable[..., str]  # see conftest.py

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tokenizer_json(more_tokens: int = 0) -> str:
    """A tokenizer of all bytes and four control tokens: 260 tokens, the small models have room for 320."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"])
    tokenizer.add_tokens([f"<more {i}>" for i in range(more_tokens)])
    return str(tokenizer.to_str())


def make_models(root: Path) -> None:
    """Good folders under `root`: dense, hybrid, int8, fp8, int4, and a session of the dense one."""
    (root / "tokenizer.json").write_text(tokenizer_json(), encoding="utf-8")
    (root / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    text = {"tokenizer": root / "tokenizer.json", "chat_template": root / "chat_template.jinja"}
    convert_checkpoint(RECURRENT_PTH, root / "dense", **text)
    convert_checkpoint(HYBRID_PTH, root / "hybrid", config=str(HYBRID_CONFIG), **text)
    for format in ("int8", "fp8", "int4"):
        quantize_checkpoint(root / "dense", root / format, make_recipe({"format": format}, format))
    session = Session(load(root / "dense", "cpu"))
    list(session.send("hello", max_tokens=4))
    session.save(root / SESSION)


def copied(model: Path, target: Path) -> Path:
    """A copy of a model's folder that takes no room."""
    target.mkdir()
    for file in model.iterdir():
        linked(file, target / file.name)
    return target


def linked(file: Path, target: Path) -> Path:
    try:
        os.link(file, target)
    except OSError:  # another file system
        shutil.copyfile(file, target)
    return target


def replaced(path: Path, content: bytes | str | Any) -> Path:
    """A new file in the place of `path`: bytes, text, or JSON."""
    if not isinstance(content, bytes | str):
        content = json.dumps(content)
    path.unlink(missing_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def with_config(folder: Path, **changed: Any) -> Path:
    """The folder with other fields in its config.json; None takes a field out."""
    fields = json.loads((folder / CONFIG).read_bytes()) | changed
    replaced(folder / CONFIG, {name: value for name, value in fields.items() if value is not None})
    return folder


Change = Callable[[dict[str, Tensor]], None]


def with_tensors(folder: Path, change: Change) -> Path:
    """The folder with other tensors."""
    tensors = load_file(folder / TENSORS)
    change(tensors)
    replaced(folder / TENSORS, save({name: t.contiguous() for name, t in tensors.items()}))
    return folder


def with_header(folder: Path, header: bytes | Mapping[str, Any], data: bytes = b"", length: int | None = None) -> Path:
    """The folder with a safetensors file of this header and data; `length` is what it says of its header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    replaced(folder / TENSORS, struct.pack("<Q", len(text) if length is None else length) + text + data)
    return folder


def with_session(source: Path, target: Path, change: Change = lambda tensors: None, **strings: Any) -> Path:
    """A session file with other tensors and other metadata (JSON values; bytes as they are)."""
    tensors = load_file(source)
    change(tensors)
    with safe_open(source, framework="pt") as file:
        metadata = file.metadata()
    metadata |= {name: v.decode() if isinstance(v, bytes) else json.dumps(v) for name, v in strings.items()}
    return replaced(target, save(tensors, metadata))


def pth(target: Path, change: Change = lambda tensors: None, source: Path = RECURRENT_PTH, **options: Any) -> Path:
    """A training file with other tensors."""
    tensors = state_dict(source)
    change(tensors)
    torch.save({"model": tensors}, target, **options)
    return target


def state_dict(source: Path = RECURRENT_PTH) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = torch.load(source, weights_only=True)["model"]
    return tensors


def fla_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under fla's layer names, as a bare state dict."""
    changes = (("transformer.h.", "model.layers."), ("transformer.", "model."), ("mlp.swiglu.", "mlp."))
    renamed = {}
    for name, tensor in tensors.items():
        for old, new in changes:
            name = name.replace(old, new)
        renamed[name] = tensor
    return renamed


class RunsCode:
    """Unpickled without care, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


class Zeros:
    """Unpickled, it is that many bytes."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __reduce__(self) -> tuple[Any, ...]:
        return bytearray, (self.size,)


class Custom:
    """A class of somebody's own."""


def resized(name: str, *shape: int) -> Change:
    """A tensor of zeros in another shape."""
    return lambda tensors: tensors.update({name: torch.zeros(shape, dtype=tensors[name].dtype)})


def retyped(name: str, dtype: torch.dtype) -> Change:
    return lambda tensors: tensors.update({name: tensors[name].to(dtype)})


def added(**more: Tensor) -> Change:
    """Further tensors; two underscores stand for a dot."""
    return lambda tensors: tensors.update({name.replace("__", "."): value for name, value in more.items()})


def dropped(name: str) -> Change:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[name]

    return change


def filled(name: str, value: float, where: int = -1) -> Change:
    """One value of a tensor is another."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[where] = value

    return change
