"""A proxy between NBD clients and a server: what other proxies add to, or take away from.

    client --> read() --> parts that are held --> pass_() --> server        and the same backwards

To read and to pass on are two tasks each way: a proxy that passes nothing on goes on accepting.
Everything runs in one thread with a loop of its own; a test's calls are done between two steps of
that loop (`_call`), so that what they ask for holds for every byte after them.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import itertools
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

from peers.nbd_client import Address
from peers.process import wait_until

T = TypeVar("T")

RECEIVE_BYTES = 1 << 18
HELD_PARTS_MAX = 256
"""64 MiB a direction: two of NBD's largest payloads. With more a client has to wait, as it has to
for any network."""

CALL_S = 10.0


class Way(enum.Enum):
    """The two directions of a connection."""

    TO_SERVER = "to server"
    TO_CLIENT = "to client"


class Traffic(NamedTuple):
    """Bytes each way, all connections together."""

    to_server: int
    to_client: int


class End(enum.Enum):
    """How a connection ends."""

    DROP = "drop"
    """With a FIN, on both sides. What comes afterwards goes nowhere: a RST could take away what a
    peer has not read yet."""

    RESET = "reset"
    """With a RST, on both sides. A unix socket has none: there it is the end of the stream."""


class Flow:
    """One direction of one connection. `passed` counts its own bytes."""

    def __init__(self, way: Way, source: socket.socket, sink: socket.socket) -> None:
        self.way = way
        self.source = source
        self.sink = sink
        self.passed = 0
        self.held: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(HELD_PARTS_MAX)
        """Parts, and when they came. The empty one is the end of the stream."""


class Link:
    """A client's connection, `number` of those to a proxy, and the one to the server for it."""

    def __init__(self, number: int, client: socket.socket, server: socket.socket) -> None:
        self.number = number
        self.sockets = (client, server)
        self.flows = (
            Flow(Way.TO_SERVER, client, server),
            Flow(Way.TO_CLIENT, server, client),
        )
        self.ending: asyncio.Future[End] = asyncio.get_running_loop().create_future()
        """Done when it is to end before its peers end it."""

    def cut(self, end: End) -> None:
        """End it, if it is not ending yet."""
        if not self.ending.done():
            self.ending.set_result(end)


