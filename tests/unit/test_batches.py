"""The steps of a rank as TensorFlow sees them: who gets which rows, and what for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pyarrow as pa
import pytest
import tensorflow as tf
from hvdspark.estimators.keras import batches as module
from hvdspark.estimators.keras.batches import Batches, packer
from hvdspark.estimators.keras.feeding import StepFeed

from hvdspark.data.materialize import TRAIN
from hvdspark.data.schema import resolve
from hvdspark.data.shards import plan_shards
from hvdspark.errors import ValueRangeError
from hvdspark.plan import BatchSpec, ColumnSpec, FitPlan, ShardPlan, TensorSpec

COLUMNS = (
    ColumnSpec("x", "scalar", "int64"),
    ColumnSpec("v", "array", "float32", None),
    ColumnSpec("y", "scalar", "int32"),
    ColumnSpec("w", "scalar", "float32"),
)
FEATURES = (TensorSpec(("x", "v"), (3,), "float32"),)


@pytest.fixture(scope="module")
def written(write_dataset: Callable[..., Any]) -> Any:
    """Write 23 rows: ``x`` is the row's number, ``v`` its half twice, ``y`` twice it, ``w`` a tenth of it."""
    x = np.arange(23)
    wide = pa.array([[number / 2, number / 2] for number in x], pa.list_(pa.float32()))
    rows = pa.RecordBatch.from_pydict({"x": x, "v": wide, "y": (2 * x).astype("i4"), "w": (x / 10).astype("f4")})
    return write_dataset(COLUMNS, [[rows.slice(0, 9)], [rows.slice(9)]], group_bytes=4 * 24)


def batches(written: Any, rank: int, shards: ShardPlan, *, shuffle: bool = False, weight: str | None = "w") -> Batches:
    spec = BatchSpec(FEATURES, (TensorSpec(("y",), (1,)),), weight)
    plan = FitPlan(
        run_id="run",
        store=written.store.ref(),
        dataset=written.dataset,
        columns=written.manifest.columns,
        batch=resolve(spec, written.manifest.columns),
        train=shards,
        val=None,
        epochs=1,
        shuffle=shuffle,
        seed=4,
    )
    return Batches(plan, shards, rank, shuffle=shuffle, workers=2)


def shards_of(written: Any, size: int, batch_rows: int, *, keep_order: bool = True, rows: int = 23) -> ShardPlan:
    groups, taken = [], 0
    for group in written.manifest.splits[TRAIN]:
        if taken + group.rows <= rows:
            groups.append(group)
            taken += group.rows
    assert taken == rows
    return plan_shards(groups, size, batch_rows, keep_order=keep_order, seed=4)


def numbers_of(tensors: Any) -> list[int]:
    """List the rows of a batch, having checked that all of its tensors belong to them."""
    x, y, w = (np.asarray(tensor) for tensor in tensors)
    found = x[:, 0]
    assert x.tolist() == [[number, number / 2, number / 2] for number in found]
    assert y.ravel().tolist() == (2 * found).tolist()
    assert w == pytest.approx(found / 10)
    return [int(number) for number in found]


def steps_of(
    written: Any, rank: int, shards: ShardPlan, passes: int = 1, per_step: int = 1, shuffle: bool = False
) -> list[Any]:
    source = batches(written, rank, shards, shuffle=shuffle)
    facts = source.facts(per_step)
    taken = []
    for batch in batches_of(source, passes, fill=True):
        (rows,), (total,), (apply,) = facts.of(len(taken), len(taken) + 1)
        taken.append((numbers_of(batch), float(rows), float(total), bool(apply)))
    return taken


def batches_of(source: Batches, passes: int, *, fill: bool, first: int = 0) -> list[Any]:
    """Cut all chunks into their batches."""
    return [
        source.batch(chunk, step)
        for chunk in source.chunks(passes, fill=fill, first=first)
        for step in range(source.steps_in(chunk))
    ]


