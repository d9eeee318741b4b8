"""Which of several failures is the cause, and what the driver says of it."""

from __future__ import annotations

import socket

import pytest

from hvdspark.errors import LaunchError, LaunchTimeoutError, RendezvousError, WorkerFailedError
from hvdspark.launch.alarm import Alarm
from hvdspark.launch.answers import LifeSign
from hvdspark.launch.failures import Failure, FailureKind, error_of, first_cause, lost_stage
from hvdspark.plan import RankContext

WAITING = "HorovodInternalError: Timed out waiting 30000ms for recv operation to complete"


def failure(rank: int, kind: FailureKind, time: float = 0.0, sign: LifeSign | None = None, error: str = "") -> Failure:
    return Failure(rank, f"host{rank}", kind, error or f"{kind} of rank {rank}", time=time, sign=sign)


def test_a_failure_survives_its_way_to_the_driver() -> None:
    sent = failure(3, "stalled", 1.5, LifeSign(7, "epoch 1, step 2", 31.0, 0.5))
    assert Failure.from_json(sent.to_json()) == sent
    assert Failure.from_json(failure(1, "died").to_json()) == failure(1, "died")


@pytest.mark.parametrize(
    ("failures", "cause"),
    [
        # The one that raised, not those that were killed afterwards, whatever their clocks say.
        ([failure(0, "died", 1), failure(1, "user", 5)], 1),
        ([failure(0, "peer", 1, LifeSign(1)), failure(1, "died", 2)], 1),
        ([failure(0, "user", 7), failure(1, "user", 6)], 1),
        # All waited: the one that is furthest behind made the others wait, whoever said so first.
        ([failure(0, "stalled", 1, LifeSign(9, idle_s=30)), failure(1, "peer", 2, LifeSign(8, idle_s=30.1))], 1),
        ([failure(0, "peer", 1, LifeSign(8, idle_s=31)), failure(1, "peer", 2, LifeSign(9, idle_s=31))], 0),
        # One that stands still as a process did not get anywhere, although it may have been ahead.
        ([failure(0, "peer", 1, LifeSign(8, idle_s=30)), failure(1, "peer", 2, LifeSign(9, "", 30, 30))], 1),
        # Within the same step: the one that has stood still for longer.
        ([failure(0, "stalled", 1, LifeSign(8, idle_s=30)), failure(1, "stalled", 1, LifeSign(8, idle_s=31))], 1),
        # Who only lost a connection noticed it before those who waited, but did not end by itself.
        ([failure(0, "peer", 1, LifeSign(8, idle_s=30)), failure(1, "cut", 2, LifeSign(9, idle_s=30))], 1),
        ([failure(0, "cut", 1, LifeSign(8)), failure(1, "died", 31)], 1),
        # One that never answered is why the others did not meet.
        ([failure(0, "unmet", 1), failure(1, "died", 16), failure(2, "unmet", 1)], 1),
        # One that does not reach the first rank says so; that one has not heard of it, and is given up.
        ([failure(0, "died", 46), failure(1, "system", 31)], 1),
        # A rank that died is the cause of others' waiting.
        ([failure(0, "stalled", 1, LifeSign(8, idle_s=30)), failure(1, "died", 31)], 1),
    ],
)
def test_the_cause_is_what_the_others_followed_from(failures: list[Failure], cause: int) -> None:
    assert first_cause(failures).rank == cause
    assert first_cause(failures[::-1]).rank == cause


def test_a_rank_that_only_its_peers_complained_of_is_named_with_what_it_was_doing() -> None:
    stood_still = failure(1, "peer", 2, LifeSign(4, "epoch 2, step 9, after it", 30.4), "stopped, because another rank")
    error = error_of([failure(0, "peer", 1, LifeSign(5, idle_s=30), WAITING), stood_still], "file:///logs")
    assert isinstance(error, WorkerFailedError)
    first = "rank 1 on host1: the training did not move on for 30 s (epoch 2, step 9, after it)"
    assert str(error).splitlines()[0] == first
    assert "Logs of all ranks: file:///logs" in str(error)
    assert error.is_passing
    assert error.noticed == 2
    assert error.failures[0] == WAITING


@pytest.mark.parametrize("kind", ["stalled", "peer"])
def test_what_could_not_be_ended_is_told_with_what_happened(kind: FailureKind) -> None:
    left = "process 7 (state D) cannot be killed; a file system or a device of host1 may not answer it"
    silent = Failure(1, "host1", kind, "stopped", time=2, sign=LifeSign(3, "", 30, 30), left=left)
    assert Failure.from_json(silent.to_json()) == silent
    first = str(error_of([silent, failure(0, "peer", 1, LifeSign(4, idle_s=30))])).splitlines()[0]
    assert first.startswith("rank 1 on host1: ")
    assert first.endswith(f"; {left}")


