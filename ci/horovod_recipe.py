"""What a Horovod wheel is made of: the source and its corrections, the build flags, the environment."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

VERSION = "0.28.1"
SDIST_SHA256 = "92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0"
BUILD_TOOLS_LOCK = Path(__file__).with_name("build-tools.lock")

# Seen from site-packages/horovod/tensorflow/: TensorFlow's libraries are two folders up and across, MPICH's
# wheel keeps libmpi.so.12 in the environment's own lib folder. No absolute path, so the wheel works in any
# environment, also in one that was packed and unpacked elsewhere.
RUNPATH = ("$ORIGIN/../../tensorflow", "$ORIGIN/../../../..")

# The build variables of each kind of wheel.
FLAGS = {
    "cpu": {
        "HOROVOD_WITH_TENSORFLOW": "1",
        "HOROVOD_WITHOUT_PYTORCH": "1",
        "HOROVOD_WITHOUT_MXNET": "1",
        "HOROVOD_WITH_GLOO": "1",
        "HOROVOD_WITH_MPI": "1",
        # Horovod's CMake files predate CMake 4, which otherwise refuses them.
        "CMAKE_POLICY_VERSION_MINIMUM": "3.5",
        # 54 MB of library become 2 MB.
        "LDFLAGS": "-Wl,--strip-debug",
    },
}
# By default Horovod takes what the building machine has; a wheel for a cluster must not depend on that.
ARCH_FLAGS = {"x86_64": {"HOROVOD_BUILD_ARCH_FLAGS": "-mf16c -mavx -mfma"}}


class BuildError(Exception):
    """The wheel could not be built; the message says why and what to do."""


@dataclass(frozen=True)
class Change:
    """One correction of Horovod's source.

    Parameters
    ----------
    file : str
        Path inside the source archive.
    old : str
        Text to replace; occurs exactly once.
    new : str
        Its replacement.
    why : str
        What goes wrong without it.
    """

    file: str
    old: str
    new: str
    why: str

    def apply(self, text: str) -> str:
        """Return `text` with the correction; raise `BuildError` unless `old` occurs in it exactly once."""
        found = text.count(self.old)
        if found != 1:
            raise BuildError(
                f"{self.file}: expected the following text once, found it {found} times; these corrections "
                f"are for Horovod {VERSION} only:\n{self.old}"
            )
        return text.replace(self.old, self.new)


CHANGES = (
    Change(
        file="horovod/tensorflow/CMakeLists.txt",
        old='list(APPEND TF_SOURCES "${PROJECT_SOURCE_DIR}/horovod/tensorflow/xla_mpi_ops.cc")\n',
        new="",
        why="TensorFlow no longer ships the headers this file includes. Without it XLA cannot compile "
        "collectives; they run as ordinary operations, which is Horovod's default anyway.",
    ),
    Change(
        file="horovod/common/gloo/gloo_controller.cc",
        old="  global_ranks_.reserve(size_);\n",
        new="  global_ranks_.resize(size_);\n",
        why="reserve() leaves the vector empty. The stall check takes the number of ranks from its size, so "
        "under Gloo it never finds a missing rank: a hang is neither reported nor ended.",
    ),
    Change(
        file="horovod/common/gloo/gloo_context.cc",
        old="  attr device_attr;\n"
        "  device_attr.iface = gloo_iface_;\n"
        "  device_attr.ai_family = AF_UNSPEC;\n"
        "  auto dev = CreateDevice(device_attr);\n"
        "\n"
        "  global_ctx = global_context.ctx;\n",
        new="  attr device_attr;\n"
        "  gloo_iface_ = global_context.gloo_iface_;\n"
        "  device_attr.iface = gloo_iface_;\n"
        "  device_attr.ai_family = AF_UNSPEC;\n"
        "  auto dev = CreateDevice(device_attr);\n"
        "\n"
        "  global_ctx = global_context.ctx;\n",
        why="A process set, and the one of all ranks is such, never learns the interface that "
        "HOROVOD_GLOO_IFACE names: it binds to whatever the hostname resolves to. Where that is 127.0.1.1, "
        "as on a stock Debian, two hosts cannot connect.",
    ),
)


@dataclass(frozen=True)
class Environment:
    """The virtual environment the wheel is built against.

    Parameters
    ----------
    python : str
        Its interpreter.
    tensorflow : str
        Distribution and version, such as "tensorflow-cpu 2.21.0".
    mpich : str
        Version of MPICH.
    abi : str
        The interpreter's extension tag, such as "cpython-311-x86_64-linux-gnu".
    """

    python: str
    tensorflow: str
    mpich: str
    abi: str

    @classmethod
    def inspect(cls, venv: Path) -> Environment:
        """Look into the one at `venv`; raise `BuildError` if it lacks TensorFlow or MPICH."""
        python = venv / "bin" / "python"
        if not python.exists():
            raise BuildError(f"{venv} is no virtual environment: create it with ci/setup")
        result = subprocess.run([python, "-c", _INSPECT], capture_output=True, text=True, check=True)
        found = json.loads(result.stdout)
        for name in ("tensorflow", "mpich"):
            if not found[name]:
                raise BuildError(f"{venv} has no {name}: install the locked packages first (ci/setup)")
        return cls(python=str(python), **found)


_INSPECT = """
import json, sysconfig
from importlib.metadata import PackageNotFoundError, version

