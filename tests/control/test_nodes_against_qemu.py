"""The commands on nodes, to a QEMU that has three, and to ours: the same answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from control_fakes import FakeBackend, RawClient
from peers import Process, QmpClient

from replnbd.control import ControlServer
from replnbd.control.node_commands import _DRIVERS

pytestmark = [pytest.mark.interop, pytest.mark.slow]

NOWHERE = {"type": "unix", "path": "/nowhere/nbd.sock"}
INET = {"type": "inet", "host": "127.0.0.1", "port": "1"}
NBD = {"driver": "nbd", "node-name": "n", "server": NOWHERE}


class ThreeNodes(FakeBackend):
    """As the QEMU below: nodes a and b, and nothing with a connection."""

    def jobs(self) -> list[dict[str, Any]]:
        return []

    def block_nodes(self) -> list[dict[str, Any]]:
        return [{"node-name": name} for name in ("a", "b")]

    def yankable(self) -> list[str]:
        return []


@pytest.fixture(scope="module")
def qemu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[QmpClient]:
    folder = tmp_path_factory.mktemp("q")
    argv = ["qemu-system-x86_64", "-M", "none", "-display", "none", "-nodefaults", "-S"]
    process = Process(
        [*argv, "-qmp", f"unix:{folder}/qmp,server=on,wait=off"], log=folder / "qemu.log"
    )
    try:
        qmp = process.reach(lambda: QmpClient(folder / "qmp"))
        for name in ("a", "b"):
            (folder / name).write_bytes(bytes(1 << 20))
            file = {"driver": "file", "node-name": name, "filename": str(folder / name)}
            qmp.execute("blockdev-add", file)
        yield qmp
        qmp.close()
    finally:
        process.kill()


async def same(
    qemu: QmpClient, folder: Path, command: str, arguments: dict[str, Any]
) -> dict[str, Any]:
    """What both answer."""
    theirs = qemu.answer(command, arguments)
    server = ControlServer(ThreeNodes(), folder / "qmp.sock")
    await server.start()
    client = await RawClient.negotiated(server.path)
    message = {"execute": command, "arguments": arguments}
    ours: dict[str, Any] = json.loads(await client.ask(json.dumps(message).encode()))
    await client.close()
    await server.close()
    if theirs.ok:
        assert ours == {"return": theirs.value}
    else:
        assert ours == {"error": {"class": theirs.error_class, "desc": theirs.desc}}
    return ours


def without(*members: str) -> dict[str, Any]:
    return {name: value for name, value in NBD.items() if name not in members}


NO_TYPES: list[Any] = ["x", 5, "unix", "inet", None]
NO_SERVERS: list[Any] = [5, "x", [], None, {}]
BAD_ADDS: list[dict[str, Any]] = [
    {},
    {"driver": "nbd"},
    without("driver"),
    without("node-name"),
    without("server"),
    *({**NBD, "driver": value} for value in ("x", "", 5, None, "NBD")),
    *(
        {**NBD, "node-name": value}
        for value in ("a", "", "1n", "#n", "n n", "x" * 32, "-n", "_n", 5, None)
    ),
    *({**NBD, "server": value} for value in NO_SERVERS),
    *({**NBD, "server": {"type": value}} for value in NO_TYPES),
    {**NBD, "server": {"path": "/x"}},
    {**NBD, "server": {"type": "unix", "path": 5}},
    {**NBD, "server": {"type": "unix", "path": "/x", "y": 1}},
    {**NBD, "server": {"type": "unix", "path": "/x", "host": "h"}},
    {**NBD, "server": {"type": "inet", "host": "h"}},
    {**NBD, "server": {"type": "inet", "port": "1"}},
    {**NBD, "server": {"type": "inet", "host": "h", "port": 1}},
    {**NBD, "server": {"type": "inet", "host": 5, "port": 1}},
    {**NBD, "server": {**INET, "path": "/x"}},
    *({**NBD, "export": value} for value in (5, None, "x" * 4097)),
    *({**NBD, "detect-zeroes": value} for value in ("x", True, "unmap")),
    {**NBD, "detect-zeroes": "unmap", "discard": "ignore"},
    *({**NBD, "reconnect-delay": value} for value in (-1, "1", 1.5, True, 1 << 32, 1 << 64)),
    *({**NBD, "open-timeout": value} for value in (-1, None, 1 << 63, (1 << 64) - 1)),
    *({**NBD, "tls-creds": value} for value in ("x", 5)),
    {**NBD, "tls-creds": "x", "tls-hostname": "y"},
    *({**NBD, "discard": value} for value in ("x", 5)),
    *({**NBD, "cache": value} for value in (5, {"x": 1}, {"direct": 5}, {"no-flush": 1})),
    *({**NBD, name: 5} for name in ("read-only", "auto-read-only", "force-share", "tls-hostname")),
    {**NBD, "force-share": True},
    {**NBD, "bogus": 1},
    # The first that is wrong.
    {"driver": "x", "node-name": 5, "server": 5},
    {**NBD, "server": {"type": "inet"}, "export": 5, "bogus": 1},
    {**NBD, "export": 5, "bogus": 1},
    {**NBD, "node-name": 5, "discard": 5},
    {**NBD, "discard": 5, "cache": 5},
    {**NBD, "cache": 5, "read-only": 5},
    {**NBD, "read-only": 5, "auto-read-only": 5},
    {**NBD, "auto-read-only": 5, "force-share": 5},
    {**NBD, "force-share": 5, "detect-zeroes": 5},
    {**NBD, "detect-zeroes": 5, "server": 5},
    {**NBD, "server": 5, "export": 5},
    {**NBD, "export": 5, "tls-creds": 5},
    {**NBD, "tls-creds": 5, "tls-hostname": 5},
    {**NBD, "tls-hostname": 5, "reconnect-delay": "x"},
    {**NBD, "reconnect-delay": "x", "open-timeout": "x"},
    {**NBD, "cache": {"direct": 5, "no-flush": 5}},
]


@pytest.mark.parametrize("arguments", BAD_ADDS, ids=lambda arguments: json.dumps(arguments)[:60])
async def test_a_bad_blockdev_add_is_refused_in_the_same_words(
    qemu: QmpClient, short_dir: Path, arguments: dict[str, Any]
) -> None:
    assert "error" in await same(qemu, short_dir, "blockdev-add", arguments)


def test_the_drivers_that_are_known_are_qemus(qemu: QmpClient) -> None:
    for driver in _DRIVERS:
        answer = qemu.answer("blockdev-add", {"driver": driver, "bogus": 1})
        assert not answer.ok
        if answer.desc == f"Parameter 'driver' does not accept value '{driver}'":
            # Some are left out where QEMU was built without what they need.
            assert driver in ("host_cdrom", "blkio", "gluster", "iscsi", "rbd", "ssh", "nfs")


MIRROR = {"job-id": "r", "device": "a", "target": "b", "sync": "full"}
BAD_MIRRORS: list[dict[str, Any]] = [
    {},
    *({key: value for key, value in MIRROR.items() if key != name} for name in list(MIRROR)[1:]),
    *({**MIRROR, "sync": value} for value in ("x", "incremental", "bitmap", 5)),
    *({**MIRROR, "device": value} for value in ("nope", "", 5)),
    *({**MIRROR, "target": value} for value in ("nope", "a", 5)),
    {**MIRROR, "device": "nope", "target": "neither"},
    *({**MIRROR, "granularity": value} for value in (5, 513, 1000, 1 << 27, -1, 1 << 32, "x")),
    *({**MIRROR, "buf-size": value} for value in (-1, "x", 1.5)),
    *({**MIRROR, "on-target-error": value} for value in ("x", 5)),
    *({**MIRROR, "on-source-error": value} for value in ("x", None)),
    *({**MIRROR, "copy-mode": value} for value in ("x", 5)),
    *({**MIRROR, name: 5} for name in ("auto-dismiss", "auto-finalize", "job-id")),
    {**MIRROR, "filter-node-name": 5},
    {**MIRROR, "speed": "x"},
    {**MIRROR, "bitmap": "x"},
    {**MIRROR, "unmap": True},
    # The first that is wrong.
    {**MIRROR, "device": "nope", "granularity": 5, "sync": "bitmap"},
    {**MIRROR, "granularity": 5, "sync": "bitmap", "buf-size": -1},
    {**MIRROR, "sync": "bitmap", "buf-size": -1},
    {**MIRROR, "buf-size": -1, "target": "a"},
    {"job-id": 5, "device": 5, "target": 5},
    {**MIRROR, "sync": 5, "speed": "x"},
    {**MIRROR, "speed": "x", "granularity": "x"},
    {**MIRROR, "granularity": "x", "buf-size": "x"},
    {**MIRROR, "buf-size": "x", "on-source-error": "x"},
    {**MIRROR, "on-source-error": "x", "on-target-error": "y"},
    {**MIRROR, "on-target-error": "y", "filter-node-name": 5},
    {**MIRROR, "filter-node-name": 5, "copy-mode": "x"},
    {**MIRROR, "copy-mode": "x", "auto-finalize": 5},
    {**MIRROR, "auto-finalize": 5, "auto-dismiss": 5},
]


@pytest.mark.parametrize("arguments", BAD_MIRRORS, ids=lambda arguments: json.dumps(arguments))
async def test_a_bad_mirror_is_refused_in_the_same_words(
    qemu: QmpClient, short_dir: Path, arguments: dict[str, Any]
) -> None:
    assert "error" in await same(qemu, short_dir, "blockdev-mirror", arguments)


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("blockdev-del", {}),
        ("blockdev-del", {"node-name": "nope"}),
        ("blockdev-del", {"node-name": 5}),
        ("x-blockdev-change", {}),
        ("x-blockdev-change", {"parent": "nope"}),
        ("x-blockdev-change", {"parent": "nope", "node": "nope", "child": "x"}),
        ("x-blockdev-change", {"parent": "a"}),
        ("x-blockdev-change", {"parent": "a", "node": "b", "child": "x"}),
        ("x-blockdev-change", {"parent": "a", "node": "nope"}),
        ("x-blockdev-change", {"parent": 5}),
        ("x-blockdev-change", {"parent": "a", "child": 5, "node": 5}),
        ("x-blockdev-change", {"parent": "a", "node": 5}),
        ("x-blockdev-change", {"parent": "a", "node": "b", "x": 1}),
        ("yank", {}),
        ("yank", {"x": 1}),
        ("yank", {"instances": 5}),
        ("yank", {"instances": []}),
        ("yank", {"instances": [5]}),
        ("yank", {"instances": [{}]}),
        ("yank", {"instances": [{"type": "x"}]}),
        ("yank", {"instances": [{"type": 5}]}),
        ("yank", {"instances": [{"type": "block-node"}]}),
        ("yank", {"instances": [{"type": "block-node", "node-name": 5}]}),
        ("yank", {"instances": [{"type": "block-node", "node-name": "a"}]}),
        ("yank", {"instances": [{"type": "block-node", "node-name": "a", "x": 1}]}),
        ("yank", {"instances": [{"type": "block-node", "node-name": "a"}, 5]}),
        ("yank", {"instances": [{"type": "chardev", "id": "x"}]}),
        ("yank", {"instances": [{"type": "chardev"}]}),
        ("yank", {"instances": [{"type": "migration"}]}),
        ("yank", {"instances": [{"type": "migration", "x": 1}]}),
        ("yank", {"instances": [{"type": "block-node", "node-name": "a"}], "x": 1}),
    ],
    ids=str,
)
async def test_other_commands_on_nodes_answer_the_same(
    qemu: QmpClient, short_dir: Path, command: str, arguments: dict[str, Any]
) -> None:
    await same(qemu, short_dir, command, arguments)
