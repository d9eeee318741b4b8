"""An allreduce in shared memory: adds lists of arrays up over the ranks of one host.

Horovod negotiates before every collective which tensors are ready on all ranks, and its threads sleep in between.
Ranks that run the same compiled step call the same sums in the same order, and need neither.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hvdspark.worker.shared_region import SharedRegion

# Arrays larger than this go through the memory in pieces, which stay in the processor's cache.
CHUNK_BYTES = 4 << 20
# More memory is not taken, however many ranks there are.
_REGION_BYTES = 256 << 20
# Up to this many bytes over all ranks every rank adds up everything, which saves a meeting.
WHOLE_BYTES = 2 << 20
# What TensorFlow asks of an array that it is to take over without a copy.
_ALIGN_BYTES = 64
# Both: ranks take turns with two sets of slots, so that nobody overwrites what a slower one still reads.
_TURNS = 2

Arrays = Sequence[npt.NDArray[Any]]


@dataclass(frozen=True)
class _Piece:
    """Values ``start`` to ``stop`` of an array, which are at ``at`` in a chunk."""

    array: int
    start: int
    stop: int
    at: int


@dataclass(frozen=True)
class _Layout:
    """Where the arrays of a list are in the flat sum, and in which pieces they go through the memory."""

    offsets: tuple[int, ...]
    values: int
    chunks: tuple[tuple[int, int, tuple[_Piece, ...]], ...]


class SharedSum:
    """Adds arrays up over ranks; all ranks must call it in the same order with the same shapes.

    Sums are made in the order of the ranks, so that all get the same bits. Floating-point numbers of less than 32 bits
    are added up in 32.

    Parameters
    ----------
    address, rank, size
        As for :class:`~hvdspark.worker.shared_region.SharedRegion`.
    chunk_bytes
        Bytes that a rank puts into the memory at once.

    Raises
    ------
    OSError
        When the ranks do not come together.
    """

    def __init__(self, address: str, rank: int, size: int, chunk_bytes: int = CHUNK_BYTES) -> None:
        most = min(chunk_bytes, _REGION_BYTES // (_TURNS * size))
        self._chunk_bytes = max(most // _ALIGN_BYTES, 1) * _ALIGN_BYTES
        self._region = SharedRegion(address, rank, size, _TURNS * size * self._chunk_bytes)
        self._turn = 0
        self._slots: dict[Any, list[list[npt.NDArray[Any]]]] = {}
        self._layouts: dict[Any, _Layout] = {}

    def add(self, arrays: Arrays, factor: float = 1.0) -> list[npt.NDArray[Any]]:
        """Add each array up over all ranks.

        Parameters
        ----------
        arrays
            Floating-point arrays of any shapes, the same shapes and dtypes on every rank.
        factor
            What each array is multiplied by first.

        Returns
        -------
        list of arrays
            The sums, new arrays of the same shapes and dtypes, the same bits on every rank.

        Raises
        ------
        PeerLostError
            When a peer is gone.
        RuntimeError
            When the ranks do not add up the same.
        """
        wide = [np.result_type(array.dtype, np.float32) for array in arrays]
        sums: list[npt.NDArray[Any]] = list(arrays)
        for dtype in dict.fromkeys(wide):
            chosen = [index for index, found in enumerate(wide) if found == dtype]
            for index, total in zip(chosen, self._add([arrays[i] for i in chosen], dtype, factor), strict=True):
                sums[index] = total.astype(arrays[index].dtype, copy=False)
        return sums

    def close(self) -> None:
        """Part from the peers."""
        self._region.close()

    def _add(self, arrays: Arrays, dtype: np.dtype[Any], factor: float) -> list[npt.NDArray[Any]]:
        layout = self._layout(arrays, dtype)
        flat = [array.reshape(-1) for array in arrays]
        sums = _aligned(layout.values, dtype)
        # Gradients may be infinite, or no numbers: that is for the optimizer to see, not for NumPy to warn of.
        with np.errstate(all="ignore"):
            for start, stop, pieces in layout.chunks:
                self._add_chunk(flat, pieces, dtype.type(factor), sums[start:stop])
        return [
            sums[offset : offset + array.size].reshape(array.shape)
            for offset, array in zip(layout.offsets, arrays, strict=True)
        ]

    def _add_chunk(self, flat: Arrays, pieces: Sequence[_Piece], factor: Any, out: npt.NDArray[Any]) -> None:
        region, count = self._region, len(out)
        self._turn = (self._turn + 1) % _TURNS
        slots = [slot[:count] for slot in self._slots_of(out.dtype)[self._turn]]
        own = slots[region.rank]
        for piece in pieces:
            place = own[piece.at : piece.at + piece.stop - piece.start]
            np.multiply(flat[piece.array][piece.start : piece.stop], factor, out=place, casting="same_kind")
        region.note(out.nbytes)
        region.meet()
        if len(set(notes := region.notes())) > 1:
            raise RuntimeError(f"the ranks add up different arrays, of {notes} bytes; do they all run the same step?")
        if region.size * out.nbytes <= WHOLE_BYTES or region.size == 2:
            _add_up(slots, out)
            return
        start, stop = (count * rank // region.size for rank in (region.rank, region.rank + 1))
        # Nobody else reads or writes this part of the first slot before the next meeting.
        _add_up([slot[start:stop] for slot in slots], slots[0][start:stop])
        region.meet()
        out[:] = slots[0]

    def _slots_of(self, dtype: np.dtype[Any]) -> list[list[npt.NDArray[Any]]]:
        """Return the slots of both turns, one per rank, as arrays of a dtype."""
        if dtype not in self._slots:
            size, count = self._region.size, self._chunk_bytes // dtype.itemsize
            views = [self._region.array(i * self._chunk_bytes, count, dtype) for i in range(_TURNS * size)]
            self._slots[dtype] = [views[turn * size : (turn + 1) * size] for turn in range(_TURNS)]
        return self._slots[dtype]

    def _layout(self, arrays: Arrays, dtype: np.dtype[Any]) -> _Layout:
        key = (dtype, *(array.size for array in arrays))
        if key not in self._layouts:
            self._layouts[key] = _lay_out([array.size for array in arrays], dtype.itemsize, self._chunk_bytes)
        return self._layouts[key]


def _lay_out(sizes: Sequence[int], item_bytes: int, chunk_bytes: int) -> _Layout:
    """Put arrays of so many values one behind the other, each aligned, and cut the whole into chunks."""
    align = _ALIGN_BYTES // item_bytes
    ends = list(itertools.accumulate((-(-size // align) * align for size in sizes), initial=0))
    chunk = chunk_bytes // item_bytes
    chunks = tuple(
        (start, min(start + chunk, ends[-1]), tuple(_pieces(sizes, ends, start, start + chunk)))
        for start in range(0, ends[-1], chunk)
    )
    return _Layout(tuple(ends[:-1]), ends[-1], chunks)


def _pieces(sizes: Sequence[int], offsets: Sequence[int], start: int, stop: int) -> Iterator[_Piece]:
    for index, (size, offset) in enumerate(zip(sizes, offsets, strict=False)):
        first, last = max(start, offset), min(stop, offset + size)
        if first < last:
            yield _Piece(index, first - offset, last - offset, first - start)


def _aligned(count: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    raw = np.empty(count * dtype.itemsize + _ALIGN_BYTES, np.uint8)
    skip = -raw.ctypes.data % _ALIGN_BYTES
    return raw[skip : skip + count * dtype.itemsize].view(dtype)


def _add_up(slots: Arrays, out: npt.NDArray[Any]) -> None:
    """Add slots up, the first rank's first; ``out`` may be the first slot itself."""
    np.add(slots[0], slots[1], out=out)
    for slot in slots[2:]:
        np.add(out, slot, out=out)
