"""A page about a run: its curves, where the time went, its ranks, parameters and data.

The page is one HTML file. It loads nothing and runs no script, so it can be mailed, kept with a build, or opened years
later; and what is in a run's files (names, parameters, errors) is shown as text, whatever it holds.

It needs the extra ``report``: ``pip install --find-links dist 'hvdspark[report]'`` (``ci/wheels`` makes ``dist``).
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hvdspark.errors import ConfigError, StoreError
from hvdspark.history import read_history, read_progress
from hvdspark.runs import require_run, run_folder
from hvdspark.store import Store
from hvdspark.versions import command_for

if TYPE_CHECKING:
    from jinja2 import Template

Found = TypeVar("Found")

__all__ = ["render_report", "write_report"]


def render_report(store: Store, run_id: str) -> str:
    """Return the page about a run, in any state; what a run has not left is left out.

    Parameters
    ----------
    store, run_id
        Which one.

    Raises
    ------
    ParamError
        When there is no such run.
    ConfigError
        When the extra ``report`` is not installed.
    StoreError
        When the Store cannot be read.
    """
    record = require_run(store, run_id)
    sections, template = _machinery()
    troubles: list[str] = []
    epochs = _read(read_history, store, run_id, troubles) or ()
    progress = _read(read_progress, store, run_id, troubles)
    return template.render(sections(record, epochs, progress, store.url_of(run_folder(run_id)), troubles))


def write_report(store: Store, run_id: str, path: str | os.PathLike[str]) -> Path:
    """Write the page about a run into a file, replacing one of the same name; see :func:`render_report`.

    Parameters
    ----------
    store, run_id
        Which one.
    path
        The local file.

    Returns
    -------
    Path
        The file, as an absolute path.

    Raises
    ------
    StoreError
        When the file cannot be written; also what :func:`render_report` raises.
    """
    target = Path(path).absolute()
    # Half a surrogate pair, which JSON may hold, is no text that a file can hold.
    page = render_report(store, run_id).encode(errors="replace")
    beside = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
    try:
        beside.write_bytes(page)
        beside.replace(target)
    except OSError as exc:
        beside.unlink(missing_ok=True)
        raise StoreError(
            f"the report cannot be written to '{target}': {exc.strerror or exc}; give a file in a folder that exists",
            url=str(target),
        ) from exc
    return target


def _read(read: Callable[[Store, str], Found], store: Store, run_id: str, troubles: list[str]) -> Found | None:
    """Read a file of the run; one that is damaged is no reason to show nothing of the others."""
    try:
        return read(store, run_id)
    except StoreError as exc:
        troubles.append(str(exc))
        return None


def _machinery() -> tuple[Callable[..., dict[str, Any]], Template]:
    """Import what makes pages, which only those need who want one."""
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined

        from hvdspark.report.page import sections
    except ModuleNotFoundError as exc:
        if (exc.name or "").startswith("hvdspark"):
            raise
        raise ConfigError(
            f"a report needs the package {exc.name}, which is not installed: {command_for('report')}"
        ) from exc
    templates = Environment(
        loader=PackageLoader("hvdspark.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return sections, templates.get_template("page.html.j2")
