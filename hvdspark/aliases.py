"""Aliases: names such as ``champion`` for the model that is in use, and a way back from it.

::

    aliases/<name>.json        the entry that the alias refers to, the earlier ones, and those that were rolled back
    aliases/leases/            who changes one now, see hvdspark.lease

A reader finds the old entry or the new one, whole. Who changes an alias holds a lease meanwhile, so that of two who do
it at once neither loses what the other wrote.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from hvdspark import lease
from hvdspark.errors import AliasConflictError, AliasError, ParamError
from hvdspark.runs import NOTES, published_model, require_run, run_folder
from hvdspark.store import Store, normalized, require_store

ALIASES = "aliases"

# How many earlier entries an alias keeps, to go back to: gc spares their runs. As many that were rolled back are noted.
KEPT = 10

_SUFFIX = ".json"
_WRITER = "writer"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True)
class AliasEntry:
    """What an alias refers to, or did.

    Parameters
    ----------
    run_id
        The run that trained the model.
    model
        Address of a saved ``PipelineModel`` or ``KerasModel``, or the path of a model file in the Store.
    metrics
        What it was promoted for, such as ``{"val_loss": 0.31}``; what is not finite is left out.
    promoted
        Seconds since the epoch, by the clock of who promoted it; :func:`promote` sets it.
    rolled_back
        When it was rolled back, where it was.
    previous
        The entries before it, newest first; empty for those themselves.
    withdrawn
        The entries that were rolled back, the last one first: a record, nothing goes back to them.
    """

    run_id: str
    model: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    promoted: float = 0.0
    rolled_back: float | None = None
    previous: tuple[AliasEntry, ...] = ()
    withdrawn: tuple[AliasEntry, ...] = ()

    @property
    def alone(self) -> AliasEntry:
        """The entry without those before it."""
        return replace(self, previous=(), withdrawn=())


def read_alias(store: Store, name: str) -> AliasEntry | None:
    """Return what an alias refers to.

    Parameters
    ----------
    store, name
        Which one.

    Returns
    -------
    AliasEntry or None
        ``None`` where there is no such alias.

    Raises
    ------
    AliasError
        When its file is damaged.
    StoreError
        When it cannot be read.
    """
    place = _place(name)
    data = require_store(store).find_bytes(place)
    if data is None:
        return None
    try:
        return _from_json(data)
    except ValueError as exc:
        reason = "; ".join(str(exc).splitlines()[1:3]).strip()
        raise AliasError(
            f"the alias '{name}' is damaged: {store.url_of(place)} is not what promoting writes ({reason}). Put a copy"
            " of the file back, or remove it and promote a run anew; gc then no longer spares the runs that it named",
            alias=name,
        ) from exc


def alias_names(store: Store) -> list[str]:
    """Return the names of a Store's aliases, whatever is in their files."""
    names = [name.removesuffix(_SUFFIX) for name in store.list(ALIASES) if name.endswith(_SUFFIX)]
    return [name for name in names if _NAME.fullmatch(name)]


def list_aliases(store: Store) -> dict[str, AliasEntry]:
    """Return all aliases of a Store by name; errors as :func:`read_alias`, and ``ParamError`` where there is none."""
    require_store(store).check_there()
    found = {name: read_alias(store, name) for name in alias_names(store)}
    return {name: entry for name, entry in found.items() if entry is not None}


def runs_in_use(store: Store) -> dict[str, tuple[str, ...]]:
    """Return the runs that aliases refer to, or can be rolled back to, with the names of these aliases.

    Raises
    ------
    AliasError
        When one of them is damaged: nobody knows then what it refers to.
    """
    users: dict[str, set[str]] = {}
    for name, entry in list_aliases(store).items():
        for kept in (entry, *entry.previous):
            users.setdefault(kept.run_id, set()).add(name)
    return {run_id: tuple(sorted(names)) for run_id, names in users.items()}


