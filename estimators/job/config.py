"""What a job's configuration may hold, and messages that point to what is wrong in it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Self

from hvdspark.estimators.converters import to_run_id
from hvdspark.estimators.job.document import Document, Keys, read_document
from hvdspark.estimators.job.gate import Gate
from hvdspark.estimators.keras.estimator import KerasEstimator
from hvdspark.estimators.keywords import HINTS, REPLACED
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from hvdspark.aliases import check_name
from hvdspark.errors import ParamError, closest

# Where in the Store the model of a run goes, unless the configuration says otherwise.
RUN_ID = "{run_id}"

# The alias of the last model that was compared, whatever came of it.
CANDIDATE = "candidate"

# What the job itself decides.
_NOT_THERE = {
    "store": "give it as 'store' at the top of the file",
    "run_id": "give it with --run-id, or as 'run_id' at the top of the file",
    "warm_start": "give it with --warm-start, or as 'warm_start' at the top of the file",
}

Text = Annotated[str, StringConstraints(min_length=1, strip_whitespace=True)]


# Not a union: of that pydantic tells once per branch what is wrong.
def _scalar(value: Any) -> Any:
    if isinstance(value, str | bool | int | float):
        return value
    raise ValueError(f"give one value, not {value!r}")


def _alias(name: str) -> str:
    if check_name(name) == CANDIDATE:
        raise ValueError(f"every model that is compared becomes '{CANDIDATE}'; give another name, such as 'champion'")
    return name


Scalar = Annotated[Any, AfterValidator(_scalar)]
Bound = Annotated[Any, AfterValidator(lambda value: None if value is None else _scalar(value))]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True)


class Window(_Section):
    """Which rows of the input are taken, by a column: ``since`` included, ``until`` not."""

    column: Text
    since: Bound = None
    until: Bound = None


class Input(_Section):
    """Rows, from any reader of Spark's: files or a connector, a table, or a query."""

    format: Text | None = None
    path: Text | list[Text] | None = None
    options: dict[str, Scalar] = {}
    schema_: Text | None = Field(default=None, alias="schema")
    table: Text | None = None
    sql: Text | None = None
    window: Window | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [name for name in ("path", "table", "sql") if getattr(self, name) is not None]
        is_connector = self.format is not None and not given
        if len(given) != 1 and not is_connector:
            found = " and ".join(given) or "none of them"
            raise ValueError(
                f"give one of 'path' (with 'format', parquet by default), 'table' or 'sql', or a 'format' that needs no"
                f" path, such as jdbc; found {found}"
            )
        files_only = [name for name in ("format", "schema_", "options") if getattr(self, name)]
        if given and given != ["path"] and files_only:
            raise ValueError(f"'{files_only[0].rstrip('_')}' belongs to 'path'; '{given[0]}' needs none")
        return self


class Evaluation(_Section):
    """Which rows the model is compared on: held out of the input, or rows of their own."""

    fraction: float | None = Field(default=None, gt=0, lt=1)
    by: list[Text] | None = None
    since: Bound = None
    input: Input | None = None
    metrics: list[Any] = []

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        given = [name for name in ("fraction", "since", "input") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                "give one of 'fraction' (a share of the input's rows), 'since' (rows from then on, by the column of"
                f" input.window) or 'input' (rows of their own); found {' and '.join(given) or 'none of them'}"
            )
        if self.by and self.fraction is None:
            raise ValueError("'by' belongs to 'fraction': rows that agree in these columns stay together")
        return self


class EstimatorSection(BaseModel):
    """``KerasEstimator``'s keywords; those that YAML cannot hold by the address of a function, or as Keras' config."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    model: Text
    model_args: dict[str, Any] = {}
    loss: Any = None
    loss_weights: Any = None
    optimizer: Any = None
    metrics: Any = None
    callbacks: Text | None = None
    custom_objects: Text | None = None
    checkpoint_callback: Text | dict[str, Any] | None = None

    @property
    def params(self) -> dict[str, Any]:
        """What goes to the estimator as it is."""
        return dict(self.__pydantic_extra__ or {})


class JobConfig(_Section):
    """A training job."""

    store: Text
    run_id: Text | None = None
    input: Input
    pipeline: Text | None = None
    pipeline_args: dict[str, Any] = {}
    estimator: EstimatorSection
    evaluation: Evaluation | None = None
    output: Text | None = None
    promote_if: Text | None = None
    alias: Annotated[Text, AfterValidator(_alias)] = "champion"
    warm_start: Text | None = None
    spark: dict[str, Scalar] = {}

    @property
    def addresses(self) -> list[str | None]:
        """The functions that it names; executors need their modules too."""
        section = self.estimator
        nested = [section.loss, section.optimizer, section.metrics, self.evaluation and self.evaluation.metrics]
        return [self.pipeline, section.model, section.callbacks, section.custom_objects, *_texts(nested)]

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.promote_if is not None:
            gate = Gate.parse(self.promote_if)
            if gate.conditions and self.evaluation is None:
                raise ValueError(
                    "'promote_if' compares models on held-out rows; add 'evaluation', such as {fraction: 0.1}"
                )
            if self.output is not None and RUN_ID not in self.output:
                raise ValueError(
                    f"'output' is {self.output!r} for every run, so a run would overwrite the promoted model; put"
                    f" {RUN_ID} into it"
                )
        if self.evaluation is not None and self.evaluation.since is not None and self.input.window is None:
            raise ValueError("'evaluation.since' goes by the column of 'input.window'; add it")
        return self


def _texts(value: Any) -> Iterator[str]:
    """Yield the texts in lists and mappings within each other."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(item)


