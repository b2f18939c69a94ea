"""The phases of a round, one by one: nodes, cohort, training, aggregation, evaluation; and replies that lie."""

import json
import logging
import math
import os
import tracemalloc
import weakref
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MessageType, MetricRecord, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytorch_example_low_level import figures, messaging, server_app, task
from pytorch_example_low_level.config import UserError
from pytorch_example_low_level.messaging import MAX_EXAMPLES, MAX_WAITING, Mailbox, Node, connected_nodes
from pytorch_example_low_level.server_app import (
    collect_opt_ins,
    evaluate,
    evaluate_centrally,
    sample_asked,
    sample_cohort,
    send_queries,
    train,
    wait_for_nodes,
    weighted_mean,
)
from tests.conftest import lines_of, same_bits
from tests.grid import InProcessGrid, run_config, typed_config

# ---------------------------------------------------------------------------------- Nodes


class Registering(InProcessGrid):
    """A Grid that has one more of `counts` nodes each time that it is asked, and the last one for good."""

    def __init__(self, *counts: int, simulated: bool = True) -> None:
        super().__init__(lambda m, c: None, run_config(), max(counts))
        self.simulated = simulated
        self.counts = list(counts)

    def get_nodes(self):
        count = self.counts.pop(0) if len(self.counts) > 1 else self.counts[0]
        return [node for node in super().get_nodes() if self.partition(node.node_id) < count]


@pytest.fixture
def slept(monkeypatch) -> list[float]:
    """The pauses of the server, on a clock that only they move, with the real time to settle."""
    pauses: list[float] = []
    monkeypatch.undo()
    monkeypatch.setattr(server_app, "time", SimpleNamespace(monotonic=lambda: sum(pauses), sleep=pauses.append))
    return pauses


def wait(grid, before=None, *, resumed=True, **overrides) -> int:
    nodes = wait_for_nodes(grid, typed_config(**overrides), before, (), resumed=resumed)
    assert [grid.partition(node.node_id) for node in nodes] == list(range(len(nodes)))
    return len(nodes)


@pytest.mark.parametrize(
    ("counts", "least", "expected"), [((0, 0, 2, 7, 9, 10, 10, 11), 2, 10), ((3, 3, 3, 6, 6), 5, 6)]
)
def test_waits_for_the_least_number_and_until_no_more_nodes_register(counts, least, expected):
    assert wait(Registering(*counts), min_available_nodes=least) == expected


def test_enough_nodes_that_come_and_go_do_not_hold_up_a_run():
    assert wait(Registering(*[4, 5] * 100, simulated=False), node_wait_timeout=0.1) in (4, 5)


def test_waits_as_long_as_it_takes_to_settle(slept):
    assert wait(Registering(2, 4, 4)) == 4
    assert slept == [0.5, 0.5]
    assert wait(Registering(2, 2), node_wait_timeout=0.2) == 2
    assert slept[2:] == [0.2]


def test_the_number_of_the_last_round_needs_no_wait(slept):
    assert wait(Registering(5), before=5, resumed=False) == 5
    assert slept == []


def test_too_few_nodes_are_one_clear_error(slept):
    said = r"Connected nodes after 12 s: 1; min-available-nodes is 2\. Start more nodes, or change"
    with pytest.raises(UserError, match=said):
        wait(Registering(1), node_wait_timeout=12.0)
    assert 12 <= sum(slept) <= 12.5


def test_waiting_for_nodes_is_logged_every_five_seconds(slept, caplog):
    caplog.set_level("INFO", logger="flwr")
    assert wait(Registering(*[1] * 24, 3, 3), min_available_nodes=3, node_wait_timeout=20) == 3
    assert lines_of(caplog, "INFO") == [f"Waiting for nodes: 1/3, {left} s left" for left in (19, 14, 9)]


@pytest.mark.parametrize(("counts", "before"), [((5,), 4), ((5,), 6), ((5, 10, 10), 5)])
def test_a_simulation_resumed_with_other_nodes_is_refused(counts, before):
    """Once the number stands still."""
    said = rf'split for {before} simulated nodes, and now there are {counts[-1]}\..* "num-supernodes={before} '
    with pytest.raises(UserError, match=said):
        wait(Registering(*counts), before=before)


def test_a_simulation_has_a_node_for_each_site():
    names = ["east", "north", "south"]
    nodes = wait_for_nodes(Registering(3), typed_config(), None, names, resumed=False)
    assert [node.name for node in nodes] == names
    said = r'split for 3 simulated nodes, and now there are 5\..*"num-supernodes=3 client-resources-num-cpus=1"'
    with pytest.raises(UserError, match=said):
        wait_for_nodes(Registering(5), typed_config(), None, names, resumed=False)
    assert len(wait_for_nodes(Registering(5, simulated=False), typed_config(), None, names, resumed=False)) == 5


