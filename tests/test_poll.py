"""Looking for replies without waiting, for loops that go on with the first ones."""

import time

from flwr.app import ConfigRecord, MessageType, RecordDict

from pytorch_example_low_level import messaging
from pytorch_example_low_level.messaging import Mailbox, connected_nodes
from tests.grid import TimedGrid


def mailbox_with(delays: list[float], timeout: float):
    grid = TimedGrid(delays)
    mailbox = Mailbox(grid)
    content = RecordDict({"config": ConfigRecord({"server-round": 1})})
    return grid, mailbox, mailbox.send(connected_nodes(grid), MessageType.TRAIN, content, 1, timeout)


def test_a_poll_returns_what_is_there_and_does_not_wait():
    grid, mailbox, batch = mailbox_with([0.0, 9.0, 0.0, 9.0], timeout=0.3)
    started = time.monotonic()
    first = mailbox.poll(batch, lambda reply: "read")
    assert sorted(grid.partition(node.node_id) for node, _ in first) == [0, 2]
    assert mailbox.poll(batch, lambda reply: "read") == []
    assert time.monotonic() - started < 0.2
    assert (batch.received, batch.failed, len(batch.nodes)) == (2, 0, 2)
    time.sleep(0.35)
    assert mailbox.poll(batch, lambda reply: "read") == []
    assert (batch.received, batch.failed, len(batch.nodes)) == (2, 2, 0)


def test_what_a_poll_forgets_is_fetched_later_and_dropped():
    grid, mailbox, batch = mailbox_with([0.0, 0.1], timeout=9)
    assert len(mailbox.poll(batch, lambda reply: "read")) == 1
    mailbox.forget(batch)
    assert (batch.received, batch.failed, len(batch.nodes)) == (1, 0, 0)
    time.sleep(0.15)
    mailbox.poll(mailbox.send(connected_nodes(grid)[:1], MessageType.TRAIN, RecordDict(), 2, 9), lambda reply: "read")
    assert not grid.replies


def test_a_poll_of_many_asks_for_few_at_a_time():
    grid, mailbox, batch = mailbox_with([0.0] * 150, timeout=9)
    assert len(mailbox.poll(batch, lambda reply: "read")) == 150
    assert [len(look) for look in grid.looks] == [messaging.MAX_LOOK, messaging.MAX_LOOK, 150 - 2 * messaging.MAX_LOOK]
