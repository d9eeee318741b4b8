"""Datasets that are found again, shared and removed, and the leases that keep them."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import pytest

from hvdspark import Store, lease, shelf
from hvdspark.errors import StoreError
from hvdspark.shelf import Removed, dataset_of

KEY = "a1b2"
FOLDER = f"datasets/{KEY}"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.create(tmp_path / "store")


def writer(store: Store, text: str = "rows", calls: list[str] | None = None) -> Callable[[str], None]:
    def write(dataset: str) -> None:
        if calls is not None:
            calls.append(dataset)
        store.publish_bytes(text.encode(), dataset, "rows")

    return write


def fail(_dataset: str) -> None:
    pytest.fail("there is a dataset already")


def keep(store: Store, key: str, size: int, used: float) -> None:
    """Leave a dataset that was last used some seconds ago."""
    with dataset_of(store, key, writer(store, "x" * size)):
        pass
    entry = store.read_json("datasets", key, "entry.json") or {}
    store.publish_bytes(json.dumps({**entry, "size_bytes": size}).encode(), "datasets", key, "entry.json")
    store.publish_bytes(json.dumps({"time": time.time() - used}).encode(), "datasets", key, "used.json")


def test_a_second_fit_finds_what_the_first_one_wrote(store: Store) -> None:
    with dataset_of(store, KEY, writer(store)) as first:
        assert store.read_bytes(first, "rows") == b"rows"
    with dataset_of(store, KEY, fail) as second:
        assert second == first
    assert lease.is_held(store, FOLDER) is False


def test_a_dataset_that_is_not_kept_leaves_nothing(store: Store) -> None:
    with dataset_of(store, KEY, writer(store), keep=False) as dataset:
        assert store.exists(dataset)
    assert store.list("datasets") == []


def test_a_writing_that_fails_is_never_found(store: Store) -> None:
    def write(dataset: str) -> None:
        store.publish_bytes(b"half", dataset, "rows")
        store.delete(dataset)
        raise ValueError("no more rows")

    with pytest.raises(ValueError, match="no more rows"), dataset_of(store, KEY, write):
        pass
    assert store.list("datasets") == []
    with dataset_of(store, KEY, writer(store)) as dataset:
        assert store.read_bytes(dataset, "rows") == b"rows"


def test_threads_that_want_one_dataset_share_one_writing(store: Store) -> None:
    calls: list[str] = []
    found: list[str] = []
    together = threading.Barrier(4)

    def fit() -> None:
        together.wait()
        with dataset_of(store, KEY, writer(store, calls=calls)) as dataset:
            found.append(dataset)

    threads = [threading.Thread(target=fit) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert set(found) == set(calls)


PROGRAM = """
import sys
from hvdspark import Store
from hvdspark.shelf import dataset_of
store = Store.create(sys.argv[1])
def write(dataset):
    store.publish_bytes(b"theirs", dataset, "rows")
    print("writing", flush=True)
    sys.stdin.readline()
with dataset_of(store, sys.argv[2], write) as dataset:
    print("reading", flush=True)
    sys.stdin.readline()
"""


class OtherProcess:
    """A process that writes the dataset, and reads it, each until it is told to go on."""

    def __init__(self, store: Store, within: Sequence[str] = ()) -> None:
        command = [*within, sys.executable, "-c", PROGRAM, store.url, KEY]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.says = self.process.stdout.readline

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def __enter__(self) -> OtherProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def test_a_process_waits_for_another_that_writes_the_same(store: Store) -> None:
    waited = []
    with OtherProcess(store) as other:
        assert other.says() == "writing\n"

        def sleep(_seconds: float) -> None:
            waited.append(True)
            other.go_on()
            assert other.says() == "reading\n"

        with mock.patch.object(shelf.time, "sleep", sleep), dataset_of(store, KEY, fail) as dataset:
            assert store.read_bytes(dataset, "rows") == b"theirs"
    assert waited == [True]


AT_ONCE = """
import sys, time
from pathlib import Path
from hvdspark import Store
from hvdspark.shelf import dataset_of
store, marks, own, other = Store.create(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4]
for number in range(int(sys.argv[5])):
    def write(dataset):
        (marks / f"{number}-written-by-{own}").touch()
        time.sleep(0.02)
        store.publish_bytes(b"rows", dataset, "rows")
    (marks / f"{number}-{own}").touch()
    while not (marks / f"{number}-{other}").exists():
        pass
    with dataset_of(store, f"key-{number}", write) as dataset:
        assert store.read_bytes(dataset, "rows") == b"rows"
