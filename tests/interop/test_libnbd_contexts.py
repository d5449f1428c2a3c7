"""BLOCK_STATUS through libnbd: base:allocation, qemu:allocation-depth and
qemu:dirty-bitmap:checkpoint of both exports, against a model and against QEMU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from interop_support import CHECKPOINT, START, Standby
from libnbd_support import (
    BASE,
    DEPTH,
    DIRTY,
    EXPORTS,
    NAME,
    SIZE,
    TOP,
    QemuNbd,
    Served,
    sparse_disk,
)
from map_support import SECONDARY, SUBCLUSTER, Changes, as_map, as_states, change, depths
from peers import Libnbd, LibnbdError, LibnbdProcess, qemu_img
from peers.nbd_wire import REQ_ONE

pytestmark = [pytest.mark.interop, pytest.mark.slow]

CONTEXTS = [BASE, DEPTH, DIRTY]
HOLE = 3  # nbd.STATE_HOLE | nbd.STATE_ZERO
CLEAN, CHANGED = 0, 1


class Histories:
    """Clients of both exports, and what they have changed since the last checkpoint."""

    def __init__(self, served: Served) -> None:
        self.served = served
        self.clients = {export: served.connect(export, contexts=CONTEXTS) for export in EXPORTS}
        self.checkpoint()

    def checkpoint(self) -> None:
        self.served.checkpoint()
        self.changes = {export: Changes.of(self.served.model(export)) for export in EXPORTS}

    def change(self, export: str, count: int, *, zeroes: bool = True) -> None:
        """By one of the two."""
        change(
            self.served.rng, self.clients[export], self.served.model(export),
            self.changes[export], count, zeroes=zeroes,
        )  # fmt: skip

    def status(self, export: str) -> dict[str, list[tuple[int, int]]]:
        """Of the whole export."""
        return self.clients[export].block_status(SIZE, 0)


@pytest.fixture
def histories(served: Served) -> Iterator[Histories]:
    histories = Histories(served)
    yield histories
    for client in histories.clients.values():
        client.close()


# Section: a model


def test_after_a_checkpoint_nothing_has_changed_and_the_disk_decides(histories: Histories) -> None:
    histories.change(NAME, 10)
    histories.change(TOP, 10)
    histories.checkpoint()
    for export, depth in ((NAME, 1), (TOP, SECONDARY)):
        status = histories.status(export)
        assert status[DIRTY] == [(SIZE, CLEAN)]
        assert status[DEPTH] == [(SIZE, depth)]  # a raw disk decides its holes, too
    assert histories.status(NAME)[BASE] == histories.status(TOP)[BASE]


@pytest.mark.parametrize("turn", range(3))
def test_depth_and_dirty_show_to_the_subcluster_who_wrote(histories: Histories, turn: int) -> None:
    for _ in range(3):
        histories.change(NAME, 5, zeroes=False)
        histories.change(TOP, 5)
        primary, view = (histories.changes[export].touched for export in EXPORTS)
        assert histories.status(NAME)[DIRTY] == as_map(primary, SIZE)
        assert histories.status(TOP)[DIRTY] == as_map(view, SIZE)
        assert histories.status(TOP)[DEPTH] == as_map(depths(primary, view), SIZE)
        assert histories.status(NAME)[DEPTH] == [(SIZE, 1)]


def test_zeroes_of_the_primary_are_dirty_where_bytes_changed_and_nowhere_else(
    histories: Histories,
) -> None:
    for _ in range(3):
        histories.change(NAME, 10)
        changes = histories.changes[NAME]
        found = as_states(histories.status(NAME)[DIRTY], SUBCLUSTER)
        for at, (written, dirty, touched) in enumerate(
            zip(changes.written, found, changes.touched, strict=True)
        ):
            assert written <= dirty <= touched, f"subcluster {at}"
        view = histories.changes[TOP].touched
        assert histories.status(TOP)[DEPTH] == as_map(depths(found, view), SIZE)


@pytest.mark.parametrize("export", EXPORTS)
def test_what_is_called_a_hole_reads_as_zeroes_and_what_is_trimmed_is_a_hole(
    histories: Histories, export: str
) -> None:
    block = 64 * 1024
    model, client = histories.served.model(export), histories.clients[export]
    histories.change(export, 20)
    trimmed = histories.served.rng.sample(range(SIZE // block), 8)
    for at in trimmed:
        client.trim(block, at * block)
        model[at * block : (at + 1) * block] = bytes(block)
    states = as_states(histories.status(export)[BASE])
    for at, state in enumerate(states):
        assert state in (0, HOLE)
        assert state == 0 or not any(model[at * 512 : (at + 1) * 512]), f"sector {at}"
    for at in trimmed:
        assert set(states[at * block // 512 : (at + 1) * block // 512]) == {HOLE}, f"block {at}"


# Section: requests


@pytest.mark.parametrize("export", EXPORTS)
def test_any_way_to_ask_gives_the_same_map(histories: Histories, export: str) -> None:
    for each in EXPORTS:
        histories.change(each, 10)
    rng, client, whole = histories.served.rng, histories.clients[export], histories.status(export)
    for context, expected in whole.items():
        assert sum(length for length, _ in expected) == SIZE
        states = [state for length, state in expected for _ in range(length)]
        for _ in range(50):
            offset = rng.randrange(SIZE)
            length = min(rng.randint(1, 1 << 20), SIZE - offset)
            flags = rng.choice([0, REQ_ONE])
            extents = client.block_status(length, offset, flags)[context]
            position = offset
            for count, state in extents:
                assert states[position : position + count] == [state] * count
                position += count
            if flags:
                assert len(extents) == 1
                assert position == offset + length or states[position] != extents[0][1]
            else:
                assert position == offset + length


@pytest.mark.parametrize("selected", [[BASE], [DEPTH], [DIRTY], [DIRTY, BASE], CONTEXTS[::-1]])
@pytest.mark.parametrize("export", EXPORTS)
def test_the_selected_contexts_are_answered_and_no_others(
    histories: Histories, export: str, selected: list[str]
) -> None:
    for each in EXPORTS:
        histories.change(each, 5)
    whole = histories.status(export)
    with histories.served.connect(export, contexts=selected) as client:
        found = client.block_status(SIZE, 0)
        assert found == {context: whole[context] for context in selected}
        one = client.block_status(SIZE, 0, REQ_ONE)
        assert one == {context: whole[context][:1] for context in selected}


# Section: QEMU


def chain(served: Served, export: str) -> Path:
    """QEMU's description of what an export leads to, in files that somebody else has open."""
    disk = served.standby.disk
    drivers = {disk.active: "qcow2", disk.hidden: "qcow2", disk.secondary: "raw"}
    files = list(drivers) if export == TOP else [disk.secondary]
    options = ["force-share=on"]
    for depth, file in enumerate(files):
        prefix = "backing." * depth
        options += [f"{prefix}driver={drivers[file]}", f"{prefix}file.driver=file"]
        options += [f"{prefix}file.filename={file}"]
    return Path(",".join(options))


