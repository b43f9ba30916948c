"""Reads the size that the header of an image file declares, without decoding the image."""

from __future__ import annotations

import struct

# 600 MB when decoded. A small file can claim any size, and decoders allocate what it claims.
MAX_PIXELS = 200_000_000

_OS2_HEADER = 12  # Header size in bytes of the first BMP version, which has 16-bit sides.

# Start-of-frame markers of JPEG: C0..CF without the tables C4, C8, CC.
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


def declared_size(image: bytes) -> tuple[int, int] | None:
    """Returns the (width, height) in pixels that a JPEG, PNG, GIF or BMP declares, or None."""
    try:
        for signature, read in _READERS.items():
            if image.startswith(signature):
                return read(image)
    except (struct.error, IndexError):
        pass  # Too short.
    return None


def problem(image: bytes) -> str:
    """Returns why the image must not be decoded, or an empty string."""
    size = declared_size(image)
    if size is None or size[0] * size[1] <= MAX_PIXELS:
        return ""
    return f"the image claims {size[0]} x {size[1]} pixels, more than {MAX_PIXELS // 10**6} million"


def _jpeg(image: bytes) -> tuple[int, int] | None:
    at = 2
    while at < len(image):
        if image[at] != 0xFF:
            at += 1
            continue
        marker = image[at + 1]
        if marker in _JPEG_FRAMES:
            height, width = struct.unpack_from(">HH", image, at + 5)
            return width, height
        # Fill bytes and standalone markers have no length.
        standalone = marker in (0x00, 0x01, 0xFF) or 0xD0 <= marker <= 0xD8
        at += (
            (1 if marker == 0xFF else 2)
            if standalone
            else 2 + int.from_bytes(image[at + 2 : at + 4], "big")
        )
    return None


def _png(image: bytes) -> tuple[int, int]:
    return struct.unpack_from(">II", image, 16)


def _gif(image: bytes) -> tuple[int, int]:
    return struct.unpack_from("<HH", image, 6)


def _bmp(image: bytes) -> tuple[int, int]:
    (header,) = struct.unpack_from("<I", image, 14)
    width, height = struct.unpack_from("<HH" if header == _OS2_HEADER else "<ii", image, 18)
    return abs(width), abs(height)


_READERS = {b"\xff\xd8": _jpeg, b"\x89PNG\r\n": _png, b"GIF8": _gif, b"BM": _bmp}
