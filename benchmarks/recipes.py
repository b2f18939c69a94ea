"""Compares the recipes of docs/recipes/ with the unchanged app, in this process.

    python -m benchmarks.recipes fedprox --seeds 3
    python -m benchmarks.recipes attacks --out attacks.json

The nodes of a run work one after the other on the bundled images. Where some nodes are slow, the seconds are those of
a simulated clock, which only waiting advances: a TRAIN message takes as long as the pace of the node says. OUT is
written after every run, and the same command continues after an interruption. Runs of other code or settings are done
again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.seeds import COLOURS, Rows
from pytorch_example_low_level.config import CODE
from pytorch_example_low_level.utils import replace_json
from recipes import PACKAGE, all_blocks
from tests.grid import PROJECT, InProcessGrid
from tests.recipes import PacedGrid, changed_app, run


@dataclass
class Variant:
    """A line of a table, or one of its cells: the recipes that are applied, and the run configuration."""

    line: str
    recipes: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    column: str = ""
    change: Callable[[Any], None] = lambda app: None  # of the modules of the app
    one_place: bool = False  # one node has all training data


# Digits in the table, and the value for the rows of a run.
FIGURES: dict[str, tuple[int, Callable[[Rows], float]]] = {
    "accuracy": (3, lambda rows: rows[-1]["centralized_accuracy"]),
    "accuracy of the nodes": (3, lambda rows: rows[-1]["federated_evaluate_accuracy"]),
    "personal accuracy": (3, lambda rows: rows[-1]["federated_evaluate_personal_accuracy"]),
    "best": (3, lambda rows: best(rows, "centralized_accuracy")),
    "best by the nodes": (3, lambda rows: best(rows, "federated_evaluate_accuracy")),
    "AUC": (3, lambda rows: rows[-1]["centralized_auc"]),
    "R²": (3, lambda rows: rows[-1]["centralized_r2"]),
    "loss": (3, lambda rows: rows[-1]["centralized_loss"]),
    "ε": (0, lambda rows: rows[-1].get("epsilon", np.nan)),
    "seconds": (1, lambda rows: sum(row["seconds_total"] for row in rows[1:])),
    "TRAIN, s, last round": (1, lambda rows: rows[-1]["seconds_train"]),
    "TRAIN, s a round": (1, lambda rows: float(np.median([row["seconds_train"] for row in rows[1:]]))),
    "MB received": (2, lambda rows: rows[1]["megabytes_received"]),
    "MB a round": (1, lambda rows: rows[1]["megabytes_sent"] + rows[1]["megabytes_received"]),
}


def best(rows: Rows, score: str) -> float:
    """Return the accuracy on the test split of the round with the best score."""
    return float(max(rows[1:], key=lambda row: row[score])["centralized_accuracy"])


@dataclass
class Experiment:
    """A table: its runs and figures, and on which nodes the runs are."""

    variants: list[Variant]
    figures: tuple[str, ...] = ("accuracy",)
    nodes: int = 50
    slow: float = 1.0  # a tenth of the nodes is this many times slower
    config: dict[str, Any] = field(default_factory=dict)
    worst: bool = False  # the worst seed, and not the standard deviation


def another_task(figure: str, nodes: int, *recipes: str) -> Experiment:
    """Return the comparison of a task on nodes with the same model trained on all data in one place."""
    variants = [Variant(f"{nodes} nodes", recipes), Variant("one place", recipes, one_place=True)]
    return Experiment(variants, (figure,), nodes, config={"num-server-rounds": 20, "fraction-clients-train": 0.5})


def secure(nodes: int) -> Experiment:
    """Return the accuracy and the cost of secure sums over a cohort of all nodes."""
    variants = [Variant("FedAvg"), Variant("secure sum", ("secure-sum",))]
    config = {"fraction-clients-train": 1.0, "partitioner": "iid", "query-timeout": 600.0}
    return Experiment(variants, ("accuracy", "MB received", "TRAIN, s, last round"), nodes, config=config)


def attacks(alpha: float) -> Experiment:
    """Return the comparison of the rules under the attacks: a rule a line, an attack a column."""
    config = {"hostile-nodes": 10, "dirichlet-alpha": alpha}
    variants = [
        Variant(rule, ("attack",) if rule == "mean" else ("attack", rule), config | {"attack": attack}, attack)
        for rule in ("mean", "median", "trimmed-mean", "multi-krum", "norm-clipping")
        for attack in ("none", "sign-flip", "label-flip", "scaled", "noise", "little")
    ]
    return Experiment(variants, worst=True)


def drift() -> list[Variant]:
    """Return what is compared against label skew, with and without logit adjustment, all with plain SGD."""
    recipes: dict[str, tuple[str, ...]] = {"FedAvg": (), "FedProx": ("fedprox",), "SCAFFOLD": ("scaffold",)}
    variants = []
    for epochs, name, adjustment in product((1, 5), recipes, (1.0, 0.0)):
        line, column = f"{name}, {epochs} local epochs", f"logit adjustment {adjustment:g}"
        config = {"local-epochs": epochs, "logit-adjustment": adjustment}
        variants.append(Variant(line, recipes[name], config, column))
    return variants


FEDAVG = Variant("FedAvg")
MANY_NODES = {
    "partitioner": "iid", "fraction-clients-train": 0.5, "fraction-clients-query": 0.01, "num-server-rounds": 5,
    "local-epochs": 5, "batch-size": 8,
}  # fmt: skip
EXPERIMENTS = {
    "adamw": Experiment([Variant("SGD, rate 0.05"), Variant("AdamW, rate 0.001", ("adamw",))]),
    "attacks": attacks(1.0),
    "attacks-skew": attacks(0.1),
    "dp": Experiment(
        [FEDAVG, Variant("noise multiplier 0.1", ("dp",), {"noise-multiplier": 0.1, "clip-norm": 0.5})],
        figures=("accuracy", "ε"),
        nodes=400,
        config=MANY_NODES,
    ),
    "fedbuff": Experiment(
        [
            Variant("synchronous, 10 of 50", config={"num-server-rounds": 20}),
            Variant("FedBuff, 10 at work", ("fedbuff",), {"num-server-rounds": 40}),
        ],
        figures=("accuracy", "seconds"),
        slow=10.0,
        config={"lr-decay-every": 0},
    ),
    "fedopt": Experiment([FEDAVG, Variant("FedAvgM", ("fedavgm",)), Variant("FedAdam", ("fedavgm", "fedadam"))]),
    "fedprox": Experiment(
        [FEDAVG, *(Variant(f"μ = {mu:g}", ("fedprox",), {"proximal-mu": mu}) for mu in (0.01, 0.1, 1.0))],
        config={"dirichlet-alpha": 0.1, "local-epochs": 5},
    ),
    "first-k": Experiment(
        [Variant("all 10 of 10"), Variant("the first 10 of 13", ("first-k",), {"fraction-clients-train": 0.26})],
        figures=("accuracy", "seconds"),
        slow=10.0,
    ),
    "no-test-data": Experiment([FEDAVG], ("accuracy", "best", "best by the nodes"), config={"evaluate-every": 1}),
    "personal-head": Experiment(
        [Variant(f"α = {alpha:g}", ("personal-head",), {"dirichlet-alpha": alpha}) for alpha in (0.1, 1.0)],
        figures=("accuracy", "accuracy of the nodes", "personal accuracy"),
        config={"opt-in-probability": 1.0, "num-server-rounds": 20},
    ),
    "quantise": Experiment(
        [Variant("float32"), Variant("bfloat16", ("quantise", "bfloat16")), Variant("8-bit integers", ("quantise",))],
        figures=("accuracy", "MB received"),
    ),
    "regression": another_task("R²", 10, "tabular", "regression"),
    "scaffold": Experiment(drift(), config={"dirichlet-alpha": 0.1, "momentum": 0.0, "learning-rate": 0.1}),
    "secure-sum": Experiment([FEDAVG, Variant("secure sum", ("secure-sum",))], config={"query-timeout": 60.0}),
    **{f"secure-sum-{nodes}": secure(nodes) for nodes in (10, 50, 100)},
    "tabular": another_task("AUC", 10, "tabular"),
    "text": another_task("loss", 9, "text"),
}


def measure(experiment: Experiment, variant: Variant, seed: int) -> Rows:
    """Run a variant once; return the rows of results.json."""
    with tempfile.TemporaryDirectory() as folder:
        app = changed_app(*variant.recipes)
        variant.change(app)
        config: dict[str, Any] = {"use-wandb": False, "output-dir": folder, "seed": seed}
        config |= {"query-max-delay": 0.0, "evaluate-every": 1000}
        config |= experiment.config | variant.config
        if "text" in variant.recipes:
            config["text-folder"] = str(one_text(Path(folder)) if variant.one_place else PROJECT / PACKAGE)
        if variant.one_place:
            config |= {"min-available-nodes": 1, "min-train-nodes": 1, "fraction-clients-train": 1.0}
        if experiment.slow > 1:
            paces = np.random.default_rng(seed).lognormal(sigma=0.3, size=experiment.nodes)
            paces[::10] *= experiment.slow
            grid: Any = PacedGrid(app, config, list(paces))
        else:
            grid = InProcessGrid(app.client_app.app, config, 1 if variant.one_place else experiment.nodes)
        run(app, config, grid)
        (path,) = Path(folder).glob("*/*/results.json")
        rows: Rows = json.loads(path.read_text())
        return rows


def one_text(folder: Path) -> Path:
    """Join the texts of all nodes to one; return the folder that has it, and the server's text."""
    paths = sorted((PROJECT / PACKAGE).glob("*.py"))
    texts = [path.read_text() for path in paths if path.name != "config.py" and path.stat().st_size > 1000]
    (folder / "all.py").write_text("".join(texts))
    shutil.copy(PROJECT / PACKAGE / "config.py", folder)
    return folder


