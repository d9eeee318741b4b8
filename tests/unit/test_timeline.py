"""Horovod's timeline comes into the run's folder as valid JSON, wherever Horovod stopped writing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from hvdspark import Store
from hvdspark.worker.timeline import timeline_in, whole_events

# As Horovod writes it: two lines of description for each tensor, and its events one behind the other.
WHOLE = (
    '[\n{"name": "process_name", "ph": "M", "pid": 1, "args": {"name": "a {tensor}"}},\n'
    '{"name": "process_sort_index", "ph": "M", "pid": 1, "args": {"sort_index": 1}},\n'
    '{"ph": "B", "name": "ALLREDUCE", "ts": 10, "pid": 1},{"ph": "E", "ts": 20, "pid": 1}]'
)


def test_a_timeline_that_ends_anywhere_keeps_the_events_that_are_whole() -> None:
    expected = json.loads(WHOLE)
    assert json.loads(whole_events(WHOLE)) == expected
    counts = set()
    for length in range(len(WHOLE)):
        found = json.loads(whole_events(WHOLE[:length]))
        assert found == expected[: len(found)]
        counts.add(len(found))
    assert counts == {0, 1, 2, 3, 4}
    assert json.loads(whole_events(WHOLE[:-1] + ",")) == expected


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"RANK": 0, "SIZE": 2, "LOCAL_RANK": 0, "LOCAL_SIZE": 2, "CROSS_RANK": 0, "CROSS_SIZE": 1}
    for name, value in values.items():
        monkeypatch.setenv(f"HOROVOD_{name}", str(value))
    monkeypatch.delenv("HOROVOD_TIMELINE", raising=False)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.create(tmp_path / "store")


@pytest.mark.usefixtures("rank")
def test_the_first_rank_publishes_it_also_after_an_error(store: Store) -> None:
    def train() -> None:
        with timeline_in(store, "a"):
            Path(os.environ["HOROVOD_TIMELINE"]).write_text(WHOLE[:-30])
            raise KeyError

    with pytest.raises(KeyError):
        train()
    assert "HOROVOD_TIMELINE" not in os.environ
    (name,) = store.list("runs", "a", "timeline")
    assert json.loads(store.read_bytes("runs", "a", "timeline", name)) == json.loads(WHOLE)[:3]


@pytest.mark.usefixtures("rank")
def test_other_ranks_have_one_and_publish_none_and_the_users_own_stays(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with timeline_in(store, "a"):  # Horovod wrote nothing
        pass
    assert "there is no timeline of this run" in caplog.text
    monkeypatch.setenv("HOROVOD_RANK", "1")
    with timeline_in(store, "a"):
        assert "HOROVOD_TIMELINE" in os.environ
    monkeypatch.setenv("HOROVOD_TIMELINE", "/users/own.json")
    with timeline_in(store, "a"):
        assert os.environ["HOROVOD_TIMELINE"] == "/users/own.json"
    assert not store.exists("runs", "a")
