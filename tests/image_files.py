"""Image files of every kind the formats allow, written from their definitions or by Pillow.

`FILES` maps names to functions that return the bytes. All show about 20 x 14 pixels of noise.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 14, 21  # Odd, so that rows of packed bits end within a byte.


def noise(channels: int = 3, depth: int = 8, seed: int = 0) -> np.ndarray:
    """Returns noise of `depth` bits as uint16 [HEIGHT, WIDTH, channels]."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 2**depth, [HEIGHT, WIDTH, channels], np.uint16)


def smooth() -> np.ndarray:
    """Returns uint8 [48, 64, 3] that lossy compression barely changes."""
    y, x = np.mgrid[0:48, 0:64]
    return np.stack([4 * x, 5 * y, 255 - 2 * x - 2 * y], -1).astype(np.uint8)


def by_pillow(image, kind: str, **options) -> bytes:
    target = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(
        target, kind, **options
    )
    return target.getvalue()


# PNG.

_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2))
_ADAM7 += ((1, 0, 2, 1),)


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _packed_rows(samples: np.ndarray, depth: int) -> list[bytes]:
    """Packs [H, W, C] into rows of bits, most significant first, padded to whole bytes."""
    rows = samples.reshape(len(samples), -1)
    if depth == 16:
        return [row.astype(">u2").tobytes() for row in rows]
    bits = (rows[..., None] >> np.arange(depth)[::-1]) & 1
    return [np.packbits(row.reshape(-1).astype(np.uint8)).tobytes() for row in bits]


def png(
    kind: int,
    depth: int,
    *,
    interlaced: bool = False,
    transparent: bytes = b"",
    extra: bytes = b"",
    colors: int = 256,
) -> bytes:
    """Returns a PNG of color type `kind`.

    `transparent` is the body of its tRNS chunk, and `extra` holds further chunks after the header.
    `colors` is the length of the palette; in a short one, some pixels have no entry.
    """
    samples = noise(_CHANNELS[kind], depth)
    passes = _ADAM7 if interlaced else [(0, 0, 1, 1)]
    rows = [
        row
        for y, x, down, right in passes
        for row in _packed_rows(samples[y::down, x::right], depth)
    ]
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, depth, kind, 0, 0, int(interlaced))
    palette = noise(3, seed=1).reshape(-1, 3)[: min(2**depth, colors)].astype(np.uint8)
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            _chunk(b"IHDR", header),
            extra,
            _chunk(b"PLTE", palette.tobytes()) if kind == 3 else b"",
            _chunk(b"tRNS", transparent) if transparent else b"",
            _chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))),
            _chunk(b"IEND", b""),
        ]
    )


_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}


