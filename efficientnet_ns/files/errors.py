"""The error for input that cannot be used; `config.command_line` makes it one line for the user."""

from __future__ import annotations


class DataError(ValueError):
    """Input files cannot be used as they are; the message names the file, record and value."""
