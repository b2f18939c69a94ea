"""Flower's command line, as tests, benchmarks and the local federation use it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent  # where this environment's `flwr` is


@dataclass(frozen=True)
class FinishedRun:
    """What a run printed, how Flower says that it ended, and where its files are."""

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
    """Return a TCP port on which nobody listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def toml(values: Mapping[str, object]) -> str:
    """Write key-value pairs as `flwr run --run-config` takes them."""

    def literal(value: object) -> str:
        if isinstance(value, bool):
            return str(value).lower()
        return f"'{value}'" if isinstance(value, str) else str(value)

    return " ".join(f"{key}={literal(value)}" for key, value in values.items())


def start(command: Sequence[str], cwd: Path, env: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own, so that all it starts can be ended with it."""
    with log.open("ab") as file:
        return subprocess.Popen(
            command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
        )


def family(pid: int) -> dict[int, str]:
    """Return the living descendants of a process: process id -> command line."""
    # -ww: without a terminal, ps may cut lines at 80 columns.
    listing = subprocess.run(["ps", "-ww", "-eo", "pid,ppid,stat,args"], capture_output=True, text=True, check=True)
    rows = [line.split(None, 3) for line in listing.stdout.splitlines()[1:]]
    found = {pid}
    while more := {int(p) for p, parent, *_ in rows if int(parent) in found} - found:
        found |= more
    return {int(p): args for p, _, state, args in rows if int(p) in found - {pid} and state[0] != "Z"}


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started: first kindly, then not."""
    started = family(process.pid)
    for sig in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sig)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
    for pid in started:  # some have left the session, and live on without their parent
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


class FlowerCli:
    """The `flwr` command with a Flower home of its own: nothing of the user's is touched."""

    def __init__(self, home: Path, env: Mapping[str, str] | None = None) -> None:
        self.home = home.absolute()
        self.home.mkdir(parents=True, exist_ok=True)
        self.env = os.environ | {
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "FLWR_HOME": str(self.home),
            # The app runs in this environment; it is not installed anew for each run.
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_TELEMETRY_ENABLED": "0",
            "PYTHONUNBUFFERED": "1",
        }
        self.env |= env or {}

    def __call__(self, *args: str, timeout: float = 600) -> str:
        """Run `flwr` with these arguments; return what it printed."""
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
        """Run the app to its end. `some_key=…` is `some-key` of the run configuration."""
        return self.finished(self(*self._arguments(nodes, cpus, app, run_config), timeout=timeout))

    def lines(
        self, nodes: int | None = None, cpus: float = 1, app: Path = PROJECT, **run_config: object
    ) -> Iterator[str]:
        """Run the app and yield the lines of its log as they come."""
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
        """Make sense of the log of a run that has ended."""
        log = re.sub(r"\x1b\[\d+m", "", log)
        started = re.search(r"Successfully started run (\d+)", log)
        run_id = started.group(1) if started else ""
        directory = re.search(r"📂 (?:Run directory|Resuming after round -?\d+): (.+)", log)
        return FinishedRun(run_id, log, self.status(run_id), Path(directory.group(1)) if directory else None)

    def status(self, run_id: str) -> str:
        """Ask Flower how a run stands."""
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
