"""The form of log lines."""

from __future__ import annotations

import re

from absl import logging

from efficientnet_ns.config import log_lines


def test_lines_have_no_thread_or_file():
    formatter = log_lines.LineFormatter()
    record = logging.get_absl_logger().makeRecord(
        "absl", logging.converter.STANDARD_WARNING, "x.py", 1, "%d of %d", (3, 7), None
    )
    assert re.fullmatch(r"W \d\d:\d\d:\d\d 3 of 7", formatter.format(record))
