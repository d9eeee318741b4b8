"""What ``fit`` finds out before its first Spark job."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import pytest
from hvdspark.estimators import BestOf, KerasEstimator, sources
from pyspark.sql import DataFrame, SparkSession

from hvdspark import Store
from hvdspark.errors import (
    ConfigError,
    NotEnoughSlotsError,
    ParamError,
    RunInProgressError,
    SchemaError,
    StoreError,
)
from hvdspark.runs import REMOVED, in_progress, read_record


@pytest.fixture(scope="module")
def rows(spark: SparkSession) -> DataFrame:
    return spark.range(0, 20, numPartitions=2).selectExpr(
        "double(id) AS a",
        "double(id % 3) AS b",
        "id % 2 AS y",
        "string(id) AS text",
        "array(double(id)) AS list",
        "timestamp_micros(id) AS at",
    )


@pytest.fixture(autouse=True)
def _no_rows_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: Any) -> None:
        raise AssertionError("the checks let it pass: rows were to be written")

    monkeypatch.setattr(sources, "materialize", refuse)


def network(outputs: int = 1, size: int = 2) -> keras.Model:
    return keras.Sequential([keras.Input((size,)), keras.layers.Dense(outputs)])


@pytest.fixture
def estimator(store: Store) -> Any:
    # Imports ahead of the ranks would be a job, and begin before rows are written.
    settings: dict[str, Any] = {"feature_cols": [["a", "b"]], "label_cols": ["y"], "warm_pool": False}
    return KerasEstimator(num_proc=2, store=store, model=network(), loss="mse", **settings)


def test_what_is_right_passes_the_checks(estimator: Any, rows: DataFrame, jobs_of: Callable[[], int]) -> None:
    with pytest.raises(AssertionError, match="rows were to be written"):
        estimator.fit(rows)
    assert jobs_of() == 0


@pytest.mark.parametrize("name", ["model", "store", "feature_cols", "label_cols"])
def test_what_is_needed_is_asked_for_by_name(estimator: Any, rows: DataFrame, name: str) -> None:
    setter = "set" + "".join(part.capitalize() for part in name.split("_"))
    getattr(estimator, setter)(None)
    with pytest.raises(ParamError, match=rf"KerasEstimator needs {name}; it was not given") as caught:
        estimator.fit(rows)
    assert caught.value.param == name


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"feature_cols": [["a", "bb"]]}, SchemaError, r"'bb' does not exist. Did you mean 'b'"),
        ({"label_cols": ["yy"]}, SchemaError, r"'yy' does not exist. Did you mean 'y'"),
        ({"sample_weight_col": "ww"}, SchemaError, r"'ww' does not exist"),
        ({"validation": "held"}, SchemaError, r"'held' does not exist"),
        ({"validation": "list"}, SchemaError, r"validation column 'list' has type array<double>"),
        ({"sample_weight_col": "list"}, SchemaError, r"sample_weight_col 'list' has type array<double>"),
        ({"feature_cols": [["a", "text"]]}, SchemaError, r"'text' has type string, but .*StringIndexer"),
        ({"feature_cols": ["at"], "model": network(size=1)}, SchemaError, r"'at' is a timestamp, .*int64 or float64"),
        ({"fill_nulls": {"c": 0}}, ParamError, r"fill_nulls names the column 'c', which is neither feature"),
        ({"fill_nulls": {"y": 0.5}}, ParamError, r"fill_nulls=.*'y': 0.5.*a whole number that int64 holds"),
        ({"padding": {"a": 0}}, ParamError, r"padding names the column 'a', which is no array"),
        ({"feature_cols": ["a"]}, SchemaError, r"the columns a hold 1 values per row, .* takes 2"),
        ({"feature_cols": [["a", "b"], "a"]}, ParamError, r"feature_cols has 2 entries, but the model has 1 inputs"),
        ({"label_cols": ["y", "a"]}, ParamError, r"label_cols has 2 entries, but the model has 1 outputs"),
        ({"store": "/tmp/somewhere"}, ParamError, r"store='/tmp/somewhere' is a str; give hvdspark.Store.create"),
        ({"model": "resnet"}, ParamError, r"model is a str; give a keras.Model of Keras 3"),
        ({"loss": None}, ParamError, r"give loss=, or a model that is compiled"),
        ({"callbacks": [print]}, ParamError, r"callbacks holds a builtin_function_or_method, which is no keras"),
        ({"checkpoint_callback": "best"}, ParamError, r"checkpoint_callback is a str; give .*BestOf"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_before_a_job(
    estimator: Any,
    rows: DataFrame,
    jobs_of: Callable[[], int],
    values: dict[str, Any],
    error: type[ConfigError],
    message: str,
) -> None:
    for name, value in values.items():
        getattr(estimator, "set" + "".join(part.capitalize() for part in name.split("_")))(value)
    with pytest.raises(error, match=message):
        estimator.fit(rows)
    assert jobs_of() == 0


def test_more_ranks_than_slots_are_refused_at_once(estimator: Any, rows: DataFrame, jobs_of: Callable[[], int]) -> None:
    with pytest.raises(NotEnoughSlotsError) as caught:
        estimator.setNumProc(3).fit(rows)
    assert (caught.value.needed, caught.value.available) == (3, 2)
    assert jobs_of() == 0


def test_a_session_that_protects_its_connections_is_told_that_ranks_do_not(
    spark: SparkSession,
    estimator: Any,
    rows: DataFrame,
    jobs_of: Callable[[], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    conf = spark.sparkContext.getConf()
    conf.set("spark.network.crypto.enabled", "true")
    monkeypatch.setattr(spark.sparkContext, "getConf", lambda: conf)
    with pytest.raises(AssertionError, match="rows were to be written"):
        estimator.fit(rows)  # nothing leaves this machine
    conf.set("spark.master", "yarn")
    with pytest.raises(ParamError, match=r"spark\.network\.crypto\.enabled=true: .* allow_insecure_transport=True"):
        estimator.fit(rows)
    assert jobs_of() == 0
    with pytest.raises(AssertionError, match="rows were to be written"):
        estimator.fit(rows, {estimator.allow_insecure_transport: True})


def test_a_store_that_cannot_be_written_is_found_out_at_once(
    estimator: Any, rows: DataFrame, tmp_path: Path, jobs_of: Callable[[], int]
) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match=r"not writable"):
        estimator.setStore(Store.create(tmp_path / "file" / "store")).fit(rows)
    assert jobs_of() == 0


def test_a_run_that_exists_is_not_written_over(estimator: Any, rows: DataFrame, store: Store) -> None:
    store.publish_bytes(b"the old model", "runs", "monday", "model.keras")
    with pytest.raises(ParamError, match=r"run_id='monday' exists already"):
        estimator.setRunId("monday").fit(rows)
    assert store.read_bytes("runs", "monday", "model.keras") == b"the old model"


def test_a_run_that_another_is_at_is_refused_before_any_job(
    estimator: Any, rows: DataFrame, store: Store, jobs_of: Callable[[], int]
) -> None:
    with in_progress(store, "monday"), pytest.raises(RunInProgressError, match="run_id='monday' is being trained"):
        estimator.setRunId("monday").fit(rows)
    assert jobs_of() == 0


def test_what_is_left_of_a_run_that_was_being_removed_is_not_gone_on_with(
    estimator: Any, rows: DataFrame, store: Store
) -> None:
    store.publish_bytes(REMOVED, "runs", "monday", "run.json")
    store.publish_bytes(b"the old model", "runs", "monday", "model.keras")
    with pytest.raises(AssertionError, match="rows were to be written"):
        estimator.setRunId("monday").setBackendEnv({"TOKEN": "secret"}).fit(rows)
    assert store.list("runs", "monday") == ["run.json"]
    record = read_record(store, "monday")
    assert record is not None
    assert (record.state, record.attempts) == ("failed", ())
    assert str(record.cause).startswith("AssertionError: ")
    assert record.params["backend_env"] == ["TOKEN"]
    assert record.params["model"]["class"] == "Sequential"
    assert [column["name"] for column in record.data["columns"]] == ["a", "b", "y"]
    assert set(record.phases) == {"check", "write"}


def test_mlflow_that_is_not_installed_is_found_out_at_once(
    estimator: Any, rows: DataFrame, jobs_of: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ParamError, match=r"hvdspark\[mlflow\]"):
        estimator.setMlflow(True).fit(rows)
    assert jobs_of() == 0


def test_a_fit_that_is_refused_leaves_nothing_in_the_store(estimator: Any, rows: DataFrame, store: Store) -> None:
    with pytest.raises(SchemaError):
        estimator.setFeatureCols(["c"]).fit(rows)
    assert store.list() == [] if Path(store.url).exists() else True


@pytest.mark.parametrize(("name", "value"), [("epochs", 0), ("batch_size", -1), ("num_proc", "2"), ("validation", 2.0)])
def test_values_for_one_fit_are_checked_like_any_other(estimator: Any, rows: DataFrame, name: str, value: Any) -> None:
    with pytest.raises(ParamError, match=name):
        estimator.fit(rows, {getattr(estimator, name): value})


def test_a_monitor_of_validation_needs_validation(estimator: Any, rows: DataFrame) -> None:
    with pytest.raises(ParamError, match=r"val_loss.*validation"):
        estimator.setCheckpointCallback(BestOf("val_loss")).fit(rows)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"output_cols": ["p", "q"]}, r"output_cols has 2 names, but the model has 1 outputs"),
        ({"output_types": ["vector", "scalar"]}, r"output_types has 2 entries"),
        ({"output_types": ["scalar"], "model": network(3)}, r"cannot be a scalar"),
    ],
    ids=["names", "types", "shape"],
)
def test_output_columns_that_transform_would_refuse_are_refused_before_training(
    estimator: Any, rows: DataFrame, values: dict[str, Any], message: str
) -> None:
    for name, value in values.items():
        getattr(estimator, "set" + "".join(part.capitalize() for part in name.split("_")))(value)
    with pytest.raises(ParamError, match=message):
        estimator.fit(rows)


def test_a_label_for_two_outputs_needs_output_names_of_their_own(store: Store, rows: DataFrame) -> None:
    entry = keras.Input((2,))
    model = keras.Model(entry, [keras.layers.Dense(1, name="p")(entry), keras.layers.Dense(1, name="q")(entry)])
    estimator: Any = KerasEstimator(
        num_proc=2, store=store, model=model, loss="mse", feature_cols=[["a", "b"]], label_cols=["y", "y"]
    )
    with pytest.raises(ConfigError, match=r"y__output.*"):
        estimator.fit(rows)
    with pytest.raises(AssertionError, match="rows were to be written"):
        estimator.setOutputCols(["p", "q"]).fit(rows)


def test_a_learning_rate_cannot_replace_a_schedule(estimator: Any, rows: DataFrame) -> None:
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 100, 0.9)
    estimator.setOptimizer(keras.optimizers.SGD(schedule)).setLearningRate(0.5)
    with pytest.raises(ParamError, match=r"learning_rate.*ExponentialDecay"):
        estimator.fit(rows)
