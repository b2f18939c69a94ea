"""Real `flwr run`s, at tiny size, on a SuperLink of the tests' own."""

import json
import os
import random
import re
import signal
import subprocess
import tempfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.simulation import LocalSuperLink
from deploy.cli import BIN, PROJECT, FinishedRun, family, free_port, start, stop
from tests.conftest import model, results, same_bits, wait_for
from tests.wandb_files import wandb_rounds

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def superlink(tmp_path_factory):
    with LocalSuperLink(tmp_path_factory.mktemp("flower")) as superlink:
        yield superlink


SETTINGS = {
    "partitioner": "iid",
    "num_server_rounds": 2,
    "fraction_clients_train": 0.5,
    "query_max_delay": 0.3,  # so that a round takes half a second on a fast machine, too: `flwr stop` needs some
    "query_timeout": 60.0,
    "use_wandb": False,
}


@pytest.fixture
def settings(tiny_dataset) -> dict:
    return SETTINGS | {"dataset": tiny_dataset}


def files_of(directory: Path) -> set[str]:
    return {str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file()}


FILES = {
    ".lock", ".holder", "run_config.json", "results.json", "metrics.png", "final_model.pt",
    "checkpoints/best.pt", "checkpoints/last.pt",
}  # fmt: skip


ACTIONS = ["SIGKILL"] * int(os.environ.get("KILLS", "1")) + ["SIGTERM", "flwr stop"]
ROUNDS = 2 * len(ACTIONS) + 40  # two at most for each signal; `flwr stop` and the stream of the log take more


