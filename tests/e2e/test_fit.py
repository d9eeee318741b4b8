"""``fit`` on a real cluster: it learns, it loses no row, and it is right to float tolerance."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from hvdspark.estimators import BestOf, KerasEstimator, KerasModel
from pyspark.ml import Pipeline, PipelineModel
from pyspark.ml.evaluation import RegressionEvaluator
from pyspark.ml.feature import VectorAssembler
from pyspark.ml.tuning import CrossValidator, ParamGridBuilder, TrainValidationSplit
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from hvdspark import Store, show_run
from hvdspark.errors import (
    NotEnoughSlotsError,
    NullValueError,
    ParamError,
    SchemaError,
    StoreError,
    WorkerFailedError,
)

Rows = list[tuple[Any, ...]]


def linear_rows(rows: int, seed: int = 0) -> Rows:
    """Make rows ``(id, a, b, c, y, w)`` with ``y`` linear in the others, but for a little noise."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(rows, 3))
    y = x @ [2.0, -1.0, 0.5] + 3 + 0.01 * random.normal(size=rows)
    weights = random.uniform(0.5, 2.0, size=rows)
    return [(i, *map(float, x[i]), float(y[i]), float(weights[i])) for i in range(rows)]


def frame(spark: SparkSession, rows: Rows, partitions: int = 3) -> DataFrame:
    schema = "id long, a double, b double, c double, y double, w double"
    return spark.createDataFrame(spark.sparkContext.parallelize(rows, partitions), schema)


def linear_model(seed: int = 1) -> keras.Model:
    keras.utils.set_random_seed(seed)
    return keras.Sequential([keras.Input((3,)), keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(1)])


def estimator(store: Store | None, **overrides: Any) -> KerasEstimator:
    given: dict[str, Any] = {
        "num_proc": 2,
        "store": store,
        "model": linear_model(),
        "optimizer": keras.optimizers.Adam(0.02),
        "loss": "mse",
        "feature_cols": [["a", "b", "c"]],
        "label_cols": ["y"],
        "batch_size": 32,
        "epochs": 5,
        "verbose": 0,
    }
    return KerasEstimator(**{**given, **overrides})


def rmse(scored: DataFrame, column: str = "y__output") -> float:
    return RegressionEvaluator(labelCol="y", predictionCol=column).evaluate(scored)


def weights_of(model: KerasModel) -> list[np.ndarray]:
    return [np.asarray(weight) for weight in model.getModel().get_weights()]


