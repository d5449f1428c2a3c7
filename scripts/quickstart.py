"""The main job on real data, told step by step; run it through scripts/quickstart.

A primary fills an ext4 disk and keeps writing through NBD. A standby works on the view of the last
checkpoint, and writes to it, too. The primary dies in the middle of its writes; after the failover
the disk is what the standby saw. Files are compared one by one, disks byte by byte.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from nbd_client import NbdClient, NbdError

ROOT = Path(__file__).resolve().parent.parent
REPLNBD = str(Path(sys.executable).with_name("replnbd"))

DISK_SIZE = 96 << 20
BLOCK_SIZE = 4096  # bytes; ext4's block and the unit of comparison
FILES_SIZE_MAX = 32 << 20  # bytes of real files to put on the disk
RUN_MAX = 64  # blocks per write request
WAIT_S = 30.0

SUMMARY = """The primary's writes reached the disk at once; the view
stood still between checkpoints; the standby kept its own writes; the failover left the last
checkpoint plus those, without the primary's half-finished writes, and a clean file system."""

begin = time.monotonic()


def step(number: int, text: str) -> None:
    """Announce a step of the story."""
    print(f"\n[{number}/8 {time.monotonic() - begin:4.1f} s] {text}", flush=True)


def tell(text: str) -> None:
    """A line of what happens."""
    print(f"    {text}", flush=True)


def prove(claim: str, holds: bool) -> None:
    """Print a claim that was checked, or end the run because it is false."""
    if not holds:
        raise SystemExit(f"    FALSE: {claim}")
    print(f"    ok: {claim}", flush=True)


class Machine:
    """A disk image with an ext4 on it, and a directory that says which files must be there.

    Files are changed in both: in the image by debugfs, which needs no mount and no root.
    """

    def __init__(self, image: Path, files: Path) -> None:
        self.image = image
        self.files = files

    def change(self, *, write: dict[str, bytes], remove: list[str]) -> list[tuple[int, bytes]]:
        """Write and remove files; returns what changed on the disk: (offset, bytes) in order."""
        before = self.image.read_bytes()
        script = []
        for name in [*remove, *write]:
            path = self.files / name
            if path.exists():
                path.unlink()
                script.append(f"rm /{name}")
        for name, data in write.items():
            path = self.files / name
            if not path.parent.exists():
                path.parent.mkdir()
                script.append(f"mkdir /{path.parent.name}")
            path.write_bytes(data)
            script.append(f"write {path} /{name}")
        self._debugfs(script)
        return list(differences(before, self.image.read_bytes()))

    def _debugfs(self, script: list[str]) -> None:
        # `write` takes its target in the current directory only, so go there for each file.
        lines = []
        for line in script:
            verb, *arguments = line.split()
            if verb == "write":
                directory, name = arguments[1].rsplit("/", 1)
                lines += [f"cd {directory or '/'}", f"write {arguments[0]} {name}", "cd /"]
            else:
                lines.append(line)
        command = ["debugfs", "-w", "-f", "-", str(self.image)]
        subprocess.run(
            command, input="\n".join(lines) + "\n", text=True, capture_output=True, check=True
        )


def differences(before: bytes, after: bytes) -> Iterator[tuple[int, bytes]]:
    """Runs of blocks that differ, as (offset, new bytes)."""
    start = None
    for offset in range(0, len(after) + BLOCK_SIZE, BLOCK_SIZE):
        differs = before[offset : offset + BLOCK_SIZE] != after[offset : offset + BLOCK_SIZE]
        if start is not None and (not differs or offset - start == RUN_MAX * BLOCK_SIZE):
            yield start, after[start:offset]
            start = None
        if differs and start is None:
            start = offset


def send(client: NbdClient, changes: list[tuple[int, bytes]]) -> str:
    """Write changes through NBD; returns how much it was, for people."""
    for offset, data in changes:
        client.write(offset, data)
    client.flush()
    total = sum(len(data) for _, data in changes)
    return f"{len(changes)} writes, {total // 1024} KiB"


def real_files(target: Path) -> int:
    """Copy Python's own library, up to a limit; returns how many files there are."""
    source = Path(sysconfig.get_path("stdlib"))
    count = size = 0
    for path in sorted(source.rglob("*.py")):
        relative = path.relative_to(source)
        if {"test", "tests", "site-packages", "dist-packages"} & set(relative.parts):
            continue
        size += path.stat().st_size
        if size > FILES_SIZE_MAX:
            break
        (target / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target / relative)
        count += 1
    return count


