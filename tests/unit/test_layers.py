"""The layers of the design: each module imports only what is below it, lazy imports included."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# The longest matching prefix decides.
LAYERS = {
    "hvdspark.errors": 0,
    "hvdspark.layout": 0,
    "hvdspark.metrics": 0,
    "hvdspark.plain": 0,
    "hvdspark.plan": 0,
    "hvdspark.versions": 0,
    "hvdspark.lease": 1,
    "hvdspark.shelf": 1,
    "hvdspark.store": 1,
    "hvdspark.aliases": 2,
    "hvdspark.recording": 2,
    "hvdspark.registry": 2,
    "hvdspark.retention": 2,
    "hvdspark.history": 2,
    "hvdspark.runs": 2,
    "hvdspark.warmstart": 2,
    "hvdspark.data": 2,
    "hvdspark.report": 3,
    "hvdspark.launch": 3,
    "hvdspark.worker": 4,
    "hvdspark.run": 5,
    "hvdspark.predict": 5,
    "hvdspark.doctor": 6,
    "hvdspark": 5,  # hvdspark/__init__.py shows the public names of the layers up to 5
    "hvdspark.estimators": 6,
    "hvdspark.estimators.converters": 6,
    "hvdspark.estimators.params": 6,
    "hvdspark.estimators.keywords": 6,
    "hvdspark.estimators.outputs": 6,
    "hvdspark.estimators.sources": 6,
    "hvdspark.estimators.starting": 6,
    "hvdspark.estimators.facts": 6,
    "hvdspark.estimators.fitting": 6,
    "hvdspark.estimators.tracking": 6,
    "hvdspark.estimators.progress": 6,
    "hvdspark.estimators.watching": 6,
    "hvdspark.estimators.base": 6,
    "hvdspark.estimators.persistence": 6,
    "hvdspark.estimators.keras": 7,
    "hvdspark.airflow": 8,
    "hvdspark.estimators.job": 8,
    "hvdspark.cli": 9,
    "hvdspark.__main__": 10,
}

# What a part of the house must not import. The engine knows no framework and no Spark ML; a training process starts
# without a JVM in sight.
FORBIDDEN = {
    "hvdspark": ("tensorflow", "keras", "torch", "pyspark.ml", "horovod"),
    "hvdspark.worker": ("pyspark",),
    "hvdspark.errors": ("pyspark", "pyarrow", "numpy"),
    "hvdspark.plan": ("pyspark", "pyarrow", "numpy"),
    "hvdspark.launch.topology": ("pyspark", "os", "socket"),
    "hvdspark.data.shards": ("pyspark", "pyarrow", "petastorm"),
    "hvdspark.airflow": ("pyspark", "py4j", "cloudpickle", "numpy", "pyarrow"),
}

# These run in the training process, where pyspark has no business.
IN_THE_RANK = (
    "trainer",
    "agreement",
    "allreduce",
    "batches",
    "callbacks",
    "clock",
    "codec",
    "feeding",
    "finite",
    "journal",
    "lean",
    "metrics",
    "optimizer",
    "snapshot",
    "spec",
    "states",
    "steps",
    "tensorboard",
)


def modules() -> Iterator[tuple[str, Path]]:
    for package, folder in (("hvdspark", ROOT / "hvdspark"), ("hvdspark.estimators", ROOT / "estimators")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join([package, *parts])
            yield name.removesuffix(".__init__"), path


MODULES = dict(modules())


def imports_of(name: str) -> set[str]:
    """Every module that a module imports, wherever in it; type checking's imports excepted."""
    tree = ast.parse(MODULES[name].read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import; write it out"
            assert node.module is not None
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in MODULES else node.module)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            address = re.fullmatch(r"([\w.]+):\w+", node.value)  # "package.module:function", imported by address
            found |= {address[1]} & set(MODULES) if address else set()
    return found


def prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(len(parts), 0, -1)]


def layer_of(name: str) -> int:
    return next(LAYERS[prefix] for prefix in prefixes(name) if prefix in LAYERS)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_module_imports_nothing_above_its_layer(name: str) -> None:
    above = {found for found in imports_of(name) & set(MODULES) if layer_of(found) > layer_of(name)}
    assert above == set()


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_module_imports_nothing_that_its_part_must_not_know(name: str) -> None:
    if name.startswith(("hvdspark.estimators", "hvdspark.cli")) or name == "hvdspark.__main__":
        rules = ["pyspark"] if name.split(".")[-1] in IN_THE_RANK else []
    else:
        rules = [rule for prefix in prefixes(name) for rule in FORBIDDEN.get(prefix, ())]
    found = imports_of(name)
    assert {other for other in found for rule in rules if other == rule or other.startswith(f"{rule}.")} == set()


def test_imports_have_no_cycles() -> None:
    graph = {name: (imports_of(name) & set(MODULES)) - {name} for name in MODULES}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in graph[name]:
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_environment_variables_are_written_only_where_processes_are_made() -> None:
    allowed = ("hvdspark.launch", "hvdspark.worker")
    for name, path in MODULES.items():
        if name.startswith(allowed):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            targets = node.targets if isinstance(node, ast.Assign | ast.Delete) else []
            assert not any("environ" in ast.dump(target) for target in targets), name
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                changes = node.func.attr in ("setdefault", "update", "pop", "clear", "putenv", "unsetenv")
                assert not (changes and "environ" in ast.dump(node.func.value)), name


def test_top_level_estimators_cannot_be_imported_under_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    with pytest.raises(ImportError, match=r"import hvdspark\.estimators"):
        __import__("estimators")


def test_importing_the_estimators_loads_no_framework() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from hvdspark.estimators import KerasEstimator; "
        "print([name for name in ('tensorflow', 'keras', 'horovod', 'petastorm') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_importing_hvdspark_takes_what_airflow_has_too() -> None:
    import subprocess
    import sys

    code = (
        "import sys, hvdspark.runs; "
        "print([name for name in ('pyspark', 'py4j', 'numpy', 'pyarrow', 'cloudpickle') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_training_process_starts_without_pyspark() -> None:
    import subprocess
    import sys

    code = (
        "import sys, hvdspark.worker.__main__, hvdspark.worker.session, hvdspark.worker.checkpoint; "
        "import hvdspark.estimators.keras.spec, hvdspark.data.shards; "
        "print([name for name in ('pyspark', 'tensorflow', 'petastorm') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
