"""How a training process answers its task, and shows every second that it lives and moves on.

The other side is :mod:`hvdspark.launch.answers`.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time

from hvdspark.launch.answers import FRAME, PULSE, PULSE_S

# Of this process as a whole, like its standard output: who moves on need not know to whom it is told.
_moves = 0
_doing = ""


def moved_on(doing: str) -> None:
    """Note that the work of this rank has moved on; where that is no longer called, the rank is taken to hang.

    Parameters
    ----------
    doing
        What it is at now, in a few words.
    """
    global _moves, _doing
    _doing = doing
    _moves += 1


class Pulse:
    """The way from this process to its task.

    Parameters
    ----------
    answers
        The descriptor through which it answers.
    """

    def __init__(self, answers: int) -> None:
        self._answers = answers
        self._lock = threading.Lock()

    def start(self) -> None:
        """Give signs of life from now on, until the process ends."""
        threading.Thread(target=self._beat, name="hvdspark pulse", daemon=True).start()

    def send(self, status: bytes, body: bytes = b"") -> None:
        """Send a frame."""
        view = memoryview(FRAME.pack(status, len(body)) + body)
        with self._lock:
            while view:
                view = view[os.write(self._answers, view) :]

    def _beat(self) -> None:
        with contextlib.suppress(OSError):  # the task is gone, and soon this process
            while True:
                self.send(PULSE, json.dumps([_moves, _doing]).encode())
                time.sleep(PULSE_S)
