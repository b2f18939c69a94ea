"""Faults injected on purpose: one row a fault, against the whole loop.

For each: the run ends well; the final model has the bits of the same run without the faulty
reply; results.json counts it; one warning names node, round and reason.
"""

import math
import re

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MessageType, MetricRecord, RecordDict

from pytorch_example_low_level import client_app, task
from pytorch_example_low_level.config import UserError
from tests.conftest import model, results, same_bits

pytestmark = pytest.mark.usefixtures("quick_plot")

METRICS = {"loss": 1.0, "accuracy": 0.1, "accuracy_per_class": [None] * 10}
FAULTY = 2  # the partition that misbehaves; the cohort is everybody
ROUNDS = 2


def honest(msg, context):
    return client_app.app(msg, context)


def on_arrays(change):
    """A handler that lets `change` loose on the state_dict of its TRAIN reply."""

    def handler(msg, context):
        state = honest(msg, context).content["arrays"].to_torch_state_dict()
        metrics = MetricRecord({"train_loss": 1.0, "num-examples": 10})
        return Message(RecordDict({"arrays": ArrayRecord(change(state)), "metrics": metrics}), reply_to=msg)

    return handler


def on_metrics(**changes):
    """A handler that changes metrics of its reply; None takes one out."""

    def handler(msg, context):
        reply = honest(msg, context)
        for name, value in changes.items():
            key = name.replace("_", "-") if name.startswith("num") else name
            del reply.content["metrics"][key]
            if value is not None:
                reply.content["metrics"][key] = value
        return reply

    return handler


def with_array(**fields):
    """A handler whose first array lies about itself."""

    def handler(msg, context):
        reply = honest(msg, context)
        arrays = reply.content["arrays"]
        name = next(iter(arrays))
        true = arrays[name]
        arrays[name] = Array(
            fields.get("dtype", true.dtype), fields.get("shape", true.shape),
            fields.get("stype", true.stype), fields.get("data", true.data),
        )  # fmt: skip
        return reply

    return handler


def npy(shape: tuple[int, ...], dtype: str = "<f4", *, values: bytes = b"") -> bytes:
    """Data in NumPy's format that promises `shape`, whatever it holds."""
    import io

    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": dtype, "fortran_order": False, "shape": shape})
    return stream.getvalue() + values


def raises(msg, context):
    raise RuntimeError("INFO : 🎉 all is well\nout of memory")


def never(msg, context):
    return None


def unavailable(msg, context):
    return Message(Error(code=5, reason="node unavailable"), reply_to=msg)  # from Flower, not from the app


def replace(state: dict, value) -> dict:
    state["fc1.bias"] = value(state["fc1.bias"])
    return state


def without(state: dict, name: str) -> dict:
    del state[name]
    return state


def content(records: dict):
    return lambda msg, context: Message(RecordDict(records), reply_to=msg)


def evaluation(msg, context):
    metrics = MetricRecord({"eval_loss": 1.0, "eval_acc": 0.5, "num-examples": 10})
    return Message(RecordDict({"metrics": metrics}), reply_to=msg)