@pytest.mark.parametrize(("size", "batch_rows"), [(1, 4), (2, 4), (3, 2), (3, 7), (2, 12)])
def test_ranks_in_kept_order_share_the_steps_of_one_process(written: Any, size: int, batch_rows: int) -> None:
    expected = steps_of(written, 0, shards_of(written, 1, batch_rows * size))
    ranks = [steps_of(written, rank, shards_of(written, size, batch_rows)) for rank in range(size)]
    assert {len(steps) for steps in ranks} == {len(expected)}
    for index, (numbers, rows, total, _) in enumerate(expected):
        assert [number for steps in ranks if steps[index][1] for number in steps[index][0]] == numbers
        assert sum(steps[index][1] for steps in ranks) == rows
        assert {steps[index][2] for steps in ranks} == {total}


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_pass_has_every_row_once_and_an_order_of_its_own(written: Any, size: int) -> None:
    shards = shards_of(written, size, 3, keep_order=False)
    ranks = [steps_of(written, rank, shards, passes=2, shuffle=True) for rank in range(size)]
    for number in range(2):
        mine = slice(number * shards.steps, (number + 1) * shards.steps)
        found = Counter(row for steps in ranks for rows, *_ in steps[mine] for row in rows)
        assert found == Counter(range(23))
    first, second = (
        [row for rows, *_ in ranks[0][number * shards.steps :][: shards.steps] for row in rows] for number in range(2)
    )
    assert first != second


def test_a_rank_without_a_row_of_its_own_gets_one_that_counts_nothing(written: Any) -> None:
    shards = shards_of(written, 3, 2, rows=13)
    assert shards.has_idle_steps
    ranks = [steps_of(written, rank, shards) for rank in range(3)]
    last = [steps[-1] for steps in ranks]
    assert [rows for _, rows, _, _ in last] == [1.0, 0.0, 0.0]
    assert {total for _, _, total, _ in last} == {1.0}
    assert [len(numbers) for numbers, *_ in last] == [1, 1, 1]
    assert sorted(row for steps in ranks for rows, count, *_ in steps if count for row in rows) == list(range(13))


def test_no_row_is_read_where_autograph_would_log_it(written: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    traced = []
    read_group = module.read_group

    def watched(*args: Any) -> Any:
        traced.append(tf.inside_function())
        return read_group(*args)

    monkeypatch.setattr(module, "read_group", watched)
    steps_of(written, 2, shards_of(written, 3, 2, rows=13))
    assert set(traced) == {False}


@pytest.mark.parametrize(("per_step", "expected"), [(1, [True] * 6), (2, [False, True] * 3), (4, [0, 0, 0, 1, 0, 1])])
def test_weights_change_every_few_steps_and_at_the_end_of_a_pass(
    written: Any, per_step: int, expected: list[bool]
) -> None:
    steps = steps_of(written, 0, shards_of(written, 1, 4), passes=2, per_step=per_step)
    assert [apply for *_, apply in steps] == [bool(value) for value in expected] * 2


def test_a_pass_never_shares_a_batch_with_the_next(written: Any) -> None:
    steps = steps_of(written, 0, shards_of(written, 1, 10), passes=2)
    assert [len(numbers) for numbers, *_ in steps] == [10, 10, 3] * 2
    assert steps[0] == steps[3]


def test_validation_skips_the_steps_in_which_a_rank_has_no_row(written: Any) -> None:
    shards = shards_of(written, 3, 2, rows=13, keep_order=False)
    found = []
    for rank in range(3):
        source = batches(written, rank, shards)
        steps = [numbers_of(tensors) for tensors in batches_of(source, 1, fill=False)]
        assert len(steps) == source.own_steps
        found += [row for rows in steps for row in rows]
    assert sorted(found) == list(range(13))


@pytest.mark.parametrize("chunk_bytes", [1, 200, 400, 1 << 20])
@pytest.mark.parametrize("most", [1, 2, 4, 7])
def test_steps_are_handed_out_across_chunks_and_passes(
    written: Any, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int, most: int
) -> None:
    """Epochs of 7 steps over passes of 6, calls of so many steps, chunks of one batch, of some, of all."""
    shards = shards_of(written, 1, 4)
    expected = [numbers for numbers, *_ in steps_of(written, 0, shards, passes=3)]
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk_bytes)
    source = batches(written, 0, shards)
    feed = StepFeed(source, 3, fill=True)
    found = []
    for left in (7, 7, 4):
        while left:
            portion = feed.take(min(most, left))
            assert 0 < portion.count <= min(most, left)
            steps = range(portion.start, portion.start + portion.count)
            found += [numbers_of(source.batch(portion.chunk, step)) for step in steps]
            left -= portion.count
    assert found == expected
    sizes = {source.steps_in(chunk) for chunk in source.chunks(1, fill=True)}
    assert sizes == {1: {1}, 1 << 20: {6}}.get(chunk_bytes, sizes)
    assert chunk_bytes in (1, 1 << 20) or 1 < max(sizes) < 6


