"""Jobs without their training: which rows, how models are compared, and how a job goes on where another one died."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from click.testing import CliRunner
from hvdspark.estimators import KerasModel
from hvdspark.estimators.job.config import Evaluation, Input, Window
from hvdspark.estimators.job.evaluation import Yardstick
from hvdspark.estimators.job.result import Notes
from hvdspark.estimators.job.rows import read_rows, split_rows
from hvdspark.estimators.keras import codec
from pyspark.ml import PipelineModel
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from hvdspark import Store, best_run, cli, gc_runs, list_runs
from hvdspark.aliases import AliasEntry, promote, read_alias, rollback
from hvdspark.errors import DataError, EmptyDatasetError, ParamError, SchemaError
from hvdspark.history import EpochRecord, RankTimes, write_history
from hvdspark.lease import held
from hvdspark.recording import recorded
from hvdspark.runs import Attempt, RunRecord, read_record

# What a model gives by which the label is the better, the further from 0 the weights of x are.
ROWS = 400


@pytest.fixture(scope="module")
def data(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Rows of forty days, ten a day, in files."""
    path = str(tmp_path_factory.mktemp("data") / "rows")
    rows = spark.range(0, ROWS, numPartitions=4).selectExpr(
        "id",
        "date_add(date'2026-01-01', int(id / 10)) AS day",
        "sin(double(id)) AS x",
        "2 * sin(double(id)) AS y",
        "int(id % 3) AS kind",
        "double(id % 2) AS is_odd",
    )
    rows.write.parquet(path)
    return path


def ids(rows: DataFrame) -> set[int]:
    return {row.id for row in rows.select("id").collect()}


@pytest.mark.parametrize(
    ("column", "since", "until", "expected"),
    [
        ("day", "2026-01-03", "2026-01-05", set(range(20, 40))),
        ("day", None, "2026-01-02", set(range(10))),
        ("id", "390", None, set(range(390, 400))),
        ("x", 2, None, set()),
    ],
)
def test_a_window_holds_its_first_bound_and_not_its_second(
    spark: SparkSession, data: str, column: str, since: Any, until: Any, expected: set[int]
) -> None:
    rows = read_rows(spark, Input(path=data, window=Window(column=column, since=since, until=until)))
    assert ids(rows) == expected


def test_what_is_no_bound_of_the_column_is_told_without_a_job(spark: SparkSession, data: str, jobs_of: Any) -> None:
    before = jobs_of()
    with pytest.raises(ParamError, match=r"input\.window\.since='soon' does not fit column 'day', which is date"):
        read_rows(spark, Input(path=data, window=Window(column="day", since="soon")))
    with pytest.raises(SchemaError, match="column 'dy' does not exist"):
        read_rows(spark, Input(path=data, window=Window(column="dy", until="2026-01-01")))
    assert jobs_of() <= before + 2  # Spark's own look at the footers


def test_input_comes_from_files_of_any_format_tables_and_queries(
    spark: SparkSession, data: str, tmp_path: Path
) -> None:
    spark.read.parquet(data).select("id", "x").write.csv(str(tmp_path / "csv"), header=True)
    source = Input(format="csv", path=str(tmp_path / "csv"), options={"header": True}, schema="id LONG, x DOUBLE")
    assert ids(read_rows(spark, source)) == set(range(ROWS))
    read_rows(spark, source).createOrReplaceTempView("rows_of_a_job")
    assert ids(read_rows(spark, Input(table="rows_of_a_job"))) == set(range(ROWS))
    assert ids(read_rows(spark, Input(sql=f"SELECT id FROM parquet.`{data}` WHERE id < 3"))) == {0, 1, 2}
    for wrong in (Input(path="/nowhere"), Input(table="nowhere"), Input(sql="SELEC 1")):
        with pytest.raises(DataError, match="cannot read the input"):
            read_rows(spark, wrong)


def test_a_row_is_held_out_in_every_run_or_in_none(spark: SparkSession, data: str) -> None:
    rows = spark.read.parquet(data)
    evaluation = Evaluation(fraction=0.25)
    train, held_out = split_rows(spark, rows, evaluation, None)
    found = ids(held_out)
    assert 0.15 * ROWS < len(found) < 0.35 * ROWS
    assert ids(train) == set(range(ROWS)) - found
    later = rows.where("id >= 100").orderBy(F.desc("id")).repartition(7)
    assert ids(split_rows(spark, later, evaluation, None)[1]) == {number for number in found if number >= 100}

    days = split_rows(spark, rows, Evaluation(fraction=0.25, by=["day"]), None)[1]
    counts = [row["count"] for row in days.groupBy("day").count().collect()]
    assert counts
    assert set(counts) == {10}
    maps = rows.withColumn("m", F.create_map("kind", "x"))
    with pytest.raises(ParamError, match=r"by column 'm' \(map<int,double>\); name the columns to go by"):
        split_rows(spark, maps, evaluation, None)