def load_config(
    path: str, assignments: Iterable[str] = (), options: Mapping[Keys, Any] | None = None
) -> tuple[JobConfig, Document]:
    """Read, override and check a configuration.

    Parameters
    ----------
    path
        A YAML file.
    assignments
        What ``--set`` said: ``"estimator.epochs=3"``. A parameter of the estimator needs no ``estimator.``.
    options
        Other options of the command line, by the keys of what they replace; ``None`` leaves the file's value.

    Returns
    -------
    config : JobConfig
        The configuration.
    document : Document
        The file, to say where something in it is.

    Raises
    ------
    ParamError
        For all that is wrong in it, each with its place; an unknown key with the closest that exists.
    """
    keys = {name: "estimator" for name in _estimator_keys() if name not in JobConfig.model_fields}
    document = read_document(path, assignments, keys)
    for place, value in (options or {}).items():
        if value is not None:
            _put(document, place, value)
    try:
        config = JobConfig.model_validate(document.values)
    except ValidationError as exc:
        # Of the branches of a union the first that did not fit says enough.
        first = {_keys(error): error for error in reversed(exc.errors())}
        problems = [_problem(document, error) for error in reversed(first.values())]
        raise ParamError("\n".join(problems), param=".".join(map(str, exc.errors()[0]["loc"]))) from exc
    _check_estimator(config.estimator, document)
    if config.run_id is not None:
        to_run_id(config.run_id)
    return config, document


def input_of(values: Mapping[str, Any], pairs: Iterable[str]) -> Input:
    """Make an input of a command line's options; ``pairs`` are the reader's options.

    Raises
    ------
    ParamError
        When they do not make one.
    """
    options = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator or not name:
            raise ParamError(f"--option {pair}: give a name and a value, such as header=true", param="option")
        options[name] = value
    try:
        return Input.model_validate({**values, "options": options} if options else values)
    except ValidationError as exc:
        error = exc.errors()[0]
        reason = error["ctx"]["error"] if error["type"] == "value_error" else error["msg"]
        raise ParamError(f"the input: {reason}", param="input") from exc


def estimator_error(document: Document, exc: ParamError) -> ParamError:
    """Say where in the file the parameter is that an estimator refused."""
    keys: Keys = ("estimator", exc.param)
    name = f"estimator.{exc.param}" if keys in document.lines or keys in document.overrides else "estimator"
    return ParamError(f"{document.where(keys)}: {name}: {exc}", param=exc.param)


def _check_estimator(section: EstimatorSection, document: Document) -> None:
    """Have the estimator itself check all parameters that are plain values."""
    for name in section.params:
        if name in _NOT_THERE:
            keys: Keys = ("estimator", name)
            raise ParamError(f"{document.where(keys)}: estimator.{name}: {_NOT_THERE[name]}", param=name)
    try:
        KerasEstimator(**section.params)
    except ParamError as exc:
        raise estimator_error(document, exc) from exc


def _estimator_keys() -> list[str]:
    # keyword_only leaves the signature as it is written.
    own = [name for name in inspect.signature(KerasEstimator.__init__).parameters if name not in ("self", "others")]
    known = {*own, *HINTS, *REPLACED, *EstimatorSection.model_fields} - set(_NOT_THERE)
    return sorted(known)


def _put(document: Document, keys: Keys, value: Any) -> None:
    place: Any = document.values
    for key in keys[:-1]:
        place = place.setdefault(key, {}) if isinstance(place, dict) else {}
    if isinstance(place, dict):
        place[keys[-1]] = value
        document.overrides[keys] = f"--{str(keys[-1]).replace('_', '-')}"


def _problem(document: Document, error: Any) -> str:
    """Put one of pydantic's errors as this house does: where, what was found, what to do."""
    keys = _keys(error)
    path, where, kind = ".".join(map(str, keys)), document.where(keys), error["type"]
    if kind == "extra_forbidden":
        known = _fields_at(keys[:-1])
        hint = closest(str(keys[-1]), known) or f" Known here: {', '.join(known)}"
        if not closest(str(keys[-1]), known) and keys[:-1] == () and keys[-1] in _estimator_keys():
            hint = f" It belongs into 'estimator': estimator.{keys[-1]}"
        return f"{where}: {path} is not known.{hint}"
    if kind == "missing":
        return f"{where}: {path} is missing{_needed(keys)}"
    if kind == "value_error":
        return f"{where}: {path + ': ' if path else ''}{error['ctx']['error']}"
    return f"{where}: {path}={error['input']!r}: {error['msg'][:1].lower()}{error['msg'][1:]}"


def _keys(error: Any) -> Keys:
    """Return where in the file an error is, without the steps that are pydantic's own: the branches of a union."""
    return tuple(key for key in error["loc"] if not (isinstance(key, str) and ("[" in key or key == "constrained-str")))


def _fields_at(keys: Keys) -> list[str]:
    section: Any = JobConfig
    for key in keys:
        found = section.model_fields[key].annotation
        candidates = [found, *getattr(found, "__args__", ())]
        section = next(item for item in candidates if isinstance(item, type) and issubclass(item, BaseModel))
    return [field.alias or name for name, field in section.model_fields.items()]


def _needed(keys: Keys) -> str:
    needs: dict[Keys, str] = {
        ("store",): ": the folder or URL that driver and executors reach",
        ("input",): ": the rows to train on, such as {format: parquet, path: /data/flights}",
        ("estimator",): ": the model and KerasEstimator's parameters",
        ("estimator", "model"): ": 'module:function' that builds a Keras model, or the path of a .keras file",
    }
    return needs.get(keys, "")
