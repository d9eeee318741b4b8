"""What a rank says of an error: its first line tells, and no error of its own is taken for a lost peer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from horovod.common.exceptions import HorovodInternalError

from hvdspark.worker.rank import _is_peer_error, _one_line


def caught(call: Any) -> Exception:
    with pytest.raises(Exception) as found:  # noqa: PT011 - of whatever kind TensorFlow makes it
        call()
    return found.value


def fail(value: np.ndarray) -> np.ndarray:
    raise LookupError("the user's own mistake\nand more of it")


def loop(value: tf.Tensor) -> tf.Tensor:
    for _ in tf.range(3):
        value = value + fail(value)
    return value


def test_an_error_within_a_graph_begins_with_what_it_was() -> None:
    step = tf.function(lambda value: tf.numpy_function(fail, [value], tf.float32), autograph=False)
    error = caught(lambda: step(tf.constant(1.0)))
    assert not str(error).startswith("LookupError")
    assert _one_line(error) == "UnknownError: LookupError: the user's own mistake"
    assert not _is_peer_error(error)


def test_an_error_in_what_autograph_translates_begins_with_what_it_was() -> None:
    error = caught(lambda: tf.function(loop)(tf.constant(1.0)))
    assert str(error).startswith("in user code:")
    assert _one_line(error).endswith("LookupError: the user's own mistake")


def test_where_in_the_graph_it_was_comes_later() -> None:
    text = (
        'Graph execution error:\n\nDetected at node X defined at (most recent call last):\n  File "a.py", line 1\n\nBad'
    )
    assert _one_line(tf.errors.UnknownError(None, None, text)) == "UnknownError: Bad"


def test_an_error_of_an_operation_begins_with_its_message() -> None:
    error = caught(lambda: tf.ones((2, 3)) @ tf.ones((2, 3)))
    assert _one_line(error).startswith("InvalidArgumentError: Matrix size-incompatible")
    assert _one_line(ValueError()) == "ValueError"
    assert _one_line(ValueError("one\ntwo")) == "ValueError: one"


# Horovod's own texts; the operation's name is in both.
HOROVOD = "{{function_node __wrapped__HorovodAllreduce_device_CPU:0}} "


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Horovod has been shut down. This was caused by an exception on one of the ranks", True),
        ("Mismatched data types: One rank had type float32, but another rank had type float64.", False),
        ("Mismatched allgather tensor shapes: One rank sent a tensor of rank 1.", False),
    ],
)
def test_ranks_that_do_not_do_the_same_have_lost_no_peer(text: str, expected: bool) -> None:
    error = tf.errors.FailedPreconditionError(None, None, HOROVOD + text)
    assert _is_peer_error(error) is expected
    assert _one_line(error) == f"FailedPreconditionError: {text}"


def wrapped(cause: BaseException) -> None:
    raise RuntimeError("step 7 failed") from cause


def while_handling(cause: BaseException) -> None:
    try:
        raise cause
    except type(cause):
        raise RuntimeError("step 7 failed")  # noqa: B904 - as users write it


@pytest.mark.parametrize("wrap", [wrapped, while_handling])
def test_a_lost_peer_is_known_in_what_the_users_code_makes_of_it(wrap: Any) -> None:
    error = caught(lambda: wrap(HorovodInternalError("Connection closed by peer")))
    assert _is_peer_error(error)
    assert _one_line(error) == "RuntimeError: step 7 failed"
    assert not _is_peer_error(caught(lambda: wrap(LookupError("Connection closed by peer"))))
    assert not _is_peer_error(caught(lambda: wrap(HorovodInternalError("Mismatched data types: float32"))))


def test_errors_that_refer_to_each_other_are_looked_at_once() -> None:
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__cause__ = second, first
    assert not _is_peer_error(first)
