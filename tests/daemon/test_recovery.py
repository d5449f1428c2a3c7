"""A daemon that ends, in whatever way and stage, and the next one on the same files."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import signal
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from daemon_support import SIZE, Running, Setup, pattern, tmpfs
from kills import Kills
from peers import (
    REPLNBD,
    NbdReplyError,
    fingerprints,
    qemu_img,
    refusal,
    run_replnbd,
    wait_until,
)
from writers import Writer

from replnbd import ConfigError, DiskConfig, ImageError, Standby, StateError, read_bytes
from replnbd.block import FileNode
from replnbd.daemon import recovery, standby_side
from replnbd.replication import Journal, Stage
from replnbd.replication.record_file import FILE_BYTES

pytestmark = [pytest.mark.interop, pytest.mark.slow]


def in_order(running: Running) -> None:
    running.signal(signal.SIGTERM)
    running.ended_well(timeout_s=10)


def by_kill(running: Running) -> None:
    running.process.kill()


END_NAMES: dict[Callable[[Running], None], str] = {
    in_order: "orderly end",
    by_kill: "process death",
}
any_end = pytest.mark.parametrize("end", END_NAMES, ids=lambda end: end.__name__)


def status(running: Running) -> dict[str, Any]:
    answer: dict[str, Any] = running.qmp.execute("x-replnbd-status")
    return answer


# Section: each stage goes on


@any_end
def test_a_running_standby_goes_on(setup: Setup, end: Callable[[Running], None]) -> None:
    with setup.serve() as running:
        running.start()
        running.connect("d").pwrite(0, b"first")
        running.checkpoint()
        running.connect("d").pwrite(4096, b"second")
        running.connect("d-top").pwrite(8192, b"mine")
        before, generation = running.disk(), status(running)["generation"]
        assert status(running)["recovered-from"] is None
        end(running)
    shown = bytearray(b"first" + pattern(1)[5:])
    shown[8192:8196] = b"mine"
    for _ in range(2):
        with setup.serve() as running:
            disk = running.disk()
            for key in ("stage", "checkpoints", "checkpoint-time", "error", "fenced"):
                assert disk[key] == before[key]
            assert status(running)["recovered-from"] == END_NAMES[end]
            assert status(running)["generation"] == generation
            assert running.connect("d-top").pread(0, SIZE) == shown
            assert running.connect("d").pread(4096, 6) == b"second"
            assert [job["id"] for job in running.qmp.execute("query-jobs")] == ["backup-d"]
            done = run_replnbd("start", "--control", setup.control)
            assert refusal(done) == "replnbd: Block replication is running or done"
            end(running)
    with setup.serve() as running:
        running.checkpoint()
        assert running.disk()["checkpoints"] == before["checkpoints"] + 1
        assert running.connect("d-top").pread(4096, 6) == b"second"
        assert running.connect("d-top").pread(8192, 4) == pattern(1)[8192:8196]


@any_end
def test_after_a_stop_the_standbys_writes_stay_over_the_disk(
    setup: Setup, end: Callable[[Running], None]
) -> None:
    with setup.serve() as running:
        running.start()
        running.connect("d").pwrite(0, b"latest")
        running.stop()
        running.connect("d-top").pwrite(4096, b"mine")
        end(running)
    with setup.serve() as running:
        assert (running.disk()["stage"], running.disk()["fenced"]) == ("done", False)
        assert running.connect("d-top").pread(0, 6) == b"latest"
        assert running.connect("d-top").pread(4096, 4) == b"mine"
        running.connect("d").pwrite(8192, b"more")
        assert running.connect("d-top").pread(8192, 4) == b"more"


@any_end
def test_a_fence_stays_up_until_a_reset(setup: Setup, end: Callable[[Running], None]) -> None:
    with setup.serve() as running:
        running.start()
        first = status(running)["generation"]
        running.connect("d-top").pwrite(0, b"mine")
        running.failover()
        wait_until(lambda: running.disk()["stage"] == "done", "the end of the commit")
        second = status(running)["generation"]
        assert second != first
        end(running)
    for _ in range(2):
        with setup.serve() as running:
            wait_until(lambda: running.disk()["stage"] == "done", "done")
            assert running.disk()["fenced"]
            assert status(running)["generation"] == second
            with pytest.raises(NbdReplyError, match="fenced"):
                running.connect("d")
            assert running.connect("d-top").pread(0, 4) == b"mine"
            end(running)
    with setup.serve() as running:
        running.qmp.execute("x-replnbd-reset")
        running.connect("d").pwrite(0, b"again")
        end(running)
    with setup.serve() as running:
        assert (running.disk()["stage"], running.disk()["fenced"]) == ("none", False)
        assert running.connect("d").pread(0, 5) == b"again"


BIG = 64 << 20


@any_end
def test_a_commit_goes_on_by_itself(setup: Setup, end: Callable[[Running], None]) -> None:
    before = random.Random(5).randbytes(BIG)
    setup.path("secondary").write_bytes(before)
    with setup.serve() as running:
        running.start()
        running.connect("d").pwrite(0, b"\xaa" * (BIG // 2))
        standby = Writer(running.connect("d-top"), 6, BIG)
        standby.start()
        wait_until(lambda: standby.count > 100, "standby writes")
        running.failover(("block-job-set-speed", {"device": "commit-d", "speed": 8 << 20}))
        wait_until(lambda: running.disk()["job"]["current-progress"] > BIG // 16, "progress")
        end(running)
        standby.ended()
    with setup.serve() as running:
        assert running.disk()["fenced"]
        view = running.connect("d-top")
        halves = (view.pread(offset, BIG // 2) for offset in (0, BIG // 2))
        assert standby.is_in(b"".join(halves), before)
        wait_until(lambda: running.disk()["stage"] == "done", "the end of the commit")
        in_order(running)
    assert standby.is_in(setup.path("secondary").read_bytes(), before)


@any_end
def test_a_failed_commit_can_be_tried_again_by_the_next_daemon(
    setup: Setup, end: Callable[[Running], None]
) -> None:
    with setup.serve() as running:
        running.start()
        running.connect("d").pwrite(0, b"\xaa" * SIZE)
        running.failover(("job-cancel", {"id": "commit-d"}))
        wait_until(lambda: running.disk()["stage"] != "failover", "the end of the commit")
        stage = running.disk()["stage"]
        end(running)
    with setup.serve() as running:
        if stage == "failover-failed":  # else the commit was faster than its cancellation
            assert running.disk()["stage"] == stage
            assert "commit-d" in running.disk()["error"]
            running.failover()
        wait_until(lambda: running.disk()["stage"] == "done", "the end of the commit")
        assert running.connect("d-top").pread(0, SIZE) == pattern(1)


# Section: kill -9 under load


@pytest.mark.parametrize("seed", range(10))
def test_a_kill_at_any_instant_loses_nothing_acknowledged(short_dir: Path, seed: int) -> None:
    print("seed", seed)
    kills = Kills(short_dir, seed)
    for _ in range(3):
        kills.kill_under_load()


@pytest.mark.parametrize("seed", range(4))
def test_a_kill_during_a_checkpoint_leaves_both_disks_before_it_or_after_it(
    short_dir: Path, seed: int
) -> None:
    print("seed", seed)
    kills = Kills(short_dir, seed)
    for _ in range(8):
        kills.kill_in_a_checkpoint()


# Section: files that do not belong together


def started(setup: Setup) -> None:
    """A standby that runs, and ended in an orderly way."""
    with setup.serve() as running:
        running.start()
        running.connect("d").pwrite(0, b"new")
        in_order(running)


def hidden_changed(setup: Setup) -> str:
    with setup.path("hidden").open("r+b") as file:
        file.write(file.read(4))
    os.utime(setup.path("hidden"))
    return (
        "./d.hidden has changed since the last replnbd ended, and with it the view of 'd':"
        " put it back as it was, or "
    )


def secondary_changed(setup: Setup) -> str:
    with setup.path("secondary").open("r+b") as file:
        file.write(b"booted by hand")
    return "./d.raw has changed since the last replnbd ended, and with it the view of 'd': "


def hidden_missing(setup: Setup) -> str:
    setup.path("hidden").unlink()
    return "./d.hidden is missing, and 'd' is in stage 'running': put it back, or "


def other_disks(setup: Setup) -> str:
    setup.table["name"] = "e"
    return "./d.hidden.journal is of other disks: 'd' (running); serve those, or "


def another_size(setup: Setup) -> str:
    with setup.serve() as running:
        running.process.kill()
    os.truncate(setup.path("secondary"), 2 * SIZE)
    return f"./d.raw has {2 * SIZE} bytes, and had {SIZE} when the last replnbd ended in stage "


def journal_damaged(setup: Setup) -> str:
    path = setup.folder / "d.hidden.journal"
    path.write_bytes(b"\xff" * path.stat().st_size)
    return "./d.hidden.journal: no record in it is whole: the journal is damaged"


DAMAGES = [
    hidden_changed,
    secondary_changed,
    hidden_missing,
    other_disks,
    another_size,
    journal_damaged,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_files_that_do_not_belong_together_are_refused(
    setup: Setup, damage: Callable[[Setup], str]
) -> None:
    started(setup)
    expected = damage(setup)
    setup.write()
    before = fingerprints(setup.folder)
    done = run_replnbd("serve", str(setup.config))
    line = refusal(done).replace(str(setup.folder), ".").splitlines()[-1]
    assert line.removeprefix("replnbd: ").startswith(expected)
    if damage is not journal_damaged:
        assert "to begin anew, with a full synchronisation, remove" in line
    assert fingerprints(setup.folder) == before


@pytest.mark.parametrize("dies", [False, True])
async def test_a_start_that_fails_leaves_files_that_the_next_one_takes(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, dies: bool
) -> None:
    """To open a qcow2 disk writes to it. `dies`: nothing is put in order afterwards."""
    raw = setup.path("secondary").rename(setup.folder / "raw")
    qemu_img("convert", "-f", "raw", "-O", "qcow2", raw, setup.path("secondary"))
    setup.table["format"] = "qcow2"
    started(setup)
    disk = disk_of(setup)
    disk.format = "qcow2"

    def fail(*_: object) -> None:
        raise ConfigError("not today")

    async def nothing(*_: object) -> None:
        return

    stamp = recovery._stamp(str(setup.path("secondary")))
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(standby_side, "check_size", fail)
            if dies:
                patch.setattr(recovery.Past, "give_up", nothing)
            with pytest.raises(ConfigError, match="not today"):
                await Standby([disk]).__aenter__()
        assert recovery._stamp(str(setup.path("secondary"))) != stamp
    async with Standby([disk]) as standby:
        ended = "process death" if dies else "orderly end"
        assert standby.status()["recovered-from"] == ended
        assert await read_bytes(standby.node("d"), 0, SIZE) == pattern(1)
        assert await read_bytes(standby.node("d", "primary"), 0, 3) == b"new"


def test_a_disk_that_nothing_depends_on_may_change(setup: Setup) -> None:
    started(setup)
    with setup.serve() as running:
        running.failover()
        wait_until(lambda: running.disk()["stage"] == "done", "the end of the commit")
        in_order(running)
    secondary_changed(setup)
    with setup.serve() as running:
        assert running.connect("d-top").pread(0, 14) == b"booted by hand"
        running.qmp.execute("x-replnbd-reset")
        in_order(running)
    setup.path("active").unlink()
    with setup.serve() as running:
        running.start()
        assert running.connect("d-top").pread(0, 14) == b"booted by hand"


def test_two_journals_are_told_apart(short_dir: Path) -> None:
    for name in ("a", "b"):
        with Setup(short_dir, name).serve() as running:
            running.start()
            running.process.kill()
    both = Setup(short_dir, "a", "b")
    both.write()
    done = run_replnbd("serve", str(both.config))
    assert "are journals of two groups" in refusal(done)


def test_disks_may_change_their_order_and_be_added_where_nothing_runs(short_dir: Path) -> None:
    setup = Setup(short_dir, "a", "b")
    with setup.serve() as running:
        running.start()
        running.process.kill()
    setup.tables.reverse()
    with setup.serve() as running:
        assert [running.disk(n)["name"] for n in (0, 1)] == ["b", "a"]
        assert [running.disk(n)["stage"] for n in (0, 1)] == ["running", "running"]
        running.stop()
        running.qmp.execute("x-replnbd-reset")
        in_order(running)
    three = Setup(short_dir, "c", "a", "b")
    with three.serve() as running:
        running.start()
        assert [running.disk(n)["stage"] for n in range(3)] == ["running"] * 3


# Section: power failures, and journals that fail


def disk_of(setup: Setup, durability: Literal["process", "power"] = "process") -> DiskConfig:
    return DiskConfig(
        durability=durability,
        name="d", mode="secondary", top_id="d-top", secondary=str(setup.path("secondary")),
        hidden=str(setup.path("hidden")), active=str(setup.path("active")),
    )  # fmt: skip


@pytest.fixture
def reboot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it, and the host has another boot id."""
    path = tmp_path / "boot_id"
    monkeypatch.setattr(recovery, "_BOOT_ID", path)
    boots = iter(range(1, 100))

    def next_boot() -> None:
        path.write_text(f"boot-{next(boots)}\n")

    next_boot()
    return next_boot


