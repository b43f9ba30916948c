"""Runs jobs in several processes on this machine."""

from __future__ import annotations

import concurrent.futures.process
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from efficientnet_ns.config import preemption


class ProcessDied(RuntimeError):
    """A process was killed."""


def run_each(
    function: Callable[..., Any],
    jobs: Iterable[tuple],
    processes: int,
    *,
    initializer: Callable[[], None] = preemption.end_with_parent,
) -> Iterator[tuple[tuple, Any]]:
    """Yields (job, function(*job)) as jobs finish; with `processes` below 2, in this process and in order.

    After an error, jobs that have not begun are dropped. The processes end when this one does, even
    by SIGKILL.

    Args:
      function: function at the top level of a module.
      jobs: arguments of the calls; they may be large, because only a few are queued at a time.
      initializer: runs first in each process; must call `preemption.end_with_parent`.

    Raises:
      ProcessDied: If a process was killed.
    """
    if processes < 2:
        yield from ((job, function(*job)) for job in jobs)
        return
    # Spawned, since TensorFlow's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(processes, context, initializer)
    waiting: dict[concurrent.futures.Future, tuple] = {}

    def finished() -> Iterator[tuple[tuple, Any]]:
        done, _ = concurrent.futures.wait(waiting, return_when=concurrent.futures.FIRST_COMPLETED)
        for future in done:
            yield waiting.pop(future), future.result()

    try:
        for job in jobs:
            # One job per process runs and one waits, so that no process is idle in between.
            if len(waiting) >= 2 * processes:
                yield from finished()
            waiting[pool.submit(function, *job)] = job
        while waiting:
            yield from finished()
    except concurrent.futures.process.BrokenProcessPool as e:
        raise ProcessDied(
            f"one of {processes} processes was killed, usually because memory ran out. "
            "Finished work is kept: start the same command again to continue, with a smaller "
            "--num_workers if memory was the cause"
        ) from e
    except preemption.Preempted:
        # Running jobs may take longer than a preempted machine waits. They can be interrupted
        # anywhere: unfinished work is redone.
        for process in multiprocessing.active_children():
            process.kill()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
