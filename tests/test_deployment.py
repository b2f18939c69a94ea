"""The app on the Deployment Engine: real processes on the loopback interface, TLS, authentication."""

import json
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from benchmarks.simulation import LocalSuperLink
from deploy import prepare_partitions
from deploy.cli import PROJECT, STOP_SIGNALS, family, free_port, running, start, stop
from deploy.local_federation import (
    HOST,
    Federation,
    FederationError,
    dataset_of,
    make_certificates,
    make_node_key,
    run_command,
)
from deploy.prepare_partitions import write_partitions
from tests.conftest import model, results, same_bits, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]  # on a busy machine a message takes a minute
NODES = 3


@pytest.fixture(scope="module")
def federation(tiny_dataset, tmp_path_factory):
    state = tmp_path_factory.mktemp("federation")
    write_partitions(state / "data", NODES, tiny_dataset, "iid", 1.0, 42)
    with Federation(state, NODES, state / "data") as federation:
        yield federation


SETTINGS = {
    "partitioner": "iid",
    "num_server_rounds": 2,
    "query_max_delay": 0.0,
    "query_timeout": 60.0,  # a query starts a process
    "opt_in_probability": 0.5,
    "fraction_clients_train": 0.7,
    "use_wandb": False,
}
# Who must not get in, and why the SuperLink or TLS says no.
INTRUDERS = {
    "unregistered key": "Failed to activate SuperNode",
    "no key": "All SuperNodes must be registered",
    "other CA": "certificate verify failed",
    "plain HTTP": "Server disconnected without sending a response",
}


@pytest.fixture
def settings(tiny_dataset) -> dict:
    return SETTINGS | {"dataset": tiny_dataset}


@pytest.fixture(scope="module")
def resumed(federation, tmp_path_factory, tiny_dataset):
    """A run whose ServerApp is killed in round 1, and whose SuperLink in round 2.

    Meanwhile four intruders try to get in. Returns the run, their exit codes and what they printed.
    """
    settings = SETTINGS | {"dataset": tiny_dataset}
    folder = tmp_path_factory.mktemp("intruders")
    intruders = start_intruders(federation, folder)
    directory = ""
    try:
        for server_round, kill in ((1, kill_serverapp), (2, kill_superlink)):
            log = []
            for line in federation.lines(**settings, resume_from=directory):
                log.append(line)
                if f"Starting round {server_round}/" in line:
                    kill(federation)
                    break
            directory = str(federation.flwr.finished("".join(log)).directory)
            assert len(results(Path(directory))) == server_round  # round 0 has a row, too
        run = federation.run(**settings, resume_from=directory)
        exits = {name: process.poll() for name, process in intruders.items()}
        assert federation.online() == NODES
    finally:
        for process in intruders.values():
            stop(process)
    assert run.status == "finished:completed", run.log
    return run, exits, {name: (folder / f"{name}.log").read_text() for name in intruders}


def kill_serverapp(federation: Federation) -> None:
    (pid,) = [p for p, args in family(federation.superlink.pid).items() if "flwr-serverapp" in args]
    os.kill(pid, signal.SIGKILL)


def kill_superlink(federation: Federation) -> None:
    """Kill the SuperLink with all that it started, and start it again on its database."""
    os.killpg(federation.superlink.pid, signal.SIGKILL)
    federation.superlink.wait()
    federation.start_superlink()
    federation.wait_until_online(NODES)


@pytest.mark.parametrize("name", INTRUDERS)
def test_nobody_gets_in_and_the_run_goes_on_with_the_rest(resumed, name):
    run, exits, logs = resumed
    assert "Failed to initialize the connection to the SuperLink" in logs[name]
    assert INTRUDERS[name] in logs[name]
    assert exits[name] == 1
    assert [row["nodes_available"] for row in results(run.directory)[1:]] == [NODES] * 2


