"""What an examination comes to: plain frozen values, for people and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Severity = Literal["ok", "warning", "error"]

# By how bad they are.
SEVERITIES: tuple[Severity, ...] = ("ok", "warning", "error")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Parameters
    ----------
    check
        What was looked at: ``"packages"``, ``"store"``, ``"ports"``, …
    severity
        ``"ok"``; ``"warning"``: training will work, but slowly or not always; ``"error"``: it will not.
    where
        ``"cluster"``, ``"driver"``, or an executor, as in ``"executor 1 on 10.0.0.7"``.
    found
        What is there.
    remedy
        What to do; empty where there is nothing to do.
    """

    check: str
    severity: Severity
    where: str
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Allreduce:
    """How fast ranks averaged.

    Parameters
    ----------
    controller
        What they talked over, ``"gloo"`` or ``"mpi"``.
    ranks
        How many there were.
    latency_s
        Seconds that an array of a few bytes took: the median of the slowest rank.
    large_bytes, large_s
        The size of a large array, and seconds for it.
    """

    controller: str
    ranks: int
    latency_s: float
    large_bytes: int
    large_s: float

    @property
    def bandwidth_bytes_per_s(self) -> float:
        """What passed each rank's link: a ring sends an array ``2 (n - 1) / n`` times (as in NVIDIA's nccl-tests)."""
        return 2 * (self.ranks - 1) / self.ranks * self.large_bytes / self.large_s


@dataclass(frozen=True)
class Examination:
    """All that was found.

    Parameters
    ----------
    findings
        In the order in which they were looked at.
    executors
        The facts of every executor that answered, as its probe told them, by its name.
    allreduce
        How fast ranks averaged, where they could.
    """

    findings: tuple[Finding, ...]
    executors: Mapping[str, Mapping[str, Any]]
    allreduce: Allreduce | None = None

    @property
    def severity(self) -> Severity:
        """That of the worst finding."""
        return max((finding.severity for finding in self.findings), key=SEVERITIES.index, default="ok")

    def count(self, severity: Severity) -> int:
        """Count the findings of a severity."""
        return sum(finding.severity == severity for finding in self.findings)

    def to_plain(self) -> dict[str, Any]:
        """Return all of it as JSON values."""
        speed = None
        if self.allreduce is not None:
            speed = {**asdict(self.allreduce), "bandwidth_bytes_per_s": self.allreduce.bandwidth_bytes_per_s}
        return {
            "severity": self.severity,
            "findings": [asdict(finding) for finding in self.findings],
            "executors": {name: dict(facts) for name, facts in self.executors.items()},
            "allreduce": speed,
        }
