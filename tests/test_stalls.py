"""Uploads that stop: Flower waits for minutes in `pull_messages`, and a phase does not."""

import threading
import time

import pytest
from flwr.app import MessageType, RecordDict

from pytorch_example_low_level import messaging
from pytorch_example_low_level.messaging import Batch, Mailbox, connected_nodes
from tests.grid import TimedGrid


class StallingGrid(TimedGrid):
    """A Grid over a network, in which fetching the first reply of some partitions takes until `released`."""

    def __init__(self, stalled: set[int], nodes: int = 4) -> None:
        super().__init__([0.0] * nodes)
        self.simulated = False
        self.stalled = stalled
        self.released = threading.Event()
        self.at_once = self.most = 0  # stalled requests

    def pull_messages(self, message_ids):
        (message_id,) = message_ids
        number = int(message_id.removeprefix("message-"))
        if number < len(self.contexts) and self.partition(self.sent[number].metadata.dst_node_id) in self.stalled:
            self.at_once += 1
            self.most = max(self.most, self.at_once)
            self.released.wait(30)
            self.at_once -= 1
        return super().pull_messages(message_ids)


@pytest.fixture(autouse=True)
def short_times(monkeypatch) -> None:
    monkeypatch.setattr(messaging, "GLANCE", 0.05)
    monkeypatch.setattr(messaging, "PATIENCE", 0.4)


def phase(mailbox: Mailbox, timeout: float) -> tuple[list[int], Batch, float]:
    """The partitions whose replies were used, the batch, and the seconds from the deadline to the end."""
    batch = mailbox.send(connected_nodes(mailbox.grid), MessageType.TRAIN, RecordDict(), 1, timeout)
    used = [mailbox.grid.partition(node.node_id) for node, _ in mailbox.collect(batch, lambda content: content, 8)]
    return used, batch, time.time() - batch.deadline


def test_a_phase_ends_soon_after_its_deadline_with_all_other_replies():
    mailbox = Mailbox(StallingGrid({0, 1, 3}))
    used, batch, late = phase(mailbox, 0.6)
    assert used == [2]
    assert (batch.received, batch.failed) == (1, 3)
    assert 0.4 <= late < 0.9  # one patience for all
    assert batch.log_faults().endswith("(train): no reply within 0.6 s")


def test_later_phases_work_while_a_download_is_stalled_and_its_reply_is_dropped():
    grid = StallingGrid({1})
    mailbox = Mailbox(grid)
    phase(mailbox, 0.3)
    used, _, late = phase(mailbox, 5)
    assert used == [0, 1, 2, 3]
    assert late < -4
    grid.released.set()
    time.sleep(0.2)
    used, batch, _ = phase(mailbox, 5)
    assert (used, batch.received, batch.failed) == ([0, 1, 2, 3], 4, 0)
    assert (mailbox.downloads, len(mailbox.late)) == ({}, 0)


def test_a_download_that_is_left_behind_does_not_delay_a_later_phase():
    grid = StallingGrid({1})
    mailbox = Mailbox(grid)
    phase(mailbox, 0.3)
    grid.delays[2] = 60.0
    used, _, late = phase(mailbox, 0.3)
    assert used == [0, 1, 3]
    assert late < 0.2  # and not another patience
    grid.released.set()


def test_nodes_that_all_stall_cost_one_patience_for_each_eight():
    grid = StallingGrid(set(range(16)), nodes=16)
    used, batch, late = phase(Mailbox(grid), 0.6)
    assert (used, batch.failed) == ([], 16)
    assert 0.8 <= late < 1.1
    grid.released.set()


def test_at_most_eight_replies_of_any_phase_are_fetched_at_a_time():
    grid = StallingGrid(set(range(9)), nodes=9)
    mailbox = Mailbox(grid)
    batch = mailbox.send(connected_nodes(grid), MessageType.QUERY, RecordDict(), 1, 1.3)
    threading.Timer(1.2, grid.released.set).start()
    assert len(list(mailbox.collect(batch, lambda content: content))) == 9
    assert grid.most == messaging.MAX_WAITING


def test_a_slow_download_of_a_prompt_reply_counts():
    grid = StallingGrid({2})
    mailbox = Mailbox(grid)
    threading.Timer(0.7, grid.released.set).start()  # 0.2 s after the deadline
    used, batch, _ = phase(mailbox, 0.5)
    assert (used, batch.failed) == ([0, 1, 2, 3], 0)


def test_downloads_are_part_of_the_window():
    """At most `window` models are in memory, those that are being fetched included."""
    grid = StallingGrid(set(range(4)), nodes=12)
    mailbox = Mailbox(grid)
    batch = mailbox.send(connected_nodes(grid), MessageType.TRAIN, RecordDict(), 1, 0.5)
    most = 0
    for _ in mailbox.collect(batch, lambda content: content, 4):
        most = max(most, len(mailbox.downloads))
    assert most <= 4
    assert batch.received == 8
