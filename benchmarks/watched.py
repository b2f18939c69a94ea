"""A real run of the app or of the engine's app, with what is seen of it from outside."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.simulation import FinishedRun, LocalSuperLink, copy_app
from deploy.cli import PROJECT, command_of

ENGINE_APP = PROJECT / "benchmarks" / "engine_app"
BIG = 12_000  # units of the first linear layer that give a model of 25 MB


@dataclass
class Watched:
    """A real run, with what was seen of it from outside."""

    run: FinishedRun
    seconds_to: dict[str, float] = field(default_factory=dict)  # the first line with a pattern
    server_peak: int = 0  # KiB, the process of ServerApp and engine
    worker_peak: int = 0  # KiB, the largest ClientApp worker

    def engine(self, kind: str) -> list[float]:
        """Return the seconds of an exchange of the engine's app, or of its "round", in each round."""
        return [float(seconds) for seconds in re.findall(rf"ENGINE {kind} \d+ ([\d.]+)", self.run.log)]


def watch(superlink: LocalSuperLink, pattern: str = "", **arguments: Any) -> Watched:
    """Run an app; note when a line with a pattern comes, and how much memory its processes take at most."""
    watched, ended = Watched(FinishedRun("", "", "", None)), threading.Event()

    earlier = set(psutil.pids())  # those of the run before may still be there

    def memory() -> None:
        while not ended.wait(1):
            for process in psutil.process_iter():
                name = "" if process.pid in earlier else command_of(process)
                if "flwr-simulation" in name and str(superlink.port) in name:
                    watched.server_peak = max(watched.server_peak, peak_kib(process.pid))
                elif name.startswith("ray::ClientAppActor"):
                    watched.worker_peak = max(watched.worker_peak, peak_kib(process.pid))

    thread = threading.Thread(target=memory)
    thread.start()
    started, lines = time.monotonic(), []
    try:
        for line in superlink.lines(**arguments):
            lines.append(line)
            if pattern and pattern not in watched.seconds_to and re.search(pattern, line):
                watched.seconds_to[pattern] = time.monotonic() - started
            if found := re.search(r"Round took .*|ENGINE round .*", line):
                print(f"      {found.group()}", flush=True)
    finally:
        ended.set()
        thread.join()
    watched.run = superlink.flwr.finished("".join(lines))
    if watched.run.status != "finished:completed":
        raise SystemExit(f"a run ended with {watched.run.status}:\n{watched.run.log[-4000:]}")
    return watched


def peak_kib(pid: int) -> int:
    """Return the most memory that a process has had; 0 when it has ended."""
    with contextlib.suppress(OSError):
        found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
        return int(found.group(1)) if found else 0
    return 0


def big_app(folder: Path, units: int = BIG) -> Path:
    """Copy the app with a larger first linear layer; 12,000 units give a model of 25 MB with 6,300,000 parameters."""
    copy_app(folder)
    module = folder / "pytorch_example_low_level" / "task.py"
    source = module.read_text()
    wide = source.replace("32 * 4 * 4, 128)", f"32 * 4 * 4, {units})").replace("Linear(128,", f"Linear({units},")
    module.write_text(wide)
    return folder
