"""Takes and formats measurements: rows of one run, next to their peers."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import multiprocessing
import os
import platform
import re
import resource
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from efficientnet_ns.config import BenchmarkConfig, ConfigError
from efficientnet_ns.config.cpus import available_cpus
from efficientnet_ns.files.text_table import text_table

# Instruction sets that distinguish processors of the same name, as in /proc/cpuinfo.
_INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")
# Controls whether TensorFlow uses its oneDNN kernels; a process reads it once.
ONEDNN = "TF_ENABLE_ONEDNN_OPTS"


class Row(NamedTuple):
    """One line of a result.

    Attributes:
      name: what was measured.
      value: measured value in `unit`.
      unit: images/s, ms, MB, rows/s …
      ratio: ratio to the peer of the same run; above 1 is better; None without a peer.
      peer: name of that peer.
      spread: difference of the fastest and slowest turn as a fraction of `value`; None for a single
        measurement.
    """

    name: str
    value: float
    unit: str
    ratio: float | None = None
    peer: str = ""
    spread: float | None = None


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    """Sets environment variables for processes started inside the block."""
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
    """Units per second of each contender, turn by turn: `turns` is {name: [rate, …]}."""

    turns: dict[str, list[float]]

    def rate(self, name: str) -> float:
        """Returns the rate of the median turn."""
        return statistics.median(self.turns[name])

    def spread(self, name: str) -> float:
        """Returns (fastest turn - slowest turn) / median turn."""
        turns = self.turns[name]
        return (max(turns) - min(turns)) / statistics.median(turns)

    def ratio(self, name: str, peer: str) -> float:
        """Returns the speedup over `peer`: the median over turns of the ratio within a turn.

        Unlike the ratio of two medians, it is robust to changes in machine speed that last longer
        than a turn.
        """
        pairs = zip(self.turns[name], self.turns[peer])
        return statistics.median(own / other for own, other in pairs)


def rotated(names: list[str], turn: int) -> list[str]:
    """Returns the order of a turn: each starts with another name, so that none is always first."""
    start = turn % len(names)
    return names[start:] + names[:start]


def measure(contenders: dict[str, Callable[[], int]], seconds: float, turns: int = 5) -> Measured:
    """Measures contenders in turns, so that all run under the same conditions.

    Args:
      contenders: name → function that does some work and returns the number of units done.
      seconds: total duration of each contender, after one warm-up call.
      turns: number of turns, each with at least one call.
    """
    for work in contenders.values():
        work()
    measured: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(turns):
        for name in rotated(list(contenders), turn):
            work = contenders[name]
            units, start = 0, time.perf_counter()
            while (elapsed := time.perf_counter() - start) < seconds / turns or not units:
                units += work()
            measured[name].append(units / elapsed)
    return Measured(measured)


def format_rows(rows: list[Row]) -> str:
    """Formats the rows as a table for the terminal."""
    lines = []
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f} x {row.peer}"
        spread = "" if row.spread is None else f"{row.spread:.0%}"
        lines.append([row.name, f"{row.value:,.1f} {row.unit}", spread, ratio])
    return text_table(["what", "measured", "spread", "ratio"], lines)


def machine() -> str:
    """Describes the machine in one line: cores, processor, versions."""
    lines: list[str] = []
    with contextlib.suppress(OSError):  # Not Linux.
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    # The values of the last processor represent all processors.
    facts = dict(
        re.split(r"\s*:\s*", line, maxsplit=1) for line in lines if " :" in line or "\t:" in line
    )
    flags = facts.get("flags", "").split()
    kinds = [kind for kind in _INSTRUCTIONS if kind in flags]
    name = facts.get("model name") or platform.processor() or platform.machine()
    packages = ("tensorflow", "openvino", "onnxruntime")
    versions = [
        f"{p} {importlib.metadata.version(p)}" for p in packages if importlib.util.find_spec(p)
    ]
    python = f"Python {platform.python_version()}"
    return f"{available_cpus()} cores, {', '.join([name, *kinds, python, *versions])}"


def as_json(rows: list[Row]) -> list[dict[str, Any]]:
    """Returns the rows as JSON-able objects."""
    return [row._asdict() for row in rows]


def peak_memory() -> float:
    """Returns the peak memory of this process in MB (10^6 bytes)."""
    with contextlib.suppress(OSError, StopIteration):  # Not Linux.
        # Not ru_maxrss, which starts at the memory of the parent process.
        lines = Path("/proc/self/status").read_text().splitlines()
        peak = next(line for line in lines if line.startswith("VmHWM"))
        return int(peak.split()[1]) * 1024 / 1e6
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Bytes on macOS, KiB elsewhere.
    return used * (1 if sys.platform == "darwin" else 1024) / 1e6


_Settings = TypeVar("_Settings")


class Watched(NamedTuple):
    """What a function returned and took.

    Attributes:
      result: what it returned.
      seconds, cpu_seconds: time by the clock, and of all cores together.
      before, peak: peak memory of its process in MB, before and after.
    """

    result: Any
    seconds: float
    cpu_seconds: float
    before: float
    peak: float

    def rows(self, name: str) -> list[Row]:
        """Returns time and memory as lines of a result."""
        return [
            Row(f"{name}: time", self.seconds, "s"),
            Row(f"{name}: CPU time", self.cpu_seconds, "s"),
            Row(f"{name}: peak memory", self.peak, "MB"),
            Row(f"{name}: of it the process before", self.before, "MB"),
        ]


def in_own_process(work: Callable[[_Settings], object], settings: _Settings) -> Watched:
    """Calls `work(settings)` in a process of its own, so that its peak memory is known."""
    # Spawned, because TensorFlow's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_watched, work, settings).result()


def _watched(work: Callable[[_Settings], object], settings: _Settings) -> Watched:
    before, start, cpu = peak_memory(), time.perf_counter(), time.process_time()
    result = work(settings)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    return Watched(result, seconds, cpu_seconds, before, peak_memory())


def require_disk(config: BenchmarkConfig, folder: str, bytes_per_row: int) -> None:
    """Raises ConfigError if the disk of `folder` is too small for `config.rows`."""
    free = shutil.disk_usage(folder).free
    if free < bytes_per_row * config.rows:
        raise ConfigError(
            f"--rows={config.rows} needs {bytes_per_row * config.rows >> 20} MB below "
            f"{folder}, which has {free >> 20} MB free: set TMPDIR to a folder on a larger disk"
        )