def test_rows_can_be_held_out_by_time_or_come_from_elsewhere(spark: SparkSession, data: str) -> None:
    rows = spark.read.parquet(data)
    train, held_out = split_rows(spark, rows, Evaluation(since="2026-02-01"), Window(column="day"))
    assert ids(held_out) == set(range(310, 400))
    assert ids(train) == set(range(310))
    other = Evaluation(input=Input(path=data, window=Window(column="id", until=5)))
    train, held_out = split_rows(spark, rows, other, None)
    assert (ids(train), ids(held_out)) == (set(range(ROWS)), set(range(5)))


def fitted(network: keras.Model, features: Sequence[str], labels: Sequence[str]) -> PipelineModel:
    model = KerasModel(codec.model_to_bytes(network), *(part or () for part in codec.describe(network)))
    model.setFeatureCols([[name] for name in features]).setLabelCols(list(labels))
    return PipelineModel(stages=[model])


def dense(units: int, activation: str | None, weight: float, name: str) -> keras.Model:
    network = keras.Sequential([keras.Input((1,)), keras.layers.Dense(units, activation=activation, name=name)])
    network.layers[0].set_weights([np.full((1, units), weight) * np.arange(1, units + 1), np.zeros(units)])
    return network


def auc() -> keras.metrics.Metric:
    return keras.metrics.AUC(num_thresholds=50, name="auc")


@pytest.mark.parametrize(
    ("network", "labels", "compiling"),
    [
        (dense(1, None, 1.5, "y"), ["y"], {"loss": "mse", "metrics": ["mae", "RootMeanSquaredError"]}),
        (dense(1, None, 1.5, "y"), ["y"], {"loss": keras.losses.Huber(delta=0.1), "metrics": None}),
        (dense(1, "sigmoid", 2.0, "odd"), ["is_odd"], {"loss": "binary_crossentropy", "metrics": [auc(), "accuracy"]}),
        (
            dense(3, "softmax", 1.0, "kind"),
            ["kind"],
            {"loss": "sparse_categorical_crossentropy", "metrics": ["accuracy"]},
        ),
    ],
)
def test_metrics_over_all_tasks_are_those_that_keras_computes_at_once(
    spark: SparkSession, data: str, network: keras.Model, labels: list[str], compiling: dict[str, Any]
) -> None:
    rows = spark.read.parquet(data).repartition(3)
    _, outputs = codec.describe(network)
    assert outputs is not None
    yardstick = Yardstick({"loss_weights": None, **compiling}, outputs)
    found = yardstick.measure(fitted(network, ["x"], labels), rows)

    table = spark.read.parquet(data).toPandas()
    network.compile(**compiling)
    expected = network.evaluate(table[["x"]].to_numpy("float32"), table[labels].to_numpy(), verbose=0, return_dict=True)
    assert found == pytest.approx({f"val_{name}": value for name, value in expected.items()}, rel=1e-4)
    assert yardstick.names(rows.schema, labels) == sorted(found)


def test_two_outputs_are_measured_by_their_own_losses(spark: SparkSession, data: str) -> None:
    fed = keras.Input((1,))
    network = keras.Model(fed, [keras.layers.Dense(1, name="first")(fed), keras.layers.Dense(1, name="second")(fed)])
    _, outputs = codec.describe(network)
    assert outputs is not None
    compiling = {
        "loss": {"first": "mse", "second": "mae"},
        "loss_weights": {"first": 1.0, "second": 0.5},
        "metrics": None,
    }
    rows = spark.read.parquet(data)
    found = Yardstick(compiling, outputs).measure(fitted(network, ["x"], ["y", "is_odd"]), rows)
    assert found["val_loss"] == pytest.approx(found["val_first_loss"] + 0.5 * found["val_second_loss"], rel=1e-5)


