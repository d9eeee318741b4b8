"""The Store: atomic, contained, and clear when it cannot work."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import hadoop
import pytest
from fsspec.implementations.local import LocalFileSystem
from hadoop import FolderAsHdfs, folder_as_hdfs
from hypothesis import given
from hypothesis import strategies as st

from hvdspark.errors import ParamError, StoreError
from hvdspark.store import Store


@pytest.fixture(params=["local", "memory", "hdfs"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    urls = {"local": f"{tmp_path}/store", "memory": f"memory://{tmp_path.name}", "hdfs": f"hdfs://host{tmp_path}/store"}
    with folder_as_hdfs():
        yield Store.create(urls[request.param])


def test_what_is_published_is_read_back(store: Store) -> None:
    store.publish_bytes(b"one", "runs", "a", "model.keras")
    store.publish_bytes(b"two", "runs", "a", "model.keras")
    assert store.read_bytes("runs/a/model.keras") == b"two"
    assert store.list("runs", "a") == ["model.keras"]


def test_a_writer_that_fails_leaves_the_file_of_before_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store.create(tmp_path)
    store.publish_bytes(b"whole", "runs", "model")

    def full_disk(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(StoreError, match="No space left"):
        store.publish_bytes(b"half", "runs", "model")
    assert store.read_bytes("runs", "model") == b"whole"
    assert store.list("runs") == ["model"]


@pytest.mark.parametrize("name", ["..", "a/../b", "/etc/passwd", "", "a//b", "a b", ".hidden", "a\nb"])
def test_no_name_leads_out_of_the_store(store: Store, name: str) -> None:
    with pytest.raises(ParamError, match="no name inside the Store"):
        store.path(name)


def test_an_absent_folder_is_empty_and_deleting_it_is_fine(store: Store) -> None:
    assert store.list("nothing") == []
    store.delete("nothing")
    assert not store.exists("nothing")


def test_delete_takes_a_folder_with_what_is_in_it_but_never_the_store(store: Store) -> None:
    store.publish_bytes(b"x", "runs", "a", "b")
    store.delete("runs")
    assert not store.exists("runs", "a", "b")
    with pytest.raises(ParamError, match="never deleted"):
        store.delete()


def test_a_folder_that_is_not_empty_is_never_removed_as_an_empty_one(store: Store) -> None:
    store.publish_bytes(b"x", "runs", "a", "b")
    store.delete_if_empty("runs", "a")
    store.delete_if_empty("nothing")
    assert store.read_bytes("runs", "a", "b") == b"x"


def test_a_missing_file_is_a_store_error_with_its_address(store: Store) -> None:
    with pytest.raises(StoreError, match="runs/absent") as caught:
        store.read_bytes("runs", "absent")
    assert caught.value.url == store.url_of("runs", "absent")


def test_an_unwritable_store_is_found_out_before_it_is_needed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="not writable"):
        Store.create(tmp_path / "file" / "store").check_writable()
    Store.create(tmp_path / "new").check_writable()
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize(
    ("url", "expected"),
    [("file:///data/x/", "/data/x"), ("/data/x/", "/data/x"), ("memory://data/x/", "memory://data/x")],
)
def test_addresses_are_spelled_one_way(url: str, expected: str) -> None:
    assert Store.create(url).url == expected


def test_an_unknown_scheme_names_the_closest() -> None:
    with pytest.raises(StoreError, match="Did you mean 'memory'"):
        Store.create("memori://data")


def test_a_reference_opens_the_same_store_and_does_not_show_its_options(tmp_path: Path) -> None:
    options: dict[str, Any] = {"auto_mkdir": True}
    store = Store.create(tmp_path, options)
    assert Store.from_ref(store.ref()) == store
    assert "auto_mkdir" not in repr(store.ref()) + repr(store)


@given(st.text(max_size=12) | st.text("./\\~%\0 a\u2024\uff0e\u2215", max_size=8))
def test_a_name_is_refused_or_stays_inside(name: str) -> None:
    store = Store.create("/the/store")
    try:
        path = store.path("runs", name)
    except ParamError:
        return
    assert path == f"/the/store/runs/{name}"
    assert os.path.normpath(path) == path
    assert path.isascii()


def test_a_link_in_the_place_of_a_file_is_not_followed(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "store")
    outside = tmp_path / "outside"
    outside.write_text("of somebody else")
    store.make_folder("runs/a/logs")
    for name in ("rank-0.log", "model"):
        Path(store.path("runs/a/logs", name)).symlink_to(outside)
    with pytest.raises(OSError, match="symbolic links"):
        store.open_file("runs/a/logs/rank-0.log")
    store.publish_bytes(b"mine", "runs/a/logs/model")
    assert outside.read_text() == "of somebody else"
    assert store.read_bytes("runs/a/logs/model") == b"mine"


@pytest.fixture
def _open_umask() -> Iterator[None]:
    before = os.umask(0o002)
    yield
    os.umask(before)


def modes(root: Path) -> set[str]:
    return {f"{'d' if path.is_dir() else 'f'}{path.stat().st_mode & 0o777:o}" for path in (root, *root.rglob("*"))}


def opened_elsewhere(store: Store) -> Store:
    store.make_folder("runs")
    return Store.from_ref(store.ref())


def fill(store: Store) -> None:
    store.publish_bytes(b"x", "runs", "a", "model")
    store.make_folder("runs", "b", "logs")
    with store.open_file("runs", "b", "logs", "rank-0.log") as file:
        file.write(b"line")


@pytest.mark.usefixtures("_open_umask")
def test_what_is_made_in_a_store_is_the_users_alone(tmp_path: Path) -> None:
    fill(opened_elsewhere(Store.create(tmp_path / "new" / "store")))
    assert modes(tmp_path / "new") == {"d700", "f600"}


@pytest.mark.usefixtures("_open_umask")
def test_a_team_may_share_a_store_by_its_umask(tmp_path: Path) -> None:
    fill(opened_elsewhere(Store.create(tmp_path / "store", private=False)))
    assert modes(tmp_path / "store") == {"d775", "f664"}


@pytest.mark.usefixtures("_open_umask")
def test_a_folder_that_was_there_keeps_its_permissions(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir(mode=0o750)
    fill(Store.create(tmp_path / "store"))
    assert (tmp_path / "store").stat().st_mode & 0o777 == 0o750
    assert modes(tmp_path / "store" / "runs") == {"d700", "f600"}


@pytest.mark.parametrize("url", ["s3://key:SECRET@bucket/x", "ftp://me:SECRET@host/x"])
def test_a_password_in_an_address_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ParamError, match="storage_options") as caught:
        Store.create(url)
    assert "SECRET" not in str(caught.value)


def test_an_address_may_name_a_user_or_a_container() -> None:
    assert Store.create("memory://container@account/x:y@z").url == "memory://container@account/x:y@z"


@pytest.mark.parametrize("is_folder_there", [False, True], ids=["moved", "unmounted"])
def test_a_store_that_has_gone_is_neither_made_anew_nor_taken_for_an_empty_one(
    tmp_path: Path, is_folder_there: bool
) -> None:
    folder = tmp_path / "store"
    Store.create(folder).publish_bytes(b"x", "runs", "a")
    found = Store.from_ref(Store.create(folder).ref())
    if is_folder_there:
        found = found.within("runs")
    folder.rename(tmp_path / "aside")
    if is_folder_there:
        folder.mkdir()
    with pytest.raises(StoreError, match="has gone, or its file system is no longer mounted"):
        found.publish_bytes(b"y", "runs", "b")
    with pytest.raises(StoreError, match="has gone, or its file system is no longer mounted"):
        found.list("runs")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["a"]


def test_what_a_killed_writer_left_is_no_file_of_the_store(tmp_path: Path) -> None:
    store = Store.create(tmp_path)
    store.publish_bytes(b"x", "runs", "a.json")
    half = Path(store.path("runs", f"model.keras.{'0' * 32}.part"))
    half.write_bytes(b"half")
    assert store.list("runs") == ["a.json"]


def test_an_error_of_any_kind_of_file_system_is_a_store_error(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.create("memory://store")

    def unreachable(*_: object, **__: object) -> None:
        raise RuntimeError  # as libraries for object stores do, and without a word

    for name in ("makedirs", "pipe_file", "ls", "cat_file", "rm", "info"):
        monkeypatch.setattr(store.filesystem, name, unreachable)
    uses = [
        lambda: store.publish_bytes(b"", "a"),
        lambda: store.list("a"),
        lambda: store.read_bytes("a"),
        lambda: store.delete("a"),
        lambda: store.exists("a"),
        lambda: store.find_bytes("a"),
        lambda: store.read_json("a"),
    ]
    for use in uses:
        with pytest.raises(StoreError, match=r"(?m)^cannot (write|list|read|delete|look for) .*/store/a: RuntimeError"):
            use()


def test_what_is_absent_and_what_makes_no_sense_is_told_from_what_cannot_be_read(store: Store) -> None:
    store.publish_bytes(b'{"a": 1}', "runs/a.json")
    store.publish_bytes(b"{", "runs/torn.json")
    store.publish_bytes(b"[]", "runs/list.json")
    assert store.read_json("runs/a.json") == {"a": 1}
    assert [store.read_json(name) for name in ("runs/torn.json", "runs/list.json", "runs/b.json", "x/b.json")] == [
        None
    ] * 4
    assert (store.find_bytes("runs/torn.json"), store.find_bytes("runs/b.json")) == (b"{", None)
    assert [store.exists(name) for name in ("runs", "runs/a.json", "runs/b.json", "x/b.json", "runs/a.json/x")] == [
        True,
        True,
        False,
        False,
        False,
    ]


def test_a_file_that_the_system_does_not_read_is_not_absent(tmp_path: Path) -> None:
    store = Store.create(tmp_path)
    Path(store.path("a.json")).symlink_to("a.json")
    for look in (store.exists, store.find_bytes, store.read_json):
        with pytest.raises(StoreError, match="symbolic links"):
            look("a.json")


def test_hdfs_that_does_not_answer_holds_what_it_held(tmp_path: Path) -> None:
    with folder_as_hdfs():
        store = Store.create(f"hdfs://host{tmp_path}/store")
        store.publish_bytes(b"{}", "runs/a.json")
        store.filesystem.is_reachable = False
        for look in (store.exists, store.find_bytes, store.read_json):
            with pytest.raises(StoreError, match="no NameNode answers"):
                look("runs/a.json")


def test_a_file_is_not_absent_where_its_store_has_gone(tmp_path: Path) -> None:
    Store.create(tmp_path / "store").publish_bytes(b"x", "runs", "a")
    store = Store.create(tmp_path / "store").within("runs")
    (tmp_path / "store").rename(tmp_path / "aside")
    for look in (store.exists, store.find_bytes, store.read_json):
        with pytest.raises(StoreError, match="has gone, or its file system is no longer mounted"):
            look("runs/a")


def test_a_file_that_another_host_replaced_while_it_was_read_is_read_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store.create(tmp_path)
    store.publish_bytes(b"new", "a")
    read, stale = store.filesystem.cat_file, [OSError(errno.ESTALE, os.strerror(errno.ESTALE))]

    def cat_file(path: str) -> Any:
        if stale:
            raise stale.pop()
        return read(path)

    monkeypatch.setattr(store.filesystem, "cat_file", cat_file)
    assert store.read_bytes("a") == b"new"


class Killed(BaseException):
    """What a process that is killed does not notice."""


class DyingHdfs(FolderAsHdfs):
    """Dies before one of the steps that change something."""

    steps_left = 10**9

    def step(self) -> None:
        type(self).steps_left -= 1
        if self.steps_left < 0:
            raise Killed

    def rename(self, path1: str, path2: str) -> None:
        self.step()
        super().rename(path1, path2)

    def rm_file(self, path: str) -> None:
        self.step()
        super().rm_file(path)


@pytest.mark.parametrize("step", range(6))
@pytest.mark.parametrize("again", [None, 0, 1, 2, 3, 4])
def test_a_writer_that_dies_at_any_step_loses_no_file(tmp_path: Path, step: int, again: int | None) -> None:
    with folder_as_hdfs(DyingHdfs):
        store = Store.create(f"hdfs://host{tmp_path}/store")
        DyingHdfs.steps_left = 10**9
        store.publish_bytes(b"1", "aliases/champion.json")
        store.publish_bytes(b"22", "aliases/champion.json")
        found, written = b"22", b"22"
        for content, left in ((b"333", step), (b"4444", again)):
            if left is None:
                continue
            DyingHdfs.steps_left = left
            try:
                store.publish_bytes(content, "aliases/champion.json")
                written = content
            except Killed:
                pass
            DyingHdfs.steps_left = 10**9
            before, found = found, store.read_bytes("aliases/champion.json")
            assert found in {before, written, content}
            assert store.exists("aliases/champion.json")
            assert store.find_bytes("aliases/champion.json") == found
            assert store.list("aliases") == ["champion.json"]
            assert store.sizes("aliases")["champion.json"] == len(found)
            if written == content:
                assert found == content
        store.publish_bytes(b"last", "aliases/champion.json")
        assert store.read_bytes("aliases/champion.json") == b"last"
        assert store.list("aliases") == ["champion.json"]
        store.delete("aliases/champion.json")
        assert store.find_bytes("aliases/champion.json") is None


REPLACING = """
import itertools, sys
from hadoop import folder_as_hdfs
from hvdspark import Store
with folder_as_hdfs():
    store = Store.create(sys.argv[1])
    for number in itertools.takewhile(lambda _: not store.exists("enough"), itertools.count()):
        store.publish_bytes(str(number).encode(), "runs/a/leases/driver.json")
