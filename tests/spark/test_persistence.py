"""Saving and loading: whole, in another process, and never a pickle."""

from __future__ import annotations

import json
import pickletools
import shutil
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from hvdspark.estimators import BestOf, KerasEstimator, KerasModel
from hvdspark.estimators.keras import codec
from pyspark.errors import AnalysisException
from pyspark.ml import Pipeline, PipelineModel
from pyspark.ml.feature import VectorAssembler
from pyspark.ml.util import DefaultParamsReader
from pyspark.sql import DataFrame, SparkSession

from hvdspark import Store
from hvdspark.errors import ModelFormatError


def keras_model(seed: int = 1, name: str = "small") -> keras.Model:
    keras.utils.set_random_seed(seed)
    return keras.Sequential([keras.Input((2,)), keras.layers.Dense(4, "tanh"), keras.layers.Dense(1)], name=name)


def spark_model(seed: int = 1, **given: Any) -> KerasModel:
    network = keras_model(seed)
    inputs, outputs = codec.describe(network)
    assert inputs is not None
    assert outputs is not None
    model = KerasModel(codec.model_to_bytes(network), inputs, outputs, {"loss": [0.5, 0.25]}, **given)
    return model.setFeatureCols(["v"]).setLabelCols(["y"]).setTransformBatchSize(3)  # type: ignore[attr-defined, no-any-return]


@pytest.fixture(scope="module")
def rows(spark: SparkSession) -> DataFrame:
    numbers = spark.range(0, 10, numPartitions=2).selectExpr("double(id) as a", "double(id % 3) as b")
    return VectorAssembler(inputCols=["a", "b"], outputCol="v").transform(numbers)


def predictions(model: Any, rows: DataFrame) -> list[float]:
    return [row["y__output"] for row in model.transform(rows).orderBy("a").collect()]


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "saved")


def test_a_model_comes_back_as_it_was(spark: SparkSession, rows: DataFrame, path: str) -> None:
    model = spark_model().setRunId("run-7")
    model.save(path)
    again = KerasModel.load(path)
    assert (again.uid, again.getHistory(), again.getRunId()) == (model.uid, {"loss": [0.5, 0.25]}, "run-7")
    assert again.extractParamMap() == model.extractParamMap()
    assert again._outputs == model._outputs
    assert again._inputs == model._inputs
    assert predictions(again, rows) == predictions(model, rows)
    assert all(np.array_equal(x, y) for x, y in zip(again.getModel().weights, keras_model().weights, strict=True))


def test_a_history_with_values_that_are_no_numbers_comes_back(spark: SparkSession, path: str) -> None:
    model = spark_model()
    model._history = {"loss": [float("nan"), float("inf"), 0.1]}
    model.save(path)
    assert str(KerasModel.load(path).getHistory()) == "{'loss': [nan, inf, 0.1]}"


def test_an_estimator_comes_back_as_it_was(spark: SparkSession, path: str, tmp_path: Path) -> None:
    store = Store.create(tmp_path / "store", {"auto_mkdir": True})
    estimator = KerasEstimator(
        num_proc=2,
        store=store,
        model=keras_model(),
        optimizer=keras.optimizers.Adam(0.125),
        loss=keras.losses.BinaryCrossentropy(from_logits=True),
        metrics=["mae", keras.metrics.AUC(name="area")],
        loss_weights=[0.5],
        feature_cols=[["a", "b"]],
        label_cols=["y"],
        validation=0.25,
        output_types=[None],
        backend_env={"A": "b"},
        checkpoint_callback=BestOf("val_area", "max"),
    )
    estimator.save(path)
    again = KerasEstimator.load(path)
    assert again.uid == estimator.uid
    assert {p.name: v for p, v in again.extractParamMap().items()} == {
        p.name: v for p, v in estimator.extractParamMap().items()
    }
    assert again.getOptimizer().get_config() == estimator.getOptimizer().get_config()
    assert again.getLoss().get_config() == estimator.getLoss().get_config()
    assert (again.getMetrics()[0], again.getMetrics()[1].name, again.getLossWeights()) == ("mae", "area", [0.5])
    assert again.getCheckpointCallback() == BestOf("val_area", "max")
    assert again.getStore().url == store.url
    assert all(np.array_equal(x, y) for x, y in zip(again.getModel().weights, keras_model().weights, strict=True))
    assert "auto_mkdir" not in all_text(path)


