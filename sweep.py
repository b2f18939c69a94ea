"""Compares settings over several seeds: a table, a plot, and which differences are within the spread over seeds.

    python -m sweep --seeds 2 --out rates --vary learning-rate=0.02 --vary learning-rate=0.05 --vary learning-rate=0.1

Each `--vary "key=value ..."` is one variant; without it, there is one with the defaults. `--run-config` and
`--nodes` are those of all runs. docs/sweeps.md has an example.

Each seed of a variant is a `flwr run`. With `--in-process`, ServerApp and nodes share one process instead, without
Flower's engine: the central figures are bit-identical. The nodes answer as soon as they are asked, so
set `query-max-delay=0.0` with it. `--jobs 2` does two runs at the same time; with `--in-process`, each
takes one core.

OUT.json is written after every run, and OUT-runs has the run directories. After an interruption, the tables show what
is there, and the same command continues: it does only the runs that OUT.json lacks. It refuses to continue with other
code of the app, other settings or another number of nodes. With `use-wandb=true`, the runs are a group in W&B with the
name of OUT. The tables and the plot show the last round and the curves, not the best round.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import re
import signal
import sys
import tempfile
import time
import tomllib
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from datetime import timedelta
from functools import partial
from itertools import combinations
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from benchmarks.seeds import COLUMNS, Rows, Runs, number, show
from benchmarks.simulation import LocalSuperLink, command_of
from deploy.cli import PROJECT, family, interrupt_on_signals
from pytorch_example_low_level import client_app, server_app
from pytorch_example_low_level.config import CODE, RunConfig, UserError, explained, source_digest
from pytorch_example_low_level.utils import replace_json
from tests.grid import InProcessGrid, make_context, run_config

Settings = dict[str, Any]

CODE_DIGEST = CODE.partition(" ")[0]  # without the folder
SET_HERE = {"seed", "output-dir", "resume-from"}  # not by the user
PROGRESS_EVERY = 30  # seconds


class Sweep(BaseModel):
    """OUT.json: on what the results depend, and the results."""

    model_config = ConfigDict(strict=True, extra="forbid")
    code: str  # the digest of the app's source
    in_process: bool
    nodes: int
    settings: dict[str, Settings]  # variant -> all settings, except those in SET_HERE
    runs: Runs


def main() -> None:
    """Parse the command line, do the runs, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=positive, default=3, help="number of seeds, from 0 (default: %(default)s)")
    parser.add_argument("--nodes", type=positive, default=50, help="simulated nodes (default: %(default)s)")
    parser.add_argument("--jobs", type=positive, default=1, help="runs at the same time (default: %(default)s)")
    parser.add_argument(
        "--in-process",
        action="store_true",
        help="without Flower's engine: faster, and the central results are the same",
    )
    parser.add_argument("--run-config", action="append", default=[], help="as for `flwr run`; a later one overrides")
    parser.add_argument("--vary", action="append", default=[], metavar="KEY=VALUE", help="one variant for each")
    parser.add_argument("--out", type=named_path, required=True, help="OUT.json, OUT.png and OUT-runs are written")
    args = parser.parse_args()
    out, folder = (args.out.with_name(args.out.name + end).absolute() for end in (".json", "-runs"))
    try:
        variants = read_variants(args.run_config, args.vary, args.nodes)
        sweep = Sweep(code=CODE_DIGEST, in_process=args.in_process, nodes=args.nodes, settings=variants, runs={})
        sweep = continued(sweep, out)
        folder.mkdir(parents=True, exist_ok=True)
    except (UserError, OSError) as error:
        parser.error(str(error))
    runs = {name: sweep.runs[name] for name in variants}
    seeds = [str(seed) for seed in range(args.seeds)]
    missing = [(name, seed) for seed in seeds for name in variants if seed not in runs[name]]
    os.environ["WANDB_RUN_GROUP"] = args.out.name  # the processes of the runs inherit it

    def done(name: str, seed: str, rows: Rows) -> None:
        runs[name][seed] = rows
        replace_json(out, sweep.model_dump())

    problem = ""
    if missing:
        try:
            with runner(sweep, args.jobs, folder) as begin:
                rounds = sum(variants[name]["num-server-rounds"] for name, _ in missing)
                failed = do_runs(missing, begin, done, args.jobs, rounds, lambda: rounds_done(folder))
                problem = f"Failed: {'; '.join(failed)}." if failed else ""
        except KeyboardInterrupt:
            problem = "Interrupted."
    show(runs, seeds, args.out.with_name(f"{args.out.name}.png"))
    if problem:
        there = sum(seed in rows for rows in runs.values() for seed in seeds)
        sys.exit(
            f"{problem} {there} of {len(seeds) * len(variants)} runs are in {out}. Run the same command to continue."
        )


