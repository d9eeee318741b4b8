"""Where the rows of a fit come from: a DataFrame, which is written first, or files, which are read where they lie."""

from __future__ import annotations

import abc
import json
import posixpath
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from py4j.protocol import Py4JJavaError
from pyspark.errors import AnalysisException

from hvdspark.data import schema
from hvdspark.data.columns import spark_schema
from hvdspark.data.feed import FedStage, fed_stage
from hvdspark.data.fingerprint import files_fingerprint, fingerprint
from hvdspark.data.materialize import MANIFEST, dataset_key, load_manifest, materialize, require_files
from hvdspark.data.parquet import Survey, columns_unknown_to_spark, open_parquet, survey
from hvdspark.data.partitions import TRAIN, VAL
from hvdspark.data.planning import FitDraft
from hvdspark.errors import CorruptDatasetError, ParamError, SchemaError, StoreError
from hvdspark.plan import ColumnSpec, FitPlan, Manifest, RowGroup
from hvdspark.shelf import dataset_of
from hvdspark.store import Store

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession
    from pyspark.sql.types import StructType


# What the ranks are to train on: a plan, or rows that come with them and that they plan with.
Work = FitPlan | FedStage

# The same rows may be shared out anew, among another number of ranks.
WorkFor = Callable[[int], Work]


# The Python side of Spark's own column types that are classes; "None" has none.
_KNOWN_CLASSES = frozenset(
    {"None", *(f"pyspark.{package}.linalg.{name}UDT" for package in ("ml", "mllib") for name in ("Vector", "Matrix"))}
)


class RowSource(abc.ABC):
    """Where the rows of a fit come from.

    Attributes
    ----------
    session
        The session to run in.
    schema
        The columns, as a DataFrame has them.
    facts
        What the run's record is to say of the rows: ``source``, ``fingerprint``, and what else there is; known once
        they are provided.
    """

    session: SparkSession
    schema: StructType
    facts: Mapping[str, Any] = MappingProxyType({})

    @abc.abstractmethod
    def check(self, validation: float | str | None) -> None:
        """Refuse a ``validation`` that this source cannot do, before any Spark job; raises :class:`ConfigError`."""

    @abc.abstractmethod
    @contextmanager
    def provided(self, draft: FitDraft, meanwhile: Callable[[], None]) -> Iterator[WorkFor]:
        """Provide the rows for the time of a block; gives a function that shares them out among so many ranks.

        Parameters
        ----------
        draft
            The fit.
        meanwhile
            Called before rows are computed: it begins what can go on beside that, and does not wait for it.
        """


class _FrameRows(RowSource):
    """The rows of a DataFrame, however they come to the ranks."""

    def __init__(self, df: DataFrame) -> None:
        self.session = df.sparkSession
        self.schema = df.schema
        self._df = df

    def check(self, validation: float | str | None) -> None:
        """Refuse a validation column that does not tell rows apart."""
        schema.split_condition(self.schema, validation)


class FrameSource(_FrameRows):
    """The rows of a DataFrame, written into the Store unless an earlier fit did that.

    Parameters
    ----------
    df
        The rows.
    store
        Where they are written.
    keep
        Whether what is written stays for later fits.
    """

    def __init__(self, df: DataFrame, store: Store, *, keep: bool) -> None:
        super().__init__(df)
        self._store = store
        self._keep = keep

    @contextmanager
    def provided(self, draft: FitDraft, meanwhile: Callable[[], None]) -> Iterator[WorkFor]:
        """Find the dataset that an earlier fit wrote of the same rows, or write it."""
        store = self._store

        def write(folder: str) -> None:
            with suppress(OSError, StoreError):
                store.gc()
            meanwhile()
            materialize(self._df, draft.columns, draft.split, store, folder)

        found = fingerprint(self._df)
        key = dataset_key(found, draft.columns, draft.split) if self._keep and found else None
        # Without a key nobody could find it again.
        with dataset_of(store, key or uuid.uuid4().hex, write, keep=key is not None) as folder:
            manifest = load_manifest(store, folder)
            self.facts = {"source": "DataFrame", "fingerprint": found, "dataset": folder}
            yield lambda size: replace(draft, size=size).complete(manifest, draft.store, folder)


class FedSource(_FrameRows):
    """The rows of a DataFrame, handed to the ranks without a dataset in between.

    Parameters
    ----------
    df
        The rows.
    """

    @contextmanager
    def provided(self, draft: FitDraft, meanwhile: Callable[[], None]) -> Iterator[WorkFor]:
        """Share the rows out among the tasks of the ranks' stage."""
        self.facts = {"source": "DataFrame", "fingerprint": fingerprint(self._df)}
        meanwhile()
        yield lambda size: fed_stage(self._df, replace(draft, size=size))


