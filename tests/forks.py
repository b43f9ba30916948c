"""Runs Python programs in separate processes without loading TensorFlow, which takes seconds.

They are forks of one process that has loaded TensorFlow but never uses it. How a program behaves while
it loads (what it prints, what it imports) is tested with real processes.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]


def python(
    *arguments: object, cwd: Path | str = ROOT, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs `python -m module …`, `python -c code …` or `python file …` to its end.

    Args:
      env: variables in addition to those of this process.

    Returns:
      The completed process. As in `subprocess`, `returncode` is negative after a signal.
    """
    with tempfile.TemporaryDirectory() as folder:
        request = {
            "words": list(map(str, arguments)),
            "cwd": str(cwd),
            "env": {**os.environ, **(env or {})},
            "folder": folder,
        }
        server = _server()
        assert server.stdin and server.stdout
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        assert server.stdout.readline(), "the server of forks has ended"
        code, out, err = (Path(folder, name) for name in ("code", "out", "err"))
        while not code.is_symlink():
            assert server.poll() is None, "the server of forks has ended"
            time.sleep(0.02)
        texts = (path.read_text(errors="replace") for path in (out, err))
        return subprocess.CompletedProcess(request["words"], int(os.readlink(code)), *texts)


@functools.cache
def _server() -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore::DeprecationWarning", __file__],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(server.kill)
    return server


def _serve() -> None:
    """For each request, forks a process that forks the program and waits for it."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        if not os.fork():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            request = json.loads(line)
            program = os.fork()
            if not program:
                _become(**request)
            _, status = os.waitpid(program, 0)
            # A link appears atomically with its content.
            os.symlink(
                str(os.waitstatus_to_exitcode(status)), os.path.join(request["folder"], "code")
            )
            os._exit(0)
        print("forked", flush=True)


def _become(words: list[str], cwd: str, env: dict[str, str], folder: str) -> None:
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for number, name in enumerate((os.devnull, "out", "err")):
        flags = os.O_RDWR | (os.O_CREAT if number else 0)
        os.dup2(os.open(os.path.join(folder, name), flags, 0o600), number)
    code: object = 1
    try:
        _run(words)
        code = 0
    except SystemExit as e:
        code = e.code
    except BaseException:
        traceback.print_exc()
    if isinstance(code, str):
        print(code, file=sys.stderr)
    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
    finally:
        os._exit(code if isinstance(code, int) else int(code is not None))


def _run(words: list[str]) -> None:
    kind, *rest = words
    if kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(kind).parent))
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    import efficientnet_ns  # noqa: F401 - decides which Keras TensorFlow has

    # isort: split
    import tensorflow  # noqa: F401

    _serve()
