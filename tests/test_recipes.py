"""Every block of docs/recipes/, applied to a copy of the app that then runs."""

import csv
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from matplotlib.figure import Figure

from pytorch_example_low_level import figures
from recipes import PAGES, RecipeError, all_blocks, apply
from tests.conftest import same_bits
from tests.grid import FACTS, PROJECT, InProcessGrid
from tests.recipes import PacedGrid, changed_app, run

pytestmark = pytest.mark.e2e

RECIPES = all_blocks()
TEXT = "\n".join(PAGES.values())

TINY = {
    "partitioner": "iid",
    "num-server-rounds": 2,
    "fraction-clients-train": 0.6,
    "query-max-delay": 0.0,
    "use-wandb": False,
    "server-device": "cpu",
}


@pytest.fixture
def try_out(tiny_dataset, tmp_path):
    """Run an app; return its grid, the rows of results.json, the final model and the run directory."""

    def try_out(app: SimpleNamespace, grid: InProcessGrid | None = None, **overrides) -> SimpleNamespace:
        app.utils.plot_results = lambda *args: Figure(figsize=(1, 1))  # no recipe changes the plot, which takes long
        settings = {key.replace("_", "-"): value for key, value in overrides.items()}
        config = TINY | {"dataset": tiny_dataset, "output-dir": str(tmp_path / "outputs")} | settings
        grid = run(app, config, grid)
        made = [path.parent for path in (tmp_path / "outputs").glob("*/*/results.json")]
        directory = max(made, key=lambda path: (path / "results.json").stat().st_mtime_ns)
        rows = json.loads((directory / "results.json").read_text())
        model = torch.load(directory / "final_model.pt", weights_only=True)
        return SimpleNamespace(grid=grid, rows=rows, model=model, directory=directory)

    return try_out


def trained(grid: InProcessGrid) -> dict[str, list[int]]:
    """The partitions that got a TRAIN message, by round."""
    partitions: dict[str, list[int]] = {}
    for message in grid.sent:
        if message.metadata.message_type == MessageType.TRAIN:
            partitions.setdefault(message.metadata.group_id, []).append(grid.partition(message.metadata.dst_node_id))
    return partitions


def untimed(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if not key.startswith("seconds")} for row in rows]


def interrupted(app: SimpleNamespace, after: int, monkeypatch) -> None:
    """Let the next run of the app fail when it begins the round after this one."""
    wait = app.server_app.wait_for_nodes

    def fail(grid, *args, **kwargs):
        rounds = {message.metadata.group_id for message in grid.sent}
        if str(after) in rounds:
            raise KeyboardInterrupt
        return wait(grid, *args, **kwargs)

    monkeypatch.setattr(app.server_app, "wait_for_nodes", fail)


def resumed(app, try_out, tmp_path, monkeypatch, after: int, **overrides) -> SimpleNamespace:
    """Run an app, interrupted after a round, and once more to its end."""
    with monkeypatch.context() as patch:
        interrupted(app, after, patch)
        with pytest.raises(KeyboardInterrupt):
            try_out(app, **overrides)
    directory = max((tmp_path / "outputs").glob("*/*/results.json"), key=lambda p: p.stat().st_mtime_ns).parent
    return try_out(app, **overrides, resume_from=str(directory))


# -------------------------------------------------------------------------- 1. Your own model


@pytest.mark.parametrize(("recipe", "count"), [("resnet18", 11_172_810), ("transformer", 140_000)])
def test_another_model_trains(try_out, recipe, count):
    app = changed_app(recipe)
    net = app.task.make_model(FACTS)
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(count, rel=0.01)
    assert net(torch.rand(2, 1, 28, 28)).shape == (2, 10)
    colour = app.task.make_model({"image-shape": [3, 32, 32], "class-names": list("abcdefg")})
    assert colour(torch.rand(2, 3, 32, 32)).shape == (2, 7)
    done = try_out(app, num_server_rounds=1, fraction_clients_train=0.4, learning_rate=0.01, opt_in_probability=0.0)
    assert done.rows[1]["train_received"] == 2
    assert not same_bits(done.model, app.task.initial_model(FACTS, 42).state_dict())
    if recipe == "resnet18":  # BatchNorm's counters are whole numbers
        assert done.model["bn1.num_batches_tracked"].dtype == torch.int64
        assert done.model["bn1.num_batches_tracked"] > 0


# ------------------------------------------------------------------------- 2. Your own images


NAMES = ["ant", "bee", "cat"]


