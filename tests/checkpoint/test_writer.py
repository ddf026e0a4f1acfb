"""Writing a checkpoint folder: aligned, sharded, fingerprinted, resumed, and never over something else."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file
from torch import Tensor

from gdn2_edge.checkpoint import writer
from gdn2_edge.checkpoint.files import TensorInfo
from gdn2_edge.checkpoint.reader import open_checkpoint
from gdn2_edge.checkpoint.writer import Job, write_atomically, write_checkpoint
from gdn2_edge.errors import CheckpointError
from gdn2_edge.spec import ModelSpec, spec_from_fields

SPEC = spec_from_fields(
    {
        "vocab_size": 24,
        "hidden_size": 16,
        "intermediate_size": 20,
        "layer_types": ["gdn2"] * 3,
        "num_heads": 1,
        "num_v_heads": 1,
        "head_k_dim": 5,
        "head_v_dim": 7,
        "output_gate": "silu",
    },
    "test",
)
SMALL_SHARD = 6000


def values(changes: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Every tensor of the spec; matrices of odd sizes in bf16 and int8, so that alignment is work."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for i, (name, shape) in enumerate(SPEC.tensor_shapes().items()):
        drawn = torch.randn(shape, generator=generator)
        if len(shape) == 2 and i % 3 == 0:
            drawn = drawn.bfloat16()
        elif len(shape) == 2 and i % 3 == 1:
            tensors[name + "_scale"] = torch.ones(shape[0], 1)
            drawn = (drawn * 20).to(torch.int8)
        tensors[name] = drawn
    return tensors | (changes or {})


Hook = Callable[[str], None]


def jobs(tensors: dict[str, Tensor], hook: Hook = lambda name: None) -> list[Job]:
    made = []
    for name in SPEC.tensor_shapes():
        own = {key: t for key, t in tensors.items() if key in (name, f"{name}_scale")}

        def make(name: str = name, own: dict[str, Tensor] = own) -> dict[str, Tensor]:
            hook(name)
            return own

        made.append(Job(name, {key: TensorInfo(t.dtype, tuple(t.shape)) for key, t in own.items()}, make))
    return made


def write(out: Path, tensors: dict[str, Tensor] | None = None, hook: Hook = lambda name: None, **options: Any) -> str:
    arguments: dict[str, Any] = {"identity": {"source": "test"}, "config": {}, "files": {}, "spec": SPEC, **options}
    spec: ModelSpec = arguments.pop("spec")
    return write_checkpoint(out, spec, jobs(tensors or values(), hook), **arguments)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def headers(folder: Path) -> dict[str, tuple[dict[str, Any], int]]:
    """File name -> its header and where its data begin."""
    found = {}
    for file in folder.glob("*.safetensors"):
        data = file.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        found[file.name] = json.loads(data[8 : 8 + length]), 8 + length
    return found


# What is written


def test_one_file_opens_with_safetensors_own_loader(tmp_path: Path) -> None:
    write(tmp_path / "out", files={"LICENSE": b"free"}, config={"made_by": "test"})
    loaded = load_file(tmp_path / "out" / "model.safetensors")
    assert loaded.keys() == values().keys()
    assert all(
        torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype for name, tensor in values().items()
    )
    assert sorted(contents(tmp_path / "out")) == ["LICENSE", "config.json", "model.safetensors"]
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.items() >= {"model_type": "gdn2", "made_by": "test", **SPEC.to_json()}.items()


@pytest.mark.parametrize("shard_bytes", [SMALL_SHARD, 1 << 30])
def test_tensors_are_aligned_and_files_have_no_holes(
    shard_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "SHARD_BYTES", shard_bytes)
    write(tmp_path / "out")
    for name, (header, begin) in headers(tmp_path / "out").items():
        end = 0
        for key, entry in header.items():
            if key == "__metadata__":
                continue
            first, last = entry["data_offsets"]
            assert first == end
            assert (begin + first) % values()[key].dtype.itemsize == 0, key
            end = last
        assert (tmp_path / "out" / name).stat().st_size == begin + end


def test_shards_and_their_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = write(tmp_path / "whole")
    monkeypatch.setattr(writer, "SHARD_BYTES", SMALL_SHARD)
    assert write(tmp_path / "out") == whole  # the fingerprint is of the model, not of its files
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = sorted(headers(tmp_path / "out"))
    assert len(shards) >= 3
    assert shards == [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in values().values())
    found = {}
    for shard in shards:
        loaded = load_file(tmp_path / "out" / shard)
        assert sum(t.nbytes for t in loaded.values()) <= SMALL_SHARD
        assert all(index["weight_map"][name] == shard for name in loaded)
        found |= loaded
    assert index["weight_map"].keys() == found.keys() == values().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in values().items())
    checkpoint = open_checkpoint(tmp_path / "out")
    assert checkpoint.spec == SPEC
    assert checkpoint.fingerprint == whole


def test_a_tensor_larger_than_a_shard_has_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "SHARD_BYTES", 1)
    write(tmp_path / "out")
    assert len(headers(tmp_path / "out")) == len(SPEC.tensor_shapes())
    assert open_checkpoint(tmp_path / "out").spec == SPEC


def test_progress_counts_bytes(tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    write(tmp_path / "out", progress=lambda *args: seen.append(args))
    total = sum(t.nbytes for t in values().values())
    assert [name for _, _, name in seen] == [*SPEC.tensor_shapes(), ""]
    assert seen[0][0] == 0
    assert seen[-1] == (total, total, "")
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)


def test_what_comes_out_must_be_what_was_planned(tmp_path: Path) -> None:
    planned = jobs(values())
    planned[3] = Job(planned[3].name, planned[3].stored, lambda: {key: torch.zeros(2) for key in planned[3].stored})
    with pytest.raises(CheckpointError, match=rf"{planned[3].name} came out as \(2,\) torch.float32, planned was"):
        write_checkpoint(tmp_path / "out", SPEC, planned, identity={}, config={}, files={})


# Fingerprint


def test_the_fingerprint_is_the_models(tmp_path: Path) -> None:
    first = write(tmp_path / "a")
    assert json.loads((tmp_path / "a" / "config.json").read_text())["fingerprint"] == first
    assert len(first) == 64
    again = write(tmp_path / "b", identity={"source": "another"}, config={"made_by": "x"}, files={"LICENSE": b"y"})
    assert again == first


@pytest.mark.parametrize("name", [*SPEC.tensor_shapes(), "layers.0.q_proj.weight_scale"])
def test_every_tensor_is_in_the_fingerprint(name: str, tmp_path: Path) -> None:
    tensors = values()
    if name not in tensors:
        name = next(key for key in tensors if key.endswith("_scale"))
    changed = tensors[name].clone()
    changed.view(-1).view(torch.uint8)[-1] ^= 1  # one bit of the last value
    assert write(tmp_path / "b", values({name: changed})) != write(tmp_path / "a")


@pytest.mark.parametrize(
    "change", [{"norm_eps": 1e-6}, {"output_gate": "sigmoid"}, {"allow_neg_eigval": True}], ids=str
)
def test_the_spec_is_in_the_fingerprint(change: dict[str, Any], tmp_path: Path) -> None:
    assert write(tmp_path / "b", spec=SPEC.model_copy(update=change)) != write(tmp_path / "a")


# Interruptions and errors


def interrupt_at(name: str, error: BaseException) -> Hook:
    def hook(current: str) -> None:
        if current == name:
            raise error

    return hook


@pytest.fixture
def interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of which two shards were written when Ctrl-C came."""
    monkeypatch.setattr(writer, "SHARD_BYTES", SMALL_SHARD)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out", hook=interrupt_at("layers.1.v_proj.weight", KeyboardInterrupt()))
    return tmp_path / "out"