def test_ranks_whose_connection_broke_keep_their_own_words() -> None:
    broken = "HorovodInternalError: Connection closed by peer"
    error = error_of([failure(0, "peer", 1, LifeSign(5), broken), failure(1, "peer", 2, LifeSign(5), broken)])
    assert str(error).startswith("rank 0 on host0: HorovodInternalError: Connection closed by peer")


def test_a_rank_that_lost_a_connection_says_so_however_long_it_had_waited() -> None:
    lost = "stopped, because the connection to rank 1 on host1 was lost"
    error = error_of([failure(0, "cut", 1, LifeSign(8, idle_s=11.0), lost)])
    assert str(error) == f"rank 0 on host0: {lost}"
    assert isinstance(error, WorkerFailedError)
    assert error.is_passing


@pytest.mark.parametrize(
    ("said", "is_passing", "is_cancelled"),
    [
        ("Stage failed.\nExecutorLostFailure (executor 1 exited) Reason: Remote RPC client disassociated", True, False),
        ("[SPARK_JOB_CANCELLED] Job 3 cancelled as part of cancellation of all jobs SQLSTATE: XXKDA", False, True),
        ("Job 0 cancelled because SparkContext was shut down", False, True),
        ("Task not serializable: java.io.NotSerializableException: concurrent.futures.CancelledError", False, False),
    ],
)
def test_what_spark_says_of_a_lost_stage_is_told_by_its_telling_line(
    said: str, is_passing: bool, is_cancelled: bool
) -> None:
    error = lost_stage(RuntimeError(f"An error occurred while calling o1.collectToPython.\n{said}"))
    assert (error.is_passing, error.is_cancelled) == (is_passing, is_cancelled)
    assert ("ExecutorLostFailure (executor 1 exited)" in str(error)) == is_passing


def test_ranks_that_never_began_are_no_failure_of_their_work() -> None:
    assert isinstance(error_of([failure(0, "late", 1, LifeSign(), "did not begin within 5 s")]), LaunchTimeoutError)


@pytest.mark.parametrize(
    ("kind", "error", "is_passing"),
    [
        ("killed", LaunchError, True),
        ("start", LaunchError, False),
        ("system", RendezvousError, True),
        ("meet", RendezvousError, False),
        ("unmet", RendezvousError, True),
        ("late", LaunchTimeoutError, False),
    ],
)
def test_a_launch_may_be_tried_again_where_it_was_not_the_ranks_own_doing(
    kind: FailureKind, error: type[LaunchError], is_passing: bool
) -> None:
    found = error_of([failure(0, "peer", 1), failure(1, kind, 2)])
    assert type(found) is error
    assert found.is_passing == is_passing
    assert str(found) == f"rank 1 on host1: {kind} of rank 1"


def test_a_network_that_fails_before_the_work_is_no_mistake_of_anybodys() -> None:
    context = RankContext(rank=1, size=2, local_rank=0, local_size=1, cross_rank=1, cross_size=2, host="host1")
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        port = nobody.getsockname()[1]
    with pytest.raises(RendezvousError, match="does not answer") as caught:
        Alarm(("127.0.0.1", port), "secret", 1)
    found = Failure.before(caught.value, context)
    assert found.kind == "system"
    assert found.error.startswith(f"the first rank's task does not answer at 127.0.0.1:{port}: ")
    assert Failure.before(OSError("no space"), context).kind == "system"
    assert Failure.before(RendezvousError("nics=['no'] is not there"), context).kind == "meet"
    assert Failure.before(RendezvousError("within 60 s", is_passing=True), context, have_met=False).kind == "unmet"


def test_a_life_sign_tells_a_stall_only_after_the_time_allowed() -> None:
    sign = LifeSign(3, "epoch 1, step 2, computing", idle_s=9.0, silent_s=0.5)
    assert not sign.stall(10)
    assert not sign.stall(None)
    assert sign.stall(9) == "the training did not move on for 9 s (epoch 1, step 2, computing)"
    assert LifeSign(0, "", idle_s=9.0).stall(9) == "", "work that never says where it is may take as long as it likes"
    assert "gave no sign of life for 12 s" in LifeSign(3, "", 12.0, 12.0).stall(9)
    # It was stopped a moment after it had shown that it lives, and had moved on a while before.
    assert "gave no sign of life for 9 s" in LifeSign(3, "", idle_s=10.1, silent_s=9.2).stall(10)
