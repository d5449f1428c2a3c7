"""libnbd in option haggling: LIST, INFO, GO, ABORT, EXPORT_NAME, STRUCTURED_REPLY,
LIST_META_CONTEXT and SET_META_CONTEXT, as it asks for them, and as QEMU's server answers them."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Any

import pytest
from interop_support import MIB
from libnbd_support import (
    BASE,
    CONTEXTS,
    DEPTH,
    DIGEST,
    DIRTY,
    EXPORTS,
    NAME,
    RESYNC,
    SIZE,
    TOP,
    QemuNbd,
    Served,
)
from peers import LibnbdError, qemu_img

pytestmark = [pytest.mark.interop, pytest.mark.slow]

DESCRIPTIONS = {
    NAME: "secondary disk of colo0: the primary writes here",
    TOP: "the standby's view of colo0",
}
FIXED_NEWSTYLE, NO_ZEROES = 1, 2
BLOCK_SIZES = {0: 1, 1: 4096, 2: 32 * MIB}  # nbd.SIZE_MINIMUM, _PREFERRED, _MAXIMUM
ABILITIES = [
    *("can_cache", "can_df", "can_fast_zero", "can_flush", "can_fua", "can_multi_conn"),
    *("can_trim", "can_zero", "is_read_only", "is_rotational"),
]


@pytest.fixture(scope="module")
def qemu(served_by_module: Served) -> Iterator[QemuNbd]:
    """qemu-nbd with an export of the same name, size, description and contexts."""
    image = served_by_module.folder / "qemu.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, str(SIZE))
    options = ["--format=qcow2", f"--description={DESCRIPTIONS[NAME]}"]
    for bitmap in ("resync", "checkpoint"):  # it lists the last one first
        qemu_img("bitmap", "--add", image, bitmap)
        options.append(f"--bitmap={bitmap}")
    with QemuNbd(served_by_module.folder, image, NAME, *options) as qemu:
        yield qemu


# Section: LIST, INFO, GO, ABORT


def test_list_names_and_describes_both_exports(served: Served) -> None:
    client = served.haggle()
    assert client.exports() == list(DESCRIPTIONS.items())
    assert client.exports() == list(DESCRIPTIONS.items())  # an option that changes nothing
    client.call("opt_abort")


@pytest.mark.parametrize("export", EXPORTS)
def test_info_describes_an_export_and_stays_in_haggling(served: Served, export: str) -> None:
    client = served.haggle()
    client.call("set_full_info", True)
    for name in (*EXPORTS, export):
        client.call("set_export_name", name)
        client.call("opt_info")
        assert client.size == SIZE
        assert client.call("get_canonical_export_name") == name
        assert client.call("get_export_description") == DESCRIPTIONS[name]
        assert {kind: client.call("get_block_size", kind) for kind in BLOCK_SIZES} == BLOCK_SIZES
    assert client.call("aio_is_negotiating")
    client.call("opt_go")
    assert client.call("get_export_description") == DESCRIPTIONS[export]
    assert client.pread(SIZE, 0) == served.model(export)
    client.close()


def test_go_goes_on_after_an_export_that_is_not_there(served: Served) -> None:
    client = served.haggle()
    for name, shown in (("nobody", "'nobody'"), ("n" * 4096, f"'{'n' * 64}'...")):
        client.call("set_export_name", name)
        for option in ("opt_info", "opt_go"):
            with pytest.raises(LibnbdError) as failure:
                client.call(option)
            assert failure.value.errno == errno.ENOENT
            assert client.server_messages[-1].endswith(f"there is no export named {shown}")
    client.call("set_export_name", TOP)
    client.call("opt_go")
    assert client.pread(SIZE, 0) == served.model(TOP)
    client.close()


def test_the_empty_name_is_the_first_disks_export(served: Served) -> None:
    client = served.haggle("", contexts=[BASE])
    client.call("set_full_info", True)
    client.call("opt_info")
    assert client.call("get_canonical_export_name") == NAME
    assert client.listed_contexts() == [BASE]
    client.call("opt_go")
    assert list(client.block_status(SIZE, 0)) == [BASE]
    assert client.pread(SIZE, 0) == served.model(NAME)
    client.close()
    client = served.libnbd.new()
    client.call("set_handshake_flags", 0)  # EXPORT_NAME
    client.call("connect_uri", served.uri(""))
    assert client.pread(SIZE, 0) == served.model(NAME)
    client.close()


def test_abort_ends_the_connection_in_order(served: Served) -> None:
    client = served.haggle(NAME)
    client.call("opt_info")
    client.call("opt_abort")
    assert client.call("aio_is_closed")


# Section: EXPORT_NAME, handshake flags, STRUCTURED_REPLY


@pytest.mark.parametrize("export", EXPORTS)
@pytest.mark.parametrize("flags", range(4))
def test_every_pair_of_handshake_flags_leads_to_the_export(
    served: Served, export: str, flags: int
) -> None:
    client = served.libnbd.new()
    client.call("set_handshake_flags", flags)
    client.call("add_meta_context", BASE)
    client.call("connect_uri", served.uri(export))
    fixed = bool(flags & FIXED_NEWSTYLE)  # without it there are no options but EXPORT_NAME
    assert client.call("get_protocol") == ("newstyle-fixed" if fixed else "newstyle")
    assert client.call("get_structured_replies_negotiated") is fixed
    assert client.call("can_df") is fixed
    assert client.call("can_meta_context", BASE) is fixed
    assert client.size == SIZE
    client.pwrite(b"by whatever name", 4093)
    served.model(export)[4093:4109] = b"by whatever name"
    assert client.pread(SIZE, 0) == served.model(export)
    client.close()


@pytest.mark.parametrize("flags", [0, NO_ZEROES])
def test_export_name_of_nobody_ends_the_connection(served: Served, flags: int) -> None:
    client = served.libnbd.new()
    client.call("set_handshake_flags", flags)
    with pytest.raises(LibnbdError, match="server disconnected"):
        client.call("connect_uri", served.uri("nobody"))


@pytest.mark.parametrize("structured", [False, True])
def test_structured_replies_are_for_who_asks(served: Served, structured: bool) -> None:
    replies = "structured" if structured else "simple"
    with served.connect(TOP, replies, contexts=[BASE]) as client:
        assert client.call("get_structured_replies_negotiated") is structured
        # What depends on them is offered to nobody else.
        assert client.call("can_df") is structured
        assert client.call("can_meta_context", BASE) is structured
        assert client.pread(SIZE, 0) == served.model(TOP)


# Section: metadata contexts

LISTS = [
    ([], [BASE, DEPTH, DIRTY, RESYNC, DIGEST]),
    (["base:"], [BASE]),
    (["qemu:"], [DEPTH, DIRTY, RESYNC]),
    (["qemu:dirty-bitmap:"], [DIRTY, RESYNC]),
    ([BASE], [BASE]),
    ([DEPTH, BASE], [BASE, DEPTH]),
    (["base:", BASE, BASE], [BASE]),
    (["qemu:", "base:"], [BASE, DEPTH, DIRTY, RESYNC]),
    (["qemu:dirty-bitmap:other"], []),
    (["qemu:allocation"], []),
    (["qemu:allocation-depth:"], []),
    (["base:allocatio"], []),
    (["base:allocation2", BASE], [BASE]),
    (["x-replnbd:"], [DIGEST]),
    ([DIGEST, BASE], [BASE, DIGEST]),
    (["x-nobody:", "x-nobody:thing", ":"], []),
]


@pytest.mark.parametrize("export", EXPORTS)
@pytest.mark.parametrize(("queries", "expected"), LISTS)
def test_list_meta_context_finds_names_and_wildcards(
    served: Served, export: str, queries: list[str], expected: list[str]
) -> None:
    client = served.haggle(export, contexts=queries)
    assert client.listed_contexts() == [name for name in expected if name in CONTEXTS[export]]
    client.call("opt_abort")


@pytest.mark.parametrize("export", EXPORTS)
@pytest.mark.parametrize(("queries", "listed"), LISTS)
def test_set_meta_context_selects_what_is_named_and_no_wildcard(
    served: Served, export: str, queries: list[str], listed: list[str]
) -> None:
    selected = [name for name in listed if name in queries and name in CONTEXTS[export]]
    with served.connect(export, contexts=queries) as client:
        wildcards = ["base:", "qemu:", "qemu:dirty-bitmap:", "x-replnbd:", "x-nobody:"]
        for name in CONTEXTS[NAME] + wildcards:
            assert client.call("can_meta_context", name) is (name in selected), name
        if selected:
            assert list(client.block_status(SIZE, 0)) == selected
        else:
            with pytest.raises(LibnbdError, match="did not negotiate any metadata contexts"):
                client.block_status(SIZE, 0)


def test_set_meta_context_counts_for_the_export_it_named_and_for_the_last_time(
    served: Served,
) -> None:
    client = served.haggle(NAME, contexts=[BASE])
    client.call("opt_info")  # with it, libnbd sends SET_META_CONTEXT
    assert client.call("can_meta_context", BASE)
    client.call("set_export_name", TOP)
    client.call("clear_meta_contexts")
    client.call("add_meta_context", DEPTH)
    client.call("opt_go")
    assert not client.call("can_meta_context", BASE)
    assert list(client.block_status(SIZE, 0)) == [DEPTH]
    client.close()


# Section: QEMU's server


def offered(served: Served, uri: str) -> dict[str, Any]:
    """All that libnbd learns of an export by its handshake, and what its queries find."""
    client = served.libnbd.connect(uri, options=True, contexts=[BASE, DEPTH, DIRTY])
    client.call("set_full_info", True)
    client.call("opt_go")
    found: dict[str, Any] = {ability: client.call(ability) for ability in ABILITIES}
    found["size"] = client.size
    found["protocol"] = client.call("get_protocol")
    found["description"] = client.call("get_export_description")
    found["name"] = client.call("get_canonical_export_name")
    for kind in BLOCK_SIZES:
        found[f"block size {kind}"] = client.call("get_block_size", kind)
    for name in (BASE, DEPTH, DIRTY, "base:", "qemu:"):
        found[f"can {name}"] = client.call("can_meta_context", name)
    client.close()
    queries = [queries for queries, _ in LISTS] + [["no-colon"], ["no-colon", BASE]]
    for each in queries:
        client = served.libnbd.connect(uri, options=True, contexts=each)
        try:
            found[f"list {each}"] = client.listed_contexts()
        except LibnbdError as exc:
            found[f"list {each}"] = exc.errno
        client.call("opt_abort")
    return found


def test_qemu_nbd_offers_the_same(served: Served, qemu: QemuNbd) -> None:
    ours, theirs = offered(served, served.uri(NAME)), offered(served, qemu.uri)
    different = {key: (ours[key], theirs[key]) for key in ours if ours[key] != theirs[key]}
    # "MAY fail the request with NBD_REP_ERR_INVALID": who forgot the colon is told so.
    assert different == {
        "list []": (CONTEXTS[NAME], CONTEXTS[TOP]),
        "list ['x-replnbd:']": ([DIGEST], []),
        f"list ['{DIGEST}', '{BASE}']": ([BASE, DIGEST], [BASE]),
        "list ['no-colon']": (errno.ENOTSUP, []),
        "list ['no-colon', 'base:allocation']": (errno.ENOTSUP, [BASE]),
    }


def test_qemu_nbd_ends_a_haggling_the_same_way(served: Served, qemu: QemuNbd) -> None:
    for uri in (served.uri("nobody"), qemu.uri.replace(NAME, "nobody")):
        client = served.libnbd.connect(uri, options=True)
        for option in ("opt_info", "opt_go"):
            with pytest.raises(LibnbdError) as failure:
                client.call(option)
            assert failure.value.errno == errno.ENOENT
        client.call("opt_abort")
        assert client.call("aio_is_closed")
