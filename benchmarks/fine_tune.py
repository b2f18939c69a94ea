"""Compares how much of a pretrained ResNet-18 is trained: the recipes of docs/recipes/fine-tune.md, in this process.

    python -m benchmarks.fine_tune --seeds 3

The network is pretrained on five of the ten classes of the bundled images, and fine-tuned on the other five by 10
nodes, 5 of which train in each of 10 rounds.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import torch
from torch import nn
from torchvision.models import resnet18

from pytorch_example_low_level.sources import bundled
from tests.grid import InProcessGrid
from tests.recipes import changed_app, run

VARIANTS = {
    "the last layer": ("fine-tune",),
    "the last layer and low-rank matrices": ("fine-tune", "lora"),
    "the last layer and the last block": ("fine-tune", "fine-tune-block"),
    "all layers": ("fine-tune", "fine-tune-all"),
    "all layers, from random weights": ("fine-tune", "fine-tune-all"),
}
PRETRAINED_ON = range(5)  # the other classes are those of the nodes
COMMON = {
    "use-wandb": False, "query-max-delay": 0.0, "evaluate-every": 1000, "learning-rate": 0.02,
    "fraction-clients-train": 0.5,
}  # fmt: skip


def save_half(folder: Path, *, pretraining: bool) -> str:
    """Save the images of half of the classes as a data set; return its folder."""
    whole = datasets.load_dataset(bundled())
    names = whole["train"].features["label"].names
    mine = [label for label in range(len(names)) if (label in PRETRAINED_ON) == pretraining]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[names[label] for label in mine])}
    )
    for split, rows in whole.items():
        chosen = rows.filter(lambda label: label in mine, input_columns="label").with_format("arrow")[:]
        columns = {"image": chosen["image"].to_pylist(), "label": [mine.index(n) for n in chosen["label"].to_pylist()]}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / "data" / f"{split}.parquet")
    return str(folder)


def pretrain(app: SimpleNamespace, dataset: str, path: Path) -> None:
    """Train ResNet-18 for five epochs in one place, and save its weights."""
    config = InProcessGrid(app.client_app.app, app.defaults | COMMON | {"dataset": dataset, "local-epochs": 5}, 1)
    (context,) = config.contexts.values()
    typed = app.config.RunConfig.from_context(context)
    data = app.task.load_node_data({"partition-id": 0, "num-partitions": 1}, 0, typed, {})["train"]
    net = resnet18(num_classes=len(PRETRAINED_ON))
    net.conv1.register_forward_pre_hook(lambda module, args: (args[0].expand(-1, 3, -1, -1),))
    app.task.train(net, data, typed, lr=0.02, seed=0, device=torch.device("cpu"))
    fc = nn.Linear(512, 1000).state_dict(prefix="fc.")  # the recipe ignores the last layer of the file
    torch.save({name: t for name, t in net.state_dict().items() if not name.startswith("fc.")} | fc, path)


def measure(name: str, dataset: str, weights: Path, folder: Path, seed: int) -> list[dict[str, Any]]:
    """Run a variant once; return the rows of results.json."""
    app = changed_app(*VARIANTS[name])
    app.task.WEIGHTS = weights
    if "random" in name:
        app.task.WEIGHTS = folder / "random.pt"
        torch.save(resnet18().state_dict(), app.task.WEIGHTS)
        app.task.FineTuned.train = nn.Module.train  # random statistics of BatchNorm are of no use
    config = COMMON | {"dataset": dataset, "output-dir": str(folder), "seed": seed}
    run(app, config, InProcessGrid(app.client_app.app, config, 10))
    path = max(folder.glob("*/*/results.json"), key=lambda path: path.stat().st_mtime_ns)
    rows: list[dict[str, Any]] = json.loads(path.read_text())
    return rows


def main() -> None:
    """Parse the command line, pretrain, do the runs, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0 (default: %(default)s)")
    args = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder, began = Path(temporary), time.monotonic()
        first = save_half(folder / "first", pretraining=True)
        others = save_half(folder / "others", pretraining=False)
        print("Pretraining ...", flush=True)
        torch.manual_seed(0)
        pretrain(changed_app("fine-tune"), first, folder / "resnet18.pt")
        print(f"... took {time.monotonic() - began:.0f} s\n\n| trained | accuracy | MB a round | TRAIN, s a round |")
        print("| --- | --- | --- | --- |", flush=True)
        for name in VARIANTS:
            runs = [measure(name, others, folder / "resnet18.pt", folder, seed) for seed in range(args.seeds)]
            accuracy = np.array([rows[-1]["centralized_accuracy"] for rows in runs])
            traffic = runs[0][1]["megabytes_sent"] + runs[0][1]["megabytes_received"]
            seconds = np.median([row["seconds_train"] for rows in runs for row in rows[1:]])
            print(
                f"| {name} | {accuracy.mean():.3f} ± {accuracy.std():.3f} | {traffic:.1f} | {seconds:.1f} |", flush=True
            )


if __name__ == "__main__":
    main()
