"""What every benchmark writes down: the machine, the versions, the commit, and percentiles of its samples."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from gdn2_edge.bench.machine import cpu_name

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def machine() -> dict[str, Any]:
    """The processor by name, the cores this process may use, torch's threads, the operating system, the GPU if any."""
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        **gpu,
    }


def versions() -> dict[str, str]:
    """Of Python, torch and, where it is installed, triton."""
    try:
        triton = {"triton": importlib.metadata.version("triton")}
    except importlib.metadata.PackageNotFoundError:
        triton = {}
    return {"python": platform.python_version(), "torch": str(torch.__version__), **triton}


def commit() -> str | None:
    """The checked-out commit, with "+changes" if files differ; None outside git or before a first commit."""
    try:
        head = _git("rev-parse", "--verify", "HEAD")
        return head + ("+changes" if _git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def summary(samples: Sequence[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile of at least two samples, in the samples' unit."""
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return {"median": statistics.median(samples), "p20": fifths[0], "p80": fifths[3]}


def append(name: str, record: Mapping[str, Any]) -> Path:
    """The file results/{name}.jsonl after one more line: when, where, by which command, then the record."""
    facts = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
        "command": _command(),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.jsonl"
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**facts, **record}) + "\n")
    return path


def _command() -> str:
    """This run's command line from the root of the repository, without the machine's paths."""
    script = Path(sys.argv[0]).resolve()
    shown = script.relative_to(ROOT).as_posix() if script.is_relative_to(ROOT) else script.name
    return shlex.join(["python", shown, *sys.argv[1:]])


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()
