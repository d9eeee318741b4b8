"""A configuration file with the line of each of its values, so that an error can point there."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hvdspark.errors import ParamError

Keys = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """YAML as people write it: ``1e-3`` is a number, which YAML 1.1 takes for a text, and dates stay texts."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


@dataclass
class Document:
    """The values of a configuration file.

    Parameters
    ----------
    origin
        The file, as the user named it.
    values
        What is in it.
    lines
        The line of each key, counted from 1.
    overrides
        What the command line replaced, and how it is called there.
    """

    origin: str
    values: dict[str, Any]
    lines: dict[Keys, int] = field(default_factory=dict)
    overrides: dict[Keys, str] = field(default_factory=dict)

    def where(self, keys: Keys) -> str:
        """Say where a value is: the file and line, or the option that set it."""
        for length in range(len(keys), 0, -1):
            if keys[:length] in self.overrides:
                return self.overrides[keys[:length]]
            if keys[:length] in self.lines:
                return f"{self.origin}, line {self.lines[keys[:length]]}"
        return self.origin

    def set(self, assignment: str, nested_in: Mapping[str, str]) -> None:
        """Replace a value, as in ``input.path=/data``.

        Parameters
        ----------
        assignment
            Keys with dots between them, ``=``, and a YAML value.
        nested_in
            For a first key that is none of the file's own, in which section it is.

        Raises
        ------
        ParamError
            When it is no assignment, or leads through something that has no keys.
        """
        path, separator, text = assignment.partition("=")
        names = path.strip().split(".")
        if not separator or not all(names):
            raise ParamError(
                f"--set {assignment}: give a key and its value, such as --set batch_size=512 or --set"
                " input.path=/data/today",
                param="set",
            )
        if names[0] in nested_in:
            names.insert(0, nested_in[names[0]])
        try:
            value = yaml.load(text, _Loader)
        except yaml.YAMLError as exc:
            raise ParamError(f"--set {assignment}: {text!r} is no YAML value: {_flat(exc)}", param="set") from exc
        place: Any = self.values
        for depth, name in enumerate(names[:-1]):
            place = place.setdefault(name, {})
            if not isinstance(place, dict):
                raise ParamError(
                    f"--set {assignment}: {'.'.join(names[: depth + 1])} is {place!r} in {self.origin}, and has no"
                    " keys",
                    param="set",
                )
        place[names[-1]] = value
        # Without the value, which may be a secret.
        self.overrides[tuple(names)] = f"--set {path.strip()}"


def read_document(path: str, assignments: Iterable[str] = (), nested_in: Mapping[str, str] | None = None) -> Document:
    """Read a configuration file and apply the assignments of ``--set``.

    Raises
    ------
    ParamError
        When there is no such file, or it is no YAML mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        reason = getattr(exc, "strerror", None) or str(exc)
        raise ParamError(
            f"cannot read the configuration {path}: {reason}. Give the path of a YAML file; with spark-submit in"
            " cluster mode, send it with --files and give its name alone",
            param="config",
        ) from exc
    try:
        node = yaml.compose(text, _Loader)
        values = yaml.load(text, _Loader)
    except yaml.YAMLError as exc:
        raise ParamError(f"{path} is no YAML: {_flat(exc)}", param="config") from exc
    if not isinstance(values, dict):
        raise ParamError(
            f"{path} holds {values!r}; give a mapping with 'store', 'input' and 'estimator'", param="config"
        )
    document = Document(path, values)
    _find_lines(node, (), document.lines)
    for assignment in assignments:
        document.set(assignment, nested_in or {})
    return document


def _find_lines(node: yaml.Node | None, keys: Keys, lines: dict[Keys, int]) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            place = (*keys, key.value)
            lines[place] = key.start_mark.line + 1
            _find_lines(value, place, lines)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[*keys, index] = item.start_mark.line + 1
            _find_lines(item, (*keys, index), lines)


def _flat(exc: Exception) -> str:
    return " ".join(str(exc).split())
