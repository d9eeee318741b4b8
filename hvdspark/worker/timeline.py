"""Horovod's timeline in the run's folder, as valid JSON: ``runs/<run_id>/timeline/<time>.json``.

Horovod writes it to a local file, on the first rank alone, and reads its address from the environment when it starts.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import posixpath
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from hvdspark.errors import StoreError
from hvdspark.layout import TIMELINE
from hvdspark.runs import run_folder
from hvdspark.store import Store
from hvdspark.worker.session import context_from_environment

logger = logging.getLogger(__name__)

_VARIABLE = "HOROVOD_TIMELINE"


@contextlib.contextmanager
def timeline_in(store: Store, run_id: str) -> Iterator[None]:
    """Have the Horovod session that is the block leave its timeline in the run's folder, however it ends.

    Each attempt of a run leaves one of its own. One that cannot be written costs a warning. Where the user has Horovod
    write a timeline elsewhere, that stays.
    """
    if _VARIABLE in os.environ:
        yield
        return
    name = time.strftime("%Y%m%d-%H%M%S.json", time.gmtime())
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        written = Path(folder) / name
        # All ranks must have it, or they wait for each other for ever; the first one alone opens the file.
        os.environ[_VARIABLE] = str(written)
        try:
            yield
        finally:
            del os.environ[_VARIABLE]
            if context_from_environment().rank == 0:
                _publish(written, store, posixpath.join(run_folder(run_id), TIMELINE, name))


def _publish(written: Path, store: Store, place: str) -> None:
    try:
        store.publish_bytes(whole_events(written.read_text(errors="replace")).encode(), place)
    except (StoreError, OSError) as exc:
        logger.warning("there is no timeline of this run: %s", exc)


def whole_events(text: str) -> str:
    """Return a timeline as valid JSON: Horovod leaves the list open when it does not come to its end.

    Parameters
    ----------
    text
        What Horovod wrote; it may end anywhere.
    """
    try:
        json.loads(text)
    except ValueError:
        pass
    else:
        return text
    events, decoder = [], json.JSONDecoder()
    place = text.find("{")
    while place >= 0:
        try:
            _, end = decoder.raw_decode(text, place)
        except ValueError:  # it was cut off here
            break
        events.append(text[place:end])
        place = text.find("{", end)
    return "[\n" + ",\n".join(events) + "\n]"
