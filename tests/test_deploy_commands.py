"""The commands of deploy/: one starts a federation, another one writes its partitions."""

import contextlib
import datetime
import json
import os
import re
import shlex
import shutil
import signal
import ssl
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import psutil
import pytest
from cryptography import x509

from deploy import prepare_partitions
from deploy.cli import (
    PROJECT,
    STOP_SIGNALS,
    FederationError,
    FlowerCli,
    command_of,
    family,
    free_port,
    start,
    stop,
    wait_for,
)
from deploy.keys import HOST, VALID_FOR, make_certificates, make_node_key
from deploy.local_federation import Federation, dataset_of, run_command
from deploy.prepare_partitions import write_partitions
from pytorch_example_low_level import images
from tests.conftest import alive, results
from tests.grid import typed_config
from tests.test_docs import DEPLOYMENT, section

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


# ---------------------------------------------------------------------- Starting and stopping


def local_federation(state: Path, *options: str) -> subprocess.Popen[str]:
    """Start the command in a state in which no signal is ignored, as under `nohup`, or in the background."""
    command = [sys.executable, "-m", "deploy.local_federation", "--nodes", "1", "--state", str(state), *options]
    out, err = subprocess.PIPE, subprocess.STDOUT

    def defaults() -> None:
        for each in STOP_SIGNALS:
            signal.signal(each, signal.SIG_DFL)

    return subprocess.Popen(command, cwd=PROJECT, stdout=out, stderr=err, text=True, preexec_fn=defaults)  # noqa: PLW1509 (it takes no lock)


def read_until(process: subprocess.Popen[str], text: str) -> str:
    read = ""
    for line in process.stdout:
        read += line
        if text in line:
            return read
    raise AssertionError(read)


def using(state: Path) -> list[str]:
    """The command lines of the processes that use a folder."""
    commands = [command_of(process) for process in psutil.process_iter()]
    return [command for command in commands if str(state) in command]


