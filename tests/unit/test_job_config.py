"""A job's configuration: what is taken, and where a message points for what is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hvdspark.estimators.job.building import Building
from hvdspark.estimators.job.config import JobConfig, load_config
from hvdspark.estimators.job.document import Document
from hvdspark.estimators.job.gate import Gate

from hvdspark import Store
from hvdspark.errors import ParamError
from hvdspark.worker.checkpoint import BestOf

EXAMPLE = Path(__file__).parents[2] / "examples/submit/job.yaml"

JOB = """\
store: /shared/experiments
input:
  path: /data/rows
estimator:
  model: job_parts:network
  loss: mse
  learning_rate: 1e-3
  feature_cols: [x]
  label_cols: [y]
"""


@pytest.fixture
def load(tmp_path: Path) -> Any:
    """Return a function that loads a configuration which is the one above, with lines added or replaced."""

    def load(*replaced: tuple[str, str], added: str = "", sets: tuple[str, ...] = (), **options: Any) -> Any:
        text = JOB
        for old, new in replaced:
            assert old in text
            text = text.replace(old, new)
        (tmp_path / "job.yaml").write_text(text + added)
        return load_config(str(tmp_path / "job.yaml"), sets, **options)

    return load


def test_the_example_is_a_configuration() -> None:
    config, _ = load_config(
        str(EXAMPLE), ["epochs=3"], {("run_id",): "nightly", ("input", "window", "since"): "2013-06-01"}
    )
    assert config.run_id == "nightly"
    assert config.estimator.params["epochs"] == 3
    assert config.input.window is not None
    assert (config.input.window.column, config.input.window.since) == ("day", "2013-06-01")
    assert config.evaluation is not None
    assert (config.evaluation.fraction, config.evaluation.by) == (0.2, ["day"])


def test_all_functions_that_are_named_go_to_the_executors_however_deep(load: Any) -> None:
    losses = "  loss: {a: losses:own, b: mse}\n  metrics: {a: [metrics:own, {class_name: 'more:Own'}]}\n"
    held_out = "evaluation: {fraction: 0.1, metrics: ['held_out:own']}\n"
    config, _ = load(("  loss: mse\n", losses), added=held_out)
    named = {address for address in config.addresses if address and ":" in address}
    assert named == {"job_parts:network", "losses:own", "metrics:own", "more:Own", "held_out:own"}


def test_the_readme_shows_the_example() -> None:
    text = EXAMPLE.read_text()
    assert text[text.index("store:") :] in (EXAMPLE.parents[2] / "README.md").read_text()


def test_numbers_are_numbers_however_they_are_spelled_and_dates_stay_what_they_are(load: Any) -> None:
    window = "  window: {column: day, since: 2026-01-31}\nestimator:"
    config, _ = load(("estimator:", window))
    assert config.estimator.params["learning_rate"] == 0.001
    assert config.input.window.since == "2026-01-31"


@pytest.mark.parametrize(
    ("assignment", "found"),
    [
        ("batch_size=512", lambda config: config.estimator.params["batch_size"] == 512),
        ("estimator.batch_size=512", lambda config: config.estimator.params["batch_size"] == 512),
        ("estimator.model_args.units=8", lambda config: config.estimator.model_args == {"units": 8}),
        ("input.options.header=true", lambda config: config.input.options == {"header": True}),
        ("evaluation={fraction: 0.5}", lambda config: config.evaluation.fraction == 0.5),
        ("loss=", lambda config: config.estimator.loss is None),
    ],
)
def test_set_replaces_values_at_any_depth(load: Any, assignment: str, found: Any) -> None:
    config, _ = load(sets=(assignment,))
    assert found(config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"added": "promote: x\n"}, r"job\.yaml, line 10: promote is not known\. Did you mean 'promote_if'\?"),
        ({"added": "  bach_size: 3\n"}, r"line 10: estimator\.bach_size: .* Did you mean 'batch_size'\?"),
        (
            {"added": "  batch_size: 0\n"},
            r"line 10: estimator\.batch_size: batch_size=0: give an integer of at least 1",
        ),
        ({"added": "batch_size: 5\n"}, r"line 10: batch_size is not known\. It belongs into 'estimator'"),
        ({"replaced": [("  path:", "  pth:")]}, r"line 3: input\.pth is not known\. Did you mean 'path'\?"),
        ({"replaced": [("  path: /data/rows", "  path: 7")]}, r"line 3: input\.path=7: input should be a valid string"),
        ({"replaced": [("store: /shared/experiments\n", "")]}, r"job\.yaml: store is missing: the folder or URL"),
        (
            {"replaced": [("  model: job_parts:network\n", "")]},
            r"line 4: estimator\.model is missing: 'module:function'",
        ),
        ({"added": "  store: /other\n"}, r"line 10: estimator\.store: give it as 'store' at the top"),
        ({"added": "  backend: x\n"}, r"line 10: estimator\.backend: KerasEstimator: backend is not supported"),
        ({"added": "evaluation: {}\n"}, r"line 10: evaluation: give one of 'fraction' .* found none of them"),
        ({"added": "evaluation: {fraction: 2}\n"}, r"line 10: evaluation\.fraction=2: input should be less than 1"),
        ({"added": "evaluation: {since: 3}\n"}, r"'evaluation\.since' goes by the column of 'input\.window'; add it"),
        (
            {"added": "promote_if: val_loss < current\n"},
            r"'promote_if' compares models on held-out rows; add 'evaluation'",
        ),
        (
            {"added": "promote_if: always\noutput: /models/x\n"},
            r"would overwrite the promoted model; put \{run_id\} into",
        ),
        ({"added": "promote_if: __import__('os')\n"}, r"promote_if=\"__import__\('os'\)\": give '<metric> <operator>"),
        ({"added": "alias: my champion\n"}, r"line 10: alias: 'my champion' is no name of an alias: use up to 64"),
        ({"added": "alias: candidate\n"}, r"line 10: alias: every model that is compared becomes 'candidate'; give"),
        ({"added": "run_id: a/b\n"}, r"run_id='a/b': use letters"),
        ({"sets": ("input.pth=/x",)}, r"--set input\.pth: input\.pth is not known\. Did you mean 'path'\?"),
        ({"sets": ("epochs=none",)}, r"--set epochs: estimator\.epochs: epochs='none': give an integer"),
        ({"sets": ("batch_size",)}, r"--set batch_size: give a key and its value"),
        ({"sets": ("store.x=1",)}, r"--set store\.x=1: store is '/shared/experiments' in .*job\.yaml, and has no keys"),
        ({"sets": ("epochs=[",)}, r"--set epochs=\[: '\[' is no YAML value"),
        ({"replaced": [("  path:", "  table: t\n  path:")]}, r"line 2: input: give one of .* found path and table"),
        ({"replaced": [("  path: /data/rows", "  sql: SELECT 1\n  format: csv")]}, r"'format' belongs to 'path'"),
        ({"added": "spark: {a: [1]}\n"}, r"line 10: spark\.a: give one value, not \[1\]"),
        ({"added": "\tx\n"}, r"job\.yaml is no YAML: .* line 10"),
    ],
)
def test_a_message_points_to_what_is_wrong(load: Any, arguments: dict[str, Any], message: str) -> None:
    replaced = arguments.pop("replaced", ())
    with pytest.raises(ParamError, match=message):
        load(*replaced, **arguments)


def test_all_that_is_wrong_is_told_at_once(load: Any) -> None:
    with pytest.raises(ParamError) as caught:
        load(("  path:", "  pth:"), added="promote: x\n")
    assert len(str(caught.value).splitlines()) == 2


def test_a_file_that_is_not_there_is_told_with_its_name() -> None:
    with pytest.raises(ParamError, match=r"cannot read the configuration /nowhere/job\.yaml: No such file"):
        load_config("/nowhere/job.yaml")


def test_a_file_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("- 1\n")
    with pytest.raises(ParamError, match=r"holds \[1\]; give a mapping"):
        load_config(str(tmp_path / "job.yaml"))


@pytest.mark.parametrize(
    ("text", "new", "current", "passed"),
    [
        ("val_loss < current", 1.0, 2.0, True),
        ("val_loss < current", 2.0, 2.0, False),
        ("val_loss<=current", 2.0, 2.0, True),
        ("val_auc > current * 1.5", 2.0, 1.5, False),
        ("val_auc >= current * 1e-1", 2.0, 20.0, True),
        ("val_loss < 3", 2.0, 1.0, True),
        ("val_loss < -3.5", 2.0, 1.0, False),
        ("val_loss < current and val_loss < 0.5", 1.0, 2.0, False),
        ("val_loss < current", float("nan"), 2.0, False),
        ("val_loss < current", 1.0, None, True),
        ("val_loss < current", float("nan"), None, False),
        ("val_auc > current", float("inf"), None, False),
        ("val_auc > 0.5", float("inf"), 0.7, False),
        ("val_loss < current", 1.0, float("nan"), True),
        ("val_auc > current * 1.01", 0.1, float("inf"), True),
        ("val_loss < current and val_loss < 0.5", 1.0, float("nan"), False),
        ("val_loss < 0.5 and val_loss < current", 1.0, None, False),
        ("always", 9.0, 1.0, True),
    ],
)
def test_the_gate_compares_as_it_reads(text: str, new: float, current: float | None, passed: bool) -> None:
    def metrics(value: float) -> dict[str, float]:
        return {"val_loss": value, "val_auc": value}

    verdict = Gate.parse(text).decide(metrics(new), None if current is None else metrics(current))
    assert verdict.passed is passed
    assert ("not " in verdict.reason) is not passed


@pytest.mark.parametrize(
    "text", ["", "val_loss", "val_loss < current + 1", "val_loss < current or 1", "current < x", "a == b"]
)
def test_the_gate_takes_nothing_else(text: str) -> None:
    with pytest.raises(ParamError, match="give '<metric> <operator> current'"):
        Gate.parse(text)


def test_the_gate_refuses_a_metric_that_nobody_computes() -> None:
    gate = Gate.parse("val_los < current")
    with pytest.raises(ParamError, match=r"gives no 'val_los'\. Did you mean 'val_loss'\? It gives: val_loss, val_mae"):
        gate.check(["val_loss", "val_mae"])


PARTS = """
import keras