@pytest.mark.parametrize(("simulated", "resumed"), [(False, True), (False, False), (True, False)])
def test_other_numbers_of_nodes_are_taken(simulated, resumed):
    """Over a network nodes come and go; on a busy machine, the last ones of a simulation register after round 1."""
    assert wait(Registering(5, simulated=simulated), before=4, resumed=resumed) == 5


@pytest.mark.parametrize(
    ("count", "simulated", "before", "hint"),
    [(2, True, None, True), (3, True, None, False), (2, False, None, False), (2, True, 2, False)],
)
def test_two_simulated_nodes_are_told_how_to_be_fifty(caplog, count, simulated, before, hint):
    caplog.set_level("INFO", logger="flwr")
    wait(Registering(count, simulated=simulated), before=before)
    assert ("num-supernodes=50" in caplog.text) == hint


# --------------------------------------------------------------------------------- Cohort


def nodes(count: int) -> list[Node]:
    return [Node(1000 + i, f"node {1000 + i}") for i in range(count)]


@pytest.mark.parametrize(
    ("fraction", "least", "available", "expected"),
    [(0.2, 2, 50, 10), (0.01, 2, 50, 2), (1.0, 2, 50, 50), (0.5, 2, 5, 2), (0.29, 1, 100, 29), (0.1, 3, 2, 2)],
)
def test_the_size_of_the_cohort(fraction, least, available, expected):
    config = typed_config(fraction_clients_train=fraction, min_train_nodes=least, min_available_nodes=100)
    cohort = sample_cohort(nodes(available), config, 1)
    assert len(set(cohort)) == len(cohort) == expected


@pytest.mark.parametrize(
    ("fraction", "available", "expected"), [(1.0, 7, 7), (0.5, 7, 3), (0.01, 7, 1), (0.29, 100, 29)]
)
def test_the_number_of_nodes_that_are_asked(fraction, available, expected):
    asked = sample_asked(nodes(available), typed_config(fraction_clients_query=fraction), 1)
    assert len(set(asked)) == len(asked) == expected


@pytest.mark.parametrize("sample", [sample_cohort, sample_asked])
def test_a_sample_is_uniform_and_of_seed_and_round_alone(sample):
    config = typed_config(fraction_clients_train=0.2, fraction_clients_query=0.2)
    everyone = nodes(50)
    drawn = [node.node_id - 1000 for r in range(1, 501) for node in sample(everyone, config, r)]
    counts = torch.tensor(drawn).bincount(minlength=50)
    assert counts.sum() == 5000
    assert ((counts - 100).abs() < 5 * math.sqrt(80)).all()  # binomial: n p (1 - p) = 500 * 0.2 * 0.8
    third = sample(everyone, config, 3)
    assert third == sample(everyone, config, 3) == sorted(third, key=everyone.index)
    assert third != sample(everyone, config, 4)
    assert third != sample(everyone, typed_config(seed=43, fraction_clients_train=0.2, fraction_clients_query=0.2), 3)


def test_who_trains_says_nothing_about_who_is_asked():
    config = typed_config(fraction_clients_train=0.2, fraction_clients_query=0.2)
    everyone = nodes(50)
    both = sum(len({*sample_cohort(everyone, config, r)} & {*sample_asked(everyone, config, r)}) for r in range(500))
    assert 800 < both < 1200  # a fifth of a fifth of 50, 500 times


# ---------------------------------------------------------------------------- Aggregation


@pytest.mark.parametrize(
    ("dtype", "values", "weights", "expected"),
    [
        (torch.float32, [[1.0, 2.0], [5.0, 10.0]], [1, 3], [4.0, 8.0]),  # (1*1 + 3*5) / 4, (1*2 + 3*10) / 4
        (torch.int64, [10, 20], [1, 2], 17),  # 50 / 3 = 16.67
        # 256 + 1 is 256 in bfloat16: a sum kept in that type would never leave 256. And (256 + 255) / 256 is about 2.
        (torch.bfloat16, [[256.0]] + [[1.0]] * 255, [1] * 256, [2.0]),
        (torch.bool, [[True, False, True], [True, True, False]], [1, 3], [True, True, False]),  # what most say
    ],
)
def test_the_mean_is_weighted_by_the_number_of_examples_and_keeps_the_dtype(dtype, values, weights, expected):
    sent = torch.float32 if dtype == torch.bfloat16 else dtype  # NumPy, and so a message, has no bfloat16
    replies = [{"w": torch.tensor(value, dtype=sent)} for value in values]
    mean = weighted_mean(zip(replies, weights, strict=True), like={"w": torch.tensor(values[0], dtype=dtype)})
    assert (mean["w"].dtype, mean["w"].tolist()) == (dtype, expected)
    assert [reply["w"].tolist() for reply in replies] == values  # no reply is changed, or counted twice


