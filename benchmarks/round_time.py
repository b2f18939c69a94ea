"""Measures a round of the app, its arithmetic alone and Flower's engine alone, in one run.

    python -m benchmarks.round_time --out round_time
    python -m benchmarks.round_time --dataset /absolute/path/fashion_mnist --scale --out round_time

- floor: the arithmetic of the app's rounds alone (floor.py);
- engine: the app in engine_app, whose handlers do nothing, under the same `flwr run`.
  `Grid.send_and_receive`, which asks for all replies at once every 100 ms, is measured beside it at 50 nodes;
- engine with the arithmetic: the same app, whose handlers train and test the app's model on as many random
  images in memory, and whose ServerApp averages the models and tests their mean. Unlike the sum of floor and
  engine, it has the phases of a round, and the engine's threads compete with the arithmetic for the cores;
- engine with the imports: the same app, which only imports what the app imports, and creates one optimizer. It
  gives the part of the start-up that is spent on imports;
- app: the real `flwr run`, the median of the rounds after the first, without stragglers; and once
  with the default ones.

Floor, app and engine take turns, so that other work on the machine affects all of them.

`--scale` adds 50 to 10,000 nodes, of which 50 train and up to 200 are asked, and a model of 25 MB.
OUT.json is written after every step, OUT.png at the end.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.floor import WORKERS, Setting, measure_floor
from benchmarks.report import SCALE, TARGETS, Report
from benchmarks.simulation import LocalSuperLink
from benchmarks.watched import BIG, ENGINE_APP, Watched, big_app, watch
from deploy.cli import interrupted_by_signals
from pytorch_example_low_level import sources

STARTS = 5  # of app and engine each: start-up times vary by seconds
PHASES = ("train", "query", "evaluate")
MIB = 1024


def median_of(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    """Return the median of a figure of results.json over rounds."""
    return float(statistics.median(row[key] for row in rows))


def watch_engine(superlink: LocalSuperLink, nodes: int, pattern: str = "", **settings: Any) -> Watched:
    """Run the engine's app."""
    return watch(superlink, pattern, nodes=nodes, app=ENGINE_APP, **settings)


def measure(superlink: LocalSuperLink, report: Report, rounds: int) -> None:
    """Measure a round and the start-up with 50 nodes."""
    setting = Setting(50, 10, 50, report.dataset, "dirichlet")
    settings: dict[str, Any] = {"nodes": 50} | setting.run_config()
    quick: dict[str, Any] = {"query_max_delay": 0.0, "query_timeout": 30.0} | settings
    floor: list[float] = []
    engine: dict[str, list[float]] = {"engine": [], "engine with the arithmetic": []}
    app: list[dict[str, Any]] = []
    for turn in (1, 2):
        report.step(f"floor, app and engine with 50 nodes ({turn} of 2)")
        floor += measure_floor(setting, rounds)
        watched = watch(superlink, num_server_rounds=rounds, **quick)
        app += watched.run.results[2:]  # row 0 is the initial model; in round 1 the workers load data
        for name, work in zip(engine, (setting.messages(), setting.arithmetic()), strict=True):
            engine[name] += watch_engine(superlink, 50, rounds=rounds, **work).engine("round")[1:]
    report.step("engine by send_and_receive")
    naive = watch_engine(superlink, 50, rounds=rounds, send_and_receive=True, **setting.messages())
    engine["engine by send_and_receive"] = naive.engine("round")[1:]
    report.step("app with the default stragglers")
    stragglers = watch(superlink, num_server_rounds=rounds, **settings).run.results[2:]

    of_round = {name: statistics.median(seconds) for name, seconds in ({"floor": floor} | engine).items()}
    of_round["app"] = median_of(app, "seconds_total") - median_of(app, "seconds_nodes")
    figures = {f"{name}, s per round": seconds for name, seconds in of_round.items()}
    figures |= {f"app, s in {phase.upper()}": median_of(app, f"seconds_{phase}") for phase in PHASES}
    figures["app, s in the central evaluation"] = median_of(app, "seconds_central")
    figures["app with stragglers, s per round"] = median_of(stragglers, "seconds_total")
    figures["app / floor, a round"] = of_round["app"] / of_round["floor"]
    figures["app / (floor + engine), a round"] = of_round["app"] / (of_round["floor"] + of_round["engine"])
    with_arithmetic = of_round["engine with the arithmetic"]
    figures["app / engine with the arithmetic, a round"] = of_round["app"] / with_arithmetic
    figures["server, peak MiB"] = watched.server_peak / MIB
    figures["worker, peak MiB"] = watched.worker_peak / MIB

    report.step(f"start-up of app and engine, {STARTS} times each")
    starts: dict[str, list[float]] = {"app": [], "engine": [], "engine with the imports": []}
    one = quick | {"fraction_clients_train": 0.001, "num_server_rounds": 1}
    few = {"trained": 1, "asked": 1, "evaluated": 1, "rounds": 1}
    for _ in range(STARTS):
        first = r"Received 1/1 results \(TRAIN\)"
        starts["app"].append(watch(superlink, first, **one).seconds_to[first])
        first = "ENGINE train"
        for name in ("engine", "engine with the imports"):
            watched = watch_engine(superlink, 50, first, imports=name != "engine", **few)
            starts[name].append(watched.seconds_to[first])
    medians = {name: statistics.median(seconds) for name, seconds in starts.items()}
    figures |= {f"{name}, s to the first TRAIN reply": seconds for name, seconds in medians.items()}
    figures["start-up to the first TRAIN reply, over the engine's, s"] = medians["app"] - medians["engine"]
    report.add({f"50 nodes: {name}": value for name, value in figures.items()})


