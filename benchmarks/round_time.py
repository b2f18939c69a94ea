"""Measures a round of the app, its arithmetic alone and Flower's engine alone, in one run.

    python -m benchmarks.round_time --out round_time
    python -m benchmarks.round_time --dataset /absolute/path/fashion_mnist --scale --out round_time

- floor: the arithmetic of the app's rounds alone (floor.py);
- engine: the app in engine_app, whose handlers do nothing, under the same `flwr run`.
  `Grid.send_and_receive`, which asks for all replies at once every 100 ms, is measured beside it at 50 nodes;
- engine with the arithmetic, or with the imports: the same app, whose handlers do the app's arithmetic on random
  images in memory, with the phases of a round, or only import what the app imports;
- app: the real `flwr run`, without stragglers; and once with the default ones.

Floor, app and engine take turns, so that other work on the machine affects all of them.

`--scale` adds 50 to 10,000 nodes, of which 50 train and up to 200 are asked, and a model of 25 MB.
OUT.json is written after every step, OUT.png at the end.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.floor import WORKERS, Setting, measure_floor
from benchmarks.simulation import LocalSuperLink
from benchmarks.watched import BIG, ENGINE_APP, PER_UNIT, Watched, big_app, watch
from deploy.cli import interrupt_on_signals
from pytorch_example_low_level import sources
from pytorch_example_low_level.utils import replace_json

STARTS = 5  # of app and engine each: start-up times vary by seconds
PROMPT: dict[str, Any] = {"query_max_delay": 0.0, "query_timeout": 300.0}  # nodes without delays
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

PHASES = ("train", "query", "evaluate")
# The table with more and more nodes: its columns, and the figures of a round in them.
COLUMNS = {
    "app": "app, s per round",
    **{phase.upper(): f"app, s in {phase.upper()}" for phase in PHASES},
    "engine": "engine, s per round",
    "floor": "floor, s per round",
    "app / (floor + engine)": "app / (floor + engine), a round",
    "engine with the arithmetic": "engine with the arithmetic, s per round",
    "app / engine with the arithmetic": "app / engine with the arithmetic, a round",
    "first round, app": "app, s from nodes listed to row written, first round",
    "first round, engine": "engine, s in the first round",
}
FOR_SCALE = ("engine's server, peak MiB", COLUMNS["first round, app"], COLUMNS["first round, engine"])


@dataclass
class Report:
    """All that was measured; written after each step."""

    out: Path | None
    dataset: str
    figures: dict[str, float] = field(default_factory=dict)
    scale: list[dict[str, float]] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def step(self, what: str) -> None:
        """Print what is measured next."""
        print(f"[{time.monotonic() - self.started:.0f} s gone] {what} ...", flush=True)

    def add(self, prefix: str, figures: Mapping[str, float]) -> None:
        """Add figures, and write OUT.json."""
        self.figures |= {prefix + name: value for name, value in figures.items()}
        if self.out:
            machine = {"cores": WORKERS, "machine": platform.machine(), "torch": torch.__version__}
            content = machine | {"dataset": self.dataset, "figures": self.figures, "scale": self.scale}
            self.out.parent.mkdir(parents=True, exist_ok=True)
            replace_json(self.out.with_suffix(".json"), content)

    def table(self) -> str:
        """Return the figures in Markdown, those with a target first."""
        lines = ["| figure | target | |", "| --- | --- | --- |"]
        for key in sorted(self.figures, key=lambda key: key not in TARGETS):
            target = f"≤ {TARGETS[key]:g}" if key in TARGETS else ""
            lines.append(f"| {key} | {target} | {self.figures[key]:.2f} |")
        return "\n".join(lines)

    def more_memory(self, row: Mapping[str, float]) -> tuple[float, float]:
        """Return how many MiB more the servers of app and engine took than with 50 nodes."""
        app, engine = "server, peak MiB", "engine's server, peak MiB"
        return row[app] - self.scale[0][app], row[engine] - self.scale[0][engine]

    def scale_table(self) -> str:
        """Return a line for each number of nodes in Markdown: seconds of a round, phase by phase."""
        lines = [f"| nodes | asked | {' | '.join(COLUMNS)} |", f"|{' --- |' * (len(COLUMNS) + 2)}"]
        for row in self.scale:
            cells = " | ".join(f"{row[figure]:.2f}" for figure in COLUMNS.values())
            lines.append(f"| {row['nodes']:,} | {row['asked']} | {cells} |")
        return "\n".join(lines)

    def plot(self, path: Path) -> None:
        """Draw the seconds of a round over the nodes, phase by phase."""
        from matplotlib.figure import Figure

        rows = {row["nodes"]: row for row in self.scale}.values()  # of two numbers asked, the larger
        nodes = [row["nodes"] for row in rows]
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.subplots()
        for name, style, colour in (
            ("app", "o-", "#0072B2"),
            ("TRAIN", "s:", "#E69F00"),
            ("QUERY", "^:", "#009E73"),
            ("EVALUATE", "v:", "#CC79A7"),
            ("engine", "x--", "#D55E00"),
        ):
            label = "engine with handlers that do nothing" if name == "engine" else name
            axes.plot(nodes, [row[COLUMNS[name]] for row in rows], style, color=colour, label=label)
        title = "A round after the first: 50 nodes train, at most 200 are asked"
        axes.set(xscale="log", yscale="log", xlabel="nodes", ylabel="seconds", title=title)
        axes.set_xticks(nodes, [f"{count:,}" for count in nodes])
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize="small")
        figure.savefig(path, dpi=110)


def watch_app(superlink: LocalSuperLink, setting: Setting, pattern: str = "", **settings: Any) -> Watched:
    """Run the app."""
    return watch(superlink, pattern, nodes=setting.nodes, **(setting.run_config() | settings))


def watch_engine(superlink: LocalSuperLink, setting: Setting, pattern: str = "", **settings: Any) -> Watched:
    """Run the engine's app."""
    return watch(superlink, pattern, nodes=setting.nodes, app=ENGINE_APP, **(setting.messages() | settings))


