"""The head of a GGUF file of a GDN-2 model, read without its weights and without llama.cpp. The file is hostile.

docs/gguf.md is the format. What is checked here is what llama.cpp would take on trust, or stop the process over: whose
model this is, that its sizes and tensors are those of its spec, and that every tensor lies inside the file.
"""

from __future__ import annotations

import json
import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path

from gdn2_edge.errors import CheckpointError, SpecError
from gdn2_edge.gguf_names import MAX_LAYERS, entries, sizes
from gdn2_edge.spec import MODEL_TYPE, ModelSpec, spec_from_fields

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_ENTRIES, MAX_DIMS = 1 << 20, 4
ALIGNMENT = 32
TOKENS = "tokenizer.ggml.tokens"
ROUNDING = 1e-6  # of numbers that the file has as fp32
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
# Weights and bytes of a block, by ggml's number of the type: those of `gdn2-edge export gguf`.
BLOCKS = {
    0: (1, 4),  # F32
    1: (1, 2),  # F16
    2: (32, 18),  # Q4_0
    6: (32, 22),  # Q5_0
    8: (32, 34),  # Q8_0
    12: (256, 144),  # Q4_K
    14: (256, 210),  # Q6_K
    30: (1, 2),  # BF16
}
# Files of a model folder by the keys that hold them.
TEXTS = {
    "tokenizer.huggingface.json": "tokenizer.json",
    "tokenizer.chat_template": "chat_template.jinja",
    "gdn2.generation_config": "generation_config.json",
}


@dataclass(frozen=True)
class GgufFile:
    """What a file says of itself, checked.

    Attributes:
        fingerprint: of the checkpoint that it was made from.
        format: what the export's --type said.
        sizes: bytes of each tensor by name.
        texts: tokenizer.json, chat_template.jinja and generation_config.json, as far as it has them.
    """

    path: Path
    spec: ModelSpec
    fingerprint: str
    format: str
    sizes: dict[str, int]
    texts: dict[str, bytes]


def is_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file, by its first bytes."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:  # a folder, among others
        return False


