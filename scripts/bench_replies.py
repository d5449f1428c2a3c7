"""The three shapes of replies side by side: what structured replies and extended headers cost.

A client that does next to nothing: it sends a batch of requests, and counts the bytes that come
back (the disk is full of data, so that no hole makes a reply shorter). One server, one disk; the
shapes take turns.
"""

from __future__ import annotations

import os
import random
import socket
import struct
import time
from statistics import median

from bench_cells import SMALL, tell
from bench_events import Rows, Settings
from bench_load import KIB, MIB, SEED, Load, Run, Shape
from bench_servers import Replnbd, Server

from replnbd.nbd import EXTENDED_REPLIES, SIMPLE_REPLIES, STRUCTURED_REPLIES, Replies, pack_request
from replnbd.nbd.constants import CMD_DISC, CMD_READ, CMD_WRITE, Option

OPTIONS = {
    SIMPLE_REPLIES: (),
    STRUCTURED_REPLIES: (Option.STRUCTURED_REPLY,),
    EXTENDED_REPLIES: (Option.EXTENDED_HEADERS,),
}
SHAPES = (Shape(4 * KIB, 1), SMALL, Shape(64 * KIB, 16), Shape(1 * MIB, 4))
ACK = 1
BATCHES = 64  # made beforehand, and sent over and over


def replies(settings: Settings) -> Rows:
    """Requests/s, and the server's processor time for each, in each shape."""
    if "replnbd" not in settings.servers:
        return []
    load = Load(settings.directory, settings.size, settings.runtime_s)
    found: dict[tuple[str, Replies], list[Run]] = {}
    with Replnbd(settings.directory / "replnbd", settings.size) as server:
        load.fill(server, "disk")
        server.start()
        load.fill(server, "view")
        for turn in range(settings.repeat):
            for command, verb in ((CMD_READ, "read"), (CMD_WRITE, "rewrite")):
                for shape in SHAPES:
                    order = tuple(OPTIONS)[:: 1 if turn % 2 == 0 else -1]
                    for kind in order:
                        tell(f"{turn + 1}/{settings.repeat} {verb} {shape} {kind.name}")
                        run = exchange(server, kind, command, shape, load)
                        found.setdefault((f"standby {verb} {shape}", kind), []).append(run)
    rows = []
    for what in dict.fromkeys(name for name, _ in found):
        row: dict[str, object] = {"what": what}
        for kind in OPTIONS:
            runs = found[what, kind]
            row[kind.name] = median(run.requests_per_s for run in runs)
            row[f"{kind.name}: CPU µs"] = median(run.cpu_us for run in runs)
        for kind in (STRUCTURED_REPLIES, EXTENDED_REPLIES):
            row[f"{kind.name}/simple"] = _ratio(found[what, kind], found[what, SIMPLE_REPLIES])
        rows.append(row)
    return rows


def _ratio(these: list[Run], those: list[Run]) -> float:
    """The median of the ratios of runs that were made one after the other."""
    return median(a.requests_per_s / b.requests_per_s for a, b in zip(these, those, strict=True))


def exchange(server: Server, kind: Replies, command: int, shape: Shape, load: Load) -> Run:
    """Batches of `shape.depth` random requests for the set time."""
    rng = random.Random(SEED)
    batches = [batch(kind, command, shape, load.size, rng) for _ in range(BATCHES)]
    reply = kind.read_prefix + shape.size if command == CMD_READ else kind.ack_size
    expected = reply * shape.depth
    buffer = memoryview(bytearray(expected))
    with connect(server, kind, "view") as client:
        done = 0
        used, begin = server.cpu_s(), time.perf_counter()
        ends = begin + load.runtime_s
        while (now := time.perf_counter()) < ends:
            client.sendall(batches[done % BATCHES])
            filled = 0
            while filled < expected:
                filled += client.recv_into(buffer[filled:])
            done += 1
        requests = done * shape.depth
        used = server.cpu_s() - used
        client.sendall(pack_request(0, CMD_DISC, 0, 0, 0, extended=kind is EXTENDED_REPLIES))
    return Run(requests / (now - begin), None, used / requests * 1e6)


def batch(kind: Replies, command: int, shape: Shape, size: int, rng: random.Random) -> bytes:
    """Requests in one piece, as a client with so many in flight sends them."""
    parts = []
    for cookie in range(shape.depth):
        flags = kind.write_flags if command == CMD_WRITE else 0
        offset = rng.randrange(size // shape.size) * shape.size
        extended = kind is EXTENDED_REPLIES
        parts.append(pack_request(flags, command, cookie, offset, shape.size, extended=extended))
        if command == CMD_WRITE:
            parts.append(os.urandom(shape.size))
    return b"".join(parts)


def connect(server: Server, kind: Replies, export: str) -> socket.socket:
    """A connection in the transmission phase."""
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    client.connect(str(server.socket))
    receive(client, 18)
    client.sendall(struct.pack(">I", 3))
    for option in OPTIONS[kind]:
        client.sendall(b"IHAVEOPT" + struct.pack(">II", option, 0))
        until_ack(client)
    name = export.encode()
    payload = struct.pack(">I", len(name)) + name + struct.pack(">H", 0)
    client.sendall(b"IHAVEOPT" + struct.pack(">II", Option.GO, len(payload)) + payload)
    until_ack(client)
    return client


def until_ack(client: socket.socket) -> None:
    """Read the replies to an option."""
    answer = 0
    while answer != ACK:
        _, _, answer, length = struct.unpack(">QIII", receive(client, 20))
        text = receive(client, length)
        if answer >> 31:
            raise SystemExit(f"the server refused an option: {text.decode(errors='replace')}")


def receive(client: socket.socket, length: int) -> bytes:
    """Exactly so many bytes."""
    data = client.recv(length, socket.MSG_WAITALL)
    if len(data) != length:
        raise SystemExit("the server hung up")
    return data