def test_a_cohort_of_one_comes_back_bit_by_bit():
    torch.manual_seed(0)
    model = {
        "w": torch.randn(100), "half": torch.randn(100).to(torch.bfloat16), "n": torch.tensor(7),
        "complex": torch.randn(9, dtype=torch.complex64), "bool": torch.tensor([True, False]),
        "byte": torch.arange(250, dtype=torch.uint8), "none": torch.zeros(0, 3),
    }  # fmt: skip
    reply = {**model, "half": model["half"].float()}  # NumPy, and so a message, has no bfloat16
    mean = weighted_mean([(reply, 13)], like={name: torch.zeros_like(tensor) for name, tensor in model.items()})
    assert same_bits(mean, model)


def test_what_no_node_has_changed_stays_as_it_is():
    """A sum in double precision would change these."""
    same = {
        "large": torch.tensor([2**63 - 1, 2**60 + 1]), "mask": torch.tensor([complex(0, -math.inf)]),
        "third": torch.tensor([1 / 3, 0.1, 0.7], dtype=torch.float64), "half": torch.ones(2, dtype=torch.bfloat16),
    }  # fmt: skip
    like = {**same, "w": torch.zeros(1)}
    replies = [({**same, "half": same["half"].float(), "w": torch.ones(1)}, n) for n in (3, 7, 9)]
    assert same_bits(weighted_mean(replies, like), {**same, "w": torch.ones(1)})
    replies[1][0]["third"] = torch.zeros(3, dtype=torch.float64)  # one node has changed it
    assert weighted_mean(replies, like)["third"].tolist() == pytest.approx([12 / 57, 1.2 / 19, 8.4 / 19])


def test_a_mean_over_several_blocks_has_the_bits_of_the_whole():
    """Sizes around the block, of dtypes with and without a conversion, and a tensor that is not contiguous."""
    rng = torch.Generator().manual_seed(0)
    block = server_app.BLOCK
    like = {str(n): torch.zeros(n) for n in (1, block - 1, block, block + 1, 2 * block, 3 * block + 5)}
    like |= {"double": torch.zeros(3, block).double(), "complex": torch.zeros(block + 9, dtype=torch.cfloat)}
    like |= {"transposed": torch.zeros(block, 3), "none": torch.zeros(0, 2)}
    updates = []
    for weight in (3, 7, 11):
        model = {n: torch.randn(t.shape, generator=rng, dtype=t.dtype) for n, t in like.items()}
        updates.append((model | {"transposed": torch.randn(3, block, generator=rng).T}, weight))
    mean = weighted_mean(updates, like)
    for name, tensor in like.items():
        exact = torch.complex128 if tensor.is_complex() else torch.float64
        total = sum((model[name].to(exact) * weight for model, weight in updates), torch.zeros((), dtype=exact))
        assert torch.equal(mean[name], (total / 21).to(tensor.dtype)), name


def test_a_mean_has_no_temporary_of_the_models_size():
    model = {"w": torch.ones(4_000_000)}
    weighted_mean([(model, 1)], model)
    tracemalloc.start()
    try:
        weighted_mean([(model, 1)] * 3, model)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 * 4_000_000 + 2_000_000  # the sum itself, in double precision; PyTorch's memory is not counted


def test_updates_are_added_one_by_one_and_never_held():
    alive: weakref.WeakSet = weakref.WeakSet()
    peaks = []

    def updates() -> Iterator[tuple[dict[str, torch.Tensor], int]]:
        for value in range(50):
            model = {"w": torch.full((4,), float(value))}
            alive.add(model["w"])
            peaks.append(len(alive))
            yield model, 2
            del model

    mean = weighted_mean(updates(), like={"w": torch.zeros(4)})
    assert mean["w"].tolist() == [24.5] * 4
    assert max(peaks) <= 2  # the one that is added, and the one that comes


# --------------------------------------------------------------------------- The phases

MODEL = {"w": torch.tensor([[1.0, 2.0], [3.0, -4.0]]), "d": torch.tensor([0.1, 0.2]).double(), "n": torch.tensor(5)}
INSTRUCTIONS = {"server-round": 3, "lr": 0.25, "class-names": ["a", "b"]}
CENTRAL = {"loss": 1.0, "accuracy": 0.5}
KEYS = figures.result_keys(CENTRAL, server_app.SCORE)
CONFIG = typed_config(train_timeout=30.0, query_timeout=30.0, evaluate_timeout=30.0, query_max_delay=0.125)


