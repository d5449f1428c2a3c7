"""Whether what a server has answered is what the model says: each option, each request, each byte.

PeerError if it is not.
"""

from __future__ import annotations

import struct
from dataclasses import replace
from errno import ENOTSUP
from hashlib import blake2b
from itertools import pairwise

from fuzz_sessions import PIECE
from nbd_model import Meaning, Option, Request, Session
from peers import nbd_wire as wire
from peers.nbd_answers import Answer, Answers, Asked
from peers.nbd_wire import Shape, StreamEnd, Transcript
from peers.process import PeerError

BASE_ALLOCATION = "base:allocation"
ZERO = 2
"""Its status flag of what reads as zeroes."""
STATES = {BASE_ALLOCATION: {0, 3}, "qemu:allocation-depth": {0, 1, 2, 3}}
"""What the status flags may be, by context; in a dirty bitmap 0 and 1."""
DIGEST = "x-replnbd:digest"
GRANULE = 64 << 10
WHOLE_STATUS_BYTES = 1 << 20
"""Disks up to this size have no more extents than an answer holds."""


def renumbered(sent: bytes, meaning: Meaning) -> tuple[bytes, Meaning]:
    """The same, with cookies that are all different: a server may answer in any order, and only
    cookies tell which answer is whose."""
    if meaning.session is None:
        return sent, meaning
    patched = bytearray(sent)
    requests = []
    for cookie, request in enumerate(meaning.session.requests, 1):
        struct.pack_into(">Q", patched, request.at + 8, cookie)
        requests.append(replace(request, cookie=cookie))
    session = replace(meaning.session, requests=tuple(requests))
    return bytes(patched), replace(meaning, session=session)


def check_answers(received: bytes | bytearray, meaning: Meaning) -> dict[int, Answer]:
    """The answers in all that came after the greeting, by cookie. Everything else about them is as
    the model says, but for the bytes of the disk."""
    source = Transcript(received)
    try:
        for option in meaning.options:
            _check_option(source, option, meaning.session)
        found = {} if meaning.session is None else _check_session(source, meaning.session)
    except StreamEnd as end:
        raise PeerError(f"{end}: the server has hung up too early") from None
    if source.left:
        raise PeerError(
            f"{source.left} bytes more than expected: {received[-source.left :][:60]!r}"
        )
    return found


def _check_option(source: Transcript, option: Option, session: Session | None) -> None:
    replies = wire.read_option_replies(source, option.number)
    if replies[-1].kind not in option.ends:
        ends = [hex(end) for end in option.ends]
        raise PeerError(f"option {option.number} ended by {replies[-1]}, expected {ends}")
    if option.facts is not None:
        _check_info(option, {reply.payload[:2]: reply.payload[2:] for reply in replies[:-1]})
    if option.listed is not None:
        shown = [_server(reply.payload) for reply in replies[:-1]]
        if shown != list(option.listed):
            raise PeerError(f"LIST shows {shown}, expected {option.listed}")
    if option.contexts is not None:
        found = [
            (int.from_bytes(reply.payload[:4], "big"), reply.payload[4:].decode())
            for reply in replies[:-1]
        ]
        if found != list(option.contexts):
            raise PeerError(f"contexts {found}, expected {option.contexts}")


def _server(payload: bytes) -> tuple[str, str]:
    """Name and description in a reply to LIST."""
    (length,) = struct.unpack_from(">I", payload)
    return payload[4 : 4 + length].decode(), payload[4 + length :].decode()


def _check_info(option: Option, found: dict[bytes, bytes]) -> None:
    facts = option.facts
    assert facts is not None
    expected = {
        struct.pack(">H", wire.INFO_EXPORT): struct.pack(">QH", facts.size, option.flags),
        struct.pack(">H", wire.INFO_BLOCK_SIZE): struct.pack(">III", 1, 4096, 32 << 20),
    }
    texts = {wire.INFO_NAME: facts.name, wire.INFO_DESCRIPTION: facts.description}
    for number, text in texts.items():
        if number in option.asked:
            expected[struct.pack(">H", number)] = text.encode()
    if found != expected:
        raise PeerError(f"information {found}, expected {expected}")


def _check_session(source: Transcript, session: Session) -> dict[int, Answer]:
    if session.plain_zeroes is not None:
        size, flags = struct.unpack(">QH", source.receive(10))
        zeroes = source.receive(session.plain_zeroes)
        if (size, flags) != (session.facts.size, session.flags) or any(zeroes):
            raise PeerError(f"EXPORT_NAME answered by {size}, {flags:#x}, {zeroes!r}")
    answers = Answers(source, session.shape)
    for request in session.requests:
        answers.expect(request.cookie, request.asked)
    found = {}
    while answer := answers.next():
        found[answer.cookie] = answer
    if answers.pending:
        raise PeerError(f"no answer to {len(answers.pending)}, the first {_first(answers.pending)}")
    for request in session.requests:
        _check_error(request, found[request.cookie], session.shape)
    return found


