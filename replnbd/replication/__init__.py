"""Replication: the stages, a standby's disks and a primary's, the link between, and their groups.

Words (QEMU's). The *secondary disk* receives every write of the primary. The *hidden* overlay over
it holds the old data of what the primary has overwritten since the last checkpoint, the *active*
overlay over that holds the standby's own writes. The *view* is what the standby reads: active over
hidden over secondary. A *checkpoint* empties both overlays; a *failover* makes the view the disk.
A *fence* keeps a primary out that does not know that it is none any more.

What holds at every moment while the stage is *running*: the secondary disk equals the primary's
disk (every acknowledged write); the view is the secondary disk as it was at the last checkpoint,
plus the standby's own writes since.

A standby:

    stage.py   the stages and every transition, as data
    nodes.py   what the exports hold on to: gates, refusals, the split write of a failover
    disk.py    one disk: nodes, stage, jobs
    changes.py what has changed since the checkpoint, for dirty bitmaps
    group.py   the commands, over all disks or none (and group_steps.py)
    journal.py what a group is, in a file (record_file.py), for the process after this one
    keeper.py  writes it
    standby_peer.py    what its disk is to a primary, and after a failover to a standby of its own

A primary:

    primary.py, primary_group.py    one disk, and the commands over all
    link.py    the way to the copy, found and lost; session.py while there is one, target.py its end
    forwarder.py, in_flight.py    sends what is written on, and what is on its way
    link_mirror.py    the link as a mirror job that somebody has asked for

Both:

    lineage.py whose data a disk has, and so which may be overwritten with which
    history.py that, and what a peer may lack, in a file that goes with the disk
    peer.py    what two replnbd say to each other
"""

from replnbd.replication.changes import (
    CHECKPOINT_BITMAP,
    primary_changes,
    standby_changes,
    unproven_changes,
    unproven_runs,
)
from replnbd.replication.disk import StandbyDisk
from replnbd.replication.group import Group
from replnbd.replication.history import History, Role
from replnbd.replication.journal import (
    DiskRecord,
    Durability,
    FailoverTarget,
    FileStamp,
    Journal,
    Layer,
    Record,
)
from replnbd.replication.link import Link
from replnbd.replication.link_mirror import LinkMirror, MirrorTerms
from replnbd.replication.nodes import GateNode
from replnbd.replication.peer import (
    RESYNC_BITMAP,
    RESYNC_CONTEXT,
    NoDisk,
    PeerNode,
    Target,
    peer_export,
)
from replnbd.replication.primary import NoTarget, PrimaryDisk
from replnbd.replication.primary_group import PrimaryGroup
from replnbd.replication.session import LinkState
from replnbd.replication.stage import Command, Stage

__all__ = [
    "CHECKPOINT_BITMAP",
    "RESYNC_BITMAP",
    "RESYNC_CONTEXT",
    "Command",
    "DiskRecord",
    "Durability",
    "FailoverTarget",
    "FileStamp",
    "GateNode",
    "Group",
    "History",
    "Journal",
    "Layer",
    "Link",
    "LinkMirror",
    "LinkState",
    "MirrorTerms",
    "NoDisk",
    "NoTarget",
    "PeerNode",
    "PrimaryDisk",
    "PrimaryGroup",
    "Record",
    "Role",
    "Stage",
    "StandbyDisk",
    "Target",
    "peer_export",
    "primary_changes",
    "standby_changes",
    "unproven_changes",
    "unproven_runs",
]
