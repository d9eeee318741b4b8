"""What a report says, and that it says it safely: in one file that loads nothing and runs nothing."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from report_runs import PARAMS, PHASES, STARTED, VERSIONS, epoch, put_run

from hvdspark import Store, cli
from hvdspark.errors import ConfigError, ParamError, StoreError
from hvdspark.history import EpochRecord, Progress
from hvdspark.report import render_report, words, write_report
from hvdspark.report.findings import findings
from hvdspark.report.times import breakdown, by_rank, spreads
from hvdspark.runs import RunRecord, in_progress

HOSTILE = "\"'><script>alert(1)</script><img src=x onerror=alert(2)>{{ 1234 * 5678 }}$\\frac{</style></svg>\ud800\x00"
VOID = {"meta", "link", "br", "img", "input"}


class Parsed(HTMLParser):
    """A page's elements with their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.unclosed: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.unclosed.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.unclosed.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.unclosed and self.unclosed[-1] not in ("style", "script"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def tags(self) -> set[str]:
        return {tag for tag, _ in self.elements}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.create(tmp_path / "store")


def page_of(store: Store, run_id: str = "run") -> Parsed:
    return Parsed(render_report(store, run_id))


def epochs_of(count: int, **options: Any) -> list[EpochRecord]:
    return [epoch(number, **options) for number in range(1, count + 1)]


def record(**fields: Any) -> RunRecord:
    return RunRecord("run", "finished", STARTED, STARTED + 44.6, **fields)


def test_a_page_tells_the_whole_run(store: Store) -> None:
    put_run(store, "run", epochs_of(8, turn=5), epoch=6)
    page = page_of(store)
    for section in ("How it learned", "Where the time went", "Ranks side by side", "Data", "Parameters", "Versions"):
        assert section in page.text
    assert "Finished" in page.text
    assert "validation loss 4.927 epoch 6, the model kept" in page.text
    assert "epochs 8 of 8" in page.text
    assert "2 ranks on 1 host" in page.text
    assert "train 4.280 validation 5.130" in page.text
    assert "data wait 1.2 s 3%" not in page.text  # its meaning stands between name and numbers
    assert "data wait steps wait for rows 1.2 s 3%" in page.text
    assert re.search(r"rank 0 worker-1\.example slowest", page.text)
    assert "rows trained on 235,716" in page.text
    assert "scaled: float32 11 carrier_index: float32 origin_index" in page.text
    assert "optimizer Adam(learning_rate=0.001, beta_1=0.9)" in page.text
    assert all(f"{name} {version}" in page.text for name, version in VERSIONS.items())
    assert all(name in page.text for name in PARAMS)
    assert next(attributes["aria-label"] for tag, attributes in page.elements if tag == "svg") == (
        "loss, epochs 1 to 8: train from 7.950 to 4.280; validation from 7.948 to 5.130"
    )


def test_what_a_job_came_to_after_the_training_is_on_the_page(store: Store) -> None:
    put_run(store, "run", epochs_of(3))
    assert "Evaluation" not in page_of(store).text
    phases = {"stages": 1.5, "train": 9.0, "save": 2.5, "evaluate": 3.5, "promote": 0.25}
    decision = "val_loss 4.25 is not < 4.125"
    put_run(store, "run", epochs_of(3), held_out={"val_loss": 4.25}, promoted=False, decision=decision, phases=phases)
    text = page_of(store).text
    assert f"The model was not promoted: {decision}." in text
    assert "Rows held out of the training val_loss 4.25" in text
    assert "it compares the model with the one in use" in text


def test_a_page_loads_nothing_and_forbids_it(store: Store) -> None:
    put_run(store, "run", epochs_of(3))
    page = page_of(store)
    assert not page.unclosed
    assert not page.tags() & {"script", "iframe", "object", "embed", "img", "base", "form", "foreignobject", "image"}
    addresses = [
        value
        for _, attributes in page.elements
        for name, value in attributes.items()
        if name.split(":")[-1] in ("href", "src", "srcset", "action", "data", "poster", "background")
    ]
    assert set(addresses) - {"data:,"} == {value for value in addresses if value and value.startswith("#")}
    raw = render_report(store, "run")
    assert not re.search(r"url\((?!#)|@import|https?://", raw)
    policy = next(attributes["content"] for _, attributes in page.elements if attributes.get("http-equiv") is not None)
    assert policy is not None
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'")
    assert "script-src" not in policy


def test_ids_are_unique_and_those_referred_to_exist(store: Store) -> None:
    put_run(store, "run", epochs_of(8))
    page = page_of(store)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    wanted = set(re.findall(r'(?:href="#|url\(#)([^")]+)', render_report(store, "run")))
    assert wanted
    assert wanted <= set(ids)