def test_a_run_over_tls_killed_twice_has_the_files_and_the_bits_of_a_simulation(resumed, settings, tmp_path):
    run, _, _ = resumed
    with LocalSuperLink(tmp_path / "simulation") as superlink:
        simulated = superlink.run(nodes=NODES, **settings)
    assert simulated.status == "finished:completed", simulated.log
    assert results(run.directory) == results(simulated.directory)
    assert same_bits(model(run.directory), model(simulated.directory))
    assert {p.name for p in run.directory.rglob("*")} == {p.name for p in simulated.directory.rglob("*")}


def start_intruders(federation: Federation, folder: Path) -> dict[str, subprocess.Popen]:
    """Start SuperNodes that must be refused."""
    make_certificates(folder / "other-ca")
    make_node_key(folder / "unregistered")
    ca = ["--root-certificates", str(federation.certificates / "ca.crt")]
    other_ca = ["--root-certificates", str(folder / "other-ca" / "ca.crt")]
    key = ["--auth-supernode-private-key", str(folder / "unregistered")]
    options = {
        "unregistered key": [*ca, *key],
        "no key": ca,
        "other CA": [*other_ca, *key],
        "plain HTTP": ["--insecure"],
    }
    started = {}
    for name in INTRUDERS:
        command = ["flower-supernode", "--superlink", f"{HOST}:{federation.port}", "--port", str(free_port())]
        command += ["--max-retries", "2", "--node-config", "partition-id=0 num-partitions=3", *options[name]]
        started[name] = start(command, folder, federation.flwr.env, folder / f"{name}.log")
    return started


def kill_while_it_trains(federation: Federation, index: int, seen: int) -> None:
    """Kill a SuperNode that has got a TRAIN message; `seen` is how much its log had before the run."""
    log = federation.state / f"node-{index}.log"
    node = federation.supernodes[index]
    wait_for(lambda: re.search("Receiving: train message.*Received successfully", log.read_text()[seen:], re.DOTALL))
    wait_for(lambda: any("flwr-clientapp" in args for args in family(node.pid).values()))
    os.killpg(node.pid, signal.SIGKILL)
    node.wait()


def test_a_killed_supernode_is_left_out_and_takes_part_again_when_it_is_back(federation, settings):
    settings |= {"fraction_clients_train": 1.0, "train_timeout": 40.0, "opt_in_probability": 0.0}
    # Round 2 waits for the node; else it would sample from those that are there.
    settings |= {"min_available_nodes": NODES, "node_wait_timeout": 120.0}
    seen = len((federation.state / "node-1.log").read_text())
    log = []
    for line in federation.lines(**settings):
        log.append(line)
        if "Starting round 1/" in line:
            kill_while_it_trains(federation, 1, seen)
        if "results (TRAIN)" in line and federation.supernodes[1].poll() is not None:
            # As long as the SuperLink takes the killed node for online, it refuses the new one.
            wait_for(lambda: federation.online() == NODES - 1)
            federation.start_supernode(1)
    run = federation.flwr.finished("".join(log))
    assert run.status == "finished:completed", run.log
    first, second = run.results[1:]
    assert (first["train_sampled"], first["train_received"], first["train_failed"]) == (3, 2, 1)
    assert 40 <= first["seconds_train"] < 50
    assert re.search(r"Round 1: left out node \d+ \(train\): no reply within", run.log)
    assert (second["train_sampled"], second["train_received"]) == (3, 3)


def test_private_keys_are_for_their_owner_only_and_nothing_secret_leaks(federation):
    private = [*federation.state.glob("keys/node-?"), federation.certificates / "server.key"]
    assert len(private) == NODES + 1
    secrets = []
    for path in private:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        secrets.append(path.read_text().splitlines()[1].encode())
    assert not (federation.certificates / "ca.key").exists()
    for path in federation.state.rglob("*"):
        if path.is_file() and path not in private:
            content = path.read_bytes()
            assert not any(secret in content for secret in secrets), path
            assert b"PRIVATE KEY" not in content, path


