"""``promote_if``: when a new model takes the place of the one that is in use.

A condition compares a metric with the other model's, or with a number; conditions are joined by ``and``. There is
nothing else, and nothing is evaluated as Python.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hvdspark.errors import ParamError, closest

_CONDITION = re.compile(
    r"(?P<metric>[A-Za-z_]\w*)\s*(?P<sign><=|>=|<|>)\s*"
    r"(?:(?P<current>current)(?:\s*\*\s*(?P<factor>NUMBER))?|(?P<bound>-?NUMBER))".replace(
        "NUMBER", r"\d+(?:\.\d+)?(?:[eE][-+]?\d+)?"
    )
)
_COMPARE: Mapping[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
ALWAYS = "always"


@dataclass(frozen=True)
class Verdict:
    """What the gate decided.

    Parameters
    ----------
    passed
        Whether the new model is to be promoted.
    reason
        The numbers that were compared.
    """

    passed: bool
    reason: str


@dataclass(frozen=True)
class _Condition:
    metric: str
    sign: str
    factor: float
    bound: float | None

    def holds(self, new: Mapping[str, float], current: Mapping[str, float] | None) -> Verdict:
        value = new[self.metric]
        if not math.isfinite(value):
            return Verdict(False, f"{self.metric} is {value:g}, not a finite number")
        if self.bound is not None:
            other = self.bound
        elif current is None:
            return Verdict(True, f"{self.metric} {value:.6g}, and there is no current model")
        elif not math.isfinite(current[self.metric]):
            # Whatever is a number is better; no comparison with NaN would ever hold.
            return Verdict(True, f"{self.metric} {value:.6g}, and the current model's is {current[self.metric]:g}")
        else:
            other = current[self.metric] * self.factor
        passed = _COMPARE[self.sign](value, other)
        return Verdict(passed, f"{self.metric} {value:.6g} is {'' if passed else 'not '}{self.sign} {other:.6g}")


@dataclass(frozen=True)
class Gate:
    """A parsed ``promote_if``.

    Parameters
    ----------
    text
        As the user wrote it.
    conditions
        All must hold; none for ``"always"``.
    """

    text: str
    conditions: tuple[_Condition, ...]

    @property
    def needs_current(self) -> bool:
        """Whether the current model must be measured, where there is one."""
        return any(condition.bound is None for condition in self.conditions)

    @classmethod
    def parse(cls, text: str) -> Gate:
        """Read an expression such as ``"val_loss < current * 0.99 and val_auc > 0.8"``, or ``"always"``.

        Raises
        ------
        ParamError
            When it is anything else.
        """
        if text.strip() == ALWAYS:
            return cls(text, ())
        found = [_CONDITION.fullmatch(part.strip()) for part in re.split(r"\band\b", text)]
        conditions = []
        for match in found:
            if match is None:
                raise ParamError(
                    f"promote_if={text!r}: give '<metric> <operator> current', such as 'val_loss < current', 'val_auc"
                    " >= current * 1.01' or 'val_loss < current and val_loss < 0.3'; or 'always'",
                    param="promote_if",
                )
            bound = match["bound"]
            conditions.append(
                _Condition(
                    match["metric"],
                    match["sign"],
                    float(match["factor"] or 1.0),
                    None if bound is None else float(bound),
                )
            )
        return cls(text, tuple(conditions))

    def check(self, metrics: list[str]) -> None:
        """Refuse a metric that the evaluation does not give; raises :class:`ParamError`."""
        for condition in self.conditions:
            if condition.metric not in metrics:
                raise ParamError(
                    f"promote_if={self.text!r}: the evaluation gives no '{condition.metric}'."
                    f"{closest(condition.metric, metrics)} It gives: {', '.join(metrics)}",
                    param="promote_if",
                )

    def decide(self, new: Mapping[str, float], current: Mapping[str, float] | None) -> Verdict:
        """Compare the metrics of both models.

        Without a current model, or where its metric is not finite, conditions on it hold. No condition holds for a new
        model whose metric is not finite.
        """
        verdicts = [condition.holds(new, current) for condition in self.conditions]
        reason = " and ".join(verdict.reason for verdict in verdicts) or "promoted without a comparison"
        return Verdict(all(verdict.passed for verdict in verdicts), reason)
