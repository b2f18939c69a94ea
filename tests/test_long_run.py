"""A long run over a network that fails: a fault about every 20 s, and what is left at the end.

    ROUNDS=50 pytest -m network -s tests/test_long_run.py

The faults are drawn from a seed. Fifty rounds take 30 to 50 minutes. Without ROUNDS, there are five.
"""

import contextlib
import json
import os
import random
import re
import statistics
import threading

import psutil
import pytest
import torch
from flwr.app import Error, Message

from benchmarks.simulation import FinishedRun, command_of
from benchmarks.watched import repeatedly
from deploy.cli import family
from pytorch_example_low_level import client_app
from tests.conftest import model, same_bits
from tests.grid import InProcessGrid
from tests.proxy import ProxiedFederation
from tests.test_network import NODES, SETTINGS, federation, kill, pause, revive, run

__all__ = ["federation", "run"]  # fixtures
pytestmark = [pytest.mark.network, pytest.mark.e2e, pytest.mark.timeout(7200)]

ROUNDS = int(os.environ.get("ROUNDS", "5"))
EVERY = 20  # seconds between two faults
FAULTS = (
    "cut for 5 s",
    "all nodes cut for 10 s",
    "half-open for 15 s",
    "slow",
    "killed",
    "the SuperLink hangs for 5 s",
)


class Faults(threading.Thread):
    """Draws a fault every now and then, and mends it."""

    def __init__(self, federation: ProxiedFederation) -> None:
        super().__init__(daemon=True)
        self.federation, self.ended, self.drawn = federation, threading.Event(), 0

    def run(self) -> None:
        draw = random.Random(0)
        while not self.ended.wait(EVERY * draw.uniform(0.5, 1.5)):
            fault, index = draw.choice(FAULTS), draw.randrange(NODES)
            self.drawn += 1
            print(f"fault {self.drawn}: node {index}, {fault}", flush=True)
            self.do(fault, index)
            for proxy in self.federation.proxies:
                proxy.heal()

    def do(self, fault: str, index: int) -> None:
        """Do a fault, and wait as long as it lasts."""
        proxy = self.federation.proxies[index]
        if fault == "cut for 5 s":
            proxy.cut()
            self.ended.wait(5)
        elif fault == "all nodes cut for 10 s":
            for each in self.federation.proxies:
                each.cut()
            self.ended.wait(10)
        elif fault == "half-open for 15 s":
            proxy.hold = True
            self.ended.wait(15)
        elif fault == "slow":
            proxy.latency, proxy.rate = 0.2, 1e6
            self.ended.wait(EVERY)
        elif fault == "killed":
            kill(self.federation.supernodes[index])
            revive(self.federation, index)
        else:
            pause(self.federation.superlink, 5)
            self.ended.wait(5)


def look(federation: ProxiedFederation, faults: Faults, seen: list[tuple[float, int]]) -> None:
    """Note the memory (MiB) and the open files of the ServerApp, while there are faults."""
    for process in family(federation.superlink.pid) if faults.is_alive() else ():
        if "flwr-serverapp" in command_of(process):
            with contextlib.suppress(psutil.Error):  # it has just ended
                seen.append((process.memory_full_info().uss / 2**20, process.num_fds()))


def tenths(seen: list[tuple[float, int]]) -> str:
    """The medians over the second and the last tenth of the run, without its start and its end."""
    tenth = max(1, len(seen) // 10)
    parts = seen[tenth : 2 * tenth], seen[-tenth - 2 : -2]
    medians = [[statistics.median(values) for values in zip(*part, strict=True)] for part in parts]
    (memory, files), (later_memory, later_files) = medians
    return f"memory {memory:.0f} and {later_memory:.0f} MiB, open files {files:.0f} and {later_files:.0f}"


def check(finished: FinishedRun) -> None:
    """Every round is committed, whole and in order."""
    rows = finished.results
    assert [row["round"] for row in rows] == list(range(ROUNDS + 1))
    for row in rows[1:]:
        assert row["train_received"] + row["train_failed"] + row["train_rejected"] == row["train_sampled"] == NODES
        assert row["centralized_loss"] is not None
    lines = (finished.directory / "node_results.jsonl").read_text().splitlines()
    reported = [json.loads(line)["round"] for line in lines]
    assert {r: reported.count(r) for r in set(reported)} == {
        row["round"]: row["evaluate_received"] for row in rows if row["evaluate_received"]
    }
    state = torch.load(finished.directory / "checkpoints" / "last.pt", weights_only=True)
    assert state["server_round"] == ROUNDS


def grid_without(left_out: dict[int, set[int]], config: dict) -> InProcessGrid:
    """A Grid in this process, on which the replies to TRAIN of these partitions are left out, by round."""

    def answer(message, context):
        reply = client_app.app(message, context)
        partition, server_round = context.node_config["partition-id"], int(message.metadata.group_id)
        if message.metadata.message_type == "train" and partition in left_out.get(server_round, ()):
            return Message(Error(code=3, reason="left out"), reply_to=message)  # nobody waits for it
        return reply

    return InProcessGrid(answer, config, NODES)


def test_a_long_run_with_many_faults_has_the_bits_of_the_replies_that_arrived(federation, run, app):
    faults, seen = Faults(federation), []
    # Flower would count a run as failed if its answer after the end were lost.
    on = {"Starting round 1/": faults.start, "This run is finished": faults.ended.set}
    settings = {"num_server_rounds": ROUNDS, "evaluate_every": 10, "node_wait_timeout": 300.0}
    with repeatedly(lambda: look(federation, faults, seen), 2):
        finished = run(on, **settings)
    faults.join()
    check(finished)
    nodes = json.loads(federation.flwr("supernode", "ls", "--format", "json"))["nodes"]
    partitions = {str(node["node-id"]): index for index, node in enumerate(nodes)}
    left_out: dict[int, set[int]] = {}
    for server_round, names in re.findall(r"Round (\d+): left out (.*) \(train\): ", finished.log):
        left_out.setdefault(int(server_round), set()).update(partitions[i] for i in re.findall(r"node (\d+)", names))
    settings = SETTINGS | settings | {"train_timeout": 600.0, "opt_in_probability": 0.0}
    directory = app.run(grid_without(left_out, app.config(**settings)), **settings)
    assert same_bits(model(finished.directory), model(directory))
    replies = sum(row["train_received"] for row in finished.results[1:])
    print(f"FIGURES {faults.drawn} faults, {replies} of {NODES * ROUNDS} TRAIN replies used")
    print(f"FIGURES of the ServerApp, second and last tenth of the run: {tenths(seen)}")
