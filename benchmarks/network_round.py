"""Measures a round over a network, in a real federation on this machine.

    python -m benchmarks.network_round --nodes 3 --out network_round.json

One run over TLS gives the seconds of each phase, the lifetime of the process that a SuperNode starts for
each message, the time between two looks of the ServerApp for replies while none come, and the time
from sending a reply to having fetched it.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import re
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.simulation import AppCli, copy_app
from deploy.cli import PROJECT, command_of, family, interrupted_by_signals
from deploy.local_federation import Federation

PHASES = ("train", "query", "evaluate")


def timed_app(folder: Path) -> Path:
    """Copy the app, with a ServerApp that logs when it looks for replies."""
    copy_app(folder)
    shutil.copy(PROJECT / "benchmarks" / "timed_app.py", folder / "pytorch_example_low_level" / "timed.py")
    project = folder / "pyproject.toml"
    project.write_text(project.read_text().replace("low_level.server_app:app", "low_level.timed:app"))
    return folder


def look_figures(log: str, sent: Mapping[int, Sequence[float]]) -> dict[str, float]:
    """Return how often the ServerApp looked for replies, and how soon it had them (seconds).

    `sent` is when each node, by its id, had sent its replies.
    """
    looks = re.findall(r"(LOOK|PICKED) (\w+) (?:\d+ )?([\d.]+)", log)
    # From one look to the next in the same phase, where nothing was picked up in between.
    gaps = [float(b[2]) - float(a[2]) for a, b in itertools.pairwise(looks) if a[:2] == b[:2] and a[0] == "LOOK"]
    delays: dict[str, list[float]] = {phase: [] for phase in PHASES}
    waiting = {node: iter(times) for node, times in sent.items()}
    for phase, node, picked in re.findall(r"PICKED (\w+) (\d+) ([\d.]+)", log):
        delays[phase].append(float(picked) - next(waiting[int(node)]))
    figures = {
        "from one look for replies to the next, s (median)": statistics.median(gaps),
        "from one look for replies to the next, s (99th percentile)": statistics.quantiles(gaps, n=100)[98],
    }
    for phase, values in delays.items():
        figures[f"from sending a reply to having fetched it, {phase.upper()}, s (median)"] = statistics.median(values)
    return figures | {"from sending a reply to having fetched it, s (maximum)": max(itertools.chain(*delays.values()))}


def round_figures(rows: Sequence[Mapping[str, Any]], seen: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Return the seconds of a round and its phases, and how long the processes lived that were seen."""
    figures = {"s per round": statistics.median(row["seconds_total"] for row in rows)}
    figures |= {f"s in {p.upper()}": statistics.median(row[f"seconds_{p}"] for row in rows) for p in PHASES}
    lives = [last - first for first, last in seen]
    return figures | {"life of the process that answers a message, s": statistics.median(lives)}


@contextlib.contextmanager
def watching(federation: Federation) -> Iterator[tuple[dict[int, tuple[float, float]], dict[int, list[float]]]]:
    """Note when the process of each message was first and last seen, and when each node had sent its replies."""
    seen: dict[int, tuple[float, float]] = {}  # by process id
    sent: dict[int, list[float]] = {}  # by node id
    ended = threading.Event()

    def watch() -> None:
        """Look for sent replies twenty times a second, and for processes now and then: that takes longer."""
        for turn in itertools.count():
            if ended.wait(0.05):
                break
            now = time.monotonic()
            for index, process in federation.supernodes.items():
                log = (federation.state / f"node-{index}.log").read_text()
                if found := re.search(r"SuperNode ID: (\d+)", log):
                    times = sent.setdefault(int(found.group(1)), [])
                    times += [now] * (log.count("Sent successfully") - len(times))
                for each in family(process.pid) if turn % 8 == 0 else ():
                    if "flwr-clientapp" in command_of(each):
                        seen[each.pid] = (seen.get(each.pid, (now, now))[0], now)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    yield seen, sent
    ended.set()
    thread.join()


def main() -> None:
    """Parse the command line, measure, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=3, help="SuperNodes to start (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=4, help="rounds of the run (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    settings = {
        "num_server_rounds": args.rounds, "fraction_clients_train": 1.0, "opt_in_probability": 1.0,
        "query_max_delay": 0.0, "query_timeout": 120.0, "use_wandb": False,
    }  # fmt: skip

    with tempfile.TemporaryDirectory() as name, Federation(Path(name) / "federation", args.nodes) as federation:
        flwr, lines = AppCli(federation.flwr.home), []
        with watching(federation) as (seen, sent):
            for line in flwr.log_of(app=timed_app(Path(name) / "app"), **settings):
                lines.append(line)
                if "LOOK" not in line and "PICKED" not in line:
                    print(line, end="", flush=True)
        run = flwr.finished("".join(lines))
        if run.status != "finished:completed":
            raise SystemExit(f"the run ended with {run.status}")
        figures = round_figures(run.results[2:], list(seen.values())) | look_figures(run.log, sent)
    print("\n| figure | |\n| --- | --- |")
    for key, value in figures.items():
        print(f"| {key} | {value:.2f} |")
    if args.out:
        args.out.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    with interrupted_by_signals():  # so that no process is left behind
        main()
