"""Jobs: work that goes on beside the requests, with a status, a progress and a speed limit.

    BackupJob   copy-before-write, from a start to a stop or failover
    CommitJob   moves what the overlays hold down into the secondary disk, after a failover
    MirrorJob   copies what a disk's standby lacks
    VerifyJob   compares a disk with its standby's, by digests

A job is an asyncio task with QEMU's life (qapi/job.json; see job.py). Every change of status is an
event. A job belongs to who made it: that one waits for its end, and is told of it even when a user
cancelled it. `JobRegistry` is where QMP finds them.
"""

from replnbd.jobs.backup import BackupJob
from replnbd.jobs.commit import CommitJob
from replnbd.jobs.job import Job, JobStatus
from replnbd.jobs.mirror import MirrorJob, MirrorTarget
from replnbd.jobs.registry import JobRegistry
from replnbd.jobs.verify import VerifyJob

__all__ = [
    "BackupJob",
    "CommitJob",
    "Job",
    "JobRegistry",
    "JobStatus",
    "MirrorJob",
    "MirrorTarget",
    "VerifyJob",
]
