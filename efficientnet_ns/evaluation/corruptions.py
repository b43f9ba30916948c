"""The corruptions of ImageNet-C on any images, by the package imagecorruptions-imaug, in processes
of their own: it draws from NumPy's global random state.

Nothing here loads TensorFlow, so that those processes are small.

Source: Hendrycks and Dietterich 2019 (arXiv 1903.12261). ImageNet-C's images are 224 pixels wide and
were stored as JPEG; here the pixels that a model would see are corrupted and not compressed again.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import zlib
from collections.abc import Sequence

import numpy as np

from efficientnet_ns.config import ConfigError, preemption
from efficientnet_ns.config.cpus import available_cpus

# These two have random states of their own.
_WITH_A_SEED = ("impulse_noise", "glass_blur")
_LEAST_SIDE = 32


def check_installed() -> str:
    """Version of the corruption library; ConfigError when it cannot be imported."""
    from importlib import metadata

    try:
        import imagecorruptions  # noqa: F401
    except ImportError as e:
        raise ConfigError(
            "--corrupt needs the package imagecorruptions-imaug, which is not there or cannot be "
            f"loaded ({e}): pip install 'efficientnet-ns[robustness]', or in a clone "
            "pip install -e '.[robustness]'. Where libGL is missing: apt-get install "
            "libgl1, or opencv-python-headless in place of opencv-python."
        ) from e
    try:
        return metadata.version("imagecorruptions-imaug")
    except metadata.PackageNotFoundError:
        raise ConfigError(
            "--corrupt: the installed imagecorruptions is another package than "
            "imagecorruptions-imaug; install that in its place: "
            "pip uninstall imagecorruptions; pip install imagecorruptions-imaug"
        ) from None


def image_seeds(name: str, severity: int, first: int, count: int, seed: int) -> list[int]:
    """The seeds of images `first` … `first + count - 1` of a set, each below 2**32.

    They depend on seed, corruption, severity and place in the set, on nothing else.
    """
    salt = zlib.crc32(name.encode())
    return [
        int(np.random.SeedSequence([seed, salt, severity, place]).generate_state(1)[0])
        for place in range(first, first + count)
    ]


def corrupt(pixels: np.ndarray, name: str, severity: int, seeds: Sequence[int]) -> np.ndarray:
    """Corrupts images one after the other; changes NumPy's global random state.

    Args:
      pixels: uint8 [N, S, S, 3]. The library takes no image below 32 pixels: the smaller ones are
        mirrored at their borders to that size, and their own part is cut out again.
      name: one of `robustness_metrics.ALEXNET_ERROR` or `ALEXNET_ERROR_EXTRA`.
      severity: 1 to 5.
      seeds: one per image.

    Returns:
      uint8 [N, S, S, 3].
    """
    import imagecorruptions

    missing = max(0, _LEAST_SIDE - pixels.shape[1])
    before, size = missing // 2, pixels.shape[1]
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
    """Processes that corrupt images; use it in a `with` block.

    Args:
      seed: of all images.
      workers: processes; None: one per available core.
    """

    def __init__(self, seed: int, workers: int | None = None):
        self._seed = seed
        self.workers = workers or available_cpus()
        # Forked children would inherit TensorFlow's threads in an unknown state.
        context = multiprocessing.get_context("spawn")
        self._pool = concurrent.futures.ProcessPoolExecutor(self.workers, context, _start_worker)

    def __enter__(self) -> Corruptor:
        return self

    def __exit__(self, *unused) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def submit(
        self, pixels: np.ndarray, name: str, severity: int, first: int
    ) -> concurrent.futures.Future:
        """`corrupt` of images from place `first` of their set on, in another process."""
        seeds = image_seeds(name, severity, first, len(pixels), self._seed)
        return self._pool.submit(corrupt, pixels, name, severity, seeds)


def _start_worker() -> None:
    """One thread, and no life after the parent's."""
    import cv2

    cv2.setNumThreads(1)
    preemption.end_with_parent()
