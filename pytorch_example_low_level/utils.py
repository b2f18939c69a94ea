"""What a run leaves behind: its directory, checkpoints, results, plot, W&B; and two schedules.

Every file is replaced whole, so that it is complete, old or new, after a crash at any instant.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from enum import IntEnum
from importlib.metadata import version
from itertools import count
from logging import INFO, WARNING
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import numpy as np
import torch
from flwr.app import ArrayRecord
from flwr.common.logger import log
from flwr.supercore.exit import add_exit_handler
from torch import Tensor

from pytorch_example_low_level import __version__
from pytorch_example_low_level.config import RunConfig, UserError, first_line

if TYPE_CHECKING:
    import wandb
    from matplotlib.figure import Figure

StateDict = dict[str, Tensor]
Row = dict[str, int | float | None]  # one round in results.json

RAY_ABORT = 3  # seconds after SIGTERM in which Ray has a process aborted ...
TIME_TO_CLOSE = 60  # ... and what we grant it instead: W&B may have to upload

# What results.json says of a round, in this order; what a round does not have is None.
RESULT_KEYS = (
    "round", "lr", "nodes_available",
    "train_sampled", "train_received", "train_failed", "train_rejected", "train_loss",
    "centralized_loss", "centralized_accuracy",
    "query_sent", "query_received", "opted_in",
    "evaluate_received", "evaluate_failed",
    "federated_evaluate_loss", "federated_evaluate_loss_std",
    "federated_evaluate_accuracy", "federated_evaluate_accuracy_std",
    "federated_evaluate_accuracy_min", "federated_evaluate_accuracy_p10",
    "federated_evaluate_accuracy_median",
    "seconds_train", "seconds_query", "seconds_evaluate", "seconds_total",
)  # fmt: skip


# ------------------------------------------------------------------------------ Schedules


def learning_rate(config: RunConfig, server_round: int) -> float:
    """Return the learning rate of a round (from 1): a step decay, a pure function of the round.

    So a resumed run needs no scheduler whose state would have to be saved.
    """
    if config.lr_decay_every == 0:
        return config.learning_rate
    return config.learning_rate * config.lr_decay_factor ** ((server_round - 1) // config.lr_decay_every)


class Purpose(IntEnum):
    """What random numbers are for: each purpose has a stream of its own."""

    WEIGHTS = 0
    SAMPLE = 1
    TRAIN = 2
    QUERY = 3


def random_stream(seed: int, purpose: Purpose, server_round: int = 0, partition: int = 0) -> np.random.Generator:
    """Return the random numbers of (seed, purpose, round, partition).

    Nothing is drawn from a global generator, so nothing depends on which process does the
    work, or when. https://numpy.org/doc/stable/reference/random/parallel.html
    """
    return np.random.default_rng((seed, purpose, server_round, partition))


def weights_seed(seed: int) -> int:
    """Return the seed of the initial weights."""
    return int(random_stream(seed, Purpose.WEIGHTS).integers(2**63))


class Stopwatch:
    """How long the phases of a round take, and how much time the rounds that are left will."""

    def __init__(self) -> None:
        self._totals: list[float] = []

    def start(self) -> None:
        """Begin a round."""
        self._started = self._lap = time.monotonic()

    def lap(self) -> float:
        """Return the seconds since the last lap of this round."""
        last, self._lap = self._lap, time.monotonic()
        return round(self._lap - last, 3)

    def total(self) -> float:
        """End the round; return its seconds."""
        self._totals.append(time.monotonic() - self._started)
        return round(self._totals[-1], 3)

    def summary(self, row: Row, rounds_left: int) -> str:
        """Say how long the round took and how long the rest will, if it is like the rounds so far."""
        left = timedelta(seconds=round(float(np.median(self._totals)) * rounds_left))
        phases = ", ".join(f"{name.upper()} {row[f'seconds_{name}']:.1f}" for name in ("train", "query", "evaluate"))
        return f"Round took {row['seconds_total']:.1f} s ({phases}); about {left} left"


# ---------------------------------------------------------------------- State and results


@dataclass
class ServerState:
    """All that survives a round. A checkpoint is this, and nothing else."""

    model: StateDict  # the global model, on the CPU
    server_round: int = -1  # the last complete round; 0: the initial model is evaluated
    best_accuracy: float | None = None
    results: list[Row] = field(default_factory=list)
    wandb_id: str = ""  # a resumed run goes on under it


def new_row(server_round: int, lr: float | None = None) -> Row:
    """Return the row of results.json for a round of which nothing is known yet."""
    return dict.fromkeys(RESULT_KEYS) | {"round": server_round, "lr": lr}


def to_array_record(model: StateDict) -> ArrayRecord:
    """Return the model as it travels: NumPy has no bfloat16, so that goes as float32, exactly."""
    return ArrayRecord({n: t.float() if t.dtype == torch.bfloat16 else t for n, t in model.items()})


def weighted_mean_std(values: Sequence[float], weights: Sequence[int]) -> tuple[float, float] | tuple[None, None]:
    """Return mean and (population) standard deviation, weighted; None where there is no value."""
    if not values:
        return None, None
    total = sum(weights)
    mean = math.fsum(w * v for v, w in zip(values, weights, strict=True)) / total
    variance = math.fsum(w * (v - mean) ** 2 for v, w in zip(values, weights, strict=True)) / total
    return mean, math.sqrt(variance)


# -------------------------------------------------------------------------- Run directory


def replace_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Replace `path` whole: write beside it, fsync, rename.

    Raises UserError when the disk is full or the directory not writable; the old file stays.
    """
    beside = path.with_name(f".{path.name}.part")
    try:
        with beside.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)  # the rename itself must survive a power cut
        finally:
            os.close(directory)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise UserError(f"Cannot write {path}: {error.strerror}. What was there before is untouched.") from error