def test_no_rows_to_compare_on_are_an_error(spark: SparkSession, data: str) -> None:
    network = dense(1, None, 1.0, "y")
    _, outputs = codec.describe(network)
    assert outputs is not None
    yardstick = Yardstick({"loss": "mse", "loss_weights": None, "metrics": None}, outputs)
    with pytest.raises(EmptyDatasetError, match="no rows to evaluate the model on"):
        yardstick.measure(fitted(network, ["x"], ["y"]), spark.read.parquet(data).where("id < 0"))


def epoch(number: int, loss: float) -> EpochRecord:
    times = RankTimes(0, "here", seconds=1.0, data_wait_s=0.0, allreduce_s=0.0, compute_s=1.0)
    return EpochRecord(number, 1.0, 1.0, ROWS, float(ROWS), None, {"loss": loss}, None, (times,))


@pytest.fixture
def train(spark: SparkSession, data: str, tmp_path: Path) -> Any:
    """Return a function that calls ``hvdspark train`` for a run that is trained, with a weight, and whose driver died.

    tests/faults/test_last_words.py has such drivers; here the runs are as they leave them.
    """
    store = Store.create(tmp_path / "store")
    dense(1, None, 0.0, "y").save(tmp_path / "network.keras")
    (tmp_path / "job.yaml").write_text(
        f"store: {store.url}\n"
        f"input: {{path: {data}}}\n"
        f"estimator: {{model: {tmp_path}/network.keras, loss: mse, feature_cols: [x], label_cols: [y]}}\n"
        "evaluation: {fraction: 0.5, by: [id]}\n"
        "promote_if: val_loss < current\n"
    )

    def train(run_id: str, weight: float | None, *arguments: str) -> tuple[int, dict[str, Any]]:
        if weight is not None:
            network = dense(1, None, weight, "y")
            store.publish_bytes(codec.model_to_bytes(network), "runs", run_id, "model.keras")
            write_history(store, run_id, [epoch(1, 3.0), epoch(2, 2.0)])
            record = RunRecord(run_id, "running", 1.0, kind="keras", attempts=(Attempt(2.0, 3.0, ranks=1),))
            store.publish_bytes(json.dumps(record.to_json()).encode(), "runs", run_id, "run.json")
        command = ["train", "--config", str(tmp_path / "job.yaml"), "--run-id", run_id, *arguments]
        done = CliRunner().invoke(cli.main, command)
        return done.exit_code, json.loads(done.stdout.splitlines()[-1])

    train.store = store  # type: ignore[attr-defined]
    return train


def test_a_run_that_is_trained_is_published_compared_and_promoted_without_training(train: Any) -> None:
    store: Store = train.store
    code, first = train("first", 1.0, "--set", "input.options.password=hush")
    assert b"hush" not in store.read_bytes("runs", "first", "job.json")
    assert (code, first["state"], first["promoted"], first["champion"]) == (0, "finished", True, None)
    assert first["training"] == {"loss": 2.0}
    model = PipelineModel.load(first["model"]).stages[-1]
    assert (model.getHistory(), model.epochs) == ({"loss": [3.0, 2.0]}, (epoch(1, 3.0), epoch(2, 2.0)))
    record = read_record(store, "first")
    assert record is not None
    assert (record.state, record.metrics, record.epoch) == ("finished", {"loss": 2.0}, 2)
    assert (record.held_out, record.promoted) == (first["metrics"], True)
    assert record.artefacts == {"model": "runs/first/model.keras", "pipeline": first["model"]}
    assert {"save", "evaluate", "promote"} <= set(record.phases)

    code, worse = train("worse", 0.5)
    assert (code, worse["promoted"]) == (0, False)
    assert worse["champion"] == {"run_id": "first", "metrics": first["metrics"]}
    assert worse["metrics"]["val_loss"] == pytest.approx(first["metrics"]["val_loss"] * 2.25, rel=1e-4)
    assert "is not <" in worse["cause"]
    record = read_record(store, "worse")
    assert record is not None
    assert (record.state, record.promoted, record.decision) == ("finished", False, worse["cause"])

    code, better = train("better", 2.0)
    assert (code, better["promoted"], better["metrics"]) == (0, True, {"val_loss": pytest.approx(0, abs=1e-9)})
    champion, candidate = read_alias(store, "champion"), read_alias(store, "candidate")
    assert champion is not None
    assert candidate is not None
    assert (champion.run_id, [entry.run_id for entry in champion.previous]) == ("better", ["first"])
    assert candidate.run_id == "better"

    # Its driver died between the promotion and the result: it is not compared with itself.
    store.delete("runs", "better", "result.json")
    code, again = train("better", None)
    assert (code, again["promoted"], again["champion"]) == (0, True, better["champion"])

    # Meanwhile somebody rolled it back; a run is promoted by its own command once, and not again.
    assert rollback(store, "champion").run_id == "first"
    assert train("better", None) == (0, again)
    champion = read_alias(store, "champion")
    assert champion is not None
    assert champion.run_id == "first"


