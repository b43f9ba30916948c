"""Assigns units of work to processes through one shared folder, without a coordinator.

A process that works on a unit, such as a shard, keeps a lease in the folder: the file
`.lease-<unit>` with its owner and a counter, the heartbeat, which a thread increments. A lease is
dead if it does not change for `lease_seconds` of the observer's own monotonic clock (so clocks are
never compared), or if its process on this machine has ended (its ID may belong to a new process).

To claim a unit without a live lease, a process writes its own lease, waits until others that looked
at the same moment have written theirs, and reads it again: the last writer has the unit. Stores
therefore need neither atomic renames nor exclusive creation: local folders, NFS and `gs://` all work.

If a process stalls for too long, two may work on one unit. This only costs time: every output is
written under a private name, is published atomically, and has the same content regardless of who
made it. A process that finds another lease in place of its own gives up the unit.

`pseudo_labels.predict` leases shards, `training.model_dir_lock` a model_dir.
"""

from __future__ import annotations

import json
import os
import random
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf
from absl import logging

from efficientnet_ns.files import atomic, object_stores

# Errors that storage raises.
STORE_ERRORS = (OSError, tf.errors.OpError)


_NAME = ".lease-"


def unit_of(name: str) -> str | None:
    """Returns the unit whose lease has this file name; None for other names."""
    return name.removeprefix(_NAME) if name.startswith(_NAME) else None


class LeaseLost(RuntimeError):
    """Another process has taken over the unit."""


class UnitHeld(RuntimeError):
    """Another live process works on the unit."""


class Lease:
    """The right to work on one unit, kept alive by a thread until it is released.

    Args:
      path: path of the lease file.
      seconds: interval between two heartbeats.

    Attributes:
      heartbeat: a thread; start it when the claim has succeeded.
    """

    def __init__(self, path: str, seconds: float):
        self.path, self._seconds, self._beat = path, seconds, 0
        self._owner = {**_this_process(), "token": secrets.token_hex(8)}
        self._stop, self._lock = threading.Event(), threading.Lock()
        # A daemon, because a lease must not keep a process alive that ends with an error.
        self.heartbeat = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._write()

    def is_mine(self) -> bool:
        """Checks whether the file is still the one that this lease wrote."""
        with self._lock:  # The heartbeat may be writing it.
            return _parse(_read(self.path) or "").get("token") == self._owner["token"]

    def check(self) -> None:
        """Raises LeaseLost if the unit was taken over; call it before publishing results."""
        if not self.is_mine():
            raise LeaseLost(f"{self.path}: another process took this work over")

    def check_not_taken(self) -> None:
        """Like `check`, but does not interpret a deleted lease file as a takeover."""
        owner = _parse(_read(self.path))
        if owner and not self.is_mine():
            raise LeaseLost(f"{self.path}: {_described(owner)} took this work over")

    def release(self) -> None:
        """Gives the unit back."""
        self._stop.set()
        if self.heartbeat.ident is not None:
            # It must not write the file again after it is removed.
            self.heartbeat.join()
        if self.is_mine():
            object_stores.remove(self.path)

    def _write(self) -> None:
        self._beat += 1
        with self._lock, tf.io.gfile.GFile(self.path, "w") as f:
            f.write(json.dumps({**self._owner, "beat": self._beat}) + "\n")

    def _keep(self) -> None:
        while not self._stop.wait(self._seconds):
            try:
                self.check()
                self._write()
            except LeaseLost:
                return
            except STORE_ERRORS as e:
                # A temporary store error: there is time for several more attempts.
                logging.warning("%s could not be renewed: %s", self.path, e)