TRAIN_FAULTS = {
    "raises": (raises, "failed", "out of memory"),
    "error": (lambda m, c: Message(Error(code=3, reason="no"), reply_to=m), "failed", "no"),
    "error without a reason": (lambda m, c: Message(Error(code=3, reason=""), reply_to=m), "failed", "error 3"),
    "error of spaces": (lambda m, c: Message(Error(code=3, reason=" "), reply_to=m), "failed", "no reason given"),
    "never answers": (never, "failed", "no reply within"),
    "NaN": (on_arrays(lambda s: replace(s, lambda t: t * math.nan)), "rejected", "'fc1.bias' is not finite"),
    "infinite": (on_arrays(lambda s: replace(s, lambda t: t + math.inf)), "rejected", "not finite"),
    "wrong shape": (on_arrays(lambda s: replace(s, lambda t: t[:-1])), "rejected", "float32[127], not float32[128]"),
    "extra axis": (on_arrays(lambda s: replace(s, lambda t: t[None])), "rejected", "float32[1, 128]"),
    "float64": (on_arrays(lambda s: replace(s, lambda t: t.double())), "rejected", "float64[128], not float32"),
    "integers": (on_arrays(lambda s: replace(s, lambda t: t.long())), "rejected", "int64[128]"),
    "big-endian": (
        with_array(data=npy((16, 1, 5, 5), ">f4", values=b"\0" * 1600)),
        "rejected",
        "are not float32[16, 1, 5, 5] in NumPy's format",
    ),
    "missing array": (on_arrays(lambda s: without(s, "fc1.bias")), "rejected", "other names: ['fc1.bias']"),
    "extra array": (on_arrays(lambda s: s | {"more": torch.zeros(1)}), "rejected", "other names: ['more']"),
    "renamed": (on_arrays(lambda s: {"x" + k: v for k, v in s.items()}), "rejected", "other names"),
    "no arrays": (on_arrays(lambda s: {}), "rejected", "other names"),
    "header promises a terabyte": (with_array(data=npy((2**38,))), "rejected", "NumPy's format"),
    "true header, no values": (with_array(data=npy((16, 1, 5, 5))), "rejected", "NumPy's format"),
    "values too many": (with_array(data=npy((16, 1, 5, 5), values=b"\0" * 10**6)), "rejected", "NumPy's format"),
    "pickle": (with_array(data=b"\x80\x04cos\nsystem\n."), "rejected", "NumPy's format"),
    "object array": (with_array(data=npy((16, 1, 5, 5), "|O")), "rejected", "NumPy's format"),
    "no data": (with_array(data=b""), "rejected", "NumPy's format"),
    "header a set": (with_array(data=b"\x93NUMPY\x01\x00\x09\x00{[]: 1}  "), "rejected", "NumPy's format"),
    "header no Python": (with_array(data=b"\x93NUMPY\x01\x00\x10\x00__import__('os')"), "rejected", "NumPy's format"),
    "no metrics": (content({"arrays": ArrayRecord()}), "rejected", "num-examples is None"),
    "metrics no metrics": (content({"metrics": ConfigRecord({"num-examples": 3})}), "rejected", "num-examples is None"),
    "empty": (content({}), "rejected", "num-examples is None"),
    "an EVALUATE reply": (evaluation, "rejected", "train_loss is None"),
    "num-examples 0": (on_metrics(num_examples=0), "rejected", "num-examples is 0"),
    "num-examples negative": (on_metrics(num_examples=-5), "rejected", "num-examples is -5"),
    "num-examples fractional": (on_metrics(num_examples=1.5), "rejected", "num-examples is 1.5"),
    "num-examples 2^60": (on_metrics(num_examples=2**60), "rejected", "num-examples is 1152921504606846976"),
    "num-examples a list": (on_metrics(num_examples=[1, 2]), "rejected", "num-examples is [1, 2]"),
    "num-examples missing": (on_metrics(num_examples=None), "rejected", "num-examples is None"),
    "loss NaN": (on_metrics(train_loss=math.nan), "rejected", "train_loss is nan"),
    "loss infinite": (on_metrics(train_loss=math.inf), "rejected", "train_loss is inf"),
    "loss 1e308": (on_metrics(train_loss=1e308), "rejected", "train_loss is 1e+308, not a finite number"),
    "loss missing": (on_metrics(train_loss=None), "rejected", "train_loss is None"),
}

EVALUATE_FAULTS = {
    "raises": (raises, "out of memory"),
    "never answers": (never, "no reply within"),
    "empty": (content({}), "num-examples is None"),
    "num-examples 0": (on_metrics(num_examples=0), "num-examples is 0"),
    "loss NaN": (on_metrics(eval_loss=math.nan), "eval_loss is nan"),
    "loss 1e308": (on_metrics(eval_loss=1e308), "eval_loss is 1e+308"),
    "accuracy infinite": (on_metrics(eval_acc=math.inf), "eval_acc is inf"),
    "accuracy above 1": (on_metrics(eval_acc=1.5), "eval_acc is 1.5"),
}