def replace_json(path: Path, value: object) -> None:
    """Replace a JSON file. Raises ValueError for NaN and infinity, which JSON does not have."""
    text = json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    replace_file(path, lambda file: file.write(text.encode()))


def replace_checkpoint(path: Path, value: object) -> None:
    """Replace a file that `torch.load(..., weights_only=True)` reads."""

    def write(file: BinaryIO) -> None:
        buffer = io.BytesIO()  # torch.save hides a full disk behind an internal error
        torch.save(value, buffer)
        file.write(buffer.getbuffer())

    replace_file(path, write)


def load_checkpoint(path: Path) -> Any:  # noqa: ANN401
    """Load a checkpoint; data only, never code. Raises UserError when it is not one."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"There is no checkpoint {path}.") from error
    except Exception as error:
        reason = first_line(error)
        raise UserError(f"{path} is not a checkpoint of this app, or holds more than data: {reason}") from error


@dataclass(frozen=True)
class RunDirectory:
    """The files of one run. Only `server_app.main` has them written."""

    path: Path

    @property
    def last(self) -> Path:
        """Everything that a run needs to go on."""
        return self.path / "checkpoints" / "last.pt"

    def save_round(self, state: ServerState, identity: Mapping[str, Any]) -> None:
        """Commit a round. Whatever comes after the checkpoint can be made again from it."""
        replace_checkpoint(self.last, {"identity": dict(identity), "state": asdict(state)})
        replace_json(self.path / "results.json", state.results)

    def save_best(self, model: StateDict) -> None:
        """Keep the best model so far, ready for `load_state_dict`."""
        replace_checkpoint(self.path / "checkpoints" / "best.pt", model)

    def save_config(self, config: RunConfig) -> None:
        """Note the full configuration and the versions that the run is made with."""
        packages = {name: version(name) for name in ("flwr", "flwr-datasets", "torch", "numpy")}
        versions = packages | {"app": __version__, "python": platform.python_version()}
        replace_json(self.path / "run_config.json", config.to_dict() | {"versions": versions})

    def save_final(self, model: StateDict) -> None:
        """Write what a finished run has."""
        replace_checkpoint(self.path / "final_model.pt", model)

    def save_plot(self, results: Sequence[Row]) -> None:
        """Draw what there is so far."""
        figure = plot_results(results)
        replace_file(self.path / "metrics.png", lambda file: figure.savefig(file, format="png", dpi=120))


def open_run(config: RunConfig, initial: ServerState, identity: Mapping[str, Any]) -> tuple[RunDirectory, ServerState]:
    """Begin a new run in a new directory, or go on with the one that `resume-from` names.

    `identity` is what the result depends on: a run is only resumed under the same one.
    Raises UserError when it differs, or the directory is not that of a run or not writable.
    """
    if config.resume_from:
        directory = RunDirectory(Path(config.resume_from).expanduser().absolute())
        state = _load_state(directory, identity)
        log(INFO, "📂 Resuming after round %s: %s", state.server_round, directory.path)
        replace_json(directory.path / "results.json", state.results)  # a crash may have been between the two
    else:
        directory, state = _make_run_directory(config), initial
        log(INFO, "📂 Run directory: %s", directory.path)
    directory.save_config(config)
    return directory, state


def identity_of(config: RunConfig, model: StateDict, test_images: Tensor, test_labels: Tensor) -> dict[str, Any]:
    """Return what a run's result depends on: configuration, model and data, as flat text."""
    digest = hashlib.sha256(test_images.numpy().tobytes())
    digest.update(test_labels.numpy().tobytes())
    shapes = {f"model: {name}": f"{tensor.dtype} {tuple(tensor.shape)}" for name, tensor in model.items()}
    return config.to_dict(with_operational=False) | shapes | {"test data": digest.hexdigest()[:16]}


