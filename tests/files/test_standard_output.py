"""Standard output that is closed or full."""

from __future__ import annotations

import os
import sys

import pytest

from efficientnet_ns.files import standard_output


def test_closed_standard_output_and_error_are_replaced(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    with standard_output.quiet_when_unread():
        print("to nobody")
        assert sys.stdout.encoding
        assert not sys.stderr.isatty()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has it")
@pytest.mark.parametrize("at_once", [False, True])
def test_full_standard_output_is_one_line(at_once, monkeypatch, capfd):
    full = os.fdopen(os.open("/dev/full", os.O_WRONLY), "w", encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", full)
    with pytest.raises(SystemExit) as stopped, standard_output.quiet_when_unread():
        print("for nobody", flush=at_once)
    full.close()
    assert stopped.value.code == 2
    assert capfd.readouterr().err == "standard output: No space left on device\n"


def test_a_full_disk_elsewhere_is_not_taken_for_it():
    with pytest.raises(OSError, match="weights"), standard_output.quiet_when_unread():
        raise OSError(28, "No space left on device", "weights")
