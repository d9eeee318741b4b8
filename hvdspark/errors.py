"""The exceptions that hvdspark raises.

::

    HvdSparkError
    ├── ConfigError (ValueError)      what was asked for cannot work; found before any Spark job
    │   ├── ParamError                a parameter's value
    │   └── SchemaError               a column: missing, of the wrong type or of the wrong shape
    ├── DataError                     the rows themselves
    │   ├── EmptyDatasetError
    │   ├── NullValueError
    │   ├── RaggedArrayError
    │   ├── ImageError
    │   ├── ValueRangeError
    │   └── CorruptDatasetError       a materialized dataset that is not whole
    ├── StoreError                    the Store cannot be read or written
    ├── RunInProgressError            another driver is at the run
    ├── AliasError                    an alias is damaged, or there is nothing to go back to
    │   └── AliasConflictError        it refers to another run than the one expected
    ├── LaunchError                   the ranks did not come up
    │   ├── NotEnoughSlotsError
    │   ├── StageLostError            Spark lost the stage that ran them
    │   ├── RendezvousError
    │   └── LaunchTimeoutError
    ├── WorkerFailedError             a rank failed while it ran
    ├── NonFiniteLossError            within a rank: the loss or its gradients are NaN or infinite
    ├── RankMismatchError             within a rank: it does not do what the others do
    ├── PeerLostError                 within a rank: another one is gone
    └── ModelFormatError              a model or estimator cannot be saved or loaded

Each message says what happened, the value that was found, and what to do about it. Fields are keyword
arguments and survive pickling, because errors travel from Spark's tasks to the driver. Below the message a traceback
shows, as a note (PEP 678), where to read on: the class's entry in ``hvdspark/troubleshooting.md``.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

JVM_GONE = "Spark's JVM is gone"

# Causes and remedies, with a heading for each class; the file comes with the package.
TROUBLESHOOTING = "hvdspark/troubleshooting.md"


class HvdSparkError(Exception):
    """Base of all errors of this library; catch it to catch them all."""

    def __init__(self, message: str, **fields: Any) -> None:
        super().__init__(message)
        self.add_note(f"See {self.help}.")
        self._fields = fields
        for name, value in fields.items():
            setattr(self, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args[0], self._fields)

    @property
    def fields(self) -> dict[str, Any]:
        """The fields, by name."""
        return dict(self._fields)

    @property
    def help(self) -> str:
        """Where to read on: the entry of its class among the troubles, and the command that shows it."""
        # A class of the user's own has that of the one it derives from.
        name = next(cls.__name__ for cls in type(self).__mro__ if cls.__module__ == __name__)
        return f"{TROUBLESHOOTING}#{name.lower()}, or: hvdspark explain {name}"

    def to_plain(self) -> list[Any]:
        """Describe the error by JSON values: its class, message and fields."""
        return [type(self).__name__, str(self), self.fields]


def from_plain(described: Sequence[Any]) -> HvdSparkError:
    """Make the error that :meth:`HvdSparkError.to_plain` described; lists among its fields become tuples again."""
    name, message, fields = described
    found: type[HvdSparkError] = globals()[name]
    return found(message, **{key: tuple(item) if isinstance(item, list) else item for key, item in fields.items()})


def _rebuild(cls: type[HvdSparkError], message: str, fields: dict[str, Any]) -> HvdSparkError:
    return cls(message, **fields)


class ConfigError(HvdSparkError, ValueError):
    """What was asked for cannot work; raised before any Spark job starts."""


class ParamError(ConfigError):
    """A parameter has a value that cannot be used.

    Attributes
    ----------
    param : str
        Name of the parameter.
    """

    param: str


class SchemaError(ConfigError):
    """A column is missing, or its type or shape does not fit.

    Attributes
    ----------
    column : str
        Name of the column.
    expected, found : str
        What was needed and what the DataFrame has.
    """

    column: str
    expected: str
    found: str


class DataError(HvdSparkError):
    """The rows of the DataFrame cannot be trained on."""


class EmptyDatasetError(DataError):
    """There is no row to train on (or none to validate on)."""


class NullValueError(DataError):
    """A column has nulls; nulls are refused because no number can stand for them.

    Attributes
    ----------
    column : str
        Name of the column.
    count : int
        How many nulls were found.
    """

    column: str
    count: int


class RaggedArrayError(DataError):
    """An array or vector column has rows of different lengths.

    Attributes
    ----------
    column : str
        Name of the column.
    lengths : tuple of int
        Two lengths that were found, or the one expected and the one found.
    """

    column: str
    lengths: tuple[int, int]


class ImageError(DataError):
    """A column has an image that cannot be decoded, or that is not like the others.

    Attributes
    ----------
    column : str
        Name of the column.
    expected, found : str
        What was needed and what the rows have.
    """

    column: str
    expected: str
    found: str


class ValueRangeError(DataError):
    """A column has values that the type the model takes cannot hold.

    Attributes
    ----------
    column : str
        Name of the column.
    dtype : str
        The type that is too small.
    """

    column: str
    dtype: str


class CorruptDatasetError(DataError):
    """A materialized dataset misses files or rows that its manifest names."""


class StoreError(HvdSparkError):
    """The Store cannot be read or written.

    Attributes
    ----------
    url : str
        The address that failed.
    """

    url: str


class RunInProgressError(HvdSparkError):
    """Another driver holds the lease of the run; it can be waited for.

    Attributes
    ----------
    run_id : str
        Name of the run.
    """

    run_id: str


class AliasError(HvdSparkError):
    """An alias is damaged, is not there, or has nothing to be rolled back to.

    Attributes
    ----------
    alias : str
        Its name.
    """

    alias: str


class AliasConflictError(AliasError):
    """An alias refers to another run than the one expected: somebody else changed it meanwhile.

    Attributes
    ----------
    expected, found : str
        The run that it was to refer to, and the one that it does; empty for none.
    """

    expected: str
    found: str


class LaunchError(HvdSparkError):
    """The ranks could not be started.

    Attributes
    ----------
    is_passing : bool
        Whether another attempt may succeed: a rank was killed before it began, or a network or disk failed.
    """

    is_passing: bool = False


class NotEnoughSlotsError(LaunchError):
    """The cluster cannot run that many ranks at the same time.

    Attributes
    ----------
    needed, available : int
        Ranks asked for, and tasks that the cluster can run at once.
    """

    needed: int
    available: int


class StageLostError(LaunchError):
    """Spark lost the stage that ran the ranks: an executor died, or the job was cancelled.

    Attributes
    ----------
    is_passing : bool
        Whether another attempt may succeed: something died, and nobody cancelled the job.
    is_cancelled : bool
        Whether the job was cancelled, or the session stopped.
    """

    is_passing: bool
    is_cancelled: bool


class RendezvousError(LaunchError):
    """The ranks started but did not find each other."""


class LaunchTimeoutError(LaunchError):
    """The barrier stage did not start, or its ranks did not meet, within the time allowed."""


class WorkerFailedError(HvdSparkError):
    """A rank failed while it ran the user's function or trained.

    Attributes
    ----------
    failures : dict of int to str
        The error text of every rank that failed, by rank.
    root_cause : int
        The rank that failed first, on its own account; the others noticed that it was gone.
    log_tail : str
        The last lines that this rank wrote.
    is_passing : bool
        Whether another attempt may succeed: the rank was killed or lost, and its own work raised nothing.
    noticed : float
        When the failure was noticed on that rank's host, in seconds since 1970 by the clock there; of a rank that no
        longer answered, when the driver gave it up.
    """

    failures: Mapping[int, str]
    root_cause: int
    log_tail: str
    is_passing: bool
    noticed: float


class NonFiniteLossError(HvdSparkError):
    """The training came upon a loss, gradients or weights that are NaN or infinite.

    Attributes
    ----------
    epoch, step
        Where, counted from zero; the step within the epoch.
    ranks : tuple of int
        The ranks whose own numbers were not finite; empty where only the average over all of them was not.
    """

    epoch: int
    step: int
    ranks: tuple[int, ...]


class RankMismatchError(HvdSparkError):
    """Ranks have models or gradients of different shapes, so that there is nothing to average.

    Attributes
    ----------
    ranks : tuple of int
        The ranks that differ from most others.
    """

    ranks: tuple[int, ...]


class PeerLostError(HvdSparkError):
    """A rank that others wait for has ended or does not answer; what ended it is the cause, not this."""


class ModelFormatError(HvdSparkError):
    """A model or an estimator cannot be saved or loaded."""


def text_of(exc: object) -> str:
    """Return the text of an error; of Java's errors py4j has to ask the JVM, which may be what has gone."""
    try:
        return str(exc)
    except Exception as reason:  # noqa: BLE001 - whatever the asking comes to
        return f"{JVM_GONE}, and with it the text of a {type(exc).__name__}: {reason}"


# An error of Python's or Java's, as its name and what it says; not Spark's own that wrap it.
_TELLING = re.compile(
    r"^(?:Caused by: |.*\(TID \d+\) \([^)]*\): )?"
    r"((?!org\.apache\.spark\.)(?:\w+\.)*\w*(?:Error|Exception): (?!Traceback )\S.*)",
    re.MULTILINE,
)


def telling_line(exc: BaseException) -> str:
    """Return the line of one of Spark's errors that tells what was wrong."""
    java = getattr(exc, "java_exception", None)
    text = text_of(java if java is not None else exc).strip()
    found = _TELLING.search(text)
    return (found[1] if found else text.partition("\n")[0]).strip() or type(exc).__name__


def first_line(exc: object) -> str:
    """Return the first line of an error's message; its class where there is none."""
    return next(iter(str(exc).strip().splitlines()), type(exc).__name__)


def closest(name: str, candidates: Iterable[str]) -> str:
    """Return ``' Did you mean 'x'?'`` for the best match among the candidates, or an empty string."""
    matches = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.6)
    return f" Did you mean '{matches[0]}'?" if matches else ""
