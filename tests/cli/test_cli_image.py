"""`replnbd image` as a process: what it makes, what it says, and how it ends, next to qemu-img."""

from __future__ import annotations

import json
import random
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
from peers import (
    Done,
    NbdClient,
    ReplnbdDaemon,
    ReplnbdDisk,
    fingerprints,
    qemu_img,
    refusal,
    run_replnbd,
)

pytestmark = [pytest.mark.interop, pytest.mark.slow]

KIB = 1 << 10
MIB = 1 << 20
CLUSTER = 64 * KIB

COUNTED = (
    "image-end-offset",
    "total-clusters",
    "allocated-clusters",
    "fragmented-clusters",
    "compressed-clusters",
    "check-errors",
    "corruptions",
    "leaks",
    "leaks-fixed",
)
"""Keys of `qemu-img check --output=json`, which leaves out what is 0. Its
"corruptions-fixed" counts repairs as QEMU makes them, not ours."""


def image(*arguments: str | Path, cwd: Path | None = None) -> Done:
    """Run `replnbd image`."""
    return run_replnbd("image", *arguments, cwd=cwd)


def said(done: Done) -> str:
    """What a command printed that was to succeed."""
    assert (done.status, done.stderr) == (0, "")
    return done.stdout


def said_json(*arguments: str | Path) -> Any:
    """The JSON that a command printed."""
    return json.loads(said(image(*arguments, "--json")))


def qemu_json(*arguments: str | Path) -> Any:
    """The JSON that qemu-img prints."""
    return json.loads(qemu_img(*arguments, "--output=json"))


def qemu_info(path: Path, *options: str) -> Any:
    """As `image info --json` should be: of the image, without its file."""
    info = qemu_json("info", *options, path)
    info.pop("children", None)  # since QEMU 8
    return info


def qemu_check(path: Path, *options: str) -> dict[str, int]:
    """What qemu-img counts, whatever it finds; its exit status says that, too."""
    argv = ["qemu-img", "check", "--output=json", *options, str(path)]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode in (0, 2, 3), done
    found = json.loads(done.stdout)
    return {key: found.get(key, 0) for key in COUNTED}


def counted(report: dict[str, Any]) -> dict[str, int]:
    """The same of our report."""
    return {key: report[key] for key in COUNTED}


def written(path: Path, *options: str) -> Path:
    """An image of 10 MiB with data at 1 MiB, zeroes at 2 MiB and more data in two other places, in
    a file without holes: those are zeroes to `qemu-img map`, wherever the data is."""
    qemu_img("create", "-q", "-f", "qcow2", *options, path, "10M")
    steps = ["write -P 1 1M 4k", "write -z 2M 64k", "write -P 2 5M 300k", "write -P 3 10481664 4k"]
    words = [word for step in steps for word in ("-c", step)]
    subprocess.run(["qemu-io", "-f", "qcow2", *words, path], check=True, capture_output=True)
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)
    subprocess.run(["sync", path], check=True)  # so that "actual-size" stands still
    return path


