"""The app on the Deployment Engine: real processes on the loopback interface, TLS, authentication.

test_network.py kills SuperNodes, and test_e2e.py kills a ServerApp.
"""

import os
import re
import shutil
import signal
import stat
import subprocess
from pathlib import Path

import pytest

from benchmarks.simulation import AppCli, FinishedRun, command_of
from deploy import prepare_partitions
from deploy.cli import family, free_port, start, stop, wait_for
from deploy.keys import HOST, make_certificates, make_node_key
from deploy.local_federation import Federation
from tests.conftest import alive, model, results, same_bits

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]  # on a busy machine a message takes a minute
NODES = 3


@pytest.fixture(scope="module")
def federation(tiny_dataset, tmp_path_factory):
    state = tmp_path_factory.mktemp("federation")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_partitions, "plot_labels", lambda *args: None)  # it takes seconds
        prepare_partitions.write_partitions(state / "data", NODES, tiny_dataset, "iid", 1.0, 42)
    with Federation(state, NODES, state / "data") as federation:
        yield federation


SETTINGS = {
    "partitioner": "iid",
    "num_server_rounds": 2,
    "evaluate_every": 2,  # each message starts a process, which takes seconds
    "query_max_delay": 0.0,
    "query_timeout": 60.0,
    "opt_in_probability": 1.0,
    "fraction_clients_train": 0.7,
    "fraction_clients_query": 0.4,
    "use_wandb": False,
}
# Who must not get in, and why the SuperLink or TLS says no.
INTRUDERS = {
    "unregistered key": "Failed to activate SuperNode",
    "no key": "All SuperNodes must be registered",
    "other CA": "certificate verify failed",
    "plain HTTP": "Server disconnected without sending a response",
}


@pytest.fixture(scope="module")
def settings(tiny_dataset) -> dict:
    return SETTINGS | {"dataset": tiny_dataset}


def flower(federation: Federation) -> AppCli:
    return AppCli(federation.flwr.home)


# ------------------------------------------------------------------------ Kill, stop, resume


def app_processes(federation: Federation) -> dict[int, str]:
    """The processes in which a ServerApp or a ClientApp runs: process id -> command line."""
    started = [federation.superlink, *federation.supernodes.values()]
    commands = {each.pid: command_of(each) for process in started for each in family(process.pid)}
    return {pid: args for pid, args in commands.items() if "flwr-serverapp" in args or "flwr-clientapp" in args}


def kill_superlink(federation: Federation) -> None:
    """Kill the SuperLink with all that it started, and start it again on its database."""
    os.killpg(federation.superlink.pid, signal.SIGKILL)
    federation.superlink.wait()
    federation.start_superlink()
    federation.wait_until_online(NODES)


def training(federation: Federation, run_id: str, server_round: int) -> int:
    """How many nodes have received their whole TRAIN message of a round."""
    received = (
        rf"\[RUN {run_id}, ROUND {server_round}\]\n.*Receiving: train.*\n(?:.*Start .*\n)?.*Received successfully"
    )
    return sum(len(re.findall(received, log.read_text())) for log in federation.state.glob("node-*.log"))


def interrupt(federation: Federation, how: str, run_id: str, server_round: int) -> None:
    """Stop a run, and wait until no process of it is left. Killing the SuperLink also kills the ServerApp."""
    if how == "kill the SuperLink":
        kill_superlink(federation)
        return
    # Two nodes train. A ClientApp whose run ends while its message is on the way waits for it for ever (flwr 1.41).
    wait_for(lambda: training(federation, run_id, server_round) == 2)
    wait_for(lambda: any("flwr-clientapp" in args for args in app_processes(federation).values()))
    processes = app_processes(federation)
    assert any("flwr-serverapp" in args for args in processes.values())
    federation.flwr("stop", run_id)
    wait_for(lambda: not alive(processes), seconds=180)


def start_and_interrupt(federation: Federation, how: str, server_round: int, **settings) -> FinishedRun:
    """Start a run, and interrupt it in a phase of a round."""
    log, begun = "", f"Starting round {server_round}/"
    for line in flower(federation).log_of(**settings):
        log += re.sub(r"\x1b\[\d+m", "", line)
        if begun in log and PHASE.get(how, begun) in line:
            interrupt(federation, how, re.search(r"Successfully started run (\d+)", log).group(1), server_round)
            return flower(federation).finished(log)
    raise AssertionError(f"the run ended by itself:\n{log}")


