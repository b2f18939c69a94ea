"""Compares how much of a pretrained ResNet-18 is trained: the recipes of docs/recipes/fine-tune.md, in this process.

    python -m benchmarks.fine_tune --seeds 3

The network is pretrained on five of the ten classes of the bundled images, and fine-tuned on the other five by 10
nodes, 5 of which train in each of 10 rounds.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import nn
from torchvision.models import resnet18

from benchmarks.recipes import Experiment, Variant, compare
from pytorch_example_low_level.sources import bundled
from tests.grid import InProcessGrid
from tests.recipes import changed_app

PRETRAINED_ON = 5  # the first classes; the others are those of the nodes
SETTINGS: dict[str, Any] = {"learning-rate": 0.02, "fraction-clients-train": 0.5}


def save_classes(folder: Path, classes: list[int]) -> str:
    """Save the images of some classes as a data set; return its folder."""
    for split, rows in datasets.load_dataset(bundled()).items():
        names = [rows.features["label"].names[label] for label in classes]
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        chosen = rows.filter(lambda label: label in classes, input_columns="label")
        renumbered = chosen.map(lambda label: {"label": classes.index(label)}, input_columns="label", features=features)
        renumbered.to_parquet(folder / "data" / f"{split}.parquet")
    return str(folder)


def pretrain(dataset: str, path: Path) -> None:
    """Train ResNet-18 for five epochs in one place, and save its weights."""
    app = changed_app("fine-tune")
    config = app.defaults | SETTINGS | {"dataset": dataset, "local-epochs": 5}
    (context,) = InProcessGrid(app.client_app.app, config, 1).contexts.values()
    typed = app.config.RunConfig.from_context(context)
    data = app.task.load_node_data(context.node_config, 0, typed, {})["train"]
    torch.manual_seed(0)
    net = resnet18(num_classes=PRETRAINED_ON)
    net.conv1.register_forward_pre_hook(lambda module, args: (args[0].expand(-1, 3, -1, -1),))
    app.task.train(net, data, typed, lr=0.02, seed=0, device=torch.device("cpu"))
    net.fc = nn.Linear(512, 1000)  # the recipe ignores the last layer of the file
    torch.save(net.state_dict(), path)


def experiment(dataset: str, weights: Path) -> Experiment:
    """Return the table: the variants with pretrained weights, and one with random weights."""

    def pretrained(app: Any) -> None:
        app.task.WEIGHTS = weights

    def untrained(app: Any) -> None:
        app.task.WEIGHTS = weights.with_name("random.pt")
        torch.save(resnet18().state_dict(), app.task.WEIGHTS)  # others for each seed
        app.task.FineTuned.train = nn.Module.train  # random statistics of BatchNorm are of no use

    variants = [
        Variant("the last layer", ("fine-tune",), change=pretrained),
        Variant("the last layer and low-rank matrices", ("fine-tune", "lora"), change=pretrained),
        Variant("the last layer and the last block", ("fine-tune", "fine-tune-block"), change=pretrained),
        Variant("all layers", ("fine-tune", "fine-tune-all"), change=pretrained),
        Variant("all layers, from random weights", ("fine-tune", "fine-tune-all"), change=untrained),
    ]
    figures = ("accuracy", "MB a round", "TRAIN, s a round")
    return Experiment(variants, figures, nodes=10, config=SETTINGS | {"dataset": dataset})


def main() -> None:
    """Parse the command line, pretrain, do the runs, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0 (default: %(default)s)")
    args = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        print("Pretraining ...", flush=True)
        weights = Path(folder, "resnet18.pt")
        pretrain(save_classes(Path(folder, "first"), list(range(PRETRAINED_ON))), weights)
        others = save_classes(Path(folder, "others"), list(range(PRETRAINED_ON, 10)))
        compare("fine-tune", experiment(others, weights), args.seeds)


if __name__ == "__main__":
    main()
