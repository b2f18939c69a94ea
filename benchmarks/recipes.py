"""Compares the recipes of docs/recipes/ with the unchanged app, in this process.

    python -m benchmarks.recipes fedprox --seeds 3

The nodes of a run work one after the other on the bundled images. Seconds are those of a simulated
clock, which only waiting advances: a TRAIN message takes as long as the pace of the node says.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recipes import PACKAGE
from tests.grid import PROJECT, InProcessGrid
from tests.recipes import PacedGrid, changed_app, run

Row = dict[str, Any]
COLOURS = ("#0072B2", "#D55E00", "#009E73")  # Okabe and Ito: safe for the colour-blind


@dataclass
class Variant:
    """One row of a table: the recipes that are applied, and the run configuration."""

    name: str
    recipes: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    one_place: bool = False  # one node has all training data


FIGURES: dict[str, Callable[[list[Row]], float]] = {
    "accuracy": lambda rows: rows[-1]["centralized_accuracy"],
    "nodes": lambda rows: rows[-1]["federated_evaluate_accuracy"],
    "personal": lambda rows: rows[-1].get("federated_evaluate_personal_accuracy", np.nan),
    "seconds": lambda rows: sum(row["seconds_total"] for row in rows[1:]),
    "epsilon": lambda rows: rows[-1].get("epsilon", np.nan),
    "auc": lambda rows: rows[-1]["centralized_auc"],
    "r2": lambda rows: rows[-1]["centralized_r2"],
    "loss": lambda rows: rows[-1]["centralized_loss"],
    "MB sent": lambda rows: rows[1]["megabytes_sent"],
    "TRAIN s": lambda rows: rows[-1]["seconds_train"],
    "MB received": lambda rows: rows[1]["megabytes_received"],
    "best": lambda rows: max(row["centralized_accuracy"] for row in rows[1:]),
    "best for nodes": lambda rows: max(rows[1:], key=lambda r: r["federated_evaluate_accuracy"])[
        "centralized_accuracy"
    ],
}


@dataclass
class Experiment:
    """A table: its rows and columns, and on which nodes the runs are."""

    variants: list[Variant]
    figures: tuple[str, ...] = ("accuracy",)
    nodes: int = 50
    slow: float = 1.0  # a tenth of the nodes is this many times slower
    wild: int = 0  # the number of nodes that add noise to their models
    config: dict[str, Any] = field(default_factory=dict)


MANY_NODES = {
    "partitioner": "iid", "fraction-clients-train": 0.5, "fraction-clients-query": 0.01, "num-server-rounds": 5,
    "local-epochs": 5, "batch-size": 8,
}  # fmt: skip


def another_task(figure: str, nodes: int, *recipes: str) -> Experiment:
    """Return the comparison of a task on nodes with the same model trained on all data in one place."""
    variants = [Variant(f"{nodes} nodes", recipes), Variant("one place", recipes, one_place=True)]
    return Experiment(variants, (figure,), nodes, config={"num-server-rounds": 20, "fraction-clients-train": 0.5})


def drift(local_epochs: int) -> list[Variant]:
    """Return what is compared against label skew, with and without logit adjustment, all with plain SGD."""
    recipes: dict[str, tuple[str, ...]] = {"FedAvg": (), "FedProx": ("fedprox",), "SCAFFOLD": ("scaffold",)}
    return [
        Variant(
            f"{name}, {local_epochs} local epochs, logit adjustment {adjustment:g}",
            recipe,
            {"local-epochs": local_epochs, "logit-adjustment": adjustment},
        )
        for adjustment in (1.0, 0.0)
        for name, recipe in recipes.items()
    ]


def secure(nodes: int) -> Experiment:
    """Return the accuracy and the cost of secure sums over a cohort of all nodes."""
    variants = [Variant(f"{nodes} nodes, FedAvg"), Variant(f"{nodes} nodes, secure sum", ("secure-sum",))]
    config = {"fraction-clients-train": 1.0, "partitioner": "iid", "query-timeout": 600.0}
    return Experiment(variants, ("accuracy", "MB sent", "MB received", "TRAIN s"), nodes, config=config)


EXPERIMENTS = {
    "fedopt": Experiment(
        [Variant("FedAvg"), Variant("FedAvgM", ("fedavgm",)), Variant("FedAdam", ("fedavgm", "fedadam"))]
    ),
    "fedprox": Experiment(
        [Variant("FedAvg"), *(Variant(f"μ = {mu}", ("fedprox",), {"proximal-mu": mu}) for mu in (0.01, 0.1, 1.0))],
        config={"dirichlet-alpha": 0.1, "local-epochs": 5},
    ),
    "first-k": Experiment(
        [Variant("all 10 of 10"), Variant("the first 10 of 13", ("first-k",), {"fraction-clients-train": 0.26})],
        figures=("accuracy", "seconds"),
        slow=10.0,
    ),
    "fedbuff": Experiment(
        [
            Variant("synchronous, 10 of 50", (), {"num-server-rounds": 20}),
            Variant("FedBuff, 10 at work", ("fedbuff",), {"num-server-rounds": 40}),
        ],
        figures=("accuracy", "seconds"),
        slow=10.0,
        config={"lr-decay-every": 0},
    ),
    "dp": Experiment(
        [Variant("FedAvg"), Variant("noise multiplier 0.1", ("dp",), {"noise-multiplier": 0.1, "clip-norm": 0.5})],
        figures=("accuracy", "epsilon"),
        nodes=400,
        config=MANY_NODES,
    ),
    "personal-head": Experiment(
        [Variant(f"α = {alpha}", ("personal-head",), {"dirichlet-alpha": alpha}) for alpha in (0.1, 1.0)],
        figures=("accuracy", "nodes", "personal"),
        config={"opt-in-probability": 1.0, "num-server-rounds": 20},
    ),
    "adamw": Experiment([Variant("SGD, rate 0.05"), Variant("AdamW, rate 0.001", ("adamw",))]),
    "no-test-data": Experiment(
        [Variant("FedAvg")], ("accuracy", "best", "best for nodes"), config={"evaluate-every": 1}
    ),
    "tabular": another_task("auc", 10, "tabular"),
    "regression": another_task("r2", 10, "tabular", "regression"),
    "text": another_task("loss", 9, "text"),
    "quantise": Experiment(
        [
            Variant("float32"),
            Variant("bfloat16", ("quantise", "bfloat16")),
            Variant("8-bit integers", ("quantise",)),
        ],
        ("accuracy", "MB received"),
    ),
    "scaffold": Experiment(
        [*drift(1), *drift(5)], config={"dirichlet-alpha": 0.1, "momentum": 0.0, "learning-rate": 0.1}
    ),
    "secure-sum": Experiment(
        [Variant("FedAvg"), Variant("secure sum", ("secure-sum",))], config={"query-timeout": 60.0}
    ),
    "secure-sum-10": secure(10),
    "secure-sum-50": secure(50),
    "secure-sum-100": secure(100),
    "median": Experiment([Variant("mean"), Variant("median", ("median",))]),
    "median-wild": Experiment([Variant("mean"), Variant("median", ("median",))], wild=5),
}


def measure(experiment: Experiment, variant: Variant, seed: int) -> list[Row]:
    """Run a variant once; return the rows of results.json."""
    with tempfile.TemporaryDirectory() as folder:
        app = changed_app(*variant.recipes)
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
        for partition in range(experiment.wild):
            grid.handlers[partition] = wild(app)
        run(app, config, grid)
        (path,) = Path(folder).glob("*/*/results.json")
        rows: list[Row] = json.loads(path.read_text())
        return rows


def one_text(folder: Path) -> Path:
    """Join the texts of all nodes to one; return the folder that has it, and the server's text."""
    paths = sorted((PROJECT / PACKAGE).glob("*.py"))
    texts = [path.read_text() for path in paths if path.name != "config.py" and path.stat().st_size > 1000]
    (folder / "all.py").write_text("".join(texts))
    shutil.copy(PROJECT / PACKAGE / "config.py", folder)
    return folder


