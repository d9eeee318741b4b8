"""``hvdspark runs``: what it prints, and what it says where it cannot."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from hvdspark import Store, cli, gc_runs, list_runs
from hvdspark.aliases import list_aliases
from hvdspark.cli.tables import table, value, when
from hvdspark.errors import ParamError
from hvdspark.history import EpochRecord, write_history
from hvdspark.runs import Attempt, RankPlace, RunRecord


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Two runs that finished, one that failed, and one whose record is torn."""
    store = Store.create(tmp_path / "store")
    common: dict[str, Any] = {
        "kind": "keras",
        "hosts": (RankPlace(0, "alpha", 0), RankPlace(1, "beta", 0)),
        "network": "controller gloo (as asked for), TCP over eth0; NCCL_IB_DISABLE=1",
        "versions": {"keras": "3.15.1"},
        "data": {"source": "DataFrame", "rows": 900, "columns": [{"name": "x", "kind": "vector", "shape": [4]}]},
    }
    evaluated = {**common, "held_out": {"val_loss": 0.4}, "promoted": False, "decision": "val_loss 0.4 is not < 0.3"}
    records = [
        RunRecord("monday", "finished", 1000.0, 1075.0, metrics={"loss": 0.5, "accuracy": 0.75}, epoch=2, **common),
        RunRecord("tuesday", "finished", 2000.0, 2009.5, metrics={"loss": 0.25, "accuracy": 0.5}, epoch=3, **evaluated),
        RunRecord("wednesday", "failed", 3000.0, 3001.0, "rank 1 on beta: ValueError: " + "no " * 40, **common),
    ]
    for place, record in enumerate(records):
        values = record.to_json() | {"params": {"num_proc": 2, "batch_size": 32 * (place + 1)}}
        values["attempts"] = [vars(Attempt(record.started, record.ended, record.cause, 2))]
        store.publish_bytes(json.dumps(values).encode(), "runs", record.run_id, "run.json")
    losses = {1: 0.75, 2: 0.5}
    history = [EpochRecord(epoch, 1.0, 2.0, 9, 4.5, None, {"loss": loss}, None, ()) for epoch, loss in losses.items()]
    write_history(store, "monday", history)
    store.publish_bytes(b"{", "runs/torn/run.json")
    return store


def run(store: Store, *arguments: str) -> Result:
    return CliRunner().invoke(cli.main, ["runs", *arguments], env={"HVDSPARK_STORE": store.url})


def as_json(store: Store, *arguments: str) -> Any:
    done = run(store, *arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout, parse_constant=pytest.fail)


def test_the_runs_are_listed_in_a_table(store: Store) -> None:
    done = run(store, "list")
    assert done.exit_code == 0
    head, *lines = done.stdout.splitlines()
    assert head.split() == ["RUN", "STATE", "STARTED", "TOOK", "ROWS", "RANKS", "loss", "accuracy", "CAUSE"]
    assert [line.split()[:2] for line in lines] == [
        ["wednesday", "failed"],
        ["tuesday", "finished"],
        ["monday", "finished"],
        ["torn", "damaged"],
    ]
    assert lines[2].split()[4:] == ["1", "min", "15", "s", "900", "2", "0.5", "0.75"]
    assert lines[0].endswith("…")
    assert max(map(len, lines)) < 180
    assert [
        line.split()[0] for line in run(store, "list", "--state", "finished", "--last", "1").stdout.splitlines()
    ] == [
        "RUN",
        "tuesday",
    ]


def test_every_command_speaks_json(store: Store) -> None:
    assert [record["run_id"] for record in as_json(store, "list")] == ["wednesday", "tuesday", "monday", "torn"]
    shown = as_json(store, "show", "monday")
    assert (shown["run_id"], shown["hosts"][1]["host"], shown["aliases"]) == ("monday", "beta", [])
    assert [epoch["metrics"]["loss"] for epoch in shown["history"]] == [0.75, 0.5]
    compared = as_json(store, "compare", "monday", "tuesday")
    assert compared["params"] == {"batch_size": {"monday": 32, "tuesday": 64}}
    assert compared["metrics"]["loss"] == {"monday": 0.5, "tuesday": 0.25}
    assert as_json(store, "best", "--metric", "accuracy")["run_id"] == "monday"
    judged = {found["run_id"]: found["removed"] for found in as_json(store, "gc", "--keep-last", "1", "--dry-run")}
    assert judged == {"wednesday": False, "tuesday": False, "monday": True, "torn": False}
    assert len(list_runs(store)) == 4


