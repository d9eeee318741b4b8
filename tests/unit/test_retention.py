"""What gc removes of the runs, and what it never does."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdspark import Store, gc_runs, list_runs, retention, runs
from hvdspark.aliases import AliasEntry, promote
from hvdspark.errors import AliasError, ParamError, RunInProgressError, StoreError
from hvdspark.lease import held
from hvdspark.recording import recorded
from hvdspark.retention import discard, doomed_runs
from hvdspark.runs import RunRecord, State, in_progress, is_removed, read_record

DAY_S = 86400.0


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.create(tmp_path / "store")


def put(store: Store, run_id: str, ended: float = 1.0, state: State = "finished", **fields: Any) -> None:
    record = RunRecord(run_id, state, ended - 1, ended, **fields)
    store.publish_bytes(json.dumps(record.to_json()).encode(), "runs", run_id, "run.json")
    store.publish_bytes(b"weights", "runs", run_id, "model.keras")
    store.publish_bytes(b"state", "runs", run_id, "checkpoints", "state-000000000001", "manifest.json")


def reasons(store: Store, **rules: Any) -> dict[str, tuple[bool, str]]:
    return {found.run_id: (found.removed, found.reason) for found in gc_runs(store, **rules)}


def test_without_a_rule_and_with_one_that_cannot_be_nothing_is_done(store: Store) -> None:
    put(store, "a")
    for rules in ({}, {"keep_last": -1}, {"older_than_s": -1.0}, {"older_than_s": float("nan")}):
        with pytest.raises(ParamError):
            gc_runs(store, **rules)
    assert store.exists("runs/a/model.keras")


def test_a_dry_run_says_what_would_go_and_removes_nothing(store: Store) -> None:
    for number in range(3):
        put(store, f"run-{number}", 100.0 + number)
    found = gc_runs(store, keep_last=1, dry_run=True)
    assert [(item.run_id, item.removed) for item in found] == [("run-2", False), ("run-1", True), ("run-0", True)]
    assert all(item.size_bytes > 0 for item in found if item.removed)
    assert len(list_runs(store)) == 3
    assert gc_runs(store, keep_last=1) == found
    assert store.list("runs") == ["run-2"]
    assert store.list("runs/run-2") == ["checkpoints", "model.keras", "run.json"]


def test_a_week_of_failures_does_not_cost_the_last_good_model(store: Store) -> None:
    put(store, "good-1", 1.0)
    put(store, "good-2", 2.0)
    for number in range(4):
        put(store, f"bad-{number}", 10.0 + number, "failed")
    gc_runs(store, keep_last=2)
    assert store.list("runs") == ["bad-2", "bad-3", "good-1", "good-2"]


def test_what_an_alias_refers_to_or_can_go_back_to_stays(store: Store) -> None:
    for number in range(4):
        put(store, f"run-{number}", 1.0 + number)
    put(store, "holds", 9.0)
    for number in (0, 1):
        promote(store, "champion", AliasEntry(f"run-{number}", f"runs/run-{number}/model.keras"))
    promote(store, "candidate", AliasEntry("elsewhere", f"{store.url}/runs/holds/pipeline"))
    found = reasons(store, keep_last=0)
    assert {name for name, (removed, _) in found.items() if removed} == {"run-2", "run-3"}
    assert found["run-1"] == (False, "alias 'champion'")
    assert found["run-0"] == (False, "alias 'champion' can be rolled back to it")
    assert found["holds"] == (False, "alias 'candidate'")
    store.publish_bytes(b"{", "aliases/champion.json")
    with pytest.raises(AliasError):
        gc_runs(store, keep_last=0)
    assert store.list("runs") == ["holds", "run-0", "run-1"]


def test_a_run_that_somebody_saved_a_model_in_stays_unless_it_is_the_runs_own(store: Store) -> None:
    put(store, "a")
    store.publish_bytes(b"{}", "runs/a/saved/metadata/part-00000")
    put(store, "b", artefacts={"model": "runs/b/model.keras", "exported": "runs/b/exported"})
    # The last two are what a job leaves.
    for folder in ("exported", "preparation", "pipeline"):
        store.publish_bytes(b"{}", f"runs/b/{folder}/metadata/part-00000")
    assert reasons(store, keep_last=0)["a"] == (False, "a model was saved in it (saved)")
    assert store.list("runs") == ["a"]


def test_what_is_no_whole_run_goes_only_where_nothing_is_lost(store: Store) -> None:
    put(store, "torn")
    store.publish_bytes(b"{", "runs/torn/run.json")
    store.publish_bytes(b"weights", "runs/no-record/model.keras")
    dead = json.dumps({"time": 1.0, "host": "gone", "space": "x", "pid": 1, "started": 1}).encode()
    store.publish_bytes(dead, "runs/never-began/leases/driver-0123456789ab.json")
    found = reasons(store, keep_last=0)
    assert found["never-began"] == (True, "its driver died before it began")
    assert found["torn"][0] is False
    assert found["no-record"] == (False, "it has no run.json; look at it, and delete it by hand")
    assert store.list("runs") == ["no-record", "torn"]


def test_a_run_in_progress_stays_and_one_that_was_interrupted_goes_by_the_rules(store: Store) -> None:
    put(store, "left", 1.0, "running")
    with in_progress(store, "busy"), recorded(store, "busy"):
        found = reasons(store, keep_last=0)
        assert found["busy"] == (False, "in progress")
        assert found["left"][0] is True
    assert store.list("runs") == ["busy"]
    put(store, "compared")
    with held(store, "runs/compared", "job"):
        assert reasons(store, keep_last=0)["compared"] == (False, "in progress")


def test_a_run_that_begins_while_gc_looks_stays(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "_CLAIM_S", 0.1)
    put(store, "nightly", 1.0, "interrupted")
    begun, over = threading.Event(), threading.Event()

    def driver() -> None:
        with in_progress(store, "nightly"), recorded(store, "nightly"):
            begun.set()
            over.wait(30)

    def looked(*arguments: Any) -> Any:
        found = judged(*arguments)
        thread.start()
        assert begun.wait(30)
        return found

    judged = retention._judged
    thread = threading.Thread(target=driver)
    monkeypatch.setattr(retention, "_judged", looked)
    try:
        assert reasons(store, keep_last=0) == {"nightly": (False, "in progress")}
        record = read_record(store, "nightly")
        assert record is not None
        assert record.state == "running"
        assert store.exists("runs/nightly/checkpoints/state-000000000001/manifest.json")
    finally:
        over.set()
        thread.join()


def test_a_job_that_goes_on_with_a_run_while_gc_measures_it_keeps_it(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, "nightly", 1.0, "interrupted")
    job = (
        "import sys; from hvdspark import Store; from hvdspark.lease import held\n"
        "with held(Store.create(sys.argv[1]), 'runs/nightly', 'job'):\n"
        "    print('held', flush=True); sys.stdin.read()\n"
    )
    with contextlib.ExitStack() as stack:

        def looked(*arguments: Any) -> Any:
            found = judged(*arguments)
            command = [sys.executable, "-c", job, store.url]
            process = stack.enter_context(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            return found

        judged = retention._judged
        monkeypatch.setattr(retention, "_judged", looked)
        assert reasons(store, keep_last=0) == {"nightly": (False, "in progress")}
        assert store.exists("runs/nightly/checkpoints/state-000000000001/manifest.json")
    monkeypatch.undo()
    assert reasons(store, keep_last=0)["nightly"][0] is True


def test_a_run_that_was_gone_on_with_and_finished_while_gc_looked_stays(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, "nightly", 1.0, "interrupted")

    def looked(*arguments: Any) -> Any:
        found = judged(*arguments)
        with in_progress(store, "nightly"), recorded(store, "nightly"):
            pass
        return found

    judged = retention._judged
    monkeypatch.setattr(retention, "_judged", looked)
    assert reasons(store, keep_last=0) == {"nightly": (False, "a fit has been at it meanwhile")}
    record = read_record(store, "nightly")
    assert record is not None
    assert record.state == "finished"


def test_a_run_that_is_promoted_while_gc_looks_stays_as_it_was(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    put(store, "a")
    before = store.read_bytes("runs/a/run.json")

    def looked(*arguments: Any) -> Any:
        found = judged(*arguments)
        promote(store, "champion", AliasEntry("a", "runs/a/model.keras"))
        return found

    judged = retention._judged
    monkeypatch.setattr(retention, "_judged", looked)
    assert reasons(store, keep_last=0) == {"a": (False, "alias 'champion'")}
    assert store.read_bytes("runs/a/run.json") == before
    assert store.exists("runs/a/model.keras")


@pytest.mark.parametrize("name", ["aliases/champion.json", "runs/a/leases/job-0123456789ab.json", "runs/a/run.json"])
def test_nothing_is_removed_while_that_cannot_be_read_which_keeps_it(store: Store, name: str) -> None:
    put(store, "a")
    place = Path(store.path(name))
    place.parent.mkdir(exist_ok=True)
    place.unlink(missing_ok=True)
    place.symlink_to(place.name)  # reading it is an error, and none that it is absent
    with pytest.raises(StoreError, match="symbolic links"):
        gc_runs(store, keep_last=0)
    assert store.exists("runs/a/model.keras")


def test_a_removal_that_was_cut_off_is_no_run_and_is_finished_by_the_next(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, "a")
    delete = Store.delete

    def dies(self: Store, *parts: str) -> None:
        if parts[-1] == "model.keras":
            raise StoreError("killed", url="x")
        delete(self, *parts)

    monkeypatch.setattr(Store, "delete", dies)
    with pytest.raises(StoreError, match="killed"):
        gc_runs(store, keep_last=0)
    monkeypatch.undo()
    assert is_removed(store, "a")
    assert list_runs(store) == []
    assert read_record(store, "a") is None
    assert store.exists("runs/a/model.keras")
    assert reasons(store, keep_last=5) == {"a": (True, "its removal was cut off")}
    assert not store.exists("runs/a")


def test_of_drivers_that_begin_at_once_only_one_has_the_run(store: Store) -> None:
    """A real race, over and over: two that were in the block together would see each other there."""
    inside, collisions, wins = set[int](), list[set[int]](), list[int]()
    gate = threading.Barrier(4)

    def drive(number: int) -> None:
        gate.wait(30)
        try:
            with in_progress(store, "same"):
                inside.add(number)
                if len(inside) > 1:
                    collisions.append(set(inside))
                store.publish_bytes(str(number).encode(), "runs/same/owner")
                wins.append(number)
                if store.read_bytes("runs/same/owner") != str(number).encode():
                    collisions.append({number})
                inside.discard(number)
        except RunInProgressError:
            pass

    for _ in range(5):
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(drive, range(4)))
    assert collisions == []
    assert len(wins) >= 5


def test_a_run_that_is_held_by_another_process_is_refused_by_name(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "_CLAIM_S", 0.1)
    driver = (
        "import sys; from hvdspark import Store; from hvdspark.runs import in_progress\n"
        "with in_progress(Store.create(sys.argv[1]), 'a'):\n"
        "    print('held', flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", driver, store.url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(RunInProgressError, match="run_id='a' is being trained") as caught, in_progress(store, "a"):
            pass
        assert caught.value.run_id == "a"
        process.communicate("")
    with in_progress(store, "a"):
        assert discard(store, "a")


STATES: tuple[State, ...] = ("finished", "failed", "interrupted", "running", "damaged")
RECORDS = st.lists(st.tuples(st.sampled_from(STATES), st.floats(0, 100)), max_size=12).map(
    lambda found: [
        RunRecord(
            f"run-{place}",
            state,
            float("nan") if state == "damaged" else day * DAY_S,
            None if state == "running" else day * DAY_S,
        )
        for place, (state, day) in enumerate(found)
    ]
)


@given(RECORDS, st.none() | st.integers(0, 5), st.none() | st.floats(0, 100).map(lambda days: days * DAY_S))
def test_the_rules_keep_the_newest_and_the_young_and_give_up_nothing_else(
    records: list[RunRecord], keep_last: int | None, older_than_s: float | None
) -> None:
    now = 100 * DAY_S
    doomed = doomed_runs(records, keep_last, older_than_s, now)
    left = [record for record in records if record.run_id not in doomed]
    gone = [record for record in records if record.run_id in doomed]
    assert all(record.state != "damaged" for record in gone)
    if older_than_s is not None:
        assert all(now - record.started > older_than_s for record in gone)
    for finished in (True, False):
        alike = [r for r in records if r.state != "damaged" and (r.state == "finished") is finished]
        stay, go = ([r for r in alike if (r.run_id in doomed) is dead] for dead in (False, True))
        if keep_last is not None:
            assert len(stay) >= min(keep_last, len(alike))
            assert all(
                old.started <= new.started
                for old in go
                for new in sorted(stay, key=lambda r: r.started)[-keep_last:]
                if keep_last
            )
            if older_than_s is None:
                assert len(stay) == min(keep_last, len(alike))
        elif older_than_s is not None:
            assert all(now - record.started <= older_than_s for record in stay)
    assert len(left) + len(gone) == len(records)


@pytest.fixture(scope="module")
def folders() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


RUNS = st.dictionaries(
    st.sampled_from([f"run-{number}" for number in range(6)]),
    st.tuples(st.sampled_from(["finished", "failed", "running"]), st.integers(1, 20), st.booleans()),
    max_size=6,
)


@settings(max_examples=25)
@given(RUNS, st.lists(st.sampled_from([f"run-{number}" for number in range(6)]), max_size=3), st.integers(0, 2))
def test_gc_never_removes_what_is_promoted_or_in_progress(
    folders: Path, found: dict[str, tuple[Any, int, bool]], promoted: list[str], keep_last: int
) -> None:
    store = Store.create(tempfile.mkdtemp(dir=folders))
    for name, (state, day, _) in found.items():
        put(store, name, day * DAY_S, state)
    for name in promoted:
        promote(store, "champion", AliasEntry(name, f"runs/{name}/model.keras"))
    held = [in_progress(store, name) for name, (_, _, is_held) in found.items() if is_held]
    for lease in held:
        lease.__enter__()
    try:
        gc_runs(store, keep_last=keep_last, older_than_s=0)
        protected = {name for name in found if name in promoted or found[name][2]}
        left = set(store.list("runs")) & set(found)
        assert protected <= left
        assert all(
            store.exists("runs", name, "model.keras") and store.exists("runs", name, "run.json") for name in left
        )
        finished = [name for name in left - protected if found[name][0] == "finished"]
        assert len(finished) <= keep_last
        assert all(not store.exists("runs", name) for name in set(found) - left)
    finally:
        for lease in held:
            lease.__exit__(None, None, None)
