"""Compares settings over several seeds: a table, a plot, and which differences are within the spread over seeds.

    python -m sweep --seeds 2 --out rates --vary learning-rate=0.02 --vary learning-rate=0.05 --vary learning-rate=0.1

Each `--vary "key=value ..."` is one variant; without it, there is one with the defaults. `--run-config` and
`--nodes` are those of all runs. docs/sweeps.md has an example.

Each seed of a variant is a `flwr run`. With `--in-process`, ServerApp and nodes share one process instead, without
Flower's engine: the central figures are bit-identical. The nodes answer as soon as they are asked, so
set `query-max-delay=0.0` with it. `--jobs 2` does two runs at the same time; with `--in-process`, each
takes one core.

OUT.json is written after every run, and OUT-runs has the run directories. After an interruption, the tables show what
is there, and the same command continues: it does only the runs that OUT.json lacks. With `use-wandb=true`, the runs
are a group in W&B with the name of OUT. The tables and the plot show the last round and the curves, not the best round.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import re
import signal
import statistics
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, ThreadPoolExecutor, wait
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.simulation import LocalSuperLink
from deploy.cli import command_of, family, interrupted_by_signals
from pytorch_example_low_level import client_app, server_app
from pytorch_example_low_level.task import SCORE
from pytorch_example_low_level.utils import replace_json
from tests.grid import InProcessGrid, make_context, run_config

Rows = list[dict[str, Any]]  # a run's results.json
Runs = dict[str, dict[str, Rows]]  # variant -> seed, as text for JSON -> rows

COLUMNS = {
    "central": f"centralized_{SCORE}",
    "federated": f"federated_evaluate_{SCORE}",
    "worst node": f"federated_evaluate_{SCORE}_min",
}
PROGRESS_EVERY = 30  # seconds
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")  # Okabe and Ito: safe for the colour-blind
LINES = ("-", "--", ":", "-.", "-")


def main() -> None:
    """Parse the command line, do the runs, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0 (default: %(default)s)")
    parser.add_argument("--nodes", type=int, default=50, help="simulated nodes (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time (default: %(default)s)")
    parser.add_argument("--in-process", action="store_true", help="without Flower's engine: the same bits, sooner")
    parser.add_argument("--run-config", default="", help="as for `flwr run`")
    parser.add_argument("--vary", action="append", default=[], metavar="KEY=VALUE", help="one variant for each")
    parser.add_argument("--out", type=Path, required=True, help="OUT.json, OUT.png and OUT-runs are written")
    args = parser.parse_args()
    try:
        common = {"use-wandb": False} | parse_settings(args.run_config)
        variants = {name: common | parse_settings(name) for name in args.vary} or {"": common}
    except ValueError as error:
        parser.error(str(error))
    if set_here := {"seed", "output-dir"} & set().union(*variants.values()):
        parser.error(f"a sweep sets {', '.join(sorted(set_here))} itself; use --seeds and --out")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    out = args.out.with_name(f"{args.out.name}.json")
    runs = load_runs(out, args.nodes, variants)
    missing = [(name, seed) for seed in range(args.seeds) for name in variants if str(seed) not in runs[name]]
    os.environ["WANDB_RUN_GROUP"] = args.out.name  # the processes of the runs inherit it

    def done(name: str, seed: int, rows: Rows) -> None:
        runs[name][str(seed)] = rows
        replace_json(out, {"nodes": args.nodes, "settings": variants, "runs": runs})

    interrupted = False
    if missing:
        with runner(args, variants) as run:
            try:
                rounds = sum((run_config() | variants[name])["num-server-rounds"] for name, _ in missing)
                do_runs(missing, run, done, args.jobs, rounds, lambda: rounds_done(runs_folder(args.out)))
            except KeyboardInterrupt:
                interrupted = True
                for child in family(os.getpid())[1:]:
                    if "resource_tracker" not in command_of(child):  # Python's own, which ends by itself
                        child.kill()
    seeds = [str(seed) for seed in range(args.seeds)]
    wanted = {name: [rows[seed] for seed in seeds if seed in rows] for name, rows in runs.items()}
    show({name: results for name, results in wanted.items() if results}, args.out)
    if interrupted:
        there = sum(map(len, wanted.values()))
        sys.exit(f"Interrupted: {there} of {len(seeds) * len(variants)} runs are in {out}. The same command continues.")


def runs_folder(out: Path) -> Path:
    """Return the folder of the run directories."""
    return out.with_name(f"{out.name}-runs").absolute()


def rounds_done(outputs: Path) -> int:
    """Return the number of rounds that all runs have committed."""
    return sum(len(json.loads(path.read_text())) - 1 for path in outputs.glob("*/seed-*/*/*/results.json"))


