"""Deadlines, order, late replies and faults, on a Grid whose replies come when the test says so; reading replies."""

import math
import re
import time
import tracemalloc
import weakref
from collections import deque
from itertools import pairwise

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MessageType, MetricRecord, RecordDict

from pytorch_example_low_level import messaging
from pytorch_example_low_level.messaging import (
    MAX_EXAMPLES,
    MAX_LOOK,
    MAX_REASONS,
    MAX_TEXT,
    MAX_WAITING,
    Batch,
    Mailbox,
    Rejected,
    connected_nodes,
    read_arrays,
    read_metrics,
    read_opt_in,
    to_array_record,
)
from tests.conftest import lines_of
from tests.grid import InProcessGrid, TimedGrid, echo, run_config

NODES = 4
NEVER = 1e9  # seconds


def send(mailbox: Mailbox, timeout: float, message_type: str = MessageType.QUERY) -> Batch:
    content = RecordDict({"config": ConfigRecord({"server-round": 1})})
    return mailbox.send(connected_nodes(mailbox.grid), message_type, content, 1, timeout)


def collect(mailbox: Mailbox, batch: Batch, *window: int) -> list[int]:
    """The partitions whose replies are used, in the order in which they come."""
    pairs = list(mailbox.collect(batch, lambda content: content, *window))
    assert batch.received == len(pairs)
    assert batch.received + batch.failed + batch.rejected == batch.sent
    return [mailbox.grid.partition(node.node_id) for node, _ in pairs]


# ---------------------------------------------------------------------------------- Nodes


def test_nodes_come_in_the_order_of_registration():
    grid = TimedGrid([0.0] * 300)
    nodes = connected_nodes(grid)
    assert [grid.partition(node.node_id) for node in nodes] == list(range(300))
    assert all(node.simulated for node in nodes)
    grid.simulated = False
    assert not any(node.simulated for node in connected_nodes(grid))


def test_a_node_is_called_by_its_name_its_partition_or_its_id():
    grid = TimedGrid([0.0] * 4)
    registered = grid.get_nodes
    names = ["", "ward\x1b[31m\n3", "\n", "x" * 10_000]

    def named():
        nodes = sorted(registered(), key=lambda node: node.registered_at)
        for node, name in zip(nodes, names, strict=True):
            node.name = name
        return nodes

    grid.get_nodes = named
    first, second, third, fourth = connected_nodes(grid)
    assert [node.name for node in (first, second, third)] == ["partition 0", "3", "partition 2"]
    assert len(fourth.name) < 1010
    grid.simulated = False
    first, second, third, _ = connected_nodes(grid)
    assert [node.name for node in (first, second, third)] == [f"node {first.node_id}", "3", f"node {third.node_id}"]


# -------------------------------------------------------------------- Deadlines and order


def test_a_message_says_until_when_the_server_waits():
    mailbox = Mailbox(TimedGrid([0.0] * NODES))
    content = RecordDict({"config": ConfigRecord({"server-round": 3, "lr": 0.5}), "arrays": ArrayRecord()})
    before = time.time()
    batch = mailbox.send(connected_nodes(mailbox.grid), MessageType.TRAIN, content, 3, 20)
    assert before + 20 <= batch.deadline <= time.time() + 20
    for message in mailbox.grid.sent:
        config = {"server-round": 3, "lr": 0.5, "deadline": batch.deadline}
        assert dict(message.content["config"]) == config
        assert message.content["arrays"] is content["arrays"]  # one copy for all nodes
        assert (message.metadata.message_type, message.metadata.group_id) == (MessageType.TRAIN, "3")
    assert "deadline" not in content["config"]  # the caller's record stays as it was


def test_replies_come_in_the_order_of_sending_each_with_its_node():
    def own_id(msg, context):
        return Message(RecordDict({"config": ConfigRecord({"id": context.node_id})}), reply_to=msg)

    mailbox = Mailbox(TimedGrid([0.3, 0.1, 0.2, 0.0], own_id))
    started = time.monotonic()
    pairs = list(mailbox.collect(send(mailbox, 60), lambda content: content["config"]["id"]))
    assert [mailbox.grid.partition(node.node_id) for node, _ in pairs] == [0, 1, 2, 3]
    assert [node.node_id for node, _ in pairs] == [seen for _, seen in pairs]
    assert time.monotonic() - started < 2  # a phase ends as soon as all have replied


