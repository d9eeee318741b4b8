"""Files that somebody has put where a model, an estimator or rows are expected: nothing runs, and errors name them."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import pickle
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hvdspark.estimators import KerasEstimator, KerasModel
from hvdspark.estimators.keras import codec
from hvdspark.estimators.keras.scorer import load_scorer
from hvdspark.estimators.sources import ParquetSource
from pyspark.errors import PythonException
from pyspark.ml import PipelineModel
from pyspark.ml.linalg import Vectors
from pyspark.ml.util import DefaultParamsReader
from pyspark.sql import DataFrame, SparkSession

from hvdspark.errors import CorruptDatasetError, ModelFormatError, SchemaError

Change = Callable[[dict[str, bytes]], None]


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """A file that is there once any of the planted code has run."""
    return tmp_path / "planted code has run"


class Bomb:
    """An object whose pickle runs a command where it is loaded."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self._mark}'",)


def test_the_bomb_goes_off_where_it_is_unpickled(mark: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists()


def network() -> keras.Model:
    return keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, name="dense")])


def with_lambda(mark: Path) -> bytes:
    """Make a model that runs code of its own wherever it is called."""
    code = f"lambda x: (__import__('pathlib').Path({str(mark)!r}).touch(), x)[1]"
    model = keras.Sequential([keras.Input((2,)), keras.layers.Lambda(eval(code), output_shape=(2,))])
    return codec.model_to_bytes(model)


