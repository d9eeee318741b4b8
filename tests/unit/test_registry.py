"""Finding runs again: listed, shown, compared, and the best of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from hvdspark import Store, best_run, compare_runs, gc_runs, list_runs, show_run
from hvdspark.aliases import AliasEntry, list_aliases, promote, read_alias, rollback
from hvdspark.errors import ParamError
from hvdspark.history import EpochRecord, write_history
from hvdspark.runs import RunRecord


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.create(tmp_path / "store")


def put(store: Store, run_id: str, started: float = 1.0, **fields: Any) -> RunRecord:
    record = RunRecord(run_id, **{"state": "finished", "started": started, "ended": started + 1, **fields})
    store.publish_bytes(json.dumps(record.to_json()).encode(), "runs", run_id, "run.json")
    return record


def epoch(number: int, **metrics: float) -> EpochRecord:
    return EpochRecord(number, 1.0, 2.0, 100, 50.0, None, metrics, None, ())


def test_runs_are_listed_the_newest_first_and_one_that_is_damaged_does_not_hide_the_others(store: Store) -> None:
    store.make_folder("runs")
    assert list_runs(store) == []
    old, new = put(store, "a-old", 1.0), put(store, "b-new", 2.0)
    for name, content in {
        "torn": b'{"run_id": "to',
        "list": b"[]",
        "odd": b'{"state": 7}',
        "binary": b"\xff\xfe",
    }.items():
        store.publish_bytes(content, "runs", name, "run.json")
    store.publish_bytes(b"", "runs", "no-record", "logs", "rank-0.log")
    Path(store.path("runs"), ".DS_Store").write_text("no run")
    found = list_runs(store)
    assert found[:2] == [new, old]
    assert [record.run_id for record in found[2:]] == ["binary", "list", "odd", "torn"]
    assert {record.state for record in found[2:]} == {"damaged"}
    assert all("run.json makes no sense" in str(record.cause) for record in found[2:])


def test_a_record_of_an_older_and_one_of_a_newer_version_are_read(store: Store) -> None:
    old = {"run_id": "old", "state": "failed", "started": 5, "ended": 6.5, "cause": "no"}
    store.publish_bytes(json.dumps(old).encode(), "runs/old/run.json")
    newer = put(store, "newer", 9.0, attempts=(), metrics={"loss": 1.0}).to_json()
    newer |= {"unheard_of": {"a": 1}, "attempts": [{"started": 9.0, "colour": "red"}]}
    store.publish_bytes(json.dumps(newer).encode(), "runs/newer/run.json")
    new, first = list_runs(store)
    assert (first.run_id, first.state, first.cause, first.params, first.attempts) == ("old", "failed", "no", {}, ())
    assert (new.run_id, new.metrics, new.attempts[0].started) == ("newer", {"loss": 1.0}, 9.0)


def test_a_run_is_shown_with_its_history_and_the_aliases_that_need_it(store: Store) -> None:
    record = put(store, "nightly", artefacts={"model": "runs/nightly/model.keras"})
    store.publish_bytes(b"0123456789", "runs/nightly/model.keras")
    epochs = (epoch(1, loss=0.5), epoch(2, loss=0.25))
    write_history(store, "nightly", epochs)
    promote(store, "champion", AliasEntry("nightly", "runs/nightly/model.keras"))
    found = show_run(store, "nightly")
    assert found.record == record
    assert found.epochs == epochs
    assert found.aliases == ("champion",)
    assert found.size_bytes > 10
    store.publish_bytes(b'{"epochs": [{"epoch": "no"}]}', "runs/nightly/history.json")
    assert (show_run(store, "nightly").record, show_run(store, "nightly").epochs) == (record, ())
    with pytest.raises(ParamError, match=r"no run 'nigthly'.*Did you mean 'nightly'\?"):
        show_run(store, "nigthly")


def test_what_a_run_reached_before_its_driver_died_is_in_its_record(store: Store) -> None:
    put(store, "a", state="running", ended=None, attempts=({"started": 1.0},))
    write_history(store, "a", [epoch(2, loss=0.5), epoch(3, loss=0.25, auc=math.nan)])
    [record] = list_runs(store)
    assert (record.state, record.cause, record.epoch) == ("interrupted", "its driver is gone", 3)
    assert record.metrics["loss"] == 0.25
    assert math.isnan(record.metrics["auc"])
    assert record.attempts[0].cause == "its driver is gone"


def test_runs_are_compared_by_what_differs_and_by_all_metrics(store: Store) -> None:
    columns = [{"name": "x", "dtype": "float32"}, {"name": "y", "dtype": "float32"}]
    put(
        store,
        "a",
        params={
            "epochs": 3,
            "batch_size": 32,
            "optimizer": {"class": "Adam", "learning_rate": 0.1},
            "feature_cols": ["x"],
        },
        versions={"keras": "3.14", "python": "3.11"},
        data={"rows": 10, "columns": columns},
        metrics={"loss": 0.3, "auc": 0.9},
    )
    put(
        store,
        "b",
        params={"epochs": 3, "optimizer": {"class": "Adam", "learning_rate": 0.2}, "feature_cols": ["x", "z"]},
        versions={"keras": "3.15", "python": "3.11"},
        data={"rows": 10, "columns": [{"name": "z", "dtype": "int32"}, *columns]},
        metrics={"loss": 0.2},
    )
    found = compare_runs(store, ["b", "a"])
    assert found.run_ids == ("b", "a")
    assert found.params == {
        "batch_size": {"a": 32},
        "optimizer.learning_rate": {"b": 0.2, "a": 0.1},
        "feature_cols": {"b": ["x", "z"], "a": ["x"]},
    }
    assert found.versions == {"keras": {"b": "3.15", "a": "3.14"}}
    assert found.data == {"columns.z.dtype": {"b": "int32"}}
    assert found.metrics == {"loss": {"b": 0.2, "a": 0.3}, "auc": {"a": 0.9}}
    with pytest.raises(ParamError, match="two or more"):
        compare_runs(store, ["a", "a"])


def test_the_best_run_is_the_finished_one_whose_metric_says_so(store: Store) -> None:
    store.make_folder("runs")
    with pytest.raises(ParamError, match=r"no run .* has finished"):
        best_run(store)
    put(store, "low", 1.0, metrics={"val_loss": 0.2, "accuracy": 0.7, "odd": math.nan})
    put(store, "equal", 2.0, metrics={"val_loss": 0.2, "accuracy": 0.6})
    put(store, "high", 3.0, metrics={"val_loss": 0.4, "accuracy": 0.8})
    put(store, "sick", 4.0, metrics={"val_loss": math.nan, "accuracy": math.inf})
    put(store, "broken", 5.0, state="failed", metrics={"val_loss": 0.1, "accuracy": 0.99})
    assert best_run(store).run_id == "low"
    assert best_run(store, "accuracy").run_id == "high"
    assert best_run(store, "val_loss", "max").run_id == "high"
    assert best_run(store, "accuracy", "min").run_id == "equal"
    with pytest.raises(ParamError, match=r"metric 'acuracy'\. Did you mean 'accuracy'\? There are: val_loss, accuracy"):
        best_run(store, "acuracy")
    with pytest.raises(ParamError, match="'odd' is NaN"):
        best_run(store, "odd")


def test_what_a_job_measured_on_held_out_rows_has_a_name_of_its_own(store: Store) -> None:
    put(store, "overfitted", 1.0, metrics={"val_loss": 0.1}, held_out={"val_loss": 0.9, "val_auc": 0.6})
    put(store, "sound", 2.0, metrics={"val_loss": 0.3}, held_out={"val_loss": 0.4, "val_auc": 0.8}, promoted=True)
    put(store, "sick", 3.0, held_out={"val_loss": math.nan})
    assert best_run(store, "val_loss").run_id == "overfitted"
    assert best_run(store, "held_out.val_loss").run_id == "sound"
    assert best_run(store, "held_out.val_auc").run_id == "sound"
    assert math.isnan(show_run(store, "sick").record.held_out["val_loss"])
    found = compare_runs(store, ["overfitted", "sound"]).metrics
    assert found["held_out.val_loss"] == {"overfitted": 0.9, "sound": 0.4}
    assert found["val_loss"] == {"overfitted": 0.1, "sound": 0.3}
    mode: Any = "most"
    with pytest.raises(ParamError, match="'most'"):
        best_run(store, "accuracy", mode)


def test_a_number_that_is_not_finite_is_kept_as_json_can(store: Store) -> None:
    put(store, "a", metrics={"loss": math.nan})
    assert json.loads(store.read_bytes("runs/a/run.json"), parse_constant=pytest.fail)["metrics"] == {"loss": None}
    assert math.isnan(list_runs(store)[0].metrics["loss"])


@pytest.mark.parametrize(
    "ask",
    [
        list_runs,
        best_run,
        lambda path: show_run(path, "a"),
        lambda path: compare_runs(path, ["a", "b"]),
        lambda path: gc_runs(path, keep_last=1),
        list_aliases,
        lambda path: read_alias(path, "champion"),
        lambda path: rollback(path, "champion"),
    ],
)
def test_a_path_in_place_of_a_store_is_refused_with_how_to_make_one_of_it(tmp_path: Path, ask: Any) -> None:
    with pytest.raises(ParamError, match=r"store='.*' is a str; give hvdspark\.Store\.create\('/shared/folder'\)"):
        ask(str(tmp_path))
