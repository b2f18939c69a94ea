"""Faults injected on purpose, against the whole loop: one row for each way that a reply takes to be left out.

For each: the run ends well; the final model has the bits of the same run without the faulty
reply; results.json counts it; one warning names node, round and reason. What is wrong with arrays and
metrics, one by one, is in test_messaging.py.
"""

import math
import re

import pytest
from flwr.app import ArrayRecord, Error, Message, MessageType, MetricRecord, RecordDict

from pytorch_example_low_level import client_app
from pytorch_example_low_level.config import UserError
from tests.conftest import model, results, same_bits

pytestmark = pytest.mark.usefixtures("quick_plot")

FAULTY = 2  # the partition that misbehaves; the cohort is everybody
ROUNDS = 2


def honest(msg, context):
    return client_app.app(msg, context)


def raises(msg, context):
    raise RuntimeError("INFO : 🎉 all is well\nout of memory")


def never(msg, context):
    return None


def not_finite(msg, context):
    state = honest(msg, context).content["arrays"].to_torch_state_dict()
    state["fc1.bias"] *= math.nan
    metrics = MetricRecord({"train_loss": 1.0, "num-examples": 10})
    return Message(RecordDict({"arrays": ArrayRecord(state), "metrics": metrics}), reply_to=msg)


def no_loss(msg, context):
    reply = honest(msg, context)
    reply.content["metrics"]["eval_loss"] = math.nan
    return reply


TRAIN_FAULTS = {
    "raises": (raises, "failed", "out of memory"),
    "never answers": (never, "failed", "no reply within"),
    "NaN": (not_finite, "rejected", "'fc1.bias' is not finite"),
}

OVERRIDES = {
    "num_server_rounds": ROUNDS,
    "fraction_clients_train": 1.0,
    "opt_in_probability": 1.0,
    "query_timeout": 60.0,
}
# Only where somebody never answers is a deadline short: the machine may be busy.
SHORT = {"train_timeout": 2.0, "evaluate_timeout": 2.0, "query_timeout": 2.0, "node_wait_timeout": 2.0}


def only(message_type: str, handler, rounds: tuple[int, ...] = (1,)):
    """Misbehave in these rounds and this phase, else be honest."""

    def wrapped(msg, context):
        if msg.metadata.message_type == message_type and int(msg.metadata.group_id) in rounds:
            return handler(msg, context)
        return honest(msg, context)

    wrapped.silent = handler is never
    return wrapped


def run_with(app, handler):
    grid = app.grid()
    grid.handlers = {FAULTY: handler}
    return app.run(grid, **OVERRIDES | (SHORT if handler.silent else {}))


def warnings(caplog) -> list[str]:
    return [r.message for r in caplog.records if r.levelname == "WARNING" and "left out" in r.message]


@pytest.fixture(scope="module")
def without_reply(tiny_dataset, tmp_path_factory):
    """The run in which the faulty node says in round 1 that it cannot train: what a fault must come to."""
    from tests.conftest import App

    app = App(tiny_dataset, tmp_path_factory.mktemp("reference"))
    sorry = only(MessageType.TRAIN, lambda m, c: Message(Error(code=0, reason="sorry"), reply_to=m))
    return model(run_with(app, sorry))


@pytest.mark.parametrize("fault", TRAIN_FAULTS)
def test_a_faulty_train_reply_is_left_out(app, caplog, without_reply, fault):
    handler, outcome, reason = TRAIN_FAULTS[fault]
    directory = run_with(app, only(MessageType.TRAIN, handler))
    assert same_bits(model(directory), without_reply)
    first, second = results(directory)[1:]
    assert (first["train_received"], first[f"train_{outcome}"]) == (4, 1)
    assert first["train_failed"] + first["train_rejected"] == 1
    assert second["train_received"] == 5
    (warning,) = warnings(caplog)
    assert re.match(r"Round 1: left out partition 2 \(train\): ", warning)
    assert reason in warning
    assert "\n" not in warning  # a node cannot write lines of its own into the log


def test_a_faulty_evaluate_reply_is_left_out(app, caplog):
    directory = run_with(app, only(MessageType.EVALUATE, no_loss))
    first, second = results(directory)[1:]
    assert (first["opted_in"], first["evaluate_received"], first["evaluate_failed"]) == (5, 4, 1)
    assert (second["evaluate_received"], second["evaluate_failed"]) == (5, 0)
    assert math.isfinite(first["federated_evaluate_loss"])
    (warning,) = warnings(caplog)
    assert warning.startswith("Round 1: left out partition 2 (evaluate): eval_loss is nan")


def test_a_node_that_leaves_between_the_phases_and_one_that_joins(app, caplog):
    grid = app.grid()
    grid.simulated = False
    everyone = list(grid.contexts)
    leaver = next(i for i in everyone if grid.partition(i) == FAULTY)
    joiner = next(i for i in everyone if grid.partition(i) == 4)
    grid.connected.discard(joiner)

    def come_and_go(messages):
        phase = messages[0].metadata.message_type, messages[0].metadata.group_id
        if phase == (MessageType.EVALUATE, "1"):
            grid.connected.discard(leaver)
            grid.connected.add(joiner)

    grid.before_push = come_and_go
    first, second = results(app.run(grid, **OVERRIDES))[1:]
    assert (first["nodes_available"], first["opted_in"], first["evaluate_received"]) == (4, 4, 3)
    assert (second["nodes_available"], second["train_received"], second["evaluate_received"]) == (4, 4, 4)


def test_too_few_images_for_the_nodes_is_one_clear_error(app, caplog):
    fault = r"No node can train: 6 nodes \(.*\) \(train\): .* 120 training images are too few for 130 nodes \(5 each\)"
    few = {"fraction_clients_train": 0.05, "opt_in_probability": 0.1, "num_server_rounds": 1}
    with pytest.raises(UserError, match=fault):
        app.run(app.grid(num_nodes=130), partitioner="dirichlet", **few)
    (train,) = warnings(caplog)  # one, however many nodes; the run ends with it
    assert "left out 6 nodes" in train


@pytest.mark.parametrize("working", [0, 1])
def test_a_run_ends_in_round_1_if_no_node_can_train(app, working):
    """What lies in the data or the code of every node will not change in a later round."""
    grid = app.grid()
    grid.handlers = dict.fromkeys(range(working, 5), only(MessageType.TRAIN, raises))
    if working:
        app.run(grid, **OVERRIDES)
        assert [row["train_received"] for row in results(app.latest())] == [None, 1, 5]
        return
    said = r"^No node can train: 5 nodes \(partition 0, partition 1, partition 2, \.\.\.\) \(train\): out of memory$"
    with pytest.raises(UserError, match=said):
        app.run(grid, **OVERRIDES)
    assert [row["round"] for row in results(app.latest())] == [0]
    assert {message.metadata.message_type for message in grid.sent} == {MessageType.TRAIN}
