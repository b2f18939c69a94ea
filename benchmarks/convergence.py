"""How well the app learns: many seeds of the real `flwr run`, as table, plot and JSON.

    python -m benchmarks.convergence --seeds 10 --out results/fashion_mnist \
        --run-config "dataset='/absolute/path/fashion_mnist'"

`--run-config` and `--nodes` are those of the runs; all else is the app's default. Several
`--vary key=value` compare settings side by side, such as `--vary dirichlet-alpha=0.1 --vary
dirichlet-alpha=100`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from flwr.common.config import parse_config_args

from benchmarks.simulation import LocalSuperLink

CURVES = {"central": "centralized_accuracy", "federated": "federated_evaluate_accuracy"}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")  # Okabe and Ito: safe for the colour-blind
LINES = ("-", "--", ":", "-.", "-")


def main() -> None:
    """Parse the command line, do the runs, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="number of seeds, from 0 (default: %(default)s)")
    parser.add_argument("--nodes", type=int, default=50, help="simulated nodes (default: %(default)s)")
    parser.add_argument("--run-config", default="", help="as for `flwr run`")
    parser.add_argument("--vary", action="append", default=[], metavar="KEY=VALUE", help="one curve for each")
    parser.add_argument("--out", type=Path, required=True, help="OUT.json and OUT.png are written")
    args = parser.parse_args()

    common: dict[str, Any] = {"use-wandb": False} | parse_config_args([args.run_config] if args.run_config else None)
    variants = {name: common | parse_config_args([name]) for name in args.vary} or {"": common}
    runs: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in variants}
    total, started = args.seeds * len(variants), time.monotonic()
    with tempfile.TemporaryDirectory() as home, LocalSuperLink(Path(home)) as superlink:
        for name, settings in variants.items():
            for seed in range(args.seeds):
                run = superlink.run(nodes=args.nodes, **settings | {"seed": seed})
                if run.status != "finished:completed":
                    raise SystemExit(f"seed {seed} ended with {run.status}:\n{run.log[-3000:]}")
                runs[name].append(run.results)
                done = sum(map(len, runs.values()))
                left = timedelta(seconds=round((time.monotonic() - started) / done * (total - done)))
                accuracy = run.results[-1]["centralized_accuracy"]
                print(f"{done}/{total} {name or 'run'}, seed {seed}: {accuracy:.4f}; about {left} left", flush=True)

    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".json").write_text(json.dumps({"settings": variants, "runs": runs}, indent=1))
    for name, results in runs.items():
        print(f"\n{name or 'accuracy'} over {args.seeds} seeds\n{table(results)}")
    plot(runs, args.out.with_suffix(".png"))


def of_round(results: Sequence[Sequence[dict[str, Any]]], server_round: int, key: str) -> list[float]:
    """Return a figure of a round for all seeds that have it."""
    return [run[server_round][key] for run in results if run[server_round][key] is not None]


def table(results: Sequence[Sequence[dict[str, Any]]]) -> str:
    """Return mean ± standard deviation and worst of both accuracies, a line a round, in Markdown."""
    lines = ["| round | central | worst | federated | worst |", "| --- | --- | --- | --- | --- |"]
    for server_round in range(1, len(results[0])):
        cells = []
        for key in CURVES.values():
            values = of_round(results, server_round, key)
            cells += [f"{statistics.mean(values):.3f} ± {statistics.pstdev(values):.3f}", f"{min(values):.3f}"]
        lines.append(f"| {server_round} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(runs: dict[str, list[list[dict[str, Any]]]], path: Path) -> None:
    """Draw the mean over seeds with a band from the worst to the best: both accuracies, or the variants."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    keys = CURVES if len(runs) == 1 else {"": CURVES["central"]}
    curves = [(f"{name} {what}".strip(), r, key) for name, r in runs.items() for what, key in keys.items()]
    for (label, results, key), colour, line in zip(curves, COLOURS, LINES, strict=False):
        rounds = range(1, len(results[0]))
        values = [of_round(results, r, key) for r in rounds]
        axes.plot(rounds, [statistics.mean(v) for v in values], line, color=colour, label=label, linewidth=2)
        axes.fill_between(rounds, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.15)
    seeds = len(next(iter(runs.values())))
    title = f"Mean over {seeds} seeds; the band goes from the worst to the best"
    axes.set(xlabel="round", ylabel="accuracy" if len(runs) == 1 else "central accuracy", title=title)
    axes.locator_params(axis="x", integer=True)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=len(curves))  # beside the axes it hides no curve
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