@pytest.fixture
def animals(tmp_path) -> Path:
    """Folders of colour images, of which a part that depends on the class is dark."""
    from PIL import Image

    rng = np.random.default_rng(0)

    def fill(folder: Path, names: list[str], count: int) -> None:
        for name in names:
            (folder / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.normal(128, 5, (32, 32, 3)).clip(0, 255)
                pixels[: 7 * (1 + NAMES.index(name))] = 20
                Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{number}.png")

    fill(tmp_path / "animals" / "train", NAMES, 20)
    fill(tmp_path / "animals" / "test", NAMES, 5)
    fill(tmp_path / "node", ["cat", "bee"], 10)  # no ants
    return tmp_path


def test_a_node_that_lacks_classes(try_out, animals):
    app = changed_app()
    grid = InProcessGrid(app.client_app.app, {}, 2)
    for context in grid.contexts.values():
        context.node_config["data-path"] = str(animals / "node")
    settings = {"dataset": str(animals / "animals"), "num_server_rounds": 5, "local_epochs": 3}
    done = try_out(app, grid, **settings, logit_adjustment=0.0, opt_in_probability=1.0)
    # Cats and bees have the server's numbers, although the node's own are others; it knows no ants.
    ants, bees, cats = done.rows[-1]["centralized_accuracy_per_class"]
    assert (ants, bees, cats) == (0.0, 1.0, 1.0)
    assert done.rows[-1]["federated_evaluate_accuracy"] == 1.0


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_table_of_paths_and_labels(try_out, animals, kind, monkeypatch):
    import pandas

    monkeypatch.chdir(animals)
    for split in ("train", "test"):
        paths = sorted(Path("animals", split).glob("*/*.png"))
        rows = [(str(path), path.parent.name, ("north", "south")[i % 2]) for i, path in enumerate(paths)]
        table = pandas.DataFrame(rows, columns=["path", "animal", "site"])
        table.to_csv(f"{split}.csv", index=False, quoting=csv.QUOTE_MINIMAL)
        table.to_parquet(f"{split}.parquet")
    code = block("table").replace('"animals"', '"table"')
    exec(code.replace('"csv"', f'"{kind}"').replace(".csv", f".{kind}"), {})
    app, how = changed_app(), {"partitioner": "natural", "partition_column": "site", "label_column": "animal"}
    grid = InProcessGrid(app.client_app.app, {}, 2)
    settings = {"num_server_rounds": 1, "fraction_clients_train": 1.0, "opt_in_probability": 1.0}
    done = try_out(app, grid, dataset=str(animals / "table"), **settings, **how)
    nodes = [json.loads(line) for line in (done.directory / "node_results.jsonl").read_text().splitlines()]
    assert [node["node"] for node in nodes] == ["north", "south"]
    about = json.loads((done.directory / "run_config.json").read_text())
    assert (about["class-names"], about["image-shape"]) == (NAMES, [3, 32, 32])
    assert done.rows[1]["train_received"] == 2


def block(recipe: str) -> str:
    """The code of a recipe that changes no file."""
    return re.search(rf"<!-- {recipe}: -->\n```python\n(.*?)```", TEXT, re.DOTALL).group(1)


def test_a_new_last_layer_on_an_old_body(try_out, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    net = changed_app().task.initial_model(
        FACTS | {"class-names": list("abcdefghijklmnopqrstuvwxyz")}, seed=7
    )  # letters
    torch.save(net.state_dict(), "old.pt")
    exec(block("initial"), {})
    start = torch.load("start.pt", weights_only=True)
    assert torch.equal(start["fc1.weight"], net.state_dict()["fc1.weight"])
    assert start["fc2.weight"].shape == (10, 128)
    assert try_out(changed_app(), initial_model=str(tmp_path / "start.pt")).rows[2]["train_received"] == 3
    with pytest.raises(Exception, match="is not a state_dict of this model"):
        try_out(changed_app(), initial_model=str(tmp_path / "old.pt"))


# ----------------------------------------------------------- 4. An optimizer on the server


def test_momentum_on_the_server_by_hand():
    app = changed_app("fedavgm")
    net = torch.nn.BatchNorm1d(1)  # weight and bias; running_mean, running_var and a counter
    state = app.utils.ServerState({}, {name: tensor.clone() for name, tensor in net.state_dict().items()})
    mean = {name: tensor + 1 for name, tensor in state.model.items()}
    state.model = app.server_app.server_step(["weight", "bias"], state, mean)  # a step of 1
    assert (state.model["weight"].item(), state.model["running_mean"].item()) == (2.0, 1.0)
    mean = {name: tensor + 1 for name, tensor in state.model.items()}
    state.model = app.server_app.server_step(["weight", "bias"], state, mean)  # 1 + 0.9 * 1
    assert state.model["weight"].item() == pytest.approx(3.9)
    assert (state.model["running_mean"].item(), state.model["num_batches_tracked"].item()) == (2.0, 2)


@pytest.mark.parametrize("recipes", [("fedavgm",), ("fedavgm", "fedadam")])
def test_the_server_optimizer_survives_a_resume(try_out, tmp_path, monkeypatch, recipes):
    app = changed_app(*recipes)
    whole = try_out(app, num_server_rounds=3)
    again = resumed(app, try_out, tmp_path, monkeypatch, after=2, num_server_rounds=3)
    assert same_bits(again.model, whole.model)
    assert untimed(again.rows) == untimed(whole.rows)
    checkpoint = torch.load(again.directory / "checkpoints" / "last.pt", weights_only=True)
    assert len(checkpoint["optimizer"]["state"]) == len(whole.model)
    assert not same_bits(whole.model, try_out(changed_app(), num_server_rounds=3).model)


# ------------------------------------------------------------------------------ 5. FedProx


def test_the_proximal_term_keeps_a_model_near_its_start(try_out):
    app, start = changed_app("fedprox"), changed_app().task.initial_model(FACTS, 42).state_dict()
    settings = {"num_server_rounds": 1, "local_epochs": 3, "opt_in_probability": 0.0}
    plain = try_out(changed_app(), **settings)
    drifts = []
    for mu in (0.0, 10.0):
        done = try_out(app, **settings, proximal_mu=mu)
        drifts.append(sum((done.model[name] - start[name]).square().sum().item() for name in start))
        if mu == 0.0:
            assert same_bits(done.model, plain.model)
            assert done.rows[1]["train_loss"] == plain.rows[1]["train_loss"]
    assert drifts[0] > drifts[1]


# ---------------------------------------------------------------------- 6. The first K of N


def test_the_first_of_the_cohort_make_the_round(try_out, caplog):
    app = changed_app("first-k")
    paces = [1.0, 1.0, 1.0, 500.0]  # the last one is a straggler
    plain = changed_app()
    config = app.defaults
    slow = try_out(plain, PacedGrid(plain, config, paces), fraction_clients_train=1.0)
    quick = try_out(app, PacedGrid(app, config, paces), fraction_clients_train=1.0)
    assert [row["train_received"] for row in slow.rows[1:]] == [4, 4]
    assert [row["train_received"] for row in quick.rows[1:]] == [3, 3]
    assert [row["train_failed"] for row in quick.rows[1:]] == [0, 0]
    assert sum(row["seconds_train"] for row in slow.rows[1:]) > 999
    assert sum(row["seconds_train"] for row in quick.rows[1:]) < 5
    assert "left out" not in caplog.text.split("Starting round")[-1]


# ----------------------------------------------------- 7. Buffered asynchronous rounds


def test_a_stale_update_counts_less(try_out, monkeypatch):
    app = changed_app("fedbuff")
    monkeypatch.setattr(app.server_app, "BUFFER", 1)

    def add_one(message, context):
        if message.metadata.message_type != MessageType.TRAIN:
            return app.client_app.app(message, context)
        arrays = message.content["arrays"].to_torch_state_dict()
        trained = app.messaging.to_array_record({name: tensor + 1 for name, tensor in arrays.items()})
        metrics = MetricRecord({"train_loss": 0.5, "num-examples": 1})
        return Message(RecordDict({"arrays": trained, "metrics": metrics}), reply_to=message)

    grid = PacedGrid(app, app.defaults, [1.0, 2.5])
    grid.handlers = {0: add_one, 1: add_one}
    done = try_out(app, grid, num_server_rounds=3, fraction_clients_train=1.0, evaluate_every=9)
    # The quick node adds 1 at 1 s and at 2 s. At 2.5 s, the slow one's update is two rounds old.
    start = app.task.initial_model(FACTS, 42).state_dict()
    for name, tensor in done.model.items():
        assert torch.allclose(tensor - start[name], torch.tensor(2 + 3**-0.5), atol=1e-5)
    assert trained(grid) == {"1": [0, 1], "2": [0], "3": [0]}
    assert [row["train_received"] for row in done.rows[1:]] == [1, 1, 1]
    assert sum(row["seconds_train"] for row in done.rows[1:]) == pytest.approx(2.5, abs=0.1)


def test_nodes_are_at_work_all_the_time(try_out):
    app = changed_app("fedbuff")
    grid = PacedGrid(app, app.defaults, [1.0] * 8 + [7.0] * 2)
    done = try_out(app, grid, num_server_rounds=8, fraction_clients_train=0.8, evaluate_every=9)
    assert all(row["train_received"] >= 4 for row in done.rows[1:])  # half of those at work
    sampled, received = ([row[f"train_{key}"] for row in done.rows[1:]] for key in ("sampled", "received"))
    assert sampled == [8, *received[:-1]]  # whoever is done makes room for another
    assert not any(row["train_failed"] or row["train_rejected"] for row in done.rows[1:])
    assert sum(row["seconds_train"] for row in done.rows[1:]) < 14
    assert {8, 9} & {partition for round_ in trained(grid).values() for partition in round_}


def test_fedbuff_has_min_train_nodes_at_work_and_does_not_wait_for_all_of_a_few(try_out):
    app = changed_app("fedbuff")
    few = try_out(app, PacedGrid(app, app.defaults, [1.0] * 5), fraction_clients_train=0.2, evaluate_every=9)
    assert [row["train_sampled"] for row in few.rows[1:]] == [2, 2]
    slow = PacedGrid(app, app.defaults, [1.0, 1.0, 1.0, 500.0])
    done = try_out(app, slow, num_server_rounds=3, fraction_clients_train=1.0, evaluate_every=9)
    assert [row["train_sampled"] for row in done.rows[1:]] == [4, 3, 3]
    assert sum(row["seconds_train"] for row in done.rows[1:]) < 5


def test_a_node_whose_reply_is_lost_gets_another_model_after_the_deadline(try_out, caplog):
    app = changed_app("fedbuff")
    grid = PacedGrid(app, app.defaults, [1.0] * 4)
    grid.handlers = {0: lambda msg, ctx: None if msg.metadata.group_id == "1" else app.client_app.app(msg, ctx)}
    settings = {"num_server_rounds": 8, "fraction_clients_train": 1.0, "evaluate_every": 9, "train_timeout": 3.5}
    done = try_out(app, grid, **settings)
    assert [round_ for round_, partitions in trained(grid).items() if 0 in partitions] == ["1", "5", "6", "7", "8"]
    assert [row["train_failed"] for row in done.rows[1:]] == [0, 0, 0, 1, 0, 0, 0, 0]
    assert "Round 4: left out partition 0 (train): no reply within 3.5 s" in caplog.text


# ----------------------------------------------------------------- 8. Differential privacy


def test_clipping_and_noise_by_hand():
    pytest.importorskip("dp_accounting")
    private_mean = changed_app("dp").server_app.private_mean
    model = {"w": torch.zeros(20_000), "counter": torch.tensor(3)}
    ones = {"w": torch.zeros(20_000).index_fill(0, torch.tensor([0]), 100.0), "counter": torch.tensor(9)}
    config = SimpleNamespace(clip_norm=2.0, noise_multiplier=1e-9)
    # Two of four nodes replied: (2 + 2) / 4, whatever their number of examples.
    exact = private_mean([(ones, 1), (ones, 1000)], model, ["w"], 4, config)
    assert exact["w"][0].item() == pytest.approx(1.0, abs=1e-6)
    assert exact["counter"] == 3
    with pytest.raises(ValueError, match=r"not finite: register a mask of -inf as a buffer"):
        private_mean([(ones, 1)], model | {"w": torch.full((20_000,), -torch.inf)}, ["w"], 4, config)
    config.noise_multiplier = 0.5
    noisy = [private_mean([], model, ["w"], 4, config)["w"] for _ in range(2)]
    assert noisy[0].std().item() == pytest.approx(0.5 * 2 * 2 / 4, rel=0.05)
    assert not torch.equal(*noisy)


def test_epsilon_is_that_of_the_accountant_after_a_resume_too(try_out, tmp_path, monkeypatch):
    pytest.importorskip("dp_accounting")
    from dp_accounting import GaussianDpEvent, SampledWithoutReplacementDpEvent
    from dp_accounting.privacy_accountant import NeighboringRelation
    from dp_accounting.rdp import RdpAccountant

    app = changed_app("dp")
    settings = {"num_server_rounds": 2, "noise_multiplier": 2.0}
    again = resumed(app, try_out, tmp_path, monkeypatch, after=1, **settings)
    accountant = RdpAccountant(neighboring_relation=NeighboringRelation.REPLACE_ONE)
    expected = []
    for _ in range(2):
        accountant.compose(SampledWithoutReplacementDpEvent(5, 3, GaussianDpEvent(2.0)))
        expected.append(accountant.get_epsilon(1e-3))
    assert [row["epsilon"] for row in again.rows] == [None, *map(pytest.approx, expected)]
    with pytest.raises(Exception, match="noise-multiplier"):
        try_out(app, **settings | {"noise_multiplier": 1.0}, resume_from=str(again.directory))


@pytest.mark.parametrize("frozen", [False, True])
def test_noise_is_added_to_trained_parameters_and_not_to_statistics(try_out, frozen):
    pytest.importorskip("dp_accounting")
    app = changed_app("dp")

    class Normalised(torch.nn.Module):
        def __init__(self, facts) -> None:
            super().__init__()
            self.norm = torch.nn.BatchNorm2d(1).requires_grad_(not frozen)
            self.net = app.task.Net(facts["image-shape"][0], len(facts["class-names"]))

        def train(self, mode: bool = True):
            super().train(mode)
            self.norm.train(mode and not frozen)
            return self

        def forward(self, x):
            return self.net(self.norm(x))

    app.task.make_model = Normalised
    if frozen:
        done = try_out(app, noise_multiplier=10.0)
        assert (done.model["norm.running_mean"].item(), done.model["norm.running_var"].item()) == (0.0, 1.0)
        start = app.task.initial_model(FACTS, 42).state_dict()
        assert (done.model["net.fc2.bias"] - start["net.fc2.bias"]).std() > 3
    else:
        grid = InProcessGrid(app.client_app.app, {}, 5)
        with pytest.raises(app.config.UserError, match=r"update statistics, which are not private: \['norm'\]"):
            try_out(app, grid)
        assert not grid.sent


def test_delta_is_below_one_by_the_number_of_nodes(try_out, monkeypatch):
    pytest.importorskip("dp_accounting")
    app = changed_app("dp")
    monkeypatch.setattr(app.server_app, "DELTA", 0.2)
    grid = InProcessGrid(app.client_app.app, {}, 5)
    with pytest.raises(app.config.UserError, match=r"DELTA is 0\.2, but with 5 nodes it must be below 0\.2"):
        try_out(app, grid)
    assert not grid.sent


@pytest.mark.parametrize("recipes", [("quantise",), ("quantise", "bfloat16"), ("scaffold",)])
def test_a_bfloat16_model_trains(try_out, recipes):
    app = changed_app(*recipes)
    whole = app.task.make_model

    class Half(torch.nn.Module):
        """Computes in bfloat16; its input and its output are float32."""

        def __init__(self, facts) -> None:
            super().__init__()
            self.net = whole(facts).bfloat16()

        def forward(self, x):
            return self.net(x.bfloat16()).float()

    app.task.make_model = Half
    done = try_out(app, opt_in_probability=0.0)
    assert [row["train_received"] for row in done.rows[1:]] == [3, 3]
    assert {tensor.dtype for tensor in done.model.values()} == {torch.bfloat16}
    start = app.task.initial_model(FACTS, 42).state_dict()
    assert not same_bits(done.model, start)


AGGREGATING = [(name,) for name in ("median", "trimmed-mean", "multi-krum", "norm-clipping", "fedbuff", "first-k")]
AGGREGATING += [("secure-sum",), ("fedavgm",), ("scaffold",), ("quantise",), ("quantise", "bfloat16"), ("dp",)]


@pytest.mark.parametrize("recipes", AGGREGATING)
def test_a_buffer_of_booleans_stays_as_it_is(try_out, recipes):
    app = changed_app(*recipes)

    class Masked(torch.nn.Module):
        def __init__(self, facts) -> None:
            super().__init__()
            self.net = app.task.Net(facts["image-shape"][0], len(facts["class-names"]))
            self.register_buffer("mask", torch.tensor([True, False]))

        def forward(self, x):
            return self.net(x)

    app.task.make_model = Masked
    done = try_out(app, num_server_rounds=1, fraction_clients_train=1.0)
    assert done.rows[1]["train_received"] >= 3
    assert done.model["mask"].tolist() == [True, False]
    start = app.task.initial_model(FACTS, 42).state_dict()
    assert not torch.equal(done.model["net.fc2.bias"], start["net.fc2.bias"])


# ------------------------------------------------------------------------ 9. A personal head


def test_each_node_keeps_a_head_of_its_own(try_out):
    app = changed_app("personal-head")
    settings = {"fraction_clients_train": 1.0, "opt_in_probability": 1.0}
    done = try_out(app, **settings)
    plain = try_out(changed_app(), **settings)
    assert same_bits(done.model, plain.model)  # the global model knows nothing of the heads
    heads = [context.state["head"].to_torch_state_dict()["weight"] for context in done.grid.contexts.values()]
    assert len(heads) == 5
    assert not torch.equal(heads[0], heads[1])
    assert all(0 <= row["federated_evaluate_personal_accuracy"] <= 1 for row in done.rows[1:])
    assert "federated_evaluate_personal_accuracy" not in done.rows[0]


# --------------------------------------------------------------------------- 10. Stop early


def test_stop_at_a_target(try_out):
    app = changed_app("early-stop")
    done = try_out(app, num_server_rounds=9, target_accuracy=0.01)
    assert [row["round"] for row in done.rows] == [0, 1]
    again = try_out(app, num_server_rounds=9, target_accuracy=0.01, resume_from=str(done.directory))
    assert untimed(again.rows) == untimed(done.rows)
    assert not again.grid.sent
    more = try_out(app, num_server_rounds=2, target_accuracy=2.0, resume_from=str(done.directory))
    assert [row["round"] for row in more.rows] == [0, 1, 2]
    # Without test data, there is no score before the first federated evaluation.
    late = try_out(changed_app("no-test-data", "early-stop"), evaluate_every=2, opt_in_probability=1.0)
    assert [row["round"] for row in late.rows] == [0, 1, 2]


def test_stop_without_progress_even_across_a_resume(try_out, tmp_path, monkeypatch):
    app = changed_app("early-stop")
    settings = {"num_server_rounds": 20, "target_accuracy": 2.0, "patience": 3, "learning_rate": 1e-9}
    whole = try_out(app, **settings)
    best = whole.rows[0]["centralized_accuracy"]
    assert all(row["centralized_accuracy"] == best for row in whole.rows)
    assert len(whole.rows) - 1 == 3  # the initial model is the best, and three rounds are not better
    again = resumed(app, try_out, tmp_path, monkeypatch, after=2, **settings)
    assert untimed(again.rows) == untimed(whole.rows)


# ------------------------------------------------------------------------- 11. Choose nodes


def test_nodes_by_name(try_out, monkeypatch):
    app = changed_app("by-name")
    grid = InProcessGrid(app.client_app.app, {}, 5)
    get_nodes = grid.get_nodes

    def named():
        nodes = get_nodes()
        for node in nodes:
            node.name = f"hospital-{node.node_id}" if grid.partition(node.node_id) in (1, 3, 4) else "clinic"
        return nodes

    monkeypatch.setattr(grid, "get_nodes", named)
    done = try_out(app, grid, num_server_rounds=1, fraction_clients_train=1.0)
    assert trained(done.grid) == {"1": [1, 3, 4]}


def test_nodes_by_their_configuration(try_out):
    app = changed_app("by-node-config")
    grid = InProcessGrid(app.client_app.app, {}, 5)
    for context in grid.contexts.values():
        if grid.partition(context.node_id) in (0, 3):
            context.node_config["site"] = "north"
    done = try_out(app, grid, num_server_rounds=1, fraction_clients_train=1.0)
    assert trained(done.grid) == {"1": [0, 3]}


# --------------------------------------- 12. Optimizer, setting, metric, rate for each node


def test_another_optimizer_with_its_setting(try_out):
    app = changed_app("adamw")
    models = [try_out(app, num_server_rounds=1, weight_decay=decay).model for decay in (0.0, 1.0)]
    norms = [sum(tensor.square().sum().item() for tensor in model.values()) for model in models]
    assert norms[0] > norms[1]
    assert app.defaults["learning-rate"] == 0.001
    with pytest.raises(Exception, match=r"weight-decay: Input should be less than or equal to 1; it is 2\.0"):
        try_out(app, weight_decay=2.0)


def test_a_metric_of_ones_own_reaches_log_results_plot_and_wandb(try_out, monkeypatch, caplog):
    caplog.set_level("INFO", logger="flwr")
    app = changed_app("balanced")
    logged = []
    fake = SimpleNamespace(id="abc", step=0, log=lambda values, **_: logged.append(values))
    monkeypatch.setattr(app.utils, "start_wandb", lambda *args: fake)
    monkeypatch.setattr(app.utils.Recorder, "close", lambda recorder: None)
    done = try_out(app, opt_in_probability=1.0, use_wandb=True)
    for key in ("centralized_balanced_accuracy", "federated_evaluate_balanced_accuracy"):
        values = [row[key] for row in done.rows]
        assert (values[0] is None) == key.startswith("fed")
        assert all(0 <= value <= 1 for value in values[1:])
        assert [row.get(key) for row in logged] == values
        assert values[2] != done.rows[2][key.replace("balanced_", "")]
    assert done.rows[2]["federated_evaluate_balanced_accuracy_std"] > 0
    assert "/  balanced_accuracy:  0." in caplog.text
    assert "/ balanced_accuracy: 0." in caplog.text
    monkeypatch.undo()
    titles = [axes.get_title() for axes in figures.plot_results(done.rows, {}, "accuracy").axes]
    assert titles[:4] == ["Accuracy", "Loss", "Accuracy per class", "Balanced accuracy"]


def test_f1_auc_and_the_confusion_matrix_by_hand(try_out):
    pytest.importorskip("sklearn")
    app = changed_app("metrics")
    # Class 0: one of two is found. Class 1: found, and class 0's other one is taken for it. Class 2: missing.
    logits = torch.tensor([[3.0, 0.0, 0.0], [0.0, 3.0, 0.0], [1.0, 2.0, 0.0]])
    further = app.task.further_metrics(logits, torch.tensor([0, 0, 1]))
    assert further["f1_per_class"] == [pytest.approx(2 / 3), pytest.approx(2 / 3), None]
    assert further["auc"] == pytest.approx(0.5)  # each: one of two pairs is in the right order
    assert further["confusion"] == [1, 1, 0, 0, 1, 0, 0, 0, 0]
    # A class that is predicted, but has no examples, has no F1 either.
    further = app.task.further_metrics(torch.eye(3), torch.tensor([0, 0, 1]))
    assert further["f1_per_class"] == [pytest.approx(2 / 3), 0, None]
    done = try_out(app, opt_in_probability=1.0)
    names: dict = {}
    exec(block("confusion").replace("outputs/2026-11-24/10-00-00", str(done.directory)), names)
    assert names["matrix"].sum() == 40  # test images
    assert np.trace(names["matrix"]) / 40 == done.rows[-1]["centralized_accuracy"]
    assert len(done.rows[-1]["federated_evaluate_f1_per_class"]) == 10
    assert 0 <= done.rows[-1]["federated_evaluate_auc"] <= 1


def test_a_learning_rate_that_differs_by_node(try_out):
    app, plain = changed_app("lr-scale"), changed_app()
    settings = {"num_server_rounds": 1, "opt_in_probability": 0.0}
    halved = InProcessGrid(app.client_app.app, {}, 5)
    for context in halved.contexts.values():
        context.node_config["lr-scale"] = 0.5
    assert same_bits(try_out(app, **settings).model, try_out(plain, **settings).model)
    slow = try_out(plain, **settings, learning_rate=0.025)
    assert same_bits(try_out(app, halved, **settings).model, slow.model)


# ------------------------------------------------------- 13. to 15. The round's own parts


def test_nodes_take_turns(try_out):
    done = try_out(changed_app("turns"), num_server_rounds=5, fraction_clients_train=0.4)
    assert trained(done.grid) == {"1": [0, 1], "2": [2, 3], "3": [0, 4], "4": [1, 2], "5": [3, 4]}


@pytest.mark.parametrize(
    "recipes", [("by-node-config",), ("by-node-config", "turns"), ("battery", "turns"), ("by-name",)]
)
def test_rounds_without_a_node_to_choose_train_nobody(try_out, caplog, recipes):
    app = changed_app(*recipes)
    grid = InProcessGrid(app.client_app.app, {}, 5)

    def north_and_full_in_round_2(msg: Message, context: Context) -> Message:
        if not msg.metadata.message_type.startswith("query."):
            return app.client_app.app(msg, context)
        chosen = msg.metadata.group_id == "2"
        answer = ConfigRecord({"site": "north" * chosen, "level": float(chosen)})
        return Message(RecordDict({"config": answer}), reply_to=msg)

    grid.handlers = dict.fromkeys(range(5), north_and_full_in_round_2)
    if recipes == ("by-name",):
        with pytest.raises(Exception, match="Nothing was learned"):
            try_out(app, grid)
        assert trained(grid) == {}
    else:
        done = try_out(app, grid, num_server_rounds=3)
        assert trained(grid).keys() == {"2"}
        assert [row["train_sampled"] for row in done.rows[1:]] == [0, 3, 0]
    assert "Round 1: no usable TRAIN reply; the global model stays as it is." in caplog.text


def test_one_more_phase_and_a_round_without_a_cohort(try_out, caplog):
    app = changed_app("battery")
    grid = InProcessGrid(app.client_app.app, {}, 5)

    def empty_at_first(msg: Message, context: Context) -> Message:
        if msg.metadata.message_type == "query.battery" and msg.metadata.group_id == "1":
            return Message(RecordDict(), reply_to=msg)
        return app.client_app.app(msg, context)

    full = ConfigRecord({"level": "full"})  # no number
    grid.handlers = {0: empty_at_first, 1: lambda msg, context: Message(RecordDict({"config": full}), reply_to=msg)}
    done = try_out(app, grid, fraction_clients_train=1.0)
    # Partition p has a level of 1 / (1 + p): only that of partition 0 is above one half.
    assert trained(done.grid) == {"2": [0]}
    assert [row["train_sampled"] for row in done.rows[1:]] == [0, 1]
    assert "left out partition 0 (query.battery): unreadable reply" in caplog.text


# -------------------------------------------------------------------------- 16. Another task


@pytest.mark.parametrize("recipes", [("tabular",), ("tabular", "regression")])
def test_a_table_is_learned(try_out, recipes):
    pytest.importorskip("sklearn")
    app = changed_app(*recipes)
    grid = InProcessGrid(app.client_app.app, {}, 8)
    done = try_out(app, grid, num_server_rounds=10, fraction_clients_train=0.5, opt_in_probability=1.0)
    score = app.task.SCORE
    assert score == ("r2" if "regression" in recipes else "auc")
    assert [row["train_received"] for row in done.rows[1:]] == [4] * 10
    assert done.rows[-1][f"centralized_{score}"] > (0.3 if score == "r2" else 0.98)
    nodes = [json.loads(line) for line in (done.directory / "node_results.jsonl").read_text().splitlines()]
    assert {node["node"] for node in nodes} == {f"partition {number}" for number in range(8)}
    of_last = [node[score] for node in nodes if node["round"] == 10]
    assert done.rows[-1][f"federated_evaluate_{score}_min"] == min(of_last)
    settings = json.loads((done.directory / "run_config.json").read_text())
    assert settings["num-features"] == (10 if score == "r2" else 30)


def test_a_node_with_one_class_has_no_auc(try_out):
    pytest.importorskip("sklearn")
    task = changed_app("tabular").task
    data = task.Data(torch.zeros(4, 30), torch.zeros(4, dtype=torch.int64))
    assert task.test(task.make_model({"num-features": 30, "num-targets": 2}), data, torch.device("cpu"))["auc"] is None


@pytest.mark.parametrize("recipes", [("metrics",), ("tabular",), ("tabular", "regression")])
def test_a_diverged_model_has_no_metrics_and_the_run_goes_on(try_out, recipes):
    """Its numbers are finite, but the sums in its layers are not."""
    pytest.importorskip("sklearn")
    app = changed_app(*recipes)
    grid = InProcessGrid(app.client_app.app, {}, 5)

    def diverge(message: Message, context: Context) -> Message:
        reply = app.client_app.app(message, context)
        if (message.metadata.message_type, message.metadata.group_id) == ("train", "1"):
            arrays = reply.content["arrays"].to_torch_state_dict()
            huge = {name: tensor.sign() * 1e30 if "num_" not in name else tensor for name, tensor in arrays.items()}
            reply.content["arrays"] = app.messaging.to_array_record(huge)
        return reply

    grid.handlers = dict.fromkeys(range(5), diverge)
    done = try_out(app, grid, opt_in_probability=1.0)
    assert [row["round"] for row in done.rows] == [0, 1, 2]
    assert done.rows[0][f"centralized_{app.task.SCORE}"] is not None
    for name in ["loss", *({"auc", "r2"} & {key.removeprefix("centralized_") for key in done.rows[0]})]:
        assert [row[f"centralized_{name}"] for row in done.rows[1:]] == [None, None], name


def test_the_next_character_is_learned(try_out, tmp_path):
    app = changed_app("text")
    sources = Path(app.task.__file__).parent
    texts = [path for path in sources.glob("*.py") if path.name != "config.py" and path.stat().st_size > 1000]
    grid = InProcessGrid(app.client_app.app, {}, len(texts))
    settings = {"fraction_clients_train": 1.0, "opt_in_probability": 1.0, "text_folder": str(sources)}
    done = try_out(app, grid, num_server_rounds=1, **settings)
    losses = [row["centralized_loss"] for row in done.rows]
    assert losses[0] == pytest.approx(math.log(256), rel=0.05)
    assert losses[-1] < 4
    assert done.rows[-1]["centralized_negative_loss"] == -losses[-1]
    assert '"node": "messaging.py"' in (done.directory / "node_results.jsonl").read_text()
    with pytest.raises(Exception, match=f"split for {len(texts)} simulated nodes, and now there are 5"):
        try_out(app, fraction_clients_train=1.0, text_folder=str(sources))


@pytest.mark.parametrize("recipes", [("tabular",), ("tabular", "regression"), ("text",)])
def test_another_task_changes_nothing_but_task_and_settings(recipes):
    touched = {block.file for recipe in recipes for block in RECIPES[recipe]}
    assert touched <= {"task.py", "config.py", "pyproject.toml"}


# ------------------------------------------------------------- 17. A server without test data


def test_without_test_data_the_best_model_is_that_of_the_best_federated_score(try_out, tmp_path, monkeypatch):
    app = changed_app("no-test-data")
    done = resumed(app, try_out, tmp_path, monkeypatch, 3, num_server_rounds=4, opt_in_probability=1.0)
    rows = done.rows
    assert {row[key] for row in rows for key in ("centralized_loss", "centralized_accuracy")} == {None}
    assert rows[0]["federated_evaluate_accuracy"] is None
    assert [row["evaluate_received"] for row in rows[1:]] == [5] * 4
    state = torch.load(done.directory / "checkpoints" / "last.pt", weights_only=True)
    best = max(rows[1:], key=lambda row: row["federated_evaluate_accuracy"])
    assert (state["best_round"], state["best_score"]) == (best["round"], best["federated_evaluate_accuracy"])
    # The model in best.pt is the one that the nodes evaluated in that round.
    sent = [m for m in done.grid.sent if m.metadata.message_type == "evaluate"]
    model = torch.load(done.directory / "checkpoints" / "best.pt", weights_only=True)
    assert any(same_bits(message.content["arrays"].to_torch_state_dict(), model) for message in sent)
    settings = json.loads((done.directory / "run_config.json").read_text())
    assert (settings["image-shape"], len(settings["class-names"])) == ([1, 28, 28], 10)


def test_without_test_data_a_round_without_an_evaluation_is_never_the_best(try_out):
    done = try_out(changed_app("no-test-data"), opt_in_probability=0.0)
    assert [row["federated_evaluate_accuracy"] for row in done.rows] == [None] * 3
    assert not (done.directory / "checkpoints" / "best.pt").exists()


# --------------------------------------------------------------------------- The document


def test_every_recipe_has_a_test():
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    assert len(RECIPES) >= 17
    for recipe in RECIPES:
        assert f'"{recipe}"' in tests, recipe
        assert f"**{recipe}**" in TEXT, recipe


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_a_few_lines(recipe):
    code = [line for block in RECIPES[recipe] for line in block.text.splitlines()]
    changed = [line for line in code if line.strip() and line[0] not in "-@"]
    limits = {"tabular": 120, "text": 120, "resnet18": 6, "transformer": 6, "secure-sum": 240}
    assert len(changed) <= limits.get(recipe, 50)
    assert max(map(len, code)) <= 121  # a line of the app, and a sign


def test_a_page_is_short_and_the_index_links_each():
    for name, page in PAGES.items():
        assert len(page.splitlines()) <= 200, name
        assert name == "README.md" or f"]({name}" in PAGES["README.md"], name


def test_recipes_that_cannot_be_combined_are_recipes():
    table = PAGES["README.md"].split("## Recipes that cannot be combined")[1]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("|")][2:]
    assert len(rows) > 10
    names = {name for recipe, others, _ in rows for name in [recipe, *others.split(", ")]} - {"the rules"}
    assert names <= RECIPES.keys()


# -------------------------------------------------------------------------------- The command


@pytest.fixture
def copy(tmp_path) -> Path:
    shutil.copytree(PROJECT / "pytorch_example_low_level", tmp_path / "pytorch_example_low_level")
    shutil.copy(PROJECT / "pyproject.toml", tmp_path)
    return tmp_path


def command(*args: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "recipes", *map(str, args)], cwd=PROJECT, capture_output=True, text=True, check=False
    )