def network(units=4):
    return keras.Sequential([keras.Input((2,)), keras.layers.Dense(units), keras.layers.Dense(1)])

def loss(y_true, y_pred):
    return keras.losses.mean_squared_error(y_true, y_pred) * 2

def something():
    return 7
"""


@pytest.fixture
def building(load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that makes what a configuration describes, with a module of functions to name."""
    (tmp_path / "job_parts.py").write_text(PARTS)
    monkeypatch.syspath_prepend(str(tmp_path))

    def build(*sets: str) -> Building:
        loaded: tuple[JobConfig, Document] = load(sets=sets)
        return Building(*loaded)

    return build


def test_the_estimator_is_what_the_configuration_says(building: Any, tmp_path: Path) -> None:
    optimizer = "optimizer={class_name: Adam, config: {learning_rate: 0.5}}"
    metric = "metrics=[mae, {class_name: RootMeanSquaredError}]"
    made = building(
        optimizer,
        metric,
        "loss=job_parts:loss",
        "checkpoint_callback=val_mae",
        "epochs=7",
        "estimator.model_args.units=9",
    )
    estimator = made.estimator(Store.create(tmp_path / "store"), "nightly")
    assert estimator.getModel().layers[0].units == 9
    assert float(estimator.getOptimizer().learning_rate) == 0.5
    assert estimator.getLoss()([[1.0]], [[3.0]]).numpy() == 8.0
    assert estimator.getMetrics()[0] == "mae"
    assert estimator.getMetrics()[1].name == "root_mean_squared_error"
    assert estimator.getCheckpointCallback() == BestOf("val_mae")
    assert (estimator.getEpochs(), estimator.getRunId(), estimator.getLearningRate()) == (7, "nightly", 0.001)