def honest(msg: Message, context) -> Message:
    """Node i trains by adding i / 3, and has i + 1 examples."""
    place = int(context.node_config["partition-id"])
    if msg.metadata.message_type == MessageType.QUERY:
        return Message(RecordDict({"config": ConfigRecord({"opt-in": place != 1})}), reply_to=msg)
    if msg.metadata.message_type == MessageType.EVALUATE:
        metrics = MetricRecord({"eval_loss": 1.0 + place, "eval_acc": place / 4, "num-examples": place + 1})
        return Message(RecordDict({"metrics": metrics}), reply_to=msg)
    state = msg.content["arrays"].to_torch_state_dict()
    trained = {name: (tensor + place / 3).to(tensor.dtype) for name, tensor in state.items()}
    metrics = MetricRecord({"train_loss": 0.1 + place, "num-examples": place + 1})
    return Message(RecordDict({"arrays": ArrayRecord(trained), "metrics": metrics}), reply_to=msg)


def fails(msg: Message, context) -> Message:
    return Message(Error(code=0, reason="no"), reply_to=msg)


@pytest.fixture
def grid() -> InProcessGrid:
    return InProcessGrid(honest, run_config(), 3)


def test_train_returns_model_loss_and_counts(grid, caplog):
    caplog.set_level("INFO", logger="flwr")
    batch, model, loss = train(Mailbox(grid), connected_nodes(grid), MODEL, INSTRUCTIONS, CONFIG)
    step = (0 * 1 + 1 / 3 * 2 + 2 / 3 * 3) / 6
    torch.testing.assert_close(model["w"], MODEL["w"] + step)
    torch.testing.assert_close(model["d"], MODEL["d"] + step)
    assert (model["w"].dtype, model["d"].dtype, model["n"].item()) == (torch.float32, torch.float64, 5)
    assert loss == pytest.approx(0.1 + (0 * 1 + 1 * 2 + 2 * 3) / 6)
    assert (batch.received, batch.failed, batch.rejected) == (3, 0, 0)
    assert lines_of(caplog, "INFO") == ["📥 Received 3/3 results (TRAIN)"]
    (deadline,) = {m.content["config"]["deadline"] for m in grid.sent}
    assert dict(grid.sent[0].content["config"]) == INSTRUCTIONS | {"deadline": deadline}
    assert {m.metadata.group_id for m in grid.sent} == {"3"}


def test_without_a_usable_reply_the_model_stays(grid, caplog):
    grid.client_app = fails
    batch, model, loss = train(Mailbox(grid), connected_nodes(grid), MODEL, INSTRUCTIONS, CONFIG)
    assert model is MODEL
    assert loss is None
    assert batch.failed == 3
    assert "Round 3: no usable TRAIN reply; the global model stays as it is." in caplog.text


def test_the_server_holds_few_models_at_a_time():
    grid = InProcessGrid(honest, run_config(), 40)
    train(Mailbox(grid), connected_nodes(grid), MODEL, INSTRUCTIONS, CONFIG)
    assert 1 < grid.peak_models <= MAX_WAITING


def test_opt_ins_are_those_that_say_so_and_an_error_is_named(grid, caplog):
    caplog.set_level("INFO", logger="flwr")
    grid.handlers = {0: fails}  # and partition 1 says no
    mailbox = Mailbox(grid)
    everyone = connected_nodes(grid)
    queries = send_queries(mailbox, everyone, 3, CONFIG)
    assert collect_opt_ins(mailbox, queries) == [everyone[2]]
    said = ["📨 Received 2/3 results (QUERY)", "✅ 1/3 nodes opted-in for evaluation (QUERY)"]
    assert lines_of(caplog, "INFO") == said
    assert lines_of(caplog) == ["Round 3: left out partition 0 (query): no"]
    asked = {"server-round": 3, "max-delay": 0.125, "deadline": queries.deadline}
    assert dict(grid.sent[0].content["config"]) == asked


def test_the_federated_figures_by_hand(grid, caplog):
    caplog.set_level("INFO", logger="flwr")
    reports, row = evaluate(Mailbox(grid), connected_nodes(grid), MODEL, INSTRUCTIONS, CENTRAL, CONFIG)
    assert reports == [
        {"node": f"partition {place}", "num_examples": place + 1, "loss": 1.0 + place, "accuracy": place / 4}
        for place in range(3)
    ]
    assert row == pytest.approx({
        "evaluate_received": 3,
        "evaluate_failed": 0,
        "federated_evaluate_loss": (1 * 1 + 2 * 2 + 3 * 3) / 6,
        "federated_evaluate_loss_std": math.sqrt((1 * (4 / 3) ** 2 + 2 * (1 / 3) ** 2 + 3 * (2 / 3) ** 2) / 6),
        "federated_evaluate_accuracy": (0 * 1 + 0.25 * 2 + 0.5 * 3) / 6,
        "federated_evaluate_accuracy_std": math.sqrt((1 * (1 / 3) ** 2 + 2 * (1 / 12) ** 2 + 3 * (1 / 6) ** 2) / 6),
        "federated_evaluate_accuracy_min": 0.0,
        "federated_evaluate_accuracy_p10": 0.05,
        "federated_evaluate_accuracy_median": 0.25,
    })  # fmt: skip
    assert lines_of(caplog, "INFO") == [
        "📥 Received 3/3 results (EVALUATE)",
        "📊 Federated evaluation -> loss: 2.333±0.745 / accuracy: 0.333±0.186",
    ]
    assert same_bits(grid.sent[0].content["arrays"].to_torch_state_dict(), MODEL)


