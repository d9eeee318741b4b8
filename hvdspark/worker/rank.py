"""A rank: take the variables of its place and the job, run it, answer, end.

It reads standard input to get them, each as a block of bytes after its length: the variables as a JSON object, the
pickled :class:`~hvdspark.worker.job.Job`, and arguments of this rank's own as a pickled tuple, or nothing. It answers
by frames through a pipe of its own.
"""

from __future__ import annotations

import atexit
import faulthandler
import gc
import importlib
import json
import logging
import os
import re
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, NoReturn

import cloudpickle

from hvdspark.launch import fabric, gpus
from hvdspark.launch.answers import DONE, FAILED, READY
from hvdspark.launch.failures import FailureKind
from hvdspark.launch.guard import STACKS, STACKS_SIGNAL
from hvdspark.launch.process import ASKED, BLOCK
from hvdspark.worker import imports, pmi
from hvdspark.worker.pulse import Pulse

logger = logging.getLogger(__name__)

# What a rank whose peers are gone raises; named, so that horovod need not be imported to know it.
_PEER_ERRORS = frozenset({"HorovodInternalError", "HostsUpdatedInterrupt", "PeerLostError"})
# TensorFlow wraps the same into its own errors.
_PEER_MARKS = (
    "Horovod has been shut down",
    "HorovodAllreduce",
    "HorovodAllgather",
    "HorovodBroadcast",
    "HorovodGroupedAllreduce",
    "Connection closed by peer",
    "Connection reset by peer",
    "Timed out waiting",
    "PeerLostError",
)
# What Horovod says on every rank when they do not all do the same: no peer is gone, and it would happen again.
_MISMATCH = re.compile(r"\bMismatched [\w ]+[:.]")

# What TensorFlow puts before the message of an error: where in the graph it was, and where that was defined.
_FRAMING = re.compile(r"Graph execution error:|Detected at node |\s|Traceback |$")
# AutoGraph puts all of an error behind these words and four spaces, the user's lines of code behind eight.
_IN_USER_CODE = re.compile(r"in user code:\n(?:.*\n)*?    (?!\s|File )(.+)")
_NODE = re.compile(r"^\{\{[^}]*\}\}\s*")


def preload(modules: Iterable[str]) -> None:
    """Import modules that the job will need."""
    # Imports make objects that stay. Looking for garbage among them takes a fifth of the time and finds none; neither
    # shall later collections look at them, which would also copy the pages that forks share.
    gc.disable()
    with imports.timed():
        for name in modules:
            importlib.import_module(name)
    gc.freeze()
    gc.enable()


def serve_after(modules: Iterable[str], answers: int) -> NoReturn:
    """Import modules, then do as :func:`serve`; that they cannot be imported is told to the task."""
    hindrance = None
    try:
        preload(modules)
    except BaseException as exc:  # noqa: BLE001 - whatever it is, the driver must hear of it
        hindrance = exc
    serve(answers, hindrance)


def serve(answers: int, hindrance: BaseException | None = None) -> NoReturn:
    """Run the job that comes through standard input and end the process.

    Parameters
    ----------
    answers
        The descriptor through which to answer.
    hindrance
        Why it cannot be run, if so: that is the answer then.
    """
    os.environ.update(json.loads(_read_block(sys.stdin.buffer)))
    imports.asked(float(os.environ.pop(ASKED)))
    payload, own = _read_block(sys.stdin.buffer), _read_block(sys.stdin.buffer)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # A warm parent may have looked for the place of temporary files already.
    tempfile.tempdir = None
    if fabric.NETWORK in os.environ:
        network, settings = os.environ.pop(fabric.NETWORK), fabric.settings_in(os.environ)
        logger.info("%s, %s; %s", network, gpus.describe(os.environ), settings)
    if STACKS in os.environ:
        # By a signal, because a process that stands still may not run any Python. Java blocks this one in all that it
        # starts.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [STACKS_SIGNAL])
        faulthandler.register(STACKS_SIGNAL, open(os.environ.pop(STACKS), "w"))  # noqa: PTH123, SIM115
    pulse = Pulse(answers)
    if hindrance is not None:
        _end_with(hindrance, "start", pulse)
    try:
        mpi = pmi.join()
    except BaseException as exc:  # noqa: BLE001 - as above
        is_passing = isinstance(exc, ConnectionError) or getattr(exc, "is_passing", False)
        _end_with(exc, "unmet" if is_passing else "meet", pulse)
    _run(payload, own, pulse)
    # Interpreter teardown can hang in native threads that wait for peers which are gone; so only what must be is done.
    atexit._run_exitfuncs()
    if mpi is not None and not mpi.Is_finalized():
        mpi.Finalize()
    _end(0)


