"""Aliases: what they refer to after promotions and rollbacks, also when several change one, or one dies at it."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvdspark import Store
from hvdspark.aliases import (
    KEPT,
    AliasEntry,
    list_aliases,
    path_in_store,
    promote,
    read_alias,
    rollback,
    runs_in_use,
    to_json,
)
from hvdspark.errors import AliasConflictError, AliasError, ParamError

RUNS = ("a", "b", "c", "d")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.create(tmp_path / "store")


def entry(run_id: str, **metrics: float) -> AliasEntry:
    return AliasEntry(run_id, f"hdfs://host/models/{run_id}", metrics)


def shown(found: AliasEntry | None) -> tuple[str, list[str], list[str]]:
    """The runs of an entry: its own, the earlier ones and the withdrawn ones."""
    assert found is not None
    return found.run_id, [item.run_id for item in found.previous], [item.run_id for item in found.withdrawn]


@given(st.lists(st.sampled_from([*RUNS, "back"]), min_size=1, max_size=3 * KEPT))
def test_any_promotions_and_rollbacks_are_a_stack_whose_end_is_bounded(acts: list[str]) -> None:
    store = Store.create(f"memory://{uuid.uuid4().hex}")
    stack: list[str] = []
    withdrawn: list[str] = []
    for act in acts:
        if act == "back":
            if len(stack) < 2:
                with pytest.raises(AliasError, match="cannot be rolled back"):
                    rollback(store, "champion")
                continue
            withdrawn.insert(0, stack.pop(0))
            found = rollback(store, "champion", expected=withdrawn[0])
        else:
            found = promote(store, "champion", entry(act, loss=1), expected=stack[0] if stack else "")
            if stack[:1] != [act]:
                stack = [act, *stack][: KEPT + 1]
        assert found == read_alias(store, "champion")
        assert shown(found) == (stack[0], stack[1:], withdrawn[:KEPT])
    assert runs_in_use(store) == dict.fromkeys(stack, ("champion",))
    assert store.list("aliases", "leases") == []


def test_an_entry_says_for_what_and_when_it_was_promoted_and_withdrawn(store: Store) -> None:
    before = time.time()
    promote(store, "champion", entry("a", val_loss=0.5, auc=math.nan))
    promote(store, "champion", replace(entry("b", val_loss=0.4), promoted=1.0, previous=(entry("forged"),)))
    promote(store, "candidate", entry("c"))
    found = rollback(store, "champion")
    (withdrawn,) = found.withdrawn
    assert withdrawn.rolled_back is not None
    assert before <= found.promoted <= withdrawn.promoted <= withdrawn.rolled_back <= time.time()
    assert (found.metrics, withdrawn.metrics) == ({"val_loss": 0.5}, {"val_loss": 0.4})
    assert {name: shown(item) for name, item in list_aliases(store).items()} == {
        "champion": ("a", [], ["b"]),
        "candidate": ("c", [], []),
    }
    assert runs_in_use(store) == {"a": ("champion",), "c": ("candidate",)}
    assert json.loads(store.read_bytes("aliases/champion.json")) == to_json(found)


def test_promoting_again_changes_the_metrics_alone_and_keeps_the_way_back(store: Store) -> None:
    promote(store, "champion", entry("a"))
    first = promote(store, "champion", entry("b", val_loss=0.4), expected="a")
    # Its caller was killed before it knew: the run that it expected is not there any more.
    assert promote(store, "champion", entry("b", val_loss=0.3), expected="a") == replace(
        first, metrics={"val_loss": 0.3}
    )


@pytest.mark.parametrize("expected", ["", "b"])
def test_an_alias_that_was_changed_meanwhile_is_left_alone(store: Store, expected: str) -> None:
    current = promote(store, "champion", entry("a"))
    with pytest.raises(AliasConflictError, match="refers to the run 'a'") as caught:
        promote(store, "champion", entry("c"), expected)
    assert (caught.value.expected, caught.value.found) == (expected, "a")
    with pytest.raises(AliasConflictError, match="refers to the run 'a'"):
        rollback(store, "champion", "b")
    assert read_alias(store, "champion") == current


def test_nothing_goes_back_to_a_model_that_is_no_longer_there(store: Store) -> None:
    store.publish_bytes(b"", "runs/a/model.keras")
    gone = f"file://{store.url_of('runs/b/model.keras')}"  # as Spark may spell it
    for run_id, model in (("a", "runs/a/model.keras"), ("b", gone), ("c", "/elsewhere")):
        promote(store, "champion", AliasEntry(run_id, model))
    with pytest.raises(AliasError, match="to the run 'b': its model"):
        rollback(store, "champion")
    promote(store, "candidate", AliasEntry("a", "runs/a/model.keras"))
    promote(store, "candidate", AliasEntry("b", "/elsewhere"))
    assert shown(rollback(store, "candidate")) == ("a", [], ["b"])


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b'{"run_id": "a"',
        b"[]",
        b'{"run_id": "a"}',
        b'{"run_id": 1, "model": "m"}',
        b'{"run_id": "a", "model": "m", "metrics": {"loss": "low"}}',
        b'{"run_id": "a", "model": "m", "previous": [{"run_id": "b"}]}',
        b"\xff\xfe",
        b'{"run_id": "a", "model": "m", "previous": ' + b"[" * 100_000,
    ],
)
def test_a_damaged_alias_is_named_and_never_written_over(store: Store, damage: bytes) -> None:
    store.publish_bytes(damage, "aliases/champion.json")
    acts = (
        lambda: read_alias(store, "champion"),
        lambda: list_aliases(store),
        lambda: runs_in_use(store),
        lambda: promote(store, "champion", entry("b")),
        lambda: rollback(store, "champion"),
    )
    for act in acts:
        with pytest.raises(AliasError, match=r"'champion' is damaged: .*champion\.json") as caught:
            act()
        assert caught.value.alias == "champion"
    assert store.read_bytes("aliases/champion.json") == damage


@pytest.mark.parametrize(
    ("url", "model", "path"),
    [
        ("/shared/x", "runs/a/model.keras", "runs/a/model.keras"),
        ("/shared/x", "/shared/x/runs/a", "runs/a"),
        ("/shared/x", "file:///shared/x/runs/a/", "runs/a"),
        ("/shared/x", "file:/shared/x/runs/a", "runs/a"),
        ("/shared/x", "/shared/xy/runs/a", None),
        ("/shared/x", "hdfs://host/shared/x/runs/a", None),
        ("memory://x", "memory://x/runs/a", "runs/a"),
        ("memory://x", "/x/runs/a", None),
    ],
)
def test_a_model_in_the_store_is_known_by_all_its_addresses(url: str, model: str, path: str | None) -> None:
    assert path_in_store(Store.create(url), model) == path


def test_what_no_alias_can_be_is_refused(store: Store) -> None:
    for name in ("", "../champion", "a/b", "a.b", "-a", "x" * 65):
        with pytest.raises(ParamError, match="no name of an alias"):
            promote(store, name, entry("a"))
        with pytest.raises(ParamError, match="no name of an alias"):
            rollback(store, name)
    for wrong in (AliasEntry("", "m"), AliasEntry("a", ""), AliasEntry("a", "m", {"loss": "low"})):  # type: ignore[dict-item]
        with pytest.raises(ParamError):
            promote(store, "champion", wrong)
    assert read_alias(store, "champion") is None
    assert not store.exists("aliases")


PROMOTER = """
import sys
from hvdspark import Store
from hvdspark.aliases import AliasEntry, promote, read_alias
from hvdspark.errors import AliasConflictError
store, own = Store.create(sys.argv[1]), sys.argv[2]
print("ready", flush=True)
sys.stdin.readline()
lost = 0
for number in range(3):
    while True:
        current = read_alias(store, "champion")
        try:
            promote(store, "champion", AliasEntry(f"{own}{number}", "/m"), expected=current.run_id if current else "")
            break
        except AliasConflictError:
            lost += 1