@pytest.mark.parametrize("window", [1, 64])
def test_late_nodes_are_left_out_and_others_are_not(window, caplog):
    mailbox = Mailbox(TimedGrid([9, 0.0, 9, 0.1]))
    started = time.monotonic()
    batch = send(mailbox, 0.5, MessageType.TRAIN)
    assert collect(mailbox, batch, window) == [1, 3]
    assert 0.5 <= time.monotonic() - started < 1.5
    assert (batch.failed, batch.rejected) == (2, 0)
    batch.log_faults()
    (warning,) = lines_of(caplog)
    assert warning.endswith(" (train): no reply within 0.5 s")


@pytest.mark.parametrize(("clock", "busy", "used"), [(1e6, 0, 4), (math.nan, 0, 4), (math.nan, 0.2, 3), (-1e6, 0.2, 4)])
def test_a_wrong_clock_matters_only_after_the_deadline(clock, busy, used):
    grid = InProcessGrid(echo, run_config(), NODES)

    def wrong(msg, context):
        reply = echo(msg, context)
        reply.metadata.created_at += clock
        return reply

    grid.handlers = {1: wrong}
    mailbox = Mailbox(grid)
    batch = send(mailbox, 0.2 if busy else 60)
    time.sleep(busy)
    assert len(collect(mailbox, batch)) == used


def test_a_dead_node_first_costs_no_other_its_place():
    """40 models that take 0.6 s to fetch in all; the first node never replies, and the deadline is 0.3 s."""
    grid = TimedGrid([NEVER] + [0.0] * 39, fetch=0.015)
    alive: weakref.WeakSet = weakref.WeakSet()
    peak = 0

    class Model:
        pass

    def read(content: RecordDict) -> Model:
        nonlocal peak
        alive.add(model := Model())
        peak = max(peak, len(alive))
        return model

    mailbox = Mailbox(grid)
    batch = send(mailbox, 0.3, MessageType.TRAIN)
    used = []
    for node, model in mailbox.collect(batch, read, MAX_WAITING):
        used.append(grid.partition(node.node_id))
        del model
    assert used == list(range(1, 40))
    assert (batch.received, batch.failed) == (39, 1)
    assert peak <= MAX_WAITING
    assert max(map(len, grid.looks)) <= MAX_LOOK


@pytest.mark.parametrize(("room", "expected"), [(35, 3), (5, 1), (1000, 4)])
def test_fewer_large_models_wait_for_their_turn(monkeypatch, room, expected):
    monkeypatch.setattr(messaging, "MAX_WAITING_BYTES", room)
    grid = TimedGrid([0.0] * 9)
    mailbox = Mailbox(grid)
    batch = send(mailbox, 5)
    batch.size = 10  # bytes in a message
    assert len(list(mailbox.collect(batch, lambda content: content, 4))) == 9
    assert max(map(len, grid.looks)) == expected


def test_a_look_asks_for_a_bounded_number_of_ids():
    grid = TimedGrid([0.0] * 500 + [0.9] * 500)
    mailbox = Mailbox(grid)
    assert collect(mailbox, send(mailbox, 0.7)) == list(range(500))
    assert max(map(len, grid.looks)) == MAX_LOOK
    assert len(grid.looks) < 100  # 8 for the prompt, 8 for the late, and 70 while waiting
    grid.looks.clear()
    grid.delays = [0.0] * 1000
    assert len(collect(mailbox, send(mailbox, 60))) == 1000  # with the late ones of the phase before
    assert max(map(len, grid.looks)) == MAX_LOOK


