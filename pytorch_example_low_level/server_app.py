"""The ServerApp: `main` is the federated learning, written as a plain loop over rounds.

Read `main` first: it is one round, top to bottom. Then the phases that it calls, in the order
of the round: each turns messages into values. Last the `Mailbox`, which puts deadlines on
Flower's Grid.
"""

from __future__ import annotations

import functools
import io
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from logging import INFO, WARNING
from typing import TypeVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid, ServerApp

from pytorch_example_low_level import task, utils
from pytorch_example_low_level.config import REPLY_GRACE, RunConfig, UserError, first_line
from pytorch_example_low_level.utils import Purpose, Row, ServerState, StateDict

T = TypeVar("T")

MAX_EXAMPLES = 10**9  # more than any node has: a weight beyond it would drown all others
MAX_PARTITION = 2**31  # as above, for what a node says of itself
NPY_HEADER = 4096  # bytes that an array may be longer than its values
PULL_WINDOW = 8  # models that are fetched ahead of their turn, at most
POLL_PAUSE = (0.01, 0.1)  # seconds between two looks for replies: soon after one came, and later on
LOG_EVERY = 10  # seconds in which a phase that takes long says how far it is

app = ServerApp()


def plain_user_errors(function: Callable[[Grid, Context], None]) -> Callable[[Grid, Context], None]:
    """Let a UserError end the run with its message alone: a stack would not help its reader."""

    @functools.wraps(function)
    def wrapper(grid: Grid, context: Context) -> None:
        try:
            function(grid, context)
        except UserError as error:
            sys.tracebacklimit = 0  # Flower logs the stack of whatever ends a run
            raise error.with_traceback(None) from None

    return wrapper


@app.main()
@plain_user_errors
def main(grid: Grid, context: Context) -> None:
    """Train a global model over `num-server-rounds` rounds. Raises UserError."""
    # Whatever the user can have got wrong shows here, before anything is sent or written.
    config = RunConfig.from_context(context)
    device = task.pick_device(config.server_device)
    test_split, num_classes = task.load_test_split(config.dataset)
    net = task.Net.initial(test_split.images.shape[1], num_classes, utils.weights_seed(config.seed))
    initial = ServerState(model={name: tensor.clone() for name, tensor in net.state_dict().items()})
    identity = utils.identity_of(config, initial.model, test_split.images, test_split.labels)
    directory, state = utils.open_run(config, initial, identity)

    if state.server_round >= config.num_server_rounds:
        log(INFO, "This run is finished: %s rounds. For more, raise num-server-rounds.", state.server_round)
        directory.save_final(state.model)
        return

    mailbox = Mailbox(grid)
    roll: dict[int, Node] = {}  # all nodes that were ever connected, by node id
    stopwatch = utils.Stopwatch()

    with utils.recording(config, directory, state, identity) as recorder:
        if state.server_round < 0:  # a new run: where does it start from?
            loss, accuracy = evaluate_centrally(net, state.model, test_split, device)
            recorder.end_round(utils.new_row(0) | central_metrics(loss, accuracy))

        for server_round in range(state.server_round + 1, config.num_server_rounds + 1):
            log(INFO, "")
            log(INFO, "🔄 Starting round %s/%s", server_round, config.num_server_rounds)
            stopwatch.start()
            lr = utils.learning_rate(config, server_round)
            row = utils.new_row(server_round, lr)

            # --- 0. Nodes: who is there, and who trains this time
            nodes = connected_nodes(mailbox, config, roll)
            cohort = sample_cohort(nodes, config, server_round)
            log(INFO, "Sampled %s out of %s nodes.", len(cohort), len(nodes))
            row |= {"nodes_available": len(nodes), "train_sampled": len(cohort)}
            stopwatch.lap()  # waiting for nodes is no part of TRAIN

            # --- 1. TRAIN, and 2. aggregate: each model is added as soon as its turn comes
            state.model, outcome = train(mailbox, cohort, state.model, lr, server_round, config)
            row |= outcome | {"seconds_train": stopwatch.lap()}

            # --- 4. QUERY: ask all nodes to opt in. That is mostly waiting, and the central
            #        evaluation needs no node: so it comes in between, and first in the log.
            queries = send_queries(mailbox, nodes, server_round, config)

            # --- 3. Central evaluation of the new model
            loss, accuracy = evaluate_centrally(net, state.model, test_split, device)
            row |= central_metrics(loss, accuracy)
            if state.best_accuracy is None or accuracy > state.best_accuracy:
                log(INFO, "🎉 New best global model found: %f", accuracy)
                recorder.new_best(accuracy)

            # --- 4., continued: who has not answered by the deadline is left out
            opted_in, outcome = collect_opt_ins(mailbox, queries)
            row |= outcome | {"seconds_query": stopwatch.lap()}

            # --- 5. EVALUATE on the nodes that opted in
            accuracies, outcome = evaluate(mailbox, opted_in, state.model, server_round, config)
            row |= outcome | {"seconds_evaluate": stopwatch.lap()}

            # --- 6. Record: from here on, the round survives a crash
            row["seconds_total"] = stopwatch.total()
            recorder.end_round(row, accuracies)
            log(INFO, "⏱️ %s", stopwatch.summary(row, rounds_left=config.num_server_rounds - server_round))

        if not any(row["train_received"] for row in state.results):
            raise UserError(
                f"Nothing was learned: no round had a usable TRAIN reply. The last fault: {mailbox.last_fault}"
            )
        recorder.end_run()