def test_whatever_a_run_holds_is_shown_as_text(store: Store, tmp_path: Path) -> None:
    strange = epoch(2, metrics={HOSTILE: 1.5})
    strange = replace(strange, ranks=tuple(replace(times, host=HOSTILE) for times in strange.ranks))
    put_run(
        store,
        "run",
        [epoch(1), strange],
        state="failed",
        kind=HOSTILE,
        cause=HOSTILE,
        params={HOSTILE: HOSTILE, "nested": {"a": [HOSTILE]}, "optimizer": {"class": HOSTILE}},
        versions={HOSTILE: HOSTILE},
        data={"source": HOSTILE, HOSTILE: {"x": HOSTILE}, "columns": [{"name": HOSTILE, "dtype": HOSTILE}, HOSTILE]},
        artefacts={HOSTILE: HOSTILE},
        phases={HOSTILE: 1.0},
        attempts=[{"started": STARTED, "ended": None, "cause": HOSTILE, "ranks": 2}],
    )
    put_run(store, "plain", [epoch(1), epoch(2, metrics={"other": 1.5})], state="failed", cause="x")
    path = write_report(store, "run", tmp_path / "page.html")
    page = Parsed(path.read_text("utf-8").replace("\x00", ""))
    assert not page.unclosed
    assert page.tags() <= page_of(store, "plain").tags() | {"ol", "li", "ul"}
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    visible = " ".join(HOSTILE.replace("\x00", "").replace("\ud800", "?").split())
    assert page.text.count(visible) >= 12
    assert "7006652" not in page.text


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"state": "failed", "cause": "rank 1 on h: ValueError: no"}, ["Failed", "Why it failed", "ValueError: no"]),
        ({"state": "interrupted", "cause": "its driver is gone"}, ["Interrupted", "Why it ended", "driver is gone"]),
        ({"state": "running", "ended": None}, ["Interrupted", "its driver is gone"]),
        ({"state": "damaged", "cause": "makes no sense"}, ["Record damaged", "What is wrong makes no sense"]),
    ],
)
def test_a_run_that_did_not_finish_has_a_page_with_what_is_there(
    store: Store, fields: dict[str, Any], expected: list[str]
) -> None:
    progress = Progress(3, 8, 37, 120, 5e4, 1.2, {}, STARTED + 30)
    nothing = {"artefacts": {}, "phases": {"check": 0.4}, "attempts": []}
    put_run(store, "run", epochs_of(2), progress, **(nothing | fields))
    page = page_of(store)
    assert all(text in page.text for text in expected)
    assert "epoch 3 of 8, step 37 of 120" in page.text
    assert "epochs 2 of 8" in page.text
    assert page.tags() >= {"svg"}


def test_the_page_of_a_run_in_progress_says_where_it_is(store: Store) -> None:
    put_run(store, "run", None, Progress(1, 8, 60, 120, 5e4, 1.2, {}, STARTED + 30), state="running", ended=None)
    with in_progress(store, "run"):
        page = page_of(store)
    assert "Running" in page.text
    assert "Where it is epoch 1 of 8, step 60 of 120" in page.text
    assert ("i", {"style": "width: 6.25%"}) in page.elements


def test_attempts_before_the_last_are_told_with_what_ended_them(store: Store) -> None:
    lost = {"started": STARTED, "ended": STARTED + 20, "cause": "rank 0 on h: killed by SIGKILL", "ranks": 4}
    put_run(store, "run", epochs_of(2), attempts=[lost, {"started": STARTED + 22, "ended": STARTED + 40, "ranks": 3}])
    text = page_of(store).text
    assert "1 rank 0 on h: killed by SIGKILL Began 2026-11-18 11:06:40 UTC, 4 ranks, ended after 20.0 s" in text
    assert "2 It went through. Began 2026-11-18 11:07:02 UTC, 3 ranks, ended after 18.0 s" in text
    put_run(store, "usual", epochs_of(2))
    assert "Attempts" not in page_of(store, "usual").text


def test_a_run_of_before_there_were_histories_has_a_page(store: Store) -> None:
    store.publish_bytes(
        json.dumps(
            {"run_id": "run", "state": "finished", "started": STARTED, "ended": STARTED + 9, "cause": None}
        ).encode(),
        *("runs", "run", "run.json"),
    )
    page = page_of(store)
    assert "Finished" in page.text
    assert "took 9.0 s" in page.text
    assert "svg" not in page.tags()
    put_run(store, "phases", phases=PHASES)
    assert "train all epochs; this run has no history that divides them 31.5 s 70%" in page_of(store, "phases").text