def test_a_job_that_fails_after_the_training_says_so_and_goes_on_from_there(train: Any) -> None:
    code, failed = train("stuck", 1.0, "--set", "output=/proc/{run_id}")
    record = read_record(train.store, "stuck")
    assert record is not None
    assert (failed["exit_code"], failed["state"], record.state) == (code, "failed", "failed")
    assert "/proc/stuck" in str(record.cause)
    assert (record.artefacts, record.metrics) == ({"model": "runs/stuck/model.keras"}, {"loss": 2.0})
    with pytest.raises(ParamError, match=r"no run in .* has finished"):
        best_run(train.store, "loss")

    code, result = train("stuck", None)
    assert (code, result["state"], result["promoted"]) == (0, "finished", True)
    assert best_run(train.store, "held_out.val_loss").cause is None


def test_a_run_goes_on_with_the_configuration_that_it_began_with(train: Any) -> None:
    store: Store = train.store

    def refused(run_id: str, *assignments: str) -> str:
        before = {name: store.read_bytes("runs", run_id, name) for name in ("run.json", "job.json")}
        arguments = [part for assignment in assignments for part in ("--set", assignment)]
        code, result = train(run_id, None, *arguments)
        assert (code, result["error"]) == (78, "ParamError")
        assert {name: store.read_bytes("runs", run_id, name) for name in before} == before
        return str(result["cause"])

    secret = "input.options.password"
    assert train("stuck", 1.0, "--set", "output=/proc/{run_id}", "--set", f"{secret}=hush")[0] != 0
    cause = refused("stuck", "batch_size=7", "input.window={column: id}", "evaluation.by=[x]")
    assert (
        "was begun with another configuration: estimator.batch_size, evaluation.by, input.window.column diff" in cause
    )
    # How it is launched and where it goes is free, and a secret may have expired.
    free = ["--set", "num_proc=1", "--set", "estimator.verbose=0", "--set", f"{secret}=hushed", "--set", "alias=other"]
    code, first = train("stuck", None, *free)
    assert (code, first["promoted"]) == (0, True)

    assert "another configuration: estimator.loss differs. Give another --run-id" in refused("stuck", "loss=mae")
    assert store.read_json("runs", "stuck", "result.json") == first
    assert train("stuck", None) == (0, first)

    # The verdict of a gate is that gate's alone.
    store.delete("runs", "stuck", "result.json")
    code, again = train("stuck", None, *free, "--set", "promote_if=val_loss < 1e-9")
    assert (code, again["promoted"], again["metrics"]) == (0, False, first["metrics"])
    assert again["cause"].endswith("is not < 1e-09")

    # As long as nothing is trained a mistake in the configuration can be mended.
    assert "column 'z' does not exist" in train("mended", None, "--set", "feature_cols=[z]")[1]["cause"]
    assert "needs 9 slots" in train("mended", None, "--set", "num_proc=9")[1]["cause"]


def test_a_model_is_compared_anew_where_another_was_promoted_meanwhile(train: Any) -> None:
    store: Store = train.store
    train("first", 1.0)
    train("second", 1.5)
    # As if it had been compared before the second was there, and its driver had died then.
    notes = Notes.read(store, "second")
    assert notes is not None
    notes.with_(store, "second", champion=None)
    store.delete("runs", "second", "result.json")
    store.delete("aliases", "champion.json")
    promote(store, "champion", AliasEntry("third", train("third", 1.9)[1]["model"]))
    code, again = train("second", None)
    assert (code, again["promoted"], again["champion"]["run_id"]) == (0, False, "third")


def test_a_model_whose_loss_is_not_a_number_is_not_promoted_and_does_not_stay(train: Any) -> None:
    code, first = train("first", float("nan"))
    assert (code, first["promoted"], first["cause"]) == (0, False, "val_loss is nan, not a finite number")
    assert read_alias(train.store, "champion") is None
    for name in ("job.json", "result.json", "run.json"):
        json.loads(train.store.read_bytes("runs", "first", name), parse_constant=pytest.fail)
    assert train("forced", float("nan"), "--set", "promote_if=always")[1]["promoted"]
    code, second = train("second", 5.0)
    assert (code, second["promoted"], second["champion"]["run_id"]) == (0, True, "forced")


