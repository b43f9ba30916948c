"""Measures how fast other libraries convert encoded photos to pixels: PIL, OpenCV, PyTorch.

Each peer is a function that processes some images on one thread. Training peers crop at random,
flip and apply two operations; evaluation peers use the center crop. All resize bicubically to
uint8; timm also to normalized float32, its default. Each library runs in a separate process,
because some crash in a process with TensorFlow.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import importlib
import io
import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterator
from typing import Any

from absl import logging
from PIL import Image

TRAIN, EVAL = ": train", ": evaluation"  # In the names of peers.
_EVAL_FRACTION = 224 / 256
_OPERATIONS = 2
# timm's name of the policy with two operations.
_TIMM_POLICY = "rand-m10-n2"


def common(encoded: list[bytes]) -> list[bytes]:
    """Returns the images that all peers can decode: RGB JPEGs."""

    def is_rgb_jpeg(image: bytes) -> bool:
        try:
            with Image.open(io.BytesIO(image)) as opened:
                return opened.format == "JPEG" and opened.mode == "RGB"
        except OSError:
            return False

    return list(filter(is_rgb_jpeg, encoded))


# Encoded image → pixels.
Prepare = Callable[[bytes], object]


@contextlib.contextmanager
def installed(
    encoded: list[bytes], size: int, chunk: int
) -> Iterator[dict[str, Callable[[], int]]]:
    """Maps the name of each installed peer to a function that processes `chunk` images.

    Peers that fail on an image are skipped with a warning.

    Args:
      encoded: RGB JPEGs; see `common`.
      size: side of the result in pixels.
    """
    peers: dict[str, Callable[[], int]] = {}
    with contextlib.ExitStack() as stack:
        for library in _LIBRARIES:
            # Spawned, because a fork would inherit TensorFlow.
            process = concurrent.futures.ProcessPoolExecutor(
                1, mp_context=multiprocessing.get_context("spawn")
            )
            stack.enter_context(process)
            try:
                kinds = process.submit(_start, library, encoded, size).result()
            # Other versions of a library may raise anything, which must not end the measurement.
            except Exception as e:
                logging.warning("%s is skipped: %s (requirements-peers.txt)", library, e)
                continue
            for kind in kinds:
                peers[f"{library}{kind}"] = functools.partial(_work, process, kind, chunk)
        yield peers


def _work(process: concurrent.futures.Executor, kind: str, chunk: int) -> int:
    return process.submit(_handle, kind, chunk).result()


_images: list[Iterator[bytes]] = []  # In the peer's process: one infinite iterator.
_kinds: dict[str, Prepare] = {}


def _start(library: str, encoded: list[bytes], size: int) -> list[str]:
    """Prepares this process for a library and tries all images; returns its kinds of work."""
    # Otherwise, albumentations looks for a new version of itself on the network.
    os.environ.update(NO_ALBUMENTATIONS_UPDATE="1")
    _images.append(itertools.cycle(encoded))
    _kinds.update(_made(library, size))
    for prepare, image in itertools.product(_kinds.values(), encoded):
        prepare(image)
    return list(_kinds)


def _handle(kind: str, chunk: int) -> int:
    for image in itertools.islice(_images[0], chunk):
        _kinds[kind](image)
    return chunk


def _made(library: str, size: int) -> dict[str, Prepare]:
    """Maps kinds of work to the library's functions; ImportError if it is not installed."""
    needed, make = _LIBRARIES[library]
    for name in needed:
        importlib.import_module(name)
    return make(size)


def _timm(size: int) -> dict[str, Prepare]:
    import torch
    from timm.data import create_transform

    torch.set_num_threads(1)

    def of_pil(transform: Callable) -> Prepare:
        return lambda image: transform(Image.open(io.BytesIO(image)).convert("RGB"))

    train = {"is_training": True, "auto_augment": _TIMM_POLICY}
    return {
        f"{kind}, {output}": of_pil(
            create_transform(size, interpolation="bicubic", use_prefetcher=as_uint8, **options)
        )
        for kind, options in ((TRAIN, train), (EVAL, {}))
        for output, as_uint8 in (("uint8", True), ("normalized float32", False))
    }


