"""Columns of every kind that is accepted, with values drawn for them: what the tests of both lanes write and read."""

from __future__ import annotations

import dataclasses
import datetime
import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from pyspark.ml.linalg import DenseVector, SparseVector, Vectors, VectorUDT
from pyspark.sql import types as T

from hvdspark.data.blocks import AnyBlock, LateBlock
from hvdspark.data.missing import Missing
from hvdspark.data.schema import check_columns
from hvdspark.data.vectors import VECTOR_TYPE
from hvdspark.plan import BatchSpec, ColumnSpec, ModelTensor

Block = npt.NDArray[Any]

EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
# pyspark.ml.image asks a JVM for this.
IMAGE = T.StructType(
    [
        T.StructField("origin", T.StringType()),
        *[T.StructField(name, T.IntegerType(), False) for name in ("height", "width", "nChannels", "mode")],
        T.StructField("data", T.BinaryType(), False),
    ]
)
IMAGE_TYPE = pa.struct(
    [pa.field("origin", pa.string())]
    + [pa.field(name, pa.int32(), nullable=False) for name in ("height", "width", "nChannels", "mode")]
    + [pa.field("data", pa.binary(), nullable=False)]
)


@dataclasses.dataclass(frozen=True)
class Column:
    """A column to draw.

    Parameters
    ----------
    spark, arrow
        Its type in Spark, and as Spark's Arrow has it.
    takes
        Shape and dtype of the model's input.
    value
        Draws one row's value, as Python and Spark have it.
    expected
        What a row must be when it is read: an array, whose dtype counts, or bytes of a text.
    fill
        What stands for a null; ``None`` draws no nulls.
    padding
        What fills up short rows.
    """

    spark: T.DataType
    arrow: pa.DataType
    takes: tuple[tuple[int, ...], str]
    value: st.SearchStrategy[Any]
    expected: Callable[[Any], Block | bytes]
    fill: Any = None
    padding: Any = None

    def model_input(self, name: str) -> ModelTensor:
        """Describe the model's input for the column."""
        return ModelTensor(name, *self.takes)

    def to_arrow(self, values: Sequence[Any]) -> pa.Array:
        """Make the Arrow column that Spark would give."""
        if isinstance(self.spark, VectorUDT):
            values = [None if value is None else vector_struct(value) for value in values]
        elif self.arrow == IMAGE_TYPE:
            values = [dict(zip(IMAGE_TYPE.names, value, strict=True)) for value in values]
        return pa.array(list(values), type=self.arrow)

    def row(self, value: Any) -> tuple[str, tuple[int, ...], bytes]:
        """Give dtype, shape and bits of what a row must be."""
        if value is None:
            value = self.fill
        return row_bits(self.expected(value))


def row_bits(row: Block | bytes) -> tuple[str, tuple[int, ...], bytes]:
    """Tell a row apart from every other: NaN equals NaN, and a negative zero no positive one."""
    return ("text", (), row) if isinstance(row, bytes) else (row.dtype.name, row.shape, row.tobytes())


def rows_of(block: AnyBlock) -> list[tuple[str, tuple[int, ...], bytes]]:
    """Make a block dense and give its rows."""
    dense = block.to_dense(None, "c") if isinstance(block, LateBlock) else block
    return [row_bits(row[0] if row.dtype == object else row) for row in dense]


def vector_struct(value: DenseVector | SparseVector) -> dict[str, Any]:
    if isinstance(value, SparseVector):
        return {"type": 0, "size": value.size, "indices": value.indices, "values": value.values}
    return {"type": 1, "size": None, "indices": None, "values": value.values}


NUMBERS = {
    "bool": (T.BooleanType(), st.booleans()),
    "int8": (T.ByteType(), st.integers(-(2**7), 2**7 - 1)),
    "int16": (T.ShortType(), st.integers(-(2**15), 2**15 - 1)),
    "int32": (T.IntegerType(), st.integers(-(2**31), 2**31 - 1)),
    "int64": (T.LongType(), st.integers(-(2**63), 2**63 - 1)),
    "float32": (T.FloatType(), st.floats(width=32)),
    "float64": (T.DoubleType(), st.floats()),
}
FILLS: dict[str, Any] = {"bool": True, "float32": 0.5, "float64": math.nan}