def test_a_pipeline_learns_and_its_saved_copy_predicts_the_same(
    spark: SparkSession, store: Store, tmp_path: Path
) -> None:
    df = frame(spark, linear_rows(3000)).cache()
    assembler = VectorAssembler(inputCols=["a", "b", "c"], outputCol="features")
    network = linear_model()
    before = [weight.copy() for weight in network.get_weights()]
    keras_stage = estimator(
        store,
        model=network,
        feature_cols=["features"],
        validation=0.2,
        metrics=["mae"],
        run_id="learns",
        output_cols=["guess"],
    )
    pipeline = Pipeline(stages=[assembler, keras_stage])
    fitted = pipeline.fit(df)
    model = fitted.stages[-1]

    history = model.getHistory()
    assert sorted(history) == ["loss", "mae", "val_loss", "val_mae"]
    assert all(len(values) == 5 for values in history.values())
    assert history["loss"][-1] < 0.1 * history["loss"][0]
    scored = fitted.transform(df)
    spread = df.agg(F.stddev("y")).first()[0]
    assert rmse(scored, "guess") < 0.2 * spread

    assert model.uid == keras_stage.uid
    assert model.getRunId() == "learns"
    assert {"check", "write", "launch", "import", "train", "publish"} <= set(model.phases)
    assert model.rows_per_s > 0
    assert 0 < model.data_wait_share < 1
    files = ["checkpoints", "history.json", "logs", "model.keras", "progress.json", "run.json"]
    assert store.list("runs", "learns") == files
    assert store.list("runs", "learns", "logs") == ["launch.json", "rank-0.log", "rank-1.log"]
    log = store.read_bytes("runs", "learns", "logs", "rank-0.log").decode()
    assert "epoch 5/5" in log
    assert log.count("decoded rows are kept in memory") == 2  # those to train on, and those to validate on
    for was, now in zip(before, network.get_weights(), strict=True):
        np.testing.assert_array_equal(was, now)

    path = str(tmp_path / "pipeline")
    fitted.write().overwrite().save(path)
    loaded = PipelineModel.load(path)
    expected = [row.guess for row in scored.orderBy("id").select("guess").collect()]
    found = [row.guess for row in loaded.transform(df).orderBy("id").select("guess").collect()]
    assert found == expected


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_one_rank_and_two_end_with_the_same_weights(spark: SparkSession, store: Store, optimizer: str) -> None:
    """Several steps, a last one that is not full, sample weights, metrics and validation."""
    df = frame(spark, linear_rows(333), partitions=4).withColumn("held_out", (F.col("id") % 7 == 0).cast("int"))
    optimizers = {"sgd": keras.optimizers.SGD(0.05, momentum=0.9), "adam": keras.optimizers.Adam(0.01)}

    def fit(ranks: int) -> KerasModel:
        return estimator(
            store,
            num_proc=ranks,
            optimizer=optimizers[optimizer],
            batch_size=64 // ranks,
            epochs=3,
            shuffle=False,
            scale_learning_rate=False,
            sample_weight_col="w",
            validation="held_out",
            metrics=["mae", keras.metrics.RootMeanSquaredError()],
        ).fit(df)

    alone, together = fit(1), fit(2)
    for one, two in zip(weights_of(alone), weights_of(together), strict=True):
        np.testing.assert_allclose(one, two, rtol=2e-5, atol=2e-6)
    assert alone.getHistory().keys() == together.getHistory().keys()
    for name, values in alone.getHistory().items():
        np.testing.assert_allclose(values, together.getHistory()[name], rtol=2e-5, err_msg=name)
    # The test sees the difference it looks for: other weights come of other steps.
    assert not np.allclose(weights_of(alone)[0], linear_model().get_weights()[0], atol=1e-3)


def test_a_rank_without_rows_in_the_last_step_changes_nothing(spark: SparkSession, store: Store) -> None:
    """65 rows in global batches of 64 leave one row for two ranks: the other must not train on, or count, any."""
    df = frame(spark, linear_rows(65), partitions=1)

    def fit(ranks: int) -> KerasModel:
        return estimator(
            store,
            num_proc=ranks,
            optimizer=keras.optimizers.Adam(0.01),
            batch_size=64 // ranks,
            epochs=2,
            shuffle=False,
            scale_learning_rate=False,
            metrics=["mae"],
        ).fit(df)

    alone, together = fit(1), fit(2)
    for one, two in zip(weights_of(alone), weights_of(together), strict=True):
        np.testing.assert_allclose(one, two, rtol=2e-5, atol=2e-6)
    for name, values in alone.getHistory().items():
        np.testing.assert_allclose(values, together.getHistory()[name], rtol=2e-5, err_msg=name)


def test_every_row_is_seen_exactly_once_per_epoch(spark: SparkSession, store: Store) -> None:
    """Counted inside the training step, over all ranks, by a sum that no loss or repetition of rows leaves as it is."""
    rows = 1001
    df = frame(spark, linear_rows(rows), partitions=3).repartition(5)
    model = estimator(
        store,
        label_cols=["id"],
        epochs=2,
        loss=id_squared,
        scale_learning_rate=False,
        optimizer=keras.optimizers.SGD(0.0),
    ).fit(df)
    # The loss of a row is its id squared, whatever the model says: the mean over all rows is known exactly.
    expected = sum(i * i for i in range(rows)) / rows
    np.testing.assert_allclose(model.getHistory()["loss"], [expected] * 2, rtol=1e-6)


def id_squared(y_true: Any, y_pred: Any) -> Any:
    return keras.ops.square(keras.ops.cast(y_true, "float32")) + 0.0 * y_pred


