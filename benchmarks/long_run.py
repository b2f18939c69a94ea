"""A long run over a network that fails: real nodes with TLS, a fault about every 20 s, and what is left at the end.

    python -m benchmarks.long_run --rounds 50

Each of three SuperNodes is behind a proxy. The faults are drawn from a seed. At the end, the run is repeated in this
process with the same replies left out, and must have the same bits. Fifty rounds take 30 to 50 minutes.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import re
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import psutil
import torch
from flwr.app import Error, Message

from benchmarks.simulation import AppCli, FinishedRun
from deploy.cli import command_of
from pytorch_example_low_level import client_app, server_app
from pytorch_example_low_level.sources import bundled
from tests.grid import InProcessGrid, make_context, run_config
from tests.proxy import ProxiedFederation

NODES = 3
EVERY = 20  # seconds between two faults
SETTINGS: dict[str, Any] = {
    "partitioner": "iid", "fraction_clients_train": 1.0, "opt_in_probability": 1.0, "query_max_delay": 0.0,
    "query_timeout": 60.0, "train_timeout": 60.0, "evaluate_timeout": 60.0, "evaluate_every": 10,
    "min_available_nodes": NODES, "node_wait_timeout": 300.0, "use_wandb": False,
}  # fmt: skip


class Faults(threading.Thread):
    """Draws a fault every now and then, and mends it."""

    def __init__(self, federation: ProxiedFederation, seed: int) -> None:
        super().__init__(daemon=True)
        self.federation, self.random, self.ended = federation, random.Random(seed), threading.Event()
        self.drawn: list[str] = []

    def run(self) -> None:
        """Do one fault after another."""
        kinds: dict[str, Callable[[int], None]] = {
            "cut for 5 s": lambda index: self.cut([index], 5),
            "all nodes cut for 10 s": lambda index: self.cut(list(range(NODES)), 10),
            "half-open for 15 s": self.hold,
            "slow": self.slow,
            "killed": self.kill,
            "the SuperLink hangs for 5 s": lambda index: self.hang(),
        }
        while not self.ended.wait(EVERY * self.random.uniform(0.5, 1.5)):
            kind, index = self.random.choice(list(kinds)), self.random.randrange(NODES)
            self.drawn.append(kind)
            print(f"      fault {len(self.drawn)}: node {index}, {kind}", flush=True)
            kinds[kind](index)

    def cut(self, indices: list[int], seconds: float) -> None:
        """Cut the connections of nodes."""
        for index in indices:
            self.federation.proxies[index].cut()
        self.ended.wait(seconds)
        for index in indices:
            self.federation.proxies[index].heal()

    def hold(self, index: int) -> None:
        """Let nothing of a node come through for a while."""
        self.federation.proxies[index].hold = True
        self.ended.wait(15)
        self.federation.proxies[index].heal()

    def slow(self, index: int) -> None:
        """Slow down a node until the next fault but one."""
        self.federation.proxies[index].latency, self.federation.proxies[index].rate = 0.2, 1e6
        self.ended.wait(EVERY)
        self.federation.proxies[index].latency, self.federation.proxies[index].rate = 0.0, float("inf")

    def kill(self, index: int) -> None:
        """Kill a SuperNode, and start it again when the SuperLink lets it."""
        node = self.federation.supernodes[index]
        os.killpg(node.pid, signal.SIGKILL)
        node.wait()
        while self.federation.online() == NODES and not self.ended.wait(5):
            pass
        self.federation.start_supernode(index)

    def hang(self) -> None:
        """Stop the SuperLink for a moment."""
        if self.federation.superlink is not None:
            self.federation.superlink.send_signal(signal.SIGSTOP)
            time.sleep(5)
            self.federation.superlink.send_signal(signal.SIGCONT)


class ServerWatch(threading.Thread):
    """Looks at the memory (MiB) and the open files of the ServerApp."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.ended, self.seen = threading.Event(), list[tuple[float, int]]()

    def run(self) -> None:
        """Look every two seconds."""
        while not self.ended.wait(2):
            for process in psutil.process_iter():
                if "flwr-serverapp" in command_of(process):
                    try:
                        self.seen.append((process.memory_full_info().uss / 2**20, process.num_fds()))
                    except psutil.Error:
                        continue  # it has just ended

    def tenths(self) -> str:
        """Return the medians over the first and the last tenth of the run, without its start and its end."""
        tenth = max(1, len(self.seen) // 10)
        first, last = self.seen[tenth : 2 * tenth], self.seen[-tenth - 2 : -2]
        medians = [[statistics.median(values) for values in zip(*part, strict=True)] for part in (first, last)]
        (memory, files), (memory_later, files_later) = medians
        return f"memory {memory:.0f} and {memory_later:.0f} MiB, open files {files:.0f} and {files_later:.0f}"


def few_images(folder: Path) -> str:
    """Save a part of the bundled images as a data set; return its folder."""
    datasets.disable_progress_bars()
    for split, rows in datasets.load_dataset(bundled()).items():
        rows.shuffle(seed=0).select(range(120)).to_parquet(folder / "data" / f"{split}.parquet")
    return str(folder)


def left_out(log: str, message_type: str) -> dict[int, set[str]]:
    """Return the ids of the nodes that a phase left out, by round."""
    found = re.findall(rf"Round (\d+): left out (.*) \({message_type}\): ", log)
    result: dict[int, set[str]] = {}
    for server_round, names in found:
        result.setdefault(int(server_round), set()).update(re.findall(r"node (\d+)", names))
    return result


def repeated(settings: dict[str, Any], missing: dict[int, set[int]], folder: Path) -> dict[str, torch.Tensor]:
    """Do the run in this process, without the TRAIN replies of some partitions; return the final model."""
    config = run_config(**settings, output_dir=str(folder))
    grid = InProcessGrid(client_app.app, config, NODES)

    def answer(message: Any, context: Any) -> Any:
        reply = client_app.app(message, context)
        partition, server_round = int(context.node_config["partition-id"]), int(message.metadata.group_id)
        if message.metadata.message_type == "train" and partition in missing.get(server_round, ()):
            return Message(Error(code=3, reason="left out"), reply_to=message)  # nobody waits for it
        return reply

    grid.handlers = dict.fromkeys(range(NODES), answer)
    config |= {"train-timeout": 600.0, "opt-in-probability": 0.0}
    for context in grid.contexts.values():
        context.run_config = config
    server_app.main(grid, make_context(config))
    (path,) = folder.glob("*/*/final_model.pt")
    model: dict[str, torch.Tensor] = torch.load(path, weights_only=True)
    return model


def check(finished: FinishedRun, rounds: int) -> None:
    """Raise AssertionError unless every round is committed, whole and in order."""
    assert finished.status == "finished:completed", finished.log[-3000:]
    assert finished.directory is not None
    rows = finished.results
    assert [row["round"] for row in rows] == list(range(rounds + 1))
    for row in rows[1:]:
        assert row["train_received"] + row["train_failed"] + row["train_rejected"] == row["train_sampled"] == NODES
        assert row["centralized_loss"] is not None
    lines = (finished.directory / "node_results.jsonl").read_text().splitlines()
    reported = [json.loads(line)["round"] for line in lines]
    assert {r: reported.count(r) for r in set(reported)} == {
        row["round"]: row["evaluate_received"] for row in rows if row["evaluate_received"]
    }
    state = torch.load(finished.directory / "checkpoints" / "last.pt", weights_only=True)
    assert state["server_round"] == rounds


def main() -> None:
    """Parse the command line, do the run, repeat it, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the faults (default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        settings = SETTINGS | {"dataset": few_images(Path(made, "few")), "num_server_rounds": args.rounds}
        with ProxiedFederation(Path(made, "federation"), NODES) as federation:
            flwr, faults, watch, log = AppCli(federation.flwr.home), Faults(federation, args.seed), ServerWatch(), ""
            for line in flwr.log_of(**settings):
                log += line
                if "Starting round 1/" in line:
                    faults.start()
                    watch.start()
                if "This run is finished" in line:  # an answer that Flower loses now would count as a failed run
                    faults.ended.set()
                if found := re.search(r"Starting round .*|Round took .*|Round \d+: left out .*", line):
                    print(f"      {found.group()}", flush=True)
            faults.ended.set()
            watch.ended.set()
            finished = flwr.finished(log)
            order = [
                line["node-id"] for line in json.loads(federation.flwr("supernode", "ls", "--format", "json"))["nodes"]
            ]
        check(finished, args.rounds)
        logging.getLogger("flwr").setLevel(logging.ERROR)
        names = {str(node): index for index, node in enumerate(order)}
        missing = {r: {names[node] for node in ids} for r, ids in left_out(finished.log, "train").items()}
        again = repeated(settings, missing, Path(made, "again"))
        assert finished.directory is not None
        final = torch.load(finished.directory / "final_model.pt", weights_only=True)
        same = all(torch.equal(final[name], again[name]) for name in again)
        replies = sum(row["train_received"] for row in finished.results[1:])
    print(f"{args.rounds} rounds, {len(faults.drawn)} faults, {replies} of {NODES * args.rounds} TRAIN replies used")
    print(f"The ServerApp's first and last tenth: {watch.tenths()}")
    print(f"The final model has the bits of a run with the same replies: {same}")


if __name__ == "__main__":
    main()