def test_an_interrupted_run_goes_on(interrupted: Path, tmp_path: Path) -> None:
    partial = tmp_path / ".out.partial"
    assert not interrupted.exists()
    finished = {name for file in partial.glob("*.safetensors") for name in load_file(file)}
    assert "embed.weight" in finished
    made: list[str] = []
    fingerprint = write(interrupted, hook=made.append)
    assert made == [name for name in SPEC.tensor_shapes() if name not in finished]
    assert "layers.1.v_proj.weight" in made
    assert fingerprint == write(tmp_path / "at once")
    assert contents(interrupted) == contents(tmp_path / "at once")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["at once", "out"]


@pytest.mark.parametrize("damage", ["changed", "cut", "gone"])
def test_a_finished_shard_that_was_damaged_is_made_again(damage: str, interrupted: Path, tmp_path: Path) -> None:
    shard = sorted((tmp_path / ".out.partial").glob("*.safetensors"))[0]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-5] if damage == "cut" else whole[:-5] + b"wrong")
    if damage == "gone":
        shard.unlink()
    write(interrupted)
    write(tmp_path / "at once")
    assert contents(interrupted) == contents(tmp_path / "at once")


def test_somebody_elses_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "letter").write_text("mine")
    with pytest.raises(CheckpointError, match="not of an interrupted run"):
        write(tmp_path / "out")
    assert (tmp_path / ".out.partial" / "letter").read_text() == "mine"


