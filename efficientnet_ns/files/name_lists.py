"""Lists of names in messages, which must stay readable when there are thousands."""

from __future__ import annotations

from collections.abc import Sequence


def shortened(names: Sequence[str], most: int = 10) -> str:
    """`a, b, …`: the first `most` names; the mark only if there are more."""
    return ", ".join([*names[:most], *(["…"] if len(names) > most else [])])
