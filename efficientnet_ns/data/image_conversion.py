"""Prepares encoded images for records.

Images are checked, converted if TensorFlow cannot decode the format, and shrunk on request.
"""

from __future__ import annotations

import dataclasses
import io
import re
import warnings

import numpy as np
import tensorflow as tf

from efficientnet_ns.data import images, misread, transparency

JPEG_QUALITY = 95

# Signatures of the formats that TensorFlow decodes.
_KNOWN = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"BM")
# Lossy formats, which become JPEG; all others become PNG.
_LOSSY = frozenset({"JPEG", "MPO", "HEIF", "AVIF", "JPEG2000"})
# Formats whose samples Pillow scales to 16 bits when it opens them in its 32-bit mode.
_SIXTEEN_BITS = frozenset({"PNG", "PPM"})

# Brands at the start of files in the HEIF container.
_AVIF = frozenset({b"avif", b"avis"})
_HEIC = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"})

_TURNS = re.compile(rb"\0\0\0\x09i(?:rot|mir).", re.DOTALL)

# TIFF tags and their values.
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339
_WHITE_IS_ZERO = 0
_SAMPLE_KINDS = {2: "signed integer", 3: "floating-point", 5: "complex", 6: "complex"}


class Unusable(ValueError):
    """The bytes cannot be converted to an image; the message gives the reason."""


@dataclasses.dataclass(frozen=True)
class Rules:
    """Rules for preparing each image.

    Attributes:
      check: whether to decode every image, so that the records contain no broken ones.
      max_side: images with a longer side are shrunk to it, keeping the aspect ratio, and become
        JPEG; None keeps all sizes.
    """

    check: bool = True
    max_side: int | None = None


def prepare(raw: bytes, rules: Rules) -> tuple[bytes, tuple[int, int] | None]:
    """Returns the bytes to store for an image file, and its (height, width) if it was decoded.

    JPEG, PNG, GIF and BMP pass through unchanged unless they must be shrunk or TensorFlow would
    misread them (`misread`). Those and other formats that Pillow opens become JPEG if lossy and PNG
    if not: first frame, transparent pixels on white (`transparency.on_white`), high byte of 16-bit
    samples. HEIC requires the package pillow-heif. No orientation is applied.

    Raises:
      Unusable: If neither TensorFlow nor Pillow can decode it, or its pixels have no known range.
    """
    from PIL import Image

    if not raw:
        raise Unusable("the file is empty")
    try:
        pixels = _by_tensorflow(raw, decode=rules.check or rules.max_side is not None)
    except tf.errors.InvalidArgumentError as e:
        image, lossy = _open(raw, _first_line(e))
    else:
        if pixels is None:
            return raw, None
        # Not from Pillow, which inverts every CMYK JPEG, not only those marked as inverted.
        image, lossy = Image.fromarray(pixels), None
    if rules.max_side and max(image.size) > rules.max_side:
        image.thumbnail((rules.max_side, rules.max_side), Image.Resampling.LANCZOS)
        lossy = True
    return raw if lossy is None else _encode(image, lossy), (image.height, image.width)


def png(pixels: np.ndarray, compression: int = -1) -> bytes:
    """Encodes uint8 [H, W, 1 or 3] as PNG; zlib level 0 suits images that are soon decoded again."""
    return tf.io.encode_png(pixels, compression=compression).numpy()


def _first_line(error: Exception) -> str:
    # TensorFlow puts its kernel's name in front, in double braces, and the op's name at the end.
    return (str(error).splitlines() or [""])[0].split("}} ")[-1].split(" [Op:")[0]


def _by_tensorflow(raw: bytes, decode: bool) -> np.ndarray | None:
    """Returns uint8 [H, W, 3] or, for bytes that look decodable, None; else InvalidArgumentError."""
    if not raw.startswith(_KNOWN):
        raise tf.errors.InvalidArgumentError(None, None, "not a format TensorFlow decodes")
    if decode:
        return images.decode(tf.constant(raw)).numpy()
    if raw.startswith(misread.SIGNATURES):
        misread.refuse(tf.constant(raw))
    return None


