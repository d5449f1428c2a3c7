"""A proxy between NBD clients and a server that does to them what networks and hosts do.

    with CuttingProxy(("127.0.0.1", 0), target) as proxy:
        client = NbdClient(proxy.address, "d")
        proxy.cut_after(28, Way.TO_SERVER)    # a request's header, and not its payload

What a test asks for holds for every byte that is passed on after the call; bytes before it are with
the peer's kernel. One thing combines with another: what is slow may be silent, and then be cut.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from peers.nbd_client import Address
from peers.proxy import End, Flow, Link, Proxy, Way

SLICES_PER_S = 50
"""So evenly a limited rate is kept."""


class Fault(NamedTuple):
    """What becomes of a connection once so many bytes have passed that way: it is cut, or says
    nothing any more (None), either way."""

    after_bytes: int
    way: Way = Way.TO_SERVER
    end: End | None = End.DROP


def random_faults(rng: random.Random, bytes_max: int) -> Iterator[Fault]:
    """Endless: each way, by a FIN or a RST, after any number of bytes."""
    while True:
        yield Fault(rng.randint(0, bytes_max), rng.choice(list(Way)), rng.choice(list(End)))


class CuttingProxy(Proxy):
    """See `Proxy`. The methods say whom they mean: the clients that are there, or later ones, too.

    `cuts` has (connection's number, bytes it had passed to the server, to the client) of every
    connection that was ended here, in order.
    """

    def __init__(self, listen: Address, target: Address) -> None:
        self.cuts: list[tuple[int, int, int]] = []
        self._silent: set[Way] = set()
        self._faults: dict[Link, Fault] = {}
        self._coming: Iterator[Fault] = iter(())
        self._delays_s = dict.fromkeys(Way, 0.0)
        self._rates: dict[Way, int | None] = dict.fromkeys(Way)
        self._hushed: set[Link] = set()
        self._changes: deque[asyncio.Event] = deque()
        super().__init__(listen, target)

    # Section: the ends of connections

    def drop(self) -> None:
        """End every connection that is there with a FIN on both sides. What was held is lost."""
        self._end_all(End.DROP)

    def reset(self) -> None:
        """End every connection that is there with a RST on both sides. What was held is lost."""
        self._end_all(End.RESET)

    def cut_after(self, count: int, way: Way = Way.TO_SERVER, end: End | None = End.DROP) -> None:
        """Pass on exactly `count` more bytes that way, and end the connection (or, None, go
        silent). For the clients that are there, each by itself."""

        def plan() -> None:
            for link in self._links:
                passed = next(flow.passed for flow in link.flows if flow.way is way)
                self._faults[link] = Fault(passed + count, way, end)
                self._meet_fault(link)

        self._call(plan)

    def spare(self) -> None:
        """What was planned for clients that are there does not happen."""
        self._call(self._faults.clear)

    def schedule(self, faults: Iterable[Fault]) -> None:
        """For the clients to come: each has the next of these, until there are no more."""

        def plan() -> None:
            self._coming = iter(faults)

        self._call(plan)

    # Section: the network

    def silence(self, *ways: Way) -> None:
        """Go on accepting, and pass nothing on (no end of a connection either): both ways, if none
        is named. For all clients, later ones too, until `resume`."""
        self._call(lambda: self._silent.update(ways or Way))

    def resume(self, *ways: Way) -> None:
        """Pass on all that was held, in order, and what comes: both ways, if none is named."""

        def open_() -> None:
            self._silent.difference_update(ways or Way)
            self._hushed.clear()
            self._wake()

        self._call(open_)

    def delay(self, seconds: float, *ways: Way) -> None:
        """Every byte arrives that much later: both ways, if none is named. For all clients."""
        self._call(lambda: self._delays_s.update(dict.fromkeys(ways or Way, seconds)))

    def limit(self, bytes_per_s: int | None, *ways: Way) -> None:
        """No connection is faster (None: as fast as it can be): both ways, if none is named."""
        self._call(lambda: self._rates.update(dict.fromkeys(ways or Way, bytes_per_s)))

    # Section: the listener

    def refuse(self) -> None:
        """Nobody listens: new clients are told ECONNREFUSED. Those that are there go on."""
        self._await(self._stop_listening())

    def admit(self) -> None:
        """Listen again, at the same address."""
        self._call(self._listen)

    @contextlib.contextmanager
    def refusing(self) -> Iterator[None]:
        """`refuse` for as long as the block lasts."""
        self.refuse()
        yield
        self.admit()

    # Section: in the loop

    async def _stop_listening(self) -> None:
        assert self._accepting is not None
        self._accepting.cancel()
        await asyncio.gather(self._accepting, return_exceptions=True)

    def _end_all(self, end: End) -> None:
        def cut() -> None:
            for link in sorted(self._links, key=lambda link: link.number):
                self._cut(link, end)

        self._call(cut)
        self._await(self._until_ended())

    async def _until_ended(self) -> None:
        while any(link.ending.done() for link in self._links):
            await asyncio.sleep(0)

    def _cut(self, link: Link, end: End) -> None:
        if not link.ending.done():
            to_server, to_client = (flow.passed for flow in link.flows)
            self.cuts.append((link.number, to_server, to_client))
        link.cut(end)

    def _begun(self, link: Link) -> None:
        fault = next(self._coming, None)
        if fault is not None:
            self._faults[link] = fault
            self._meet_fault(link)

    def _meet_fault(self, link: Link) -> None:
        """Do what was planned for a connection, if it has passed as much as that was for."""
        fault = self._faults.get(link)
        if fault is None:
            return
        passed = next(flow.passed for flow in link.flows if flow.way is fault.way)
        if passed < fault.after_bytes:
            return
        del self._faults[link]
        if fault.end is None:
            self._hushed.add(link)
        else:
            self._cut(link, fault.end)

    async def _pass(self, link: Link, flow: Flow, part: bytes, arrived: float) -> None:
        await asyncio.sleep(arrived + self._delays_s[flow.way] - self._loop.time())
        view = memoryview(part)
        await self._wait_open(link, flow)
        while view:
            rate = self._rates[flow.way]
            count = await self._send(flow, view[: self._allowance(link, flow, rate)])
            self._meet_fault(link)
            view = view[count:]
            if rate is not None:
                await asyncio.sleep(count / rate)
            await self._wait_open(link, flow)

    def _allowance(self, link: Link, flow: Flow, rate: int | None) -> int | None:
        """How many bytes may be sent at once; None: all."""
        limits = []
        if rate is not None:
            limits.append(max(1, rate // SLICES_PER_S))
        fault = self._faults.get(link)
        if fault is not None and fault.way is flow.way:
            limits.append(fault.after_bytes - flow.passed)
        return min(limits, default=None)

    async def _wait_open(self, link: Link, flow: Flow) -> None:
        """Until this connection may pass something on that way; for ever, when it is ending."""
        while flow.way in self._silent or link in self._hushed or link.ending.done():
            change = asyncio.Event()
            self._changes.append(change)
            await change.wait()

    def _wake(self) -> None:
        while self._changes:
            self._changes.popleft().set()
