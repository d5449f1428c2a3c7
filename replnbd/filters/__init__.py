"""Filters: nodes over one other node that change some of its operations.

    CopyBeforeWrite   saves what a write is about to overwrite (the backup job's filter)
    QuorumNode        sends what is written on to a copy elsewhere
    FaultNode         fails chosen operations with chosen errors
    DelayNode         makes every operation wait, as a slow disk does

A filter knows nothing of what is below it, and forwards what it does not change (PassThrough).
FaultNode and DelayNode are how a bad disk is rehearsed, in tests and by library users.
"""

from replnbd.filters.copy_before_write import CopyBeforeWrite
from replnbd.filters.delay import DelayNode
from replnbd.filters.fault import FaultNode
from replnbd.filters.quorum import Copy, QuorumNode

__all__ = ["Copy", "CopyBeforeWrite", "DelayNode", "FaultNode", "QuorumNode"]
