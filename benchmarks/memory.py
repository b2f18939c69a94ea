"""Measures the memory of server and workers, and the times, on many photos or with a large model.

    python -m benchmarks.memory photos
    python -m benchmarks.memory large-model

The photos are made: JPEGs of 320x240 in class folders, each with a bright patch whose place tells its class. The
second of two runs finds them in the cache. With the large model, few images are used, so that the messages take most
of the time, and not the training.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.simulation import LocalSuperLink, few_images
from benchmarks.watched import PER_UNIT, big_app, own_memory, watch
from deploy.cli import interrupt_on_signals

CLASSES = 10
SETTINGS: dict[str, Any] = {"partitioner": "iid", "use_wandb": False}


def make_photos(folder: Path, count: int) -> None:
    """Write `count` photos, a tenth of them to test."""
    generator = np.random.default_rng(0)
    grounds = [generator.integers(0, 160, (240, 320, 3), dtype=np.uint8) for _ in range(20)]
    for number in range(count):
        label = number % CLASSES
        pixels = grounds[number // CLASSES % len(grounds)].copy()
        pixels[20 + 20 * label : 40 + 20 * label, 130 + number % 40 : 170 + number % 40] = 255
        path = folder / ("test" if number % 100 < 10 else "train") / f"class {label}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, quality=85)


def measure_photos(superlink: LocalSuperLink, folder: Path, count: int) -> str:
    """Run twice on photos; return the table."""
    make_photos(folder, count)
    lines = ["| | to round 0, s | whole run, s | server, MiB | worker, MiB |", "| --- | --- | --- | --- | --- |"]
    settings = SETTINGS | {"nodes": 10, "dataset": str(folder), "image_size": 128, "num_server_rounds": 1}
    for name in ("first run", "second run"):
        run = watch(superlink, "Centrally evaluated", own_memory, **settings)
        lines.append(f"| {name} | {run.seconds_to:.1f} | {run.seconds:.1f} | {run.server:.0f} | {run.worker:.0f} |")
    return "\n".join(lines)


def measure_large_model(superlink: LocalSuperLink, folder: Path, megabytes: int) -> str:
    """Run two rounds in which all nodes train the large model; return the table."""
    settings = SETTINGS | {"dataset": few_images(folder / "few", 200, 200), "num_server_rounds": 2, "nodes": 4}
    settings |= {"fraction_clients_train": 1.0, "opt_in_probability": 1.0}
    app = big_app(folder / "app", int(megabytes * 1e6 / (4 * PER_UNIT)))
    run = watch(superlink, memory=own_memory, app=app, **settings)
    replies = " and ".join(str(row["train_received"]) for row in run.run.results[1:])
    seconds = " and ".join(f"{row['seconds_total']:.0f}" for row in run.run.results[1:])
    return (
        f"| model, MB | nodes | replies | rounds, s | server, MiB | worker, MiB |\n|{' --- |' * 6}\n"
        f"| {megabytes} | {settings['nodes']} | {replies} | {seconds} | {run.server:.0f} | {run.worker:.0f} |"
    )


def main() -> None:
    """Parse the command line, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("photos", "large-model"))
    parser.add_argument("--images", type=int, default=20_000, help="number of photos (default: %(default)s)")
    parser.add_argument("--megabytes", type=int, default=300, help="of the large model (default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        cache = {"HF_HOME": str(Path(made, "cache"))}  # nothing is decoded yet
        with LocalSuperLink(Path(made, "home"), cache) as superlink:
            if args.what == "photos":
                table = measure_photos(superlink, Path(made, "photos"), args.images)
            else:
                table = measure_large_model(superlink, Path(made, "large"), args.megabytes)
    print(f"\n{table}")


if __name__ == "__main__":
    interrupt_on_signals()  # so that no process is left behind
    main()
