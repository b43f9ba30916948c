"""Lists of names in messages, which must stay readable with thousands of names."""

from __future__ import annotations

from collections.abc import Sequence


def shortened(names: Sequence[str], most: int = 10) -> str:
    """Returns `a, b, …`: the first `most` names, and the ellipsis only if there are more."""
    return ", ".join([*names[:most], *(["…"] if len(names) > most else [])])