def origin(experiment: Experiment, variant: Variant) -> str:
    """Return a digest of the code and the settings on which the runs of a variant depend."""
    code = [CODE.partition(" ")[0], (PROJECT / "pyproject.toml").read_text()]
    changes = [all_blocks()[recipe] for recipe in variant.recipes]
    settings = [experiment.nodes, experiment.slow, experiment.config, variant.config, variant.one_place]
    return hashlib.sha256(repr([code, changes, settings]).encode()).hexdigest()[:8]


def compare(
    name: str, experiment: Experiment, seeds: int, out: Path | None = None
) -> dict[tuple[str, str], list[Rows]]:
    """Do the runs that OUT lacks, with the progress; print the table. Returns the runs by line and column."""

    def title(variant: Variant, seed: int) -> str:
        return ", ".join(filter(None, (name, variant.line, variant.column, f"seed {seed}")))

    found: dict[str, Rows] = json.loads(out.read_text()) if out and out.exists() else {}
    runs = [(variant, seed) for seed in range(seeds) for variant in experiment.variants]
    # Determined once, because a file may be edited while the runs go on.
    keys = [f"{title(variant, seed)} ({origin(experiment, variant)})" for variant, seed in runs]
    missing, began = [run for run in zip(keys, runs, strict=True) if run[0] not in found], time.monotonic()
    for count, (key, (variant, seed)) in enumerate(missing, start=1):
        rows = found[key] = measure(experiment, variant, seed)
        if out:
            replace_json(out, found)
        left = timedelta(seconds=round((time.monotonic() - began) / count * (len(missing) - count)))
        figure = experiment.figures[0]
        value = FIGURES[figure][1](rows)
        print(f"{count}/{len(missing)} {title(variant, seed)}: {figure} {value:.3f}; about {left} left", flush=True)
    by_place: dict[tuple[str, str], list[Rows]] = {}
    for key, (variant, _) in zip(keys, runs, strict=True):
        by_place.setdefault((variant.line, variant.column), []).append(found[key])
    print(f"\n{table(experiment, by_place)}")
    return by_place


