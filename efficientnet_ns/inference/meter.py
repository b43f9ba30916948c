"""Measures a teacher's work: images, their bytes, and the time for decoding and inference."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence


class Meter:
    """Thread-safe counts.

    The counts are `images`, `bytes`, `unreadable`, and the microseconds of all threads, `decode_us`
    and `inference_us`.
    """

    def __init__(self) -> None:
        self._lock, self._counts = threading.Lock(), Counter[str]()

    def add(self, **counts: int) -> None:
        """Adds to the counts."""
        with self._lock:
            self._counts.update(counts)

    def add_images(self, images: Sequence[bytes | None], unreadable: int) -> None:
        """Counts encoded images, some of which are None or cannot be decoded."""
        size = sum(len(image) for image in images if image is not None)
        self.add(images=len(images), bytes=size, unreadable=unreadable)

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Adds the microseconds of the block to the count `name`."""
        began = time.perf_counter_ns()
        try:
            yield
        finally:
            self.add(**{name: (time.perf_counter_ns() - began) // 1000})

    def take(self) -> dict[str, int]:
        """Returns the counts since the last call."""
        with self._lock:
            taken, self._counts = dict(self._counts), Counter()
        return taken
