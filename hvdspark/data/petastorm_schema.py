"""What Petastorm's own readers are told about the stored columns.

``make_reader`` gives numbers, arrays of the rows' shape, strings, encoded images as bytes, and for a sparse vector an
array of ``(index, value)`` entries.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from pyspark.sql import types as T

from hvdspark.data.columns import NUMBERS
from hvdspark.data.petastorm_compat import NdarrayCodec, ScalarCodec, Unischema, UnischemaField
from hvdspark.plan import ColumnSpec


def unischema(columns: Sequence[ColumnSpec]) -> Unischema:
    """Return Petastorm's schema of the columns."""
    with warnings.catch_warnings():
        # Petastorm warns of names that are also attributes of its class, which nothing here uses.
        warnings.filterwarnings("ignore", message="Can not create dynamic property")
        return Unischema("hvdspark", [_field(spec) for spec in columns])


def arrow_schema(columns: Sequence[ColumnSpec]) -> pa.Schema:
    """Return the schema of the files."""
    return pa.schema([pa.field(spec.name, _arrow_type(spec)) for spec in columns])


def _field(spec: ColumnSpec) -> UnischemaField:
    if spec.storage == "sparse":
        return UnischemaField(spec.name, np.void, (None,), NdarrayCodec(), False)
    if spec.storage == "text":
        return UnischemaField(spec.name, np.str_, (), ScalarCodec(T.StringType()), False)
    if spec.storage != "dense":
        return UnischemaField(spec.name, np.bytes_, (), ScalarCodec(T.BinaryType()), False)
    dtype = np.dtype(spec.dtype)
    if spec.size == 1:
        # Spark has no unsigned bytes; the codec is asked for values, not for a type.
        return UnischemaField(spec.name, dtype.type, (), ScalarCodec(NUMBERS.get(spec.dtype, T.ShortType)()), False)
    return UnischemaField(spec.name, dtype.type, spec.row_shape, NdarrayCodec(), False)


def _arrow_type(spec: ColumnSpec) -> pa.DataType:
    if spec.storage == "text":
        return pa.string()
    return pa.from_numpy_dtype(np.dtype(spec.dtype)) if spec.storage == "dense" and spec.size == 1 else pa.binary()
