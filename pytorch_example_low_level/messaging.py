"""Messages with deadlines on Flower's Grid, and the checks that every reply must pass.

`Grid.send_and_receive` would do for a first version, but it returns all models at once, looks for
replies only every 3 s over a network, and leaves late replies at the SuperLink.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from logging import getLogger
from reprlib import repr as brief
from typing import TypeVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

T = TypeVar("T")

MAX_EXAMPLES = 10**9  # a larger weight would drown all other nodes
MAX_FLOAT = 1e100  # a weighted sum of squares of such numbers is still finite in double precision
MAX_INTEGER = 2**53  # double precision holds every integer up to here
MAX_TEXT = 300  # characters of a node's text that reach the log
MAX_REASONS = 5  # warnings a phase; further reasons are counted together
MAX_LOOK = 64  # message ids in one look for replies, whose cost grows with their number
MAX_WAITING = 8  # models in memory that wait for their turn to be aggregated
MAX_LATE = 10_000  # late replies that are still looked for, to take them off the SuperLink
PAUSE = (0.01, 0.1)  # seconds between two looks: short after a reply, longer when none come
PROGRESS_EVERY = 10  # seconds

log = getLogger("flwr")


@dataclass(frozen=True)
class Node:
    """A connected node. Its id is random in every simulation; its place in the order of registration is not."""

    node_id: int
    name: str = ""
    registered_at: str = ""  # ISO 8601, UTC
    simulated: bool = False

    def __str__(self) -> str:
        """Return the name for the log."""
        return clean(self.name) or f"node {self.node_id}"


def connected_nodes(grid: Grid) -> list[Node]:
    """Return the connected nodes in the order in which they registered.

    In a simulation that is the order of the partitions. Over a network it stays the same when a
    node or the SuperLink restarts.
    """
    # A simulated node sends no heartbeats, so Flower gives it an interval without end.
    nodes = [Node(n.node_id, n.name, n.registered_at, n.heartbeat_interval > 1e9) for n in grid.get_nodes()]
    return sorted(nodes, key=lambda node: (node.registered_at, node.node_id))


class Rejected(ValueError):
    """A reply that cannot be used; the message says why."""


@dataclass
class Batch:
    """The messages of one phase, and what became of them."""

    message_type: str
    server_round: int
    timeout: float  # seconds
    deadline: float  # seconds since the epoch
    sent: int  # nodes asked
    nodes: dict[str, Node] = field(default_factory=dict)  # by message id, in the order of sending
    received: int = 0  # replies that were used
    failed: int = 0  # errors, and nodes without a reply before the deadline
    rejected: int = 0  # replies that could not be used
    faults: dict[str, list[Node]] = field(default_factory=dict)  # reason -> nodes

    def leave_out(self, node: Node, reason: str) -> None:
        """Note why a node is left out; the reason may be its own words."""
        reason = clean(reason)
        if reason not in self.faults and len(self.faults) >= MAX_REASONS:
            reason = "other reasons"
        self.faults.setdefault(reason, []).append(node)

    def log_faults(self) -> str:
        """Log one warning for each reason, however many nodes it concerns; return the first, or ""."""
        lines = []
        for reason, nodes in self.faults.items():
            who = ", ".join(map(str, nodes[:3])) + (", ..." if len(nodes) > 3 else "")
            who = who if len(nodes) == 1 else f"{len(nodes)} nodes ({who})"
            lines.append(f"{who} ({self.message_type}): {reason}")
            log.warning("Round %s: left out %s", self.server_round, lines[-1])
        return lines[0] if lines else ""


class Mailbox:
    """Sends the messages of a phase and collects the replies that arrive before its deadline."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self._late: deque[str] = deque(maxlen=MAX_LATE)  # message ids whose deadline has passed

    def send(
        self, nodes: Sequence[Node], message_type: str, content: RecordDict, server_round: int, timeout: float
    ) -> Batch:
        """Send `content` to each node, with the deadline (seconds since the epoch) in its record "config"."""
        batch = Batch(message_type, server_round, timeout, time.time() + timeout, len(nodes))
        config = ConfigRecord({**content.config_records.get("config", {}), "deadline": batch.deadline})
        content = RecordDict({**content, "config": config})
        # All messages share one content, so the model is not copied for each node.
        messages = [Message(content, node.node_id, message_type, group_id=str(server_round)) for node in nodes]
        accepted = set(self.grid.push_messages(messages)) if messages else set()
        for message, node in zip(messages, nodes, strict=True):
            if message.metadata.message_id in accepted:
                batch.nodes[message.metadata.message_id] = node
            else:
                batch.failed += 1
                batch.leave_out(node, "the SuperLink did not accept the message")
        return batch

    def collect(
        self, batch: Batch, read: Callable[[RecordDict], T], window: int = MAX_LOOK
    ) -> Iterator[tuple[Node, T]]:
        """Yield each node whose reply can be used, with what `read` makes of the reply.

        The order is that of sending, not of arrival, so that a sum over the replies has the same
        bits in every run. At most `window` replies that wait for their turn are held in memory;
        the others stay at the SuperLink until there is room.
        """
        waiting = dict.fromkeys(batch.nodes)  # message ids that have no reply yet, in order
        values: dict[str, T] = {}  # read, but not yet at their turn
        last_arrival = time.time()
        log_at = last_arrival + PROGRESS_EVERY
        for message_id, node in batch.nodes.items():
            while message_id in waiting:
                now = time.time()
                is_last_look = now >= batch.deadline
                ids = list(islice(waiting, window - len(values)))
                arrived = self._look(ids, batch, read, values)
                for seen in ids if is_last_look else arrived:
                    del waiting[seen]
                if is_last_look:
                    missing = [i for i in ids if i not in arrived]
                    self._late.extend(missing)
                    self._miss(batch, missing)
                elif message_id in waiting:  # pause for a tenth of the time since the last reply, within bounds
                    last_arrival = now if arrived else last_arrival
                    pause = min(max((now - last_arrival) / 10, PAUSE[0]), PAUSE[1])
                    time.sleep(max(0.0, min(pause, batch.deadline - time.time())))
                if now >= log_at and waiting:
                    log_at, done = now + PROGRESS_EVERY, batch.sent - len(waiting)
                    left = max(0.0, batch.deadline - now)
                    log.info("... %s/%s (%s), %.0f s to the deadline", done, batch.sent, batch.message_type, left)
            if message_id in values:
                yield node, values.pop(message_id)

    def poll(self, batch: Batch, read: Callable[[RecordDict], T]) -> list[tuple[Node, T]]:
        """Return the replies that are there, without waiting; `batch.nodes` keeps the nodes still missing.

        `collect` waits for all nodes; this is for a loop that goes on with the first replies.
        """
        nodes, values = batch.nodes, dict[str, T]()
        is_last_look = time.time() >= batch.deadline
        chunks = [list(nodes)[start : start + MAX_LOOK] for start in range(0, len(nodes), MAX_LOOK)]
        arrived = set().union(*(self._look(ids, batch, read, values) for ids in chunks))
        batch.nodes = {i: node for i, node in nodes.items() if i not in arrived}
        if is_last_look:
            self._miss(batch, list(batch.nodes))
            self.forget(batch)
        return [(nodes[i], value) for i, value in values.items()]

    def forget(self, batch: Batch) -> None:
        """Wait no longer for a batch that is polled: what still comes is late."""
        self._late.extend(batch.nodes)
        batch.nodes = {}

    def _look(
        self, ids: Sequence[str], batch: Batch, read: Callable[[RecordDict], T], values: dict[str, T]
    ) -> set[str]:
        """Look once for replies to `ids`; add what can be used to `values`. Return the ids that had a reply.

        A reply that is first seen after the deadline counts if it was written before it, since the
        server may have been busy. The look also fetches late replies of earlier phases and drops
        them, because the simulation searches through all messages that it holds.
        """
        late = [self._late.popleft() for _ in range(min(len(self._late), MAX_LOOK - len(ids)))]
        arrived: set[str] = set()
        for message_id, reply in self._pull([*ids, *late]):
            if message_id in late:
                late.remove(message_id)
            if message_id not in ids or message_id in arrived:
                continue
            arrived.add(message_id)
            node = batch.nodes[message_id]
            try:
                if isinstance(reply, Exception):
                    raise reply
                if time.time() > batch.deadline and not reply.metadata.created_at <= batch.deadline:
                    self._miss(batch, [message_id])
                elif reply.has_error():
                    batch.failed += 1
                    batch.leave_out(node, last_line(reply.error.reason or f"error {reply.error.code}"))
                else:
                    values[message_id] = read(reply.content)
                    batch.received += 1
            except Exception as error:  # whatever it is, it comes from what the node sent
                batch.rejected += 1
                batch.leave_out(node, str(error) if isinstance(error, Rejected) else f"unreadable reply: {error!r}")
        self._late.extend(late)
        return arrived

    def _miss(self, batch: Batch, ids: Sequence[str]) -> None:
        """Count nodes without a reply before the deadline. In a QUERY that is no fault."""
        batch.failed += len(ids)
        for message_id in ids if batch.message_type != MessageType.QUERY else ():
            batch.leave_out(batch.nodes[message_id], f"no reply within {batch.timeout:g} s")

    def _pull(self, ids: Sequence[str]) -> Iterator[tuple[str, Message | Exception]]:
        """Fetch the replies that are there. A reply that Flower cannot decode comes as the exception."""
        try:
            for reply in self.grid.pull_messages(ids):
                yield reply.metadata.reply_to_message_id, reply
        except Exception as error:
            self.grid.get_node_ids()  # raises if it is the SuperLink that cannot be reached
            if len(ids) == 1:
                yield ids[0], error
            else:
                for message_id in ids:
                    yield from self._pull([message_id])


