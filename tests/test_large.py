"""A training file of 1.45e9 parameters through convert and quantize: minutes and gigabytes, so `just test-slow`."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="RssAnon is read from /proc, which Linux alone has"),
]
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
LARGEST_TENSOR = 32_000 * 2304 * 4
LIMIT = 1.2 * LARGEST_TENSOR + 500e6


@pytest.fixture(scope="module")
def training_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "gdn2-model-ckpt.pth"
    command = [sys.executable, str(BENCHMARKS / "random_checkpoint.py"), str(path), "gdn2_1.3B"]
    subprocess.run(command, check=True)  # in a process of its own, whose memory goes with it
    assert path.stat().st_size > 1_450_096_416 * 4
    return path


def peak_anonymous_bytes(*arguments: str | Path) -> int:
    """Run the command; the largest RssAnon seen, looked at every 10 ms."""
    process = subprocess.Popen([sys.executable, "-m", "gdn2_edge", *map(str, arguments)], stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
        peak = max(peak, int(found[1]) * 1024 if found else 0)
        time.sleep(0.01)
    assert process.returncode == 0
    assert peak > 50e6  # it was seen at work
    return peak


def test_convert_needs_memory_for_one_tensor(training_file: Path) -> None:
    out = training_file.parent / "converted"
    assert peak_anonymous_bytes("convert", training_file, "--config", "gdn2_1.3B", "--out", out, "--quiet") <= LIMIT
    assert len(list(out.glob("*.safetensors"))) > 1


@pytest.mark.parametrize("format", ["int8", "fp8", "int4"])
def test_quantize_needs_memory_for_one_tensor(training_file: Path, format: str) -> None:
    out = training_file.parent / format
    assert peak_anonymous_bytes("quantize", training_file, "--format", format, "--out", out, "--quiet") <= LIMIT
