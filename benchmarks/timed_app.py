"""The app's ServerApp, which logs when it looks for replies and which it finds."""

from __future__ import annotations

import time
from collections.abc import Iterable
from logging import getLogger
from typing import Any

from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp

from pytorch_example_low_level import server_app

app = ServerApp()
log = getLogger("flwr")


class TimedGrid:
    """Flower's Grid, with these lines of the log."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.types: dict[str, str] = {}  # by message id

    def __getattr__(self, name: str) -> Any:
        """Return what is as in Flower's Grid."""
        return getattr(self.grid, name)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send messages, and remember their types."""
        ids = list(self.grid.push_messages(messages := list(messages)))
        self.types |= {message.metadata.message_id: message.metadata.message_type for message in messages}
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Look for replies."""
        message_ids = list(message_ids)
        if message_ids:
            log.info("LOOK %s %.4f", self.types[message_ids[0]], time.monotonic())
        replies = list(self.grid.pull_messages(message_ids))
        for reply in replies:
            kind = self.types[reply.metadata.reply_to_message_id]
            log.info("PICKED %s %d %.4f", kind, reply.metadata.src_node_id, time.monotonic())
        return replies


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the app."""
    timed: Any = TimedGrid(grid)
    server_app.main(timed, context)