class Clock:
    """A clock that only sleeping moves; `pauses` has each sleep, with the time before it."""

    def __init__(self) -> None:
        self.start = self.now = time.time()
        self.pauses: list[tuple[float, float]] = []

    def time(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pauses.append((self.now - self.start, seconds))
        self.now += seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(messaging, "time", clock)
    return clock


def silent(message: Message, context: Context) -> None:
    """The handler of a node that never replies."""


def test_looks_grow_rarer_in_a_long_phase_which_logs_its_progress(clock, caplog):
    """After 0.01 s, and from 1 s on after 1 % of the time since the sending, until it is 10 s."""
    caplog.set_level("INFO", logger="flwr")
    mailbox = Mailbox(InProcessGrid(silent, run_config(), NODES))
    assert collect(mailbox, send(mailbox, 3600)) == []
    assert [pause for at, pause in clock.pauses[:90]] == [pytest.approx(0.01, abs=1e-6)] * 90
    assert all(pause == pytest.approx(min(0.01 * at, 10), rel=1e-3) for at, pause in clock.pauses[110:-1])
    assert len(clock.pauses) < 2000
    assert clock.now - clock.start == pytest.approx(3600, abs=1e-3)  # the last pause ends at the deadline
    said = [re.fullmatch(r"\.\.\. 0/4 \(query\), (\d+) s to the deadline", r.message) for r in caplog.records]
    left = [3600, *(int(found[1]) for found in said)]
    assert max(a - b for a, b in pairwise(left)) <= 22


@pytest.mark.parametrize(("took", "pause", "timeout"), [(0.5, 0.5, 50), (20, messaging.PROGRESS_EVERY, 490)])
def test_slow_looks_take_half_of_the_time(clock, caplog, took, pause, timeout):
    """With 490 s, the last look but one ends after the deadline."""
    caplog.set_level("INFO", logger="flwr")

    class SlowGrid(InProcessGrid):
        def pull_messages(self, message_ids):
            clock.now += took
            return super().pull_messages(message_ids)

    mailbox = Mailbox(SlowGrid(silent, run_config(), NODES))
    assert collect(mailbox, send(mailbox, timeout)) == []
    pauses = [pause for _, pause in clock.pauses]
    assert pauses[:-2] == [pytest.approx(pause, abs=1e-6)] * len(pauses[:-2])
    assert pauses[:-2]
    assert min(pauses) >= 0
    assert caplog.records
    assert not any(", -" in record.message for record in caplog.records)


def test_late_replies_are_fetched_and_dropped_later():
    grid = TimedGrid([0.4, 0, 0, 0])
    mailbox = Mailbox(grid)
    first = send(mailbox, 0.2)
    first_ids = set(first.pending)
    assert collect(mailbox, first) == [1, 2, 3]
    grid.delays = [0.5] * 4
    second = send(mailbox, 5, MessageType.EVALUATE)
    assert collect(mailbox, second) == [0, 1, 2, 3]
    assert first_ids <= set(grid.pulled)
    assert grid.replies == {}  # nothing is left at the SuperLink
    grid.looks.clear()
    grid.delays = [0.0] * 4
    collect(mailbox, send(mailbox, 5))
    assert all(not first_ids & set(look) for look in grid.looks)  # and it is looked for no more


@pytest.mark.parametrize(("room", "looked_for"), [(5, 5), (10, messaging.MAX_WAITING)])  # they may be models
def test_late_replies_are_looked_for_only_while_there_is_room(room, looked_for):
    grid = TimedGrid([NEVER] * 30)
    mailbox = Mailbox(grid)
    assert mailbox.late.maxlen == 10_000
    mailbox.late = deque(maxlen=room)
    first = send(mailbox, 0.05)
    first_ids = set(first.pending)
    assert collect(mailbox, first) == []
    grid.delays = [0.0] * 30
    grid.looks.clear()
    assert len(collect(mailbox, send(mailbox, 5))) == 30
    assert len(first_ids & set().union(*grid.looks)) == looked_for


def test_a_node_that_left_before_the_message_is_not_awaited(caplog):
    grid = TimedGrid([0.0] * NODES)
    mailbox = Mailbox(grid)
    nodes = connected_nodes(grid)
    grid.connected.discard(nodes[2].node_id)
    started = time.monotonic()
    batch = mailbox.send(nodes, MessageType.TRAIN, RecordDict(), 1, 60)
    assert collect(mailbox, batch) == [0, 1, 3]
    assert time.monotonic() - started < 5
    assert batch.failed == 1
    batch.log_faults()
    assert lines_of(caplog) == [f"Round 1: left out {nodes[2].name} (train): the SuperLink did not accept the message"]


def test_a_phase_without_nodes_sends_nothing():
    mailbox = Mailbox(TimedGrid([0.0]))
    mailbox.grid.push_messages = None  # raises if it is called
    batch = mailbox.send([], MessageType.EVALUATE, RecordDict(), 1, 5)
    assert collect(mailbox, batch) == []


# --------------------------------------------------------------------------------- Faults


def fails(reason: str, code: int = 0):
    return lambda m, c: Message(Error(code=code, reason=reason), reply_to=m)


def faults_of(caplog, handlers: list, message_type: str = MessageType.TRAIN) -> list[str]:
    """The warnings of a phase in which node i handles its message as `handlers[i]` does."""
    grid = TimedGrid([0.0] * len(handlers))
    grid.handlers = dict(enumerate(handlers))
    mailbox = Mailbox(grid)
    batch = send(mailbox, 5, message_type)
    collect(mailbox, batch)
    first = batch.log_faults()
    assert f"Round 1: left out {first}" == lines_of(caplog)[0]
    return lines_of(caplog)


def test_nodes_that_fail_alike_share_one_short_warning(caplog):
    (warning,) = faults_of(caplog, [fails("x" * 10**6)] * 20)
    assert warning.startswith("Round 1: left out 20 nodes (partition ")
    assert warning.endswith(", ...) (train): " + "x" * MAX_TEXT + "...")
    assert warning.count("partition ") == 3


def test_two_nodes_that_fail_alike_are_named_in_the_order_of_the_sample(caplog):
    mailbox = Mailbox(TimedGrid([0.3, 0.0], fails("no")))  # the second one replies first
    batch = send(mailbox, 5, MessageType.TRAIN)
    assert collect(mailbox, batch) == []
    assert batch.log_faults() == "2 nodes (partition 0, partition 1) (train): no"


def test_many_reasons_are_a_few_lines(caplog):
    lines = faults_of(caplog, [fails(f"fault {i}") for i in range(30)])
    assert len(lines) == MAX_REASONS + 1
    assert sum(f"fault {i}" in line for i in range(30) for line in lines if line.endswith(f": fault {i}")) == 5
    assert "25 " in lines[-1]
    assert lines[-1].endswith("other reasons")


def test_a_missed_query_is_no_fault(caplog):
    mailbox = Mailbox(TimedGrid([NEVER] * NODES))
    batch = send(mailbox, 0.1, MessageType.QUERY)
    assert collect(mailbox, batch) == []
    time.sleep(0.1)
    assert (batch.failed, batch.log_faults(), lines_of(caplog)) == (4, "", [])


RAY = """<class 'ray.exceptions.RayTaskError(ClientAppException)'>:<'ray::ClientAppActor.run() (pid=7, ip=1.2.3.4)
  File "/opt/flwr/simulation/ray_transport/ray_actor.py", line 58, in run
    raise ClientAppException(str(ex)) from ex
flwr.client.client_app.ClientAppException:
Exception ClientAppException occurred. Message: 3 images are too few for 20 nodes
 \x1b\x07
"""


@pytest.mark.parametrize(
    ("reason", "named"),
    [
        (RAY, "Exception ClientAppException occurred. Message: 3 images are too few for 20 nodes"),
        ("", "error 7"),
        (" \n\t\u2028", "no reason given"),
        ("Traceback\n" * 10_000 + "ValueError: no", "ValueError: no"),
        ("\x1b[31mred\x1b[0m \u202etxt.exe\u2066 a\x07b\x00c", "[31mred [0m txt.exe a b c"),
        ("café 東京 🎉", "café 東京 🎉"),
        ("y" * MAX_TEXT, "y" * MAX_TEXT),
    ],
)
def test_the_last_line_of_an_error_is_its_reason(caplog, reason, named):
    (warning,) = faults_of(caplog, [fails(reason, code=7)], MessageType.QUERY)
    assert warning.split(" (query): ")[1] == named


# ---------------------------------------------------------- Replies that Flower cannot decode


class Undecodable(TimedGrid):
    """A Grid over a network that cannot decode the reply of partition 2.

    As Flower's, it has taken all replies of a request off the SuperLink by then, and loses them.
    """

    reachable = True

    def __init__(self, delays: list[float]) -> None:
        super().__init__(delays)
        self.simulated = False

    def pull_messages(self, message_ids):
        if not self.reachable:
            raise ValueError("Error parsing message")
        found = super().pull_messages(message_ids)
        bad = {m.metadata.message_id for m in self.sent if self.partition(m.metadata.dst_node_id) == 2}
        if any(reply.metadata.reply_to_message_id in bad for reply in found):
            raise ValueError("Error parsing message\x1b[2J")
        return found

    def get_node_ids(self):
        if not self.reachable:
            raise ConnectionError("the SuperLink is gone")
        return super().get_node_ids()


def test_a_reply_that_cannot_be_decoded_is_left_out(caplog):
    mailbox = Mailbox(Undecodable([0.0] * NODES))
    batch = send(mailbox, 5)
    mailbox.send([], MessageType.EVALUATE, RecordDict(), 1, 5)  # a phase without nodes changes nothing
    assert collect(mailbox, batch) == [0, 1, 3]
    assert batch.rejected == 1
    batch.log_faults()
    (warning,) = lines_of(caplog)
    assert warning.endswith("(query): unreadable reply: ValueError('Error parsing message\\x1b[2J')")


@pytest.mark.parametrize(
    ("simulated", "reachable", "error"),
    [(True, True, "Error parsing message"), (False, False, "the SuperLink is gone")],
)
def test_an_error_of_flower_in_a_simulation_and_an_unreachable_superlink_end_the_run(simulated, reachable, error):
    """In a simulation all nodes run this code, and the other replies of the request may be lost, too."""
    grid = Undecodable([0.0] * NODES)
    mailbox = Mailbox(grid)
    grid.simulated = simulated
    batch = send(mailbox, 5)
    grid.reachable = reachable
    with pytest.raises((ValueError, ConnectionError), match=error):
        collect(mailbox, batch)


def test_a_late_reply_that_cannot_be_decoded_costs_nobody_else_a_reply():
    grid = Undecodable([0.0, 0.0, 0.3, 0.0])
    mailbox = Mailbox(grid)
    assert collect(mailbox, send(mailbox, 0.1)) == [0, 1, 3]
    time.sleep(0.3)
    grid.delays = [0.0] * 4
    assert collect(mailbox, send(mailbox, 5)) == [0, 1, 3]


def test_over_a_network_a_look_asks_for_one_late_reply():
    grid = TimedGrid([NEVER] * NODES)
    grid.simulated = False
    mailbox = Mailbox(grid)
    late = send(mailbox, 0.05)
    late_ids = set(late.pending)
    assert collect(mailbox, late) == []
    grid.delays = [0.0] * NODES
    grid.looks.clear()
    assert len(collect(mailbox, send(mailbox, 5))) == NODES
    assert sum(look[0] in late_ids for look in grid.looks) == 1
    assert len(grid.looks) == NODES + 1


def test_a_message_outlives_its_deadline_at_the_superlink():
    mailbox = Mailbox(TimedGrid([0.0]))
    send(mailbox, 86_400)
    assert mailbox.grid.sent[0].metadata.ttl > 2 * 43_200  # a busy server may fetch the reply hours later


def test_a_constant_that_is_not_finite_may_come_back_as_it_was_sent():
    """Such as the mask of an attention layer."""
    sent = to_array_record({"mask": torch.tensor([[0.0, -math.inf], [0.0, 0.0]])})
    assert read_arrays(RecordDict({"arrays": sent}), sent)["mask"][0, 1] == -math.inf
    other = to_array_record({"mask": torch.tensor([[0.0, -math.inf], [-math.inf, 0.0]])})
    with pytest.raises(Rejected, match="'mask' is not finite"):
        read_arrays(RecordDict({"arrays": other}), sent)


@pytest.mark.parametrize("error", [RecursionError(), KeyError("x\n")])
def test_whatever_a_reader_raises_leaves_out_one_reply(error, caplog):
    mailbox = Mailbox(TimedGrid([0.0] * NODES))
    batch = send(mailbox, 5)

    def read(content: RecordDict) -> int:
        if batch.received == 1 and not batch.rejected:
            raise error
        return 1

    assert len(list(mailbox.collect(batch, read))) == 3
    assert (batch.received, batch.rejected) == (3, 1)
    batch.log_faults()
    assert f"unreadable reply: {error!r}" in caplog.text


def test_a_second_reply_of_a_node_is_ignored():
    grid = TimedGrid([0.0] * NODES, lambda m, c: [Message(m.content, reply_to=m), Message(RecordDict(), reply_to=m)])
    mailbox = Mailbox(grid)
    batch = send(mailbox, 5)
    pairs = list(mailbox.collect(batch, len))
    assert [size for _, size in pairs] == [1] * 4
    assert batch.received == 4


# --------------------------------------------------------------------------------- Arrays

GENERATOR = torch.Generator().manual_seed(0)  # each worker of pytest-xdist must see the same data
MODEL = {
    "float": torch.randn(3, 4, generator=GENERATOR),
    "double": torch.tensor([1.0, 1e37, -1e37], dtype=torch.float64),
    "half": torch.tensor([65504.0], dtype=torch.float16),
    "brain": torch.tensor([1e37, 3.14159], dtype=torch.bfloat16),
    "complex": torch.tensor([1 + 2j, -3j]),
    "bool": torch.tensor([True, False]),
    "byte": torch.arange(5, dtype=torch.uint8),
    "counter": torch.tensor(7),
    "large": torch.tensor([2**53, -(2**53)]),
    "none": torch.zeros(0, 3),
    "scalar": torch.tensor(0.5, dtype=torch.float64),
    "transposed": torch.randn(5, 2, generator=GENERATOR).t(),
    "channels last": torch.randn(2, 3, 4, 4, generator=GENERATOR).to(memory_format=torch.channels_last),
}
SENT = to_array_record(MODEL)


def reply(**changes) -> RecordDict:
    """A reply with all arrays of MODEL; those in `changes` are replaced, or left out for None."""
    arrays = {**SENT, **changes}
    return RecordDict({"arrays": ArrayRecord({name: array for name, array in arrays.items() if array is not None})})


def test_all_kinds_of_arrays_come_back_bit_by_bit():
    values = read_arrays(reply(), SENT)
    assert values.keys() == MODEL.keys()
    for name, tensor in MODEL.items():
        assert torch.equal(values[name].to(tensor.dtype), tensor), name
        assert values[name].shape == tensor.shape
        assert values[name].dtype == (torch.float32 if name == "brain" else tensor.dtype)


@pytest.mark.filterwarnings("error")  # PyTorch warns of memory that must not be written to
def test_what_is_read_shares_no_memory_with_the_reply():
    record = reply()
    read_arrays(record, SENT)["float"].zero_()
    assert torch.equal(read_arrays(record, SENT)["float"], MODEL["float"])


def changed(name: str, value) -> Array:
    """An honest array like that of MODEL, with `value` in its first place."""
    tensor = to_array_record(MODEL)[name].numpy().copy()
    tensor.reshape(-1)[0] = value
    return Array(tensor)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("float", math.nan), ("float", math.inf), ("float", -math.inf), ("half", math.inf), ("brain", math.nan),
        ("brain", 3.4e38), ("double", 1e39), ("double", -1e308), ("double", math.nan),
        ("complex", complex(0, math.inf)), ("complex", complex(math.nan, 0)),
        ("counter", 2**63 - 1), ("counter", -(2**63)), ("large", 2**53 + 2),
    ],
)  # fmt: skip
def test_numbers_that_would_spoil_a_sum_are_rejected(name, value):
    with pytest.raises(Rejected, match=f"array '{name}' is not finite, or has numbers beyond"):
        read_arrays(reply(**{name: changed(name, value)}), SENT)