def changed(data: bytes, change: Change) -> bytes:
    """Change the members of a ``.keras`` file."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def config_with(layer: Any) -> Change:
    def change(members: dict[str, bytes]) -> None:
        config = json.loads(members["config.json"])
        config["config"]["layers"].insert(1, layer)
        members["config.json"] = json.dumps(config).encode()

    return change


def compiled_with(loss: Any) -> Change:
    def change(members: dict[str, bytes]) -> None:
        config = json.loads(members["config.json"])
        config["compile_config"] = {"optimizer": "sgd", "loss": loss}
        members["config.json"] = json.dumps(config).encode()

    return change


def call_of(module: str, name: str, config: Any) -> dict[str, Any]:
    return {"module": module, "class_name": name, "config": config, "registered_name": name}


def hostile(kind: str, mark: Path) -> bytes:
    """Make a hostile model file."""
    bomb, plain = pickle.dumps(Bomb(mark)), codec.model_to_bytes(network())
    command, code = ["touch", str(mark)], f"open({str(mark)!r}, 'w')"
    function = {"module": "os", "class_name": "function", "config": "system", "registered_name": "system"}
    made: dict[str, Callable[[], bytes]] = {
        "a pickle": lambda: bomb,
        "a lambda": lambda: with_lambda(mark),
        "a process as layer": lambda: changed(plain, config_with(call_of("subprocess", "Popen", {"args": command}))),
        "a function as layer": lambda: changed(plain, config_with(function)),
        "code as layer": lambda: changed(plain, config_with(call_of("builtins", "exec", {"source": code}))),
        "safe mode off, then a lambda": lambda: changed(
            with_lambda(mark), config_with(call_of("keras.config", "enable_unsafe_deserialization", {}))
        ),
        "a function of Keras' insides": lambda: changed(
            plain, config_with(call_of("keras.src.utils.file_utils", "join", {"path": str(mark)}))
        ),
        "a function as loss": lambda: changed(plain, compiled_with(function)),
        "a pickle as weights": lambda: changed(plain, lambda members: members.update({"model.weights.h5": bomb})),
        "a pickle as configuration": lambda: changed(plain, lambda members: members.update({"config.json": bomb})),
        "half a file": lambda: plain[: len(plain) // 2],
        "nothing": lambda: b"",
    }
    return made[kind]()


KINDS = [
    "a pickle",
    "a lambda",
    "a process as layer",
    "a function as layer",
    "code as layer",
    "safe mode off, then a lambda",
    "a function of Keras' insides",
    "a function as loss",
    "a pickle as weights",
    "a pickle as configuration",
    "half a file",
    "nothing",
]


def test_the_lambda_goes_off_where_it_is_trusted(mark: Path) -> None:
    codec.model_from_bytes(with_lambda(mark), safe_mode=False)(keras.ops.ones((1, 2)))
    assert mark.exists()


@pytest.fixture(scope="module")
def pipeline(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    plain = network()
    inputs, outputs = codec.describe(plain)
    model = KerasModel(codec.model_to_bytes(plain), inputs or (), outputs or (), {"loss": [0.5]})
    path = tmp_path_factory.mktemp("saved") / "pipeline"
    PipelineModel([model.setFeatureCols(["v"]).setLabelCols(["y"])]).save(str(path))  # type: ignore[attr-defined]
    return path


@pytest.fixture
def saved(pipeline: Path, tmp_path: Path) -> Path:
    """A model that was saved, in the place of a stage of a pipeline."""
    shutil.copytree(pipeline, tmp_path / "pipeline")
    [stage] = (tmp_path / "pipeline" / "stages").iterdir()
    return stage


@pytest.fixture(scope="module")
def saved_estimator(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "estimator"
    KerasEstimator(model=network(), loss="mse").save(str(path))
    return path


@pytest.fixture(scope="module")
def rows(spark: SparkSession) -> DataFrame:
    return spark.createDataFrame([(Vectors.dense([1.0, 2.0]),)], ["v"])


def metadata_file(saved: Path) -> Path:
    [part] = (saved / "metadata").glob("part-*")
    return part


def plant(saved: Path, data: bytes) -> None:
    """Put a model file in the place of the saved one, as who can write there would: with all checksums right."""
    (saved / "model.keras").write_bytes(data)
    metadata = json.loads(metadata_file(saved).read_text())
    metadata["hvdspark"]["files"]["model.keras"] = hashlib.sha256(data).hexdigest()
    write_metadata(saved, json.dumps(metadata).encode())


def write_metadata(saved: Path, data: bytes) -> None:
    metadata_file(saved).write_bytes(data)
    for file in saved.rglob(".*.crc"):
        file.unlink()


@pytest.mark.parametrize("kind", KINDS)
def test_no_code_of_a_model_file_runs(mark: Path, kind: str) -> None:
    model = KerasModel(hostile(kind, mark))
    model._origin = "/from/there"
    with pytest.raises(ModelFormatError, match=r"Keras cannot load the model of /from/there: "):
        model.getModel()
    if kind != "a function as loss":  # which nobody needs who only predicts
        with pytest.raises(ModelFormatError, match=r"Keras cannot load the model of /from/there: "):
            load_scorer(model._payload())
    assert not mark.exists()


def test_no_code_runs_by_way_of_a_pipeline_and_transform(saved: Path, rows: DataFrame, mark: Path) -> None:
    plant(saved, hostile("a lambda", mark))
    pipeline = PipelineModel.load(str(saved.parent.parent))
    with pytest.raises(PythonException, match=r"ModelFormatError: Keras cannot load the model of .*/stages/"):
        pipeline.transform(rows).collect()
    assert not mark.exists()


@pytest.mark.parametrize("kind", ["a lambda", "a function as layer", "a pickle"])
def test_no_code_of_an_estimators_model_runs(saved_estimator: Path, tmp_path: Path, mark: Path, kind: str) -> None:
    path = shutil.copytree(saved_estimator, tmp_path / "estimator")
    plant(path, hostile(kind, mark))
    with pytest.raises(ModelFormatError, match=str(path)):
        KerasEstimator.load(str(path))
    assert not mark.exists()


@pytest.mark.parametrize(
    "loss",
    [
        {"function": "os>system"},
        {"keras": {"module": "os", "class_name": "function", "config": "system", "registered_name": "system"}},
        {"keras": call_of("subprocess", "Popen", {"args": ["true"]})},
        {"settings": {"keras": call_of("os", "system", {}), "values": {}}},
        {},
        {"list": 3},
    ],
    ids=str,
)
def test_no_code_of_an_estimators_configuration_runs(saved_estimator: Path, tmp_path: Path, loss: Any) -> None:
    path = shutil.copytree(saved_estimator, tmp_path / "estimator")
    metadata = json.loads(metadata_file(path).read_text())
    metadata["hvdspark"]["compiling"]["loss"] = loss
    write_metadata(path, json.dumps(metadata).encode())
    with pytest.raises(ModelFormatError, match=str(path)):
        KerasEstimator.load(str(path))


@pytest.mark.parametrize(
    "damage", ["pickle", "half", "empty", "list", "no parameters", "unknown parameter", "crc", "gone"]
)
def test_damaged_metadata_is_named(saved: Path, mark: Path, damage: str) -> None:
    metadata = json.loads(metadata_file(saved).read_text())
    whole = json.dumps(metadata).encode()
    if damage == "crc":
        metadata_file(saved).write_bytes(whole[:-1] + b" }")  # Hadoop's checksum lies beside it
    elif damage == "gone":
        metadata_file(saved).unlink()
    else:
        contents = {
            "pickle": pickle.dumps(Bomb(mark)),
            "half": whole[: len(whole) // 2],
            "empty": b"",
            "list": b"[1, 2]",
            "no parameters": json.dumps({**metadata, "paramMap": None}).encode(),
            "unknown parameter": json.dumps({**metadata, "paramMap": {"_data": 1}}).encode(),
        }
        write_metadata(saved, contents[damage])
    with pytest.raises(ModelFormatError, match=str(saved)):
        KerasModel.load(str(saved))
    assert not mark.exists()


def test_a_class_in_the_metadata_is_not_made_of_what_it_names(saved: Path) -> None:
    metadata = json.loads(metadata_file(saved).read_text())
    write_metadata(saved, json.dumps({**metadata, "class": "subprocess.Popen"}).encode())
    with pytest.raises(ModelFormatError, match=r"holds a subprocess\.Popen, not a hvdspark\."):
        KerasModel.load(str(saved))
    # Spark ML imports what the metadata names, but only a class with a load() of its own gets any further.
    with pytest.raises(AttributeError, match="load"):
        DefaultParamsReader.loadParamsInstance(str(saved), SparkSession.getActiveSession())


def test_a_parquet_file_cannot_have_its_own_classes_imported(spark: SparkSession, tmp_path: Path, mark: Path) -> None:
    pickled = base64.b64encode(pickle.dumps(Bomb(mark))).decode()
    for named in ("antigravity.Type", "numpy.Nothing"):
        kind = {"type": "udt", "sqlType": "double", "pyClass": named, "serializedClass": pickled}
        field = {"name": "a", "type": kind, "nullable": True, "metadata": {}}
        described = json.dumps({"type": "struct", "fields": [field]})
        table = pa.table({"a": [1.0, 2.0]})
        table = table.replace_schema_metadata({"org.apache.spark.sql.parquet.row.metadata": described})
        pq.write_table(table, tmp_path / "rows.parquet")
        with pytest.raises(SchemaError, match=r"column 'a' of .* wants the Python class"):
            ParquetSource(spark, str(tmp_path / "rows.parquet"), None)
    assert "antigravity" not in sys.modules
    assert not mark.exists()


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + b"x" * 100 + b"PAR1"])
def test_what_is_no_parquet_is_named(spark: SparkSession, tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "rows.parquet"
    file.write_bytes(content)
    with pytest.raises(CorruptDatasetError, match=str(file)):
        ParquetSource(spark, str(file), None)
