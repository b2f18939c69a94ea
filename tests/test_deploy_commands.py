"""The commands of deploy/: one starts a federation, another one writes its partitions."""

import contextlib
import datetime
import json
import os
import re
import shlex
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

from benchmarks.simulation import command_of
from deploy import prepare_partitions
from deploy.cli import PROJECT, STOP_SIGNALS, family, stop, wait_for
from deploy.keys import VALID_FOR, make_certificates, make_node_key
from deploy.local_federation import Federation, run_command, settings_of
from deploy.prepare_partitions import write_partitions
from pytorch_example_low_level import images
from pytorch_example_low_level.config import UserError
from tests.conftest import alive
from tests.grid import typed_config

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


# ---------------------------------------------------------------------- Starting and stopping


def start_command(name: str, *options: str) -> subprocess.Popen[str]:
    """Start a command in a state in which no signal is ignored, as under `nohup`, or in the background."""
    command, out, err = [sys.executable, "-m", f"deploy.{name}", *options], subprocess.PIPE, subprocess.STDOUT

    def defaults() -> None:
        for each in STOP_SIGNALS:
            signal.signal(each, signal.SIG_DFL)

    return subprocess.Popen(command, cwd=PROJECT, stdout=out, stderr=err, text=True, preexec_fn=defaults)  # noqa: PLW1509 (it takes no lock)


def local_federation(state: Path) -> subprocess.Popen[str]:
    return start_command("local_federation", "--nodes", "1", "--state", str(state))


def read_until(process: subprocess.Popen[str], text: str) -> None:
    read = ""
    for line in process.stdout:
        read += line
        if text in line:
            return
    raise AssertionError(read)


def using(state: Path) -> list[str]:
    """The command lines of the processes that use a folder."""
    commands = [command_of(process) for process in psutil.process_iter()]
    return [command for command in commands if str(state) in command]


def stop_by(name: str, process: subprocess.Popen[str]) -> str:
    """Stop a command by a signal, check that nothing is left, and return what it printed."""
    started = [each.pid for each in family(process.pid)]
    for _ in range(2):  # an impatient user
        process.send_signal(signal.Signals[name])
        time.sleep(0.1)
    output, _ = process.communicate(timeout=60)
    assert "Stopping ..." in output
    assert "Traceback" not in output
    assert not alive(started)
    return output


