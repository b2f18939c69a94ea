"""The whole loop on an in-process Grid that runs the real ClientApp."""

import json
import math
import time

import pandas as pd
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from torch import nn

from pytorch_example_low_level import client_app, figures, images, server_app, task
from pytorch_example_low_level.config import CODE
from pytorch_example_low_level.utils import frozen_digest
from tests.conftest import model, results, same_bits
from tests.grid import FACTS, InProcessGrid, TimedGrid, typed_config

pytestmark = pytest.mark.usefixtures("quick_plot")


RESULT_KEYS = tuple(figures.result_keys(["loss", "accuracy", "accuracy_per_class"], server_app.SCORE))
FEDERATED = [key for key in RESULT_KEYS if key.startswith("federated")]


def by_round(grid: InProcessGrid, message_type: str) -> dict[int, list[Message]]:
    """The messages of a type that were sent, by round."""
    found: dict[int, list[Message]] = {}
    for message in grid.sent:
        if message.metadata.message_type == message_type:
            found.setdefault(int(message.metadata.group_id), []).append(message)
    return found


def test_a_run_leaves_the_promised_figures(app):
    """Which files there are is compared with the reference, in test_docs.py."""
    directory = app.run(num_server_rounds=3, lr_decay_every=2, opt_in_probability=1.0)
    rows = results(directory, times=True)
    assert [row["round"] for row in rows] == [0, 1, 2, 3]
    assert [row["lr"] for row in rows] == [None, 0.05, 0.05, 0.025]
    assert all(tuple(row) == RESULT_KEYS for row in rows)
    assert all(value is None for key, value in rows[0].items() if key[:11] not in ("round", "centralized"))
    for row in rows[1:]:
        counts = ("nodes_available", "train_sampled", "train_received", "query_sent", "opted_in", "evaluate_received")
        assert [row[k] for k in counts] == [5, 3, 3, 5, 5, 5]
        assert row["train_failed"] == row["train_rejected"] == row["evaluate_failed"] == 0
        figures = [value for key, value in row.items() if "per_class" not in key]
        assert all(isinstance(value, int | float) and math.isfinite(value) for value in figures)
    assert len(pd.read_json(directory / "results.json")) == 4
    nodes = pd.read_json(directory / "node_results.jsonl", lines=True)
    assert nodes["round"].tolist() == [1] * 5 + [2] * 5 + [3] * 5
    assert nodes["node"].tolist() == [f"partition {number}" for number in range(5)] * 3
    for row, (_, of_round) in zip(rows[1:], nodes.groupby("round"), strict=True):
        mean = (of_round["accuracy"] * of_round["num_examples"]).sum() / of_round["num_examples"].sum()
        assert row["federated_evaluate_accuracy"] == pytest.approx(mean)

    accuracies = [row["centralized_accuracy"] for row in rows]
    net = task.make_model(FACTS)
    net.load_state_dict(model(directory, "checkpoints/best.pt"))
    test_split = images.load_test_split(typed_config(dataset=app.config()["dataset"]))
    assert task.test(net, test_split, torch.device("cpu"))["accuracy"] == max(accuracies)
    net.load_state_dict(model(directory))
    assert task.test(net, test_split, torch.device("cpu"))["accuracy"] == accuracies[-1]
    config = json.loads((directory / "run_config.json").read_text())
    config.pop("versions")
    assert config.pop("code") == CODE
    settings = app.config(num_server_rounds=3, lr_decay_every=2, opt_in_probability=1.0)
    assert config == settings | test_split.facts | {"run-id": "1"}


def test_the_seconds_of_a_round_add_up(app, monkeypatch, caplog):
    caplog.set_level("INFO", logger="flwr")
    grid = app.grid()
    nodes = grid.get_nodes

    def slow_nodes():
        time.sleep(0.1)
        return nodes()

    def slow(seconds):
        def handler(msg, context):
            time.sleep(seconds[msg.metadata.message_type])
            return client_app.app(msg, context)

        return handler

    grid.get_nodes = slow_nodes
    seconds = {MessageType.TRAIN: 0.2, MessageType.QUERY: 0.3, MessageType.EVALUATE: 0.4}
    grid.handlers = {0: slow(seconds)}
    overrides = {"fraction_clients_train": 1.0, "opt_in_probability": 1.0, "num_server_rounds": 1}
    for row in results(app.run(grid, **overrides), times=True)[1:]:
        parts = {key: row[f"seconds_{key}"] for key in ("nodes", "train", "central", "query", "evaluate")}
        assert sum(parts.values()) == pytest.approx(row["seconds_total"], abs=0.05)
        assert parts["nodes"] >= 0.1
        assert parts["train"] >= 0.2
        assert parts["central"] >= 0.3  # the queries are sent before it, and this Grid answers at once
        assert parts["evaluate"] >= 0.4
    assert "⏱️ Round took " in caplog.text


