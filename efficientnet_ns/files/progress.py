"""Progress of long work: a bar with rate and ETA on a terminal, plain log lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping

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
        if Whole.current is None and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=done, desc=what, unit=f" {unit}", leave=False)

    def update(self, units: int, note: str = "") -> None:
        """Counts `units` more; `note` is shown after the rate."""
        before, self.count = self.count, self.count + units
        if Whole.current is not None:
            Whole.current.update(self.count / max(self.total, 1), self.line(note, eta=False))
        elif self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(units)
        elif self._line_is_due(before):
            self._printed = time.monotonic()
            logging.info("%s: %s", self.what, self.line(note))

    def restart_rate(self) -> None:
        """Leaves what is counted out of the rate, such as a first step that included compilation."""
        self._first, self._started = self.count, time.monotonic()

    def _line_is_due(self, before: int) -> bool:
        if self._line_every is not None:
            return self.count // self._line_every > before // self._line_every
        return time.monotonic() - self._printed > _SECONDS_BETWEEN_LINES

    def line(self, note: str = "", *, eta: bool = True) -> str:
        """`400/1000 steps, 12.3 steps/s, ETA 49 s`."""
        rate = (self.count - self._first) / max(time.monotonic() - self._started, 1e-9)
        left = f", ETA {(self.total - self.count) / rate:.0f} s" if rate > 0 and eta else ""
        tail = f", {note}" if note else ""
        return f"{self.count}/{self.total} {self.unit}, {rate:.1f} {self.unit}/s{left}{tail}"

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *unused) -> None:
        self.close()


class Whole:
    """One line for a long run of many stages: stage, percentage and time left of the whole.

    While it is entered, every `Progress` reports to it and prints nothing itself.

    Args:
      seconds: stage → estimated seconds; the part of the whole that it makes up.
    """

    current: Whole | None = None

    def __init__(self, seconds: Mapping[str, float]):
        self._seconds, self._stage = dict(seconds), ""
        # Estimated seconds of what is done: all of it, and what this process did.
        self._done = self._own = self._within = 0.0
        self._started, self._printed = time.monotonic(), -_SECONDS_BETWEEN_LINES
        self._terminal = sys.stderr.isatty()

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """The block is the stage `name`; a stage within a stage is part of that."""
        if self._stage:
            yield
            return
        self._stage, self._within = name, 0.0
        self.update(0.0, "", always=True)
        try:
            yield
        finally:
            self._stage = ""
        self._own += self._seconds.get(name, 0.0)
        self.skip(name)

    def skip(self, name: str) -> None:
        """Counts a stage as done."""
        self._done += self._seconds.get(name, 0.0)
        self._within = 0.0

    def update(self, part: float, note: str, *, always: bool = False) -> None:
        """Reports that `part` (0..1) of the stage is done; prints occasionally."""
        self._within = min(part, 1.0) * self._seconds.get(self._stage, 0.0)
        now = time.monotonic()
        between = 1.0 if self._terminal else _SECONDS_BETWEEN_LINES
        if not always and now - self._printed < between:
            return
        self._printed = now
        line = f"[{self.percentage():3.0f} %] {self._stage}" + (f": {note}" if note else "")
        line = f"{line}; {self.time_left()}"
        if self._terminal:
            print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def percentage(self) -> float:
        """Of the whole, as estimated."""
        return 100 * (self._done + self._within) / max(sum(self._seconds.values()), 1e-9)

    def time_left(self) -> str:
        """`12 min left`, by the estimates until enough of the run has shown how long it takes."""
        left = sum(self._seconds.values()) - self._done - self._within
        own, elapsed = self._own + self._within, time.monotonic() - self._started
        # Estimates of the first seconds say more than what they took.
        slowness = (elapsed + 60) / (own + 60)
        return f"{duration(max(left, 0.0) * slowness)} left"

    def __enter__(self) -> Whole:
        Whole.current = self
        return self

    def __exit__(self, *unused) -> None:
        Whole.current = None
        if self._terminal:
            print(file=sys.stderr)


@contextlib.contextmanager
def stage(name: str) -> Iterator[None]:
    """A stage of the `Whole` that is entered, if one is."""
    with Whole.current.stage(name) if Whole.current else contextlib.nullcontext():
        yield


def duration(seconds: float) -> str:
    """`40 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