async def lost_power(setup: Setup, *commands: str) -> None:
    """A daemon in a stage, killed with its host."""
    with setup.serve() as running:
        running.start()
        running.connect("d").pwrite(0, b"new")
        for command in commands:
            getattr(running, command)()
            while await recorded_stage(setup) is Stage.FAILOVER:
                await asyncio.sleep(0.01)
        running.process.kill()


async def recorded_stage(setup: Setup) -> Stage:
    """What a power failure would leave."""
    journal = Journal(FileNode.open(setup.folder / "d.hidden.journal", read_only=True, lock=False))
    record = await journal.load()
    await journal.close()
    assert record is not None
    return record.disks[0].stage


async def forget_the_end(setup: Setup) -> None:
    """As if the last process had died with its host, and not ended in order."""
    journal = Journal(FileNode.open(setup.folder / "d.hidden.journal"))
    record = await journal.load()
    assert record is not None
    record.files = None
    await journal.write(record, durable=True)
    await journal.close()


async def test_after_a_power_failure_the_view_is_refused_and_the_disk_served(
    setup: Setup, reboot: Callable[[], None]
) -> None:
    await lost_power(setup)
    lost = [setup.path(key).read_bytes() for key in ("hidden", "active")]
    for number in range(2):
        reboot()
        async with Standby([disk_of(setup)]) as standby:
            assert standby.status()["recovered-from"] == "power failure"
            disk = standby.status()["disks"][0]
            assert disk["stage"] == "running"
            assert "power failure" in disk["view-lost"]
            assert disk["error"] == disk["view-lost"]
            with pytest.raises(OSError, match="the view cannot be trusted"):
                await read_bytes(standby.node("d"), 0, 512)
            assert await read_bytes(standby.node("d", "primary"), 0, 3) == b"new"
            for target in (None, "standby", "checkpoint"):
                with pytest.raises(StateError, match="fail over to 'latest'"):
                    await standby.failover(to=target)
        # What was the view is kept, whatever comes.
        aside = [setup.folder / f"d.{key}.lost" for key in ("hidden", "active")]
        assert [path.read_bytes() for path in aside] == lost
        if not number:
            await forget_the_end(setup)
    # The primary has synchronised again:
    async with Standby([disk_of(setup)]) as standby:
        assert standby.status()["recovered-from"] == "orderly end"
        await standby.node("d", "primary").pwrite(4096, b"synced")
        await standby.checkpoint()
        assert standby.status()["disks"][0]["view-lost"] is None
        await standby.node("d", "primary").pwrite(4096, b"later!")
        assert await read_bytes(standby.node("d"), 4096, 6) == b"synced"


