"""The programs that users copy: the examples, the README's quick start, and one written for horovod.spark."""

from __future__ import annotations

import html
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PYTHON_FOLDER = str(Path(sys.executable).parent)

# As one finds it in programs for Horovod's own estimator, but for the data.
HOROVOD_SPARK_PROGRAM = """
import numpy as np
import pyspark.sql.types as T
from pyspark.ml.evaluation import MulticlassClassificationEvaluator
from pyspark.ml.feature import OneHotEncoder, VectorAssembler
from pyspark.sql import SparkSession
from pyspark.sql.functions import udf
from sklearn.datasets import load_digits
from tensorflow import keras
from tensorflow.keras.layers import Dense, Input

import horovod.spark.keras as hvd
from horovod.spark.common.store import Store

spark = SparkSession.builder.master("local[2]").getOrCreate()
store = Store.create("experiments")

digits = load_digits()
columns = [f"pixel_{i}" for i in range(64)]
rows = [(*(float(v) for v in image), int(label)) for image, label in zip(digits.data, digits.target)]
df = spark.createDataFrame(rows, [*columns, "label"])
df = VectorAssembler(inputCols=columns, outputCol="features").transform(df)
df = OneHotEncoder(inputCols=["label"], outputCols=["label_vec"], dropLast=False).fit(df).transform(df)
train_df, test_df = df.randomSplit([0.9, 0.1], seed=1)

model = keras.models.Sequential([Input((64,)), Dense(64, activation="relu"), Dense(10, activation="softmax")])

keras_estimator = hvd.KerasEstimator(
    num_proc=2,
    store=store,
    model=model,
    optimizer=keras.optimizers.Adam(0.001),
    loss="categorical_crossentropy",
    metrics=["accuracy"],
    feature_cols=["features"],
    label_cols=["label_vec"],
    validation=0.1,
    batch_size=16,
    epochs=8,
    partitions_per_process=4,
    verbose=1,
)
keras_model = keras_estimator.fit(train_df).setOutputCols(["label_prob"])

history = keras_model.getHistory()
pred_df = keras_model.transform(test_df)
argmax = udf(lambda v: float(np.argmax(v)), returnType=T.DoubleType())
pred_df = pred_df.withColumn("label_pred", argmax(pred_df.label_prob))
evaluator = MulticlassClassificationEvaluator(predictionCol="label_pred", labelCol="label", metricName="accuracy")
print("loss", history["loss"][0], history["loss"][-1], "epochs", len(history["val_loss"]))
print("accuracy", evaluator.evaluate(pred_df))
spark.stop()
"""

# The imports that a program changes: what was, what is.
NEW_IMPORTS = {
    "import horovod.spark.keras as hvd": "import hvdspark.estimators as hvd",
    "from horovod.spark.common.store import Store": "from hvdspark import Store",
}