@pytest.mark.parametrize(("name", "value"), [("double", 1e38), ("double", -1e38), ("counter", -(2**53))])
def test_the_largest_numbers_allowed_are_read(name, value):
    assert read_arrays(reply(**{name: changed(name, value)}), SENT)[name].flatten()[0] == value


def npy(header: bytes, values: bytes = b"", version: int = 1) -> bytes:
    """Data in NumPy's format with this header, whatever it says."""
    length = len(header).to_bytes(2 if version == 1 else 4, "little")
    return b"\x93NUMPY" + bytes([version, 0]) + length + header + values


HONEST = SENT["float"].data
VALUES = HONEST[-48:]
HEADERS = {
    "deep nesting": b"(" * 5000,
    "objects": b"{'descr': '|O', 'fortran_order': False, 'shape': (3, 4), }\n",
    "Fortran's order": b"{'descr': '<f4', 'fortran_order': True, 'shape': (3, 4), }\n",
}
LENGTH = len(HONEST) - 58  # of an honest header
DATA = {f"a header with {name}": npy(header.ljust(LENGTH)[:LENGTH], VALUES) for name, header in HEADERS.items()}
DATA |= {
    "nothing": b"", "a pickle": b"\x80\x04cos\nsystem\n.", "a byte less": HONEST[:-1], "a byte more": HONEST + b"\0",
    "the header alone": HONEST[:128], "zeros": b"\0" * len(HONEST), "shifted by a byte": HONEST[1:] + b"\0",
}  # fmt: skip


