"""A run that stops and goes on ends with the bits of one that never stopped."""

import json
import shutil
import signal
import threading
from functools import partial

import pytest
import torch
from flwr.app import MessageType

from pytorch_example_low_level import client_app, server_app, utils
from pytorch_example_low_level.config import UserError
from tests.conftest import load_test_split_once, model, results, same_bits

pytestmark = pytest.mark.usefixtures("quick_plot")

ROUNDS = 4
SETTINGS = {"num_server_rounds": ROUNDS, "lr_decay_every": 2}


class Crash(BaseException):
    """Like a power cut: nothing catches it."""


def crash_at(monkeypatch, app, write: int, half: bool, **overrides):
    """Run until the `write`-th file is about to be replaced; then stop, with half of it written."""
    real, count = utils.replace_file, 0

    def counting(path, writer):
        nonlocal count
        count += 1
        if count == write:
            if half:
                path.with_name(f".{path.name}.part").write_bytes(b"half a fi")
            raise Crash
        real(path, writer)

    with monkeypatch.context() as patch:
        patch.setattr(utils, "replace_file", counting)
        patch.setattr(utils.RunDirectory, "save_plot", lambda *args: None)
        with pytest.raises(Crash):
            app.run(**SETTINGS | overrides)
    return app.latest()


@pytest.fixture(scope="module")
def uninterrupted(tiny_dataset, tmp_path_factory):
    from tests.conftest import App

    return App(tiny_dataset, tmp_path_factory.mktemp("uninterrupted")).run(**SETTINGS)


@pytest.mark.parametrize("write", range(3, 13))
def test_a_crash_at_any_write_loses_nothing_but_the_round_in_flight(app, monkeypatch, uninterrupted, write):
    directory = crash_at(monkeypatch, app, write, half=write % 2 == 0)
    for path in directory.rglob("*"):  # every file that is there is whole
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".pt":
            torch.load(path, weights_only=True)
    assert (directory / "checkpoints" / "last.pt").exists()
    before = results(directory) if (directory / "results.json").exists() else []

    assert app.run(**SETTINGS, resume_from=str(directory)) == directory
    assert results(directory)[: len(before)] == before
    assert results(directory) == results(uninterrupted)
    for name in ("final_model.pt", "checkpoints/best.pt"):
        assert same_bits(model(directory, name), model(uninterrupted, name))
    assert (directory / "metrics.png").exists()


@pytest.fixture
def alarm():
    """Set alarms as Ray does; the one that ends a test which takes too long is set again behind it."""
    own, interval = signal.setitimer(signal.ITIMER_REAL, 0)
    yield partial(signal.setitimer, signal.ITIMER_REAL)
    signal.setitimer(signal.ITIMER_REAL, own, interval)


@pytest.mark.parametrize("notice", ["Ray's alarm", "the main thread has ended"])
def test_a_simulation_that_ends_answers_for_its_workers_but_is_not_believed(
    app, uninterrupted, monkeypatch, caplog, alarm, notice
):
    """As on SIGTERM: the last reply of a round is an error, because its worker has been ended."""
    grid = app.grid()

    def ended(msg, context):
        if (msg.metadata.message_type, msg.metadata.group_id) == (MessageType.EVALUATE, "2"):
            if notice == "Ray's alarm":
                alarm(utils.RAY_ABORT)
            else:
                monkeypatch.setattr(utils.threading, "main_thread", threading.Thread)  # one that does not run
            raise RuntimeError("the worker has been ended")
        return client_app.app(msg, context)

    grid.handlers = dict.fromkeys(range(5), ended)
    handed_back: list[tuple] = []
    monkeypatch.setattr(utils.signal, "pthread_kill", lambda *args: handed_back.append(args))
    with pytest.raises(UserError, match="engine has ended"):
        app.run(grid, **SETTINGS)
    if notice == "Ray's alarm":
        left, _ = signal.getitimer(signal.ITIMER_REAL)
        assert utils.RAY_ABORT < left <= utils.TIME_TO_CLOSE
        assert handed_back == [(threading.main_thread().ident, signal.SIGINT)]
    else:
        assert handed_back == []
    assert "left out" not in caplog.text
    directory = app.latest()
    assert results(directory) == results(uninterrupted)[:2]  # round 2 is not recorded
    assert (directory / "metrics.png").exists()


