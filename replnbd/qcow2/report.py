"""CheckReport: what a check says about an image."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

FINDINGS_MAX = 1000
"""Lines kept in a report: enough to see the pattern; a destroyed image has millions."""


@dataclass
class CheckReport:
    """What a check found, and what a repair did about it."""

    filename: str
    corruptions: int = 0
    leaks: int = 0
    """Clusters whose refcount is too high."""
    corruptions_fixed: int = 0
    leaks_fixed: int = 0
    total_clusters: int = 0
    """Guest clusters of the disk."""
    allocated_clusters: int = 0
    fragmented_clusters: int = 0
    """Allocated, but not where the cluster before it in the same L2 table ends."""
    compressed_clusters: int = 0
    image_end_offset: int = 0
    """Bytes: the end of the last cluster in use."""
    findings: list[str] = field(default_factory=list)
    """One line each, in the order of the walk; at most FINDINGS_MAX."""
    findings_omitted: int = 0

    @property
    def clean(self) -> bool:
        """Nothing is wrong, or nothing any more."""
        return not self.corruptions and not self.leaks

    def note(self, text: str) -> None:
        """Add a finding."""
        if len(self.findings) < FINDINGS_MAX:
            self.findings.append(text)
        else:
            self.findings_omitted += 1

    def to_json(self) -> dict[str, Any]:
        """A JSON object with the keys of `qemu-img check --output=json`, and "findings"."""
        return {
            "filename": self.filename,
            "format": "qcow2",
            "check-errors": 0,
            "image-end-offset": self.image_end_offset,
            "total-clusters": self.total_clusters,
            "allocated-clusters": self.allocated_clusters,
            "fragmented-clusters": self.fragmented_clusters,
            "compressed-clusters": self.compressed_clusters,
            "corruptions": self.corruptions,
            "leaks": self.leaks,
            "corruptions-fixed": self.corruptions_fixed,
            "leaks-fixed": self.leaks_fixed,
            "findings": self.findings,
            "findings-omitted": self.findings_omitted,
        }
