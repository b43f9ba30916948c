"""Who works on what, agreed through one shared folder, without a coordinator.

Every process that wants a unit of work (a shard) writes a lease: a small file of its own beside the
outputs, `.lease-<unit>-<token>`, with its owner and a counter. The store needs to show a file in
listings once it is written; it needs neither an atomic rename nor an exclusive create, so that a
local folder, NFS and object stores (`gs://`) all do.

Claiming:
  1. List the leases of the unit. If another living one is there, the unit is taken.
  2. Write the own lease, in state `claiming`. Wait for the settle time, in which everybody who
     listed before this lease was visible has written theirs.
  3. List again. If another living lease is `held`, or has a lower token, give way: remove the own.
  4. Else write the own lease again, in state `held`.

Holding: a thread counts the own lease's `beat` up. A lease whose content did not change for
`lease_seconds` *of the observer's own monotonic clock* is dead: no clock is compared with another
machine's, and no file times are read. The owner's process being gone, when the observer is on the
same machine, is the same sign at once. Who takes a unit over removes the dead lease.

When a process stalls for longer than the settle time inside a claim, or for longer than
`lease_seconds` while it holds, two may work on one unit. That costs time and nothing else: every
output is written under a private name, appears whole, and has the same content whoever made it. The
slower one finds its lease gone, or the unit done, and leaves it.
"""

from __future__ import annotations

import contextlib
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

from efficientnet_ns.data import manifests

_CLAIMING, _HELD = "claiming", "held"


class LeaseLost(RuntimeError):
    """Another process has taken the unit over."""


class Lease:
    """The right to work on one unit, kept alive by a thread until it is released.

    Args:
      path: of the lease file.
      owner: what the file says besides state and beat.
      beat_seconds: between two signs of life.
    """

    def __init__(self, path: str, owner: dict[str, Any], beat_seconds: float):
        self.path, self._owner, self._seconds = path, owner, beat_seconds
        self._beat, self._stop, self._lost = 0, threading.Event(), False
        self._thread: threading.Thread | None = None
        self._write(_CLAIMING)

    def hold(self) -> None:
        """Says that the claim succeeded, and begins to show signs of life."""
        self._write(_HELD)
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """LeaseLost if it was taken away; to be asked before results are published."""
        if self._lost or not tf.io.gfile.exists(self.path):
            self._lost = True
            raise LeaseLost(f"{self.path} is gone: another process took this work over")

    def release(self) -> None:
        """Gives the unit back."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        with contextlib.suppress(tf.errors.NotFoundError):
            tf.io.gfile.remove(self.path)

    def _write(self, state: str) -> None:
        self._beat += 1
        with tf.io.gfile.GFile(self.path, "w") as f:
            f.write(json.dumps({**self._owner, "state": state, "beat": self._beat}) + "\n")

    def _keep(self) -> None:
        while not self._stop.wait(self._seconds):
            try:
                self.check()
                self._write(_HELD)
            except LeaseLost:
                return
            except (OSError, tf.errors.OpError) as e:
                # A hiccup of the store: there is time for several more attempts.
                logging.warning("%s could not be renewed: %s", self.path, e)


class Queue:
    """Units of work that processes with the same `folder` divide among themselves.

    Args:
      folder: where the leases lie.
      lease_seconds: without a change, after which a lease is dead.
      settle_seconds: longest time between a write and everybody's seeing it; None: by the kind
        of the path.
    """

    def __init__(self, folder: str, lease_seconds: float, settle_seconds: float | None = None):
        self._folder, self._lease_seconds = folder, lease_seconds
        if settle_seconds is None:
            settle_seconds = 2.0 if "://" in folder else 0.02
        self._settle = settle_seconds
        self._token = secrets.token_hex(8)
        self._seen: dict[str, tuple[str, float]] = {}
        tf.io.gfile.makedirs(folder)

    def claims(
        self, units: Sequence[str], done: Callable[[str], bool]
    ) -> Iterator[tuple[str, Lease]]:
        """Yields units that are not done with a lease on each; returns when all are done.

        The consumer works on the unit before it asks for the next; one that is not done then
        comes again. Units that others hold are waited for, and taken over when their owners die.

        Args:
          units: names, usable in file names, in order of preference.
          done: whether a unit needs no more work.
        """
        waiting, told = list(units), False
        while waiting:
            claimed = False
            for unit in list(waiting):
                if done(unit):
                    waiting.remove(unit)
                    continue
                lease = self.claim(unit)
                if lease is None:
                    continue
                claimed, told = True, False
                try:
                    # It may have been finished between the two looks.
                    if not done(unit):
                        yield unit, lease
                finally:
                    lease.release()
            if waiting and not claimed:
                if not told:
                    logging.info("waiting for %s, which other processes hold", ", ".join(waiting))
                told = True
                time.sleep(min(5.0, self._lease_seconds / 5) * random.uniform(0.5, 1))

    def claim(self, unit: str) -> Lease | None:
        """A lease on the unit, or None when another process has it."""
        dead: list[str] = []
        if self._rivals(unit, dead):
            return None
        path = os.path.join(self._folder, f".lease-{unit}-{self._token}")
        owner = {**_identity(), "token": self._token}
        lease = Lease(path, owner, self._lease_seconds / 5)
        time.sleep(self._settle)
        for token, state in self._rivals(unit, dead).items():
            if state != _CLAIMING or token < self._token:
                lease.release()
                return None
        lease.hold()
        for path in dead:
            with contextlib.suppress(tf.errors.NotFoundError):
                tf.io.gfile.remove(path)
        return lease

    def _rivals(self, unit: str, dead: list[str]) -> dict[str, str]:
        """{token: state} of the living leases of others; paths of dead ones go to `dead`."""
        living = {}
        prefix = f".lease-{unit}-"
        for name in tf.io.gfile.listdir(self._folder):
            if not name.startswith(prefix) or name.endswith(self._token):
                continue
            path = os.path.join(self._folder, name)
            content = _read(path)
            if content is None:
                continue
            record = _parse(content)
            if self._is_dead(path, content, record):
                dead.append(path)
            else:
                # One that is being written is taken for held: whoever doubts gives way.
                living[name[len(prefix) :]] = record.get("state", _HELD)
        return living

    def _is_dead(self, path: str, content: str, record: dict[str, Any]) -> bool:
        now = time.monotonic()
        known, since = self._seen.get(path, (None, now))
        if content != known:
            self._seen[path] = (content, now)
        elif now - since > self._lease_seconds:
            return True
        return record.get("machine") == _identity()["machine"] and not manifests.is_running(
            record["pid"]
        )


def _read(path: str) -> str | None:
    try:
        with tf.io.gfile.GFile(path) as f:
            return f.read()
    except tf.errors.NotFoundError:
        return None


def _parse(content: str) -> dict[str, Any]:
    # The last line: there are stores (`ram://`) where writing an existing file appends to it.
    try:
        return json.loads(content.splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        return {}


def _identity() -> dict[str, Any]:
    """This process; `machine` differs between machines, containers and reboots."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as f:
            boot = f.read().strip()
    except OSError:
        boot = "?"
    host = socket.gethostname()
    return {"host": host, "machine": f"{host}/{boot}", "pid": os.getpid()}