def _run(payload: bytes, own: bytes, pulse: Pulse) -> None:
    try:
        job = cloudpickle.loads(payload)
        if own:
            job = job.after(*cloudpickle.loads(own))
        pulse.send(READY)
        pulse.start()
        result = cloudpickle.dumps(job.call())
    except BaseException as exc:  # noqa: BLE001 - as above
        _end_with(exc, "peer" if _is_peer_error(exc) else "user", pulse)
    pulse.send(DONE, result)


def _end_with(exc: BaseException, kind: FailureKind, pulse: Pulse) -> NoReturn:
    """Tell the task of an error and end."""
    # A zero ends the line; what is no Unicode (a name of a file, say) is told by its bytes.
    line = _one_line(exc).replace("\0", "\\x00")
    pulse.send(FAILED, "\0".join((kind, line, _users_traceback(exc))).encode(errors="backslashreplace"))
    _end(1)


def _end(code: int) -> NoReturn:
    """End at once, whatever other threads do."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _is_peer_error(exc: BaseException) -> bool:
    """Whether an error is a lost peer's doing, be it that the user's own code has raised another one because of it."""
    seen = set[int]()
    found: BaseException | None = exc
    while found is not None and id(found) not in seen:
        if _tells_of_lost_peer(found):
            return True
        seen.add(id(found))
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)
    return False


def _tells_of_lost_peer(exc: BaseException) -> bool:
    if _MISMATCH.search(_message(exc)):
        return False
    names = {cls.__name__ for cls in type(exc).__mro__}
    if names & _PEER_ERRORS:
        return True
    is_framework_error = any(cls.__module__.startswith("tensorflow") for cls in type(exc).__mro__)
    return is_framework_error and any(mark in _message(exc) for mark in _PEER_MARKS)


def _users_traceback(exc: BaseException) -> str:
    """Format the traceback from the user's first frame on."""
    found = traceback.TracebackException.from_exception(exc)
    own = Path(__file__).parent
    kept = [frame for frame in found.stack if Path(frame.filename).parent != own]
    found.stack = traceback.StackSummary.from_list(kept)
    return "".join(found.format())


def _message(exc: BaseException) -> str:
    try:
        return str(exc)
    except Exception:  # noqa: BLE001 - it is the user's own code
        return "<exception str() failed>"  # as in Python's tracebacks


def _one_line(exc: BaseException) -> str:
    text = _message(exc).strip()
    wrapped = _IN_USER_CODE.match(text)
    lines = [wrapped[1]] if wrapped else text.splitlines()
    telling = [line for line in lines if not _FRAMING.match(line)] or lines
    return f"{type(exc).__name__}: {_NODE.sub('', telling[0])}" if telling else type(exc).__name__


def _read_block(stream: BinaryIO) -> bytes:
    return _read_exactly(stream, BLOCK.unpack(_read_exactly(stream, BLOCK.size))[0])


def _read_exactly(stream: BinaryIO, count: int) -> bytes:
    data = stream.read(count)
    if len(data) != count:
        os._exit(1)  # the task is gone; there is nobody to tell
    return data
