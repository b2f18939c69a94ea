"""The app's ServerApp, which logs when it looks for replies and which it finds."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp

from pytorch_example_low_level import server_app
from pytorch_example_low_level.config import log

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the app."""
    timed: Any = grid
    push, pull = grid.push_messages, grid.pull_messages
    kinds: dict[str, str] = {}  # by message id

    def push_messages(messages: Iterable[Message]) -> list[str]:
        ids = list(push(messages := list(messages)))
        kinds.update({message.metadata.message_id: message.metadata.message_type for message in messages})
        return ids

    def pull_messages(message_ids: Iterable[str]) -> list[Message]:
        if message_ids := list(message_ids):
            log.info("LOOK %s %.4f", kinds[message_ids[0]], time.monotonic())
        replies = list(pull(message_ids))
        for reply in replies:
            kind = kinds[reply.metadata.reply_to_message_id]
            log.info("PICKED %s %d %.4f", kind, reply.metadata.src_node_id, time.monotonic())
        return replies

    timed.push_messages, timed.pull_messages = push_messages, pull_messages
    server_app.main(grid, context)