def test_a_further_metric_is_averaged_over_the_nodes_that_have_it(grid, caplog):
    """A number, and a list with an element that one node lacks."""
    caplog.set_level("INFO", logger="flwr")
    nan = math.nan
    further = [
        {"eval_auc": 0.5, "eval_f1": [0.0, nan]},
        {"eval_f1": [1.0, 0.5]},
        {"eval_auc": 1.0, "eval_f1": [1.0, nan]},
    ]

    def reports_more(msg, context):
        place = int(context.node_config["partition-id"])
        reply = honest(msg, context)
        metrics = MetricRecord({**reply.content["metrics"], **further[place]})
        return Message(RecordDict({"metrics": metrics}), reply_to=msg)

    grid.client_app = reports_more
    central = CENTRAL | {"auc": 0.75, "f1": [0.5, None]}
    reports, row = evaluate(Mailbox(grid), connected_nodes(grid), MODEL, INSTRUCTIONS, central, CONFIG)
    assert [(report["auc"], report["f1"]) for report in reports] == [
        (0.5, [0.0, None]), (None, [1.0, 0.5]), (1.0, [1.0, None])
    ]  # fmt: skip
    assert row["federated_evaluate_auc"] == pytest.approx((1 * 0.5 + 3 * 1.0) / 4)
    assert row["federated_evaluate_auc_std"] == pytest.approx(math.sqrt((1 * 0.375**2 + 3 * 0.125**2) / 4))
    assert row["federated_evaluate_f1"] == pytest.approx([(0 + 2 + 3) / 6, 0.5])
    assert row["federated_evaluate_f1_std"] == pytest.approx(
        [math.sqrt((1 * (5 / 6) ** 2 + 5 * (1 / 6) ** 2) / 6), 0.0]
    )
    assert lines_of(caplog, "INFO")[-1].endswith("/ accuracy: 0.333±0.186 / auc: 0.875±0.217")


@pytest.mark.parametrize(
    ("metrics", "reason"),
    [
        ({"eval_f1": [0.5]}, "eval_f1 is [0.5], not a list of 2 numbers"),
        ({"eval_f1": 0.5}, "eval_f1 is 0.5, not a list of 2 numbers"),
        ({"eval_f1": [0.5, math.inf]}, "eval_f1 is inf, not a finite number"),
        ({"eval_auc": math.nan}, "eval_auc is nan, not a finite number"),
        ({"eval_auc": [0.5]}, "eval_auc is [0.5], not a finite number"),
        ({"eval_acc": 1.0001}, "eval_acc is 1.0001, not between 0 and 1"),
        ({"eval_acc": -0.1}, "eval_acc is -0.1, not between 0 and 1"),
        ({"eval_acc": 0.0}, None),
        ({"eval_acc": 1}, None),
    ],
)
def test_a_metric_that_is_impossible_is_rejected(grid, caplog, metrics, reason):
    def claims(msg, context):
        claimed = MetricRecord({"eval_loss": 1.0, "eval_acc": 0.5, "num-examples": 1, **metrics})
        return Message(RecordDict({"metrics": claimed}), reply_to=msg)

    grid.handlers = {1: claims}
    central = CENTRAL | {"auc": 0.75, "f1": [0.5, None]}
    reports, row = evaluate(Mailbox(grid), connected_nodes(grid), MODEL, INSTRUCTIONS, central, CONFIG)
    assert row["evaluate_received"] == len(reports) == (2 if reason else 3)
    assert (reason or "") in caplog.text


@pytest.mark.parametrize("nobody", [True, False])
def test_without_results_the_federated_figures_are_null(grid, caplog, nobody):
    caplog.set_level("INFO", logger="flwr")
    grid.client_app = fails
    reports, row = evaluate(
        Mailbox(grid), [] if nobody else connected_nodes(grid), MODEL, INSTRUCTIONS, CENTRAL, CONFIG
    )
    assert reports == []
    assert {key: value for key, value in row.items() if value is not None} == {
        "evaluate_received": 0, "evaluate_failed": 0 if nobody else 3,
    }  # fmt: skip
    assert lines_of(caplog, "INFO")[-1] == "📊 Federated evaluation -> no node took part"


