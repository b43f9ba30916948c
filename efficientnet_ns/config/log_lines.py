"""Human-readable log lines: `I 12:34:56 message`."""

from __future__ import annotations

import logging as std_logging
import os

from absl import logging

# Initials of the levels, as in absl.
_INITIALS = {
    std_logging.DEBUG: "D",
    std_logging.INFO: "I",
    std_logging.WARNING: "W",
    std_logging.ERROR: "E",
    std_logging.CRITICAL: "F",
}


class LineFormatter(std_logging.Formatter):
    """Formats a record as the level's initial, the time and the message."""

    def format(self, record: std_logging.LogRecord) -> str:
        """Returns the level's initial, the time, and the message with its stack trace, if any."""
        initial = _INITIALS.get(record.levelno, record.levelname[:1])
        return f"{initial} {self.formatTime(record, '%H:%M:%S')} {super().format(record)}"


def begin() -> None:
    """Sets the format and level of this process's log, and hides messages of libraries."""
    logging.set_verbosity(logging.INFO)
    logging.get_absl_handler().setFormatter(LineFormatter())
    # Errors of TensorFlow's C++ code reach Python as exceptions; the rest of its log is noise here.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # With several replicas, TensorFlow logs how it reduces each variable.
    std_logging.getLogger("tensorflow").addFilter(
        lambda entry: entry.module != "cross_device_ops" or entry.levelno >= std_logging.WARNING
    )