def wild(app: Any) -> Callable[..., Any]:
    """Return a ClientApp that answers TRAIN with noise."""

    def handle(message: Any, context: Any) -> Any:
        reply = app.client_app.app(message, context)
        if "arrays" in reply.content:
            numbers = (int(context.node_config["partition-id"]), int(message.content["config"]["server-round"]))
            rng, arrays = np.random.default_rng(numbers), reply.content["arrays"].to_torch_state_dict()
            noisy = {n: (t + torch.from_numpy(rng.normal(0, 1, t.shape))).float() for n, t in arrays.items()}
            reply.content["arrays"] = app.messaging.to_array_record(noisy)
        return reply

    return handle


def plot(results: dict[str, list[list[Row]]], path: Path) -> None:
    """Draw the accuracy over the seconds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for (name, runs), colour in zip(results.items(), COLOURS, strict=False):
        for number, rows in enumerate(runs):
            seconds = np.cumsum([row["seconds_total"] or 0.0 for row in rows])
            accuracies = [row["centralized_accuracy"] for row in rows]
            axes.plot(seconds, accuracies, color=colour, label=name if not number else None)
    axes.set(xlabel="seconds (a median node trains for 1 s)", ylabel="accuracy over the test split")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=100)


def main() -> None:
    """Parse the command line, do the runs, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=EXPERIMENTS)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0 (default: %(default)s)")
    parser.add_argument("--plot", type=Path, help="draw accuracy over seconds into this file")
    args = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)

    experiment = EXPERIMENTS[args.name]
    results: dict[str, list[list[Row]]] = {}
    print("| |", " | ".join(experiment.figures), "|\n| --- |" + " --- |" * len(experiment.figures))
    for variant in experiment.variants:
        runs = results[variant.name] = [measure(experiment, variant, seed) for seed in range(args.seeds)]
        cells = []
        for name in experiment.figures:
            values = np.array([FIGURES[name](rows) for rows in runs])
            digits = 1 if name == "seconds" else 3
            cells.append(f"{values.mean():.{digits}f} ± {values.std():.{digits}f}")
        print(f"| {variant.name} |", " | ".join(cells), "|", flush=True)
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
