"""Schedules, random streams, files that are replaced whole, the run directory and its lock."""

import errno
import json
import math
import os
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from torch import nn

from pytorch_example_low_level import figures, utils
from pytorch_example_low_level.config import UserError
from tests.conftest import results
from tests.grid import PROJECT, typed_config

SCORE = "accuracy"


def test_the_learning_rate_is_a_step_decay():
    half = typed_config(learning_rate=0.8, lr_decay_every=2, lr_decay_factor=0.5)
    assert [utils.learning_rate(half, r) for r in range(1, 7)] == [0.8, 0.8, 0.4, 0.4, 0.2, 0.2]
    assert utils.learning_rate(typed_config(learning_rate=0.8, lr_decay_every=0), 1000) == 0.8
    default = typed_config()
    assert utils.learning_rate(default, 10) < utils.learning_rate(default, 1)  # it shows in a default run


def test_the_best_round_is_the_first_with_the_highest_score(tmp_path):
    state = utils.ServerState({}, {})
    (tmp_path / "checkpoints").mkdir()
    recorder = utils.Recorder(tmp_path, None, state, {}, "auc")
    best = []
    for server_round, auc in enumerate([None, 0.0, 0.5, 0.5, None, 0.4, 0.6]):
        row = figures.new_row(["centralized_auc"], server_round) | {"centralized_auc": auc}
        best.append(recorder.is_best(row))
        recorder.commit(row)
    assert best == [False, True, True, False, False, False, True]
    assert (state.best_round, state.best_score) == (6, 0.6)


def test_the_evaluations_of_nodes_survive_a_power_cut(tmp_path, monkeypatch):
    """They are on the disk before their round is committed."""
    path, synced = tmp_path / "node_results.jsonl", []
    monkeypatch.setattr(utils.os, "fsync", lambda descriptor: synced.append(path.read_text()))
    utils.append_lines(path, [3])
    assert synced == ["3\n"]


def test_the_evaluations_of_nodes_hold_each_committed_round_once(tmp_path):
    """Lines are written before their round is committed, so a crash in between leaves lines that a resumed run cuts."""
    path = tmp_path / "node_results.jsonl"
    utils.cut_lines(path, 3)  # there is none yet
    for server_round in (1, 2):
        utils.append_lines(path, [{"round": server_round, "node": name, "accuracy": None} for name in ("é", "b")])
    whole = path.read_bytes()
    utils.append_lines(path, [{"round": 3, "node": "é"}])
    with path.open("ab") as file:
        file.write(b'{"round": 3, "no')  # the power was cut
    utils.cut_lines(path, 2)
    assert path.read_bytes() == whole
    assert pd.read_json(path, lines=True)["node"].tolist() == ["é", "b", "é", "b"]
    utils.append_lines(path, [])
    assert path.read_bytes() == whole
    with pytest.raises(UserError, match=r"Cannot write .*node_results"):
        utils.append_lines(tmp_path / "none" / "node_results.jsonl", [{}])


# ---------------------------------------------------------------------------------- Files


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "results.json"
    utils.replace_json(path, {"name": "Schuhgröße"})

    def fails_half_way(file):
        file.write(b"[1, 2")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"Cannot write .*results\.json: .*No space left on device.*unchanged"):
        utils.replace_file(path, fails_half_way)
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="JSON"):
            utils.replace_json(path, [value])
    assert path.read_text() == '{\n  "name": "Schuhgröße"\n}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]  # and nothing is left beside it
    with pytest.raises(UserError, match=r"Cannot write .*: \[Errno 2\] No such file or directory"):
        utils.replace_json(tmp_path / "none" / "x.json", [])


@pytest.mark.parametrize("system", ["posix", "nt"])
def test_a_file_and_its_folder_survive_a_power_cut(tmp_path, monkeypatch, system):
    """The file is on the disk before it gets its name, and the name before the function returns."""
    path, done = tmp_path / "x.json", []
    folders: list[int] = []
    real = {name: getattr(os, name) for name in ("fsync", "open", "close", "replace")}

    def fsync(descriptor):
        inode = os.fstat(descriptor).st_ino
        what = "folder" if inode == tmp_path.stat().st_ino else "file"
        if what == "file":
            assert (tmp_path / ".x.json.part").read_text() == "[1]\n".replace("[1]", "[\n  1\n]")  # it was flushed
            assert inode == (tmp_path / ".x.json.part").stat().st_ino
        done.append((what, path.exists()))
        real["fsync"](descriptor)

    def opened(name, *args):
        if system == "nt":
            raise PermissionError("Windows cannot open a folder")
        folders.append(real["open"](name, *args))
        return folders[-1]

    fake = SimpleNamespace(O_RDONLY=os.O_RDONLY, close=os.close, fsync=fsync, open=opened)
    monkeypatch.setattr(utils, "os", fake)
    utils.replace_json(path, [1])
    assert done == [("file", False), ("folder", True)][: 2 if system == "posix" else 1]
    for descriptor in folders:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