# How a run is interrupted, and in which round; the line of the log after which it is, if it is not in TRAIN.
INTERRUPTIONS = {"flwr stop": 1, "kill the SuperLink": 2}
PHASE = {"kill the SuperLink": "Centrally evaluated model"}  # with the queries on their way
STATUS = {"flwr stop": "finished:stopped"}


@pytest.fixture(scope="module")
def resumed(federation, tmp_path_factory, settings):
    """A run that is interrupted and resumed again and again.

    Meanwhile four intruders try to get in. Returns the run, what was interrupted and what
    it had committed by then, the intruders' exit codes and what they printed.
    """
    folder = tmp_path_factory.mktemp("intruders")
    intruders = start_intruders(federation, folder)
    directory, interrupted, committed = "", {}, {}
    try:
        for how, server_round in INTERRUPTIONS.items():
            part = start_and_interrupt(federation, how, server_round, **settings, resume_from=str(directory))
            directory, interrupted[how], committed[how] = part.directory, part, part.results  # read now: they grow
            # They are refused while a run takes place, and before the SuperLink is killed.
            wait_for(lambda: all(process.poll() is not None for process in intruders.values()))
        run = flower(federation).run(**settings, resume_from=str(directory))
        exits = {name: process.poll() for name, process in intruders.items()}
        assert federation.online() == NODES
    finally:
        for process in intruders.values():
            stop(process)
    assert run.status == "finished:completed", run.log
    return run, interrupted, committed, exits, {name: (folder / f"{name}.log").read_text() for name in intruders}


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
        command += ["--isolation", "process"]  # without a process that would start ClientApps
        command += ["--max-retries", "2", "--node-config", "partition-id=0 num-partitions=3", *options[name]]
        started[name] = start(command, folder, federation.flwr.env, folder / f"{name}.log")
    return started


@pytest.mark.parametrize("name", INTRUDERS)
def test_nobody_gets_in_and_the_run_goes_on_with_the_rest(resumed, name):
    run, _, _, exits, logs = resumed
    assert "Failed to initialize the connection to the SuperLink" in logs[name]
    assert INTRUDERS[name] in logs[name]
    assert exits[name] == 1
    assert [row["nodes_available"] for row in results(run.directory)[1:]] == [NODES] * 2


@pytest.mark.parametrize("how", INTERRUPTIONS)
def test_an_interruption_loses_no_committed_round(resumed, how):
    run, interrupted, committed, _, _ = resumed
    assert len(committed[how]) == INTERRUPTIONS[how]  # round 0 has a row, too
    assert committed[how] == run.results[: INTERRUPTIONS[how]]
    if how in STATUS:
        assert interrupted[how].status == STATUS[how]
    else:  # a SuperLink that was killed may not know
        assert interrupted[how].status != "finished:completed"
    if how in PHASE:
        assert PHASE[how] in interrupted[how].log.partition("Starting round 2/")[2]
        assert "results (QUERY)" not in interrupted[how].log


def test_a_run_over_tls_that_was_interrupted_is_bit_identical_to_one_in_process(resumed, app, settings):
    """Those of a simulation have the same bits, too: see test_e2e.py."""
    run, in_process = resumed[0], app.run(app.grid(num_nodes=NODES), **settings)
    assert results(run.directory) == results(in_process)
    assert same_bits(model(run.directory), model(in_process))
    assert {p.name for p in run.directory.rglob("*")} == {p.name for p in in_process.rglob("*")}


# --------------------------------------------------------------------------------- Secrets


def test_private_keys_are_private_and_nothing_secret_leaks(federation):
    private = [*federation.state.glob("keys/node-?"), federation.certificates / "server.key"]
    assert len(private) == NODES + 1
    secrets = []
    for path in private:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        secrets.append(path.read_text().splitlines()[1].encode())
    for path in federation.state.rglob("*"):
        if path.is_file() and path not in private:
            content = path.read_bytes()
            assert not any(secret in content for secret in secrets), path
            assert b"PRIVATE KEY" not in content, path


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
