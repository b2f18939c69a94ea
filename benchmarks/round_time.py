"""What a round costs: the real app beside its floor and beside Flower's engine, in one run.

    python -m benchmarks.round_time --out round_time.json
    python -m benchmarks.round_time --dataset /absolute/path/fashion_mnist --scale

- floor: exactly the work of the app's rounds (the same cohorts' SGD steps, the central
  evaluation, the same opted-in nodes' evaluation) in as many single-thread processes as the
  simulation has workers, on decoded tensors in memory: no Flower, no messages, no data loading;
- app: the real `flwr run`, the median of the rounds after the first, without stragglers; and
  once more with the default ones;
- engine: an app whose handlers do nothing, under the same `flwr run`: start-up, and what a
  round's messages cost.

Floor and app take turns, so that a noisy neighbour hits both.

`--scale` adds what 1,000 nodes and a 10 MB model cost; that takes some minutes more.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from flwr.app import Context, RecordDict

from benchmarks.simulation import LocalSuperLink, copy_app, report
from deploy.cli import PROJECT, FinishedRun
from pytorch_example_low_level import task
from pytorch_example_low_level.config import RunConfig
from pytorch_example_low_level.server_app import Node, sample_cohort
from pytorch_example_low_level.utils import Purpose, random_stream

WORKERS = os.cpu_count() or 1
NODES, SAMPLED, OPTED_IN = 50, 10, 25
MIB = 1024
STARTS = 5  # of app and engine each: what a start-up takes varies by seconds

NOOP_APP = """
import time
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
import numpy as np

client = ClientApp()
server = ServerApp()

@client.train()
def train(msg, context):
    return Message(RecordDict({"arrays": msg.content["arrays"], "metrics": MetricRecord({"n": 1})}), reply_to=msg)

@client.evaluate()
def evaluate(msg, context):
    return Message(RecordDict({"metrics": MetricRecord({"n": 1})}), reply_to=msg)

@client.query()
def query(msg, context):
    return Message(RecordDict({"config": ConfigRecord({"n": 1})}), reply_to=msg)

@server.main()
def main(grid, context):
    cfg = context.run_config
    while len(list(grid.get_node_ids())) < cfg["expected"]:
        time.sleep(0.1)
    nodes = sorted(grid.get_node_ids())
    arrays = ArrayRecord([np.zeros(cfg["parameters"], dtype=np.float32)])
    def exchange(kind, count):
        started = time.monotonic()
        content = {} if kind == MessageType.QUERY else {"arrays": arrays}
        content = RecordDict(content | {"config": ConfigRecord({"lr": 0.1})})
        messages = [Message(content, node, kind) for node in nodes[:count]]
        replies = list(grid.send_and_receive(messages))
        assert len(replies) == count
        print(f"NOOP {kind} {count} {time.monotonic() - started:.6f}", flush=True)
    exchange(MessageType.QUERY, len(nodes))
    for _ in range(cfg["rounds"]):
        exchange(MessageType.TRAIN, cfg["sampled"])
        exchange(MessageType.QUERY, len(nodes))
        exchange(MessageType.EVALUATE, cfg["opted-in"])
"""

NOOP_PROJECT = """
[project]
name = "noop"
version = "1.0.0"
license = { file = "LICENSE" }
dependencies = ["flwr[simulation]>=1.41,<2"]

[tool.flwr.app]
publisher = "benchmark"
fab-format-version = 1
flwr-version-target = "1.41.0"

[tool.flwr.app.components]
serverapp = "noop.app:server"
clientapp = "noop.app:client"

