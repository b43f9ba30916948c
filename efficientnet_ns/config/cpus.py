"""How many CPU cores this process may use, which on shared machines is fewer than there are."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

_limit = math.inf


def limit_cpus(cores: float) -> None:
    """Makes `available_cpus` of this process at most `cores`: what a scheduler reserved for it."""
    global _limit
    _limit = cores


def available_cpus(groups: str = "/proc/self/cgroup", mounted: str = "/sys/fs/cgroup") -> int:
    """CPU cores that this process may use, at least 1.

    The smallest of its affinity (taskset, Slurm), the CPU quota of its control groups (containers)
    and `limit_cpus`, rounded up.

    Args:
      groups: lists the control groups of the process.
      mounted: where their settings are.
    """
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    return max(1, math.ceil(min([cores, *_quotas(groups, Path(mounted)), _limit])))


def _quotas(groups: str, mounted: Path) -> Iterator[float]:
    """Cores that each limited group allows: those of the process, and all above."""
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
            # In a container the path may be that on the host, of which only the root is there.
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
