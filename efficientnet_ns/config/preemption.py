"""Requests to stop: SIGTERM (a preempted machine), SIGINT (Ctrl-C), SIGHUP (a lost terminal).

The first signal is a request: work that can be interrupted anywhere ends at once, and work that has
something to save ends after saving it. The program then exits with code 75 (EX_TEMPFAIL of
sysexits.h: try again), which distinguishes it from a failure. A later signal ends the process
without saving. Signals that follow within a second count as the same request: GNU timeout, for one,
signals both the process and its group.

Python runs handlers between two bytecodes of the main thread, so inside a host loop of the device a
signal waits until the loop returns.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from collections.abc import Iterator

from absl import logging

EXIT_CODE = 75
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SAME_REQUEST_SECONDS = 1.0


class Preempted(BaseException):
    """The process received a request to stop, and has saved its state.

    Like KeyboardInterrupt, not an `Exception`, so that error handlers do not swallow it.
    """

    exit_code = EXIT_CODE


class StopRequest:
    """Takes the signals while the block runs; blocks may be nested; the innermost one handles them.

    Outside the main thread, where signals cannot be taken, the block changes nothing.

    Attributes:
      requested: whether to stop as soon as everything is saved.
    """

    def __init__(self):
        self.requested = False
        self._requested_at = 0.0
        self._cut = False
        self._process = os.getpid()
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._undo.callback(signal.signal, number, signal.getsignal(number))
            self.take_signals()
        return self

    def __exit__(self, *unused) -> None:
        self._undo.close()

    def take_signals(self) -> None:
        """Takes them back from native code that took them for itself inside the block."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                # Under nohup a lost terminal is to be survived.
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                    signal.signal(number, self._answer)

    @contextlib.contextmanager
    def immediate(self) -> Iterator[None]:
        """For work that can be interrupted anywhere: a request raises `Preempted` inside the block."""
        outer, self._cut = self._cut, True
        try:
            if self.requested:
                raise Preempted("stopped")
            yield
        finally:
            self._cut = outer

    def _answer(self, number: int, frame) -> None:
        name = signal.Signals(number).name
        if os.getpid() != self._process:
            # A forked worker inherits the handler, but has nothing to save.
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if self.requested:
            if time.monotonic() - self._requested_at < SAME_REQUEST_SECONDS:
                return
            logging.warning("%s again: ending without saving", name)
            os._exit(128 + number)
        self.requested, self._requested_at = True, time.monotonic()
        logging.warning("%s: stopping when everything is saved; once more: at once", name)
        if self._cut:
            self._cut = False  # Clean-up on the way out is not interrupted.
            raise Preempted(f"stopped by {name}")


def end_with_parent() -> None:
    """In a worker process: ends it when its parent ends, even by SIGKILL."""
    parent = multiprocessing.parent_process()
    if parent is None:
        raise RuntimeError("end_with_parent is for worker processes")

    def leave() -> None:
        # Not `parent.join()`: in a process that was not forked, only the sentinel can be waited for.
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=leave, daemon=True).start()