NO_DATA = SimpleNamespace(facts={})


def test_a_central_figure_that_is_no_number_is_null(monkeypatch, caplog):
    caplog.set_level("INFO", logger="flwr")
    net = torch.nn.Linear(2, 2)
    monkeypatch.setattr(task, "initial_model", lambda *args: net)
    for loss, recorded in ((math.nan, None), (math.inf, None), (0.5, 0.5)):
        metrics = {"loss": loss, "accuracy": 0.25, "auc": None, "accuracy_per_class": [0.5, None, math.nan]}
        monkeypatch.setattr(task, "test", lambda *args, metrics=metrics: metrics)
        assert evaluate_centrally(net.state_dict(), NO_DATA, typed_config(), torch.device("cpu")) == {
            "loss": recorded, "accuracy": 0.25, "auc": None, "accuracy_per_class": [0.5, None, None],
        }  # fmt: skip
    assert lines_of(caplog, "INFO")[-1] == "💡 Centrally evaluated model -> loss:  0.5000 /  accuracy:  0.2500"


@pytest.mark.parametrize(
    ("metrics", "reason"),
    [
        ({"accuracy": 0.5}, r"must return 'loss' and the score 'accuracy'; \{'loss'\} is not in"),
        ({"loss": 1.0}, r"\{'accuracy'\} is not in"),
        ({"loss": 1.0, "accuracy": [0.5]}, "the score 'accuracy' must be a number or None"),
        ({"loss": 1.0, "accuracy": 0.5, "node": 1}, r"names are taken: \['node'\]"),
        ({"loss": 1.0, "accuracy": 0.5, "num_examples": 1}, r"names are taken: \['num_examples'\]"),
        ({"loss": 1.0, "accuracy": 0.5, "accuracy_min": 1}, r"taken: \['federated_evaluate_accuracy_min'\]"),
        ({"loss": 1.0, "accuracy": 0.5, "loss_std": 1}, r"taken: \['federated_evaluate_loss_std'\]"),
    ],
)
def test_metrics_whose_names_are_missing_or_taken_are_refused(metrics, reason):
    with pytest.raises(UserError, match=reason):
        figures.checked(metrics, "accuracy")
    with pytest.raises(UserError, match="rename the metric 'acc'"):
        messaging.metric_key("acc")


def test_metrics_are_recorded_as_numbers_of_python():
    """A checkpoint with NumPy's would not be data only."""
    recorded = figures.checked({"loss": np.float64(1), "accuracy": True, "counts": [np.float64(2), 3]}, "accuracy")
    assert recorded == {"loss": 1.0, "accuracy": 1.0, "counts": [2.0, 3]}
    assert [type(value) for value in [*recorded.values()][:2] + recorded["counts"]] == [float, float, float, int]


@pytest.mark.parametrize("value", [torch.tensor(0.5), np.float32(0.5), [0.5, torch.tensor(0.5)], "0.5"])
def test_a_metric_that_cannot_be_recorded_is_named_before_anything_is_committed(monkeypatch, value):
    """A tensor would otherwise reach the checkpoint, and fail in results.json."""
    net = torch.nn.Linear(2, 2)
    monkeypatch.setattr(task, "initial_model", lambda *args: net)
    monkeypatch.setattr(task, "test", lambda *args: {"loss": 1.0, "accuracy": 0.5, "recall": value})
    with pytest.raises(UserError, match=r"test\(\) returned a (Tensor|float32|str) in the metric 'recall'.*item\(\)"):
        evaluate_centrally(net.state_dict(), NO_DATA, typed_config(), torch.device("cpu"))


# ---------------------------------------------------------------------------- Hostile nodes

DEFAULTS = run_config()
LIAR = 1  # of the nodes 0, 1 and 2
HONEST = ArrayRecord(MODEL)
SCALAR = st.integers(-(2**63), 2**63 - 1) | st.floats() | st.sampled_from([1e308, -1e308, 1e38, 0, 0.5, 2**63 - 1])
WORDS = st.text(max_size=40) | st.sampled_from(
    ["\x1b[2J\x1b[31m", "a\nINFO : 🎉 all is well", "\u202e\u2066\u200f", "\x00\x07\r", "x" * 5000]
)
NUMBERS = SCALAR | st.lists(st.integers(-(2**63), 2**63 - 1), max_size=3) | st.lists(st.floats(), max_size=3)
SETTING = SCALAR | st.booleans() | WORDS | st.binary(max_size=20) | st.lists(WORDS, max_size=3)


