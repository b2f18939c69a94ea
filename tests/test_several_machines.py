"""The steps of docs/deployment.md for several machines: on one host, and as they are written on four hosts with names.

The four hosts are network namespaces, which only root can create: pytest -m network
"""

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy import prepare_partitions
from deploy.cli import PROJECT, FlowerCli, free_port, start, stop, wait_for
from deploy.keys import HOST
from tests.conftest import results
from tests.test_docs import DEPLOYMENT, section

HOSTS = {"server": "10.77.0.1", "node-a": "10.77.0.2", "node-b": "10.77.0.3", "desk": "10.77.0.4"}
NAMES = "127.0.0.1 localhost\n10.77.0.1 server.example.org\n"
BRIDGE = "flower-test"

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


@pytest.fixture(autouse=True)
def no_plot(monkeypatch) -> None:
    monkeypatch.setattr(prepare_partitions, "plot_labels", lambda *args: None)  # it takes seconds


def ip(*arguments: str, check: bool = True) -> bool:
    return subprocess.run(["ip", *arguments], capture_output=True, check=check).returncode == 0


def allowed() -> bool:
    """Whether this process may create network namespaces."""
    if os.geteuid() or not shutil.which("ip") or not ip("netns", "add", "flower-try", check=False):
        return False
    return ip("netns", "del", "flower-try", check=False)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """The beginning of a command on a host. It gives a process /etc/netns/NAME/hosts as its /etc/hosts."""
    ip("link", "add", BRIDGE, "type", "bridge")
    ip("link", "set", BRIDGE, "up")
    try:
        for name, address in HOSTS.items():
            (Path("/etc/netns") / name).mkdir(parents=True)
            (Path("/etc/netns") / name / "hosts").write_text(NAMES)
            ip("netns", "add", name)
            ip("link", "add", f"veth-{name}", "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", f"veth-{name}", "master", BRIDGE, "up")
            ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            for device in ("eth0", "lo"):
                ip("-n", name, "link", "set", device, "up")
        yield ["ip", "netns", "exec"]
    finally:
        for name in HOSTS:
            ip("netns", "del", name, check=False)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)
        ip("link", "del", BRIDGE, check=False)


def walk_through(steps: str, folder: Path, dataset: str, nodes: list[str], on_host: list[str]) -> None:
    """Follow the steps. Each host has a home folder, with the files that the steps give it, and nothing else."""
    prepare_partitions.write_partitions(folder / "parts", len(nodes), dataset, "iid", 1.0, 42)
    settings = f"num-server-rounds=1 min-available-nodes={len(nodes)} min-train-nodes={len(nodes)} use-wandb=false"
    ours = f"\"query-timeout=60.0 dataset='{dataset}' opt-in-probability=0.0 {settings}\""
    assert '"query-timeout=30.0"' in steps
    commands = re.findall(r"`((?:python -c|flower-\w+|flwr \w+) [^`]+)`", steps.replace('"query-timeout=30.0"', ours))
    certificates, key, superlink, register, supernode, run = map(shlex.split, commands)
    (configuration,) = re.findall(r"```toml\n(.*?)```", steps, re.DOTALL)
    homes = {name: folder / name for name in ("server", *nodes, "desk")}
    env = {}
    for name, home in homes.items():
        env[name] = FlowerCli(home / ".flwr").env | {"HOME": str(home), "PYTHONPATH": str(PROJECT)}  # as in a clone
        del env[name]["FLWR_HOME"]  # it is ~/.flwr
    data = {name: str(folder / "parts" / f"node-{index}") for index, name in enumerate(nodes)}

    def there(name: str, command: list[str]) -> list[str]:
        """The command, as a command on a host, with the path that the host has."""
        prefix = [*on_host, name] if on_host else []
        return prefix + [word.replace("/path/to/data", data.get(name, "")) for word in command]

    def do(name: str, command: list[str], cwd: Path | None = None) -> str:
        done = subprocess.run(
            there(name, command), cwd=cwd or homes[name], env=env[name], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def online() -> bool:
        listed = json.loads(do("desk", ["flwr", "supernode", "ls", "production", "--format", "json"]))["nodes"]
        return [node["status"] for node in listed] == ["online"] * len(nodes)

    processes = []
    try:
        do("server", certificates)
        for name in nodes:
            do(name, key)
        for name in (*nodes, "desk"):
            shutil.copy(homes["server"] / "certificates" / "ca.crt", homes[name])
        configuration = configuration.replace("/path/to/ca.crt", str(homes["desk"] / "ca.crt"))
        (homes["desk"] / ".flwr" / "config.toml").write_text(configuration)
        processes.append(start(there("server", superlink), homes["server"], env["server"], homes["server"] / "log"))
        wait_for(lambda: "Uvicorn running" in (homes["server"] / "log").read_text())
        for name in nodes:
            shutil.copy(homes[name] / "node-key.pub", homes["desk"])
            do("desk", register)
            processes.append(start(there(name, supernode), homes[name], env[name], homes[name] / "log"))
        wait_for(online, pause=2)
        log = do("desk", run, PROJECT)
    finally:
        stop(*processes)
    (directory,) = (homes["server"] / "outputs").glob("*/*")
    row = results(directory)[1]
    assert [row[key] for key in ("nodes_available", "train_received", "query_received")] == [len(nodes)] * 3, log
    assert (directory / "final_model.pt").exists()


def test_the_steps_work_with_the_addresses_of_one_host(tmp_path, tiny_dataset):
    steps = section(DEPLOYMENT, "## Several machines")
    here = {"server.example.org": HOST, "0.0.0.0": HOST, "8000": str(free_port())}
    here["`flower-supernode "] = f"`flower-supernode --port {free_port()} "  # of one that starts ClientApps
    for written, ours in here.items():
        assert written in steps
        steps = steps.replace(written, ours)
    walk_through(steps, tmp_path, tiny_dataset, ["node"], [])


@pytest.mark.network
@pytest.mark.skipif(not allowed(), reason="only root can create network namespaces")
def test_the_steps_work_as_they_are_written_on_four_hosts(hosts, tmp_path, tiny_dataset):
    steps = section(DEPLOYMENT, "## Several machines")
    walk_through(steps, tmp_path, tiny_dataset, ["node-a", "node-b"], hosts)
