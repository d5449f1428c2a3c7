"""Rounds of scripted clients against a real daemon, and the model beside it.

A round is one to four clients at a time, each of another export. After it every answer has been
compared with the model, every byte of the small disks with what the model says, and of the large
one what was touched; the daemon lives, has let go of its clients, and has logged nothing bad.
"""

from __future__ import annotations

import random
import re
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

import fuzz_client
from fuzz_check import check_answers, check_disk, disks_on_the_way, in_order, renumbered
from fuzz_client import Client
from fuzz_sessions import KIB, MIB, Ending, Script, script
from nbd_model import End, Facts, Meaning
from nbd_model_options import hear
from peers import (
    NbdClient,
    PeerError,
    RawClient,
    ReplnbdDaemon,
    ReplnbdDisk,
    list_exports,
    wait_until,
)
from peers import nbd_wire as wire

SMALL, LARGE = 256 * KIB, 64 * MIB
DEFAULT_EXPORT = "d"
CONNECTION_BYTES_MAX = 64 * MIB
"""What one connection may make the daemon hold, with what is kept for the next."""
ROUNDS_PER_CHECKPOINT = 50
ROUNDS_PER_LOG = 200
TOUCHED_MAX = 4 * MIB  # of the large disk, read back after a round
SHOWN_MAX = 1000

_WRONG_IN_LOG = re.compile(r"Traceback|^\S+ \S+ (ERROR|CRITICAL) .*|never retrieved", re.M)


def _shown(sent: bytes) -> str:
    """What was sent, or as much of it as one wants to read: the seed has it all."""
    digits = sent[:SHOWN_MAX].hex()
    return digits if len(sent) <= SHOWN_MAX else f"{digits}... ({len(sent)} bytes)"


@dataclass
class Counts:
    """What has been done. `connection_bytes`: the most that one connection has cost, measured where
    it was alone, with what is kept for the next; `round_bytes` by any round; `growth_bytes` what
    all have left behind."""

    rounds: int = 0
    sessions: int = 0
    options: int = 0
    requests: int = 0
    refused: int = 0
    connection_bytes: int = 0
    round_bytes: int = 0
    growth_bytes: int = 0
    cpu_s: float = 0.0
    seconds: float = 0.0


