"""The NBD server: asyncio around the protocol core of `replnbd.nbd`.

    server = NbdServer(bus)
    server.add_export(Export("disk0", node))
    await server.listen("nbd://127.0.0.1:10809")
    ...
    await server.close()

Words. A *batch* is what one `recv` brought: requests that are parsed, run and answered together.
A request is *in flight* while its node operation is suspended; nearly all finish before that. A
*slab* is a buffer with a count of operations that still use it. *Holding* means not parsing what
arrived, because the peer does not read, too much is in flight, or the connection is to end. A
*fence* refuses an export to everyone, with a reason.

The life of a request, a 4 KiB WRITE of the primary while replication runs:

    Connection.buffer_updated      the bytes are in the Inbox; `_run` is one batch, and
      Requests.parse               its loop: unpack, check, and ask the export's node
      GateNode.pwrite_nowait       nobody has the range, so no lock is taken (replication/nodes.py)
      CopyBeforeWrite.pwrite_nowait        old data first (filters/copy_before_write.py):
        Qcow2Node.copy_up_nowait           is it saved? else read it, and (qcow2/image.py)
          first_touch_nowait               store it, then its L2 entry (qcow2/write.py)
        FileNode.pwrite_nowait             then the write itself (block/file.py)
    Outbox                         the reply is packed; one write sends those of the batch
    BusyPoll                       a short look for the next request, then the loop sleeps

Any of these may answer False, "not without waiting": then `parse` starts the coroutine `pwrite` of
the same nodes, which can do everything. It is driven eagerly (resume.py), and most often still
ends there; if it suspends, a task carries it on (operations.py). What is more than a plain READ or
WRITE always goes that way (requests.py, `_uncommon`), and is answered through Answers. What a reply
looks like (simple, structured, extended) was negotiated: `replnbd.nbd.Replies`.

Laws.
1. One batch, one `write`. No task, future, log line or copy for a request that does not suspend.
2. A node gets valid requests only (`replnbd.nbd.validate`), and is driven eagerly.
3. Bytes that an operation or the transport still uses are never overwritten: a slab is used anew
   only when no operation holds it and the transport has sent everything.
4. What one peer can make us hold is bounded: input, replies and operations (`limits.py` has the
   numbers). A peer that does not read stops being read, and is not waited for without end; nor is
   one whose host is gone (`deadlines.py`).
5. An operation that began ends, whether its client is still there or not; only its reply is lost.
6. A peer can end its own connection, and nothing else.
"""

from replnbd.server.connection import Connection
from replnbd.server.contexts import DirtyBitmap
from replnbd.server.export import Export, ExportStats
from replnbd.server.limits import WRITE_TIMEOUT_S
from replnbd.server.listener import parse_listen_uri
from replnbd.server.server import NbdServer
from replnbd.server.tls import Tls, TlsFiles

__all__ = [
    "WRITE_TIMEOUT_S",
    "Connection",
    "DirtyBitmap",
    "Export",
    "ExportStats",
    "NbdServer",
    "Tls",
    "TlsFiles",
    "parse_listen_uri",
]
