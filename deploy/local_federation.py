"""A real federation on one machine: SuperLink and SuperNodes over TLS, with authentication.

    python -m deploy.local_federation --nodes 3

creates certificates and keys, starts a SuperLink and three SuperNodes, registers the nodes' keys, waits until all nodes
are online, and prints the `flwr run` command for this federation. Ctrl-C, SIGTERM and SIGHUP stop everything. Keys,
logs and run directories are in the `--state` folder (default: ./federation). The next start uses the keys again, with a
new database. Your own Flower configuration is not changed.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from deploy import cli
from deploy.keys import HOST, keep_out_of_git, make_certificates, make_node_key
from pytorch_example_low_level.config import UserError


class Federation:
    """A SuperLink and its SuperNodes on this machine, as a context manager that starts and stops them."""

    def __init__(self, state: Path, nodes: int, data: Path | None = None) -> None:
        self.state, self.num_nodes = state.absolute(), nodes
        self.data = data.absolute() if data else None
        self.settings = settings_of(self.data, nodes) if self.data else {}
        self.port = cli.free_port()
        self.flwr = cli.FlowerCli(self.state / "flower")
        self.certificates = self.state / "certificates"
        self.superlink: subprocess.Popen[bytes] | None = None
        self.supernodes: dict[int, subprocess.Popen[bytes]] = {}
        self._mark: IO[str]  # a file that all of its processes have open

    def __enter__(self) -> Federation:
        """Start everything and wait until all nodes are online. Raises UserError."""
        # The folder may be one that has a .gitignore already, so the folders of the keys get their own.
        for folder in (self.state, self.certificates, self.key(0).parent):
            keep_out_of_git(folder)
        self._mark = (self.state / "lock").open("w")
        try:
            self._check_that_it_is_alone()
            make_certificates(self.certificates)
            self._write_flower_configuration()
            for file in self.state.glob("superlink.db*"):  # in it, killed nodes would be online for a minute
                file.unlink()
            self.start_superlink()
            for index in range(self.num_nodes):
                self.start_supernode(index)
            self.wait_until_online(self.num_nodes, timeout=120 + 10 * self.num_nodes)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *args: object) -> None:
        """Stop all processes."""
        cli.stop(*self.supernodes.values(), *([self.superlink] if self.superlink else ()))
        self._mark.close()

    def key(self, index: int) -> Path:
        """Return the path of a node's private key."""
        return self.state / "keys" / f"node-{index}"

    def start_superlink(self) -> None:
        """Start the SuperLink and wait until it answers. Raises UserError."""
        options = ["--enable-supernode-auth", "--database", str(self.state / "superlink.db")]
        for option, name in (("ca-certfile", "ca.crt"), ("certfile", "server.crt"), ("keyfile", "server.key")):
            options += [f"--ssl-{option}", str(self.certificates / name)]
        self.superlink = cli.start_superlink(options, self.port, self.state, self.flwr.env, [self._mark.fileno()])

    def start_supernode(self, index: int) -> None:
        """Register and start a SuperNode, which uses its folder of `data` if there is one, or else its partition."""
        make_node_key(self.key(index))
        answer = self.flwr("supernode", "register", f"{self.key(index)}.pub", "--name", f"node {index}")
        if "registered successfully" not in answer and "already in use" not in answer:  # by an earlier call
            raise UserError(f"node {index} could not be registered:\n{answer}")
        config: dict[str, object] = {"partition-id": index, "num-partitions": self.num_nodes}
        if self.data:
            config["data-path"] = str(self.data / f"node-{index}")
        command = ["flower-supernode", "--superlink", f"{HOST}:{self.port}", "--port", str(cli.free_port())]
        command += ["--root-certificates", str(self.certificates / "ca.crt")]
        command += ["--auth-supernode-private-key", str(self.key(index)), "--node-config", cli.toml(config)]
        log = self.state / f"node-{index}.log"
        self.supernodes[index] = cli.start(command, self.state, self.flwr.env, log, [self._mark.fileno()])

    def wait_until_online(self, count: int, timeout: float = 120) -> None:
        """Wait until this many nodes are online. Raises UserError."""

        def all_online() -> bool:
            ended = [index for index, process in self.supernodes.items() if process.poll() is not None]
            if ended and len(self.supernodes) - len(ended) < count:
                log = self.state / f"node-{ended[0]}.log"
                raise UserError(f"the SuperNode of node {ended[0]} has ended; {cli.last_lines(log)}")
            return self.online() >= count

        print(f"Waiting until {count} SuperNodes are online ...", flush=True)
        late = f"not all {count} SuperNodes are online after {timeout:.0f} s; see {self.state}/node-*.log"
        cli.wait_for(all_online, timeout, 2, late)  # asking takes a second of CPU time, which the nodes need to start

    def online(self) -> int:
        """Return the number of nodes that the SuperLink lists as online; 0 if it does not answer."""
        return sum(node["status"] == "online" for node in self.flwr.ask("supernode", "ls").get("nodes", ()))

    def _check_that_it_is_alone(self) -> None:
        """Raise UserError if another federation uses the state folder.

        The SuperLink and the SuperNodes inherit the open file. So they are found even if their command was killed.
        """
        if users := cli.users_of(Path(self._mark.name)):
            how = f"stop it with `kill {' '.join(str(process.pid) for process in users)}`"
            raise UserError(f"another local federation uses {self.state}; {how}, or choose another folder with --state")

    def _write_flower_configuration(self) -> None:
        """Write the address of this SuperLink, whose port differs at each start, for the `flwr` command."""
        certificate = json.dumps(str(self.certificates / "ca.crt"), ensure_ascii=False)  # also valid in TOML
        lines = ["[superlink]", 'default = "federation"', "[superlink.federation]"]
        lines += [f'address = "{HOST}:{self.port}"', f"root-certificates = {certificate}"]
        (self.flwr.home / "config.toml").write_text("\n".join(lines) + "\n")