def test_the_megabytes_of_a_round_by_hand(app, caplog):
    """Each array is a header of NumPy (128 bytes) and its numbers; Flower also counts its name."""
    caplog.set_level("INFO", logger="flwr")
    arrays = [(name, 4 * tensor.numel()) for name, tensor in task.make_model(FACTS).state_dict().items()]
    one = sum(len(name) + 128 + size for name, size in arrays) / 1e6
    assert one == pytest.approx(80_298 * 4 / 1e6, rel=0.01)
    grid = app.grid()
    grid.handlers = {0: lambda msg, context: Message(Error(code=0, reason="no"), reply_to=msg)}
    settings = {"fraction_clients_train": 1.0, "opt_in_probability": 1.0, "query_timeout": 60.0}
    rows = results(app.run(grid, **settings, num_server_rounds=3, evaluate_every=2))
    assert (rows[0]["megabytes_sent"], rows[0]["megabytes_received"]) == (None, None)
    # TRAIN goes to all 5 nodes, of which 4 answer and evaluate; round 1 has no evaluation.
    assert [row["megabytes_sent"] for row in rows[1:]] == [pytest.approx(n * one) for n in (5, 9, 9)]
    assert [row["megabytes_received"] for row in rows[1:]] == [pytest.approx(4 * one)] * 3
    assert f"), {9 * one:.1f} MB sent, {4 * one:.1f} MB received; about 0:00:" in caplog.text


def test_the_messages_are_those_of_the_contract(app):
    grid = app.grid()
    start = time.time()
    timeouts = {"train_timeout": 1e3, "query_timeout": 2e3, "evaluate_timeout": 3e3}
    app.run(grid, opt_in_probability=1.0, lr_decay_every=1, query_max_delay=0.01, **timeouts)
    train, query, evaluate = (by_round(grid, t) for t in (MessageType.TRAIN, MessageType.QUERY, MessageType.EVALUATE))
    facts = images.load_test_split(typed_config(dataset=app.config()["dataset"])).facts

    def config_of(message: Message, timeout: float) -> dict:
        config = dict(message.content["config"])
        assert start + timeout <= config.pop("deadline") <= time.time() + timeout
        return config

    for server_round, lr in ((1, 0.05), (2, 0.025)):
        assert [len(m[server_round]) for m in (train, query, evaluate)] == [3, 5, 5]
        to_train, to_evaluate = train[server_round][0], evaluate[server_round][0]
        whole = {"server-round": server_round, "app": CODE, "frozen": frozen_digest({}), **facts}
        assert config_of(to_train, 1e3) == whole | {"lr": lr}
        assert config_of(query[server_round][0], 2e3) == {"server-round": server_round, "max-delay": 0.01}
        assert config_of(to_evaluate, 3e3) == whole
        assert to_train.content.keys() == to_evaluate.content.keys() == {"arrays", "config"}
        assert query[server_round][0].content.keys() == {"config"}
        assert to_train.content["arrays"].keys() == task.make_model(FACTS).state_dict().keys()
        assert to_train.content["arrays"] is train[server_round][1].content["arrays"]  # one copy for all nodes
    # What is evaluated is what was aggregated, and it is trained on in the next round.
    assert evaluate[1][0].content["arrays"].object_id == train[2][0].content["arrays"].object_id
    assert evaluate[1][0].content["arrays"].object_id != train[1][0].content["arrays"].object_id


def test_the_same_seed_gives_the_same_bits(app):
    """Whatever the ids of the nodes and the order of the replies."""
    first = app.run(app.grid(seed=0), augment=True)
    second = app.run(app.grid(seed=7), augment=True)  # other node ids, replies in random order
    other = app.run(app.grid(seed=0), augment=True, seed=43)
    assert first != second
    assert results(first) == results(second)
    assert same_bits(model(first), model(second))
    assert not same_bits(model(first), model(other))


# ------------------------------------------------------------------- Whom and when to ask


def test_only_a_sample_is_asked_to_opt_in(app, caplog):
    caplog.set_level("INFO", logger="flwr")
    grid = app.grid(num_nodes=10)
    overrides = {"fraction_clients_query": 0.4, "opt_in_probability": 1.0, "num_server_rounds": 3}
    rows = results(app.run(grid, **overrides))[1:]
    keys = ("query_sent", "query_received", "opted_in", "evaluate_received")
    assert [[row[key] for key in keys] for row in rows] == [[4] * 4] * 3
    asked, evaluated = by_round(grid, MessageType.QUERY), by_round(grid, MessageType.EVALUATE)
    cohorts = [[m.metadata.dst_node_id for m in asked[r]] for r in (1, 2, 3)]
    assert cohorts == [[m.metadata.dst_node_id for m in evaluated[r]] for r in (1, 2, 3)]
    assert len({tuple(cohort) for cohort in cohorts}) > 1
    assert [row["train_sampled"] for row in rows] == [6] * 3  # of all nodes
    assert "📨 Received 4/4 results (QUERY)" in caplog.text
    assert "✅ 4/4 nodes opted-in for evaluation (QUERY)" in caplog.text


