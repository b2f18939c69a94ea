"""The plot of a run and its run on W&B."""

import io
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from pytorch_example_low_level import figures, server_app, utils
from pytorch_example_low_level.config import RunConfig
from tests.conftest import lines_of, results
from tests.grid import make_context
from tests.test_utils import SCORE, recorder
from tests.wandb_files import expected_history, history_of, own, records_of, wandb_folder

METRICS = ["loss", "accuracy", "accuracy_per_class"]
KEYS = figures.result_keys(METRICS, SCORE)

# -------------------------------------------------------------------------------- The plot


def rows_with(**columns: list) -> list[dict]:
    count = len(next(iter(columns.values())))
    return [figures.new_row(KEYS, r) | {key: values[r] for key, values in columns.items()} for r in range(count)]


def test_the_plot_shows_the_curves_and_leaves_out_what_is_null():
    n = None
    rows = rows_with(
        centralized_accuracy=[0.0, 0.1, 0.2, 0.3],
        centralized_loss=[2.0, n, 1.0, 0.5],
        federated_evaluate_accuracy=[n, n, 0.5, 0.6],
        federated_evaluate_accuracy_std=[n, n, 0.1, 0.2],
        federated_evaluate_accuracy_median=[n, n, 0.45, 0.55],
        federated_evaluate_accuracy_p10=[n, n, 0.4, 0.5],
        federated_evaluate_accuracy_min=[n, n, 0.3, 0.2],
        federated_evaluate_loss=[n, n, 1.5, 1.25],
        federated_evaluate_loss_std=[n, n, 0.5, 0.25],
        centralized_accuracy_per_class=[[0.5]] * 4,
    )
    left, middle, right, _ = figures.plot_results(rows, {}, SCORE).axes
    names = [(axes.get_title(), axes.get_xlabel(), axes.get_ylabel()) for axes in (left, middle)]
    assert names == [("Accuracy", "round", "accuracy"), ("Loss", "round", "loss")]
    assert right.get_title() == "Accuracy per class"

    def curves(axes) -> list:
        return [[line.get_xdata().tolist(), line.get_ydata().tolist()] for line in axes.lines]

    assert curves(left) == [
        [[0, 1, 2, 3], [0.0, 0.1, 0.2, 0.3]],
        [[2, 3], [0.5, 0.6]],
        [[2, 3], [0.3, 0.2]],
        [[2, 3], [0.4, 0.5]],
        [[2, 3], [0.45, 0.55]],
    ]
    assert curves(middle) == [[[0, 2, 3], [2.0, 1.0, 0.5]], [[2, 3], [1.5, 1.25]]]
    bands = [axes.collections[0].get_paths()[0].get_extents() for axes in (left, middle)]
    assert [[*band.intervalx, *band.intervaly] for band in bands] == [
        pytest.approx([2, 3, 0.4, 0.8]),
        pytest.approx([2, 3, 1.0, 2.0]),
    ]
    labels = [text.get_text() for text in left.get_legend().get_texts()]
    assert labels == [
        "central (test split)", "federated mean (opted-in nodes)", "± 1 std over nodes",
        "nodes: min", "nodes: p10", "nodes: median",
    ]  # fmt: skip
    assert len({(line.get_linestyle(), line.get_marker(), line.get_color()) for line in left.lines}) == 5


def test_the_plot_shows_the_accuracy_of_each_class():
    table = [None, [0.0, None, 0.5], None, [0.25, None, 1.0]]
    _, _, right, _ = figures.plot_results(
        rows_with(centralized_accuracy_per_class=table), {"names": ["a", "b", "c"]}, SCORE
    ).axes
    (image,) = right.images
    assert image.get_array().filled(-1).tolist() == [
        [0.0, -1, 0.25],
        [-1, -1, -1],
        [0.5, -1, 1.0],
    ]  # classes over rounds
    assert tuple(image.get_extent()) == (0.5, 3.5, 2.5, -0.5)  # each class and each round has a field of size 1
    assert image.get_clim() == (0, 1)
    assert [text.get_text() for text in right.get_yticklabels()] == ["a", "b", "c"]
    money = figures.plot_results(rows_with(centralized_accuracy_per_class=table), {"names": ["1 $", "2 $", "3"]}, SCORE)
    money.savefig(io.BytesIO())  # a formula in Matplotlib's eyes
    many = [str(number) for number in range(31)]
    figure = figures.plot_results(rows_with(centralized_accuracy_per_class=[[0.5] * 31]), {"names": many}, SCORE)
    assert len(figure.axes[2].get_yticks()) < 31


