"""Measures the memory of two rounds with a large model.

    python -m benchmarks.large_model --megabytes 300 --nodes 4

Few images are used, so that the messages take most of the time, and not the training.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import datasets

from benchmarks.photos import Memory
from benchmarks.simulation import LocalSuperLink
from benchmarks.watched import big_app, watch
from pytorch_example_low_level.sources import bundled

BYTES_PER_UNIT = 4 * (512 + 1 + 10)  # of the first linear layer: its weights, its bias, and those of the last layer
IMAGES = 200  # in each split


def few_images(folder: Path) -> str:
    """Save a part of the bundled images as a data set; return its folder."""
    datasets.disable_progress_bars()
    for split, rows in datasets.load_dataset(bundled()).items():
        rows.shuffle(seed=0).select(range(IMAGES)).to_parquet(folder / "data" / f"{split}.parquet")
    return str(folder)


def main() -> None:
    """Parse the command line, do the run, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=300, help="of the model (default: %(default)s)")
    parser.add_argument(
        "--nodes", type=int, default=4, help="simulated nodes, all of which train (default: %(default)s)"
    )
    args = parser.parse_args()
    settings: dict[str, Any] = {"num_server_rounds": 2, "fraction_clients_train": 1.0, "opt_in_probability": 1.0}
    with tempfile.TemporaryDirectory() as made, LocalSuperLink(Path(made, "home")) as superlink:
        settings |= {"dataset": few_images(Path(made, "few")), "partitioner": "iid", "use_wandb": False}
        app = big_app(Path(made, "app"), int(args.megabytes * 1e6 / BYTES_PER_UNIT))
        memory = Memory(superlink.process.pid)
        memory.start()
        rows = watch(superlink, app=app, nodes=args.nodes, **settings).run.results[1:]
        memory.going_on = False
    received = " and ".join(str(row["train_received"]) for row in rows)
    seconds = " and ".join(f"{row['seconds_total']:.0f}" for row in rows)
    print("| model, MB | nodes | replies in each round | rounds, s | server, MiB | worker, MiB |\n|" + " --- |" * 6)
    peaks = f"{memory.peaks['server']:.0f} | {memory.peaks['worker']:.0f}"
    print(f"| {args.megabytes} | {args.nodes} | {received} | {seconds} | {peaks} |")


if __name__ == "__main__":
    main()
