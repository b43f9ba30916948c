"""Who works on which unit, agreed through one shared folder, without a coordinator.

A process that works on a unit, such as a shard, keeps a lease in the folder: the file
`.lease-<unit>` with its owner and a counter, the heartbeat, which a thread counts up. A lease is dead
if it does not change for `lease_seconds` of the observer's own monotonic clock (so no two clocks are
compared), or if its process is gone from this machine (another process with its number is not it).

To claim a unit without a living lease, a process writes its own, waits until others that looked at
the same moment have written theirs, and reads it again: the last writer has the unit. So a store
needs neither atomic renames nor exclusive creation: local folders, NFS and `gs://` all do.

If a process stalls for too long, two may work on one unit. That only costs time: every output is
written under a private name, appears whole, and has the same content whoever made it. The process
that finds another's lease in place of its own gives the unit up.
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

# What storage raises.
STORE_ERRORS = (OSError, tf.errors.OpError)


_NAME = ".lease-"


def unit_of(name: str) -> str | None:
    """The unit whose lease has this file name; None for other names."""
    return name.removeprefix(_NAME) if name.startswith(_NAME) else None


class LeaseLost(RuntimeError):
    """Another process has taken the unit over."""


class UnitHeld(RuntimeError):
    """Another process, which is alive, works on the unit."""


class Lease:
    """The right to work on one unit, kept alive by a thread until it is released.

    Args:
      path: of the lease file.
      seconds: between two heartbeats.

    Attributes:
      heartbeat: a thread; to be started when the claim has succeeded.
    """

    def __init__(self, path: str, seconds: float):
        self.path, self._seconds, self._beat = path, seconds, 0
        self._owner = {**_this_process(), "token": secrets.token_hex(8)}
        self._stop, self._lock = threading.Event(), threading.Lock()
        # A daemon: a lease must not keep a process alive that ends with an error.
        self.heartbeat = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._write()

    def is_mine(self) -> bool:
        """Whether the file is still the one that this lease wrote."""
        with self._lock:  # The heartbeat may be writing it.
            return _parse(_read(self.path) or "").get("token") == self._owner["token"]

    def check(self) -> None:
        """Raises LeaseLost if the unit was taken over; to be called before results are published."""
        if not self.is_mine():
            raise LeaseLost(f"{self.path}: another process took this work over")

    def check_not_taken(self) -> None:
        """Like `check`, except that a lease file that was deleted is no sign of another process."""
        owner = _parse(_read(self.path))
        if owner and not self.is_mine():
            raise LeaseLost(f"{self.path}: {_described(owner)} took this work over")

    def release(self) -> None:
        """Gives the unit back."""
        self._stop.set()
        if self.heartbeat.ident is not None:
            # It must not write the file again once that is removed.
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
                # A hiccup of the store: there is time for several more attempts.
                logging.warning("%s could not be renewed: %s", self.path, e)


class Leases:
    """Units of work that processes with the same `folder` divide among themselves.

    Args:
      folder: where the leases lie.
      lease_seconds: after which a lease without a heartbeat is dead.
      settle_seconds: longest time until a write is seen by everybody; None: by the kind of path.
    """

    def __init__(self, folder: str, lease_seconds: float, settle_seconds: float | None = None):
        self._folder, self._lease_seconds = folder, lease_seconds
        if settle_seconds is None:
            # Object stores may return an old version for a moment.
            settle_seconds = 2.0 if object_stores.is_object_store(folder) else 0.02
        self._settle = settle_seconds
        # Path → (content, since when it has been the same by the clock of this process).
        self._seen: dict[str, tuple[str, float]] = {}
        object_stores.make_folder(folder)

    def claims(
        self,
        units: Sequence[str],
        done: Callable[[str], bool],
        still_undone: Callable[[str], bool] | None = None,
    ) -> Iterator[tuple[str, Lease]]:
        """Yields units that are not done with a lease on each; returns when all are done.

        The consumer works on the unit before it requests the next; one that is not done then
        comes again. Units that others hold are waited for, and taken over when their owners die.

        Args:
          units: names, usable in file names, in order of preference.
          done: whether a unit needs no more work. Called often; its result may be slightly out of date.
          still_undone: asked once when the unit is claimed, and knows; None: not `done`.
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
                    # It may have been finished between the two looks.
                    if undone(unit):
                        yield unit, lease
                finally:
                    lease.release()
            if waiting and not claimed:
                if not logged:
                    logging.info("waiting for %s, which other processes hold", ", ".join(waiting))
                logged = True
                # At random, so that those who wait for one unit do not all write at once.
                time.sleep(min(5.0, self._lease_seconds / 5) * random.uniform(0.5, 1))

    def claim(self, unit: str) -> Lease | None:
        """A lease on the unit, or None when another process has it."""
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
        """A lease on the unit, at the latest when that of another process is dead.

        The time since this object first saw the other's lease counts.

        Raises:
          UnitHeld: the other process shows that it is alive.
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
        """Whether the lease is that of another process of this machine that runs."""
        owner = _parse(_read(self._path(unit)))
        return bool(owner) and _is_here(owner) and _runs(owner)

    def _path(self, unit: str) -> str:
        return os.path.join(self._folder, f"{_NAME}{unit}")

    def _is_alive(self, path: str) -> bool:
        """Whether there is a lease, with a heartbeat and, on this machine, a running process."""
        content, now = _read(path), time.monotonic()
        if content is None:
            self._seen.pop(path, None)
            return False
        known, since = self._seen.get(path, (None, now))
        if content != known:
            self._seen[path] = (content, now)
        elif now - since > self._lease_seconds:
            return False
        # A lease that is being written is not readable yet, and alive.
        owner = _parse(content)
        return not _is_here(owner) or _runs(owner)


def _read(path: str) -> str | None:
    content = object_stores.read(path)
    return None if content is None else content.decode("utf-8", "replace")


def _parse(content: str | None) -> dict[str, Any]:
    # The last line: some stores (`ram://`) append when an existing file is written.
    try:
        return json.loads((content or "").splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        return {}


def _is_here(owner: dict[str, Any]) -> bool:
    return owner.get("machine") == _this_process()["machine"]


def _runs(owner: dict[str, Any]) -> bool:
    """Whether a process of this machine runs; another one may have its number by now.

    In a container that was started again, this very process often has.
    """
    pid, started = owner["pid"], owner.get("started")
    found = _start_of(pid) if started else None
    return found == started if found is not None else atomic.is_running(pid)


def _start_of(pid: int) -> str | None:
    """When a process of this machine started, in Linux's clock ticks; "" if it has ended.

    None if unknown: it has ended, or the system has no /proc, or hides it.
    """
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as f:
            state, *values = f.read().rpartition(")")[2].split()
    except OSError:
        return None
    # A killed process is a zombie until its parent takes notice.
    return "" if state in ("Z", "X") else values[18]


def _described(owner: dict[str, Any]) -> str:
    return f"process {owner.get('pid', '?')} on {owner.get('host', '?')}"


def _this_process() -> dict[str, Any]:
    """What identifies this process; `machine` differs between machines, containers and reboots."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as f:
            boot = f.read().strip()
    except OSError:
        boot = "?"
    host = socket.gethostname()
    pid = os.getpid()
    return {"host": host, "machine": f"{host}/{boot}", "pid": pid, "started": _start_of(pid)}