# ------------------------------------------------------------------------------- 0. Nodes


@dataclass(frozen=True, order=True)
class Node:
    """A connected node.

    Node ids are random in every simulation; the partition is not. So `key`, by which a node is
    drawn and ordered, is its partition where it has told it, and its node id where not.
    """

    key: int
    node_id: int

    def __str__(self) -> str:
        """Name the node in a warning."""
        return f"node {self.node_id}" + ("" if self.key == self.node_id else f" (partition {self.key})")


def connected_nodes(mailbox: Mailbox, config: RunConfig, roll: dict[int, Node]) -> list[Node]:
    """Wait for `min-available-nodes`; return all that are connected, ordered by their key.

    Raises UserError when `node-wait-timeout` passes before there are enough.
    """
    deadline = time.monotonic() + config.node_wait_timeout
    log_at = time.monotonic() + 1
    while True:
        connected = set(mailbox.grid.get_node_ids())
        unknown = connected - roll.keys()
        if len(connected) >= config.min_available_nodes:
            if not unknown:
                break
            # While these answer, others may connect: in a simulation the nodes register when
            # the ServerApp is already running. So look again behind it.
            call_roll(mailbox, unknown, config.node_wait_timeout, roll)
            continue
        left = deadline - time.monotonic()
        if left <= 0:
            raise UserError(
                f"Only {len(connected)} nodes are connected after {config.node_wait_timeout:g} s, and "
                f"min-available-nodes is {config.min_available_nodes}. Start more nodes, wait longer "
                "(node-wait-timeout) or ask for fewer (min-available-nodes, min-train-nodes)."
            )
        utils.check_engine()
        if time.monotonic() >= log_at:
            log(INFO, "Waiting for nodes: %s/%s, %.0f s left", len(connected), config.min_available_nodes, left)
            log_at += 5
        time.sleep(min(left, 0.2))
    return sorted(roll[node_id] for node_id in connected)


def call_roll(mailbox: Mailbox, node_ids: Iterable[int], timeout: float, roll: dict[int, Node]) -> None:
    """Ask nodes for their partition and enter them into `roll`.

    What a node says of itself orders only itself: whatever it claims, another node's included,
    each node stays in the roll once, under its node id.
    """
    nodes = [Node(node_id, node_id) for node_id in node_ids]
    log(INFO, "Calling the roll of %s nodes ...", len(nodes))
    content = RecordDict({"config": ConfigRecord({"server-round": 0, "max-delay": 0.0})})
    batch = mailbox.push(nodes, MessageType.QUERY, content, 0, timeout)
    told = 0
    for node, reply in mailbox.collect(batch):
        answer = reply.content.get("config") if reply is not None and reply.has_content() else None
        partition = answer.get("partition-id") if isinstance(answer, ConfigRecord) else None
        if isinstance(partition, int) and 0 <= partition < MAX_PARTITION:
            told += 1
            roll[node.node_id] = Node(int(partition), node.node_id)
        else:
            roll[node.node_id] = node
    log(INFO, "%s of %s nodes told their partition.", told, len(nodes))
    if len(roll) == 2:
        log(INFO, "Two nodes are Flower's default. To simulate 50, add to `flwr run . --stream`:")
        log(INFO, '    --federation-config "num-supernodes=50 client-resources-num-cpus=1"')


