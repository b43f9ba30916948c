"""Finds unlabeled pictures that are exact copies of labeled ones."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence

from efficientnet_ns.data.image_conversion import Unusable
from efficientnet_ns.ingest import image_sources, listing
from efficientnet_ns.ingest.image_sources import Entry


def among(place: str, others: Sequence[str]) -> list[str]:
    """Returns the names of the pictures in `place` that are also in one of `others`.

    Reads only files whose size occurs in both.

    Args:
      place, others: folders or archives of pictures.
    """
    with contextlib.ExitStack() as stack:
        own, *sources = (
            stack.enter_context(image_sources.open_source(path)) for path in (place, *others)
        )
        entries = listing.list_images(own, labeled=False).entries
        theirs = [
            (source, listing.list_images(source, labeled=False).entries) for source in sources
        ]
        # Sizes are known from the listing, so most files need not be read.
        sizes = {entry.size for entry in entries}
        their_sizes = {entry.size for _, found in theirs for entry in found}
        # 0 means unknown, as on object stores.
        sizes = sizes | their_sizes if 0 in sizes | their_sizes else sizes & their_sizes
        known = {
            content for source, found in theirs for _, content in _hashed(source, found, sizes)
        }
        return [name for name, content in _hashed(own, entries, sizes) if content in known]


def _hashed(source, entries: Sequence[Entry], sizes: set[int]) -> Iterator[tuple[str, bytes]]:
    """Yields (name, hash of the content) of the entries that have one of these sizes."""
    chosen = [entry for entry in entries if entry.size in sizes]
    with source.reader(chosen) as read:
        for entry in chosen:
            try:
                yield entry.name, hashlib.sha256(read(entry).image).digest()
            except Unusable:
                continue  # Reported when the records are made.
