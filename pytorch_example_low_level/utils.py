"""The learning-rate schedule, the times of a round, and the run directory with its checkpoints and results.json.

Every file is replaced as a whole, so after a crash at any time it is complete, old or new.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from importlib.metadata import version
from itertools import count
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

from pytorch_example_low_level import __version__, report
from pytorch_example_low_level.config import RunConfig, UserError, first_line

if TYPE_CHECKING:
    import wandb

T = TypeVar("T")
Row = dict[str, Any]  # one round in results.json

PLOT_EVERY = 30  # seconds between two drawings during a run
PLOT_FAILED = "The plot cannot be drawn"
WANDB_FAILED = "📈 W&B failed; the run continues without it"

# The keys of a round in results.json, in this order. A value that a round does not have is None.
RESULT_KEYS = (
    "round", "lr", "nodes_available",
    "train_sampled", "train_received", "train_failed", "train_rejected", "train_loss",
    "centralized_loss", "centralized_accuracy", "centralized_accuracy_per_class",
    "query_sent", "query_received", "opted_in", "evaluate_received", "evaluate_failed",
    "federated_evaluate_loss", "federated_evaluate_loss_std",
    "federated_evaluate_accuracy", "federated_evaluate_accuracy_std", "federated_evaluate_accuracy_min",
    "federated_evaluate_accuracy_p10", "federated_evaluate_accuracy_median",
    "seconds_nodes", "seconds_train", "seconds_central", "seconds_query", "seconds_evaluate", "seconds_total",
)  # fmt: skip

log = getLogger("flwr")


def log_environment() -> None:
    """Log versions and environment, which show if the SuperLink of another project took the run."""
    log.info("flwr %s, torch %s, app %s, in %s", version("flwr"), torch.__version__, __version__, sys.prefix)


def learning_rate(config: RunConfig, server_round: int) -> float:
    """Return the learning rate of a round (from 1): a step decay.

    It is a pure function of the round, so a resumed run needs no scheduler.
    """
    decays = (server_round - 1) // config.lr_decay_every if config.lr_decay_every else 0
    return config.learning_rate * config.lr_decay_factor**decays


class Stopwatch:
    """Measures a round and its phases, in seconds."""

    def __init__(self) -> None:
        self.started = self.last_lap = time.monotonic()

    def lap(self) -> float:
        """Return the seconds since the last lap."""
        before, self.last_lap = self.last_lap, time.monotonic()
        return round(self.last_lap - before, 3)

    def total(self) -> float:
        """Return the seconds since the beginning of the round."""
        return round(time.monotonic() - self.started, 3)


def time_summary(results: Sequence[Row], rounds_left: int) -> str:
    """Return how long the last round took, and how long the rest takes at the median pace after the first round."""
    row, names = results[-1], ("nodes", "train", "central", "query", "evaluate")
    phases = [f"{name} {row[f'seconds_{name}']:.1f}" for name in names if row[f"seconds_{name}"] is not None]
    seconds = [row["seconds_total"] for row in results if row["seconds_total"] is not None]
    left = timedelta(seconds=round(float(np.median(seconds[1:] or seconds)) * rounds_left))
    return f"Round took {row['seconds_total']:.1f} s ({', '.join(phases)}); about {left} left"


@dataclass
class ServerState:
    """Everything that is kept from round to round. A checkpoint contains these fields."""

    model: dict[str, Tensor]  # the global model, on the CPU
    server_round: int = -1  # the last committed round; 0: the initial model is evaluated; -1: nothing is committed
    best_round: int | None = None
    best_accuracy: float | None = None
    results: list[Row] = field(default_factory=list)
    wandb_id: str = ""  # a resumed run continues under it
    last_fault: str = ""  # why the last TRAIN reply was left out

    def is_best(self, row: Row) -> bool:
        """Return whether a round has a better central accuracy than all committed rounds."""
        return self.best_accuracy is None or row["centralized_accuracy"] > self.best_accuracy


def new_row(server_round: int, lr: float | None = None) -> Row:
    """Return the row of results.json for a round that has no results yet."""
    return dict.fromkeys(RESULT_KEYS) | {"round": server_round, "lr": lr}


def weighted_mean_std(values: Sequence[float], weights: Sequence[int]) -> tuple[float, float] | tuple[None, None]:
    """Return the weighted mean and (population) standard deviation; None, None without values."""
    if not values:
        return None, None
    mean = np.average(values, weights=weights)
    return float(mean), float(np.average((np.array(values) - mean) ** 2, weights=weights) ** 0.5)


# ---------------------------------------------------------------------------------- Files


def replace_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Replace `path` as a whole: write a temporary file beside it, fsync, rename.

    Raises UserError when it cannot be written, such as on a full disk; the old file is kept.
    """
    beside = path.with_name(f".{path.name}.part")
    try:
        with beside.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save hides an OSError behind a RuntimeError
        with suppress(OSError):
            beside.unlink()
        cause = error if isinstance(error, OSError) else error.__context__ or error
        raise UserError(f"Cannot write {path}: {first_line(cause)}. An earlier file is unchanged.") from error
    with suppress(OSError):  # so that the rename survives a power cut; not every system can sync a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def replace_json(path: Path, value: object) -> None:
    """Replace a JSON file. Raises ValueError for NaN and infinity, which JSON does not have."""
    text = json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    replace_file(path, lambda file: file.write(text.encode()))


