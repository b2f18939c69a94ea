"""Measures two runs on photos, the second from the cache: their times, and the memory of their processes.

    python -m benchmarks.photos --images 20000 --nodes 10

The photos are made: JPEGs of 320x240 in class folders, each with a bright patch whose place tells its class.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from benchmarks.simulation import LocalSuperLink

CLASSES = 10
EVERY = 0.5  # seconds between two looks at the memory


def make_photos(folder: Path, count: int) -> None:
    """Write `count` photos, a tenth of them to test."""
    generator = np.random.default_rng(0)
    grounds = [generator.integers(0, 160, (240, 320, 3), dtype=np.uint8) for _ in range(20)]
    for number in range(count):
        label = number % CLASSES
        pixels = grounds[number // CLASSES % len(grounds)].copy()
        pixels[20 + 20 * label : 40 + 20 * label, 130 + number % 40 : 170 + number % 40] = 255
        path = folder / ("test" if number % 100 < 10 else "train") / f"class {label}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, quality=85)


class Memory(threading.Thread):
    """Looks at the processes of a run: the most memory of a server and of a worker, in MiB, without shared pages."""

    def __init__(self, parent: int) -> None:
        super().__init__(daemon=True)
        self.parent, self.peaks, self.going_on = psutil.Process(parent), {"server": 0.0, "worker": 0.0}, True

    def run(self) -> None:
        """Look until `going_on` is false."""
        while self.going_on:
            for process in self.parent.children(recursive=True):
                try:
                    name, memory = " ".join(process.cmdline()), process.memory_full_info()
                except psutil.Error:
                    continue  # it has ended
                kind = "worker" if "ClientAppActor" in name else "server" if "flwr-simulation" in name else ""
                if kind:
                    self.peaks[kind] = max(self.peaks[kind], memory.uss / 2**20)
            time.sleep(EVERY)


def main() -> None:
    """Parse the command line, make the photos, run twice, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000, help="number of photos (default: %(default)s)")
    parser.add_argument("--nodes", type=int, default=10, help="simulated nodes (default: %(default)s)")
    parser.add_argument("--size", type=int, default=128, help="image-size (default: %(default)s)")
    args = parser.parse_args()
    print("| | to round 0, s | whole run, s | server, MiB | worker, MiB |\n| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made, "photos")
        make_photos(folder, args.images)
        with LocalSuperLink(Path(made, "home"), {"HF_HOME": str(Path(made, "cache"))}) as superlink:
            memory = Memory(superlink.process.pid)
            memory.start()
            for name in ("first run", "second run"):
                memory.peaks = {"server": 0.0, "worker": 0.0}
                began, ready = time.monotonic(), None
                settings = {
                    "dataset": str(folder),
                    "image_size": args.size,
                    "partitioner": "iid",
                    "num_server_rounds": 1,
                }
                for line in superlink.lines(nodes=args.nodes, use_wandb=False, **settings):
                    print(re.sub(r"\x1b\[\d+m", "", line).rstrip(), flush=True)
                    if ready is None and "Centrally evaluated" in line:
                        ready = time.monotonic() - began
                peaks = memory.peaks
                whole = time.monotonic() - began
                print(
                    f"| {name} | {ready:.1f} | {whole:.1f} | {peaks['server']:.0f} | {peaks['worker']:.0f} |",
                    flush=True,
                )
            memory.going_on = False


if __name__ == "__main__":
    main()