@contextlib.contextmanager
def runner(args: argparse.Namespace, variants: Mapping[str, dict[str, Any]]) -> Iterator[Callable[[str, int], Rows]]:
    """Give a function that does the run of a variant and a seed, and returns the rows of its results.json."""
    outputs = runs_folder(args.out)

    def settings(name: str, seed: int) -> dict[str, Any]:
        number = list(variants).index(name)  # two names may differ only in what is replaced here
        readable = re.sub(r"[^\w.=-]+", "_", name or "default")
        folder = outputs / f"{number}_{readable}" / f"seed-{seed}"
        return variants[name] | {"seed": seed, "output-dir": str(folder)}

    if args.in_process:
        with ProcessPoolExecutor(args.jobs, get_context("spawn"), quiet_worker) as pool:
            yield lambda name, seed: pool.submit(run_in_process, args.nodes, settings(name, seed)).result()
        return

    def run(name: str, seed: int) -> Rows:
        finished = superlink.run(nodes=args.nodes, **settings(name, seed))
        if finished.status != "finished:completed":
            raise SystemExit(f"{name} seed {seed} ended with {finished.status}:\n{finished.log[-3000:]}")
        return finished.results

    with tempfile.TemporaryDirectory() as home, LocalSuperLink(Path(home)) as superlink:
        yield run


def show(runs: Mapping[str, Sequence[Rows]], out: Path) -> None:
    """Print the tables and write the plot."""
    if not runs:
        return
    seeds = max(map(len, runs.values()))
    print(f"\nThe last round, mean ± standard deviation and worst of {seeds} seeds\n\n{final_table(runs)}")
    if len(runs) > 1:
        print(differences(runs))
    for name, results in runs.items():
        print(f"\n{name or 'All rounds'}\n\n{table(results)}")
    plot(runs, out.with_name(f"{out.name}.png"))


def quiet_worker() -> None:
    """Prepare a process for runs: one thread, so that two share the cores, no log, and no end by Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.WARNING)


def run_in_process(nodes: int, settings: dict[str, Any]) -> Rows:
    """Do one run on the in-process Grid of the tests; return the rows of its results.json."""
    config = run_config() | settings
    server_app.main(InProcessGrid(client_app.app, config, nodes), make_context(config))
    latest = max(Path(config["output-dir"]).glob("*/*/results.json"))  # an earlier one was interrupted
    rows: Rows = json.loads(latest.read_text())
    return rows


def parse_settings(text: str) -> dict[str, Any]:
    """Return the settings in a text such as `a=1 b='x y'`, which `flwr run --run-config` takes. Raises ValueError."""
    pair = r"""([\w-]+)=('[^']*'|"[^"]*"|\S+)"""
    if not re.fullmatch(rf"\s*({pair}(\s+|$))*", text):
        raise ValueError(f"not settings such as \"a=1 b='x'\": {text}")
    return tomllib.loads("\n".join(f"{key} = {value}" for key, value in re.findall(pair, text)))


def load_runs(path: Path, nodes: int, variants: Mapping[str, dict[str, Any]]) -> Runs:
    """Return the runs of an earlier start. Raises SystemExit when they had other settings."""
    if not path.exists():
        return {name: {} for name in variants}
    earlier = json.loads(path.read_text())
    if (earlier["nodes"], earlier["settings"]) != (nodes, variants):
        raise SystemExit(f"{path} has runs with other settings ({earlier['nodes']} nodes, {earlier['settings']})")
    runs: Runs = earlier["runs"]
    return runs


def do_runs(
    missing: Sequence[tuple[str, int]],
    run: Callable[[str, int], Rows],
    done: Callable[[str, int, Rows], None],
    jobs: int,
    rounds: int,
    rounds_done: Callable[[], int],
) -> None:
    """Do the runs, `jobs` at the same time; print the progress and the time left, by the rounds of all runs."""
    print(f"{len(missing)} runs with {rounds} rounds to do, {jobs} at the same time ...", flush=True)
    started, before = time.monotonic(), rounds_done()  # those of interrupted runs are done again

    def progress() -> str:
        finished = rounds_done() - before
        pace = (time.monotonic() - started) / max(finished, 1)
        left = timedelta(seconds=round(pace * (rounds - finished))) if finished else "an unknown time"
        return f"{finished}/{rounds} rounds; about {left} left"

    executor = ThreadPoolExecutor(jobs)
    futures = {executor.submit(run, *which): which for which in missing}
    waiting, count = set(futures), 0
    try:
        while waiting:
            finished, waiting = wait(waiting, PROGRESS_EVERY, FIRST_COMPLETED)
            if not finished:
                print(f"... {progress()}", flush=True)
            for future in sorted(finished, key=lambda f: f.exception() is not None):  # keep those that went well
                count, (name, seed) = count + 1, futures[future]
                rows = future.result()
                done(name, seed, rows)
                figures = ", ".join(f"{what} {number(rows[-1][key])}" for what, key in COLUMNS.items())
                print(f"{count}/{len(missing)} {name or 'run'}, seed {seed}: {figures}; {progress()}", flush=True)
    finally:
        executor.shutdown(wait=False, cancel_futures=True)  # begin no other run, and do not wait for those at work