def lies_about(name: str) -> st.SearchStrategy[Array]:
    """Any array, or one that differs little from the honest one."""
    true = HONEST[name]
    size = true.numpy().nbytes
    head, values = true.data[:-size], true.data[-size:]
    data = st.binary(max_size=200) | st.binary(min_size=len(head), max_size=len(head)).map(lambda h: h + values)
    dtypes = WORDS | st.sampled_from(["float32", "float64", "int64", "object", "<f4", "bfloat16"])
    shapes = st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4).map(tuple)
    any_numbers = st.binary(min_size=size, max_size=size).map(lambda v: head + v)
    dtype, shape, stype = map(st.just, (true.dtype, true.shape, true.stype))
    return st.one_of(
        st.builds(Array, dtype, shape, stype, data | any_numbers),
        st.builds(Array, dtypes | dtype, shapes | shape, WORDS | stype, data | st.just(true.data)),
    )


def mostly(true: dict, lies: dict) -> st.SearchStrategy[dict]:
    """The true entries, with one or two of them replaced, taken out or added to."""
    names = st.lists(st.sampled_from(sorted(lies)), min_size=1, max_size=2, unique=True)
    missing = st.integers(0, 9).map(lambda number: number == 0)
    return names.flatmap(lambda chosen: st.tuples(missing, st.fixed_dictionaries({n: lies[n] for n in chosen}))).map(
        lambda drawn: {n: v for n, v in {**true, **drawn[1]}.items() if not (drawn[0] and n in drawn[1])}
    )


ARRAYS = mostly(dict(HONEST), {name: lies_about(name) for name in HONEST} | {"more": lies_about("w")}).map(ArrayRecord)
TRUE_METRICS = {"train_loss": 0.5, "eval_loss": 0.5, "eval_acc": 0.5, "eval_f1": [0.5, 1.0], "num-examples": 2}
LIED_ABOUT = CENTRAL | {"f1": [0.5, 0.5]}
METRICS = mostly(TRUE_METRICS, dict.fromkeys([*TRUE_METRICS, "more"], NUMBERS)).map(MetricRecord)
NO_LOSS = mostly(TRUE_METRICS, {"train_loss": NUMBERS}).map(MetricRecord)
CONFIGS = st.dictionaries(WORDS | st.just("opt-in"), SETTING, max_size=3).map(ConfigRecord)
ANY = ARRAYS | METRICS | CONFIGS
TRUTH = {"arrays": HONEST, "metrics": MetricRecord(TRUE_METRICS), "config": ConfigRecord({"opt-in": True})}
WRONG = [{"arrays": ARRAYS}, {"metrics": METRICS}, {"metrics": NO_LOSS}, {"config": CONFIGS}]
WRONG.append(dict.fromkeys([*TRUTH, "more"], ANY))
CONTENT = st.one_of(*(mostly(TRUTH, wrong) for wrong in WRONG), st.dictionaries(WORDS, ANY, max_size=3))
LIE = CONTENT.map(RecordDict) | st.builds(Error, st.integers(0, 2**31 - 1), WORDS)
LIES = st.fixed_dictionaries({MessageType.TRAIN: LIE, MessageType.QUERY: LIE, MessageType.EVALUATE: LIE})


def a_round(lies: dict) -> tuple[dict, dict, list[int], list[str]]:
    """All phases of a round with one liar: its row, the model, who opted in, and the log (first the TRAIN fault)."""
    grid = InProcessGrid(honest, DEFAULTS, 3)
    grid.handlers = {LIAR: lambda msg, context: Message(lies[msg.metadata.message_type], reply_to=msg)}
    mailbox = Mailbox(grid)
    everyone = connected_nodes(grid)
    lines: list[str] = []
    with mock.patch.object(logging.getLogger("flwr"), "handle", lambda record: lines.append(record.getMessage())):
        batch, model, loss = train(mailbox, everyone, MODEL, INSTRUCTIONS, CONFIG)
        lines.insert(0, batch.log_faults())
        opted_in = collect_opt_ins(mailbox, send_queries(mailbox, everyone, 3, CONFIG))
        reports, figures = evaluate(mailbox, everyone, MODEL, INSTRUCTIONS, LIED_ABOUT, CONFIG)
    row = {"train_loss": loss, "train_received": batch.received, "reports": reports, **figures}
    assert batch.received + batch.failed + batch.rejected == 3
    return row, model, [grid.partition(node.node_id) for node in opted_in], lines


NO = Error(code=0, reason="no")
WITHOUT = a_round({MessageType.TRAIN: NO, MessageType.QUERY: NO, MessageType.EVALUATE: NO})
FEDERATED = [key for key in WITHOUT[0] if key[:9] in ("federated", "reports")]


