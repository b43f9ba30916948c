"""Programs whose output nobody reads to the end: `… | head`."""

from __future__ import annotations

import contextlib
import os
import select
import sys
from collections.abc import Iterator

UNREAD = 141  # Exit code: 128 + SIGPIPE.


@contextlib.contextmanager
def quiet_when_unread() -> Iterator[None]:
    """Ends the program without a trace when the reader of its output, e.g. `head`, has gone."""
    try:
        try:
            yield
        finally:
            flush()
    except BrokenPipeError:
        if not is_unread():
            raise
        # Python writes what is left when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(UNREAD)


def flush() -> None:
    """Writes what standard output still holds."""
    if sys.stdout is not None:  # It was closed before the program began.
        sys.stdout.flush()


def is_unread() -> bool:
    """Whether it is standard output, and not another pipe, that nobody reads."""
    look = select.poll()
    look.register(sys.stdout.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in look.poll(0))
