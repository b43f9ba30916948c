"""Number of CPU cores that this process may use: on shared machines, fewer than exist."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

from efficientnet_ns.config.fields import ConfigError

_limit = math.inf


def limit_cpus(cores: float) -> None:
    """Limits `available_cpus` of this process to `cores`, which a scheduler reserved for it."""
    global _limit
    _limit = cores


@contextlib.contextmanager
def limited_cpus(threads: int | None) -> Iterator[None]:
    """Runs on some cores only, like `taskset`, with all threads and processes started inside.

    Args:
      threads: number of cores, from --threads; None for all.

    Raises:
      ConfigError: If there are fewer cores, or the system cannot limit a process.
    """
    if threads is None:
        yield
        return
    if not hasattr(os, "sched_setaffinity"):
        raise ConfigError(
            f"--threads={threads}: a process can be restricted to some cores only on Linux"
        )
    cores = os.sched_getaffinity(0)
    if threads > len(cores):
        raise ConfigError(f"--threads={threads}: there are only {len(cores)} cores")
    os.sched_setaffinity(0, sorted(cores)[:threads])
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def available_cpus(groups: str = "/proc/self/cgroup", mounted: str = "/sys/fs/cgroup") -> int:
    """Returns the number of CPU cores that this process may use, at least 1.

    This is the minimum of its affinity (taskset, Slurm), the CPU quota of its control groups
    (containers) and `limit_cpus`, rounded up.

    Args:
      groups: file that lists the control groups of the process.
      mounted: folder of their settings.
    """
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    return max(1, math.ceil(min([cores, *_quotas(groups, Path(mounted)), _limit])))


def _quotas(groups: str, mounted: Path) -> Iterator[float]:
    """Yields the cores that each limited group of the process, or parent group, allows."""
    lines: list[str] = []
    with contextlib.suppress(OSError):  # Not Linux.
        lines = Path(groups).read_text().splitlines()
    for line in lines:
        _, controllers, group = line.split(":", 2)
        # Version 2 has one hierarchy and names no controller.
        if controllers and "cpu" not in controllers.split(","):
            continue
        for root in [mounted / "cpu", mounted / controllers] if controllers else [mounted]:
            folder = root / group.lstrip("/")
            # In a container, the path may be the host's, of which only the root is mounted.
            for level in (folder, *folder.parents):
                if level.is_relative_to(root):
                    yield from _quota(level)


def _quota(level: Path) -> list[float]:
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        quota, period = (level / "cpu.max").read_text().split()
        return [float(quota) / float(period)]  # "max" is not a number: no limit.
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        quota, period = ((level / f"cpu.cfs_{k}_us").read_text() for k in ("quota", "period"))
        return [float(quota) / float(period)] if float(quota) > 0 else []
    return []
