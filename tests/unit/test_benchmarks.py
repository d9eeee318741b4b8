"""The benchmark's own parts: ratios, the table, JSON, the chart, and a case's process."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from benchmarks import cases, chart, dataset, read_images, report
from benchmarks.cases import Case
from benchmarks.comparison import Comparison, Row, interleaved
from benchmarks.memory import DRIVER, PeakMemory
from matplotlib.image import imread

from hvdspark.data.reader import ShardReader
from hvdspark.plan import ColumnSpec, GroupRead

MACHINE = {
    "cpu": "A Processor",
    "cores": 2,
    "memory_gb": 25.3,
    "system": "Linux",
    "python": "3.11.7",
    "versions": {"keras": "3.15.1"},
}
FASTER = Row.of(Comparison("fit: old", "s", [2.0, 2.5, 2.0], [20.0, 20.0, 24.0], target=8.0))
SLOWER = Row.of(Comparison("read: bare", "rows/s", [50.0], [100.0], target=0.9, note="on one thread"))
ROWS = [
    FASTER,
    SLOWER,
    Row.of(Comparison("peak memory: old", "MB", [100.0], [150.0])),
    Row("direct", "skipped", note="not there"),
    Row("train", "failed", note="exit code 1"),
]
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(("unit", "ratio"), [("rows/s", 2.0), ("samples/s", 2.0), ("s", 0.5), ("MB", 0.5), ("%", 0.5)])
def test_a_ratio_says_how_many_times_better_ours_is(unit: str, ratio: float) -> None:
    assert Row.of(Comparison("x", unit, [20.0], [10.0])).ratio == ratio


def test_the_ratio_is_the_median_of_the_repeats_not_of_the_values() -> None:
    row = Row.of(Comparison("x", "rows/s", [10.0, 30.0, 99.0], [10.0, 10.0, 11.0]))

    assert row.ratio == 3.0
    assert row.spread == [1.0, 9.0]
    assert (row.ours, row.theirs, row.repeats) == (30.0, 10.0, 3)


def test_a_slow_spell_of_the_machine_does_not_move_the_ratio() -> None:
    calm = Comparison("x", "rows/s", [20.0] * 3, [10.0] * 3)
    disturbed = Comparison("x", "rows/s", [20.0, 2.0, 20.0], [10.0, 1.0, 10.0])

    assert Row.of(disturbed).ratio == Row.of(calm).ratio


@pytest.mark.parametrize(
    ("ours", "target", "state", "ok"),
    [(9.0, 0.9, "ok", True), (8.9, 0.9, "missed", False), (8.9, None, "info", None)],
)
def test_a_target_is_met_when_the_ratio_reaches_it(ours: float, target: float | None, state: str, ok: Any) -> None:
    row = Row.of(Comparison("x", "rows/s", [ours], [10.0], target))

    assert row.state == state
    assert row.to_json()["ok"] is ok


def test_one_value_stands_beside_all_repeats_of_the_other_side() -> None:
    row = Row.of(Comparison("x", "s", [1.0, 2.0, 3.0], [1.5], target=1.0))

    assert (row.ratio, row.repeats, row.state) == (0.75, 3, "missed")


def test_sides_with_different_numbers_of_repeats_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        Row.of(Comparison("x", "s", [1.0, 2.0, 3.0], [1.0, 2.0]))


def test_contestants_take_turns_and_change_who_is_first() -> None:
    calls: list[str] = []

    def measure(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    values = interleaved(3, lambda: measure("a"), lambda: measure("b"))

    assert calls == ["a", "b", "b", "a", "a", "b"]
    assert values == [[1.0, 4.0, 5.0], [2.0, 3.0, 6.0]]


def test_the_table_has_a_line_per_row_and_tells_met_from_missed() -> None:
    table = report.markdown(ROWS, MACHINE).splitlines()

    assert table[2] == "| fit: old | 2.00 s | 20.0 s | 10.0 (8.00 to 12.0) | ≥ 8.00 | ok |"
    assert table[3] == "| read: bare | 50.0 rows/s | 100 rows/s | 0.50 | ≥ 0.90 | **missed** |"
    assert table[5].endswith("| skipped |")
    assert table[6].endswith("| **failed** |")
    assert {line.count("|") for line in table[:7]} == {7}


def test_the_table_comes_with_its_machine_and_the_rows_notes() -> None:
    text = report.markdown(ROWS, MACHINE)

    assert "A Processor, 2 cores, 25.3 GB" in text
    assert "keras 3.15.1" in text
    assert "- read: bare: on one thread" in text


def test_json_holds_every_row_and_the_machine() -> None:
    found = json.loads(report.to_json(ROWS, MACHINE))

    assert found["machine"] == MACHINE
    assert [row["name"] for row in found["rows"]] == [row.name for row in ROWS]
    assert [row["ok"] for row in found["rows"]] == [True, False, None, None, False]
    assert found["rows"][0] == {
        "name": "fit: old",
        "ratio": 10.0,
        "target": 8.0,
        "ok": True,
        "state": "ok",
        "ours": 2.0,
        "theirs": 20.0,
        "unit": "s",
        "repeats": 3,
        "spread": [8.0, 12.0],
        "note": "",
    }


def test_the_machine_is_this_one() -> None:
    found = report.machine()

    assert found["cores"] == len(os.sched_getaffinity(0))
    assert found["versions"]["horovod"].startswith("0.28.1")
    assert json.loads(json.dumps(found)) == found


def test_the_chart_draws_a_bar_for_every_ratio_in_the_colour_of_its_state(tmp_path: Path) -> None:
    chart.draw(ROWS, MACHINE, tmp_path / "all.png")
    chart.draw([], MACHINE, tmp_path / "none.png")

    assert (tmp_path / "all.png").read_bytes().startswith(PNG)
    for state, (colour, _) in chart.STATES.items():
        # The legend has a little of every colour.
        assert _pixels(tmp_path / "all.png", colour) > 2 * _pixels(tmp_path / "none.png", colour) > 0, state


def test_the_chart_leaves_out_rows_without_a_ratio(tmp_path: Path) -> None:
    chart.draw(ROWS, MACHINE, tmp_path / "all.png")
    chart.draw(ROWS[:3], MACHINE, tmp_path / "some.png")

    assert (tmp_path / "all.png").read_bytes() == (tmp_path / "some.png").read_bytes()


def _pixels(path: Path, colour: str) -> int:
    wanted = np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)]) / 255
    return int((np.abs(imread(path)[:, :, :3] - wanted) < 0.01).all(axis=2).sum())


def test_names_choose_cases_by_their_beginning() -> None:
    readers = ["read-array", "read-scalars", "read-images", "read-encoded-images"]
    assert [case.name for case in cases.chosen(["read", "fit"])] == [*readers, "fit"]
    assert cases.chosen([]) == list(cases.CASES)
    with pytest.raises(ValueError, match="no case 'reed'; the cases are: read-array, "):
        cases.chosen(["reed"])


def test_every_case_has_a_function_that_takes_its_options() -> None:
    for case in cases.CASES:
        source = Path(cases.__file__).with_name(case.module.removeprefix("benchmarks.") + ".py").read_text()
        parameters = "".join(f", {name}: str" for name in case.options)
        assert f"def measure(*, quick: bool{parameters}) -> Iterator[Comparison]:" in source


@pytest.fixture
def run_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Row]]:
    """Return a function that runs a module's text as a case, in a process of its own."""
    monkeypatch.setenv("HVDSPARK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(Path(cases.__file__).parents[1]), str(tmp_path))))

    def run(body: str, timeout_s: float = 60.0) -> list[Row]:
        text = "from benchmarks.comparison import Comparison, SkippedError\n\ndef measure(quick, size):\n"
        (tmp_path / "subject.py").write_text(text + "".join(f"    {line}\n" for line in body.splitlines()))
        return list(cases.run(Case("a-case", "", "subject", {"size": 4}), quick=True, timeout_s=timeout_s))

    return run


def test_a_case_measures_in_a_process_of_its_own(run_case: Callable[..., list[Row]]) -> None:
    rows = run_case("import os\nyield Comparison('x', 's', [size], [os.getppid()], note=str(quick))")

    assert rows == [Row.of(Comparison("x", "s", [4], [os.getpid()], note="True"))]


def test_a_case_that_fails_keeps_its_rows_and_tells_why(
    run_case: Callable[..., list[Row]], capsys: pytest.CaptureFixture[str]
) -> None:
    first, failed = run_case("yield Comparison('x', 's', [1.0], [1.0])\nraise ValueError('no such luck')")

    assert (first.name, first.state) == ("x", "info")
    assert (failed.name, failed.state) == ("a-case", "failed")
    assert failed.note == "failed with exit code 1: ValueError: no such luck"
    assert "no such luck" in capsys.readouterr().err


def test_a_case_that_has_nothing_to_compare_is_skipped_with_the_reason(run_case: Callable[..., list[Row]]) -> None:
    assert run_case("raise SkippedError('not there yet')\nyield") == [Row("a-case", "skipped", note="not there yet")]


def test_a_case_that_hangs_is_ended_with_all_it_started(run_case: Callable[..., list[Row]], tmp_path: Path) -> None:
    # What the case starts holds the pipe open as long as it lives.
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reading = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    body = f"""
import subprocess, time
held = open({str(pipe)!r}, "wb", buffering=0)
subprocess.Popen(["sleep", "1000"], stdout=held)
held.write(b"started")
yield Comparison("x", "s", [1.0], [1.0])
time.sleep(1000)
"""
    rows = run_case(body.strip(), timeout_s=4.0)

    assert [row.state for row in rows] == ["info", "failed"]
    assert "took more than 4 s" in rows[1].note
    os.set_blocking(reading, True)
    with os.fdopen(reading, "rb") as held:
        assert held.read() == b"started"


def test_memory_is_told_by_role_and_keeps_the_peak() -> None:
    child = "import sys; block = bytearray(80_000_000); del block; print('ready', flush=True); sys.stdin.read()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}, 'the-role'])"
    command = [sys.executable, "-S", "-c", parent]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        memory = PeakMemory(process.pid, {"rank": "the-role", "other": "no such thing"})
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        memory.look()
        process.communicate("")

    assert set(memory.peaks_mb) == {DRIVER, "rank"}
    assert memory.peaks_mb["rank"] > 80 > memory.peaks_mb[DRIVER] > 1


@pytest.mark.parametrize("kind", ["array", "images", "scalars"])
def test_the_bare_reader_finds_the_numbers_that_the_shard_reader_finds(
    kind: str, write_dataset: Callable[..., Any]
) -> None:
    batch = pa.RecordBatch.from_pydict(dataset.KINDS[kind].make(100))
    sizes = {"array": dataset.WIDTH, "images": dataset.IMAGE_BYTES, "scalars": 1}
    kinds = {"array": ("array", "float32"), "images": ("binary", "uint8"), "scalars": ("scalar", "float32")}
    columns = [ColumnSpec(name, *kinds[kind], size=sizes[kind]) for name in dataset.KINDS[kind].features]
    written = write_dataset(columns, [[batch]])
    groups = written.manifest.splits["train"]
    reads = [GroupRead(group, ((0, group.rows),)) for group in groups]

    with ShardReader(written.store, written.dataset, written.manifest.columns, reads) as reader:
        (blocks,) = list(reader)
    table = pq.read_table(written.store.path(written.dataset, groups[0].path))

    for spec in columns:
        bare = dataset.to_numpy(table.column(spec.name))
        assert bare.dtype == blocks[spec.name].dtype
        assert bare.tobytes() == blocks[spec.name].tobytes()


def test_both_readers_of_encoded_images_find_all_of_them(write_dataset: Callable[..., Any]) -> None:
    batch = pa.RecordBatch.from_pydict(dataset.KINDS["encoded-images"].make(5))
    columns = [ColumnSpec("x", "binary", "uint8", None), ColumnSpec(dataset.LABEL, "scalar", "float32")]
    written = write_dataset(columns, [[batch]])
    (group,) = written.manifest.splits["train"]
    reads = [GroupRead(group, ((0, group.rows),))]
    found = dataset.Dataset(written.store, written.dataset, written.manifest.columns, reads)

    read_images.read_bare(found.files, 5)
    read_images.read_pass(read_images.source(found, "none"), 0, 5)
    with pytest.raises(ValueError, match="5 of 6 images came"):
        read_images.read_pass(read_images.source(found, "none"), 0, 6)


def test_rows_survive_the_way_out_of_a_cases_process() -> None:
    again = Row(**json.loads(json.dumps(dataclasses.asdict(FASTER))))

    assert again.to_json() == FASTER.to_json()