def promote(store: Store, name: str, entry: AliasEntry, expected: str | None = None) -> AliasEntry:
    """Let an alias refer to a model; what it referred to comes first among its earlier entries.

    An alias that refers to that run and model already stays as it is, but for the metrics: whoever is not sure that
    promoting went well can do it again.

    Parameters
    ----------
    store, name
        Which alias; letters, digits, ``_`` and ``-``. There need not be one.
    entry
        What it is to refer to; its ``promoted`` and its earlier entries are filled in.
    expected
        The run that it must refer to still, ``""`` that there must be none; by default whatever it refers to. So
        nobody replaces a model that the new one was not compared with.

    Returns
    -------
    AliasEntry
        As it is now.

    Raises
    ------
    AliasConflictError
        When it refers to another run than the one expected.
    AliasError
        When its file is damaged.
    ParamError
        For a name, a run or metrics that cannot be.
    StoreError
        When it cannot be written; it is as before then.
    """
    new = _checked(entry)
    _place(name)
    with lease.held_alone(require_store(store), ALIASES, _WRITER):
        current = read_alias(store, name)
        if current is not None and (current.run_id, current.model) == (new.run_id, new.model):
            promoted = replace(current, metrics=new.metrics)
        else:
            _check_expected(name, current, expected)
            promoted = _promoted(current, replace(new, promoted=time.time()))
        _write(store, name, promoted)
    return promoted


def rollback(store: Store, name: str, expected: str | None = None) -> AliasEntry:
    """Let an alias refer to its previous entry again; the one that was rolled back is noted as withdrawn.

    Parameters
    ----------
    store, name
        Which alias.
    expected
        The run to roll back, so that of two who do it at once only one does; by default whatever it refers to.

    Returns
    -------
    AliasEntry
        As it is now.

    Raises
    ------
    AliasConflictError
        When it refers to another run than the one expected.
    AliasError
        When there is no such alias, it is damaged, nothing was before, or the model that was is no longer in the Store.
    StoreError
        When it cannot be written; it is as before then.
    """
    _place(name)
    with lease.held_alone(require_store(store), ALIASES, _WRITER):
        current = read_alias(store, name)
        _check_expected(name, current, expected)
        if current is None or not current.previous:
            what = "there is no such alias" if current is None else f"'{current.run_id}' is its first entry"
            raise AliasError(f"the alias '{name}' cannot be rolled back: {what}. Promote a run instead", alias=name)
        back = _rolled_back(current, time.time())
        if _is_gone(store, back.model):
            raise AliasError(
                f"the alias '{name}' cannot be rolled back to the run '{back.run_id}': its model {back.model} is not"
                f" in {store} any more. Promote another run instead",
                alias=name,
            )
        _write(store, name, back)
    return back


def entry_of_run(store: Store, run_id: str, model: str | None = None) -> AliasEntry:
    """Describe a finished run, to promote it.

    Parameters
    ----------
    store, run_id
        Which one.
    model
        Address of what is to be used of it; by default the ``PipelineModel`` that its job has saved, and for the run
        of a fit alone the model in its folder.

    Returns
    -------
    AliasEntry
        With the metrics of the job's evaluation, or else those that are recorded of the run.

    Raises
    ------
    ParamError
        When there is no such run, it has not finished, or the model is not there.
    """
    record = require_run(store, run_id)
    if record.state != "finished":
        reason = f" ({record.cause})" if record.cause else ""
        raise ParamError(
            f"the run '{run_id}' is {record.state}{reason}; only a finished run can be promoted", param="run_id"
        )
    notes = store.read_json(run_folder(run_id), NOTES)
    if model is None and notes is not None and not notes.get("model"):
        raise ParamError(
            f"the run '{run_id}' is trained, but its job has not saved the pipeline yet; give its command again, which"
            " goes on from there",
            param="run_id",
        )
    if model is None:
        model = published_model(store, run_id) if notes is None else str(notes["model"])
    if model is None or _is_gone(store, model):
        where = store.url_of(run_folder(run_id)) if model is None else model
        raise ParamError(f"the run '{run_id}' has no model in {where} any more; give the address of one", param="model")
    return AliasEntry(run_id, model, dict((notes or {}).get("metrics") or record.metrics))