def _torchvision(size: int) -> dict[str, Prepare]:
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg
    from torchvision.transforms import InterpolationMode, v2

    torch.set_num_threads(1)
    cubic = InterpolationMode.BICUBIC
    train = v2.Compose(
        [
            v2.RandomResizedCrop(size, interpolation=cubic),
            v2.RandomHorizontalFlip(),
            v2.RandAugment(_OPERATIONS, 27),
        ]
    )
    resized = round(size / _EVAL_FRACTION)
    evaluate = v2.Compose([v2.Resize(resized, interpolation=cubic), v2.CenterCrop(size)])

    def decoded(image: bytes) -> torch.Tensor:
        # PyTorch warns about read-only buffers such as bytes.
        content = torch.frombuffer(bytearray(image), dtype=torch.uint8)
        return decode_jpeg(content, mode=ImageReadMode.RGB)

    return {TRAIN: lambda x: train(decoded(x)), EVAL: lambda x: evaluate(decoded(x))}


def _albumentations(size: int) -> dict[str, Prepare]:
    import albumentations as A
    import cv2
    import simplejpeg

    cv2.setNumThreads(1)
    # As our warps: the nearest pixel, and gray where there is none.
    warp: dict[str, Any] = {
        "interpolation": cv2.INTER_NEAREST,
        "border_mode": cv2.BORDER_CONSTANT,
        "fill": 128,
        "p": 1,
    }
    # Equivalents of RandAugment's operations, in the same order; there is no SolarizeAdd.
    operations = [
        A.AutoContrast(p=1),
        A.Equalize(p=1),
        A.InvertImg(p=1),
        A.Rotate(limit=(27, 27), **warp),
        A.Posterize(num_bits=4, p=1),
        A.Solarize(p=1),
        A.ColorJitter(brightness=0, contrast=0, saturation=(0.1, 1.9), hue=0, p=1),
        A.RandomBrightnessContrast(brightness_limit=0, contrast_limit=0.9, p=1),
        A.RandomBrightnessContrast(brightness_limit=0.9, contrast_limit=0, p=1),
        A.Sharpen(p=1),
        A.Affine(shear={"x": (-15, 15)}, **warp),
        A.Affine(shear={"y": (-15, 15)}, **warp),
        A.Affine(translate_px={"x": (-100, 100)}, **warp),
        A.Affine(translate_px={"y": (-100, 100)}, **warp),
        A.CoarseDropout(num_holes_range=(1, 1), p=1),
    ]
    train = A.Compose(
        [
            A.RandomResizedCrop((size, size), interpolation=cv2.INTER_CUBIC),
            A.HorizontalFlip(),
            A.SomeOf(operations, n=_OPERATIONS),
        ]
    )
    return {TRAIN: lambda image: train(image=simplejpeg.decode_jpeg(image))["image"]}


def _opencv(size: int) -> dict[str, Prepare]:
    import cv2
    import simplejpeg

    cv2.setNumThreads(1)

    def evaluate(image: bytes) -> object:
        pixels = simplejpeg.decode_jpeg(image)
        height, width = pixels.shape[:2]
        side = int(_EVAL_FRACTION * min(height, width))
        y, x = (height - side) // 2, (width - side) // 2
        crop = pixels[y : y + side, x : x + side]
        return cv2.resize(crop, (size, size), interpolation=cv2.INTER_CUBIC)

    return {EVAL: evaluate}


# Name → (required modules, function of the image size that returns `{kind: prepare}`).
_LIBRARIES: dict[str, tuple[tuple[str, ...], Callable[[int], dict[str, Prepare]]]] = {
    "timm": (("timm", "PIL"), _timm),
    "torchvision v2": (("torchvision",), _torchvision),
    "albumentations + simplejpeg": (("albumentations", "simplejpeg"), _albumentations),
    "OpenCV + simplejpeg": (("cv2", "simplejpeg"), _opencv),
}
