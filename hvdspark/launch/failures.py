"""How ranks end without a result, and the one error that the driver makes of all that failed."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from hvdspark.errors import (
    HvdSparkError,
    LaunchError,
    LaunchTimeoutError,
    RendezvousError,
    StageLostError,
    WorkerFailedError,
    from_plain,
)
from hvdspark.launch.answers import SILENCE_S, LifeSign
from hvdspark.plan import RankContext

FailureKind = Literal[
    "user", "peer", "cut", "died", "stalled", "meet", "unmet", "system", "start", "killed", "late", "data"
]


@dataclass(frozen=True)
class Failure:
    """Why a rank did not finish.

    Parameters
    ----------
    rank, host
        Which one, and where.
    kind
        ``"user"``: an exception in what the rank ran; ``"peer"``: it noticed that another rank was gone; ``"cut"``: the
        same, where all that is known is that a connection ended; ``"died"``:
        the process ended by a signal or exit; ``"stalled"``: it was stopped, or did not move on; ``"meet"``: the tasks
        did not find each other, and would not another time; ``"unmet"``: one of them did not come; ``"system"``: a
        network or a disk failed before that; ``"start"``: the process ended by itself before it began its work;
        ``"killed"``: it was killed before that; ``"late"``: it did not begin in time; ``"data"``: the rows that
        came with the tasks cannot be trained on.
    error
        Type and message of the exception, or what happened to the process; for ``"data"`` the exception as JSON.
    details
        The traceback, or what the threads were doing, where that is known.
    log_tail
        The last lines the rank wrote.
    time
        When it was noticed, in seconds since the epoch by that host's clock.
    sign
        The last sign of life of a rank that was ended because another failed, or because it stalled.
    left
        What of it could not be ended, where that is so.
    """

    rank: int
    host: str
    kind: FailureKind
    error: str
    details: str = ""
    log_tail: str = ""
    time: float = 0.0
    sign: LifeSign | None = None
    left: str = ""

    def to_json(self) -> str:
        """Write the failure as JSON text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Failure:
        """Read what :meth:`to_json` wrote."""
        values: dict[str, Any] = json.loads(text)
        sign = values.pop("sign")
        return cls(**values, sign=None if sign is None else LifeSign(**sign))

    @classmethod
    def before(cls, exc: HvdSparkError | OSError, context: RankContext, *, have_met: bool = True) -> Failure:
        """Describe what was wrong before the rank had its work, and before or after the tasks had met."""
        if isinstance(exc, OSError):
            return cls(context.rank, context.host, "system", f"{type(exc).__name__}: {exc}", time=time.time())
        if isinstance(exc, RendezvousError):
            # Who does not reach the first rank then knows why; who waits for a task that does not come, does not.
            passing: FailureKind = "system" if have_met else "unmet"
            return cls(context.rank, context.host, passing if exc.is_passing else "meet", str(exc), time=time.time())
        return cls(context.rank, context.host, "data", json.dumps(exc.to_plain()), time=time.time())


@dataclass(frozen=True)
class Outcome:
    """How a rank ended: its result's bytes, or its failure."""

    result: bytes | None = None
    failure: Failure | None = None


# A rank that died is the cause rather than those that raised because it was gone; of several causes the first in time.
_SEVERITY = {
    **dict.fromkeys(("user", "meet", "system", "data", "killed"), 0),
    **dict.fromkeys(("late", "died", "start"), 1),
    **dict.fromkeys(("cut", "unmet"), 2),
    **dict.fromkeys(("stalled", "peer"), 3),
}

# Another attempt may go well.
_PASSING = ("unmet", "system", "killed", "died", "cut", "stalled", "peer")

# Those of ranks that did not come to their work.
_NEVER_RAN = {
    "meet": RendezvousError,
    "unmet": RendezvousError,
    "system": RendezvousError,
    "start": LaunchError,
    "killed": LaunchError,
    "late": LaunchTimeoutError,
}


def first_cause(failures: Sequence[Failure]) -> Failure:
    """Return the failure that the others followed from.

    Where ranks only waited for each other, that is the one which stood still itself, else the one that was furthest
    behind: those that wait in a collective have moved on from where it is.
    """

    def order(failure: Failure) -> tuple[float, ...]:
        severity, sign = _SEVERITY[failure.kind], failure.sign
        if sign is None or severity < _SEVERITY["stalled"]:
            return severity, 0, 0, failure.time
        # How long ranks have waited is told by clocks of their own; when each said so is not.
        return severity, not sign.is_silent, sign.moves, -max(sign.idle_s, sign.silent_s)

    return min(failures, key=order)


def error_of(failures: Sequence[Failure], logs: str | None = None) -> HvdSparkError:
    """Make one error of all failures, which begins with the one that came first on its own account.

    Parameters
    ----------
    failures
        Those of all ranks that failed.
    logs
        Where the ranks' logs are.
    """
    first = first_cause(failures)
    if first.kind == "data":
        return from_plain(json.loads(first.error))
    parts = [f"rank {first.rank} on {first.host}: {_described(first)}"]
    if first.details:
        parts.append(first.details.rstrip())
    if first.log_tail:
        parts.append(f"Last lines of rank {first.rank}:\n{first.log_tail}")
    if logs is not None:
        parts.append(f"Logs of all ranks: {logs}")
    text = "\n\n".join(parts)
    is_passing = first.kind in _PASSING
    if first.kind in _NEVER_RAN:
        return _NEVER_RAN[first.kind](text, is_passing=is_passing)
    return WorkerFailedError(
        text,
        failures={failure.rank: failure.error for failure in failures},
        root_cause=first.rank,
        log_tail=first.log_tail,
        is_passing=is_passing,
        noticed=first.time,
    )


# How Spark says that a process or a host is gone, rather than that something in it raised an error.
_LOST = re.compile(r"ExecutorLostFailure|Python worker exited unexpectedly|FetchFailed|executor \S+ (?:lost|exited)")
_CANCELLED = re.compile(r"\bJob \S+ cancelled\b|SPARK_JOB_CANCELLED")


def lost_stage(exc: Exception) -> StageLostError:
    """Translate an exception of Spark's own: the stage as a whole was lost, not the work of a rank."""
    text = str(exc).strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(exc).__name__]
    said = next((line for line in lines if _LOST.search(line)), lines[0])
    return StageLostError(
        f"the barrier stage was lost: {said}. An executor may have died or the job was cancelled; Spark's own log"
        " tells more.",
        is_passing=_LOST.search(text) is not None and "cancelled" not in text,
        is_cancelled=_CANCELLED.search(text) is not None,
    )


def _described(failure: Failure) -> str:
    """Return what happened; of a rank that was given up together with all others, that it stood still."""
    stood_still = "" if failure.kind != "peer" or failure.sign is None else failure.sign.stall(SILENCE_S)
    return "; ".join(filter(None, (stood_still or failure.error, failure.left)))