def test_the_command_that_applies_a_recipe(copy):
    assert sorted(line.split()[0] for line in command("--list").stdout.splitlines()) == sorted(RECIPES)
    assert command("fedprox", copy).returncode == 0
    assert "proximal-mu = 0.01" in (copy / "pyproject.toml").read_text()
    assert "config.proximal_mu" in (copy / "pytorch_example_low_level" / "task.py").read_text()


def test_a_recipe_that_does_not_fit_changes_nothing(copy):
    """Only the last block, for pyproject.toml, does not fit."""
    path = copy / "pyproject.toml"
    path.write_text(path.read_text().replace("momentum = 0.9 ", "momentum = 0.8 "))
    before = {file: file.read_text() for file in copy.rglob("*.*")}
    done = command("fedprox", copy)
    assert done.returncode == 1
    assert "fedprox does not fit" in done.stderr
    assert "momentum = 0.9" in done.stderr
    assert {file: file.read_text() for file in copy.rglob("*.*")} == before


def test_a_recipe_that_only_adds_lines_is_applied_once(copy):
    apply("balanced", copy)
    with pytest.raises(RecipeError, match=r"(?s)already in it:\n.*balanced_accuracy"):
        apply("balanced", copy)


@pytest.mark.parametrize(
    ("first", "second", "lost"),
    [
        ("norm-clipping", "median", "'weighted_mean', which norm-clipping changed"),
        ("dp", "secure-sum", "'train', which dp changed"),  # dp changed some lines of it
        ("fedprox", "tabular", "'train', which fedprox changed"),
    ],
)
def test_a_recipe_does_not_replace_what_another_one_changed(copy, first, second, lost):
    apply(first, copy)
    before = {file: file.read_text() for file in copy.rglob("*.*")}
    with pytest.raises(RecipeError, match=f"nothing was changed: it would replace {lost}"):
        apply(second, copy)
    assert {file: file.read_text() for file in copy.rglob("*.*")} == before


def test_a_recipe_that_nothing_would_use_changes_nothing(copy):
    apply("dp", copy)  # it calls another function than `weighted_mean`
    before = (copy / "pytorch_example_low_level" / "server_app.py").read_text()
    with pytest.raises(RecipeError, match="median changes nothing here, because nothing uses weighted_mean"):
        apply("median", copy)
    assert (copy / "pytorch_example_low_level" / "server_app.py").read_text() == before
    with pytest.raises(RecipeError, match="bfloat16 does not fit"):
        apply("bfloat16", copy)  # without quantise
    (copy / "pytorch_example_low_level" / "client_app.py").write_text("def f(:")
    with pytest.raises(RecipeError, match=r"client_app\.py is not Python: invalid syntax"):
        apply("turns", copy)


def test_what_the_command_refuses(copy, tmp_path):
    apply("fedprox", copy)
    with pytest.raises(RecipeError, match=r"does not fit .* already in it"):
        apply("fedprox", copy)  # it is there already
    with pytest.raises(RecipeError, match="there is no recipe 'fedprix'"):
        apply("fedprix", copy)
    with pytest.raises(RecipeError, match="is not a folder of the app"):
        apply("fedprox", tmp_path / "nowhere")
