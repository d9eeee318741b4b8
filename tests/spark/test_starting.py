"""The model that ``warm_start`` names: found in what Spark ML saved, without a job, and without anything of it run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import pytest
from hvdspark.estimators import KerasModel
from hvdspark.estimators.keras import codec
from hvdspark.estimators.starting import find_start
from pyspark.ml import PipelineModel
from pyspark.ml.feature import VectorAssembler
from pyspark.sql import SparkSession

from hvdspark import Store
from hvdspark.aliases import AliasEntry, promote
from hvdspark.errors import HvdSparkError, ModelFormatError, ParamError
from hvdspark.warmstart import WarmStart

SAVED = "hvdspark.estimators.keras.model.KerasModel"


@pytest.fixture(scope="module")
def data() -> bytes:
    return codec.model_to_bytes(keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]))


@pytest.fixture
def find(spark: SparkSession, store: Store) -> Callable[[str], WarmStart]:
    return lambda given: find_start(given, store, spark, SAVED, ".keras")


def keras_stage(data: bytes) -> KerasModel:
    return KerasModel(data).setFeatureCols(["v"]).setLabelCols(["y"])  # type: ignore[attr-defined, no-any-return]


def assembler() -> VectorAssembler:
    return VectorAssembler(inputCols=["a", "b"], outputCol="v")


def test_a_saved_model_is_found_alone_in_a_pipeline_in_a_run_and_by_an_alias(
    spark: SparkSession,
    store: Store,
    tmp_path: Path,
    data: bytes,
    find: Callable[[str], WarmStart],
    jobs_of: Callable[[], int],
) -> None:
    alone, nested, inside = tmp_path / "alone", tmp_path / "with space", Path(store.path("runs/a/pipeline"))
    keras_stage(data).save(str(alone))
    PipelineModel([assembler(), PipelineModel([keras_stage(data)])]).save(str(nested))
    PipelineModel([keras_stage(data)]).save(str(inside))
    store.publish_bytes(data, "runs/b/model.keras")
    promote(store, "champion", AliasEntry("b", "runs/b/model.keras"))
    promote(store, "candidate", AliasEntry("a", store.url_of("runs/a/pipeline")))
    promote(store, "elsewhere", AliasEntry("c", str(alone)))
    jobs = jobs_of()
    expected = {
        str(alone): (f"{alone}/model.keras", None),
        f"file://{alone}": (f"file://{alone}/model.keras", None),
        f"{alone}/model.keras": (f"{alone}/model.keras", None),
        str(nested): (None, None),
        "runs/b": (store.url_of("runs/b/model.keras"), "b"),
        "runs/b/model.keras": (store.url_of("runs/b/model.keras"), "b"),
        "alias:champion": (store.url_of("runs/b/model.keras"), "b"),
        "alias:candidate": (None, "a"),
        "alias:elsewhere": (f"{alone}/model.keras", "c"),
    }
    for given, (address, run_id) in expected.items():
        found = find(given)
        assert (found.given, found.run_id, found.data) == (given, run_id, data)
        assert address in (found.model, None)
    assert find(str(nested)).model.startswith(f"{nested}/stages/1_PipelineModel")
    assert find("alias:candidate").model.startswith(store.url_of("runs/a/pipeline/stages/0_Keras"))
    assert jobs_of() == jobs


def change_metadata(folder: Path, **values: Any) -> None:
    """Change what the metadata of a saved thing says."""
    (part,) = (folder / "metadata").glob("part-*")
    part.write_text(json.dumps({**json.loads(part.read_text()), **values}))
    (folder / "metadata" / f".{part.name}.crc").unlink()


def test_what_a_saved_pipeline_names_is_not_imported(
    tmp_path: Path, data: bytes, find: Callable[[str], WarmStart], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, mark = tmp_path / "pipeline", tmp_path / "planted code has run"
    PipelineModel([assembler(), keras_stage(data)]).save(str(path))
    (tmp_path / "planted.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\nclass Stage: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    (planted,) = path.glob("stages/0_*")
    change_metadata(planted, **{"class": "planted.Stage"})
    assert find(str(path)).data == data
    assert not mark.exists()
    with pytest.raises(AttributeError):
        PipelineModel.load(str(path))
    assert mark.exists()  # that is what would have run


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("{folder}/nothing", ParamError, r"no model of .*KerasModel is in .*/nothing; give a finished run"),
        ("{folder}/nothing.keras", ParamError, r"no model of .*KerasModel is in .*/nothing\.keras; give"),
        ("{folder}/two", ParamError, r"2 models \(.*/two/stages/0_.*/two/stages/1_.*\).*; give the folder of one"),
        ("{folder}/none", ParamError, r"no model of .*KerasModel is in .*/none"),
        ("{folder}/exchanged", ModelFormatError, r"exchanged/model\.keras is not the file that was saved"),
        ("{folder}/damaged", ModelFormatError, r"damaged/metadata is damaged"),
        ("{folder}/empty", ModelFormatError, r"empty/metadata is damaged"),
        ("{folder}/list", ModelFormatError, r"list/metadata holds a list, no JSON object"),
        ("{folder}/nameless", ModelFormatError, r"metadata of .*/nameless names no model\.keras"),
        ("nosuch://host/model", ModelFormatError, r'nosuch://host/model cannot be read: .*scheme "nosuch"'),
        ("runs/unfinished", ParamError, r"no model .* is in .*/runs/unfinished; give a finished run"),
        ("alias:gone", ParamError, r"no model .* is in .*/runs/gone/model\.keras; give a finished run"),
        ("alias:nobody", ParamError, r"there is no alias 'nobody'"),
    ],
)
def test_what_cannot_be_begun_with_is_named_without_a_job(
    store: Store,
    tmp_path: Path,
    data: bytes,
    find: Callable[[str], WarmStart],
    jobs_of: Callable[[], int],
    given: str,
    error: type[HvdSparkError],
    message: str,
) -> None:
    name = Path(given).name
    folder = tmp_path / name
    if name == "two":
        PipelineModel([keras_stage(data), keras_stage(data)]).save(str(folder))
    elif name == "none":
        PipelineModel([assembler()]).save(str(folder))
    elif name in ("exchanged", "damaged", "empty", "list", "nameless"):
        keras_stage(data).save(str(folder))
    if name == "exchanged":
        (folder / "model.keras").write_bytes(data + b"more")
        (folder / ".model.keras.crc").unlink(missing_ok=True)
    elif name in ("damaged", "list"):
        shutil.rmtree(folder / "metadata")
        (folder / "metadata").mkdir()
        (folder / "metadata" / "part-00000").write_text("{" if name == "damaged" else "[]")
    elif name == "empty":
        shutil.rmtree(folder / "metadata")
        (folder / "metadata").mkdir()
    elif name == "nameless":
        change_metadata(folder, hvdspark={"files": {}})
    store.publish_bytes(b"", "runs/unfinished/checkpoints/last.keras")
    promote(store, "gone", AliasEntry("gone", "runs/gone/model.keras"))
    jobs = jobs_of()
    with pytest.raises(error, match=message):
        find(given.format(folder=tmp_path))
    assert jobs_of() == jobs
