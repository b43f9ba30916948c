"""Labeling, selection and writing on a Ray cluster: one task per unit, on actors that hold the teacher.

This process distributes the units of `whole_set`, selects, and writes shards as Ray tasks. An actor
that Ray cannot place yet waits until a node has room; a unit whose actor or node is lost is requeued.
Only files are shared, so all nodes must have access to the folders.
"""

from __future__ import annotations

import contextlib
import logging as standard_logging
import math
import signal
import sys
import threading
from collections import Counter, deque
from collections.abc import Iterator
from typing import Any

from absl import logging

from efficientnet_ns.config import Config, ConfigError, RayConfig, SelectConfig
from efficientnet_ns.config.cpus import limit_cpus
from efficientnet_ns.files.progress import Progress
from efficientnet_ns.pipelines import whole_set
from efficientnet_ns.pipelines.whole_set import StepFailed, Unit
from efficientnet_ns.pseudo_labels import write

try:
    import ray
    import ray.exceptions
except ImportError as e:
    raise ConfigError(
        f"Ray cannot be imported ({e}): pip install 'efficientnet-ns[ray]', or in a clone "
        "pip install -r requirements-ray.txt"
    ) from e

_TICK = 1.0  # Seconds between checks for new resources.
_LOSSES = 10  # Actors lost in a row at one unit; then, the cause is not their nodes.


def label(prediction: Config, selection: SelectConfig, pool: RayConfig) -> dict[str, object]:
    """Labels all shards, selects, and writes the balanced records; skips finished work.

    Args:
      prediction: see `whole_set.unfinished`.
      selection: settings of the selection from these predictions.
      pool: settings of the cluster and its actors.

    Returns:
      See `whole_set.finish`.

    Raises:
      ConfigError, DataError, manifests.OutputConflict: See `predict.predict`, `selection.select` and
        `write.write`; existing outputs are checked before connecting to the cluster.
      StepFailed: If a unit ends every actor that it is assigned to, or no actor can start.
    """
    _resources(pool)
    units = whole_set.unfinished(prediction, selection)
    with _connected(pool.ray_address):
        refused = _Pool(prediction, pool, units).run() if units else []
        _write(selection, whole_set.select_shards(refused, selection))
    return whole_set.finish(prediction, selection)


@contextlib.contextmanager
def _connected(address: str) -> Iterator[None]:
    """Connects this process to the cluster while the block runs."""
    if ray.is_initialized():
        yield  # The code that connected also disconnects.
        return
    handler = signal.getsignal(signal.SIGTERM)
    # Ray prints events there, such as the death of a node.
    with contextlib.redirect_stdout(sys.stderr):
        try:
            ray.init(
                address=address or None, log_to_driver=False, logging_level=standard_logging.ERROR
            )
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, handler)  # Ray replaces it.
            yield
        finally:
            ray.shutdown()


def _resources(pool: RayConfig) -> dict[str, float]:
    """Returns the resources that an actor reserves, by Ray's names."""
    needed = {"CPU": pool.cpus_per_actor, "GPU": pool.gpus_per_actor}
    for part in filter(None, pool.resources_per_actor.split(",")):
        name, _, amount = part.strip().partition("=")
        try:
            needed[name] = float(amount)
        except ValueError:
            needed[name] = math.nan
        # Not `<= 0`, which is false for NaN.
        if not needed[name] > 0 or name in ("", "CPU", "GPU"):
            raise ConfigError(
                f"--resources_per_actor={pool.resources_per_actor}: {part!r} is not name=amount of a "
                "resource other than CPU and GPU"
            )
    return {name: amount for name, amount in needed.items() if amount}


class _Labeler:
    """An actor that runs the teacher on the cores reserved for it."""

    def __init__(self, prediction: Config, cpus: float):
        limit_cpus(cpus)
        self._prediction = prediction

    def load(self) -> None:
        """Loads the teacher."""
        self._teacher = whole_set.load_teacher(self._prediction)

    def label(self, unit: Unit) -> str:
        """See `whole_set.label`."""
        return whole_set.label(self._prediction, unit, self._teacher)


