"""Work in several processes of this machine."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from efficientnet_ns.config import preemption


class ProcessDied(RuntimeError):
    """A process was ended from outside."""


def run_each(
    function: Callable[..., Any], jobs: Sequence[tuple], processes: int
) -> Iterator[tuple[tuple, Any]]:
    """Yields (job, function(*job)) as jobs finish; with one process in this one, in order.

    After an error, jobs that have not begun are dropped. The processes end when this one does, even
    by SIGKILL.

    Args:
      function: of a module's top level.

    Raises:
      ProcessDied: see there.
    """
    if processes < 2:
        yield from ((job, function(*job)) for job in jobs)
        return
    # Spawned, since TensorFlow's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        processes, context, preemption.end_with_parent
    ) as pool:
        waiting = {pool.submit(function, *job): job for job in jobs}
        try:
            for future in concurrent.futures.as_completed(waiting):
                yield waiting[future], future.result()
        except concurrent.futures.process.BrokenProcessPool as e:
            raise ProcessDied(
                "a process was ended from outside, perhaps because memory ran out: start the same "
                "command with fewer processes; what is finished is kept"
            ) from e
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
