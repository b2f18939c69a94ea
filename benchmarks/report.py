"""The tables and the plot of benchmarks.round_time."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.floor import WORKERS

SCALE = ((50, 50), (200, 200), (1000, 100), (1000, 200), (5000, 200), (10_000, 200))  # nodes, asked; 50 train

# The most that a figure should be, on 2 cores; the others have no target.
TARGETS = {
    "50 nodes: app / (floor + engine), a round": 1.0,
    "50 nodes: start-up to the first TRAIN reply, over the engine's, s": 6.0,
    "1,000 nodes, 100 asked: app, s per round": 4.5,
    "1,000 nodes, 100 asked: app / engine with the arithmetic, a round": 1.25,
    "10,000 nodes, 200 asked: app, s per round": 14.0,
    "10,000 nodes, 200 asked: app / engine with the arithmetic, a round": 1.25,
    "10,000 nodes, 200 asked: app, s from nodes listed to row written, first round": 35.0,
    "server, 10,000 nodes against 50, MiB more, beyond the engine's own": 64.0,
}


@dataclass
class Report:
    """All that was measured; written after each step."""

    out: Path | None
    dataset: str
    figures: dict[str, float] = field(default_factory=dict)
    scale: list[dict[str, Any]] = field(default_factory=list)

    started: float = field(default_factory=time.monotonic)

    def step(self, what: str) -> None:
        """Print what is measured next."""
        print(f"[{time.monotonic() - self.started:.0f} s gone] {what} ...", flush=True)

    def add(self, figures: Mapping[str, float]) -> None:
        """Add figures, and write OUT.json."""
        self.figures |= figures
        if self.out:
            machine = {"cores": WORKERS, "machine": platform.machine(), "torch": torch.__version__}
            content = machine | {"dataset": self.dataset, "figures": self.figures, "scale": self.scale}
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.out.with_suffix(".json").write_text(json.dumps(content, indent=1))

    def table(self) -> str:
        """Return the figures in Markdown, those with a target first."""
        lines = ["| figure | target | |", "| --- | --- | --- |"]
        for key in sorted(self.figures, key=lambda key: key not in TARGETS):
            target = f"≤ {TARGETS[key]:g}" if key in TARGETS else ""
            lines.append(f"| {key} | {target} | {self.figures[key]:.2f} |")
        return "\n".join(lines)

    def scale_table(self) -> str:
        """Return a line for each number of nodes in Markdown: seconds of a round, phase by phase."""
        columns = {
            "app": "app_round", "TRAIN": "app_train", "QUERY": "app_query", "EVALUATE": "app_evaluate",
            "engine": "engine_round", "floor": "floor", "app / (floor + engine)": "ratio",
            "engine with the arithmetic": "busy_round", "app / engine with the arithmetic": "busy_ratio",
            "first round, app": "app_first", "first round, engine": "engine_first",
        }  # fmt: skip
        lines = [f"| nodes | asked | {' | '.join(columns)} |", f"|{' --- |' * (len(columns) + 2)}"]
        for row in self.scale:
            cells = " | ".join(f"{row[key]:.2f}" for key in columns.values())
            lines.append(f"| {row['nodes']:,} | {row['asked']} | {cells} |")
        return "\n".join(lines)

    def law(self) -> str:
        """Return the seconds of a round as a straight line over the nodes, where equally many were asked."""
        rows = [row for row in self.scale if row["asked"] == SCALE[-1][1]]
        nodes = np.array([row["nodes"] for row in rows])
        slope, start = np.polyfit(nodes, [row["app_round"] for row in rows], 1)
        engine_slope, engine_start = np.polyfit(nodes, [row["engine_round"] for row in rows], 1)
        return (
            f"A round takes {start:.1f} s plus {1000 * slope:.2f} s per 1,000 nodes, and the engine alone "
            f"{engine_start:.1f} s plus {1000 * engine_slope:.2f} s. With 100,000 nodes that would be "
            f"{start + 1e5 * slope:.0f} s, {engine_start + 1e5 * engine_slope:.0f} s of it the engine's."
        )

    def plot(self, path: Path) -> None:
        """Draw the seconds of a round over the nodes, phase by phase."""
        from matplotlib.figure import Figure

        rows = {row["nodes"]: row for row in self.scale}.values()  # of two numbers asked, the larger
        nodes = [row["nodes"] for row in rows]
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.subplots()
        for label, key, style, colour in (
            ("app", "app_round", "o-", "#0072B2"),
            ("TRAIN", "app_train", "s:", "#E69F00"),
            ("QUERY", "app_query", "^:", "#009E73"),
            ("EVALUATE", "app_evaluate", "v:", "#CC79A7"),
            ("engine with handlers that do nothing", "engine_round", "x--", "#D55E00"),
        ):
            axes.plot(nodes, [row[key] for row in rows], style, color=colour, label=label)
        title = "A round after the first: 50 nodes train, at most 200 are asked"
        axes.set(xscale="log", yscale="log", xlabel="nodes", ylabel="seconds", title=title)
        axes.set_xticks(nodes, [f"{count:,}" for count in nodes])
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize="small")
        figure.savefig(path, dpi=110)
