"""Signals that ask a run to end: a preempted job (SIGTERM), Slurm's warning (SIGUSR1), a terminal that went (SIGHUP),
Ctrl-C (SIGINT).

During training they are a request that the loop reads between two steps or rows of an evaluation; before and after it,
where nothing has to be saved first, they end the run at once, with a message. What was ignored when the process started
(nohup, a shell's background jobs) stays ignored. In a thread other than the main one Python allows no handlers.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

NAMES = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
# torchrun passes a terminal's Ctrl-C on to processes that have received it themselves: that is no second one.
SAME = 1.0


class Interrupted(BaseException):
    """A signal came where nothing has to be saved first; its text is the signal's name."""


class EvaluationStopped(Exception):
    """A signal came between two rows of an evaluation."""


class _Handlers:
    """Context manager: inside, `_received` is called with a signal's name."""

    def __init__(self):
        self._previous: dict[int, Any] = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self._owner = os.getpid()
            numbers = [number for name in NAMES if (number := getattr(signal, name, None))]
            for number in numbers:
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _handle(self, number, frame) -> None:
        if os.getpid() != self._owner:  # a data-loader worker inherited the handler and must still end
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._received(signal.Signals(number).name)

    def _received(self, name: str) -> None:
        raise NotImplementedError


class Termination(_Handlers):
    """Of the training loop: `requested` is the first signal's name, "" before. A second SIGINT raises
    KeyboardInterrupt. `logger` is not called in the handler, where it could deadlock."""

    def __init__(self):
        super().__init__()
        self.requested = ""
        self.active = False
        self._since = 0.0

    def __enter__(self) -> Termination:
        self.requested, self.active = "", True
        return super().__enter__()

    def __exit__(self, *exception) -> None:
        super().__exit__(*exception)
        self.active = False

    def _received(self, name: str) -> None:
        if self.requested and name == "SIGINT" and time.monotonic() - self._since > SAME:
            raise KeyboardInterrupt
        if not self.requested:
            self.requested, self._since = name, time.monotonic()


class Interruptible(_Handlers):
    """Of a command, around its training: a signal raises Interrupted."""

    def _received(self, name: str) -> None:
        raise Interrupted(name)
