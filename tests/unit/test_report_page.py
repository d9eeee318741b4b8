"""A report as a browser shows it: it asks for nothing, complains of nothing, and its charts are there to be seen."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser
import numpy as np
import pytest
from report_runs import STARTED, epoch, put_run

from hvdspark import Store
from hvdspark.history import Progress
from hvdspark.report import write_report

pytestmark = pytest.mark.skipif(browser.CHROMIUM is None, reason="no Chromium (Debian: apt-get install chromium)")

DESKTOP, PHONE = 1280, 390
HOST = "ip-10-120-33-7.eu-central-1.compute.internal"

# As the page's style sheet has them.
TRAIN, VAL = {"light": (0x21, 0x60, 0xD8), "dark": (0x74, 0xA7, 0xFF)}, {"light": (0xC8, 0x50, 0x0A)}

CHARTS = """[...document.querySelectorAll('svg.chart')].map(svg => {
  const box = svg.getBoundingClientRect();
  const marks = [...svg.querySelectorAll('[style*="var(--"]')].map(mark => mark.getBoundingClientRect());
  return {
    label: svg.getAttribute('aria-label'), width: box.width, height: box.height,
    drawn: marks.filter(mark => mark.width + mark.height > 0).length,
    outside: [...svg.querySelectorAll('[style*="var(--"]')].filter(mark => {
      const one = mark.getBoundingClientRect();
      return one.width + one.height > 0 && (one.left < box.left - 1 || one.right > box.right + 1);
    }).map(mark => mark.outerHTML),
  };
})"""

# Labels of axes: those that are not shown by the mouse.
OVERLAPPING = """[...document.querySelectorAll('svg.chart')].flatMap(svg => {
  const texts = [...svg.querySelectorAll('text')].filter(text => !text.closest('.at') && text.textContent);
  const boxes = texts.map(text => [text.textContent, text.getBoundingClientRect()]);
  return boxes.flatMap(([one, a], place) => boxes.slice(place + 1).filter(([, b]) =>
    a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 2 && b.top < a.bottom - 2
  ).map(([other]) => one + ' on ' + other));
})"""

# What sticks out of the window, or out of its card where that does not scroll.
TOO_WIDE = """[document.documentElement, ...document.querySelectorAll('.card, h1')]
  .filter(part => part.scrollWidth > part.clientWidth + 1 && getComputedStyle(part).overflowX === 'visible')
  .map(part => part.tagName + ' ' + part.textContent.trim().slice(0, 40))"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Page]:
    with browser.browser(tmp_path_factory.mktemp("chromium")) as page:
        yield page


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("reports")
    store = Store.create(folder / "store")
    put_run(store, "usual", [epoch(number, turn=5) for number in range(1, 9)], epoch=6)
    many = [epoch(number, 16, lagging=11) for number in range(1, 61)]
    put_run(store, "sixteen-ranks-and-a-name-that-goes-on-" + 60 * "x", many)
    put_run(
        store,
        "failed",
        [epoch(1, val=False), epoch(2, val=False, metrics={"loss": float("nan")})],
        Progress(3, 8, 37, 120, 5e4, 1.2, {}, STARTED + 30),
        state="failed",
        cause=f"rank 1 on {HOST}: ValueError: <script>document.title='taken'</script> <img src=http://x.invalid/a.png>",
        attempts=[{"started": STARTED, "ended": STARTED + 41, "cause": f"rank 1 on {HOST}: ValueError", "ranks": 2}],
        params={f"parameter_{number}": "<b onmouseover=alert(1)>" + 60 * "y" for number in range(40)},
    )
    put_run(store, "one-epoch", [epoch(1, 1, metrics={"loss": 1234.5678, "val_loss": 0.00012})])
    put_run(store, "before-histories", params={}, versions={}, data={}, hosts=[], phases={}, attempts=[], artefacts={})
    return {name: write_report(store, name, folder / f"{name}.html") for name in store.list("runs")}