def table(experiment: Experiment, runs: dict[tuple[str, str], list[Rows]]) -> str:
    """Return the mean over the seeds with its standard deviation, or with the worst seed, in Markdown."""
    columns = list(dict.fromkeys(column for _, column in runs))
    places = [(figure, column) for figure in experiment.figures for column in columns]
    lines = [f"| | {' | '.join(column or figure for figure, column in places)} |", "| --- |" + " --- |" * len(places)]
    for line in dict.fromkeys(line for line, _ in runs):
        cells = [cell(runs[line, column], figure, worst=experiment.worst) for figure, column in places]
        lines.append(f"| {line} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(runs: list[Rows], figure: str, *, worst: bool) -> str:
    """Return a figure of the runs with all seeds."""
    digits, of = FIGURES[figure]
    values = np.array([of(rows) for rows in runs])
    spread = f"({values.min():.{digits}f})" if worst else f"± {values.std():.{digits}f}"
    return "–" if np.isnan(values).any() else f"{values.mean():.{digits}f} {spread}"


def plot(runs: dict[tuple[str, str], list[Rows]], path: Path) -> None:
    """Draw the accuracy over the seconds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for ((line, _column), of_seeds), colour in zip(runs.items(), COLOURS, strict=False):
        for seed, rows in enumerate(of_seeds):
            seconds = np.cumsum([row["seconds_total"] or 0.0 for row in rows])
            accuracies = [row["centralized_accuracy"] for row in rows]
            axes.plot(seconds, accuracies, color=colour, label=None if seed else line)
    axes.set(xlabel="seconds (a median node trains for 1 s)", ylabel="accuracy over the test split")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=100)


def main() -> None:
    """Parse the command line, do the runs, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=EXPERIMENTS)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0 (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file with the results.json of all runs")
    parser.add_argument("--plot", type=Path, help="draw accuracy over seconds into this file")
    args = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    runs = compare(args.name, EXPERIMENTS[args.name], args.seeds, args.out)
    if args.plot:
        plot(runs, args.plot)


if __name__ == "__main__":
    main()
