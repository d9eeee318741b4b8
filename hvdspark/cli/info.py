"""``hvdspark info``: the versions of the stack, and what Horovod was built with."""

from __future__ import annotations

import json
import subprocess
import sys

import click

from hvdspark.versions import installed_versions

# In a process of its own, because importing TensorFlow takes seconds and prints.
_BUILT = """
import json, os
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
import horovod.tensorflow as hvd
print(json.dumps({
    "gloo": bool(hvd.gloo_built()), "mpi": bool(hvd.mpi_built()),
    "nccl": bool(hvd.nccl_built()), "cuda": bool(hvd.cuda_built()),
}))
"""


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def info(as_json: bool) -> None:
    """Print the versions of the stack and what Horovod was built with.

    Ends with exit code 1 when Horovod cannot be loaded.
    """
    versions = installed_versions()
    built, error = _horovod_built()
    if as_json:
        click.echo(json.dumps({"versions": versions, "horovod_built": built, "error": error}))
    else:
        width = max(len(name) for name in versions)
        for name, version in versions.items():
            click.echo(f"{name:<{width}}  {version}")
        for name, present in built.items():
            click.echo(f"horovod with {name:<5} {'yes' if present else 'no'}")
    if error:
        click.echo(f"Horovod cannot be loaded: {error}", err=True)
        sys.exit(1)


def _horovod_built() -> tuple[dict[str, bool], str | None]:
    """Ask Horovod what it was built with; returns that and what went wrong."""
    process = subprocess.run([sys.executable, "-c", _BUILT], capture_output=True, text=True, check=False)
    lines = process.stdout.strip().splitlines()
    if process.returncode == 0 and lines:
        found: dict[str, bool] = json.loads(lines[-1])
        return found, None
    reason = process.stderr.strip().splitlines()
    return {}, reason[-1] if reason else f"exit code {process.returncode}"
