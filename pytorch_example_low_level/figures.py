"""The figures of a round: their names in results.json, the summary in the log, and the plot."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np

from pytorch_example_low_level.config import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]  # one round in results.json
Report = dict[str, Any]  # the evaluation of one node: its name, number of examples and metrics
TAIL = {"min": 0, "p10": 10, "median": 50}  # percentiles of the nodes' scores
OF_NODE = {"round", "node", "num_examples"}  # keys of node_results.jsonl beside the metrics
MAX_NAME = 20  # characters of a name in the plot


def result_keys(metrics: Iterable[str], score: str) -> list[str]:
    """Return the keys of a round in results.json, in order. A value that a round does not have is None."""
    return [
        "round", "lr", "nodes_available", "train_sampled", "train_received", "train_failed", "train_rejected",
        "train_loss", *(f"centralized_{name}" for name in metrics),
        "query_sent", "query_received", "opted_in", "evaluate_received", "evaluate_failed",
        *(f"federated_evaluate_{name}{suffix}" for name in metrics for suffix in ("", "_std")),
        *(f"federated_evaluate_{score}_{tail}" for tail in TAIL),
        "seconds_nodes", "seconds_train", "seconds_central", "seconds_query", "seconds_evaluate", "seconds_total",
        "megabytes_sent", "megabytes_received",
    ]  # fmt: skip


def new_row(keys: Iterable[str], server_round: int, lr: float | None = None) -> Row:
    """Return the row of results.json for a round that has no results yet."""
    return dict.fromkeys(keys) | {"round": server_round, "lr": lr}


def centralized(metrics: Mapping[str, Any]) -> Row:
    """Return what results.json has of a central evaluation."""
    return {f"centralized_{name}": value for name, value in metrics.items()}


def checked(metrics: Mapping[str, Any], score: str) -> dict[str, Any]:
    """Return the metrics that `test` has returned as they are recorded: Python's numbers, lists of them, and None.

    None replaces numbers that are not finite, since JSON has none of them. Raises UserError.
    """
    if missing := {"loss", score} - metrics.keys():
        raise UserError(f"test() must return 'loss' and the score {score!r}; {missing} is not in {list(metrics)}")
    if isinstance(metrics[score], list):
        raise UserError(f"the score {score!r} must be a number or None; test() returned a list")
    keys = result_keys(metrics, score)
    if taken := (OF_NODE & metrics.keys()) | {key for key in keys if keys.count(key) > 1}:
        raise UserError(f"test() returned metrics whose names are taken: {sorted(taken)}; rename them")

    def known(name: str, value: object) -> float | None:
        if not isinstance(value, int | float | None):
            allowed = "allowed are numbers (of a tensor: .item()), lists of them (.tolist()), and None"
            raise UserError(f"test() returned a {type(value).__name__} in the metric {name!r}; {allowed}")
        if value is None or not math.isfinite(value):
            return None
        return value if type(value) is int else float(value)  # NumPy's are not data only, and bool is an int

    each = metrics.items()
    return {n: [known(n, v) for v in value] if isinstance(value, list) else known(n, value) for n, value in each}


def time_summary(results: Sequence[Row], rounds_left: int) -> str:
    """Return the time and traffic of the last round, and the time of the rest at the median pace after round 1."""
    row, names = results[-1], ("nodes", "train", "central", "query", "evaluate")
    phases = [f"{name} {row[f'seconds_{name}']:.1f}" for name in names if row[f"seconds_{name}"] is not None]
    pace = np.median([each["seconds_total"] for each in results[2:] or results[1:]])  # round 0 has no time
    left = timedelta(seconds=round(float(pace) * rounds_left))
    traffic = f"{row['megabytes_sent']:.1f} MB sent, {row['megabytes_received']:.1f} MB received"
    return f"Round took {row['seconds_total']:.1f} s ({', '.join(phases)}), {traffic}; about {left} left"


def element_names(elements: Sequence[object], facts: Mapping[str, Any]) -> list[str]:
    """Return the names of a list's elements: the only list of texts among the facts with this length, or numbers."""
    lists = [fact for fact in facts.values() if isinstance(fact, list) and len(fact) == len(elements)]
    texts = [fact for fact in lists if all(isinstance(text, str) for text in fact)]
    return texts[0] if len(texts) == 1 else [str(number) for number in range(len(elements))]


def plot_results(results: Sequence[Row], facts: Mapping[str, Any], score: str) -> Figure:
    """Draw each metric over the rounds, the score first: numbers as curves, and lists as a picture."""
    from matplotlib.figure import Figure  # without pyplot, which has global state and may need a display

    def curve(key: str) -> tuple[list[float], np.ndarray]:
        """Return the rounds that have this value, and the values: (rounds,), or (rounds, elements) for lists."""
        rows = [row for row in results if row.get(key) is not None]
        return [row["round"] for row in rows], np.array([row[key] for row in rows], dtype=float)

    names = [key.removeprefix("centralized_") for row in results[-1:] for key in row if key.startswith("centralized_")]
    names.sort(key=lambda name: name != score)
    height = max(1, math.ceil(len(names) / 3))
    figure = Figure(figsize=(16, 4.5 * height), layout="constrained")
    grid = figure.subplots(height, 3, squeeze=False).flat
    for spare in grid[len(names) :]:
        spare.remove()
    for axes, name in zip(grid, names, strict=False):
        rounds, central = curve(f"centralized_{name}")
        axes.set(xlabel="round", title=name.replace("_", " ").capitalize())
        axes.locator_params(axis="x", integer=True)
        if central.ndim == 2:
            extent = (rounds[0] - 0.5, rounds[-1] + 0.5, central.shape[1] - 0.5, -0.5)
            picture = np.full((central.shape[1], int(rounds[-1] - rounds[0]) + 1), np.nan)  # a round may have no list
            picture[:, np.array(rounds, dtype=int) - int(rounds[0])] = central.T
            shares = np.nanmin(central, initial=0) >= 0 and np.nanmax(central, initial=0) <= 1
            limits = {"vmin": 0, "vmax": 1} if shares else {}
            figure.colorbar(
                axes.imshow(picture, extent=extent, aspect="auto", interpolation="nearest", **limits), ax=axes
            )
            if central.shape[1] <= 30:
                names_shown = [name[:MAX_NAME] for name in element_names(central[0], facts)]
                axes.set_yticks(range(central.shape[1]), names_shown, parse_math=False)
            continue
        axes.set_ylabel(name)
        # Okabe and Ito's colours; lines and markers differ, too.
        axes.plot(rounds, central, color="#0072B2", marker="o", label="central (test split)")
        rounds, mean = curve(f"federated_evaluate_{name}")
        _, std = curve(f"federated_evaluate_{name}_std")
        axes.plot(rounds, mean, color="#D55E00", linestyle="--", marker="s", label="federated mean (opted-in nodes)")
        axes.fill_between(rounds, mean - std, mean + std, color="#D55E00", alpha=0.2, label="± 1 std over nodes")
        for tail, style in zip(TAIL, ("x", ":", "-."), strict=True):
            if name == score:
                axes.plot(*curve(f"federated_evaluate_{name}_{tail}"), style, color="black", label=f"nodes: {tail}")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return figure
