"""Every error leads to an entry that says what to do."""

from __future__ import annotations

import pickle
import re
import traceback
from pathlib import Path

import pytest
from click.testing import CliRunner

import hvdspark
from hvdspark import errors
from hvdspark.cli import main

ROOT = Path(hvdspark.__file__).parents[1]


def all_errors(cls: type = errors.HvdSparkError) -> list[type[errors.HvdSparkError]]:
    found = [cls, *(found for child in cls.__subclasses__() for found in all_errors(child))]
    return [one for one in found if one.__module__ == errors.__name__]


def anchors(path: Path) -> list[str]:
    """List the anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles]


@pytest.mark.parametrize("cls", all_errors(), ids=lambda cls: cls.__name__)
def test_the_link_below_an_errors_message_leads_to_an_entry_of_its_own(cls: type[errors.HvdSparkError]) -> None:
    lines = traceback.format_exception_only(cls("what happened\nand more"))
    last = "".join(lines).splitlines()[-1]
    link = re.fullmatch(rf"See (\S+)#(\S+), or: hvdspark explain {cls.__name__}\.", last)
    assert link is not None
    assert link[2] == cls.__name__.lower()
    assert anchors(ROOT / link[1]).count(link[2]) == 1


def test_entries_are_of_errors_that_there_are() -> None:
    title, *names = anchors(ROOT / errors.TROUBLESHOOTING)
    assert (title, names) == ("troubleshooting", [cls.__name__.lower() for cls in in_the_order_of_the_tree()])


def in_the_order_of_the_tree() -> list[type]:
    assert errors.__doc__ is not None
    names = re.findall(r"^[ │├└─]*(\w+Error)\b", errors.__doc__, re.MULTILINE)
    return [getattr(errors, name) for name in names]


def test_the_link_is_told_once_after_pickling_and_is_no_part_of_the_message() -> None:
    error = errors.NotEnoughSlotsError("needs 4 slots", needed=4, available=2)
    copy = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(error))))
    assert str(copy) == "needs 4 slots"
    assert copy.__notes__ == error.__notes__
    assert len(copy.__notes__) == 1


def test_an_error_class_of_a_users_own_has_the_entry_of_the_one_it_derives_from() -> None:
    class Own(errors.StoreError):
        pass

    assert "#storeerror," in Own("x").help


def test_explain_prints_an_entry_and_lists_them_all() -> None:
    entry = CliRunner().invoke(main, ["explain", "NotEnoughSlotsError"])
    assert entry.exit_code == 0
    assert "spark.executor.instances" in entry.output
    assert "StageLostError" not in entry.output
    listed = CliRunner().invoke(main, ["explain"])
    assert set(listed.output.split()) >= {cls.__name__ for cls in all_errors()}


def test_explain_knows_the_nearest_name() -> None:
    result = CliRunner().invoke(main, ["explain", "NotEnoughSlots"])
    assert result.exit_code == 2
    assert "Did you mean 'NotEnoughSlotsError'?" in result.stderr
