"""Decoding, cropping and resizing of single images (arXiv 1905.11946; 1911.04252, section 3.1).

Evaluation, prediction and serving all use `eval_image`; training uses `train_image` and
`reflect_pad_crop`. Pixels stay on the 0..255 scale: the model normalizes them.

Functions that take an `image` accept either encoded bytes (scalar string) or decoded pixels
(uint8 [H, W, 3]). Undecodable bytes raise tf.errors.InvalidArgumentError when the op runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import tensorflow as tf

from efficientnet_ns.data import misread, transparency

# Padding of the evaluation crop, in pixels at its scale: 224 of 256, 299 of 331 and so on.
CROP_PADDING = 32

# Smooth chroma upsampling reads one chroma sample (two pixels) on each side.
_CHROMA_REACH = 2

# Pixels of an image per pixel of the resized one, from which converting them all to float32 costs
# more than it saves: 18 for 96 pixels, 13 for 224, 9 for 380.
_CAST_BELOW = 12


def decode(image_bytes: tf.Tensor) -> tf.Tensor:
    """Decodes JPEG, PNG, GIF (first frame) or BMP bytes, scalar string, to uint8 [H, W, 3].

    JPEG gives exactly the pixels of tf.image.decode_jpeg(channels=3), including grayscale and CMYK.
    Gray becomes RGB, palettes are looked up, transparent PNGs are shown on white (see `transparency`),
    the alpha of BMPs is dropped, and 16-bit channels keep their high byte. Orientation tags are
    ignored. Images that TensorFlow would misread (most BMPs with palettes, transparent GIFs; see
    `misread`) are rejected like undecodable ones; `image_conversion.prepare` converts both.
    """
    image_bytes = misread.refuse(image_bytes)
    pixels = tf.cond(
        transparency.is_transparent_png(image_bytes),
        lambda: transparency.on_white(tf.io.decode_png(image_bytes, channels=4)),
        lambda: tf.io.decode_image(image_bytes, channels=3, expand_animations=False),
    )
    return tf.ensure_shape(pixels, [None, None, 3])


def decode_reduced(image_bytes: tf.Tensor, size: int, fraction: float | None = None) -> tf.Tensor:
    """Like `decode`, but decodes only as many pixels of a large JPEG as its evaluation crop needs.

    The decoder omits high frequencies: the result has 1/2, 1/4 or 1/8 of the height and width, the
    smallest for which the evaluation crop still has `size` pixels. It differs from resizing the
    whole image.

    Args:
      size, fraction: parameters of the evaluation crop; see `center_crop_box`.
    """

    def from_jpeg() -> tf.Tensor:
        shorter = tf.reduce_min(tf.image.extract_jpeg_shape(image_bytes)[:2])
        side = center_crop_box(shorter, shorter, size, fraction)[2]
        # Compares integers, because the logarithm of an exact power of two may round either way.
        halvings = sum(tf.cast(side >= size * 2**n, tf.int32) for n in (1, 2, 3))
        ratios = [
            functools.partial(tf.io.decode_jpeg, image_bytes, channels=3, ratio=2**n)
            for n in range(4)
        ]
        return tf.switch_case(halvings, ratios)

    return tf.cond(tf.io.is_jpeg(image_bytes), from_jpeg, lambda: decode(image_bytes))


def _decode_jpeg_box(image_bytes: tf.Tensor, box: tf.Tensor, width: tf.Tensor) -> tf.Tensor:
    """Decodes `box` of a JPEG that is `width` pixels wide, with the pixels of a full decode."""
    y, x, box_height, box_width = tf.unstack(box)
    # The decoder has no chroma neighbors for the first and last column of its window.
    left = tf.maximum(x - _CHROMA_REACH, 0)
    right = tf.minimum(x + box_width + _CHROMA_REACH, width)
    window = tf.stack([y, left, box_height, right - left])
    pixels = tf.image.decode_and_crop_jpeg(image_bytes, window, channels=3)
    return tf.slice(pixels, [0, x - left, 0], [box_height, box_width, 3])


def crop(image: tf.Tensor, choose_box: Callable[[tf.Tensor, tf.Tensor], tf.Tensor]) -> tf.Tensor:
    """Cuts out the box (y, x, h, w) that `choose_box(height, width)` returns; uint8 [h, w, 3].

    For a JPEG, only the box is decoded.
    """
    image = tf.convert_to_tensor(image)
    if image.dtype != tf.string:
        shape = tf.shape(image)
        box = choose_box(shape[0], shape[1])
        return tf.slice(image, [box[0], box[1], 0], [box[2], box[3], 3])

    def from_jpeg() -> tf.Tensor:
        shape = tf.image.extract_jpeg_shape(image)
        return _decode_jpeg_box(image, choose_box(shape[0], shape[1]), shape[1])

    pixels = tf.cond(tf.io.is_jpeg(image), from_jpeg, lambda: crop(decode(image), choose_box))
    return tf.ensure_shape(pixels, [None, None, 3])


def resize(image: tf.Tensor, size: int) -> tf.Tensor:
    """Resizes with TF1's bicubic method; any numeric type [H, W, 3] to float32 [size, size, 3].

    Uses neither half-pixel centers nor aligned corners nor antialiasing, because the published
    weights were trained this way. Overshoots exceed 0..255 by up to about 30.
    """
    image = tf.convert_to_tensor(image)
    shape = tf.shape(image)
    batch = image[tf.newaxis]

    def resized(images: tf.Tensor) -> tf.Tensor:
        return tf.raw_ops.ResizeBicubic(
            images=images, size=[size, size], align_corners=False, half_pixel_centers=False
        )

    # The kernel converts a pixel to float32 each time it reads it, up to 16 times per pixel of the
    # result. Converting the image once beforehand saves a fifth of the time if it is small; of a
    # large one, the kernel reads only a part.
    result = tf.cond(
        shape[0] * shape[1] < _CAST_BELOW * size**2,
        lambda: resized(tf.cast(batch, tf.float32)),
        lambda: resized(batch),
    )
    return tf.ensure_shape(result[0], [size, size, 3])


def center_crop_box(
    height: int | tf.Tensor, width: int | tf.Tensor, size: int, fraction: float | None = None
) -> tf.Tensor:
    """Returns the centered square that fills `fraction` of the shorter side.

    Args:
      fraction: None means size / (size + CROP_PADDING).

    Returns int32 [4] (y, x, h, w); at least one pixel.
    """
    shorter = tf.cast(tf.minimum(height, width), tf.float32)
    fraction = size / (size + CROP_PADDING) if fraction is None else fraction
    side = tf.maximum(tf.cast(fraction * shorter, tf.int32), 1)
    return tf.stack([(height - side + 1) // 2, (width - side + 1) // 2, side, side])


def eval_image(image: tf.Tensor, size: int, fraction: float | None = None) -> tf.Tensor:
    """Applies the evaluation preprocessing: center crop (`center_crop_box`) and bicubic resize.

    Returns float32 [size, size, 3], neither clipped to 0..255 nor normalized.
    """
    return resize(
        crop(image, lambda height, width: center_crop_box(height, width, size, fraction)), size
    )


def whole_image(image: tf.Tensor, size: int) -> tf.Tensor:
    """Resizes the whole image (bicubic), for images that are already evaluation crops.

    Returns float32 [size, size, 3], neither clipped to 0..255 nor normalized.
    """
    image = tf.convert_to_tensor(image)
    return resize(decode(image) if image.dtype == tf.string else image, size)


def small_eval_image(image: tf.Tensor, size: int) -> tf.Tensor:
    """Applies the evaluation preprocessing for small images (SVHN, 32 x 32): a cast.

    An image of another size is resized (bicubic, without cropping) and clipped.
    Returns float32 [size, size, 3] in 0..255.
    """
    image = tf.convert_to_tensor(image)
    if image.dtype == tf.string:
        image = decode(image)
    pixels = tf.cond(
        tf.reduce_all(tf.equal(tf.shape(image)[:2], size)),
        lambda: tf.cast(image, tf.float32),
        lambda: tf.clip_by_value(resize(image, size), 0.0, 255.0),
    )
    return tf.ensure_shape(pixels, [size, size, 3])


def random_crop_box(
    height: int | tf.Tensor,
    width: int | tf.Tensor,
    seed: tf.Tensor,
    *,
    area: tuple[float, float] = (0.08, 1.0),
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
    max_attempts: int = 10,
    size: int | None = None,
) -> tf.Tensor:
    """Draws the Inception-style random crop for training.

    Args:
      height, width: size of the image in pixels, int32.
      seed: int32 or int64 [2]; equal seeds give equal boxes.
      area: range of the fraction of the image that the crop covers. As in the original code, crops
        below 0.1 are redrawn regardless of the lower end.
      aspect: range of width / height of the crop.
      max_attempts: maximum number of draws; if all fail, the whole image is returned.
      size: if given, the evaluation crop for this size replaces the whole image, which would be
        distorted to a square.

    Returns:
      int32 [4] (y, x, h, w).
    """
    begin, extent, _ = tf.image.stateless_sample_distorted_bounding_box(
        tf.stack([height, width, 3]),
        bounding_boxes=tf.constant([[[0.0, 0.0, 1.0, 1.0]]]),
        seed=seed,
        min_object_covered=0.1,
        aspect_ratio_range=aspect,
        area_range=area,
        max_attempts=max_attempts,
    )
    box = tf.concat([begin[:2], extent[:2]], axis=0)
    if size is None:
        return box
    is_whole = tf.reduce_all(tf.equal(extent[:2], tf.stack([height, width])))
    return tf.where(is_whole, center_crop_box(height, width, size), box)


def crop_and_resize(image: tf.Tensor, box: tf.Tensor, size: int) -> tf.Tensor:
    """Cuts `box`, int32 [4] (y, x, h, w), out of an image and resizes it (bicubic).

    Returns float32 [size, size, 3], not clipped.
    """
    return resize(crop(image, lambda _height, _width: tf.convert_to_tensor(box)), size)


def to_uint8(image: tf.Tensor) -> tf.Tensor:
    """Clips to 0..255 and drops the fraction; float32 to uint8 of the same shape."""
    # These two kernels are vectorized, unlike the kernel of tf.clip_by_value.
    return tf.cast(tf.minimum(tf.maximum(image, 0.0), 255.0), tf.uint8)


def train_image(image: tf.Tensor, size: int, seed: tf.Tensor, *, flip: bool = True) -> tf.Tensor:
    """Applies the training preprocessing: random crop, bicubic resize, random horizontal flip.

    Args:
      image: encoded bytes or uint8 [H, W, 3].
      size: side of the result in pixels.
      seed: int32 or int64 [2]; equal seeds give equal results.
      flip: whether to mirror half of the images.

    Returns:
      float32 [size, size, 3], not clipped; RandAugment takes `to_uint8` of it.
    """
    crop_seed, flip_seed = split_seed(seed, 2)
    pixels = resize(
        crop(image, lambda height, width: random_crop_box(height, width, crop_seed, size=size)),
        size,
    )
    return random_flip(pixels, flip_seed) if flip else pixels


def random_flip(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Mirrors half of the images; [H, W, 3] of any numeric type, same shape and type.

    Args:
      seed: int32 or int64 [2]; equal seeds give equal results.
    """
    draw = uniform(seed, [])
    return tf.cond(draw < 0.5, lambda: tf.reverse(image, [1]), lambda: image)