[tool.flwr.app.config]
expected = 50
sampled = 10
opted-in = 25
rounds = 3
parameters = 80202
"""


# ---------------------------------------------------------------------------------- Floor


def cohorts(dataset: str, rounds: int) -> list[list[tuple[str, int]]]:
    """Return the pieces of work of each round of the app, the large ones first."""
    defaults = tomllib.loads((PROJECT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    config = RunConfig.from_context(Context(0, 0, {}, RecordDict(), defaults | {"dataset": dataset}))
    nodes = [Node(partition, partition) for partition in range(NODES)]

    def opts_in(server_round: int, partition: int) -> bool:
        _delay, chance = random_stream(config.seed, Purpose.QUERY, server_round, partition).random(2)
        return bool(chance < config.opt_in_probability)

    return [
        [("train", node.key) for node in sample_cohort(nodes, config, server_round)]
        + [("test", quarter) for quarter in range(4)]
        + [("validation", node.key) for node in nodes if opts_in(server_round, node.key)]
        for server_round in range(1, rounds + 1)
    ]


def floor_worker(mine: Any, shared: Any, done: Any, dataset: str) -> None:
    """Prepare the tensors of a round; then do pieces of its work for as long as there are any."""
    torch.set_num_threads(1)
    test_split, classes = task.load_test_split(dataset)
    channels = test_split.images.shape[1]
    quarters = torch.arange(len(test_split)).chunk(4)  # so that the workers can share it

    def split(part: str, number: int) -> task.Split:
        if part == "test":
            return test_split[quarters[number]]
        return task.load_partition(channels, number, NODES, dataset, "dirichlet", 1.0, 42)[part]

    while (pieces := mine.get()) is not None:
        tensors = {piece: split(*piece) for piece in pieces}
        done.put("prepared")
        while (piece := shared.get()) is not None:
            images, labels = tensors[piece].images, tensors[piece].labels
            net = task.Net.initial(channels, classes, 0).to(memory_format=torch.channels_last)
            if piece[0] == "train":
                optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, fused=True)
                for rows in torch.randperm(len(labels)).split(32):  # type: ignore[no-untyped-call]
                    optimizer.zero_grad()
                    F.cross_entropy(net(task.normalise(images[rows])), labels[rows]).backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
            else:
                with torch.inference_mode():
                    for start in range(0, len(labels), 500):
                        net(task.normalise(images[start : start + 500])).argmax(1)
        done.put("worked")


def floor(dataset: str, rounds: int) -> list[float]:
    """Return the seconds of the bare work of each round after the first, in WORKERS processes."""
    context = multiprocessing.get_context("spawn")
    shared, done, own = context.Queue(), context.Queue(), [context.Queue() for _ in range(WORKERS)]
    workers = [context.Process(target=floor_worker, args=(mine, shared, done, dataset)) for mine in own]
    for worker in workers:
        worker.start()
    seconds = []
    for pieces in cohorts(dataset, rounds):
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
    return seconds[1:]  # in the first, PyTorch still makes up its mind


# ------------------------------------------------------------------------------------ Runs


@dataclass
class Watched:
    """A real run, with what was seen of it from outside."""

    run: FinishedRun
    seconds_to: dict[str, float] = field(default_factory=dict)  # the first line with a pattern
    server_peak: int = 0  # KiB, the process of ServerApp and engine
    worker_peak: int = 0  # KiB, the largest ClientApp worker


def watch(superlink: LocalSuperLink, patterns: dict[str, str], **arguments: Any) -> Watched:
    """Run an app; note when lines come, and how much memory its processes take at most."""
    watched, ended = Watched(FinishedRun("", "", "", None)), threading.Event()

    def memory() -> None:
        while not ended.wait(0.5):
            for status in Path("/proc").glob("[0-9]*/status"):
                try:
                    text, command = status.read_text(), (status.parent / "cmdline").read_text()
                except OSError:
                    continue  # it has just ended
                peak = int(match.group(1)) if (match := re.search(r"VmHWM:\s+(\d+)", text)) else 0
                if "flwr-simulation" in command and str(superlink.port) in command:
                    watched.server_peak = max(watched.server_peak, peak)
                elif command.startswith("ray::ClientAppActor"):
                    watched.worker_peak = max(watched.worker_peak, peak)

    thread = threading.Thread(target=memory)
    thread.start()
    started, lines = time.monotonic(), []
    for line in superlink.lines(**arguments):
        lines.append(line)
        for name, pattern in patterns.items():
            if name not in watched.seconds_to and re.search(pattern, line):
                watched.seconds_to[name] = time.monotonic() - started
    ended.set()
    thread.join()
    watched.run = superlink.flwr.finished("".join(lines))
    if watched.run.status != "finished:completed":
        raise SystemExit(f"a run ended with {watched.run.status}:\n{watched.run.log[-4000:]}")
    return watched


def noop_app(folder: Path) -> Path:
    """Write the app whose handlers do nothing."""
    (folder / "noop").mkdir(parents=True)
    (folder / "noop" / "__init__.py").touch()
    (folder / "noop" / "app.py").write_text(NOOP_APP)
    (folder / "pyproject.toml").write_text(NOOP_PROJECT)
    shutil.copy(PROJECT / "LICENSE", folder)
    return folder


def big_app(folder: Path) -> Path:
    """Copy the app with a model of 10 MB: 2,600,000 parameters."""
    copy_app(folder)
    module = folder / "pytorch_example_low_level" / "task.py"
    source = module.read_text()
    module.write_text(source.replace("32 * 4 * 4, 128)", "32 * 4 * 4, 4900)").replace("Linear(128,", "Linear(4900,"))
    return folder


def engine_seconds(watched: Watched, kind: str) -> float:
    """Return the median seconds a message of the no-op app."""
    found = re.findall(rf"NOOP {kind} (\d+) ([\d.]+)", watched.run.log)[1:]
    return statistics.median(float(seconds) / int(count) for count, seconds in found)


def median_of(rows: list[dict[str, Any]], key: str) -> float:
    """Return the median of a figure of results.json over rounds."""
    return float(statistics.median(row[key] for row in rows))


# ----------------------------------------------------------------------------------- Figures


def measure(
    superlink: LocalSuperLink, folder: Path, dataset: str, rounds: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Measure what a round and the start-up cost."""
    figures: dict[str, Any] = {}
    common: dict[str, Any] = {"nodes": NODES, "use_wandb": False, "dataset": dataset}
    first_reply = {"first TRAIN reply": r"Received 1/1 results \(TRAIN\)"}
    one = {"fraction_clients_train": 0.001, "min_train_nodes": 1, "num_server_rounds": 1}

    bare: list[float] = []
    rows: dict[str, list[dict[str, Any]]] = {"app": [], "app, stragglers": []}
    for turn in (1, 2):
        say(f"floor ({turn} of 2)")
        bare += floor(dataset, rounds)
        say(f"app without stragglers ({turn} of 2)")
        quick = watch(superlink, {}, num_server_rounds=rounds, query_max_delay=0.0, query_timeout=30.0, **common)
        rows["app"] += quick.run.results[2:]  # row 0 is the initial model; in round 1 the workers still load data
    say("app with the default stragglers")
    rows["app, stragglers"] = watch(superlink, {}, num_server_rounds=rounds, **common).run.results[2:]
    figures["floor: s a round"] = statistics.median(bare)
    for name, of in rows.items():
        figures[f"{name}: s a round"] = median_of(of, "seconds_total")
    for phase in ("train", "query", "evaluate"):
        figures[f"app: s in {phase.upper()}"] = median_of(rows["app"], f"seconds_{phase}")
    query_timeout = 2.0  # the default: with stragglers, QUERY always lasts until then
    figures["app, stragglers: s a round, without the deadline's 2 s"] = (
        figures["app, stragglers: s a round"] - query_timeout
    )
    say(f"start-up of app and engine, {STARTS} times each")
    noop = noop_app(folder / "noop-app")
    engine_first = {"first TRAIN reply": "NOOP train"}
    starts: dict[str, list[float]] = {"app": [], "engine": []}
    for _ in range(STARTS):
        app = watch(superlink, first_reply, **one, query_max_delay=0.0, **common)
        engine = watch(superlink, engine_first, nodes=NODES, app=noop)
        for name, watched in (("app", app), ("engine", engine)):
            starts[name].append(watched.seconds_to["first TRAIN reply"])
    figures["engine: s for a round's messages"] = sum(
        engine_seconds(engine, kind) * count
        for kind, count in (("train", SAMPLED), ("query", NODES), ("evaluate", OPTED_IN))
    )
    figures |= {f"{name}: s to the first TRAIN reply": statistics.median(v) for name, v in starts.items()}

    figures["app / floor, a round"] = figures["app: s a round"] / figures["floor: s a round"]
    figures["app / (floor + engine), a round"] = figures["app: s a round"] / (
        figures["floor: s a round"] + figures["engine: s for a round's messages"]
    )
    figures["stragglers / none, a round without the deadline's 2 s"] = (
        figures["app, stragglers: s a round, without the deadline's 2 s"] / figures["app: s a round"]
    )
    figures["start-up over the engine's, s"] = (
        figures["app: s to the first TRAIN reply"] - figures["engine: s to the first TRAIN reply"]
    )
    figures["server, peak MiB"] = quick.server_peak / MIB
    figures["worker, peak MiB"] = quick.worker_peak / MIB
    return figures