def test_more_rounds_than_were_first_asked_for(app, uninterrupted):
    directory = app.run(**SETTINGS | {"num_server_rounds": 2})
    assert len(results(directory)) == 3
    app.run(**SETTINGS, resume_from=str(directory))
    assert results(directory) == results(uninterrupted)
    assert same_bits(model(directory), model(uninterrupted))


def test_a_finished_run_says_so_and_writes_what_a_crash_has_kept_back(app, caplog):
    caplog.set_level("INFO", logger="flwr")
    directory = app.run(**SETTINGS)
    final = model(directory)
    (directory / "final_model.pt").unlink()
    grid = app.grid()
    app.run(grid, **SETTINGS, resume_from=str(directory))
    assert grid.sent == []
    assert any("finished" in r.message for r in caplog.records)
    assert same_bits(model(directory), final)


@pytest.mark.parametrize(
    ("key", "value"), [("seed", 1), ("learning_rate", 0.1), ("batch_size", 8), ("opt_in_probability", 1.0)]
)
def test_a_changed_setting_is_refused_with_what_it_was(app, key, value):
    directory = app.run(num_server_rounds=1)
    before = {p: p.read_bytes() for p in directory.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match=rf"(?s)another run.*{key.replace('_', '-')}: .* there, {value!r} now"):
        app.run(num_server_rounds=2, resume_from=str(directory), **{key: value})
    assert {p: p.read_bytes() for p in directory.rglob("*") if p.is_file()} == before


def test_all_differences_are_listed(app):
    directory = app.run(num_server_rounds=1)
    with pytest.raises(UserError) as error:
        app.run(num_server_rounds=2, resume_from=str(directory), seed=1, momentum=0.5)
    assert [line.split(":")[0] for line in str(error.value).splitlines()[1:]] == ["  - momentum", "  - seed"]


def test_another_model_and_other_data_under_the_same_name_are_refused(app, monkeypatch, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(app.defaults["dataset"], copy)
    directory = app.run(num_server_rounds=1, dataset=str(copy))

    with monkeypatch.context() as patch:
        bigger = server_app.task.Net
        patch.setattr(server_app.task, "Net", type("Wide", (bigger,), {}))
        patch.setattr(
            server_app.task.Net, "initial", classmethod(lambda cls, channels, classes, seed: bigger(channels, 12))
        )
        with pytest.raises(UserError, match=r"model: fc2\.bias: 'torch\.float32 \(10,\)' there"):
            app.run(num_server_rounds=2, dataset=str(copy), resume_from=str(directory))

    (copy / "data" / "test.parquet").write_bytes((copy / "data" / "train.parquet").read_bytes())
    load_test_split_once.cache_clear()
    with pytest.raises(UserError, match="test data: "):
        app.run(num_server_rounds=2, dataset=str(copy), resume_from=str(directory))


def test_what_cannot_be_resumed_is_one_clear_error(app, tmp_path):
    with pytest.raises(UserError, match="resume-from: there is no directory"):
        app.run(resume_from=str(tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="There is no checkpoint"):
        app.run(resume_from=str(tmp_path / "empty"))
    (tmp_path / "other" / "checkpoints").mkdir(parents=True)
    torch.save({"w": torch.ones(2)}, tmp_path / "other" / "checkpoints" / "last.pt")
    with pytest.raises(UserError, match="not a checkpoint of this app"):
        app.run(resume_from=str(tmp_path / "other"))


def test_a_resumed_run_goes_on_under_the_same_wandb_id(app):
    directory = app.run(num_server_rounds=1, use_wandb=True)
    app.run(num_server_rounds=2, use_wandb=True, resume_from=str(directory))
    folders = sorted(p.name for p in (directory / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    wandb_id = folders[0].split("-")[3]
    assert wandb_id in folders[1]
