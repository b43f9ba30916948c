"""Work in several processes, and how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from efficientnet_ns.config import preemption

ROOT = Path(__file__).parents[2]

LONG_JOBS = """
import os, pathlib, sys, time
from efficientnet_ns import config
from efficientnet_ns.config.processes import run_each

def work(path):
    print(os.getpid(), flush=True)
    time.sleep(600)
    pathlib.Path(path).touch()

def main():
    for _ in run_each(work, [(sys.argv[0] + str(i),) for i in range(4)], 2):
        pass

if __name__ == "__main__":
    config.run(main)
"""


def test_a_request_to_stop_ends_the_jobs_of_other_processes(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(LONG_JOBS)
    process = subprocess.Popen(
        [sys.executable, program],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        workers = [int(process.stdout.readline()) for _ in range(2)]
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=60)  # The job sleeps for much longer.
    finally:
        process.kill()
    assert process.returncode == preemption.EXIT_CODE, error
    assert [path.name for path in tmp_path.iterdir()] == ["program.py"]
    for worker in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(worker, 0)
