"""Peers: the real programs and the small clients that tests drive replnbd and QEMU with.

    Disk           the files of one replicated disk; `qemu_img` makes and checks them
    NbdClient      a synchronous NBD client in plain Python: no libnbd between a test and the bytes
    RawClient      one that sends any bytes, in all shapes of requests and replies (nbd_wire.py)
    Libnbd         libnbd, in a process of the Python that has its module
    CountingProxy  between any client and a server: how many bytes travelled
    CuttingProxy   the same, and cuts, resets, silences, slows and refuses, as a test wants it
    QmpClient      a synchronous QMP client: every answer as it came, events kept
    Daemon         a process with its QMP, and an orderly end
    Process        a child process that is always killed, with its stderr in every failure
    Guest          a small Linux guest: the kernel's own NBD client
    Machine        a QEMU without a guest: its drives, its block nodes
    QemuPrimary    one whose disk is a quorum: with QEMU's filter (FilterPrimary) or PlainPrimary
    QemuSecondary  QEMU 7.2 with its own replication filter: the oracle
    ReplnbdDaemon  `replnbd serve` on a configuration of the test
    ReplnbdPrimary the same for one disk in mode primary
    Authority      signs certificates for tests of TLS
    run_replnbd    any `replnbd` command, run to its end

Everything here is synchronous and takes deadlines in seconds; nothing imports replnbd, so that
what judges the code shares none of it.
"""

from peers.certificates import Authority, Credentials
from peers.command import REPLNBD, Done, fingerprints, refusal, run_replnbd
from peers.counting_proxy import CountingProxy
from peers.cutting_proxy import CuttingProxy, Fault, random_faults
from peers.daemon import Daemon
from peers.disk import Disk, DiskFormat, qemu_img
from peers.guest import Guest
from peers.libnbd import Libnbd, LibnbdError, LibnbdProcess, ReadChunk
from peers.machine import Machine
from peers.nbd_client import NbdClient, NbdExport, NbdReplyError, list_exports
from peers.nbd_raw import RawClient
from peers.process import PeerError, Process, wait_until
from peers.proxy import End, Proxy, Traffic, Way
from peers.qemu import QemuDisk, QemuSecondary
from peers.qemu_primary import FilterPrimary, PlainPrimary, QemuPrimary
from peers.qmp_client import Answer, QmpClient
from peers.replnbd import ReplnbdDaemon, ReplnbdDisk
from peers.replnbd_primary import ReplnbdPrimary

__all__ = [
    "REPLNBD",
    "Answer",
    "Authority",
    "CountingProxy",
    "Credentials",
    "CuttingProxy",
    "Daemon",
    "Disk",
    "DiskFormat",
    "Done",
    "End",
    "Fault",
    "FilterPrimary",
    "Guest",
    "Libnbd",
    "LibnbdError",
    "LibnbdProcess",
    "Machine",
    "NbdClient",
    "NbdExport",
    "NbdReplyError",
    "PeerError",
    "PlainPrimary",
    "Process",
    "Proxy",
    "QemuDisk",
    "QemuPrimary",
    "QemuSecondary",
    "QmpClient",
    "RawClient",
    "ReadChunk",
    "ReplnbdDaemon",
    "ReplnbdDisk",
    "ReplnbdPrimary",
    "Traffic",
    "Way",
    "fingerprints",
    "list_exports",
    "qemu_img",
    "random_faults",
    "refusal",
    "run_replnbd",
    "wait_until",
]
