"""Applies recipes to a copy of the app, and runs the copy in this process."""

import functools
import importlib
import itertools
import shutil
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace

from flwr.app import Message

from recipes import PACKAGE, apply
from tests.grid import PROJECT, InProcessGrid, TimedGrid, make_context

numbers = itertools.count()
copies = tempfile.TemporaryDirectory(prefix="recipes-")  # goes when this process ends


def changed_app(*recipes: str) -> SimpleNamespace:
    """The modules of a copy of the app with these recipes, and its default configuration."""
    return _load(_copy(recipes))


@functools.cache
def _copy(recipes: tuple[str, ...]) -> Path:
    folder = Path(copies.name, f"copy-{next(numbers)}")
    shutil.copytree(PROJECT / PACKAGE, folder / PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(PROJECT / "pyproject.toml", folder)
    for recipe in recipes:
        apply(recipe, folder)
    return folder


def _load(folder: Path) -> SimpleNamespace:
    """Import the app in a folder under a name of its own, beside the app that is installed."""
    name = f"changed_app_{next(numbers)}"
    shutil.copytree(folder / PACKAGE, folder / name)
    for path in (folder / name).glob("*.py"):
        path.write_text(path.read_text().replace(PACKAGE, name))
    sys.path.insert(0, str(folder))
    try:
        modules = ("server_app", "client_app", "messaging", "task", "figures", "utils", "config")
        loaded = {module: importlib.import_module(f"{name}.{module}") for module in modules}
    finally:
        sys.path.remove(str(folder))
    loaded["server_app"].SETTLE = 0.01  # in one process all nodes are there from the beginning
    defaults = tomllib.loads((folder / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    return SimpleNamespace(**loaded, defaults=defaults)


class PacedGrid(TimedGrid):
    """Partition p takes `paces[p]` seconds for a TRAIN message, one message at a time.

    The seconds are those of a clock that only sleeping moves, so a run takes no longer than its
    computing, and gives the same result on every machine.
    """

    def __init__(self, app: SimpleNamespace, config: dict, paces: list[float]) -> None:
        super().__init__(paces, app.client_app.app, config)
        self.now = time.time()
        self.free_at: dict[int, float] = {}
        self.clock = SimpleNamespace(time=self.time, monotonic=self.time, sleep=self.sleep)
        for module in (app.server_app, app.client_app, app.messaging, app.task, app.utils):
            if hasattr(module, "time"):
                module.time = self.clock

    def time(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def done_at(self, message: Message, sent_at: float) -> float:
        partition = self.partition(message.metadata.dst_node_id)
        pace = self.delays[partition] if message.metadata.message_type == "train" else 0.0
        self.free_at[partition] = max(sent_at, self.free_at.get(partition, 0.0)) + pace
        return self.free_at[partition]


def run(app: SimpleNamespace, config: dict, grid: InProcessGrid | None = None, num_nodes: int = 5) -> InProcessGrid:
    """Run a changed app to its end. `config` overrides the defaults of its pyproject.toml."""
    config = app.defaults | config
    grid = grid or InProcessGrid(app.client_app.app, config, num_nodes)
    for context in grid.contexts.values():
        context.run_config = config
    app.server_app.main(grid, make_context(config))
    return grid
