"""The ClientApp: how a node answers TRAIN, EVALUATE and QUERY messages.

Records and keys are those of Flower's built-in strategies, so this ClientApp also runs under
`flwr.serverapp.strategy.FedAvg`. All random numbers derive from (seed, round, partition), so it
does not matter which process does the work.
"""

import math
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from pytorch_example_low_level import task
from pytorch_example_low_level.config import (
    CODE,
    Purpose,
    RunConfig,
    UserError,
    check_code,
    explained,
    log,
    one_line,
    random_stream,
)
from pytorch_example_low_level.messaging import metric_key, to_array_record
from pytorch_example_low_level.utils import frozen, frozen_digest


def report_errors(msg: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
    """Reply to a failed message with one line that says what went wrong on this node, and where.

    Without this mod, Flower's engine wraps the error, and a simulation prints its traceback
    several times. With FLWR_LOG_LEVEL=DEBUG, the node's own log has the traceback.
    https://flower.ai/docs/framework/how-to-use-built-in-mods.html
    """
    try:
        return call_next(msg, context)
    except Exception as error:
        log.debug("A handler failed", exc_info=True)
        text = one_line(error)
        if not isinstance(error, UserError | TimeoutError):  # a bug: say where
            frame = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__}: {text} ({frame.name} in {frame.filename}, line {frame.lineno})"
        return Message(Error(code=0, reason=text), reply_to=msg)


app = ClientApp(mods=[report_errors])


@app.train()
def train(msg: Message, context: Context) -> Message:
    """Train the received model on this node's training split; return it with "num-examples", its weight in FedAvg.

    The reply has the arrays that the message has, so frozen parameters are not in it unless the server sent them.
    """
    check_code(msg.content.config_records["config"].get("app", CODE))  # other ServerApps do not say theirs
    config = RunConfig.from_context(context)
    data = local_data("train", msg, config, context)
    net = received_model(msg, data, config)
    stream = random_stream(config.seed, Purpose.TRAIN, int(number(msg, "server-round")), partition_of(context))
    seed = int(stream.integers(2**63))
    torch.set_num_threads(1)  # the number of threads changes the last bits of a sum
    task.make_gpu_repeatable()

    device = task.pick_device()
    train_loss = task.train(net, data, config, lr=number(msg, "lr"), seed=seed, device=device, deadline=deadline(msg))

    metrics = MetricRecord({"train_loss": train_loss, "num-examples": len(data)})
    trained = {n: tensor for n, tensor in net.state_dict().items() if n in msg.content.array_records["arrays"]}
    content = RecordDict({"arrays": to_array_record(trained), "metrics": metrics})
    return Message(content, reply_to=msg)


@app.evaluate()
def evaluate(msg: Message, context: Context) -> Message:
    """Evaluate the received model on this node's validation split."""
    check_code(msg.content.config_records["config"].get("app", CODE))
    config = RunConfig.from_context(context)
    data = local_data("validation", msg, config, context)
    net = received_model(msg, data, config)
    torch.set_num_threads(1)
    task.make_gpu_repeatable()

    metrics = task.test(net, data, task.pick_device())

    # A metric without a value is left out, and an element of a list without one becomes NaN.
    known = {metric_key(name): value for name, value in metrics.items() if value is not None}
    floats: dict[str, Any] = {
        k: [math.nan if element is None else float(element) for element in v] if isinstance(v, list) else float(v)
        for k, v in known.items()
    }
    record = MetricRecord({**floats, "num-examples": len(data)})
    return Message(RecordDict({"metrics": record}), reply_to=msg)


@app.query()
def query(msg: Message, context: Context) -> Message:
    """Say whether this node opts in to the evaluation, after a random delay.

    A real node would check its battery, its load or its owner's consent. Here the answer is random,
    and the delay makes some nodes miss the deadline.
    """
    config = RunConfig.from_context(context)
    stream = random_stream(config.seed, Purpose.QUERY, int(number(msg, "server-round")), partition_of(context))
    delay = stream.random() * number(msg, "max-delay")
    opt_in = bool(stream.random() < config.opt_in_probability)

    # In a simulation, a sleeping node blocks a worker, so no node sleeps past the deadline.
    time.sleep(max(0.0, min(delay, deadline(msg) - time.time())))

    return Message(RecordDict({"config": ConfigRecord({"opt-in": opt_in})}), reply_to=msg)


def number(msg: Message, name: str, default: float | None = None) -> float:
    """Return a number of the message's `config`. Raises ValueError when it is missing."""
    value = msg.content.config_records["config"].get(name, default)
    if not isinstance(value, int | float):
        raise ValueError(f"the message's config needs the number {name!r}, it is {value!r}")
    return float(value)


def deadline(msg: Message) -> float:
    """Return the deadline in seconds since the epoch; infinity for a message without one."""
    return number(msg, "deadline", math.inf)


def received_model(msg: Message, data: task.Data, config: RunConfig) -> nn.Module:
    """Return the server's model; only frozen parameters may be missing in the message. Raises UserError."""
    # Seeded, because a model may have random buffers that are not in its state_dict.
    net = task.initial_model(data.facts, config.seed)
    received, mine = msg.content.array_records["arrays"].to_torch_state_dict(), frozen(net)
    with explained(f"the server's model does not fit data of {data.facts}"):
        net.load_state_dict(mine | received)
    digest = msg.content.config_records["config"].get("frozen")  # other ServerApps send the frozen parameters
    if digest is not None and digest != frozen_digest(mine):
        raise UserError(f"make_model creates other frozen parameters here (another file of weights?): {list(mine)[:5]}")
    return net


def local_data(part: str, msg: Message, config: RunConfig, context: Context) -> task.Data:
    """Load this node's "train" or "validation" data; not after the deadline."""
    if time.time() > deadline(msg):  # useless work would delay other messages
        raise TimeoutError("the deadline passed before the message was handled (is the clock of this machine right?)")
    facts = msg.content.config_records["config"]  # other ServerApps send none
    return task.load_node_data(context.node_config, partition_of(context), config, facts)[part]


def partition_of(context: Context) -> int:
    """Return the number that identifies this node in every run: its partition id if it has one, otherwise its id."""
    with explained("partition-id", "; allowed: a whole number"):
        return int(context.node_config.get("partition-id", context.node_id))
