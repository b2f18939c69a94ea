"""A Grid in one process: it hands each message to a real ClientApp as soon as it is sent.

`TaskIdentity` is not public. Flower's processes fill it in before an app runs, and messages take
their sender from it; there is no public way to make a message without it.
"""

import pickle
import random
import time
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from pytorch_example_low_level.config import RunConfig

PROJECT = Path(__file__).parent.parent
FACTS = {"image-shape": [1, 28, 28], "class-names": list("abcdefghij")}  # of ten classes of grey images
Handler = Callable[[Message, Context], Message | list[Message] | None]

TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1


def run_config(**overrides) -> dict:
    """The defaults of pyproject.toml, with `some_key=…` for `some-key`."""
    defaults = tomllib.loads((PROJECT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    return defaults | {key.replace("_", "-"): value for key, value in overrides.items()}


def make_context(config: dict, node_id: int = 0, node_config: dict | None = None) -> Context:
    return Context(run_id=1, node_id=node_id, node_config=node_config or {}, state=RecordDict(), run_config=config)


def typed_config(**overrides) -> RunConfig:
    return RunConfig.from_context(make_context(run_config(**overrides)))


class InProcessGrid(Grid):
    """`handlers[partition]` replaces the ClientApp of a node. It may return None (never answers),
    several messages, or raise. With a `seed` replies come in random order.
    """

    def __init__(self, client_app: ClientApp | Handler, config: dict, num_nodes: int, seed: int = 0) -> None:
        rng = random.Random(seed)
        self.client_app = client_app
        self.shuffle = random.Random(seed).shuffle if seed else None
        self.simulated = True
        self.contexts: dict[int, Context] = {}
        for partition in range(num_nodes):
            node_id = rng.getrandbits(63)
            node_config = {"partition-id": partition, "num-partitions": num_nodes}
            self.contexts[node_id] = make_context(config, node_id, node_config)
        self.connected = set(self.contexts)
        self.handlers: dict[int, Handler] = {}
        self.sent: list[Message] = []
        self.replies: dict[str, list[Message]] = {}  # handled, not yet pulled
        self.before_push: Callable[[list[Message]], None] = lambda messages: None
        self.looks: list[list[str]] = []  # the message ids of each pull
        self.peak_models = 0  # in one pull

    def partition(self, node_id: int) -> int:
        return int(self.contexts[node_id].node_config["partition-id"])

    def set_run(self, run) -> None: ...

    @property
    def run(self):
        raise NotImplementedError

    def create_message(self, *args, **kwargs):
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return set(self.connected)

    def get_nodes(self) -> Iterable:
        interval = 1e300 if self.simulated else 30.0
        nodes = []
        for node_id in self.connected:  # a set: in no order
            stamp = f"2026-01-01T00:00:00.{self.partition(node_id):06d}+00:00"
            nodes.append(SimpleNamespace(node_id=node_id, name="", registered_at=stamp, heartbeat_interval=interval))
        return nodes

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        self.before_push(messages)
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"message-{len(self.sent)}"
            self.sent.append(message)
            if message.metadata.dst_node_id in self.connected:
                ids.append(message.metadata.message_id)
                self._handle(message)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        message_ids = list(message_ids)
        self.looks.append(message_ids)
        if self.shuffle:
            self.shuffle(message_ids)
        found = [reply for i in message_ids for reply in self.replies.pop(i, [])]
        models = sum(reply.has_content() and "arrays" in reply.content for reply in found)
        self.peak_models = max(self.peak_models, models)
        return found

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        ids = list(self.push_messages(messages))
        return self.pull_messages(ids)

    def _handle(self, message: Message) -> None:
        context = self.contexts[message.metadata.dst_node_id]
        handler = self.handlers.get(self.partition(context.node_id), self.client_app)
        try:
            replies = handler(pickle.loads(pickle.dumps(message)), context)
        except Exception as error:
            replies = Message(Error(code=0, reason=f"{type(error).__name__}: {error}"), reply_to=message)
        if replies is not None:
            replies = replies if isinstance(replies, list) else [replies]
            self.replies[message.metadata.message_id] = [pickle.loads(pickle.dumps(r)) for r in replies]


def echo(message: Message, context: Context) -> Message:
    return Message(message.content, reply_to=message)


class TimedGrid(InProcessGrid):
    """Partition p answers `delays[p]` seconds after its message was sent; fetching a reply takes `fetch` seconds."""

    def __init__(
        self, delays: list[float], client_app: Handler = echo, config: dict | None = None, fetch: float = 0
    ) -> None:
        super().__init__(client_app, config or run_config(), len(delays))
        self.delays = delays
        self.fetch = fetch
        self.pulled: list[str] = []

    def time(self) -> float:
        return time.time()

    def done_at(self, message: Message, sent_at: float) -> float:
        return sent_at + self.delays[self.partition(message.metadata.dst_node_id)]

    def push_messages(self, messages):
        messages = list(messages)
        sent_at = self.time()
        ids = super().push_messages(messages)
        for message in messages:
            done_at = self.done_at(message, sent_at)
            for reply in self.replies.get(message.metadata.message_id, []):
                reply.metadata.created_at = done_at
        return ids

    def pull_messages(self, message_ids):
        now = self.time()
        ready = [i for i in message_ids if i in self.replies and self.replies[i][0].metadata.created_at <= now]
        self.looks.append(list(message_ids))
        found = super().pull_messages(ready)
        self.looks.pop()
        time.sleep(self.fetch * len(found))
        self.pulled += [reply.metadata.reply_to_message_id for reply in found]
        return found