class ParquetSource(RowSource):
    """Rows in Parquet files, read where they lie.

    Parameters
    ----------
    session
        The session to run in.
    path
        A dataset that a fit wrote, or a file or folder that any other program did.
    validation_path
        A file or folder of rows to validate on.
    """

    def __init__(self, session: SparkSession, path: str, validation_path: str | None) -> None:
        self.session = session
        self._path = path
        self._validation_path = validation_path
        self._written = _written_by_a_fit(path)
        if self._written is None:
            self.schema = _schema_of(session, path)
        else:
            self.schema = spark_schema(self._written[1].columns)

    def check(self, validation: float | str | None) -> None:
        """Refuse to hold out rows, which would mean to write them."""
        if self._written is not None and self._validation_path is not None:
            raise ParamError(
                f"{self._path} is a dataset that a fit wrote, and has its validation rows with it; leave out"
                " validation_path",
                param="validation_path",
            )
        held_out = self._validation_path is not None or (self._written is not None and self._written[1].rows(VAL) > 0)
        if validation is not None and not held_out:
            raise ParamError(
                f"validation={validation!r}: fit_on_parquet() writes nothing, and so holds no rows out; give"
                " validation_path=, or read the files with Spark and fit() the DataFrame",
                param="validation",
            )

    @contextmanager
    def provided(self, draft: FitDraft, meanwhile: Callable[[], None]) -> Iterator[WorkFor]:  # noqa: ARG002
        """Look at the files, and make one dataset of training and validation rows."""
        store, manifest = self._survey(draft.columns) if self._written is None else self._written
        # The model that a dataset was written for may have taken other types.
        fed_as = {column.name: column.fed_as for column in draft.columns}
        columns = tuple(replace(column, fed_as=fed_as.get(column.name, ())) for column in manifest.columns)
        manifest = replace(manifest, columns=columns)
        self.facts = {
            "source": self._path,
            "validation_source": self._validation_path,
            "fingerprint": files_fingerprint(store, manifest),
        }
        yield lambda size: replace(draft, size=size).complete(manifest, store.ref(), "")

    def _survey(self, columns: tuple[ColumnSpec, ...]) -> tuple[Store, Manifest]:
        train = survey(self._path, columns)
        if self._validation_path is None:
            return train.store, Manifest(train.columns, {TRAIN: train.groups, VAL: ()}, summary=train.summary)
        val = survey(self._validation_path, columns)
        if val.columns != train.columns:
            raise ParamError(
                f"the columns in {self._validation_path} are not as those in {self._path}: {list(val.columns)} instead"
                f" of {list(train.columns)}",
                param="validation_path",
            )
        root = _common_folder(train.store.url, val.store.url)
        splits = {TRAIN: _seen_from(root, train), VAL: _seen_from(root, val)}
        return Store.create(root), Manifest(train.columns, splits, summary=train.summary)


def _written_by_a_fit(path: str) -> tuple[Store, Manifest] | None:
    store, file = open_parquet(path)
    if file is not None or not store.exists(MANIFEST):
        return None
    manifest = load_manifest(store, "")
    require_files(store, "", manifest)
    return store, manifest


def _schema_of(session: SparkSession, path: str) -> StructType:
    """Return the columns of Parquet files, as Spark sees them.

    Raises
    ------
    CorruptDatasetError
        When a file is damaged.
    SchemaError
        When a column has a type that Spark does not read, or a file wants a Python class of its own for one: PySpark
        would import it, or unpickle it.
    """
    try:
        frame = session.read.parquet(path)
    except AnalysisException as exc:
        raise _unreadable(path, exc) from exc
    except Py4JJavaError as exc:
        raise CorruptDatasetError(f"Spark cannot read {path}: {_root_cause(exc)}") from exc
    for column, named in _classes_in(frame):
        if named not in _KNOWN_CLASSES:
            raise SchemaError(
                f"column '{column}' of {path} wants the Python class {named}; only Spark's own vectors and matrices are"
                " taken. Read the files with Spark, and select plain columns of them.",
                column=column,
                expected="a column of Spark's own types",
                found=named,
            )
    return frame.schema


def _unreadable(path: str, exc: AnalysisException) -> Exception:
    """Name the column for which Spark has no type, where that is what it says."""
    unknown = columns_unknown_to_spark(path) if "Illegal Parquet type" in str(exc) else {}
    for column, found in unknown.items():
        return SchemaError(
            f"column '{column}' of {path} has the type {found}, which Spark does not read, and so none of the file."
            " Write it anew with timestamps in microseconds (pandas: to_parquet(…, coerce_timestamps='us',"
            " allow_truncated_timestamps=True)), floats of 32 or 64 bits, and times of day as numbers, or without the"
            " column.",
            column=column,
            expected="a type that Spark reads",
            found=found,
        )
    return exc


def _classes_in(frame: DataFrame) -> Iterator[tuple[str, str]]:
    """Yield the Python classes that columns want, before PySpark has looked at them."""
    java: Any = frame._jdf  # of a classic session, as are all that a fit runs in
    for field in json.loads(java.schema().json())["fields"]:
        inside = [field["type"]]
        while inside:
            found = inside.pop()
            if isinstance(found, list):
                inside += found
            elif isinstance(found, dict):
                if found.get("type") == "udt":
                    yield str(field["name"]), "of a pickle" if "serializedClass" in found else str(found.get("pyClass"))
                inside += found.values()


def _root_cause(exc: Py4JJavaError) -> str:
    cause = exc.java_exception
    while cause.getCause() is not None:
        cause = cause.getCause()
    return str(cause.getMessage()).strip().partition("\n")[0]


def _common_folder(first: str, second: str) -> str:
    """Return the folder that two addresses lie in."""
    schemes, paths = zip(*(url.rpartition("://")[::2] for url in (first, second)), strict=True)
    if schemes[0] != schemes[1]:
        raise ParamError(f"{first} and {second} are on different file systems", param="validation_path")
    common = posixpath.commonpath(paths)
    return f"{schemes[0]}://{common}" if schemes[0] else common


def _seen_from(root: str, found: Survey) -> tuple[RowGroup, ...]:
    """Return row groups with paths relative to a folder further up."""
    prefix = posixpath.relpath(found.store.path(), Store.create(root).path())
    return tuple(replace(group, path=posixpath.normpath(f"{prefix}/{group.path}")) for group in found.groups)