def positive(text: str) -> int:
    """Return a number of the command line that must be at least 1."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is not allowed; it must be at least 1")
    return number


def named_path(text: str) -> Path:
    """Return the path of --out, whose last part is the name to which .json is added."""
    if text.replace(os.sep, "/").rpartition("/")[2] in {"", ".", ".."}:
        raise argparse.ArgumentTypeError(f"{text!r} does not end in a name, as results/rates does")
    return Path(text)


def parse_settings(text: str) -> Settings:
    """Return the settings in a text such as `a=1 b='x y'`, which `flwr run --run-config` takes. Raises UserError."""
    pair = r"""([\w-]+)=('[^']*'|"[^"]*"|\S+)"""
    if not re.fullmatch(rf"\s*({pair}(\s+|$))*", text):
        raise UserError(f"--run-config and --vary take settings such as \"a=1 b='x'\", not {text}")
    with explained(f"--run-config and --vary take settings such as \"a=1 b='x'\", not {text}"):
        return tomllib.loads("\n".join(f"{key} = {value}" for key, value in re.findall(pair, text)))


def read_variants(common: Sequence[str], vary: Sequence[str], nodes: int) -> dict[str, Settings]:
    """Return all settings of each variant. Raises UserError, which lists the faults of all variants."""
    of_all: Settings = {}
    for text in common:
        of_all |= parse_settings(text)
    given = {name: of_all | parse_settings(name) for name in vary or [""]}
    if set_here := SET_HERE & set().union(*given.values()):
        raise UserError(f"a sweep sets {', '.join(sorted(set_here))} itself; use --seeds and --out")
    defaults = {key: value for key, value in run_config(use_wandb=False).items() if key not in SET_HERE}
    variants = {name: defaults | settings for name, settings in given.items()}
    if same := [pair for pair in combinations(vary, 2) if variants[pair[0]] == variants[pair[1]]]:
        raise UserError(f"two variants have the same settings: --vary {same[0][0]!r} and --vary {same[0][1]!r}")
    faults: dict[str, str] = {}  # with the first variant that has each
    for name, settings in variants.items():
        try:
            check_settings(settings, nodes)
        except UserError as error:
            faults.setdefault(str(error), f"--vary {name!r}: " if vary else "")
    if faults:
        raise UserError("\n".join(name + fault for fault, name in faults.items()))
    return variants


def check_settings(settings: Settings, nodes: int) -> None:
    """Check the settings of a variant before anything is run. Raises UserError."""
    config = RunConfig.from_context(make_context(for_run(settings, "0", Path("any"))))
    if nodes < config.min_available_nodes:
        raise UserError(f"--nodes {nodes} is less than min-available-nodes, {config.min_available_nodes}")
    is_folder = config.dataset.startswith(".") or Path(config.dataset).is_dir()
    paths = {"initial-model": config.initial_model, "dataset": config.dataset if is_folder else ""}
    for key, path in paths.items():
        if path and not path.startswith("~") and not Path(path).is_absolute():
            # The runs have other working directories than this process.
            raise UserError(f"{key}={path!r} is a relative path; use the absolute one, {str(Path(path).absolute())!r}")


def for_run(settings: Settings, seed: str, folder: Path) -> Settings:
    """Return the settings of a run: those of its variant, and those that a sweep sets."""
    return settings | {"seed": int(seed), "output-dir": str(folder), "resume-from": ""}


def continued(sweep: Sweep, path: Path) -> Sweep:
    """Return the sweep with the variants and runs of an earlier start. Raises UserError if the two do not agree."""
    then = sweep
    advice = "Choose another --out, or delete the file"
    if path.exists():
        try:
            then = Sweep.model_validate_json(path.read_bytes())
        except ValidationError as error:
            fault = error.errors()[0]
            what = ": ".join([*map(str, fault["loc"]), fault["msg"]])
            raise UserError(f"{path} is damaged, or not of this version of the command ({what}). {advice}") from None
    pairs: dict[str, tuple[object, object]] = {
        "the app's code": (then.code, sweep.code),
        "--in-process": (then.in_process, sweep.in_process),
        "--nodes": (then.nodes, sweep.nodes),
    }
    for name, now in sweep.settings.items():
        before = then.settings.get(name, now)
        pairs |= {f"{key} of {name!r}" if name else key: (before.get(key), now.get(key)) for key in before | now}
    if differing := [f"  - {what}: {a!r} then, {b!r} now" for what, (a, b) in pairs.items() if a != b]:
        raise UserError("\n".join([f"{path} has runs of something else. {advice}. What differs:", *differing]))
    settings = then.settings | sweep.settings
    return sweep.model_copy(update={"settings": settings, "runs": {n: then.runs.get(n, {}) for n in settings}})


@contextlib.contextmanager
def runner(sweep: Sweep, jobs: int, folder: Path) -> Iterator[Callable[[str, str], futures.Future[Rows]]]:
    """Give a function that begins the run of a variant and a seed. An exception in the block ends all runs."""
    with contextlib.ExitStack() as stack:
        executor: futures.Executor
        begun: list[futures.Future[Rows]] = []
        run: Callable[[int, str, Settings], Rows] = run_in_process
        if sweep.in_process:
            executor = stack.enter_context(futures.ProcessPoolExecutor(jobs, get_context("spawn"), quiet_worker))
        else:
            home = stack.enter_context(tempfile.TemporaryDirectory())
            run = partial(run_with_engine, stack.enter_context(LocalSuperLink(Path(home))))
            executor = stack.enter_context(futures.ThreadPoolExecutor(jobs))

        def begin(name: str, seed: str) -> futures.Future[Rows]:
            number = list(sweep.settings).index(name)  # two names may differ only in what is replaced here
            readable = re.sub(r"[^\w.=-]+", "_", name or "default")
            settings = for_run(sweep.settings[name], seed, folder / f"{number}_{readable}" / f"seed-{seed}")
            begun.append(executor.submit(run, sweep.nodes, sweep.code, settings))
            return begun[-1]

        try:
            yield begin
        except BaseException:
            while futures.wait(begun, 0.2).not_done:  # again, because a run may just be starting its process
                end_processes()
            raise


