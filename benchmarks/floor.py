"""The floor of a round's time: the arithmetic of the app's rounds alone.

The app's `train` and `test` for the same cohorts, the test split and the nodes that evaluate, in as
many single-thread processes as the simulation has workers, on decoded tensors in memory: no Flower,
no messages, no data loading.
"""

from __future__ import annotations

import multiprocessing
import os
import time
import tomllib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from flwr.app import Context, RecordDict
from torch import nn

from deploy.cli import PROJECT
from pytorch_example_low_level import images, task
from pytorch_example_low_level.config import Purpose, RunConfig, random_stream
from pytorch_example_low_level.messaging import Node
from pytorch_example_low_level.server_app import sample_asked, sample_cohort

WORKERS = os.cpu_count() or 1


@dataclass(frozen=True)
class Setting:
    """How many nodes there are and take part, on which data; `width` is that of the first linear layer."""

    nodes: int
    trained: int
    asked: int
    dataset: str
    partitioner: str = "iid"
    width: int = 128

    def run_config(self) -> dict[str, Any]:
        """Return the settings of the app."""
        return {
            "dataset": self.dataset,
            "partitioner": self.partitioner,
            "fraction_clients_train": self.trained / self.nodes,
            "fraction_clients_query": self.asked / self.nodes,
            "min_train_nodes": 1,
            "use_wandb": False,
            "server_device": "cpu",
            "node_wait_timeout": 600.0,
        }

    def config(self) -> RunConfig:
        """Return the app's configuration."""
        defaults = tomllib.loads((PROJECT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
        changed = {key.replace("_", "-"): value for key, value in self.run_config().items()}
        return RunConfig.from_context(Context(0, 0, {}, RecordDict(), defaults | changed))

    def messages(self) -> dict[str, Any]:
        """Return the settings of the engine's app: how many messages of each kind it exchanges."""
        return {"trained": self.trained, "asked": self.asked, "evaluated": self.asked // 2}

    def arithmetic(self) -> dict[str, Any]:
        """Return how many random images stand for those of the app, beside the messages."""
        node = len(images.partitions(self.config(), 1).dataset) // self.nodes
        validation = int(node * images.VALIDATION_SHARE)
        work = {"train_images": node - validation, "validation_images": validation}
        return self.messages() | work | {"test_images": len(images.load_test_split(self.config()))}

    def __str__(self) -> str:
        """Return the words for the tables."""
        return f"{self.nodes:,} nodes" + (f", {self.asked} asked" if self.asked < self.nodes else "")


def cohorts(setting: Setting, rounds: int) -> list[list[tuple[str, int]]]:
    """Return the pieces of work of each round of the app, the large ones first."""
    config = setting.config()
    nodes = [Node(partition, "") for partition in range(setting.nodes)]

    def opts_in(server_round: int, partition: int) -> bool:
        _delay, chance = random_stream(config.seed, Purpose.QUERY, server_round, partition).random(2)
        return bool(chance < config.opt_in_probability)

    return [
        [("train", node.node_id) for node in sample_cohort(nodes, config, server_round)]
        + [("test", quarter) for quarter in range(4)]  # so that the workers can share it
        + [
            ("validation", n.node_id)
            for n in sample_asked(nodes, config, server_round)
            if opts_in(server_round, n.node_id)
        ]
        for server_round in range(1, rounds + 1)
    ]


def floor_worker(mine: Any, shared: Any, done: Any, setting: Setting) -> None:
    """Prepare the tensors of a round; then do pieces of its work for as long as there are any."""
    torch.set_num_threads(1)
    config, cpu = setting.config(), torch.device("cpu")
    test_split = images.load_test_split(config)
    quarters = np.array_split(np.arange(len(test_split)), 4)

    def split(part: str, number: int) -> images.Split:
        if part == "test":
            rows = quarters[number]
            return images.Split(test_split.images[rows], test_split.labels[rows], test_split.class_names)
        return images.load_partition(number, setting.nodes, config)[part]

    def model() -> nn.Module:
        net = task.make_model(test_split.facts)
        if setting.width != 128:
            classes = len(test_split.class_names)
            net.fc1, net.fc2 = nn.Linear(32 * 4 * 4, setting.width), nn.Linear(setting.width, classes)
        return net

    while (pieces := mine.get()) is not None:
        data = {piece: split(*piece) for piece in pieces}
        done.put("prepared")
        while (piece := shared.get()) is not None:
            if piece[0] == "train":
                task.train(model(), data[piece], config, lr=0.01, seed=1, device=cpu)
            else:
                task.test(model(), data[piece], cpu)
        done.put("worked")


def measure_floor(setting: Setting, rounds: int) -> list[float]:
    """Return the seconds of the bare work of each round after the first, in WORKERS processes."""
    context = multiprocessing.get_context("spawn")
    shared, done, own = context.Queue(), context.Queue(), [context.Queue() for _ in range(WORKERS)]
    workers = [context.Process(target=floor_worker, args=(mine, shared, done, setting)) for mine in own]
    for worker in workers:
        worker.start()
    seconds = []
    for pieces in cohorts(setting, rounds):
        for mine in own:
            mine.put(pieces)
        for _ in workers:
            done.get()
        started = time.monotonic()
        for piece in [*pieces, *[None] * WORKERS]:
            shared.put(piece)
        for _ in workers:
            done.get()
        seconds.append(time.monotonic() - started)
    for mine in own:
        mine.put(None)
    for worker in workers:
        worker.join()
    return seconds[1:]  # in the first, PyTorch still chooses its kernels