def test_nothing_that_exists_is_overwritten(tmp_path):
    make_certificates(tmp_path / "certificates")
    make_node_key(tmp_path / "node")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    make_certificates(tmp_path / "certificates")
    make_node_key(tmp_path / "node")
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_partitions_are_written_for_each_node_with_a_picture_and_never_over_others(tmp_path, tiny_dataset):
    command = [sys.executable, "-m", "deploy.prepare_partitions", "--nodes", "3", "--dataset", tiny_dataset]
    command += ["--out", str(tmp_path / "parts")]
    first = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr
    made = {p.name for p in (tmp_path / "parts").iterdir()}
    assert made == {"node-0", "node-1", "node-2", "labels.png", "partitions.json"}
    assert json.loads((tmp_path / "parts" / "partitions.json").read_text()) == {
        "dataset": tiny_dataset, "partitioner": "dirichlet", "dirichlet-alpha": 1.0, "seed": 42, "num-partitions": 3,
    }  # fmt: skip
    second = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert second.returncode == 2
    assert "exists" in second.stderr


@pytest.mark.parametrize("typed", ["fashion-mnist-sample", "./tiny", "an/unknown-name"])
def test_the_record_names_a_data_set_so_that_the_server_finds_it(typed, tiny_dataset, tmp_path, monkeypatch):
    (tmp_path / "tiny").symlink_to(tiny_dataset)
    monkeypatch.chdir(tmp_path)
    tiny = prepare_partitions.partitions(tiny_dataset, "iid", 2, 1.0, 42, decoded=False)
    monkeypatch.setattr(prepare_partitions, "partitions", lambda *args, **kwargs: tiny)
    write_partitions(tmp_path / "parts", 2, typed, "iid", 1.0, 42)
    assert dataset_of(tmp_path / "parts") == (tiny_dataset if typed == "./tiny" else typed)


def test_a_failed_preparation_leaves_nothing_and_can_be_repeated(tmp_path, monkeypatch, capsys):
    def full(*args: object) -> None:
        (tmp_path / "parts" / "node-0").mkdir()
        raise ValueError("too few images")

    monkeypatch.setattr(prepare_partitions, "write_partitions", full)
    monkeypatch.setattr(sys, "argv", ["prepare_partitions", "--nodes", "2", "--out", str(tmp_path / "parts")])
    for _ in range(2):
        with pytest.raises(SystemExit):
            prepare_partitions.main()
        assert "error: too few images" in capsys.readouterr().err
    assert not (tmp_path / "parts").exists()


def test_a_broken_record_is_an_error_and_a_missing_one_is_none(tmp_path):
    assert dataset_of(tmp_path) is None
    for content in ("{", "[]", "{}"):
        (tmp_path / "partitions.json").write_text(content)
        with pytest.raises(FederationError, match=r"partitions\.json has no valid record; create .* again"):
            dataset_of(tmp_path)


@pytest.mark.parametrize("dataset", [None, "fashion-mnist-sample", "/a $HOME/with `date` and \\t", "/it's $HOME/\\t"])
def test_the_printed_command_gives_flower_the_data_set(dataset, tmp_path):
    command = run_command(tmp_path / "a folder", dataset)
    assert re.search(r'--run-config "query-timeout=30\.0.*"$', command)  # one string: a key can be added
    script = f'flwr() {{ printf "%s\\n" "$FLWR_HOME" "$@"; }}\n{command}'
    printed = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.splitlines()
    assert printed[:4] == [str(tmp_path / "a folder"), "run", str(PROJECT), "--stream"]
    config = tomllib.loads("\n".join(re.findall(r"""\S+?=(?:'[^']*'|"[^"]*"|\S+)""", printed[-1])))
    assert config == {"query-timeout": 30.0} | ({} if dataset is None else {"dataset": dataset})