@st.composite
def scalars(draw: st.DrawFn) -> Column:
    dtype = draw(st.sampled_from(list(NUMBERS)))
    spark, value = NUMBERS[dtype]
    fill = draw(st.sampled_from([None, FILLS.get(dtype, -7)]))
    return Column(
        spark=spark,
        arrow=pa.from_numpy_dtype(np.dtype(dtype)),
        takes=((1,), dtype),
        value=value if fill is None else st.none() | value,
        expected=lambda found: np.array([found], dtype),
        fill=fill,
    )


@st.composite
def times(draw: st.DrawFn) -> Column:
    if draw(st.booleans()):
        return Column(
            spark=T.DateType(),
            arrow=pa.date32(),
            takes=((1,), draw(st.sampled_from(["int32", "int64", "float32"]))),
            value=st.dates(),
            expected=lambda day: np.array([(day - EPOCH.date()).days], "int32"),
        )
    zone = draw(st.sampled_from([None, datetime.UTC]))
    dtype = draw(st.sampled_from(["int64", "float64"]))
    # Later ones are more microseconds than float64 counts.
    latest = datetime.datetime.max if dtype == "int64" else datetime.datetime(2255, 1, 1)
    earliest = datetime.datetime.min if dtype == "int64" else datetime.datetime(1686, 1, 1)
    return Column(
        spark=T.TimestampNTZType() if zone is None else T.TimestampType(),
        arrow=pa.timestamp("us", tz=None if zone is None else "UTC"),
        takes=((1,), dtype),
        value=st.datetimes(earliest, latest).map(lambda moment: moment.replace(tzinfo=zone)),
        expected=lambda moment: np.array(
            [(moment.replace(tzinfo=datetime.UTC) - EPOCH) // datetime.timedelta(microseconds=1)], "int64"
        ),
    )


@st.composite
def texts(draw: st.DrawFn) -> Column:
    fill = draw(st.sampled_from([None, "", "größe"]))
    value = st.text(max_size=12)
    return Column(
        spark=T.StringType(),
        arrow=pa.string(),
        takes=(draw(st.sampled_from([(), (1,)])), "string"),
        value=value if fill is None else st.none() | value,
        expected=lambda text: text.encode(),
        fill=fill,
    )


@st.composite
def arrays(draw: st.DrawFn) -> Column:
    dtype = draw(st.sampled_from(list(NUMBERS)))
    shape = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple))
    spark, value = NUMBERS[dtype]
    arrow = pa.from_numpy_dtype(np.dtype(dtype))
    for size in reversed(shape):
        value = st.lists(value, min_size=size, max_size=size)
        spark, arrow = T.ArrayType(spark), pa.list_(arrow)
    return Column(spark, arrow, (shape, dtype), value, lambda found: np.array(found, dtype))


@st.composite
def padded_arrays(draw: st.DrawFn) -> Column:
    dtype = draw(st.sampled_from(["int32", "int64", "float32"]))
    spark, value = NUMBERS[dtype]
    size = draw(st.integers(2, 5))
    fill = draw(st.sampled_from([None, 9]))
    elements = value if fill is None else st.none() | value

    def expected(found: Any) -> Block:
        if found == fill:
            return np.full(size, fill, dtype)
        filled = [fill if item is None else item for item in found]
        return np.array(filled + [-1] * (size - len(filled)), dtype)

    rows = st.lists(elements, max_size=size)
    return Column(
        spark=T.ArrayType(spark),
        arrow=pa.list_(pa.from_numpy_dtype(np.dtype(dtype))),
        takes=((size,), dtype),
        value=rows if fill is None else st.none() | rows,
        expected=expected,
        fill=fill,
        padding=-1,
    )


@st.composite
def vectors(draw: st.DrawFn) -> Column:
    size = draw(st.sampled_from([1, 2, 5, 5000]))
    dtype = draw(st.sampled_from(["float32", "float64"]))
    width = 32 if dtype == "float32" else 64
    entries = st.dictionaries(st.integers(0, size - 1), st.floats(width=width), max_size=4)
    sparse = entries.map(lambda found: Vectors.sparse(size, sorted(found.items())))
    dense = entries.map(lambda found: Vectors.dense([found.get(place, 0.0) for place in range(size)]))
    fill = draw(st.sampled_from([None, 0]))

    def expected(found: Any) -> Block:
        return np.zeros(size, dtype) if found == fill else found.toArray().astype(dtype)

    value = sparse | dense
    return Column(
        VectorUDT(), VECTOR_TYPE, ((size,), dtype), value if fill is None else st.none() | value, expected, fill
    )


