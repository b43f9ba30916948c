"""Signals: the first requests a stop, a later one ends the program, and exit codes tell why."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from efficientnet_ns.config import preemption
from efficientnet_ns.config.preemption import Preempted, StopRequest

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def signals_are_not_ignored():
    """Undoes `nohup` in this process and in the programs that it starts."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def send(number: int) -> None:
    """Sends a signal to this process and waits until it is handled."""
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


@pytest.mark.parametrize("number", preemption.SIGNALS)
def test_work_that_can_be_cut_is_cut(number):
    with StopRequest() as stop:
        with pytest.raises(Preempted, match=signal.Signals(number).name), stop.immediate():
            send(number)
            pytest.fail("not cut")
        assert stop.requested


def test_an_ignored_lost_terminal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            send(signal.SIGHUP)
            assert not stop.requested
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


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
    """Starts a program whose `main` is `body` (indented by 4), which must first print `ready`."""
    code = f"""
import os, signal, sys, time
from efficientnet_ns import config
from efficientnet_ns.config import preemption
def main():
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


def in_child(work) -> tuple[int, int]:
    """Forks a child that runs `work`; returns its process ID and a pipe that signals `ready`."""
    ready, says_ready = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            work(lambda: os.write(says_ready, b"1"))
        finally:
            os._exit(3)
    return child, ready


def never_look(ready) -> None:
    with StopRequest():
        ready()
        while True:
            time.sleep(0.001)


def test_a_later_signal_ends_work_that_never_looks(monkeypatch):
    monkeypatch.setattr(preemption, "SAME_REQUEST_SECONDS", 0.02)
    child, ready = in_child(never_look)
    os.read(ready, 1)
    os.kill(child, signal.SIGTERM)
    ended, status = 0, 0
    while not ended:
        time.sleep(0.03)
        os.kill(child, signal.SIGTERM)
        ended, status = os.waitpid(child, os.WNOHANG)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGTERM


@pytest.mark.parametrize("second", preemption.SIGNALS)
def test_signals_in_quick_succession_are_one_request(second):
    with StopRequest() as stop:
        send(signal.SIGTERM)
        send(second)  # Sent separately so that both reach the handler.
        assert stop.requested
        with pytest.raises(Preempted), stop.immediate():
            pytest.fail("a request from before is heeded at the door")
        send(second)


def test_a_signal_inside_native_code_is_heeded_after_it():
    """The main thread is inside a C function, as in a host loop on a device."""
    with StopRequest() as stop:
        threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGTERM)).start()
        while not stop.requested:
            hashlib.pbkdf2_hmac("sha256", b"", b"", 300_000)


def test_a_forked_worker_that_is_ended_asks_nothing_of_its_parent():
    with StopRequest() as stop:
        child, ready = in_child(lambda ready: (ready(), signal.pause()))
        os.read(ready, 1)
        os.kill(child, signal.SIGTERM)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGTERM
        assert not stop.requested


HELD_UP = """
import contextlib, ctypes, signal, sys
from efficientnet_ns.config import preemption

preemption.HELD_UP_SECONDS = 0.3
where, seconds = sys.argv[1:]
with preemption.StopRequest() as stop:
    with stop.immediate() if where == "anywhere" else contextlib.nullcontext():
        # The other thread gets the signal, so that it does not end what the main thread waits for. It is sent from
        # within the native call: before it, the main thread would still answer by itself.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        ctypes.CDLL(None).system(b"kill -TERM $PPID; exec sleep %s >&-" % seconds.encode())
    print("saved", flush=True)
"""


@pytest.mark.parametrize(
    ("where", "seconds", "code", "printed"),
    [("anywhere", 30, preemption.EXIT_CODE, ""), ("loop", 2, 0, "saved\n")],
)
def test_a_main_thread_that_is_held_up(where, seconds, code, printed):
    """A main thread stuck in a store request is ended; an equally long host loop continues."""
    done = subprocess.run(
        [sys.executable, "-c", HELD_UP, where, str(seconds)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert (done.returncode, done.stdout) == (code, printed)
