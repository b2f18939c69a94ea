"""A run that stops and goes on is bit-identical to one that never stopped."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from flwr.app import Error, Message
from PIL import Image
from torch import nn

from pytorch_example_low_level import images, sources, task, utils
from pytorch_example_low_level.config import UserError
from tests.conftest import App, load_test_split_once, model, results, same_bits

pytestmark = pytest.mark.usefixtures("quick_plot")

ROUNDS = 2
SETTINGS = {
    "num_server_rounds": ROUNDS,
    "lr_decay_every": 1,
    "opt_in_probability": 0.8,
    "augment": True,
    "learning_rate": 0.3,
}


class Crash(BaseException):
    """Like a power cut: nothing catches it, and nothing is written after it."""


def crash_at(monkeypatch, app: App, write: int, **overrides) -> bool:
    """Run until the `write`-th file is half written. Whether the run got so far."""
    real, count = utils.replace_file, itertools.count(1)

    def crashing(path, writer):
        if next(count) >= write:
            path.with_name(f".{path.name}.part").write_bytes(b"half a fi")
            raise Crash
        real(path, writer)

    with monkeypatch.context() as patch:
        patch.setattr(utils, "replace_file", crashing)
        try:
            app.run(**SETTINGS | overrides)
        except Crash:
            return True
    return False


class Whole:
    """An uninterrupted run, and the global model after each of its rounds."""

    def __init__(self, app: App, **overrides) -> None:
        self.models: dict[int, dict[str, torch.Tensor]] = {}
        real = utils.Recorder.commit

        def commit(recorder, row, accuracies=()):
            self.models[row["round"]] = {name: tensor.clone() for name, tensor in recorder.state.model.items()}
            real(recorder, row, accuracies)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(utils.Recorder, "commit", commit)
            self.directory = app.run(**SETTINGS | overrides)
        self.rows = results(self.directory)


@pytest.fixture(scope="module")
def whole(tiny_dataset, tmp_path_factory) -> Whole:
    return Whole(App(tiny_dataset, tmp_path_factory.mktemp("uninterrupted")))


def best_round(rows: list[dict]) -> int | None:
    """The first round with the highest accuracy."""
    return max(rows, key=lambda row: (row["centralized_accuracy"], -row["round"]), default={"round": None})["round"]


def check_whole_files(directory, whole: Whole) -> list[dict]:
    """Every file that is there is whole, and the best model is that of a round in results.json. The rows."""
    for path in directory.rglob("[!.]*"):
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".pt":
            torch.load(path, weights_only=True)
        elif path.suffix == ".png":
            Image.open(path).verify()
    rows = results(directory) if (directory / "results.json").exists() else []
    assert rows == whole.rows[: len(rows)]
    if (directory / "checkpoints" / "best.pt").exists():
        best = model(directory, "checkpoints/best.pt")
        # Best so far, or still that of the rounds before the last: results.json is written first.
        candidates = {best_round(rows), best_round(rows[:-1])} - {None}
        assert any(same_bits(best, whole.models[r]) for r in candidates)
    return rows


def check_finished(directory, whole: Whole) -> None:
    assert results(directory) == whole.rows
    lines = [(each / "node_results.jsonl").read_bytes() for each in (directory, whole.directory)]
    assert lines[0] == lines[1]  # each committed round once, wherever the crash was
    assert same_bits(model(directory), whole.models[whole.rows[-1]["round"]])
    assert same_bits(model(directory, "checkpoints/best.pt"), whole.models[best_round(whole.rows)])
    assert (directory / "metrics.png").exists()
    assert not [path for path in directory.rglob("*.part") if path.name != ".last.pt.part"]


def test_a_crash_at_any_write_loses_only_the_round_in_flight(app, monkeypatch, whole):
    assert (
        len({model["fc2.bias"][0].item() for model in whole.models.values()}) == ROUNDS + 1
    )  # each round has its model
    lost = []
    for write in itertools.count(1):
        if not crash_at(monkeypatch, app, write):
            break
        directory = app.latest() if write > 1 else None
        if write <= 2:  # the configuration, the first checkpoint: nothing to go on from
            if directory:
                with pytest.raises(UserError, match=r"is not the directory of a run that has committed a round"):
                    app.run(**SETTINGS, resume_from=str(directory))
            continue
        before = check_whole_files(directory, whole)
        done = torch.load(directory / "checkpoints" / "last.pt", weights_only=True)["server_round"]
        assert len(before) in (done, done + 1)
        lost.append(ROUNDS - done)
        assert app.run(**SETTINGS, resume_from=str(directory)) == directory
        check_finished(directory, whole)
    bests = sum(best_round(whole.rows[: r + 1]) == r for r in range(ROUNDS + 1))
    assert write - 1 == 1 + 2 * (ROUNDS + 1) + bests + 2  # configuration; rounds from 0; final model and plot
    assert set(lost) == set(range(ROUNDS + 1))


def test_a_finished_run_says_so_and_makes_up_for_what_is_missing_even_after_a_crash(app, monkeypatch, whole, caplog):
    caplog.set_level("INFO", logger="flwr")
    for write in itertools.count(1):
        copy = Path(shutil.copytree(whole.directory, app.defaults["output_dir"] + f"/day/{write}"))
        for name in ("final_model.pt", "metrics.png", "results.json"):
            (copy / name).unlink()
        crashed = crash_at(monkeypatch, app, write, resume_from=str(copy))
        app.run(grid := app.grid(), **SETTINGS, resume_from=str(copy))
        assert grid.sent == []
        check_finished(copy, whole)
        if not crashed:
            break
    assert write >= 6
    assert "📂 Resuming after round 2" in caplog.messages
    assert (
        "This run is finished after round 2. To continue it, set resume-from and raise num-server-rounds."
        in caplog.messages
    )


def test_more_rounds_than_were_first_asked_for(app, whole):
    directory = app.run(**SETTINGS | {"num_server_rounds": 1})
    assert len(results(directory)) == 2
    app.run(**SETTINGS, resume_from=str(directory))
    check_finished(directory, whole)


def test_a_run_that_learned_nothing_says_so_and_stays_failed_when_resumed(app):
    def fail(msg, context):
        return Message(Error(code=5, reason=f"no {msg.metadata.message_type}"), reply_to=msg)

    grid = app.grid()
    grid.handlers = dict.fromkeys(range(5), fail)
    error = r"Nothing was learned: no round had a usable TRAIN reply\. The last fault: .* \(train\): no train$"
    resumed = {}
    for sent in (True, False):
        with pytest.raises(UserError, match=error):
            app.run(grid, num_server_rounds=1, **resumed)
        assert bool(grid.sent) == sent
        grid, directory = app.grid(), app.latest()
        resumed = {"resume_from": str(directory)}
        assert {path.name for path in directory.iterdir()} >= {"metrics.png", "results.json"}
        assert not (directory / "final_model.pt").exists()
    app.run(num_server_rounds=2, **resumed)  # now with nodes that work
    rows = results(directory)
    assert [row["train_received"] for row in rows] == [None, 0, 3]
    assert rows[1]["centralized_loss"] == rows[0]["centralized_loss"] != rows[2]["centralized_loss"]
    assert (directory / "final_model.pt").exists()


def test_what_only_says_how_a_run_is_carried_out_may_change(app):
    """Over a network, nodes may come and go, too."""
    directory = app.run(num_server_rounds=1)
    changed = {"train_timeout": 5.0, "query_timeout": 1.0, "min_available_nodes": 4, "wandb_project": "other"}
    grid = app.grid()
    grid.simulated = False
    grid.connected.remove(next(iter(grid.contexts)))
    app.run(grid, num_server_rounds=2, resume_from=str(directory), **changed)
    assert [row["nodes_available"] for row in results(directory)] == [None, 5, 4]
    assert json.loads((directory / "run_config.json").read_text())["train-timeout"] == 5.0


def test_other_frozen_parameters_are_refused(app, monkeypatch):
    values = {"conv1": 1.0, "conv2": 1.0}

    def make_model(facts):
        net = task.Net(1, 10)
        for name, value in values.items():
            nn.init.constant_(getattr(net, name).requires_grad_(False).weight, value)
        return net

    monkeypatch.setattr(task, "make_model", make_model)
    directory = app.run(num_server_rounds=1)
    for changed in ({"conv1": 2.0, "conv2": 1.0}, {"conv1": 1.0}):  # another value, and one that is not frozen
        values = changed
        with pytest.raises(UserError, match=r"- frozen parameters: '[0-9a-f]{16}' then, '[0-9a-f]{16}' now"):
            app.run(resume_from=str(directory))
    values = {"conv1": 1.0, "conv2": 1.0}
    assert len(results(app.run(resume_from=str(directory)))) == 3


def test_changed_settings_are_refused_with_what_they_were(app):
    directory = app.run(num_server_rounds=1)
    before = {p: p.read_bytes() for p in directory.rglob("*") if p.is_file()}
    changed = {"learning_rate": 0.1, "logit_adjustment": 0.0, "opt_in_probability": 1.0, "seed": 1}
    with pytest.raises(UserError) as error:
        app.run(num_server_rounds=2, resume_from=str(directory), **changed)
    hint, *differences = str(error.value).splitlines()
    assert hint == f"resume-from: the run in {directory} had other settings. Use the same ones again:"
    then = json.loads((directory / "run_config.json").read_text())
    keys = {key.replace("_", "-"): value for key, value in changed.items()}
    assert differences == [f"  - {key}: {then[key]!r} then, {value!r} now" for key, value in keys.items()]
    assert {p: p.read_bytes() for p in directory.rglob("*") if p.is_file()} == before
    with pytest.raises(UserError, match=r"split for 5 simulated nodes, and now there are 6.*num-supernodes=5 "):
        app.run(app.grid(num_nodes=6), num_server_rounds=2, resume_from=str(directory), node_wait_timeout=0.2)
    assert len(results(directory)) == 2


def test_another_model_is_refused(app, monkeypatch):
    directory = app.run(num_server_rounds=1)

    class Wide(task.Net):
        def __init__(self, in_channels: int, num_classes: int) -> None:
            super().__init__(in_channels, num_classes)
            self.conv1 = nn.Conv2d(in_channels, 16, 5, bias=False)
            self.fc2 = nn.Linear(128, 12)
            self.more = nn.Parameter(torch.zeros(2))

    monkeypatch.setattr(task, "make_model", lambda facts: Wide(1, 10))
    with pytest.raises(UserError) as error:
        app.run(num_server_rounds=2, resume_from=str(directory))
    assert [line.strip() for line in str(error.value).splitlines()[1:]] == [
        "- model: conv1.bias: 'torch.float32 (16,)' then, None now",
        "- model: fc2.weight: 'torch.float32 (10, 128)' then, 'torch.float32 (12, 128)' now",
        "- model: fc2.bias: 'torch.float32 (10,)' then, 'torch.float32 (12,)' now",
        "- model: more: None then, 'torch.float32 (2,)' now",
    ]


def test_the_same_data_at_another_path_is_accepted_and_changed_training_data_is_not(app, tmp_path):
    """With one training image less, validation images would become training images."""
    first = shutil.copytree(app.defaults["dataset"], tmp_path / "first")
    directory = app.run(num_server_rounds=1, dataset=str(first))
    second = shutil.copytree(first, tmp_path / "second")
    app.run(num_server_rounds=2, dataset=str(second), resume_from=str(directory))
    import datasets

    rows = datasets.load_dataset(str(first), split="train")
    rows.select(range(len(rows) - 1)).to_parquet(second / "data" / "train.parquet")
    load_test_split_once.cache_clear()
    sources.read.cache_clear()
    with pytest.raises(UserError, match=r"- data: '\w+' then, '\w+' now\n  data is a digest of what dataset holds"):
        app.run(num_server_rounds=3, dataset=str(second), resume_from=str(directory))


@pytest.mark.parametrize("changed", ["data", "class-names"])
def test_other_labels_are_other_data(app, monkeypatch, changed):
    """With class names in another order, nodes would number their labels in the new one."""
    directory = app.run(num_server_rounds=1)
    data = load_test_split_once(app.defaults["dataset"])
    names = data.class_names[::-1] if changed == "class-names" else data.class_names
    other = images.Split(data.images, data.labels.roll(int(changed == "data")), names)
    monkeypatch.setattr(images, "load_test_split", lambda config: other)
    with pytest.raises(UserError, match=f"- {changed}: "):
        app.run(num_server_rounds=2, resume_from=str(directory))


def test_what_cannot_be_resumed_is_one_clear_error(app, tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("nothing", "empty"):
        with pytest.raises(UserError, match="is not the directory of a run"):
            app.run(resume_from=str(tmp_path / name))
    assert not list((tmp_path / "empty").iterdir())
    (tmp_path / "other" / "checkpoints").mkdir(parents=True)
    for content in ({"w": torch.ones(2)}, [1], 7, {"identity": {}, "model": {}, "colour": "blue"}):
        torch.save(content, tmp_path / "other" / "checkpoints" / "last.pt")
        with pytest.raises(UserError, match="not a checkpoint of this version of the app"):
            app.run(resume_from=str(tmp_path / "other"))
    assert {path.name for path in (tmp_path / "other").iterdir()} == {"checkpoints", ".lock"}
