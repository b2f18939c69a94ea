"""Measures how opt-in and weighting change the federated accuracy of a run.

    python -m benchmarks.federated_figure outputs/2026-11-22/19-17-57

In the run, all nodes opted in. The opt-in is drawn many times, and the table compares the mean over the nodes
that opted in with the mean over all nodes, after the last round.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

DRAWS = 100_000
OPT_IN = 0.5  # the default of opt-in-probability


def last_round(directory: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return accuracy (nodes,) and number of validation images (nodes,). Raises SystemExit if a node is missing."""
    last = json.loads((directory / "results.json").read_text())[-1]
    lines = map(json.loads, (directory / "node_results.jsonl").read_text().splitlines())
    found = [(line["accuracy"], line["num_examples"]) for line in lines if line["round"] == last["round"]]
    if len(found) != last["nodes_available"]:
        some = f"only {len(found)} of {last['nodes_available']} nodes evaluated in the last round of {directory}"
        raise SystemExit(f"{some}; do the run with opt-in-probability=1.0")
    accuracies, sizes = np.array(found).T
    return accuracies, sizes


def main() -> None:
    """Parse the command line, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="the directory of a finished run")
    accuracies, sizes = last_round(parser.parse_args().directory)
    opted_in = np.random.default_rng(0).random((DRAWS, len(sizes))) < OPT_IN
    opted_in = opted_in[opted_in.any(axis=1)]
    weighted = opted_in @ (sizes * accuracies) / (opted_in @ sizes)
    plain = opted_in @ accuracies / opted_in.sum(axis=1)
    print("| | weighted by examples | unweighted |\n| --- | --- | --- |")
    print(f"| all {len(sizes)} nodes | {np.average(accuracies, weights=sizes):.3f} | {accuracies.mean():.3f} |")
    share = f"{OPT_IN:.0%} opted in, mean ± std of {DRAWS:,} draws"
    print(f"| {share} | {weighted.mean():.3f} ± {weighted.std():.3f} | {plain.mean():.3f} ± {plain.std():.3f} |")
    print(f"\nAccuracy of the nodes: {accuracies.min():.3f} to {accuracies.max():.3f}")
    print(f"Validation images of the nodes: {sizes.min():.0f} to {sizes.max():.0f}")


if __name__ == "__main__":
    main()
