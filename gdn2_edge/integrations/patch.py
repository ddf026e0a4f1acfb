"""Applies a unified diff to a folder of text, exactly or not at all: no offsets, no fuzz, no half-patched folder."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from gdn2_edge.errors import BackendError

HUNK = re.compile(r"@@ -(\d+)(?:,\d+)? \+\d+(?:,\d+)? @@")


@dataclass
class FilePatch:
    """Of one file: `name` from the folder patched, and for each hunk the first line (from 0), old and new lines."""

    name: str
    is_new: bool
    hunks: list[tuple[int, list[str], list[str]]] = field(default_factory=list)


def read_patch(diff: str) -> list[FilePatch]:
    """The files of a `git diff`, which changes and adds text and does nothing else.

    Raises:
        BackendError: a file name leads out of the folder.
    """
    files: list[FilePatch] = []
    lines = iter(diff.split("\n"))
    for line in lines:
        if line.startswith("--- "):
            old, new = line[4:], next(lines)[4:]
            name = new.removeprefix("b/")
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise BackendError(f"the patch names {name}, which is not a file below the folder it is for")
            files.append(FilePatch(name, is_new=old == "/dev/null"))
        elif found := HUNK.match(line):
            files[-1].hunks.append((max(int(found[1]) - 1, 0), *_hunk(lines, line)))
    return files


def _hunk(lines: Iterator[str], header: str) -> tuple[list[str], list[str]]:
    left = [int(count or 1) for count in re.findall(r"[-+]\d+(?:,(\d+))?", header.split("@@")[1])]
    old: list[str] = []
    new: list[str] = []
    while len(old) < left[0] or len(new) < left[1]:
        line = next(lines)
        if line[:1] != "+":
            old.append(line[1:])
        if line[:1] != "-":
            new.append(line[1:])
    return old, new


def apply_patch(diff: str, folder: Path, what: str) -> None:
    """Change the files below `folder` as `diff` says.

    Args:
        what: names the folder in an error.
    Raises:
        BackendError: a line is not what the patch expects there; then no file is changed.
    """
    changed: dict[Path, str] = {}
    for file in read_patch(diff):
        path = folder / file.name
        try:
            lines = [] if file.is_new and not path.exists() else path.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError):
            raise BackendError(f"the patch does not fit {what}: it changes {file.name}, which is not there") from None
        if file.is_new:
            if lines:
                raise BackendError(f"the patch does not fit {what}: it adds {file.name}, which is there already")
            lines = [""]
        for start, old, new in reversed(file.hunks):
            if lines[start : start + len(old)] != old:
                raise BackendError(
                    f"the patch does not fit {what}: {file.name} has other lines at {start + 1} than it expects"
                )
            lines[start : start + len(old)] = new
        changed[path] = "\n".join(lines)
    for path, text in changed.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")
