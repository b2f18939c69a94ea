"""Measures a round over a network, in a real federation on this machine.

    python -m benchmarks.network_round --nodes 3

One run over TLS gives the seconds of each phase, the lifetime of the process that a SuperNode starts for
each message, the time between two looks of the ServerApp for replies while none come, and the time
from sending a reply to having fetched it.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from benchmarks.simulation import AppCli, command_of, copy_app
from benchmarks.watched import repeatedly
from deploy.cli import PROJECT, family, interrupt_on_signals
from deploy.local_federation import Federation

PHASES = ("train", "query", "evaluate")
Seen = dict[int, tuple[float, float]]  # by process id: when the process of a message was first and last there
Sent = dict[int, list[float]]  # by node id: when it had sent each reply
SETTINGS: dict[str, Any] = {
    "num_server_rounds": 4, "fraction_clients_train": 1.0, "opt_in_probability": 1.0, "query_max_delay": 0.0,
    "query_timeout": 120.0, "use_wandb": False,
}  # fmt: skip


def timed_app(folder: Path) -> Path:
    """Copy the app, with a ServerApp that logs when it looks for replies."""
    copy_app(folder)
    shutil.copy(PROJECT / "benchmarks" / "timed_app.py", folder / "pytorch_example_low_level" / "timed.py")
    project = folder / "pyproject.toml"
    project.write_text(project.read_text().replace("low_level.server_app:app", "low_level.timed:app"))
    return folder


def figures_of(rows: list[dict[str, Any]], log: str, seen: Seen, sent: Sent) -> dict[str, float]:
    """Return the figures of the table from the rounds and the log of a run, and what was seen beside it."""
    looks = re.findall(r"(LOOK|PICKED) (\w+) (?:\d+ )?([\d.]+)", log)
    # From one look to the next in the same phase, where nothing was picked up in between.
    gaps = [float(b[2]) - float(a[2]) for a, b in itertools.pairwise(looks) if a[:2] == b[:2] and a[0] == "LOOK"]
    delays: dict[str, list[float]] = {phase: [] for phase in PHASES}
    waiting = {node: iter(times) for node, times in sent.items()}
    for phase, node, picked in re.findall(r"PICKED (\w+) (\d+) ([\d.]+)", log):
        delays[phase].append(float(picked) - next(waiting[int(node)]))
    fetched = "from sending a reply to having fetched it"
    return {
        "s per round": median(row["seconds_total"] for row in rows),
        **{f"s in {phase.upper()}": median(row[f"seconds_{phase}"] for row in rows) for phase in PHASES},
        "life of the process that answers a message, s": median(last - first for first, last in seen.values()),
        "from one look for replies to the next, s (median)": median(gaps),
        "from one look for replies to the next, s (99th percentile)": quantiles(gaps, n=100)[98],
        **{f"{fetched}, {phase.upper()}, s (median)": median(values) for phase, values in delays.items()},
        f"{fetched}, s (maximum)": max(itertools.chain(*delays.values())),
    }


@contextlib.contextmanager
def watching(federation: Federation) -> Iterator[tuple[Seen, Sent]]:
    """Note when the process of each message was first and last seen, and when each node had sent its replies."""
    seen: Seen = {}
    sent: Sent = {}

    def look_for_processes() -> None:
        now = time.monotonic()
        for supernode in federation.supernodes.values():
            for process in family(supernode.pid):
                if "flwr-clientapp" in command_of(process):
                    seen[process.pid] = (seen.get(process.pid, (now, now))[0], now)

    def look_for_replies() -> None:
        now = time.monotonic()
        for index in federation.supernodes:
            log = (federation.state / f"node-{index}.log").read_text()
            if found := re.search(r"SuperNode ID: (\d+)", log):
                times = sent.setdefault(int(found.group(1)), [])
                times += [now] * (log.count("Sent successfully") - len(times))

    with repeatedly(look_for_processes, 0.4), repeatedly(look_for_replies, 0.05):
        yield seen, sent


def main() -> None:
    """Parse the command line, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=3, help="SuperNodes to start (default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, Federation(Path(name) / "federation", args.nodes) as federation:
        flwr, log = AppCli(federation.flwr.home), ""
        with watching(federation) as (seen, sent):
            for line in flwr.log_of(app=timed_app(Path(name) / "app"), **SETTINGS):
                log += line
                if "LOOK" not in line and "PICKED" not in line:
                    print(line, end="", flush=True)
        run = flwr.finished(log)
        if run.status != "finished:completed":
            raise SystemExit(f"the run ended with {run.status}")
        figures = figures_of(run.results[2:], run.log, seen, sent)
    print("\n| figure | |\n| --- | --- |")
    for key, value in figures.items():
        print(f"| {key} | {value:.2f} |")


if __name__ == "__main__":
    interrupt_on_signals()  # so that no process is left behind
    main()
