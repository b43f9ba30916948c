"""ImageNet-C corruptions by the optional library; skipped if it is not installed."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from efficientnet_ns.config import ConfigError
from efficientnet_ns.evaluation import corruptions
from efficientnet_ns.evaluation import robustness_metrics as metrics

NAMES = [*metrics.ALEXNET_ERROR, *metrics.ALEXNET_ERROR_EXTRA]


@pytest.fixture
def pixels() -> np.ndarray:
    """Smooth images, on which both noise and blur are visible."""
    y, x = np.mgrid[:32, :32]
    waves = [128 + 90 * np.sin(x / (3 + i)) * np.cos(y / (4 + i)) for i in range(3)]
    image = np.stack(waves, -1)
    return np.stack([image, image[::-1]]).astype(np.uint8)


def test_seeds_belong_to_the_image():
    seeds = corruptions.image_seeds("snow", 3, 10, 4, seed=0)
    assert seeds[2:] == corruptions.image_seeds("snow", 3, 12, 2, seed=0)
    others = [("snow", 3, 10, 1), ("snow", 2, 10, 0), ("fog", 3, 10, 0)]
    different = [corruptions.image_seeds(n, s, f, 1, seed)[0] for n, s, f, seed in others]
    assert len({*seeds, *different}) == 7 and max(seeds) < 2**32


def test_absent_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    with pytest.raises(ConfigError, match=r"pip install 'efficientnet-ns\[robustness\]'"):
        corruptions.check_installed()


@pytest.fixture
def library():
    return pytest.importorskip("imagecorruptions")


def test_names_are_the_librarys(library):
    assert library.get_corruption_names("common") == list(metrics.ALEXNET_ERROR)
    assert set(library.get_corruption_names("all")) == set(NAMES)


# Numba compiles it at its first use, which takes seconds.
SLOW = {"glass_blur"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in NAMES]
)
def test_repeats_whatever_came_before(library, pixels, name):
    found = corruptions.corrupt(pixels, name, 3, [1, 2])
    assert found.dtype == np.uint8 and found.shape == pixels.shape
    assert not np.array_equal(found, pixels)
    again = corruptions.corrupt(pixels[1:], name, 3, [2])
    np.testing.assert_array_equal(again, found[1:])
    other = corruptions.corrupt(pixels, name, 3, [3, 4])
    random = set(NAMES) - {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate"}
    random -= {"jpeg_compression", "gaussian_blur", "saturate"}
    assert np.array_equal(other, found) == (name not in random)


def test_severity_of_noise(library, pixels):
    """Uses the standard deviations of the paper's code on an image without clipping."""
    gray = np.full([1, 64, 64, 3], 128, np.uint8)
    for severity, scale in ((1, 0.08), (2, 0.12)):
        noisy = corruptions.corrupt(gray, "gaussian_noise", severity, [7])
        assert np.std(noisy.astype(float) / 255) == pytest.approx(scale, rel=0.05)
    contrast = corruptions.corrupt(pixels, "contrast", 1, [0, 0]).astype(float)
    assert contrast.std() == pytest.approx(0.4 * pixels.std(), rel=0.05)


def test_small_images_are_mirrored_to_the_least_size(library, pixels):
    small = pixels[:, :16, :16]
    # Brightness is per pixel and contrast depends on the mean, which mirroring preserves.
    bright = corruptions.corrupt(pixels, "brightness", 2, [0, 0])[:, :16, :16]
    np.testing.assert_array_equal(corruptions.corrupt(small, "brightness", 2, [0, 0]), bright)
    found = corruptions.corrupt(small, "contrast", 2, [0, 0]).astype(float)
    mean = small.mean((1, 2), keepdims=True)
    np.testing.assert_allclose(found, (small - mean) * 0.3 + mean, atol=1.01)
    blurred = corruptions.corrupt(small, "motion_blur", 5, [0, 0])
    assert blurred.shape == small.shape


@pytest.mark.slow
def test_processes_give_the_same(library, pixels):
    with corruptions.Corruptor(seed=4, workers=2) as corruptor:
        jobs = [corruptor.submit(pixels[i : i + 1], "snow", 2, i) for i in range(2)]
        found = np.concatenate([job.result() for job in jobs])
    seeds = corruptions.image_seeds("snow", 2, 0, 2, 4)
    np.testing.assert_array_equal(found, corruptions.corrupt(pixels, "snow", 2, seeds))