QUERY_FAULTS = {
    "raises": raises,
    "never answers": never,
    "empty": content({}),
    "neither yes nor no": content({"config": ConfigRecord({"opt-in": "yes"})}),
    "a number": content({"config": ConfigRecord({"opt-in": 1})}),
    "no config": content({"config": MetricRecord({"opt-in": 1})}),
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


def run_with(app, handler, partitions=(FAULTY,)):
    grid = app.grid()
    grid.handlers = dict.fromkeys(partitions, handler)
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


@pytest.mark.parametrize("fault", EVALUATE_FAULTS)
def test_a_faulty_evaluate_reply_is_left_out(app, caplog, fault):
    handler, reason = EVALUATE_FAULTS[fault]
    directory = run_with(app, only(MessageType.EVALUATE, handler))
    first, second = results(directory)[1:]
    assert (first["opted_in"], first["evaluate_received"], first["evaluate_failed"]) == (5, 4, 1)
    assert (second["evaluate_received"], second["evaluate_failed"]) == (5, 0)
    assert math.isfinite(first["federated_evaluate_loss"])
    (warning,) = warnings(caplog)
    assert re.match(r"Round 1: left out partition 2 \(evaluate\): ", warning)
    assert reason in warning


@pytest.mark.parametrize("fault", QUERY_FAULTS)
def test_a_faulty_reply_to_a_query_is_no_opt_in(app, fault):
    directory = run_with(app, only(MessageType.QUERY, QUERY_FAULTS[fault]))
    first, second = results(directory)[1:]
    assert (first["query_sent"], first["query_received"], first["opted_in"]) == (5, 4, 4)
    assert second["opted_in"] == 5


def test_a_node_that_answers_twice_is_counted_once(app):
    def twice(msg, context):
        reply = honest(msg, context)
        return [reply, reply]

    directory = run_with(app, only(MessageType.TRAIN, twice))
    assert same_bits(model(directory), model(app.run(**OVERRIDES)))
    assert [row["train_received"] for row in results(directory)[1:]] == [5, 5]


def test_a_reply_that_comes_in_a_later_phase_is_ignored(app, without_reply):
    """The reply to round 1's TRAIN lies in the grid when later phases look for theirs."""
    grid = app.grid()
    held: list[Message] = []

    def keep(msg, context):
        held.append(honest(msg, context))

    grid.handlers = {FAULTY: only(MessageType.TRAIN, keep)}
    pull = grid.pull_messages

    def pull_with_the_late_one(message_ids):
        replies = list(pull(message_ids))
        late_phase = grid.sent[-1].metadata.message_type != MessageType.TRAIN or grid.sent[-1].metadata.group_id != "1"
        return replies + (held if late_phase else [])

    grid.pull_messages = pull_with_the_late_one
    directory = app.run(grid, **OVERRIDES | SHORT)
    assert held
    assert same_bits(model(directory), without_reply)


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


def test_a_round_in_which_all_are_faulty_leaves_the_model_as_it_was(app, caplog):
    directory = run_with(app, only(MessageType.TRAIN, unavailable), partitions=range(5))
    start, first, second = results(directory)
    assert (first["train_received"], first["train_failed"], first["train_loss"]) == (0, 5, None)
    assert first["centralized_loss"] == start["centralized_loss"]
    assert second["train_received"] == 5
    assert any("no usable TRAIN reply" in r.message for r in caplog.records)


def test_too_few_images_for_the_nodes_is_one_clear_error(app, caplog):
    fault = (
        r"No node can train: 6 nodes \(partition .*\) \(train\): .*"
        r"120 training images are too few for 130 nodes \(5 each\)"
    )
    with pytest.raises(UserError, match=fault):
        few = {"fraction_clients_train": 0.05, "opt_in_probability": 0.1, "num_server_rounds": 1}
        app.run(app.grid(num_nodes=130), partitioner="dirichlet", **few)
    (train,) = warnings(caplog)  # one, however many nodes; the run ends with it
    assert "left out 6 nodes" in train


def test_the_last_fault_is_one_of_train(app):
    def handler(msg, context):
        return Message(Error(code=5, reason=f"no {msg.metadata.message_type}"), reply_to=msg)

    grid = app.grid()
    grid.handlers = dict.fromkeys(range(5), handler)
    with pytest.raises(UserError, match=r"The last fault: 5 nodes \(.*\) \(train\): no train$"):
        app.run(grid, **OVERRIDES)


@pytest.mark.parametrize("working", [0, 1])
def test_a_run_ends_in_round_1_if_no_node_can_train(app, working):
    """What lies in the data or the code of every node will not change in a later round."""
    grid = app.grid()
    grid.handlers = dict.fromkeys(range(working, 5), only(MessageType.TRAIN, raises))
    if working:
        app.run(grid, **OVERRIDES)
        assert [row["train_received"] for row in results(app.latest())] == [None, 1, 5]
    else:
        said = (
            r"^No node can train: 5 nodes \(partition 0, partition 1, partition 2, \.\.\.\) \(train\): out of memory$"
        )
        with pytest.raises(UserError, match=said):
            app.run(grid, **OVERRIDES)
        assert [row["round"] for row in results(app.latest())] == [0]
        assert {message.metadata.message_type for message in grid.sent} == {MessageType.TRAIN}


def test_a_run_in_which_all_are_faulty_says_that_it_learned_nothing(app):
    with pytest.raises(UserError, match="Nothing was learned"):
        run_with(app, only(MessageType.TRAIN, unavailable, rounds=(1, 2)), partitions=range(5))
    directory = app.latest()
    assert [row["train_received"] for row in results(directory)[1:]] == [0, 0]
    assert (directory / "metrics.png").exists()
    assert not (directory / "final_model.pt").exists()


def test_a_model_that_diverged_leaves_null_and_no_nan(app, monkeypatch):
    monkeypatch.setattr(task, "test", lambda *args: METRICS | {"loss": math.nan})
    directory = run_with(app, only(MessageType.EVALUATE, honest))
    assert [row["centralized_loss"] for row in results(directory)] == [None] * 3
    assert "NaN" not in (directory / "results.json").read_text()