def number(value: float | None) -> str:
    """Return a score for a table."""
    return "–" if value is None else f"{value:.3f}"


def of_round(results: Sequence[Rows], server_round: int, key: str) -> list[float]:
    """Return a figure of a round (-1: the last one) for all seeds that have it. A run may have stopped early."""
    values = [run[server_round][key] for run in results if server_round < len(run)]
    return [value for value in values if value is not None]


def cells(results: Sequence[Rows], server_round: int) -> str:
    """Return mean ± standard deviation and worst of each figure of a round: columns in Markdown."""
    found = []
    for key in COLUMNS.values():
        values = of_round(results, server_round, key)
        found += [f"{statistics.mean(values):.3f} ± {statistics.pstdev(values):.3f}" if values else "–"]
        found += [number(min(values, default=None))]
    return " | ".join(found)


def header(first: str) -> list[str]:
    """Return the first two lines of a table in Markdown."""
    return [f"| {first} | {' | worst seed | '.join(COLUMNS)} | worst seed |", f"|{' --- |' * (2 * len(COLUMNS) + 1)}"]


def table(results: Sequence[Rows]) -> str:
    """Return a line for each round in Markdown."""
    lines = header("round")
    rounds = range(1, max(map(len, results)))
    lines += [f"| {server_round} | {cells(results, server_round)} |" for server_round in rounds]
    return "\n".join(lines)


def final_table(runs: Mapping[str, Sequence[Rows]]) -> str:
    """Return the last round of each variant in Markdown."""
    lines = header("settings")
    lines += [f"| {name or 'default'} | {cells(results, -1)} |" for name, results in runs.items()]
    return "\n".join(lines)


def differences(runs: Mapping[str, Sequence[Rows]]) -> str:
    """Return how far each variant is behind the best one, as a list in Markdown.

    A difference is within the spread over seeds if it is at most the sum of the two standard deviations.
    """
    found = {name: of_round(results, -1, COLUMNS["central"]) for name, results in runs.items()}
    scores = {name: values for name, values in found.items() if values}
    if not scores:
        return f"\nNo run has a central {SCORE}."
    mean = {name: statistics.mean(values) for name, values in scores.items()}
    best = max(mean, key=lambda name: mean[name])
    lines = [f"\nThe best is {best}. The others, in the central {SCORE}:\n"]
    for name, values in scores.items():
        if name != best:
            spread = statistics.pstdev(values) + statistics.pstdev(scores[best])
            where = "within" if mean[best] - mean[name] <= spread else "beyond"
            lines.append(f"- {name}: {mean[name] - mean[best]:.3f}, {where} the spread over seeds ({spread:.3f})")
    return "\n".join(lines)


def plot(runs: Mapping[str, Sequence[Rows]], path: Path) -> None:
    """Draw the mean over seeds with a band from the worst to the best: both accuracies, or the variants."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    names = ["central", "federated"] if len(runs) == 1 else ["central"]
    curves = [
        (name if len(runs) > 1 else what, results, COLUMNS[what]) for name, results in runs.items() for what in names
    ]
    for i, (label, results, key) in enumerate(curves):
        colour, line = COLOURS[i % len(COLOURS)], LINES[i % len(LINES)]
        rounds = range(1, max(map(len, results)))
        found = {r: values for r in rounds if (values := of_round(results, r, key))}
        lows, highs = [min(v) for v in found.values()], [max(v) for v in found.values()]
        means = [statistics.mean(v) for v in found.values()]
        axes.plot(list(found), means, line, color=colour, label=label, linewidth=2)
        axes.fill_between(list(found), lows, highs, color=colour, alpha=0.15)
    seeds = max(map(len, runs.values()))
    title = f"Mean over {seeds} seeds; the band goes from the worst to the best"
    axes.set(xlabel="round", ylabel=SCORE if len(runs) == 1 else f"central {SCORE}", title=title)
    axes.locator_params(axis="x", integer=True)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=min(len(curves), 2))  # beside the axes it hides no curve
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    with interrupted_by_signals():  # so that no process is left behind
        main()