def test_more_nodes_than_folders_are_refused_before_anything_starts(tmp_path):
    for index in (0, 2):
        (tmp_path / "data" / f"node-{index}").mkdir(parents=True)
    with pytest.raises(FederationError, match="data has no folder node-1, but each of the 3 nodes needs its own"):
        Federation(tmp_path / "state", 3, tmp_path / "data")
    assert not (tmp_path / "state").exists()


def local_federation(state: Path, *options: str) -> subprocess.Popen[str]:
    """Start the command in a state in which no signal is ignored, as under `nohup`, or in the background."""
    command = [sys.executable, "-m", "deploy.local_federation", "--nodes", "1", "--state", str(state), *options]
    return subprocess.Popen(
        command,
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: [signal.signal(each, signal.SIG_DFL) for each in STOP_SIGNALS],  # noqa: PLW1509 (it takes no lock)
    )


def read_until(process: subprocess.Popen[str], text: str) -> str:
    read = ""
    for line in process.stdout:
        read += line
        if text in line:
            return read
    raise AssertionError(read)


def using(state: Path) -> list[str]:
    """The command lines of the processes that use a folder."""
    return [args for _, args in running().values() if str(state) in args]


@pytest.fixture(scope="module")
def state(tmp_path_factory) -> Path:
    """A folder that one federation after the other uses."""
    return tmp_path_factory.mktemp("signals") / "state"


@pytest.mark.parametrize(
    ("name", "moment"),
    [
        ("SIGINT", "starting"),
        ("SIGTERM", "starting"),
        ("SIGHUP", "online"),
        ("SIGTERM", "online"),
        ("SIGINT", "online"),
    ],
)
def test_every_stop_signal_stops_everything_even_during_the_start(state, name, moment):
    process = local_federation(state)
    try:
        if moment == "online":
            read_until(process, "Ctrl-C stops the federation")
        else:
            wait_for(lambda: any("flower-superlink" in args for args in family(process.pid).values()))
        started = family(process.pid)
        assert started
        for _ in range(2):  # an impatient user
            process.send_signal(signal.Signals[name])
            time.sleep(0.1)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0, output
        assert "Stopping ..." in output
        assert "Traceback" not in output
        assert not using(state)
        assert not started.keys() & running().keys()
    finally:
        stop(process)


def test_a_second_federation_is_refused_while_any_process_of_the_first_lives(state):
    first = local_federation(state)
    started: set[int] = set()
    try:
        read_until(first, "Ctrl-C stops the federation")
        started = set(family(first.pid))
        second = local_federation(state)
        output, _ = second.communicate(timeout=60)
        assert second.returncode == 1
        assert output == (
            f"error: another local federation uses {state}; stop it with `kill {first.pid}`, "
            "or choose another folder with --state\n"
        )
        first.kill()
        first.wait()
        third = local_federation(state)
        output, _ = third.communicate(timeout=60)
        assert third.returncode == 1
        (kill,) = re.findall(r"`(kill [\d ]+)`", output)
        subprocess.run(shlex.split(kill), check=True)
        wait_for(lambda: not using(state))
        fourth = local_federation(state)
        read_until(fourth, "Ctrl-C stops the federation")
        fourth.terminate()
        fourth.communicate(timeout=60)
        assert fourth.returncode == 0
        assert not using(state)
    finally:
        for pid in running().keys() & started:
            os.kill(pid, signal.SIGKILL)
        stop(first)


def test_git_sees_nothing_of_the_state_folder(federation):
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(federation.state), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    git("init", "--quiet")
    try:
        assert git("status", "--porcelain", "--untracked-files=all") == ""
        # With `--state .`, the folder may have a `.gitignore` already, which is kept.
        (federation.state / ".gitignore").write_text("")
        seen = git("status", "--porcelain", "--untracked-files=all")
        assert "?? superlink.log" in seen
        assert "keys/" not in seen
        assert "certificates/" not in seen
    finally:
        (federation.state / ".gitignore").write_text("*\n")
        shutil.rmtree(federation.state / ".git")
