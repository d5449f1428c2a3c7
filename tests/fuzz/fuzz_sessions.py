"""Sessions out of a seed: valid, nearly valid, mutated and noise; and how they are sent."""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass
from enum import Enum

from nbd_model import Facts
from peers import nbd_wire as wire
from peers.nbd_wire import PAYLOAD_LEN, Shape

KIB, MIB = 1 << 10, 1 << 20
PIECE = 16 * MIB
"""TRIM and WRITE_ZEROES are done in pieces of this size: what is sent behind a longer one, and not
after its answer, may come between two of them."""
QUERIES = [
    "base:allocation",
    "qemu:allocation-depth",
    "base:",
    "qemu:",
    "qemu:dirty-bitmap:",
    "x-replnbd:",
    "x:y",
]
NUMBERS = [0, 1, 2, 3, 4, 7, 8, 12, 16, 20, 28, 32, 127, 128, 255, 256, 511, 512, 4095, 4096, 4097,
           32767, 32768, 65535, 65536, 2**17, 2**20, 2**25 - 1, 2**25, 2**25 + 1, 2**31 - 1, 2**31,
           2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 512, 2**64 - 1]  # fmt: skip
COMMANDS = [wire.READ] * 6 + [wire.WRITE] * 6 + [
    wire.FLUSH, wire.TRIM, wire.CACHE, wire.ZEROES, wire.ZEROES, wire.STATUS, wire.STATUS,
]  # fmt: skip


class Ending(Enum):
    """What the client does when all is sent."""

    FIN = "sends no more, and reads to the end"
    RST = "closes at once"
    DEAF = "reads nothing until all is sent, or for as long as the server takes it"


@dataclass(frozen=True)
class Script:
    """One client: `sent` after the greeting, cut at `cuts`; at those in `pauses` it waits for the
    server to have read what was sent."""

    kind: str
    sent: bytes
    cuts: tuple[int, ...]
    pauses: frozenset[int]
    ending: Ending


def script(rng: random.Random, exports: list[Facts], export: Facts, seeds: list[bytes]) -> Script:
    """A client of `export`, if it is one; `seeds` are sessions to take pieces from."""
    kind = rng.choices(["valid", "odd", "mutated", "noise"], [35, 30, 30, 5])[0]
    sent = _noise(rng) if kind == "noise" else _session(rng, exports, export, kind != "valid")
    if kind == "mutated":
        base = rng.choice(seeds) if seeds and rng.random() < 0.4 else sent
        sent = mutated(rng, base, seeds)
    elif kind == "odd" and rng.random() < 0.3:
        sent = sent[: rng.randrange(len(sent) + 1)]
    endings = [Ending.FIN, Ending.RST, Ending.DEAF]
    ending = rng.choices(endings, [8, 1, 1])[0]
    cuts = rng.sample(range(len(sent)), min(len(sent), rng.choice([0, 0, 1, 2, 5, 20])))
    pauses = frozenset(cut for cut in cuts if rng.random() < 0.5)
    return Script(kind, sent, tuple(sorted(cuts)), pauses, ending)


# Section: handshakes