def test_the_plot_shows_each_metric_the_score_first():
    keys = figures.result_keys(["loss", "counts", "auc", "f1"], "auc")
    rows = [dict.fromkeys(keys) | {"round": r, "centralized_counts": [3, 70], "centralized_auc": 0.5} for r in range(3)]
    figure = figures.plot_results(rows, {}, "auc")
    assert [axes.get_title() for axes in figure.axes] == ["Auc", "Loss", "Counts", "F1", ""]  # "": the colour bar
    assert figure.axes[2].images[0].get_clim() == (3, 70)
    assert [text.get_text() for text in figure.axes[2].get_yticklabels()] == ["0", "1"]  # no fact names two elements
    assert len(figure.axes[0].lines) == 5
    figure.savefig(io.BytesIO())
    figures.plot_results([], {}, "auc").savefig(io.BytesIO())
    facts = {"shape": [1, 2], "names": ["a", "b"]}
    assert figures.element_names([0.5, 0.5], facts) == ["a", "b"]  # the only fact that fits
    assert figures.element_names([0.5, 0.5], facts | {"others": ["c", "d"]}) == ["0", "1"]


def test_long_names_are_cut_and_missing_characters_cost_no_page_of_warnings(tmp_path, recwarn):
    one = recorder(tmp_path, model={}, results=rows_with(centralized_accuracy_per_class=[[0.5, 1.0]] * 2))
    one.facts = {"names": ["a name that is much too long", "\U0001f600\u4e2d"]}
    one.draw()
    with Image.open(tmp_path / "metrics.png") as picture:
        assert (picture.format, picture.size) == ("PNG", (1920, 540))
    assert not [warning for warning in recwarn if "missing from" in str(warning.message)]
    axes = figures.plot_results(one.state.results, one.facts, SCORE).axes[2]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["a name that is much ", "\U0001f600\u4e2d"]


def test_the_plot_is_drawn_while_a_run_goes_on(tmp_path, monkeypatch):
    """At most every 30 s, since it takes a moment."""
    one = recorder(tmp_path, model={})
    now = start = one.drawn_at
    monkeypatch.setattr(utils.time, "monotonic", lambda: now)
    drawn = []

    def plot(rows, facts, score):
        drawn.append((now - start, len(rows), facts["names"]))
        return SimpleNamespace(savefig=lambda file, **options: file.write(b"picture"))

    monkeypatch.setattr(utils, "plot_results", plot)
    for server_round, now in enumerate([start + 10, start + 31, start + 40, start + 61.5]):  # noqa: B007
        one.commit(figures.new_row([], server_round))
    assert drawn == [(pytest.approx(31), 2, ["a", "b"]), (pytest.approx(61.5), 4, ["a", "b"])]
    assert (tmp_path / "metrics.png").read_bytes() == b"picture"


# ----------------------------------------------------------------------- Weights & Biases


def test_an_offline_run_holds_all_that_results_json_has(app, quick_plot, caplog):
    caplog.set_level("INFO", logger="flwr")
    settings = {"use_wandb": True, "opt_in_probability": 1.0, "wandb_project": "my-project", "evaluate_every": 2}
    directory = app.run(num_server_rounds=3, **settings)
    folder = wandb_folder(directory)
    assert [r.getMessage() for r in caplog.records if "W&B" in r.getMessage()] == [
        f"📈 W&B is offline. To upload this run later: wandb sync {folder}"
    ]
    history = history_of(folder)
    for logged, expected in zip(own(history), expected_history(directory), strict=True):
        assert logged == expected
    histograms = [values.get("client_accuracy/values") for values in history]
    assert histograms[:2] == [None, None]
    assert [(len(counts), sum(counts)) for counts in histograms[2:]] == [(20, 5)] * 2  # bins, nodes

    records = records_of(folder)
    text = "".join(map(str, records))
    for word in ("my-project", "low-level-api", "best_centralized_accuracy", "image-file", "best-model-", "best_round"):
        assert word in text
    (artifact,) = [r.artifact for r in records if r.WhichOneof("record_type") == "artifact"]
    size = (directory / "checkpoints" / "best.pt").stat().st_size
    assert [(file.path, file.size) for file in artifact.manifest.contents] == [("best.pt", size)]
    configs = [str(r.run.config) for r in records if r.WhichOneof("record_type") == "run"]
    assert "num-server-rounds" in configs[0]
    assert "dirichlet-alpha" in configs[0]
    (exit_code,) = [r.exit.exit_code for r in records if r.WhichOneof("record_type") == "exit"]
    assert exit_code == 0