@pytest.mark.parametrize("export", EXPORTS)
def test_qemu_nbd_reads_the_same_files_and_finds_the_same_layers_and_holes(
    histories: Histories, export: str
) -> None:
    served = histories.served
    for _ in range(3):
        for each in EXPORTS:
            histories.change(each, 10)
            histories.clients[each].flush()
        ours = histories.status(export)
        options = ["--image-opts", "--read-only"]
        with (
            QemuNbd(served.folder, chain(served, export), export, *options) as qemu,
            served.libnbd.connect(qemu.uri, contexts=[BASE, DEPTH]) as client,
        ):
            theirs = client.block_status(SIZE, 0)
            assert client.pread(SIZE, 0) == served.model(export)
        for context in (BASE, DEPTH):
            assert as_states(ours[context]) == as_states(theirs[context]), context


def test_the_dirty_bitmap_is_qemus_but_for_zeroes_that_change_nothing(
    histories: Histories,
) -> None:
    served = histories.served
    image = served.folder / "bitmap.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=2048", image, str(SIZE))
    qemu_img("bitmap", "--add", "-g", str(SUBCLUSTER), image, "checkpoint")
    with QemuNbd(served.folder, image, NAME, "--format=qcow2", "--bitmap=checkpoint") as qemu:
        theirs = served.libnbd.connect(qemu.uri, contexts=[DIRTY])
        twin, noted = bytearray(served.model(NAME)), Changes.of(served.model(NAME))
        for zeroes in (False, True):
            state = served.rng.getstate()
            histories.change(NAME, 20, zeroes=zeroes)
            served.rng.setstate(state)
            change(served.rng, theirs, twin, noted, 20, zeroes=zeroes)
            assert twin == served.model(NAME)
            ours_states = as_states(histories.status(NAME)[DIRTY], SUBCLUSTER)
            theirs_states = as_states(theirs.block_status(SIZE, 0)[DIRTY], SUBCLUSTER)
            written = histories.changes[NAME].written
            for at, (mine, other) in enumerate(zip(ours_states, theirs_states, strict=True)):
                assert mine == other or (mine < other and not written[at]), f"subcluster {at}"
        theirs.close()


