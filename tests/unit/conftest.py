"""No JVM in this lane: Arrow batches by partition stand for a DataFrame."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, Self
from unittest import mock

import pyarrow as pa
import pyspark.java_gateway
import pytest
from pyspark import TaskContext

from hvdspark import Store
from hvdspark.data import files
from hvdspark.data.materialize import materialize
from hvdspark.data.partitions import Split
from hvdspark.plan import ColumnSpec, Manifest

Partition = Sequence[pa.RecordBatch]


@pytest.fixture(scope="session", autouse=True)
def _no_jvm() -> Iterator[None]:
    """Fail a test that would start a JVM."""

    def refuse(*_args: Any, **_kwargs: Any) -> None:
        pytest.fail("a unit test tried to start a JVM; it belongs into tests/spark")

    with mock.patch.object(pyspark.java_gateway, "launch_gateway", refuse):
        yield


class ArrowFrame:
    """As much of a DataFrame as ``materialize`` uses; its "tasks" run here, one after the other."""

    def __init__(self, partitions: Sequence[Partition]) -> None:
        self._partitions = partitions
        self._names: list[str] | None = None
        self._task: Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]] | None = None

    def select(self, *quoted: str) -> Self:
        names = [name[1:-1].replace("``", "`") for name in quoted]
        return type(self)([[batch.select(names) for batch in batches] for batches in self._partitions])

    def toDF(self, *names: str) -> Self:
        self._names = list(names)
        return self

    def mapInArrow(self, task: Any, _schema: str) -> Self:
        self._task = task
        return self

    def collect(self) -> list[dict[str, Any]]:
        assert self._task is not None
        rows = []
        for number, batches in enumerate(self._partitions):
            context = SimpleNamespace(partitionId=lambda number=number: number)
            with mock.patch.object(TaskContext, "get", return_value=context):
                for answer in self._task(self._renamed(batches)):
                    rows += answer.to_pylist()
        return rows

    def _renamed(self, batches: Partition) -> Iterator[pa.RecordBatch]:
        return (batch if self._names is None else batch.rename_columns(self._names) for batch in batches)


@dataclasses.dataclass(frozen=True)
class Written:
    """A dataset that was written for a test."""

    store: Store
    dataset: str
    manifest: Manifest


@pytest.fixture(scope="session")
def arrow_frame() -> Callable[[Sequence[Partition]], ArrowFrame]:
    """Return a function that makes a stand-in for a DataFrame out of each partition's batches."""
    return ArrowFrame


@pytest.fixture(scope="session")
def write_dataset(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Written]:
    """Return a function that materializes partitions into a Store of its own."""

    def write(
        columns: Sequence[ColumnSpec],
        partitions: Sequence[Partition],
        split: Split | None = None,
        group_bytes: int = files.ROW_GROUP_BYTES,
    ) -> Written:
        store = Store.create(tmp_path_factory.mktemp("store"))
        frame: Any = ArrowFrame(partitions)
        with mock.patch.object(files, "ROW_GROUP_BYTES", group_bytes):
            dataset, manifest = materialize(frame, columns, split or Split(), store)
        return Written(store, dataset, manifest)

    return write