class Proxy:
    """A client of `address` gets a connection of its own to the server at `target`.

    `listen` is a path or (host, port); with port 0 `address` has the one that was found.
    """

    def __init__(self, listen: Address, target: Address) -> None:
        self.target = target
        self._received = dict.fromkeys(Way, 0)
        self._passed = dict.fromkeys(Way, 0)
        self._links: set[Link] = set()
        self._numbers = itertools.count()
        self._tasks: set[asyncio.Task[None]] = set()
        self._port: socket.socket | None = None
        self.address = listen
        if isinstance(listen, tuple):
            # The port stays ours while nobody listens on it.
            self._port = _bind(listen)
            self.address = self._port.getsockname()
        self._accepting: asyncio.Task[None] | None = None
        self._closing = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._call(self._listen)

    def uri(self, export: str) -> str:
        """The NBD URI of an export behind it."""
        if isinstance(self.address, tuple):
            host, port = self.address
            return f"nbd://{host}:{port}/{export}"
        return f"nbd+unix:///{export}?socket={self.address}"

    @property
    def connections(self) -> int:
        """How many clients are there."""
        return len(self._links)

    @property
    def received(self) -> Traffic:
        """What was accepted so far."""
        return self._call(lambda: Traffic(*self._received.values()))

    @property
    def passed(self) -> Traffic:
        """What was passed on so far."""
        return self._call(lambda: Traffic(*self._passed.values()))

    def wait_hung_up(self) -> None:
        """Until no client is there any more."""
        wait_until(lambda: not self._links, "the clients to hang up")

    # Section: in the loop

    def _call(self, do: Callable[[], T]) -> T:
        """Do it between two steps of the loop: what was sent, for one thing, is counted, too."""
        if self._loop.is_closed():
            return do()

        async def step() -> T:
            return do()

        return self._await(step())

    def _await(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(CALL_S)

    def _listen(self) -> None:
        """Begin to accept clients."""
        listener = _bind(self.address)
        listener.setblocking(False)
        listener.listen(64)
        self._accepting = self._start(self._accept(listener))

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _accept(self, listener: socket.socket) -> None:
        with listener:
            while True:
                client, _ = await self._loop.sock_accept(listener)
                _hasten(client)
                try:
                    server = await self._connect()
                except OSError:
                    _close(client, End.RESET)
                    continue
                except BaseException:
                    client.close()
                    raise
                link = Link(next(self._numbers), client, server)
                self._links.add(link)
                self._begun(link)
                self._start(self._serve(link))

    async def _connect(self) -> socket.socket:
        family = socket.AF_INET if isinstance(self.target, tuple) else socket.AF_UNIX
        server = socket.socket(family, socket.SOCK_STREAM)
        try:
            server.setblocking(False)
            await self._loop.sock_connect(server, _plain(self.target))
        except BaseException:
            server.close()
            raise
        _hasten(server)
        return server

    def _begun(self, link: Link) -> None:
        """A client is there, and nothing was read of it."""

    async def _serve(self, link: Link) -> None:
        tasks = [
            self._loop.create_task(work)
            for flow in link.flows
            for work in (self._read(flow), self._write(link, flow))
        ]
        through = asyncio.gather(*tasks)
        try:
            either: list[asyncio.Future[Any]] = [through, link.ending]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            reset = through.done() and isinstance(through.exception(), ConnectionResetError)
            link.cut(End.RESET if reset else End.DROP)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, through, return_exceptions=True)
            self._links.remove(link)
            for sock in link.sockets:
                dropped = link.ending.done() and link.ending.result() is End.DROP
                if self._closing or not dropped:
                    _close(sock, End.RESET)
                else:
                    self._start(self._drop(sock))

    async def _read(self, flow: Flow) -> None:
        part = b"more"
        while part:
            part = await self._loop.sock_recv(flow.source, RECEIVE_BYTES)
            self._received[flow.way] += len(part)
            await flow.held.put((self._loop.time(), part))

    async def _write(self, link: Link, flow: Flow) -> None:
        while True:
            arrived, part = await flow.held.get()
            await self._pass(link, flow, part, arrived)
            if not part:
                flow.sink.shutdown(socket.SHUT_WR)
                return

    async def _pass(self, link: Link, flow: Flow, part: bytes, arrived: float) -> None:
        """Pass a part on; with an empty one there is nothing to do but to wait."""
        view = memoryview(part)
        while view:
            view = view[await self._send(flow, view) :]

    async def _send(self, flow: Flow, view: memoryview) -> int:
        """Send some of it, as soon as there is room, or nothing if there was none."""
        try:
            count = flow.sink.send(view)
        except BlockingIOError:
            await self._room(flow.sink)
            return 0
        flow.passed += count
        self._passed[flow.way] += count
        return count

    async def _room(self, sink: socket.socket) -> None:
        ready = asyncio.Event()
        self._loop.add_writer(sink, ready.set)
        try:
            await ready.wait()
        finally:
            self._loop.remove_writer(sink)

    async def _drop(self, sock: socket.socket) -> None:
        """End our side, and take what the peer still says until it ends its own."""
        with sock, contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_WR)
            while await self._loop.sock_recv(sock, RECEIVE_BYTES):
                pass

    # Section: its end

    def close(self) -> None:
        """No more clients; the connections of those that are there are reset."""
        if self._loop.is_closed():
            return
        self._await(self._cancel_all())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CALL_S)
        self._loop.close()
        if self._port is not None:
            self._port.close()

    async def _cancel_all(self) -> None:
        self._closing = True
        await asyncio.sleep(0)  # a task that has not begun would not close its sockets
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for link in self._links:  # those of which nothing was served yet
            for sock in link.sockets:
                _close(sock, End.RESET)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _plain(address: Address) -> str | tuple[str, int]:
    return str(address) if isinstance(address, Path) else address


def _bind(address: Address) -> socket.socket:
    if isinstance(address, tuple):
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    else:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        Path(address).unlink(missing_ok=True)  # of an earlier listener
    sock.bind(_plain(address))
    return sock


def _hasten(sock: socket.socket) -> None:
    """No byte waits for more."""
    sock.setblocking(False)
    if sock.family == socket.AF_INET:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _close(sock: socket.socket, end: End) -> None:
    if end is End.RESET:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()
