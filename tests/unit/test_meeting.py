"""How tasks of one host tell each other something: real processes' worth of threads on real sockets."""

from __future__ import annotations

import secrets
from concurrent.futures import ThreadPoolExecutor

import pytest

from hvdspark.errors import RendezvousError
from hvdspark.launch.meeting import gather_here


def test_everybody_gets_the_texts_of_all_in_order() -> None:
    name = secrets.token_hex(8)
    with ThreadPoolExecutor(5) as pool:
        # The first comes last: the others wait for it.
        met = [pool.submit(gather_here, name, own, 5, f"I am {own}\nof five 🙂", 30.0) for own in reversed(range(5))]
    assert [found.result() for found in met] == [[f"I am {own}\nof five 🙂" for own in range(5)]] * 5


def test_a_task_alone_meets_itself() -> None:
    assert gather_here(secrets.token_hex(8), 0, 1, "alone", 1.0) == ["alone"]


@pytest.mark.parametrize("own", [0, 1])
def test_a_task_that_does_not_come_is_an_error_that_says_so(own: int) -> None:
    with pytest.raises(RendezvousError, match=r"did not find each other within 0\.05 s") as caught:
        gather_here(secrets.token_hex(8), own, 2, "here", 0.05)
    assert caught.value.is_passing
    assert ("still awaited: 1" in str(caught.value)) == (own == 0)


def test_two_meetings_at_a_time_do_not_mix() -> None:
    names = [secrets.token_hex(8), secrets.token_hex(8)]
    with ThreadPoolExecutor(4) as pool:
        met = [pool.submit(gather_here, name, own, 2, f"{name} {own}", 30.0) for name in names for own in (0, 1)]
    for index, name in enumerate(names):
        assert met[2 * index].result() == met[2 * index + 1].result() == [f"{name} 0", f"{name} 1"]
