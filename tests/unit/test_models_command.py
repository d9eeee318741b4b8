"""``hvdspark models``: what is in use, what is promoted, and the way back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from hvdspark import Store, cli
from hvdspark.recording import recorded


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.create(tmp_path / "store")


def invoke(store: Store, *arguments: str) -> Result:
    return CliRunner().invoke(cli.main, ["models", *arguments], env={"HVDSPARK_STORE": store.url})


def told(store: Store, *arguments: str) -> Any:
    result = invoke(store, *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def finish(store: Store, run_id: str) -> None:
    """Leave what a finished run does."""
    store.publish_bytes(b"model", f"runs/{run_id}/model.keras")
    with recorded(store, run_id):
        pass


def test_a_run_is_promoted_listed_and_rolled_back(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for run_id in ("monday", "tuesday"):
        finish(store, run_id)
    first = told(store, "promote", "champion", "monday", "--expected", "")
    assert (first["alias"], first["run_id"], first["model"]) == ("champion", "monday", "runs/monday/model.keras")
    saved = "hdfs://host/models/tuesday"
    second = told(store, "promote", "champion", "tuesday", "--model", saved, "--expected", "monday")
    assert [item["run_id"] for item in second["previous"]] == ["monday"]
    assert told(store, "list") == [second]
    back = told(store, "rollback", "champion", "--expected", "tuesday")
    assert (back["run_id"], [item["run_id"] for item in back["withdrawn"]]) == ("monday", ["tuesday"])
    assert told(store, "show", "champion") == back

    lines = invoke(store, "list").stdout.splitlines()
    assert [line.split()[:2] for line in lines] == [["alias", "run"], ["champion", "monday"]]
    lines = invoke(store, "show", "champion").stdout.splitlines()
    assert lines[0].split()[0] == "champion"
    assert lines[1].startswith("in use ")
    assert lines[1].endswith("runs/monday/model.keras")
    assert lines[2].startswith("rolled back ")
    assert lines[2].endswith(saved)


def test_of_a_job_its_pipeline_is_promoted_with_the_metrics_of_its_evaluation(store: Store) -> None:
    finish(store, "monday")
    notes: dict[str, Any] = {"model": None, "metrics": None}
    store.publish_bytes(json.dumps(notes).encode(), "runs/monday/job.json")
    result = invoke(store, "promote", "champion", "monday")
    assert (result.exit_code, "its job has not saved the pipeline yet" in result.stderr) == (78, True)
    notes = {"model": store.url_of("runs/monday/pipeline"), "metrics": {"val_loss": 0.5}}
    store.publish_bytes(json.dumps(notes).encode(), "runs/monday/job.json")
    result = invoke(store, "promote", "champion", "monday")
    assert (result.exit_code, "has no model in" in result.stderr) == (78, True)
    store.make_folder("runs/monday/pipeline")
    entry = told(store, "promote", "champion", "monday")
    assert (entry["model"], entry["metrics"]) == (notes["model"], notes["metrics"])


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["promote", "champion", "mondy"], 78, "there is no run 'mondy' in"),
        (["promote", "champion", "mondy"], 78, "Did you mean 'monday'?"),
        (["promote", "champion", "broken"], 78, "the run 'broken' is failed (ValueError: no); only a finished run"),
        (["promote", "champion", "emptied"], 78, "the run 'emptied' has no model in"),
        (["promote", "champion", "tuesday", "--expected", "x"], 75, "refers to the run 'monday', not to the run 'x'"),
        (["promote", "../x", "monday"], 78, "'../x' is no name of an alias"),
        (["show", "champ"], 70, "there is no alias 'champ' in"),
        (["show", "champio"], 70, "Did you mean 'champion'?"),
        (["rollback", "champion"], 70, "cannot be rolled back: 'monday' is its first entry"),
        (["rollback", "nobody"], 70, "cannot be rolled back: there is no such alias"),
    ],
)
def test_what_cannot_be_is_said_and_changes_nothing(
    store: Store, arguments: list[str], code: int, message: str
) -> None:
    for run_id in ("monday", "tuesday", "emptied"):
        finish(store, run_id)
    store.delete("runs/emptied/model.keras")
    with pytest.raises(ValueError, match="no"), recorded(store, "broken"):
        raise ValueError("no")
    before = told(store, "promote", "champion", "monday")
    result = invoke(store, *arguments, "--json")
    assert result.exit_code == code
    assert message in result.stderr
    assert result.stdout == ""
    assert told(store, "list") == [before]


def test_without_aliases_the_list_says_how_to_make_one(store: Store) -> None:
    store.make_folder("runs")
    result = invoke(store, "list")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "hvdspark models promote champion RUN" in result.stderr
    assert told(store, "list") == []
    result = CliRunner().invoke(cli.main, ["models", "list"])
    assert result.exit_code == 2
    assert "--store" in result.output
