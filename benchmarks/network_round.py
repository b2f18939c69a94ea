"""What a round costs over a network, and where its time goes: a real federation on this machine.

    python -m benchmarks.network_round --nodes 3 --out network_round.json

Measured in one run over TLS: the phases; how long the process lives that a SuperNode starts for
each message; how soon the ServerApp looks again for replies while none come; and how long a
look lasts that fetches one. The last is Flower's own time: it finds a reply as soon as its
upload begins, and asks for parts that are not there yet again after a second.
"""

from __future__ import annotations

import argparse
import itertools
import re
import statistics
import tempfile
import threading
import time
from pathlib import Path

from benchmarks.simulation import copy_app, report
from deploy.cli import family
from deploy.local_federation import Federation

PHASES = ("train", "query", "evaluate")
LOOKS = """

_pull = Mailbox._pull


def _timed_pull(self, wanted, batch):
    started = time.monotonic()
    replies = _pull(self, wanted, batch)
    log(INFO, "LOOK %s %.4f %.4f %d", batch.message_type, started, time.monotonic(), len(replies))
    return replies


Mailbox._pull = _timed_pull
"""


def timed_app(folder: Path) -> Path:
    """Copy the app; let it log when it looks for replies."""
    with (copy_app(folder) / "pytorch_example_low_level" / "server_app.py").open("a") as file:
        file.write(LOOKS)
    return folder


def look_figures(log: str) -> dict[str, float]:
    """Return how often the ServerApp looked for replies, and how long looks took (seconds)."""
    looks = [
        (kind, float(started), float(ended), int(found))
        for kind, started, ended, found in re.findall(r"LOOK (\w+) ([\d.]+) ([\d.]+) (\d+)", log)
    ]
    # From the start of a look that found nothing to the start of the next one in the same phase.
    gaps = [b[1] - a[1] for a, b in itertools.pairwise(looks) if a[0] == b[0] and not a[3]]
    figures = {
        "from one look for replies to the next, s (median)": statistics.median(gaps),
        "from one look for replies to the next, s (99th percentile)": statistics.quantiles(gaps, n=100)[98],
    }
    for phase in PHASES:
        fetched = [ended - started for kind, started, ended, found in looks if found and kind == phase]
        figures[f"a look that fetches a reply, {phase.upper()}, s (median)"] = statistics.median(fetched)
    return figures


class ProcessWatch(threading.Thread):
    """Notes how long the processes live that the SuperNodes start for their messages."""

    def __init__(self, supernodes: list[int]) -> None:
        super().__init__(daemon=True)
        self._supernodes, self._ended = supernodes, threading.Event()
        self._seen: dict[int, tuple[float, float]] = {}

    def run(self) -> None:
        """Look every tenth of a second."""
        while not self._ended.wait(0.1):
            now = time.monotonic()
            for supernode in self._supernodes:
                for pid, command in family(supernode).items():
                    if "flwr-clientapp" in command:
                        self._seen[pid] = (self._seen.get(pid, (now, now))[0], now)

    def lifetimes(self) -> list[float]:
        """End the watch; return the seconds that each process lived."""
        self._ended.set()
        self.join()
        return [last - first for first, last in self._seen.values()]


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
        watch = ProcessWatch([process.pid for process in federation.supernodes.values()])
        watch.start()
        lines = []
        for line in federation.lines(app=timed_app(Path(name) / "app"), **settings):
            lines.append(line)
            if "LOOK" not in line:
                print(line, end="", flush=True)
        lifetimes = watch.lifetimes()
        run = federation.flwr.finished("".join(lines))
        if run.status != "finished:completed":
            raise SystemExit(f"the run ended with {run.status}")
        rows, looks = run.results[2:], look_figures(run.log)

    figures = {f"s in {p.upper()}": statistics.median(row[f"seconds_{p}"] for row in rows) for p in PHASES}
    figures = {"s a round": statistics.median(row["seconds_total"] for row in rows)} | figures
    figures["life of the process that answers a message, s"] = statistics.median(lifetimes)
    figures |= looks
    print()
    report(figures, args.out)


if __name__ == "__main__":
    main()
