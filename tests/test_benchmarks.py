"""The commands of the docs that measure something: here they run, small, and what they compute is checked."""

import contextlib
import dataclasses
import io
import json
import logging
import re
import runpy
import shlex
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
from flwr.app import MessageType

from benchmarks import federated_figure, floor, network_round, recipes, round_time, watched
from benchmarks.recipes import Experiment, Variant
from benchmarks.simulation import FinishedRun
from deploy.cli import PROJECT
from tests.conftest import App, load_module, results
from tests.grid import FACTS, InProcessGrid, make_context

DOCS = "\n".join(p.read_text() for p in [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))])
NODES = 5


def commands(module: str) -> list[list[str]]:
    """The arguments of each command of the docs that runs a module of ours."""
    found = re.findall(rf"^(?:pip install .* && )?python -m {module}((?:.*\\\n)*.*)$", DOCS, re.MULTILINE)
    return [shlex.split(line.replace("\\\n", " ")) for line in found]


def documented(module: str) -> list[str]:
    """The names of the figures in the table after the command that runs a module of ours."""
    after = re.split(rf"^python -m {module}", DOCS, flags=re.MULTILINE)[-1]
    _, *rows = re.search(r"(?:^\|.*\n)+", after, re.MULTILINE).group().splitlines()
    return [row.split("|")[1].strip() for row in rows[1:]]


class InProcessSuperLink:
    """Stands in for Flower's processes: whatever is asked for, few nodes, rounds and images run, on our Grid."""

    process = psutil.Process()

    def __init__(self, app: App) -> None:
        self.app = app
        self.flwr, self.lines = self, self.log_of
        self.asked: list[dict] = []

    def __call__(self, home: Path) -> "InProcessSuperLink":
        return self

    def __enter__(self) -> "InProcessSuperLink":
        return self

    def __exit__(self, *args: object) -> None: ...

    def run(self, nodes: int, timeout: float = 0, **run_config) -> FinishedRun:
        self.asked.append({key.replace("_", "-"): value for key, value in run_config.items()} | {"nodes": nodes})
        small = {"dataset": self.app.defaults["dataset"], "num-server-rounds": 2, "query-timeout": 2.0}
        small["output-dir"] = self.app.defaults["output_dir"]
        if run_config.get("partitioner") == "pathological":
            small["classes-per-node"] = 2  # so that few nodes hold all classes
        directory = self.app.run(self.app.grid(num_nodes=NODES), **run_config | small)
        return FinishedRun("1", "", "finished:completed", directory)

    def log_of(self, nodes: int, app: Path = PROJECT, **run_config) -> list[str]:
        if app.name == "engine_app":
            few = {
                "imports": "imports" in run_config and run_config["imports"],
                "rounds": 2,
                "parameters": 80,
                "width": run_config.get("width", 0),
                "trained": 2,
                "asked": NODES,
                "evaluated": 3,
            }
            few |= {f"{part}-images": 8 * (f"{part}_images" in run_config) for part in ("train", "validation", "test")}
            return run_engine(few | {"send-and-receive": "send_and_receive" in run_config})
        return logged(lambda: self.run(nodes, **run_config))

    def finished(self, log: str) -> FinishedRun:
        directory = re.search(r"📂 Run directory: (.+)", log)
        return FinishedRun("1", log, "finished:completed", Path(directory.group(1)) if directory else None)


def logged(function: Callable[[], object]) -> list[str]:
    """The lines that Flower's logger gets from a function."""
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    logging.getLogger("flwr").addHandler(handler)
    function()
    logging.getLogger("flwr").removeHandler(handler)
    return log.getvalue().splitlines(keepends=True)


def run_engine(config: dict) -> list[str]:
    module = runpy.run_path(str(watched.ENGINE_APP / "engine_app" / "app.py"))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        module["server"](InProcessGrid(module["client"], config, NODES), make_context(config))
    return printed.getvalue().splitlines(keepends=True)


@pytest.fixture
def superlink(app, quick_plot, monkeypatch) -> InProcessSuperLink:
    monkeypatch.setenv("WANDB_RUN_GROUP", "to be restored")
    return InProcessSuperLink(app)


@pytest.fixture
def short_sleeps(monkeypatch) -> None:
    """For tests where every node and every reply is there at once."""
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.02)))


