"""The user's own functions, which a configuration names as ``module:function``."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hvdspark.errors import ParamError


def find_function(address: str, where: str) -> Callable[..., Any]:
    """Import a function by its address.

    Parameters
    ----------
    address
        ``"package.module:function"``.
    where
        What names it, for errors.

    Raises
    ------
    ParamError
        When there is no such module or function.
    """
    module_name, separator, name = address.partition(":")
    if not separator or not module_name or not name:
        raise ParamError(f"{where}: {address!r} is no address; give 'module:function'", param=where)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as exc:
        if exc.name is None or not module_name.startswith(exc.name):
            raise ParamError(f"{where}: {address}: importing {module_name} failed: {exc}", param=where) from exc
        raise ParamError(
            f"{where}: {address}: there is no module '{exc.name}'. Put its file beside the configuration, send it with"
            " --py-files, or install its package",
            param=where,
        ) from exc
    found = getattr(module, name, None)
    if not callable(found):
        functions = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise ParamError(
            f"{where}: {address}: {module_name} has no function '{name}'; it has: {', '.join(functions) or 'none'}",
            param=where,
        )
    return found  # type: ignore[no-any-return]


def call(function: Callable[..., Any], arguments: Mapping[str, Any], offered: Mapping[str, Any], where: str) -> Any:
    """Call a function with the configuration's arguments, and with those of what is offered that it asks for.

    Raises
    ------
    ParamError
        When the arguments do not fit; what the function itself raises goes through.
    """
    signature = inspect.signature(function)
    wanted = {name: value for name, value in offered.items() if name in signature.parameters}
    try:
        bound = signature.bind(**wanted, **arguments)
    except TypeError as exc:
        raise ParamError(
            f"{where}: {function.__module__}:{function.__name__}{signature} cannot be called with"
            f" {dict(arguments)}: {exc}",
            param=where,
        ) from exc
    return function(*bound.args, **bound.kwargs)


def wants(function: Callable[..., Any], name: str) -> bool:
    """Whether a function has a parameter of that name."""
    return name in inspect.signature(function).parameters


def look_in(folder: Path) -> None:
    """Let modules be imported from a folder, after all other places."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def files_in(folder: Path, *addresses: str | None) -> list[Path]:
    """Return the files of a folder that hold the modules of these addresses, to send them to the executors."""
    names = {address.partition(":")[0].partition(".")[0] for address in addresses if address and ":" in address}
    return sorted(path for name in names if (path := folder / f"{name}.py").is_file())
