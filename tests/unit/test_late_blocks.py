"""Blocks that are no arrays yet: sparse vectors, encoded images, text."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from column_kinds import Block, encode
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from pyspark.ml.linalg import Vectors

from hvdspark.data.arrays import fill_tensor, to_block
from hvdspark.data.blocks import DENSE_BYTES, AnyBlock, LateBlock, concatenate, late_slices
from hvdspark.data.cells import TextBlock
from hvdspark.data.images import ImageBlock
from hvdspark.data.sparse import SparseBlock
from hvdspark.data.storage import from_parquet
from hvdspark.data.vectors import VECTOR_TYPE, from_vectors
from hvdspark.errors import DataError, ImageError, NullValueError, RaggedArrayError, ValueRangeError
from hvdspark.plan import ColumnSpec, TensorSpec

WIDE = ColumnSpec("v", "vector", "float32", None, storage="sparse")
BINARY = ColumnSpec("b", "binary", "uint8", None)


def dense(block: AnyBlock) -> Block:
    return block.to_dense(None, "c") if isinstance(block, LateBlock) else block


@st.composite
def sparse_blocks(draw: st.DrawFn, rows: int, size: int = 7) -> tuple[SparseBlock, Block]:
    """Draw a sparse block and the array that it stands for."""
    values = draw(hnp.arrays("float32", (rows, size), elements=st.sampled_from([0, 0, 1.5, -0.0, np.inf, np.nan])))
    kept = values.view("uint32") != 0
    starts = np.concatenate([[0], np.cumsum(kept.sum(axis=1))])
    return SparseBlock(starts, np.nonzero(kept)[1].astype("int32"), values[kept], size), values


@st.composite
def late_blocks(draw: st.DrawFn, rows: int) -> tuple[LateBlock, Block]:
    """Draw a late block and the array that it becomes."""
    kind = draw(st.sampled_from(["sparse", "text", "png"]))
    if kind == "sparse":
        return draw(sparse_blocks(rows))
    if kind == "text":
        words = draw(st.lists(st.text(max_size=4), min_size=rows, max_size=rows))
        return TextBlock(pa.array(words, pa.string())), np.array([word.encode() for word in words], object).reshape(
            -1, 1
        )
    pixels = draw(hnp.arrays("uint8", (rows, 2, 3, 1)))
    return ImageBlock(pa.array([encode(row, "PNG") for row in pixels], pa.binary()), "png"), pixels


@given(st.data(), st.integers(1, 9))
def test_a_late_block_is_cut_and_joined_as_the_array_would_be(data: st.DataObject, rows: int) -> None:
    late, array = data.draw(late_blocks(rows))
    start, stop = sorted(data.draw(st.tuples(st.integers(0, rows), st.integers(0, rows))))
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows)))
    order = np.array(data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=12)))
    for index in (slice(start, stop), slice(None, None, 2), mask, order):
        found = late[index]
        assert len(found) == len(array[index])
        if len(found):
            np.testing.assert_array_equal(dense(found), array[index])
    joined = concatenate([late, late[:1], late[order]])
    np.testing.assert_array_equal(dense(joined), np.concatenate([array, array[:1], array[order]]))


@given(st.data(), st.integers(0, 9))
def test_sparse_vectors_are_stored_as_npy_arrays_of_their_entries(data: st.DataObject, rows: int) -> None:
    block, values = data.draw(sparse_blocks(rows))
    cells = block.to_parquet()
    for cell, row in zip(cells.to_pylist(), values, strict=True):
        entries = np.load(io.BytesIO(cell), allow_pickle=False)
        again = np.zeros_like(row)
        again[entries["index"]] = entries["value"]
        assert again.tobytes() == row.tobytes()
    start = data.draw(st.integers(0, rows))
    found = from_parquet(cells.slice(start), ColumnSpec("v", "vector", "float32", 7, storage="sparse"))
    assert dense(found).tobytes() == values[start:].tobytes()


@pytest.mark.parametrize(
    "cells", [[b""], [b"x" * 120], [b"x" * 119], ["entries of another type"], ["an index out of range"]]
)
def test_cells_that_are_no_sparse_vectors_are_not_taken_for_some(cells: list[Any]) -> None:
    one = SparseBlock(np.array([0, 1]), np.array([6], "int32"), np.array([1.0]), 7)
    dtype, size = ("float32", 7) if cells == ["entries of another type"] else ("float64", 6)
    column = one.to_parquet() if isinstance(cells[0], str) else pa.array(cells, pa.binary())
    with pytest.raises(ValueError, match=r"column 'v': (cells|indices)"):
        from_parquet(column, ColumnSpec("v", "vector", dtype, size, storage="sparse"))


def vectors(*values: Any) -> pa.Array:
    rows: list[dict[str, Any]] = []
    for value in values:
        indices = getattr(value, "indices", None)
        kind = {"type": 1, "size": None} if indices is None else {"type": 0, "size": len(value)}
        rows.append({**kind, "indices": indices, "values": value.values})
    return pa.array(rows, type=VECTOR_TYPE)


def test_sparse_and_dense_vectors_become_one_sparse_block_without_their_zeros() -> None:
    block = from_vectors(
        vectors(Vectors.sparse(4, {1: 2.0}), Vectors.dense([0.0, -0.0, 3.0, 0.0]), Vectors.sparse(4, {})), WIDE
    )
    assert isinstance(block, SparseBlock)
    assert (block.starts.tolist(), block.indices.tolist()) == ([0, 1, 3, 3], [1, 1, 2])
    expected = np.array([[0, 2, 0, 0], [0, -0.0, 3, 0], [0, 0, 0, 0]], "float32")
    assert dense(block).tobytes() == expected.tobytes()


@pytest.mark.parametrize("storage", ["dense", "sparse"])
def test_values_of_vectors_that_float32_cannot_hold_are_refused(storage: Any) -> None:
    spec = ColumnSpec("v", "vector", "float32", None, storage=storage)
    with pytest.raises(ValueRangeError, match=r"'v' has the value 1e\+300, which float32 cannot hold"):
        to_block(vectors(Vectors.sparse(2, {1: 1e300})), spec)
    with pytest.raises(RaggedArrayError, match=r"expected 2 values, found 3"):
        to_block(vectors(Vectors.sparse(2, {}), Vectors.dense([1, 2, 3])), spec)


def test_a_vector_as_wide_as_a_hashing_table_becomes_dense_a_few_rows_at_a_time() -> None:
    rows, size = 1000, 1 << 18
    block = SparseBlock(np.arange(rows + 1), np.arange(rows, dtype="int32"), np.ones(rows, "float32"), size)
    blocks = {"v": block, "x": np.arange(rows)}
    total = 0
    for piece in late_slices(blocks):
        tensor = fill_tensor({"v": block[piece]}, TensorSpec(("v",), (size,), "float32"))
        assert tensor.nbytes <= DENSE_BYTES
        total += int(tensor.sum())
    assert total == rows
    assert block.nbytes < 20 * rows
    assert [piece.stop - piece.start for piece in late_slices({"x": np.arange(rows)})] == [rows]
    assert max(piece.stop - piece.start for piece in late_slices({"x": np.arange(rows)}, 300)) == 300


def binaries(*cells: bytes) -> pa.Array:
    return pa.array(cells, pa.binary())


def gray(height: int = 2, width: int = 3, channels: int = 1, fill: int = 7) -> Block:
    return np.full((height, width, channels), fill, "uint8")


def test_bytes_of_the_inputs_size_are_raw_whatever_they_begin_with() -> None:
    spec = BINARY.with_shape((4, 2, 1))
    cells = [b"\xff\xd8\xff" + bytes(5), b"\x89PNG\r\n\x1a\n", bytes(8)]
    block = to_block(binaries(*cells), spec)
    assert isinstance(block, np.ndarray)
    assert [row.tobytes() for row in block] == cells


def test_an_encoded_image_is_one_even_if_it_is_as_long_as_the_pixels() -> None:
    for kind in ("PNG", "JPEG"):
        cell = encode(gray(), kind)
        block = to_block(binaries(cell), BINARY.with_shape((len(cell),)))
        assert isinstance(block, ImageBlock)
        assert dense(block).shape == (1, 2, 3, 1)


@pytest.mark.parametrize(
    ("cells", "found"),
    [
        (
            [bytes(6), bytes(5)],
            r"2 rows of raw bytes \(5, 6 of them per row\); expected .* 6 raw bytes \(shape 2x3x1\)",
        ),
        ([encode(gray(), "PNG"), bytes(6)], r"1 PNG images and 1 rows of raw bytes \(6 of them"),
        (
            [encode(gray(), "PNG"), encode(gray(), "JPEG")],
            r"1 PNG images and 1 JPEG images; expected all rows",
        ),
        ([b""], r"1 rows of raw bytes \(0 of them per row\)"),
    ],
    ids=["lengths", "raw and PNG", "PNG and JPEG", "empty"],
)
def test_binaries_of_different_kinds_are_told_apart(cells: list[bytes], found: str) -> None:
    with pytest.raises(ImageError, match=rf"column 'b' holds .*{found}"):
        to_block(binaries(*cells), BINARY.with_shape((2, 3, 1)))


@pytest.mark.parametrize(("mode", "channels"), [("1", 1), ("L", 1), ("LA", 2), ("P", 3), ("RGB", 3), ("RGBA", 4)])
def test_every_8_bit_image_keeps_its_channels(mode: str, channels: int) -> None:
    random = np.random.default_rng(0).integers(0, 256, (5, 4, 4), dtype="uint8")
    image = Image.fromarray(random).convert("RGB").convert(mode) if mode != "RGBA" else Image.fromarray(random)
    out = io.BytesIO()
    image.save(out, "PNG")
    shown = {"1": "L", "P": "RGB"}.get(mode, mode)
    expected = np.asarray(image.convert(shown)).reshape(1, 5, 4, channels)
    np.testing.assert_array_equal(dense(to_block(binaries(out.getvalue()), BINARY)), expected)


def test_a_palette_with_transparency_has_four_channels() -> None:
    image = Image.fromarray(np.arange(16, dtype="uint8").reshape(4, 4)).convert("P")
    out = io.BytesIO()
    image.save(out, "PNG", transparency=3)
    found = dense(to_block(binaries(out.getvalue()), BINARY))
    assert found.shape == (1, 4, 4, 4)
    assert sorted(set(found[..., 3].ravel().tolist())) == [0, 255]


@pytest.mark.parametrize(("mode", "kind"), [("I;16", "PNG"), ("CMYK", "JPEG")])
def test_images_of_other_colours_are_refused(mode: str, kind: str) -> None:
    out = io.BytesIO()
    Image.new(mode, (3, 2)).save(out, kind)
    block = to_block(binaries(out.getvalue()), BINARY)
    with pytest.raises(ImageError, match=rf"column 'c' has an image of Pillow's mode '{mode}'; expected 8 bits"):
        dense(block)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_an_image_that_is_cut_off_names_its_column(kind: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype="uint8")
    whole = encode(pixels, kind)
    block = to_block(binaries(whole[: len(whole) // 2]), BINARY)
    with pytest.raises(ImageError, match=rf"column 'b' has a {kind} image that cannot be decoded"):
        block.to_dense(None, "b")  # type: ignore[union-attr]


def test_images_of_different_shapes_are_refused_by_their_headers_and_when_they_are_decoded() -> None:
    for other in (gray(height=3), gray(channels=3)):
        block = to_block(binaries(encode(gray(), "PNG"), encode(other, "PNG")), BINARY)
        assert isinstance(block, ImageBlock)
        message = rf"'b' has images of different shapes: 2x3x1 and {'x'.join(map(str, other.shape))}"
        for read in (lambda block=block: block.common_shape("b"), lambda block=block: block.to_dense(None, "b")):
            with pytest.raises(ImageError, match=message):
                read()


IMAGE = ColumnSpec("i", "image", "uint8", None)


def struct(**values: Any) -> dict[str, Any]:
    return {"origin": "", "height": 2, "width": 1, "nChannels": 3, "mode": 16, "data": bytes(range(6)), **values}


def test_sparks_images_come_red_first() -> None:
    found = to_block(pa.array([struct()]), IMAGE)
    assert isinstance(found, np.ndarray)
    assert found.tolist() == [[[[2, 1, 0]], [[5, 4, 3]]]]


@pytest.mark.parametrize(
    ("other", "error", "message"),
    [
        (
            struct(height=-1, width=-1, nChannels=-1, mode=-1, data=b""),
            NullValueError,
            r"1 images that Spark could",
        ),
        (struct(height=1, width=2), ImageError, r"different shapes: 2x1x3 and 1x2x3"),
        (struct(mode=21), ImageError, r"3 channels of OpenCV's type 21"),
        (struct(data=bytes(5)), ImageError, r"in 5 bytes; expected .* in 2x1x3 bytes"),
    ],
    ids=["undefined", "shape", "floats", "bytes"],
)
def test_sparks_images_that_are_not_like_the_first_are_refused(
    other: dict[str, Any], error: type[DataError], message: str
) -> None:
    with pytest.raises(error, match=rf"column 'i' has .*{message}"):
        to_block(pa.array([struct(), other]), IMAGE)


@pytest.mark.parametrize("row", [[1, 2, 3], [1, None, 3, 4], []])
def test_padding_fills_short_rows_and_cuts_none(row: list[int | None]) -> None:
    spec = ColumnSpec("t", "array", "int32", 3, fill=-5, padding=0)
    column = pa.array([row, [7], None], pa.list_(pa.int32()))
    if len(row) > 3:
        with pytest.raises(RaggedArrayError, match=r"'t' has a row of 4 values, but rows are padded to 3.*'length': 4"):
            to_block(column, spec)
    else:
        assert dense(to_block(column, spec)).tolist() == [(row + [0] * 3)[:3], [7, 0, 0], [-5, -5, -5]]


def test_a_fill_that_no_row_tells_the_length_of_needs_a_shape() -> None:
    column = pa.array([None, None], pa.list_(pa.int32()))
    with pytest.raises(NullValueError, match=r"nothing says how long they are to be"):
        to_block(column, ColumnSpec("t", "array", "int32", None, fill=0))
    assert dense(to_block(column, ColumnSpec("t", "array", "int32", 2, fill=0))).tolist() == [[0, 0], [0, 0]]