def test_half_a_shard_is_made_again(interrupted: Path, tmp_path: Path) -> None:
    partial = tmp_path / ".out.partial"
    leftovers = [file for file in partial.iterdir() if file.name.endswith(".tmp")]
    assert leftovers  # the shard that was being written
    (partial / "stray").write_bytes(b"x")
    write(interrupted)
    assert not any(name.endswith(".tmp") or name == "stray" for name in contents(interrupted))


@pytest.mark.parametrize(
    "different",
    [{"identity": {"source": "another"}}, {"spec": SPEC.model_copy(update={"norm_eps": 1e-6})}],
    ids=["source", "spec"],
)
def test_other_work_starts_over(different: dict[str, Any], interrupted: Path, tmp_path: Path) -> None:
    tensors = {name: tensor.flip(0) for name, tensor in values().items()}
    made: list[str] = []
    fingerprint = write(interrupted, tensors, made.append, **different)
    assert made == list(SPEC.tensor_shapes())
    assert fingerprint == write(tmp_path / "at once", tensors, **different)
    assert contents(interrupted) == contents(tmp_path / "at once")


def test_a_damaged_record_starts_over(interrupted: Path, tmp_path: Path) -> None:
    (tmp_path / ".out.partial" / "progress.json").write_text("{")
    made: list[str] = []
    write(interrupted, hook=made.append)
    assert made == list(SPEC.tensor_shapes())


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (CheckpointError("this tensor is bad"), "this tensor is bad"),
        (OSError(28, "No space left on device"), "out: cannot be written (No space left on device)."),
    ],
)
def test_an_error_removes_everything(error: Exception, raised: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        write(tmp_path / "out", hook=interrupt_at("layers.1.v_proj.weight", error))
    assert str(caught.value).endswith(raised)
    assert list(tmp_path.iterdir()) == []


def test_too_little_room_is_seen_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 100})())
    made: list[str] = []
    with pytest.raises(CheckpointError, match="0 MiB are free, 0 MiB are needed"):
        write(tmp_path / "out", hook=made.append)
    assert made == []


def test_two_writers_at_once(tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    with (
        FileLock(tmp_path / ".out.partial" / "lock"),
        pytest.raises(CheckpointError, match="another process is writing"),
    ):
        write(tmp_path / "out")
    assert (tmp_path / ".out.partial").is_dir()  # the other's work is left alone
    write(tmp_path / "out")


# Targets that exist


def test_nothing_is_overwritten_without_force(tmp_path: Path) -> None:
    write(tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"exists.*--force"):
        write(tmp_path / "out", {name: t.flip(0) for name, t in values().items()})
    assert contents(tmp_path / "out") == before


def test_force_replaces_our_own_folder(tmp_path: Path) -> None:
    write(tmp_path / "out", files={"LICENSE": b"old"})
    tensors = {name: t.flip(0) for name, t in values().items()}
    assert write(tmp_path / "out", tensors, force=True) == write(tmp_path / "new", tensors)
    assert contents(tmp_path / "out") == contents(tmp_path / "new")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["new", "out"]


def test_a_failed_replacement_leaves_the_old_folder(tmp_path: Path) -> None:
    write(tmp_path / "out")
    before = contents(tmp_path / "out")
    for error in (CheckpointError("bad"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            write(tmp_path / "out", hook=interrupt_at("ln_f.weight", error), force=True)
        assert contents(tmp_path / "out") == before


def other_folder(path: Path) -> None:
    path.mkdir()
    (path / "thesis.txt").write_text("years of work")


def other_model(path: Path) -> None:
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "llama"}')


def a_file(path: Path) -> None:
    path.write_text("years of work")


def a_link_to_ours(path: Path) -> None:
    write(path.parent / "real")
    path.symlink_to(path.parent / "real", target_is_directory=True)


def a_broken_link(path: Path) -> None:
    path.symlink_to(path.parent / "nowhere")


@pytest.mark.parametrize("make", [other_folder, other_model, a_file, a_link_to_ours, a_broken_link])
def test_force_replaces_nothing_else(make: Callable[[Path], None], tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(out)
    before = sorted(str(file) for file in tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match="not a folder that gdn2-edge made"):
        write(out, force=True)
    with pytest.raises(CheckpointError, match="exists"):
        write(out)
    assert sorted(str(file) for file in tmp_path.rglob("*")) == before


def test_force_fills_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", force=True)
    assert open_checkpoint(tmp_path / "out").spec == SPEC


# Single files


def test_a_file_is_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_atomically(path, b"old")

    def fail_halfway() -> None:
        with writer.open_atomically(path) as file:
            file.write(b"half of the n")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_halfway()
    assert contents(tmp_path) == {"x.json": b"old"}
    write_atomically(path, b"new")
    assert contents(tmp_path) == {"x.json": b"new"}
