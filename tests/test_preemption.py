"""Signals: the first asks, the second ends; programs answer with their exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from efficientnet_ns import preemption
from efficientnet_ns.preemption import Preempted, StopRequest

ROOT = Path(__file__).parent.parent


def send(number: int) -> None:
    """A signal to this process, handled when this returns."""
    os.kill(os.getpid(), number)
    threading.Event().wait(0.01)


@pytest.mark.parametrize("number", preemption.SIGNALS)
def test_a_request_waits_to_be_asked_for(number):
    before = [signal.getsignal(n) for n in preemption.SIGNALS]
    with StopRequest() as stop:
        assert not stop.requested
        send(number)
        assert stop.requested
        with pytest.raises(Preempted), stop.immediate():
            pytest.fail("a request from before is heeded at the door")
    assert [signal.getsignal(n) for n in preemption.SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.parametrize("number", preemption.SIGNALS)
def test_work_that_can_be_cut_is_cut(number):
    with StopRequest() as stop:
        with pytest.raises(Preempted, match=signal.Signals(number).name), stop.immediate():
            send(number)
            pytest.fail("not cut")
        assert stop.requested


def test_the_innermost_block_answers():
    with StopRequest() as outer, outer.immediate():
        with StopRequest() as inner:
            send(signal.SIGTERM)
            assert inner.requested and not outer.requested


def test_preempted_is_no_error_to_be_handled_on_the_way():
    assert not issubclass(Preempted, Exception)


def test_other_threads_cannot_take_signals():
    seen = []

    def work() -> None:
        with StopRequest() as stop:
            seen.append((stop.requested, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, signal.SIG_DFL)]


def program(body: str) -> subprocess.Popen:
    """A program whose `main` is `body` (indented by 4), which prints `ready` at first."""
    code = f"""
import hashlib, os, signal, sys, time
from efficientnet_ns import config, preemption
def main(argv):
{body}
config.run(main)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", preemption.SIGNALS)
def test_programs_end_with_their_code(number):
    process = program(
        "    try:\n"
        "        print('ready', flush=True)\n"
        "        time.sleep(60)\n"
        "    finally:\n"
        "        print('cleaned up')"
    )
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == preemption.EXIT_CODE == 75
    assert out == "cleaned up\n"
    assert "start the same command again to continue" in err and "Traceback" not in err


def test_the_second_signal_ends_work_that_never_looks():
    """The main thread is inside a C function all the time, as in a host loop of the device."""
    process = program(
        "    with preemption.StopRequest():\n"
        "        print('ready', flush=True)\n"
        "        hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"
    )
    process.send_signal(signal.SIGTERM)
    while "stopping when everything is saved" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert "SIGTERM again" in err


def test_a_forked_worker_that_is_ended_asks_nothing_of_its_parent():
    with StopRequest() as stop:
        ready, says_ready = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(says_ready, b"1")
            signal.pause()
            os._exit(0)
        os.read(ready, 1)
        os.kill(child, signal.SIGTERM)
        _, status = os.waitpid(child, 0)
        threading.Event().wait(0.01)
        assert os.WTERMSIG(status) == signal.SIGTERM
        assert not stop.requested
