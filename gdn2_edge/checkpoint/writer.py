"""Writing a checkpoint folder tensor by tensor: resumable, never half-written, never over something else.

The folder is made beside its target as ``.NAME.partial`` and renamed when it is whole. An interrupted run leaves it
there, with a digest of every finished tensor, and the same command checks them and goes on; a failed run removes it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gdn2_edge.checkpoint.files import DTYPES, INDEX_NAME, TensorInfo, read_json
from gdn2_edge.errors import CheckpointError, Gdn2EdgeError
from gdn2_edge.spec import MODEL_TYPE, ModelSpec

SHARD_BYTES = 1 << 30
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Job:
    """One canonical tensor to be written: what it will be stored as, and how to make it."""

    name: str
    stored: dict[str, TensorInfo]
    make: Callable[[], dict[str, Tensor]]

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.stored.values())


def write_checkpoint(
    out: Path,
    spec: ModelSpec,
    jobs: Sequence[Job],
    *,
    identity: dict[str, Any],
    config: dict[str, Any],
    files: dict[str, bytes],
    notes: dict[str, Any] | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> str:
    """Write `out` and return the model's fingerprint.

    Args:
        jobs: every tensor of the spec, in order; each is made, written and dropped before the next.
        identity: what the work is, as JSON; an interrupted run is only continued by the same work.
        config: what config.json says beside the spec's fields.
        files: further files of the folder by name.
        notes: what the jobs learn, as JSON; an interrupted run's notes are there again when it goes on.
        progress: called with (bytes done, bytes in all, tensor name).
    Raises:
        CheckpointError: `out` exists and `force` is false, another process writes it, the disk is full, ...
    """
    check_target(out, force)
    partial = out.parent / f".{out.name}.partial"
    if partial.is_symlink():
        raise CheckpointError(f"{partial} is a link, expected a folder of an interrupted run. Remove it.")
    left = [file.name for file in partial.iterdir()] if partial.is_dir() else []
    if left and not any(name in ("lock", "progress.json") or name.endswith(".tmp") for name in left):
        raise CheckpointError(f"{partial} is not of an interrupted run of this program. Remove it or move it away.")
    made = [folder for folder in partial.parents if not folder.exists()]
    total = sum(job.nbytes for job in jobs)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with FileLock(partial / "lock", timeout=0):
            notes = {} if notes is None else notes
            work = {"spec": spec.to_json(), "format": 1, "shard_bytes": SHARD_BYTES, **identity}
            done = _resume_point(partial, work, notes)
            check_room(partial, total - done.nbytes(partial), out)
            shards = _plan_shards(jobs)
            _write_shards(partial, shards, done, total, progress)
            digest = _fingerprint(spec, done.digests)
            described = {"model_type": MODEL_TYPE, **spec.to_json(), **config, "fingerprint": digest}
            _write_extras(partial, shards, {**files, "config.json": _json(described)})
        (partial / "lock").unlink(missing_ok=True)
        (partial / "progress.json").unlink(missing_ok=True)
        _move_into_place(partial, out)
    except Timeout:
        raise CheckpointError(f"{out}: another process is writing it.") from None
    except KeyboardInterrupt:
        raise
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError):
            raise CheckpointError(f"{out}: cannot be written ({error.strerror or error}).") from None
        raise
    return digest


def check_room(folder: Path, needed: int, out: Path) -> None:
    """Raise CheckpointError if `folder`, which becomes `out`, cannot take so many bytes."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(f"{out.parent}: {free >> 20} MiB are free, {needed >> 20} MiB are needed.")


def check_target(out: Path, force: bool) -> None:
    """Raise CheckpointError if `out` is there already and must not be replaced."""
    if not out.exists() and not out.is_symlink():
        return
    if not force:
        raise CheckpointError(f"{out} exists. Choose another --out, or give --force to replace it.")
    if not _is_ours(out):
        raise CheckpointError(f"{out} is not a folder that gdn2-edge made, so --force does not replace it.")


def _is_ours(folder: Path) -> bool:
    if not folder.is_dir() or folder.is_symlink():
        return False
    with contextlib.suppress(Gdn2EdgeError):
        return read_json(folder / "config.json").get("model_type") == MODEL_TYPE
    return not any(folder.iterdir())


class _Done:
    """What is finished, by this run or an earlier one of the same work: shards, digests of tensors, the jobs' notes."""

    def __init__(self, path: Path, identity: dict[str, Any], notes: dict[str, Any]) -> None:
        self.path, self.identity, self.notes = path, identity, notes
        self.shards: list[str] = []
        self.digests: dict[str, str] = {}

    def nbytes(self, folder: Path) -> int:
        return sum((folder / shard).stat().st_size for shard in self.shards)

    def save(self) -> None:
        names = ("identity", "shards", "digests", "notes")
        write_atomically(self.path, _json({name: getattr(self, name) for name in names}))