def test_wandb_gets_each_round_that_it_lacks_once(tmp_path):
    """A resumed run online: W&B says at which step to go on."""
    logged = []
    run = SimpleNamespace(step=2, log=lambda values, step, commit: logged.append((values["round"], step, commit)))
    one = recorder(tmp_path, model={}, results=rows_with(centralized_accuracy_per_class=[[0.5, None]] * 4))
    one.wandb_run = run
    one.start()
    assert logged == [(2, 2, True), (3, 3, True)]


def test_the_command_that_uploads_a_run_can_be_pasted(app, monkeypatch, caplog):
    import wandb

    caplog.set_level("INFO", logger="flwr")
    run = SimpleNamespace(dir="/with space/wandb/files", disabled=False, offline=True)
    monkeypatch.setattr(wandb, "init", lambda **kwargs: run)
    utils.start_wandb(RunConfig.from_context(make_context(app.config())), Path("/with space"), "")
    assert caplog.messages == ["📈 W&B is offline. To upload this run later: wandb sync '/with space/wandb'"]


def test_a_disabled_wandb_is_called_disabled(app, quick_plot, monkeypatch, caplog):
    caplog.set_level("INFO", logger="flwr")
    import wandb

    wandb.teardown()  # W&B reads its environment once a process
    monkeypatch.setenv("WANDB_MODE", "disabled")
    app.run(use_wandb=True, num_server_rounds=1)
    wandb.teardown()
    assert [message for message in caplog.messages if "W&B" in message] == ["📈 W&B is disabled."]


def test_no_credentials_or_network_means_offline(app, quick_plot, monkeypatch, caplog):
    import wandb

    caplog.set_level("INFO", logger="flwr")
    modes = []
    real = wandb.init

    def refuse(**kwargs):
        modes.append(kwargs.get("mode"))
        if modes[-1] is None:
            raise wandb.errors.CommError("no network\nat all")
        return real(**kwargs)

    monkeypatch.setattr(wandb, "init", refuse)
    teardown = wandb.teardown
    monkeypatch.setattr(wandb, "teardown", lambda: modes.append("teardown") or teardown())
    directory = app.run(use_wandb=True, num_server_rounds=1)
    assert modes == [None, "teardown", "offline"]  # a failed attempt may still hold the id of a resumed run
    assert len(results(directory)) == 2
    said = [r.getMessage() for r in caplog.records if "W&B" in r.getMessage()]
    assert said[0] == "📈 W&B cannot go online: no network at all"
    assert said[1].startswith("📈 W&B is offline.")


@pytest.mark.parametrize("step", ["init", "log"])
def test_a_failure_of_wandb_is_said_once_and_never_stops_a_run(app, quick_plot, monkeypatch, caplog, step):
    """As when W&B's process has been killed: then the next call raises ConnectionResetError."""
    import wandb

    def fail(*args, **kwargs):
        raise ConnectionResetError("Connection lost")

    run = SimpleNamespace(id="abc", step=0, dir="/wandb/files", disabled=False, offline=True, log=fail)
    monkeypatch.setattr(wandb, "init", fail if step == "init" else lambda **kwargs: run)
    directory = app.run(use_wandb=True)
    assert len(results(directory)) == 3
    assert (directory / "final_model.pt").exists()
    said = [r.getMessage() for r in caplog.records if "continues without it" in r.getMessage()]
    assert said == ["📈 W&B failed; the run continues without it: Connection lost"]


@pytest.mark.parametrize("closing", ["works", "fails"])
def test_a_failure_while_closing_does_not_hide_what_ended_the_run(app, monkeypatch, caplog, closing):
    exit_codes = []

    def failing(error: Exception):
        def fail(*args):
            raise error

        return fail

    def finish(exit_code):
        exit_codes.append(exit_code)
        if closing == "fails":
            raise BrokenPipeError("W&B is gone")

    run = SimpleNamespace(id="abc", step=1000, summary={}, log_artifact=lambda artifact: None, finish=finish)
    monkeypatch.setattr(utils, "start_wandb", lambda *args: run)
    monkeypatch.setattr(server_app, "evaluate", failing(RuntimeError("crash")))
    if closing == "fails":
        monkeypatch.setattr(utils, "plot_results", failing(MemoryError("no memory\nat all")))
    with pytest.raises(RuntimeError, match="crash"):
        app.run(use_wandb=True)
    assert exit_codes == [1]
    parts = {"The plot": "no memory at all", "📈 W&B": "W&B is gone"} if closing == "fails" else {}
    assert lines_of(caplog) == [f"{part} failed; the run continues without it: {why}" for part, why in parts.items()]
    directory = app.latest()
    assert [row["round"] for row in results(directory)] == [0]
    assert (directory / "metrics.png").exists() == (closing == "works")
    assert not (directory / "final_model.pt").exists()