@pytest.mark.parametrize("data", DATA)
def test_false_data_are_compared_and_never_interpreted(data):
    array = Array("float32", (3, 4), "numpy.ndarray", DATA[data])
    with pytest.raises(Rejected, match=r"the data of array 'float' are not float32\[3, 4\] in NumPy's format"):
        read_arrays(reply(float=array), SENT)


@pytest.mark.parametrize(
    ("dtype", "shape", "named"),
    [
        ("float64", (3, 4), r"float64\[3, 4\]"), ("float32", (4, 3), r"float32\[4, 3\]"),
        ("float32", (12,), r"float32\[12\]"), ("float32", (), r"float32\[\]"),
        ("float32", (2**62, 2**62), r"float32\[4611686018427387904, 4611686018427387904\]"),
        ("float32", tuple(range(10**4)), r"float32\[0, 1, 2, 3, 4, 5, \.\.\.\]"),
        ("\x1b[2J\nfloat32", (3, 4), r"float32\[3, 4\], not"), ("no" * 10**6, (3, 4), "nono"),
    ],
)  # fmt: skip
def test_another_dtype_or_shape_is_rejected_and_named(dtype, shape, named):
    with pytest.raises(Rejected, match=rf"^array 'float' is {named}") as error:
        read_arrays(reply(float=Array(dtype, shape, "numpy.ndarray", HONEST)), SENT)
    assert len(str(error.value)) < 1100


