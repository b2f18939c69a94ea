"""What the tests share: a small data set of real images, and the app on an in-process Grid."""

import functools
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import types
from pathlib import Path

# Before Hugging Face's libraries are imported: nothing of the user's, and no network.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hf-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["WANDB_MODE"] = "offline"

import psutil
import pytest
import torch

from benchmarks.simulation import few_images
from pytorch_example_low_level import client_app, images, server_app, utils
from tests.grid import InProcessGrid, make_context, run_config, typed_config

torch.set_num_threads(1)


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory) -> str:
    """120 images to train and 40 to test, of Fashion-MNIST's ten classes."""
    return few_images(tmp_path_factory.mktemp("tiny"), train=120, test=40)


@pytest.fixture(autouse=True)
def short_wait_for_nodes(monkeypatch) -> None:
    """In one process all nodes are there from the beginning."""
    monkeypatch.setattr(server_app, "SETTLE", 0.01)


class App:
    """The whole app with a tiny data set: its configuration, its Grid and what a run leaves."""

    def __init__(self, dataset: str, output_dir: Path) -> None:
        self.defaults = {
            "dataset": dataset,
            "output_dir": str(output_dir),
            "partitioner": "iid",
            "num_server_rounds": 2,
            "fraction_clients_train": 0.6,
            "query_max_delay": 0.0,
            "query_timeout": 60.0,  # the machine may be busy
            "use_wandb": False,
            "server_device": "cpu",
        }

    def config(self, **overrides) -> dict:
        return run_config(**(self.defaults | overrides))

    def grid(self, seed: int = 0, num_nodes: int = 5) -> InProcessGrid:
        return InProcessGrid(client_app.app, self.config(), num_nodes, seed)

    def run(self, grid: InProcessGrid | None = None, **overrides) -> Path:
        """Run the ServerApp to its end; return the run directory."""
        config = self.config(**overrides)
        grid = grid or self.grid()
        for context in grid.contexts.values():
            context.run_config = config
        server_app.main(grid, make_context(config))
        return self.latest()

    def latest(self) -> Path:
        folders = [p.parent for p in Path(self.defaults["output_dir"]).glob("*/*/run_config.json")]
        return max(folders, key=lambda p: (p / "run_config.json").stat().st_mtime_ns)


load_test_data = images.load_test_split


@functools.cache
def load_test_split_once(dataset: str) -> images.Split:
    return load_test_data(typed_config(dataset=dataset))


@pytest.fixture
def app(tiny_dataset, tmp_path, monkeypatch) -> App:
    """The app, with an output directory of its own; the many runs share one loading of the test split."""
    monkeypatch.setattr(images, "load_test_split", lambda config: load_test_split_once(config.dataset))
    return App(tiny_dataset, tmp_path / "outputs")


@pytest.fixture
def quick_plot(monkeypatch) -> None:
    """An empty plot: for the many tests that run the loop for something else."""
    from matplotlib.figure import Figure

    monkeypatch.setattr(utils, "plot_results", lambda *args: Figure(figsize=(1, 1)))


def results(directory: Path, *, times: bool = False) -> list[dict]:
    """The rows of results.json, without the times unless asked for."""
    rows = json.loads((directory / "results.json").read_text())
    return [{k: v for k, v in row.items() if times or not k.startswith("seconds")} for row in rows]


def model(directory: Path, name: str = "final_model.pt") -> dict[str, torch.Tensor]:
    return torch.load(directory / name, weights_only=True)


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def lines_of(caplog, level: str = "WARNING") -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == level]


def alive(pids) -> set[int]:
    """Those of the processes that have not ended; a zombie has."""
    running = {each.pid for each in psutil.process_iter(["status"]) if each.info["status"] != psutil.STATUS_ZOMBIE}
    return running & set(pids)


def load_module(path: Path, name: str, monkeypatch) -> types.ModuleType:
    """Import a file as a module, for as long as the test runs."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module