def first(*names):
    for name in names:
        try:
            return name, version(name)
        except PackageNotFoundError:
            pass
    return ()

abi = sysconfig.get_config_var("SOABI")
tensorflow = " ".join(first("tensorflow", "tensorflow-cpu"))
print(json.dumps({"tensorflow": tensorflow, "mpich": "".join(first("mpich")[1:]), "abi": abi}))
"""


@dataclass(frozen=True)
class Ingredients:
    """Everything the compiled wheel depends on. Two equal sets share one wheel in the cache."""

    horovod: str
    sdist_sha256: str
    tensorflow: str
    mpich: str
    abi: str
    machine: str
    compiler: str
    tools_sha256: str
    flags: Mapping[str, str]
    runpath: Sequence[str]
    changes: Sequence[tuple[str, str, str]]

    @classmethod
    def gather(cls, environment: Environment, flags: Mapping[str, str]) -> Ingredients:
        """Collect them for a build in `environment` with `flags` on this machine."""
        return cls(
            horovod=VERSION,
            sdist_sha256=SDIST_SHA256,
            tensorflow=environment.tensorflow,
            mpich=environment.mpich,
            abi=environment.abi,
            machine=f"{platform.machine()} {os.confstr('CS_GNU_LIBC_VERSION')}",
            compiler=compiler_version(),
            tools_sha256=sha256_of(BUILD_TOOLS_LOCK),
            flags=flags,
            runpath=RUNPATH,
            changes=[(change.file, change.old, change.new) for change in CHANGES],
        )

    def to_json(self) -> str:
        """Return them as text, the same for equal ingredients."""
        return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True)

    def key(self) -> str:
        """Return the name of the wheel's folder in the cache."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def local_version(self) -> str:
        """Return what tells this wheel from a stock Horovod, such as "hvdspark.tf2.21.0.k1a2b3c4d"."""
        return f"hvdspark.tf{self.tensorflow.split()[-1]}.k{self.key()[:8]}"


def compiler_path() -> str:
    """Return the path of the C++ compiler, $CXX or c++; raise `BuildError` if there is none."""
    name = os.environ.get("CXX") or "c++"
    path = shutil.which(name)
    if not path:
        raise BuildError(f"there is no C++ compiler ({name}): on Debian or Ubuntu, apt-get install g++ make")
    return path


def compiler_version() -> str:
    """Return the C++ compiler's name and version."""
    result = subprocess.run([compiler_path(), "--version"], capture_output=True, text=True, check=True)
    return result.stdout.splitlines()[0]


def sha256_of(path: Path) -> str:
    """Return the digest of a file's content in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
