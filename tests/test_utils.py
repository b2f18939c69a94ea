"""Schedules, files that are replaced whole, the run directory and the plot."""

import json
import os
import resource
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pytorch_example_low_level import server_app, utils
from pytorch_example_low_level.config import RunConfig, UserError
from tests.conftest import results, wait_for
from tests.grid import PROJECT, make_context, run_config


def config(**overrides) -> RunConfig:
    return RunConfig.from_context(make_context(run_config(**overrides)))


def test_the_learning_rate_is_a_step_decay():
    half = config(learning_rate=0.8, lr_decay_every=2, lr_decay_factor=0.5)
    assert [utils.learning_rate(half, r) for r in range(1, 7)] == [0.8, 0.8, 0.4, 0.4, 0.2, 0.2]
    assert utils.learning_rate(config(learning_rate=0.8, lr_decay_every=0), 1000) == 0.8
    default = config()
    assert utils.learning_rate(default, 10) < utils.learning_rate(default, 1)  # it shows in a default run


def test_random_streams_are_repeatable_and_differ_in_each_part():
    def draw(*path) -> float:
        return utils.random_stream(*path).random()

    here = (42, utils.Purpose.TRAIN, 3, 7)
    assert draw(*here) == draw(*here)
    others = [(43, *here[1:]), (42, utils.Purpose.QUERY, 3, 7), (42, utils.Purpose.TRAIN, 7, 3), (*here[:3], 2**63)]
    assert len({draw(*path) for path in (here, *others)}) == 5


def test_stopwatch_laps_and_tells_the_time_left(monkeypatch):
    times = iter([0.0, 2.0, 5.0, 6.0, 6.5, 10.0, 20.0])
    monkeypatch.setattr(utils.time, "monotonic", lambda: next(times))
    watch = utils.Stopwatch()
    watch.start()
    assert [watch.lap(), watch.lap(), watch.lap(), watch.total()] == [2.0, 3.0, 1.0, 6.5]
    row = {"seconds_total": 6.5, "seconds_train": 2.0, "seconds_query": 3.0, "seconds_evaluate": 1.0}
    expected = "Round took 6.5 s (TRAIN 2.0, QUERY 3.0, EVALUATE 1.0); about 0:01:05 left"
    assert watch.summary(row, rounds_left=10) == expected


# ---------------------------------------------------------------------------------- Files


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "results.json"
    utils.replace_json(path, [1])

    def fails_half_way(file):
        file.write(b"[1, 2")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"Cannot write .*results\.json: No space left on device"):
        utils.replace_file(path, fails_half_way)
    assert json.loads(path.read_text()) == [1]
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]  # and nothing is left beside it


