"""The most memory that the processes of a program ever held, by what they are for."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

POLL_S = 0.25
DRIVER = "driver"


class PeakMemory:
    """Watches a process and all below it; use as a context manager.

    The system keeps each process's peak, so that looking now and then misses none but of those that live shorter.

    Parameters
    ----------
    pid
        The program's process.
    marks
        Per role a text in the command line of its processes; the first that fits counts.
    """

    def __init__(self, pid: int, marks: Mapping[str, str]) -> None:
        self._pid = pid
        self._marks = marks
        self._peaks: dict[str, int] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @property
    def peaks_mb(self) -> dict[str, float]:
        """Per role the peak of its largest process in MB (resident memory); ``"driver"`` is the program itself."""
        return {role: size / 1e6 for role, size in self._peaks.items()}

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._done.set()
        self._thread.join()

    def look(self) -> None:
        """Note the peaks as they are now."""
        with contextlib.suppress(psutil.NoSuchProcess):
            program = psutil.Process(self._pid)
            self._note(DRIVER, program)
            for process in program.children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    command = " ".join(process.cmdline())
                    role = next((role for role, mark in self._marks.items() if mark in command), None)
                    if role is not None:
                        self._note(role, process)

    def _watch(self) -> None:
        while not self._done.wait(POLL_S):
            self.look()

    def _note(self, role: str, process: psutil.Process) -> None:
        # A process may end while one looks at it.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    self._peaks[role] = max(self._peaks.get(role, 0), int(line.split()[1]) * 1024)