def test_a_full_disk_is_one_clear_error_and_the_old_file_stays(tmp_path):
    """As on a full disk: the system refuses to write on. torch.save raises a RuntimeError then."""
    path = tmp_path / "last.pt"
    utils.replace_file(path, lambda file: torch.save({"w": torch.ones(10)}, file))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(UserError) as error:
            utils.replace_file(path, lambda file: torch.save({"w": torch.ones(100_000)}, file))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(error.value) == f"Cannot write {path}: [Errno 27] File too large. An earlier file is unchanged."
    assert torch.equal(torch.load(path, weights_only=True)["w"], torch.ones(10))
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/pwned",)


@pytest.mark.parametrize("content", [Evil(), b"", b"PK\x03\x04 no zip"])
def test_a_checkpoint_with_code_in_it_and_what_is_none_are_refused(tmp_path, content):
    path = tmp_path / "checkpoints" / "last.pt"
    path.parent.mkdir()
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save({"w": content}, path)
    said = "Weights only load failed" if isinstance(content, Evil) else "."
    with pytest.raises(
        UserError, match=rf"last\.pt is not a checkpoint of this version of the app, or contains code: {said}"
    ) as error:
        utils.load_state(tmp_path, utils.ServerState({}, {}))
    assert len(str(error.value).splitlines()) == 1
    with pytest.raises(UserError, match=rf"last\.pt is not a state_dict of this model, or contains code: {said}"):
        utils.load_model(str(path), nn.Linear(1, 1))
    assert not Path("/tmp/pwned").exists()


def recorder(tmp_path, **state) -> utils.Recorder:
    (tmp_path / "checkpoints").mkdir()
    return utils.Recorder(
        tmp_path, typed_config(use_wandb=False), utils.ServerState({"seed": 1}, **state), {"names": ["a", "b"]}, SCORE
    )


def test_writing_a_checkpoint_does_not_copy_the_model(tmp_path):
    tensor = torch.ones(10_000_000)
    one = recorder(tmp_path, model={"w": tensor}, best_round=0, best_score=0.0)

    def peak() -> float:
        (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) / 1024

    Path("/proc/self/clear_refs").write_text("5")  # Linux: begin to measure the peak anew
    before = peak()
    one.commit(figures.new_row([], 0) | {"centralized_accuracy": 0.0})
    assert peak() - before < 20  # MB, of 40
    assert one.state.model["w"] is tensor
    assert {p.stat().st_size // 10**6 for p in (tmp_path / "checkpoints").iterdir()} == {40}


# -------------------------------------------------------------------------- Run directory


def test_runs_that_begin_at_the_same_time_have_a_directory_each(tmp_path, monkeypatch):
    class Clock(utils.datetime):
        @classmethod
        def now(cls):
            return cls(2026, 1, 2, 3, 4, 5)

    monkeypatch.setattr(utils, "datetime", Clock)
    monkeypatch.setenv("HOME", str(tmp_path))
    with ThreadPoolExecutor(max_workers=3) as pool:
        paths = list(pool.map(lambda _: utils.make_directory(typed_config(output_dir="~/runs")), range(3)))
    assert set(paths) == {tmp_path / "runs" / "2026-01-02" / f"03-04-05{suffix}" for suffix in ("", "-2", "-3")}
    assert all((p / "checkpoints").is_dir() for p in paths)


def test_an_output_directory_that_cannot_be_used_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "link", Path("/proc/nothing")):
        with pytest.raises(UserError, match=rf"output-dir: .*'{folder}.*'; allowed: a folder that can be"):
            utils.make_directory(typed_config(output_dir=str(folder)))


# ----------------------------------------------------------------------------------- Locks

SLOW = """
import sys
from pathlib import Path
sys.modules["torchvision"] = None  # an import would raise
from pytorch_example_low_level import images
from tests.grid import typed_config
images.load_test_split(typed_config(dataset=sys.argv[1]))
print("early:", sorted({"flwr_datasets", "matplotlib", "torch._dynamo", "wandb"} & sys.modules.keys()))
from tests.conftest import App
App(sys.argv[1], Path(sys.argv[2])).run(num_server_rounds=1)
print("run:", "wandb" in sys.modules)
"""


