"""Has something follow a training while it runs, in a thread of the driver.

What follows reads what the first rank writes into the run's folder, so that it works on any cluster without an open
port.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

logger = logging.getLogger(__name__)

# A fit that has ended does not wait longer for a watcher that waits for a Store, or a server.
_PARTING_S = 5.0


class Watcher(Protocol):
    """Follows a training."""

    def update(self) -> None:
        """Look at the run, and do what is to be done about what is new."""

    def close(self) -> None:
        """Leave it: nothing comes any more."""


@contextmanager
def watched(watcher: Watcher, what: str, poll_s: float) -> Iterator[None]:
    """Have a training followed for the time of a block, which is never held up by that.

    Parameters
    ----------
    watcher
        Looks at the run every now and then, and once more when the block has ended.
    what
        What it does, for the warning that it no longer does.
    poll_s
        Seconds from one look to the next.
    """
    ended = threading.Event()
    thread = threading.Thread(target=_watch, args=(watcher, what, poll_s, ended), name=f"hvdspark {what}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(_PARTING_S)


def _watch(watcher: Watcher, what: str, poll_s: float, ended: threading.Event) -> None:
    """Update a watcher until the fit has ended, and once more then."""
    try:
        is_over = False
        while not is_over:
            is_over = ended.wait(poll_s)
            watcher.update()
    except Exception:
        # What only looks on must not take a training along.
        logger.warning("%s has failed and is given up; the training is not affected", what, exc_info=True)
    finally:
        watcher.close()