def all_text(path: str) -> str:
    return "".join(part.read_text() for part in Path(path).rglob("part-*"))


def test_an_estimator_with_nothing_set_comes_back(spark: SparkSession, path: str) -> None:
    KerasEstimator().save(path)
    again = KerasEstimator.load(path)
    assert (again.getModel(), again.getStore(), again.getBatchSize()) == (None, None, 32)
    assert not again.isSet(again.batch_size)


def test_params_that_were_set_and_defaults_stay_apart(spark: SparkSession, path: str) -> None:
    KerasEstimator(batch_size=32, epochs=3).save(path)
    again = KerasEstimator.load(path)
    assert [again.isSet(param) for param in (again.batch_size, again.epochs, again.shuffle)] == [True, True, False]


def test_callbacks_are_not_saved_and_the_error_says_what_to_do(spark: SparkSession, path: str) -> None:
    estimator = KerasEstimator(callbacks=[keras.callbacks.EarlyStopping()])
    with pytest.raises(ModelFormatError, match=r"callbacks \(EarlyStopping\) cannot be saved.*setCallbacks\(\[\]\)"):
        estimator.save(path)
    assert not Path(path).exists()
    estimator.setCallbacks([]).save(path)  # type: ignore[attr-defined]
    assert KerasEstimator.load(path).uid == estimator.uid


def test_a_pipeline_model_comes_back_as_it_was(spark: SparkSession, rows: DataFrame, path: str) -> None:
    assembler = VectorAssembler(inputCols=["a", "b"], outputCol="v2")
    pipeline = PipelineModel([assembler, spark_model().setFeatureCols(["v2"])])
    pipeline.write().overwrite().save(path)
    again = PipelineModel.load(path)
    assert predictions(again, rows) == predictions(pipeline, rows)


def test_a_pipeline_with_the_estimator_comes_back(spark: SparkSession, path: str) -> None:
    estimator = KerasEstimator(model=keras_model(), loss="mse", epochs=4)
    Pipeline(stages=[VectorAssembler(inputCols=["a"], outputCol="v"), estimator]).save(path)
    stage: Any = Pipeline.load(path).getStages()[1]
    assert (type(stage), stage.uid, stage.getEpochs(), stage.getLoss()) == (KerasEstimator, estimator.uid, 4, "mse")


def test_saving_over_something_fails_and_leaves_it_whole(spark: SparkSession, rows: DataFrame, path: str) -> None:
    first, second = spark_model(1), spark_model(2)
    first.save(path)
    with pytest.raises(Exception, match=r"(?i)exist"):
        second.save(path)
    assert predictions(KerasModel.load(path), rows) == predictions(first, rows)


def test_overwriting_replaces_what_is_there(spark: SparkSession, rows: DataFrame, path: str) -> None:
    first, second = spark_model(1), spark_model(2)
    first.save(path)
    second.write().overwrite().save(path)
    again = KerasModel.load(path)
    assert again.uid == second.uid
    assert predictions(again, rows) == predictions(second, rows)
    KerasEstimator().write().overwrite().save(path)
    assert [found.name for found in Path(path).iterdir()] == ["metadata"]


@pytest.mark.parametrize("name", ["with space", "größe", "a%20b", "a+b", "a#b", "x=1"])
def test_a_path_may_have_any_name(spark: SparkSession, tmp_path: Path, name: str) -> None:
    path = str(tmp_path / name / "saved")
    model = spark_model()
    model.save(path)
    assert KerasModel.load(path).uid == model.uid


def test_a_url_is_a_path_too(spark: SparkSession, path: str) -> None:
    model = spark_model()
    model.save(f"file://{path}")
    assert KerasModel.load(path).uid == KerasModel.load(f"file:{path}").uid == model.uid


@pytest.fixture
def saved(spark: SparkSession, path: str) -> Path:
    spark_model().save(path)
    return Path(path)