def sample_cohort(nodes: Sequence[Node], config: RunConfig, server_round: int) -> list[Node]:
    """Draw the nodes that train, uniformly and without replacement; a pure function of (seed, round).

    Every node draws a lot from its own stream, and the smallest lots win. So a node that joins
    or leaves does not change what the others draw.
    """
    wanted = int(config.fraction_clients_train * len(nodes) + 1e-9)  # 0.29 * 100 is 28.999...
    size = min(len(nodes), max(wanted, config.min_train_nodes))

    def lot(node: Node) -> float:
        return utils.random_stream(config.seed, Purpose.SAMPLE, server_round, node.key).random()

    return sorted(sorted(nodes, key=lot)[:size])


# ------------------------------------------------------------- 1. TRAIN and 2. aggregation


def train(
    mailbox: Mailbox, cohort: Sequence[Node], model: StateDict, lr: float, server_round: int, config: RunConfig
) -> tuple[StateDict, Row]:
    """Have the cohort train the model; return the mean of what comes back, and what to record.

    Without any usable reply the model stays as it is.
    """
    sent = utils.to_array_record(model)
    instructions = ConfigRecord({"server-round": server_round, "lr": lr})
    content = RecordDict({"arrays": sent, "config": instructions})
    batch = mailbox.push(cohort, MessageType.TRAIN, content, server_round, config.train_timeout)

    tally: Counter[str] = Counter()
    losses: list[float] = []
    weights: list[int] = []

    def read(reply: RecordDict) -> tuple[StateDict, float, int]:
        metrics, num_examples = read_metrics(reply, "train_loss")
        return read_arrays(reply, sent), metrics["train_loss"], num_examples

    def updates() -> Iterator[tuple[StateDict, int]]:
        for _, (arrays, loss, num_examples) in usable(mailbox, batch, read, tally, PULL_WINDOW):
            losses.append(loss)
            weights.append(num_examples)
            yield arrays, num_examples

    mean = weighted_mean(updates(), like=model)
    log(INFO, "📥 Received %s/%s results (TRAIN)", tally["received"], len(cohort))
    if mean is None:
        log(WARNING, "Round %s: no usable TRAIN reply; the global model stays as it is.", server_round)
    train_loss, _ = utils.weighted_mean_std(losses, weights)
    outcome: Row = {f"train_{k}": tally[k] for k in ("received", "failed", "rejected")}
    return model if mean is None else mean, outcome | {"train_loss": train_loss}


def weighted_mean(updates: Iterable[tuple[StateDict, int]], like: StateDict) -> StateDict | None:
    """Return the mean of state_dicts, weighted by their number of examples; None if there are none.

    FedAvg (McMahan et al. 2017, arXiv:1602.05629, algorithm 1). One sum is kept, in double
    precision, and each model is let go as soon as it is added: so the updates may be many, and
    the order in which they come is all that the last bit can depend on. Names, shapes and
    dtypes are those of `like`; integers (such as BatchNorm's counter) are rounded.
    """
    sums = {name: torch.zeros(tensor.shape, dtype=torch.float64) for name, tensor in like.items()}
    total = 0
    for arrays, num_examples in updates:
        total += num_examples
        for name, tensor in arrays.items():
            sums[name].add_(tensor.to(torch.float64), alpha=num_examples)
    if not total:
        return None
    means = {name: tensor.div_(total) for name, tensor in sums.items()}
    return {
        name: (mean if like[name].is_floating_point() else mean.round()).to(like[name].dtype)
        for name, mean in means.items()
    }


# ------------------------------------------------------------------ 3. Central evaluation


def evaluate_centrally(
    net: task.Net, model: StateDict, test_split: task.Split, device: torch.device
) -> tuple[float, float]:
    """Return loss and accuracy of the global model on the test split."""
    net.load_state_dict(model)
    loss, accuracy = task.test(net, test_split, device)
    log(INFO, "💡 Centrally evaluated model -> loss: %7.4f /  accuracy: %7.4f", loss, accuracy)
    return loss, accuracy