def test_one_epoch_no_validation_and_one_rank_have_charts_of_what_there_is(store: Store) -> None:
    put_run(store, "run", [epoch(1, 1, val=False)])
    page = page_of(store)
    assert "loss train 7.950" in page.text
    assert "validation 7" not in page.text
    assert "fastest and slowest" not in page.text
    assert "The ring" not in page.text


def test_a_long_run_of_many_ranks_stays_small(store: Store) -> None:
    put_run(store, "run", epochs_of(200, ranks=16, lagging=11))
    raw = render_report(store, "run")
    page = Parsed(raw)
    assert len(raw) < 600_000
    assert "16 ranks on 4 hosts" in page.text
    assert "Rank 11 on worker-3.example took" in page.text
    assert "slowest in 200 of 200 epochs" in page.text
    assert "All 200 epochs" in page.text


def test_losses_of_very_different_sizes_have_a_logarithmic_axis(store: Store) -> None:
    put_run(store, "run", [epoch(number, val=False, metrics={"loss": 10.0**-number}) for number in range(5)])
    assert "logarithmic" in page_of(store).text
    put_run(store, "usual", epochs_of(5))
    assert "logarithmic" not in page_of(store, "usual").text


def test_a_history_that_is_damaged_is_named_and_the_rest_is_shown(store: Store) -> None:
    put_run(store, "run")
    store.publish_bytes(b'{"epochs": [{"epoch": 1}]}', "runs", "run", "history.json")
    page = page_of(store)
    assert "Not shown" in page.text
    assert "history.json is damaged" in page.text
    assert "rows trained on" in page.text


def test_the_same_run_makes_the_same_page(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: STARTED + 100)
    put_run(store, "run", epochs_of(4))
    assert render_report(store, "run") == render_report(store, "run")


def test_the_parts_of_the_time_add_up() -> None:
    epochs = epochs_of(8)
    parts = {part.name: part.seconds for part in breakdown(record(phases=PHASES), epochs)}
    assert list(parts) == [
        *("check", "write", "launch", "import", "prepare", "compute", "allreduce", "data wait", "validation", "publish")
    ]
    in_steps = sum(parts[name] for name in ("compute", "allreduce", "data wait"))
    assert in_steps == pytest.approx(sum(one.seconds for one in epochs))
    assert parts["validation"] == pytest.approx(8 * 0.31)
    longer = {part.name: part.seconds for part in breakdown(record(phases=PHASES | {"train": 40.0}), epochs)}
    assert sum(longer.values()) == pytest.approx(sum(PHASES.values()) - PHASES["train"] + 40.0)
    assert longer["other training"] > 0
    assert sum(part.seconds for part in breakdown(record(), epochs)) == pytest.approx(in_steps + 8 * 0.31)


def test_the_slowest_rank_is_the_one_with_the_most_work_of_its_own() -> None:
    epochs = epochs_of(5, ranks=4, lagging=2)
    assert {one.slowest.rank for one in spreads(epochs)} == {2}
    assert all(one.most_s > one.least_s for one in spreads(epochs))
    ranks = by_rank(epochs)
    assert [rank.slowest_in for rank in ranks] == [0, 0, 5, 0]
    assert ranks[2].allreduce_s == min(rank.allreduce_s for rank in ranks)


BEST = {"checkpoint_callback": {"monitor": "val_loss", "mode": "auto"}}


@pytest.mark.parametrize(
    ("epochs", "fields", "said", "unsaid"),
    [
        (epochs_of(9, turn=5), {}, "lowest in epoch 5 and has risen by 7% since. Keep the best", "more epochs"),
        (epochs_of(9, turn=5), {"params": BEST}, "The model of the best epoch was kept", "Keep the best"),
        (epochs_of(3), {}, "still fell by 13% in the last epoch. More epochs may help", "risen"),
        (epochs_of(3, val=False), {}, "", "Validation"),
        ([epoch(1), epoch(2, metrics={"loss": float("nan")})], {}, "not finite in epoch 2. Lower the learning", ""),
        (epochs_of(3, wait=0.3), {}, "waited for rows 30% of their time: reading is the bottleneck", "keeps up"),
        (epochs_of(3, wait=0.01), {}, "waited for rows 1% of their time: reading keeps up", "bottleneck"),
        (epochs_of(3, ranks=4, lagging=1), {}, "Rank 1 on worker-1.example took", "equally fast"),
        (epochs_of(3, ranks=4), {}, "The 4 ranks are about equally fast", "Rank"),
        (epochs_of(3, ranks=1), {}, "", "ranks"),
        (epochs_of(2), {"phases": {"write": 30.0, "train": 9.0}}, "before the first step, most of it into write", ""),
        ([], {"phases": PHASES}, "", "time"),
    ],
)
def test_what_stands_out_is_said_with_what_to_do(
    epochs: list[EpochRecord], fields: dict[str, Any], said: str, unsaid: str
) -> None:
    about = record(**fields)
    found = findings(about, epochs, breakdown(about, epochs), by_rank(epochs))
    text = " ".join(f"{finding.what} {finding.advice}" for finding in found)
    assert said in text
    assert not unsaid or unsaid not in text


