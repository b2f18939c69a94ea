"""The whole loop on an in-process Grid that runs the real ClientApp."""

import json
import math

import pandas as pd
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from pytorch_example_low_level import client_app, server_app, task, utils
from pytorch_example_low_level.config import REPLY_GRACE, RunConfig, UserError
from pytorch_example_low_level.server_app import Node, sample_cohort
from tests.conftest import model, results, same_bits
from tests.grid import InProcessGrid, make_context

pytestmark = pytest.mark.usefixtures("quick_plot")


def test_a_run_leaves_the_files_and_figures_that_the_design_promises(app):
    directory = app.run(num_server_rounds=3, lr_decay_every=2, opt_in_probability=1.0)
    files = {str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file()}
    assert files == {
        "run_config.json", "results.json", "metrics.png", "final_model.pt",
        "checkpoints/best.pt", "checkpoints/last.pt",
    }  # fmt: skip
    rows = results(directory, times=True)
    assert [row["round"] for row in rows] == [0, 1, 2, 3]
    assert [row["lr"] for row in rows] == [None, 0.05, 0.05, 0.025]
    assert all(tuple(row) == utils.RESULT_KEYS for row in rows)
    assert all(value is None for key, value in rows[0].items() if key[:11] not in ("round", "centralized"))
    for row in rows[1:]:
        counts = ("nodes_available", "train_sampled", "train_received", "query_sent", "opted_in", "evaluate_received")
        assert [row[k] for k in counts] == [5, 3, 3, 5, 5, 5]
        assert row["train_failed"] == row["train_rejected"] == row["evaluate_failed"] == 0
        assert all(isinstance(value, int | float) and math.isfinite(value) for value in row.values())
        assert row["seconds_total"] >= row["seconds_train"] + row["seconds_query"] + row["seconds_evaluate"] - 0.01
    assert len(pd.read_json(directory / "results.json")) == 4

    accuracies = [row["centralized_accuracy"] for row in rows[1:]]
    net = task.Net.from_state_dict(model(directory, "checkpoints/best.pt"))
    test_split, _ = task.load_test_split(app.config()["dataset"])
    assert task.test(net, test_split, torch.device("cpu"))[1] == max(accuracies)
    assert (directory / "metrics.png").read_bytes()[:4] == b"\x89PNG"
    config = json.loads((directory / "run_config.json").read_text())
    assert config.pop("versions").keys() == {"flwr", "flwr-datasets", "torch", "numpy", "app", "python"}
    assert config == app.config(num_server_rounds=3, lr_decay_every=2, opt_in_probability=1.0)


def test_the_log_reads_like_the_design(app, caplog):
    caplog.set_level("INFO", logger="flwr")
    app.run(num_server_rounds=1, opt_in_probability=1.0)
    log = [r.message for r in caplog.records]
    start = log.index("🔄 Starting round 1/1")
    words = [
        "🔄 Starting round", "Calling the roll", "5 of 5 nodes", "Sampled 3 out of 5 nodes.",
        "📥 Received 3/3 results (TRAIN)", "💡 Centrally evaluated model -> loss:", "🎉 New best global model found:",
        "📨 Received 5/5 results (QUERY)", "✅ 5/5 nodes opted-in for evaluation (QUERY)",
        "📥 Received 5/5 results (EVALUATE)", "📊 Federated evaluation -> loss:", "⏱️ Round took", "📂 Run directory:",
    ]  # fmt: skip
    assert [line.startswith(word) for line, word in zip(log[start:], words, strict=True)] == [True] * len(words)


def test_the_messages_are_those_of_the_contract(app):
    grid = app.grid()
    app.run(grid, num_server_rounds=1, opt_in_probability=1.0)
    by_type: dict[tuple, list[Message]] = {}
    for message in grid.sent:
        by_type.setdefault((message.metadata.message_type, message.metadata.group_id), []).append(message)
    roll, train = by_type[MessageType.QUERY, "0"], by_type[MessageType.TRAIN, "1"]
    query, evaluate = by_type[MessageType.QUERY, "1"], by_type[MessageType.EVALUATE, "1"]
    assert [len(m) for m in (roll, train, query, evaluate)] == [5, 3, 5, 5]
    assert dict(roll[0].content["config"]) == {"server-round": 0, "max-delay": 0.0}
    assert dict(query[0].content["config"]) == {"server-round": 1, "max-delay": 0.0}
    assert dict(train[0].content["config"]) == {"server-round": 1, "lr": 0.05}
    assert dict(evaluate[0].content["config"]) == {"server-round": 1}
    assert train[0].content["arrays"].keys() == task.Net().state_dict().keys()
    assert train[0].content["arrays"] is train[1].content["arrays"]  # one copy for all nodes
    assert train[0].metadata.ttl == 600 + REPLY_GRACE


