"""Flower's command line, and processes that are stopped with everything they started."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from deploy.keys import HOST
from pytorch_example_low_level.config import UserError

PROJECT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent  # where this environment's `flwr` is
# The signals that ask a program to stop: Ctrl-C, `kill`, a closed terminal (not on Windows).
STOP_SIGNALS = tuple(each for each in signal.Signals if each.name in {"SIGINT", "SIGTERM", "SIGHUP"})
PARTITIONS = "partitions.json"  # the record that deploy.prepare_partitions writes beside the partitions
PATIENCE = 10.0  # seconds between SIGTERM and SIGKILL

_ports: set[int] = set()
_received: list[int] = []  # stop signals


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
        self.env.pop("WANDB_SERVICE", None)  # W&B's service of a killed run, which would still use the run's id
        self.env |= env or {}

    def __call__(self, *args: str) -> str:
        """Run `flwr` with these arguments and return its output."""
        return "".join(self.lines(*args))

    def lines(self, *args: str) -> Iterator[str]:
        """Run `flwr` with these arguments and yield the lines of its output as they are printed."""
        out, err = subprocess.PIPE, subprocess.STDOUT
        command = ["flwr", *args]
        with subprocess.Popen(command, cwd=self.home, env=self.env, stdout=out, stderr=err, text=True) as process:
            try:
                yield from process.stdout or ()
            finally:
                process.terminate()

    def ask(self, *args: str) -> dict[str, Any]:
        """Run `flwr` with these arguments and return its answer in JSON; {} if there is none."""
        answer = self(*args, "--format", "json")
        with contextlib.suppress(ValueError):
            return dict(json.loads(answer[answer.index("{") :]))
        return {}


def toml(values: Mapping[str, object]) -> str:
    """Write key-value pairs in the form that `--run-config` and `--node-config` take."""

    def literal(value: object) -> str:
        if not isinstance(value, str) or ("'" in value and '"' not in value):
            return json.dumps(value, ensure_ascii=False)  # also valid in TOML
        if "'" in value:  # Flower's parser does not know escaped quotation marks
            raise UserError(f"a value with both kinds of quotation marks cannot be passed to Flower: {value}")
        return f"'{value}'"

    return " ".join(f"{key}={literal(value)}" for key, value in values.items())


def interrupt_on_signals() -> None:
    """From now on, raise KeyboardInterrupt at the first stop signal, and ignore those that follow.

    So a second Ctrl-C does not interrupt the cleanup. Signals that are ignored, such as SIGHUP under `nohup`, stay so.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        _received.append(number)
        for each in STOP_SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        with contextlib.suppress(OSError):  # the terminal may be closed
            os.write(2, b"\nStopping ...\n")
        raise KeyboardInterrupt

    for each in STOP_SIGNALS:
        if signal.getsignal(each) is not signal.SIG_IGN:
            signal.signal(each, interrupt)


def raise_if_interrupted() -> None:
    """Raise KeyboardInterrupt after a stop signal, for work with a library that catches every exception."""
    if _received:
        raise KeyboardInterrupt


def start(
    command: Sequence[str], cwd: Path, env: Mapping[str, str], log: Path, keep_open: Collection[int] = ()
) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own, which inherits the file descriptors in `keep_open`."""
    with log.open("ab") as out, Path(os.devnull).open() as none:
        return subprocess.Popen(
            command, cwd=cwd, env=env, stdin=none, stdout=out, stderr=out, start_new_session=True, pass_fds=keep_open
        )


def stop(*processes: subprocess.Popen[bytes] | psutil.Process) -> None:
    """Stop processes and everything they started: SIGTERM to all, then SIGKILL to those still running."""
    everything = [each for process in processes for each in family(process.pid)]
    for each in everything:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.terminate()
    for each in psutil.wait_procs(everything, PATIENCE)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    for process in processes:
        with contextlib.suppress(ProcessLookupError):  # those whose parent had ended, or that began meanwhile
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@atexit.register
def stop_what_is_left() -> None:
    """Stop what `start` has started and nobody has stopped: an error or a signal may come before anyone can."""
    stop(*(child for child in psutil.Process().children() if os.getsid(child.pid) == child.pid))


def family(pid: int) -> list[psutil.Process]:
    """Return a process and its descendants; nothing if it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    return []


def users_of(file: Path) -> list[psutil.Process]:
    """Return the other processes that have a file open."""
    others = (each for each in psutil.process_iter(["open_files"]) if each.pid != os.getpid())
    return [each for each in others if str(file.resolve()) in {opened.path for opened in each.info["open_files"] or ()}]


def free_port() -> int:
    """Return a TCP port that is not in use and that no earlier call has returned."""
    port = 0
    while not port or port in _ports:
        with socket.socket() as probe:
            probe.bind((HOST, 0))
            port = int(probe.getsockname()[1])
    _ports.add(port)
    return port


def wait_for(condition: Callable[[], bool], seconds: float = 90, pause: float = 0.2, late: str = "too late") -> None:
    """Wait until a condition holds. Raises UserError, with the message in `late`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise UserError(late)
        time.sleep(pause)


def start_superlink(
    options: Sequence[str], port: int, folder: Path, env: Mapping[str, str], keep_open: Collection[int] = ()
) -> subprocess.Popen[bytes]:
    """Start a SuperLink in a folder, and wait until it accepts connections. Raises UserError."""
    log = folder / "superlink.log"
    process = start(["flower-superlink", "--host", HOST, "--port", str(port), *options], folder, env, log, keep_open)

    def accepts() -> bool:
        if process.poll() is not None:
            raise UserError(f"the SuperLink did not start; {last_lines(log)}")
        with socket.socket() as probe:
            return probe.connect_ex((HOST, port)) == 0

    wait_for(accepts, 60, 0.1, f"the SuperLink does not listen; see {log}")
    return process


def last_lines(log: Path, count: int = 5) -> str:
    """Return the last lines of a log, for an error."""
    return f"the last lines of {log}:\n" + "\n".join(log.read_text(errors="replace").splitlines()[-count:])