def test_a_champion_that_cannot_be_compared_is_found_before_the_training(train: Any) -> None:
    store: Store = train.store

    def refused(run_id: str, *arguments: str) -> tuple[int, str]:
        code, result = train(run_id, None, *arguments)
        record = read_record(store, run_id)
        assert record is not None
        assert record.state == "failed"
        assert all(attempt.ranks is None for attempt in record.attempts)
        return code, result["cause"]

    always = ("--set", "promote_if=always")
    train("first", 1.0, *always)
    store.delete("runs", "first", "pipeline")
    code, cause = refused("next")
    assert (code, "to cannot be compared with a new one: there is no saved model in" in cause) == (78, True)
    assert "hvdspark models rollback champion" in cause

    # What always promotes does without a comparison, here with a model for another column.
    code, other = train("other", 1.0, *always, "--set", "label_cols=[is_odd]")
    assert (code, other["promoted"], other["champion"]) == (0, True, {"run_id": "first", "metrics": {}})
    code, cause = refused("next")
    assert (code, "it predicts is_odd, and label_cols are y" in cause) == (78, True)

    store.publish_bytes(b"{", "aliases", "champion.json")
    assert "the alias 'champion' is damaged" in refused("next", *always)[1]


def test_a_run_that_was_promoted_by_hand_is_scored_with_and_compared(
    spark: SparkSession, train: Any, data: str, tmp_path: Path
) -> None:
    store: Store = train.store

    def promote_by_hand(alias: str, run_id: str, **facts: Any) -> dict[str, Any]:
        with recorded(store, run_id, **facts):
            pass
        done = CliRunner().invoke(cli.main, ["models", "promote", alias, run_id, "--store", store.url, "--json"])
        assert done.exit_code == 0, done.stderr
        entry: dict[str, Any] = json.loads(done.stdout)
        return entry

    def weight_of(alias: str) -> float:
        output = str(tmp_path / alias)
        command = ["score", "--model", f"alias:{alias}", "--store", store.url, "--input", data, "--output", output]
        done = CliRunner().invoke(cli.main, command)
        assert done.exit_code == 0, done.stderr
        (weight,) = {round(row.prediction / row.x, 3) for row in spark.read.parquet(output).where("x != 0").collect()}
        return weight

    # Of a job it is the pipeline, as when the job promotes it itself.
    job = train("job", 1.0, "--set", "promote_if=", "--set", "output_cols=[prediction]")[1]
    entry = promote_by_hand("production", "job")
    assert (entry["model"], entry["metrics"]) == (job["model"], job["metrics"])
    assert weight_of("production") == 1.0

    # A fit alone leaves a file of Keras'; what its columns are is in the run's record.
    store.publish_bytes(codec.model_to_bytes(dense(1, None, 1.5, "y")), "runs", "fit", "model.keras")
    columns = {"feature_cols": ["x"], "label_cols": ["y"], "output_cols": ["prediction"]}
    assert promote_by_hand("champion", "fit", kind="keras", params=columns)["model"] == "runs/fit/model.keras"
    assert weight_of("champion") == 1.5
    code, worse = train("worse", 1.4)
    assert (code, worse["promoted"], worse["champion"]["run_id"]) == (0, False, "fit")
    code, better = train("better", 1.9)
    assert (code, better["promoted"], better["champion"]["run_id"]) == (0, True, "fit")


def test_a_run_that_another_driver_holds_is_left_alone(train: Any) -> None:
    store: Store = train.store
    with held(store, "runs/busy", "job"):
        code, result = train("busy", None)
    assert (code, result["state"], result["error"]) == (75, "running", "RunInProgressError")
    assert "another driver is at the run 'busy'" in result["cause"]
    assert store.list("runs", "busy") == []