def _session(rng: random.Random, exports: list[Facts], export: Facts, odd: bool) -> bytes:
    """Client flags to DISC. `odd`: with things in it that no client should do."""
    flags = rng.choice([1, 3, 3, 3] + ([0, 2, 7, 1 << 31] if odd and rng.random() < 0.1 else []))
    parts = [struct.pack(">I", flags)]
    shape = rng.choices(list(Shape), [3, 4, 4])[0]
    negotiate = {
        Shape.STRUCTURED: wire.option(wire.STRUCTURED_REPLY),
        Shape.EXTENDED: wire.option(wire.EXTENDED_HEADERS),
    }
    parts += [_option(rng, exports, odd) for _ in range(rng.choice([0, 0, 1, 3]))]
    parts.append(negotiate.get(shape, b""))
    contexts = 0
    if shape is not Shape.SIMPLE and rng.random() < 0.7:
        queries = rng.sample(export.contexts, rng.randint(0, len(export.contexts)))
        contexts = len(queries)
        parts.append(wire.meta_context(wire.SET_META_CONTEXT, export.name, *queries))
    if odd and rng.random() < 0.3:
        parts.append(_option(rng, exports, odd))
    requests = [rng.randrange(6) for _ in range(rng.randrange(4))]
    if rng.random() < 0.1 and (odd or shape is not Shape.EXTENDED):
        parts.append(wire.option(wire.EXPORT_NAME, export.name.encode()))
    else:
        parts.append(wire.choose(wire.GO, export.name, *requests))
    count = rng.choice([1, 2, 5, 10, 20, 40] + [200] * (rng.random() < 0.1))
    budget = rng.choice([16 * KIB, 128 * KIB] + [64 * MIB] * (export.size >= 64 * MIB))
    for cookie in range(1, count + 1):
        one = _request(rng, export, shape, cookie, odd and rng.random() < 0.3, contexts, budget)
        budget -= len(one)
        parts.append(one)
        if budget < 0:
            break
    if rng.random() < 0.6:
        parts.append(wire.request(wire.DISC, shape=shape))
        if odd and rng.random() < 0.2:
            parts.append(rng.randbytes(rng.randrange(100)))
    return b"".join(parts)


def _option(rng: random.Random, exports: list[Facts], odd: bool) -> bytes:
    name = rng.choice([each.name for each in exports] + ["", "nosuch", "n" * 4096])
    queries = [rng.choice(QUERIES) for _ in range(rng.choice([0, 1, 2, 5]))]
    plain = [
        wire.option(wire.LIST),
        wire.choose(wire.INFO, name, *(rng.randrange(6) for _ in range(rng.randrange(5)))),
        wire.meta_context(wire.LIST_META_CONTEXT, name, *queries),
        wire.option(rng.choice([wire.PEEK_EXPORT, wire.STARTTLS, 12, 99]), rng.randbytes(3)),
        wire.option(wire.STRUCTURED_REPLY),
    ]
    if not odd or rng.random() < 0.5:
        return rng.choice(plain)
    lie = rng.choice(NUMBERS) & 0xFFFFFFFF
    number = rng.choice([wire.INFO, wire.GO])
    setting = rng.choice([wire.LIST_META_CONTEXT, wire.SET_META_CONTEXT])
    return rng.choice(
        [
            wire.option(rng.randrange(13), rng.randbytes(rng.choice([0, 1, 4, 100, 9000]))),
            wire.option(rng.randrange(2, 13), b"?" * (lie % 70_000), length=lie % 70_000),
            wire.choose(number, name, name_length=lie),
            wire.choose(number, name, 0, 1, count=lie & 0xFFFF),
            wire.choose(number, rng.randbytes(rng.choice([0, 1, 5, 300]))),
            wire.meta_context(setting, name, *queries, count=lie),
            wire.meta_context(setting, name, *queries, name_length=lie),
            wire.meta_context(setting, name, *["x:y"] * rng.choice([255, 256, 257, 300])),
            wire.meta_context(setting, name, "x:" + "y" * rng.choice([4093, 4094, 4095])),
            wire.meta_context(setting, name, rng.randbytes(9)),
            wire.option(wire.SET_META_CONTEXT, b"?" * rng.choice([0, 7, (128 << 10) + 1])),
            wire.option(number, b"?" * rng.choice([5, 135_172, 135_173])),
            wire.option(wire.EXTENDED_HEADERS),
        ]
    )


# Section: requests