def end_processes() -> None:
    """End the processes of the runs in progress."""
    for child in psutil.Process().children():
        # Python's tracker ends by itself. Without the SuperLink, `flwr` would start another one, which stays.
        if not re.search("resource_tracker|flower-superlink", command_of(child)):
            for process in family(child.pid):
                with contextlib.suppress(psutil.Error):  # it has just ended
                    process.kill()


def quiet_worker() -> None:
    """Prepare a process for runs: one thread, so that two share the cores, no log, and no end by Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.WARNING)


def run_in_process(nodes: int, code: str, settings: Settings) -> Rows:
    """Do one run on the in-process Grid of the tests; return the rows of its results.json."""
    check_code(CODE_DIGEST, code)
    folder = Path(settings["output-dir"])
    before = set(folder.glob("*/*"))  # those of interrupted runs
    server_app.main(InProcessGrid(client_app.app, settings, nodes), make_context(settings))
    (directory,) = set(folder.glob("*/*")) - before
    rows: Rows = json.loads((directory / "results.json").read_text())
    return rows


def run_with_engine(superlink: LocalSuperLink, nodes: int, code: str, settings: Settings) -> Rows:
    """Do one `flwr run`; return the rows of its results.json. Raises UserError if it fails."""
    check_code(source_digest(PROJECT / "pytorch_example_low_level"), code)
    finished = superlink.run(nodes=nodes, **settings)
    if finished.status != "finished:completed":
        _, found, message = finished.log.rpartition(f"\n{UserError.__module__}.UserError: ")  # of a traceback
        why = message.partition("\nERROR")[0] if found else f"{finished.status}:\n{finished.log[-3000:]}"
        raise UserError(why)
    return finished.results


def check_code(now: str, then: str) -> None:
    """Raise UserError if the app was edited after the sweep began."""
    if now != then:
        raise UserError(f"the app was edited after the sweep began (its code is now {now}; it was {then})")


def rounds_done(outputs: Path) -> int:
    """Return the number of rounds that all runs have committed."""
    return sum(len(json.loads(path.read_text())) - 1 for path in outputs.glob("*/seed-*/*/*/results.json"))


def do_runs(
    missing: Sequence[tuple[str, str]],
    begin: Callable[[str, str], futures.Future[Rows]],
    done: Callable[[str, str, Rows], None],
    jobs: int,
    rounds: int,
    rounds_done: Callable[[], int],
) -> list[str]:
    """Do the runs, `jobs` at the same time; print the progress and the time left, by the rounds of all runs.

    After a failure, those at work go on to their end, and no other begins. Returns which failed.
    """
    print(f"Runs to do: {len(missing)}, with {rounds} rounds in all; {jobs} at the same time ...", flush=True)
    started, before = time.monotonic(), rounds_done()  # those of interrupted runs are done again

    def progress() -> str:
        finished = rounds_done() - before
        pace = (time.monotonic() - started) / max(finished, 1)
        left = f"about {timedelta(seconds=round(pace * (rounds - finished)))} left" if finished else "time left unknown"
        return f"{finished}/{rounds} rounds; {left}"

    waiting, failed, count = deque(missing), list[str](), 0
    at_work: dict[futures.Future[Rows], tuple[str, str]] = {}
    while at_work or (waiting and not failed):
        while waiting and not failed and len(at_work) < jobs:
            which = waiting.popleft()
            at_work[begin(*which)] = which
        finished, _ = futures.wait(at_work, PROGRESS_EVERY, futures.FIRST_COMPLETED)
        if not finished:
            print(f"... {progress()}", flush=True)
        for future in finished:
            name, seed = at_work.pop(future)
            what = f"{name or 'run'}, seed {seed}"
            try:
                rows = future.result()
                done(name, seed, rows)
            except Exception as error:
                known = isinstance(error, UserError | futures.BrokenExecutor)
                why = str(error) if known else "".join(traceback.format_exception(error))
                others = (
                    f"\nWaiting for the runs in progress ({len(at_work)}); no other run is started." if at_work else ""
                )
                print(f"{what} failed: {why}{others}", file=sys.stderr, flush=True)
                failed.append(what)
                continue
            count += 1
            figures = ", ".join(f"{column} {number(rows[-1][key])}" for column, key in COLUMNS.items())
            print(f"{count}/{len(missing)} {what}: {figures}; {progress()}", flush=True)
    return failed


if __name__ == "__main__":
    interrupt_on_signals()  # so that no process is left behind
    main()
