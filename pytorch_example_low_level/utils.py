"""The learning-rate schedule, the stopwatch, and the run directory: checkpoints, results.json, plot, W&B.

Every file but node_results.jsonl is replaced as a whole, so after a crash at any time it is complete, old or new.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

from pytorch_example_low_level import __version__
from pytorch_example_low_level.config import CODE, OPERATIONAL, RunConfig, UserError, explained, log, one_line
from pytorch_example_low_level.figures import Report, Row, element_names, plot_results

if TYPE_CHECKING:
    import wandb

PLOT_EVERY = 30  # seconds between two drawings during a run


def frozen(net: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that training cannot change, by all their names. They are the same in every new model."""
    tensors = net.state_dict(keep_vars=True)
    return {n: t.detach() for n, t in tensors.items() if isinstance(t, nn.Parameter) and not t.requires_grad}


def frozen_digest(parameters: Mapping[str, Tensor]) -> str:
    """Return a digest of the frozen parameters. They must be the same at the server and on all nodes."""
    digest = hashlib.sha256()
    for name, tensor in parameters.items():
        digest.update(name.encode())
        digest.update(tensor.resolve_conj().flatten().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def log_environment() -> None:
    """Log versions and environment, which show if the SuperLink of another project took the run."""
    log.info("flwr %s, torch %s, app %s, in %s", version("flwr"), torch.__version__, __version__, sys.prefix)


def learning_rate(config: RunConfig, server_round: int) -> float:
    """Return the learning rate of a round (from 1): a step decay. It has no state that a resumed run must restore."""
    decays = (server_round - 1) // config.lr_decay_every if config.lr_decay_every else 0
    return config.learning_rate * config.lr_decay_factor**decays


class Stopwatch:
    """Measures the time between two calls of `lap`, in seconds."""

    def __init__(self) -> None:
        self.last_lap = time.monotonic()

    def lap(self) -> float:
        """Return the seconds since the last lap, or since the stopwatch was made."""
        before, self.last_lap = self.last_lap, time.monotonic()
        return round(self.last_lap - before, 3)


@dataclass
class ServerState:
    """Everything that is kept from round to round. A checkpoint contains these fields."""

    identity: dict[str, Any]  # the settings on which the results depend
    model: dict[str, Tensor]  # the global model, on the CPU
    server_round: int = -1  # the last committed round; 0: the initial model is evaluated; -1: nothing is committed
    best_round: int | None = None
    best_score: float | None = None
    results: list[Row] = field(default_factory=list)
    wandb_id: str = ""  # a resumed run continues under it
    last_fault: str = ""  # the first fault of the last TRAIN phase


# ---------------------------------------------------------------------------------- Files


def replace_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Replace `path` by a temporary file beside it. Raises UserError when that fails; the old file is kept."""
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
        raise UserError(f"Cannot write {path}: {one_line(cause)}. An earlier file is unchanged.") from error
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


def append_lines(path: Path, values: Iterable[object]) -> None:
    """Append JSON values to a file, a line each. Raises UserError."""
    lines = [json.dumps(value, allow_nan=False, ensure_ascii=False) + "\n" for value in values]
    with explained(f"Cannot write {path}"), path.open("ab") as file:
        file.write("".join(lines).encode())
        file.flush()
        os.fsync(file.fileno())


def cut_lines(path: Path, last_round: int) -> None:
    """Remove the lines of later rounds, which a crash left behind: they are written before a round is committed."""
    if path.exists():
        lines = path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith(b"\n") and json.loads(line)["round"] <= last_round]
        replace_file(path, lambda file: file.write(b"".join(kept)))


def load_model(name: str, net: nn.Module) -> None:
    """Load the state_dict in a file into `net`. Raises UserError unless it fits, is finite and holds data only."""
    with explained("initial-model"):
        path = Path(name).expanduser().absolute()
    fresh = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with explained(f"initial-model: {path} is not a state_dict of this model, or contains code"):
        net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    # A mask of -inf is part of the model: it is also in the one that was just made.
    faulty = [name for name, t in net.state_dict().items() if not (t.isfinite() | (t == fresh[name])).all()]
    if faulty:
        raise UserError(f"initial-model: {path} has numbers that are not finite, in {faulty}")
    if other := [name for name, tensor in frozen(net).items() if not torch.equal(tensor, fresh[name])]:
        raise UserError(
            f"initial-model: {path} has other frozen parameters than a new model: {other}. They are not sent to the "
            "nodes, so make_model must load them."
        )
    log.info("Starting from the model %s", path)


# -------------------------------------------------------------------------- Run directory


def new_state(config: RunConfig, net: nn.Module, facts: Mapping[str, Any], fingerprint: str, score: str) -> ServerState:
    """Return the state of a new run, which begins with `net`, or with `initial-model` if there is one.

    Facts and fingerprint are those of the server's data. Raises UserError.
    """
    if config.initial_model and not config.resume_from:
        load_model(config.initial_model, net)
    with explained("make_model's state_dict cannot be sent"):
        model = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    # A run is resumed only with the same configuration, model and data.
    identity = config.model_dump(by_alias=True, exclude=OPERATIONAL) | {**facts, "score": score}
    identity |= {f"model: {name}": f"{tensor.dtype} {tuple(tensor.shape)}" for name, tensor in model.items()}
    identity |= {"frozen parameters": frozen_digest(frozen(net)), "data": fingerprint}
    return ServerState(identity, model)


@contextmanager
def open_run(
    config: RunConfig, run_id: int, state: ServerState, facts: Mapping[str, Any], score: str
) -> Iterator[Recorder]:
    """Begin a new run in a new directory, or continue that of `resume-from`, whose state replaces `state` in place.

    Raises UserError when the directory cannot be written, is in use by another run, or belongs to a run with
    other settings.
    """
    with explained("resume-from"):
        resumed = Path(config.resume_from).expanduser().absolute()
    directory = resumed if config.resume_from else make_directory(config)
    if config.resume_from and not (directory / "checkpoints" / "last.pt").is_file():
        raise UserError(f"resume-from: {directory} is not the directory of a run that has committed a round")
    with lock(directory):
        if config.resume_from:
            load_state(directory, state)
        log.info("📂 Run directory: %s", directory)
        versions = {name: version(name) for name in ("flwr", "flwr-datasets", "torch", "numpy")}
        versions |= {"app": __version__, "python": sys.version.split()[0]}
        about = {**facts, "versions": versions, "code": CODE, "run-id": str(run_id)}
        replace_json(directory / "run_config.json", config.model_dump(by_alias=True) | about)
        recorder = Recorder(directory, config, state, facts, score)
        try:
            recorder.start()
            yield recorder
        finally:
            recorder.close()
            log.info("📂 Run directory: %s", directory)


def make_directory(config: RunConfig) -> Path:
    """Create `<output-dir>/<date>/<time>`; never reuse a directory. Raises UserError."""
    with explained("output-dir", "; allowed: a folder that can be written to"):
        base = Path(config.output_dir).expanduser().absolute() / f"{datetime.now():%Y-%m-%d/%H-%M-%S}"
        base.parent.mkdir(parents=True, exist_ok=True)
        for attempt in count(1):  # another run may have begun in the same second
            path = base if attempt == 1 else base.with_name(f"{base.name}-{attempt}")
            with suppress(FileExistsError):
                (path / "checkpoints").mkdir(parents=True)
                break
    return path


def lock(directory: Path) -> AbstractContextManager[object]:
    """Lock the directory until the context or the process ends. Raises UserError when another run has the lock."""
    try:
        return FileLock(directory / ".lock", fallback_to_soft=False).acquire(timeout=0)
    except Timeout as error:
        run = "RUN_ID"  # in its first moments, a run has no run_config.json
        with suppress(OSError):
            run = json.loads((directory / "run_config.json").read_text(encoding="utf-8"))["run-id"]
        raise UserError(f"resume-from: {directory} is in use by run {run}. To stop it: flwr stop {run}") from error
    except PermissionError as error:
        raise UserError(f"resume-from: {directory / '.lock'} cannot be locked: {one_line(error)}") from error
    except (NotImplementedError, OSError) as error:
        log.warning("This file system has no locks (%s): make sure that no other run uses %s.", error, directory)
        return nullcontext()


def load_state(directory: Path, state: ServerState) -> None:
    """Read the last checkpoint into `state`. Raises UserError when it belongs to a run with other settings."""
    path = directory / "checkpoints" / "last.pt"
    with explained(f"resume-from: {path} is not a checkpoint of this version of the app, or contains code"):
        last = ServerState(**torch.load(path, map_location="cpu", weights_only=True))
    then, now = last.identity, state.identity
    changed = [key for key in then | now if then.get(key) != now.get(key)]
    if changed:
        what = f"resume-from: the run in {directory} had other settings. Use the same ones again:"
        lines = [f"  - {key}: {then.get(key)!r} then, {now.get(key)!r} now" for key in changed]
        if "data" in changed:
            lines.append("  data is a digest of what dataset holds, so check dataset first.")
        raise UserError("\n".join([what, *lines]))
    vars(state).update(vars(last))
    log.info("📂 Resuming after round %s", state.server_round)


# ------------------------------------------------------------------------------ Recording


@dataclass
class Recorder:
    """Records a run: always in files, and in W&B if `use-wandb` is true."""

    directory: Path
    config: RunConfig
    state: ServerState
    facts: Mapping[str, Any]
    score: str
    wandb_run: wandb.Run | None = None
    finished: bool = False
    drawn_at: float = field(default_factory=time.monotonic)

    def start(self) -> None:
        """Bring the files of a resumed run up to its checkpoint; open W&B."""
        cut_lines(self.directory / "node_results.jsonl", self.state.server_round)
        if self.state.server_round >= 0:
            self.write_results()
        if self.config.use_wandb:
            with optional("📈 W&B"):
                self.wandb_run = start_wandb(self.config, self.directory, self.state.wandb_id)
                self.state.wandb_id = self.wandb_run.id
        for row in self.state.results:  # W&B may lack the last ones after a crash
            self.log_to_wandb(row)

    def is_best(self, row: Row) -> bool:
        """Return whether a round has a better central score than all committed rounds."""
        new, best = row.get(f"centralized_{self.score}"), self.state.best_score
        return new is not None and (best is None or new > best)

    def commit(self, row: Row, reports: Sequence[Report] = ()) -> None:
        """Commit a round: `row` is its object in results.json, `reports` are the evaluations of the nodes."""
        if self.is_best(row):
            self.state.best_round, self.state.best_score = row["round"], row[f"centralized_{self.score}"]
        self.state.server_round = row["round"]
        self.state.results.append(row)
        append_lines(self.directory / "node_results.jsonl", [{"round": row["round"], **report} for report in reports])
        # Everything else can be restored from this file, so writing it commits the round.
        replace_file(self.directory / "checkpoints" / "last.pt", lambda file: torch.save(vars(self.state), file))
        self.write_results()
        self.log_to_wandb(row, reports)
        if time.monotonic() - self.drawn_at > PLOT_EVERY:
            self.draw()

    def write_results(self) -> None:
        """Write results.json, and then the best model, so that its round is always in results.json."""
        replace_json(self.directory / "results.json", self.state.results)
        if self.state.best_round == self.state.server_round:
            replace_file(self.directory / "checkpoints" / "best.pt", lambda file: torch.save(self.state.model, file))

    def log_to_wandb(self, row: Row, reports: Sequence[Report] = ()) -> None:
        """Log one round as one step, unless W&B has it, with a histogram of the nodes' scores."""
        if self.wandb_run is None:
            return
        with optional("📈 W&B"):
            import wandb

            values = {key: value for key, value in row.items() if value is not None and not isinstance(value, list)}
            for key, elements in ((key, value) for key, value in row.items() if isinstance(value, list)):
                names = element_names(elements, self.facts)
                values |= {f"{key}/{n}": v for n, v in zip(names, elements, strict=True) if v is not None}
            if scores := [report[self.score] for report in reports if report[self.score] is not None]:
                values[f"client_{self.score}"] = wandb.Histogram(scores, num_bins=20)
            if row["round"] >= self.wandb_run.step:
                self.wandb_run.log(values, step=row["round"], commit=True)
            return
        self.wandb_run = None  # it failed

    def draw(self) -> None:
        """Draw the plot, which takes about 0.3 s."""
        self.drawn_at = time.monotonic()
        # Matplotlib warns of each character that its font lacks, at each drawing.
        with optional("The plot"), warnings.catch_warnings(action="ignore", category=UserWarning):
            figure = plot_results(self.state.results, self.facts, self.score)
            replace_file(self.directory / "metrics.png", lambda file: figure.savefig(file, format="png", dpi=120))

    def finish(self) -> None:
        """Write the final model. Raises UserError when no round had a usable TRAIN reply."""
        if not any(row["train_received"] for row in self.state.results):
            fault = self.state.last_fault or "none"
            raise UserError(f"Nothing was learned: no round had a usable TRAIN reply. The last fault: {fault}")
        replace_file(self.directory / "final_model.pt", lambda file: torch.save(self.state.model, file))
        log.info(
            "This run is finished after round %s. To continue it, set resume-from and raise num-server-rounds.",
            self.state.server_round,
        )
        self.finished = True

    def close(self) -> None:
        """Draw the plot and close W&B with the plot and the best model, however the run ended."""
        self.draw()
        if self.wandb_run is None:
            return
        with optional("📈 W&B"):
            import wandb

            if (plot := self.directory / "metrics.png").exists():
                self.wandb_run.summary["metrics"] = wandb.Image(str(plot))  # `log` would use up the next round's step
            if (best := self.directory / "checkpoints" / "best.pt").exists():
                metadata = {"best_round": self.state.best_round}
                artifact = wandb.Artifact(f"best-model-{self.wandb_run.id}", type="model", metadata=metadata)
                artifact.add_file(str(best))
                self.wandb_run.log_artifact(artifact)
            self.wandb_run.summary[f"best_centralized_{self.score}"] = self.state.best_score
            self.wandb_run.finish(exit_code=int(not self.finished))


@contextmanager
def optional(part: str) -> Iterator[None]:
    """Turn any exception in a part that must not end the run into a warning."""
    try:
        yield
    except Exception as error:
        log.warning("%s failed; the run continues without it: %s", part, one_line(error))


def start_wandb(config: RunConfig, directory: Path, wandb_id: str) -> wandb.Run:
    """Start a W&B run, offline if it cannot go online. `wandb_id` is that of a resumed run, otherwise ""."""
    import wandb

    # Flower reads this process's output, so W&B must leave it alone. Without a timeout, `finish` may block forever.
    settings = wandb.Settings(init_timeout=20, finish_timeout=60, console="off", silent=True)
    init = partial(wandb.init, project=config.wandb_project, dir=directory, config=config.model_dump(by_alias=True))
    init = partial(init, id=wandb_id or None, resume="allow", tags=["flower", "low-level-api"], settings=settings)
    try:
        run = init()
    except Exception as error:  # of many classes: for a missing account, network or process
        log.info("📈 W&B cannot go online: %s", one_line(error))
        wandb.teardown()  # the failed attempt may still hold the id of a resumed run
        run = init(mode="offline")
    sync = f"offline. To upload this run later: wandb sync {shlex.quote(str(Path(run.dir).parent))}"
    log.info("📈 W&B is %s", "disabled." if run.disabled else sync if run.offline else f"online: {run.url}")
    return run