def open_gguf(path: Path) -> GgufFile:
    """Open a file that `gdn2-edge export gguf` made; no weight is read.

    Raises:
        CheckpointError: damaged, cut short, of another architecture, or not made by us.
        SpecError: its spec is not one.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            head = _Head(data)
            values, tensors = head.read()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}).") from None
    except (ValueError, struct.error) as error:
        reason = str(error) if isinstance(error, ValueError) else "it ends inside its head"
        raise CheckpointError(f"{path}: this GGUF file is damaged or cut short ({reason}). Export it again.") from None
    architecture = values.get("general.architecture")
    if architecture != MODEL_TYPE.encode():
        name = architecture.decode(errors="replace")[:40] if isinstance(architecture, bytes) else "none"
        raise CheckpointError(f"{path}: this GGUF file is of the architecture {name!r}, expected {MODEL_TYPE!r}.")
    texts = {key: value for key, value in values.items() if isinstance(value, bytes)}
    if "gdn2.spec" not in texts:
        raise CheckpointError(f"{path}: it has no key gdn2.spec, so it was not written by gdn2-edge export gguf.")
    try:
        fields = json.loads(texts["gdn2.spec"])
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path}: its key gdn2.spec is not valid JSON. Export it again.") from None
    if not isinstance(fields, dict):
        raise SpecError(f"{path.name}: gdn2.spec holds a {type(fields).__name__}, expected an object.")
    spec = spec_from_fields(fields, path.name)
    for key, value in sizes(spec).items():
        if not _same(found := values.get(key), value):
            raise CheckpointError(
                f"{path}: its key {key} is {str(found)[:60]}, its spec says {value}; export it again."
            )
    shapes = {entry.name: entry.shape for entry in entries(spec)}
    for name in shapes.keys() | tensors.keys():
        if shapes.get(name) != (has := tensors[name].shape if name in tensors else None):
            wanted = shapes.get(name, "none of this name")
            raise CheckpointError(f"{path}: tensor {name[:60]} is {has or 'missing'}, its spec asks for {wanted}.")
    return GgufFile(
        path,
        spec,
        texts.get("gdn2.fingerprint", b"").decode(errors="replace"),
        texts.get("gdn2.type", b"").decode(errors="replace"),
        {name: tensor.nbytes for name, tensor in tensors.items()},
        {TEXTS[key]: value for key, value in texts.items() if key in TEXTS},
    )


@dataclass(frozen=True)
class _Tensor:
    """Shape, slowest first, as `gguf_names.Entry` has it; first byte in the data; bytes."""

    shape: tuple[int, ...]
    offset: int
    nbytes: int


Value = bytes | float | tuple[float, ...]


def _same(found: Value | None, value: object) -> bool:
    if isinstance(found, float) and isinstance(value, float):
        return abs(found - value) <= ROUNDING * abs(value)
    return found == (value.encode() if isinstance(value, str) else tuple(value) if isinstance(value, list) else value)


class _Head:
    """One pass over the head of a mapped file: its keys, then where the tensors are."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def read(self) -> tuple[dict[str, Value], dict[str, _Tensor]]:
        """Values by key (arrays longer than a model has layers are stepped over), and tensors by name."""
        if self._take(len(MAGIC)) != MAGIC:
            raise ValueError("it does not begin with GGUF")
        if (version := self._number("I")) not in VERSIONS:
            raise ValueError(f"version {version:.0f}, expected one of {', '.join(map(str, VERSIONS))}")
        count, keys = self._count(), self._count()
        values: dict[str, Value] = {}
        for _ in range(keys):
            key = self._string().decode()
            if (value := self._value(int(self._number("I")), distinct=key == TOKENS)) is not None:
                values[key] = value
        found = dict(self._tensor() for _ in range(count))
        if values.get("general.alignment", ALIGNMENT) != ALIGNMENT:
            raise ValueError(f"its alignment is not {ALIGNMENT}")
        begin = -(-self.at // ALIGNMENT) * ALIGNMENT
        for name, tensor in found.items():
            if (end := begin + tensor.offset + tensor.nbytes) > len(self.data):
                raise ValueError(f"tensor {name[:60]} ends at byte {end} of {len(self.data)}")
        return values, found

    def _tensor(self) -> tuple[str, _Tensor]:
        name, dims = self._string().decode(), int(self._number("I"))
        if dims > MAX_DIMS:
            raise ValueError(f"tensor {name[:60]} has {dims} dimensions")
        shape = [int(self._number("Q")) for _ in range(dims)]
        kind, offset = int(self._number("I")), int(self._number("Q"))
        if kind not in BLOCKS:
            raise ValueError(f"tensor {name[:60]} is of ggml's type {kind}, which gdn2-edge export gguf does not write")
        weights, block_bytes = BLOCKS[kind]
        if shape and shape[0] % weights:
            raise ValueError(f"tensor {name[:60]} has rows of {shape[0]}, of whole blocks of {weights}")
        return name, _Tensor(tuple(reversed(shape)), offset, prod(shape) // weights * block_bytes)

    def _value(self, kind: int, distinct: bool) -> Value | None:
        """A string's bytes, a number, or a short array's numbers; None after another array, of `distinct` strings."""
        if kind in NUMBERS:
            return self._number(NUMBERS[kind])
        if kind == STRING:
            return self._string()
        if kind != ARRAY:
            raise ValueError(f"a key has a value of type {kind}")
        kind, count = int(self._number("I")), int(self._number("Q"))
        if kind in NUMBERS and count <= MAX_LAYERS:
            return tuple(self._number(NUMBERS[kind]) for _ in range(count))
        if kind in NUMBERS:
            self._take(count * struct.calcsize(NUMBERS[kind]), keep=False)
        elif kind == STRING:
            if count > MAX_ENTRIES:
                raise ValueError(f"an array of {count} strings, expected at most {MAX_ENTRIES}")
            if len({self._string() for _ in range(count)}) < count and distinct:
                raise ValueError("two of its tokens are the same")
        else:
            raise ValueError(f"a key has an array of type {kind}")
        return None

    def _string(self) -> bytes:
        return self._take(int(self._number("Q")))

    def _count(self) -> int:
        count = int(self._number("Q"))
        if count > MAX_ENTRIES:
            raise ValueError(f"{count} entries, expected at most {MAX_ENTRIES}")
        return count

    def _number(self, form: str) -> float:
        (number,) = struct.unpack("<" + form, self._take(struct.calcsize(form)))
        return number  # type: ignore[no-any-return]

    def _take(self, size: int, keep: bool = True) -> bytes:
        if size > len(self.data) - self.at:
            raise ValueError(f"{size} bytes are asked for at byte {self.at} of {len(self.data)}")
        self.at += size
        return self.data[self.at - size : self.at] if keep else b""
