"""The head of a GGUF file: what an export wrote comes back, and a file that lies is refused in a sentence."""

from __future__ import annotations

import contextlib
import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("gguf", reason="the extra gguf is not installed")

from gguf import GGUFReader

from gdn2_edge.checkpoint.gguf_file import is_gguf, open_gguf
from gdn2_edge.checkpoint.reader import open_checkpoint
from gdn2_edge.convert import convert_checkpoint
from gdn2_edge.errors import BackendError, CheckpointError, Gdn2EdgeError
from gdn2_edge.export.gguf import export_gguf
from gdn2_edge.generate.text import open_text
from gdn2_edge.loading import load, model_path

NAME = struct.pack("<Q", 4) + b"gdn2"  # as the file says it
GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hybrid") / "model"
    convert_checkpoint(GOLDEN / "hybrid-model-ckpt.pth", folder, config=str(GOLDEN / "hybrid.json"))
    out = folder.with_suffix(".gguf")
    export_gguf(folder, out, "q5_0")
    return out


def test_what_an_export_wrote(file: Path) -> None:
    found, source = open_gguf(file), open_checkpoint(file.with_suffix(""))
    assert is_gguf(file)
    assert (found.spec, found.fingerprint, found.format) == (source.spec, source.fingerprint, "q5_0")
    assert found.sizes == {tensor.name: tensor.n_bytes for tensor in GGUFReader(file).tensors}
    assert found.texts == {}


def test_the_texts_of_a_chat(tmp_path: Path) -> None:
    export_gguf(model_path("tiny"), tmp_path / "tiny.gguf", "q8_0")
    texts = open_gguf(tmp_path / "tiny.gguf").texts
    assert set(texts) == {"tokenizer.json", "chat_template.jinja", "generation_config.json"}
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert texts[name] == (model_path("tiny") / name).read_bytes()
    assert open_text(texts).stop_ids == open_text(model_path("tiny")).stop_ids


def set_number(name: str, value: int) -> Callable[[bytes], bytes]:
    """Another u32 after a name: of a key it follows the four bytes of its type, of a tensor it counts dimensions."""

    def change(data: bytes) -> bytes:
        at = data.index(name.encode()) + len(name) + (4 if name.startswith("gdn2.") else 0)
        return data[:at] + value.to_bytes(4, "little") + data[at + 4 :]

    return change


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        pytest.param(lambda data: b"GGUG" + data[4:], "does not begin with GGUF", id="magic"),
        pytest.param(lambda data: data[:4] + b"\x09" + data[5:], "version 9", id="version"),
        pytest.param(lambda data: data[:8] + b"\xff" * 8 + data[16:], "entries, expected at most", id="count"),
        pytest.param(lambda data: data[:40], "bytes are asked for", id="head"),
        pytest.param(lambda data: data[:-4000], "ends at byte", id="cut short"),
        pytest.param(lambda data: data.replace(NAME, NAME[:8] + b"rwkv", 1), "architecture 'rwkv'", id="other"),
        pytest.param(lambda data: data.replace(b"gdn2.spec", b"gdn2.spek"), "no key gdn2.spec", id="spec"),
        pytest.param(lambda data: data.replace(b'{"', b"(\x22", 1), "not valid JSON", id="JSON"),
        pytest.param(
            set_number("gdn2.attention.sliding_window", 0), "sliding_window is 0, its spec says 48", id="window"
        ),
        pytest.param(set_number("gdn2.attention.head_count", 3), "head_count is 3, its spec says", id="heads"),
        pytest.param(set_number("blk.0.ffn_up.weight", 3), "has 3 dimensions|is of ggml's type|asked for", id="shape"),
        pytest.param(lambda data: data.replace(b"blk.1.ffn_up", b"blk.1.ffn_op"), "ffn_[uo]p.weight is", id="name"),
    ],
)
def test_a_file_that_lies(damage: Callable[[bytes], bytes], says: str, file: Path, tmp_path: Path) -> None:
    data = damage(file.read_bytes())
    assert data != file.read_bytes()
    (tmp_path / "damaged.gguf").write_bytes(data)
    with pytest.raises(CheckpointError, match=says):
        open_gguf(tmp_path / "damaged.gguf")


def test_any_byte_may_be_wrong(file: Path, tmp_path: Path) -> None:
    """Whatever is changed in the head, there is a sentence, and no number in it is believed before it is checked."""
    data, dice = file.read_bytes(), random.Random(0)
    ends = data.index(b"blk.0.") + 2000
    for _ in range(400):
        at, bad = dice.randrange(ends), bytearray(data)
        width = dice.choice((1, 4, 8))
        bad[at : at + width] = struct.pack("<Q", dice.choice((0, 255, 2**31, 2**63, 2**64 - 1)))[:width]
        (tmp_path / "x.gguf").write_bytes(bad)
        with contextlib.suppress(Gdn2EdgeError):
            open_gguf(tmp_path / "x.gguf")


def test_what_cannot_run_it_says_so(file: Path, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="the torch runtime cannot run"):
        load(file, runtime="torch")
    with pytest.raises(BackendError, match="is no GGUF file"):
        load("tiny", runtime="llama-cpp")
    (tmp_path / "text.txt").write_text("no model")
    with pytest.raises(BackendError, match="is no GGUF file"):
        load(tmp_path / "text.txt")