def _first(pending: dict[int, Asked]) -> tuple[int, Asked]:
    return next(iter(pending.items()))


def _check_error(request: Request, answer: Answer, shape: Shape) -> None:
    allowed = [request.error]
    if not request.error and request.asked.flags & wire.FAST_ZERO:
        allowed.append(ENOTSUP)
    if answer.error not in allowed:
        raise PeerError(f"{request.asked} answered by {answer}, expected {request.error}")
    if answer.error and shape is not Shape.SIMPLE and not answer.text:
        raise PeerError(f"{request.asked} refused without a text")


# Section: the disk


def apply(request: Request, disk: bytearray) -> None:
    """What a valid request does to the disk."""
    command, offset, length, _, _ = request.asked
    if command == wire.WRITE and request.payload:
        disk[offset : offset + length] = request.payload
    elif command in (wire.TRIM, wire.ZEROES):
        disk[offset : offset + length] = bytes(length)


def in_order(session: Session) -> bool:
    """Whether all of it happens in the order in which it was sent, where it overlaps: nothing of it
    is done in several pieces."""
    for request in session.requests:
        command, offset, length, _, _ = request.asked
        changes = command in (wire.TRIM, wire.ZEROES) and length and not request.error
        if changes and offset // PIECE != (offset + length - 1) // PIECE:
            return False
    return True


def check_disk(session: Session, answers: dict[int, Answer], disk: bytearray) -> None:
    """Every byte that was read is what the requests before have made of `disk`, which is afterwards
    what all of them have. Overlapping requests happen in the order in which they were sent; but
    digests are of the disk at that time or later."""
    digests: list[tuple[int, int, int]] = []
    for request in session.requests:
        answer = answers[request.cookie]
        if answer.error:
            continue
        offset, length = request.asked.offset, request.asked.length
        if request.asked.command == wire.READ and answer.data != disk[offset : offset + length]:
            raise PeerError(f"{request.asked} has read other bytes than were there")
        for number, descriptors in answer.statuses.items():
            name = session.facts.contexts[number - 1]
            _check_status(name, descriptors, request.asked, session.facts.size)
            if name == BASE_ALLOCATION:
                _check_zeroes(offset, descriptors, disk)
            elif name == DIGEST and len(disk) <= WHOLE_STATUS_BYTES:
                digests += _pieces(offset, descriptors)
        digests = _other(digests, disk, session.shape)
        apply(request, disk)
    digests = _other(digests, disk, session.shape)
    if digests:
        raise PeerError(f"no bytes that were there at some time have the digests {digests}")


def _check_status(name: str, descriptors: list[tuple[int, int]], asked: Asked, size: int) -> None:
    states = [flags for _, flags in descriptors]
    if name != DIGEST and not set(states) <= STATES.get(name, {0, 1}):
        raise PeerError(f"{name}: status flags {states} in the answer to {asked}")
    if any(a == b for a, b in pairwise(states)):
        raise PeerError(f"{name}: extents that are one in the answer to {asked}")
    covered = sum(length for length, _ in descriptors)
    whole = size <= WHOLE_STATUS_BYTES and not asked.flags & wire.REQ_ONE
    if covered > asked.length or (whole and covered < asked.length):
        raise PeerError(f"{name}: extents of {covered} bytes in the answer to {asked}")


def _pieces(offset: int, descriptors: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """(start, end, digest) of each granule in an answer, or what it has of it."""
    pieces = []
    for length, value in descriptors:
        end = offset + length
        while offset < end:
            stop = min(offset - offset % GRANULE + GRANULE, end)
            pieces.append((offset, stop, value))
            offset = stop
    return pieces


def _other(
    digests: list[tuple[int, int, int]], disk: bytearray, shape: Shape
) -> list[tuple[int, int, int]]:
    """Those that are of other bytes than the disk has now."""
    size = 8 if shape is Shape.EXTENDED else 4  # compact headers have room for half of it
    return [
        (start, end, value)
        for start, end, value in digests
        if value.to_bytes(size, "big") != blake2b(disk[start:end], digest_size=8).digest()[-size:]
    ]


def _check_zeroes(offset: int, descriptors: list[tuple[int, int]], disk: bytearray) -> None:
    for length, flags in descriptors:
        end = min(offset + length, len(disk))
        if flags & ZERO and disk.count(0, offset, end) != end - offset:
            raise PeerError(f"{length} bytes at {offset} are no zeroes")
        offset += length


def disks_on_the_way(session: Session | None, disk: bytes) -> list[bytes]:
    """What the disk may be after a client that closed at once: the server has had all of it, or as
    much as it had read."""
    disks = [disk]
    for request in session.requests if session is not None else ():
        if not request.error:
            changed = bytearray(disks[-1])
            apply(request, changed)
            if changed != disks[-1]:
                disks.append(bytes(changed))
    return disks