def test_the_global_model_is_the_weighted_mean_of_what_the_nodes_send(app):
    """Partitions of 24 and 96 images; the first node always sends ones, the second threes."""
    grid = app.grid(num_nodes=2)

    def send(value: float, num_examples: int):
        def handler(msg, context):
            if msg.metadata.message_type != MessageType.TRAIN:
                return client_app.app(msg, context)
            state = {k: torch.full_like(v, value) for k, v in msg.content["arrays"].to_torch_state_dict().items()}
            metrics = MetricRecord({"train_loss": value, "num-examples": num_examples})
            return Message(RecordDict({"arrays": ArrayRecord(state), "metrics": metrics}), reply_to=msg)

        return handler

    grid.handlers = {0: send(1.0, 24), 1: send(3.0, 72)}
    directory = app.run(grid, num_server_rounds=1, fraction_clients_train=1.0)
    assert {v for t in model(directory).values() for v in t.flatten().tolist()} == {2.5}  # (24*1 + 72*3) / 96
    assert results(directory)[1]["train_loss"] == 2.5


def test_the_federated_figures_are_weighted_by_examples(app):
    grid = app.grid(num_nodes=2)

    def send(accuracy: float, num_examples: int):
        def handler(msg, context):
            if msg.metadata.message_type != MessageType.EVALUATE:
                return client_app.app(msg, context)
            metrics = MetricRecord({"eval_loss": 1 - accuracy, "eval_acc": accuracy, "num-examples": num_examples})
            return Message(RecordDict({"metrics": metrics}), reply_to=msg)

        return handler

    grid.handlers = {0: send(0.25, 10), 1: send(0.75, 30)}
    row = results(app.run(grid, num_server_rounds=1, opt_in_probability=1.0))[1]
    assert row["federated_evaluate_accuracy"] == 0.625
    assert row["federated_evaluate_loss"] == 0.375
    assert row["federated_evaluate_accuracy_std"] == pytest.approx(math.sqrt(3) / 8)  # 1/4*(3/8)² + 3/4*(1/8)²
    assert row["federated_evaluate_accuracy_min"] == 0.25
    assert row["federated_evaluate_accuracy_median"] == 0.5
    assert row["federated_evaluate_accuracy_p10"] == pytest.approx(0.3)


def test_the_same_seed_gives_the_same_bits_whatever_the_node_ids_and_the_order_of_replies(app):
    first = app.run(app.grid(seed=0))
    second = app.run(app.grid(seed=7))  # other node ids, replies in random order
    other = app.run(app.grid(seed=0), seed=43)
    assert first != second
    assert results(first) == results(second)
    assert same_bits(model(first), model(second))
    assert not same_bits(model(first), model(other))


def test_nodes_that_do_not_opt_in_are_not_asked_to_evaluate(app):
    grid = app.grid()
    directory = app.run(grid, opt_in_probability=0.0)
    assert MessageType.EVALUATE not in {m.metadata.message_type for m in grid.sent}
    for row in results(directory)[1:]:
        assert (row["query_received"], row["opted_in"], row["evaluate_received"]) == (5, 0, 0)
        assert row["federated_evaluate_accuracy"] is None
        assert row["federated_evaluate_loss_std"] is None


def test_opting_in_follows_its_probability(app):
    config = RunConfig.from_context(make_context(app.config()))
    answers = [
        utils.random_stream(config.seed, utils.Purpose.QUERY, server_round, partition).random(2)[1] < 0.5
        for server_round in range(1, 11)
        for partition in range(50)
    ]
    assert 220 < sum(answers) < 280


# --------------------------------------------------------------------------------- Cohort


def nodes(count: int) -> list[Node]:
    return [Node(partition, 1000 + partition) for partition in range(count)]


@pytest.mark.parametrize(
    ("fraction", "least", "available", "expected"),
    [(0.2, 2, 50, 10), (0.01, 2, 50, 2), (1.0, 2, 50, 50), (0.5, 2, 5, 2), (0.29, 1, 100, 29), (0.1, 3, 2, 2)],
)
def test_the_size_of_the_cohort(app, fraction, least, available, expected):
    overrides = {"fraction_clients_train": fraction, "min_train_nodes": least, "min_available_nodes": 100}
    config = RunConfig.from_context(make_context(app.config(**overrides)))
    cohort = sample_cohort(nodes(available), config, 1)
    assert len(set(cohort)) == len(cohort) == expected


