"""Reads frames of short clips: .mp4 videos and animated .gif pictures.

`av` (FFmpeg) is imported only here, and only when a video is read.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence

import numpy as np
import tensorflow as tf

from efficientnet_ns.files.errors import DataError


def is_clip(name: str) -> bool:
    """Checks whether a file name has the extension of a clip."""
    return _extension(name) in _READERS


def check_readable(names: Sequence[str]) -> None:
    """Raises DataError with the extra to install if files with these names cannot be read here."""
    if any(_extension(name) == "mp4" for name in names):
        _av()


def frames(path: str) -> Iterator[np.ndarray]:
    """Yields the frames of a clip in order, uint8 [H, W, 3]; decodes videos one frame at a time.

    Raises:
      DataError: If the clip cannot be decoded or its decoder is not installed.
    """
    with tf.io.gfile.GFile(path, "rb") as f:
        content = f.read()
    yield from _READERS[_extension(path)](content, path)


def _extension(name: str) -> str:
    return name.rpartition(".")[2].lower()


def _av():
    try:
        import av
    except ImportError as e:
        raise DataError(
            "videos require av (pip install 'efficientnet-ns[robustness]', or in a clone "
            f"pip install -e '.[robustness]'): {e}"
        ) from e
    return av


def _of_mp4(content: bytes, path: str) -> Iterator[np.ndarray]:
    av = _av()
    try:
        with av.open(io.BytesIO(content)) as video:
            for frame in video.decode(video=0):
                yield frame.to_ndarray(format="rgb24")
    # FFmpegError for other files, IndexError for files without a video track.
    except (av.error.FFmpegError, IndexError) as e:
        reason = getattr(e, "strerror", None) or e
        raise DataError(f"{path}: cannot decode the video: {reason}") from e


def _of_gif(content: bytes, path: str) -> Iterator[np.ndarray]:
    try:
        yield from tf.io.decode_gif(content).numpy()
    except tf.errors.InvalidArgumentError as e:
        raise DataError(f"{path}: cannot decode the GIF: {e.message}") from e


_READERS = {"mp4": _of_mp4, "gif": _of_gif}