def check(lies: dict) -> str:
    """One round with these lies; return what became of the TRAIN reply."""
    row, model, opted_in, lines = a_round(lies)
    without, model_without, opted_in_without, _ = WITHOUT
    json.dumps(row, allow_nan=False)
    assert all(tensor.double().isfinite().all() for tensor in model.values())
    assert all(model[name].dtype == tensor.dtype for name, tensor in MODEL.items())
    if row["train_received"] == 2:  # the liar is left out, as if it had never replied
        assert same_bits(model, model_without)
        assert row["train_loss"] == without["train_loss"]
    else:  # what it says cannot be told from the truth
        reply = lies[MessageType.TRAIN]
        assert 1 <= reply["metrics"]["num-examples"] <= MAX_EXAMPLES
        assert math.isfinite(reply["metrics"]["train_loss"])
        assert reply["arrays"].keys() == MODEL.keys()
        for name, tensor in reply["arrays"].to_torch_state_dict().items():
            assert tensor.isfinite().all()
            assert (tensor.shape, tensor.dtype) == (MODEL[name].shape, MODEL[name].dtype)
    if row["evaluate_received"] == 2:
        assert all(row[key] == without[key] for key in FEDERATED)
    assert [place for place in opted_in if place != LIAR] == opted_in_without
    if LIAR in opted_in:
        assert lies[MessageType.QUERY]["config"]["opt-in"] is True
    for line in lines:
        assert line.isprintable()
        assert len(line) < 1200
    if isinstance(lies[MessageType.TRAIN], Error):
        return "an error"
    if row["train_received"] == 3:
        return "used"
    return next((kind for kind in ("array '", "train_loss is", "num-examples is") if kind in lines[0]), "other")


def test_no_lie_ends_a_round_or_spoils_its_figures():
    seen: Counter[str] = Counter()

    @settings(
        max_examples=int(os.environ.get("EXAMPLES", "100")),
        derandomize="EXAMPLES" not in os.environ,  # the suite tells the same lies every time
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
    )
    @given(LIES)
    def lie(lies):
        seen[check(lies)] += 1

    lie()
    # The lies are of all kinds: none of them is only an empty reply.
    assert all(seen[kind] for kind in ("an error", "used", "array '", "train_loss is", "num-examples is")), seen


def test_a_row_with_the_largest_figures_allowed_is_json(grid):
    def claims(msg, context):
        if msg.metadata.message_type == MessageType.TRAIN:
            arrays = {name: torch.full_like(t, 2**53 if name == "n" else 1e38) for name, t in MODEL.items()}
            arrays["d"] = torch.full_like(MODEL["d"], 1e38)
            metrics = MetricRecord({"train_loss": 1e38, "num-examples": MAX_EXAMPLES})
            return Message(RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics}), reply_to=msg)
        metrics = MetricRecord({"eval_loss": -1e38, "eval_acc": 1.0, "num-examples": MAX_EXAMPLES})
        return Message(RecordDict({"metrics": metrics}), reply_to=msg)

    grid.client_app = claims
    grid.handlers = {0: honest}
    mailbox = Mailbox(grid)
    batch, model, loss = train(mailbox, connected_nodes(grid), MODEL, INSTRUCTIONS, CONFIG)
    assert batch.received == 3
    assert all(tensor.double().isfinite().all() for tensor in model.values())
    _, row = evaluate(mailbox, connected_nodes(grid), MODEL, INSTRUCTIONS, CENTRAL, CONFIG)
    assert row["evaluate_received"] == 3
    json.dumps(figures.new_row(KEYS, 1) | row | {"train_loss": loss}, allow_nan=False)


# ----------------------------------------------------------------------- Figures of a round


def test_the_time_left_is_that_of_the_median_round_after_the_first():
    rows = [figures.new_row(KEYS, r) for r in range(4)]
    for row, total in zip(rows[1:], (20.0, 3.5, 6.5), strict=True):  # round 0 has no time
        row["seconds_total"] = total
        row |= {"megabytes_sent": 12.345, "megabytes_received": 0.0}
    rows[3] |= {"seconds_nodes": 1.0, "seconds_train": 2.0, "seconds_central": 3.0}
    expected = "Round took 6.5 s (nodes 1.0, train 2.0, central 3.0), 12.3 MB sent, 0.0 MB received; about 0:00:50 left"
    assert figures.time_summary(rows, rounds_left=10) == expected
    assert figures.time_summary(rows, rounds_left=0).endswith("about 0:00:00 left")
    rows[1] |= {"seconds_nodes": 1.0, "seconds_train": 19.0, "seconds_central": 0.0}
    assert figures.time_summary(rows[:2], rounds_left=3).endswith("about 0:01:00 left")
