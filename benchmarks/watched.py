"""A real run of the app or of the engine's app, with what is seen of it from outside."""

from __future__ import annotations

import contextlib
import math
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.simulation import FinishedRun, LocalSuperLink, command_of, copy_app
from deploy.cli import PROJECT, family

ENGINE_APP = PROJECT / "benchmarks" / "engine_app"
BIG = 12_000  # units of the first linear layer that give a model of 25 MB
PER_UNIT = 512 + 1 + 10  # numbers: its weights, its bias, and those of the last layer


@dataclass
class Watched:
    """A real run, with what was seen of it from outside."""

    run: FinishedRun
    seconds: float
    seconds_to: float  # the first line with a pattern
    server: float  # MiB at most, the process of ServerApp and engine
    worker: float  # MiB at most, the largest ClientApp worker

    def engine_rounds(self) -> list[float]:
        """Return the seconds of each round of the engine's app."""
        return [float(seconds) for seconds in re.findall(r"ENGINE round \d+ ([\d.]+)", self.run.log)]


@contextlib.contextmanager
def repeatedly(look: Callable[[], None], pause: float) -> Iterator[None]:
    """Call a function again and again in a thread, with a pause of some seconds, until the block ends."""
    ended = threading.Event()

    def look_again() -> None:
        while not ended.wait(pause):
            look()

    thread = threading.Thread(target=look_again, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def peak_memory(process: psutil.Process) -> float:
    """Return the most memory that a process has had, with shared pages, in MiB; 0 when it has ended."""
    with contextlib.suppress(OSError):
        found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())
        return int(found.group(1)) / 1024 if found else 0.0
    return 0.0


def own_memory(process: psutil.Process) -> float:
    """Return the memory of a process without shared pages, in MiB; 0 when it has ended."""
    with contextlib.suppress(psutil.Error):
        return float(process.memory_full_info().uss / 2**20)
    return 0.0


def watch(
    superlink: LocalSuperLink,
    pattern: str = "",
    memory: Callable[[psutil.Process], float] = peak_memory,
    **arguments: Any,
) -> Watched:
    """Run an app; note when a line with a pattern comes, and how much memory its processes take at most."""
    peaks = {"flwr-simulation": 0.0, "ray::ClientAppActor": 0.0}
    earlier = set(psutil.pids())  # those of the run before may still be there

    def look() -> None:
        for process in family(superlink.process.pid):
            command = "" if process.pid in earlier else command_of(process)
            for program, peak in peaks.items():
                if program in command:
                    peaks[program] = max(peak, memory(process))

    started, seconds_to, log = time.monotonic(), math.nan, ""
    with repeatedly(look, 0.5):
        for line in superlink.lines(**arguments):
            log += line
            if pattern and math.isnan(seconds_to) and re.search(pattern, line):
                seconds_to = time.monotonic() - started
            if found := re.search(r"Round took .*|ENGINE round .*", line):
                print(f"      {found.group()}", flush=True)
    seconds, run = time.monotonic() - started, superlink.flwr.finished(log)
    if run.status != "finished:completed":
        raise SystemExit(f"a run ended with {run.status}:\n{run.log[-4000:]}")
    return Watched(run, seconds, seconds_to, *peaks.values())


def big_app(folder: Path, units: int = BIG) -> Path:
    """Copy the app with a larger first linear layer; 12,000 units give a model of 25 MB with 6,300,000 parameters."""
    module = copy_app(folder) / "pytorch_example_low_level" / "task.py"
    source = module.read_text()
    wide = source.replace("32 * 4 * 4, 128)", f"32 * 4 * 4, {units})").replace("Linear(128,", f"Linear({units},")
    module.write_text(wide)
    return folder
