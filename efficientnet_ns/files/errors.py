"""The error for input that cannot be used."""

from __future__ import annotations


class DataError(ValueError):
    """Input files cannot be used as they are; the message names the file, record and value."""