"""


@contextlib.contextmanager
def replacing(store: Store, writers: int) -> Iterator[Callable[[], bool]]:
    """Have processes replace one file again and again; gives a function that says whether they are at it."""
    environment = {**os.environ, "PYTHONPATH": str(Path(hadoop.__file__).parent)}
    processes = [
        subprocess.Popen([sys.executable, "-c", REPLACING, store.url], env=environment) for _ in range(writers)
    ]
    try:
        yield lambda: all(process.poll() is None for process in processes)
        store.publish_bytes(b"", "enough")
        assert [process.wait(60) for process in processes] == [0] * writers
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.parametrize("writers", [1, 2])
def test_a_file_is_there_at_every_moment_while_processes_replace_it(tmp_path: Path, writers: int) -> None:
    with folder_as_hdfs():
        store = Store.create(f"hdfs://host{tmp_path}/store")
        store.publish_bytes(b"first", "runs/a/leases/driver.json")
        seen = set[bytes | None]()
        with replacing(store, writers) as are_at_it:
            while len(seen) < 100 and are_at_it():
                seen.add(store.find_bytes("runs/a/leases/driver.json"))
                assert store.list("runs/a/leases") == ["driver.json"]
                assert store.exists("runs/a/leases/driver.json")
        assert None not in seen
        assert len(seen) == 100


def test_what_one_that_died_at_replacing_left_goes_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with folder_as_hdfs():
        store = Store.create(f"hdfs://host{tmp_path}/store")
        store.publish_bytes(b"old", "runs/a.json")
        left = Path(store.path(f"runs/a.json.{'1' * 20}-0123abcd.part"))
        left.write_bytes(b"never told to be there")
        store.publish_bytes(b"new", "runs/a.json")
        assert (store.read_bytes("runs/a.json"), store.list("runs")) == (b"new", ["a.json"])
        assert left.exists()
        monkeypatch.setattr("hvdspark.store._STALE_NS", 0)
        left.rename(left.with_name(f"a.json.{'0' * 20}-0123abcd.part"))
        store.publish_bytes(b"newer", "runs/a.json")
        assert store.filesystem.names(store.path("runs")) == {"a.json"}


class ListingS3(LocalFileSystem):
    """Keeps listings as s3fs does, on folders of this machine."""

    protocol = "s3"

    def ls(self, path: str, detail: bool = False, **kwargs: Any) -> Any:
        if path not in self.dircache:
            found = super().ls(path, detail=True, **kwargs)
            self.dircache[path] = found
        else:
            found = self.dircache[path]
        return found if detail else [entry["name"] for entry in found]

    def info(self, path: Any, **kwargs: Any) -> Any:
        if isinstance(path, str) and self._ls_from_cache(path) is not None:
            return next(entry for entry in self._ls_from_cache(path) if entry["name"] == path)
        return super().info(path, **kwargs)


def test_what_another_process_wrote_is_seen(tmp_path: Path) -> None:
    with mock.patch.dict("fsspec.registry._registry", {"s3": ListingS3}):
        store = Store.create(f"s3://{tmp_path}")
        (tmp_path / "runs").mkdir()
        assert store.list("runs") == []
        assert not store.exists("runs", "a")
        (tmp_path / "runs" / "a").write_bytes(b"x")
        assert store.list("runs") == ["a"]
        assert store.sizes("runs") == {"a": 1}
        assert store.exists("runs", "a")
        (tmp_path / "runs" / "a").unlink()
        assert (store.list("runs"), store.exists("runs", "a")) == ([], False)
        # Nothing of this is said to others who use the same file system, and an option that was given counts.
        assert store.ref().storage_options == {}
        assert Store.create(f"s3://{tmp_path}", {"use_listings_cache": True}).filesystem.dircache.use_listings_cache
