"""Measures a round of the app, its arithmetic alone and Flower's engine alone, in one run.

    python -m benchmarks.round_time --out round_time
    python -m benchmarks.round_time --dataset /absolute/path/fashion_mnist --scale --out round_time

- floor: the arithmetic of the app's rounds (the SGD steps of the same cohorts, the central
  evaluation, the evaluation by the same nodes) in as many single-thread processes as the simulation
  has workers, on decoded tensors in memory: no Flower, no messages, no data loading;
- engine: an app with handlers that do nothing, under the same `flwr run`. It waits for the nodes as
  the app does, sends as many messages of the same size to nodes drawn at random, and asks for at
  most 64 replies at a time, every 10 ms. `Grid.send_and_receive`, which asks for all replies at once
  every 100 ms, is measured beside it at 50 nodes;
- engine with the arithmetic: the same app, whose handlers train and test the app's model on as many random
  images in memory, and whose ServerApp averages the models and tests their mean. Unlike the sum of floor and
  engine, it has the phases of a round, and the engine's threads compete with the arithmetic for the cores;
- engine with the imports: an app whose handlers only import what the app imports, and create one optimizer. It gives
  the part of the start-up that is spent on imports;
- app: the real `flwr run`, the median of the rounds after the first, without stragglers; and once
  with the default ones.

Floor, app and engine take turns, so that other work on the machine affects all of them.

`--scale` adds 50 to 10,000 nodes, of which 50 train and up to 200 are asked, and a model of 25 MB.
OUT.json is written after every step, OUT.png at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import platform
import re
import shutil
import statistics
import tempfile
import threading
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from flwr.app import Context, RecordDict
from torch import nn

from benchmarks.simulation import FinishedRun, LocalSuperLink, copy_app
from deploy.cli import PROJECT, interrupted_by_signals
from pytorch_example_low_level import images, task
from pytorch_example_low_level.config import Purpose, RunConfig, random_stream
from pytorch_example_low_level.messaging import Node
from pytorch_example_low_level.server_app import sample_asked, sample_cohort

WORKERS = os.cpu_count() or 1
STARTS = 5  # of app and engine each: start-up times vary by seconds
PHASES = ("train", "query", "evaluate")
MIB = 1024
BIG = 12_000  # units of the first linear layer that give a model of 25 MB

# The most that a figure should be, on 2 cores; the others have no target.
TARGETS = {
    "50 nodes: app / (floor + engine), a round": 1.0,
    "50 nodes: start-up to the first TRAIN reply, over the engine's, s": 6.0,
    "1,000 nodes, 100 asked: app, s per round": 4.5,
    "1,000 nodes, 100 asked: app / engine with the arithmetic, a round": 1.25,
    "10,000 nodes, 200 asked: app, s per round": 14.0,
    "10,000 nodes, 200 asked: app / engine with the arithmetic, a round": 1.25,
    "10,000 nodes, 200 asked: app, s from nodes listed to row written, first round": 35.0,
    "server, 10,000 nodes against 50, MiB more, beyond the engine's own": 64.0,
}

NOOP_APP = """
from functools import lru_cache
import random
import time
from types import SimpleNamespace
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
import numpy as np

client = ClientApp()
server = ServerApp()
SETTINGS = SimpleNamespace(local_epochs=1, batch_size=32, momentum=0.9, logit_adjustment=1.0, augment=False)

@lru_cache
def images(count):
    import torch
    from pytorch_example_low_level.images import Split
    pixels = torch.randint(0, 256, (count, 1, 28, 28), dtype=torch.uint8)
    return Split(pixels, torch.arange(count) % 10, [str(i) for i in range(10)])

def prepare_node():
    pass

def prepare_server():
    pass

def model(arrays):
    from pytorch_example_low_level.task import make_model
    net = make_model(images(1).facts)
    net.load_state_dict(arrays.to_torch_state_dict())
    return net

def test(arrays, count):
    import torch
    from pytorch_example_low_level import task
    task.test(model(arrays), images(count), torch.device("cpu"))

@client.train()
def train(msg, context):
    prepare_node()
    arrays, count = msg.content["arrays"], context.run_config["train-images"]
    if count:
        import torch
        from pytorch_example_low_level import task
        net = model(arrays)
        task.train(net, images(count), SETTINGS, lr=0.01, seed=1, device=torch.device("cpu"))
        arrays = ArrayRecord(net.state_dict())
    metrics = MetricRecord({"train_loss": 1.0, "num-examples": 1})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=msg)