def stop_by(name: str, process: subprocess.Popen[str], state: Path) -> str:
    """Stop the command by a signal, check that nothing is left, and return what it printed."""
    started = [each.pid for each in family(process.pid)]
    assert len(started) > 1
    for _ in range(2):  # an impatient user
        process.send_signal(signal.Signals[name])
        time.sleep(0.1)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert "Stopping ..." in output
    assert "Traceback" not in output
    assert not using(state)
    assert not alive(started)
    return output


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The state of a federation whose command was killed; the ends of two others that were started on it.

    One was started while everything of the first was there, and one when its command was killed.
    """
    state = tmp_path_factory.mktemp("killed") / "state"
    first = local_federation(state)
    started: set[int] = set()
    ends = []
    try:
        read_until(first, "Ctrl-C stops the federation")
        started = {each.pid for each in family(first.pid)}
        for command_lives in (True, False):
            if not command_lives:
                first.kill()
                first.wait()
            other = local_federation(state)
            output, _ = other.communicate(timeout=60)
            ends.append((other.returncode, output))
        (kill,) = re.findall(r"`(kill [\d ]+)`", ends[1][1])
        subprocess.run(shlex.split(kill), check=True)
        wait_for(lambda: not using(state))
    finally:
        for pid in alive(started):
            os.kill(pid, signal.SIGKILL)
        stop(first)
    return state, first.pid, ends


@pytest.fixture(scope="module")
def restarted(killed):
    """The federation that was killed, started again while other tests run.

    That takes a minute: for so long, the SuperLink takes the killed SuperNode for online. Tests that take as long
    stand before the last one, which needs it.
    """
    process = local_federation(killed[0])
    yield process
    stop(process)


@pytest.mark.usefixtures("restarted")
def test_a_second_federation_is_refused_while_the_first_lives(killed):
    state, pid, ((code, output), (code_later, output_later)) = killed
    assert (code, code_later) == (1, 1)
    error = f"error: another local federation uses {state}; stop it with `kill {{}}`, or choose another folder"
    assert output == f"{error.format(pid)} with --state\n"
    ids = re.search(r"`kill ([\d ]+)`", output_later).group(1)
    assert output_later == f"{error.format(ids)} with --state\n"
    assert str(pid) not in ids.split()


@pytest.fixture(scope="module")
def state(tmp_path_factory) -> Path:
    """A folder that one federation after the other uses."""
    return tmp_path_factory.mktemp("signals") / "state"


# A signal when the nodes are online: see the last test.
@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP"])
def test_a_stop_signal_stops_everything_even_during_the_start(state, name):
    process = local_federation(state)
    try:
        wait_for(lambda: any("flower-superlink" in command_of(each) for each in family(process.pid)))
        stop_by(name, process, state)
    finally:
        stop(process)


# ------------------------------------------------------------------------- Files and commands


def handshake(folder: Path, name: str) -> None:
    """A TLS connection in memory: the server has the certificate, and the client knows the CA and the name."""
    server_context, client_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    server_context.load_cert_chain(folder / "server.crt", folder / "server.key")
    client_context.load_verify_locations(folder / "ca.crt")
    client_context.verify_flags |= ssl.VERIFY_X509_STRICT
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_context.wrap_bio(down, up, server_hostname=name)
    server = server_context.wrap_bio(up, down, server_side=True)
    for side in (client, server, client, server):
        with contextlib.suppress(ssl.SSLWantReadError):
            side.do_handshake()
    assert server.version() == client.version() == "TLSv1.3"


def test_the_certificate_is_for_these_names_for_a_year_and_for_a_server(tmp_path):
    make_certificates(tmp_path, ["server.example.org", "10.0.0.1"])
    for name in ("server.example.org", "10.0.0.1", "127.0.0.1"):
        handshake(tmp_path, name)
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        handshake(tmp_path, "other.example.org")
    ca, server = (x509.load_pem_x509_certificate((tmp_path / f"{name}.crt").read_bytes()) for name in ("ca", "server"))
    assert datetime.timedelta(days=364) < server.not_valid_after_utc - datetime.datetime.now(datetime.UTC) <= VALID_FOR
    assert server.not_valid_before_utc < datetime.datetime.now(datetime.UTC)
    usage = server.extensions.get_extension_for_class(x509.KeyUsage).value
    assert usage.digital_signature and not usage.key_cert_sign
    assert not server.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert ca.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length == 0
    assert [path.name for path in tmp_path.iterdir() if b"PRIVATE KEY" in path.read_bytes()] == ["server.key"]
    make_node_key(tmp_path / "node")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    make_certificates(tmp_path, ["10.0.0.1"])  # again: nothing that exists is overwritten
    make_node_key(tmp_path / "node")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_certificate_that_has_expired_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("deploy.keys.VALID_FOR", datetime.timedelta(minutes=1))
    make_certificates(tmp_path / "old")
    with pytest.raises(FileExistsError, match=r"server.crt expired on \d{4}-\d\d-\d\d\. Delete"):
        make_certificates(tmp_path / "old")


def test_keys_of_two_hosts_whose_names_begin_alike_do_not_replace_each_other(tmp_path):
    make_node_key(tmp_path / "site.org")
    make_node_key(tmp_path / "site.com")
    assert {path.name for path in tmp_path.iterdir()} == {"site.org", "site.org.pub", "site.com", "site.com.pub"}


def test_keys_of_an_interrupted_call_are_made_again(tmp_path):
    (tmp_path / "server.key").touch()
    (tmp_path / "node.pub").touch()
    make_certificates(tmp_path)
    make_node_key(tmp_path / "node")
    names = ("server.key", "server.crt", "ca.crt", "node", "node.pub")
    assert all((tmp_path / name).stat().st_size for name in names)


def test_partitions_are_written_for_each_node_and_never_over_others(tmp_path, tiny_dataset, monkeypatch, capsys):
    options = ["--nodes", "3", "--dataset", tiny_dataset, "--out", str(tmp_path / "parts")]
    monkeypatch.setattr(sys, "argv", ["prepare_partitions", *options])
    prepare_partitions.main()
    made = {p.name for p in (tmp_path / "parts").iterdir()}
    assert made == {"node-0", "node-1", "node-2", "labels.png", "partitions.json"}
    assert json.loads((tmp_path / "parts" / "partitions.json").read_text()) == {
        "dataset": tiny_dataset, "partitioner": "dirichlet", "dirichlet-alpha": 1.0, "seed": 42, "num-partitions": 3,
    }  # fmt: skip
    with pytest.raises(SystemExit) as error:
        prepare_partitions.main()
    assert error.value.code == 2
    assert "exists" in capsys.readouterr().err


@pytest.mark.parametrize("typed", ["fashion-mnist-sample", "./tiny", "an/unknown-name"])
def test_the_record_names_a_data_set_so_that_the_server_finds_it(typed, tiny_dataset, tmp_path, monkeypatch):
    (tmp_path / "tiny").symlink_to(tiny_dataset)
    monkeypatch.chdir(tmp_path)
    tiny = typed_config(dataset=tiny_dataset, partitioner="iid")
    for name in ("opened", "partitions", "rows_of_partition"):
        real = getattr(images, name)
        monkeypatch.setattr(prepare_partitions, name, lambda config, *args, real=real: real(tiny, *args))
    monkeypatch.setattr(prepare_partitions, "plot_labels", lambda *args: None)  # it takes seconds
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


# --------------------------------------------------------------------------- Several machines


def test_the_steps_for_several_machines_work(tmp_path, tiny_dataset):
    """Server, node and desk are folders here, each with the files that the steps give it."""
    server, node, desk = (tmp_path / name for name in ("server", "node", "desk"))
    home = {folder: FlowerCli(folder / ".flwr").env for folder in (server, node, desk)}
    write_partitions(tmp_path / "parts", 1, tiny_dataset, "iid", 1.0, 42)
    port = free_port()
    settings = "num-server-rounds=1 min-available-nodes=1 min-train-nodes=1 opt-in-probability=0.0 use-wandb=false"
    here = {
        "server.example.org": HOST, "0.0.0.0": HOST, "8000": str(port), "/path/to/ca.crt": str(desk / "ca.crt"),
        "/path/to/data": str(tmp_path / "parts" / "node-0"),
        '"query-timeout=30.0"': f"\"query-timeout=30.0 dataset='{tiny_dataset}' {settings}\"",
    }  # fmt: skip
    steps = section(DEPLOYMENT, "## Several machines")
    for there, ours in here.items():
        assert there in steps
        steps = steps.replace(there, ours)
    commands = re.findall(r"`((?:python -c|flower-\w+|flwr \w+) [^`]+)`", steps)
    certificates, key, superlink, register, supernode, run = map(shlex.split, commands)

    def do(command: list[str], cwd: Path, env: dict[str, str]) -> str:
        done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    processes = []
    try:
        for folder in (server, node):  # so that `python -c` finds this checkout
            home[folder]["PYTHONPATH"] = str(PROJECT)
        do(certificates, server, home[server])
        do(key, node, home[node])
        for folder in (node, desk):
            shutil.copy(server / "certificates" / "ca.crt", folder)
        shutil.copy(node / "node-key.pub", desk)
        (configuration,) = re.findall(r"```toml\n(.*?)```", steps, re.DOTALL)
        (desk / ".flwr" / "config.toml").write_text(configuration)

        processes.append(start(superlink, server, home[server], server / "log"))
        nodes = ["flwr", "supernode", "ls", "production", "--format", "json"]
        wait_for(lambda: "Uvicorn running" in (server / "log").read_text())
        wait_for(lambda: '"success": true' in FlowerCli(desk / ".flwr")(*nodes[1:]), pause=2)
        do(register, desk, home[desk])
        processes.append(start([*supernode, "--port", str(free_port())], node, home[node], node / "log"))
        wait_for(lambda: json.loads(do(nodes, desk, home[desk]))["nodes"][0]["status"] == "online", pause=2)
        log = do(run, PROJECT, home[desk])
    finally:
        stop(*reversed(processes))
    (directory,) = (server / "outputs").glob("*/*")
    row = results(directory)[1]
    assert (row["nodes_available"], row["train_received"]) == (1, 1), log
    assert (row["query_sent"], row["opted_in"]) == (1, 0)  # test_deployment.py has an evaluation
    assert (directory / "final_model.pt").exists()


# ------------------------------------------------------------------------------- Once more


def test_a_federation_starts_again_after_it_was_killed_and_stops_at_sigterm(killed, restarted):
    read_until(restarted, "Ctrl-C stops the federation")
    stop_by("SIGTERM", restarted, killed[0])