"""


def test_processes_that_begin_at_once_share_one_writing(store: Store, tmp_path: Path) -> None:
    rounds = 25
    arguments = [sys.executable, "-c", AT_ONCE, store.url, str(tmp_path)]
    both = [subprocess.Popen([*arguments, own, other, str(rounds)]) for own, other in (("a", "b"), ("b", "a"))]
    try:
        assert [process.wait(240) for process in both] == [0, 0]
    finally:
        for process in both:
            process.kill()
            process.wait()
    assert len(list(tmp_path.glob("*-written-by-*"))) == rounds
    for number in range(rounds):
        assert len(store.list("datasets", f"key-{number}")) == 3, "one attempt, its entry, and when it was used"


def attempts(store: Store) -> list[str]:
    return [name for name in store.list(FOLDER) if re.fullmatch(r"[0-9a-f]{12}", name)]


def test_what_a_killed_writer_left_goes_when_another_one_is_through(store: Store) -> None:
    with OtherProcess(store) as other:
        assert other.says() == "writing\n"
        os.kill(other.process.pid, signal.SIGKILL)
        other.process.wait()
    store.publish_bytes(b"half", FOLDER, "0123456789ab", "rows")
    with dataset_of(store, KEY, writer(store)) as dataset:
        assert attempts(store) == [dataset.rpartition("/")[2]]


def test_a_damaged_dataset_goes_when_nobody_reads_it_any_more(store: Store) -> None:
    with dataset_of(store, KEY, writer(store)) as old, OtherProcess(store) as other:
        assert other.says() == "reading\n"
        Path(store.path(old, "rows")).write_text("row")
        with dataset_of(store, KEY, writer(store)) as new:
            assert sorted(attempts(store)) == sorted(name.rpartition("/")[2] for name in (old, new))
        assert store.gc(max_bytes=0) == []
    size_bytes = shelf._size_bytes(store, new)
    assert store.gc(max_bytes=size_bytes, dry_run=True) == [Removed(old, 0, "unfinished")]
    assert store.exists(old)
    assert store.gc(max_bytes=size_bytes) == [Removed(old, 0, "unfinished")]
    assert attempts(store) == [new.rpartition("/")[2]]
    with dataset_of(store, KEY, fail) as found:
        assert found == new


def test_an_old_attempt_that_is_in_use_counts_for_the_limit(store: Store) -> None:
    keep(store, "a", 100, 300.0)
    with dataset_of(store, KEY, writer(store, "x" * 60)) as dataset:
        assert store.gc(max_bytes=200, dry_run=True) == []
        store.publish_bytes(b"x" * 60, FOLDER, "0123456789ab", "rows")
        assert store.gc(max_bytes=200, dry_run=True) == [Removed("datasets/a", 100, "size")]
        assert store.exists(dataset)


def test_a_writer_that_was_killed_is_not_waited_for_and_its_files_are_not_taken(store: Store) -> None:
    with OtherProcess(store) as other:
        assert other.says() == "writing\n"
        os.kill(other.process.pid, signal.SIGKILL)
        other.process.wait()
        with dataset_of(store, KEY, writer(store, "ours")) as dataset:
            assert store.read_bytes(dataset, "rows") == b"ours"


def test_what_a_killed_writer_left_is_removed(store: Store) -> None:
    with OtherProcess(store) as other:
        assert other.says() == "writing\n"
        assert store.gc(max_bytes=0) == []
        os.kill(other.process.pid, signal.SIGKILL)
        other.process.wait()
    assert store.gc() == [Removed(FOLDER, 0, "unfinished")]
    assert store.list("datasets") == []


def test_a_lease_of_another_host_counts_until_it_is_stale(store: Store) -> None:
    def leave(age_s: float) -> None:
        holder = {"time": time.time() - age_s, "host": "elsewhere", "space": "x", "pid": 1, "started": 0}
        store.publish_bytes(json.dumps(holder).encode(), FOLDER, "leases", "writer-1.json")

    leave(lease.STALE_S - 30)
    assert lease.is_held(store, FOLDER, "writer")
    assert not lease.is_held(store, FOLDER, "reader")
    leave(lease.STALE_S + 1)
    assert not lease.is_held(store, FOLDER, "writer")


# What a lease of another host or container says, where that has the same name and a process of the same number.
@pytest.mark.parametrize("space", ["another boot", "another space of numbers", None])
def test_a_process_is_looked_for_only_where_its_number_means_it(store: Store, space: str | None) -> None:
    with lease.held(store, FOLDER, "reader") as name:
        own = store.read_json(name) or {}
    boot = str(own["space"]).split()[1]
    assert Path("/proc/sys/kernel/random/boot_id").read_text().strip() == boot
    gone = subprocess.Popen(["true"])
    gone.wait()
    spaces = {
        "another boot": own["space"].replace(boot, str(uuid.uuid4())),
        "another space of numbers": own["space"] + "1",
    }
    for pid in (gone.pid, os.getpid(), 1):
        holder = {**own, "pid": pid, "started": 1, "space": spaces.get(str(space))}
        store.publish_bytes(json.dumps(holder).encode(), FOLDER, "leases", "reader-1.json")
        assert lease.is_held(store, FOLDER), "it is nobody's to say here that its holder is dead"
        store.publish_bytes(json.dumps({**holder, "space": own["space"]}).encode(), FOLDER, "leases", "reader-1.json")
        assert not lease.is_held(store, FOLDER)


def test_a_lease_of_a_container_with_the_name_of_its_host_is_seen(store: Store) -> None:
    inside = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if subprocess.run([*inside, "true"], capture_output=True).returncode:
        pytest.skip("cannot make a space of process numbers")
    with OtherProcess(store, inside) as other:
        assert other.says() == "writing\n"
        found = store.read_json(FOLDER, "leases", store.list(FOLDER, "leases")[0]) or {}
        assert (found["host"], found["pid"]) == (socket.gethostname(), 1)
        assert lease.is_held(store, FOLDER, "writer")
        # And the other way round: in there nobody knows the processes out here.
        looking = "import sys; from hvdspark import Store, lease; print(lease.is_held(Store.create(sys.argv[1]), 'x'))"
        with lease.held(store, "x", "reader"):
            command = [*inside, sys.executable, "-c", looking, store.url]
            assert subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout == "True\n"


@pytest.mark.parametrize("is_own", [False, True], ids=["gone", "another process has its number"])
def test_a_holder_that_died_here_is_not_waited_for(store: Store, is_own: bool) -> None:
    with OtherProcess(store) as other:
        assert other.says() == "writing\n"
        (name,) = (name for name in store.list(FOLDER, "leases") if name.startswith("writer"))
        assert lease.is_held(store, FOLDER, "writer")
        if is_own:
            found = store.read_json(FOLDER, "leases", name) or {}
            changed = {**found, "started": found["started"] - 1}
            store.publish_bytes(json.dumps(changed).encode(), FOLDER, "leases", name)
        else:
            os.kill(other.process.pid, signal.SIGKILL)
            other.process.wait()
        assert not lease.is_held(store, FOLDER, "writer")


def test_a_lease_is_renewed_while_it_is_held(store: Store) -> None:
    written = threading.Event()
    publish = Store.publish_bytes

    def count(self: Store, data: bytes, *parts: str) -> None:
        publish(self, data, *parts)
        if threading.current_thread() is not threading.main_thread():
            written.set()

    with (
        mock.patch.object(lease, "RENEWAL_S", 0.01),
        mock.patch.object(Store, "publish_bytes", count),
        lease.held(store, FOLDER, "reader"),
    ):
        assert written.wait(30)
        assert lease.is_held(store, FOLDER)
    assert store.list(FOLDER) == []


def test_datasets_go_by_age_and_then_the_least_recently_used(store: Store) -> None:
    for key, size, used in (("old", 10, 9000.0), ("a", 100, 300.0), ("b", 100, 200.0), ("c", 100, 100.0)):
        keep(store, key, size, used)
    expected = [Removed("datasets/a", 100, "size"), Removed("datasets/old", 10, "age")]
    assert store.gc(max_bytes=250, max_age_s=3600, dry_run=True) == expected
    assert store.list("datasets") == ["a", "b", "c", "old"]
    assert store.gc(max_bytes=250, max_age_s=3600) == expected
    assert store.list("datasets") == ["b", "c"]


def test_a_dataset_that_is_used_stays_whatever_the_limits(store: Store) -> None:
    with dataset_of(store, KEY, writer(store)) as dataset:
        assert store.gc(max_bytes=0, max_age_s=0) == []
        assert store.exists(dataset)
    assert [removed.folder for removed in store.gc(max_bytes=0)] == [FOLDER]


def test_a_fit_that_begins_while_its_dataset_is_being_removed_keeps_it(store: Store) -> None:
    with dataset_of(store, KEY, writer(store)):
        pass
    delete = store.delete

    def begin(*parts: str) -> None:
        with mock.patch.object(store, "delete", delete):
            entered.enter_context(dataset_of(store, KEY, fail))
        delete(*parts)

    import contextlib

    with contextlib.ExitStack() as entered:
        with mock.patch.object(store, "delete", begin):
            assert store.gc(max_bytes=0) == []
        with dataset_of(store, KEY, fail) as dataset:
            assert store.read_bytes(dataset, "rows") == b"rows"


def test_the_limits_of_the_store_are_those_it_was_made_with(tmp_path: Path) -> None:
    store = Store.create(tmp_path, max_dataset_bytes=50)
    keep(store, "a", 100, 0)
    assert [removed.reason for removed in store.gc(dry_run=True)] == ["size"]
    assert store.gc(max_bytes=200, dry_run=True) == []
    assert [removed.reason for removed in Store.create(tmp_path, max_dataset_age_s=-1).gc(dry_run=True)] == ["age"]


@pytest.mark.parametrize("damage", ["truncated", "removed", "grown"])
def test_a_dataset_that_was_changed_is_written_anew(store: Store, damage: str) -> None:
    calls: list[str] = []
    with dataset_of(store, KEY, writer(store, calls=calls)) as first:
        pass
    rows = Path(store.path(first, "rows"))
    if damage == "removed":
        rows.unlink()
    else:
        rows.write_text("row" if damage == "truncated" else "rows and rows")
    with dataset_of(store, KEY, writer(store, calls=calls)) as second:
        assert store.read_bytes(second, "rows") == b"rows"
    assert len(calls) == 2
    with dataset_of(store, KEY, fail) as third:
        assert third == second


@pytest.mark.parametrize(
    "entry",
    [
        {"attempt": "../../../outside", "size_bytes": 4, "written": 1.0},
        {"attempt": "/etc", "size_bytes": 4, "written": 1.0},
        {"attempt": None, "size_bytes": 4, "written": 1.0},
        {"attempt": "0123456789ab", "size_bytes": "4"},
        {},
    ],
    ids=str,
)
def test_an_entry_that_makes_no_sense_is_none(store: Store, entry: dict[str, object]) -> None:
    store.publish_bytes(json.dumps(entry).encode(), FOLDER, "entry.json")
    assert [item.reason for item in store.gc(dry_run=True)] == ["unfinished"]
    with dataset_of(store, KEY, writer(store)) as dataset:
        assert store.read_bytes(dataset, "rows") == b"rows"


def test_a_lease_that_makes_no_sense_holds_nothing(store: Store) -> None:
    for number, content in enumerate(
        [b"{}", b'{"time": "now", "host": 1}', b"\x80\x04.", b'{"time": 9e99, "host": "x"}']
    ):
        store.publish_bytes(content, FOLDER, "leases", f"reader-{number}.json")
    assert not lease.is_held(store, FOLDER)


def test_a_lease_that_has_ended_is_held_no_longer_though_its_file_could_not_be_removed(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("out of reach")

    with lease.held(store, FOLDER, "reader"):
        assert lease.is_held(store, FOLDER)
        monkeypatch.setattr(store.filesystem, "rm", unreachable)
    assert store.list(FOLDER, "leases")
    assert not lease.is_held(store, FOLDER)


def test_a_lease_or_an_entry_that_cannot_be_read_keeps_the_dataset(store: Store) -> None:
    with dataset_of(store, KEY, writer(store)) as dataset:
        pass
    for name in (f"{FOLDER}/leases/reader-000000000000.json", f"{FOLDER}/entry.json"):
        place = Path(store.path(name))
        place.parent.mkdir(exist_ok=True)
        place.unlink(missing_ok=True)
        place.symlink_to(place.name)  # reading it is an error, and none that it is absent
        with pytest.raises(StoreError, match="symbolic links"):
            store.gc(max_bytes=0, max_age_s=0)
        assert store.exists(dataset)
        place.unlink()
