"""A TCP proxy that fails on purpose, in front of the SuperLink. It sees only ciphertext."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
import time
from contextlib import ExitStack, suppress
from types import TracebackType

from deploy.keys import HOST
from deploy.local_federation import Federation

CHUNK = 16_384  # bytes


class Proxy:
    """Passes connections on to a port of this machine. Its attributes may be changed at any time."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.latency = 0.0  # seconds, in each direction
        self.rate = float("inf")  # bytes a second, in each direction
        self.refuses = False  # new connections: set by `cut` and `heal`
        self.hold = False  # half-open: nothing comes through, and nothing is closed; afterwards, TCP sends it again
        self.uploaded = 0  # bytes from the node, since it was last set to 0
        self.hold_after = float("inf")  # of `uploaded`: then nothing comes through
        self.cut_after = float("inf")  # of `uploaded`: then all connections are cut, and new ones are refused
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._writers: set[asyncio.StreamWriter] = set()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Proxy:
        self._thread.start()
        self._ready.wait(10)
        return self

    def __exit__(self, *args: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def cut(self) -> None:
        """Reset all connections, and refuse new ones until `heal`."""
        self._loop.call_soon_threadsafe(self._cut)

    def heal(self) -> None:
        """Pass everything on again."""
        self.latency, self.rate, self.hold = 0.0, float("inf"), False
        self.hold_after = self.cut_after = float("inf")
        if self.refuses:
            asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(10)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._listen())
        self._ready.set()
        self._loop.run_forever()

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, HOST, self.port)
        self.port, self.refuses = self._server.sockets[0].getsockname()[1], False

    def _cut(self) -> None:
        # Without a reset in the TLS handshake, SuperNodes take it for a wrong certificate, and give up.
        self._server.close()
        self.refuses = True
        for writer in self._writers:
            reset = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
            writer.transport.abort()
        self._writers.clear()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection(HOST, self.target)
        except OSError:  # the SuperLink is not there
            writer.transport.abort()
            return
        self._writers |= {writer, back}
        await asyncio.gather(self._pump(reader, back, upload=True), self._pump(there, writer, upload=False))
        self._writers -= {writer, back}

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, upload: bool) -> None:
        """Pass bytes on, each `latency` seconds later."""
        waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        sending = asyncio.ensure_future(self._send(waiting, writer))
        with suppress(OSError):
            while data := await reader.read(CHUNK):
                self.uploaded += len(data) * upload
                if self.uploaded > self.cut_after:
                    self._cut()
                    break
                while self.hold or self.uploaded > self.hold_after:
                    await asyncio.sleep(0.05)
                await asyncio.sleep(len(data) / self.rate)
                waiting.put_nowait((time.monotonic() + self.latency, data))
        waiting.put_nowait((time.monotonic() + self.latency, b""))
        await sending

    async def _send(self, waiting: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while (item := await waiting.get())[1]:
                await asyncio.sleep(max(0.0, item[0] - time.monotonic()))
                writer.write(item[1])
                await writer.drain()
            writer.close()


class ProxiedFederation(Federation):
    """A federation whose nodes reach the SuperLink through proxies."""

    def __enter__(self) -> ProxiedFederation:
        with ExitStack() as stack:
            self.proxies = [stack.enter_context(Proxy(self.port)) for _ in range(self.num_nodes)]
            super().__enter__()
            self.close_proxies = stack.pop_all().close
        return self

    def __exit__(self, *args: object) -> None:
        super().__exit__(*args)
        self.close_proxies()

    def start_supernode(self, index: int) -> None:
        port, self.port = self.port, self.proxies[index].port
        try:
            super().start_supernode(index)
        finally:
            self.port = port
