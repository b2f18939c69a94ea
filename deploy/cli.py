"""Flower's command line and its processes, for the tests, the benchmarks and the local federation."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent  # where this environment's `flwr` is
# The signals that ask a program to stop: Ctrl-C, `kill`, a closed terminal (not on Windows).
STOP_SIGNALS = tuple(each for each in signal.Signals if each.name in {"SIGINT", "SIGTERM", "SIGHUP"})
PARTITIONS = "partitions.json"  # the record that deploy.prepare_partitions writes beside the partitions
PATIENCE = 10.0  # seconds between SIGTERM and SIGKILL

_ports: set[int] = set()


@dataclass(frozen=True)
class FinishedRun:
    """A finished run: its log, its final status according to Flower, and its run directory."""

    run_id: str
    log: str
    status: str  # such as "finished:completed"
    directory: Path | None

    @property
    def results(self) -> list[dict[str, Any]]:
        """The rows of results.json."""
        if self.directory is None:
            raise RuntimeError(f"the run has no directory:\n{self.log}")
        rows: list[dict[str, Any]] = json.loads((self.directory / "results.json").read_text())
        return rows


def free_port() -> int:
    """Return a TCP port that is not in use and that no earlier call has returned."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        if port not in _ports:
            _ports.add(port)
            return port


def toml(values: Mapping[str, object]) -> str:
    """Write key-value pairs in the form that `--run-config` and `--node-config` take."""

    def literal(value: object) -> str:
        if isinstance(value, bool):
            return str(value).lower()
        if not isinstance(value, str):
            return str(value)
        if "'" not in value:
            return f"'{value}'"
        if '"' in value:  # Flower's parser does not know escaped quotation marks
            raise ValueError(f"a value with both kinds of quotation marks cannot be passed to Flower: {value}")
        return '"' + value.replace("\\", "\\\\") + '"'

    return " ".join(f"{key}={literal(value)}" for key, value in values.items())


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Hold back stop signals until the block has ended.

    A signal that raises an exception between the start of a process and the assignment of its
    handle would leave that process running.
    """
    if threading.current_thread() is not threading.main_thread():  # no other thread receives signals
        yield
        return
    held: list[int] = []
    handled = [each for each in STOP_SIGNALS if signal.getsignal(each) is not signal.SIG_IGN]
    previous = {each: signal.signal(each, lambda number, _: held.append(number)) for each in handled}
    try:
        yield
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)
    for number in held:
        signal.raise_signal(number)


def start(
    command: Sequence[str], cwd: Path, env: Mapping[str, str], log: Path, keep_open: Collection[int] = ()
) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own, so that `stop` can signal its whole process group.

    The process inherits the file descriptors in `keep_open`.
    """
    with log.open("ab") as file:
        return subprocess.Popen(
            command,
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
            pass_fds=keep_open,
        )


def running() -> dict[int, tuple[int, str]]:
    """Return all running processes: process id -> (parent's process id, command line)."""
    # -ww: without a terminal, ps may cut lines at 80 columns.
    listing = subprocess.run(["ps", "-ww", "-eo", "pid,ppid,stat,args"], capture_output=True, text=True, check=True)
    rows = [line.split(None, 3) for line in listing.stdout.splitlines()[1:]]
    return {int(pid): (int(parent), args) for pid, parent, state, args in rows if state[0] != "Z"}  # Z: has ended


def family(pid: int) -> dict[int, str]:
    """Return the running descendants of a process: process id -> command line."""
    processes = running()
    found = {pid}
    while more := {child for child, (parent, _) in processes.items() if parent in found} - found:
        found |= more
    return {child: args for child, (_, args) in processes.items() if child in found - {pid}}


def stop(*processes: subprocess.Popen[bytes]) -> None:
    """Stop processes and everything they started: SIGTERM to all, then SIGKILL to those still running."""
    started = [pid for process in processes for pid in family(process.pid)]
    for sig in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, sig)
        deadline = time.monotonic() + PATIENCE
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
    for pid in started:  # a descendant that has left the process group survives its parent
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


class FlowerCli:
    """The `flwr` command with a Flower home of its own. The user's Flower configuration stays untouched."""

    def __init__(self, home: Path, env: Mapping[str, str] | None = None) -> None:
        self.home = home.absolute()
        self.home.mkdir(parents=True, exist_ok=True)
        self.env = os.environ | {
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "FLWR_HOME": str(self.home),
            # Run the app in this environment, instead of installing its dependencies for each run.
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_TELEMETRY_ENABLED": "0",
            "PYTHONUNBUFFERED": "1",
        }
        # W&B stores the address of its service in this variable. A run that used the service of a killed
        # run would find its W&B id still in use.
        self.env.pop("WANDB_SERVICE", None)
        self.env |= env or {}

    def __call__(self, *args: str, timeout: float = 600) -> str:
        """Run `flwr` with these arguments and return its output."""
        done = subprocess.run(
            ["flwr", *args],
            cwd=self.home,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
        return done.stdout

    def run(
        self, nodes: int | None = None, cpus: float = 1, app: Path = PROJECT, timeout: float = 600, **run_config: object
    ) -> FinishedRun:
        """Run the app to its end. The argument `some_key` sets `some-key` of the run configuration."""
        return self.finished(self(*self._arguments(nodes, cpus, app, run_config), timeout=timeout))

    def lines(
        self, nodes: int | None = None, cpus: float = 1, app: Path = PROJECT, **run_config: object
    ) -> Iterator[str]:
        """Run the app and yield the lines of its log as they are printed."""
        with subprocess.Popen(
            ["flwr", *self._arguments(nodes, cpus, app, run_config)],
            cwd=self.home,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            try:
                yield from process.stdout or ()
            finally:
                process.terminate()

    def finished(self, log: str) -> FinishedRun:
        """Find the run id and the run directory in the log of a finished run, and ask Flower for its status."""
        log = re.sub(r"\x1b\[\d+m", "", log)
        started = re.search(r"Successfully started run (\d+)", log)
        run_id = started.group(1) if started else ""
        directory = re.search(r"📂 Run directory: (.+)", log)
        return FinishedRun(run_id, log, self.status(run_id), Path(directory.group(1)) if directory else None)

    def status(self, run_id: str) -> str:
        """Return the status of a run, such as "finished:completed"; if Flower does not know it, Flower's answer."""
        answer = self("ls", "--run-id", run_id, "--format", "json")
        with contextlib.suppress(ValueError, KeyError, IndexError):
            return str(json.loads(answer[answer.index("{") :])["runs"][0]["status"])
        return answer

    def _arguments(self, nodes: int | None, cpus: float, app: Path, run_config: Mapping[str, object]) -> list[str]:
        arguments = ["run", str(app), "--stream"]
        if run_config:
            arguments += ["--run-config", toml({key.replace("_", "-"): v for key, v in run_config.items()})]
        if nodes is not None:
            arguments += ["--federation-config", f"num-supernodes={nodes} client-resources-num-cpus={cpus}"]
        return arguments
