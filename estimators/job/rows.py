"""A job's rows: read as the configuration says, cut to a window of time, and split for the evaluation."""

from __future__ import annotations

import datetime as dt
from typing import Any

from hvdspark.estimators.job.config import Evaluation, Input, Window
from pyspark.errors import AnalysisException, PySparkException
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql import types as T

from hvdspark.data.columns import find_field
from hvdspark.errors import DataError, EmptyDatasetError, ParamError, first_line

Bound = str | int | float

# A row's place among so many decides on which side it is.
_PLACES = 1_000_000

_TIMES = (T.DateType, T.TimestampType, T.TimestampNTZType)


def read_rows(session: SparkSession, source: Input) -> DataFrame:
    """Read an input, lazily.

    Raises
    ------
    DataError
        When Spark cannot: no such path or table, a query with an error.
    ConfigError
        When its window does not fit its columns.
    """
    try:
        rows = _read(session, source)
    except AnalysisException as exc:
        raise DataError(f"cannot read the input {_name(source)}: {first_line(exc)}") from exc
    except PySparkException as exc:
        raise DataError(f"cannot read the input {_name(source)}: {exc}") from exc
    return rows if source.window is None else _within(rows, source.window)


def split_rows(
    session: SparkSession, rows: DataFrame, evaluation: Evaluation, window: Window | None
) -> tuple[DataFrame, DataFrame]:
    """Return the rows to train on and those that are held out.

    A fraction is drawn by a hash of the rows themselves, so that a row is on the same side in every run, however the
    rows come: what one run's model was trained on, the next one's is not compared on.

    Raises
    ------
    ConfigError
        When the split does not fit the columns.
    """
    if evaluation.input is not None:
        return rows, read_rows(session, evaluation.input)
    if evaluation.since is not None:
        assert window is not None
        bound = _bound(rows, window.column, evaluation.since, "evaluation.since")
        column = F.col(_quoted(window.column))
        return rows.where(column < bound), rows.where(column >= bound)
    names = evaluation.by or rows.columns
    for name in names:
        data_type = find_field(rows.schema, name).dataType
        if isinstance(data_type, T.MapType | T.VariantType):
            raise ParamError(
                f"evaluation.fraction: rows cannot be told apart by column '{name}' ({data_type.simpleString()}); name"
                " the columns to go by in evaluation.by",
                param="by",
            )
    assert evaluation.fraction is not None
    place = F.pmod(F.xxhash64(*[F.col(_quoted(name)) for name in names]), F.lit(_PLACES))
    is_out = place < round(evaluation.fraction * _PLACES)
    return rows.where(~is_out), rows.where(is_out)


def require_rows(rows: DataFrame, what: str) -> None:
    """Raise :class:`EmptyDatasetError` where there are none."""
    if rows.isEmpty():
        raise EmptyDatasetError(f"there are no {what}: check the input, and the window of time if it has one")


def _read(session: SparkSession, source: Input) -> DataFrame:
    if source.sql is not None:
        return session.sql(source.sql)
    if source.table is not None:
        return session.table(source.table)
    options = {name: str(value).lower() if isinstance(value, bool) else value for name, value in source.options.items()}
    reader = session.read.format(source.format or "parquet").options(**options)
    if source.schema_ is not None:
        reader = reader.schema(source.schema_)
    return reader.load() if source.path is None else reader.load(source.path)


def _within(rows: DataFrame, window: Window) -> DataFrame:
    column = F.col(_quoted(window.column))
    if window.since is not None:
        rows = rows.where(column >= _bound(rows, window.column, window.since, "input.window.since"))
    if window.until is not None:
        rows = rows.where(column < _bound(rows, window.column, window.until, "input.window.until"))
    return rows


def _bound(rows: DataFrame, name: str, value: Bound, where: str) -> Column:
    """Make a bound of the column's type, so that days are not compared as text."""
    data_type = find_field(rows.schema, name).dataType
    try:
        plain: Any = value
        if isinstance(data_type, _TIMES):
            # Spark reads the same spellings; Python's parser is here to refuse all others before a job.
            dt.datetime.fromisoformat(str(value))
            plain = str(value)
        elif isinstance(data_type, T.NumericType):
            plain = float(value) if isinstance(data_type, T.FractionalType) else int(value)
        elif isinstance(data_type, T.StringType):
            plain = str(value)
        else:
            raise ValueError("such columns have no order")
    except ValueError as exc:
        raise ParamError(
            f"{where}={value!r} does not fit column '{name}', which is {data_type.simpleString()}: give"
            f" {_wanted(data_type)}",
            param=where,
        ) from exc
    return F.lit(plain).cast(data_type)


def _wanted(data_type: T.DataType) -> str:
    if isinstance(data_type, _TIMES):
        return "a date or time such as 2026-01-31 or 2026-01-31T06:00:00"
    return "a number" if isinstance(data_type, T.NumericType) else "a column of dates, times, numbers or strings"


def _name(source: Input) -> str:
    return str(source.path or source.table or source.sql or source.format)


def _quoted(name: str) -> str:
    return "`" + name.replace("`", "``") + "`"