promote(store, own, AliasEntry(own, "/m"))
print(lost)
"""


def test_of_processes_that_promote_at_once_none_loses_what_another_wrote(store: Store) -> None:
    names = ("a", "b", "c")
    command = [sys.executable, "-c", PROMOTER, store.url]
    others = [
        subprocess.Popen([*command, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for name in names
    ]
    for other in others:
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
    # Nobody waits for the others: each has its line before any can have ended.
    for other in others:
        assert other.stdin is not None
        other.stdin.write("\n")
        other.stdin.flush()
    for other in others:
        other.communicate()
        assert other.returncode == 0
    run_id, previous, withdrawn = shown(read_alias(store, "champion"))
    assert sorted([run_id, *previous]) == sorted(f"{name}{number}" for name in names for number in range(3))
    assert withdrawn == []
    for name in names:
        # What each promoted, in its own order.
        assert [found for found in [run_id, *previous] if found[0] == name] == [f"{name}{n}" for n in (2, 1, 0)]
    assert set(list_aliases(store)) == {"champion", *names}
    assert store.list("aliases", "leases") == []


KILLED = """
import os, signal, sys
from hvdspark import Store
from hvdspark.aliases import AliasEntry, promote
replace = Store._replace
def killed(self, source, target):
    if target.endswith("champion.json"):
        if sys.argv[2] == "after":
            replace(self, source, target)
        os.kill(os.getpid(), signal.SIGKILL)
    replace(self, source, target)
Store._replace = killed
promote(Store.create(sys.argv[1]), "champion", AliasEntry("b", "/m"))
"""


@pytest.mark.parametrize(("moment", "left"), [("before", ("a", [], [])), ("after", ("b", ["a"], []))])
def test_a_promoter_that_is_killed_leaves_the_old_entry_or_the_new_one(store: Store, moment: str, left: object) -> None:
    promote(store, "champion", AliasEntry("a", "/m"))
    died = subprocess.run([sys.executable, "-c", KILLED, store.url, moment], check=False)
    assert died.returncode == -signal.SIGKILL
    found = read_alias(store, "champion")
    assert shown(found) == left
    assert found is not None
    # The dead one's lease is in nobody's way.
    assert promote(store, "champion", AliasEntry("c", "/m")).previous == (found.alone, *found.previous)
