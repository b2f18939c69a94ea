"""Messages with deadlines on Flower's Grid, and the checks that every reply must pass.

They replace `Grid.send_and_receive`, which returns all models at once and asks only every 3 s over a network.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from reprlib import repr as brief
from typing import Any, TypeVar

import numpy as np
import torch
from flwr.app import DEFAULT_TTL, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from pytorch_example_low_level.config import UserError, log

T = TypeVar("T")
Read = Callable[[RecordDict], T]  # converts a reply to a value, or raises

REQUIRED = {"train_loss", "eval_loss", "eval_acc"}  # the metrics of Flower's own apps
MAX_EXAMPLES = 10**9  # a larger weight would dominate all other nodes
MAX_FLOAT = 1e38  # float32 and bfloat16 represent it, and double precision sums its squares without overflow
MAX_INTEGER = 2**53  # double precision represents every integer up to this one
MAX_TEXT = 1000  # characters of a node's text that reach the log
BROKEN = {0, 1, 2}  # error codes of a ClientApp: it reported an error, it could not be loaded, it raised an exception
MAX_REASONS = 5  # warnings per phase; further reasons share one
MAX_LOOK = 64  # message ids in one look for replies; its cost grows with their number
MAX_WAITING = 8  # models in memory that wait for their turn to be aggregated
MAX_WAITING_BYTES = 2**29  # of these models, so of large ones there are fewer
PAUSE = 0.01  # seconds between two looks at the beginning of a phase
PROGRESS_EVERY = 10  # seconds
GLANCE = 1  # seconds that a look waits for a download before it turns to the next one
PATIENCE = 10  # seconds after the deadline in which a download can still be completed


@dataclass(frozen=True)
class Node:
    """A connected node. In a simulation, its id is random, but its position in the order of registration is not."""

    node_id: int
    name: str  # the name it was registered with, otherwise "partition" and its number, or "node" and its id
    simulated: bool = False


def connected_nodes(grid: Grid, names: Sequence[str] = ()) -> list[Node]:
    """Return the connected nodes in the order of registration. In a simulation, that is the order of partitions.

    `names` are those of the partitions, if they have any.
    """
    nodes = sorted(grid.get_nodes(), key=lambda node: (node.registered_at, node.node_id))
    # A simulated node sends no heartbeats, so Flower gives it a practically infinite interval.
    simulated = [node.heartbeat_interval > 1e9 for node in nodes]
    partitions = [names[i] if i < len(names) else f"partition {i}" for i in range(len(nodes))]
    unnamed = [partitions[i] if simulated[i] else f"node {node.node_id}" for i, node in enumerate(nodes)]
    return [Node(n.node_id, clean(n.name) or unnamed[i], simulated[i]) for i, n in enumerate(nodes)]


class Rejected(ValueError):
    """A reply that cannot be used; the message says why."""


@dataclass
class Batch:
    """The messages of one phase, and the outcome of each."""

    message_type: str
    server_round: int
    timeout: float  # seconds
    deadline: float  # seconds since the epoch
    nodes: Sequence[Node]  # those asked, in the order of the sample
    size: int = 0  # bytes of the arrays in one message
    pending: dict[str, Node] = field(default_factory=dict)  # no reply yet; by message id, in the order of sending
    received: int = 0  # replies that were used
    failed: int = 0  # errors, and nodes without a reply before the deadline
    rejected: int = 0  # replies that could not be used
    broken: int = 0  # of those that failed, errors that lie in a node's data or code
    faults: dict[str, set[Node]] = field(default_factory=dict)  # reason -> nodes

    @property
    def sent(self) -> int:
        """The number of nodes asked."""
        return len(self.nodes)

    def leave_out(self, node: Node, reason: str) -> None:
        """Record why a node is left out; the reason may be text from the node."""
        reason = clean(reason) or "no reason given"
        reason = reason if reason in self.faults or len(self.faults) < MAX_REASONS else "other reasons"
        self.faults.setdefault(reason, set()).add(node)

    def miss(self, node: Node) -> None:
        """Record a node without a reply before the deadline. In a QUERY that is not a fault."""
        self.failed += 1
        if self.message_type != MessageType.QUERY:
            self.leave_out(node, f"no reply within {self.timeout:g} s")

    def log_faults(self) -> str:
        """Log one warning per reason, for all of its nodes together; return the first, or ""."""
        lines = []
        for reason, left_out in self.faults.items():
            names = [node.name for node in self.nodes if node in left_out]  # not in the order of arrival
            listed = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            who = listed if len(names) == 1 else f"{len(names)} nodes ({listed})"
            lines.append(f"{who} ({self.message_type}): {reason}")
            log.warning("Round %s: left out %s", self.server_round, lines[-1])
        return lines[0] if lines else ""


class Download(threading.Thread):
    """Fetches the reply to one message.

    Flower finds a reply when its upload begins. If the node then dies, `pull_messages` waits for minutes for the
    rest, so it has a thread of its own that can be left behind.
    """

    def __init__(self, grid: Grid, message_id: str) -> None:
        super().__init__(daemon=True)  # so that it does not hold up the end of the run
        self.grid, self.message_id, self.began = grid, message_id, time.time()
        self.found: list[Message | Exception] = []  # the reply, if there is one, or the exception of Flower

    def run(self) -> None:
        """Look once for the reply."""
        try:
            self.found = list(self.grid.pull_messages([self.message_id]))
        except Exception as error:
            self.found = [error]


class Mailbox:
    """Sends the messages of a phase and collects the replies that arrive before its deadline."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.together = 1  # message ids in one request
        self.downloads: dict[str, Download] = {}  # that have not ended, by message id
        self.late: deque[str] = deque(maxlen=10_000)  # ids of messages whose replies are no longer awaited
        self.bytes_sent = self.bytes_received = 0  # of arrays, since the last call of `traffic`

    def send(
        self, nodes: Sequence[Node], message_type: str, content: RecordDict, server_round: int, timeout: float
    ) -> Batch:
        """Send `content` to each node, and add the deadline (seconds since the epoch) to its record "config"."""
        size = sum(arrays.count_bytes() for arrays in content.array_records.values())
        batch = Batch(message_type, server_round, timeout, time.time() + timeout, nodes, size)
        # Flower loses all replies of a request if it cannot decode one. Over a network, each has its own request.
        if nodes:
            self.together = MAX_LOOK if any(node.simulated for node in nodes) else 1
        config = ConfigRecord({**content.config_records.get("config", {}), "deadline": batch.deadline})
        content = RecordDict({**content, "config": config})
        # All messages share one content, so the model is not copied for each node.
        ttl, group_id = timeout + DEFAULT_TTL, str(server_round)  # a busy server may fetch a reply long after it came
        messages = [Message(content, node.node_id, message_type, ttl=ttl, group_id=group_id) for node in nodes]
        accepted = set(self.grid.push_messages(messages)) if messages else set()
        for message, node in zip(messages, nodes, strict=True):
            if message.metadata.message_id in accepted:
                batch.pending[message.metadata.message_id] = node
            else:
                batch.failed += 1
                batch.leave_out(node, "the SuperLink did not accept the message")
        self.bytes_sent += len(batch.pending) * size
        return batch

    def collect(self, batch: Batch, read: Read[T], window: int = MAX_LOOK) -> Iterator[tuple[Node, T]]:
        """Yield each node with a usable reply, and the value that `read` returns for the reply.

        The order is that of sending, not of arrival, so that a sum over the replies is bit-identical in every
        run. At most `window` values wait for their turn in memory; the other replies wait at the SuperLink.
        """
        window = min(window, MAX_WAITING) if self.together == 1 else window  # a hostile reply may be large in any phase
        window = max(1, min(window, MAX_WAITING_BYTES // max(1, batch.size)))
        values: dict[str, T] = {}  # values that wait for their turn
        log_at = time.time() + PROGRESS_EVERY
        for message_id, node in list(batch.pending.items()):
            while message_id in batch.pending:
                began = time.time()
                values |= self.look(batch, list(batch.pending)[: window - len(values)], read)
                now = time.time()
                left = max(0.0, batch.deadline - now)
                if message_id in batch.pending:
                    # In a long phase, a pause is 1 % of the time since it began, so that waiting costs little.
                    time.sleep(min(max(PAUSE, now - began, (batch.timeout - left) / 100), PROGRESS_EVERY, left))
                if now >= log_at:
                    log_at, done = now + PROGRESS_EVERY, batch.sent - len(batch.pending)
                    log.info("... %s/%s (%s), %.0f s to the deadline", done, batch.sent, batch.message_type, left)
            if message_id in values:
                yield node, values.pop(message_id)

    def look(self, batch: Batch, ids: Sequence[str], read: Read[T]) -> dict[str, T]:
        """Look once for replies to some of the pending messages; return the usable values, by message id.

        After the deadline, none of these stays pending, and only a reply that was created before it counts. Late
        replies of earlier phases are fetched and dropped, because a simulation searches all messages that it holds.
        """
        is_last_look = time.time() >= batch.deadline
        room = min(MAX_WAITING, MAX_LOOK - len(ids), self.together)
        late = {self.late.popleft(): None for _ in range(min(len(self.late), room))}
        values: dict[str, T] = {}
        for message_id, reply in self._pull(ids, list(late), batch.deadline if is_last_look else None):
            late.pop(message_id, None)
            node = batch.pending.pop(message_id, None)
            if node is None:  # a late reply, or a second one
                continue
            try:
                if isinstance(reply, Exception):
                    raise reply
                if time.time() > batch.deadline and not reply.metadata.created_at <= batch.deadline:
                    batch.miss(node)
                elif reply.has_error():
                    batch.failed += 1
                    batch.broken += reply.error.code in BROKEN
                    batch.leave_out(node, reply.error.reason or f"error {reply.error.code}")
                else:
                    self.bytes_received += sum(arrays.count_bytes() for arrays in reply.content.array_records.values())
                    values[message_id] = read(reply.content)
                    batch.received += 1
            except Exception as error:  # any exception here is caused by what the node sent
                batch.rejected += 1
                batch.leave_out(node, str(error) if isinstance(error, Rejected) else f"unreadable reply: {error!r}")
        missing = [message_id for message_id in ids if is_last_look and message_id in batch.pending]
        for message_id in missing:
            batch.miss(batch.pending.pop(message_id))
        self.late.extend([*late, *missing])
        return values

    def traffic(self) -> dict[str, float]:
        """Return the megabytes of the arrays sent and received since the last call, as results.json has them."""
        counts = {"megabytes_sent": self.bytes_sent / 1e6, "megabytes_received": self.bytes_received / 1e6}
        self.bytes_sent = self.bytes_received = 0
        return counts

    def _pull(
        self, ids: Sequence[str], late: Sequence[str], deadline: float | None
    ) -> Iterator[tuple[str, Message | Exception]]:
        """Fetch the replies that have arrived. For a reply that Flower cannot decode, yield the exception.

        In the last look of a phase, which has its `deadline`, downloads of `ids` that are not complete get a little
        more time, all of them together.
        """
        both = [*ids, *late]
        if self.together > 1:
            for start in range(0, len(both), self.together):
                found = list(self.grid.pull_messages(both[start : start + self.together]))
                while found:  # the memory of each message is free when it is read
                    message = found.pop(0)
                    yield message.metadata.reply_to_message_id, message
            return
        for message_id in both:
            if message_id not in self.downloads:
                download = self.downloads[message_id] = Download(self.grid, message_id)
                download.start()
                download.join(GLANCE if deadline is None else 0)
        for message_id in both:
            download = self.downloads[message_id]
            if deadline is not None and message_id in ids:
                download.join(max(0.0, max(deadline, download.began) + PATIENCE - time.time()))
            if download.is_alive():
                continue
            for reply in self.downloads.pop(message_id).found:
                if isinstance(reply, Exception):
                    self.grid.get_node_ids()  # raises if the SuperLink cannot be reached
                yield message_id, reply


def clean(text: str) -> str:
    """Return the printable part of a text's last line, where a traceback has its cause; "" if all are blank."""
    lines = ("".join(c if c.isprintable() else " " for c in line) for line in text[-40 * MAX_TEXT :].splitlines())
    last = ([""] + [words for line in lines if (words := " ".join(line.split()))])[-1]
    return last if len(last) <= MAX_TEXT else last[:MAX_TEXT] + "..."


def to_array_record(model: dict[str, Tensor]) -> ArrayRecord:
    """Convert a state_dict for sending. Types that NumPy lacks, such as bfloat16, become float32, without loss."""
    known = (torch.float16, torch.float32, torch.float64)
    exact = {n: t.float() if t.is_floating_point() and t.dtype not in known else t for n, t in model.items()}
    return ArrayRecord({name: tensor.contiguous() for name, tensor in exact.items()})


def read_arrays(content: RecordDict, sent: ArrayRecord) -> dict[str, Tensor]:
    """Return the arrays of a reply. Raises Rejected unless they are finite and match those that were sent.

    A node could forge a header that claims any size, so the header is compared before NumPy parses it.
    """
    arrays = content.get("arrays")
    if not isinstance(arrays, ArrayRecord):
        raise Rejected("the reply has no ArrayRecord 'arrays'")
    if arrays.keys() != sent.keys():
        raise Rejected(f"the reply's arrays have other names: {brief(sorted(arrays.keys() ^ sent.keys()))}")
    tensors = {}
    for name, like in sent.items():
        array, kind = arrays[name], f"{like.dtype}{list(like.shape)}"
        if array.dtype != like.dtype or tuple(array.shape) != tuple(like.shape):
            raise Rejected(f"array {name!r} is {clean(array.dtype)}{brief(list(array.shape))}, not {kind}")
        header = len(like.data) - np.dtype(like.dtype).itemsize * int(np.prod(like.shape))
        if len(array.data) != len(like.data) or array.data[:header] != like.data[:header]:
            raise Rejected(f"the data of array {name!r} are not {kind} in NumPy's format")
        values = array.numpy()
        numbers = values.reshape(-1).view(values.real.dtype)  # complex numbers as pairs of real ones
        limit = MAX_FLOAT if np.issubdtype(numbers.dtype, np.floating) else MAX_INTEGER
        # A mask of -inf may come back as it was sent. NaN fails every comparison, so it is also rejected.
        if array.data != like.data and not (-limit <= float(numbers.min()) and float(numbers.max()) <= limit):
            raise Rejected(f"array {name!r} is not finite, or has numbers beyond ±{limit:g}")
        tensors[name] = torch.from_numpy(values)
    return tensors


def metric_key(name: str) -> str:
    """Return the name of a metric in a reply. Accuracy has that of Flower's own apps. Raises UserError for "acc"."""
    if name == "acc":
        raise UserError("rename the metric 'acc': 'eval_acc' has another meaning in the messages of Flower's apps")
    return "eval_acc" if name == "accuracy" else f"eval_{name}"


def read_metrics(content: RecordDict, expected: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """Return the expected metrics and "num-examples"; None for one of them that is missing, unless it is REQUIRED.

    A list must be as long as the expected one; NaN in it stands for None. Raises Rejected for impossible values.
    """
    metrics = content.metric_records.get("metrics", MetricRecord())
    num_examples = metrics.get("num-examples")
    if type(num_examples) is not int or not 1 <= num_examples <= MAX_EXAMPLES:
        raise Rejected(f"num-examples is {brief(num_examples)}, not a whole number from 1 to {MAX_EXAMPLES}")
    values: dict[str, Any] = {}
    for name, like in expected.items():
        value = metrics.get(name)
        if value is None and name not in REQUIRED:
            values[name] = None
        elif isinstance(like, list):
            if not isinstance(value, list) or len(value) != len(like):
                raise Rejected(f"{name} is {brief(value)}, not a list of {len(like)} numbers")
            values[name] = [None if math.isnan(number) else read_number(name, number) for number in value]
        else:
            values[name] = read_number(name, value)
    if not 0 <= values.get("eval_acc", 0) <= 1:
        raise Rejected(f"eval_acc is {values['eval_acc']}, not between 0 and 1")
    return values, num_examples


def read_number(name: str, value: object) -> float:
    """Return a finite number. Raises Rejected."""
    if not isinstance(value, int | float) or not -MAX_FLOAT <= value <= MAX_FLOAT:
        raise Rejected(f"{name} is {brief(value)}, not a finite number")
    return float(value)


def read_opt_in(content: RecordDict) -> bool:
    """Return a node's answer to a query. Raises Rejected when it is not a boolean."""
    opt_in = content.config_records.get("config", ConfigRecord()).get("opt-in")
    if not isinstance(opt_in, bool):
        raise Rejected(f"opt-in is {brief(opt_in)}, neither true nor false")
    return opt_in
