"""Failover of a real daemon: the fence, the commit job and its failure, and the way back."""

from __future__ import annotations

import errno
import os

import pytest
from daemon_support import SIZE, Running, Setup, check_overlays, pattern
from peers import NbdClient, NbdReplyError, wait_until
from writers import Writer

pytestmark = [pytest.mark.interop, pytest.mark.slow]

BIG = 48 << 20
PAUSE = ("job-pause", {"id": "commit-d"})


def fill_hidden(running: Running, size: int) -> None:
    """Let the primary overwrite everything: all the old data goes to the hidden overlay."""
    with running.connect("d") as primary:
        for offset in range(0, size, 16 << 20):
            primary.pwrite(offset, b"\xaa" * min(16 << 20, size - offset))


def stage(running: Running) -> str:
    return str(running.disk()["stage"])


def wait_done(running: Running) -> None:
    wait_until(lambda: stage(running) == "done", "the end of the commit")


def commit(running: Running) -> dict[str, object]:
    """The commit job, from query-jobs."""
    (job,) = running.qmp.execute("query-jobs")
    assert job["id"] == "commit-d"
    assert isinstance(job, dict)
    return job


# Section: the fence


def write_until_cut_off(client: NbdClient) -> None:
    """Of a stale primary: at first it is told why, then its connection ends."""
    told: set[int | None] = set()
    while True:
        try:
            client.pwrite(0, b"from a stale primary")
        except NbdReplyError as exc:
            told.add(exc.errno)
        except (ConnectionResetError, BrokenPipeError):
            break
        else:
            raise AssertionError("a stale primary has written")
    assert told <= {errno.ESHUTDOWN}


def test_a_failover_cuts_the_primary_off_until_a_reset(setup: Setup) -> None:
    with setup.serve() as running:
        running.start()
        primary, view = running.connect("d"), running.connect("d-top")
        arguments = {"device": "d", "name": "another-name", "writable": True}
        running.qmp.execute("nbd-server-add", arguments)
        other = running.connect("another-name")
        primary.pwrite(0, b"after the checkpoint")
        view.pwrite(512, b"the standby's own")
        running.failover()
        expected = bytearray(pattern(1))
        expected[512 : 512 + 17] = b"the standby's own"

        for client in (primary, other):
            write_until_cut_off(client)
        for name in ("d", "another-name"):
            with pytest.raises(NbdReplyError, match="'d' is fenced: the standby has taken over"):
                running.connect(name)
        # A new export of the same node is behind the same fence.
        running.qmp.execute("nbd-server-add", arguments | {"name": "third-name"})
        with pytest.raises(NbdReplyError, match="'d' is fenced"):
            running.connect("third-name")
        answer = running.qmp.answer("nbd-server-add", {"device": "d-secondary", "writable": True})
        assert answer.desc == "Cannot find device='d-secondary' nor node-name='d-secondary'"

        wait_done(running)
        assert running.disk()["fenced"] is True
        with pytest.raises(NbdReplyError, match="'d' is fenced"):
            running.connect("d")
        assert view.pread(0, SIZE) == expected
        assert setup.path("secondary").read_bytes() == expected

        running.qmp.execute("x-replnbd-reset")
        assert running.disk()["fenced"] is False
        assert stage(running) == "none"
        for name in ("d", "another-name", "third-name"):
            running.connect(name).pwrite(0, name.encode())
        running.start()
        assert view.pread(0, 10) == b"third-name"


# Section: the commit job


def test_a_commit_can_be_paused_slowed_down_and_resumed(setup: Setup) -> None:
    os.truncate(setup.path("secondary"), BIG)
    with setup.serve() as running:
        running.start()
        fill_hidden(running, BIG)
        standby = Writer(running.connect("d-top"), 1, BIG)
        standby.start()
        running.failover(PAUSE)
        speed = {"device": "commit-d", "speed": 8 << 20}
        running.qmp.execute("block-job-set-speed", speed)
        assert commit(running)["status"] == "paused"
        assert running.qmp.answer("job-pause", {"id": "commit-d"}).desc == "Job is already paused"
        # It may end the chunk it is at. Then nothing moves, but the standby does.
        counts = [standby.count]
        progress = {commit(running)["current-progress"]}
        for _ in range(3):
            counts.append(standby.count)
            wait_until(lambda: standby.count > counts[-1] + 50, "standby writes")
            progress.add(commit(running)["current-progress"])
        assert len(progress) <= 2
        (described,) = running.qmp.execute("query-block-jobs")
        assert described["device"] == "commit-d"
        assert described["speed"] == 8 << 20
        assert described["paused"] is True
        running.qmp.execute("job-resume", {"id": "commit-d"})
        assert commit(running)["status"] == "running"
        answer = running.qmp.answer("job-resume", {"id": "commit-d"})
        assert answer.desc == "Can't resume a job that was not paused"
        answer = running.qmp.answer("block-job-set-speed", speed | {"speed": -1})
        assert answer.desc == "Parameter 'speed' expects a non-negative value"
        running.qmp.execute("block-job-set-speed", speed | {"speed": 0})
        wait_done(running)
        standby.stop()
        running.process.terminate()
    check_overlays(setup)
    before = pattern(1) + bytes(BIG - SIZE)
    assert standby.is_in(setup.path("secondary").read_bytes(), before)