async def test_after_a_power_failure_a_failover_to_latest_is_possible(
    setup: Setup, reboot: Callable[[], None]
) -> None:
    await lost_power(setup)
    reboot()
    async with Standby([disk_of(setup)]) as standby:
        await standby.failover(to="latest")
        assert await read_bytes(standby.node("d"), 0, 3) == b"new"


async def test_a_disk_that_was_done_survives_a_power_failure(
    setup: Setup, reboot: Callable[[], None]
) -> None:
    await lost_power(setup, "failover")
    reboot()
    async with Standby([disk_of(setup)]) as standby:
        disk = standby.status()["disks"][0]
        assert (disk["stage"], disk["fenced"], disk["view-lost"]) == ("done", True, None)
        assert await read_bytes(standby.node("d"), 0, SIZE) == pattern(1)


async def test_a_view_with_durability_power_survives_a_power_failure(
    setup: Setup, reboot: Callable[[], None]
) -> None:
    """(What is on the disk then is the matter of test_power.py: here nothing is lost of it.)"""
    setup.table["durability"] = "power"
    with setup.serve() as running:
        running.start()
        running.connect("d").pwrite(0, b"before")
        running.checkpoint()
        assert running.disk()["durability"] == "power"
        running.connect("d").pwrite(0, b"behind")
        running.connect("d-top").pwrite(100_000, b"standby")
        running.process.kill()
    reboot()
    async with Standby([disk_of(setup, "power")]) as standby:
        status = standby.status()
        assert status["recovered-from"] == "power failure"
        disk = status["disks"][0]
        assert (disk["stage"], disk["view-lost"], disk["error"]) == ("running", None, None)
        view = b"before" + pattern(1)[6:100_000] + b"standby" + pattern(1)[100_007:]
        assert await read_bytes(standby.node("d"), 0, SIZE) == view
        assert await read_bytes(standby.node("d", "primary"), 0, 6) == b"behind"
        await standby.failover()
    assert setup.path("secondary").read_bytes() == view
    for key in ("hidden", "active"):
        qemu_img("check", "-q", "-f", "qcow2", setup.path(key))