def settings_of(data: Path, nodes: int) -> dict[str, object]:
    """Return the settings that `deploy.prepare_partitions` has recorded, or a `dataset` to fill in without a record.

    Raises UserError unless each node has its folder, and each folder its node.
    """
    found, needed = {path.name for path in data.glob("node-*")}, {f"node-{index}" for index in range(nodes)}
    if odd := sorted(found ^ needed):
        raise UserError(
            f"{data} has {len(found)} folders of nodes, and {nodes} nodes need node-0 to node-{nodes - 1} "
            f"(differing: {', '.join(odd[:5])}); change --nodes, or create the folders with deploy.prepare_partitions"
        )
    path = data / cli.PARTITIONS
    if not path.exists():
        return {"dataset": "..."}
    try:
        record = json.loads(path.read_text())
        return {key: record[key] for key in ("dataset", "partitioner", "dirichlet-alpha", "seed")}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} has no valid record; create {data} again with deploy.prepare_partitions") from None


def run_command(home: Path, settings: Mapping[str, object]) -> str:
    """Return the shell command that runs the app in this federation."""
    quoted = re.sub(r'([\\"$`])', r"\\\1", cli.toml({"query-timeout": 30.0} | dict(settings)))
    command = f"FLWR_HOME={shlex.quote(str(home))} flwr run {shlex.quote(str(cli.PROJECT))} --stream"
    return f'{command} --run-config "{quoted}"'


def main() -> None:
    """Start a federation and keep it running until a signal stops it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=3, help="number of SuperNodes (default: %(default)s)")
    parser.add_argument("--state", type=Path, default=Path("federation"), help="folder for keys, logs and outputs")
    parser.add_argument("--data", type=Path, help="folder that deploy.prepare_partitions has written")
    args = parser.parse_args()
    if args.nodes < 1:
        parser.error("--nodes must be at least 1")
    try:
        with Federation(args.state, args.nodes, args.data) as federation:
            print(f"All {args.nodes} SuperNodes are online. To run the app:\n")
            print(f"    {run_command(federation.flwr.home, federation.settings)}\n")
            print(f"Run directories are in {federation.state}/outputs. Ctrl-C stops the federation.", flush=True)
            while True:
                time.sleep(1)
    except KeyboardInterrupt:
        pass
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    cli.interrupt_on_signals()
    main()
