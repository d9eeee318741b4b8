"""The state of a training: whole or not there, and what comes back is what went in."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from hvdspark.estimators.keras.snapshot import Snapshot
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hvdspark import Store
from hvdspark.errors import CorruptDatasetError, StoreError
from hvdspark.worker.state import _DIGEST_BYTES, StateFiles, _digest, pack, unpack


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.create(tmp_path / "store")


def keep(store: Store, step: int, size: int = 2, number: float = 0.0) -> None:
    for rank in range(size):
        StateFiles(store, "run", rank, size).write_own(step, {"own": np.full(2, rank + number)})
    StateFiles(store, "run", 0, size).publish(step, {"shared": np.full(3, number)}, {"note": number})


def place(store: Store, step: int, name: str) -> Path:
    return Path(store.path("runs/run/checkpoints", f"state-{step:012d}", name))


def test_each_rank_gets_what_all_have_and_what_was_its_own(store: Store) -> None:
    keep(store, 7, number=0.5)
    for rank in range(2):
        state = StateFiles(store, "run", rank, 2).load(7)
        assert state.step == 7
        assert state.info == {"note": 0.5}
        assert state.shared["shared"].tolist() == [0.5] * 3
        assert state.own is not None
        assert state.own["own"].tolist() == [rank + 0.5] * 2
        assert state.first["own"].tolist() == [0.5] * 2
    assert StateFiles(store, "run", 2, 3).load(7).own is None


def test_the_last_two_are_kept_and_all_go_in_the_end(store: Store) -> None:
    for step in (3, 6, 9, 12):
        keep(store, step)
    files = StateFiles(store, "run", 0, 2)
    assert files.latest() == 12
    assert sorted(path.name[-2:] for path in place(store, 0, "x").parent.parent.iterdir()) == ["09", "12"]
    files.clear()
    assert files.latest() is None


@pytest.mark.parametrize("name", ["manifest", "shared.npz", "rank-0.npz", "rank-1.npz"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped", "empty", "other"])
def test_a_damaged_state_is_passed_over_for_the_one_before(store: Store, name: str, damage: str) -> None:
    keep(store, 3)
    keep(store, 6)
    path = place(store, 6, name)
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]
        path.write_bytes(
            {"truncated": content[:-5], "flipped": flipped, "empty": b"", "other": b"cos\nsystem\n"}[damage]
        )
    assert StateFiles(store, "run", 0, 2).latest() == 3


@pytest.mark.parametrize("name", ["manifest", "shared.npz", "rank-0.npz", "rank-1.npz"])
def test_a_state_that_cannot_be_read_is_not_passed_over(store: Store, name: str) -> None:
    keep(store, 3)
    keep(store, 6)
    path = place(store, 6, name)
    path.unlink()
    path.symlink_to(name)  # reading it is an error, and none that it is absent
    with pytest.raises(StoreError, match=r"symbolic links.*an older one is not taken .* remove .*state-000000000006"):
        StateFiles(store, "run", 0, 2).latest()


@pytest.fixture(scope="module")
def two_states(tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = Store.create(tmp_path_factory.mktemp("store"))
    keep(store, 3, number=0.25)
    keep(store, 6, number=0.5)
    return store


@settings(max_examples=200)
@given(st.sampled_from(["manifest", "shared.npz", "rank-0.npz", "rank-1.npz"]), st.floats(0, 1), st.integers(1, 255))
def test_whatever_byte_of_a_state_is_changed_the_one_before_is_taken(
    two_states: Store, name: str, where: float, change: int
) -> None:
    path = place(two_states, 6, name)
    content = path.read_bytes()
    changed = bytearray(content)
    changed[int(where * (len(content) - 1))] ^= change
    path.write_bytes(changed)
    try:
        files = StateFiles(two_states, "run", 1, 2)
        # As one who goes on reads it: every key must be there.
        assert files.latest(lambda _, info: info["note"] > 0) == 3
        assert files.load(3).info == {"note": 0.25}
    finally:
        path.write_bytes(content)
    assert files.latest() == 6


def test_a_state_that_is_not_whole_counts_for_nothing(store: Store) -> None:
    StateFiles(store, "run", 0, 2).write_own(5, {"own": np.zeros(1)})
    assert StateFiles(store, "run", 0, 2).latest() is None
    with pytest.raises(CorruptDatasetError):
        StateFiles(store, "run", 0, 2).load(5)


numbers = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text())
arrays = hnp.arrays(st.sampled_from(["f4", "f8", "i8", "u1", "?"]), hnp.array_shapes(min_dims=0, max_side=3))
values = st.recursive(
    st.one_of(numbers, arrays),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(), inner, max_size=3),
    ),
    max_leaves=8,
)


@given(values)
def test_plain_values_come_back_as_they_were(value: Any) -> None:
    aside: dict[str, np.ndarray[Any, Any]] = {}
    np.testing.assert_equal(unpack(pack(value, aside, "x"), aside), value)


@pytest.mark.parametrize("value", [object(), lambda: None, {1: 2}, [set()], np.array(["a"]), np.array([object()])])
def test_anything_else_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="cannot be kept"):
        pack(value, {}, "x")


def training(units: int = 4, dtype: str = "float32") -> tuple[keras.Model, list[Any]]:
    keras.utils.set_random_seed(1)
    layers = [keras.layers.Dense(units, dtype=dtype), keras.layers.BatchNormalization(), keras.layers.Dropout(0.5)]
    model = keras.Sequential([keras.Input((3,)), *layers, keras.layers.Dense(1)])
    model.compile(keras.optimizers.Adam(0.01), "mse", metrics=["mae"], jit_compile=False)
    callbacks: list[Any] = [
        keras.callbacks.EarlyStopping(patience=3, restore_best_weights=True, monitor="loss"),
        keras.callbacks.ReduceLROnPlateau(monitor="loss", patience=1),
        keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: None),
    ]
    return model, callbacks


def begin(model: keras.Model, callbacks: list[Any]) -> Snapshot:
    for callback in callbacks:
        callback.set_model(model)
        callback.on_train_begin()
    return Snapshot(model, callbacks)


def after(state: dict[str, Any], *callbacks: Any) -> list[Any]:
    """Begin a training with callbacks, and give them back what there is in a state of their own."""
    model, _ = training()
    begin(model, list(callbacks)).restore_callbacks(state)
    return list(callbacks)


def state_of(callbacks: list[Any], losses: list[float]) -> dict[str, Any]:
    """Return the state after some epochs of these losses."""
    model, _ = training()
    snapshot = begin(model, callbacks)
    for epoch, loss in enumerate(losses):
        for callback in callbacks:
            callback.on_epoch_end(epoch, {"loss": loss})
    return snapshot.own()


class Counter(keras.callbacks.Callback):  # type: ignore[misc]
    """Counts epochs from a number that it is given."""

    def __init__(self, count: int = 0, step: int = 1) -> None:
        super().__init__()
        self.count, self.step = count, step
        self.table = np.zeros(1000)
        self.seen = np.zeros(2)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.count += self.step
        self.seen[0] += 1
        self.last = logs


def test_what_a_callback_was_given_is_as_the_program_has_it_now() -> None:
    stopping = {"monitor": "loss", "mode": "min", "min_delta": 0.5}
    state = state_of([keras.callbacks.EarlyStopping(patience=3, **stopping), Counter(10)], [4.0, 3.8, 3.7])
    early, counter = after(state, keras.callbacks.EarlyStopping(patience=7, **stopping), Counter(10, step=5))
    assert (early.patience, early.wait, early.best) == (7, 2, 4.0)
    assert (counter.count, counter.step, counter.last) == (13, 5, {"loss": 3.7})
    assert counter.seen.tolist() == [3, 0]
    # Less by more than min_delta, and less by less.
    for loss, wait in ((3.3, 0), (3.2, 1)):
        early.on_epoch_end(4, {"loss": loss})
        assert early.wait == wait


def test_what_a_callback_has_not_changed_takes_no_room() -> None:
    kept = [array.size for name, array in state_of([Counter()], [1.0]).items() if name.startswith("Counter")]
    assert kept == [2]


def test_a_state_cannot_say_where_callbacks_write(tmp_path: Path) -> None:
    def callbacks(folder: str) -> list[Any]:
        return [
            keras.callbacks.ModelCheckpoint(f"{folder}/best.keras", monitor="loss", mode="min", save_best_only=True),
            keras.callbacks.CSVLogger(f"{folder}/log.csv"),
            keras.callbacks.TensorBoard(folder, write_graph=False),
        ]

    mine = str(tmp_path)
    planted = {
        "filepath": "/theirs/best.keras",
        "filename": "/theirs/log.csv",
        "_train_dir": "/theirs",
        "log_dir": "/theirs",
        "__class__": "str",
        "__dict__": {"dict": {"filepath": "/theirs/best.keras"}},
        "_model": None,
        "best": 0.5,
    }
    before = callbacks(mine)
    state = state_of(before, [1.0])
    notes = json.loads(state["notes"].tobytes())
    for values in notes["callbacks"]:
        values["values"] = planted
    state["notes"] = np.frombuffer(json.dumps(notes).encode(), np.uint8)
    found = after(state, *callbacks(mine))
    for callback in found:
        assert callback.model is not None
        assert callback.best == 0.5
    assert found[0].filepath == f"{mine}/best.keras"
    assert found[1].filename == f"{mine}/log.csv"
    assert (found[2].log_dir, found[2]._train_dir) == (mine, f"{mine}/train")
    for callback in (*before, *found):
        callback.on_train_end()  # closes its files


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_training_goes_on_as_if_nothing_had_happened(dtype: str) -> None:
    random_rows = np.random.default_rng(0)
    x, y = random_rows.normal(size=(64, 3)).astype("f4"), random_rows.normal(size=(64, 1)).astype("f4")

    def epochs(model: keras.Model, callbacks: list[Any], count: int) -> list[float]:
        found = [
            float(model.fit(x, y, batch_size=16, verbose=0, shuffle=False).history["loss"][0]) for _ in range(count)
        ]
        for callback in callbacks:
            callback.set_model(model)
            callback.on_epoch_end(0, {"loss": found[-1]})
        return [*found, random.random(), float(np.random.random())]

    model, callbacks = training(dtype=dtype)
    snapshot = begin(model, callbacks)
    epochs(model, callbacks, 2)
    shared, own = snapshot.shared(), snapshot.own()
    expected = epochs(model, callbacks, 2)

    other, fresh = training(dtype=dtype)
    other.fit(x, y, verbose=0)  # builds what is to be given back
    again = begin(other, fresh)
    again.restore(shared, own)
    again.restore_callbacks(own)
    assert fresh[0].best_weights is not None
    assert epochs(other, fresh, 2) == expected
    assert (fresh[0].best, fresh[0].wait, fresh[1].wait) == (callbacks[0].best, callbacks[0].wait, callbacks[1].wait)
    for mine, theirs in zip(other.weights, model.weights, strict=True):
        np.testing.assert_array_equal(np.asarray(mine), np.asarray(theirs))


def test_the_state_of_another_model_is_refused() -> None:
    model, callbacks = training(4)
    model.optimizer.build(model.trainable_variables)
    other, _ = training(5)
    other.optimizer.build(other.trainable_variables)
    kept = Snapshot(model, callbacks)
    with pytest.raises(CorruptDatasetError, match="another model"):
        Snapshot(other, callbacks).restore(kept.shared(), kept.own())


def test_a_state_that_is_spared_stays_and_one_that_does_not_fit_is_passed_over(store: Store) -> None:
    keep(store, 9)
    files = StateFiles(store, "run", 0, 2, keep=1)
    for step in (11, 13, 15):
        for rank in range(2):
            StateFiles(store, "run", rank, 2).write_own(step, {"own": np.zeros(1)})
        files.publish(step, {"shared": np.zeros(1)}, {"note": step}, spared=9)
    assert files.latest() == 15
    assert files.latest(lambda step, info: step % 9 == 0) == 9
    assert files.latest(lambda step, info: info["note"] == 13) is None
    files.clear(but=9)
    assert files.latest() == 9


def rewrite(store: Store, step: int, name: str, data: bytes) -> None:
    """Put something in a file's place, as who can write there would: with a checksum that fits."""
    place(store, step, name).write_bytes(data + _digest(data))