def test_averaging_that_takes_most_of_the_time_stands_out() -> None:
    epochs = [
        replace(
            one,
            ranks=tuple(
                replace(times, compute_s=0.3 * times.seconds, data_wait_s=0.0, allreduce_s=0.7 * times.seconds)
                for times in one.ranks
            ),
        )
        for one in epochs_of(3)
    ]
    found = findings(record(), epochs, [], by_rank(epochs))
    assert "Averaging gradients took 70% of the steps' time." in [finding.what for finding in found]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (words.number(0.24113), "0.2411"),
        (words.number(16230.4), "16,230"),
        (words.number(3.0), "3"),
        (words.number(0.0), "0"),
        (words.number(1.234e-7), "1.23e-07"),
        (words.number(-0.5), "\N{MINUS SIGN}0.5000"),
        (words.number(float("nan")), "NaN"),
        (words.number(float("-inf")), "\N{MINUS SIGN}∞"),
        (words.tick(45000), "45k"),
        (words.tick(0.30000000000000004), "0.3"),
        (words.duration(0.417), "0.42 s"),
        (words.duration(12.34), "12.3 s"),
        (words.duration(59.97), "1 min 00 s"),
        (words.duration(245), "4 min 05 s"),
        (words.duration(3600 * 30), "1 d 6 h"),
        (words.duration(4320), "1 h 12 min"),
        (words.share(0.001), "<1%"),
        (words.share(0.0), "0%"),
        (words.moment(STARTED), "2026-11-18 11:06:40 UTC"),
        (words.moment(1e300), "unknown"),
        (words.value({"a": 1}), '{"a": 1}'),
        (words.value("text"), "text"),
        (
            words.value([{"class": "Adam", "name": "a", "lr": 0.1, "decay": 0.0, "clip": None}, {"class": "B"}]),
            "Adam(lr=0.1, decay=0), B()",
        ),
    ],
)
def test_numbers_are_written_as_people_read_them(written: str, expected: str) -> None:
    assert written == expected


def test_the_command_writes_the_page_and_prints_its_path(store: Store, tmp_path: Path) -> None:
    put_run(store, "run", epochs_of(2))
    target = tmp_path / "page.html"
    target.write_text("older")
    done = CliRunner().invoke(cli.main, ["report", "--store", store.url, "--run", "run", "-o", str(target)])
    assert (done.exit_code, done.stdout) == (0, f"{target}\n")
    asked = ["report", "--run", "run", "-o", str(target), "--json"]
    done = CliRunner().invoke(cli.main, asked, env={"HVDSPARK_STORE": store.url})
    assert json.loads(done.stdout) == {"run_id": "run", "report": str(target)}
    assert "run: finished" in target.read_text("utf-8")
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["page.html"]


def test_no_such_run_and_no_such_folder_are_refused_with_what_to_do(store: Store, tmp_path: Path) -> None:
    put_run(store, "nightly-1", epochs_of(1))
    with pytest.raises(ParamError, match=r"no run 'nightly-2' .* Did you mean 'nightly-1'"):
        render_report(store, "nightly-2")
    with pytest.raises(StoreError, match="give a file in a folder that exists"):
        write_report(store, "nightly-1", tmp_path / "none" / "page.html")
    done = CliRunner().invoke(cli.main, ["report", "--store", store.url, "--run", "nightly-2"])
    assert done.exit_code != 0
    assert "Did you mean 'nightly-1'" in done.stderr


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_a_missing_package_is_named_with_what_installs_it(
    store: Store, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    put_run(store, "run", epochs_of(1))
    for name in [name for name in sys.modules if name.startswith("hvdspark.report.")]:
        monkeypatch.delitem(sys.modules, name)
        monkeypatch.delattr(name)  # of the package, which holds its modules too
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ConfigError, match=rf"needs the package {package}, .* pip install --find-links dist 'hvdspark\[report\]'"
    ):
        render_report(store, "run")
