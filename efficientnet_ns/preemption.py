"""Requests to stop: SIGTERM (a preempted machine) and SIGINT (Ctrl-C).

The first one asks: work that can be cut anywhere ends at once, work that has something to save
ends when it has saved it; the program then exits with code 75 (EX_TEMPFAIL of sysexits.h: try
again), which tells it from a failure. The second one ends the process on the spot.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator

from absl import logging

EXIT_CODE = 75
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Preempted(BaseException):
    """The process was asked to stop, and what is to be saved is saved.

    Like KeyboardInterrupt no `Exception`: what handles errors on the way must not handle this.
    """

    exit_code = EXIT_CODE


class StopRequest:
    """Takes the signals while the block runs; blocks may be nested, the innermost answers.

    Python runs its own handlers only between two bytecodes of the main thread, which may be deep in
    a host loop of many minutes. The signals are therefore counted by a thread that reads what the
    interpreter writes at once (`signal.set_wakeup_fd`). Outside the main thread, where signals
    cannot be taken, the block changes nothing.

    Attributes:
      requested: whether to stop as soon as everything is saved.
    """

    def __init__(self):
        self.requested = False
        self._cut = False
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is not threading.main_thread():
            return self
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        watcher = threading.Thread(target=self._watch, args=(read_end,), daemon=True)
        watcher.start()
        self._undo.callback(watcher.join)
        self._undo.callback(os.close, write_end)
        previous = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        self._undo.callback(signal.set_wakeup_fd, previous)
        for number in SIGNALS:
            self._undo.callback(signal.signal, number, signal.getsignal(number))
        self.take_signals()
        # A forked worker would write into this process' pipe when it is told to end.
        os.register_at_fork(after_in_child=self._undo_in_child)
        return self

    def __exit__(self, *unused) -> None:
        self._undo.close()

    def take_signals(self) -> None:
        """Takes them back from native code that took them for itself inside the block."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self._answer)

    @contextlib.contextmanager
    def immediate(self) -> Iterator[None]:
        """For work that can be cut anywhere: a request raises `Preempted` inside the block."""
        outer, self._cut = self._cut, True
        try:
            if self.requested:
                raise Preempted("stopped")
            yield
        finally:
            self._cut = outer

    def _undo_in_child(self) -> None:
        if signal.getsignal(signal.SIGTERM) == self._answer:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _answer(self, number: int, frame) -> None:
        self.requested = True
        if self._cut:
            self._cut = False  # Clean-up on the way out is not cut.
            raise Preempted(f"stopped by {signal.Signals(number).name}")

    def _watch(self, read_end: int) -> None:
        """Runs in a thread until the other end is closed."""
        seen = 0
        with os.fdopen(read_end, "rb", buffering=0) as pipe:
            while numbers := pipe.read(64):
                for number in numbers:
                    if number not in SIGNALS:
                        continue
                    seen += 1
                    name = signal.Signals(number).name
                    if seen > 1:
                        logging.warning("%s again: ending without saving", name)
                        os._exit(128 + number)
                    self.requested = True
                    logging.warning(
                        "%s: stopping when everything is saved; once more: at once", name
                    )


def end_with_parent() -> None:
    """In a worker process: no life after the parent's, which cannot tell its workers when killed."""
    parent = multiprocessing.parent_process()

    def leave() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=leave, daemon=True).start()
