"""Arrow types that other programs write into Parquet, as the types that Spark has.

pyarrow brings columns back in the type that they had when they were written (wide lists, dictionaries, views), where
Spark sees the Parquet types beneath; columns are planned with those.
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq


def as_spark_has(column: pa.Array) -> pa.Array:
    """Turn a column into lists, strings, binaries and numbers of the usual kinds.

    Raises
    ------
    pyarrow.ArrowException
        When it cannot be turned.
    """
    if isinstance(column.type, pa.BaseExtensionType):
        return as_spark_has(column.storage)
    wanted = _plain(column.type)
    return column if wanted == column.type else column.cast(wanted)


def _plain(found: pa.DataType) -> pa.DataType:
    types = pa.types
    if isinstance(found, pa.BaseExtensionType):
        return _plain(found.storage_type)
    if types.is_dictionary(found):
        return _plain(found.value_type)
    if types.is_list(found) or types.is_large_list(found):
        inside = _plain(found.value_type)
        return found if inside == found.value_type else pa.large_list(inside)
    if types.is_list_view(found) or types.is_large_list_view(found):
        # Arrow's own cast to lists loses values of views within other lists.
        raise pa.ArrowNotImplementedError("views of lists are not read, write them as lists")
    if types.is_fixed_size_list(found):
        return pa.large_list(_plain(found.value_type))
    if types.is_string_view(found):
        return pa.large_string()
    if types.is_binary_view(found) or types.is_fixed_size_binary(found):
        return pa.large_binary()
    # Spark sees the numbers alone: of a duration their count of the file's unit, of nothing but nulls none at all.
    if types.is_duration(found):
        return pa.int64()
    return pa.int32() if types.is_null(found) else found


def unknown_to_spark(footer: pq.FileMetaData) -> dict[str, str]:
    """Name the columns of a file whose Parquet types Spark does not have, and their types in Arrow."""
    leaves = [footer.schema.column(index) for index in range(footer.num_columns)]
    # Spark's own old timestamps, which Arrow takes for nanoseconds.
    old = {leaf.path.partition(".")[0] for leaf in leaves if leaf.physical_type == "INT96"}
    fields = [field for field in footer.schema.to_arrow_schema() if field.name not in old]
    return {field.name: str(field.type) for field in fields if not _has_spark(field.type)}


def _has_spark(found: pa.DataType) -> bool:
    types = pa.types
    if isinstance(found, pa.BaseExtensionType):
        return _has_spark(found.storage_type)
    if types.is_nested(found):
        return all(_has_spark(found.field(index).type) for index in range(found.num_fields))
    is_nanoseconds = types.is_timestamp(found) and found.unit == "ns"
    return not (is_nanoseconds or types.is_float16(found) or types.is_time(found))
