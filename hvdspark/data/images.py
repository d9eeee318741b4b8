"""Images: encoded ones (PNG, JPEG), raw bytes, and Spark's own image structs.

Nothing here changes an image: one of another size or number of channels than the model takes is an error.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from hvdspark.data.blocks import Block, cast
from hvdspark.data.cells import CellBlock
from hvdspark.errors import ImageError, NullValueError
from hvdspark.plan import ColumnSpec, Shape

if TYPE_CHECKING:
    from PIL import Image

Encoding = Literal["png", "jpeg"]

# PNG's signature and the start of the chunk that must come first; a JPEG begins and ends with these markers.
_PNG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"
_JPEG, _JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"

# Channels by Pillow's mode, and the mode that has them as bytes. A palette's colours and black and white are bytes in
# other words; what has more than 8 bits, or other colours, is not turned into RGB unasked.
_MODES = {
    "1": ("L", 1),
    "L": ("L", 1),
    "LA": ("LA", 2),
    "P": ("RGB", 3),
    "PA": ("RGBA", 4),
    "RGB": ("RGB", 3),
    "RGBA": ("RGBA", 4),
}

# Spark's image modes are OpenCV's: 8 bits, by the number of channels.
_CV_8U = {1: 0, 3: 16, 4: 24}


class ImageBlock(CellBlock):
    """Encoded images, all of one format.

    Parameters
    ----------
    cells
        The files.
    encoding
        Their format.
    """

    def __init__(self, cells: pa.Array, encoding: Encoding) -> None:
        super().__init__(cells)
        self._encoding = encoding

    @property
    def storage(self) -> Encoding:
        """The format."""
        return self._encoding

    @property
    def dense_row_bytes(self) -> int:
        """Bytes of the first image's pixels."""
        return int(np.prod(self._shape_of(0, "?"))) if len(self) else 0

    def common_shape(self, column: str) -> Shape:
        """Return the ``(height, width, channels)`` of all images, by their headers.

        Raises
        ------
        ImageError
            When an image has another size than the first, or none that can be read.
        """
        first = self._shape_of(0, column)
        for row in range(1, len(self)):
            found = self._shape_of(row, column)
            if found != first:
                raise _different(column, first, found)
        return first

    def to_dense(self, dtype: str | None, column: str) -> Block:
        """Decode the images to shape ``(rows, height, width, channels)``."""
        pixels = self.decoded(column)
        return pixels if dtype is None else cast(pixels, dtype, column)

    def decoded(self, column: str, threads: int = 1, out: Block | None = None) -> Block:
        """Decode the images in several threads, which Pillow does mostly without Python's lock.

        Parameters
        ----------
        column
            Name of the column, for errors.
        threads
            How many threads decode.
        out
            Where the pixels go, ``uint8`` of shape ``(rows, height, width, channels)``; by default a new array.
        """
        if not len(self):
            return np.zeros((0, 0, 0, 0), dtype="uint8") if out is None else out
        pixels = np.empty((len(self), *self._shape_of(0, column)), dtype=np.uint8) if out is None else out
        # Several pieces for each, because images take different times.
        step = -(-len(self) // (4 * threads))
        pieces = [range(start, min(start + step, len(self))) for start in range(0, len(self), step)]
        if threads == 1 or len(pieces) == 1:
            self._decode(range(len(self)), pixels, column)
            return pixels
        with ThreadPoolExecutor(threads) as pool:
            for done in [pool.submit(self._decode, piece, pixels, column) for piece in pieces]:
                done.result()
        return pixels

    def _decode(self, rows: Iterable[int], pixels: Block, column: str) -> None:
        for row in rows:
            with self._opened(row, column) as image:
                mode, channels = _channels(image, column)
                found = (image.height, image.width, channels)
                if found != pixels.shape[1:]:
                    raise _different(column, pixels.shape[1:], found)
                converted = image if image.mode == mode else image.convert(mode)
                pixels[row] = np.asarray(converted).reshape(found)

    def _like(self, cells: pa.Array) -> Self:
        return type(self)(cells, self._encoding)

    def _shape_of(self, row: int, column: str) -> Shape:
        with self._opened(row, column) as image:
            return image.height, image.width, _channels(image, column)[1]

    @contextmanager
    def _opened(self, row: int, column: str) -> Iterator[Image.Image]:
        """Open an image, which reads its header; what is asked of it within may read the rest."""
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(io.BytesIO(self.cells[row].as_buffer()), formats=[self._encoding]) as image:
                yield image
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as exc:
            raise ImageError(
                f"column '{column}' has a {self._encoding.upper()} image that cannot be decoded: {exc}."
                " Drop the row, or write the image anew.",
                column=column,
                expected=f"a whole {self._encoding.upper()} file",
                found=str(exc),
            ) from exc


def _channels(image: Image.Image, column: str) -> tuple[str, int]:
    mode = "PA" if image.mode == "P" and "transparency" in image.info else image.mode
    if mode not in _MODES:
        raise ImageError(
            f"column '{column}' has an image of Pillow's mode '{image.mode}'; expected 8 bits of gray or RGB, with or"
            " without alpha. Convert the images before fit().",
            column=column,
            expected="8 bits of gray or RGB",
            found=f"mode {image.mode}",
        )
    return _MODES[mode]


def _different(column: str, expected: Shape, found: Shape) -> ImageError:
    return ImageError(
        f"column '{column}' has images of different shapes: {show(expected)} and {show(found)}"
        " (height x width x channels). Bring them to one size and one number of channels before fit(); nothing is"
        " resized unasked.",
        column=column,
        expected=show(expected),
        found=show(found),
    )


def show(shape: Shape) -> str:
    """Write a shape as people do: ``28x28x1``."""
    return "x".join(map(str, shape))


def from_binary(column: pa.Array, spec: ColumnSpec) -> Block | ImageBlock:
    """Turn binaries into raw bytes or encoded images, whichever all rows are.

    Returns
    -------
    ndarray or ImageBlock
        Raw bytes have the spec's shape, or else that of the first row's length.

    Raises
    ------
    ImageError
        When the rows are of different kinds, or raw bytes have different lengths or another one than the spec's.
    """
    data, offsets = _bytes_of(column)
    lengths = np.diff(offsets)
    is_png = _has(data, offsets[:-1], lengths, _PNG)
    # Any three bytes may be pixels: bytes of the right length must end like a JPEG, too.
    ends = _has(data, offsets[1:] - len(_JPEG_END), lengths, _JPEG_END)
    is_jpeg = _has(data, offsets[:-1], lengths, _JPEG) & (ends | (lengths != spec.size))
    if len(column) and is_png.all():
        return ImageBlock(column, "png")
    if len(column) and is_jpeg.all():
        return ImageBlock(column, "jpeg")
    size = spec.size if spec.size is not None else int(lengths[0]) if len(lengths) else 0
    if ((lengths != size) | is_png | is_jpeg).any():
        raise _no_image(spec, size, lengths, is_png, is_jpeg)
    shape = spec.shape if spec.shape is not None else (size,)
    return data[offsets[0] : offsets[-1]].reshape(len(column), *shape)


def _bytes_of(column: pa.Array) -> tuple[Block, Block]:
    """Return a binary column's bytes, and where each row's begin and the last one's end."""
    cells = column.cast(pa.large_binary())
    offsets = np.frombuffer(cells.buffers()[1] or bytes(8), dtype=np.int64)
    data = np.frombuffer(cells.buffers()[2] or b"", dtype=np.uint8)
    return data, offsets[cells.offset : cells.offset + len(cells) + 1]


def _has(data: Block, starts: Block, lengths: Block, mark: bytes) -> npt.NDArray[np.bool_]:
    """Tell which rows have a mark at the place given for each; a row shorter than the mark has none."""
    found = lengths >= len(mark)
    places = starts[found, None] + np.arange(len(mark))
    found[found] = (data[places] == np.frombuffer(mark, dtype=np.uint8)).all(axis=1)
    return np.asarray(found)


def _no_image(spec: ColumnSpec, size: int, lengths: Block, is_png: Block, is_jpeg: Block) -> ImageError:
    raw = lengths[~is_png & ~is_jpeg]
    found = []
    if is_png.any():
        found.append(f"{int(is_png.sum())} PNG images")
    if is_jpeg.any():
        found.append(f"{int(is_jpeg.sum())} JPEG images")
    if len(raw):
        different = ", ".join(str(length) for length in np.unique(raw)[:3])
        found.append(f"{len(raw)} rows of raw bytes ({different} of them per row)")
    shape = f" (shape {show(spec.shape)})" if spec.shape is not None else ""
    expected = f"all rows PNG, all JPEG, or all {size} raw bytes{shape}"
    return ImageError(
        f"column '{spec.name}' holds {' and '.join(found)}; expected {expected}",
        column=spec.name,
        expected=expected,
        found=" and ".join(found),
    )


def from_structs(column: pa.StructArray, spec: ColumnSpec) -> Block:
    """Turn Spark's image structs into pixels of shape ``(rows, height, width, channels)``, red first.

    Raises
    ------
    NullValueError
        When there are undefined images, which Spark makes of files that it cannot read.
    ImageError
        When images have different shapes, or values of more than 8 bits.
    """
    undefined = pc.sum(pc.or_(pc.less(column.field("height"), 0), pc.is_null(column.field("data")))).as_py()
    if undefined:
        raise NullValueError(
            f"column '{spec.name}' has {undefined} images that Spark could not read; drop them, for instance by"
            " spark.read.option('dropInvalid', True)",
            column=spec.name,
            count=undefined,
        )
    if not len(column):
        return np.zeros((0, *(spec.row_shape or (0,))), dtype=np.uint8)
    shapes = np.stack([_numbers(column, name) for name in ("height", "width", "nChannels")], axis=1)
    shape = spec.shape if spec.shape is not None else tuple(int(axis) for axis in shapes[0])
    different = shapes[(shapes != shape).any(axis=1)]
    if len(different):
        raise _different(spec.name, shape, tuple(int(axis) for axis in different[0]))
    channels, modes = shape[-1], _numbers(column, "mode")
    wrong = modes[modes != _CV_8U.get(channels, -1)]
    data, offsets = _bytes_of(column.field("data"))
    lengths = np.diff(offsets)
    if len(wrong) or (lengths != math.prod(shape)).any():
        found = f"{channels} channels of OpenCV's type {int((*wrong, modes[0])[0])} in {lengths.min()} bytes"
        raise ImageError(
            f"column '{spec.name}' has images of {found}; expected 8 bits of gray, BGR or BGRA in {show(shape)} bytes",
            column=spec.name,
            expected=f"8 bits of gray, BGR or BGRA in {show(shape)} bytes",
            found=found,
        )
    pixels = data[offsets[0] : offsets[-1]].reshape(len(column), *shape)
    return pixels if channels == 1 else np.ascontiguousarray(pixels[..., [2, 1, 0, 3][:channels]])


def _numbers(column: pa.StructArray, field: str) -> Block:
    return np.asarray(column.field(field).to_numpy(zero_copy_only=False))