# Section: stages


def dirty(client: Libnbd) -> list[tuple[int, int]]:
    """The dirty bitmap of a whole export."""
    return client.block_status(SIZE, 0)[DIRTY]


def test_where_no_account_is_kept_everything_counts_as_changed(short_dir: Path) -> None:
    disk = sparse_disk(short_dir, bytes(SIZE))
    with Standby(short_dir, disk) as standby, LibnbdProcess(short_dir) as libnbd:
        primary = libnbd.connect(standby.unix(NAME), contexts=[DIRTY])
        view = libnbd.connect(standby.unix(TOP), contexts=[DIRTY])
        for client in (primary, view):
            assert dirty(client) == [(SIZE, CHANGED)]  # there was no checkpoint
        standby.qmp.execute(*START)
        view.pwrite(b"v", 100_000)
        primary.pwrite(b"p", 50_000)
        written = {export: Changes.of(bytes(SIZE)) for export in EXPORTS}
        written[TOP].note(100_000, 1, zeroes=False)
        written[NAME].note(50_000, 1, zeroes=False)
        assert dirty(primary) == as_map(written[NAME].touched, SIZE)
        assert dirty(view) == as_map(written[TOP].touched, SIZE)
        standby.qmp.execute(*CHECKPOINT)
        for client in (primary, view):
            assert dirty(client) == [(SIZE, CLEAN)]
        view.pwrite(b"v", 100_000)
        standby.qmp.execute("xen-set-replication", {"enable": False, "primary": False})
        assert dirty(primary) == [(SIZE, CHANGED)]
        assert dirty(view) == [(SIZE, CLEAN)]  # what the standby had written is dropped
        view.pwrite(b"v", 100_000)
        assert dirty(view) == as_map(written[TOP].touched, SIZE)
        for client in (primary, view):
            client.close()
        standby.quit()


def test_the_status_of_a_view_that_is_not_there_is_an_error(short_dir: Path) -> None:
    disk = sparse_disk(short_dir, bytes(SIZE))
    with Standby(short_dir, disk) as standby, LibnbdProcess(short_dir) as libnbd:
        view = libnbd.connect(standby.unix(TOP), contexts=[BASE])
        with pytest.raises(LibnbdError, match="Input/output error"):
            view.block_status(SIZE, 0)
        text = "BLOCK_STATUS failed: Block replication is not running"
        assert view.server_messages[-1].endswith(text)
        view.close()
        standby.quit()
