"""Two processes never train in one folder, and none waits for a dead process."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys

import pytest

from efficientnet_ns.files import leases
from efficientnet_ns.files.leases import LeaseLost
from efficientnet_ns.training import model_dir_lock
from efficientnet_ns.training.claim import DirectoryConflict
from efficientnet_ns.training.model_dir_lock import ModelDirLock


class Clock:
    """A clock that advances only in `sleep`, which also calls `meanwhile`."""

    def __init__(self):
        self.now, self.meanwhile = 0.0, lambda: None

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.meanwhile()


@pytest.fixture
def clock(monkeypatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(leases, "time", fake)
    return fake


def write_lease(folder, **values) -> None:
    """Writes the lease of a process on another machine."""
    owner = {"host": "far", "machine": "far/1", "pid": 7, "token": "other", **values}
    (folder / ".lease-training").write_text(json.dumps(owner) + "\n")


def owner_of(folder) -> dict:
    return json.loads((folder / ".lease-training").read_text())


def test_second_process_of_this_machine_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(model_dir_lock, "LEASE_SECONDS", 2.0)
    named = f"process {os.getpid()} on {socket.gethostname()} is training in {tmp_path}"
    with ModelDirLock(str(tmp_path)) as first:
        first.acquire_if_free()
        with (
            ModelDirLock(str(tmp_path)) as second,
            pytest.raises(DirectoryConflict, match=re.escape(named)),
        ):
            second.acquire_if_free()
        first.acquire()
        first.check()
    assert list(tmp_path.iterdir()) == []


def test_killed_process_of_this_machine_is_followed_at_once(tmp_path, clock):
    """Even if it is a zombie, because its parent has not waited for it."""
    code = (
        "import sys, time; from efficientnet_ns.training.model_dir_lock import ModelDirLock; "
        "ModelDirLock(sys.argv[1]).acquire_if_free(); print('held', flush=True); time.sleep(1000)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    process.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert owner_of(tmp_path)["pid"] == process.pid
    with ModelDirLock(str(tmp_path)) as mine:
        mine.acquire_if_free()
        assert owner_of(tmp_path)["pid"] == os.getpid()
        assert clock.now < 0.1
    process.communicate()


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="processes have no start times")
def test_number_of_a_dead_process_may_be_this_ones(tmp_path, clock):
    """A restarted container has the same machine and the same process ID."""
    this = leases._this_process()
    write_lease(tmp_path, **{**this, "started": "1"})
    with ModelDirLock(str(tmp_path)) as mine:
        mine.acquire_if_free()
        assert owner_of(tmp_path)["started"] == this["started"]
        assert clock.now < 0.1


def test_training_on_another_machine_is_refused_when_it_shows_a_sign(tmp_path, clock):
    write_lease(tmp_path, beat=1)
    clock.meanwhile = lambda: write_lease(tmp_path, beat=2)
    with ModelDirLock(str(tmp_path)) as mine:
        mine.acquire_if_free()
        with pytest.raises(DirectoryConflict, match="process 7 on far is training in"):
            mine.acquire()
    assert owner_of(tmp_path)["token"] == "other"


def test_lost_machine_is_followed_without_a_wait_if_the_model_takes_as_long(tmp_path, clock):
    write_lease(tmp_path)
    with ModelDirLock(str(tmp_path)) as mine:
        mine.acquire_if_free()
        assert clock.now == 0 and owner_of(tmp_path)["token"] == "other"
        clock.now = building = model_dir_lock.LEASE_SECONDS + 1
        mine.acquire()
        assert clock.now < building + 0.1
        assert owner_of(tmp_path)["pid"] == os.getpid()


def test_lost_machine_is_followed_after_its_time(tmp_path, clock):
    write_lease(tmp_path)
    with ModelDirLock(str(tmp_path)) as mine:
        mine.acquire_if_free()
        mine.acquire()
        assert model_dir_lock.LEASE_SECONDS < clock.now < model_dir_lock.LEASE_SECONDS + 1


def test_process_that_stood_still_notices_its_follower(tmp_path):
    with ModelDirLock(str(tmp_path)) as mine:
        mine.acquire_if_free()
        write_lease(tmp_path)
        with pytest.raises(LeaseLost, match="process 7 on far took this work over"):
            mine.check()
    assert owner_of(tmp_path)["token"] == "other"


def test_lease_that_was_deleted_stops_nothing(tmp_path):
    with ModelDirLock(str(tmp_path)) as mine:
        mine.acquire_if_free()
        (tmp_path / ".lease-training").unlink()
        mine.check()