def _request(
    rng: random.Random,
    export: Facts,
    shape: Shape,
    cookie: int,
    odd: bool,
    contexts: int,
    budget: int,
) -> bytes:
    command, flags = rng.choice(COMMANDS), rng.choice([0, 0, 0, 0, wire.FUA])
    offset, length = _range(rng, export.size, budget)
    if command == wire.STATUS and not contexts and not odd:
        command = wire.READ
    if command == wire.FLUSH:
        offset = length = 0
    elif command == wire.READ and shape is not Shape.SIMPLE and rng.random() < 0.2:
        flags |= wire.DF
    elif command == wire.STATUS:
        length = length or 1
        flags |= rng.choice([0, wire.REQ_ONE])
    elif command in (wire.TRIM, wire.ZEROES):
        length = min(length, -offset % PIECE or PIECE)
    if command == wire.ZEROES:
        flags |= rng.choice([0, wire.NO_HOLE, wire.FAST_ZERO, wire.NO_HOLE | wire.FAST_ZERO])
    payload = _payload(rng, length) if command == wire.WRITE else b""
    if command == wire.STATUS and shape is Shape.EXTENDED and contexts and rng.random() < 0.4:
        ids = rng.sample(range(1, 5), rng.randint(1, 2)) if odd else [1]
        payload = struct.pack(f">Q{len(ids)}I", length, *ids)
        length = len(payload)
    if payload and shape is Shape.EXTENDED:
        flags |= PAYLOAD_LEN
    if odd:
        match rng.randrange(5):
            case 0:
                command = rng.choice([*range(9), 99, 65535])
            case 1:
                flags ^= rng.choice([1 << bit for bit in range(16)])
            case 2:
                offset = rng.choice([*NUMBERS, export.size - 1, export.size, export.size + 1])
            case 3 if shape is not Shape.EXTENDED:
                length = rng.choice(NUMBERS) & 0xFFFFFFFF
            case 3:
                length = rng.choice(NUMBERS)
            case _:
                payload += rng.randbytes(rng.choice([1, 28, 32]))
    header = wire.request(command, offset, length, cookie=cookie, flags=flags, shape=shape)
    return header + payload


def _range(rng: random.Random, size: int, budget: int) -> tuple[int, int]:
    """(offset, length) within the export: any, or at edges; long ones are rare."""
    longest = min(size, max(budget, 1))
    length = rng.choice([0, 1, 2, 511, 512, 513, 4096, 4097, 8192, 20_000, 32_768, 32_769, 65_537])
    if budget > MIB:
        length = rng.choice([length, MIB, 5 * MIB, 32 * MIB - 1, 32 * MIB])
    length = min(rng.choice([length, rng.randint(0, 6000)]), longest)
    offset = rng.randint(0, size - length)
    if rng.random() < 0.5:
        offset = rng.choice([0, size - length, offset & ~4095, offset & ~511])
    return offset, length


def _payload(rng: random.Random, length: int) -> bytes:
    """Random bytes, or runs of zeroes among them."""
    if length > MIB:
        return rng.randbytes(MIB) * (length // MIB) + bytes(length % MIB)
    data = bytearray(rng.randbytes(length))
    if rng.random() < 0.4:
        for _ in range(3):
            start = rng.randint(0, length)
            end = min(length, start + rng.choice([1, 511, 512, 4096, 10_000]))
            data[start:end] = bytes(end - start)
    return bytes(data)


# Section: mutations


def _noise(rng: random.Random) -> bytes:
    start = rng.choice([b"", wire.FIXED, wire.FIXED + b"IHAVEOPT", wire.FIXED_NO_ZEROES])
    return start + rng.randbytes(rng.choice([0, 1, 4, 20, 28, 100, 5000]))


def mutated(rng: random.Random, sent: bytes, seeds: list[bytes]) -> bytes:
    """A few changes of bytes, numbers and order."""
    data = bytearray(sent)
    for _ in range(rng.choice([1, 1, 1, 2, 3, 8])):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.choice([1, 2, 4, 8, 16, 28, 32, 100]))
        match rng.randrange(9):
            case 0 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at:end] = rng.randbytes(end - at)
            case 2:
                del data[at:end]
            case 3:
                data[at:at] = data[at:end]
            case 4:
                del data[at:]
            case 5:
                size = rng.choice([2, 4, 8])
                number = rng.choice(NUMBERS) & (256**size - 1)
                data[at : at + size] = number.to_bytes(size, "big")
            case 6 if seeds:
                other = rng.choice(seeds)
                start = rng.randrange(len(other) + 1)
                data[at:] = other[start:]
            case 7:
                data[at:at] = rng.randbytes(rng.choice([1, 2, 4, 28]))
            case 8:
                data[at:at] = bytes(end - at)
    return bytes(data)
