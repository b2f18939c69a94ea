"""Real `flwr run`s, at tiny size, on a SuperLink of the tests' own."""

import contextlib
import json
import os
import random
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

import recipes
from benchmarks.simulation import FinishedRun, LocalSuperLink, copy_app
from deploy.cli import BIN, FlowerCli, free_port, start, stop, users_of, wait_for
from tests.conftest import App, alive, model, results, same_bits
from tests.test_docs import CI
from tests.wandb_files import wandb_rounds

KILLS = int(os.environ.get("KILLS", "1"))  # `flwr stop`: test_deployment.py
ROUNDS = 2 * KILLS + 4  # two at most for each
SETTINGS = {
    "nodes": 6,
    "partitioner": "iid",
    "num_server_rounds": ROUNDS,
    "fraction_clients_train": 0.5,
    "query_max_delay": 0.5,  # so that a round takes a second on a fast machine, too
    "query_timeout": 60.0,
    "use_wandb": False,
}
ONE_WORKER = {"cpus": os.cpu_count() or 1}  # all CPUs for one client; starting a worker takes 6 s of CPU time
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300 + 60 * KILLS)]


@pytest.fixture(scope="module")
def superlink(tmp_path_factory):
    with LocalSuperLink(tmp_path_factory.mktemp("flower")) as superlink:
        yield superlink


@pytest.fixture(scope="module")
def settings(tiny_dataset) -> dict:
    return SETTINGS | {"dataset": tiny_dataset}


@contextlib.contextmanager
def two_ray_nodes(folder: Path) -> Iterator[LocalSuperLink]:
    """A SuperLink that uses a Ray cluster of two nodes with one CPU, so one worker, each."""
    address, log = f"127.0.0.1:{free_port()}", folder / "ray.log"
    head = ["--head", "--port", address.split(":")[1], "--include-dashboard", "false"]
    nodes: list[subprocess.Popen] = []
    with tempfile.TemporaryDirectory(prefix="ray-") as short:  # Ray's sockets have paths of 107 bytes at most
        try:
            for options in (head, ["--address", address]):
                command = [str(BIN / "ray"), "start", *options, "--num-cpus", "1", "--block"]
                nodes.append(start(command, folder, os.environ | {"RAY_TMPDIR": short}, log))
                wait_for(lambda: log.read_text().count("Ray runtime started") == len(nodes))
            with LocalSuperLink(folder / "flower", {"RAY_ADDRESS": address}) as superlink:
                yield superlink
        finally:
            stop(*reversed(nodes))


# ------------------------------------------------------------------------------ Kill, resume


def start_run(superlink: LocalSuperLink, **settings) -> tuple[str, Path]:
    """Start a run; return its id and its directory as soon as it has one."""
    log, lines = "", superlink.lines(**settings)
    for line in lines:
        log += re.sub(r"\x1b\[\d+m", "", line)
        if found := re.search(r"📂 Run directory: (.+)", log):
            lines.close()  # ends `flwr run --stream`, not the run
            return re.search(r"Successfully started run (\d+)", log).group(1), Path(found.group(1))
    raise AssertionError(f"the run ended by itself:\n{log}")


def kill(run_id: str, directory: Path) -> None:
    """Kill a run, and wait until its process has ended."""
    assert json.loads((directory / "run_config.json").read_text())["run-id"] == run_id
    (process,) = users_of(directory / ".lock")
    process.kill()
    wait_for(lambda: not alive([process.pid]))


def check_files(directory: Path) -> None:
    """Every file is whole, whenever the process died."""
    for path in directory.rglob("*"):
        if path.suffix == ".json" and "wandb" not in path.parts:
            json.loads(path.read_text())
        elif path.suffix == ".pt":
            torch.load(path, weights_only=True)
        elif path.suffix == ".png" and "wandb" not in path.parts:
            assert path.read_bytes()[-8:-4] == b"IEND"


@pytest.fixture(scope="module")
def resumed(superlink, settings, tmp_path_factory) -> FinishedRun:
    """A run on one worker that is killed and resumed, and finished by two workers on two nodes."""
    settings = settings | {"use_wandb": True}
    rng, directory, seen = random.Random(os.environ.get("KILL_SEED", "0")), "", []
    for _ in range(KILLS):
        run_id, directory = start_run(superlink, **settings, **ONE_WORKER, resume_from=str(directory))
        done = len(seen)  # rows: round 0 has one, too
        wait_for(lambda d=directory, n=done: (d / "results.json").exists() and len(results(d)) > max(n, 1))
        time.sleep(rng.uniform(0, 0.8))  # about a round
        kill(run_id, directory)
        check_files(directory)
        rows = results(directory)
        assert rows[:done] == seen  # nothing is lost but the round in flight
        assert done < len(rows) <= ROUNDS
        seen = rows
    with two_ray_nodes(tmp_path_factory.mktemp("ray")) as cluster:
        resumed = cluster.run(**settings, resume_from=str(directory))
    assert resumed.status == "finished:completed", resumed.log
    assert resumed.directory == directory
    assert results(directory)[: len(seen)] == seen
    return resumed