def test_missing_and_extra_arrays_are_named():
    with pytest.raises(Rejected, match=r"reply's arrays have other names: \['float'\]"):
        read_arrays(reply(float=None), SENT)
    with pytest.raises(Rejected, match=r"reply's arrays have other names: \['more'\]"):
        read_arrays(reply(more=SENT["float"]), SENT)
    with pytest.raises(Rejected, match=r"names: \['0', .*, \.\.\.\]"):
        read_arrays(reply(**{str(i): SENT["float"] for i in range(1000)}), SENT)


@pytest.mark.parametrize(
    "content", [{}, {"arrays": MetricRecord({"float": 1.0})}, {"arrays": ConfigRecord()}, {"array": ArrayRecord()}]
)
def test_a_reply_without_arrays_is_rejected(content):
    with pytest.raises(Rejected, match="no ArrayRecord 'arrays'"):
        read_arrays(RecordDict(content), SENT)


@pytest.mark.parametrize("version", [1, 2])
def test_a_lie_takes_no_more_memory_than_a_model(version):
    """A header that promises 100 GB, one that is 50 MB long, and one that is both."""
    model = {"w": torch.zeros(250_000)}  # 1 MB
    sent = to_array_record(model)
    shape = b"{'descr': '<f4', 'fortran_order': False, 'shape': (25000000000,), }\n"
    lies = [npy(shape, version=version), npy(shape.ljust(128 - 10), sent["w"].data[128:], version)]
    if version == 2:
        lies.append(npy(shape.rjust(50_000_000), version=2))
    arrays = [Array("float32", (250_000,), "numpy.ndarray", data) for data in lies]
    arrays += [Array("float32", (25_000_000_000,), "numpy.ndarray", data) for data in lies]
    tracemalloc.start()
    try:
        read_arrays(RecordDict({"arrays": sent}), sent)
        honest = tracemalloc.get_traced_memory()[1]
        for array in arrays:
            tracemalloc.reset_peak()
            with pytest.raises(Rejected):
                read_arrays(RecordDict({"arrays": ArrayRecord({"w": array})}), sent)
            assert tracemalloc.get_traced_memory()[1] < 100_000 + honest / 2
    finally:
        tracemalloc.stop()
    assert honest < 2_500_000