def test_the_federated_evaluation_comes_every_so_many_rounds(app):
    grid = app.grid()
    directory = app.run(grid, num_server_rounds=5, evaluate_every=2, opt_in_probability=1.0)
    assert by_round(grid, MessageType.QUERY).keys() == by_round(grid, MessageType.EVALUATE).keys() == {2, 4, 5}
    rows = results(directory, times=True)
    keys = [*FEDERATED, "query_sent", "query_received", "opted_in", "evaluate_received", "evaluate_failed"]
    keys += ["seconds_query", "seconds_evaluate"]
    for row in rows[1:]:
        assert {row[key] is None for key in keys} == {row["round"] in (1, 3)}
        assert row["train_received"] == 3
        assert row["centralized_accuracy"] is not None
        assert row["seconds_total"] > 0


# ------------------------------------------------------------------------------ Deadlines


def test_a_long_central_evaluation_costs_no_node_its_place(app, monkeypatch):
    """It takes ten times `query-timeout`: prompt answers to the queries are used, late ones are not."""
    real, central = task.test, images.load_test_split(typed_config(dataset=app.config()["dataset"]))

    def slow(net, data, *args):
        time.sleep(1.0 if data is central and grid.sent else 0)  # not in round 0
        return real(net, data, *args)

    config = app.config(num_server_rounds=1, query_timeout=0.15, opt_in_probability=1.0, train_timeout=60.0)
    grid = TimedGrid([0.0, 0.4, 0.0, 0.05, 0.75], client_app.app, config)
    monkeypatch.setattr(task, "test", slow)
    row = results(app.run(grid, **{k.replace("-", "_"): v for k, v in config.items()}), times=True)[1]
    assert (row["query_sent"], row["query_received"], row["opted_in"], row["evaluate_received"]) == (5, 3, 3, 3)
    asked = {grid.partition(m.metadata.dst_node_id) for m in by_round(grid, MessageType.EVALUATE)[1]}
    assert asked == {0, 2, 3}
    assert row["seconds_central"] >= 1.0
    assert row["seconds_query"] < 1


# ------------------------------------------------------- Flower's own strategy, and its tutorial


def test_this_client_app_runs_under_flowers_fedavg(app):
    grid = app.grid()
    arrays = ArrayRecord(task.initial_model(FACTS, 0).state_dict())
    config = ConfigRecord({"lr": 0.05})
    result = FedAvg(fraction_train=0.6).start(grid, arrays, num_rounds=2, train_config=config, timeout=30)
    assert set(result.train_metrics_clientapp) == set(result.evaluate_metrics_clientapp) == {1, 2}
    assert 0 <= result.evaluate_metrics_clientapp[2]["eval_acc"] <= 1
    assert not torch.equal(result.arrays.to_torch_state_dict()["fc2.bias"], arrays.to_torch_state_dict()["fc2.bias"])


def tutorial_client_app() -> ClientApp:
    """A ClientApp like that of Flower's PyTorch quickstart: train and evaluate, no query."""
    app = ClientApp()

    @app.train()
    def train(msg, context):
        net = task.make_model(FACTS)
        net.load_state_dict(msg.content["arrays"].to_torch_state_dict())
        nn.init.constant_(net.fc2.bias, msg.content["config"]["lr"])
        metrics = MetricRecord({"train_loss": 0.5, "num-examples": 8})
        return Message(RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": metrics}), reply_to=msg)

    @app.evaluate()
    def evaluate(msg, context):
        metrics = MetricRecord({"eval_loss": 1.0, "eval_acc": 0.5, "num-examples": 8})
        return Message(RecordDict({"metrics": metrics}), reply_to=msg)

    return app


def test_this_server_app_drives_the_client_app_of_the_tutorial(app):
    grid = InProcessGrid(tutorial_client_app(), app.config(), 5)
    directory = app.run(grid)
    rows = results(directory)[1:]
    assert [row["train_received"] for row in rows] == [3, 3]
    keys = ("query_sent", "query_received", "opted_in", "evaluate_received")  # who cannot opt in is not asked more
    assert [[row[key] for key in keys] for row in rows] == [[5, 0, 0, 0]] * 2
    torch.testing.assert_close(model(directory)["fc2.bias"], torch.full((10,), 0.05))
