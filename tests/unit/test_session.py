"""How often Horovod asks the peers once gradients go through shared memory."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

from hvdspark.plan import RankContext
from hvdspark.worker.session import Session
from hvdspark.worker.shared_sum import SharedSum

CYCLE = "HOROVOD_CYCLE_TIME"


class Recorder:
    """In place of Horovod, which starts once per process: notes the cycle time at every start."""

    def __init__(self) -> None:
        self.cycles: list[str | None] = []

    def init(self) -> None:
        self.cycles.append(os.environ.get(CYCLE))

    def shutdown(self) -> None: ...


@pytest.fixture
def shared() -> Iterator[SharedSum]:
    interval = sys.getswitchinterval()
    region = SharedSum("hvdspark-test-session", 0, 1)
    yield region
    region.close()
    sys.setswitchinterval(interval)


@pytest.mark.parametrize(("controller", "cycle"), [("gloo", "50"), ("mpi", "200")])
def test_horovod_rests_longer_where_waiting_costs_more(
    monkeypatch: pytest.MonkeyPatch, shared: SharedSum, controller: str, cycle: str
) -> None:
    monkeypatch.setenv("HOROVOD_CONTROLLER", controller)
    monkeypatch.delenv(CYCLE, raising=False)
    horovod = Recorder()
    Session(horovod, RankContext(0, 1, 0, 1, 0, 1, "here")).rely_on(shared)
    assert horovod.cycles == [cycle]
    assert CYCLE not in os.environ


def test_a_cycle_time_that_the_user_chose_stays(monkeypatch: pytest.MonkeyPatch, shared: SharedSum) -> None:
    monkeypatch.setenv(CYCLE, "7")
    horovod = Recorder()
    Session(horovod, RankContext(0, 1, 0, 1, 0, 1, "here")).rely_on(shared)
    assert horovod.cycles == []
    assert os.environ[CYCLE] == "7"
