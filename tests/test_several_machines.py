"""The steps of docs/deployment.md for several machines, as they are written, on four hosts with addresses and names.

The hosts are network namespaces, which only root can create: pytest -m network
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

from deploy.cli import FlowerCli, start, stop, wait_for
from deploy.prepare_partitions import write_partitions
from tests.conftest import results
from tests.grid import PROJECT
from tests.test_docs import DEPLOYMENT, section

HOSTS = {"server": "10.77.0.1", "node-a": "10.77.0.2", "node-b": "10.77.0.3", "desk": "10.77.0.4"}
NAMES = "127.0.0.1 localhost\n10.77.0.1 server.example.org\n"
BRIDGE = "flower-test"


def ip(*arguments: str, check: bool = True) -> bool:
    return subprocess.run(["ip", *arguments], capture_output=True, check=check).returncode == 0


def allowed() -> bool:
    """Whether this process may create network namespaces."""
    if os.geteuid() or not shutil.which("ip") or not ip("netns", "add", "flower-try", check=False):
        return False
    return ip("netns", "del", "flower-try", check=False)


pytestmark = [
    pytest.mark.network,
    pytest.mark.e2e,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not allowed(), reason="only root can create network namespaces"),
]


@pytest.fixture
def hosts(tmp_path) -> Iterator[dict[str, Path]]:
    """The home folder of each host. `ip netns exec` gives a process /etc/netns/NAME/hosts as its /etc/hosts."""
    ip("link", "add", BRIDGE, "type", "bridge")
    ip("link", "set", BRIDGE, "up")
    try:
        for name, address in HOSTS.items():
            (tmp_path / name).mkdir()
            (Path("/etc/netns") / name).mkdir(parents=True)
            (Path("/etc/netns") / name / "hosts").write_text(NAMES)
            ip("netns", "add", name)
            ip("link", "add", f"veth-{name}", "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", f"veth-{name}", "master", BRIDGE, "up")
            ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            for device in ("eth0", "lo"):
                ip("-n", name, "link", "set", device, "up")
        yield {name: tmp_path / name for name in HOSTS}
    finally:
        for name in HOSTS:
            ip("netns", "del", name, check=False)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)
        ip("link", "del", BRIDGE, check=False)


def test_the_steps_work_as_they_are_written(hosts, tmp_path, tiny_dataset):
    write_partitions(tmp_path / "parts", 2, tiny_dataset, "iid", 1.0, 42)
    steps = section(DEPLOYMENT, "## Several machines")
    settings = f"query-timeout=30.0 dataset='{tiny_dataset}' num-server-rounds=1 opt-in-probability=1.0 use-wandb=false"
    steps = steps.replace('"query-timeout=30.0"', f'"{settings}"')
    commands = re.findall(r"`((?:python -c|flower-\w+|flwr \w+) [^`]+)`", steps)
    certificates, key, superlink, register, supernode, run = map(shlex.split, commands)
    env = {name: {k: v for k, v in FlowerCli(home / ".flwr").env.items() if k != "FLWR_HOME"} | {"HOME": str(home)}
           for name, home in hosts.items()}  # fmt: skip

    def there(name: str, command: list[str]) -> list[str]:
        """The command, as a command on a host, with the path that the host has."""
        data = str(tmp_path / "parts" / ("node-1" if name == "node-b" else "node-0"))
        return ["ip", "netns", "exec", name, *(word.replace("/path/to/data", data) for word in command)]

    def do(name: str, command: list[str], cwd: Path | None = None) -> str:
        done = subprocess.run(
            there(name, command), cwd=cwd or hosts[name], env=env[name], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    processes = []
    try:
        for name in ("server", "node-a", "node-b"):  # "in a clone of this repository"
            env[name]["PYTHONPATH"] = str(PROJECT)
        do("server", certificates)
        for name in ("node-a", "node-b"):
            do(name, key)
        for name in ("node-a", "node-b", "desk"):
            shutil.copy(hosts["server"] / "certificates" / "ca.crt", hosts[name])
        (configuration,) = re.findall(r"```toml\n(.*?)```", steps, re.DOTALL)
        configuration = configuration.replace("/path/to/ca.crt", str(hosts["desk"] / "ca.crt"))
        (hosts["desk"] / ".flwr" / "config.toml").write_text(configuration)
        processes.append(start(there("server", superlink), hosts["server"], env["server"], hosts["server"] / "log"))
        wait_for(lambda: "Uvicorn running" in (hosts["server"] / "log").read_text())
        for name in ("node-a", "node-b"):
            shutil.copy(hosts[name] / "node-key.pub", hosts["desk"])
            do("desk", register)
            processes.append(start(there(name, supernode), hosts[name], env[name], hosts[name] / "log"))

        def online() -> bool:
            listed = json.loads(do("desk", ["flwr", "supernode", "ls", "production", "--format", "json"]))["nodes"]
            return [node["status"] for node in listed] == ["online", "online"]

        wait_for(online, pause=2)
        log = do("desk", run, PROJECT)
    finally:
        stop(*reversed(processes))
    (directory,) = (hosts["server"] / "outputs").glob("*/*")
    row = results(directory)[1]
    assert (row["nodes_available"], row["train_received"], row["evaluate_received"]) == (2, 2, 2), log
    assert (directory / "final_model.pt").exists()