@pytest.mark.parametrize("chunk_bytes", [1, 200, 1 << 20])
@pytest.mark.parametrize("first", range(13))
def test_a_training_that_goes_on_gets_the_steps_that_are_left(
    written: Any, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int, first: int
) -> None:
    """Two passes of six steps, the last of which finds this rank without a row."""
    shards = shards_of(written, 3, 2, rows=13)
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk_bytes)

    def rows_of(first: int) -> list[list[int]]:
        source = batches(written, 2, shards, shuffle=True)
        return [numbers_of(batch) for batch in batches_of(source, 2, fill=True, first=first)]

    assert shards.has_idle_steps
    assert rows_of(first) == rows_of(0)[first:]


def test_the_sample_is_one_row(written: Any) -> None:
    sample = batches(written, 0, shards_of(written, 1, 4)).sample()
    assert [tensor.shape for tensor in sample] == [(1, 3), (1, 1), (1,)]
    assert numbers_of(sample) == [0]


def spec(inputs: int, outputs: int, weight: str | None = None) -> BatchSpec:
    return BatchSpec(
        tuple(TensorSpec((f"x{number}",)) for number in range(inputs)),
        tuple(TensorSpec((f"y{number}",)) for number in range(outputs)),
        weight,
    )


def test_tensors_are_put_into_the_structure_of_the_model() -> None:
    left, right = keras.Input((1,), name="left"), keras.Input((1,), name="right")
    joined = keras.layers.Concatenate()([left, right])
    heads = [keras.layers.Dense(1, name="p")(joined), keras.layers.Dense(1, name="q")(joined)]
    assert packer(keras.Model(left, keras.layers.Dense(1)(left)), spec(1, 1))("x", "y") == ("x", "y")
    assert packer(keras.Model([left, right], heads[0]), spec(2, 1, "w"))("x", "z", "y", "w") == (("x", "z"), "y", "w")
    named = keras.Model({"left": left, "right": right}, {"p": heads[0], "q": heads[1]})
    x, y = packer(named, spec(2, 2))("x", "z", "y", "u")
    assert (x, y) == ({"left": "x", "right": "z"}, {"p": "y", "q": "u"})


def test_tensors_of_several_inputs_stay_apart_on_their_way_through_tensorflow() -> None:
    inputs = [keras.Input((1,)), keras.Input((1,))]
    model = keras.Model(inputs, keras.layers.Dense(1)(keras.layers.Concatenate()(inputs)))
    same_shape = tf.data.Dataset.from_tensors((tf.ones((4, 1)), tf.zeros((4, 1)), tf.ones((4, 1))))
    [(x, y)] = same_shape.map(packer(model, spec(2, 1)))
    assert [tensor.shape for tensor in x] == [(4, 1), (4, 1)]
    assert y.shape == (4, 1)
    assert model(x).shape == (4, 1)


def test_a_model_that_is_not_built_gets_plain_tensors() -> None:
    assert packer(keras.Sequential([keras.layers.Dense(1)]), spec(1, 1))("x", "y") == ("x", "y")


@pytest.mark.parametrize(("dtype", "exact"), [("float32", 2**24), ("float64", 2**53)])
def test_whole_numbers_reach_the_model_exactly_or_not_at_all(
    write_dataset: Callable[..., Any], dtype: str, exact: int
) -> None:
    spec = BatchSpec((TensorSpec(("x",), (1,), dtype),), ())
    for last in (exact, exact + 1):
        written = write_dataset([ColumnSpec("x", "scalar", "int64")], [[pa.RecordBatch.from_pydict({"x": [1, last]})]])
        shards = plan_shards(written.manifest.splits[TRAIN], 1, 2, keep_order=True)
        plan = FitPlan(
            run_id="run",
            store=written.store.ref(),
            dataset=written.dataset,
            columns=written.manifest.columns,
            batch=spec,
            train=shards,
            val=None,
            epochs=1,
            shuffle=False,
            seed=4,
        )
        source = Batches(plan, shards, 0, shuffle=False, workers=1)
        if last == exact:
            ((batch,),) = batches_of(source, 1, fill=True)
            assert (batch.dtype, np.asarray(batch).ravel().tolist()) == (dtype, [1, exact])
        else:
            with pytest.raises(tf.errors.UnknownError, match=rf"column 'x' has the value {last}"):
                batches_of(source, 1, fill=True)
            assert isinstance(source.error, ValueRangeError)
