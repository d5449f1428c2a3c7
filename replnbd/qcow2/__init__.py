"""The image engine: qcow2 versions 2 and 3 as a block node that can be written to.

Words. A *guest offset* is one in the virtual disk, a *host offset* one in the image file. Both are
cut into *clusters*. Guest clusters are mapped by an *L1 table* that points to *L2 tables*, whose
entries point to host clusters. With *extended L2 entries* a cluster has 32 *subclusters*, each
*allocated*, *zero* or *unallocated* by itself; then the *backing* node shows. *Refcounts* say how
often a host cluster is referred to; free means 0. *COPIED* marks an entry whose cluster may be
written in place: its refcount is exactly one.

Laws.
1. Metadata is written through, each change with one small pwrite, in an order that a process may
   die within at any instant: a refcount before the cluster's first use; data, and the content of
   a new L2 table, before the entry that refers to it; the entry gone before the refcount drops.
   What is cut short leaks clusters. It never uses one twice, and never shows bytes that nobody
   wrote there.
2. A store that fails changes nothing in memory, and the file is put back to what memory says; the
   request fails with that errno, and the next ones work.
3. After a flush, refcounts are exact: `qemu-img check` finds neither errors nor leaks.
4. Nothing read from a file is trusted: offsets, reserved bits, lengths, refcounts. What is wrong
   fails the request with EIO, marks the image corrupt, and stops all writing to it.
5. A request costs the same whatever the size of the disk; memory is bounded by the cache.

Power failure. Between two flushes the file system may keep stores or lose them, in any order, torn
at any sector. An image that is opened `power_safe` can bear that, by two more laws:
6. No store refers to what is not durable, and nothing is used again before it is durable that
   nothing refers to it: a flush in between, shared by all who wait for one (FileNode).
7. Refcounts alone are in no order. The dirty bit is on disk while the image is open (version 3),
   and whoever opens it next counts anew.

    open, create, check, inspect    what one calls
    image                           the node: fast paths, range lock
    read, write, copy_up, zeroes, empty, status, compressed      the verbs
    reclaim                         space and memory that go back in the background
    recount                         refcounts after a death, fast
    state                           an open image's parts, and the lookups the verbs share
    mapping                         the L1 table, cached L2 slices, and the stores to them
    refcounts, allocation           which host clusters are free, and taking them in runs
    host                            the file below, and what must never be overwritten in it
    entries, header, format         what bytes mean, and which are wrong
"""

from replnbd.qcow2.check import CheckReport, check_image, repair_image
from replnbd.qcow2.create import create_image, create_qcow2
from replnbd.qcow2.format import read_header
from replnbd.qcow2.header import Header
from replnbd.qcow2.image import Qcow2Node
from replnbd.qcow2.open import LastEnd, open_qcow2

__all__ = [
    "CheckReport",
    "Header",
    "LastEnd",
    "Qcow2Node",
    "check_image",
    "create_image",
    "create_qcow2",
    "open_qcow2",
    "read_header",
    "repair_image",
]
