"""The columns that a model's outputs become."""

from __future__ import annotations

from collections.abc import Sequence

from hvdspark.estimators.params import ModelParams

from hvdspark.errors import ParamError
from hvdspark.plan import ModelTensor
from hvdspark.predict import OutputColumn, output_columns


def planned_outputs(params: ModelParams, outputs: Sequence[ModelTensor]) -> tuple[OutputColumn, ...]:
    """Decide the columns that a model's outputs become, by the parameters of the model or of its estimator.

    Raises
    ------
    ParamError
        When names, types and outputs do not go together.
    """
    names = params._value("output_cols")
    if names is None:
        names = [f"{label}__output" for label in params._value("label_cols") or ()]
    kinds = params._value("output_types") or [None] * len(names)
    if len(kinds) != len(names):
        raise ParamError(
            f"output_types has {len(kinds)} entries for {len(names)} output columns; give one per column",
            param="output_types",
        )
    return output_columns(names, outputs, kinds)