def test_a_run_is_shown_with_all_that_is_known(store: Store) -> None:
    done = run(store, "show", "monday")
    assert done.exit_code == 0
    for line in (
        "run       monday",
        "state     finished",
        "hosts     rank 0: alpha, local rank 0",
        "          rank 1: beta, local rank 0",
        "network   controller gloo (as asked for), TCP over eth0; NCCL_IB_DISABLE=1",
        "metrics of epoch 2",
        "  loss      0.5",
        "  rows      900",
        "  column x  vector [4]",
        "  batch_size  32",
        "  keras  3.15.1",
        "  EPOCH  loss",
        "  2      0.5",
    ):
        assert line in done.stdout.splitlines(), line
    assert "promoted" not in done.stdout
    evaluated = run(store, "show", "tuesday").stdout.splitlines()
    assert "promoted  no: val_loss 0.4 is not < 0.3" in evaluated
    assert "  val_loss  0.4" in evaluated[evaluated.index("metrics of the held-out rows") :]
    failed = run(store, "show", "wednesday").stdout
    assert "state     failed: rank 1 on beta: ValueError: no no" in failed
    assert "2 ranks: rank 1 on beta" in failed


def test_runs_are_compared_in_columns(store: Store) -> None:
    done = run(store, "compare", "monday", "tuesday")
    assert done.exit_code == 0
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines[0] == ["monday", "tuesday"]
    assert ["loss", "0.5", "0.25"] in lines
    assert ["batch_size", "32", "64"] in lines
    assert ["versions:", "the", "same"] in lines


def test_the_best_run_is_its_name_alone_on_stdout(store: Store) -> None:
    done = run(store, "best", "--metric", "loss")
    assert (done.exit_code, done.stdout) == (0, "tuesday\n")
    assert "loss 0.25, of epoch 3" in done.stderr
    done = run(store, "best", "--metric", "held_out.val_loss")
    assert (done.exit_code, done.stdout) == (0, "tuesday\n")
    assert "held_out.val_loss 0.4, of the held-out rows" in done.stderr


def test_gc_says_what_it_did_and_why(store: Store) -> None:
    would = run(store, "gc", "--older-than", "30d", "--keep-last", "1", "--dry-run")
    assert [line.split()[:3] for line in would.stdout.splitlines() if "would go" in line] == [["monday", "would", "go"]]
    done = run(store, "gc", "--older-than", "30d", "--keep-last", "1")
    assert "1 of 4 runs removed" in done.stderr
    assert store.list("runs") == ["torn", "tuesday", "wednesday"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "mondya"], "Did you mean 'monday'?"),
        (["compare", "monday", "tuesdy"], "Did you mean 'tuesday'?"),
        (["compare", "monday"], "give two or more"),
        (["best", "--metric", "acuracy"], "Did you mean 'accuracy'?"),
        (["gc"], "--keep-last N, --older-than AGE, or both"),
        (["gc", "--older-than", "a month"], "'a month' is no time"),
        (["show", "../etc"], "is no name inside the Store"),
    ],
)
def test_what_cannot_be_is_said_with_what_to_do(store: Store, arguments: list[str], message: str) -> None:
    done = run(store, *arguments)
    assert done.exit_code != 0
    assert message in done.stderr
    assert "Traceback" not in done.output


def test_without_a_store_and_with_an_empty_one_it_says_so(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.main, ["runs", "list"], env={"HVDSPARK_STORE": ""})
    assert done.exit_code == 2
    assert "--store" in done.stderr
    done = CliRunner().invoke(cli.main, ["runs", "list", "--store", str(tmp_path)])
    assert (done.exit_code, done.stdout) == (0, "")
    assert "no runs in" in done.stderr


def test_values_are_written_as_people_read_them() -> None:
    assert [value(found) for found in (None, 0.123456789, "text", [1, 2], True)] == [
        "-",
        "0.123457",
        "text",
        "[1, 2]",
        "true",
    ]
    assert when(float("nan")) == "-"
    assert table(["A", "B"], [["longer", ""], ["x", "y"]]) == "A       B\nlonger\nx       y"


@pytest.mark.parametrize(
    "arguments",
    [
        ["runs", "list"],
        ["runs", "list", "--json"],
        ["runs", "gc", "--keep-last", "1"],
        ["runs", "best"],
        ["models", "list"],
        ["models", "promote", "champion", "monday"],
        ["models", "rollback", "champion"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("url", ["{}/stor", "memory://{}/stor"])
def test_a_store_that_is_not_there_is_wrong_and_is_not_made(tmp_path: Path, arguments: list[str], url: str) -> None:
    address = url.format(tmp_path)
    done = CliRunner().invoke(cli.main, arguments, env={"HVDSPARK_STORE": address})
    assert done.exit_code == 78
    assert done.stderr.startswith(
        f"Error: there is no Store at '{Store.create(address).url}': nothing has that address"
    )
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_what_looks_into_a_store_tells_one_that_is_not_there_from_an_empty_one(tmp_path: Path) -> None:
    for look in (list_runs, list_aliases, partial(gc_runs, keep_last=1)):
        with pytest.raises(ParamError, match="there is no Store at") as caught:
            look(Store.create(tmp_path / "stor"))
        assert caught.value.param == "store"
    (tmp_path / "stor").mkdir()
    store = Store.create(tmp_path / "stor")
    assert (list_runs(store), list_aliases(store), gc_runs(store, keep_last=1)) == ([], {}, [])
