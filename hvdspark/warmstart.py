"""The model that a training begins with, where it is not the estimator's own.

::

    runs/<id>/warm_start.json            which model it was, and its checksum
    runs/<id>/checkpoints/start.keras    that model, so that the run can go on though an alias has moved meanwhile

Both are there from when the ranks are first started, and stay.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
from collections.abc import Collection
from dataclasses import asdict, dataclass, field

from hvdspark.aliases import alias_names, path_in_store, read_alias
from hvdspark.errors import ModelFormatError, ParamError, closest
from hvdspark.runs import RUNS, run_folder, run_names
from hvdspark.store import Store

ALIAS = "alias:"

_NOTE = "warm_start.json"
START = "start"
_STATE = "state-"


@dataclass(frozen=True)
class WarmStart:
    """A model whose weights a training begins with.

    Parameters
    ----------
    given
        The parameter, such as ``"alias:champion"``.
    model
        Address of the model's file.
    run_id
        The run that trained it, where that is known.
    sha256
        Of the file.
    data
        The file.
    """

    given: str
    model: str
    run_id: str | None
    sha256: str
    data: bytes = field(repr=False)

    @classmethod
    def of(cls, given: str, model: str, run_id: str | None, data: bytes) -> WarmStart:
        """Describe a file that was read."""
        return cls(given, model, run_id, hashlib.sha256(data).hexdigest(), data)


@dataclass(frozen=True)
class Location:
    """Where a model is.

    Parameters
    ----------
    path
        Relative to the Store where ``is_inside``; else an address as Spark takes it.
    is_inside
        Whether it is read from the Store.
    run_id
        The run that trained it, where that is known.
    """

    path: str
    is_inside: bool
    run_id: str | None = None


def locate(store: Store, given: str) -> Location:
    """Find out where the model of a ``warm_start`` is.

    Parameters
    ----------
    store
        Where runs and aliases are.
    given
        ``"alias:<name>"``, ``"runs/<id>"`` for a run in the Store, or the address of a saved model.

    Raises
    ------
    ParamError
        When there is no such alias or run.
    AliasError
        When the alias is damaged.
    """
    if given.startswith(ALIAS):
        name = given.removeprefix(ALIAS)
        entry = read_alias(store, name)
        if entry is None:
            raise ParamError(
                f"warm_start='{given}': there is no alias '{name}' in {store}; promote a run first, or begin without",
                param="warm_start",
            )
        inside = path_in_store(store, entry.model)
        return Location(entry.model if inside is None else inside, inside is not None, entry.run_id)
    folder, _, rest = given.partition("/")
    if folder != RUNS or not rest:
        return Location(given, is_inside=False)
    run_id = rest.partition("/")[0]
    if not store.exists(run_folder(run_id)):
        raise ParamError(
            f"warm_start='{given}': there is no run '{run_id}' in {store}.{closest(run_id, store.list(RUNS))}",
            param="warm_start",
        )
    return Location(given.rstrip("/"), is_inside=True, run_id=run_id)


def pinned(store: Store, given: str, awaited: Collection[str] = ()) -> str | None:
    """Return what a job is to begin with by an address that refers to the same model later.

    Parameters
    ----------
    store
        Where runs and aliases are.
    given
        The name of an alias, with or without ``"alias:"``, or of a run; or, with a slash in it, what :func:`locate`
        takes.
    awaited
        Names that may not be there yet: those of aliases that such jobs make themselves.

    Returns
    -------
    str or None
        What :func:`locate` takes; ``None`` for an awaited name that is not there.

    Raises
    ------
    ParamError
        For any other name that is not there.
    AliasError
        When the alias is damaged.
    """
    if "/" in given:
        locate(store, given)
        return given
    name, aliases = given.removeprefix(ALIAS), alias_names(store)
    entry = read_alias(store, name) if name in aliases else None
    if entry is not None:
        return entry.model
    runs = [] if given.startswith(ALIAS) else run_names(store)
    if name in runs:
        return run_folder(name)
    if name in awaited:
        return None
    what = "no alias" if given.startswith(ALIAS) else "neither an alias nor a run"
    hint = closest(name, [*aliases, *runs, *awaited])
    raise ParamError(
        f"warm_start='{given}': there is {what} '{name}' in {store}.{hint} Give an alias, a run, or the path of a saved"
        " model with a slash in it",
        param="warm_start",
    )


def keep_start(store: Store, run_id: str, start: WarmStart, suffix: str) -> None:
    """Keep with a run what it begins with; what is kept already stays.

    Parameters
    ----------
    store, run_id
        The run.
    start
        What it begins with.
    suffix
        File suffix of the framework's format.

    Raises
    ------
    StoreError
        When it cannot be written.
    """
    folder = run_folder(run_id)
    if store.exists(folder, _NOTE):
        return
    note = {name: value for name, value in asdict(start).items() if name != "data"}
    # The note last: where it is, the copy is whole.
    store.publish_bytes(start.data, _copy_of(run_id, suffix))
    store.publish_bytes(json.dumps(note, indent=1).encode(), folder, _NOTE)


def recall_start(store: Store, run_id: str, given: str | None, suffix: str) -> WarmStart | None:
    """Return what a run that was interrupted began with.

    Parameters
    ----------
    store, run_id, suffix
        As for :func:`keep_start`.
    given
        The ``warm_start`` with which it is to go on.

    Returns
    -------
    WarmStart or None
        ``None`` for a run that has not begun, or began without.

    Raises
    ------
    ParamError
        When it began with another one.
    ModelFormatError
        When what was kept is damaged.
    StoreError
        When it cannot be read.
    """
    note = store.read_json(run_folder(run_id), _NOTE)
    before = None if note is None else note.get("given")
    has_begun = note is not None or any(
        name.startswith(_STATE) for name in store.list(run_folder(run_id), "checkpoints")
    )
    if has_begun and before != given:
        raise ParamError(
            f"run_id='{run_id}' was begun with warm_start={before!r}, and now it is {given!r}; give another run_id, or"
            " what the run began with",
            param="warm_start",
        )
    if note is None:
        return None
    data = store.read_bytes(_copy_of(run_id, suffix))
    start = WarmStart.of(str(before), str(note.get("model")), note.get("run_id"), data)
    if start.sha256 != note.get("sha256"):
        raise ModelFormatError(
            f"{store.url_of(_copy_of(run_id, suffix))} is not the model that the run '{run_id}' began with (its"
            " checksum differs); give another run_id"
        )
    return start


def _copy_of(run_id: str, suffix: str) -> str:
    return posixpath.join(run_folder(run_id), "checkpoints", START + suffix)
