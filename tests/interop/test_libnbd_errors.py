"""What libnbd is told when something cannot be done: the errno, and with structured replies the
text, of every command; and what QEMU's server and nbdkit say to the same."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest
from interop_support import MIB, START, Standby, assert_same
from libnbd_support import (
    BASE,
    DEPTH,
    EXPORTS,
    NAME,
    REPLIES,
    SIZE,
    TOP,
    NbdkitFile,
    QemuNbd,
    Served,
    sparse_disk,
    write_sparse,
)
from peers import Libnbd, LibnbdError, LibnbdProcess, wait_until
from peers.libnbd import Command
from peers.nbd_wire import DF, FAST_ZERO, FUA, NO_HOLE, PAYLOAD_LEN, REQ_ONE

pytestmark = [pytest.mark.interop, pytest.mark.slow]

LAST = SIZE - 1
UNKNOWN_FLAG = 0x8000
STATUS = "block_status"

ERRORS: list[tuple[Command, int, str]] = [
    # Past the end: "The server SHOULD return NBD_ENOSPC" to what writes, and NBD_EINVAL otherwise.
    (("pread", 2, LAST, 0), errno.EINVAL, f"READ at {LAST} of 2 bytes ends past {SIZE}"),
    (("pread", 1, SIZE, 0), errno.EINVAL, f"READ at {SIZE} of 1 bytes ends past {SIZE}"),
    (("pread", 1, 2**63, 0), errno.EINVAL, f"READ at {2**63} of 1 bytes ends past {SIZE}"),
    (("pwrite", b"ab", LAST, 0), errno.ENOSPC, f"WRITE at {LAST} of 2 bytes ends past {SIZE}"),
    (("zero", 2, LAST, 0), errno.ENOSPC, f"WRITE_ZEROES at {LAST} of 2 bytes ends past {SIZE}"),
    (("trim", 2, LAST, 0), errno.EINVAL, f"TRIM at {LAST} of 2 bytes ends past {SIZE}"),
    (("cache", 2, LAST, 0), errno.EINVAL, f"CACHE at {LAST} of 2 bytes ends past {SIZE}"),
    ((STATUS, 2, LAST, 0), errno.EINVAL, f"BLOCK_STATUS at {LAST} of 2 bytes ends past {SIZE}"),
    ((STATUS, 0, 0, 0), errno.EINVAL, "BLOCK_STATUS of no bytes"),
    (("pread", 0, SIZE + 1, 0), errno.EINVAL, f"READ at {SIZE + 1} of 0 bytes ends past {SIZE}"),
    # Too long
    (("pread", 33 * MIB, 0, 0), errno.EINVAL, f"READ of {33 * MIB} bytes, more than {32 * MIB}"),
    # "SHOULD return NBD_EINVAL if it receives a request with a flag not explicitly documented"
    (("pread", 1, 0, UNKNOWN_FLAG), errno.EINVAL, "READ with flags 0x8000"),
    (("pread", 1, 0, REQ_ONE), errno.EINVAL, "READ with flags 0x8"),
    (("pread", 1, 0, PAYLOAD_LEN | NO_HOLE), errno.EINVAL, "READ with flags 0x22"),
    (("pwrite", b"a", 0, DF), errno.EINVAL, "WRITE with flags 0x4"),
    (("pwrite", b"a", 0, PAYLOAD_LEN | FUA), errno.EINVAL, "WRITE with flags 0x20"),
    (("zero", 1, 0, REQ_ONE), errno.EINVAL, "WRITE_ZEROES with flags 0x8"),
    (("trim", 1, 0, NO_HOLE), errno.EINVAL, "TRIM with flags 0x2"),
    (("trim", 1, 0, FAST_ZERO | FUA), errno.EINVAL, "TRIM with flags 0x10"),
    (("cache", 1, 0, UNKNOWN_FLAG), errno.EINVAL, "CACHE with flags 0x8000"),
    (("flush", 0, 0, NO_HOLE), errno.EINVAL, "FLUSH with flags 0x2"),
    ((STATUS, 1, 0, DF), errno.EINVAL, "BLOCK_STATUS with flags 0x4"),
    ((STATUS, 1, 0, PAYLOAD_LEN), errno.EINVAL, "BLOCK_STATUS with flags 0x20"),
]

FINE: list[Command] = [
    # "NBD_CMD_FLAG_FUA ... valid for all commands", and DF for every READ once it was offered.
    ("pread", 10, 0, FUA),
    ("pread", 10, 0, FUA | DF),
    ("cache", 10, 0, FUA),
    ("flush", 0, 0, FUA),
    (STATUS, 10, 0, FUA | REQ_ONE),
    ("pread", 0, SIZE, 0),
]


def outcome(client: Libnbd, command: Command) -> int:
    """The errno that a command ends with, 0 for none."""
    verb, what, offset, flags = command
    if verb != STATUS:
        (result,) = client.pipeline([command])
        return int(result[0]) if isinstance(result, tuple) else 0
    assert isinstance(what, int)
    try:
        client.block_status(what, offset, flags)
    except LibnbdError as exc:
        return int(exc.errno or 0)
    return 0


def applies(command: Command, replies: str) -> bool:
    """Whether a command makes sense in a shape of replies: DF and BLOCK_STATUS are structured."""
    verb, _, _, flags = command
    return replies == "structured" or not (verb == STATUS or (verb == "pread" and flags & DF))


FENCED = "'colo0' is fenced: the standby has taken over; 'reset' lifts the fence"


@pytest.mark.parametrize("export", EXPORTS)
@pytest.mark.parametrize("replies", REPLIES)
def test_an_error_is_told_by_its_errno_and_a_text(
    served: Served, export: str, replies: str
) -> None:
    with served.connect(export, replies, contexts=[BASE], strict=False) as client:
        texts = []
        for command, error, text in ERRORS:
            if applies(command, replies):
                assert outcome(client, command) == error, command
                texts.append(f"structured error server message: {text}")
        # A simple reply has a number only.
        assert client.server_messages == (texts if replies == "structured" else [])
        for command in FINE:
            if applies(command, replies):
                assert outcome(client, command) == 0, command
        assert_same(client.pread(SIZE, 0), served.model(export), export)


@pytest.mark.parametrize("replies", REPLIES)
def test_a_flag_that_was_not_offered_is_refused(served: Served, replies: str) -> None:
    with served.connect(TOP, replies, strict=False) as client:
        offered = replies == "structured"
        assert outcome(client, ("pread", 10, 0, DF)) == (0 if offered else errno.EINVAL)
        assert outcome(client, ("pread", 10, 0, 0)) == 0


def test_block_status_without_a_context_is_refused_by_libnbd(served: Served) -> None:
    with served.connect(TOP) as client, pytest.raises(LibnbdError, match="did not negotiate"):
        client.block_status(10, 0)


# Section: an export that may not be written, or not at all


@pytest.mark.parametrize("export", EXPORTS)
@pytest.mark.parametrize("replies", REPLIES)
def test_a_read_only_export_refuses_what_changes_bytes_with_eperm(
    served: Served, export: str, replies: str
) -> None:
    name = f"{export}-{replies}"
    add = {"device": export, "name": name, "writable": False}
    served.standby.qmp.execute("nbd-server-add", add)
    with served.connect(name, replies, contexts=[BASE, DEPTH], strict=False) as client:
        assert client.call("is_read_only")
        assert client.call("can_multi_conn")
        assert client.call("can_flush")
        for ability in ("can_trim", "can_zero", "can_fast_zero"):
            assert not client.call(ability), ability
        texts = []
        for command in (
            ("pwrite", b"a", 0, 0),
            ("pwrite", b"ab", LAST, FUA),  # permission first, whatever else is wrong
            ("zero", 1, 0, 0),
            ("zero", 1, SIZE, FAST_ZERO),
            ("trim", 1, 0, UNKNOWN_FLAG),
        ):
            assert outcome(client, command) == errno.EPERM, command
            what = {"pwrite": "WRITE", "zero": "WRITE_ZEROES", "trim": "TRIM"}[str(command[0])]
            texts.append(f"structured error server message: {what} on a read-only export")
        assert client.server_messages == (texts if replies == "structured" else [])
        for command in (("flush", 0, 0, 0), ("cache", 100, 0, 0), (STATUS, SIZE, 0, 0)):
            if applies(command, replies):
                assert outcome(client, command) == 0, command
        assert_same(client.pread(SIZE, 0), served.model(export), name)
    served.standby.qmp.execute("nbd-server-remove", {"name": name})


def is_cut_off(client: Libnbd) -> bool:
    """Whether the connection has ended; a READ that finds it there must fail for a reason."""
    try:
        client.pread(1, 0)
    except LibnbdError as exc:
        return exc.errno != errno.ESHUTDOWN
    raise AssertionError("a READ behind the fence succeeded")


def test_the_reasons_of_a_life_reach_libnbd(short_dir: Path) -> None:
    disk = sparse_disk(short_dir, bytes(SIZE))
    with Standby(short_dir, disk) as standby, LibnbdProcess(short_dir) as libnbd:
        view = libnbd.connect(standby.unix(TOP), contexts=[BASE])
        assert outcome(view, ("pread", 1, 0, 0)) == errno.EIO
        assert view.server_messages[-1].endswith("READ failed: Block replication is not running")
        standby.qmp.execute(*START)
        assert outcome(view, ("pread", 1, 0, 0)) == 0
        primary = libnbd.connect(standby.unix(NAME))
        standby.fail_over()
        # Who was there is told why for a moment, and then the connection ends.
        wait_until(lambda: is_cut_off(primary), "the fence")
        refused = libnbd.connect(standby.unix(NAME), options=True)
        for option in ("opt_info", "opt_go"):
            with pytest.raises(LibnbdError) as failure:
                refused.call(option)
            assert failure.value.errno == errno.ENOTSUP  # libnbd's word for any refusal but UNKNOWN
            assert refused.server_messages[-1] == f"handshake: server error message: {FENCED}"
        refused.call("opt_abort")
        view.pwrite(b"promoted", 0)
        assert view.pread(8, 0) == b"promoted"
        view.close()
        standby.quit()


# Section: other servers


QEMU_DIFFERS = {
    # "The server SHOULD return NBD_ENOSPC if it receives a write request including one or more
    # sectors beyond the size of the device": QEMU says EINVAL.
    ("pwrite", b"ab", LAST, 0): (errno.ENOSPC, errno.EINVAL),
    ("zero", 2, LAST, 0): (errno.ENOSPC, errno.EINVAL),
}
NBDKIT_DIFFERS = {
    # A length of 0 is unspecified; nbdkit refuses it at the end of the disk.
    ("pread", 0, SIZE, 0): (0, errno.EINVAL),
}


def outcomes(served: Served, uri: str, replies: str) -> dict[Command, int]:
    """The errno of every command of this file."""
    structured = replies == "structured"
    client = served.libnbd.connect(uri, structured=structured, contexts=[BASE], strict=False)
    found = {
        command: outcome(client, command)
        for command in [*(command for command, _, _ in ERRORS), *FINE]
        if applies(command, replies)
    }
    assert client.pread(SIZE, 0) == served.initial
    client.close()
    return found


def differences(served: Served, uri: str, replies: str) -> dict[Command, tuple[int, int]]:
    """(our errno, theirs) where they are not the same."""
    served.restore(NAME)
    ours, theirs = outcomes(served, served.uri(NAME), replies), outcomes(served, uri, replies)
    return {key: (ours[key], theirs[key]) for key in ours if ours[key] != theirs[key]}


@pytest.fixture(scope="module")
def image(served_by_module: Served) -> Path:
    """A file with the disk's content."""
    path = served_by_module.folder / "other.raw"
    write_sparse(path, served_by_module.initial)
    return path


@pytest.fixture(scope="module")
def qemu(served_by_module: Served, image: Path) -> Iterator[QemuNbd]:
    with QemuNbd(served_by_module.folder, image, NAME, "--format=raw") as qemu:
        yield qemu


@pytest.fixture(scope="module")
def nbdkit(served_by_module: Served, image: Path) -> Iterator[NbdkitFile]:
    with NbdkitFile(served_by_module.folder, image) as nbdkit:
        yield nbdkit


@pytest.mark.parametrize("replies", REPLIES)
def test_qemu_nbd_answers_by_the_same_errors(served: Served, qemu: QemuNbd, replies: str) -> None:
    assert differences(served, qemu.uri, replies) == QEMU_DIFFERS


@pytest.mark.parametrize("replies", REPLIES)
def test_nbdkit_answers_by_the_same_errors(
    served: Served, nbdkit: NbdkitFile, replies: str
) -> None:
    assert differences(served, nbdkit.uri, replies) == NBDKIT_DIFFERS
