"""A private local SuperLink: real simulations that do not touch the user's Flower configuration.

`flwr run` starts a SuperLink on fixed ports, with the user's Flower home, and leaves it running.
Benchmarks and tests need a SuperLink of their own that stops when they end.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from deploy.cli import PROJECT, FlowerCli, free_port, signals_held, start, stop


class LocalSuperLink:
    """Flower's local SuperLink, in simulation mode, on free ports and with its own Flower home."""

    def __init__(self, home: Path, env: Mapping[str, str] | None = None) -> None:
        self.port = str(free_port())
        ports = {"FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": self.port, "FLWR_LOCAL_CONTROL_API_PORT": str(free_port())}
        self.flwr = FlowerCli(home, ports | dict(env or {}))
        self.run, self.lines = self.flwr.run, self.flwr.lines
        self.process: subprocess.Popen[bytes]

    def __enter__(self) -> LocalSuperLink:
        """Start the SuperLink and wait until it answers."""
        home, log = self.flwr.home, self.flwr.home / "superlink.log"
        command = ["flower-superlink", "--insecure", "--simulation", "--host", "127.0.0.1", "--port", self.port]
        with signals_held():
            self.process = start(command, home, self.flwr.env, log)
        deadline = time.monotonic() + 60
        try:
            while True:
                url = f"http://127.0.0.1:{self.port}/health"
                with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=1):
                    return self
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the SuperLink did not start:\n{log.read_text()}")
                time.sleep(0.1)
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *args: object) -> None:
        """Stop the SuperLink and everything it started."""
        with signals_held():
            stop(self.process)


def copy_app(folder: Path) -> Path:
    """Copy the app to a folder where a benchmark can change it."""
    left_out = shutil.ignore_patterns(
        ".git", "fashion_mnist_sample", "outputs", ".venv", "*_cache", "federation", "partitions"
    )
    shutil.copytree(PROJECT, folder, ignore=left_out)
    return folder


def report(figures: Mapping[str, float], out: Path | None) -> None:
    """Print figures as a Markdown table, and write them to a JSON file if `out` is given."""
    print("| figure | |\n| --- | --- |")
    for key, value in figures.items():
        print(f"| {key} | {value:.2f} |")
    if out:
        out.write_text(json.dumps(figures, indent=2))