# Section: create


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ([], "extended_l2=on"),
        (["--no-extended-l2"], "extended_l2=off"),
        (["--cluster-size", "4K"], "cluster_size=4k"),
        (["--cluster-size", "512", "--refcount-bits", "1"], "cluster_size=512,refcount_bits=1"),
        (["--cluster-size", "2M", "--refcount-bits", "64"],
         "cluster_size=2M,refcount_bits=64,extended_l2=on"),
        (["--cluster-size", "16K", "--extended-l2"], "cluster_size=16k,extended_l2=on"),
        (["--version", "2"], "compat=0.10"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_create_makes_what_qemu_img_makes_and_info_says_so(
    ours: list[str], theirs: str, tmp_path: Path
) -> None:
    path, other = tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2"
    assert said(image("create", path, "10M", *ours)) == f"{path}: 10.0 MiB\n"
    qemu_img("check", "-q", "-f", "qcow2", path)
    info = qemu_info(path)
    qemu_img("create", "-q", "-f", "qcow2", "-o", theirs, other, "10M")
    for key in ("format", "virtual-size", "cluster-size", "dirty-flag", "format-specific"):
        assert info[key] == qemu_info(other)[key], key
    assert said_json("info", path) == info
    nothing = tmp_path / "nothing"
    nothing.write_bytes(bytes(10 * MIB))
    qemu_img("compare", "-f", "qcow2", "-F", "raw", path, nothing)


@pytest.mark.parametrize(
    ("size", "shown"),
    [("3072", "3.0 KiB"), ("7k", "7.0 KiB"), ("1536K", "1.5 MiB"), ("12M", "12.0 MiB"),
     ("3G", "3.0 GiB"), ("2T", "2.0 TiB")],
)  # fmt: skip
def test_a_size_means_what_it_means_to_qemu_img(size: str, shown: str, tmp_path: Path) -> None:
    path, other = tmp_path / "ours", tmp_path / "theirs"
    options = ["--cluster-size", "2M"]
    assert said(image("create", path, size, *options)) == f"{path}: {shown}\n"
    qemu_img("create", "-q", "-f", "qcow2", other, size)
    assert qemu_info(path)["virtual-size"] == qemu_info(other)["virtual-size"]
    qemu_img("check", "-q", "-f", "qcow2", path)


def test_an_overlay_takes_its_size_from_what_it_stands_on_and_shows_it(tmp_path: Path) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    content = random.Random(seed).randbytes(3 * MIB + 512)
    disk, lower, upper = (tmp_path / name for name in ("disk.raw", "lower.qcow2", "upper.qcow2"))
    disk.write_bytes(content)
    # A relative backing file is relative to the image, wherever the command runs.
    said(image("create", lower, "-b", "disk.raw", "-F", "raw", cwd=Path("/")))
    said(image("create", upper, "-b", "lower.qcow2", "-F", "qcow2", cwd=Path("/")))
    for path in (lower, upper):
        assert said_json("info", path) == qemu_info(path)
        assert said_json("info", path)["virtual-size"] == len(content)
        qemu_img("compare", "-f", "qcow2", "-F", "raw", path, disk)
        qemu_img("check", "-q", "-f", "qcow2", path)
    assert (
        said(image("map", upper))
        == f"{0:>16} +{len(content):<16} unallocated see the backing file\n"
    )


# Section: info, map


@pytest.mark.parametrize("options", ["", "compat=0.10", "extended_l2=on", "cluster_size=512"])
def test_info_map_and_check_print_the_json_of_qemu_img(options: str, tmp_path: Path) -> None:
    path = written(tmp_path / "image.qcow2", *(["-o", options] if options else []))
    before = path.read_bytes()
    assert said_json("info", path) == qemu_info(path)
    ours, theirs = said_json("map", path), qemu_json("map", path)
    for entry in (*ours, *theirs):
        entry.pop("compressed", None)  # QEMU has it since 8.2
    assert ours == theirs
    report = said_json("check", path)
    assert counted(report) == qemu_check(path)
    assert report["findings"] == []
    assert path.read_bytes() == before


def test_info_check_and_map_for_people(tmp_path: Path) -> None:
    path = written(tmp_path / "image.qcow2")
    size = path.stat().st_blocks * 512
    assert said(image("info", path)).splitlines() == [
        f"filename: {path}",
        "format: qcow2",
        "virtual-size: 10.0 MiB (10485760 bytes)",
        "cluster-size: 64.0 KiB (65536 bytes)",
        "dirty-flag: False",
        f"actual-size: {size / KIB:.1f} KiB ({size} bytes)",
        "format-specific:",
        "    type: qcow2",
        "    data:",
        "        compat: 1.1",
        "        compression-type: zlib",
        "        refcount-bits: 16",
        "        lazy-refcounts: False",
        "        corrupt: False",
        "        extended-l2: False",
    ]
    assert said(image("check", path)) == f"{path}: no errors, 7 of 160 clusters allocated\n"
    runs = [line.split() for line in said(image("map", path)).splitlines()]
    assert [(int(line[0]), int(line[1]), line[2]) for line in runs] == [
        (0, MIB, "zeroes"),
        (MIB, CLUSTER, "data"),
        (MIB + CLUSTER, MIB - CLUSTER, "zeroes"),
        (2 * MIB, CLUSTER, "zeroes"),
        (2 * MIB + CLUSTER, 3 * MIB - CLUSTER, "zeroes"),
        (5 * MIB, 5 * CLUSTER, "data"),
        (5 * MIB + 5 * CLUSTER, 5 * MIB - 6 * CLUSTER, "zeroes"),
        (10 * MIB - CLUSTER, CLUSTER, "data"),
    ]
    at = [int(entry["offset"]) for entry in qemu_json("map", path) if entry["data"]]
    assert [int(line[-1]) for line in runs if line[2] == "data"] == at


# Section: every error is one line


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("create taken.qcow2 1M", "cannot create taken.qcow2: File exists"),
        ("create no-dir/x 1M", "cannot create no-dir/x: No such file or directory"),
        ("create x 1M --cluster-size 1000", "cluster size is 1000: must be a power of two"),
        ("create x 1M --refcount-bits 3", "refcount bits is 3: must be a power of two"),
        ("create x 1M --version 2 --extended-l2", "extended L2 entries need version 3"),
        ("create x 1M --version 2 --refcount-bits 64", "refcount bits is 64: version 2 images"),
        ("create x 99999999P", "size is 112589989558362493157376: must be 0 to"),
        ("create x 1M -b taken.qcow2", "backing file taken.qcow2 needs a backing format"),
        ("create x -b missing -F raw", "cannot open missing: No such file or directory"),
        ("create x -b disk.raw -F qcow2", "disk.raw: magic is 0x00000000: not a qcow2 image"),
        ("info missing", "cannot open missing: No such file or directory"),
        ("check disk.raw", "disk.raw: magic is 0x00000000: not a qcow2 image"),
        ("map .", "cannot open .: neither a regular file nor a block device"),
        ("check --repair all future", "future: version is 9:"),
        ("info short", "short:"),
    ],
)  # fmt: skip
def test_a_failure_is_one_line_and_status_1_and_changes_nothing(
    command: str, line: str, tmp_path: Path
) -> None:
    taken = tmp_path / "taken.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", taken, "1M")
    header = bytearray(taken.read_bytes())
    (tmp_path / "short").write_bytes(header[:50])
    header[4:8] = struct.pack(">I", 9)
    (tmp_path / "future").write_bytes(header)
    (tmp_path / "disk.raw").write_bytes(bytes(MIB))
    before = fingerprints(tmp_path)
    told = refusal(image(*command.split(), cwd=tmp_path))
    assert told.startswith(f"replnbd: {line}")
    assert fingerprints(tmp_path) == before


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("create x", "SIZE is missing, and no --backing-file with its format"),
        ("create x ten", "'ten' is no size: use bytes, or a suffix K, M, G, T, P"),
        ("create x 1M --version 4", "Invalid value for '--version': 4 is not in the range"),
        ("create x 1M -b a -F vmdk", "'vmdk' is not one of 'raw', 'qcow2'"),
        ("check --repair some x", "'some' is not one of 'leaks', 'all'"),
        ("check -U --repair all x", "--repair needs the image for itself: no --force-share"),
        ("info", "Missing argument 'FILE'"),
        ("map x y", "Got unexpected extra argument (y)"),
        ("frob x", "No such command 'frob'"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_status_2(
    command: str, line: str, tmp_path: Path
) -> None:
    told = refusal(image(*command.split(), cwd=tmp_path), status=2)
    assert line in told
    assert "--help')" in told
    assert not list(tmp_path.iterdir())


# Section: check and repair


class Damaged:
    """A copy of an image with its metadata in reach."""

    def __init__(self, source: Path) -> None:
        self.data = bytearray(source.read_bytes())
        self.data += bytes(-len(self.data) % CLUSTER)
        self.l1 = self.word(40)
        self.refcounts = self.word(self.word(48))

    def word(self, offset: int) -> int:
        """A 64-bit word of the file."""
        return int(struct.unpack_from(">Q", self.data, offset)[0])

    def put_word(self, offset: int, value: int) -> None:
        """Change one."""
        struct.pack_into(">Q", self.data, offset, value)

    def put_refcount(self, offset: int, value: int) -> None:
        """Of the cluster at `offset` of the file; 16 bits wide."""
        struct.pack_into(">H", self.data, self.refcounts + offset // CLUSTER * 2, value)

    def leak(self, count: int) -> None:
        """Clusters that are counted and that nothing refers to."""
        for _ in range(count):
            self.put_refcount(len(self.data), 1)
            self.data += bytes(CLUSTER)


def test_leaks_are_told_and_given_back(tmp_path: Path) -> None:
    source, path, theirs = written(tmp_path / "source"), tmp_path / "leaky", tmp_path / "theirs"
    damaged = Damaged(source)
    damaged.leak(3)
    path.write_bytes(damaged.data)
    shutil.copy(path, theirs)

    found = image("check", path)
    told = f"replnbd: {path}: 0 corruptions, 3 leaked clusters; --repair puts right what can be\n"
    assert (found.status, found.stderr) == (1, told)
    assert found.stdout.startswith("leaked 3 clusters at 0x")
    found = image("check", "--json", path)
    assert (found.status, found.stderr) == (1, told)
    assert counted(json.loads(found.stdout)) == qemu_check(path)
    assert path.read_bytes() == damaged.data

    repaired = said_json("check", "--repair", "leaks", path)
    assert counted(repaired) == qemu_check(theirs, "-r", "leaks")
    assert repaired["leaks-fixed"] == 3
    qemu_img("check", "-q", "-f", "qcow2", path)
    qemu_img("compare", "-f", "qcow2", "-F", "qcow2", source, path)
    assert said(image("check", path)) == f"{path}: no errors, 7 of 160 clusters allocated\n"


def test_a_corrupt_image_is_repaired_by_all_and_left_alone_by_leaks(tmp_path: Path) -> None:
    source, path = written(tmp_path / "source"), tmp_path / "corrupt"
    damaged = Damaged(source)
    damaged.leak(2)
    l2 = damaged.word(damaged.l1) & 0x00FF_FFFF_FFFF_FE00
    data = damaged.word(l2 + MIB // CLUSTER * 8) & 0x00FF_FFFF_FFFF_FE00
    damaged.put_refcount(data, 0)
    path.write_bytes(damaged.data)

    found = image("check", "--json", path)
    assert (found.status, len(found.stderr.splitlines())) == (1, 1)
    assert counted(json.loads(found.stdout)) == qemu_check(path)
    assert path.read_bytes() == damaged.data

    found = image("check", "--repair", "leaks", path)
    told = f"replnbd: {path}: 2 corruptions, "
    assert found.status == 1
    assert found.stderr.startswith(told)
    assert len(found.stderr.splitlines()) == 1
    assert qemu_check(path)["corruptions"] == 2

    text = said(image("check", "--repair", "all", path)).splitlines()
    assert text[-1] == f"{path}: no errors, 7 of 160 clusters allocated"
    assert text[-2].startswith("repaired: 2 corruptions and ")
    qemu_img("check", "-q", "-f", "qcow2", path)
    qemu_img("compare", "-f", "qcow2", "-F", "qcow2", source, path)


def test_what_cannot_be_repaired_is_told_and_not_touched(tmp_path: Path) -> None:
    source, path = written(tmp_path / "source"), tmp_path / "hopeless"
    damaged = Damaged(source)
    damaged.put_word(damaged.l1, damaged.word(damaged.l1) | 0x200)
    path.write_bytes(damaged.data)
    for repair in ("leaks", "all"):
        found = image("check", "--repair", repair, path)
        assert found.status == 1
        assert "points to an offset that is not aligned to 65536 bytes" in found.stdout
        (line,) = found.stderr.splitlines()
        assert line.startswith(f"replnbd: {path}: 1 corruptions, ")
        assert path.read_bytes() == damaged.data


# Section: an image that a daemon holds


def test_an_image_in_use_is_shown_with_force_share_only_and_never_repaired(
    short_dir: Path,
) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    content = rng.randbytes(MIB)
    disk = ReplnbdDisk.create(short_dir, "colo0", "top0", content, "qcow2")
    with ReplnbdDaemon(short_dir, [disk]) as daemon:
        daemon.qmp.execute("xen-set-replication", {"enable": True, "primary": False})
        with daemon.connect("colo0") as primary, daemon.connect("top0") as view:
            expected = use(primary, view, rng, bytearray(content))
            images = (disk.active, disk.hidden, disk.secondary)
            before = [path.read_bytes() for path in images]
            for path in images:
                for command in (["info"], ["check", "--repair", "all"]):
                    told = refusal(image(*command, path))
                    assert told.startswith(f"replnbd: {path} is in use by another process"), told
                assert said_json("info", "-U", path) == qemu_info(path, "-U")
                report = said_json("check", "--force-share", path)
                assert report["corruptions"] == report["leaks"] == 0
                ours = [entry for entry in said_json("map", "-U", path) if entry["data"]]
                theirs = [
                    entry
                    for entry in qemu_json("map", "-U", path)
                    if entry["data"] and entry["depth"] == 0
                ]
                assert [(e["start"], e["length"], e["offset"]) for e in ours] == [
                    (e["start"], e["length"], e["offset"]) for e in theirs
                ]
            assert [path.read_bytes() for path in images] == before
            # It goes on as if nobody had looked.
            primary.pwrite(0, b"p" * 1000)
            assert view.pread(0, len(expected)) == expected
        daemon.quit()


def use(primary: NbdClient, view: NbdClient, rng: random.Random, expected: bytearray) -> bytearray:
    """Some writes of both sides, flushed; what the view shows then."""
    for _ in range(20):
        primary.pwrite(rng.randrange(MIB - 5000), rng.randbytes(5000))
        offset, data = rng.randrange(MIB - 5000), rng.randbytes(5000)
        view.pwrite(offset, data)
        expected[offset : offset + len(data)] = data
    primary.flush()
    view.flush()
    assert view.pread(0, MIB) == expected
    return expected
