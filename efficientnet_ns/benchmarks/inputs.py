"""Measures images per second of the input pipeline, by stage, and compares other libraries.

"One core" means one thread, for this package and its peers (`input_peers`), that converts encoded
bytes in memory to pixels. The results of this package are batches of uint8 if augmented, else of
float32. They are not normalized, because normalization is the model's first layer.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import tensorflow as tf
from absl import logging

from efficientnet_ns.benchmarks import input_peers
from efficientnet_ns.benchmarks.tables import Measured, Row, measure
from efficientnet_ns.config import BenchmarkConfig, ConfigError
from efficientnet_ns.config.cpus import available_cpus
from efficientnet_ns.data import augment, autoaugment, images, levels, pipeline, randaugment
from efficientnet_ns.files import tfexamples, tfrecords
from efficientnet_ns.files.paths import listed

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif")
_SHARD = re.compile(r".+-\d{5}-of-\d{5}$")
_MOST_IMAGES = 512  # Maximum number of images in memory.
_CHUNK = 16  # Images per batch, and between two readings of the clock.
# Each of the fifty single stages, which show where time is spent, runs for this fraction of the
# duration of the compared measurements.
_STAGE_SHARE = 0.1
_LAYERS, _MAGNITUDE = 2, 27


def run(settings: BenchmarkConfig) -> list[Row]:
    """Measures all stages; `settings.data` is a folder of images or of records.

    Raises:
      ConfigError: If the folder has neither.
    """
    files, encoded = encoded_images(settings.data)
    stages = {
        **_read_stage(files),
        **_stages(encoded, settings.image_size),
        **_op_stages(encoded, settings.image_size),
    }
    # All contenders get the same images.
    compared = input_peers.common(encoded)
    if len(compared) < len(encoded):
        logging.warning(
            "%d of %d images are not RGB JPEGs and are left out of the comparison",
            *(len(encoded) - len(compared), len(encoded)),
        )
    wholes = _wholes(compared or encoded, settings.image_size)
    parts = measure(stages, settings.seconds * _STAGE_SHARE)
    with input_peers.installed(compared, settings.image_size, _CHUNK) as peers:
        # Turns are short, so that a disturbance of a second affects only few of them.
        measured = measure({**wholes, **peers}, settings.seconds, turns=9)
    rows = _one_core(parts, stages) + _one_core(measured, wholes)
    rows += _against_peers(measured, list(peers))
    return rows + _all_cores(encoded, settings)


def _one_core(measured: Measured, names: Iterable[str]) -> list[Row]:
    return [
        Row(f"{n}, one core", measured.rate(n), "images/s", spread=measured.spread(n))
        for n in names
    ]


def _against_peers(measured: Measured, peers: list[str]) -> list[Row]:
    if not peers:
        return [Row("no peer can be compared (requirements-peers.txt)", float("nan"), "")]
    rows = _one_core(measured, peers)
    for ours, kind in ((_TRAIN, input_peers.TRAIN), (_EVAL, input_peers.EVAL)):
        for peer in (name for name in peers if kind in name):
            rate, ratio = measured.rate(ours), measured.ratio(ours, peer)
            rows.append(Row(f"{ours}, one core", rate, "images/s", ratio, peer))
    return rows


# Images.


def encoded_images(folder: str, most: int = _MOST_IMAGES) -> tuple[list[str], list[bytes]]:
    """Returns the paths of the image or record files in a folder, and encoded images from them.

    If `folder` is empty, returns no paths and generated images.

    Raises:
      ConfigError: If the folder has neither images nor records.
    """
    if not folder:
        return [], _made_images()
    above = listed(folder, r"[^.].*")
    # The folder and its subfolders, such as class folders.
    paths = sorted(itertools.chain(above, *(listed(f, r"[^.].*") for f in above)))
    shards = [path for path in paths if _SHARD.fullmatch(path)]
    pictures = [path for path in paths if path.lower().endswith(_SUFFIXES)]
    if shards:
        payloads = (r.payload for path in shards for r in tfrecords.read(path))
        found = (tfexamples.image_bytes(payload) for payload in payloads if payload is not None)
    else:
        found = (tf.io.gfile.GFile(path, "rb").read() for path in pictures)
    encoded = list(itertools.islice(found, most))
    if not encoded:
        raise ConfigError(
            f"--data={folder}: neither images ({', '.join(_SUFFIXES)}) nor records "
            "(…-00000-of-00004) in it or in its folders"
        )
    return shards or pictures, encoded


def _made_images(count: int = 48, height: int = 400, width: int = 500) -> list[bytes]:
    """Generates JPEGs with the detail of photographs: seeded noise at several scales."""
    rng = np.random.default_rng(0)

    def picture() -> bytes:
        total = tf.zeros([height, width, 3]) + 128.0
        for cell in (100, 50, 25, 12, 6, 3):
            noise = rng.normal(size=(height // cell + 1, width // cell + 1, 3)) * cell**0.8
            total += tf.image.resize(noise, [height, width], "bicubic")
        return tf.io.encode_jpeg(images.to_uint8(total), quality=95).numpy()

    return [picture() for _ in range(count)]


# One core.


def _one_thread() -> tf.data.Options:
    options = tf.data.Options()
    options.threading.private_threadpool_size = 1
    options.threading.max_intra_op_parallelism = 1
    options.autotune.enabled = False
    return options


def _worker(data: tf.data.Dataset, function: Callable[..., tf.Tensor]) -> Callable[[], int]:
    """Maps `function(element, seed)` over the infinitely repeated `data` on one thread.

    The results have one shape and are batched, because passing them to Python one by one would take
    a third of the time of the entire pipeline.
    """
    mapped = data.repeat().enumerate().map(lambda index, x: function(x, tf.stack([index, 0])))
    batches = mapped.batch(_CHUNK, drop_remainder=True).with_options(_one_thread())
    # Started by the first call, which warms up.
    iterator: list[Iterator] = []

    def work() -> int:
        if not iterator:
            iterator.append(iter(batches))
        next(iterator[0])
        return _CHUNK

    return work


def _read_stage(files: list[str]) -> dict[str, Callable[[], int]]:
    if not files:
        return {}
    paths = tf.data.Dataset.from_tensor_slices(files)
    if not _SHARD.fullmatch(files[0]):
        return {"read files": _worker(paths, lambda path, _: tf.io.read_file(path))}
    return {
        "read records": _worker(
            paths.flat_map(tf.data.TFRecordDataset),
            lambda record, _: tfexamples.parse_unlabeled(record),
        )
    }


def _stages(encoded: list[bytes], size: int) -> dict[str, Callable[[], int]]:
    source = tf.data.Dataset.from_tensor_slices(encoded)

    def random_crop(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        return images.crop(image, functools.partial(images.random_crop_box, seed=seed, size=size))

    crops = source.enumerate().map(lambda i, image: random_crop(image, tf.stack([i, 0]))).cache()
    floats = crops.map(lambda image: images.resize(image, size)).take(64).cache()
    # Images of different shapes cannot be batched, but their sizes can.
    return {
        "decode": _worker(source, lambda image, _: tf.size(images.decode(image))),
        "decode a random crop": _worker(source, lambda *args: tf.size(random_crop(*args))),
        "resize the crop": _worker(crops, lambda image, _: images.resize(image, size)),
        "clip to uint8": _worker(floats, lambda image, _: images.to_uint8(image)),
        "flip": _worker(floats.map(images.to_uint8).cache(), images.random_flip),
    }


def _op_stages(encoded: list[bytes], size: int) -> dict[str, Callable[[], int]]:
    """Returns stages for every op at the published magnitude and for the policies that use them."""
    source = tf.data.Dataset.from_tensor_slices(encoded[:64])
    pixels = source.map(lambda image: images.to_uint8(images.eval_image(image, size))).cache()

    def op(name: str) -> Callable[[tf.Tensor, tf.Tensor], tf.Tensor]:
        args = levels.op_args(
            name, _MAGNITUDE, randaugment.CUTOUT_CONST, randaugment.TRANSLATE_CONST, "original"
        )

        def apply(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
            # They differ between images, but take no time to draw.
            draws = tf.fill([4], tf.cast(seed[0] % 16, tf.float32) / 16)
            return levels.apply_op(name, args, "original", image, draws)

        return apply

    stages = {
        f"{name}({_MAGNITUDE})" if levels.op_args(name, 1, 1, 1, "original") else name: _worker(
            pixels, op(name)
        )
        for name in augment.OPS
    }
    rand_augment = functools.partial(
        randaugment.rand_augment, num_layers=_LAYERS, magnitude=_MAGNITUDE
    )
    stages[f"RandAugment N={_LAYERS} M={_MAGNITUDE}"] = _worker(pixels, rand_augment)
    stages["AutoAugment, ImageNet policy"] = _worker(pixels, autoaugment.auto_augment)
    return stages


_TRAIN, _EVAL = f"train, RandAugment N={_LAYERS} M={_MAGNITUDE}", "eval"


def _preprocessings(size: int) -> dict[str, pipeline.Preprocessing]:
    noise = pipeline.RandAugment(_LAYERS, _MAGNITUDE)
    return {
        "train, no augmentation": pipeline.Preprocessing(size),
        _TRAIN: pipeline.Preprocessing(size, augmentation=noise),
        "train, AutoAugment": pipeline.Preprocessing(size, augmentation=pipeline.AutoAugment()),
    }


def _wholes(encoded: list[bytes], size: int) -> dict[str, Callable[[], int]]:
    source = tf.data.Dataset.from_tensor_slices(encoded)
    evaluate = pipeline.Preprocessing(size).evaluate
    return {
        **{name: _worker(source, p.train) for name, p in _preprocessings(size).items()},
        _EVAL: _worker(source, lambda image, _: evaluate(image)),
    }


# All cores.


def _all_cores(encoded: list[bytes], settings: BenchmarkConfig) -> list[Row]:
    threads = settings.threads or available_cpus()
    options = tf.data.Options()
    options.threading.private_threadpool_size = threads
    options.threading.max_intra_op_parallelism = 1
    source = tf.data.Dataset.from_tensor_slices(encoded).repeat().enumerate()

    def worker(preprocessing: pipeline.Preprocessing) -> Callable[[], int]:
        batches = iter(
            source.map(
                lambda index, image: preprocessing.train(image, tf.stack([index, 0])),
                num_parallel_calls=tf.data.AUTOTUNE,
            )
            .batch(settings.batch_size)
            .prefetch(tf.data.AUTOTUNE)
            .with_options(options)
        )
        return lambda: len(next(batches))

    # One after another, because each fills its buffers on all cores even while another is measured.
    rows = []
    for name, preprocessing in _preprocessings(settings.image_size).items():
        rate = measure({name: worker(preprocessing)}, settings.seconds).rate(name)
        rows.append(Row(f"{name}, batches, {threads} threads", rate, "images/s"))
    return rows
