"""Encoded image bytes on their way into a record: checked, converted where TensorFlow cannot
decode the format, shrunk when asked."""

from __future__ import annotations

import dataclasses
import io
import warnings

import numpy as np
import tensorflow as tf

from efficientnet_ns.data import images

JPEG_QUALITY = 95

# How the formats that TensorFlow decodes begin.
_KNOWN = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"BM")
# Formats that throw detail away as JPEG does; from all others a PNG is made.
_LOSSY = frozenset({"JPEG", "MPO", "HEIF", "AVIF", "JPEG2000"})


class Unusable(ValueError):
    """No image can be had from these bytes; the message says why."""


@dataclasses.dataclass(frozen=True)
class Rules:
    """What is done to each image.

    Attributes:
      check: decode every image, so that none in the records is broken.
      max_side: images with a longer side are shrunk to it, aspect ratio kept, and become JPEG; None
        leaves all sizes.
    """

    check: bool = True
    max_side: int | None = None


def prepare(raw: bytes, rules: Rules) -> tuple[bytes, tuple[int, int] | None]:
    """The bytes to store for an image file's bytes, and its (height, width) when it was decoded.

    JPEG, PNG, GIF and BMP pass through unchanged unless they are to be shrunk. Other formats that
    Pillow opens become JPEG when they are lossy and PNG when not (first frame, without alpha).

    Raises:
      Unusable: neither TensorFlow nor Pillow can decode it.
    """
    if not raw:
        raise Unusable("the file is empty")
    known, size = raw.startswith(_KNOWN), None
    if known and (rules.check or rules.max_side):
        try:
            size = tuple(int(side) for side in images.decode(tf.constant(raw)).shape[:2])
        except tf.errors.InvalidArgumentError as e:
            known, reason = False, _first_line(e)
    else:
        reason = "not a format TensorFlow decodes"
    if not known:
        raw, size = _convert(raw, reason)
    if rules.max_side and max(size) > rules.max_side:
        raw, size = _shrink(raw, rules.max_side)
    return raw, size


def png(pixels: np.ndarray, compression: int = -1) -> bytes:
    """PNG of uint8 [H, W, 1 or 3] pixels; zlib's level, 0 for what is soon decoded again."""
    return tf.io.encode_png(pixels, compression=compression).numpy()


def _first_line(error: Exception) -> str:
    # TensorFlow puts its kernel's name in front, in double braces.
    return (str(error).splitlines() or [""])[0].split("}} ")[-1]


def _convert(raw: bytes, reason: str) -> tuple[bytes, tuple[int, int]]:
    image, source_format = _open(raw, reason)
    lossless_webp = source_format == "WEBP" and b"VP8L" in raw[:64]
    lossy = source_format in _LOSSY or (source_format == "WEBP" and not lossless_webp)
    return _encode(image, lossy), (image.height, image.width)


def _shrink(raw: bytes, max_side: int) -> tuple[bytes, tuple[int, int]]:
    from PIL import Image

    image, _ = _open(raw, "cannot be shrunk")
    image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    return _encode(image, lossy=True), (image.height, image.width)


def _open(raw: bytes, reason: str):
    """(Pillow image in RGB or L, name of the file's format)."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Of large images and odd metadata.
            image = Image.open(io.BytesIO(raw))
            image.load()
            return _eight_bit(image), image.format
    except Exception as e:  # Decoders of damaged files raise nearly anything.
        raise Unusable(f"{reason}; Pillow: {_without_address(e)}") from e


def _eight_bit(image):
    from PIL import Image

    if image.mode.startswith("I"):  # 16 bits; like TensorFlow, the high byte is kept.
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    if image.mode == "F":
        raise Unusable("floating-point pixels have no known range")
    return image if image.mode in ("RGB", "L") else image.convert("RGB")


def _without_address(error: Exception) -> str:
    # "cannot identify image file <_io.BytesIO object at 0x…>" must not differ from run to run.
    return str(error).split(" <_io")[0] or type(error).__name__


def _encode(image, lossy: bool) -> bytes:
    target = io.BytesIO()
    if lossy:
        image.save(target, "JPEG", quality=JPEG_QUALITY)
    else:
        image.save(target, "PNG")
    return target.getvalue()
