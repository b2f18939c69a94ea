"""The very same app on the Deployment Engine: real processes on loopback, TLS, authentication."""

import os
import re
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.simulation import LocalSuperLink
from deploy.cli import PROJECT, family, free_port, start, stop
from deploy.local_federation import HOST, Federation, make_certificates, make_node_key
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
    assert re.search(r"Round 1: left out node \d+ \(partition 1\) \(train\)", run.log)
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
    assert {p.name for p in (tmp_path / "parts").iterdir()} == {"node-0", "node-1", "node-2", "labels.png"}
    second = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert second.returncode == 2
    assert "exists" in second.stderr