def side_by_side(superlink: LocalSuperLink, *runs: dict) -> list[FinishedRun]:
    """Runs at the same time: they wait for a good part of theirs."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda run: superlink.run(**run), runs))


@pytest.fixture(scope="module")
def two_workers_and_one(superlink, tiny_dataset):
    """The same run on as many workers as there are CPUs, and on a single one."""
    settings = SETTINGS | {"dataset": tiny_dataset, "num_server_rounds": ROUNDS, "nodes": 6}
    runs = side_by_side(superlink, settings, settings | {"cpus": os.cpu_count() or 1})
    for run in runs:
        assert run.status == "finished:completed", run.log
    return runs


@pytest.fixture(scope="module")
def whole(two_workers_and_one):
    """A run that nothing interrupts."""
    return two_workers_and_one[0]


def test_one_worker_and_two_give_the_same_bits(two_workers_and_one):
    two, one = two_workers_and_one
    for run in (two, one):
        assert files_of(run.directory) == FILES
    assert results(one.directory) == results(two.directory)
    assert same_bits(model(one.directory), model(two.directory))


def test_late_answers_are_left_out_and_do_not_hold_up_the_evaluation(superlink, settings):
    run = superlink.run(nodes=20, **settings | {"query_timeout": 1.0, "query_max_delay": 0.5})
    assert run.status == "finished:completed", run.log
    for row in run.results[1:]:
        assert row["query_sent"] == 20
        assert 0 < row["query_received"] < 20
        assert 0.9 <= row["seconds_central"] + row["seconds_query"] < 1.8
        assert row["evaluate_received"] == row["opted_in"]
        # Behind the deadline lie more than a second of answers that sleepers would still give.
        assert row["seconds_evaluate"] < 1.5
    assert "ERROR" not in run.log


def test_the_defaults_run_as_they_are_and_say_how_to_simulate_fifty_nodes(superlink):
    run = superlink.run(num_server_rounds=1, dataset="fashion-mnist-sample")
    assert run.status == "finished:completed", run.log
    assert "num-supernodes=50" in run.log
    assert "W&B is offline" in run.log
    assert run.results[1]["nodes_available"] == 2


def test_what_the_user_has_got_wrong_ends_the_run_with_one_error_and_leaves_nothing(superlink, tmp_path):
    outputs = tmp_path / "outputs"
    common = {"nodes": 2, "output_dir": str(outputs)}
    configuration, data = side_by_side(
        superlink,
        common | {"learning_rate": -1.0, "batch_size": 0, "use_wandb": "no"},
        common | {"dataset": "/no/such/folder"},
    )
    assert [line.split(":")[0] for line in configuration.log.splitlines() if line.startswith("  - ")] == [
        "  - batch-size", "  - learning-rate", "  - use-wandb"
    ]  # fmt: skip
    assert "Cannot use dataset '/no/such/folder'" in data.log
    assert [run.status for run in (configuration, data)] == ["finished:failed"] * 2
    assert not outputs.exists()


def test_nodes_that_fail_alike_are_one_line_of_the_log(superlink, settings):
    run = superlink.run(nodes=30, **settings | {"num_server_rounds": 1})
    assert run.status == "finished:failed"
    reason = "120 training images are too few for 30 nodes"
    (warning,) = [line for line in run.log.splitlines() if "left out" in line and "(train)" in line]
    assert "15 nodes (node " in warning
    assert reason in warning
    assert "Nothing was learned" in run.log
    assert len(run.log.splitlines()) < 120  # most of them are the stack of the error that ends the run


@pytest.fixture
def ray_folder():
    with tempfile.TemporaryDirectory(prefix="ray-") as name:  # Ray's sockets have paths of 107 bytes at most
        yield name


def test_a_ray_cluster_of_two_nodes_gives_the_same_bits(whole, settings, tmp_path, ray_folder):
    address = f"127.0.0.1:{free_port()}"
    env = os.environ | {"RAY_TMPDIR": ray_folder}
    head = [
        "ray",
        "start",
        "--head",
        "--port",
        address.split(":")[1],
        "--num-cpus",
        "1",
        "--include-dashboard",
        "false",
    ]
    more = ["ray", "start", "--address", address, "--num-cpus", "1"]
    nodes = []
    try:
        for command in (head, more):
            nodes.append(start([str(BIN / command[0]), *command[1:], "--block"], tmp_path, env, tmp_path / "ray.log"))
            wait_for(lambda: (tmp_path / "ray.log").read_text().count("Ray runtime started") == len(nodes))
        with LocalSuperLink(tmp_path / "flower", {"RAY_ADDRESS": address}) as superlink:
            run = superlink.run(nodes=6, **settings)
    finally:
        for process in reversed(nodes):
            stop(process)
    assert run.status == "finished:completed", run.log
    assert results(run.directory) == results(whole.directory)[:3]


# ------------------------------------------------------------------------ Kill, stop, resume


def simulations(superlink: LocalSuperLink) -> list[int]:
    """The processes in which the ServerApp runs now: among those that the SuperLink started."""
    return [pid for pid, args in family(superlink.process.pid).items() if "flwr-simulation" in args]


def run_until(superlink: LocalSuperLink, pattern: str, seconds: float, action, **settings) -> Path:
    """Start a run; `seconds` after a line of its log matches, act on its process; return its directory."""
    directory, run_id, log = None, "", ""
    for line in superlink.lines(nodes=6, **settings):
        log += line
        plain = re.sub(r"\x1b\[\d+m", "", line)
        if found := re.search(r"Successfully started run (\d+)", plain):
            run_id = found.group(1)
        if found := re.search(r"📂 (?:Run directory|Resuming after round -?\d+): (.+)", plain):
            directory = Path(found.group(1))
        if re.search(pattern, plain):
            time.sleep(seconds)
            (pid,) = simulations(superlink)
            action(pid, run_id)
            break
    else:
        pytest.fail(f"the run ended by itself:\n{log}")
    deadline = time.monotonic() + 60
    while simulations(superlink) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not simulations(superlink)
    assert directory
    return directory


def check_files(directory: Path) -> None:
    """Every file is whole, whenever the process died."""
    for path in directory.rglob("*"):
        if path.suffix == ".json" and "wandb" not in path.parts:
            json.loads(path.read_text())
        elif path.suffix == ".pt":
            torch.load(path, weights_only=True)
        elif path.suffix == ".png" and "wandb" not in path.parts:
            assert path.read_bytes()[-8:-4] == b"IEND"


def interrupt(superlink: LocalSuperLink, how: str, pid: int, run_id: str) -> None:
    if how == "flwr stop":
        superlink.flwr("stop", run_id)
    else:
        os.kill(pid, signal.Signals[how])


def test_a_run_that_is_killed_and_stopped_ends_with_the_bits_of_one_that_is_not(superlink, whole, settings):
    """KILLS=20 in the environment kills more often than the suite has time for."""
    settings |= {"num_server_rounds": ROUNDS, "use_wandb": True}
    rng, directory, done = random.Random(os.environ.get("KILL_SEED", "0")), "", 0
    for how in ACTIONS:
        delay = rng.uniform(0, 0.8)  # about a round
        second_round = rf"Starting round {done + 2}/"
        action = partial(interrupt, superlink, how)
        directory = run_until(superlink, second_round, delay, action, **settings, resume_from=str(directory))
        check_files(directory)
        rows = results(directory)
        assert rows == results(whole.directory)[: len(rows)]  # nothing is lost but the round in flight
        assert done + 1 <= len(rows) - 1 < ROUNDS
        done = len(rows) - 1
    resumed = superlink.run(nodes=6, **settings, resume_from=str(directory))
    assert resumed.status == "finished:completed", resumed.log
    assert resumed.directory == directory
    assert results(directory) == results(whole.directory)
    assert same_bits(model(directory), model(whole.directory))
    assert same_bits(model(directory, "checkpoints/best.pt"), model(whole.directory, "checkpoints/best.pt"))
    # W&B writes its file every 15 s, so a kill takes some rounds; the resumed run logs all of them again.
    newest = max((directory / "wandb").glob("offline-run-*"), key=lambda path: path.stat().st_mtime)
    assert wandb_rounds(newest) == list(range(ROUNDS + 1))


# ------------------------------------------------------------------------------- Package


def test_the_fab_holds_the_app_readme_and_licence_and_nothing_else(tmp_path):
    subprocess.run([BIN / "flwr", "build", "--app", PROJECT], cwd=tmp_path, check=True, capture_output=True)
    (fab,) = tmp_path.glob("*.fab")
    with zipfile.ZipFile(fab) as archive:
        names = {name for name in archive.namelist() if not name.startswith(".info/")}
        assert names == {"pyproject.toml", "README.md", "LICENSE"} | {
            f"pytorch_example_low_level/{m}.py"
            for m in ("__init__", "client_app", "config", "messaging", "server_app", "task", "utils")
        }
        assert max(info.file_size for info in archive.infolist()) < 1_000_000  # the limit for publishing
    assert fab.stat().st_size < 10_000_000
