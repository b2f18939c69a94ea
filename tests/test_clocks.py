"""Nodes whose clock is wrong: each can at most leave itself out. test_messaging.py has lies about a reply's time."""

import time
from types import SimpleNamespace

from flwr.app import Message

from pytorch_example_low_level import client_app, task
from tests.conftest import results

MINUTES = 60.0


def with_clock(offset: float, monkeypatch):
    """A node whose clock is this many seconds fast. Flower takes the time of a reply from the same clock."""

    def handle(message: Message, context) -> Message:
        clock = SimpleNamespace(time=lambda: time.time() + offset, sleep=time.sleep)
        with monkeypatch.context() as patch:
            patch.setattr(client_app, "time", clock)
            patch.setattr(task, "time", clock)
            reply = client_app.app(message, context)
        reply.metadata.created_at += offset
        return reply

    return handle


def test_a_fast_clock_leaves_out_its_node_and_a_slow_one_nobody(app, quick_plot, monkeypatch, caplog):
    grid = app.grid()
    grid.handlers = {1: with_clock(10 * MINUTES, monkeypatch), 2: with_clock(-10 * MINUTES, monkeypatch)}
    began = time.monotonic()
    times = {"train_timeout": 5 * MINUTES, "query_timeout": 5 * MINUTES, "evaluate_timeout": 5 * MINUTES}
    rows = results(app.run(grid, fraction_clients_train=1.0, opt_in_probability=1.0, **times))
    assert [(row["train_received"], row["train_failed"]) for row in rows[1:]] == [(4, 1)] * 2
    assert [row["evaluate_received"] for row in rows[1:]] == [4, 4]
    assert "left out partition 1 (train): the deadline passed before the message was handled" in caplog.text
    assert time.monotonic() - began < MINUTES  # nobody waits for the deadline
