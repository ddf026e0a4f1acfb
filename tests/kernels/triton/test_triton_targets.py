"""Every kernel of a decode step compiles for GPUs that are not here, and fits in their shared memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
OTHER_SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 64,
    "layer_types": ["gdn2", "sliding_attention"],
    "num_heads": 1,
    "num_v_heads": 2,
    "head_k_dim": 16,
    "head_v_dim": 32,
    "output_gate": "silu",
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "sliding_window": 4,
    "rope_theta": 10000.0,
}


def compile_for(*arguments: str, timeout: float) -> None:
    """In a process of its own: the interpreter, which other tests run kernels in, cannot compile."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu_targets.py", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("format", "targets"),
    [
        # int4 steps have int8 matrices too, and dot products of bytes without an instruction on AMD.
        ("int4", ["sm_86", "gfx1100"]),
        # fp8 by integers and by the hardware; the oldest NVIDIA cards and the newest.
        ("fp8", ["sm_80", "sm_120"]),
    ],
)
def test_a_step_compiles_and_fits(format: str, targets: list[str]) -> None:
    compile_for("--formats", format, "--targets", *targets, "--uses", "token", timeout=900)


def test_heads_whose_keys_and_values_differ_in_size(tmp_path: Path) -> None:
    """The interpreter lets a name have one shape in a branch and another in the other; the compiler does not."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps(OTHER_SIZES))
    compile_for("--config", str(config), "--formats", "int8", "--targets", "sm_90", timeout=900)


@pytest.mark.slow
def test_everything_compiles_and_fits() -> None:
    compile_for(timeout=7200)