def a_pickle(mark: Path) -> bytes:
    class Bomb:
        def __reduce__(self) -> Any:
            return os.system, (f"touch '{mark}'",)

    return pickle.dumps(Bomb())


def arrays_of_objects(mark: Path) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, own=np.array([0]))
    member = io.BytesIO()
    np.lib.format.write_array_header_1_0(member, {"descr": "|O", "fortran_order": False, "shape": (1,)})
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("own.npy", member.getvalue() + a_pickle(mark))
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["manifest", "shared.npz", "rank-0.npz", "rank-1.npz"])
@pytest.mark.parametrize("make", [a_pickle, arrays_of_objects, lambda _: b"", lambda _: b"[]", lambda _: b"PK\x05\x06"])
def test_nothing_that_was_planted_runs_or_counts(
    store: Store, tmp_path: Path, name: str, make: Callable[[Path], bytes]
) -> None:
    keep(store, 3)
    keep(store, 6)
    rewrite(store, 6, name, make(tmp_path / "mark"))
    files = StateFiles(store, "run", 1, 2)
    with pytest.raises(CorruptDatasetError, match=r"state-000000000006/"):
        StateFiles(store, "run", 0 if name == "rank-0.npz" else 1, 2).load(6)
    assert files.latest() == 3
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"files": ["../../../../outside.npz"]},
        {"files": ["/etc/passwd"]},
        {"files": ["shared.npz", "rank-0.npz/../../x"]},
        {"files": "shared.npz"},
        {"files": [1]},
        {"files": None},
        {"info": []},
        {"version": 99},
        {"step": 7},
    ],
    ids=str,
)
def test_a_manifest_names_files_of_its_own_folder_only(store: Store, change: dict[str, Any]) -> None:
    keep(store, 3)
    keep(store, 6)
    manifest = json.loads(place(store, 6, "manifest").read_bytes()[:-_DIGEST_BYTES])
    rewrite(store, 6, "manifest", json.dumps({**manifest, **change}).encode())
    files = StateFiles(store, "run", 0, 2)
    with pytest.raises(CorruptDatasetError, match=r"manifest"):
        files.load(6)
    assert files.latest() == 3