def test_a_fresh_process_loads_it_and_predicts_the_same(
    spark: SparkSession, rows: DataFrame, saved: Path, tmp_path: Path
) -> None:
    pipeline = tmp_path / "pipeline"
    PipelineModel([spark_model()]).save(str(pipeline))
    program = f"""
        from pyspark.sql import SparkSession
        spark = SparkSession.builder.master("local[1]").config("spark.ui.enabled", "false").getOrCreate()
        spark.sparkContext.setLogLevel("OFF")
        from pyspark.ml import PipelineModel
        from pyspark.ml.feature import VectorAssembler
        numbers = spark.range(0, 10, numPartitions=2).selectExpr("double(id) as a", "double(id % 3) as b")
        rows = VectorAssembler(inputCols=["a", "b"], outputCol="v").transform(numbers)
        pipeline = PipelineModel.load({str(pipeline)!r})
        found = [row["y__output"] for row in pipeline.transform(rows).orderBy("a").collect()]
        import json
        print("answer", json.dumps(found))
        spark.stop()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    [answer] = [line for line in done.stdout.splitlines() if line.startswith("answer")]
    assert json.loads(answer.removeprefix("answer ")) == pytest.approx(predictions(spark_model(), rows), rel=1e-6)


def is_pickle(data: bytes) -> bool:
    """Whether bytes are a pickle from their start to their end."""
    try:
        return [code.name for code, _, _ in pickletools.genops(data)][-1:] == ["STOP"]
    except (ValueError, UnicodeDecodeError, KeyError):
        return False


def test_the_test_for_pickles_knows_one() -> None:
    import pickle

    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert is_pickle(pickle.dumps({"a": [1, print]}, protocol))


def contents(root: Path) -> Iterator[tuple[str, bytes]]:
    """Yield every file that was saved, and every member of those that are archives."""
    for file in root.rglob("*"):
        if file.suffix == ".keras":
            with zipfile.ZipFile(file) as archive:
                for name in archive.namelist():
                    yield f"{file.relative_to(root)}/{name}", archive.read(name)
        elif file.is_file() and not file.name.endswith(".crc"):
            yield str(file.relative_to(root)), file.read_bytes()


def test_what_is_saved_is_json_and_hdf5_and_no_pickle(spark: SparkSession, tmp_path: Path) -> None:
    spark_model(custom_objects={"f": lambda x: x}).save(str(tmp_path / "saved" / "model"))
    KerasEstimator(
        model=keras_model(), optimizer="adam", loss=keras.losses.Huber(), custom_objects={"f": lambda x: x}
    ).save(str(tmp_path / "saved" / "estimator"))
    found = dict(contents(tmp_path / "saved"))
    assert len(found) >= 10
    for name, data in found.items():
        assert not is_pickle(data), name
        assert b"cloudpickle" not in data, name
        if name.endswith(".h5"):
            assert data.startswith(b"\x89HDF\r\n")
        elif not name.endswith("_SUCCESS"):
            assert isinstance(json.loads(data), dict), name


def test_a_model_file_that_was_exchanged_is_refused(saved: Path) -> None:
    (saved / "model.keras").write_bytes(codec.model_to_bytes(keras_model(2)))
    drop_hadoop_checksums(saved)
    with pytest.raises(ModelFormatError, match=r"model\.keras is not the file that was saved"):
        KerasModel.load(str(saved))


def test_a_model_file_that_was_cut_off_is_refused(saved: Path) -> None:
    file = saved / "model.keras"
    file.write_bytes(file.read_bytes()[:-10])
    drop_hadoop_checksums(saved)
    with pytest.raises(ModelFormatError, match=r"model\.keras is not the file that was saved"):
        KerasModel.load(str(saved))


def drop_hadoop_checksums(root: Path) -> None:
    for file in root.rglob(".*.crc"):
        file.unlink()


def test_a_missing_model_file_is_refused(saved: Path) -> None:
    (saved / "model.keras").unlink()
    with pytest.raises(ModelFormatError, match=r"model\.keras is missing, though the metadata names it"):
        KerasModel.load(str(saved))


def test_a_folder_whose_writing_was_cut_off_is_not_taken_for_whole(saved: Path) -> None:
    shutil.rmtree(saved / "metadata")
    with pytest.raises(AnalysisException, match=r"PATH_NOT_FOUND|does not exist"):
        KerasModel.load(str(saved))


def test_nothing_at_all_is_sparks_own_error(spark: SparkSession, path: str) -> None:
    with pytest.raises(AnalysisException, match=r"PATH_NOT_FOUND|does not exist"):
        KerasModel.load(path)


def change_metadata(saved: Path, change: Callable[[dict[str, Any]], None]) -> None:
    [part] = saved.glob("metadata/part-*")
    values = json.loads(part.read_text())
    change(values)
    part.write_text(json.dumps(values))
    drop_hadoop_checksums(saved)


def test_the_metadata_of_another_class_is_refused(saved: Path) -> None:
    with pytest.raises(ModelFormatError, match=r"holds a .*\.KerasModel, not a .*\.KerasEstimator"):
        KerasEstimator.load(str(saved))


def test_the_class_path_in_the_metadata_is_the_one_that_spark_ml_can_import(saved: Path) -> None:
    metadata: list[dict[str, Any]] = []
    change_metadata(saved, metadata.append)
    assert metadata[0]["class"] == "hvdspark.estimators.keras.model.KerasModel"
    assert isinstance(DefaultParamsReader.loadParamsInstance(str(saved), SparkSession.getActiveSession()), KerasModel)


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values.pop("hvdspark"),
        lambda values: values["hvdspark"].pop("files"),
        lambda values: values["hvdspark"].pop("inputs"),
        lambda values: values["hvdspark"]["files"].clear(),
        lambda values: values["hvdspark"].update(outputs=[{"name": "x"}]),
    ],
    ids=["no section", "no files", "no inputs", "no model", "half an output"],
)
def test_metadata_that_lacks_something_is_refused(saved: Path, change: Callable[[dict[str, Any]], None]) -> None:
    change_metadata(saved, change)
    with pytest.raises(ModelFormatError):
        KerasModel.load(str(saved))


def test_a_parameter_in_the_metadata_is_checked_like_any_other(saved: Path) -> None:
    change_metadata(saved, lambda values: values["paramMap"].update(transform_batch_size=0))
    with pytest.raises(ModelFormatError, match=r"transform_batch_size=0: give an integer of at least 1"):
        KerasModel.load(str(saved))


def test_a_file_outside_of_the_folder_is_not_read(saved: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.keras"
    shutil.copy(saved / "model.keras", outside)

    def lead_out(values: dict[str, Any]) -> None:
        files = values["hvdspark"]["files"]
        files["../outside.keras"] = files["model.keras"]

    change_metadata(saved, lead_out)
    with pytest.raises(ModelFormatError, match=r"outside"):
        KerasModel.load(str(saved))


def cubed(y_true: Any, y_pred: Any) -> Any:
    return keras.ops.mean(keras.ops.abs(y_true - y_pred) ** 3, axis=-1)


def test_a_loss_function_of_the_users_own_is_registered_before_loading(spark: SparkSession, path: str) -> None:
    KerasEstimator(loss=cubed).save(path)
    with pytest.raises(ModelFormatError, match=r"'cubed' is not known here"):
        KerasEstimator.load(path)
    with keras.saving.custom_object_scope({"cubed": cubed}):
        assert KerasEstimator.load(path).getLoss() is cubed


def test_the_remedy_for_an_unknown_function_can_be_followed(spark: SparkSession, path: str) -> None:
    KerasEstimator(loss=cubed).save(path)
    with pytest.raises(ModelFormatError, match=r"register_keras_serializable|custom_object_scope"):
        KerasEstimator.load(path)


def test_a_model_with_a_layer_of_the_users_own_loads_and_asks_for_it_when_it_is_needed(
    spark: SparkSession, path: str
) -> None:
    class Doubling(keras.layers.Layer):
        def call(self, inputs: Any) -> Any:
            return inputs * 2

    network = keras.Sequential([keras.Input((2,)), Doubling(), keras.layers.Dense(1)])
    inputs, outputs = codec.describe(network)
    model = KerasModel(codec.model_to_bytes(network), inputs or (), outputs or ())
    model.save(path)
    again = KerasModel.load(path)
    with pytest.raises(ModelFormatError, match=r"custom_objects="):
        again.getModel()
    again.setCustomObjects({"Doubling": Doubling})  # type: ignore[attr-defined]
    assert np.array_equal(again.getModel()(np.ones((1, 2))), network(np.ones((1, 2))))