def run_main(module, monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
    logger = logging.getLogger("flwr")
    level = logger.level
    try:
        module.main()
    finally:
        logger.setLevel(level)  # a command may want less of the log than other tests


def test_the_federated_figure_is_that_of_a_round_with_all_nodes(app, monkeypatch, capsys):
    directory = app.run(opt_in_probability=1.0, num_server_rounds=1)
    for (named,) in commands("benchmarks.federated_figure"):
        assert named.startswith("outputs/")
    run_main(federated_figure, monkeypatch, str(directory))
    accuracies, sizes = federated_figure.last_round(directory)
    weighted = np.average(accuracies, weights=sizes)
    assert weighted == pytest.approx(results(directory)[1]["federated_evaluate_accuracy"], abs=1e-12)
    assert f"| all {NODES} nodes | {weighted:.3f} | {accuracies.mean():.3f} |" in capsys.readouterr().out
    directory = app.run(opt_in_probability=0.5, num_server_rounds=1)
    with pytest.raises(SystemExit, match=r"only \d of 5 nodes evaluated .* do the run with opt-in-probability=1\.0"):
        run_main(federated_figure, monkeypatch, str(directory))


@pytest.fixture
def small_round_time(superlink, short_sleeps, monkeypatch) -> None:
    """The floor with few nodes, in threads; one start-up; of --scale, what the targets need."""

    def measure_floor(setting: floor.Setting, rounds: int) -> list[float]:
        return floor.measure_floor(dataclasses.replace(setting, nodes=NODES, trained=2, asked=NODES), 2)

    monkeypatch.setattr(round_time, "LocalSuperLink", superlink)
    monkeypatch.setattr(round_time, "measure_floor", measure_floor)
    monkeypatch.setattr(round_time, "STARTS", 1)
    monkeypatch.setattr(round_time, "SCALE", [round_time.SCALE[number] for number in (0, 2, -1)])
    monkeypatch.setattr(floor.multiprocessing, "get_context", lambda method: threading)
    monkeypatch.setattr(floor, "ProcessPoolExecutor", lambda n, context, *init: ThreadPoolExecutor(n, "", *init))


def test_the_round_time_prints_the_documented_figures(small_round_time, superlink, monkeypatch, tmp_path, capsys):
    command = commands("benchmarks.round_time")[-1]
    command[command.index("--dataset") + 1] = superlink.app.defaults["dataset"]
    out = tmp_path / "round_time"
    run_main(round_time, monkeypatch, *command, "--scale", "--rounds", "2", "--scale-rounds", "2", "--out", str(out))
    written = json.loads(out.with_name("round_time.json").read_text())
    figures = written["figures"]
    # The docs show the figures of the command without --scale.
    assert sorted(documented("benchmarks.round_time")) == sorted(key for key in figures if key.startswith("50 nodes"))
    assert set(round_time.TARGETS) <= set(figures)
    assert [(row["nodes"], row["asked"]) for row in written["scale"]] == list(round_time.SCALE)
    shown = capsys.readouterr().out
    for key, value in figures.items():
        target = f"≤ {round_time.TARGETS[key]:g}" if key in round_time.TARGETS else ""
        assert f"| {key} | {target} | {value:.2f} |" in shown
    ratio = figures["50 nodes: app, s per round"] / figures["50 nodes: floor, s per round"]
    assert figures["50 nodes: app / floor, a round"] == ratio > 0
    assert out.with_name("round_time.png").read_bytes().startswith(b"\x89PNG")


def test_the_big_model_has_25_mb(monkeypatch, tmp_path):
    app = watched.big_app(tmp_path / "app")
    module = load_module(app / "pytorch_example_low_level" / "task.py", "big_task", monkeypatch)
    assert 25e6 < sum(p.numel() * 4 for p in module.make_model(FACTS).parameters()) < 25.5e6


def test_the_floor_does_the_work_of_the_rounds_of_the_app(app):
    grid = app.grid(num_nodes=20)
    setting = floor.Setting(20, 5, 12, app.defaults["dataset"])
    app.run(grid, **setting.run_config(), num_server_rounds=2)
    asked = {MessageType.TRAIN: "train", MessageType.EVALUATE: "validation"}
    for server_round, pieces in enumerate(floor.cohorts(setting, 2), start=1):
        sent = [
            (asked[m.metadata.message_type], grid.partition(m.metadata.dst_node_id))
            for m in grid.sent
            if m.metadata.group_id == str(server_round) and m.metadata.message_type in asked
        ]
        assert [piece for piece in pieces if piece[0] != "test"] == sent
        assert [number for part, number in pieces if part == "test"] == [0, 1, 2, 3]


def test_the_docs_name_comparisons_that_there_are():
    pages = "\n".join(path.read_text() for path in (PROJECT / "docs" / "recipes").glob("*.md"))
    named = set(re.findall(r"python -m benchmarks\.recipes ([a-z-]+\d*)", pages))
    assert len(named) > 10
    assert named <= recipes.EXPERIMENTS.keys()


def test_a_comparison_of_recipes_continues_after_an_interruption(monkeypatch, tmp_path, capsys):
    accuracies = {("mean", "none"): 0.8, ("mean", "noise"): 0.2, ("median", "none"): 0.7, ("median", "noise"): 0.6}
    variants = [Variant(line, column=column) for line, column in accuracies]
    monkeypatch.setattr(recipes, "EXPERIMENTS", {"attacks": Experiment(variants, worst=True)})
    done: list[tuple[str, int]] = []

    def measure(experiment: Experiment, variant: Variant, seed: int) -> list[dict]:
        if len(done) == 3:
            done.append(("interrupted", seed))
            raise KeyboardInterrupt
        done.append((f"{variant.line}, {variant.column}", seed))
        return [{}, {"centralized_accuracy": accuracies[variant.line, variant.column] + seed / 10}]

    monkeypatch.setattr(recipes, "measure", measure)
    arguments = ["attacks", "--seeds", "2", "--out", str(tmp_path / "attacks.json")]
    with pytest.raises(KeyboardInterrupt):
        run_main(recipes, monkeypatch, *arguments)
    run_main(recipes, monkeypatch, *arguments)
    names = ["mean, none", "mean, noise", "median, none", "median, noise"]
    assert done == [*((name, 0) for name in names[:3]), ("interrupted", 0), (names[3], 0), *((n, 1) for n in names)]
    shown = capsys.readouterr().out
    assert "3/8 attacks, median, none, seed 0: accuracy 0.700; about 0:00:00 left" in shown
    assert "5/5 attacks, median, noise, seed 1: accuracy 0.700; about 0:00:00 left" in shown
    assert shown.endswith("""
| | none | noise |
| --- | --- | --- |
| mean | 0.850 (0.800) | 0.250 (0.200) |
| median | 0.750 (0.700) | 0.650 (0.600) |
""")
    before = len(done)
    variants[1].config["momentum"] = 0.0  # results of other settings, or of other code, are not taken
    run_main(recipes, monkeypatch, *arguments)
    assert done[before:] == [(names[1], 0), (names[1], 1)]
    monkeypatch.setattr(recipes, "CODE", "of an edited app")
    run_main(recipes, monkeypatch, *arguments)
    assert len(done) == before + 2 + 8


def test_a_comparison_shows_figures_and_what_has_none(monkeypatch, capsys):
    epsilon = {"FedAvg": {}, "noise": {"epsilon": 502.3}}
    experiment = Experiment([Variant(name) for name in epsilon], ("accuracy", "ε"))
    monkeypatch.setattr(recipes, "measure", lambda _, v, seed: [{"centralized_accuracy": seed / 2} | epsilon[v.line]])
    recipes.compare("dp", experiment, 2)
    assert capsys.readouterr().out.endswith("""
| | accuracy | ε |
| --- | --- | --- |
| FedAvg | 0.250 ± 0.250 | – |
| noise | 0.250 ± 0.250 | 502 ± 0 |
""")


def test_a_round_over_a_network_has_the_documented_figures():
    log = """
    LOOK query 10.0
    LOOK query 10.2
    LOOK query 10.5
    PICKED query 7 11.0
    PICKED query 8 11.0
    LOOK train 20.0
    LOOK train 20.4
    PICKED train 8 21.4
    LOOK evaluate 30.0
    PICKED evaluate 7 32.0
    """
    of_round = {f"seconds_{part}": 1.0 for part in ("total", "train", "query", "evaluate")}
    rows = [of_round, of_round | {"seconds_train": 3.0}]
    figures = network_round.figures_of(rows, log, {1: (5.0, 9.0)}, {7: [10.7, 31.0], 8: [10.9, 21.0]})
    assert list(figures) == documented("benchmarks.network_round")
    assert figures["s in TRAIN"] == 2.0
    assert figures["life of the process that answers a message, s"] == 4.0
    # The gaps are 0.2 and 0.3 s in QUERY and 0.4 s in TRAIN.
    assert figures["from one look for replies to the next, s (median)"] == pytest.approx(0.3)
    assert figures["from sending a reply to having fetched it, QUERY, s (median)"] == pytest.approx(0.2)
    assert figures["from sending a reply to having fetched it, TRAIN, s (median)"] == pytest.approx(0.4)
    assert figures["from sending a reply to having fetched it, EVALUATE, s (median)"] == pytest.approx(1.0)
    assert figures["from sending a reply to having fetched it, s (maximum)"] == pytest.approx(1.0)
