"""Compares aggregation rules under attacks: the recipes of docs/recipes/attacks.md and aggregation.md, in this process.

    python -m benchmarks.attacks --seeds 3 --out attacks.json

10 of 50 nodes are hostile. OUT is written after every run, and the same command continues after an interruption.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Iterable
from datetime import timedelta
from itertools import product
from pathlib import Path

import numpy as np
import torch

from benchmarks.recipes import Experiment, Variant, measure
from pytorch_example_low_level.utils import replace_json

RULES = ("mean", "median", "trimmed-mean", "multi-krum", "norm-clipping")
ATTACKS = ("none", "sign-flip", "label-flip", "scaled", "noise", "little")
ALPHAS = (1.0, 0.1)
HOSTILE = 10  # of 50 nodes


def key_of(seed: int, alpha: float, attack: str, rule: str) -> str:
    """Return the name of a run in OUT."""
    return f"{rule}, {attack}, α = {alpha:g}, seed {seed}"


def accuracy(seed: int, alpha: float, attack: str, rule: str) -> float:
    """Do a run; return the accuracy on the test split after the last round."""
    recipes = ("attack",) if rule == "mean" else ("attack", rule)
    config = {"attack": attack, "hostile-nodes": HOSTILE, "dirichlet-alpha": alpha}
    last: float = measure(Experiment([]), Variant("", recipes, config), seed)[-1]["centralized_accuracy"]
    return last


def table(found: dict[str, float], alpha: float, seeds: int) -> str:
    """Return the mean over seeds and the worst of each rule and attack, in Markdown."""
    lines = [f"| α = {alpha:g} | {' | '.join(ATTACKS)} |", f"|{' --- |' * (len(ATTACKS) + 1)}"]
    for rule in RULES:
        cells = []
        for attack in ATTACKS:
            keys = [key_of(seed, alpha, attack, rule) for seed in range(seeds)]
            values = [found[key] for key in keys if key in found]
            cells.append(f"{np.mean(values):.3f} ({min(values):.3f})" if values else "–")
        lines.append(f"| {rule} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, do the runs that are missing, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0 (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("attacks.json"), help="the accuracies (default: %(default)s)")
    args = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    found: dict[str, float] = json.loads(args.out.read_text()) if args.out.exists() else {}
    runs: Iterable[tuple[int, float, str, str]] = product(range(args.seeds), ALPHAS, ATTACKS, RULES)
    missing = [run for run in runs if key_of(*run) not in found]
    began = time.monotonic()
    for count, run in enumerate(missing, start=1):
        key = key_of(*run)
        found[key] = accuracy(*run)
        replace_json(args.out, found)
        left = timedelta(seconds=round((time.monotonic() - began) / count * (len(missing) - count)))
        print(f"{count}/{len(missing)} {key}: {found[key]:.3f}; about {left} left", flush=True)
    for alpha in ALPHAS:
        print(f"\n{table(found, alpha, args.seeds)}")


if __name__ == "__main__":
    main()
