"""The floor of a round's time: the arithmetic of the app's rounds alone.

The app's `train` and `test` for the same cohorts, the test split and the nodes that evaluate, in as
many single-thread processes as the simulation has workers, on decoded tensors in memory: no Flower,
no messages, no data loading.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from pytorch_example_low_level import images, task
from pytorch_example_low_level.config import Purpose, RunConfig, random_stream
from pytorch_example_low_level.messaging import Node
from pytorch_example_low_level.server_app import sample_asked, sample_cohort
from tests.grid import typed_config

WORKERS = os.cpu_count() or 1
QUARTERS = 4  # of the test split, so that the workers can share it

prepared: dict[Any, Any] = {}  # in a worker: what all pieces of work need, and the data of each


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
        config: RunConfig = typed_config(**self.run_config())
        return config

    def messages(self) -> dict[str, Any]:
        """Return the settings of the engine's app: how many messages of each kind it exchanges."""
        return {"trained": self.trained, "asked": self.asked, "evaluated": self.asked // 2}

    def arithmetic(self) -> dict[str, Any]:
        """Return how many random images stand for those of the app, beside the messages."""
        node = len(images.partitions(self.config(), 1).dataset) // self.nodes
        validation = int(node * images.VALIDATION_SHARE)
        work = {"train_images": node - validation, "validation_images": validation}
        tested = {"test_images": len(images.load_test_split(self.config())), "width": self.width}
        return self.messages() | work | tested

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
        [("train", node.node_id) for node in sample_cohort(nodes, config, number)]
        + [("test", quarter) for quarter in range(QUARTERS)]
        + [("validation", n.node_id) for n in sample_asked(nodes, config, number) if opts_in(number, n.node_id)]
        for number in range(1, rounds + 1)
    ]


def prepare(setting: Setting, pieces: list[tuple[str, int]], barrier: Any) -> None:
    """Load the tensors of all pieces in a worker; return when all workers have."""
    torch.set_num_threads(1)
    config = setting.config()
    test_split = images.load_test_split(config)
    prepared.update(config=config, width=setting.width, facts=test_split.facts)
    for part, number in pieces:
        if part == "test":
            rows = np.array_split(np.arange(len(test_split)), QUARTERS)[number]
            data = images.Split(test_split.images[rows], test_split.labels[rows], test_split.class_names)
        else:
            data = images.load_partition(number, setting.nodes, config)[part]
        prepared[part, number] = data
    barrier.wait()


def work(piece: tuple[str, int]) -> None:
    """Train or test a new model on the data of a piece."""
    facts, width, cpu = prepared["facts"], prepared["width"], torch.device("cpu")
    net = task.make_model(facts)
    if width != 128:
        net.fc1, net.fc2 = nn.Linear(32 * 4 * 4, width), nn.Linear(width, len(facts["class-names"]))
    if piece[0] == "train":
        task.train(net, prepared[piece], prepared["config"], lr=0.01, seed=1, device=cpu)
    else:
        task.test(net, prepared[piece], cpu)


def measure_floor(setting: Setting, rounds: int) -> list[float]:
    """Return the seconds of the bare work of each round after the first, in WORKERS processes."""
    work_of_rounds, context = cohorts(setting, rounds), multiprocessing.get_context("spawn")
    everything = sorted({piece for pieces in work_of_rounds for piece in pieces})
    seconds = []
    with ProcessPoolExecutor(WORKERS, context, prepare, (setting, everything, context.Barrier(WORKERS))) as pool:
        for pieces in work_of_rounds:
            started = time.monotonic()
            list(pool.map(work, pieces))
            seconds.append(time.monotonic() - started)
    return seconds[1:]  # in the first, the workers load data, and PyTorch still chooses its kernels