def of_round(row: dict[str, Any]) -> float:
    """Return the seconds of a round, without the pause in which the nodes are counted again: the engine has none."""
    return float(row["seconds_total"] - row["seconds_nodes"])


def measure_rounds(
    superlink: LocalSuperLink, report: Report, setting: Setting, rounds: int, turns: int = 1, big: Path | None = None
) -> dict[str, float]:
    """Let floor, app and engine take turns; return the medians over their rounds after the first.

    `big` is the app with a model of 25 MB.
    """
    app: dict[str, Any] = {"app": big} if big else {}
    engine: dict[str, Any] = {"parameters": PER_UNIT * BIG} if big else {}
    floor, alone, busy = list[float](), list[float](), list[float]()
    rows: list[dict[str, Any]] = []
    for turn in range(1, turns + 1):
        report.step(f"{setting}: floor, app and engine ({turn} of {turns})")
        floor += measure_floor(setting, rounds)
        real = watch_app(superlink, setting, num_server_rounds=rounds, **PROMPT, **app)
        rows += real.run.results[2:]  # row 0 is the initial model; in round 1 the workers load data
        bare = watch_engine(superlink, setting, rounds=rounds, **engine)
        alone += bare.engine_rounds()[1:]
        busy += watch_engine(superlink, setting, rounds=rounds, **setting.arithmetic()).engine_rounds()[1:]
    seconds = {"floor": median(floor), "engine": median(alone), "app": median(map(of_round, rows))}
    seconds["engine with the arithmetic"] = median(busy)
    return {
        **{f"{name}, s per round": value for name, value in seconds.items()},
        **{f"app, s in {phase.upper()}": median(row[f"seconds_{phase}"] for row in rows) for phase in PHASES},
        "app, s in the central evaluation": median(row["seconds_central"] for row in rows),
        "app / floor, a round": seconds["app"] / seconds["floor"],
        "app / (floor + engine), a round": seconds["app"] / (seconds["floor"] + seconds["engine"]),
        "app / engine with the arithmetic, a round": seconds["app"] / seconds["engine with the arithmetic"],
        "server, peak MiB": real.server,
        "worker, peak MiB": real.worker,
        "engine's server, peak MiB": bare.server,
        "app, s from nodes listed to row written, first round": of_round(real.run.results[1]),
        "engine, s in the first round": bare.engine_rounds()[0],
    }