def in_one_process(app: App, settings: dict) -> Path:
    """Run the app without an engine, where no node needs to be late; return the run directory."""
    here = {key: value for key, value in settings.items() if key != "nodes"} | {"query_max_delay": 0.0}
    return app.run(app.grid(num_nodes=settings["nodes"]), **here)


def test_a_killed_run_has_the_bits_of_a_whole_one(resumed, app, settings):
    """KILLS=20 in the environment kills more often than the suite has time for."""
    whole = in_one_process(app, settings)
    assert results(resumed.directory) == results(whole)
    for name in ("final_model.pt", "checkpoints/best.pt"):
        assert same_bits(model(resumed.directory, name), model(whole, name))
    # W&B writes its file every 15 s, so a kill takes some rounds; the resumed run logs all of them again.
    folder = Path(re.search(r"wandb sync (\S+)", resumed.log).group(1))
    assert wandb_rounds(folder) == list(range(ROUNDS + 1))
    assert len({run.name.split("-")[3] for run in folder.parent.glob("offline-run-*")}) == 1  # its id stays


def test_a_run_does_not_join_the_wandb_process_of_the_tests(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SERVICE", "3-1-unix-/nowhere")
    assert "WANDB_SERVICE" not in FlowerCli(tmp_path).env


# ---------------------------------------------------------------------------- Without interruption


def test_another_task_runs_with_flowers_engine_and_late_answers_do_not_hold_it_up(tmp_path):
    app = copy_app(tmp_path / "app")
    recipes.apply("tabular", app)
    late = {"nodes": 20, "num_server_rounds": 2, "query_timeout": 2.0, "query_max_delay": 1.0}
    with LocalSuperLink(app) as superlink:  # the nodes import the app from the directory of the SuperLink
        run = superlink.run(app=app, use_wandb=False, **late, **ONE_WORKER)
    assert run.status == "finished:completed", run.log
    for row in run.results[1:]:
        assert row["train_received"] == 4
        assert row["query_sent"] == 20
        assert 0 < row["query_received"] < 20
        # The answers of all take ten seconds; after the deadline, eight of them are left.
        assert 1.9 <= row["seconds_central"] + row["seconds_query"] < 6
        assert row["evaluate_received"] == row["opted_in"]
        assert row["seconds_evaluate"] < 6
    assert run.results[2]["centralized_auc"] > 0.9
    assert "ERROR" not in run.log


TUTORIAL = """

class Tutorial(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.pool = nn.Conv2d(3, 6, 5), nn.Conv2d(6, 16, 5), nn.MaxPool2d(2, 2)
        self.fc1, self.fc2, self.fc3 = nn.Linear(16 * 5 * 5, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x):
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x))).view(-1, 16 * 5 * 5)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


def make_model(facts):
    return Tutorial()
"""


def test_a_changed_copy_runs_in_ci_and_another_copy_is_refused_there(tmp_path, tiny_dataset):
    """The copy has the network of Flower's PyTorch tutorial, and colour images, which its pyproject.toml names."""
    first, second, data = copy_app(tmp_path / "first"), copy_app(tmp_path / "second"), tmp_path / "data"
    task, pyproject = first / "pytorch_example_low_level" / "task.py", first / "pyproject.toml"
    task.write_text(task.read_text() + TUTORIAL)
    pyproject.write_text(pyproject.read_text().replace('dataset = "fashion-mnist-sample"', f'dataset = "{data}"'))
    for number in range(60):
        path = data / ("test" if number % 3 == 0 else "train") / f"{number // 3 % 10}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (number, 99, 255 - number)).save(path)
    with LocalSuperLink(first) as superlink:  # it is started in the first copy
        env = superlink.flwr.env
        done = subprocess.run(["sh", "-c", CI], cwd=first, env=env, capture_output=True, text=True, check=False)
        run = superlink.flwr.finished(done.stdout.replace('"run-id": "', "Successfully started run "))
        settings = {"nodes": 2, "num_server_rounds": 1, "partitioner": "iid", "use_wandb": False}
        refused = superlink.run(app=second, dataset=tiny_dataset, **settings, **ONE_WORKER)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "num-supernodes=50" in run.log  # the defaults say how to simulate so many
    assert "W&B is offline" in run.log
    assert "class folders; images: 20 test, 40 train; 10 classes (0, 1, 2, 3, 4, 5, 6, 7, 8, 9); 32x32 RGB" in run.log
    assert (run.results[1]["nodes_available"], run.results[1]["train_received"]) == (2, 2)
    assert (run.directory / "final_model.pt").exists()

    assert refused.status == "finished:failed", refused.log
    there = re.escape(str(first / "pytorch_example_low_level"))
    said = (
        r"No node can train: 2 nodes \(partition 0, partition 1\) \(train\): this node runs different code from the "
        rf"server: the node [0-9a-f]{{16}} in {there}, the server [0-9a-f]{{16}} in /.*: stop it, and"
    )
    assert re.search(said, refused.log), refused.log
    assert [row["round"] for row in refused.results] == [0]
    assert len(refused.log.splitlines()) < 120  # most of them are the stack of the error that ends the run
