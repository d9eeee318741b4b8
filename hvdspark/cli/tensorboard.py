"""``hvdspark tensorboard``: TensorBoard on the event files of a run."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import posixpath
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from hvdspark.cli.options import opened, store_option
from hvdspark.errors import HvdSparkError
from hvdspark.layout import TENSORBOARD
from hvdspark.runs import run_folder
from hvdspark.store import Store
from hvdspark.versions import command_for

logger = logging.getLogger(__name__)

_REFRESH_S = 10.0


@click.command()
@click.option("--run", "run_id", required=True, metavar="ID", help="The run, of a fit with tensorboard=True.")
@store_option
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option("--port", default=6006, show_default=True, type=click.IntRange(0, 65535), help="The port; 0 takes any.")
def tensorboard(run_id: str, url: str, host: str, port: int) -> None:
    """Show a run in TensorBoard, until it is stopped by Ctrl-C or SIGTERM."""
    if importlib.util.find_spec("tensorboard") is None:
        raise click.ClickException(f"TensorBoard is not installed: {command_for('tensorboard')}")
    with opened(url) as store, _files_of(store, posixpath.join(run_folder(run_id), TENSORBOARD)) as folder:
        click.echo(f"{run_id}: {_launch(folder, host, port)}")
        _await_end()


def _launch(folder: Path, host: str, port: int) -> str:
    """Start the server in a thread; returns its address."""
    from tensorboard import program

    server = program.TensorBoard()
    server.configure(logdir=str(folder), host=host, port=port)
    try:
        return str(server.launch())
    except program.TensorBoardServerException as exc:
        raise click.ClickException(str(exc)) from exc


def _await_end() -> None:
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    with contextlib.suppress(KeyboardInterrupt):
        ended.wait()


@contextlib.contextmanager
def _files_of(store: Store, place: str) -> Iterator[Path]:
    """Provide a local folder with the event files; those of a Store elsewhere are copied there, now and then anew."""
    if not store.exists(place):
        raise click.ClickException(
            f"there are no event files in {store.url_of(place)}; fit with tensorboard=True, and see that ID and URL are"
            " those of the fit"
        )
    if store.is_local:
        yield Path(store.path(place))
        return
    with tempfile.TemporaryDirectory(prefix="hvdspark-tensorboard-", ignore_cleanup_errors=True) as folder:
        sizes: dict[str, int] = {}
        copy_new(store, place, Path(folder), sizes)
        ended = threading.Event()
        thread = threading.Thread(target=_refresh, args=(ended, store, place, Path(folder), sizes), daemon=True)
        thread.start()
        try:
            yield Path(folder)
        finally:
            ended.set()


def _refresh(ended: threading.Event, *arguments: Any) -> None:
    while not ended.wait(_REFRESH_S):
        try:
            copy_new(*arguments)
        except (HvdSparkError, OSError) as exc:
            logger.warning("the event files could not be refreshed: %s", exc)


def copy_new(store: Store, place: str, target: Path, sizes: dict[str, int]) -> None:
    """Copy the event files that have grown, of all folders below a place.

    Parameters
    ----------
    store, place
        Where they are.
    target
        A local folder.
    sizes
        What was copied before, and is added to.
    """
    for part in ("train", "validation"):
        for name, size in store.sizes(place, part).items():
            key = posixpath.join(part, name)
            if sizes.get(key) == size:
                continue
            data = store.read_bytes(place, key)
            (target / part).mkdir(exist_ok=True)
            with (target / key).open("ab") as file:
                # TensorBoard holds the file open, and reads on where it was.
                file.write(data[file.tell() :])
            sizes[key] = len(data)
