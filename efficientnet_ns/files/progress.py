"""Progress of long work: a bar with rate and ETA on a terminal, plain log lines elsewhere."""

from __future__ import annotations

import sys
import time

from absl import logging

_SECONDS_BETWEEN_LINES = 15.0


class Progress:
    """Counts units of work towards a total.

    Args:
      total: units of the whole work.
      what: short description.
      unit: name of a unit.
      done: units finished earlier, which do not count towards the rate.
      line_every: units between two log lines; None: a line every 15 seconds.
    """

    def __init__(
        self, total: int, what: str, unit: str, done: int = 0, line_every: int | None = None
    ):
        self.total, self.what, self.unit = total, what, unit
        self.count = self._first = done
        self._started = self._printed = time.monotonic()
        self._line_every = line_every
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=done, desc=what, unit=f" {unit}", leave=False)

    def update(self, units: int, note: str = "") -> None:
        """Counts `units` more; `note` is shown after the rate."""
        before, self.count = self.count, self.count + units
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(units)
        elif self._line_is_due(before):
            self._printed = time.monotonic()
            logging.info("%s: %s", self.what, self.line(note))

    def _line_is_due(self, before: int) -> bool:
        if self._line_every is not None:
            return self.count // self._line_every > before // self._line_every
        return time.monotonic() - self._printed > _SECONDS_BETWEEN_LINES

    def line(self, note: str = "") -> str:
        """`400/1000 steps, 12.3 steps/s, ETA 49 s`."""
        rate = (self.count - self._first) / max(time.monotonic() - self._started, 1e-9)
        eta = f", ETA {(self.total - self.count) / rate:.0f} s" if rate > 0 else ""
        tail = f", {note}" if note else ""
        return f"{self.count}/{self.total} {self.unit}, {rate:.1f} {self.unit}/s{eta}{tail}"

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *unused) -> None:
        self.close()