def _open(raw: bytes, reason: str):
    """Returns (Pillow image in RGB or L, whether its format is lossy)."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # About large images and odd metadata.
            _need_heif_decoder(raw)
            raw = _without_turns(raw)
            tags = _tiff_tags(raw)
            _refuse_unknown_range(tags)
            image = Image.open(io.BytesIO(raw))
            image.load()
            if _is_transparent(image, raw):
                pixels = transparency.on_white(np.asarray(image.convert("RGBA")))
                shown = Image.fromarray(pixels.numpy())
            else:
                shown = _eight_bit(image, tags)
            return shown, _is_lossy(image.format or "", raw)
    except Unusable:
        raise
    except Exception as e:  # Decoders of damaged files raise nearly anything.
        raise Unusable(f"{reason}; Pillow: {_without_address(e)}") from e


def _is_transparent(image, raw: bytes) -> bool:
    """Returns whether an opened image has transparent pixels that are meant to be transparent."""
    # Programs leave the fourth byte of these undefined, and `images.decode` ignores that of BMPs.
    if image.format in ("BMP", "DIB") or (image.format == "TGA" and not raw[17] & 15):
        return False
    return image.has_transparency_data


def _need_heif_decoder(raw: bytes) -> None:
    """Raises Unusable if `raw` is HEIC or AVIF and its decoder is not installed."""
    if raw[4:8] != b"ftyp":
        return
    length = int.from_bytes(raw[:4], "big")
    brands = {raw[at : at + 4] for at in (8, *range(16, min(length, 256), 4))}
    if brands & _AVIF:
        from PIL import features

        if not features.check("avif"):
            raise Unusable(
                "AVIF, which this build of Pillow cannot decode; install the build from PyPI: "
                "pip install --force-reinstall pillow"
            )
    elif brands & _HEIC:
        try:
            import pillow_heif
        except ImportError as e:
            raise Unusable("HEIC requires pillow-heif: pip install pillow-heif") from e
        pillow_heif.register_heif_opener()


def _without_turns(raw: bytes) -> bytes:
    """Replaces a HEIC's rotations and reflections, which its decoder would apply, by 0 degrees.

    ISO/IEC 23008-12, 6.5.10 and 6.5.12: boxes of nine bytes, of which the last holds the turn.
    """
    return _TURNS.sub(b"\0\0\0\x09irot\0", raw) if raw[4:8] == b"ftyp" else raw


def _tiff_tags(raw: bytes) -> dict[int, int]:
    """Returns the first value of each tag of a TIFF's first page; empty for other formats."""
    if raw[:4] not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return {}
    from PIL import TiffImagePlugin

    directory = TiffImagePlugin.ImageFileDirectory_v2(raw[: 16 if b"+" in raw[:4] else 8])
    file = io.BytesIO(raw)
    file.seek(directory.next)
    directory.load(file)
    values = {tag: directory.get(tag) for tag in (_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT)}
    values = {tag: v[0] if isinstance(v, tuple) else v for tag, v in values.items()}
    return {tag: value for tag, value in values.items() if value is not None}


def _refuse_unknown_range(tags: dict[int, int]) -> None:
    """Raises Unusable for TIFFs whose samples are not unsigned integers of up to 16 bits."""
    kind, bits = tags.get(_SAMPLE_FORMAT, 1), tags.get(_BITS, 1)
    if kind in _SAMPLE_KINDS or bits > 16:
        raise _unknown_range(f"{bits}-bit {_SAMPLE_KINDS.get(kind, 'integer')}")


def _unknown_range(samples: str) -> Unusable:
    return Unusable(f"{samples} pixels have no known range; save them as unsigned 8 or 16 bits")


def _eight_bit(image, tags: dict[int, int]):
    """Converts to RGB or L; keeps the high byte of wider samples, as TensorFlow does."""
    from PIL import Image

    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in _SIXTEEN_BITS):
        high = np.asarray(image).astype(np.uint16) >> (tags.get(_BITS, 16) - 8)
        if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:  # Pillow inverts only 8-bit samples.
            high = 255 - high
        return Image.fromarray(high.astype(np.uint8))
    if image.mode in ("I", "F"):
        raise _unknown_range({"I": "32-bit integer", "F": "floating-point"}[image.mode])
    return image if image.mode in ("RGB", "L") else image.convert("RGB")


def _is_lossy(image_format: str, raw: bytes) -> bool:
    if image_format != "WEBP":
        return image_format in _LOSSY
    at = 12  # After RIFF, length and WEBP. A chunk has a name, a length and evenly padded bytes.
    while at + 8 <= len(raw):
        name, length = raw[at : at + 4], int.from_bytes(raw[at + 4 : at + 8], "little")
        if name in (b"VP8 ", b"VP8L"):
            return name == b"VP8 "
        # An animation frame has its own chunks after its 16 bytes.
        at += 8 + (16 if name == b"ANMF" else length + length % 2)
    return True


def _without_address(error: Exception) -> str:
    # "cannot identify image file <_io.BytesIO object at 0x…>" must not vary between runs.
    return str(error).split(" <_io")[0] or type(error).__name__


def _encode(image, lossy: bool) -> bytes:
    target = io.BytesIO()
    if lossy:
        image.save(target, "JPEG", quality=JPEG_QUALITY)
    else:
        image.save(target, "PNG")
    return target.getvalue()
