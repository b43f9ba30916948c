"""Lets only one process train in a model_dir; two would overwrite each other's files.

The process holds a lease there while it trains (see `files.leases`). After a process of this machine
is killed, the next one takes over at once. A process lost with its machine appears to still train
until its heartbeat has been missing for `LEASE_SECONDS`. The model is built in the meantime, so
most restarts do not wait.
"""

from __future__ import annotations

from absl import logging

from efficientnet_ns.files import leases
from efficientnet_ns.training.claim import DirectoryConflict

# A live process writes heartbeats five times as often.
LEASE_SECONDS = 10.0
_UNIT = "training"


class ModelDirLock:
    """A lock on a model_dir, held from `acquire` to the end of the block."""

    def __init__(self, folder: str):
        self._folder = folder
        self._leases: leases.Leases | None = None
        self._lease: leases.Lease | None = None

    def __enter__(self) -> ModelDirLock:
        return self

    def acquire_if_free(self) -> None:
        """Acquires the folder if it has no live lease.

        Raises:
          DirectoryConflict: If a process of this machine trains there; `acquire` handles those of
            other machines.
        """
        self._leases = leases.Leases(self._folder, LEASE_SECONDS)
        self._lease = self._leases.claim(_UNIT)
        # It certainly runs, so `acquire` raises at its next heartbeat, before a model is built.
        if self._lease is None and self._leases.is_held_here(_UNIT):
            self.acquire()

    def acquire(self) -> None:
        """Acquires the folder; call it after `acquire_if_free`, before anything is written.

        Raises:
          DirectoryConflict: If another live process trains in the folder.
        """
        if self._leases is None:
            raise RuntimeError("call acquire_if_free before acquire")
        if self._lease is not None:
            return
        try:
            self._lease = self._leases.claim_or_refuse(_UNIT)
        except leases.UnitHeld as e:
            raise DirectoryConflict(
                f"{e} is training in {self._folder}. Stop it, or choose another --model_dir."
            ) from e

    def check(self) -> None:
        """Raises leases.LeaseLost if another process has taken over the folder.

        That happens if this one was suspended for more than `LEASE_SECONDS`.
        """
        if self._lease is not None:
            self._lease.check_not_taken()

    def __exit__(self, *unused) -> None:
        if self._lease is None:
            return
        try:
            self._lease.release()
        # Training is over, or has raised its own error, which this one must not replace.
        except leases.STORE_ERRORS as e:
            logging.warning("cannot remove %s: %s", self._lease.path, e)
