"""Real runs of the app that do not touch the user's Flower configuration, and a private local SuperLink.

`flwr run` starts a SuperLink on fixed ports, with the user's Flower home, and leaves it running.
Benchmarks and tests need a SuperLink of their own that stops when they end.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from deploy.cli import PROJECT, FlowerCli, free_port, start_superlink, stop, toml
from pytorch_example_low_level.sources import bundled


@dataclass(frozen=True)
class FinishedRun:
    """A finished run: its log, its final status according to Flower, and its run directory."""

    run_id: str
    log: str
    status: str  # such as "finished:completed"
    directory: Path | None

    @property
    def results(self) -> list[dict[str, Any]]:
        """The rows of results.json."""
        if self.directory is None:
            raise RuntimeError(f"the run has no directory:\n{self.log}")
        rows: list[dict[str, Any]] = json.loads((self.directory / "results.json").read_text())
        return rows


class AppCli(FlowerCli):
    """The `flwr` command, and what becomes of a run of the app."""

    def run(self, **arguments: Any) -> FinishedRun:
        """Run the app to its end, with the arguments of `log_of`."""
        return self.finished("".join(self.log_of(**arguments)))

    def log_of(
        self, nodes: int | None = None, cpus: float = 1, app: Path = PROJECT, **run_config: object
    ) -> Iterator[str]:
        """Run the app and yield the lines of its log. The argument `some_key` sets `some-key` of the configuration."""
        arguments = ["run", str(app), "--stream"]
        if run_config:
            arguments += ["--run-config", toml({key.replace("_", "-"): v for key, v in run_config.items()})]
        if nodes is not None:
            arguments += ["--federation-config", f"num-supernodes={nodes} client-resources-num-cpus={cpus}"]
        return self.lines(*arguments)

    def finished(self, log: str) -> FinishedRun:
        """Find the run id and the run directory in the log of a finished run, and ask Flower for its status."""
        log = re.sub(r"\x1b\[\d+m", "", log)
        started = re.search(r"Successfully started run (\d+)", log)
        run_id = started.group(1) if started else ""
        directory = re.search(r"📂 Run directory: (.+)", log)
        runs = self.ask("ls", "--run-id", run_id).get("runs")
        status = str(runs[0]["status"]) if runs else "unknown to Flower"
        return FinishedRun(run_id, log, status, Path(directory.group(1)) if directory else None)


class LocalSuperLink:
    """Flower's local SuperLink, in simulation mode, on free ports and with its own Flower home."""

    def __init__(self, home: Path, env: Mapping[str, str] | None = None) -> None:
        self.port = free_port()
        ports = {"FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(self.port), "FLWR_LOCAL_CONTROL_API_PORT": str(free_port())}
        self.flwr = AppCli(home, ports | dict(env or {}))
        self.run, self.lines = self.flwr.run, self.flwr.log_of
        self.process: subprocess.Popen[bytes]

    def __enter__(self) -> LocalSuperLink:
        """Start the SuperLink and wait until it answers."""
        self.process = start_superlink(["--insecure", "--simulation"], self.port, self.flwr.home, self.flwr.env)
        return self

    def __exit__(self, *args: object) -> None:
        """Stop the SuperLink and everything it started."""
        stop(self.process)


def command_of(process: psutil.Process) -> str:
    """Return the command line of a process; "" if it has ended."""
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def copy_app(folder: Path) -> Path:
    """Copy the app to a folder where a benchmark can change it."""
    left_out = shutil.ignore_patterns(
        ".git", "fashion_mnist_sample", "outputs", ".venv", "*_cache", "federation", "partitions"
    )
    shutil.copytree(PROJECT, folder, ignore=left_out)
    return folder


def few_images(folder: Path, train: int, test: int) -> str:
    """Save some of the bundled images as a data set; return its folder."""
    import datasets

    for split, count in (("train", train), ("test", test)):
        rows = datasets.load_dataset(bundled())[split].shuffle(seed=0).select(range(count))
        rows.to_parquet(folder / "data" / f"{split}.parquet")
    return str(folder)