def path_in_store(store: Store, model: str) -> str | None:
    """Return the path, relative to the Store, of an entry's model; ``None`` for one that is elsewhere.

    Addresses as Spark spells them are known, too: ``file:///shared/…``, ``s3a://…``.
    """
    is_address = model.startswith("/") or ":" in model.partition("/")[0]
    inside = normalized(model).removeprefix(f"{store.url}/") if is_address else model
    return None if inside.startswith("/") or "://" in inside else inside


def _is_gone(store: Store, model: str) -> bool:
    """Whether a model that belongs into the Store is not there; of those elsewhere the Store knows nothing."""
    inside = path_in_store(store, model)
    try:
        return inside is not None and not store.exists(inside)
    except ParamError:
        return False  # the user's own folder, with a name that the Store gives to none


def _promoted(current: AliasEntry | None, new: AliasEntry) -> AliasEntry:
    if current is None:
        return new
    return replace(new, previous=(current.alone, *current.previous)[:KEPT], withdrawn=current.withdrawn)


def _rolled_back(current: AliasEntry, now: float) -> AliasEntry:
    back, *earlier = current.previous
    withdrawn = (replace(current.alone, rolled_back=now), *current.withdrawn)[:KEPT]
    return replace(back, previous=tuple(earlier), withdrawn=withdrawn)


def _check_expected(name: str, current: AliasEntry | None, expected: str | None) -> None:
    found = "" if current is None else current.run_id
    if expected not in (None, found):
        raise AliasConflictError(
            f"the alias '{name}' refers to {_shown(found)}, not to {_shown(str(expected))} as expected: it was changed"
            " meanwhile. Compare with what it refers to now, and try again",
            alias=name,
            expected=expected,
            found=found,
        )


def _shown(run_id: str) -> str:
    return f"the run '{run_id}'" if run_id else "no run"


def _checked(entry: AliasEntry) -> AliasEntry:
    """Return what counts of an entry that was given; raises ``ParamError`` for what cannot be written."""
    for name in ("run_id", "model"):
        value = getattr(entry, name)
        if not value:
            raise ParamError(f"{name}={value!r} cannot be promoted: give the {name} of a finished run", param=name)
    try:
        metrics = {str(name): float(value) for name, value in entry.metrics.items() if math.isfinite(value)}
    except (TypeError, ValueError) as exc:
        raise ParamError(f"metrics={entry.metrics!r} are no numbers by name: {exc}", param="metrics") from exc
    return AliasEntry(entry.run_id, entry.model, metrics)


def check_name(name: str) -> str:
    """Return the name of an alias as it is; raises :class:`ParamError` for what none can be called."""
    if not _NAME.fullmatch(name):
        raise ParamError(
            f"{name!r} is no name of an alias: use up to 64 letters, digits, '_' and '-', such as 'champion'",
            param="alias",
        )
    return name


def _place(name: str) -> str:
    return f"{ALIASES}/{check_name(name)}{_SUFFIX}"


def _write(store: Store, name: str, entry: AliasEntry) -> None:
    store.publish_bytes(json.dumps(to_json(entry), indent=1).encode(), _place(name))


def to_json(entry: AliasEntry) -> dict[str, Any]:
    """Describe an entry, with those before it, by JSON values: what its file holds."""
    values = {name: value for name, value in asdict(entry.alone).items() if value is not None}
    for name in ("previous", "withdrawn"):
        values[name] = [to_json(other) for other in getattr(entry, name)]
        if not values[name]:
            del values[name]
    return values


def _from_json(data: bytes) -> AliasEntry:
    # Imported here: programs that use no alias need not wait for it.
    from pydantic import TypeAdapter

    return TypeAdapter(AliasEntry).validate_json(data, strict=True)