@pytest.mark.parametrize("before", ["process", "power"])
async def test_how_a_view_was_written_counts_and_not_the_present_configuration(
    setup: Setup, reboot: Callable[[], None], before: Literal["process", "power"]
) -> None:
    setup.table["durability"] = before
    await lost_power(setup)
    reboot()
    after: Literal["process", "power"] = "process" if before == "power" else "power"
    async with Standby([disk_of(setup, after)]) as standby:
        disk = standby.status()["disks"][0]
        assert disk["durability"] == after
        assert (disk["view-lost"] is None) == (before == "power")


@pytest.mark.parametrize("layer", ["hidden", "active"])
def test_an_overlay_of_another_run_is_refused(short_dir: Path, layer: str) -> None:
    """After a death no time stamp tells: it has an identity of its own."""
    setups = []
    for name in ("one", "two"):
        folder = short_dir / name / "x"
        folder.mkdir(parents=True)
        setups.append(Setup(folder))
        with setups[-1].serve() as running:
            running.start()
            running.connect("d").pwrite(0, name.encode())
            running.process.kill()
    one, two = setups
    mine = one.path(layer).read_bytes()
    one.path(layer).write_bytes(two.path(layer).read_bytes())
    done = run_replnbd("serve", str(one.config))
    text = refusal(done)
    assert f"{one.path(layer)} is not the overlay that 'd' had" in text
    assert "to begin anew, with a full synchronisation, remove" in text
    one.path(layer).write_bytes(mine)
    with one.serve() as running:
        assert running.connect("d-top").pread(0, SIZE) == pattern(1)
        in_order(running)


