"""Requests to stop: SIGTERM (a preempted machine), SIGINT (Ctrl-C), SIGHUP (a lost terminal).

The first signal is a request: work that can be interrupted anywhere ends at once, and work that has
something to save ends after saving it. The program then exits with code 75 (EX_TEMPFAIL of
sysexits.h: try again), which distinguishes it from a failure. A later signal ends the process
without saving. Signals within a second count as the same request, because GNU timeout, for example,
signals both the process and its group.

Python runs handlers between bytecodes of the main thread, so a signal during a host loop waits until
the loop returns. For work that can be interrupted anywhere, a thread ends the process if the main
thread is blocked for longer, e.g. while TensorFlow retries requests to an object store for minutes.
"""

from __future__ import annotations

import contextlib
import functools
import math
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
HELD_UP_SECONDS = 5.0
_HELD_UP = b"stopped while it waited: start the same command again to continue\n"


class Preempted(BaseException):
    """The process received a request to stop and has saved its state.

    Like KeyboardInterrupt, not an `Exception`, so that error handlers do not swallow it.
    """

    exit_code = EXIT_CODE


class StopRequest:
    """Handles the signals while the block runs; of nested blocks, the innermost one handles them.

    Outside the main thread, where signals cannot be handled, the block has no effect.

    Attributes:
      requested: whether to stop as soon as everything is saved.
    """

    def __init__(self):
        self.requested = False
        self._requested_at = 0.0
        self._cut = False
        self._process = os.getpid()
        self._undo = contextlib.ExitStack()
        self._heard_at = -math.inf

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._undo.callback(signal.signal, number, signal.getsignal(number))
            self._watch()
            self.take_signals()
        return self

    def __exit__(self, *unused) -> None:
        self._undo.close()

    def _watch(self) -> None:
        """Starts the thread that receives signals while the main thread is blocked."""
        _leave_children_alone()
        read, write = os.pipe()
        # Required by set_wakeup_fd: a handler must not wait for a full pipe.
        os.set_blocking(write, False)
        before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        # Python writes the number of every signal to the pipe; closing it ends the thread. Callbacks
        # run in reverse order, so that Python never writes to a descriptor reused for another file.
        self._undo.callback(os.close, write)
        self._undo.callback(signal.set_wakeup_fd, before)

        def hear() -> None:
            while number := os.read(read, 1):
                began = time.monotonic()
                # Until `_handle` has run in the main thread, perhaps before this thread woke up.
                while number[0] in SIGNALS and self._heard_at < began - SAME_REQUEST_SECONDS:
                    time.sleep(0.1)
                    held_up = time.monotonic() > began + HELD_UP_SECONDS
                    if held_up and (self._cut or self.requested):
                        os.write(2, _HELD_UP)  # The main thread may hold the lock of the log.
                        os._exit(EXIT_CODE)
                    # A first request during a host loop: the state is saved when the loop returns.
                    if held_up:
                        break
            os.close(read)

        threading.Thread(target=hear, name="signals", daemon=True).start()

    def take_signals(self) -> None:
        """Reinstalls the handlers after native code has replaced them inside the block."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                # Under nohup, the process must survive a lost terminal.
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                    signal.signal(number, self._handle)

    @contextlib.contextmanager
    def immediate(self) -> Iterator[None]:
        """Makes requests raise `Preempted` in the block, which can be interrupted anywhere."""
        outer, self._cut = self._cut, True
        try:
            if self.requested:
                raise Preempted("stopped")
            yield
        finally:
            self._cut = outer

    def _handle(self, number: int, frame) -> None:
        name = signal.Signals(number).name
        self._heard_at = time.monotonic()
        if os.getpid() != self._process:
            # A forked worker inherits the handler, but has nothing to save.
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if self.requested:
            if time.monotonic() - self._requested_at < SAME_REQUEST_SECONDS:
                return
            logging.warning("%s again: ending without saving", name)
            os._exit(
                128 + number
            )  # The status that shells report for a process killed by a signal.
        self.requested, self._requested_at = True, time.monotonic()
        logging.warning(
            "%s: stopping once everything is saved; send it again to stop at once", name
        )
        if self._cut:
            self._cut = False  # Clean-up on the way out is not interrupted.
            raise Preempted(f"stopped by {name}")


@functools.cache
def _leave_children_alone() -> None:
    """Prevents forked processes from reporting their signals to the parent."""

    def forget() -> None:
        with contextlib.suppress(ValueError):  # Not in the main thread.
            signal.set_wakeup_fd(-1)

    os.register_at_fork(after_in_child=forget)


def end_with_parent() -> None:
    """Ends this worker process when its parent ends, even by SIGKILL."""
    parent = multiprocessing.parent_process()
    if parent is None:
        raise RuntimeError("end_with_parent is for worker processes")

    def leave() -> None:
        # Not `parent.join()`: in a process that was not forked, only the sentinel can be waited for.
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=leave, daemon=True).start()
