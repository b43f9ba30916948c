"""Leases: no work is done twice and no process waits for a dead one, on any kind of store."""

from __future__ import annotations

import contextlib
import json
import threading
from collections import Counter

import pytest
import tensorflow as tf

from efficientnet_ns.files import leases
from efficientnet_ns.files.leases import LeaseLost, Leases


@pytest.fixture(params=["local", "ram"])
def folder(request, tmp_path) -> str:
    """A local folder, and a store that has names but no folders, like an object store."""
    return str(tmp_path) if request.param == "local" else f"ram://{tmp_path}"


class Clock:
    """A clock that advances on sleep, `during` which something may happen."""

    def __init__(self):
        self.now, self.during = 0.0, None

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if self.during:
            action, self.during = self.during, None
            action()


@pytest.fixture
def clock(monkeypatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(leases, "time", fake)
    return fake


def write_lease(folder: str, token: str = "other", **values) -> str:
    """Writes the lease of a process on another machine; returns its path."""
    path = f"{folder}/.lease-a"
    tf.io.gfile.makedirs(folder)
    with tf.io.gfile.GFile(path, "w") as f:
        f.write(json.dumps({"machine": "far away", "pid": 1, "token": token, **values}) + "\n")
    return path


def content(path: str) -> dict:
    with tf.io.gfile.GFile(path) as f:
        return json.loads(f.read().splitlines()[-1])


def leases_in(folder: str) -> list[str]:
    return [name for name in tf.io.gfile.listdir(folder) if name.startswith(".lease")]


def test_every_unit_is_done_once(folder):
    """Five workers compete at full speed."""
    units = [f"unit-{i}" for i in range(12)]
    finished, work, errors = set(), Counter(), []

    def worker():
        try:
            mine = Leases(folder, lease_seconds=60, settle_seconds=0.05)
            for unit, lease in mine.claims(units, finished.__contains__):
                work[unit] += 1
                lease.check()
                finished.add(unit)
        except Exception as e:
            errors.append(e)

    threads = [threading.Thread(target=worker) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert work == Counter(units)
    assert leases_in(folder) == []


def test_held_unit_is_not_given_out(folder):
    first, second = (Leases(folder, 30, 0) for _ in range(2))
    lease = first.claim("a")
    assert second.claim("a") is None
    other = second.claim("b")
    assert other is not None
    lease.release()
    again = second.claim("a")
    assert again is not None
    for held in (other, again):
        held.release()


def test_names_that_begin_alike(folder):
    """A lease of `a` is not one of `a-1`."""
    first, second = (Leases(folder, 30, 0) for _ in range(2))
    leases = [first.claim("x-00001"), second.claim("x-0000")]
    assert all(leases)
    for lease in leases:
        lease.release()


def test_silent_lease_is_taken_over_after_its_time(folder, clock):
    path = write_lease(folder)
    mine = Leases(folder, lease_seconds=100, settle_seconds=0)
    assert mine.claim("a") is None
    clock.now = 99
    assert mine.claim("a") is None
    clock.now = 101
    lease = mine.claim("a")
    assert lease is not None
    assert content(path)["token"] != "other"
    lease.release()
    assert leases_in(folder) == []


def test_beating_lease_is_never_taken_over(folder, clock):
    mine = Leases(folder, lease_seconds=100, settle_seconds=0)
    for beat in range(5):
        write_lease(folder, beat=beat)
        clock.now += 99
        assert mine.claim("a") is None


def test_dead_process_of_this_machine_is_seen_at_once(folder, monkeypatch):
    path = write_lease(folder, machine=leases._this_process()["machine"], pid=4242)
    mine = Leases(folder, 100, 0)
    monkeypatch.setattr(leases.atomic, "is_running", lambda pid: pid != 4242)
    lease = mine.claim("a")
    assert lease is not None
    assert content(path)["token"] != "other"
    lease.release()
    assert leases_in(folder) == []


@pytest.mark.parametrize("text", ["", '{"machine": "far'])
def test_lease_that_is_being_written_is_respected(folder, clock, text):
    path = f"{folder}/.lease-a"
    tf.io.gfile.makedirs(folder)
    with tf.io.gfile.GFile(path, "w") as f:
        f.write(text)
    assert Leases(folder, 100, 0).claim("a") is None


def test_the_last_of_two_claims_at_once_has_the_unit(folder, clock):
    """A rival that checked before this claim was visible writes its own while this one settles."""
    mine = Leases(folder, 100, 1)
    clock.during = lambda: write_lease(folder, beat=1)
    assert mine.claim("a") is None
    assert content(f"{folder}/.lease-a")["token"] == "other"


@pytest.mark.parametrize("how", ["removed", "taken over"])
def test_lost_lease_is_noticed(folder, how):
    lease = Leases(folder, 30, 0).claim("a")
    lease.check()
    if how == "removed":
        tf.io.gfile.remove(lease.path)
    else:
        write_lease(folder)
    with pytest.raises(LeaseLost, match="another process took this work over"):
        lease.check()
    lease.release()
    # The rival's lease remains.
    assert leases_in(folder) == ([] if how == "removed" else [".lease-a"])


def test_heartbeat(folder):
    lease = Leases(folder, 0.05, 0).claim("a")

    def beat() -> int:
        # The file may be read while it is written.
        with contextlib.suppress(ValueError, IndexError):
            return content(lease.path)["beat"]
        return 0

    first, seen = beat(), threading.Event()
    for _ in range(1000):
        if beat() > first + 2:
            seen.set()
            break
        seen.wait(0.01)
    lease.release()
    assert seen.is_set()


def test_waits_for_what_others_hold(folder, clock):
    """Retries a unit held by another process until it is done or its owner is silent."""
    write_lease(folder)
    mine = Leases(folder, lease_seconds=100, settle_seconds=0)
    finished = set()
    got = []
    for unit, _ in mine.claims(["a", "b"], finished.__contains__):
        got.append((unit, clock.now > 100))
        finished.add(unit)
    assert got == [("b", False), ("a", True)]


def test_lease_is_released_when_the_work_fails(folder):
    claims = Leases(folder, 30, 0).claims(["a"], lambda unit: False)
    with pytest.raises(RuntimeError), contextlib.closing(claims):
        for _ in claims:
            raise RuntimeError
    assert leases_in(folder) == []