def clean(text: str) -> str:
    """Return a node's text without control, format and line-break characters, cut short."""
    words = " ".join("".join(c if c.isprintable() else " " for c in text[: 4 * MAX_TEXT]).split())
    return words if len(words) <= MAX_TEXT else words[:MAX_TEXT] + "..."


def last_line(text: str) -> str:
    """Return the last line with text in it: of a traceback, the one that says what went wrong."""
    lines = [line for line in text[-40 * MAX_TEXT :].splitlines() if clean(line)]
    return lines[-1] if lines else "no reason given"


# ------------------------------------------------------------------------------- Contents


def to_array_record(model: dict[str, Tensor]) -> ArrayRecord:
    """Return a state_dict as it is sent. Types that NumPy lacks, such as bfloat16, become float32, exactly."""
    known = (torch.float16, torch.float32, torch.float64)
    exact = {n: t.float() if t.is_floating_point() and t.dtype not in known else t for n, t in model.items()}
    return ArrayRecord({name: tensor.contiguous() for name, tensor in exact.items()})


def read_arrays(content: RecordDict, sent: ArrayRecord) -> dict[str, Tensor]:
    """Return the arrays of a reply. Raises Rejected unless they are finite and like those that were sent."""
    arrays = content.get("arrays")
    if not isinstance(arrays, ArrayRecord):
        raise Rejected("it has no ArrayRecord 'arrays'")
    if arrays.keys() != sent.keys():
        raise Rejected(f"its arrays have other names: {brief(sorted(arrays.keys() ^ sent.keys()))}")
    return {name: read_array(name, arrays[name], like) for name, like in sent.items()}


