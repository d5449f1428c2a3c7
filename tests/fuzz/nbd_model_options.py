"""The handshake of the model (nbd_model.py): what a server must make of options."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace

from nbd_model import SEND_DF, STATUS_PAYLOAD, End, Facts, Meaning, Option, Session, hear_requests
from peers import nbd_wire as wire
from peers.nbd_wire import PAYLOAD_BYTES_MAX, STRING_BYTES_MAX, Shape

OPTIONS_MAX = 32
QUERIES_MAX = 256
META_BYTES_MAX = 128 << 10
INFO_BYTES_MAX = 4 + STRING_BYTES_MAX + 2 + 2 * 65535


class _Incomplete(Exception):
    """The stream ends in the middle of something."""


class _Stream:
    def __init__(self, sent: bytes, at: int = 0) -> None:
        self.sent = sent
        self.at = at

    def take(self, length: int) -> bytes:
        if self.at + length > len(self.sent):
            raise _Incomplete
        self.at += length
        return self.sent[self.at - length : self.at]

    def number(self) -> int:
        return int.from_bytes(self.take(4), "big")

    def string(self) -> bytes:
        return self.take(self.number())


@dataclass
class _State:
    shape: Shape = Shape.SIMPLE
    context_export: str = ""
    contexts: tuple[str, ...] = ()


def hear(
    sent: bytes, exports: Mapping[str, Facts], *, tls: str = "off", before: Meaning | None = None
) -> Meaning:
    """What `sent` means. `exports`: by the name that clients use, "" for the default one too.
    `tls`: "off", "on" or "require"; `before`: what the client has said up to STARTTLS, if TLS runs
    now."""
    return _Haggler(sent, exports, tls, before).run()


class _Haggler:
    def __init__(
        self, sent: bytes, exports: Mapping[str, Facts], tls: str, before: Meaning | None
    ) -> None:
        self._stream = _Stream(sent)
        self._exports = exports
        self._tls = tls
        self._secure = before is not None
        self._options_before = 0 if before is None else len(before.options)
        self._state = _State()
        self.meaning = Meaning(no_zeroes=before is not None and before.no_zeroes)

    def run(self) -> Meaning:
        meaning = self.meaning
        try:
            self._haggle()
        except _Incomplete:
            return meaning
        if meaning.session is not None:
            requests, meaning.end, meaning.used = hear_requests(
                self._stream.sent, self._stream.at, meaning.session
            )
            meaning.session = replace(meaning.session, requests=tuple(requests))
        return meaning

    def _haggle(self) -> None:
        stream, meaning = self._stream, self.meaning
        fixed = True
        if not self._secure:
            flags = stream.number()
            fixed, meaning.no_zeroes = bool(flags & 1), bool(flags & 2)
            if flags & ~3:
                meaning.end = End.CLOSED
                return
        for _ in range(self._options_before, OPTIONS_MAX):
            meaning.used = stream.at
            magic, number, length = struct.unpack(">8sII", stream.take(16))
            if magic != b"IHAVEOPT" or length > PAYLOAD_BYTES_MAX:
                break
            if number == wire.EXPORT_NAME:
                if length <= STRING_BYTES_MAX:
                    self._export_name(stream.take(length))
                break
            if not fixed:
                break
            data = stream.take(length)
            if number == wire.ABORT:
                meaning.options.append(Option(number, frozenset([wire.REP_ACK])))
                break
            option = self._option(number, data)
            meaning.options.append(option)
            if wire.REP_ACK in option.ends and number == wire.GO:
                assert option.facts is not None
                meaning.session = self._session(option.facts)
                return
            if wire.REP_ACK in option.ends and number == wire.STARTTLS:
                meaning.end, meaning.used = End.TLS, stream.at
                return
        if meaning.session is None:
            meaning.end = End.CLOSED

    def _session(self, facts: Facts, plain_zeroes: int | None = None) -> Session:
        contexts = self._state.contexts if self._state.context_export == facts.name else ()
        ids = tuple(facts.contexts.index(name) + 1 for name in contexts)
        return Session(facts, self._state.shape, self._flags(facts), ids, plain_zeroes)

    def _flags(self, facts: Facts) -> int:
        flags = facts.flags
        if self._state.shape is not Shape.SIMPLE:
            flags |= SEND_DF
        selected = self._state.contexts and self._state.context_export == facts.name
        if self._state.shape is Shape.EXTENDED and selected:
            flags |= STATUS_PAYLOAD
        return flags

    def _export_name(self, name: bytes) -> None:
        found = self._find(wire.EXPORT_NAME, name)
        if isinstance(found, int) or self._state.shape is Shape.EXTENDED:
            return
        if self._tls != "require" or self._secure:
            self.meaning.session = self._session(found, 0 if self.meaning.no_zeroes else 124)

    def _option(self, number: int, data: bytes) -> Option:
        def ends(*kinds: int) -> Option:
            return Option(number, frozenset(kinds))

        if self._tls == "require" and not self._secure and number != wire.STARTTLS:
            return ends(wire.ERR_TLS_REQD)
        if number in (wire.INFO, wire.GO):
            return self._info(number, data)
        if number in (wire.LIST_META_CONTEXT, wire.SET_META_CONTEXT):
            return self._meta(number, data)
        known = (wire.LIST, wire.STARTTLS, wire.STRUCTURED_REPLY, wire.EXTENDED_HEADERS)
        if number not in known:
            return ends(wire.ERR_UNSUP)
        if data:
            return ends(wire.ERR_INVALID)
        if number == wire.LIST:
            return Option(number, frozenset([wire.REP_ACK]), listed=self._listed())
        if number == wire.STARTTLS:
            if self._tls == "off":
                return ends(wire.ERR_POLICY)
            return ends(wire.ERR_INVALID if self._secure else wire.REP_ACK)
        if number == wire.STRUCTURED_REPLY:
            if self._state.shape is not Shape.SIMPLE:
                extended = self._state.shape is Shape.EXTENDED
                return ends(wire.ERR_EXT_HEADER_REQD if extended else wire.ERR_INVALID)
            self._state.shape = Shape.STRUCTURED
        if number == wire.EXTENDED_HEADERS:
            if self._state.shape is Shape.EXTENDED:
                return ends(wire.ERR_INVALID)
            self._state.shape = Shape.EXTENDED
        return ends(wire.REP_ACK)

    def _listed(self) -> tuple[tuple[str, str], ...]:
        shown = {each.name: each.description for each in self._exports.values() if self._may(each)}
        return tuple(shown.items())

    def _may(self, facts: Facts) -> bool:
        return not facts.refused and (self._secure or not facts.needs_tls)

    def _find(self, number: int, name: bytes) -> Facts | int:
        try:
            text = name.decode()
        except UnicodeDecodeError:
            return wire.ERR_INVALID
        found = self._exports.get(text)
        if len(name) > STRING_BYTES_MAX:
            return wire.ERR_INVALID
        if found is None:
            return wire.ERR_UNKNOWN
        if found.needs_tls and not self._secure:
            # "MUST NOT send NBD_REP_ERR_TLS_REQD in response to any option other than ..."
            wanted = self._tls == "on" and number in (wire.INFO, wire.GO)
            return wire.ERR_TLS_REQD if wanted else wire.ERR_POLICY
        return wire.ERR_POLICY if found.refused else found

    def _info(self, number: int, data: bytes) -> Option:
        parts = _split_info(data) if len(data) <= INFO_BYTES_MAX else None
        found = wire.ERR_INVALID if parts is None else self._find(number, parts[0])
        if isinstance(found, int):
            return Option(number, frozenset([found]))
        assert parts is not None
        ends = frozenset([wire.REP_ACK])
        return Option(number, ends, found, self._flags(found), asked=frozenset(parts[1]))

    def _meta(self, number: int, data: bytes) -> Option:
        setting = number == wire.SET_META_CONTEXT
        if setting:
            self._state.contexts, self._state.context_export = (), ""
            if self._state.shape is Shape.SIMPLE:
                return Option(number, frozenset([wire.ERR_INVALID]))
        if len(data) > META_BYTES_MAX:
            return Option(number, frozenset([wire.ERR_TOO_BIG]))
        split = _split_meta(data)
        if split is None:
            kinds = [wire.ERR_INVALID]
            if _claims_many(data):
                kinds.append(wire.ERR_TOO_BIG)
            return Option(number, frozenset(kinds))
        name, queries = split
        found = self._find(number, name)
        if found == wire.ERR_INVALID or not all(_is_query(query) for query in queries):
            return Option(number, frozenset([wire.ERR_INVALID, wire.ERR_TOO_BIG]))
        if len(queries) > QUERIES_MAX:
            return Option(number, frozenset([wire.ERR_TOO_BIG]))
        if isinstance(found, int):
            return Option(number, frozenset([found]))
        wanted = {query.decode() for query in queries}
        if setting:
            names = tuple(each for each in found.contexts if each in wanted)
            self._state.contexts, self._state.context_export = names, found.name
            answer = tuple((found.contexts.index(each) + 1, each) for each in names)
        else:
            listed = [each for each in found.contexts if not wanted or _matches(each, wanted)]
            answer = tuple((0, each) for each in listed)
        return Option(number, frozenset([wire.REP_ACK]), contexts=answer)


def _split_info(data: bytes) -> tuple[bytes, list[int]] | None:
    if len(data) < 6:
        return None
    (length,) = struct.unpack_from(">I", data)
    if 4 + length + 2 > len(data):
        return None
    (count,) = struct.unpack_from(">H", data, 4 + length)
    if len(data) != 4 + length + 2 + 2 * count:
        return None
    return data[4 : 4 + length], [each for (each,) in struct.iter_unpack(">H", data[6 + length :])]


def _split_meta(data: bytes) -> tuple[bytes, list[bytes]] | None:
    stream = _Stream(data)
    try:
        name = stream.string()
        queries = [stream.string() for _ in range(stream.number())]
    except _Incomplete:
        return None
    return None if stream.at < len(data) else (name, queries)


def _claims_many(data: bytes) -> bool:
    try:
        stream = _Stream(data)
        stream.string()
        return stream.number() > QUERIES_MAX
    except _Incomplete:
        return False


def _is_query(query: bytes) -> bool:
    try:
        return len(query) <= STRING_BYTES_MAX and ":" in query.decode()
    except UnicodeDecodeError:
        return False


def _matches(name: str, queries: set[str]) -> bool:
    """Whether a query is the name, or what it begins with up to one of its colons."""
    return any(
        query == name or (query.endswith(":") and name.startswith(query)) for query in queries
    )
