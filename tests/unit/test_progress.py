"""What a driver shows of a fit: a bar where somebody sees it, else a line per epoch, and nothing that is not new."""

from __future__ import annotations

import logging
import os
import pty
import sys
import threading
from contextlib import nullcontext
from pathlib import Path

import pytest
from hvdspark.estimators import progress as module
from hvdspark.estimators.progress import Bar, Lines, line_of, shown

from hvdspark import Store
from hvdspark.history import EpochRecord, Progress, RankTimes, write_history, write_progress

TIMES = tuple(RankTimes(rank, f"host-{rank}", 2.0, 0.0, 1.0 - rank, 1.0 + rank) for rank in (0, 1))


def record(epoch: int, started: float = 1e9) -> EpochRecord:
    return EpochRecord(epoch, started + epoch, 2.0, 2000, 1000.0, 0.1, {"loss": 0.25, "val_loss": 0.5}, 0.5, TIMES)


def progress(epoch: int, step: int, loss: float | None = 0.25) -> Progress:
    return Progress(epoch, 3, step, 100, 1234.0, loss, {}, time=epoch * 1e3 + step)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.create(tmp_path / "store")


def test_a_bar_goes_over_all_epochs_and_back_where_an_attempt_begins_anew(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    write_progress(store, "a", progress(3, 90))  # of an earlier fit of this run
    bar = Bar(store, "a")
    bar.update()
    assert capsys.readouterr().err == ""
    seen = []
    for at in (progress(2, 50, None), progress(2, 100), progress(2, 25), progress(3, 100)):
        write_progress(store, "a", at)
        bar.update()
        bar.update()
        seen.append(capsys.readouterr().err.rpartition("\r")[2].rstrip())
    bar.close()
    for text, parts in zip(
        seen,
        (
            ("epoch 2/3 step 50/100:  50%|", "1,234 rows/s"),
            ("epoch 2/3 step 100/100:  67%|", "1,234 rows/s, loss 0.25"),
            ("epoch 2/3 step 25/100:  42%|", "00:00<?"),
            ("epoch 3/3 step 100/100: 100%|", "<00:00"),
        ),
        strict=True,
    ):
        assert all(part in text for part in parts), text
    assert "loss" not in seen[0]
    assert capsys.readouterr().err.endswith("\n")


def test_an_epoch_has_one_line_and_another_one_where_it_was_trained_anew(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="hvdspark")
    write_history(store, "a", [record(1)])
    lines = Lines(store, "a", 3)
    for epochs in ([record(1)], [record(1), record(2)], [record(1), record(2, 2e9), record(3, 2e9)]):
        write_history(store, "a", epochs)
        lines.update()
    assert [entry.getMessage() for entry in caplog.records] == [
        f"a: {line_of(found, 3)}" for found in (record(2), record(2, 2e9), record(3, 2e9))
    ]
    assert line_of(record(2), 3) == (
        "epoch 2/3: loss 0.25, val_loss 0.5; 2.0 s, 1,000 rows/s; slowest rank 1 on host-1"
    )


@pytest.mark.parametrize(("verbose", "kind"), [(0, None), (1, "Bar"), (2, "Lines")])
def test_a_terminal_has_a_bar_unless_lines_or_nothing_are_asked_for(
    store: Store, monkeypatch: pytest.MonkeyPatch, verbose: int, kind: str | None
) -> None:
    master, terminal = pty.openpty()
    watched: list[str] = []
    monkeypatch.setattr(module, "watched", lambda display, *_: watched.append(type(display).__name__) or nullcontext())
    with os.fdopen(terminal, "w") as screen, monkeypatch.context() as context:
        context.setattr(sys, "stderr", screen)
        with shown(store, "a", 3, verbose):
            pass
    os.close(master)
    assert watched == ([] if kind is None else [kind])


def test_the_watcher_ends_with_the_fit_and_tells_the_last_of_it(
    store: Store, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="hvdspark")
    before = threading.active_count()

    def fit() -> None:
        with shown(store, "a", 3, 1):
            write_history(store, "a", [record(1)])
            raise KeyError("the fit's own")

    with pytest.raises(KeyError):
        fit()
    assert threading.active_count() == before
    assert [entry.getMessage() for entry in caplog.records] == [f"a: {line_of(record(1), 3)}"]
    assert capsys.readouterr().err == ""


def test_a_display_that_fails_costs_the_display_alone(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Lines, "update", lambda _: 1 // 0)
    with shown(store, "a", 3, 2):
        done = True
    assert done
    assert "the display of the progress has failed and is given up; the training is not affected" in caplog.text
