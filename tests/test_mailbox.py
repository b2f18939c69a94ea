"""Deadlines, order and late answers, on a Grid whose replies come when the test says so."""

import time

import pytest
from flwr.app import ConfigRecord, Message, MessageType, RecordDict

from pytorch_example_low_level import server_app
from pytorch_example_low_level.config import REPLY_GRACE
from pytorch_example_low_level.server_app import Mailbox, Node
from tests.grid import TimedGrid, make_context

NODES = 4


def push(mailbox: Mailbox, timeout: float, message_type: str = MessageType.QUERY):
    grid = mailbox.grid
    nodes = sorted(Node(grid.partition(i), i) for i in grid.contexts)
    content = RecordDict({"config": ConfigRecord({"server-round": 1})})
    return mailbox.push(nodes, message_type, content, 1, timeout)


def answered(pairs) -> list[bool]:
    return [reply is not None for _, reply in pairs]


def test_replies_come_in_the_order_of_the_batch_not_of_arrival():
    mailbox = Mailbox(TimedGrid([0.3, 0.1, 0.2, 0.0]))
    pairs = list(mailbox.collect(push(mailbox, 5)))
    assert [node.key for node, _ in pairs] == [0, 1, 2, 3]
    assert answered(pairs) == [True] * 4
    for node, reply in pairs:
        assert reply.metadata.src_node_id == node.node_id


@pytest.mark.parametrize("window", [None, 1, 2, 8])
def test_who_is_late_is_left_out_and_the_others_are_not(window):
    mailbox = Mailbox(TimedGrid([9, 0.0, 9, 0.1]))
    started = time.monotonic()
    pairs = list(mailbox.collect(push(mailbox, 0.5), window))
    assert answered(pairs) == [False, True, False, True]
    assert 0.5 <= time.monotonic() - started < 1.5


def test_a_phase_ends_as_soon_as_all_have_answered():
    mailbox = Mailbox(TimedGrid([0.1] * NODES))
    started = time.monotonic()
    assert answered(mailbox.collect(push(mailbox, 60))) == [True] * 4
    assert time.monotonic() - started < 2


def test_replies_beyond_the_window_stay_where_they_are():
    grid = TimedGrid([0.2, 0, 0, 0])
    mailbox = Mailbox(grid)
    replies = mailbox.collect(push(mailbox, 5), window=2)
    next(replies)
    assert len(grid.pulled) == 2  # partition 3 answered long ago, but its turn is far away
    assert len(list(replies)) == 3


def test_late_answers_to_queries_are_dropped_during_the_next_phase():
    grid = TimedGrid([0.4, 0, 0, 0])
    mailbox = Mailbox(grid)
    first = push(mailbox, 0.2)
    assert answered(mailbox.collect(first)) == [False, True, True, True]
    grid.delays = [0.5] * 4
    second = push(mailbox, 5, MessageType.EVALUATE)
    pairs = list(mailbox.collect(second))
    assert {reply.metadata.reply_to_message_id for _, reply in pairs} == set(second.message_ids)
    assert first.message_ids[0] in grid.pulled  # taken out of the grid, and given to nobody
    assert mailbox._late == {}


def test_a_node_that_left_before_its_message_was_sent_is_not_waited_for():
    grid = TimedGrid([0.0] * NODES)
    mailbox = Mailbox(grid)
    gone = next(i for i in grid.contexts if grid.partition(i) == 2)
    grid.connected.discard(gone)
    started = time.monotonic()
    assert answered(mailbox.collect(push(mailbox, 60))) == [True, True, False, True]
    assert time.monotonic() - started < 5


def test_an_empty_batch_sends_nothing():
    mailbox = Mailbox(TimedGrid([0.0]))
    batch = mailbox.push([], MessageType.EVALUATE, RecordDict(), 1, 5)
    assert list(mailbox.collect(batch)) == []
    assert mailbox.grid.sent == []


def test_messages_near_their_expiry_are_not_looked_for(monkeypatch):
    """Flower's in-memory Grid raises KeyError for a message that has expired."""
    mailbox = Mailbox(TimedGrid([0.0] * NODES))
    batch = push(mailbox, 0.1)
    later = time.monotonic() + REPLY_GRACE
    monkeypatch.setattr(server_app.time, "monotonic", lambda: later)
    mailbox.grid.pull_messages = None  # would raise if it were called
    assert answered(mailbox.collect(batch)) == [False] * 4


def test_waiting_says_how_far_it_is(monkeypatch, caplog):
    caplog.set_level("INFO", logger="flwr")
    clock = iter(range(0, 10_000, 4))
    monkeypatch.setattr(server_app.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(server_app.time, "sleep", lambda seconds: None)
    mailbox = Mailbox(TimedGrid([0, 1e9, 0, 0]))
    list(mailbox.collect(push(mailbox, 100)))
    assert any(r.message.startswith("... 3/4 (query), ") for r in caplog.records)


# ------------------------------------------------------------- Deadlines, as a node sees them


def test_a_node_sees_that_nobody_waits_any_more(app):
    from pytorch_example_low_level import client_app

    app.grid()  # gives messages a sender
    context = make_context(app.config(), 5, {"partition-id": 0, "num-partitions": 5})

    def message(message_type: str, age: float, timeout: float = 10, **config) -> Message:
        content = RecordDict({"config": ConfigRecord({"server-round": 1, **config})})
        msg = Message(content, 5, message_type, ttl=timeout + REPLY_GRACE)
        msg.metadata.created_at -= age
        msg.metadata.__dict__["_message_id"] = "m"
        return msg

    for message_type in (MessageType.TRAIN, MessageType.EVALUATE):
        reply = client_app.app(message(message_type, age=11, lr=0.1), context)
        assert "deadline" in reply.error.reason
    started = time.monotonic()
    late = client_app.app(message(MessageType.QUERY, age=11, **{"max-delay": 1e6}), context)
    assert time.monotonic() - started < 1  # no sleep past the deadline, and no error either
    assert late.content["config"]["partition-id"] == 0
    started = time.monotonic()
    client_app.app(message(MessageType.QUERY, age=9.5, **{"max-delay": 1e6}), context)
    assert 0.4 < time.monotonic() - started < 2  # sleeps to the deadline, not to the end of its delay