def run_python(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run Python as from a shell in which the virtual environment is active, with nothing else set."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYSPARK_")}
    environment["PATH"] = os.pathsep.join([PYTHON_FOLDER, environment["PATH"]])
    # Programs this short spend most of their time on compiling Spark: let Java compile less, and collect simply.
    environment.setdefault("JDK_JAVA_OPTIONS", "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC")
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def check_ended_well(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"


def check_report(page: str) -> None:
    """Check that a report tells what only a real fit of two ranks leaves behind."""
    for section in ("curves", "times", "ranks", "epochs", "data", "parameters"):
        assert f'<section id="{section}">' in page
    words = html.unescape(" ".join(re.sub(r"<[^>]*>", " ", page).split()))
    assert "Finished" in words
    assert "epochs 3 of 3" in words
    assert "2 ranks on 1 host" in words or "2 ranks on 2 hosts" in words
    for part in ("write", "launch", "compute", "allreduce", "validation", "publish"):
        assert re.search(rf" {part} .*? [\d.]+ (s|min \d+ s) [<\d]+%", words)
    assert re.search(r"rmse, epochs 1 to 3: train from [\d.]+ to [\d.]+; validation from", page)
    assert re.search(r"rows trained on 1\d,\d{3}", words)
    assert "Not shown" not in words


def number(pattern: str, text: str) -> float:
    """Find the number that a pattern's group holds."""
    found = re.search(pattern, text)
    assert found is not None, f"'{pattern}' is not in:\n{text}"
    return float(found[1].replace(",", ""))


def test_flights_beats_the_mean_and_scores_the_same_after_loading(tmp_path: Path) -> None:
    pipeline = tmp_path / "pipeline"
    done = run_python(
        *[str(ROOT / "examples" / "flights.py"), "--rows", "20000", "--epochs", "3"],
        *["--store", str(tmp_path / "store"), "--output", str(pipeline), "--report", str(tmp_path / "report.html")],
        folder=tmp_path,
    )
    check_ended_well(done)
    text = done.stdout
    assert text.splitlines()[-1] == f"report of the fit: {tmp_path / 'report.html'}"
    check_report((tmp_path / "report.html").read_text("utf-8"))
    rmse = {
        name: number(rf"(?m)^{re.escape(name)} +([\d.]+) +[\d.]+$", text)
        for name in ("mean of the training rows", "Spark's LinearRegression", "Keras, hvdspark")
    }
    assert rmse["Keras, hvdspark"] < 0.6 * rmse["mean of the training rows"]
    assert rmse["Keras, hvdspark"] < 1.2 * rmse["Spark's LinearRegression"]
    dropped = number(r"20,000 flights; ([\d,]+) that never arrived", text)
    trained, held_out = (number(pattern, text) for pattern in (r"([\d,]+) to train on", r"([\d,]+) held out"))
    assert 0 < dropped < 2000
    assert dropped + trained + held_out == 20000
    assert number(rf"it scored {held_out:,.0f} flights; its predictions differ by at most (\S+) minutes", text) < 1e-3
    phases = dict(re.findall(r"(\w+) ([\d.]+)", text.split("phases of the fit, seconds: ")[1].splitlines()[0]))
    assert {"write", "launch", "train", "publish"} <= set(phases)
    assert number(r"training speed: ([\d,]+) rows/s", text) > 0
    assert f"saved pipeline: {pipeline}" in text
    assert (pipeline / "metadata").is_dir()


def test_flights_ends_with_an_error_when_a_baseline_is_better(tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'examples')!r}); import flights\n"
        "scores = {'mean': {'rmse': 40.0}, 'linear': {'rmse': 16.0}, 'keras': {'rmse': 16.5}}\n"
        "print(flights.verdict(scores, 0.0, linear_counts=False), flights.verdict(scores, 0.0, linear_counts=True))\n"
        "scores['keras'] = {'rmse': 39.0}\n"
        "print(flights.verdict(scores, 0.0, linear_counts=False))\n"
    )
    done = run_python("-c", code, folder=tmp_path)
    check_ended_well(done)
    assert done.stdout.split() == ["0", "1", "1"]
    assert "RMSE 16.50 is above 16.00, that of LinearRegression" in done.stderr
    assert "RMSE 39.00 is not clearly below 40.00, that of the mean" in done.stderr


def test_digits_are_read(tmp_path: Path) -> None:
    done = run_python(str(ROOT / "examples" / "digits.py"), folder=tmp_path)
    check_ended_well(done)
    assert number(r"read right: ([\d.]+)%", done.stdout) > 95
    first, last = (number(rf"([\d.]+) in the {which}", done.stdout) for which in ("first epoch", "last"))
    assert last < first / 5


def test_the_code_of_the_readme_runs_when_pasted(tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text()
    quick_start = re.search(r"<!-- quick start -->\n```python\n(.*?)```", readme, re.DOTALL)
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert quick_start is not None
    assert blocks[0] == quick_start[1]
    # The third is a piece of a DAG, whose operator the lane `airflow` runs.
    assert len(blocks) == 3
    compile(blocks[2], "README.md", "exec")
    # After the quick start: did it learn, and does it predict?
    check = """
error, spread = scored.selectExpr("avg(pow(product - product__output, 2))", "var_pop(product)").first()
assert error < spread / 20, (error, spread)
assert trained.getHistory()["val_loss"][-1] < spread / 20
print("it learned")
"""
    program = tmp_path / "program.py"
    program.write_text("\n".join([blocks[0], check, blocks[1]]))
    done = run_python(str(program), folder=tmp_path)
    check_ended_well(done)
    assert "product__output" in done.stdout
    assert "it learned" in done.stdout
    assert "[0.5, 0.5]" in done.stdout


def test_a_program_for_horovod_spark_runs_when_its_imports_are_changed(tmp_path: Path) -> None:
    program = HOROVOD_SPARK_PROGRAM
    for old, new in NEW_IMPORTS.items():
        assert program.count(old) == 1
        program = program.replace(old, new)
    path = tmp_path / "program.py"
    path.write_text(program)
    done = run_python(str(path), folder=tmp_path)
    check_ended_well(done)
    first, last = re.search(r"loss ([\d.]+) ([\d.]+) epochs 8", done.stdout).groups()  # type: ignore[union-attr]
    assert float(last) < float(first) / 2
    assert number(r"accuracy ([\d.]+)", done.stdout) > 0.85
    assert "partitions_per_process has no effect" in done.stderr
