"""The reports of a run: the plot of its rounds, and Weights & Biases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pytorch_example_low_level.config import RunConfig, first_line

if TYPE_CHECKING:
    import wandb
    from matplotlib.figure import Figure

log = getLogger("flwr")


def plot_results(results: Sequence[Mapping[str, Any]], class_names: Sequence[str]) -> Figure:
    """Draw accuracy and loss over the rounds, central and federated, and the accuracy of each class."""
    from matplotlib.figure import Figure  # without pyplot, which has global state and may need a display

    def curve(key: str) -> tuple[list[float], np.ndarray]:
        """Return the rounds that have this value, and the values."""
        rows = [row for row in results if row[key] is not None]
        return [row["round"] for row in rows], np.array([row[key] for row in rows], dtype=float)

    figure = Figure(figsize=(16, 4.5), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for axes, name in ((left, "accuracy"), (middle, "loss")):
        # Okabe and Ito's colours; lines and markers differ, too.
        axes.plot(*curve(f"centralized_{name}"), color="#0072B2", marker="o", label="central (test split)")
        rounds, mean = curve(f"federated_evaluate_{name}")
        _, std = curve(f"federated_evaluate_{name}_std")
        axes.plot(rounds, mean, color="#D55E00", linestyle="--", marker="s", label="federated mean (opted-in nodes)")
        axes.fill_between(rounds, mean - std, mean + std, color="#D55E00", alpha=0.2, label="± 1 std over nodes")
        axes.set(xlabel="round", ylabel=name if name == "accuracy" else "loss (cross-entropy)", title=name.capitalize())
    tail = {"median": ("median node", "-."), "p10": ("10th percentile", ":"), "min": ("worst node", "x")}
    for key, (text, style) in tail.items():
        left.plot(*curve(f"federated_evaluate_accuracy_{key}"), style, color="black", label=text)
    for axes in (left, middle):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")

    rounds, table = curve("centralized_accuracy_per_class")
    if rounds:
        extent = (rounds[0] - 0.5, rounds[-1] + 0.5, len(class_names) - 0.5, -0.5)
        image = right.imshow(table.T, extent=extent, aspect="auto", vmin=0, vmax=1, interpolation="nearest")
        figure.colorbar(image, ax=right, label="accuracy")
        if len(class_names) <= 30:
            names = [name.replace("$", r"\$") for name in class_names]  # Matplotlib reads $...$ as a formula
            right.set_yticks(range(len(class_names)), names)
    right.set(xlabel="round", title="Central accuracy of each class")
    for axes in (left, middle, right):
        axes.locator_params(axis="x", integer=True)
    return figure


# ----------------------------------------------------------------------- Weights & Biases


def start_wandb(config: RunConfig, directory: Path, wandb_id: str) -> wandb.Run:
    """Start a W&B run: online with credentials and a network, otherwise offline.

    A resumed run continues under its `wandb_id`; a new one has "". Raises what W&B raises when it cannot start.
    """
    import wandb

    options: dict[str, Any] = {"project": config.wandb_project, "dir": directory, "config": config.to_dict()}
    tags = ["flower", "low-level-api", config.partitioner]
    options |= {"id": wandb_id or None, "resume": "allow", "tags": tags}
    # Flower reads this process's output, so W&B must leave it alone. Without a timeout, `finish` may wait for ever.
    options["settings"] = wandb.Settings(init_timeout=20, finish_timeout=60, console="off", silent=True)
    try:
        run = wandb.init(**options)
    except Exception as error:  # W&B raises many classes, for a missing account, network or process
        log.info("📈 W&B cannot go online: %s", first_line(error))
        wandb.teardown()  # the failed attempt may still hold the id of a resumed run
        run = wandb.init(**options, mode="offline")
    run.define_metric("*", step_metric="round")
    sync = f"offline. To upload this run later: wandb sync {Path(run.dir).parent}"
    log.info("📈 W&B is %s", sync if run.offline else f"online: {run.url}")
    return run


def log_to_wandb(
    run: wandb.Run, row: Mapping[str, Any], accuracies: Sequence[float], class_names: Sequence[str]
) -> wandb.Run:
    """Log one round as one step, unless W&B has it, with a histogram of the nodes' accuracies; return the run."""
    import wandb

    values = {key: value for key, value in row.items() if value is not None}
    per_class = zip(class_names, values.pop("centralized_accuracy_per_class", ()), strict=False)
    values |= {f"accuracy/{name}": accuracy for name, accuracy in per_class if accuracy is not None}
    if accuracies:
        values["client_accuracies"] = wandb.Histogram(accuracies, num_bins=20)
    if row["round"] >= run.step:
        run.log(values, step=row["round"], commit=True)
    return run


def finish_wandb(
    run: wandb.Run, directory: Path, best_round: int | None, best_accuracy: float | None, exit_code: int
) -> None:
    """Upload the plot and the best model of a run directory, and close the W&B run."""
    import wandb

    plot, best = directory / "metrics.png", directory / "checkpoints" / "best.pt"
    if plot.exists():
        run.summary["metrics"] = wandb.Image(str(plot))  # `log` would use up the step of the next round
    if best.exists():
        artifact = wandb.Artifact(f"best-model-{run.id}", type="model", metadata={"best_round": best_round})
        artifact.add_file(str(best))
        run.log_artifact(artifact)
    run.summary["best_centralized_accuracy"] = best_accuracy
    run.finish(exit_code=exit_code)