def test_a_commit_ends_under_constant_load_of_the_standby(setup: Setup) -> None:
    os.truncate(setup.path("secondary"), BIG)
    with setup.serve() as running:
        running.start()
        fill_hidden(running, BIG)
        # Each writes the part of its own: what was written last to a place is known.
        standbys = [Writer(running.connect("d-top"), seed, BIG, part=seed) for seed in range(3)]
        for standby in standbys:
            standby.start()
        wait_until(lambda: min(s.count for s in standbys) > 100, "standby writes")
        running.failover()
        wait_done(running)
        counts = [standby.count for standby in standbys]
        wait_until(
            lambda: all(s.count > n + 100 for s, n in zip(standbys, counts, strict=True)),
            "standby writes after the commit",
        )
        for standby in standbys:
            standby.stop()
        disk = running.disk()
        assert (disk["hidden-bytes"], disk["active-bytes"]) == (0, 0)
        assert disk["job"] is None
        running.process.terminate()
    check_overlays(setup)
    expected = pattern(1) + bytes(BIG - SIZE)
    for standby in standbys:
        expected = standby.applied_to(expected)
    assert setup.path("secondary").read_bytes() == expected


def test_a_cancelled_commit_can_be_tried_again_by_failover(setup: Setup) -> None:
    os.truncate(setup.path("secondary"), BIG)
    with setup.serve() as running:
        running.start()
        fill_hidden(running, BIG)
        view = running.connect("d-top")
        view.pwrite(SIZE, b"the standby's own")
        running.failover(PAUSE)
        running.qmp.execute("job-cancel", {"id": "commit-d"})
        wait_until(lambda: running.disk()["stage"] != "failover", "the end of the commit")
        disk = running.disk()
        assert disk["stage"] == "failover-failed"
        assert disk["error"] == "commit-d: Operation canceled"
        assert disk["fenced"] is True
        status = running.qmp.execute("query-xen-replication-status")
        assert status == {"error": True, "desc": "I/O error occurred"}
        for command, text in (
            ("xen-colo-do-checkpoint", "Backup job was cancelled unexpectedly"),
            ("x-replnbd-reset", None),
        ):
            answer = running.qmp.answer(command)
            assert not answer.ok
            assert answer.desc is not None
            assert answer.desc == text or "which a reset would lose: use force" in answer.desc
        view.pwrite(SIZE + 512, b"in the stage failover-failed")
        running.failover()
        wait_done(running)
        events = [event for event in running.qmp.events if event["event"].startswith("BLOCK_JOB")]
        assert [
            (event["event"], event["data"]["device"], event["data"].get("error"))
            for event in events
        ] == [
            ("BLOCK_JOB_COMPLETED", "backup-d", None),
            ("BLOCK_JOB_CANCELLED", "commit-d", None),
            ("BLOCK_JOB_COMPLETED", "commit-d", None),
        ]
        running.process.terminate()
    check_overlays(setup)
    expected = bytearray(pattern(1) + bytes(BIG - SIZE))
    expected[SIZE : SIZE + 17] = b"the standby's own"
    expected[SIZE + 512 : SIZE + 512 + 28] = b"in the stage failover-failed"
    assert setup.path("secondary").read_bytes() == expected


def test_a_failed_commit_is_told_and_can_be_tried_again(setup: Setup) -> None:
    """The secondary disk takes no writes beyond 32 MiB, for a while."""
    os.truncate(setup.path("secondary"), BIG)
    with setup.serve() as running:
        running.start()
        fill_hidden(running, 32 << 20)
        view = running.connect("d-top")
        view.pwrite(BIG - 512, b"beyond what can be written")
        running.process.limit_file_size(40 << 20)
        running.failover()
        wait_until(lambda: stage(running) == "failover-failed", "the failure")
        assert running.disk()["error"] == "commit-d: File too large"
        assert running.qmp.execute("query-jobs") == []
        expected = bytearray(pattern(1) + bytes(BIG - SIZE))
        expected[BIG - 512 : BIG - 512 + 26] = b"beyond what can be written"
        assert view.pread(0, BIG) == expected
        view.pwrite(BIG - 512, b"BEYOND")  # allocated: to the active overlay, which takes it
        expected[BIG - 512 : BIG - 512 + 6] = b"BEYOND"
        with pytest.raises(NbdReplyError):
            running.connect("d")
        running.process.limit_file_size(None)
        running.failover()
        wait_done(running)
        errors = [event for event in running.qmp.events if event["event"] == "BLOCK_JOB_ERROR"]
        assert [event["data"] for event in errors] == [
            {"device": "commit-d", "operation": "write", "action": "report"}
        ]
        assert running.qmp.execute("query-xen-replication-status") == {"error": False}
        assert running.disk()["error"] is None
        assert view.pread(0, BIG) == expected
        running.process.terminate()
    check_overlays(setup)
    assert setup.path("secondary").read_bytes() == expected


# Section: the backup job


def test_a_backup_job_is_not_cancelled_and_keeps_the_checkpoint(setup: Setup) -> None:
    with setup.serve() as running:
        running.start()
        primary, view = running.connect("d"), running.connect("d-top")
        primary.pwrite(0, b"before")
        answer = running.qmp.answer("job-cancel", {"id": "backup-d"})
        assert answer.desc == (
            "Job 'backup-d' keeps the checkpoint of its disk: end it by a stop or a failover"
        )
        primary.pwrite(6, b" and after")
        assert view.pread(0, SIZE) == pattern(1)
        assert running.disk()["error"] is None
        running.stop()
        assert view.pread(0, SIZE) == b"before and after" + pattern(1)[16:]
        running.process.terminate()
    check_overlays(setup)


def test_jobs_that_are_not_there_have_qemus_texts(setup: Setup) -> None:
    with setup.serve() as running:
        for command in ("job-pause", "job-resume", "job-cancel"):
            answer = running.qmp.answer(command, {"id": "backup-d"})
            assert (answer.error_class, answer.desc) == ("GenericError", "Job not found")
        answer = running.qmp.answer("block-job-set-speed", {"device": "backup-d", "speed": 1})
        assert answer.desc == "Block job 'backup-d' not found"
        assert answer.error_class == "DeviceNotActive"
