"""A Grid in one process: it hands each message to a real ClientApp when it is first looked for."""

import pickle
import random
import time
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

PROJECT = Path(__file__).parent.parent
Handler = Callable[[Message, Context], Message | list[Message] | None]


def run_config(**overrides) -> dict:
    """The defaults of pyproject.toml, with `some_key=…` for `some-key`."""
    defaults = tomllib.loads((PROJECT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    return defaults | {key.replace("_", "-"): value for key, value in overrides.items()}


def make_context(config: dict, node_id: int = 0, node_config: dict | None = None) -> Context:
    return Context(run_id=1, node_id=node_id, node_config=node_config or {}, state=RecordDict(), run_config=config)


class InProcessGrid(Grid):
    """Nodes are run in the order in which they are asked, unless `shuffle` says otherwise.

    `handler` stands for the ClientApp of a node: `handlers[partition]` replaces the real one.
    It may return None (never answers), several messages, or raise.
    """

    def __init__(self, client_app: ClientApp | Handler, config: dict, num_nodes: int, seed: int = 0) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        rng = random.Random(seed)
        self.client_app = client_app
        self.shuffle = random.Random(seed).shuffle if seed else None
        self.contexts: dict[int, Context] = {}
        for partition in range(num_nodes):
            node_id = rng.getrandbits(63)
            node_config = {"partition-id": partition, "num-partitions": num_nodes}
            self.contexts[node_id] = make_context(config, node_id, node_config)
        self.connected = set(self.contexts)
        self.handlers: dict[int, Handler] = {}
        self.sent: list[Message] = []
        self.waiting: dict[str, Message] = {}  # pushed, not yet handled
        self.replies: dict[str, list[Message]] = {}  # handled, not yet pulled
        self.before_push: Callable[[list[Message]], None] = lambda messages: None
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

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        self.before_push(messages)
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"message-{len(self.sent)}"
            self.sent.append(message)
            if message.metadata.dst_node_id in self.connected:
                ids.append(message.metadata.message_id)
                self.waiting[message.metadata.message_id] = message
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        wanted = [i for i in self.waiting if i in set(message_ids)]
        if self.shuffle:
            self.shuffle(wanted)
        for message_id in wanted:
            self._handle(self.waiting.pop(message_id))
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
    """Partition p answers `delays[p]` seconds after its message was pushed."""

    def __init__(self, delays: list[float], client_app: Handler = echo, config: dict | None = None) -> None:
        super().__init__(client_app, config or run_config(), len(delays))
        self.delays = delays
        self.due: dict[str, float] = {}
        self.pulled: list[str] = []

    def push_messages(self, messages):
        ids = super().push_messages(messages)
        for message in messages:
            delay = self.delays[self.partition(message.metadata.dst_node_id)]
            self.due[message.metadata.message_id] = time.monotonic() + delay
        return ids

    def pull_messages(self, message_ids):
        ready = [i for i in message_ids if self.due.get(i, 0) <= time.monotonic()]
        found = super().pull_messages(ready)
        self.pulled += [reply.metadata.reply_to_message_id for reply in found]
        return found