def load_checkpoint(path: Path) -> Any:  # noqa: ANN401
    """Load a file that torch.save wrote, without executing code from it. Raises UserError when that fails."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many classes
        raise UserError(
            f"Cannot load {path}, which must be a checkpoint with data only: {first_line(error)}"
        ) from error


def load_model(name: str, net: nn.Module) -> None:
    """Load the state_dict in a file into `net`. Raises UserError when it does not fit the model."""
    path = Path(name).expanduser().absolute()
    try:
        net.load_state_dict(load_checkpoint(path))
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"initial-model: {path} is not a state_dict of this model: {reason}") from error
    log.info("Starting from the model %s", path)


# -------------------------------------------------------------------------- Run directory


@contextmanager
def open_run(
    config: RunConfig, run_id: int, net: nn.Module, images: Tensor, labels: Tensor, class_names: Sequence[str]
) -> Iterator[Recorder]:
    """Begin a new run in a new directory, or continue the one that `resume-from` names.

    Images, labels and names are those of the test split. Raises UserError when the directory cannot
    be written, is in use by another run, or belongs to a run with other settings.
    """
    model = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    # What the result depends on: a run is resumed only with the same configuration, model and data.
    identity = config.to_dict(with_operational=False)
    identity |= {f"model: {name}": f"{tensor.dtype} {tuple(tensor.shape)}" for name, tensor in model.items()}
    identity["test data"] = hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()[:16]

    directory = Path(config.resume_from).expanduser().absolute() if config.resume_from else make_directory(config)
    with locked(directory):
        state = load_state(directory, identity) if config.resume_from else ServerState(model)
        text = f"📂 Resuming after round {state.server_round}: %s" if config.resume_from else "📂 Run directory: %s"
        log.info(text, directory)
        versions = {name: version(name) for name in ("flwr", "flwr-datasets", "torch", "numpy")}
        versions |= {"app": __version__, "python": platform.python_version()}
        about = {"class-names": list(class_names), "image-shape": list(images.shape[1:]), "versions": versions}
        replace_json(directory / "run_config.json", config.to_dict() | about | {"run-id": str(run_id)})
        recorder = Recorder(directory, config, state, identity, class_names)
        try:
            recorder.start()
            yield recorder
        finally:
            recorder.close()
            log.info("📂 Run directory: %s", directory)


def make_directory(config: RunConfig) -> Path:
    """Create `<output-dir>/<date>/<time>`; never reuse a directory. Raises UserError."""
    base = Path(config.output_dir).expanduser().absolute() / f"{datetime.now():%Y-%m-%d/%H-%M-%S}"
    for attempt in count(1):  # another run may have begun in the same second
        path = base if attempt == 1 else base.with_name(f"{base.name}-{attempt}")
        try:
            path.mkdir(parents=True)
            (path / "checkpoints").mkdir()
            break
        except OSError as error:
            if not isinstance(error, FileExistsError) or not path.is_dir():
                reason = f"{error.strerror}; allowed: a folder that can be written to"
                raise UserError(f"output-dir: cannot make {path}: {reason}") from error
    return path


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Lock the directory for this run. Raises UserError when another run has the lock.

    The operating system releases the lock when the process ends, however it ends.
    """
    if not (directory / "checkpoints").is_dir():
        raise UserError(f"resume-from: {directory} is not the directory of a run")
    lock = FileLock(directory / ".lock", fallback_to_soft=False)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        run_id = "RUN_ID"  # in its first moments, a run has no run_config.json
        with suppress(OSError, ValueError, KeyError):
            run_id = json.loads((directory / "run_config.json").read_text(encoding="utf-8"))["run-id"]
        text = f"resume-from: {directory} is in use by run {run_id}. To stop it: flwr stop {run_id}"
        raise UserError(text) from error
    except (NotImplementedError, OSError) as error:
        log.warning("This file system has no locks (%s): make sure that no other run uses %s.", error, directory)
    try:
        yield
    finally:
        lock.release()