def test_the_cohort_is_uniform_and_a_pure_function_of_seed_and_round(app):
    config = RunConfig.from_context(make_context(app.config(fraction_clients_train=0.2)))
    everyone = nodes(50)
    drawn = [node.key for r in range(1, 501) for node in sample_cohort(everyone, config, r)]
    counts = torch.tensor(drawn).bincount(minlength=50)
    assert counts.sum() == 5000
    assert ((counts - 100).abs() < 5 * math.sqrt(80)).all()  # binomial: n p (1 - p) = 500 * 0.2 * 0.8
    assert sample_cohort(everyone, config, 3) == sample_cohort(list(reversed(everyone)), config, 3)
    assert sample_cohort(everyone, config, 3) != sample_cohort(everyone, config, 4)


@pytest.mark.parametrize("claim", [-1, 2**62, 3, 49, 0])
def test_a_false_partition_displaces_and_duplicates_no_other_node(app, claim):
    grid = app.grid(num_nodes=10)

    def liar(msg, context):
        reply = client_app.app(msg, context)
        if msg.metadata.message_type == MessageType.QUERY:
            reply.content["config"]["partition-id"] = claim
        return reply

    grid.handlers = {7: liar}
    app.run(grid, num_server_rounds=3)
    trained: dict[str, list[int]] = {}
    for message in grid.sent:
        if message.metadata.message_type == MessageType.TRAIN:
            trained.setdefault(message.metadata.group_id, []).append(message.metadata.dst_node_id)
    for cohort in trained.values():
        assert len(set(cohort)) == len(cohort) == 6
    config = RunConfig.from_context(make_context(app.config()))
    honest = [Node(grid.partition(i), i) for i in grid.contexts if grid.partition(i) != 7]
    for server_round, cohort in trained.items():
        # Without the liar's lot, the order in which the honest nodes are drawn is what it was.
        expected = sample_cohort(honest, config, int(server_round))[:5]
        assert len({n.node_id for n in expected} & set(cohort)) >= 4


def test_waiting_for_nodes_ends_with_one_clear_error(app):
    grid = app.grid()
    grid.connected = set(list(grid.contexts)[:1])
    with pytest.raises(UserError, match=r"Only 1 nodes are connected after 0\.3 s, and min-available-nodes is 2"):
        app.run(grid, node_wait_timeout=0.3)


def test_nodes_that_connect_while_the_roll_is_called_are_in_the_first_round(app):
    grid = app.grid()
    everyone = set(grid.contexts)
    grid.connected = set(list(everyone)[:2])

    def connect(messages):
        grid.connected = everyone

    grid.before_push = connect
    assert [row["nodes_available"] for row in results(app.run(grid))[1:]] == [5, 5]


# ------------------------------------------------------- Flower's own strategy, and its tutorial


def test_this_client_app_runs_under_flowers_fedavg(app):
    grid = app.grid()
    arrays = ArrayRecord(task.Net.initial(1, 10, 0).state_dict())
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
        net = task.Net()
        net.load_state_dict(msg.content["arrays"].to_torch_state_dict())
        optimizer = torch.optim.Adam(net.parameters(), lr=msg.content["config"]["lr"])
        loss = torch.nn.functional.cross_entropy(net(torch.ones(8, 1, 28, 28)), torch.ones(8, dtype=torch.long))
        loss.backward()
        optimizer.step()
        metrics = MetricRecord({"train_loss": loss.item(), "num-examples": 8})
        return Message(RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": metrics}), reply_to=msg)

    @app.evaluate()
    def evaluate(msg, context):
        metrics = MetricRecord({"eval_loss": 1.0, "eval_acc": 0.5, "num-examples": 8})
        return Message(RecordDict({"metrics": metrics}), reply_to=msg)

    return app


def test_this_server_app_drives_the_client_app_of_the_tutorial(app):
    grid = InProcessGrid(tutorial_client_app(), app.config(), 5)
    rows = results(app.run(grid))[1:]
    assert [row["train_received"] for row in rows] == [3, 3]
    assert [(row["query_sent"], row["query_received"], row["opted_in"]) for row in rows] == [(5, 0, 0)] * 2


def test_the_server_fetches_few_models_ahead_of_their_turn(app):
    grid = app.grid(num_nodes=30)
    app.run(grid, num_server_rounds=1, fraction_clients_train=1.0, opt_in_probability=0.0)
    trained = [m for m in grid.sent if m.metadata.message_type == MessageType.TRAIN]
    assert len(trained) == 30
    assert grid.peak_models <= server_app.PULL_WINDOW