def measure_scale(superlink: LocalSuperLink, report: Report, rounds: int) -> None:
    """Measure a round of app, engine and floor with more and more nodes."""
    for nodes, asked in SCALE:
        setting = Setting(nodes, 50, asked, report.dataset)
        report.step(f"{setting}: app, engine and floor")
        row = measure_setting(superlink, setting, rounds)
        busy = watch_engine(superlink, nodes, rounds=rounds, **setting.arithmetic())
        row["busy_round"] = statistics.median(busy.engine("round")[1:])
        row["busy_ratio"] = row["app_round"] / row["busy_round"]
        report.scale.append(row)
        figures = {
            f"{setting}: app, s per round": row["app_round"],
            f"{setting}: app / engine with the arithmetic, a round": row["busy_ratio"],
            f"{setting}: app, s from nodes listed to row written, first round": row["app_first"],
        }
        report.add({name: value for name, value in figures.items() if name in TARGETS})
        if nodes == 10_000:
            app, engine = more_memory(report, row)
            report.add({"server, 10,000 nodes against 50, MiB more": app})
            report.add({"server, 10,000 nodes against 50, MiB more, beyond the engine's own": app - engine})


def measure_big(superlink: LocalSuperLink, folder: Path, report: Report, rounds: int) -> None:
    """Measure a round with a model of 25 MB."""
    report.step("model of 25 MB: app, engine and floor")
    setting = Setting(500, 50, 50, report.dataset, width=BIG)
    row = measure_setting(superlink, setting, rounds, {"app": big_app(folder)}, {"parameters": (512 + 11) * BIG})
    busy = watch_engine(superlink, 500, rounds=rounds, width=BIG, **setting.arithmetic()).engine("round")
    app, engine = more_memory(report, row)
    figures = {
        "app, s per round": row["app_round"],
        "engine with the arithmetic, s per round": statistics.median(busy[1:]),
        "app / engine with the arithmetic, a round": row["app_round"] / statistics.median(busy[1:]),
        "engine, s per round": row["engine_round"],
        "floor, s per round": row["floor"],
        "app / (floor + engine), a round": row["ratio"],
        "app, s in TRAIN": row["app_train"],
        "app, server, MiB more than with the small model": app,
        "engine, server, MiB more than with the small model": engine,
    }
    report.add({f"25 MB, 50 of 500 nodes train: {name}": value for name, value in figures.items()})


def more_memory(report: Report, row: Mapping[str, Any]) -> list[float]:
    """Return how many MiB more the servers of app and engine took than with 50 nodes."""
    return [row[f"{who}_server_peak_mib"] - report.scale[0][f"{who}_server_peak_mib"] for who in ("app", "engine")]


def measure_setting(
    superlink: LocalSuperLink,
    setting: Setting,
    rounds: int,
    app: Mapping[str, Any] | None = None,
    engine: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Run app, engine and floor in one setting; return their medians over the rounds after the first."""
    quick = {"query_max_delay": 0.0, "query_timeout": 300.0} | setting.run_config() | dict(app or {})
    real = watch(superlink, nodes=setting.nodes, num_server_rounds=rounds, **quick)
    alone = watch_engine(superlink, setting.nodes, rounds=rounds, **setting.messages(), **(engine or {}))
    # Without the pause in which the nodes are counted again, which the engine's rounds do not include either.
    seconds = [row["seconds_total"] - row["seconds_nodes"] for row in real.run.results[1:]]  # row 0: the initial model
    figures = asdict(setting) | {
        "app_first": seconds[0],
        "app_round": statistics.median(seconds[1:]),
        "engine_first": alone.engine("round")[0],
        "engine_round": statistics.median(alone.engine("round")[1:]),
        "floor": statistics.median(measure_floor(setting, rounds)),
        "app_server_peak_mib": real.server_peak / MIB,
        "engine_server_peak_mib": alone.server_peak / MIB,
    }
    figures |= {f"app_{phase}": median_of(real.run.results[2:], f"seconds_{phase}") for phase in PHASES}
    return figures | {"ratio": figures["app_round"] / (figures["floor"] + figures["engine_round"])}


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
        print(f"\nSeconds of a round:\n\n{report.scale_table()}\n\n{report.law()}")
        if args.out:
            report.plot(args.out.with_suffix(".png"))


if __name__ == "__main__":
    with interrupted_by_signals():  # so that no process is left behind
        main()