def tree(directory: Path) -> dict[str, bytes | None]:
    """Every file's bytes by path; None for a directory."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in directory.rglob("*")
        if path.relative_to(directory).parts[0] != "lost+found"
    }


class Daemon:
    """`replnbd serve` on the example's configuration, and its command line."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        config = (ROOT / "examples" / "replnbd.toml").read_text()
        # Another server may sit on NBD's port: let the system choose one.
        (directory / "replnbd.toml").write_text(config.replace(":10809", ":0"))
        with open(directory / "replnbd.log", "w") as log:
            self.process = subprocess.Popen(
                [REPLNBD, "serve", "replnbd.toml"], cwd=directory, stderr=log
            )

    def wait_ready(self) -> None:
        """Until the control socket answers."""
        deadline = time.monotonic() + WAIT_S
        while self.process.poll() is None and time.monotonic() < deadline:
            if self._run("status").returncode == 0:
                return
            time.sleep(0.05)
        raise SystemExit(f"replnbd does not serve:\n{self.log()}")

    def command(self, name: str) -> None:
        """Run `replnbd NAME --control ...` and show it."""
        tell(f"$ replnbd {name} --control qmp.sock")
        done = self._run(name)
        if done.returncode != 0:
            raise SystemExit(f"replnbd {name} failed: {done.stderr.strip()}\n{self.log()}")

    def disk(self) -> dict[str, object]:
        """The status of the one disk."""
        done = self._run("status", "--json")
        if done.returncode != 0:
            raise SystemExit(f"replnbd status failed: {done.stderr.strip()}\n{self.log()}")
        disk: dict[str, object] = json.loads(done.stdout)["disks"][0]
        return disk

    def wait_stage(self, wanted: str) -> None:
        """Until the disk is in a stage; any failure on the way ends the run."""
        deadline = time.monotonic() + WAIT_S
        while (disk := self.disk())["stage"] != wanted:
            if disk["error"] or time.monotonic() > deadline:
                raise SystemExit(f"stage {wanted} not reached: {disk}\n{self.log()}")
            time.sleep(0.02)

    def log(self) -> str:
        """What the daemon wrote so far."""
        return (self.directory / "replnbd.log").read_text()

    def end(self) -> int:
        """SIGTERM, and its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(WAIT_S)

    def _run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [REPLNBD, *arguments, "--control", "qmp.sock"]
        return subprocess.run(
            command, cwd=self.directory, text=True, capture_output=True, timeout=WAIT_S
        )


def make_primary(directory: Path) -> Machine:
    """The primary's disk, with real files on it."""
    files = directory / "primary-files"
    files.mkdir()
    count = real_files(files)
    image = directory / "primary.raw"
    options = ["-q", "-F", "-m", "0", "-E", "lazy_itable_init=0,lazy_journal_init=0"]
    command = ["mkfs.ext4", *options, "-d", str(files), str(image), f"{DISK_SIZE >> 10}k"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    tell(f"{count} files of Python's library on an ext4 of {DISK_SIZE >> 20} MiB: primary.raw")
    return Machine(image, files)


def story(directory: Path, daemon: Daemon, primary: Machine) -> Machine:
    """Steps 2 to 8, up to the end of the failover; returns what the standby has."""
    socket = str(directory / "nbd.sock")

    step(2, "replnbd serves: colo0 for the primary, top0 for the standby")
    tell("$ replnbd serve replnbd.toml")
    daemon.wait_ready()

    step(3, "The first synchronisation: the primary sends its whole disk to colo0")
    to_secondary = NbdClient(socket, "colo0")
    start = primary.image.read_bytes()
    tell(send(to_secondary, list(differences(bytes(DISK_SIZE), start))))
    prove("colo0 equals the primary's disk", to_secondary.read(0, DISK_SIZE) == start)

    step(4, "Replication starts, and the first checkpoint holds")
    daemon.command("start")
    view = NbdClient(socket, "top0")
    prove("top0 equals the primary's disk", view.read(0, DISK_SIZE) == start)

    step(5, "The primary works on: files written, replaced, removed")
    library = sorted(path.name for path in primary.files.glob("*.py"))
    changes = primary.change(
        write={"db/journal": bytes(range(256)) * 4000, library[3]: b"# rewritten\n" * 900},
        remove=library[4:8],
    )
    tell(f"sent to colo0: {send(to_secondary, changes)}")
    prove("top0 stood still: every byte as at the checkpoint", view.read(0, DISK_SIZE) == start)

    step(6, "A checkpoint moves the view")
    daemon.command("checkpoint")
    at_checkpoint = primary.image.read_bytes()
    prove("top0 equals the primary's disk as of now", view.read(0, DISK_SIZE) == at_checkpoint)

    step(7, "The standby works on top0 and writes, while the primary writes, too")
    standby = Machine(directory / "standby.raw", directory / "standby-files")
    shutil.copytree(primary.files, standby.files)
    standby.image.write_bytes(view.read(0, DISK_SIZE))
    own = standby.change(
        write={"standby/report": b"checked by the standby\n" * 5000, library[0]: b"# patched\n"},
        remove=library[10:12],
    )
    theirs = primary.change(
        write={"db/journal": bytes(reversed(range(256))) * 6000, library[1]: b"# newer\n"},
        remove=library[12:16],
    )
    half = len(theirs) // 2
    first = send(to_secondary, theirs[:half])
    tell(f"the standby wrote to top0:   {send(view, own)}")
    tell(f"the primary wrote to colo0:  {first}, then {send(to_secondary, theirs[half:])}")
    expected = standby.image.read_bytes()
    prove("top0 is the checkpoint plus the standby's writes", view.read(0, DISK_SIZE) == expected)
    latest = to_secondary.read(0, DISK_SIZE)
    prove("colo0 is the primary's disk, untouched by them", latest == primary.image.read_bytes())

    step(8, "The primary dies in the middle of its writes: failover")
    torn = primary.change(write={"db/torn": b"half of this arrives\n" * 50000}, remove=[])
    send(to_secondary, torn[: len(torn) // 2])
    tell(f"only {len(torn) // 2} of its last {len(torn)} writes arrived")
    daemon.command("failover")
    daemon.wait_stage("done")
    prove("the old primary is fenced: colo0 refuses it", refused(socket, to_secondary))
    prove("top0 kept every byte through the failover", view.read(0, DISK_SIZE) == expected)
    view.close()
    to_secondary.close()
    return standby


def refused(socket: str, client: NbdClient) -> bool:
    """Neither the old connection can write, nor can a new one be made."""
    try:
        client.write(0, bytes(BLOCK_SIZE))
    except OSError:
        pass
    else:
        return False
    try:
        NbdClient(socket, "colo0").close()
    except NbdError:
        return True
    return False


def check_result(directory: Path, standby: Machine) -> None:
    """The daemon is gone: look at its disk with e2fsprogs and plain eyes."""
    disk = directory / "colo0.raw"
    prove("colo0.raw equals the standby's disk", disk.read_bytes() == standby.image.read_bytes())
    fsck = subprocess.run(["e2fsck", "-fn", str(disk)], text=True, capture_output=True)
    prove("e2fsck -fn finds nothing to repair", fsck.returncode == 0)
    result = directory / "result-files"
    result.mkdir()
    subprocess.run(
        ["debugfs", "-R", f"rdump / {result}", str(disk)], capture_output=True, check=True
    )
    found, wanted = tree(result), tree(standby.files)
    prove(
        f"all {len(wanted)} files and directories are the standby's, byte by byte", found == wanted
    )


def main() -> None:
    """Tell the story in a new directory, and clean up; with --keep, leave all of it."""
    if sys.argv[1:] not in ([], ["--keep"]):
        print("usage: scripts/quickstart [--keep]", file=sys.stderr)
        raise SystemExit(2)
    directory = Path(tempfile.mkdtemp(prefix="replnbd-"))
    daemon = None
    try:
        step(1, f"A primary with a disk of real files, in {directory}")
        primary = make_primary(directory)
        with open(directory / "colo0.raw", "wb") as disk:
            disk.truncate(DISK_SIZE)
        daemon = Daemon(directory)
        standby = story(directory, daemon, primary)
        prove("the daemon ended in good order on SIGTERM", daemon.end() == 0)
        check_result(directory, standby)
    except BaseException:
        print(f"\nThe disks and the log are in {directory}", file=sys.stderr)
        raise
    finally:
        if daemon is not None and daemon.process.poll() is None:
            daemon.process.kill()
            daemon.process.wait()
    print(f"\nAll of it held, in {time.monotonic() - begin:.1f} s. {SUMMARY}")
    if sys.argv[1:]:
        print(f"Kept: {directory}")
    else:
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