class Leases:
    """Units of work that processes with the same `folder` divide among themselves.

    Args:
      folder: folder of the leases.
      lease_seconds: time after which a lease without a heartbeat is dead.
      settle_seconds: maximum time until a write is visible to all processes; None chooses it by the
        kind of path.
    """

    def __init__(self, folder: str, lease_seconds: float, settle_seconds: float | None = None):
        self._folder, self._lease_seconds = folder, lease_seconds
        if settle_seconds is None:
            # Object stores may return an old version for a moment.
            settle_seconds = 2.0 if object_stores.is_object_store(folder) else 0.02
        self._settle = settle_seconds
        # Path → (content, time of its last change by the clock of this process).
        self._seen: dict[str, tuple[str, float]] = {}
        object_stores.make_folder(folder)

    def claims(
        self,
        units: Sequence[str],
        done: Callable[[str], bool],
        still_undone: Callable[[str], bool] | None = None,
    ) -> Iterator[tuple[str, Lease]]:
        """Yields each unit that is not done with a lease on it; returns when all are done.

        The consumer works on the unit before it requests the next one. A unit that is not done by
        then is yielded again. Waits for units that others hold and takes them over if the owners die.

        Args:
          units: names, usable in file names, in order of preference.
          done: checks whether a unit needs no more work. Called often; may be slightly out of date.
          still_undone: an up-to-date check, called once when the unit is claimed; None for not
            `done`.
        """
        undone = still_undone or (lambda unit: not done(unit))
        waiting, logged = list(units), False
        while waiting:
            claimed = False
            for unit in list(waiting):
                if done(unit):
                    waiting.remove(unit)
                    continue
                lease = self.claim(unit)
                if lease is None:
                    continue
                claimed, logged = True, False
                try:
                    # It may have been finished between the two checks.
                    if undone(unit):
                        yield unit, lease
                finally:
                    lease.release()
            if waiting and not claimed:
                if not logged:
                    logging.info("waiting for %s, which other processes hold", ", ".join(waiting))
                logged = True
                # Random, so that processes that wait for one unit do not all write at once.
                time.sleep(min(5.0, self._lease_seconds / 5) * random.uniform(0.5, 1))

    def claim(self, unit: str) -> Lease | None:
        """Claims the unit; returns None if another process has it."""
        path = self._path(unit)
        if self._is_alive(path):
            return None
        lease = Lease(path, self._lease_seconds / 5)
        time.sleep(self._settle)
        if not lease.is_mine():
            return None
        lease.heartbeat.start()
        return lease

    def claim_or_refuse(self, unit: str) -> Lease:
        """Claims the unit, waiting if needed until another process's lease expires.

        The wait includes the time since this object first saw the other lease.

        Raises:
          UnitHeld: If the other process shows that it is alive.
        """
        path = self._path(unit)
        while True:
            known, _ = self._seen.get(path, (None, 0.0))
            lease = self.claim(unit)
            if lease is not None:
                return lease
            found, _ = self._seen.get(path, (None, 0.0))
            if None not in (known, found) and found != known:
                raise UnitHeld(_described(_parse(found) or _parse(known)))
            time.sleep(self._lease_seconds / 50)

    def is_held_here(self, unit: str) -> bool:
        """Checks whether a running process of this machine has the lease."""
        owner = _parse(_read(self._path(unit)))
        return bool(owner) and _is_here(owner) and _runs(owner)

    def _path(self, unit: str) -> str:
        return os.path.join(self._folder, f"{_NAME}{unit}")

    def _is_alive(self, path: str) -> bool:
        """Checks whether there is a lease with a heartbeat and, on this machine, a live process."""
        content, now = _read(path), time.monotonic()
        if content is None:
            self._seen.pop(path, None)
            return False
        known, since = self._seen.get(path, (None, now))
        if content != known:
            self._seen[path] = (content, now)
        elif now - since > self._lease_seconds:
            return False
        # A lease that is being written cannot be parsed yet, but is alive.
        owner = _parse(content)
        return not _is_here(owner) or _runs(owner)


def _read(path: str) -> str | None:
    content = object_stores.read(path)
    return None if content is None else content.decode("utf-8", "replace")


def _parse(content: str | None) -> dict[str, Any]:
    # Uses the last line, because some stores (`ram://`) append to an existing file.
    try:
        return json.loads((content or "").splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        return {}


def _is_here(owner: dict[str, Any]) -> bool:
    return owner.get("machine") == _this_process()["machine"]


def _runs(owner: dict[str, Any]) -> bool:
    """Checks whether a process of this machine runs, even if its ID was reused.

    In a restarted container, this very process often has the same ID.
    """
    pid, started = owner["pid"], owner.get("started")
    found = _start_of(pid) if started else None
    return found == started if found is not None else atomic.is_running(pid)


def _start_of(pid: int) -> str | None:
    """Returns when a process of this machine started, in Linux clock ticks; "" if it has ended.

    Returns None if unknown: the process has ended, or the system has no /proc or hides it.
    """
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as f:
            state, *values = f.read().rpartition(")")[2].split()
    except OSError:
        return None
    # A killed process is a zombie until its parent waits for it.
    return "" if state in ("Z", "X") else values[18]


def _described(owner: dict[str, Any]) -> str:
    return f"process {owner.get('pid', '?')} on {owner.get('host', '?')}"


def _this_process() -> dict[str, Any]:
    """Identifies this process; `machine` differs between machines, containers and reboots."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as f:
            boot = f.read().strip()
    except OSError:
        boot = "?"
    host = socket.gethostname()
    pid = os.getpid()
    return {"host": host, "machine": f"{host}/{boot}", "pid": pid, "started": _start_of(pid)}