shapes = st.tuples(st.integers(1, 6), st.integers(1, 6), st.sampled_from([1, 3, 4]))


@st.composite
def raw_images(draw: st.DrawFn) -> Column:
    shape = draw(shapes)
    return Column(
        spark=T.BinaryType(),
        arrow=pa.binary(),
        takes=(shape, draw(st.sampled_from(["float32", "uint8"]))),
        value=hnp.arrays("uint8", shape).map(lambda pixels: pixels.tobytes()),
        expected=lambda cell: np.frombuffer(cell, "uint8").reshape(shape),
    )


@st.composite
def encoded_images(draw: st.DrawFn) -> Column:
    kind = draw(st.sampled_from(["PNG", "JPEG"]))
    shape = draw(shapes.filter(lambda shape: kind == "PNG" or shape[2] != 4))

    def decoded(cell: bytes) -> Block:
        with Image.open(io.BytesIO(cell)) as image:
            return np.asarray(image).reshape(shape)

    return Column(
        spark=T.BinaryType(),
        arrow=pa.binary(),
        takes=(shape, "float32"),
        value=hnp.arrays("uint8", shape).map(lambda pixels: encode(pixels, kind)),
        expected=decoded,
    )


@st.composite
def struct_images(draw: st.DrawFn) -> Column:
    height, width, channels = draw(shapes)
    mode = {1: 0, 3: 16, 4: 24}[channels]

    def value(pixels: Block) -> tuple[Any, ...]:
        return ("file:/a.png", height, width, channels, mode, pixels.tobytes())

    def expected(found: Any) -> Block:
        pixels = np.frombuffer(found[-1], "uint8").reshape(height, width, channels)
        return np.ascontiguousarray(pixels[..., [2, 1, 0, 3][:channels]] if channels > 1 else pixels)

    images = hnp.arrays("uint8", (height, width, channels)).map(value)
    return Column(IMAGE, IMAGE_TYPE, ((height, width, channels), "float32"), images, expected)


def encode(pixels: Block, kind: str) -> bytes:
    """Write an image file."""
    out = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(out, kind)
    return out.getvalue()


KINDS = (scalars, times, texts, arrays, padded_arrays, vectors, raw_images, encoded_images, struct_images)

Parts = list[list[list[tuple[Any, ...]]]]


@st.composite
def tables(draw: st.DrawFn) -> tuple[dict[str, Column], Parts]:
    """Draw columns by name, and rows by partition and batch; some of either empty."""
    columns = draw(st.lists(st.one_of([kind() for kind in KINDS]), min_size=1, max_size=4))
    row = st.tuples(*[column.value for column in columns])
    parts = draw(st.lists(st.lists(st.lists(row, max_size=6), max_size=3), min_size=1, max_size=3))
    if not any(rows for part in parts for rows in part):
        parts.append([draw(st.lists(row, min_size=1, max_size=3))])
    return named(columns), parts


@st.composite
def wide_rows(draw: st.DrawFn) -> tuple[dict[str, Column], list[tuple[Any, ...]]]:
    """Draw rows of several columns of every kind: many cases for one Spark job."""
    columns = [draw(kind()) for kind in KINDS for _ in range(4)]
    return named(columns), draw(st.lists(st.tuples(*[column.value for column in columns]), min_size=5, max_size=5))


def named(columns: Sequence[Column]) -> dict[str, Column]:
    return {f"c{number}": column for number, column in enumerate(columns)}


def schema_of(columns: dict[str, Column]) -> T.StructType:
    return T.StructType([T.StructField(name, column.spark) for name, column in columns.items()])


def plan_of(columns: dict[str, Column], sparse: bool = False) -> tuple[tuple[ColumnSpec, ...], BatchSpec]:
    """Plan how drawn columns are stored and fed, as ``fit`` does."""
    return check_columns(
        schema_of(columns),
        feature_cols=list(columns),
        inputs=[column.model_input(name) for name, column in columns.items()],
        missing=Missing.from_params(
            {name: column.fill for name, column in columns.items() if column.fill is not None},
            {name: {"value": column.padding} for name, column in columns.items() if column.padding is not None},
        ),
        sparse=sparse,
    )