@client.evaluate()
def evaluate(msg, context):
    if context.run_config["validation-images"]:
        test(msg.content["arrays"], context.run_config["validation-images"])
    metrics = MetricRecord({"eval_loss": 1.0, "eval_acc": 1.0, "num-examples": 1})
    return Message(RecordDict({"metrics": metrics}), reply_to=msg)

@client.query()
def query(msg, context):
    return Message(RecordDict({"config": ConfigRecord({"opt-in": True})}), reply_to=msg)

def connected_nodes(grid, last):
    while True:
        nodes = sorted(grid.get_nodes(), key=lambda node: node.registered_at)
        if len(nodes) >= 2 and len(nodes) == last:
            return [node.node_id for node in nodes]
        last = len(nodes)
        time.sleep(0.5)

def send_and_look(grid, messages, meanwhile):
    waiting = list(grid.push_messages(messages))
    meanwhile()
    while waiting:
        replies = {reply.metadata.reply_to_message_id: reply for reply in grid.pull_messages(waiting[:64])}
        yield from replies.values()
        waiting = [message_id for message_id in waiting if message_id not in replies]
        time.sleep(0.01)

def counted(replies, expected):
    received = 0
    for reply in replies:
        received += 1
        yield reply
    assert received == expected

def drop(replies):
    for _ in replies:
        pass

def mean(replies, like):
    from pytorch_example_low_level.server_app import weighted_mean
    updates = ((reply.content["arrays"].to_torch_state_dict(), 1) for reply in replies)
    return ArrayRecord(weighted_mean(updates, like.to_torch_state_dict()))

@server.main()
def main(grid, context):
    prepare_server()
    cfg = context.run_config
    if cfg["test-images"]:
        from pytorch_example_low_level.task import make_model
        arrays = ArrayRecord(make_model(images(1).facts).state_dict())
    else:  # as many arrays as the app's model has, and as many numbers
        values = np.zeros(cfg["parameters"] // 12, dtype=np.float32)
        arrays = ArrayRecord({f"{i}": Array(values) for i in range(12)})
    def exchange(kind, count, consume=drop, meanwhile=lambda: None):
        started = time.monotonic()
        nodes = [connected[i] for i in sorted(draw(range(len(connected)), count))]
        content = {} if kind == MessageType.QUERY else {"arrays": arrays}
        content = RecordDict(content | {"config": ConfigRecord({"server-round": 1, "lr": 0.1})})
        messages = [Message(content, node, kind) for node in nodes]
        if cfg["send-and-receive"]:
            replies = grid.send_and_receive(messages)
        else:
            replies = send_and_look(grid, messages, meanwhile)
        consumed = consume(counted(replies, len(nodes)))
        print(f"NOOP {kind} {len(nodes)} {time.monotonic() - started:.6f}", flush=True)
        return consumed
    connected = []
    for server_round in range(1, cfg["rounds"] + 1):
        connected = connected_nodes(grid, last=len(connected))
        draw = random.Random(server_round).sample
        started = time.monotonic()
        if cfg["test-images"]:
            arrays = exchange(MessageType.TRAIN, cfg["trained"], lambda replies: mean(replies, like=arrays))
            exchange(MessageType.QUERY, cfg["asked"], meanwhile=lambda: test(arrays, cfg["test-images"]))
        else:
            exchange(MessageType.TRAIN, cfg["trained"])
            exchange(MessageType.QUERY, cfg["asked"])
        exchange(MessageType.EVALUATE, cfg["evaluated"])
        print(f"NOOP round {len(connected)} {time.monotonic() - started:.6f}", flush=True)
"""

IMPORTS = """
import torch

@lru_cache
def prepare_node():
    import flwr_datasets.partitioner
    torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)

