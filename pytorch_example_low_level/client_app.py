"""The ClientApp: how a node answers TRAIN, EVALUATE and QUERY messages.

Records and keys are those of Flower's built-in strategies, so that this ClientApp also runs
under `flwr.serverapp.strategy.FedAvg`. A node draws no random number from a global state: all
derives from (seed, round, partition), so it does not matter which process does the work.
"""

from __future__ import annotations

import time

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from pytorch_example_low_level import task
from pytorch_example_low_level.config import REPLY_GRACE, RunConfig
from pytorch_example_low_level.utils import Purpose, random_stream

app = ClientApp()


@app.train()
def train(msg: Message, context: Context) -> Message:
    """Train the received model on this node's training split; return it with its weight."""
    if is_overdue(msg):
        return too_late(msg)
    config = RunConfig.from_context(context)
    server_round, lr = read_instructions(msg, "server-round", "lr")
    net = task.Net.from_state_dict(msg.content.array_records["arrays"].to_torch_state_dict())
    data = local_split("train", net.in_channels, config, context)
    stream = random_stream(config.seed, Purpose.TRAIN, int(server_round), partition_of(context))
    use_one_thread()

    try:
        train_loss = task.train(
            net,
            data,
            epochs=config.local_epochs,
            batch_size=config.batch_size,
            lr=lr,
            momentum=config.momentum,
            augment=config.augment,
            seed=int(stream.integers(2**63)),
            device=task.pick_device(),
            overdue=lambda: is_overdue(msg),
        )
    except TimeoutError:
        return too_late(msg)

    # "num-examples" is the weight that FedAvg gives to this node's model.
    metrics = MetricRecord({"train_loss": train_loss, "num-examples": len(data)})
    content = RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": metrics})
    return Message(content, reply_to=msg)


@app.evaluate()
def evaluate(msg: Message, context: Context) -> Message:
    """Evaluate the received model on this node's validation split."""
    if is_overdue(msg):
        return too_late(msg)
    config = RunConfig.from_context(context)
    net = task.Net.from_state_dict(msg.content.array_records["arrays"].to_torch_state_dict())
    data = local_split("validation", net.in_channels, config, context)
    use_one_thread()

    loss, accuracy = task.test(net, data, task.pick_device())

    metrics = MetricRecord({"eval_loss": loss, "eval_acc": accuracy, "num-examples": len(data)})
    return Message(RecordDict({"metrics": metrics}), reply_to=msg)


@app.query()
def query(msg: Message, context: Context) -> Message:
    """Say whether this node opts in to the evaluation, after the time a person might take.

    Real nodes would look at their battery, their owner's consent or their load. Here chance
    decides, and how long they think makes some of them miss the deadline.
    """
    config = RunConfig.from_context(context)
    server_round, max_delay = read_instructions(msg, "server-round", "max-delay")
    stream = random_stream(config.seed, Purpose.QUERY, int(server_round), partition_of(context))
    delay = stream.random() * max_delay
    opt_in = bool(stream.random() < config.opt_in_probability)

    # In a simulation a sleeping node keeps a worker from others. Nobody reads an answer that
    # comes after the deadline, so none is worth sleeping past it.
    time.sleep(max(0.0, min(delay, deadline_of(msg) - time.time())))

    answer = ConfigRecord({"opt-in": opt_in})
    if "partition-id" in context.node_config:
        answer["partition-id"] = partition_of(context)
    return Message(RecordDict({"config": answer}), reply_to=msg)


def read_instructions(msg: Message, *names: str) -> list[float]:
    """Return numbers of the message's `config`. Raises ValueError that names what is missing."""
    instructions = msg.content.config_records["config"]
    values = [instructions.get(name) for name in names]
    if not all(isinstance(value, int | float) for value in values):
        raise ValueError(f"the message's config needs the numbers {names}, it is {dict(instructions)}")
    return [float(value) for value in values]  # type: ignore[arg-type]


def local_split(part: str, in_channels: int, config: RunConfig, context: Context) -> task.Split:
    """Load this node's "train" or "validation" split, from its own folder if it has one."""
    node = context.node_config
    if "data-path" in node:
        # partition_of() can be a node id here: any number will do that is always the same.
        return task.load_folder(part, in_channels, str(node["data-path"]), partition_of(context), config.seed)
    if "partition-id" not in node or "num-partitions" not in node:
        raise task.DataError("a node needs --node-config 'data-path=\"…\"' or 'partition-id=… num-partitions=…'")
    splits = task.load_partition(
        in_channels,
        partition_of(context),
        int(node["num-partitions"]),
        config.dataset,
        config.partitioner,
        config.dirichlet_alpha,
        config.seed,
    )
    return splits[part]


def partition_of(context: Context) -> int:
    """Return the number by which this node is known in every run: its partition, else its id."""
    return int(context.node_config.get("partition-id", context.node_id))


def deadline_of(msg: Message) -> float:
    """Return when the server stops waiting for the reply, in seconds since the epoch.

    The server lets a message live REPLY_GRACE longer than it waits for the answer.
    """
    return msg.metadata.created_at + msg.metadata.ttl - REPLY_GRACE


def is_overdue(msg: Message) -> bool:
    """Tell whether nobody waits for the reply any more: then work would only hold up others."""
    return time.time() > deadline_of(msg)


def too_late(msg: Message) -> Message:
    """Answer a message whose deadline has passed."""
    return Message(Error(code=0, reason="the deadline of the message has passed"), reply_to=msg)


def use_one_thread() -> None:
    """Compute with one thread.

    How a sum is split over threads decides its last bits, so their number must not depend on
    the machine. For models this small one thread is also the fastest: set more if yours is
    large and equal bits on all machines do not matter.
    """
    torch.set_num_threads(1)