def test_a_state_that_could_not_be_written_takes_no_place_of_a_whole_one(store: Store) -> None:
    keep(store, 3)
    keep(store, 6)
    StateFiles(store, "run", 1, 2).write_own(9, {"own": np.zeros(1)})
    keep(store, 12)
    place(store, 12, "manifest").unlink()
    assert StateFiles(store, "run", 0, 2).latest() == 6
    keep(store, 15)
    assert sorted(path.name[-2:] for path in place(store, 0, "x").parent.parent.iterdir()) == ["06", "15"]
    StateFiles(store, "run", 0, 2).discard(15)
    assert StateFiles(store, "run", 0, 2).latest() == 6


@pytest.mark.parametrize("what", ["delete", "list"])
def test_a_state_that_is_whole_counts_though_the_old_ones_cannot_be_removed(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    for step in (3, 6):
        keep(store, step)

    def refuse(_self: Store, *parts: str) -> None:
        raise StoreError(f"cannot {what} {parts}", url="")

    with monkeypatch.context() as patch:
        patch.setattr(Store, what, refuse)
        keep(store, 9)
    assert StateFiles(store, "run", 0, 2).latest() == 9
    assert "too many" in caplog.text
    keep(store, 12)
    assert sorted(path.name[-2:] for path in place(store, 0, "x").parent.parent.iterdir()) == ["09", "12"]