def load_state(directory: Path, identity: Mapping[str, Any]) -> ServerState:
    """Read the last checkpoint. Raises UserError when it belongs to a run with other settings."""
    path = directory / "checkpoints" / "last.pt"
    if not path.exists():
        raise UserError(f"resume-from: the run in {directory} has not committed a round; start a new run")
    checkpoint = load_checkpoint(path)
    try:
        theirs, state = checkpoint["identity"], ServerState(**checkpoint["state"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is not a checkpoint of this app: {error!r}") from error
    differences = [
        f"\n  - {key}: {theirs.get(key, 'nothing')!r} then, {identity.get(key, 'nothing')!r} now"
        for key in dict.fromkeys((*theirs, *identity))
        if theirs.get(key) != identity.get(key)
    ]
    if differences:
        hint = f"the settings of the run in {directory} differ. Give it the same ones again:"
        raise UserError(f"resume-from: {hint}{''.join(differences)}")
    return state


# ------------------------------------------------------------------------------ Recording


@dataclass
class Recorder:
    """Records a run: always in files, and in W&B if `use-wandb` is true."""

    directory: Path
    config: RunConfig
    state: ServerState
    identity: Mapping[str, Any]
    class_names: Sequence[str]
    wandb_run: wandb.Run | None = None
    finished: bool = False
    drawn_at: float = field(default_factory=time.monotonic)

    def start(self) -> None:
        """Bring the files of a resumed run up to its checkpoint; open W&B."""
        if self.state.server_round >= 0:
            self.write_results()
        if self.config.use_wandb:
            self.wandb_run = attempt(WANDB_FAILED, report.start_wandb, self.config, self.directory, self.state.wandb_id)
            if self.wandb_run is not None:
                self.state.wandb_id = self.wandb_run.id
        for row in self.state.results:  # W&B may lack the last ones after a crash
            self.log(row)

    def commit(self, row: Row, accuracies: Sequence[float] = ()) -> None:
        """Commit a round: `row` is its object in results.json, `accuracies` are those of the nodes."""
        if self.state.is_best(row):
            self.state.best_round, self.state.best_accuracy = row["round"], row["centralized_accuracy"]
        self.state.server_round = row["round"]
        self.state.results.append(row)
        # Everything else can be restored from this file, so writing it commits the round.
        checkpoint = {"identity": dict(self.identity), "state": vars(self.state)}
        replace_file(self.directory / "checkpoints" / "last.pt", lambda file: torch.save(checkpoint, file))
        self.write_results()
        self.log(row, accuracies)
        if time.monotonic() - self.drawn_at > PLOT_EVERY:  # drawing takes 0.3 s
            attempt(PLOT_FAILED, self.draw)

    def write_results(self) -> None:
        """Write results.json, and then the best model, so that its round is always in results.json."""
        replace_json(self.directory / "results.json", self.state.results)
        if self.state.best_round == self.state.server_round:
            best = self.directory / "checkpoints" / "best.pt"
            replace_file(best, lambda file: torch.save(self.state.model, file))

    def log(self, row: Row, accuracies: Sequence[float] = ()) -> None:
        """Log a round to W&B."""
        if self.wandb_run is not None:
            self.wandb_run = attempt(
                WANDB_FAILED, report.log_to_wandb, self.wandb_run, row, accuracies, self.class_names
            )

    def draw(self) -> None:
        """Draw the plot."""
        self.drawn_at = time.monotonic()
        figure = report.plot_results(self.state.results, self.class_names)
        replace_file(self.directory / "metrics.png", lambda file: figure.savefig(file, format="png", dpi=120))

    def finish(self) -> None:
        """Write the final model. Raises UserError when no round had a usable TRAIN reply."""
        if not any(row["train_received"] for row in self.state.results):
            fault = f" The last fault: {self.state.last_fault}" if self.state.last_fault else ""
            raise UserError(f"Nothing was learned: no round had a usable TRAIN reply.{fault}")
        replace_file(self.directory / "final_model.pt", lambda file: torch.save(self.state.model, file))
        log.info("This run is finished: %s rounds. For more, raise num-server-rounds.", self.state.server_round)
        self.finished = True

    def close(self) -> None:
        """Draw the plot and close W&B, however the run ended."""
        attempt(PLOT_FAILED, self.draw)
        if self.wandb_run is not None:
            best, exit_code = (self.state.best_round, self.state.best_accuracy), int(not self.finished)
            attempt(WANDB_FAILED, report.finish_wandb, self.wandb_run, self.directory, *best, exit_code)


def attempt(failed: str, function: Callable[..., T], *arguments: Any) -> T | None:  # noqa: ANN401
    """Call a function whose failure must not end the run, such as one of W&B. Return None if it fails."""
    try:
        return function(*arguments)
    except Exception as error:
        log.warning("%s: %s", failed, first_line(error))
        return None
