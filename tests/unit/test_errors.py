"""The exception tree: what users catch, read and what travels between processes."""

from __future__ import annotations

import pickle

import pytest

from hvdspark import errors

FIELDS = {
    errors.ParamError: {"param": "epochs"},
    errors.SchemaError: {"column": "a", "expected": "a number", "found": "string"},
    errors.NullValueError: {"column": "a", "count": 3},
    errors.RaggedArrayError: {"column": "a", "lengths": (2, 3)},
    errors.ImageError: {"column": "a", "expected": "28x28x1", "found": "28x28x3"},
    errors.ValueRangeError: {"column": "a", "dtype": "float32"},
    errors.StoreError: {"url": "/x"},
    errors.RunInProgressError: {"run_id": "run-1"},
    errors.AliasError: {"alias": "champion"},
    errors.AliasConflictError: {"expected": "run-1", "found": "run-2"},
    errors.NotEnoughSlotsError: {"needed": 4, "available": 2},
    errors.WorkerFailedError: {
        "failures": {1: "ValueError: x"},
        "root_cause": 1,
        "log_tail": "x",
        "is_passing": False,
        "noticed": 1.0,
    },
    errors.NonFiniteLossError: {"epoch": 1, "step": 6, "ranks": (1,)},
    errors.RankMismatchError: {"ranks": (1,)},
    errors.LaunchError: {"is_passing": True},
    errors.StageLostError: {"is_passing": True, "is_cancelled": False},
}


def all_errors(cls: type = errors.HvdSparkError) -> list[type[errors.HvdSparkError]]:
    return [cls, *(found for child in cls.__subclasses__() for found in all_errors(child))]


@pytest.mark.parametrize("cls", all_errors(), ids=lambda cls: cls.__name__)
def test_every_error_survives_pickling_with_its_fields(cls: type[errors.HvdSparkError]) -> None:
    fields = FIELDS.get(cls, {})
    copy = pickle.loads(pickle.dumps(cls("what happened", **fields)))
    assert type(copy) is cls
    assert str(copy) == "what happened"
    assert {name: getattr(copy, name) for name in fields} == fields


@pytest.mark.parametrize("cls", all_errors(), ids=lambda cls: cls.__name__)
def test_declared_fields_are_the_tested_ones(cls: type[errors.HvdSparkError]) -> None:
    assert set(cls.__annotations__ if "__annotations__" in vars(cls) else ()) == set(FIELDS.get(cls, {}))


def test_configuration_errors_are_value_errors() -> None:
    assert issubclass(errors.ParamError, ValueError)
    assert issubclass(errors.SchemaError, ValueError)


def test_closest_names_the_best_match_and_stays_silent_without_one() -> None:
    assert errors.closest("feture", ["feature", "label"]) == " Did you mean 'feature'?"
    assert errors.closest("zzz", ["feature", "label"]) == ""