def test_json_has_no_nan(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        utils.replace_json(tmp_path / "x.json", [float("nan")])
    assert not (tmp_path / "x.json").exists()


def test_a_file_size_limit_is_one_clear_error_and_the_old_checkpoint_stays(tmp_path):
    """As on a full disk: the system refuses to write on."""
    script = f"""
import resource, signal, sys, torch
from pathlib import Path
from pytorch_example_low_level import utils
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path = Path({str(tmp_path / "last.pt")!r})
utils.replace_checkpoint(path, {{"w": torch.ones(10)}})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    utils.replace_checkpoint(path, {{"w": torch.ones(100_000)}})
except utils.UserError as error:
    print(error)
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=PROJECT, check=True)
    assert "Cannot write" in out.stdout
    assert "File too large" in out.stdout
    assert torch.equal(utils.load_checkpoint(tmp_path / "last.pt")["w"], torch.ones(10))
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 100_000


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/pwned",)


def test_a_checkpoint_with_code_in_it_is_refused(tmp_path):
    path = tmp_path / "last.pt"
    torch.save({"w": Evil()}, path)
    with pytest.raises(UserError, match="more than data"):
        utils.load_checkpoint(path)
    assert not Path("/tmp/pwned").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no zip", b"text"])
def test_what_is_no_checkpoint_is_one_clear_error(tmp_path, content):
    (tmp_path / "last.pt").write_bytes(content)
    with pytest.raises(UserError, match="not a checkpoint"):
        utils.load_checkpoint(tmp_path / "last.pt")
    with pytest.raises(UserError, match="no checkpoint"):
        utils.load_checkpoint(tmp_path / "none.pt")


# -------------------------------------------------------------------------- Run directory


def test_runs_that_begin_in_the_same_second_have_a_directory_each(tmp_path):
    paths = [utils._make_run_directory(config(output_dir=str(tmp_path))).path for _ in range(5)]
    assert len(set(paths)) == 5
    assert all(p.is_absolute() and (p / "checkpoints").is_dir() for p in paths)


def test_an_output_directory_that_cannot_be_used_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nothing")):
        with pytest.raises(UserError, match="output-dir: "):
            utils._make_run_directory(config(output_dir=str(folder)))


def test_the_plot_shows_both_curves_and_the_spread_even_where_rounds_are_missing():
    rows = [utils.new_row(r) | {"centralized_accuracy": r / 10, "centralized_loss": 1.0} for r in range(4)]
    rows[2] |= {f"federated_evaluate_{n}{s}": 0.5 for n in ("accuracy", "loss") for s in ("", "_std")}
    rows[2] |= {f"federated_evaluate_accuracy_{k}": v for k, v in (("min", 0.3), ("p10", 0.4), ("median", 0.45))}
    for results_so_far in (rows, rows[:1], []):
        left, right = utils.plot_results(results_so_far).axes
        assert left.get_ylabel() == "accuracy"
        assert right.get_ylabel() == "loss (cross-entropy)"
        assert left.get_xlabel() == right.get_xlabel() == "round"
    left = utils.plot_results(rows).axes[0]
    assert left.lines[0].get_ydata().tolist() == [0.0, 0.1, 0.2, 0.3]
    assert left.lines[1].get_xdata().tolist() == [2.0]
    assert [line.get_ydata().tolist() for line in left.lines[2:]] == [[0.45], [0.4], [0.3]]
    assert len(left.get_legend().get_texts()) == 6


# ----------------------------------------------------------------------- Weights & Biases


def test_what_takes_long_to_import_and_is_not_needed_is_not_imported(tiny_dataset, tmp_path):
    """Without W&B not W&B; for training not PyTorch's compiler, for the server not flwr-datasets."""
    script = f"""
import sys
from pathlib import Path
for name in ("wandb", "torch._dynamo", "torchvision"):
    sys.modules[name] = None  # an import would raise
from pytorch_example_low_level import task
task.load_test_split({tiny_dataset!r})
assert "flwr_datasets" not in sys.modules
from tests.conftest import App
directory = App({tiny_dataset!r}, Path(sys.argv[1])).run(num_server_rounds=1)
assert '"train_received": 3' in (directory / "results.json").read_text()
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, cwd=PROJECT, capture_output=True)


def test_an_offline_run_holds_configuration_steps_histogram_plot_artifact_and_summary(app, monkeypatch, caplog):
    caplog.set_level("INFO", logger="flwr")
    monkeypatch.setenv("WANDB_MODE", "offline")
    directory = app.run(use_wandb=True, opt_in_probability=1.0)
    (folder,) = (directory / "wandb").glob("offline-run-*")
    assert [r.message for r in caplog.records if "wandb sync" in r.message] == [
        f"📈 W&B is offline. To upload this run later: wandb sync {folder}"
    ]
    records = read_wandb(folder)
    history = [
        {next(iter(i.nested_key), i.key): i for i in r.history.item}
        for r in records
        if r.WhichOneof("record_type") == "history"
    ]
    rows = results(directory, times=True)
    for row, items in zip(rows, history, strict=False):
        assert json.loads(items["_step"].value_json) == row["round"]
        for key, value in row.items():
            if value is not None:
                assert json.loads(items[key].value_json) == value
    text = "".join(str(r) for r in records)
    for word in (
        "client_accuracies",
        "histogram",
        "num-server-rounds",
        "dirichlet-alpha",
        "best-model-",
        "low-level-api",
        "best_centralized_accuracy",
        "image-file",
    ):
        assert word in text
    assert any(r.metric.summary.max for r in records if r.WhichOneof("record_type") == "metric")


def read_wandb(folder: Path) -> list:
    """Read W&B's own file back, once it is whole: W&B's process may still write when `finish` has returned."""
    (file,) = folder.glob("run-*.wandb")
    wait_for(lambda: (records := records_of(file)) and records[-1].WhichOneof("record_type") == "exit")
    return records_of(file)


def records_of(file: Path) -> list:
    """Read records in LevelDB's log format, behind a header of 7 bytes.

    https://github.com/google/leveldb/blob/main/doc/log_format.md
    """
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, parts, records = file.read_bytes(), 7, b"", []
    while position + 7 <= len(data):
        left_in_block = 32768 - position % 32768
        if left_in_block < 7:  # too small for a header: padding
            position += left_in_block
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        if position + 7 + length > len(data):
            break  # not written to its end
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(Record.FromString(parts))
            parts = b""
    return records


def test_no_credentials_or_network_means_offline_and_never_stops_a_run(app, monkeypatch, caplog):
    import wandb

    caplog.set_level("INFO", logger="flwr")
    modes = []
    real = wandb.init

    def refuse(**kwargs):
        modes.append(kwargs["mode"])
        if kwargs["mode"] is None:
            raise wandb.errors.CommError("no network")
        return real(**kwargs)

    monkeypatch.setattr(wandb, "init", refuse)
    directory = app.run(use_wandb=True, num_server_rounds=1)
    assert modes == [None, "offline"]
    assert len(results(directory)) == 2
    assert any("cannot go online: no network" in r.message for r in caplog.records)


@pytest.mark.parametrize("step", ["init", "log", "finish"])
def test_a_failure_of_wandb_is_said_once_and_never_stops_a_run(app, monkeypatch, caplog, step):
    """As when W&B's process has been killed: then the next call raises ConnectionResetError."""
    import wandb

    owner = wandb if step == "init" else wandb.Run
    real = getattr(owner, step)

    def fail(*args, **kwargs):
        if step == "finish":
            real(*args, **kwargs)  # so that no other test finds the run open
        raise ConnectionResetError("Connection lost")

    monkeypatch.setattr(owner, step, fail)
    directory = app.run(use_wandb=True)
    monkeypatch.undo()
    wandb.finish()
    assert len(results(directory)) == 3
    assert (directory / "final_model.pt").exists()
    said = [r.getMessage() for r in caplog.records if "goes on without it" in r.getMessage()]
    assert said == ["📈 W&B has failed, and the run goes on without it: Connection lost"]


def test_a_run_that_fails_closes_wandb_and_keeps_its_files(app, monkeypatch):
    finished = []
    monkeypatch.setattr(
        utils,
        "finish_wandb",
        lambda run, directory, state, exit_code: finished.append(exit_code) or run.finish(exit_code),
    )

    def crash(*args):
        raise RuntimeError("crash")

    monkeypatch.setattr(server_app, "evaluate", crash)
    with pytest.raises(RuntimeError, match="crash"):
        app.run(use_wandb=True)
    assert finished == [1]
    assert [row["round"] for row in results(app.latest())] == [0]
