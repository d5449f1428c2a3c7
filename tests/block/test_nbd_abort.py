"""What a session that is given up leaves behind: nothing that reaches the server later on."""

from __future__ import annotations

import asyncio
import errno
import socket
from pathlib import Path

import pytest
from nbd_support import nbdkit, on_both_loops, settled

from replnbd.block import connect_nbd, parse_nbd_uri
from replnbd.nbd import constants as c

SENT = 4 << 20


@pytest.mark.interop
@on_both_loops
async def test_what_is_in_the_socket_of_an_aborted_session_is_not_sent_afterwards(
    short_dir: Path,
) -> None:
    """TCP keeps trying for a quarter of an hour: a server that is reached again by then would do
    what it was sent before what a new session sends."""
    loop = asyncio.get_running_loop()
    with nbdkit(short_dir, "memory", "16M"), socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.setblocking(False)
        target = parse_nbd_uri(f"nbd://127.0.0.1:{listener.getsockname()[1]}/disk")
        connecting = asyncio.ensure_future(connect_nbd(target))
        client, _ = await loop.sock_accept(listener)
        reader, writer = await asyncio.open_unix_connection(str(short_dir / "s"))

        async def there() -> None:
            while part := await loop.sock_recv(client, 4096):
                writer.write(part)

        async def back() -> None:
            while part := await reader.read(4096):
                await loop.sock_sendall(client, part)

        passing = [asyncio.ensure_future(there()), asyncio.ensure_future(back())]
        session = await connecting
        for task in passing:
            task.cancel()
        await asyncio.wait(passing)
        failures: list[OSError | None] = []
        session.submit(c.CMD_WRITE, 0, 0, SENT, payload=bytes(SENT), done=failures.append)
        await settled(0.1)  # until the socket takes no more
        session.abort(OSError(errno.ETIMEDOUT, "given up"))
        await session.close()
        assert len(failures) == 1
        received = 0
        reset = False
        try:
            while part := await loop.sock_recv(client, 1 << 20):
                received += len(part)
        except ConnectionResetError:
            reset = True
        assert reset
        assert received < SENT // 8
        client.close()
        writer.close()