def _resume_point(partial: Path, identity: dict[str, Any], notes: dict[str, Any]) -> _Done:
    done = _Done(partial / "progress.json", json.loads(json.dumps(identity)), notes)
    with contextlib.suppress(Gdn2EdgeError, KeyError, TypeError, ValueError):  # damaged: the work begins anew
        earlier = read_json(done.path)
        if earlier.get("identity") == done.identity:
            notes.update(earlier["notes"])
            done.digests = dict(earlier["digests"])
            done.shards = [shard for shard in earlier["shards"] if _is_intact(partial / shard, done.digests)]
    for file in partial.iterdir():
        if file.name not in {*done.shards, "lock", "progress.json"}:
            file.unlink()
    return done


def _is_intact(shard: Path, digests: dict[str, str]) -> bool:
    """Whether every tensor of a finished shard is still what was written."""
    try:
        with safe_open(shard, framework="pt") as file:
            return all(
                hashlib.sha256(_raw(file.get_tensor(name))).hexdigest() == digests.get(name) for name in file.keys()
            )
    except (SafetensorError, OSError):
        return False


def _plan_shards(jobs: Sequence[Job]) -> dict[str, list[Job]]:
    groups: list[list[Job]] = [[]]
    for job in jobs:
        if groups[-1] and sum(j.nbytes for j in groups[-1]) + job.nbytes > SHARD_BYTES:
            groups.append([])
        groups[-1].append(job)
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def _write_shards(
    partial: Path, shards: dict[str, list[Job]], done: _Done, total: int, progress: Progress | None
) -> None:
    written = 0
    for shard, jobs in shards.items():
        if shard in done.shards:
            written += sum(job.nbytes for job in jobs)
            continue
        temporary = partial / f"{shard}.tmp"
        with temporary.open("wb") as file:
            offsets = _write_header(file, jobs)
            for job in jobs:
                if progress:
                    progress(written, total, job.name)
                tensors = job.make()
                for name, info in job.stored.items():
                    data = _bytes(name, tensors[name], info)
                    file.seek(offsets[name])
                    file.write(data)
                    done.digests[name] = hashlib.sha256(data).hexdigest()
                written += job.nbytes
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(partial / shard)
        done.shards.append(shard)
        done.save()
    if progress:
        progress(total, total, "")


def _write_header(file: Any, jobs: Sequence[Job]) -> dict[str, int]:
    """Write the safetensors header; returns where in the file each tensor's bytes begin.

    The widest dtypes come first, so that every tensor is aligned and can be mapped.
    """
    stored = {name: info for job in jobs for name, info in job.stored.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets, end = {}, 0
    for name, info in sorted(stored.items(), key=lambda item: -item[1].dtype.itemsize):
        header[name] = {
            "dtype": _DTYPE_NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [end, end + info.nbytes],
        }
        offsets[name] = end
        end += info.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    return {name: 8 + len(text) + offset for name, offset in offsets.items()}


def _bytes(name: str, tensor: Tensor, info: TensorInfo) -> memoryview:
    if tensor.dtype != info.dtype or tuple(tensor.shape) != info.shape:
        raise CheckpointError(f"{name} came out as {tuple(tensor.shape)} {tensor.dtype}, planned was {info}.")
    return _raw(tensor)


def _raw(tensor: Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _fingerprint(spec: ModelSpec, digests: dict[str, str]) -> str:
    """sha256 over the spec and the bytes of every stored tensor, in the order of their names."""
    fields = json.dumps(spec.to_json(), sort_keys=True)
    lines = [fields, *(f"{name} {digest}" for name, digest in sorted(digests.items()))]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _write_extras(partial: Path, shards: dict[str, list[Job]], files: dict[str, bytes]) -> None:
    if len(shards) > 1:
        weight_map = {name: shard for shard, jobs in shards.items() for job in jobs for name in job.stored}
        total = sum(job.nbytes for jobs in shards.values() for job in jobs)
        files = {**files, INDEX_NAME: _json({"metadata": {"total_size": total}, "weight_map": weight_map})}
    for name, content in files.items():
        write_atomically(partial / name, content)


def _move_into_place(partial: Path, out: Path) -> None:
    if out.exists():
        old = out.parent / f".{out.name}.old"
        shutil.rmtree(old, ignore_errors=True)
        out.replace(old)
        try:
            partial.replace(out)
        except OSError:
            old.replace(out)
            raise
        shutil.rmtree(old, ignore_errors=True)
    else:
        partial.replace(out)


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is either the old one or the whole new one.

    Raises:
        OSError: as the system gave it; the temporary file is gone.
    """
    with open_atomically(path) as file:
        file.write(content)


@contextlib.contextmanager
def open_atomically(path: Path) -> Iterator[Any]:
    """A binary file to write that takes the place of `path` when the block ends well."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Where to write a file that becomes `path` when the block ends well. If it does not, nothing is left.

    Raises:
        CheckpointError: `path` exists, or cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    made = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        if path.exists() or path.is_symlink():
            raise CheckpointError(f"{path} exists. Choose another --out.")
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
            for folder in made:
                folder.rmdir()
        if isinstance(error, OSError):
            raise CheckpointError(f"{path}: cannot be written ({error.strerror or error}).") from None
        raise