def central_metrics(loss: float, accuracy: float) -> Row:
    """Return what to record of it; a model that diverged has no loss that JSON could write."""
    return {"centralized_loss": loss if math.isfinite(loss) else None, "centralized_accuracy": accuracy}


# ------------------------------------------------------------------------------- 4. QUERY


def send_queries(mailbox: Mailbox, nodes: Sequence[Node], server_round: int, config: RunConfig) -> Batch:
    """Ask all nodes whether they opt in to the evaluation."""
    instructions = ConfigRecord({"server-round": server_round, "max-delay": config.query_max_delay})
    content = RecordDict({"config": instructions})
    return mailbox.push(nodes, MessageType.QUERY, content, server_round, config.query_timeout)


def collect_opt_ins(mailbox: Mailbox, queries: Batch) -> tuple[list[Node], Row]:
    """Return the nodes that opted in before the deadline, and what to record.

    Silence is no consent, and neither is an error: a ClientApp without a query handler gives one.
    """
    tally: Counter[str] = Counter()
    answers = list(usable(mailbox, queries, read_opt_in, tally, warn=False))
    opted_in = [node for node, opt_in in answers if opt_in]
    log(INFO, "📨 Received %s/%s results (QUERY)", len(answers), len(queries.nodes))
    log(INFO, "✅ %s/%s nodes opted-in for evaluation (QUERY)", len(opted_in), len(queries.nodes))
    return opted_in, {
        "query_sent": len(queries.nodes),
        "query_received": len(answers),
        "opted_in": len(opted_in),
    }


# ---------------------------------------------------------------------------- 5. EVALUATE


def evaluate(
    mailbox: Mailbox, nodes: Sequence[Node], model: StateDict, server_round: int, config: RunConfig
) -> tuple[list[float], Row]:
    """Have nodes evaluate the model on their own data; return their accuracies, and what to record."""
    instructions = ConfigRecord({"server-round": server_round})
    content = RecordDict({"arrays": utils.to_array_record(model), "config": instructions})
    batch = mailbox.push(nodes, MessageType.EVALUATE, content, server_round, config.evaluate_timeout)

    def read(reply: RecordDict) -> tuple[dict[str, float], int]:
        metrics, num_examples = read_metrics(reply, "eval_loss", "eval_acc")
        if not 0 <= metrics["eval_acc"] <= 1:
            raise Rejected(f"eval_acc is {metrics['eval_acc']}, not between 0 and 1")
        return metrics, num_examples

    tally: Counter[str] = Counter()
    results = [result for _, result in usable(mailbox, batch, read, tally)]
    log(INFO, "📥 Received %s/%s results (EVALUATE)", len(results), len(nodes))

    weights = [num_examples for _, num_examples in results]
    accuracies = [metrics["eval_acc"] for metrics, _ in results]
    loss, loss_std = utils.weighted_mean_std([metrics["eval_loss"] for metrics, _ in results], weights)
    accuracy, accuracy_std = utils.weighted_mean_std(accuracies, weights)
    if results:
        text = "📊 Federated evaluation -> loss: %.3f±%.3f / accuracy: %.3f±%.3f"
        log(INFO, text, loss, loss_std, accuracy, accuracy_std)
    else:
        log(INFO, "📊 Federated evaluation -> no node took part")
    return accuracies, {
        "evaluate_received": len(results),
        "evaluate_failed": len(nodes) - len(results),
        "federated_evaluate_loss": loss,
        "federated_evaluate_loss_std": loss_std,
        "federated_evaluate_accuracy": accuracy,
        "federated_evaluate_accuracy_std": accuracy_std,
        # A mean hides the nodes for which the model does not work: so record the tail as well.
        "federated_evaluate_accuracy_min": min(accuracies, default=None),
        "federated_evaluate_accuracy_p10": float(np.percentile(accuracies, 10)) if accuracies else None,
        "federated_evaluate_accuracy_median": float(np.median(accuracies)) if accuracies else None,
    }


# ---------------------------------------------------- Reading replies, which anyone can send


class Rejected(ValueError):
    """A reply that cannot be used; the message says why."""


