"""Whether all ranks average the same gradients, before any of them is sent.

Horovod does not look: of a group of tensors whose shapes differ between ranks it makes averages of whatever lies there.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from hvdspark.errors import RankMismatchError
from hvdspark.worker.session import Session


class Agreement:
    """What this rank does, to compare with the others; all ranks call the same in the same order.

    Parameters
    ----------
    session
        The Horovod session.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._noted: list[str] = []
        self._checked: set[tuple[str, ...]] = set()

    def note(self, grads: Sequence[Any]) -> None:
        """Note gradients that are averaged together: while a step is traced to check it later, else to check it now."""
        texts = tuple(f"gradient {number} of {len(grads)}: {describe(grad)}" for number, grad in enumerate(grads, 1))
        if not tf.executing_eagerly():
            self._noted += texts
        elif texts not in self._checked:
            self._checked.add(texts)
            self.check("gradients", texts)

    def check_noted(self) -> None:
        """Check what was noted while the steps were traced; errors as of :meth:`check`."""
        noted, self._noted = self._noted, []
        self.check("gradients", noted)

    def check(self, what: str, items: Sequence[str]) -> None:
        """Check that all ranks have the same.

        Parameters
        ----------
        what
            What it is, for the error.
        items
            A text for each of them, in order.

        Raises
        ------
        RankMismatchError
            On the ranks that differ from most others; those others learn that they have lost a peer.
        """
        text = "\n".join(items)
        digest = hashlib.blake2b(text.encode(), digest_size=6).digest()  # a float64 holds it exactly
        found = self._session.gather(int.from_bytes(digest, "big"), "hvdspark_layout").tolist()
        (common, _), *others = Counter(found).most_common()
        if not others:
            return
        texts = self._session.gather_texts(text, "hvdspark_layouts")
        expected = texts[found.index(common)].split("\n")
        ranks = [rank for rank, own in enumerate(found) if own != common]
        theirs = texts[ranks[0]].split("\n")
        place = next((i for i, pair in enumerate(zip(theirs, expected, strict=False)) if pair[0] != pair[1]), None)
        if place is None:
            place = min(len(theirs), len(expected))
        here, there = (lines[place] if place < len(lines) else "no more" for lines in (theirs, expected))
        self._session.raise_on(
            ranks,
            RankMismatchError(
                f"the {what} of rank {ranks[0]} are not those of rank {found.index(common)}: it has {here or 'none'},"
                f" the other {there or 'none'}. All ranks must run the same model and the same step: look for what"
                " depends on the rank, the host or the environment",
                ranks=tuple(ranks),
            ),
        )


def describe(value: Any) -> str:
    """Return dtype and shape of a tensor, a variable or a sparse gradient."""
    if isinstance(value, tf.IndexedSlices):
        shape = tf.get_static_value(value.dense_shape) if value.dense_shape is not None else None
        return f"sparse {value.dtype.name} {list(shape) if shape is not None else 'of any shape'}"
    return f"{tf.as_dtype(value.dtype).name} {value.shape}"
