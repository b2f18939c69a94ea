"""A real federation on one machine: SuperLink and SuperNodes over TLS, with authentication.

    python -m deploy.local_federation --nodes 3

creates certificates and keys, starts a SuperLink and three SuperNodes, registers the nodes' keys,
waits until all nodes are online, and prints the `flwr run` command for this federation. Ctrl-C,
SIGTERM and SIGHUP stop everything. Keys, logs and the database are in the `--state` folder
(default: ./federation) and are used again at the next start. Your own Flower configuration is not
changed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from deploy import cli
from deploy.cli import FederationError, signals_held
from deploy.keys import HOST, keep_out_of_git, make_certificates, make_node_key


class Federation:
    """A SuperLink and its SuperNodes on this machine, as a context manager that starts and stops them."""

    def __init__(self, state: Path, nodes: int, data: Path | None = None) -> None:
        self.state = state.absolute()
        self.num_nodes = nodes
        self.data = data.absolute() if data else None
        if missing := [name for name in map("node-{}".format, range(nodes)) if data and not (data / name).is_dir()]:
            raise FederationError(
                f"{self.data} has no folder {missing[0]}, but each of the {nodes} nodes needs its own; "
                "start fewer nodes, or create the folders with deploy.prepare_partitions"
            )
        self.port = cli.free_port()
        self.flwr = cli.FlowerCli(self.state / "flower")
        self.certificates = self.state / "certificates"
        self.superlink: subprocess.Popen[bytes] | None = None
        self.supernodes: dict[int, subprocess.Popen[bytes]] = {}
        self._lock: int | None = None  # a file descriptor

    def __enter__(self) -> Federation:
        """Start everything and wait until all nodes are online. Raises FederationError."""
        # The folder may be one that has a .gitignore already, so the folders of the keys get their own.
        for folder in (self.state, self.certificates, self.key(0).parent):
            keep_out_of_git(folder)
        try:
            self._acquire_lock()
            with signals_held():  # an interrupted start would leave half of the files
                make_certificates(self.certificates)
                for index in range(self.num_nodes):
                    make_node_key(self.key(index))
            self._write_flower_configuration()
            self.start_superlink()
            self._register_keys()
            self._wait_for_earlier_nodes()
            for index in range(self.num_nodes):
                self.start_supernode(index)
            self.wait_until_online(self.num_nodes, timeout=120 + 10 * self.num_nodes)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *args: object) -> None:
        """Stop all processes."""
        with signals_held():
            cli.stop(*self.supernodes.values())  # first: they sign off from the SuperLink
            cli.stop(*([self.superlink] if self.superlink else ()))
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    def key(self, index: int) -> Path:
        """Return the path of a node's private key."""
        return self.state / "keys" / f"node-{index}"

    def start_superlink(self) -> None:
        """Start the SuperLink and wait until it answers. Raises FederationError."""
        command = ["flower-superlink", "--host", HOST, "--port", str(self.port), "--enable-supernode-auth"]
        command += ["--database", str(self.state / "superlink.db")]
        for option, name in (("ca-certfile", "ca.crt"), ("certfile", "server.crt"), ("keyfile", "server.key")):
            command += [f"--ssl-{option}", str(self.certificates / name)]
        log = self.state / "superlink.log"
        with signals_held():
            self.superlink = self._start(command, log)
        cli.wait_for_superlink(self.superlink, self.port, log)

    def start_supernode(self, index: int) -> None:
        """Start a SuperNode, which uses its folder of `data` if there is one, or else its partition."""
        config: dict[str, object] = {"partition-id": index, "num-partitions": self.num_nodes}
        if self.data is not None:
            config["data-path"] = str(self.data / f"node-{index}")
        command = ["flower-supernode", "--superlink", f"{HOST}:{self.port}", "--port", str(cli.free_port())]
        command += ["--root-certificates", str(self.certificates / "ca.crt")]
        command += ["--auth-supernode-private-key", str(self.key(index)), "--node-config", cli.toml(config)]
        with signals_held():
            self.supernodes[index] = self._start(command, self.state / f"node-{index}.log")

    def wait_until_online(self, count: int, timeout: float = 120) -> None:
        """Wait until this many nodes are online. Raises FederationError."""

        def all_online() -> bool:
            ended = [index for index, process in self.supernodes.items() if process.poll() is not None]
            if ended and len(self.supernodes) - len(ended) < count:
                log = self.state / f"node-{ended[0]}.log"
                raise FederationError(f"the SuperNode of node {ended[0]} has ended; {cli.last_lines(log)}")
            return self.online() >= count

        print(f"Waiting until {count} SuperNodes are online ...", flush=True)
        late = f"not all {count} SuperNodes are online after {timeout:.0f} s; see {self.state}/node-*.log"
        cli.wait_for(all_online, timeout, 2, late)  # asking takes a second of CPU time, which the nodes need to start

    def online(self) -> int:
        """Return the number of nodes that the SuperLink lists as online; 0 if it does not answer."""
        answer = self.flwr("supernode", "ls", "--format", "json")
        with contextlib.suppress(ValueError):
            nodes = json.loads(answer[answer.index("{") :]).get("nodes", ())
            return sum(node["status"] == "online" for node in nodes)
        return 0

    def _start(self, command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        """Start a process that inherits the lock."""
        return cli.start(command, self.state, self.flwr.env, log, [] if self._lock is None else [self._lock])

    def _acquire_lock(self) -> None:
        """Lock the state folder. Raises FederationError if another federation uses it.

        The SuperLink and the SuperNodes inherit the lock. So it is held until they have ended,
        even if this process is killed first.
        """
        import fcntl  # not on Windows, where the functions above work nevertheless

        path = self.state / "lock"
        self._lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            parents = {process.pid: process.ppid() for process in cli.users_of(path)}
            ids = [str(pid) for pid, parent in parents.items() if parent not in parents]  # they stop the others
            raise FederationError(
                f"another local federation uses {self.state}; stop it with `kill {' '.join(ids)}`, "
                "or choose another folder with --state"
            ) from None

    def _register_keys(self) -> None:
        """Register the nodes' keys, of which the database may have those of an earlier start."""
        for index in range(self.num_nodes):
            answer = self.flwr("supernode", "register", f"{self.key(index)}.pub")
            if "registered successfully" not in answer and "already in use" not in answer:
                raise FederationError(f"node {index} could not be registered:\n{answer}")

    def _wait_for_earlier_nodes(self) -> None:
        """Wait until nodes that were killed in an earlier federation are offline, if there are any.

        Until then the SuperLink refuses a new SuperNode with the key of a killed one.
        """
        if self.online():
            print("Waiting until the SuperNodes of an earlier start are offline (about a minute) ...", flush=True)
            cli.wait_for(lambda: not self.online(), 120, 8, "SuperNodes of an earlier start are still online")

    def _write_flower_configuration(self) -> None:
        """Write the address of this SuperLink, whose port differs at each start, for the `flwr` command."""
        certificate = json.dumps(str(self.certificates / "ca.crt"), ensure_ascii=False)  # also valid in TOML
        lines = ["[superlink]", 'default = "federation"', "[superlink.federation]"]
        lines += [f'address = "{HOST}:{self.port}"', f"root-certificates = {certificate}"]
        (self.flwr.home / "config.toml").write_text("\n".join(lines) + "\n")


# ------------------------------------------------------------------------------ Command line


def dataset_of(data: Path) -> str | None:
    """Return the data set that `deploy.prepare_partitions` has recorded, or None without a record."""
    path = data / cli.PARTITIONS
    if not path.exists():
        return None
    try:
        return str(json.loads(path.read_text())["dataset"])
    except (ValueError, KeyError, TypeError):
        said = f"{path} has no valid record; create {data} again with deploy.prepare_partitions"
        raise FederationError(said) from None


def run_command(home: Path, dataset: str | None) -> str:
    """Return the shell command that runs the app in this federation."""
    config = {"query-timeout": 30.0} | ({} if dataset is None else {"dataset": dataset})
    quoted = re.sub(r'([\\"$`])', r"\\\1", cli.toml(config))
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
    with cli.interrupted_by_signals():
        try:
            dataset = None if args.data is None else dataset_of(args.data)
            with Federation(args.state, args.nodes, args.data) as federation:
                print(f"All {args.nodes} SuperNodes are online. To run the app:\n")
                print(f"    {run_command(federation.flwr.home, dataset)}\n")
                if args.data is not None and dataset is None:
                    print(
                        f"The command names no data set of the server, because {args.data} has no {cli.PARTITIONS}.\n"
                        "Add dataset='...' to --run-config unless the nodes' images are from the app's default one.\n"
                    )
                print(f"Run directories are in {federation.state}/outputs. Ctrl-C stops the federation.", flush=True)
                while True:
                    time.sleep(1)
        except KeyboardInterrupt:
            pass
        except (FederationError, OSError) as error:
            sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