def _load_state(directory: RunDirectory, identity: Mapping[str, Any]) -> ServerState:
    """Read the last checkpoint; refuse it when it belongs to another run than this one."""
    if not directory.path.is_dir():
        raise UserError(f"resume-from: there is no directory {directory.path}; allowed: the directory of a run")
    checkpoint = load_checkpoint(directory.last)
    try:
        theirs, state = checkpoint["identity"], ServerState(**checkpoint["state"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{directory.last} is not a checkpoint of this app: {error!r}") from error
    differences = [
        f"  - {key}: {theirs.get(key, 'nothing')!r} there, {identity.get(key, 'nothing')!r} now"
        for key in dict.fromkeys((*theirs, *identity))
        if theirs.get(key) != identity.get(key)
    ]
    if differences:
        raise UserError(
            f"resume-from: {directory.path} is another run; these settings must be what they were:\n"
            + "\n".join(differences)
        )
    return state


def _make_run_directory(config: RunConfig) -> RunDirectory:
    """Make `<output-dir>/<date>/<time>`, never an existing one."""
    now = datetime.now()
    base = Path(config.output_dir).expanduser().absolute() / f"{now:%Y-%m-%d}" / f"{now:%H-%M-%S}"
    for attempt in count(1):  # another run may have begun in the same second
        path = base if attempt == 1 else base.with_name(f"{base.name}-{attempt}")
        try:
            path.mkdir(parents=True)
            (path / "checkpoints").mkdir()
            break
        except FileExistsError as error:
            if not path.is_dir():  # a part of the path is a file
                raise UserError(f"output-dir: {error.filename} is not a folder; allowed: a folder") from error
        except OSError as error:
            raise UserError(
                f"output-dir: cannot make {path}: {error.strerror}; allowed: a folder that can be written to"
            ) from error
    return RunDirectory(path)


def plot_results(results: Sequence[Row]) -> Figure:
    """Draw accuracy and loss over the rounds: central, and federated with its spread over the nodes."""
    from matplotlib.figure import Figure  # no pyplot: nothing global, no display

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("accuracy", "loss"), strict=True):

        def curve(key: str) -> tuple[list[float], list[float]]:
            """Return the rounds that have this figure, and the figure."""
            rows = [row for row in results if row[key] is not None]
            return [float(row["round"] or 0) for row in rows], [float(row[key] or 0) for row in rows]

        # Okabe and Ito's colours, each with its own line and marker: told apart without seeing colours.
        federated = f"federated_evaluate_{name}"
        axes.plot(*curve(f"centralized_{name}"), color="#0072B2", marker="o", label="central (test split)")
        rounds, mean = curve(federated)
        axes.plot(rounds, mean, color="#D55E00", linestyle="--", marker="s", label="federated mean (opted-in nodes)")
        low, high = np.array(mean) - curve(f"{federated}_std")[1], np.array(mean) + curve(f"{federated}_std")[1]
        axes.fill_between(rounds, low, high, color="#D55E00", alpha=0.2, label="± 1 std over nodes")
        if name == "accuracy":  # the nodes that a mean hides
            axes.plot(*curve(f"{federated}_median"), color="#009E73", linestyle="-.", label="median node")
            axes.plot(*curve(f"{federated}_p10"), color="#CC79A7", linestyle=":", marker="v", label="10th percentile")
            axes.plot(*curve(f"{federated}_min"), color="black", linestyle="", marker="x", label="worst node")
        axes.set(xlabel="round", ylabel="loss (cross-entropy)" if name == "loss" else name, title=name.capitalize())
        axes.locator_params(axis="x", integer=True)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return figure


# ------------------------------------------------------------------------------ Recording


@dataclass
class Recorder:
    """Writes down what happens in a run: files always, W&B where it is wanted."""

    directory: RunDirectory
    state: ServerState
    identity: Mapping[str, Any]
    wandb_run: wandb.Run | None = None
    finished: bool = False
    _closed: bool = False

    def open_wandb(self, config: RunConfig) -> None:
        """Start a W&B run, unless W&B cannot start."""
        with self._going_on_without_wandb():
            self.wandb_run = start_wandb(config, self.directory, self.state)

    def new_best(self, accuracy: float) -> None:
        """Keep the current model as the best so far."""
        self.state.best_accuracy = accuracy
        self.directory.save_best(self.state.model)

    def end_round(self, row: Row, accuracies: Sequence[float] = ()) -> None:
        """Commit a round: `row` is its line in results.json, `accuracies` are those of the nodes."""
        if self._closed:  # by a signal, while this thread went on
            raise UserError("The run was stopped. It can be resumed with resume-from.")
        self.state.server_round = int(row["round"] or 0)
        self.state.results.append(row)
        self.directory.save_round(self.state, self.identity)
        with self._going_on_without_wandb():
            if self.wandb_run is not None:
                log_to_wandb(self.wandb_run, row, accuracies)

    def end_run(self) -> None:
        """Write the final model: with it, the run is finished."""
        self.directory.save_final(self.state.model)
        self.finished = True

    def close(self) -> None:
        """Draw the plot and close W&B, once, however the run ended."""
        if self._closed:
            return
        self._closed = True
        self.directory.save_plot(self.state.results)
        with self._going_on_without_wandb():
            if self.wandb_run is not None:
                finish_wandb(self.wandb_run, self.directory, self.state, exit_code=0 if self.finished else 1)
        log(INFO, "📂 Run directory: %s", self.directory.path)

    @contextmanager
    def _going_on_without_wandb(self) -> Iterator[None]:
        """Let no failure of W&B stop a run: its process may be killed, its disk be full."""
        try:
            yield
        except Exception as error:
            log(WARNING, "📈 W&B has failed, and the run goes on without it: %s", first_line(error))
            self.wandb_run = None


@contextmanager
def recording(
    config: RunConfig, directory: RunDirectory, state: ServerState, identity: Mapping[str, Any]
) -> Iterator[Recorder]:
    """Open what a run is recorded with, and close it at the run's end: good, bad or by a signal."""
    recorder = Recorder(directory, state, identity)
    if config.use_wandb:
        recorder.open_wandb(config)
    # On SIGTERM and `flwr stop` Flower ends the process without unwinding this thread. (Ray stands
    # between the two in a simulation: see check_engine.)
    add_exit_handler(recorder.close, run_before_force_exit=True)
    try:
        yield recorder
    finally:
        recorder.close()


def check_engine() -> None:
    """Raise UserError when the simulation around this thread ends, as it does on SIGTERM.

    The engine is the main thread, and this is another. In a simulation Ray takes SIGTERM in Flower's
    place: it sets an alarm that aborts the process (Abseil's failure handler), and ends the main thread
    in its own time. No answer will come any more, and nobody would close the run. So hand the signal
    back to the main thread, as one that Ray leaves alone.
    """
    abort_in = signal.getitimer(signal.ITIMER_REAL)[0] if hasattr(signal, "getitimer") else 0  # not on Windows
    if 0 < abort_in <= RAY_ABORT:
        signal.alarm(TIME_TO_CLOSE)
        # Flower's handler closes the run, and reports that it was stopped.
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
    elif threading.main_thread().is_alive():
        return
    raise UserError("Flower's engine has ended. The run can be resumed with resume-from.")


# ----------------------------------------------------------------------- Weights & Biases


def start_wandb(config: RunConfig, directory: RunDirectory, state: ServerState) -> wandb.Run:
    """Start a W&B run: online where there are credentials and a network, else offline.

    A resumed run goes on under the same W&B id. Raises whatever W&B raises when it cannot start at all.
    """
    import wandb

    # Of the program that started the SuperLink, a notebook say: its W&B process may be gone by now,
    # or still hold the id of a run that was killed.
    os.environ.pop("WANDB_SERVICE", None)

    def start(mode: Literal["offline"] | None) -> wandb.Run:
        run = wandb.init(
            project=config.wandb_project,
            dir=directory.path,
            config=config.to_dict(),
            id=state.wandb_id or None,
            resume="allow",
            mode=mode,
            tags=["flower", "low-level-api", config.partitioner],
            # Flower reads this process's output: W&B must not put itself in between.
            settings=wandb.Settings(init_timeout=20, console="off", silent=True),
        )
        run.define_metric("*", step_metric="round")
        for name in ("centralized", "federated_evaluate"):  # so that the table of runs shows the best
            run.define_metric(f"{name}_accuracy", step_metric="round", summary="max")
            run.define_metric(f"{name}_loss", step_metric="round", summary="min")
        return run

    try:
        run = start(None)
    except Exception as error:  # no account, no network, no W&B process, ...: classes of many libraries
        log(INFO, "📈 W&B cannot go online: %s", first_line(error))
        run = start("offline")
    if run.offline:
        log(INFO, "📈 W&B is offline. To upload this run later: wandb sync %s", Path(run.dir).parent)
    else:
        log(INFO, "📈 W&B: %s", run.url)
    state.wandb_id = run.id
    return run


def log_to_wandb(run: wandb.Run, row: Row, accuracies: Sequence[float]) -> None:
    """Log one round as one step, with the nodes' accuracies as a histogram."""
    import wandb

    values: dict[str, Any] = {key: value for key, value in row.items() if value is not None}
    if accuracies:
        values["client_accuracies"] = wandb.Histogram(accuracies, num_bins=20)
    run.log(values, step=int(row["round"] or 0))


def finish_wandb(run: wandb.Run, directory: RunDirectory, state: ServerState, exit_code: int) -> None:
    """Upload the plot and the best model, and close the run."""
    import wandb

    plot, best = directory.path / "metrics.png", directory.path / "checkpoints" / "best.pt"
    if plot.exists():
        run.log({"metrics": wandb.Image(str(plot))})
    if best.exists():
        metadata = {"centralized_accuracy": state.best_accuracy, "rounds": state.server_round}
        artifact = wandb.Artifact(f"best-model-{run.id}", type="model", metadata=metadata)
        artifact.add_file(str(best))
        run.log_artifact(artifact)
    run.summary["best_centralized_accuracy"] = state.best_accuracy
    run.finish(exit_code=exit_code)
