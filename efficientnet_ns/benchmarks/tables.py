"""How measurements are taken and shown: rows of one run, side by side with their peers."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from efficientnet_ns.files.text_table import text_table

# Whether TensorFlow uses its oneDNN kernels; a process looks at it once.
ONEDNN = "TF_ENABLE_ONEDNN_OPTS"


class Row(NamedTuple):
    """One line of a result.

    Attributes:
      name: what was measured.
      value: in `unit`.
      unit: images/s, ms, MB, rows/s …
      ratio: against the peer of the same run, above 1 is better than it; None without a peer.
      peer: name of that peer.
    """

    name: str
    value: float
    unit: str
    ratio: float | None = None
    peer: str = ""


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    """Environment variables of the processes that are started inside the block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@dataclasses.dataclass(frozen=True)
class Measured:
    """Units per second of each contender, turn by turn: {name: [rate, …]}."""

    turns: dict[str, list[float]]

    def rate(self, name: str) -> float:
        """The median turn."""
        return statistics.median(self.turns[name])

    def ratio(self, name: str, peer: str) -> float:
        """How much faster than `peer`: the median over turns of the ratio within the turn.

        What changes the machine's speed for longer than a turn does not touch it, while it would
        shift the ratio of two medians.
        """
        pairs = zip(self.turns[name], self.turns[peer])
        return statistics.median(own / other for own, other in pairs)


def measure(contenders: dict[str, Callable[[], int]], seconds: float, turns: int = 5) -> Measured:
    """Measures contenders in turns, so that all see the same machine.

    Args:
      contenders: name → function that does some work and returns how many units it did.
      seconds: how long each contender runs, after one call that warms it up.
      turns: in how many parts; a part is one call at least.
    """
    for work in contenders.values():
        work()
    measured: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(turns):
        for name, work in contenders.items():
            units, start = 0, time.perf_counter()
            while (elapsed := time.perf_counter() - start) < seconds / turns or not units:
                units += work()
            measured[name].append(units / elapsed)
    return Measured(measured)


def format_rows(rows: list[Row]) -> str:
    """The rows as a table for the terminal."""
    lines = []
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f} x {row.peer}"
        lines.append([row.name, f"{row.value:,.1f} {row.unit}", ratio])
    return text_table(["what", "measured", "ratio"], lines)


def as_json(rows: list[Row]) -> list[dict[str, Any]]:
    """The rows for programs."""
    return [row._asdict() for row in rows]
