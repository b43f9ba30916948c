"""Grids of inline images."""

from __future__ import annotations

import io
from collections.abc import Sequence

from efficientnet_ns.report import style, tables

_SMALL_BYTES = 4096  # Approximately the size of a thumbnail.


def thumbnail(data: bytes, size: int) -> bytes:
    """Reduces an encoded image to a JPEG of at most `size` pixels on each side.

    Returns files of up to 4 KiB unchanged, and b"" for images that cannot be decoded.
    """
    from PIL import Image

    if len(data) <= _SMALL_BYTES:
        return data
    buffer = io.BytesIO()
    try:
        with Image.open(io.BytesIO(data)) as image:
            # Decodes a JPEG at 1/2, 1/4 or 1/8 of its size if the result is not below `size`.
            image.draft("RGB", (size, size))
            # JPEG supports neither transparency nor palettes. As in training, transparent is white;
            # before the reduction, which would mix in the colors behind.
            shown: Image.Image = image
            if image.has_transparency_data and image.format != "BMP":
                shown = Image.new("RGBA", image.size, "white")
                shown.alpha_composite(image.convert("RGBA"))
            shown.thumbnail((size, size))
            shown.convert("RGB").save(buffer, "JPEG", quality=80)
    # PIL raises SyntaxError for damaged PNGs.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return b""
    return buffer.getvalue()


def picture(data: bytes, description: str) -> str:
    """Returns HTML of a JPEG or PNG, limited to the width of the page."""
    uri = style.data_uri(data, style.mime(data) or "image/png")
    return f'<img src="{uri}" alt="{tables.escape(description)}" style="max-width: 100%">\n'


def _is_smaller(data: bytes, size: int) -> bool:
    """Checks whether both sides are below `size` pixels; False if the header is damaged."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:  # Reads only the header.
            return max(image.size) < size
    except (OSError, ValueError, Image.DecompressionBombError):
        return False


def _grid_item(data: bytes, caption: str, size: int) -> str:
    mime = style.mime(data)
    if mime is None:
        image = '<div class="placeholder" title="unknown image format">?</div>'
    else:
        # Enlarged images show their pixels; reduced photographs are smooth.
        pixelated = ' class="pixelated"' if _is_smaller(data, size) else ""
        uri = style.data_uri(data, mime)
        image = f'<img{pixelated} src="{uri}" alt="" width="{size}" height="{size}">'
    return f"<figure>{image}<figcaption>{tables.escape(caption)}</figcaption></figure>\n"


def image_grid(
    items: Sequence[tuple[bytes, str]], *, columns: int = 12, pixel_size: int = 56
) -> str:
    """Returns HTML of images in rows, each above its caption.

    Args:
      items: encoded image (JPEG or PNG; others show a placeholder) and caption, plain text.
      columns: images per row.
      pixel_size: side of the square into which each image is fitted, in CSS pixels.
    """
    if columns < 1:
        raise ValueError("columns must be at least 1")
    if pixel_size < 1:
        raise ValueError("pixel_size must be at least 1")
    if not len(items):
        return tables.NOTHING
    figures = "".join(_grid_item(bytes(data), text, pixel_size) for data, text in items)
    # If the page has room, columns are up to 50 % wider, for captions.
    tracks = f"repeat({columns}, minmax({pixel_size}px, {pixel_size * 3 // 2}px))"
    style = f"grid-template-columns: {tracks}; --size: {pixel_size}px"
    return f'<div class="scroll"><div class="grid" style="{style}">\n{figures}</div></div>\n'
