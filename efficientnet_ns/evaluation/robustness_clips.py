"""ImageNet-P: clips of frames, as distributed (videos) or unpacked (one image per frame)."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import tensorflow as tf

from efficientnet_ns.data import image_conversion
from efficientnet_ns.evaluation import robustness_sets as sets
from efficientnet_ns.files.errors import DataError
from efficientnet_ns.files.progress import Progress
from efficientnet_ns.ingest import videos


class Clips(NamedTuple):
    """The clips of one perturbation.

    Attributes:
      path: folder of the perturbation.
      names: paths of videos, or of folders with one image per frame, relative to `path`.
      labels: ImageNet class of each clip.
    """

    path: str
    names: list[str]
    labels: list[int]

    def frames(self, what: str) -> Iterator[tuple[str, bytes]]:
        """Yields (name for messages, encoded image) of all frames, clip by clip.

        Args:
          what: title of the progress bar.

        Raises:
          DataError: If a clip has fewer than two frames or a different number than the first clip.
        """
        length = None
        with Progress(len(self.names), what, "clips") as progress:
            for name in self.names:
                count, path = 0, os.path.join(self.path, name)
                for frame in _frames(path):
                    yield f"{path}, frame {count}", frame
                    count += 1
                # Known only here, because the frames of a video are decoded as they are read.
                length = length or count
                if count < 2 or count != length:
                    raise DataError(
                        f"{path} has {count} frames, {self.names[0]} {length}: all clips of a "
                        "perturbation need the same number, two or more. Is the file truncated?"
                    )
                progress.update(1)


def clips(path: str, classes: Mapping[str, int]) -> Clips:
    """Lists the clips of `path/<wnid>/`: `<clip>.mp4`, `<clip>.gif` or `<clip>/<image per frame>`.

    Args:
      path: folder of the perturbation.
      classes: folder name → class.

    Raises:
      DataError: If there are unknown or empty folders, duplicate clips, folders with fewer than two
        frames or different numbers of frames, or videos that cannot be read on this machine.
    """
    names = sets.folders(path)
    sets.refuse(path, "unknown class folders", [n for n in names if n not in classes])
    found = {name: _clips_in(os.path.join(path, name)) for name in names}
    if not any(found.values()):
        raise DataError(
            f"{path!r} has no clips: expected <wnid>/<clip>.mp4 or .gif, or folders <wnid>/<clip>/ "
            "with one image per frame"
        )
    sets.refuse(
        path, "class folders without clips", [n for n, inside in found.items() if not inside]
    )
    listed = [f"{name}/{clip}" for name, inside in found.items() for clip in inside]
    # A video next to the folder it was unpacked into would count twice.
    stems = Counter(os.path.splitext(c)[0] if videos.is_clip(c) else c for c in listed)
    sets.refuse(path, "duplicate clips", sorted(s for s, n in stems.items() if n > 1))
    videos.check_readable(listed)
    # Only folders, because counting the frames of a video requires decoding it.
    _check_folders(path, [clip for clip in listed if not videos.is_clip(clip)])
    labels = [classes[name] for name, inside in found.items() for _ in inside]
    return Clips(path, listed, labels)


def _clips_in(path: str) -> list[str]:
    files = (n for n in tf.io.gfile.listdir(path) if n[0] != "." and videos.is_clip(n))
    return sorted([*files, *sets.folders(path)])


def _check_folders(path: str, names: Sequence[str]) -> None:
    lengths = {name: len(sets.image_files(os.path.join(path, name))) for name in names}
    sets.refuse(
        path, "clips of fewer than two frames", [n for n, length in lengths.items() if length < 2]
    )
    longest = max(lengths.values(), default=0)
    shorter = [n for n, length in lengths.items() if length < longest]
    sets.refuse(path, f"clips shorter than {longest} frames", shorter)


def _frames(path: str) -> Iterator[bytes]:
    if videos.is_clip(path):
        # Predictors take encoded images, which they decode immediately, so compression is useless.
        yield from (image_conversion.png(frame, compression=0) for frame in videos.frames(path))
        return
    for name in sorted(sets.image_files(path), key=_numeric):
        with tf.io.gfile.GFile(os.path.join(path, name), "rb") as f:
            yield f.read()


def _numeric(name: str) -> list:
    """Returns a key that sorts `img2.png` before `img10.png`; the set names its frames this way."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
