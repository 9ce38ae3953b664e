"""SIGTERM (a preempted job, the end of its time) as a request that the training loop reads between two steps."""

from __future__ import annotations

import os
import signal
import threading


class Termination:
    """Context manager: inside, SIGTERM sets `requested` instead of ending the process; `logger` is not called in the
    handler, where it could deadlock. In a thread other than the main one Python allows no handler and none is set."""

    def __init__(self):
        self.requested = False
        self._previous = None

    def __enter__(self) -> Termination:
        self.requested = False
        if threading.current_thread() is threading.main_thread():
            self._owner = os.getpid()
            self._previous = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(self, *exception) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
            self._previous = None

    def _handle(self, number, frame) -> None:
        if os.getpid() != self._owner:  # a data-loader worker inherited the handler and must still end
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        self.requested = True
