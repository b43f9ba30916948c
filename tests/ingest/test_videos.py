"""Clips: frames of videos and GIFs, in order and in the right colors."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from fakes import flat_frames as flat
from fakes import write_gif, write_mp4

from efficientnet_ns.files.errors import DataError
from efficientnet_ns.ingest import videos

COLORS = [(8 * i, 248 - 8 * i, 100) for i in range(31)]


def test_mp4(tmp_path):
    write_mp4(tmp_path / "a.mp4", flat(COLORS))
    frames = list(videos.frames(str(tmp_path / "a.mp4")))
    assert len(frames) == 31
    for frame, color in zip(frames, COLORS):
        assert frame.shape == (48, 64, 3) and frame.dtype == np.uint8
        # Videos store chroma at half the resolution, and a smaller range of values.
        np.testing.assert_allclose(frame.mean((0, 1)), color, atol=4)


def test_gif(tmp_path):
    write_gif(tmp_path / "a.GIF", flat(COLORS[:5]))
    frames = list(videos.frames(str(tmp_path / "a.GIF")))
    assert len(frames) == 5
    for frame, color in zip(frames, COLORS):
        np.testing.assert_array_equal(frame, flat([color])[0])


def test_one_frame_of_a_video_at_a_time(tmp_path):
    write_mp4(tmp_path / "a.mp4", flat(COLORS))
    frames = videos.frames(str(tmp_path / "a.mp4"))
    np.testing.assert_allclose(next(frames).mean((0, 1)), COLORS[0], atol=4)
    frames.close()


def test_broken_files_are_named(tmp_path):
    write_mp4(tmp_path / "a.mp4", flat(COLORS))
    content = (tmp_path / "a.mp4").read_bytes()
    for cut in (0, 10, len(content) // 2):
        (tmp_path / "cut.mp4").write_bytes(content[:cut])
        with pytest.raises(DataError, match="cut.mp4: cannot decode the video: Inv"):
            list(videos.frames(str(tmp_path / "cut.mp4")))
    (tmp_path / "b.gif").write_bytes(b"GIF89a")
    with pytest.raises(DataError, match="b.gif: cannot decode the GIF"):
        list(videos.frames(str(tmp_path / "b.gif")))


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    videos.check_readable(["a.gif", "folder"])
    with pytest.raises(DataError, match=r"pip install 'efficientnet-ns\[robustness\]'"):
        videos.check_readable(["a.gif", "b.MP4"])