def read_array(name: str, array: Array, like: Array) -> Tensor:
    """Return one array of a reply.

    An honest reply begins with the very header that was sent, and has as many bytes. So a header
    that a node wrote, which could promise any size, is compared and never interpreted.
    """
    dtype = np.dtype(like.dtype)
    header = len(like.data) - dtype.itemsize * math.prod(like.shape)
    if array.dtype != like.dtype or tuple(array.shape) != tuple(like.shape):
        theirs = f"{clean(array.dtype)}{brief(list(array.shape))}"
        raise Rejected(f"array {name!r} is {theirs}, not {like.dtype}{list(like.shape)}")
    if len(array.data) != len(like.data) or array.data[:header] != like.data[:header]:
        raise Rejected(f"the data of array {name!r} are not {like.dtype}{list(like.shape)} in NumPy's format")
    values = np.frombuffer(bytearray(memoryview(array.data)[header:]), dtype)
    numbers = values.view(values.real.dtype)  # complex numbers as pairs of real ones
    limit = MAX_FLOAT if np.issubdtype(numbers.dtype, np.floating) else MAX_INTEGER
    # NaN fails every comparison, so it is rejected, too.
    if values.size and not (-limit <= float(numbers.min()) and float(numbers.max()) <= limit):
        raise Rejected(f"array {name!r} is not finite, or has numbers beyond ±{limit:g}")
    return torch.from_numpy(values.reshape(like.shape))


def read_metrics(content: RecordDict, *names: str) -> tuple[dict[str, float], int]:
    """Return the named metrics and "num-examples". Raises Rejected for values that cannot be true."""
    metrics = content.get("metrics")
    if not isinstance(metrics, MetricRecord):
        raise Rejected("it has no MetricRecord 'metrics'")
    num_examples = metrics.get("num-examples")
    if type(num_examples) is not int or not 1 <= num_examples <= MAX_EXAMPLES:
        raise Rejected(f"num-examples is {brief(num_examples)}, not a whole number from 1 to {MAX_EXAMPLES}")
    values: dict[str, float] = {}
    for name in names:
        value = metrics.get(name)
        if not isinstance(value, int | float) or not -MAX_FLOAT <= value <= MAX_FLOAT:
            raise Rejected(f"{name} is {brief(value)}, not a finite number")
        values[name] = float(value)
    return values, num_examples


def read_opt_in(content: RecordDict) -> bool:
    """Return a node's answer to a query. Raises Rejected when it is neither true nor false."""
    answer = content.get("config")
    opt_in = answer.get("opt-in") if isinstance(answer, ConfigRecord) else None
    if not isinstance(opt_in, bool):
        raise Rejected(f"opt-in is {brief(opt_in)}, neither true nor false")
    return opt_in