def test_whoever_builds_it_again_gets_the_same_weights(building: Any, tmp_path: Path) -> None:
    store = Store.create(tmp_path / "store")
    one, two = (building("random_seed=3").estimator(store, "x").getModel().get_weights() for _ in range(2))
    assert all((mine == theirs).all() for mine, theirs in zip(one, two, strict=True))


def test_the_model_may_be_a_file(building: Any, tmp_path: Path) -> None:
    store = Store.create(tmp_path / "store")
    building().estimator(store, "x").getModel().save(tmp_path / "network.keras")
    estimator = building(f"estimator.model={tmp_path}/network.keras").estimator(store, "x")
    assert estimator.getModel().layers[0].units == 4


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["estimator.model=nowhere:network"], r"there is no module 'nowhere'\. Put its file beside the configuration"),
        (["estimator.model=job_parts:net"], r"job_parts has no function 'net'; it has: network, loss, something"),
        (["estimator.model=job_parts:something"], r"job_parts:something gave a int; it must return a keras\.Model"),
        (["estimator.model_args={unit: 3}"], r"network\(units=4\) cannot be called with \{'unit': 3\}"),
        (["estimator.model=/nowhere/x.keras"], r"cannot read /nowhere/x\.keras"),
        (["loss=msee"], r"--set loss: estimator\.loss: keras\.losses has nothing like 'msee'"),
        (["optimizer={class_name: Adm}"], r"estimator\.optimizer: keras\.optimizers has nothing like"),
        (["optimizer={class_name: Adam, config: {lr: 1}}"], r"estimator\.optimizer: .*lr"),
        (["checkpoint_callback={metric: x}"], r"give the name of a metric, such as val_loss"),
    ],
)
def test_what_cannot_be_made_is_told_before_any_job(
    building: Any, tmp_path: Path, sets: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        building(*sets).estimator(Store.create(tmp_path / "store"), "x")