def usable(
    mailbox: Mailbox,
    batch: Batch,
    read: Callable[[RecordDict], T],
    tally: Counter[str],
    window: int | None = None,
    *,
    warn: bool = True,
) -> Iterator[tuple[Node, T]]:
    """Yield what `read` makes of each reply; leave out, count and name all others.

    `tally` counts "received" (usable), "failed" (an error, or no answer in time) and "rejected"
    (read raised Rejected).
    """
    for node, reply in mailbox.collect(batch, window):
        outcome = "failed"
        if reply is None:
            reason = f"no answer within {batch.timeout:g} s"
        elif reply.has_error():
            reason = (reply.error.reason or "").strip() or f"error {reply.error.code}"
        else:
            try:
                value = read(reply.content)
            except Rejected as error:
                outcome, reason = "rejected", str(error)
            else:
                tally["received"] += 1
                yield node, value
                continue
        tally[outcome] += 1
        if warn:
            reason = " ".join(first_line(reason).split())[:300]  # a node's words: no line of its own in the log
            mailbox.last_fault = f"{node} ({batch.message_type}): {reason}"
            log(WARNING, "Round %s: left out %s", batch.server_round, mailbox.last_fault)


def read_arrays(reply: RecordDict, sent: ArrayRecord) -> StateDict:
    """Return the arrays of a reply. Raises Rejected unless they are finite and like those sent."""
    arrays = reply.get("arrays")
    if not isinstance(arrays, ArrayRecord):
        raise Rejected("it has no ArrayRecord 'arrays'")
    if arrays.keys() != sent.keys():
        raise Rejected(f"its arrays have other names: {sorted(arrays.keys() ^ sent.keys())[:5]}")
    return {name: read_array(name, arrays[name], like) for name, like in sent.items()}


def read_array(name: str, array: Array, like: Array) -> torch.Tensor:
    """Return one array; check all that it says of itself before memory is taken for its values.

    Flower's `Array.numpy()` believes the header inside the data, which can promise any size.
    https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
    """
    stream = io.BytesIO(array.data)
    try:
        if array.stype != like.stype or np.lib.format.read_magic(stream) != (1, 0):
            raise Rejected(f"array {name!r} is not in NumPy's format 1.0")
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream, max_header_size=NPY_HEADER)
    except (ValueError, SyntaxError) as error:
        raise Rejected(f"array {name!r} is not in NumPy's format: {error}") from error
    if dtype != np.dtype(like.dtype) or shape != tuple(like.shape):
        raise Rejected(f"array {name!r} is {dtype}{list(shape)}, not {like.dtype}{list(like.shape)}")
    if len(array.data) != stream.tell() + dtype.itemsize * math.prod(shape):
        raise Rejected(f"array {name!r} has {len(array.data)} bytes, not what its shape takes")
    values = np.frombuffer(array.data, dtype, offset=stream.tell())
    if not np.isfinite(values).all():
        raise Rejected(f"array {name!r} is not finite")
    return torch.from_numpy(values.reshape(shape, order="F" if fortran_order else "C").copy())


def read_metrics(reply: RecordDict, *names: str) -> tuple[dict[str, float], int]:
    """Return the named metrics and "num-examples". Raises Rejected for any that cannot be true."""
    metrics = reply.get("metrics")
    if not isinstance(metrics, MetricRecord):
        raise Rejected("it has no MetricRecord 'metrics'")
    num_examples = metrics.get("num-examples")
    if type(num_examples) is not int or not 1 <= num_examples <= MAX_EXAMPLES:
        raise Rejected(f"num-examples is {num_examples!r}, not a whole number from 1 to {MAX_EXAMPLES}")
    values: dict[str, float] = {}
    for name in names:
        value = metrics.get(name)
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise Rejected(f"{name} is {value!r}, not a finite number")
        values[name] = float(value)
    return values, num_examples


def read_opt_in(reply: RecordDict) -> bool:
    """Return a node's answer to a query. Raises Rejected when it is neither yes nor no."""
    answer = reply.get("config")
    opt_in = answer.get("opt-in") if isinstance(answer, ConfigRecord) else None
    if not isinstance(opt_in, bool):
        raise Rejected(f"opt-in is {opt_in!r}, neither true nor false")
    return opt_in


# ------------------------------------------------------- The Grid, with a deadline on it