# ------------------------------------------------------------------- Metrics and opt-ins


def metrics(**values) -> RecordDict:
    values = {"num-examples": 3, "train_loss": 0.5, "acc": 1} | {k.replace("m_", "m-"): v for k, v in values.items()}
    return RecordDict({"metrics": MetricRecord({k: v for k, v in values.items() if v is not None})})


@pytest.mark.parametrize(("weight", "loss"), [(1, 0.5), (MAX_EXAMPLES, -1e38)])
def test_metrics_are_read_as_floats_with_the_weight(weight, loss):
    asked_for = {"train_loss": 0.0, "acc": 0.0, "eval_auc": 0.0}
    values, num_examples = read_metrics(metrics(num_examples=weight, train_loss=loss), asked_for)
    assert values == {"train_loss": loss, "acc": 1.0, "eval_auc": None}  # a further metric may be missing
    assert isinstance(values["acc"], float)
    assert num_examples == weight


@pytest.mark.parametrize("value", [0, -1, MAX_EXAMPLES + 1, 2**63 - 1, 1.0, math.nan, [3], [1] * 10**5, None])
def test_a_weight_that_cannot_be_true_is_rejected(value):
    with pytest.raises(Rejected, match=r"num-examples is .*, not a whole number from 1 to 1000000000") as error:
        read_metrics(metrics(num_examples=value), {"train_loss": 0.0})
    assert len(str(error.value)) < 200
    with pytest.raises(Rejected, match="num-examples is None, not a whole number"):
        read_metrics(RecordDict({"metrics": ConfigRecord({"num-examples": 3})}), {})


@pytest.mark.parametrize("value", [1e308, -1e308, 1e39, math.nan, math.inf, -math.inf, [0.5], None])
def test_a_metric_that_is_no_usable_number_is_rejected(value):
    with pytest.raises(Rejected, match=r"train_loss is .*, not a finite number"):
        read_metrics(metrics(train_loss=value), {"train_loss": 0.0})


@pytest.mark.parametrize(
    "record",
    [
        None, MetricRecord({"opt-in": 1}), ConfigRecord(), ConfigRecord({"opt-in": 1}),
        ConfigRecord({"opt-in": "yes" * 1000}), ConfigRecord({"opt-in": [True]}),
    ],
)  # fmt: skip
def test_an_opt_in_is_either_true_or_false(record):
    assert read_opt_in(RecordDict({"config": ConfigRecord({"opt-in": False})})) is False
    content = RecordDict({} if record is None else {"config": record})
    with pytest.raises(Rejected, match=r"opt-in is .*, neither true nor false") as error:
        read_opt_in(content)
    assert len(str(error.value)) < 100