@pytest.mark.parametrize("width", [DESKTOP, PHONE])
def test_pages_ask_for_nothing_complain_of_nothing_and_fit_the_window(
    page: browser.Page, pages: dict[str, Path], width: int
) -> None:
    drawn = {}
    for name, path in pages.items():
        page.open(path, width)
        assert (name, page.requested, page.complaints) == (name, [path.as_uri()], [])
        assert page.evaluate("document.title") == f"{name}: {'failed' if name == 'failed' else 'finished'}"
        assert (name, page.evaluate(TOO_WIDE)) == (name, [])
        assert (name, page.evaluate(OVERLAPPING)) == (name, [])
        charts = page.evaluate(CHARTS)
        drawn[name] = len(charts)
        for chart in charts:
            assert chart["width"] > 0.75 * min(width, 550), (name, chart)
            assert chart["height"] > 0.4 * chart["width"], (name, chart)
            assert chart["drawn"] > 5, (name, chart)
            assert chart["outside"] == [], (name, chart)
    # Two metrics, learning rate, time of epochs, rows per second, spread of ranks; of one epoch and rank three.
    assert list(drawn.values()) == [0, 6, 3, 6, 6]


def test_lines_of_train_and_validation_have_their_colours_by_day_and_by_night(
    page: browser.Page, pages: dict[str, Path]
) -> None:
    page.open(pages["usual"], DESKTOP)
    day = page.picture("#curves svg.chart")
    assert count(day, TRAIN["light"]) > 300
    assert count(day, VAL["light"]) > 300
    assert day.mean() > 230
    page.open(pages["usual"], DESKTOP, dark=True)
    night = page.picture("#curves svg.chart")
    assert count(night, TRAIN["dark"]) > 300
    assert night.mean() < 60


def test_the_mouse_over_an_epoch_shows_its_values(page: browser.Page, pages: dict[str, Path]) -> None:
    page.open(pages["usual"], DESKTOP)
    shown = "[...document.querySelectorAll('.at text')].filter(t => getComputedStyle(t).visibility === 'visible')"
    assert page.evaluate(f"{shown}.length") == 0
    for section, text in (
        ("curves", "epoch 3train 5.448validation 5.608"),
        ("times", "epoch 3data wait 0.15 scompute 2.5 sallreduce 1.0 svalidation 0.31 s"),
    ):
        page.evaluate(f"document.querySelector('#{section} svg.chart').scrollIntoView()")
        zone = page.evaluate(
            "(b => ({x: b.x + b.width / 2, y: b.y + b.height / 2}))"
            f"(document.querySelectorAll('#{section} .at')[2].querySelector('rect').getBoundingClientRect())"
        )
        page.call("Input.dispatchMouseEvent", type="mouseMoved", **zone)
        assert page.evaluate(f"{shown}.map(t => t.textContent)") == [text]


def test_bars_divide_the_time_as_the_numbers_beside_them_do(page: browser.Page, pages: dict[str, Path]) -> None:
    page.open(pages["usual"], DESKTOP)
    widths = page.evaluate(
        "[...document.querySelectorAll('#times .whole i')].map(i => [i.title, i.getBoundingClientRect().width])"
    )
    by_name = {title.rsplit(" ", 2)[0]: width for title, width in widths}
    assert by_name["write"] / by_name["launch"] == pytest.approx(7.9 / 2.1, rel=0.05)
    total = page.evaluate("document.querySelector('#times .whole').getBoundingClientRect().width")
    assert sum(by_name.values()) == pytest.approx(total, rel=0.03)


def count(picture: np.ndarray[Any, Any], colour: tuple[int, int, int]) -> int:
    """Count the pixels that are of a colour, but for what a line's soft edge changes of it."""
    return int((np.abs(picture.astype(int) - colour).max(axis=2) < 40).sum())