class Arena:
    """A daemon with two disks in stage running, in a folder; `with`, then `rounds`."""

    def __init__(self, folder: Path, seed: int, seeds: Sequence[bytes] = ()) -> None:
        self.counts = Counts()
        self._seed = seed
        self._seeds = list(seeds)
        rng = random.Random(seed)
        small = rng.randbytes(SMALL // 2) + bytes(SMALL // 4) + rng.randbytes(SMALL // 4)
        large = folder / "b.raw"
        with large.open("wb") as file:
            file.write(rng.randbytes(MIB))
            file.truncate(LARGE)
        disks = [
            ReplnbdDisk.create(folder, "d", "d-top", small),
            ReplnbdDisk("b", "b-top", large, folder / "b.hidden", folder / "b.active", "raw"),
        ]
        self._daemon = ReplnbdDaemon(folder, disks)
        try:
            self._daemon.qmp.execute("xen-set-replication", {"enable": True, "primary": False})
            self._exports = [self._facts(each.name) for each in list_exports(self._address)]
            self._by_name = {each.name: each for each in self._exports}
            self._by_name[""] = self._by_name[DEFAULT_EXPORT]
            contents = {"d": small, "d-top": small}
            contents["b"] = contents["b-top"] = large.read_bytes()
            self.disks = {name: bytearray(content) for name, content in contents.items()}
            """What the model has, by export."""
            self._keepers = {name: NbdClient(self._address, name) for name in contents}
        except BaseException:
            self._daemon.process.kill()
            raise
        self._descriptors = self._daemon.process.descriptors
        self._resident = self._daemon.process.resident_bytes
        self._begin = time.monotonic()
        self._cpu_begin = time.process_time() + self._daemon.process.cpu_s

    @property
    def _address(self) -> Path:
        return self._daemon.nbd_socket

    def _facts(self, name: str) -> Facts:
        with RawClient(self._address).go(name) as client:
            size, flags = client.size, client.flags
        with RawClient(self._address) as client:
            client.send(wire.FIXED)
            number = wire.LIST_META_CONTEXT
            replies = client.option(number, wire.meta_context(number, name)[16:])
            contexts = tuple(reply.payload[4:].decode() for reply in replies[:-1])
            number = wire.INFO
            told = client.option(number, wire.choose(number, name, wire.INFO_DESCRIPTION)[16:])
            texts = [reply.payload[2:] for reply in told if reply.payload[:2] == b"\0\2"]
        return Facts(name, size, flags, contexts, texts[0].decode())

    @property
    def cpu_s(self) -> float:
        """CPU time that this process and the daemon have used."""
        return time.process_time() + self._daemon.process.cpu_s - self._cpu_begin

    # Section: rounds

    def round(self, number: int) -> None:
        """The round of that number: the same clients each time, if the seed is the same."""
        rng = random.Random(f"{self._seed}/{number}")
        count = rng.choices([1, 2, 3, 4], [5, 2, 1, 1])[0]
        weights = [1 if facts.size > SMALL else 25 for facts in self._exports]
        chosen = {each.name: each for each in rng.choices(self._exports, weights, k=count)}
        scripts = [script(rng, self._exports, facts, self._seeds) for facts in chosen.values()]
        try:
            self.play(scripts)
        except (PeerError, OSError, struct.error, ValueError) as exc:
            sent = [f"{each.kind} {each.ending.name} {_shown(each.sent)}" for each in scripts]
            what = f"seed {self._seed}, round {number}: {type(exc).__name__}: {exc}"
            raise PeerError(self._daemon.process.failure("\n".join([what, *sent]))) from exc
        self.counts.rounds += 1
        if not number % ROUNDS_PER_CHECKPOINT:
            self._checkpoint()
        if not number % ROUNDS_PER_LOG:
            self._read_log()

    def play(self, scripts: Sequence[Script]) -> None:
        """These clients, at the same time. PeerError if anything is not as it should be."""
        heard = self._hear(scripts)
        process = self._daemon.process
        process.reset_peak()
        before = process.resident_bytes
        clients = self._run(heard)
        wait_until(
            lambda: process.descriptors <= self._descriptors,
            "the daemon to let go of its clients",
            interval_s=0.0003,
        )
        self._measure(process.peak_bytes - before, len(clients))
        for client, (_, meaning) in zip(clients, heard, strict=True):
            self._check(client, meaning)

    def converse(self, one: Script) -> tuple[Client, Meaning]:
        """A client whose answers are yours to check, against `disks`."""
        heard = self._hear([one])
        (client,) = self._run(heard)
        return client, heard[0][1]

    def _run(self, heard: Sequence[tuple[Script, Meaning]]) -> list[Client]:
        clients = [
            Client(self._address, each, closed_by_server=meaning.end is End.CLOSED)
            for each, meaning in heard
        ]
        try:
            fuzz_client.run(clients)
        finally:
            for client in clients:
                client.close()
        return clients

    def _hear(self, scripts: Sequence[Script]) -> list[tuple[Script, Meaning]]:
        """What they mean, without those who use the export of another."""
        heard: list[tuple[Script, Meaning]] = []
        used: set[str] = set()
        for each in scripts:
            sent, meaning = renumbered(each.sent, hear(each.sent, self._by_name))
            ending = each.ending
            if meaning.session is not None:
                if meaning.session.facts.name in used:
                    continue
                used.add(meaning.session.facts.name)
                fast = any(one.asked.flags & wire.FAST_ZERO for one in meaning.session.requests)
                if ending is Ending.RST and (fast or meaning.session.facts.size > SMALL):
                    ending = Ending.FIN  # nobody could say what it has done
            heard.append((replace(each, sent=sent, ending=ending), meaning))
        return heard

    def _measure(self, used: int, clients: int) -> None:
        counts = self.counts
        counts.round_bytes = max(counts.round_bytes, used)
        if clients == 1:
            counts.connection_bytes = max(counts.connection_bytes, used)
        if used > clients * CONNECTION_BYTES_MAX:
            raise PeerError(f"{clients} clients have cost {used / MIB:.1f} MiB")

    def _check(self, client: Client, meaning: Meaning) -> None:
        counts, session = self.counts, meaning.session
        counts.sessions += 1
        counts.options += len(meaning.options)
        if session is not None:
            counts.requests += len(session.requests)
            counts.refused += sum(bool(each.error) for each in session.requests)
        if client.script.ending is Ending.RST:
            if session is not None:
                name = session.facts.name
                found = self._keepers[name].pread(0, session.facts.size)
                if found not in disks_on_the_way(session, bytes(self.disks[name])):
                    raise PeerError("the disk is none that a client who broke off may leave")
                self.disks[name] = found
            return
        answers = check_answers(client.received, meaning)
        if session is not None:
            name = session.facts.name
            if in_order(session):
                check_disk(session, answers, self.disks[name])
                self._compare(session.facts, [each.asked[1:3] for each in session.requests])
            else:
                self.disks[name] = self._keepers[name].pread(0, session.facts.size)

    def _compare(self, facts: Facts, touched: Sequence[tuple[int, ...]]) -> None:
        disk, keeper = self.disks[facts.name], self._keepers[facts.name]
        ranges = [(0, facts.size)] if facts.size <= SMALL else [(at, size) for at, size in touched]
        for offset, length in ranges:
            length = min(length, TOUCHED_MAX, max(facts.size - offset, 0))
            if length and keeper.pread(offset, length) != disk[offset : offset + length]:
                raise PeerError(f"{facts.name}: other bytes at {offset} than the model has")

    # Section: now and then

    def _checkpoint(self) -> None:
        self._daemon.qmp.execute("xen-colo-do-checkpoint")
        for name in ("d", "b"):
            self.disks[f"{name}-top"][:] = self.disks[name]

    def _read_log(self) -> None:
        log = self._daemon.process.log
        if found := _WRONG_IN_LOG.search(log.read_text(errors="replace")):
            raise PeerError(self._daemon.process.failure(f"logged {found[0]!r}"))
        with log.open("r+b") as file:
            file.truncate(0)
        counts = self.counts
        counts.growth_bytes = self._daemon.process.resident_bytes - self._resident
        counts.cpu_s = self.cpu_s
        counts.seconds = time.monotonic() - self._begin

    def finish(self) -> None:
        """All bytes of all exports once more, and an orderly end."""
        for name, disk in self.disks.items():
            if self._keepers[name].pread(0, len(disk)) != disk:
                raise PeerError(f"{name}: other bytes than the model has")
            self._keepers[name].close()
        self._read_log()
        self._daemon.quit()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._daemon.process.kill()