@dataclass(frozen=True)
class Batch:
    """The messages of one phase, on their way."""

    nodes: Sequence[Node]
    message_ids: Sequence[str | None]  # None: could not be sent
    message_type: str
    server_round: int
    timeout: float  # seconds
    deadline: float  # on the monotonic clock


class Mailbox:
    """Sends a phase's messages, and hands out the replies in the order in which they were sent.

    `Grid.send_and_receive` would do for a first version. It returns when the last reply is
    there, so all models lie in memory at once; it looks for replies every 3 s over a network;
    and it leaves late answers where each later look has to step over them.
    """

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.last_fault = "no node was asked"  # why a reply was left out last
        self._last_reply = self._log_at = 0.0  # on the monotonic clock: when one came; when to say how far it is
        self._late: dict[str, float] = {}  # unanswered queries: message id -> when to forget it

    def push(
        self, nodes: Sequence[Node], message_type: str, content: RecordDict, server_round: int, timeout: float
    ) -> Batch:
        """Send `content` to each node. The clock for the answers starts now."""
        messages = [
            Message(
                content,  # one object for all: a model is not copied for each node
                node.node_id,
                message_type,
                ttl=timeout + REPLY_GRACE,
                group_id=str(server_round),
            )
            for node in nodes
        ]
        self._last_reply = time.monotonic()
        self._log_at = self._last_reply + LOG_EVERY
        deadline = self._last_reply + timeout
        pushed = set(self.grid.push_messages(messages)) if messages else set()
        ids = [m.metadata.message_id if m.metadata.message_id in pushed else None for m in messages]
        return Batch(nodes, ids, message_type, server_round, timeout, deadline)

    def collect(self, batch: Batch, window: int | None = None) -> Iterator[tuple[Node, Message | None]]:
        """Yield each node with its reply, or None if it has not answered by the deadline.

        The order is that of the batch, not of arrival, so that whatever is computed from the
        replies has the same bits in every run. At most `window` replies are fetched ahead of
        their turn; the others wait where they are.
        """
        waiting = dict.fromkeys(i for i in batch.message_ids if i is not None)  # in order, unlike a set
        arrived: dict[str, Message] = {}
        for node, message_id in zip(batch.nodes, batch.message_ids, strict=True):
            while message_id in waiting:
                last_look = time.monotonic() >= batch.deadline
                wanted = list(islice(waiting, window and window - len(arrived)))
                replies = self._pull(wanted, batch)
                arrived |= replies
                for done in wanted if last_look else replies:
                    del waiting[done]
                if last_look and batch.message_type == MessageType.QUERY:
                    forget_at = batch.deadline + REPLY_GRACE / 2
                    self._late |= {i: forget_at for i in wanted if i not in replies}
                if message_id in waiting:
                    self._pause(batch, len(waiting))
            yield node, arrived.pop(message_id, None) if message_id else None

    def _pause(self, batch: Batch, missing: int) -> None:
        """Wait a little before the next look; say now and then how far the phase is."""
        now = time.monotonic()
        left = max(0.0, batch.deadline - now)
        if now >= self._log_at:
            self._log_at = now + LOG_EVERY
            count = len(batch.nodes)
            log(INFO, "... %s/%s (%s), %.0f s to the deadline", count - missing, count, batch.message_type, left)
        pause = np.clip((now - self._last_reply) / 10, *POLL_PAUSE)  # a reply waits a tenth of the time it took
        time.sleep(min(float(pause), left))

    def _pull(self, wanted: list[str], batch: Batch) -> dict[str, Message]:
        """Fetch the replies to the wanted messages that are there; drop late answers on the way."""
        now = time.monotonic()
        if now > batch.deadline + REPLY_GRACE / 2:
            return {}  # the messages are about to expire, and Flower's simulation stumbles over those
        self._late = {i: forget_at for i, forget_at in self._late.items() if now < forget_at}
        replies: dict[str, Message] = {}
        pulled = self.grid.pull_messages({*wanted, *self._late})
        utils.check_engine()  # behind the pull: an engine that ends answers for its workers, with errors
        for reply in pulled:
            message_id = reply.metadata.reply_to_message_id
            if self._late.pop(message_id, None) is None and message_id in wanted:
                replies.setdefault(message_id, reply)
                self._last_reply = now
        return replies
