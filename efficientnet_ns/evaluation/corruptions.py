"""Applies the corruptions of ImageNet-C to any images, in separate processes.

Separate processes are required because the package imagecorruptions-imaug draws from NumPy's
global random state. They stay small because this module does not import TensorFlow.

Source: Hendrycks and Dietterich 2019 (arXiv 1903.12261). ImageNet-C's images are 224 pixels wide
and stored as JPEG. This module corrupts the model's input pixels and does not compress them.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import zlib
from collections.abc import Sequence

import numpy as np

from efficientnet_ns.config import ConfigError, preemption
from efficientnet_ns.config.cpus import available_cpus

# These two corruptions do not draw from NumPy's global random state and need the seed itself.
_WITH_A_SEED = ("impulse_noise", "glass_blur")
_LEAST_SIDE = 32


def check_installed() -> str:
    """Returns the version of the corruption library.

    Raises:
      ConfigError: If the library cannot be imported or is another package of that name.
    """
    from importlib import metadata

    try:
        import imagecorruptions  # noqa: F401
    except ImportError as e:
        raise ConfigError(
            "--corrupt requires the package imagecorruptions-imaug, which is missing or cannot be "
            f"loaded ({e}): pip install 'efficientnet-ns[robustness]', or in a clone "
            "pip install -e '.[robustness]'. If libGL is missing: apt-get install "
            "libgl1, or replace opencv-python with opencv-python-headless."
        ) from e
    try:
        # The package imagecorruptions installs a module of the same name.
        return metadata.version("imagecorruptions-imaug")
    except metadata.PackageNotFoundError:
        raise ConfigError(
            "--corrupt: the installed package imagecorruptions is not "
            "imagecorruptions-imaug; replace it: "
            "pip uninstall imagecorruptions; pip install imagecorruptions-imaug"
        ) from None


def image_seeds(name: str, severity: int, first: int, count: int, seed: int) -> list[int]:
    """Returns the seeds of images `first` … `first + count - 1` of a set, each below 2**32.

    They depend only on the seed, the corruption, the severity and the index of the image.
    """
    # Not hash(), which differs between processes for strings.
    salt = zlib.crc32(name.encode())
    return [
        # One uint32, because np.random.seed does not accept larger numbers.
        int(np.random.SeedSequence([seed, salt, severity, place]).generate_state(1)[0])
        for place in range(first, first + count)
    ]


def corrupt(pixels: np.ndarray, name: str, severity: int, seeds: Sequence[int]) -> np.ndarray:
    """Corrupts images one by one; changes NumPy's global random state.

    Args:
      pixels: uint8 [N, S, S, 3]. The library rejects images below 32 pixels, so smaller ones are
        padded to that size by reflection and cropped afterwards.
      name: one of `robustness_metrics.ALEXNET_ERROR` or `ALEXNET_ERROR_EXTRA`.
      severity: 1 to 5.
      seeds: one per image.

    Returns:
      uint8 [N, S, S, 3].
    """
    import imagecorruptions

    missing = max(0, _LEAST_SIDE - pixels.shape[1])
    before, size = missing // 2, pixels.shape[1]
    # Mirrored, because constant pixels would change the mean, on which `contrast` depends.
    border = [(before, missing - before)] * 2 + [(0, 0)]
    corrupted = np.empty_like(pixels)
    for place, (image, seed) in enumerate(zip(pixels, seeds)):
        np.random.seed(seed)
        own = {"seed": seed} if name in _WITH_A_SEED else {}
        result = imagecorruptions.corrupt(
            np.pad(image, border, "symmetric"), severity, corruption_name=name, **own
        )
        corrupted[place] = result[before : before + size, before : before + size]
    return corrupted


class Corruptor:
    """Corrupts images in separate processes; a context manager.

    Args:
      seed: seed of all draws.
      workers: number of processes; None for one per available core.
    """

    def __init__(self, seed: int, workers: int | None = None):
        self._seed = seed
        self.workers = workers or available_cpus()
        # Forked child processes would inherit TensorFlow's threads in an undefined state.
        context = multiprocessing.get_context("spawn")
        self._pool = concurrent.futures.ProcessPoolExecutor(self.workers, context, _start_worker)

    def __enter__(self) -> Corruptor:
        return self

    def __exit__(self, *unused) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def submit(
        self, pixels: np.ndarray, name: str, severity: int, first: int
    ) -> concurrent.futures.Future:
        """Runs `corrupt` in another process, on images of a set starting at index `first`."""
        seeds = image_seeds(name, severity, first, len(pixels), self._seed)
        return self._pool.submit(corrupt, pixels, name, severity, seeds)


def _start_worker() -> None:
    """Limits OpenCV to one thread and ends the process when its parent ends."""
    import cv2

    # There is already one process per core.
    cv2.setNumThreads(1)
    preemption.end_with_parent()
