"""The pages of the documentation, as a Markdown parser reads them: tables are whole, and links lead somewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "hvdspark/troubleshooting.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
]


def tokens_of(page: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text())


def inline(page: Path) -> Iterator[Token]:
    """Go through the texts of a page, paragraph by paragraph, cell by cell."""
    yield from (token for token in tokens_of(page) if token.type == "inline")


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    tokens = tokens_of(page)
    titles = [tokens[place + 1].content for place, token in enumerate(tokens) if token.type == "heading_open"]
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


def links(page: Path) -> Iterator[str]:
    for text in inline(page):
        yield from (str(child.attrGet("href")) for child in text.children or () if child.type == "link_open")


def ids(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_every_row_is_in_its_table_and_all_of_it_in_its_cells(page: Path) -> None:
    paragraphs = [text.content for text in inline(page)]
    assert [text for text in paragraphs if re.search(r"^\|", text, re.MULTILINE)] == []
    # What is more than the head has cells for is not shown.
    lines = page.read_text().splitlines()
    for token in tokens_of(page):
        if token.type == "table_open":
            assert token.map is not None
            rows = lines[slice(*token.map)]
            assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {rows[0].count("|")}, rows[0]


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_no_row_of_a_table_is_there_twice(page: Path) -> None:
    rows = [line.split("|")[1].strip() for line in page.read_text().splitlines() if line.startswith("| `")]
    assert [row for row in rows if row.startswith("`runs/") and rows.count(row) > 1] == []


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_lead_to_files_and_headings_that_there_are(page: Path) -> None:
    for link in links(page):
        if "://" in link or link.startswith("mailto:"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_readme_names_the_examples_that_there_are() -> None:
    named = set(re.findall(r"^\| `examples/([\w./]+?)/?` \|", (ROOT / "README.md").read_text(), re.MULTILINE))
    found = {path.name for path in (ROOT / "examples").iterdir() if not path.name.startswith((".", "_"))}
    assert named == found


def test_the_page_on_airflow_names_the_variables_of_its_dag() -> None:
    folder = ROOT / "examples" / "airflow"
    used = set(re.findall(r"var\.value\.(\w+)", (folder / "retrain_dag.py").read_text()))
    assert used == set(re.findall(r"`(retrain_\w+)`", (folder / "README.md").read_text()))
