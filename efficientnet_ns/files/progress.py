"""Shows the progress of long work: a bar with rate and ETA on a terminal, else log lines."""

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
      total: number of units of the whole work.
      what: short description.
      unit: name of a unit.
      done: number of units finished earlier, which do not count towards the rate.
      line_every: units between two log lines; None logs a line every 15 seconds.
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
        """Excludes the units so far from the rate, such as a first step that includes compilation."""
        self._first, self._started = self.count, time.monotonic()

    def _line_is_due(self, before: int) -> bool:
        if self._line_every is not None:
            return self.count // self._line_every > before // self._line_every
        return time.monotonic() - self._printed > _SECONDS_BETWEEN_LINES

    def line(self, note: str = "", *, eta: bool = True) -> str:
        """Returns a line such as `400/1000 steps, 12.3 steps/s, ETA 49 s`."""
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
    """Shows one line for a run of many stages: stage, percentage and remaining time.

    While it is entered, every `Progress` reports to it and prints nothing itself.

    Args:
      seconds: stage → estimated seconds, its share of the whole.
    """

    current: Whole | None = None

    def __init__(self, seconds: Mapping[str, float]):
        self._seconds, self._stage = dict(seconds), ""
        # Estimated seconds of the finished work: in total and by this process.
        self._done = self._own = self._within = 0.0
        self._started, self._printed = time.monotonic(), -_SECONDS_BETWEEN_LINES
        self._terminal = sys.stderr.isatty()

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Runs the block as the stage `name`; a nested stage is part of the outer one."""
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
        """Returns the estimated percentage of the whole."""
        return 100 * (self._done + self._within) / max(sum(self._seconds.values()), 1e-9)

    def time_left(self) -> str:
        """Returns a text such as `12 min left`, at first based mostly on the estimates."""
        left = sum(self._seconds.values()) - self._done - self._within
        own, elapsed = self._own + self._within, time.monotonic() - self._started
        # For the first seconds, the estimates are more reliable than the measured time.
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
    """Runs the block as a stage of the current `Whole`, if there is one."""
    with Whole.current.stage(name) if Whole.current else contextlib.nullcontext():
        yield


def duration(seconds: float) -> str:
    """Formats a duration, e.g. `40 s`, `12 min` or `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