def on_white(rgba: np.ndarray) -> np.ndarray:
    """Blends [H, W, 4] over white, rounding half up, into uint8 [H, W, 3]."""
    color, share = rgba[..., :3].astype(int), rgba[..., 3:].astype(int)
    return ((2 * (color * share + 255 * (255 - share)) + 255) // 510).astype(np.uint8)


def as_decoded(name: str, image: Image.Image) -> np.ndarray:
    """Returns the 8-bit image of that name on white (BMP: without alpha) as uint8 [H, W, 3]."""
    # Pillow scales the samples to 8 bits, but not the transparent one.
    for bits, factor in (("2", 85), ("4", 17)):
        if name.startswith(f"PNG gray {bits} bit") and "tRNS" in name:
            image.info["transparency"] *= factor
    if image.has_transparency_data and image.format != "BMP":
        return on_white(np.asarray(image.convert("RGBA")))
    return np.asarray(image.convert("RGB"))


_KINDS = {0: "gray", 2: "RGB", 3: "palette", 4: "gray + alpha", 6: "RGBA"}
_TRANSPARENT = {0: b"\0\1", 2: b"\0\1\0\2\0\3", 3: b"\0\x80"}


def _pngs() -> dict[str, Callable[[], bytes]]:
    found = {}
    for kind, depths in _DEPTHS.items():
        for depth in depths:
            for interlaced in (False, True):
                for transparent in {b"", _TRANSPARENT.get(kind, b"")}:
                    name = f"PNG {_KINDS[kind]} {depth} bit"
                    name += ", interlaced" * interlaced + ", tRNS" * bool(transparent)
                    found[name] = lambda a=(kind, depth), i=interlaced, t=transparent: png(
                        *a, interlaced=i, transparent=t
                    )
    return {
        **found,
        "PNG RGB, gAMA": lambda: png(2, 8, extra=_chunk(b"gAMA", struct.pack(">I", 22_000))),
        "PNG RGB, sBIT": lambda: png(2, 8, extra=_chunk(b"sBIT", bytes([5, 6, 5]))),
        "PNG palette, some colors missing": lambda: png(3, 8, colors=40),
        "PNG animated": lambda: by_pillow(
            noise().astype(np.uint8),
            "PNG",
            save_all=True,
            append_images=[Image.fromarray(noise(seed=2).astype(np.uint8))],
        ),
    }


# BMP.


def _bmp_rows(samples: np.ndarray, bits: int) -> bytes:
    if bits <= 8:
        rows = _packed_rows(samples, bits)
    else:
        size = bits // 8
        rows = [
            b"".join(int(value).to_bytes(size, "little") for value in row)
            for row in samples.reshape(len(samples), -1)
        ]
    return b"".join(row + bytes(-len(row) % 4) for row in rows)


def bmp(
    bits: int,
    *,
    header: int = 40,
    compression: int = 0,
    top_down: bool = False,
    masks: tuple[int, ...] = (),
    colors: np.ndarray | None = None,
    data: bytes | None = None,
    filler: bytes = b"\0",
) -> bytes:
    """Returns a BMP; `header` 12 is OS/2's, 40 Windows', 108 and 124 its later ones.

    `colors` uint8 [N, 3] is the palette, whose entries end with `filler`; `data` replaces the
    noise.
    """
    width, height = WIDTH, HEIGHT
    rng = np.random.default_rng(3)
    if data is None:
        limit = len(colors) if colors is not None else 2**bits
        samples = rng.integers(0, limit, [height, width, 1], np.uint64).astype(object)
        if bits <= 8:
            samples = samples.astype(np.uint16)
        data = _bmp_rows(samples, bits)
    palette, mask_bytes = b"", b"".join(struct.pack("<I", mask) for mask in masks)
    if colors is not None:
        gap = b"" if header == 12 else filler
        palette = b"".join(bytes(color[::-1].tolist()) + gap for color in colors)
    if header == 12:
        info = struct.pack("<IHHHH", 12, width, height, 1, bits)
    else:
        used = len(colors) if colors is not None else 0
        info = struct.pack(
            "<IiiHHIIiiII",
            *(header, width, -height if top_down else height, 1, bits, compression, len(data)),
            *(2835, 2835, used, 0),
        )
        if header > 40:
            info += mask_bytes.ljust(16, b"\0")
            info = info.ljust(header, b"\0")
        else:
            info += mask_bytes
    offset = 14 + len(info) + len(palette)
    whole = info + palette + data
    return b"BM" + struct.pack("<IHHI", 14 + len(whole), 0, 0, offset) + whole


def _palette(count: int) -> np.ndarray:
    return np.random.default_rng(4).integers(0, 256, [count, 3], np.uint8)


def _grays(count: int) -> np.ndarray:
    return np.repeat(np.linspace(0, 255, count).astype(np.uint8)[:, None], 3, 1)


_RLE8 = b"".join(bytes([WIDTH, y * 7, 0, 0]) for y in range(HEIGHT)) + b"\0\1"
_RLE4 = b"".join(bytes([WIDTH, y * 17 % 256, 0, 0]) for y in range(HEIGHT)) + b"\0\1"
_888 = (0xFF0000, 0xFF00, 0xFF)

_BMPS = {
    "BMP palette 1 bit": lambda: bmp(1, colors=_palette(2)),
    "BMP palette 4 bit": lambda: bmp(4, colors=_palette(16)),
    "BMP palette 8 bit": lambda: bmp(8, colors=_palette(256)),
    "BMP palette 8 bit, 40 colors": lambda: bmp(8, colors=_palette(40)),
    "BMP palette 8 bit, top-down": lambda: bmp(8, colors=_palette(256), top_down=True),
    "BMP palette 8 bit, OS/2": lambda: bmp(8, colors=_palette(256), header=12),
    "BMP palette 8 bit, header 124": lambda: bmp(8, colors=_palette(256), header=124),
    "BMP gray 8 bit": lambda: bmp(8, colors=_grays(256)),
    "BMP gray 8 bit, reversed": lambda: bmp(8, colors=_grays(256)[::-1]),
    "BMP gray 8 bit, 16 grays": lambda: bmp(8, colors=_grays(16)),
    "BMP gray 1 bit": lambda: bmp(1, colors=_grays(2)),
    "BMP gray 8 bit, Pillow": lambda: by_pillow(noise(1)[..., 0].astype(np.uint8), "BMP"),
    "BMP RLE8": lambda: bmp(8, colors=_palette(256), compression=1, data=_RLE8),
    "BMP RLE4": lambda: bmp(4, colors=_palette(16), compression=2, data=_RLE4),
    "BMP 16 bit 555": lambda: bmp(16),
    "BMP 16 bit 555 masks": lambda: bmp(16, compression=3, masks=(0x7C00, 0x3E0, 0x1F)),
    "BMP 16 bit 565": lambda: bmp(16, compression=3, masks=(0xF800, 0x7E0, 0x1F)),
    "BMP 24 bit": lambda: bmp(24),
    "BMP 24 bit, top-down": lambda: bmp(24, top_down=True),
    "BMP 24 bit, bytes behind the end": lambda: bmp(24) + bytes(2),
    "BMP gray 8 bit, alpha in the palette": lambda: bmp(8, colors=_grays(256), filler=b"\xff"),
    "BMP 24 bit, OS/2": lambda: bmp(24, header=12),
    "BMP 24 bit, header 108": lambda: bmp(24, header=108),
    "BMP 24 bit, header 124": lambda: bmp(24, header=124),
    "BMP 32 bit": lambda: bmp(32),
    "BMP 32 bit, top-down": lambda: bmp(32, top_down=True),
    "BMP 32 bit, masks": lambda: bmp(32, compression=3, masks=_888),
    "BMP 32 bit, masks RGBX": lambda: bmp(32, compression=3, masks=(0xFF000000, 0xFF0000, 0xFF00)),
    "BMP 32 bit, masks BGR": lambda: bmp(32, compression=3, masks=_888[::-1]),
    "BMP 32 bit, header 124, alpha": lambda: bmp(
        32, compression=3, header=124, masks=(*_888, 0xFF000000)
    ),
    "BMP 32 bit, header 124, masks BGR": lambda: bmp(
        32, compression=3, header=124, masks=(*_888[::-1], 0xFF000000)
    ),
    "BMP RGBA, Pillow": lambda: by_pillow(noise(4).astype(np.uint8), "BMP"),
    "BMP with a JPEG inside": lambda: bmp(0, compression=4, data=by_pillow(smooth(), "JPEG")),
    "BMP with a PNG inside": lambda: bmp(0, compression=5, data=png(2, 8)),
}


# GIF.


def _paletted(colors: np.ndarray, seed: int = 0) -> Image.Image:
    index = np.random.default_rng(seed).integers(0, len(colors), [HEIGHT, WIDTH], np.uint8)
    image = Image.frombytes("P", (WIDTH, HEIGHT), index.tobytes())
    image.putpalette(colors.tobytes())
    return image


def gif(
    *,
    screen: tuple[int, int] = (WIDTH, HEIGHT),
    place: tuple[int, int] = (0, 0),
    colors: int = 16,
    local: bool = False,
    table: bool = True,
    transparent: int | None = None,
    disposal: int = 0,
    interlaced: bool = False,
    comment: bytes = b"",
    background: int = 0,
) -> bytes:
    """Returns a GIF with one WIDTH x HEIGHT frame, possibly on a screen of another size."""
    index = np.random.default_rng(0).integers(0, colors, [HEIGHT, WIDTH], np.uint8)
    whole = by_pillow(
        Image.frombytes("L", (WIDTH, HEIGHT), index.tobytes()), "GIF", interlace=int(interlaced)
    )
    # Only the LZW data of Pillow's frame: a descriptor, an optional table, the data, the end.
    at = whole.index(b"\x2c" + struct.pack("<HHHH", 0, 0, WIDTH, HEIGHT))
    flags = whole[at + 9]
    data = whole[at + 10 + (3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else 0) :]
    bits = max(1, (colors - 1).bit_length())
    entries = _palette(2**bits).tobytes()
    told = 0x80 | bits - 1
    parts = [b"GIF89a", struct.pack("<HH", *screen)]
    parts += [bytes([told if table and not local else 0x70, background, 0])]
    parts += [entries] if table and not local else []
    parts += [b"\x21\xfe" + bytes([len(comment)]) + comment + b"\0"] if comment else []
    if transparent is not None:
        parts += [b"\x21\xf9\x04" + bytes([disposal << 2 | 1, 0, 0, transparent, 0])]
    parts += [b"\x2c" + struct.pack("<HHHH", *place, WIDTH, HEIGHT)]
    parts += [bytes([(told if local else 0) | (0x40 if interlaced else 0)])]
    parts += [entries] if local else []
    return b"".join([*parts, data])


def _animated(**options) -> bytes:
    frames = [_paletted(_palette(16), seed) for seed in (1, 2, 3)]
    return by_pillow(frames[0], "GIF", save_all=True, append_images=frames[1:], **options)


_GIFS = {
    "GIF": lambda: gif(),
    "GIF 2 colors": lambda: gif(colors=2),
    "GIF 256 colors": lambda: gif(colors=256),
    "GIF gray, Pillow": lambda: by_pillow(noise(1)[..., 0].astype(np.uint8), "GIF"),
    "GIF RGB, Pillow": lambda: by_pillow(noise().astype(np.uint8), "GIF"),
    "GIF interlaced": lambda: gif(interlaced=True),
    "GIF local palette": lambda: gif(local=True),
    "GIF no palette": lambda: gif(table=False),
    "GIF comment": lambda: gif(comment=b"\x21\xf9\x04\x01 and more"),
    "GIF transparent": lambda: gif(transparent=3),
    "GIF transparent, background": lambda: gif(transparent=3, background=3),
    "GIF transparent, not used": lambda: gif(transparent=200),
    "GIF transparent, local palette": lambda: gif(transparent=3, local=True),
    "GIF frame within a larger screen": lambda: gif(screen=(30, 20), place=(4, 3)),
    "GIF frame beyond its screen": lambda: gif(screen=(10, 10)),
    "GIF animated": lambda: _animated(),
    "GIF animated, local palettes": lambda: by_pillow(
        _paletted(_palette(16)), "GIF", save_all=True, append_images=[_paletted(_palette(64), 5)]
    ),
    "GIF animated, transparent": lambda: _animated(transparency=3),
    "GIF animated, disposal 2": lambda: _animated(disposal=2),
}


# JPEG. Except for the color spaces, all differ only by rounding.


def _without_marker(data: bytes, marker: int) -> bytes:
    at = data.index(bytes([0xFF, marker]))
    return data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") :]


def _adobe(transform: int) -> bytes:
    return b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + bytes([transform])


def _jpeg(mode: str = "RGB", **options) -> bytes:
    return by_pillow(Image.fromarray(smooth()).convert(mode), "JPEG", quality=95, **options)


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def _ycck() -> bytes:
    """Returns Pillow's CMYK with the Adobe marker of YCCK, which redefines its pixels."""
    data = _jpeg("CMYK")
    return data.replace(_adobe(0), _adobe(2))


def _plain_cmyk() -> bytes:
    return _without_marker(_jpeg("CMYK"), 0xEE)


def _rgb_jpeg() -> bytes:
    return _jpeg(keep_rgb=True)


_JPEGS = {
    "JPEG gray": lambda: _jpeg("L"),
    "JPEG 4:4:4": lambda: _jpeg(subsampling="4:4:4"),
    "JPEG 4:2:2": lambda: _jpeg(subsampling="4:2:2"),
    "JPEG 4:2:0": lambda: _jpeg(subsampling="4:2:0"),
    "JPEG progressive": lambda: _jpeg(progressive=True),
    "JPEG RGB, Adobe": _rgb_jpeg,
    "JPEG CMYK, Adobe": lambda: _jpeg("CMYK"),
    "JPEG CMYK": _plain_cmyk,
    "JPEG YCCK": _ycck,
    "JPEG orientation 6": lambda: _jpeg(exif=_exif(6)),
    "JPEG restart markers": lambda: _jpeg(restart_marker_blocks=2),
    "JPEG, two frames (MPO)": lambda: by_pillow(
        Image.fromarray(smooth()),
        "MPO",
        save_all=True,
        append_images=[Image.fromarray(smooth()[::-1].copy())],
    ),
}


# TIFF.


def tiff(
    samples: np.ndarray, *, photometric: int = 1, sample_format: int = 1, order: str = "<"
) -> bytes:
    """Returns an uncompressed TIFF of [H, W, C] samples of their own type."""
    height, width, channels = samples.shape
    samples = samples.astype(samples.dtype.newbyteorder(order))
    bits = samples.dtype.itemsize * 8
    extra = 8 + samples.nbytes
    tags = [(256, 4, 1, width), (257, 4, 1, height)]
    tags += [(258, 3, channels, bits if channels == 1 else extra), (259, 3, 1, 1)]
    tags += [(262, 3, 1, photometric), (273, 4, 1, 8), (277, 3, 1, channels), (278, 4, 1, height)]
    tags += [(279, 4, 1, samples.nbytes), (284, 3, 1, 1)]
    tags += [(339, 3, channels, sample_format if channels == 1 else extra + 2 * channels)]
    directory = struct.pack(order + "H", len(tags))
    for tag, kind, count, value in tags:
        form = "HHIHH" if kind == 3 and count == 1 else "HHII"
        values = (tag, kind, count, value) + ((0,) if form == "HHIHH" else ())
        directory += struct.pack(order + form, *values)
    directory += bytes(4)
    arrays = struct.pack(f"{order}{channels}H", *[bits] * channels)
    arrays += struct.pack(f"{order}{channels}H", *[sample_format] * channels)
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", extra + len(arrays))
    return start + samples.tobytes() + arrays + directory


def _tiff12() -> bytes:
    """Returns a TIFF with 20 pixels per row, two of them in three bytes."""
    rows = _packed_rows(noise(1, 12)[:, :20], 12)
    whole = tiff(np.frombuffer(b"".join(rows), np.uint8).reshape(HEIGHT, -1, 1))
    for tag, before, after in ((256, 30, 20), (258, 8, 12)):
        kind = 4 if tag == 256 else 3
        old, new = (struct.pack("<HHII", tag, kind, 1, value) for value in (before, after))
        assert whole.count(old) == 1
        whole = whole.replace(old, new)
    return whole


def _wide(kind: str, top: float, channels: int = 1) -> np.ndarray:
    return (np.random.default_rng(5).random([HEIGHT, WIDTH, channels]) * top).astype(kind)


_TIFFS = {
    "TIFF bilevel": lambda: by_pillow(
        Image.fromarray(noise(1)[..., 0].astype(np.uint8)).convert("1"), "TIFF"
    ),
    "TIFF gray 8 bit": lambda: tiff(_wide("u1", 256)),
    "TIFF gray 8 bit, white is 0": lambda: tiff(_wide("u1", 256), photometric=0),
    "TIFF gray 8 bit, signed": lambda: tiff(_wide("u1", 256), sample_format=2),
    "TIFF gray 16 bit": lambda: tiff(_wide("u2", 65536)),
    "TIFF gray 16 bit, big-endian": lambda: tiff(_wide("u2", 65536), order=">"),
    "TIFF gray 16 bit, white is 0": lambda: tiff(_wide("u2", 65536), photometric=0),
    "TIFF gray 16 bit, signed": lambda: tiff(_wide("u2", 65536), sample_format=2),
    "TIFF gray 32 bit": lambda: tiff(_wide("u4", 2**32)),
    "TIFF gray 32 bit, values to 255": lambda: tiff(_wide("u4", 256)),
    "TIFF gray 32 bit, signed": lambda: tiff(_wide("i4", 2**31), sample_format=2),
    "TIFF gray 32 bit, big-endian": lambda: tiff(_wide("u4", 2**32), order=">"),
    "TIFF float": lambda: tiff(_wide("f4", 1), sample_format=3),
    "TIFF float, big-endian": lambda: tiff(_wide("f4", 1), sample_format=3, order=">"),
    "TIFF float 64 bit": lambda: tiff(_wide("f8", 1), sample_format=3),
    "TIFF RGB 8 bit": lambda: tiff(_wide("u1", 256, 3), photometric=2),
    "TIFF RGB 16 bit": lambda: tiff(_wide("u2", 65536, 3), photometric=2),
    "TIFF RGB 32 bit": lambda: tiff(_wide("u4", 2**32, 3), photometric=2),
    "TIFF RGBA": lambda: by_pillow(noise(4).astype(np.uint8), "TIFF"),
    "TIFF gray + alpha": lambda: by_pillow(
        Image.fromarray(noise(4).astype(np.uint8)).convert("LA"), "TIFF"
    ),
    "TIFF palette": lambda: by_pillow(_paletted(_palette(16)), "TIFF"),
    "TIFF CMYK": lambda: by_pillow(Image.fromarray(smooth()).convert("CMYK"), "TIFF"),
    "TIFF Lab": lambda: by_pillow(_lab(), "TIFF"),
    "TIFF gray 12 bit": _tiff12,
    "TIFF float 16 bit": lambda: tiff(_wide("f2", 1), sample_format=3),
    "TIFF LZW": lambda: by_pillow(noise().astype(np.uint8), "TIFF", compression="tiff_lzw"),
    "TIFF JPEG": lambda: by_pillow(smooth(), "TIFF", compression="jpeg", quality=95),
    "TIFF pages": lambda: by_pillow(
        noise().astype(np.uint8),
        "TIFF",
        save_all=True,
        append_images=[Image.fromarray(noise(seed=9).astype(np.uint8))],
    ),
}


def _lab() -> Image.Image:
    return Image.frombytes("LAB", (WIDTH, HEIGHT), noise().astype(np.uint8).tobytes())


# WebP and the rest.


def _rgba() -> Image.Image:
    return Image.fromarray(np.dstack([smooth(), smooth()[..., 0]]))


_OTHERS = {
    "WebP lossy": lambda: by_pillow(smooth(), "WEBP", quality=95),
    "WebP lossless": lambda: by_pillow(noise().astype(np.uint8), "WEBP", lossless=True),
    "WebP lossy, alpha": lambda: by_pillow(_rgba(), "WEBP", quality=95),
    "WebP lossless, alpha": lambda: by_pillow(_rgba(), "WEBP", lossless=True, exact=True),
    "WebP animated": lambda: by_pillow(
        Image.fromarray(smooth()),
        "WEBP",
        save_all=True,
        lossless=True,
        append_images=[Image.fromarray(smooth()[::-1].copy())],
    ),
    "WebP animated, lossy": lambda: by_pillow(
        Image.fromarray(smooth()),
        "WEBP",
        save_all=True,
        quality=95,
        append_images=[Image.fromarray(smooth()[::-1].copy())],
    ),
    "JPEG 2000": lambda: by_pillow(smooth(), "JPEG2000"),
    "JPEG 2000 gray 16 bit": lambda: by_pillow(
        smooth()[..., 0].astype(np.uint16) * 256, "JPEG2000"
    ),
    "AVIF": lambda: by_pillow(smooth(), "AVIF", quality=95),
    "PPM": lambda: by_pillow(noise().astype(np.uint8), "PPM"),
    "PGM 16 bit": lambda: by_pillow(_wide("u2", 65536)[..., 0], "PPM"),
    "PGM maxval 1000": lambda: b"P5 21 14 1000 " + _wide("u2", 1001).astype(">u2").tobytes(),
    "PFM": lambda: by_pillow(Image.fromarray(_wide("f4", 1)[..., 0]), "PPM"),
    "PBM": lambda: by_pillow(
        Image.fromarray(noise(1)[..., 0].astype(np.uint8)).convert("1"), "PPM"
    ),
    "TGA": lambda: by_pillow(noise().astype(np.uint8), "TGA"),
    "DIB": lambda: by_pillow(noise().astype(np.uint8), "DIB"),
}

FILES: dict[str, Callable[[], bytes]] = {**_pngs(), **_BMPS, **_GIFS, **_JPEGS, **_TIFFS, **_OTHERS}