def measure(superlink: LocalSuperLink, report: Report, rounds: int) -> None:
    """Measure a round and the start-up with 50 nodes."""
    setting = Setting(50, 10, 50, report.dataset, "dirichlet")
    row = measure_rounds(superlink, report, setting, rounds, turns=2)
    figures = {name: value for name, value in row.items() if name not in FOR_SCALE}
    report.step("engine by send_and_receive")
    naive = watch_engine(superlink, setting, rounds=rounds, send_and_receive=True).engine_rounds()[1:]
    figures["engine by send_and_receive, s per round"] = median(naive)
    report.step("app with the default stragglers")
    stragglers = watch_app(superlink, setting, num_server_rounds=rounds).run.results[2:]
    figures["app with stragglers, s per round"] = median(each["seconds_total"] for each in stragglers)
    report.step(f"start-up of app and engine, {STARTS} times each")
    starts = measure_starts(superlink, setting)
    figures |= {f"{name}, s to the first TRAIN reply": seconds for name, seconds in starts.items()}
    figures["start-up to the first TRAIN reply, over the engine's, s"] = starts["app"] - starts["engine"]
    report.add("50 nodes: ", figures)


def measure_starts(superlink: LocalSuperLink, setting: Setting) -> dict[str, float]:
    """Return the median seconds until app and engine have a TRAIN reply."""
    seconds: dict[str, list[float]] = {"app": [], "engine": [], "engine with the imports": []}
    one = PROMPT | {"fraction_clients_train": 0.001, "num_server_rounds": 1}
    few = {"trained": 1, "asked": 1, "evaluated": 1, "rounds": 1}
    for _ in range(STARTS):
        seconds["app"].append(watch_app(superlink, setting, r"Received 1/1 results \(TRAIN\)", **one).seconds_to)
        for name in ("engine", "engine with the imports"):
            watched = watch_engine(superlink, setting, "ENGINE train", imports=name != "engine", **few)
            seconds[name].append(watched.seconds_to)
    return {name: median(values) for name, values in seconds.items()}


def measure_scale(superlink: LocalSuperLink, report: Report, rounds: int) -> None:
    """Measure a round of app, engine and floor with more and more nodes."""
    for nodes, asked in SCALE:
        setting = Setting(nodes, 50, asked, report.dataset)
        row = measure_rounds(superlink, report, setting, rounds)
        report.scale.append({"nodes": nodes, "asked": asked} | row)
        report.add(f"{setting}: ", {name: row[name] for name in row if f"{setting}: {name}" in TARGETS})
    app, engine = report.more_memory(row)
    more = {"MiB more": app, "MiB more, beyond the engine's own": app - engine}
    report.add("server, 10,000 nodes against 50, ", more)


def measure_big(superlink: LocalSuperLink, folder: Path, report: Report, rounds: int) -> None:
    """Measure a round with a model of 25 MB."""
    setting = Setting(500, 50, 50, report.dataset, width=BIG)
    row = measure_rounds(superlink, report, setting, rounds, big=big_app(folder))
    columns = ("app", "engine", "engine with the arithmetic", "floor", "app / (floor + engine)", "TRAIN")
    names = [COLUMNS[column] for column in (*columns, "app / engine with the arithmetic")]
    figures = {name: row[name] for name in names}
    for who, mib in zip(("app", "engine"), report.more_memory(row), strict=True):
        figures[f"{who}, server, MiB more than with the small model"] = mib
    report.add("25 MB, 50 of 500 nodes train: ", figures)


def main() -> None:
    """Parse the command line, measure, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default=sources.BUNDLED, help="as in the run configuration (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="rounds of each run (default: %(default)s)")
    parser.add_argument("--scale", action="store_true", help="also 50 to 10,000 nodes and a model of 25 MB")
    parser.add_argument("--scale-rounds", type=int, default=5, help="rounds of each of those (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="OUT.json and, with --scale, OUT.png are written")
    args = parser.parse_args()
    report = Report(args.out, args.dataset)
    with tempfile.TemporaryDirectory() as name, LocalSuperLink(Path(name) / "flower") as superlink:
        measure(superlink, report, args.rounds)
        if args.scale:
            measure_scale(superlink, report, args.scale_rounds)
            measure_big(superlink, Path(name) / "big-app", report, args.scale_rounds)
    print(f"\n{WORKERS} cores ({platform.machine()}), torch {torch.__version__}, {args.dataset}; medians\n")
    print(report.table())
    if args.scale:
        print(f"\nSeconds of a round:\n\n{report.scale_table()}")
        if args.out:
            report.plot(args.out.with_suffix(".png"))


if __name__ == "__main__":
    interrupt_on_signals()  # so that no process is left behind
    main()
