"""Flower's command line, and processes that are stopped with everything they started."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

import psutil

PROJECT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent  # where this environment's `flwr` is
# The signals that ask a program to stop: Ctrl-C, `kill`, a closed terminal (not on Windows).
STOP_SIGNALS = tuple(each for each in signal.Signals if each.name in {"SIGINT", "SIGTERM", "SIGHUP"})
PARTITIONS = "partitions.json"  # the record that deploy.prepare_partitions writes beside the partitions
PATIENCE = 10.0  # seconds between SIGTERM and SIGKILL

_ports: set[int] = set()


class FederationError(RuntimeError):
    """An error the user can fix; the message says how."""


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


def toml(values: Mapping[str, object]) -> str:
    """Write key-value pairs in the form that `--run-config` and `--node-config` take."""

    def literal(value: object) -> str:
        if not isinstance(value, str) or ("'" in value and '"' not in value):
            return json.dumps(value, ensure_ascii=False)  # also valid in TOML
        if "'" in value:  # Flower's parser does not know escaped quotation marks
            raise ValueError(f"a value with both kinds of quotation marks cannot be passed to Flower: {value}")
        return f"'{value}'"

    return " ".join(f"{key}={literal(value)}" for key, value in values.items())


# ----------------------------------------------------------------------------------- Signals


@contextlib.contextmanager
def handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle stop signals, except those that are ignored, such as SIGHUP under `nohup`."""
    handled = [each for each in STOP_SIGNALS if signal.getsignal(each) is not signal.SIG_IGN]
    previous = {each: signal.signal(each, handler) for each in handled}
    try:
        yield
    finally:
        for each, before in previous.items():
            if signal.getsignal(each) is handler:
                signal.signal(each, before)


@contextlib.contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """Raise KeyboardInterrupt at the first stop signal; ignore those that follow until the program has ended.

    A second Ctrl-C does not interrupt the cleanup.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        for each in STOP_SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        with contextlib.suppress(OSError):  # the terminal may be closed
            os.write(2, b"\nStopping ...\n")
        raise KeyboardInterrupt

    with handled_by(interrupt):
        yield


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
    with handled_by(lambda number, _: held.append(number)):
        yield
    for number in held:
        signal.raise_signal(number)


# --------------------------------------------------------------------------------- Processes


def start(
    command: Sequence[str], cwd: Path, env: Mapping[str, str], log: Path, keep_open: Collection[int] = ()
) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own, which inherits the file descriptors in `keep_open`."""
    none = subprocess.DEVNULL
    with log.open("ab") as file:
        return subprocess.Popen(
            command, cwd=cwd, env=env, stdin=none, stdout=file, stderr=file, start_new_session=True, pass_fds=keep_open
        )


def stop(*processes: subprocess.Popen[bytes]) -> None:
    """Stop processes and everything they started: SIGTERM to all, then SIGKILL to those still running."""
    everything = [each for process in processes for each in family(process.pid)]
    for each in everything:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.terminate()
    deadline = time.monotonic() + PATIENCE
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
    for each in everything:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    for process in processes:
        with contextlib.suppress(ProcessLookupError):  # those whose parent had ended, or that began meanwhile
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def family(pid: int) -> list[psutil.Process]:
    """Return a process and its descendants; nothing if it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    return []


def command_of(process: psutil.Process) -> str:
    """Return the command line of a process; "" if it has ended."""
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def users_of(file: Path) -> list[psutil.Process]:
    """Return the other processes that have a file open."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # it has ended, or belongs to someone else
            if process.pid != os.getpid() and str(file.resolve()) in {each.path for each in process.open_files()}:
                found.append(process)
    return found


# ----------------------------------------------------------------------------------- Waiting


def free_port() -> int:
    """Return a TCP port that is not in use and that no earlier call has returned."""
    port = 0
    while not port or port in _ports:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
    _ports.add(port)
    return port


def wait_for(condition: Callable[[], bool], seconds: float = 90, pause: float = 0.2, late: str = "too late") -> None:
    """Wait until a condition holds. Raises FederationError, with the message in `late`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise FederationError(late)
        time.sleep(pause)


def wait_for_superlink(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Wait until a SuperLink accepts connections. Raises FederationError."""

    def accepts() -> bool:
        if process.poll() is not None:
            raise FederationError(f"the SuperLink did not start; {last_lines(log)}")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
        return False

    wait_for(accepts, 60, 0.1, f"the SuperLink does not listen; see {log}")


def last_lines(log: Path, count: int = 5) -> str:
    """Return the last lines of a log, for an error."""
    return f"the last lines of {log}:\n" + "\n".join(log.read_text(errors="replace").splitlines()[-count:])