@pytest.mark.parametrize(
    ("rows", "partitions", "repartition"),
    [(1000, 1, None), (1000, 3, None), (500, 40, None), (10, 3, 8), (1, 1, None), (3, 2, None)],
)
def test_each_rank_reads_its_rows_once_whatever_the_partitions(
    spark: SparkSession, store: Store, rows: int, partitions: int, repartition: int | None
) -> None:
    """Row by row, through the batches that the training reads, without the cost of a training."""
    from hvdspark.estimators.keras.batches import Batches

    from hvdspark.data import schema
    from hvdspark.data.materialize import materialize
    from hvdspark.data.partitions import Split
    from hvdspark.data.shards import plan_shards
    from hvdspark.plan import FitPlan

    df = frame(spark, linear_rows(rows), partitions)
    df = df if repartition is None else df.repartition(repartition)
    columns, batch = schema.check_columns(df.schema, feature_cols=[["a", "b"]], label_cols=["id"])
    dataset, manifest = materialize(df, columns, Split(), store)
    for ranks in (1, 2, 3):
        for shuffle in (True, False):
            shards = plan_shards(manifest.splits["train"], ranks, 16, keep_order=not shuffle)
            resolved = schema.resolve(batch, manifest.columns)
            plan = FitPlan("run", store.ref(), dataset, manifest.columns, resolved, shards, None, 2, shuffle, 0)
            seen: list[list[int]] = [[], []]
            steps = set()
            for rank in range(ranks):
                batches = Batches(plan, shards, rank, shuffle=shuffle, workers=2)
                facts = batches.facts(1)
                number = 0
                for chunk in batches.chunks(2, fill=True):
                    for place in range(batches.steps_in(chunk)):
                        ids = np.asarray(batches.batch(chunk, place)[1])
                        (own,), (total,), (apply,) = facts.of(number, number + 1)
                        assert apply
                        assert 0 < total <= 16 * ranks
                        if own:
                            assert len(ids) == own
                            seen[number // shards.steps] += [int(i) for i in ids.reshape(-1)]
                        number += 1
                steps.add(number)
            assert steps == {2 * shards.steps}
            assert [sorted(ids) for ids in seen] == [list(range(rows))] * 2


def test_several_inputs_and_outputs_with_loss_weights(spark: SparkSession, store: Store) -> None:
    df = frame(spark, linear_rows(2000)).selectExpr(
        "id", "array(a, b) ab", "c", "cast(id % 5 as int) group", "y", "cast(y > 3 as int) high", "w"
    )
    numbers, extra = keras.Input((2,), name="numbers"), keras.Input((1,), name="extra")
    group = keras.Input((1,), dtype="int32", name="group")
    embedded = keras.layers.Flatten()(keras.layers.Embedding(5, 2)(group))
    hidden = keras.layers.Dense(16, activation="relu")(keras.layers.Concatenate()([numbers, extra, embedded]))
    outputs = {
        "value": keras.layers.Dense(1, name="value")(hidden),
        "high": keras.layers.Dense(2, activation="softmax", name="high")(hidden),
    }
    network = keras.Model({"numbers": numbers, "extra": extra, "group": group}, outputs)
    by_name = {"extra": "c", "group": "group", "numbers": "ab"}
    model = estimator(
        store,
        model=network,
        loss={"value": "mse", "high": "sparse_categorical_crossentropy"},
        loss_weights={"value": 0.1, "high": 1.0},
        metrics={"high": ["accuracy"]},
        feature_cols=[by_name[tensor.name] for tensor in network.inputs],
        label_cols=["high" if "high" in name else "y" for name in network.output_names],
        epochs=8,
        validation=0.1,
        gradient_compression="fp16",
    ).fit(df)
    history = model.getHistory()
    accuracy = next(values for name, values in history.items() if name.startswith("val_") and "acc" in name)
    assert accuracy[-1] > 0.9
    scored = model.transform(df)
    assert rmse(scored) < 0.5 * df.agg(F.stddev("y")).first()[0]
    row = scored.first()
    assert len(row["high__output"]) == 2
    assert math.isclose(sum(row["high__output"]), 1, abs_tol=1e-5)


def test_callbacks_run_on_every_rank_with_the_same_metrics_and_writers_on_rank_0_alone(
    spark: SparkSession, store: Store, tmp_path: Path
) -> None:
    class Note(keras.callbacks.Callback):
        def __init__(self, folder: str) -> None:
            super().__init__()
            self.folder = folder
            self.lines: list[str] = []

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            self.lines.append(json.dumps(logs))
            if epoch == 2:
                self.model.stop_training = True

        def on_train_end(self, logs: Any = None) -> None:
            import os

            Path(self.folder, f"rank-{os.environ['HOROVOD_RANK']}").write_text("\n".join(self.lines))

    csv = tmp_path / "log.csv"
    df = frame(spark, linear_rows(500))
    model = estimator(
        store,
        epochs=9,
        validation=0.2,
        callbacks=[Note(str(tmp_path)), keras.callbacks.CSVLogger(str(csv))],
        checkpoint_callback=BestOf("val_loss"),
    ).fit(df)
    first, second = ((tmp_path / f"rank-{rank}").read_text().splitlines() for rank in (0, 1))
    assert first == second
    assert len(first) == 3, "stop_training ends the training on all ranks"
    assert [json.loads(line)["loss"] for line in first] == model.getHistory()["loss"]
    assert len(csv.read_text().splitlines()) == 1 + 3


def test_hooks_for_steps_that_a_callback_was_given_are_called_at_every_step(
    spark: SparkSession, store: Store, tmp_path: Path
) -> None:
    def note(name: str) -> Callable[..., None]:
        def hook(batch: int, logs: Any = None) -> None:
            import os

            with (tmp_path / f"{name}-{os.environ['HOROVOD_RANK']}").open("a") as file:
                file.write(f"{batch} {'loss' in (logs or {})}\n")

        return hook

    names = ("on_train_batch_begin", "on_train_batch_end", "on_test_batch_begin", "on_test_batch_end")
    callback = keras.callbacks.LambdaCallback(**{name: note(name) for name in names})
    # Of 500 rows some 400 are for training: seven steps of two ranks, and two of validation.
    estimator(store, callbacks=[callback], validation=0.2, epochs=1).fit(frame(spark, linear_rows(500)))
    for name in names:
        for rank in (0, 1):
            lines = (tmp_path / f"{name}-{rank}").read_text().splitlines()
            steps = 7 if "train" in name else 2
            assert lines == [f"{step} {name.endswith('end')}" for step in range(steps)], name


def test_the_best_epoch_is_kept_where_that_is_wanted(spark: SparkSession, store: Store) -> None:
    """The learning rate is too large after the first epochs, so that the last epoch is not the best."""

    def explode(epoch: int, rate: float) -> float:
        return rate if epoch < 2 else 1.5

    df = frame(spark, linear_rows(500)).cache()
    settings: dict[str, Any] = {
        "epochs": 4,
        "optimizer": keras.optimizers.SGD(0.02),
        "scale_learning_rate": False,
        "callbacks": [keras.callbacks.LearningRateScheduler(explode)],
    }
    best = estimator(store, checkpoint_callback=BestOf("loss"), **settings).fit(df)
    restore = keras.callbacks.EarlyStopping(monitor="loss", patience=1, restore_best_weights=True)
    restored = estimator(store, **{**settings, "callbacks": [*settings["callbacks"], restore]}).fit(df)
    last = estimator(store, **settings).fit(df)
    assert rmse(best.transform(df)) < 2
    assert rmse(restored.transform(df)) < 2
    assert not rmse(last.transform(df)) < 10


def test_the_learning_rate_is_scaled_while_training_and_the_users_own_in_the_model(
    spark: SparkSession, store: Store
) -> None:
    class Rate(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            logs["rate"] = float(self.model.optimizer.learning_rate)

    df = frame(spark, linear_rows(200))
    schedule = keras.optimizers.schedules.ExponentialDecay(0.01, 1000, 0.9)
    for optimizer, factor in ((keras.optimizers.SGD(0.01), 2), (keras.optimizers.SGD(schedule), 2)):
        model = estimator(store, optimizer=optimizer, callbacks=[Rate()], epochs=1).fit(df)
        assert model.getHistory()["rate"][0] == pytest.approx(0.01 * factor, rel=1e-2)
        saved = model.getModel().optimizer
        assert float(saved.learning_rate) == pytest.approx(0.01, rel=1e-2)
        assert type(saved).__module__.startswith("keras.")


def test_gradients_of_several_batches_go_into_one_update(spark: SparkSession, store: Store) -> None:
    """Two batches of 16 averaged locally are one batch of 32."""
    df = frame(spark, linear_rows(320), partitions=1)

    def fit(batch: int, passes: int) -> KerasModel:
        return estimator(
            store,
            batch_size=batch,
            backward_passes_per_step=passes,
            optimizer=keras.optimizers.SGD(0.05),
            epochs=2,
            shuffle=False,
            scale_learning_rate=False,
        ).fit(df)

    for one, two in zip(weights_of(fit(32, 1)), weights_of(fit(16, 2)), strict=True):
        np.testing.assert_allclose(one, two, rtol=2e-5, atol=2e-6)


def test_a_model_that_learns_its_shape_from_the_rows(spark: SparkSession, store: Store) -> None:
    df = frame(spark, linear_rows(2000))
    layers = [
        keras.layers.Dense(32, activation="tanh"),
        keras.layers.BatchNormalization(momentum=0.9),
        keras.layers.Dropout(0.1),
        keras.layers.Dense(1),
    ]
    model = estimator(store, model=keras.Sequential(layers), epochs=8).fit(df)
    assert model.getHistory()["loss"][-1] < 0.5 * model.getHistory()["loss"][0]
    assert rmse(model.transform(df)) < 1.5


def test_cross_validation_picks_the_better_learning_rate(spark: SparkSession, store: Store) -> None:
    df = frame(spark, linear_rows(1200)).cache()
    stage = estimator(store, epochs=3, num_proc=1)  # seven fits: one rank starts in half the time
    grid = ParamGridBuilder().addGrid(stage.learning_rate, [1e-6, 0.02]).build()
    evaluator = RegressionEvaluator(labelCol="y", predictionCol="y__output")
    found = CrossValidator(estimator=stage, estimatorParamMaps=grid, evaluator=evaluator, numFolds=2, seed=1).fit(df)
    assert found.avgMetrics[1] < 0.5 * found.avgMetrics[0]
    assert found.bestModel.transform(df).count() == 1200
    split = TrainValidationSplit(estimator=stage, estimatorParamMaps=grid[1:], evaluator=evaluator, seed=1).fit(df)
    assert split.validationMetrics[0] < 2 * found.avgMetrics[1]


def test_the_error_of_rank_1s_callback_arrives_by_name_and_leaves_no_dataset(spark: SparkSession, store: Store) -> None:
    class Fails(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            import os

            if os.environ["HOROVOD_RANK"] == "1":
                raise ZeroDivisionError("only on rank one")

    df = frame(spark, linear_rows(200))
    with pytest.raises(WorkerFailedError, match=r"^rank 1 on .*: ZeroDivisionError: only on rank one") as caught:
        estimator(store, callbacks=[Fails()], run_id="fails").fit(df)
    assert "Logs of all ranks" in str(caught.value)
    assert "only on rank one" in store.read_bytes("runs", "fails", "logs", "rank-1.log").decode()


def test_the_same_dataframe_again_is_not_written_again_unless_its_source_changed(
    spark: SparkSession, store: Store, tmp_path: Path
) -> None:
    source = str(tmp_path / "source")
    context = spark.sparkContext

    def jobs_of_a_fit(name: str, **overrides: Any) -> int:
        context.setJobGroup(name, "a fit")
        estimator(store, **{"num_proc": 1, "epochs": 1, **overrides}).fit(df)
        jobs = len(context.statusTracker().getJobIdsForGroup(name))
        context.setLocalProperty("spark.jobGroup.id", "")
        return jobs

    frame(spark, linear_rows(300)).write.parquet(source)
    df = spark.read.parquet(source)
    assert jobs_of_a_fit("first") > 1
    (dataset,) = store.list("datasets")
    assert jobs_of_a_fit("again", epochs=2) == 1, "the stage of the ranks alone"
    assert store.list("datasets") == [dataset]

    frame(spark, linear_rows(200)).write.mode("overwrite").parquet(source)
    df = spark.read.parquet(source)
    assert jobs_of_a_fit("changed", keep_dataset=True) > 1
    assert len(store.list("datasets")) == 2
    assert jobs_of_a_fit("not kept", keep_dataset=False) > 1
    assert len(store.list("datasets")) == 2
    assert len(store.gc(max_bytes=0)) == 2
    assert store.list("datasets") == []


def test_files_of_spark_train_the_same_model_where_they_lie(spark: SparkSession, store: Store, tmp_path: Path) -> None:
    source = str(tmp_path / "source")
    assembler = VectorAssembler(inputCols=["a", "b", "c"], outputCol="x")
    assembler.transform(frame(spark, linear_rows(500)).coalesce(1)).write.parquet(source)
    stage = estimator(store, feature_cols=["x"], shuffle=False, epochs=2)
    written = stage.fit(spark.read.parquet(source))
    in_place = stage.fit_on_parquet(source)
    (key,) = store.list("datasets")
    (attempt,) = (name for name in store.list("datasets", key) if store.exists("datasets", key, name, "manifest.json"))
    again = stage.fit_on_parquet(store.url_of("datasets", key, attempt))
    for model in (in_place, again):
        for ours, theirs in zip(weights_of(model), weights_of(written), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert len(store.list("datasets")) == 1
    known = {
        model.getRunId(): show_run(store, str(model.getRunId())).record.data for model in (written, in_place, again)
    }
    assert {data["rows"] for data in known.values()} == {500}
    assert len({data["fingerprint"] for data in known.values()}) == 3
    assert (known[in_place.getRunId()]["source"], known[in_place.getRunId()].get("dataset")) == (source, None)


def bad_input(store: Store) -> list[tuple[dict[str, Any], type[Exception], str]]:
    file = Path(store.url).with_name("file")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("in the way")
    return [
        ({"feature_cols": [["a", "b", "cc"]]}, SchemaError, "'cc' does not exist.*Did you mean 'c'"),
        ({"feature_cols": [["a", "b", "text"]]}, SchemaError, "'text' has type string.*StringIndexer"),
        ({"feature_cols": [["a", "b"]]}, SchemaError, "hold 2 values per row.*takes 3"),
        ({"feature_cols": ["a", "b"]}, ParamError, "2 entries, but the model has 1 inputs"),
        ({"label_cols": ["y", "w"]}, ParamError, "2 entries, but the model has 1 outputs"),
        ({"num_proc": 4}, NotEnoughSlotsError, "needs 4 slots, the cluster can run 2 at once"),
        ({"loss": None}, ParamError, "give loss="),
        ({"store": None}, ParamError, "needs store"),
        ({"store": Store.create(file / "store")}, StoreError, "not writable"),
        ({"validation": "heldout"}, SchemaError, "'heldout' does not exist"),
    ]


def test_bad_input_fails_before_any_job_and_says_what_to_do(spark: SparkSession, store: Store) -> None:
    df = frame(spark, linear_rows(10)).withColumn("text", F.lit("x"))
    group = "bad-input"
    spark.sparkContext.setJobGroup(group, "must stay empty")
    for override, error, message in bad_input(store):
        stage = estimator(**{"store": store, **override})
        with pytest.raises(error, match=message):
            stage.fit(df)
    assert list(spark.sparkContext.statusTracker().getJobIdsForGroup(group)) == []


def test_nulls_are_refused_with_the_column_and_their_number(spark: SparkSession, store: Store) -> None:
    df = frame(spark, linear_rows(100)).withColumn("b", F.when(F.col("id") % 10 != 0, F.col("b")))
    with pytest.raises(NullValueError, match="column 'b' has 10 nulls") as caught:
        estimator(store).fit(df)
    assert (caught.value.column, caught.value.count) == ("b", 10)
    assert store.list("datasets") == []
