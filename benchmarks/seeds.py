"""Tables, differences and a plot of runs that were done with several seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pytorch_example_low_level.task import SCORE

Rows = list[dict[str, Any]]  # a run's results.json
Runs = dict[str, dict[str, Rows]]  # variant -> seed, as text for JSON -> rows

COLUMNS = {
    "central": f"centralized_{SCORE}",
    "federated": f"federated_evaluate_{SCORE}",
    "worst node": f"federated_evaluate_{SCORE}_min",
}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")  # Okabe and Ito: safe for the colour-blind
LINES = ("-", "--", ":", "-.", "-")


def show(runs: Runs, seeds: Sequence[str], path: Path) -> None:
    """Print the tables and write the plot, over the seeds that all variants with results have."""
    if missing := [f"{name or 'run'}, seed {seed}" for name in runs for seed in seeds if seed not in runs[name]]:
        print(f"\nMissing: {'; '.join(missing)}")
    shown = {name: of_seeds for name, of_seeds in runs.items() if any(seed in of_seeds for seed in seeds)}
    common = [seed for seed in seeds if all(seed in of_seeds for of_seeds in shown.values())]
    if not shown or not common:
        print("There is no seed that all variants with results have, so there is no table.")
        return
    results = {name: [of_seeds[seed] for seed in common] for name, of_seeds in shown.items()}
    several = f", mean ± standard deviation and worst of the seeds {', '.join(common)}"
    print(f"\nThe last round{several if len(common) > 1 else f' of seed {common[0]}'}\n\n{final_table(results)}")
    if len(results) > 1:
        print(differences(results))
    for name, rows in results.items():
        print(f"\n{name or 'All rounds'}\n\n{table(rows)}")
    plot(results, path)


def number(value: float | None) -> str:
    """Return a score for a table."""
    return "–" if value is None else f"{value:.3f}"


def of_round(results: Sequence[Rows], server_round: int, key: str) -> list[float]:
    """Return a figure of a round (-1: the last one) for all seeds that have it. A run may have stopped early."""
    values = [run[server_round][key] for run in results if server_round < len(run)]
    return [value for value in values if value is not None]


def cells(results: Sequence[Rows], server_round: int) -> str:
    """Return mean ± standard deviation and worst of each figure of a round: columns in Markdown.

    One value has no standard deviation.
    """
    found = []
    for key in COLUMNS.values():
        values = of_round(results, server_round, key)
        spread = f" ± {statistics.pstdev(values):.3f}" if len(values) > 1 else ""
        found += [f"{statistics.mean(values):.3f}{spread}" if values else "–"]
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
    scores = {name: values for name, values in found.items() if len(values) == len(runs[name])}
    if not scores:
        return f"\nNo variant has a central {SCORE} for all seeds."
    mean = {name: statistics.mean(values) for name, values in scores.items()}
    best = max(mean, key=lambda name: mean[name])
    lines = [f"\nThe best is {best}. The others, in the central {SCORE}:\n"]
    for name, values in found.items():
        if name not in scores:
            lines.append(f"- {name}: not compared, {len(runs[name]) - len(values)} of {len(runs[name])} runs have none")
        elif name != best:
            difference, spread = mean[name] - mean[best], statistics.pstdev(values) + statistics.pstdev(scores[best])
            where = f"{'within' if -difference <= spread else 'beyond'} the spread over seeds ({spread:.3f})"
            lines.append(f"- {name}: {difference:.3f}, {where if len(values) > 1 else 'and one seed shows no spread'}")
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
    title = f"Mean over {seeds} seeds; the band spans the worst to the best" if seeds > 1 else "One seed"
    axes.set(xlabel="round", ylabel=SCORE if len(runs) == 1 else f"central {SCORE}", title=title)
    axes.locator_params(axis="x", integer=True)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=min(len(curves), 2))  # beside the axes it hides no curve
    figure.savefig(path, dpi=110)
