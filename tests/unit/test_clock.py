"""How fast steps are and how long they wait, as the clock adds it up."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hvdspark.estimators.keras import clock as module
from hvdspark.estimators.keras.clock import CALL_S, Pace, StepClock


class Time:
    """A clock that goes on only when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    found = Time()
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=found.perf_counter))
    return found


def run_epoch(clock: StepClock, time: Time, rows: int, waits_s: list[float], works_s: float) -> None:
    clock.start()
    for wait_s in waits_s:
        with clock.waiting():
            time.now += wait_s
        time.now += works_s
    clock.stop(rows)


def test_the_time_in_which_nothing_was_ready_is_counted(time: Time) -> None:
    clock = StepClock()
    for _ in range(2):
        run_epoch(clock, time, 600, [0.5, 0.0, 1.0], works_s=1.5)
    assert clock.wait_share == pytest.approx(1.5 / 6)
    assert clock.rows_per_s == pytest.approx(100)


def test_each_epoch_is_counted_by_itself_and_the_first_one_only_where_it_is_alone(time: Time) -> None:
    clock = StepClock()
    run_epoch(clock, time, 10, [9.0], works_s=1.0)
    assert (clock.rows_per_s, clock.wait_share) == pytest.approx((1, 0.9))
    time.now += 50  # what is between epochs is in none of them
    for _ in range(3):
        run_epoch(clock, time, 10, [0.0], works_s=1.0)
    assert (clock.rows_per_s, clock.wait_share) == pytest.approx((10, 0.0))


@pytest.mark.parametrize(("step_s", "expected"), [(0.0001, 32), (0.02, 32), (0.04, 16), (0.3, 2), (0.6, 1), (30.0, 1)])
def test_a_call_takes_as_many_steps_as_go_into_a_second(time: Time, step_s: float, expected: int) -> None:
    pace = Pace(32)
    assert pace.steps == 1
    for _ in range(8):
        with pace.call(pace.steps):
            time.now += pace.steps * step_s
    assert pace.steps == expected
    assert pace.steps * step_s <= max(CALL_S, step_s)


def test_one_slow_call_is_made_up_for(time: Time) -> None:
    pace = Pace(32)
    sizes = []
    for seconds in [0.01] * 6 + [2.0] + [0.01] * 2:
        sizes.append(pace.steps)
        with pace.call(pace.steps):
            time.now += seconds
    assert sizes == [1, 2, 4, 8, 16, 32, 32, 16, 32]


def test_calls_that_end_early_do_not_make_the_next_ones_longer(time: Time) -> None:
    pace = Pace(32)
    for _ in range(5):
        with pace.call(1):
            time.now += 0.01
    assert pace.steps == 2