def prepare_server():
    import datasets
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
trained = 10
asked = 50
evaluated = 25
rounds = 3
parameters = 80298
train-images = 0
validation-images = 0
test-images = 0
send-and-receive = false
"""


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
        """Return how many messages of each kind the engine exchanges."""
        return {"trained": self.trained, "asked": self.asked, "evaluated": self.asked // 2}

    def arithmetic(self) -> dict[str, Any]:
        """Return how many random images stand for those of the app, beside the messages."""
        node = len(images.partitions(self.dataset, "iid", 1, 1.0, 42, decoded=False).dataset) // self.nodes
        validation = int(node * images.VALIDATION_SHARE)
        work = {"train_images": node - validation, "validation_images": validation}
        return self.messages() | work | {"test_images": len(images.load_test_split(self.dataset))}

    def __str__(self) -> str:
        """Return the words for the tables."""
        return f"{self.nodes:,} nodes" + (f", {self.asked} asked" if self.asked < self.nodes else "")


SCALE = ((50, 50), (200, 200), (1000, 100), (1000, 200), (5000, 200), (10_000, 200))  # nodes, asked; 50 train


# ---------------------------------------------------------------------------------- Floor


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
    config = setting.config()
    test_split = images.load_test_split(setting.dataset)
    quarters = np.array_split(np.arange(len(test_split)), 4)
    classes = len(test_split.class_names)

    def split(part: str, number: int) -> images.Split:
        if part == "test":
            rows = quarters[number]
            return images.Split(test_split.images[rows], test_split.labels[rows], test_split.class_names)
        how = (config.dataset, config.partitioner, config.dirichlet_alpha, config.seed)
        return images.load_partition(number, setting.nodes, *how)[part]

    def model() -> nn.Module:
        net = task.make_model(test_split.facts)
        if setting.width != 128:
            net.fc1, net.fc2 = nn.Linear(32 * 4 * 4, setting.width), nn.Linear(setting.width, classes)
        return net

    while (pieces := mine.get()) is not None:
        tensors = {piece: split(*piece) for piece in pieces}
        done.put("prepared")
        while (piece := shared.get()) is not None:
            inputs, labels = tensors[piece].images, tensors[piece].labels
            net = model()
            if piece[0] == "train":
                optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=config.momentum, fused=True)
                adjustment = config.logit_adjustment * torch.log(torch.bincount(labels, minlength=classes) + 1.0)
                for rows in torch.randperm(len(labels)).tensor_split(math.ceil(len(labels) / config.batch_size)):
                    optimizer.zero_grad()
                    logits = net(task.normalise(inputs[rows])) + adjustment
                    F.cross_entropy(logits, labels[rows]).backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
            else:
                with torch.inference_mode():
                    for start in range(0, len(labels), 500):
                        net(task.normalise(inputs[start : start + 500])).argmax(1)
        done.put("worked")


def floor(setting: Setting, rounds: int) -> list[float]:
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


# ------------------------------------------------------------------------------------ Runs


@dataclass
class Watched:
    """A real run, with what was seen of it from outside."""

    run: FinishedRun
    seconds_to: dict[str, float] = field(default_factory=dict)  # the first line with a pattern
    server_peak: int = 0  # KiB, the process of ServerApp and engine
    worker_peak: int = 0  # KiB, the largest ClientApp worker

    def engine(self, kind: str) -> list[float]:
        """Return the seconds of an exchange of the no-op app, or of its "round", in each round."""
        return [float(seconds) for seconds in re.findall(rf"NOOP {kind} \d+ ([\d.]+)", self.run.log)]


def watch(superlink: LocalSuperLink, pattern: str = "", **arguments: Any) -> Watched:
    """Run an app; note when a line with a pattern comes, and how much memory its processes take at most."""
    watched, ended = Watched(FinishedRun("", "", "", None)), threading.Event()

    earlier = set(processes())  # that of the run before may still be there

    def memory() -> None:
        while not ended.wait(1):
            for process in set(processes()) - earlier:
                name = command(process)
                if "flwr-simulation" in name and str(superlink.port) in name:
                    watched.server_peak = max(watched.server_peak, peak_kib(process))
                elif name.startswith("ray::ClientAppActor"):
                    watched.worker_peak = max(watched.worker_peak, peak_kib(process))

    thread = threading.Thread(target=memory)
    thread.start()
    started, lines = time.monotonic(), []
    try:
        for line in superlink.lines(**arguments):
            lines.append(line)
            if pattern and pattern not in watched.seconds_to and re.search(pattern, line):
                watched.seconds_to[pattern] = time.monotonic() - started
            if found := re.search(r"Round took .*|NOOP round .*", line):
                print(f"      {found.group().replace('NOOP round', 'engine: nodes, s per round')}", flush=True)
    finally:
        ended.set()
        thread.join()
    watched.run = superlink.flwr.finished("".join(lines))
    if watched.run.status != "finished:completed":
        raise SystemExit(f"a run ended with {watched.run.status}:\n{watched.run.log[-4000:]}")
    return watched


def processes() -> list[Path]:
    """Return the folders of all processes."""
    return list(Path("/proc").glob("[0-9]*"))


def command(process: Path) -> str:
    """Return the command line of a process; "" when it has ended."""
    with contextlib.suppress(OSError):
        return (process / "cmdline").read_text()
    return ""


def peak_kib(process: Path) -> int:
    """Return the most memory that a process has had; 0 when it has ended."""
    with contextlib.suppress(OSError):
        found = re.search(r"VmHWM:\s+(\d+)", (process / "status").read_text())
        return int(found.group(1)) if found else 0
    return 0


def noop_app(folder: Path, more: str = "") -> Path:
    """Write the app whose handlers do nothing, with more code at its end."""
    (folder / "noop").mkdir(parents=True)
    (folder / "noop" / "__init__.py").touch()
    (folder / "noop" / "app.py").write_text(NOOP_APP + more)
    (folder / "pyproject.toml").write_text(NOOP_PROJECT)
    shutil.copy(PROJECT / "LICENSE", folder)
    return folder


def big_app(folder: Path) -> Path:
    """Copy the app with a model of 25 MB: 6,300,000 parameters."""
    copy_app(folder)
    module = folder / "pytorch_example_low_level" / "task.py"
    source = module.read_text()
    wide = source.replace("32 * 4 * 4, 128)", f"32 * 4 * 4, {BIG})").replace("Linear(128,", f"Linear({BIG},")
    module.write_text(wide)
    return folder


def median_of(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    """Return the median of a figure of results.json over rounds."""
    return float(statistics.median(row[key] for row in rows))


class Progress:
    """Says which step is under way, and how long the others will take, from what they took before on 2 cores."""

    def __init__(self, steps: Sequence[tuple[str, float]]) -> None:
        self.steps = steps
        self.started = time.monotonic()
        self.done = 0

    def next(self, what: str) -> None:
        """Print the step that begins."""
        names, usual = zip(*self.steps, strict=True)
        if names[self.done] != what:
            raise ValueError(f"the next step is {names[self.done]!r}, not {what!r}")
        gone, before = time.monotonic() - self.started, sum(usual[: self.done])
        pace = gone / before if before else 1.0
        left = timedelta(seconds=round(pace * sum(usual[self.done :])))
        self.done += 1
        print(f"[{self.done}/{len(self.steps)}, {gone:.0f} s gone, about {left} left] {what} ...", flush=True)


# ----------------------------------------------------------------------------------- Figures


@dataclass
class Report:
    """All that was measured; written after each step."""

    out: Path | None
    dataset: str
    figures: dict[str, float] = field(default_factory=dict)
    scale: list[dict[str, Any]] = field(default_factory=list)

    def save(self) -> None:
        """Write OUT.json."""
        if self.out:
            machine = {"cores": WORKERS, "machine": platform.machine(), "torch": torch.__version__}
            content = machine | {"dataset": self.dataset, "figures": self.figures, "scale": self.scale}
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.out.with_suffix(".json").write_text(json.dumps(content, indent=1))

    def table(self) -> str:
        """Return the figures in Markdown, those with a target first."""
        lines = ["| figure | target | |", "| --- | --- | --- |"]
        for key in sorted(self.figures, key=lambda key: key not in TARGETS):
            target = f"≤ {TARGETS[key]:g}" if key in TARGETS else ""
            lines.append(f"| {key} | {target} | {self.figures[key]:.2f} |")
        return "\n".join(lines)

    def scale_table(self) -> str:
        """Return a line for each number of nodes in Markdown: seconds of a round, phase by phase."""
        columns = {
            "app": "app_round", "TRAIN": "app_train", "QUERY": "app_query", "EVALUATE": "app_evaluate",
            "engine": "engine_round", "floor": "floor", "app / (floor + engine)": "ratio",
            "engine with the arithmetic": "busy_round", "app / engine with the arithmetic": "busy_ratio",
            "first round, app": "app_first", "first round, engine": "engine_first",
        }  # fmt: skip
        lines = [f"| nodes | asked | {' | '.join(columns)} |", f"|{' --- |' * (len(columns) + 2)}"]
        for row in self.scale:
            cells = " | ".join(f"{row[key]:.2f}" for key in columns.values())
            lines.append(f"| {row['nodes']:,} | {row['asked']} | {cells} |")
        return "\n".join(lines)

    def law(self) -> str:
        """Return the seconds of a round as a straight line over the nodes, where equally many were asked."""
        rows = [row for row in self.scale if row["asked"] == SCALE[-1][1]]
        nodes = np.array([row["nodes"] for row in rows])
        slope, start = np.polyfit(nodes, [row["app_round"] for row in rows], 1)
        engine_slope, engine_start = np.polyfit(nodes, [row["engine_round"] for row in rows], 1)
        return (
            f"A round takes {start:.1f} s plus {1000 * slope:.2f} s per 1,000 nodes, and the engine alone "
            f"{engine_start:.1f} s plus {1000 * engine_slope:.2f} s. With 100,000 nodes that would be "
            f"{start + 1e5 * slope:.0f} s, {engine_start + 1e5 * engine_slope:.0f} s of it the engine's."
        )

    def plot(self, path: Path) -> None:
        """Draw the seconds of a round over the nodes, phase by phase."""
        from matplotlib.figure import Figure

        rows = {row["nodes"]: row for row in self.scale}.values()  # of two numbers asked, the larger
        nodes = [row["nodes"] for row in rows]
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.subplots()
        for label, key, style, colour in (
            ("app", "app_round", "o-", "#0072B2"),
            ("TRAIN", "app_train", "s:", "#E69F00"),
            ("QUERY", "app_query", "^:", "#009E73"),
            ("EVALUATE", "app_evaluate", "v:", "#CC79A7"),
            ("engine with handlers that do nothing", "engine_round", "x--", "#D55E00"),
        ):
            axes.plot(nodes, [row[key] for row in rows], style, color=colour, label=label)
        title = "A round after the first: 50 nodes train, at most 200 are asked"
        axes.set(xscale="log", yscale="log", xlabel="nodes", ylabel="seconds", title=title)
        axes.set_xticks(nodes, [f"{count:,}" for count in nodes])
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize="small")
        figure.savefig(path, dpi=110)


def measure(superlink: LocalSuperLink, noop: Path, report: Report, progress: Progress, rounds: int) -> None:
    """Measure a round and the start-up with 50 nodes."""
    figures = report.figures
    setting = Setting(50, 10, 50, report.dataset, "dirichlet")
    quick: dict[str, Any] = {"query_max_delay": 0.0, "query_timeout": 30.0, "nodes": 50} | setting.run_config()

    bare: list[float] = []
    engine: list[float] = []
    busy: list[float] = []
    arithmetic = setting.arithmetic()
    app: list[dict[str, Any]] = []
    for turn in (1, 2):
        progress.next(f"floor ({turn} of 2)")
        bare += floor(setting, rounds)
        progress.next(f"app without stragglers ({turn} of 2)")
        watched = watch(superlink, num_server_rounds=rounds, **quick)
        app += watched.run.results[2:]  # row 0 is the initial model; in round 1 the workers load data
        progress.next(f"engine ({turn} of 2)")
        engine += watch(superlink, nodes=50, app=noop, rounds=rounds, **setting.messages()).engine("round")[1:]
        progress.next(f"engine with the arithmetic ({turn} of 2)")
        busy += watch(superlink, nodes=50, app=noop, rounds=rounds, **arithmetic).engine("round")[1:]
    progress.next("engine by send_and_receive")
    naive = watch(superlink, nodes=50, app=noop, rounds=rounds, send_and_receive=True, **setting.messages())
    progress.next("app with the default stragglers")
    stragglers = watch(superlink, num_server_rounds=rounds, nodes=50, **setting.run_config()).run.results[2:]

    figures["50 nodes: floor, s per round"] = statistics.median(bare)
    figures["50 nodes: engine, s per round"] = statistics.median(engine)
    figures["50 nodes: engine with the arithmetic, s per round"] = statistics.median(busy)
    figures["50 nodes: engine by send_and_receive, s per round"] = statistics.median(naive.engine("round")[1:])
    figures["50 nodes: app, s per round"] = median_of(app, "seconds_total") - median_of(app, "seconds_nodes")
    for phase in PHASES:
        figures[f"50 nodes: app, s in {phase.upper()}"] = median_of(app, f"seconds_{phase}")
    figures["50 nodes: app, s in the central evaluation"] = median_of(app, "seconds_central")
    figures["50 nodes: app with stragglers, s per round"] = median_of(stragglers, "seconds_total")
    figures["50 nodes: app / floor, a round"] = (
        figures["50 nodes: app, s per round"] / figures["50 nodes: floor, s per round"]
    )
    figures["50 nodes: app / (floor + engine), a round"] = figures["50 nodes: app, s per round"] / (
        figures["50 nodes: floor, s per round"] + figures["50 nodes: engine, s per round"]
    )
    figures["50 nodes: app / engine with the arithmetic, a round"] = (
        figures["50 nodes: app, s per round"] / figures["50 nodes: engine with the arithmetic, s per round"]
    )
    figures["50 nodes: server, peak MiB"] = watched.server_peak / MIB
    figures["50 nodes: worker, peak MiB"] = watched.worker_peak / MIB
    report.save()

    progress.next(f"start-up of app and engine, {STARTS} times each")
    starts: dict[str, list[float]] = {"app": [], "engine": [], "engine with the imports": []}
    importing = noop_app(noop.with_name("importing-app"), IMPORTS)
    one = quick | {"fraction_clients_train": 0.001, "num_server_rounds": 1}
    few: dict[str, Any] = {"trained": 1, "asked": 1, "evaluated": 1, "rounds": 1}
    for _ in range(STARTS):
        first = r"Received 1/1 results \(TRAIN\)"
        starts["app"].append(watch(superlink, first, **one).seconds_to[first])
        first = "NOOP train"
        for name, which in (("engine", noop), ("engine with the imports", importing)):
            starts[name].append(watch(superlink, first, nodes=50, app=which, **few).seconds_to[first])
    for name, values in starts.items():
        figures[f"50 nodes: {name}, s to the first TRAIN reply"] = statistics.median(values)
    figures["50 nodes: start-up to the first TRAIN reply, over the engine's, s"] = (
        figures["50 nodes: app, s to the first TRAIN reply"] - figures["50 nodes: engine, s to the first TRAIN reply"]
    )
    report.save()


def measure_scale(
    superlink: LocalSuperLink,
    noop: Path,
    report: Report,
    progress: Progress,
    rounds: int,
    sizes: Sequence[tuple[int, int]],
) -> None:
    """Measure a round of app, engine and floor with more and more nodes."""
    for nodes, asked in sizes:
        setting = Setting(nodes, 50, asked, report.dataset)
        progress.next(f"{setting}: app, engine and floor")
        row = measure_setting(superlink, setting, {}, {"app": noop}, rounds)
        busy = watch(superlink, nodes=nodes, app=noop, rounds=rounds, **setting.arithmetic())
        row["busy_round"] = statistics.median(busy.engine("round")[1:])
        row["busy_ratio"] = row["app_round"] / row["busy_round"]
        report.scale.append(row)
        for name, key in (
            ("app, s per round", "app_round"),
            ("app / engine with the arithmetic, a round", "busy_ratio"),
            ("app, s from nodes listed to row written, first round", "app_first"),
        ):
            if f"{setting}: {name}" in TARGETS:
                report.figures[f"{setting}: {name}"] = row[key]
        if nodes == 10_000:
            small = report.scale[0]
            more = [row[f"{who}_server_peak_mib"] - small[f"{who}_server_peak_mib"] for who in ("app", "engine")]
            report.figures["server, 10,000 nodes against 50, MiB more"] = more[0]
            report.figures["server, 10,000 nodes against 50, MiB more, beyond the engine's own"] = more[0] - more[1]
        report.save()


def measure_big(
    superlink: LocalSuperLink, folder: Path, noop: Path, report: Report, progress: Progress, rounds: int
) -> None:
    """Measure a round with a model of 25 MB."""
    setting = Setting(500, 50, 50, report.dataset, width=BIG)
    progress.next("model of 25 MB: app, engine and floor")
    row = measure_setting(
        superlink, setting, {"app": big_app(folder)}, {"app": noop, "parameters": (512 + 11) * BIG}, rounds
    )
    for key, name in (
        ("app_round", "app, s per round"), ("engine_round", "engine, s per round"), ("floor", "floor, s per round"),
        ("ratio", "app / (floor + engine), a round"), ("app_train", "app, s in TRAIN"),
    ):  # fmt: skip
        report.figures[f"25 MB, 50 of 500 nodes train: {name}"] = row[key]
    for who in ("app", "engine"):
        more = row[f"{who}_server_peak_mib"] - report.scale[0][f"{who}_server_peak_mib"]
        report.figures[f"25 MB, 50 of 500 nodes train: {who}, server, MiB more than with the small model"] = more
    report.save()


def measure_setting(
    superlink: LocalSuperLink, setting: Setting, app: dict[str, Any], noop: dict[str, Any], rounds: int
) -> dict[str, Any]:
    """Run app, engine and floor in one setting; return their medians over the rounds after the first."""
    quick = {"query_max_delay": 0.0, "query_timeout": 300.0} | setting.run_config()
    real = watch(superlink, nodes=setting.nodes, num_server_rounds=rounds, **quick, **app)
    engine = watch(superlink, nodes=setting.nodes, rounds=rounds, **setting.messages(), **noop)
    results = real.run.results[1:]  # row 0 is the initial model
    figures = asdict(setting) | {
        # From nodes listed to row written: the engine has no part in the pause in which the nodes are counted again.
        "app_first": results[0]["seconds_total"] - results[0]["seconds_nodes"],
        "app_round": statistics.median(row["seconds_total"] - row["seconds_nodes"] for row in results[1:]),
        "app_nodes": median_of(results[1:], "seconds_nodes"),
        "app_central": median_of(results[1:], "seconds_central"),
        "engine_first": engine.engine("round")[0],
        "engine_round": statistics.median(engine.engine("round")[1:]),
        "floor": statistics.median(floor(setting, rounds)),
        "evaluated": median_of(results[1:], "opted_in"),
        "app_server_peak_mib": real.server_peak / MIB,
        "engine_server_peak_mib": engine.server_peak / MIB,
    }
    for phase in PHASES:
        figures[f"app_{phase}"] = median_of(results[1:], f"seconds_{phase}")
        figures[f"engine_{phase}"] = statistics.median(engine.engine(phase)[1:])
    return figures | {"ratio": figures["app_round"] / (figures["floor"] + figures["engine_round"])}


def steps(sizes: Sequence[tuple[int, int]], rounds: int, scale_rounds: int) -> list[tuple[str, float]]:
    """Return the steps of a whole measurement and about how many seconds each takes."""
    found: list[tuple[str, float]] = []
    for turn in (1, 2):
        found += [(f"floor ({turn} of 2)", 15 + rounds), (f"app without stragglers ({turn} of 2)", 25 + 2 * rounds)]
        found += [
            (f"engine ({turn} of 2)", 15 + rounds),
            (f"engine with the arithmetic ({turn} of 2)", 25 + 2 * rounds),
        ]
    found += [("engine by send_and_receive", 15 + rounds), ("app with the default stragglers", 25 + 4 * rounds)]
    found += [(f"start-up of app and engine, {STARTS} times each", STARTS * 70.0)]
    for nodes, asked in sizes:
        name = f"{Setting(nodes, 50, asked, '')}: app, engine and floor"
        found.append((name, 110 + nodes / 150 + scale_rounds * (9 + nodes / 300)))
    return found + [("model of 25 MB: app, engine and floor", 90.0 + 40 * scale_rounds)] * bool(sizes)


def main() -> None:
    """Parse the command line, measure, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default=images.BUNDLED, help="as in the run configuration (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="rounds of each run (default: %(default)s)")
    parser.add_argument("--scale", action="store_true", help="also 50 to 10,000 nodes and a model of 25 MB")
    parser.add_argument("--scale-rounds", type=int, default=5, help="rounds of each of those (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="OUT.json and, with --scale, OUT.png are written")
    args = parser.parse_args()
    sizes = SCALE if args.scale else ()
    report = Report(args.out, args.dataset)
    progress = Progress(steps(sizes, args.rounds, args.scale_rounds))
    with tempfile.TemporaryDirectory() as name, LocalSuperLink(Path(name) / "flower") as superlink:
        noop = noop_app(Path(name) / "noop-app")
        measure(superlink, noop, report, progress, args.rounds)
        if args.scale:
            measure_scale(superlink, noop, report, progress, args.scale_rounds, sizes)
            measure_big(superlink, Path(name) / "big-app", noop, report, progress, args.scale_rounds)
    print(f"\n{WORKERS} cores ({platform.machine()}), torch {torch.__version__}, {args.dataset}; medians\n")
    print(report.table())
    if args.scale:
        print(f"\nSeconds of a round:\n\n{report.scale_table()}\n\n{report.law()}")
        if args.out:
            report.plot(args.out.with_suffix(".png"))


if __name__ == "__main__":
    with interrupted_by_signals():  # so that no process is left behind
        main()