def test_a_program_ends_at_a_signal_with_all_that_it_has_started(tmp_path):
    """Even if the signal comes before the program has stored the process."""
    code = """if True:
        import os, signal, sys
        from pathlib import Path
        from deploy.cli import interrupt_on_signals, raise_if_interrupted, start
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under `nohup`
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        interrupt_on_signals()
        try:
            start(["sh", "-c", "sleep 600 & echo $$ $! && wait"], Path(), os.environ, Path("log"))
            while not Path("log").read_text():
                pass
            os.kill(os.getpid(), signal.SIGHUP)
            raise_if_interrupted()
            print("goes on")
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            except BaseException:
                print("is held up by a library")
            raise_if_interrupted()
        except KeyboardInterrupt:
            os.kill(os.getpid(), signal.SIGINT)
            print("cleans up")
    """
    command, env = [sys.executable, "-c", code], os.environ | {"PYTHONPATH": str(PROJECT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (
        0,
        "goes on\nis held up by a library\ncleans up\n",
        "\nStopping ...\n",
    )
    started = {int(pid) for pid in (tmp_path / "log").read_text().split()}
    assert len(started) == 2
    assert not alive(started)


@pytest.fixture(scope="module")
def state(tmp_path_factory) -> Path:
    """A folder that one federation after the other uses."""
    return tmp_path_factory.mktemp("signals") / "state"


def test_a_stop_signal_stops_everything_even_during_the_start(state):
    process = local_federation(state)
    try:
        wait_for(lambda: any("flower-superlink" in command_of(each) for each in family(process.pid)))
        stop_by("SIGINT", process)
        assert process.returncode == 0
        assert not using(state)
    finally:
        stop(process)


def test_a_federation_whose_command_was_killed_is_found_and_can_be_started_again(state):
    first, started = local_federation(state), set()
    try:
        read_until(first, "Ctrl-C stops the federation")
        started = {each.pid for each in family(first.pid)}
        for command_lives in (True, False):
            if not command_lives:
                first.kill()
                first.wait()
            other = local_federation(state)
            output, _ = other.communicate(timeout=60)
            assert other.returncode == 1
            refused = (
                rf"error: another local federation uses {state}; stop it with `(kill [\d ]+)`, or choose .* --state\n"
            )
            (kill,) = re.fullmatch(refused, output).groups()
            assert (str(first.pid) in kill.split()) == command_lives
        subprocess.run(shlex.split(kill), check=True)
        wait_for(lambda: not using(state))
    finally:
        for pid in alive(started):
            os.kill(pid, signal.SIGKILL)
        stop(first)
    again = local_federation(state)
    try:
        read_until(again, "Ctrl-C stops the federation")
        stop_by("SIGTERM", again)
        assert again.returncode == 0
        assert not using(state)
    finally:
        stop(again)


# ------------------------------------------------------------------------- Certificates and keys


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
    for name in ("server.key", "node.pub", "ca.crt.part", "node.part"):
        (tmp_path / name).touch()
    make_certificates(tmp_path)
    make_node_key(tmp_path / "node")
    assert {path.name for path in tmp_path.iterdir()} == {"server.key", "server.crt", "ca.crt", "node", "node.pub"}
    assert all(path.stat().st_size for path in tmp_path.iterdir())
    assert (tmp_path / "node").stat().st_mode & 0o077 == 0


# ---------------------------------------------------------------------------------- Partitions


def prepare(monkeypatch, dataset: str, *options: str) -> None:
    arguments = ["--nodes", "3", "--dataset", dataset, "--out", "parts", *options]
    monkeypatch.setattr(sys, "argv", ["prepare_partitions", *arguments])
    prepare_partitions.main()


def test_partitions_are_written_for_each_node(tmp_path, tiny_dataset, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare(monkeypatch, tiny_dataset, "--seed", "7")
    assert {path.name for path in tmp_path.iterdir()} == {"parts"}
    made = {path.name for path in (tmp_path / "parts").iterdir()}
    assert made == {"node-0", "node-1", "node-2", "labels.png", "partitions.json"}
    settings = {"dataset": tiny_dataset, "partitioner": "dirichlet", "dirichlet-alpha": 1.0, "seed": 7}
    assert json.loads((tmp_path / "parts" / "partitions.json").read_text()) == settings | {"num-partitions": 3}
    assert settings_of(tmp_path / "parts", 3) == settings
    for nodes, odd in ((2, "node-2"), (4, "node-3")):
        with pytest.raises(
            UserError,
            match=rf"parts has 3 folders of nodes, and {nodes} nodes need .* \(differing: {odd}\)",
        ):
            Federation(tmp_path / "state", nodes, tmp_path / "parts")
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("typed", ["fashion-mnist-sample", "./tiny", "an/unknown-name"])
def test_the_record_names_a_data_set_so_that_the_server_finds_it(typed, tiny_dataset, tmp_path, monkeypatch):
    (tmp_path / "tiny").symlink_to(tiny_dataset)
    (tmp_path / "fashion-mnist-sample").mkdir()
    monkeypatch.chdir(tmp_path)
    tiny = typed_config(dataset=tiny_dataset, partitioner="iid")
    for name in ("opened", "rows_of_partition"):
        real = getattr(images, name)
        monkeypatch.setattr(prepare_partitions, name, lambda config, *args, real=real: real(tiny, *args))
    monkeypatch.setattr(prepare_partitions, "plot_labels", lambda *args: None)  # it takes seconds
    write_partitions(tmp_path / "parts", 2, typed, "iid", 1.0, 42)
    assert settings_of(tmp_path / "parts", 2)["dataset"] == (tiny_dataset if typed == "./tiny" else typed)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--alpha", "0"], "dirichlet-alpha: Input should be greater than or equal to 0.001; it is 0.0"),
        (
            ["--dataset", "an/unknown-name"],
            "Cannot use dataset 'an/unknown-name' for 3 nodes: it cannot be loaded from the Hub: Couldn't reach",
        ),
        (["--nodes", "100"], "120 training images are too few for 100 nodes"),
        (["--out", "file/parts"], "Cannot write file/parts: .* -- Allowed: a new folder"),
        (["--out", "file"], "Cannot write file: it exists -- Allowed: a new folder"),
    ],
)
def test_a_failed_preparation_says_why_and_leaves_nothing(options, said, tiny_dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=rf"(?s)^error: .*{said}"):
        prepare(monkeypatch, tiny_dataset, *options)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_interrupted_preparation_leaves_nothing(tmp_path, tiny_dataset):
    options = ["--nodes", "20", "--partitioner", "iid", "--dataset", tiny_dataset, "--out", str(tmp_path / "parts")]
    process = start_command("prepare_partitions", *options)
    try:
        read_until(process, "1/20: ")
        assert list(tmp_path.iterdir())
        assert "error: interrupted; nothing is written" in stop_by("SIGHUP", process)
        assert process.returncode == 1
        assert not list(tmp_path.iterdir())
    finally:
        stop(process)


def test_a_broken_record_is_refused_and_a_missing_one_leaves_the_data_set_open(tmp_path):
    assert settings_of(tmp_path, 0) == {"dataset": "..."}
    for content in ("{", "[]", "{}"):
        (tmp_path / "partitions.json").write_text(content)
        with pytest.raises(UserError, match=r"partitions\.json has no valid record; create .* again"):
            settings_of(tmp_path, 0)


@pytest.mark.parametrize("dataset", ["fashion-mnist-sample", "/a $HOME/with `date` and \\t", "/it's $HOME/\\t"])
def test_the_printed_command_gives_flower_the_settings(dataset, tmp_path):
    settings = {"dataset": dataset, "partitioner": "iid", "dirichlet-alpha": 1.0, "seed": 7}
    command = run_command(tmp_path / "a folder", settings)
    assert re.search(r'--run-config "query-timeout=30\.0.*"$', command)  # one string: a key can be added
    script = f'flwr() {{ printf "%s\\n" "$FLWR_HOME" "$@"; }}\n{command}'
    printed = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.splitlines()
    assert printed[:4] == [str(tmp_path / "a folder"), "run", str(PROJECT), "--stream"]
    config = tomllib.loads("\n".join(re.findall(r"""\S+?=(?:'[^']*'|"[^"]*"|\S+)""", printed[-1])))
    assert config == {"query-timeout": 30.0} | settings