@pytest.mark.e2e
def test_what_is_slow_to_import_is_imported_only_when_needed(tiny_dataset, tmp_path):
    """A test split needs neither flwr-datasets nor PyTorch's compiler, and only a run with W&B imports it."""
    command = [sys.executable, "-c", SLOW, tiny_dataset, str(tmp_path)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["early: []", "run: False"], done.stderr


def test_a_directory_that_is_in_use_is_refused_and_stays_as_it_is(app, quick_plot):
    """test_e2e.py resumes a run whose process was killed."""
    directory = app.run(num_server_rounds=1)
    before = {p: p.read_bytes() for p in directory.rglob("*") if p.is_file()}
    with utils.lock(directory), pytest.raises(UserError) as error:
        app.run(resume_from=str(directory))
    assert str(error.value) == f"resume-from: {directory} is in use by run 1. To stop it: flwr stop 1"
    assert {p: p.read_bytes() for p in directory.rglob("*") if p.is_file()} == before
    app.run(resume_from=str(directory))
    assert len(results(directory)) == 3


def test_a_lock_is_released_when_a_run_ends_or_fails(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with utils.lock(tmp_path), pytest.raises(UserError, match="flwr stop RUN_ID"), utils.lock(tmp_path):
        pass  # it has no run_config.json yet
    utils.replace_json(tmp_path / "run_config.json", {"run-id": "7"})
    for _ in range(2):
        with pytest.raises(KeyError), utils.lock(tmp_path):
            with pytest.raises(UserError, match=r"in use by run 7\. To stop it: flwr stop 7$"), utils.lock(tmp_path):
                pass
            raise KeyError


def test_a_lock_of_another_user_is_respected(tmp_path, monkeypatch):
    def acquire(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(utils.FileLock, "acquire", acquire)
    with pytest.raises(UserError, match=r"resume-from: .*\.lock cannot be locked: .*Permission denied"):
        utils.lock(tmp_path)


def test_a_model_that_cannot_be_sent_and_paths_of_nobody_are_one_clear_error(app):
    with pytest.raises(UserError, match="make_model's state_dict cannot be sent: "):
        utils.new_state(typed_config(), nn.LazyLinear(2), {}, "", SCORE)
    for key in ("initial_model", "resume_from"):
        with pytest.raises(UserError, match=key.replace("_", "-")):
            app.run(**{key: "~nosuchuser/x"})


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, caplog, code):
    """And it gets no soft lock, a file which a killed process leaves behind."""
    import fcntl

    def flock(descriptor, operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    (tmp_path / "checkpoints").mkdir()
    for _ in range(2):
        with utils.lock(tmp_path):
            pass
    for record in caplog.records:
        assert record.message.startswith("This file system has no locks (")
        assert record.message.endswith(f"make sure that no other run uses {tmp_path}.")
    assert len(caplog.records) == 2


# ------------------------------------------------------------------------------ First model


def test_a_run_starts_from_the_model_that_it_is_given(app, quick_plot, tmp_path, caplog):
    caplog.set_level("INFO", logger="flwr")
    first = app.run(num_server_rounds=1)
    path = first / "final_model.pt"
    second = app.run(num_server_rounds=1, initial_model=str(path))
    trained, initial = results(first)[1], results(second)[0]
    for key in ("centralized_accuracy", "centralized_loss", "centralized_accuracy_per_class"):
        assert initial[key] == trained[key]
    assert json.loads((second / "run_config.json").read_text())["initial-model"] == str(path)
    assert f"Starting from the model {path}" in caplog.text
    path.unlink()  # it is needed no more
    app.run(num_server_rounds=2, initial_model=str(path), resume_from=str(second))
    assert len(results(second)) == 3
    grid = app.grid()
    with pytest.raises(UserError, match="initial-model: "):  # before the run begins
        app.run(grid, initial_model=str(path))
    assert grid.sent == []


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"w": torch.ones(2)}, "is not a state_dict of this model, or contains code: .*Missing key"),
        (nn.Linear(3, 2).state_dict() | {"weight": torch.ones(5, 5)}, "size mismatch for weight: .*5, 5.*2, 3"),
        ([1, 2], "is not a state_dict of this model"),
        (None, "is not a state_dict of this model, or contains code: .*No such file"),
        (nn.Linear(3, 2).state_dict() | {"bias": torch.tensor([0.0, torch.nan])}, r"not finite, in \['bias'\]"),
        (nn.Linear(3, 2).state_dict() | {"weight": torch.full((2, 3), -torch.inf)}, r"not finite, in \['weight'\]"),
    ],
)
def test_what_is_no_model_of_this_kind_is_one_clear_error(tmp_path, content, reason):
    path = tmp_path / "model.pt"
    if content is not None:
        torch.save(content, path)
    with pytest.raises(UserError, match=reason) as error:
        utils.load_model(str(path), nn.Linear(3, 2))
    assert str(path) in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_an_initial_model_has_the_masks_and_frozen_parameters_of_a_new_one(tmp_path):
    """A mask has numbers that are not finite."""
    net = nn.Linear(3, 2)
    net.weight.requires_grad_(False)
    net.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    torch.save(net.state_dict() | {"bias": torch.ones(2)}, tmp_path / "model.pt")
    utils.load_model(str(tmp_path / "model.pt"), net)
    assert net.bias.tolist() == [1, 1]
    for change, said in (
        ({"mask": torch.tensor([0.0, torch.inf])}, r"not finite, in \['mask'\]"),
        ({"weight": torch.ones(2, 3)}, r"other frozen parameters than a new model: \['weight'\]\. .*make_model must"),
    ):
        torch.save(net.state_dict() | change, tmp_path / "model.pt")
        with pytest.raises(UserError, match=said):
            utils.load_model(str(tmp_path / "model.pt"), net)