async def test_an_overlay_that_a_surviving_view_needs_is_missed(
    setup: Setup, reboot: Callable[[], None]
) -> None:
    setup.table["durability"] = "power"
    await lost_power(setup)
    reboot()
    setup.path("hidden").unlink()
    with pytest.raises(ConfigError, match="is missing, and 'd' is in stage 'running'"):
        async with Standby([disk_of(setup, "power")]):
            pass


async def test_a_start_after_a_power_failure_that_dies_leaves_a_power_failure(
    setup: Setup, reboot: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only once all is in order the page cache can be trusted again."""
    setup.table["durability"] = "power"
    await lost_power(setup)
    reboot()
    with monkeypatch.context() as patch:
        patch.setattr(standby_side, "open_disk", refuse_to_open)
        with pytest.raises(ConfigError, match="not today"):
            async with Standby([disk_of(setup, "power")]):
                pass
    for end in ("power failure", "orderly end"):
        async with Standby([disk_of(setup, "power")]) as standby:
            assert standby.status()["recovered-from"] == end


async def refuse_to_open(*_: object) -> None:
    raise ConfigError("not today")


async def test_a_journal_that_cannot_be_made_refuses_the_start(setup: Setup) -> None:
    with tmpfs(setup.folder, pages=FILE_BYTES // 4096 // 2) as place:
        setup.table["hidden"] = "disk/d.hidden"
        async with Standby([disk_of(setup)]) as standby:
            with pytest.raises(ConfigError, match=r"^cannot create .*journal: No space left"):
                await standby.start()
            assert standby.status()["disks"][0]["stage"] == "none"
            assert not list(place.glob("*.journal"))


async def test_a_journal_of_a_later_replnbd_is_refused(setup: Setup) -> None:
    started(setup)
    path = setup.folder / "d.hidden.journal"
    payload = b'{"another": "format"}'
    head = struct.pack(">8sIIQ", b"replnbdJ", 2, len(payload), 1 << 40)
    digest = hashlib.blake2b(head + payload, digest_size=32).digest()
    with path.open("r+b") as file:
        file.write(head + digest + payload)
    with pytest.raises(ImageError, match="format 2 of a later replnbd; this one knows 1"):
        await Standby([disk_of(setup)]).__aenter__()


def test_secondary_with_start_goes_on_where_it_was(short_dir: Path) -> None:
    (short_dir / "d.raw").write_bytes(pattern(1))
    setup = Setup(short_dir)
    argv = [*REPLNBD, "secondary", str(short_dir / "d.raw"), "--start", "--control", setup.control]
    argv += ["--listen", setup.listen[0], "--top-id", "d-top"]
    for number in range(2):
        with Running(setup, argv) as running:
            wait_until(lambda: running.disk()["stage"] == "running", "the start")
            if not number:
                running.connect("d").pwrite(0, b"new")
            assert running.connect("d-top").pread(0, SIZE) == pattern(1)
            assert running.disk()["checkpoints"] == 1
            running.process.kill()
