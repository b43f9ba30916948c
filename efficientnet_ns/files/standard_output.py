"""Handles characters that standard output cannot show, exited readers, and closed or full output."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import select
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn, TextIO

UNREAD = 141  # Exit code: 128 + SIGPIPE.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def quiet_when_unread() -> Iterator[None]:
    """Ends the program silently when the reader of its output, e.g. `head`, has exited.

    A closed standard output or error is replaced by os.devnull; a full one ends the program with
    one line and exit code 2.
    """
    sys.stdout = sys.stdout or _nobody()
    sys.stderr = sys.stderr or _nobody()
    try:
        try:
            yield
        finally:
            flush()
    except BrokenPipeError:
        if not is_unread():
            raise
        _discard_rest()
        sys.exit(UNREAD)
    except OSError as e:
        # Errors of other files have a file name.
        if e.errno not in _FULL or e.filename is not None:
            raise
        _end_full(e)


def _nobody() -> TextIO:
    return os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8")


def flush() -> None:
    """Writes what standard output still buffers."""
    if sys.stdout is None:  # It was closed before the program began.
        return
    try:
        sys.stdout.flush()
    except OSError as e:
        if e.errno not in _FULL:
            raise
        _end_full(e)


def _end_full(error: OSError) -> NoReturn:
    _discard_rest()
    print(f"standard output: {error.strerror}", file=sys.stderr)
    sys.exit(2)


def _discard_rest() -> None:
    # Python writes the remaining output when it exits.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def escaped(text: str) -> str:
    """Escapes control characters, which could move the cursor or end the line."""
    return re.sub(
        r"[\x00-\x1f\x7f-\x9f\u2028\u2029]",
        lambda found: found[0].encode("unicode_escape").decode(),
        text,
    )


def printable(text: str) -> str:
    r"""Escapes what the output cannot encode, e.g. file names that are not UTF-8."""
    coding = sys.stdout.encoding or "utf-8"
    return text.encode(coding, "backslashreplace").decode(coding)


def photo_block(photo: str, predictions: Sequence[Mapping[str, Any]]) -> str:
    """Formats a photo's path and its classes in aligned columns.

    Args:
      predictions: `name` and `probability` of at least one class, best first.
    """
    names = [escaped(guess["name"]) for guess in predictions]
    width = max(map(len, names))
    rows = zip(names, predictions)
    lines = [f"  {name:<{width}}  {guess['probability']:.4f}" for name, guess in rows]
    return "\n".join([escaped(photo), *lines])


def is_unread() -> bool:
    """Checks whether it is standard output, and not another pipe, that nobody reads."""
    look = select.poll()
    look.register(sys.stdout.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in look.poll(0))
