"""The commands that drive a daemon: what they do, print and refuse."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import threading
from pathlib import Path

import pytest
from cli_support import SIZE, Cli, Terminal, content
from peers import REPLNBD, NbdClient, NbdReplyError, Process, refusal, run_replnbd, wait_until

pytestmark = [pytest.mark.interop, pytest.mark.slow]

NO_DAEMON = "is the daemon running, and is this its control socket?"


def generation_of(status: str) -> str:
    """The id in the first line."""
    match = re.match(r"group: generation ([0-9a-f]{32})\n", status)
    assert match is not None, status
    return match[1]


def test_the_life_of_two_disks(cli: Cli) -> None:
    primary, view = cli.connect("a"), cli.connect("a-top")
    assert cli.says("jobs") == "no jobs\n"
    assert cli.says("start") == "a: running\nb: running\n"
    assert cli.refused("start") == "Block replication is running or done"
    primary.pwrite(0, b"one")
    assert view.pread(0, SIZE) == content(1)
    assert cli.says("checkpoint") == "a: running, checkpoint 2\nb: running, checkpoint 2\n"
    assert view.pread(0, 3) == b"one"
    primary.pwrite(4096, b"two")
    view.pwrite(8192, b"three")
    assert cli.says("jobs") == ("backup-b running, 0 B saved\nbackup-a running, 2.0 KiB saved\n")
    status = re.sub(r"\d+ s ago", "n s ago", cli.says("status"))
    generation = generation_of(status)
    assert status == (
        f"group: generation {generation}\n"
        "a: stage running; checkpoint 2 (n s ago); hidden 64.0 KiB; active 64.0 KiB;"
        " primary wrote 3 B; standby wrote 5 B; primary clients 1; standby clients 1;"
        " job backup-a running, 2.0 KiB saved\n"
        "b: stage running; checkpoint 2 (n s ago); hidden 0 B; active 0 B;"
        " primary wrote 0 B; standby wrote 0 B; primary clients 0; standby clients 0;"
        " job backup-b running, 0 B saved\n"
    )
    assert cli.refused("reset") == "'reset' is not possible in stage 'running'"
    primary.close()
    assert cli.says("failover", "--wait") == "a: done\nb: done\n"
    expected = b"one" + content(1)[3:8192] + b"three" + content(1)[8197:]
    assert view.pread(0, SIZE) == expected
    assert cli.daemon.disks[0].secondary.read_bytes() == expected
    assert cli.says("failover") == "a: done\nb: done\n"  # ignored, as QEMU does
    with pytest.raises(NbdReplyError, match="fenced"):
        cli.connect("a")
    assert "a: stage done (fenced); checkpoint 2 (" in cli.says("status")
    assert generation_of(cli.says("status")) != generation
    assert cli.says("reset") == "a: none\nb: none\n"
    assert cli.connect("a").pread(0, SIZE) == expected


@pytest.mark.parametrize(
    ("target", "first", "mine"),
    [("standby", b"one", True), ("checkpoint", b"one", False), ("latest", b"two", False)],
)
def test_a_failover_can_be_to_each_state(cli: Cli, target: str, first: bytes, mine: bool) -> None:
    cli.says("start")
    primary, view = cli.connect("a"), cli.connect("a-top")
    primary.pwrite(0, b"one")
    cli.says("checkpoint")
    primary.pwrite(0, b"two")
    view.pwrite(8192, b"mine")
    assert cli.says("failover", "--wait", "--to", target) == "a: done\nb: done\n"
    expected = first + content(1)[3:8192] + (b"mine" if mine else content(1)[8192:8196])
    assert view.pread(0, 8196) == expected
    assert json.loads(cli.says("status", "--json"))["disks"][0]["failover-target"] == target


def test_a_stop_makes_the_disk_the_primarys_latest(cli: Cli) -> None:
    cli.says("start")
    cli.connect("a").pwrite(0, b"latest")
    cli.connect("a-top").pwrite(512, b"dropped")
    assert cli.says("stop") == "a: done\nb: done\n"
    assert cli.connect("a-top").pread(0, SIZE) == b"latest" + content(1)[6:]
    # QEMU ignores these; whoever types them must not believe that they have happened.
    assert cli.refused("start") == "'a' was stopped: 'reset' comes first"
    assert cli.refused("failover", "--wait") == (
        "'a' was stopped, and has no view to take over: 'reset' and 'start' come first"
    )


def test_what_the_stage_does_not_allow_is_refused_with_qemus_text(cli: Cli) -> None:
    assert cli.refused("stop") == "Block replication is not running"
    assert cli.refused("failover") == "Block replication is not running"
    assert cli.refused("checkpoint") == "Backup job was cancelled unexpectedly"


def test_a_reset_that_would_lose_data_is_refused_unless_forced(cli: Cli) -> None:
    cli.says("start")
    cli.says("stop")
    view = cli.connect("a-top")
    view.pwrite(0, b"the standby's own")
    assert cli.refused("reset") == (
        "the overlays of 'a' hold data that is in no disk, which a reset would lose: use force"
    )
    assert view.pread(0, 17) == b"the standby's own"
    assert cli.says("reset", "--force") == "a: none\nb: none\n"


def test_json_is_what_qmp_answers(cli: Cli) -> None:
    assert cli.json("jobs") == []
    cli.says("start")
    assert cli.json("jobs") == cli.daemon.qmp.execute("query-jobs")
    status = cli.json("status")
    assert status == cli.daemon.qmp.execute("x-replnbd-status")
    assert [disk["stage"] for disk in status["disks"]] == ["running", "running"]


def test_a_commit_that_fails_fails_the_command_that_waits_for_it(cli: Cli) -> None:
    cli.says("start")
    disk = cli.daemon.disks[0].secondary
    view = cli.connect("a-top")
    view.pwrite(SIZE - 512, b"x" * 512)
    cli.daemon.process.limit_file_size(SIZE - 512)  # the overlays have less, the disk has more
    assert cli.refused("failover", "--wait") == (
        "the commit failed: 'a': commit-a: File too large; 'replnbd failover' tries it again"
    )
    status = {one["name"]: one for one in cli.json("status")["disks"]}
    assert status["a"]["stage"] == "failover-failed"
    assert "stage failover-failed (fenced); " in cli.says("status")
    assert "; error commit-a: File too large\n" in cli.says("status")
    cli.daemon.process.limit_file_size(None)
    assert cli.says("failover", "--wait") == "a: done\nb: done\n"
    assert disk.read_bytes() == content(1)[:-512] + b"x" * 512


# Section: the terminal


def test_status_is_a_table_on_a_terminal(cli: Cli) -> None:
    cli.says("start")
    with Terminal("status", env=cli.env) as terminal:
        assert terminal.finish() == (0, "")
    assert "│ a / a-top │ running │ 1 (" in terminal.plain
    assert "│ b / b-top │ running │ 1 (" in terminal.plain


def test_watch_redraws_the_table_in_place(cli: Cli) -> None:
    with Terminal("status", "--watch", "--interval", "0.1", env=cli.env) as terminal:
        terminal.wait_for(lambda text: text.count("a / a-top") > 2)
        cli.daemon.qmp.execute("xen-set-replication", {"enable": True, "primary": False})
        terminal.wait_for(lambda text: "running" in text)
        terminal.interrupt()
        assert terminal.finish() == (0, "")
    drawn = terminal.text.count("a / a-top")
    # One line up for each line of the table but the last, before each drawing but the first.
    ups = terminal.text.count("\x1b[1A")
    lines = terminal.plain.split("a / a-top")[0].count("\n") + 4
    assert ups >= (drawn - 2) * (lines - 2)
    assert terminal.text.endswith("\x1b[?25h")  # the cursor is shown again


def test_watch_prints_lines_where_nobody_looks(cli: Cli) -> None:
    argv = [*REPLNBD, "status", "--watch", "--interval", "0.1"]
    for options in ([], ["--json"]):
        with subprocess.Popen(
            argv + options, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | cli.env,
        ) as process:  # fmt: skip
            assert process.stdout is not None
            assert process.stderr is not None
            lines = [process.stdout.readline() for _ in range(4)]
            process.send_signal(2)
            assert process.wait(10) == 0
            assert process.stderr.read() == ""
        if options:
            names = [[disk["name"] for disk in json.loads(line)["disks"]] for line in lines]
            assert names == [["a", "b"]] * 4
        else:
            assert [line.split(":")[0] for line in lines] == ["group", "a", "b", "group"]


def test_a_failover_that_waits_shows_its_progress_on_a_terminal(cli: Cli) -> None:
    cli.says("start")
    cli.connect("a-top").pwrite(0, bytes(SIZE))
    with Terminal("failover", "--wait", env=cli.env) as terminal:
        assert terminal.finish() == (0, "")
    assert "commit a ━━━" in terminal.plain
    assert "commit b ━━━" in terminal.plain
    assert terminal.plain.replace("\r", "").endswith("a: done\nb: done\n")


# Section: where the daemon is, or is not


def test_without_a_daemon_a_command_says_so_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "qmp.sock"
    for command in ("start", "failover", "jobs"):
        line = refusal(run_replnbd(command, "--control", path))
        assert line == f"replnbd: no replnbd answers at {path}: {NO_DAEMON}"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    line = refusal(run_replnbd("status", env={"REPLNBD_CONTROL": str(path)}))
    assert line == f"replnbd: no replnbd answers at {path}: {NO_DAEMON}"


@pytest.mark.parametrize(
    ("control", "reason"),
    [
        ("x" * 200, "AF_UNIX path too long"),
        ("file/qmp.sock", "Not a directory"),
    ],
)
def test_a_control_socket_that_cannot_be_is_told_in_one_line(
    tmp_path: Path, control: str, reason: str
) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / control
    line = refusal(run_replnbd("status", "--control", path))
    assert line == f"replnbd: cannot connect to {path}: {reason}"


def test_a_socket_that_is_no_control_socket_is_told_in_one_line(cli: Cli) -> None:
    line = refusal(run_replnbd("status", "--control", cli.daemon.nbd_socket))
    assert line.startswith(f"replnbd: control socket {cli.daemon.nbd_socket}: ")


def test_a_daemon_that_dies_in_mid_command_is_told_in_one_line(cli: Cli) -> None:
    argv = [*REPLNBD, "status", "--watch", "--interval", "0.1"]
    with subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | cli.env
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        cli.daemon.process.kill()
        lines = process.stderr.read().splitlines()
        assert process.wait(10) == 1
    path = cli.daemon.control_socket
    assert lines in (
        [f"replnbd: control socket {path}: the server closed the connection"],
        [f"replnbd: control socket {path}: Broken pipe"],
        [f"replnbd: control socket {path}: Connection reset by peer"],
    )


def test_a_daemon_that_ends_between_question_and_answer_is_told_in_one_line(
    short_dir: Path,
) -> None:
    path = short_dir / "qmp.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            client, _ = listener.accept()
            with client:
                client.sendall(b'{"QMP": {"version": {}, "capabilities": []}}\r\n')
                client.recv(4096)
                client.sendall(b'{"return": {}}\r\n')
                client.recv(4096)

        thread = threading.Thread(target=serve)
        thread.start()
        line = refusal(run_replnbd("checkpoint", "--control", path))
        thread.join()
    assert line == f"replnbd: control socket {path}: the server closed the connection"


# Section: whoever reads our output


def test_a_reader_that_has_seen_enough_is_no_error_to_talk_about(cli: Cli) -> None:
    argv = [*REPLNBD, "status", "--watch", "--json", "--interval", "0.1"]
    with subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | cli.env
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(10) == 1


@pytest.mark.parametrize("arguments", [("status",), ("status", "--json"), ("jobs",), ("--help",)])
def test_output_that_cannot_be_written_is_told_in_one_line(
    cli: Cli, arguments: tuple[str, ...]
) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*REPLNBD, *arguments], stdout=full, stderr=subprocess.PIPE, text=True,
            env=os.environ | cli.env,
        )  # fmt: skip
    assert done.stderr == "replnbd: No space left on device\n"
    assert done.returncode == 1


# Section: replnbd secondary


def test_secondary_needs_no_configuration(short_dir: Path) -> None:
    disk = short_dir / "vm0.raw"
    disk.write_bytes(content(1))
    nbd, qmp = short_dir / "nbd", short_dir / "qmp"
    arguments = ["secondary", str(disk), "--listen", f"nbd+unix:///?socket={nbd}", "--start"]
    env = {"REPLNBD_CONTROL": str(qmp)}
    argv = ["env", f"REPLNBD_CONTROL={qmp}", *REPLNBD, *arguments]
    with Process(argv, log=short_dir / "log") as process:
        process.reach(lambda: NbdClient(nbd, "vm0").close())
        wait_until(lambda: "ready: " in (short_dir / "log").read_text(), "the daemon")
        assert run_replnbd("checkpoint", env=env).stdout == "vm0: running, checkpoint 2\n"
        with NbdClient(nbd, "vm0") as primary, NbdClient(nbd, "vm0-top") as view:
            primary.pwrite(0, b"x")
            assert view.pread(0, SIZE) == content(1)
        assert (short_dir / "vm0.raw.hidden.qcow2").exists()
        assert (short_dir / "vm0.raw.active.qcow2").exists()
        assert process.terminate() == 0


def test_secondary_takes_names_and_places_from_its_options(short_dir: Path) -> None:
    (short_dir / "vm0.img").write_bytes(content(1))
    options = {
        "--name": "colo0", "--top-id": "top0", "--format": "raw", "--hidden": "h", "--active": "a",
        "--control": "qmp", "--durability": "power",
    }  # fmt: skip
    argv = [*REPLNBD, "secondary", "vm0.img", *(word for pair in options.items() for word in pair)]
    argv += ["--listen", "nbd+unix:///?socket=nbd", "--listen", "nbd://127.0.0.1:0"]
    with Process(argv, log=short_dir / "log", cwd=short_dir) as process:
        process.reach(lambda: NbdClient(short_dir / "nbd", "colo0").close())
        done = run_replnbd("status", "--json", "--control", "qmp", cwd=short_dir)
        status = json.loads(done.stdout)
        assert [(d["name"], d["top-id"], d["durability"]) for d in status["disks"]] == [
            ("colo0", "top0", "power")
        ]
        uri = status["listen"][1]
        assert uri.startswith("nbd://127.0.0.1:")
        NbdClient(("127.0.0.1", int(uri.rpartition(":")[2])), "top0").close()
        assert process.terminate() == 0
    assert sorted(path.name for path in short_dir.iterdir()) == ["a", "h", "log", "vm0.img"]
    # Reached by a path relative to another directory, and by none at all.
    assert refusal(run_replnbd("status", env={"REPLNBD_CONTROL": "qmp"}, cwd=short_dir)) == (
        f"replnbd: no replnbd answers at {short_dir}/qmp: {NO_DAEMON}"
    )


def test_secondary_that_cannot_start_says_why_and_leaves_nothing(short_dir: Path) -> None:
    (short_dir / "d.raw").write_bytes(content(1))
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-b", "d.raw", "-F", "raw", "h", "512"],
        cwd=short_dir, check=True,
    )  # fmt: skip
    before = sorted(path.name for path in short_dir.iterdir())
    done = run_replnbd(
        "secondary", "d.raw", "--start", "--hidden", "h", "--control", "qmp", "--listen",
        "nbd+unix:///?socket=nbd", "--log-level", "warning", cwd=short_dir,
    )  # fmt: skip
    assert refusal(done) == (
        "replnbd: Active disk, hidden disk, secondary disk's length are not the same"
    )
    assert sorted(path.name for path in short_dir.iterdir()) == before


# Section: names that mean something to a terminal


def test_names_are_shown_as_they_are(short_dir: Path) -> None:
    (short_dir / "d.raw").write_bytes(content(1))
    name, top = "[red]a[/red]", "top[/nothing]"
    argv = [*REPLNBD, "secondary", "d.raw", "--name", name, "--top-id", top, "--control", "qmp"]
    argv += ["--listen", "nbd+unix:///?socket=nbd", "--start"]
    env = {"REPLNBD_CONTROL": str(short_dir / "qmp")}
    with Process(argv, log=short_dir / "log", cwd=short_dir) as process:
        process.reach(lambda: NbdClient(short_dir / "nbd", name).close())
        with Terminal("status", env=env) as terminal:
            assert terminal.finish() == (0, "")
        assert name in terminal.plain
        assert top in terminal.plain
        with Terminal("failover", "--wait", env=env) as terminal:
            assert terminal.finish() == (0, "")
        assert f"commit {name} ━" in terminal.plain
        assert process.terminate() == 0