class _Pool:
    """Labels units on as many actors as there is room for.

    Every actor has one call, which loads the teacher (this waits until Ray has placed the actor) or
    labels a unit. Actors without work are removed.
    """

    def __init__(self, prediction: Config, options: RayConfig, units: list[Unit]):
        self._prediction, self._options = prediction, options
        self._needed = _resources(options)
        others = {k: v for k, v in self._needed.items() if k not in ("CPU", "GPU")}
        self._actor: Any = ray.remote(_Labeler).options(
            num_cpus=options.cpus_per_actor, num_gpus=options.gpus_per_actor, resources=others
        )
        self._waiting = deque(units)
        # Call → (actor, its unit; None while it loads the teacher).
        self._calls: dict[Any, tuple[Any, Unit | None]] = {}
        self._losses: Counter[Unit | None] = Counter()

    def run(self) -> list[str]:
        """Labels all units; returns the messages of `whole_set.label`."""
        refused = []
        if not _places(ray.cluster_resources(), self._needed):
            logging.warning("no node has room for an actor, which needs %s: waiting", self._needed)
        with Progress(len(self._waiting), "labeling", "shards") as progress:
            while self._waiting or self._working():
                self._grow()
                finished, _ = _wait(list(self._calls))
                for call in finished:
                    actor, unit = self._calls.pop(call)
                    try:
                        reason = _result(call)
                    except ray.exceptions.RayError as e:
                        self._lose(actor, unit, e)
                        continue
                    # Only losses in a row count: this actor has loaded the teacher.
                    if unit is None:
                        self._losses[None] = 0
                    else:
                        refused.append(reason)
                        progress.update(1, f"{len(self._calls) + 1} actors")
                    if self._waiting:
                        given = self._waiting.popleft()
                        self._calls[actor.label.remote(given)] = actor, given
                    else:
                        ray.kill(actor)
        # Actors that are still loading the teacher or waiting to be placed.
        for actor, _ in self._calls.values():
            ray.kill(actor)
        return refused

    def _working(self) -> int:
        return sum(unit is not None for _, unit in self._calls.values())

    def _grow(self) -> None:
        """Requests the minimum number of actors, and more if there is room."""
        actors, working = len(self._calls), self._working()
        # Actors that Ray has not placed yet will also need room.
        room = _places(ray.available_resources(), self._needed) - (actors - working)
        limit = min(self._options.max_actors or math.inf, len(self._waiting) + working)
        for _ in range(actors, int(min(max(self._options.min_actors, actors + room), limit))):
            actor = self._actor.remote(self._prediction, self._options.cpus_per_actor)
            self._calls[actor.load.remote()] = actor, None

    def _lose(self, actor: Any, unit: Unit | None, error: Exception) -> None:
        """Requeues the unit of a lost actor as the last one, because its lease may still be held."""
        ray.kill(actor)
        self._losses[unit] += 1
        what = f"shard {unit[1]}" if unit else "loading the teacher"
        if self._losses[unit] >= _LOSSES:
            raise StepFailed(f"{what} ended {_LOSSES} actors in a row: {error}")
        logging.warning("an actor was lost at %s", what)
        if unit is not None:
            self._waiting.append(unit)


def _places(resources: dict[str, float], needed: dict[str, float]) -> int:
    """Returns how many actors fit into resources, as if one node had them all."""
    return int(min(resources.get(name, 0.0) / amount for name, amount in needed.items()))


def _wait(calls: list[Any]) -> tuple[list[Any], list[Any]]:
    """Returns (the call that finished within a tick, if any; the other calls)."""
    try:
        return ray.wait(calls, timeout=_TICK)
    except SystemError as e:  # The cause is what a signal handler raised in Ray's native code.
        raise e.__cause__ or e from None


def _result(call: Any) -> Any:
    """Returns the result of a finished call; raises errors of our code unchanged."""
    try:
        return ray.get(call)
    except ray.exceptions.RayTaskError as e:
        # It is also a RayError, so it would be treated as the loss of an actor.
        raise e.cause from e


def _write(selection: SelectConfig, shards: list[int]) -> None:
    one = ray.remote(write.write_shards).options(num_cpus=1, max_retries=_LOSSES)
    waiting = [one.remote(selection, group) for group in whole_set.groups(shards)]
    with Progress(len(waiting), "writing balanced records", "groups of shards") as progress:
        while waiting:
            finished, waiting = _wait(waiting)
            for call in finished:
                _result(call)
                progress.update(1)
