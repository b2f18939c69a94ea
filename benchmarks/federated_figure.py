"""Measures how opt-in and weighting change the federated accuracy of a finished run.

    python -m benchmarks.federated_figure /absolute/path/outputs/2026-11-22/19-17-57 --nodes 50

The final model is evaluated on the validation split of every node. The opt-in is drawn many times,
and the table compares the mean over the nodes that opted in with the mean over all nodes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pytorch_example_low_level import images, task
from pytorch_example_low_level.config import RunConfig

DRAWS = 100_000


def evaluate_nodes(directory: Path, nodes: int) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Return accuracy (nodes,) and number of validation images (nodes,), and the run's configuration."""
    config = json.loads((directory / "run_config.json").read_text())
    net = task.make_model(config)
    net.load_state_dict(torch.load(directory / "final_model.pt", weights_only=True))
    keys = {field.alias for field in RunConfig.model_fields.values()}
    settings = RunConfig.model_validate({key: value for key, value in config.items() if key in keys})
    splits = [images.load_partition(node, nodes, settings)["validation"] for node in range(nodes)]
    accuracies = [task.test(net, split, torch.device("cpu"))["accuracy"] for split in splits]
    return np.array(accuracies), np.array([len(split) for split in splits], dtype=float), config


def main() -> None:
    """Parse the command line, evaluate, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="the directory of a finished run")
    parser.add_argument("--nodes", type=int, default=50, help="nodes of that run (default: %(default)s)")
    args = parser.parse_args()
    accuracies, sizes, config = evaluate_nodes(args.directory, args.nodes)

    opted_in = np.random.default_rng(0).random((DRAWS, args.nodes)) < config["opt-in-probability"]
    opted_in = opted_in[opted_in.any(axis=1)]
    weighted = opted_in @ (sizes * accuracies) / (opted_in @ sizes)
    plain = opted_in @ accuracies / opted_in.sum(axis=1)
    print("| | weighted by examples | unweighted |\n| --- | --- | --- |")
    print(f"| all {args.nodes} nodes | {np.average(accuracies, weights=sizes):.3f} | {accuracies.mean():.3f} |")
    share = f"{config['opt-in-probability']:.0%} opted in, mean ± std of {DRAWS:,} draws"
    print(f"| {share} | {weighted.mean():.3f} ± {weighted.std():.3f} | {plain.mean():.3f} ± {plain.std():.3f} |")
    print(f"\nAccuracy of the nodes: {accuracies.min():.3f} to {accuracies.max():.3f}")
    print(f"Validation images of the nodes: {sizes.min():.0f} to {sizes.max():.0f}")


if __name__ == "__main__":
    main()
