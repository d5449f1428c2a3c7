"""The oracle itself: that it notices what is wrong, and what QEMU does where worlds part."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from oracle_check import Checked, OracleError
from oracle_model import BACKUP_CANCELLED, Below, DiskModel, Overlay
from oracle_ops import Generator, Setup, Side, Verb
from oracle_worlds import COMMANDS, QemuWorld
from peers import Answer, list_exports

pytestmark = [pytest.mark.interop, pytest.mark.slow]


def run_seed(seed: int, folder: Path) -> None:
    """One sequence through QEMU and its model."""
    setup = Setup.from_seed(seed)
    with QemuWorld(setup, folder) as world:
        checked = Checked(world)
        for op in Generator(setup, fenced=False).sequence(200):
            checked.run(op)
        checked.finish()


def break_lost_copy(patch: pytest.MonkeyPatch) -> None:
    def overwrite(self: DiskModel, offset: int, data: bytes) -> None:
        self.secondary[offset : offset + len(data)] = data

    patch.setattr(DiskModel, "write_secondary", overwrite)


def break_checkpoint(patch: pytest.MonkeyPatch) -> None:
    def empty_hidden_only(self: DiskModel) -> None:
        self.hidden.blocks.clear()

    patch.setattr(DiskModel, "make_empty", empty_hidden_only)


def break_offset(patch: pytest.MonkeyPatch) -> None:
    write = Overlay.write

    def write_late(self: Overlay, offset: int, data: bytes, below: Below) -> None:
        write(self, offset + (len(data) == 513), data, below)

    patch.setattr(Overlay, "write", write_late)


def break_text(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("oracle_model.RUNNING_OR_DONE", "Block replication is running")


@pytest.mark.parametrize(
    ("break_model", "complaint"),
    [
        (break_lost_copy, "bytes differ"),
        (break_checkpoint, "bytes differ"),
        (break_offset, "bytes differ"),
        (break_text, "running or done"),
    ],
)
def test_a_peer_and_a_model_that_differ_are_noticed(
    break_model: Callable[[pytest.MonkeyPatch], None],
    complaint: str,
    monkeypatch: pytest.MonkeyPatch,
    short_dir: Path,
) -> None:
    """QEMU is right and the model is not: the same as the other way round."""
    break_model(monkeypatch)
    with pytest.raises(OracleError, match=complaint):
        run_seed(3, short_dir)


def test_qemu_stops_its_disks_last_first_until_one_fails(short_dir: Path) -> None:
    """Why Difference.GROUP: each plain stop fails, and ends one disk; the others go on."""
    setup = Setup(0, (1 << 20,) * 3, ("raw",) * 3)
    with QemuWorld(setup, short_dir) as world:
        qmp = world.peer.qmp
        qmp.execute(*COMMANDS[Verb.START])
        for index in range(3):
            world.clients[index, Side.STANDBY].pwrite(0, b"own")
        failed = Answer(None, "GenericError", BACKUP_CANCELLED)
        assert qmp.answer(*COMMANDS[Verb.STOP]) == failed
        # A checkpoint empties the overlays of the disks that still run.
        qmp.execute(*COMMANDS[Verb.CHECKPOINT])
        views = [bytes(world.clients[index, Side.STANDBY].pread(0, 3)) for index in range(3)]
        assert views == [setup.content(0)[:3], setup.content(1)[:3], b"own"]
        assert qmp.answer(*COMMANDS[Verb.STOP]) == failed
        assert qmp.answer(*COMMANDS[Verb.STOP]) == failed
        assert qmp.answer(*COMMANDS[Verb.STOP]) == Answer({})


def test_qemu_wants_sectors_of_the_filter_and_takes_bytes(short_dir: Path) -> None:
    """The row "sector-aligned requests only on the filter": its export says so, yet serves any
    range, because QEMU's block layer reads, changes and writes what the filter cannot."""
    setup = Setup(0, (1 << 20,), ("raw",))
    with QemuWorld(setup, short_dir) as world:
        sizes = {side: world.clients[0, side].block_sizes for side in Side}
        assert sizes[Side.PRIMARY] == (1, 4096, 32 << 20)
        assert sizes[Side.STANDBY] == (512, 4096, 32 << 20)
        exports = {export.name for export in list_exports(world.peer.nbd_socket)}
        assert exports == {"colo0", "top0"}


def test_qemu_drops_a_trim_where_its_world_sends_zeroes_after_it(short_dir: Path) -> None:
    """Why Difference.TRIM: the filter has no discard, and its copy-before-write does not unmap."""
    setup = Setup(1, (1 << 20,), ("raw",))
    expected = bytearray(setup.content(0))
    with QemuWorld(setup, short_dir) as world:
        primary, standby = world.clients[0, Side.PRIMARY], world.clients[0, Side.STANDBY]
        primary.trim(100, 1000)
        expected[100:1100] = bytes(1000)
        assert primary.pread(0, 1 << 20) == expected
        standby.trim(0, 1 << 20)  # not even stage none is asked
        world.peer.qmp.execute(*COMMANDS[Verb.START])
        primary.trim(200_000, 100_000)
        standby.trim(0, 1 << 20)
        assert primary.pread(0, 1 << 20) == expected
        assert standby.pread(0, 1 << 20) == expected