@pytest.mark.parametrize(
    ("arguments", "code", "cause"),
    [
        (
            ["--set", "promote_if=val_los < current"],
            78,
            "gives no 'val_los'. Did you mean 'val_loss'? It gives: val_loss",
        ),
        (["--set", "input.path=/nowhere"], 65, "cannot read the input /nowhere"),
        (["--set", "feature_cols=[z]"], 78, "column 'z' does not exist"),
        (["--set", "evaluation={input: {path: /nowhere}}"], 65, "cannot read the input /nowhere"),
        (["--set", "input.window={column: id}", "--until", "0"], 65, "there are no rows to train on"),
        (["--warm-start", "champoin"], 78, "Did you mean 'champion'?"),
        (["--set", "num_proc=9"], 75, "needs 9 slots"),
        (["--set", "estimator.model=/nowhere.keras"], 78, "cannot read /nowhere.keras"),
        (["--store", "nosuch://x"], 78, "cannot open the Store"),
    ],
)
def test_what_is_wrong_before_the_training_is_told_with_its_exit_code(
    train: Any, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, cause: str
) -> None:
    found, result = train("wrong", None, *arguments)
    assert (found, result["exit_code"], result["state"]) == (code, code, "failed")
    assert cause in result["cause"]
    if code != 78 or "cannot open" not in cause:
        assert train.store.read_json("runs", "wrong", "result.json") == result
        [record] = list_runs(train.store)
        assert (record.run_id, record.state, record.kind) == ("wrong", "failed", "keras")
        assert cause in str(record.cause)
        assert [verdict.removed for verdict in gc_runs(train.store, keep_last=0)] == [True]
    assert train.store.list("runs") == []


def test_rows_that_spark_cannot_read_are_bad_data(train: Any, data: str, tmp_path: Path) -> None:
    (tmp_path / "cut").mkdir()
    whole = next(Path(data).glob("*.parquet")).read_bytes()
    (tmp_path / "cut" / "rows.parquet").write_bytes(whole[: len(whole) // 2])

    def failed(run_id: str, **source: str) -> str:
        settings = [part for name, value in source.items() for part in ("--set", f"input.{name}={value}")]
        code, result = train(run_id, None, *settings)
        assert (code, result["state"]) == (65, "failed"), result
        return str(result["cause"])

    # Spark looks at the footer for the schema, or, with one given, when the rows are read.
    assert "rows.parquet" in failed("footer", path=str(tmp_path / "cut"))
    assert "rows.parquet" in failed("rows", path=str(tmp_path / "cut"), schema="x DOUBLE, y DOUBLE, id LONG")
    query = f"SELECT id, x, CAST(IF(id = 7, 'none', '1') AS INT) AS y FROM parquet.`{data}`"
    assert "CAST_INVALID_INPUT" in failed("cast", path="null", sql=query)


def test_scoring_goes_by_path_or_alias_and_says_what_is_wrong(
    spark: SparkSession, train: Any, data: str, tmp_path: Path
) -> None:
    store: Store = train.store
    model = train("first", 1.0)[1]["model"]

    def score(name: str, *arguments: str) -> tuple[int, dict[str, Any]]:
        command = ["score", "--model", name, "--output", str(tmp_path / "scored"), *arguments]
        done = CliRunner().invoke(cli.main, command)
        return done.exit_code, json.loads(done.stdout.splitlines()[-1])

    alias = ["alias:champion", "--store", store.url, "--input", data]
    code, result = score(*alias, "--columns", "id,y__output", "--output-format", "json")
    assert (code, result["rows"], result["run_id"], result["model"]) == (0, ROWS, "first", model)
    rows = spark.read.json(str(tmp_path / "scored")).collect()
    assert {row.id: row.y__output for row in rows} == pytest.approx(
        {number: float(np.sin(number)) for number in range(ROWS)}, rel=1e-5
    )
    code, result = score(*alias)
    assert code == 78
    assert "is there already; give another path, or --mode overwrite" in result["cause"]
    one_day = ["--sql", f"SELECT * FROM parquet.`{data}` WHERE day = date'{dt.date(2026, 1, 2)}'"]
    assert (
        score(f"{model}/stages/{Path(model, 'stages').iterdir().__next__().name}", *one_day, "--mode", "overwrite")[1][
            "rows"
        ]
        == 10
    )
    wrong = [
        (["alias:challenger", "--store", store.url, "--input", data], 78, "there is no alias 'challenger'"),
        (["alias:champion", "--input", data], 78, "give the Store that has the alias"),
        ([data, "--input", data], 78, "there is no saved model in"),
        ([f"{store.url}/runs/first/model.keras", "--input", data], 78, "is a file of Keras' own, which does not say"),
        ([model], 78, "the input: give one of 'path'"),
        ([model, "--input", "/nowhere"], 65, "cannot read the input /nowhere"),
        ([model, "--input", data, "--option", "x"], 78, "--option x: give a name and a value"),
        ([model, "--input", data, "--columns", "idd"], 78, "column 'idd' does not exist"),
    ]
    for arguments, expected, cause in wrong:
        code, result = score(*arguments)
        assert (code, cause in result["cause"]) == (expected, True), result
