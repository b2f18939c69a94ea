"""An app that exchanges as many messages of the same size as the real one, and does nothing else.

It waits for the nodes as the real app does, sends to nodes drawn at random, and asks for at most 64
replies at a time, every 10 ms. Its settings can add the arithmetic of the real app on random images
in memory, with the phases of a round, or only the imports of the real app.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

SETTINGS: Any = SimpleNamespace(local_epochs=1, batch_size=32, momentum=0.9, logit_adjustment=1.0, augment=False)
client = ClientApp()
server = ServerApp()

# The app and its libraries are imported only where a setting asks for them.


@cache
def images(count: int) -> Any:
    """Return random images of ten classes."""
    import torch

    from pytorch_example_low_level.images import Split

    pixels = torch.randint(0, 256, (count, 1, 28, 28), dtype=torch.uint8)
    return Split(pixels, torch.arange(count) % 10, [str(number) for number in range(10)])


def model(width: int, arrays: ArrayRecord | None = None) -> Any:
    """Return the app's model with this width of the first linear layer."""
    from torch import nn

    from pytorch_example_low_level.task import make_model

    net = make_model(images(1).facts)
    if width != 128:
        net.fc1, net.fc2 = nn.Linear(32 * 4 * 4, width), nn.Linear(width, 10)
    if arrays is not None:
        net.load_state_dict(arrays.to_torch_state_dict())
    return net


def work(arrays: ArrayRecord, count: int, *, train: bool = False) -> ArrayRecord:
    """Train or test the model on random images, if there are any; return the model."""
    if not count:
        return arrays
    import torch

    from pytorch_example_low_level import task

    net, cpu = model(arrays["fc1.bias"].shape[0], arrays), torch.device("cpu")
    if not train:
        task.test(net, images(count), cpu)
        return arrays
    task.train(net, images(count), SETTINGS, lr=0.01, seed=1, device=cpu)
    return ArrayRecord(net.state_dict())


@cache
def import_what_a_node_imports() -> None:
    """Import, and create the first optimizer, which imports PyTorch's compiler."""
    import torch

    torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)


# ------------------------------------------------------------------------------- The nodes


@client.train()
def train(msg: Message, context: Context) -> Message:
    """Return the model, trained for an epoch if there are images."""
    if context.run_config["imports"]:
        import_what_a_node_imports()
    arrays = work(msg.content.array_records["arrays"], int(context.run_config["train-images"]), train=True)
    metrics = MetricRecord({"train_loss": 1.0, "num-examples": 1})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=msg)


@client.evaluate()
def evaluate(msg: Message, context: Context) -> Message:
    """Test the model if there are images."""
    work(msg.content.array_records["arrays"], int(context.run_config["validation-images"]))
    metrics = MetricRecord({"eval_loss": 1.0, "eval_acc": 1.0, "num-examples": 1})
    return Message(RecordDict({"metrics": metrics}), reply_to=msg)


@client.query()
def query(msg: Message, context: Context) -> Message:
    """Opt in."""
    return Message(RecordDict({"config": ConfigRecord({"opt-in": True})}), reply_to=msg)


# ------------------------------------------------------------------------------ The server


def connected_nodes(grid: Grid, last: int) -> list[int]:
    """Return the ids of the nodes, once there are as many as before."""
    while True:
        nodes = sorted(grid.get_nodes(), key=lambda node: node.registered_at)
        if len(nodes) >= 2 and len(nodes) == last:
            return [node.node_id for node in nodes]
        last = len(nodes)
        time.sleep(0.5)


def send_and_look(grid: Grid, messages: list[Message], meanwhile: Callable[[], object]) -> Iterator[Message]:
    """Send messages, do something meanwhile, and yield the replies."""
    waiting = list(grid.push_messages(messages))
    meanwhile()
    while waiting:
        replies = {reply.metadata.reply_to_message_id: reply for reply in grid.pull_messages(waiting[:64])}
        yield from replies.values()
        waiting = [message_id for message_id in waiting if message_id not in replies]
        time.sleep(0.01)


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Exchange the messages of the rounds, and print the seconds of each round."""
    config: Any = context.run_config
    if config["imports"]:
        import datasets  # noqa: F401
        import torch  # noqa: F401
    if count := config["test-images"]:
        arrays = ArrayRecord(model(config["width"]).state_dict())
    else:  # as many arrays as the app's model has, and as many numbers
        values = np.zeros(config["parameters"] // 12, dtype=np.float32)
        arrays = ArrayRecord({f"{number}": Array(values) for number in range(12)})

    def exchange(kind: str, nodes: int, meanwhile: Callable[[], object] = lambda: None) -> ArrayRecord:
        """Exchange messages with so many nodes; return the mean of the models, or with no arithmetic the model."""
        content = RecordDict({"config": ConfigRecord({"server-round": 1, "lr": 0.1})})
        if kind != MessageType.QUERY:
            content["arrays"] = arrays
        messages = [Message(content, connected[index], kind) for index in sorted(sample(range(len(connected)), nodes))]
        by_flower = config["send-and-receive"]
        replies = grid.send_and_receive(messages) if by_flower else send_and_look(grid, messages, meanwhile)
        result = arrays
        if count and kind == MessageType.TRAIN:
            from pytorch_example_low_level.server_app import weighted_mean

            models = ((reply.content.array_records["arrays"].to_torch_state_dict(), 1) for reply in replies)
            result = ArrayRecord(weighted_mean(models, arrays.to_torch_state_dict()) or {})
        else:
            assert len(list(replies)) == nodes
        print(f"ENGINE {kind}", flush=True)
        return result

    connected: list[int] = []
    for server_round in range(1, config["rounds"] + 1):
        connected = connected_nodes(grid, last=len(connected))
        sample = random.Random(server_round).sample
        started = time.monotonic()
        arrays = exchange(MessageType.TRAIN, config["trained"])
        exchange(MessageType.QUERY, config["asked"], partial(work, arrays, count))
        exchange(MessageType.EVALUATE, config["evaluated"])
        print(f"ENGINE round {len(connected)} {time.monotonic() - started:.6f}", flush=True)
