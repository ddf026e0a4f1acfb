"""docs/decode.png of the newest whole record of benchmarks/run.py: milliseconds a token, and each format's floor.

python benchmarks/decode_plot.py
"""

from __future__ import annotations

import json
import sys
from typing import Any

import matplotlib as mpl
from record import RESULTS, ROOT

CONFIG = "gdn2_1.3B"
COLOURS = {"bf16": "#2a6f97", "fp8": "#c1121f", "int8": "#588157", "int4": "#bc6c25"}
LEFT_OUT_MS = 5.0  # ways that take longer would leave the others no room


def plot(record: dict[str, Any]) -> None:
    """One bar a way and format, shortest last, with the floor as a line across it."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    taken = [(row, time) for row in record["rows"] if (time := milliseconds(row)) and time <= LEFT_OUT_MS]
    taken.sort(key=lambda pair: -pair[1])
    figure, axes = plt.subplots(figsize=(9, 0.36 * len(taken) + 1.2), layout="constrained")
    for y, (row, time) in enumerate(taken):
        floor = 1e3 * row["bytes"] / record["read_rate"]
        axes.barh(y, time, color=COLOURS[row["format"]], alpha=1.0 if row["name"] == "runtime" else 0.45)
        axes.plot([floor, floor], [y - 0.4, y + 0.4], color="black")
        axes.text(time, y, f" {time:.2f} ms, {floor / time:.0%} of the read rate", va="center", fontsize=8)
    names = [f"{'gdn2-edge' if row['name'] == 'runtime' else row['name']}, {row['format']}" for row, _ in taken]
    axes.set(yticks=range(len(taken)), yticklabels=names, xlabel="ms a token, one sequence; black: the floor")
    axes.set_xlim(0, 1.35 * taken[0][1])
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"{CONFIG} on {record['machine']['gpu']}, {record['date'][:10]}", fontsize=10)
    figure.savefig(ROOT / "docs" / "decode.png", dpi=100)


def milliseconds(row: dict[str, Any]) -> float | None:
    """Of one token of one sequence: through the API where it was timed so, else on the device; None for other rows."""
    if row["name"].startswith(("runtime, ", "start, ")):
        return None
    seen = row["milliseconds"]
    return float(seen["median"] if seen else row["graph_milliseconds"])


def main() -> int:
    """1 where there is no record with peers."""
    lines = (RESULTS / "decode.jsonl").read_text(encoding="utf-8").splitlines()
    for record in map(json.loads, reversed(lines)):
        if record["config"] == CONFIG and any(row["name"].startswith("torch.compile") for row in record["rows"]):
            plot(record)
            return 0
    print(f"There is no record of all parts for {CONFIG}.", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
