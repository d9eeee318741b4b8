"""The build of the Horovod wheel: corrections, cache key, and the wheel that came of it."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import build_cache
import build_horovod
import horovod_recipe
import openmpi_env
import pytest
from build_cache import BuildTools, Cache, CudaToolkit
from horovod_recipe import CHANGES, GPU_CHANGES, MPIS, BuildError, Change, Environment, Ingredients, changes_for
from packaging.version import Version

INGREDIENTS = Ingredients(
    horovod="0.28.1",
    sdist_sha256="0" * 64,
    tensorflow="tensorflow-cpu 2.21.0",
    mpich="5.0.2",
    abi="cpython-311-x86_64-linux-gnu",
    machine="x86_64 glibc 2.36",
    compiler="c++ (Debian 12.2.0) 12.2.0",
    tools_sha256="1" * 64,
    flags={"HOROVOD_WITH_MPI": "1"},
    runpath=("$ORIGIN",),
    changes=[("file.cc", "old", "new")],
)
OTHER = {
    "flags": {"HOROVOD_WITH_MPI": "0"},
    "runpath": ("$ORIGIN/..",),
    "changes": [("file.cc", "old", "newer")],
}


@pytest.fixture(scope="module")
def sdist() -> Path:
    """The source archive that the wheel of this environment was built from."""
    path = Cache.default().sdist
    assert path.exists(), f"{path} is missing; ci/setup puts it there when it builds Horovod"
    return path


@pytest.fixture(scope="module")
def wheel() -> Path:
    """The wheel of this environment."""
    environment = Environment.inspect(Path(sys.prefix))
    wheel = Cache.default().wheel(Ingredients.gather(environment).key())
    assert wheel, "no wheel in the cache belongs to this environment; run ci/setup"
    return wheel


@pytest.fixture
def unusable_tools(tmp_path: Path) -> BuildTools:
    """Build tools that fail when they are used."""
    return BuildTools(tmp_path / "no-tools")


@pytest.mark.parametrize("change", [*CHANGES, *GPU_CHANGES], ids=lambda change: change.file)
def test_each_change_applies_to_the_pristine_source(change: Change, sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        member = archive.extractfile(f"horovod-{horovod_recipe.VERSION}/{change.file}")
        assert member is not None
        pristine = member.read().decode()

    mended = change.apply(pristine)

    assert mended != pristine
    assert mended.replace(change.new, change.old, 1) == pristine if change.new else len(mended) < len(pristine)


@pytest.mark.parametrize("gpu", [False, True])
def test_the_unpacked_source_holds_every_change(sdist: Path, tmp_path: Path, gpu: bool) -> None:
    source = build_horovod.unpack(sdist, tmp_path, changes_for(gpu=gpu))

    for change in changes_for(gpu=gpu):
        text = (source / change.file).read_text()
        assert change.new in text
        with pytest.raises(BuildError, match="found it 0 times"):
            change.apply(text)


@pytest.mark.parametrize(("text", "times"), [("something else", 0), ("reserve(n); reserve(n);", 2)])
def test_a_source_that_differs_is_refused_by_name(text: str, times: int) -> None:
    change = Change(file="horovod/common/x.cc", old="reserve(n);", new="resize(n);", why="")

    with pytest.raises(BuildError, match=rf"horovod/common/x\.cc: expected .* once, found it {times} times"):
        change.apply(text)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Ingredients)])
def test_the_key_changes_with_each_ingredient(field: str) -> None:
    other = dataclasses.replace(INGREDIENTS, **{field: OTHER.get(field, "something else")})

    assert other.key() != INGREDIENTS.key()


def test_equal_ingredients_share_a_key() -> None:
    assert dataclasses.replace(INGREDIENTS, flags=dict(INGREDIENTS.flags)).key() == INGREDIENTS.key()


def test_the_local_version_is_in_normal_form() -> None:
    version = f"{horovod_recipe.VERSION}+{INGREDIENTS.local_version()}"

    assert str(Version(version)) == version
    assert "tf2.21.0" in version


def test_the_library_finds_others_by_relative_paths_only(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".so")]
        libraries = [Path(archive.extract(name, tmp_path)) for name in names]

    assert len(libraries) == 1
    dynamic = subprocess.run(["readelf", "-d", *libraries], capture_output=True, text=True, check=True).stdout
    (runpath,) = [line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "PATH)" in line]
    assert all(entry.startswith("$ORIGIN/") for entry in runpath.split(":"))


def test_the_library_names_no_folder_of_this_machine(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".so")]
        content = archive.read(name)

    for folder in (sys.prefix, Cache.default().root):
        assert str(folder).encode() not in content


def test_an_archive_with_another_digest_is_refused(sdist: Path, tmp_path: Path, unusable_tools: BuildTools) -> None:
    cache = Cache(tmp_path)
    cache.sdist.parent.mkdir()
    shutil.copy(sdist, cache.sdist)
    with cache.sdist.open("ab") as archive:
        archive.write(b"\0")

    with pytest.raises(BuildError, match=r"not the expected source of Horovod .* SHA-256"):
        build_horovod.fetch_sdist(cache, unusable_tools)


@pytest.mark.parametrize("last_words", ["x.cc:1: fatal error: x.h", "CMake Error at CMakeLists.txt:1:", "Killed"])
def test_a_failed_compilation_shows_the_telling_part_of_its_log(last_words: str, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nfor i in $(seq 100); do echo line $i; done\necho '{last_words}'\nexit 1\n")
    python.chmod(0o755)
    environment = Environment(str(python), tensorflow="tensorflow-cpu 2.21.0", mpich="5.0.2", abi="cpython-311")
    log = tmp_path / "logs" / "horovod.log"

    with pytest.raises(BuildError) as failure:
        build_horovod.compile_wheel(environment, tmp_path / "source", {"MAKEFLAGS": "-j1"}, log)

    assert str(log) in str(failure.value)
    assert last_words in str(failure.value)
    assert "line 1\n" not in str(failure.value)
    assert "line 1\n" in log.read_text()


def test_a_wheel_is_in_the_cache_only_when_it_is_complete(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    wheel = tmp_path / "horovod.whl"
    missing = tmp_path / "missing.whl"
    wheel.touch()

    with pytest.raises(FileNotFoundError):
        build_horovod.publish(missing, INGREDIENTS, cache)
    assert cache.wheel(INGREDIENTS.key()) is None

    published = build_horovod.publish(wheel, INGREDIENTS, cache)
    assert cache.wheel(INGREDIENTS.key()) == published
    assert (published.parent / "ingredients.json").read_text().strip() == INGREDIENTS.to_json()


def test_a_second_build_waits_for_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path)
    order: list[str] = []
    told_to_wait = threading.Event()
    monkeypatch.setattr(build_cache, "say", lambda message: told_to_wait.set())

    def second() -> None:
        with cache.locked("wheel"):
            order.append("second")

    thread = threading.Thread(target=second)
    with cache.locked("wheel"):
        thread.start()
        assert told_to_wait.wait(timeout=30)
        order.append("first")
    thread.join()

    assert order == ["first", "second"]


ENVIRONMENT = Environment("/env/bin/python", "tensorflow 2.21.0", "5.0.2", "cpython-311", "/env/lib", nccl="2.32.3")


def test_a_wheel_without_nccl_does_not_depend_on_the_nccl_that_is_there() -> None:
    assert Ingredients.gather(ENVIRONMENT) == Ingredients.gather(dataclasses.replace(ENVIRONMENT, nccl=""))


def test_a_wheel_with_nccl_is_made_of_more_and_says_so() -> None:
    without, with_nccl = Ingredients.gather(ENVIRONMENT), Ingredients.gather(ENVIRONMENT, "13.0.88")

    assert without.flags.items() < with_nccl.flags.items()
    assert with_nccl.flags["HOROVOD_GPU_OPERATIONS"] == "NCCL"
    assert set(without.changes) < set(with_nccl.changes)
    assert set(with_nccl.runpath) - set(without.runpath) == {"$ORIGIN/../../nvidia/nccl/lib"}
    assert (with_nccl.nccl, with_nccl.cuda) == ("2.32.3", "13.0.88")
    assert ".nccl." in with_nccl.local_version()
    assert ".nccl." not in without.local_version()


def test_a_wheel_for_open_mpi_is_another_and_says_so() -> None:
    for_mpich = Ingredients.gather(ENVIRONMENT)
    for_openmpi = Ingredients.gather(dataclasses.replace(ENVIRONMENT, mpich="", openmpi="5.0.11"))

    assert for_openmpi.key() != for_mpich.key()
    assert ".openmpi." in for_openmpi.local_version()
    assert ".openmpi." not in for_mpich.local_version()
    assert '"mpich"' not in for_openmpi.to_json()


def test_an_environment_without_open_mpi_is_no_base_for_a_wheel_for_it() -> None:
    with pytest.raises(BuildError, match="has no openmpi"):
        Environment.inspect(Path(sys.prefix), mpi="openmpi")


@pytest.mark.parametrize("mpi", MPIS)
def test_where_the_compilers_wrapper_may_be_of_either_mpi_nothing_is_compiled(tmp_path: Path, mpi: str) -> None:
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    found = {"tensorflow": "tensorflow 2.21.0", "abi": "cpython-311", "mpich": "5.0.2", "openmpi": "5.0.11"}
    python.write_text(f"#!/bin/sh\necho '{json.dumps(found)}'\n")
    python.chmod(0o755)

    with pytest.raises(BuildError, match=f"beside {mpi}"):
        Environment.inspect(tmp_path, mpi=mpi)


def test_the_environment_for_open_mpi_has_the_locked_packages_and_one_mpi() -> None:
    def packages(text: str) -> set[str]:
        return {line for line in text.splitlines() if line[:1].isalnum()}

    locked, ours = packages(openmpi_env.LOCK.read_text()), packages(openmpi_env.requirements())

    assert {line.partition("==")[0] for line in locked - ours} == {"mpich"}
    assert {line.partition("==")[0] for line in ours - locked} == {"openmpi"}


def test_an_environment_without_gpus_is_no_base_for_a_wheel_with_nccl() -> None:
    with pytest.raises(BuildError, match=r"tensorflow-cpu .* NCCL not at all: .* tensorflow\[and-cuda\]"):
        Environment.inspect(Path(sys.prefix), gpu=True)


def test_the_build_is_led_to_the_compiler_of_its_toolkit_and_to_nccl(tmp_path: Path) -> None:
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.9, V12.9.86'\n")
    nvcc.chmod(0o755)
    nccl = tmp_path / "packages" / "nvidia" / "nccl" / "lib" / "libnccl.so.2"
    nccl.parent.mkdir(parents=True)
    nccl.touch()
    toolkit = CudaToolkit.at(tmp_path / "cuda")
    environment = dataclasses.replace(ENVIRONMENT, site_packages=str(tmp_path / "packages"))

    variables = toolkit.variables(environment, tmp_path / "link")

    assert toolkit.version == "12.9.86"
    assert variables["CUDACXX"] == str(nvcc)
    assert Path(variables["HOROVOD_NCCL_LIB"], "libnccl.so").samefile(nccl)


@pytest.mark.parametrize("script", [None, "#!/bin/sh\necho something else\n", "#!/bin/sh\nexit 1\n"])
def test_a_folder_without_a_compiler_is_refused_by_name(tmp_path: Path, script: str | None) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    if script is not None:
        nvcc.parent.mkdir()
        nvcc.write_text(script)
        nvcc.chmod(0o755)

    with pytest.raises(BuildError, match=str(nvcc)):
        CudaToolkit.at(tmp_path)
