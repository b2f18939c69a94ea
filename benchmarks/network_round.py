"""What a round costs over a network, and where its time goes: a real federation on this machine.

    python -m benchmarks.network_round --nodes 3 --out network_round.json

Three figures are measured in one run over TLS. How soon is a reply picked up that lies at the
SuperLink? The ServerApp looks again and again; a reply that one look did not find and the next
one fetched can have been there no longer than from the start of the one to the end of the other.
How long does the process live that a SuperNode starts for each message? And how long does a
message lie there until its node asks for one? That is the rest.
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


def pick_up_bounds(log: str) -> list[float]:
    """Return, for each look that fetched something, the longest that it can have lain there (seconds)."""
    looks = [
        (kind, float(started), float(ended), int(found))
        for kind, started, ended, found in re.findall(r"LOOK (\w+) ([\d.]+) ([\d.]+) (\d+)", log)
    ]
    return [
        now[2] - before[1]
        for before, now in itertools.pairwise(looks)
        if now[3] and now[0] == before[0]  # in the same phase
    ]


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
        rows, bounds = run.results[2:], pick_up_bounds(run.log)

    figures = {f"s in {p.upper()}": statistics.median(row[f"seconds_{p}"] for row in rows) for p in PHASES}
    figures = {"s a round": statistics.median(row["seconds_total"] for row in rows)} | figures
    figures["life of the process that answers a message, s"] = statistics.median(lifetimes)
    figures["a reply lies at the SuperLink, s, at most (median of all)"] = statistics.median(bounds)
    figures["a reply lies at the SuperLink, s, at most (worst of all)"] = max(bounds)
    print()
    report(figures, args.out)


if __name__ == "__main__":
    main()