def measure_scale(superlink: LocalSuperLink, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure what many nodes and a large model cost: time a message, memory of the server."""
    figures: dict[str, Any] = {}
    settings = {"use_wandb": False, "partitioner": "iid", "query_max_delay": 0.0, "query_timeout": 300.0}
    settings |= {"opt_in_probability": 0.0, "num_server_rounds": 3}
    noop = folder / "noop-app"
    app, engine = {}, {}
    for nodes in (50, 1000):
        say(f"{nodes} nodes, app and engine")
        app[nodes] = watch(superlink, {}, nodes=nodes, fraction_clients_train=0.1, **settings)
        engine[nodes] = watch(superlink, {}, nodes=nodes, app=noop, expected=nodes, sampled=nodes // 10)
    figures["1,000 nodes: app, ms a QUERY"] = median_of(app[1000].run.results[2:], "seconds_query")
    figures["1,000 nodes: engine, ms a QUERY"] = 1000 * engine_seconds(engine[1000], "query")
    figures["1,000 nodes: app / engine, a QUERY"] = (
        figures["1,000 nodes: app, ms a QUERY"] / figures["1,000 nodes: engine, ms a QUERY"]
    )
    figures["server, 1,000 nodes against 50, MiB more"] = (app[1000].server_peak - app[50].server_peak) / MIB
    peaks: dict[tuple[str, int], int] = {}
    big = big_app(folder / "big-app")
    for sampled in (10, 200):
        say(f"10 MB model, {sampled} nodes sampled, app and engine")
        fraction = sampled / 250
        run = settings | {"num_server_rounds": 2, "fraction_clients_train": fraction}
        peaks["app", sampled] = watch(superlink, {}, nodes=250, app=big, **run).server_peak
        engine_run = watch(
            superlink, {}, nodes=250, app=noop, expected=250, sampled=sampled, parameters=2_600_000, rounds=2
        )
        peaks["engine", sampled] = engine_run.server_peak
    app_more = peaks["app", 200] - peaks["app", 10]
    figures["server, 10 MB model, 200 sampled against 10, MiB more"] = app_more / MIB
    figures["the same of the engine, MiB more"] = (peaks["engine", 200] - peaks["engine", 10]) / MIB
    return figures


def main() -> None:
    """Parse the command line, measure, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default=task.BUNDLED, help="as in the run configuration (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="rounds of each run (default: %(default)s)")
    parser.add_argument("--scale", action="store_true", help="also 1,000 nodes and a 10 MB model")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    started, steps = time.monotonic(), iter(range(1, 100))
    total = 6 + 4 * args.scale

    def say(what: str) -> None:
        print(f"[{next(steps)}/{total}, {time.monotonic() - started:.0f} s] measuring: {what} ...", flush=True)

    with tempfile.TemporaryDirectory() as name, LocalSuperLink(Path(name) / "flower") as superlink:
        figures = measure(superlink, Path(name), args.dataset, args.rounds, say)
        if args.scale:
            figures |= measure_scale(superlink, Path(name), say)
    cpu = subprocess.run(["uname", "-m"], capture_output=True, text=True, check=True).stdout.strip()
    print(f"\n{WORKERS} cores ({cpu}), torch {torch.__version__}, {args.dataset}; medians\n")
    report(figures, args.out)


if __name__ == "__main__":
    main()
