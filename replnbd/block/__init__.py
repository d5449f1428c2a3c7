"""The one interface that everything which holds bytes has: BlockNode.

Words. A *node* is an array of `size` bytes that can be read and written at any offset. A *filter*
is a node over one other node and changes some of its operations. An *overlay* is a node whose
unallocated ranges show its *backing* node. An *extent* is a run of bytes in one state. A *session*
is what an NBD client has with a server, from GO to its end: `NbdConnection` is one, and `NbdNode` a
node over one after the other.

Laws.
1. Every operation is a coroutine, and starts eagerly: whoever calls it may drive it with
   `coro.send(None)`. Nearly always it finishes without suspending, and then it was atomic.
   `pread_nowait` and `pwrite_nowait` are the same operations for whoever is in a hurry: one plain
   call that has done it, or says False. A node that has them still does everything without them.
2. Requests are validated once, where a peer's bytes enter (the NBD server, the public API):
   inside, `0 <= offset`, `offset + length <= size` and `length > 0` hold, and may be asserted.
3. An operation fails with OSError; `errno` decides what the client is told.
4. A buffer belongs to the caller again when the operation has finished, and not before.
5. After a flush has failed, none succeeds any more on that file: what was lost is not found again.
6. An operation that has begun must not be cancelled: whoever does not want to wait lets it run on
   (`asyncio.shield`). Cancelled all the same, it ends like a process that died: between two system
   calls, with the files in order and, in memory, perhaps not. Within replnbd nobody cancels one.
7. Nodes keep themselves coherent under overlapping requests; which of two overlapping writes
   wins is the caller's business, as on any disk.
"""

from replnbd.block.digest import GRANULE, digest_of, digests
from replnbd.block.dirty_map import DirtyMap
from replnbd.block.file import FileNode
from replnbd.block.memory import MemoryNode
from replnbd.block.nbd_connect import connect_nbd
from replnbd.block.nbd_connection import NbdConnection
from replnbd.block.nbd_uri import NbdTarget, is_nbd_uri, parse_nbd_uri
from replnbd.block.node import (
    STATUS_EXTENTS_MAX,
    BlockNode,
    Buffer,
    Extent,
    OverlayNode,
    PassThrough,
    each_extent,
    read_bytes,
)
from replnbd.block.range_lock import RangeLock
from replnbd.block.remote import NbdNode

__all__ = [
    "GRANULE",
    "STATUS_EXTENTS_MAX",
    "BlockNode",
    "Buffer",
    "DirtyMap",
    "Extent",
    "FileNode",
    "MemoryNode",
    "NbdConnection",
    "NbdNode",
    "NbdTarget",
    "OverlayNode",
    "PassThrough",
    "RangeLock",
    "connect_nbd",
    "digest_of",
    "digests",
    "each_extent",
    "is_nbd_uri",
    "parse_nbd_uri",
    "read_bytes",
]