def uniform(seed: tf.Tensor, shape: list[int]) -> tf.Tensor:
    """Draws float32 in [0, 1), determined by `seed`, int32 or int64 [2].

    The numbers equal those of `tf.random.stateless_uniform(alg="philox")`, which scrambles the seed
    with a dozen graph operations; here the kernel scrambles it.
    """
    return tf.raw_ops.StatelessRandomUniform(shape=shape, seed=seed, dtype=tf.float32)


def split_seed(seed: tf.Tensor, count: int) -> list[tf.Tensor]:
    """Derives `count` seeds, int [2] each, from one, int [2]; the first is `seed` itself.

    This takes two operations. The split of tf.random draws numbers, which takes as long as flipping
    an image. The seed is a cipher key: streams of keys that differ in any bit are independent.
    """
    seed = tf.convert_to_tensor(seed)
    # Multiples of a large number are far from the adjacent seeds, which other code may use.
    salts = [[0, number * 0x3C6EF372 % 2**31] for number in range(count)]
    return tf.unstack(tf.bitwise.bitwise_xor(seed, tf.constant(salts, seed.dtype)))


def reflect_pad_crop_at(
    image: tf.Tensor, dy: tf.Tensor | int, dx: tf.Tensor | int, pad: int = 4
) -> tf.Tensor:
    """Crops the reflect-padded image, starting at row `dy`, column `dx`.

    Args:
      image: [H, W, 3] of any numeric type, with H and W greater than `pad`.
      dy, dx: offsets in 0..2*pad; `pad` gives the image itself.
      pad: pixels added to each side, mirrored without repeating the border.

    Returns:
      Same shape and type as `image`.

    Raises:
      ValueError: If H or W is not greater than `pad`; InvalidArgumentError if known only at run time.
    """
    message = f"reflect padding by {pad} requires an image of at least {pad + 1} x {pad + 1} pixels"
    known = [side for side in image.shape[:2] if side is not None]
    if any(side <= pad for side in known):
        raise ValueError(f"{message}, got shape {image.shape}")
    shape = tf.shape(image)
    with tf.control_dependencies([tf.debugging.assert_greater(shape[:2], pad, message)]):
        padded = tf.pad(image, [[pad, pad], [pad, pad], [0, 0]], mode="REFLECT")
    return tf.ensure_shape(tf.slice(padded, [dy, dx, 0], shape), image.shape)


def reflect_pad_crop(image: tf.Tensor, seed: tf.Tensor, pad: int = 4) -> tf.Tensor:
    """Shifts a small image by up to `pad` pixels in each direction, the SVHN training crop.

    Args:
      image: [H, W, 3] of any numeric type, with H and W greater than `pad`.
      seed: int32 or int64 [2]; equal seeds give equal shifts.
      pad: largest shift in pixels; all (2 * pad + 1) ** 2 shifts are equally likely.

    Returns:
      Same shape and type as `image`.
    """
    offsets = tf.random.stateless_uniform(
        [2], seed, maxval=2 * pad + 1, minval=0, dtype=tf.int32, alg="philox"
    )
    return reflect_pad_crop_at(image, offsets[0], offsets[1], pad)
