"""Shared by the serving tests: a small classifier, images, and a server's session."""

from __future__ import annotations

import os
import struct
import subprocess
import zlib
from pathlib import Path

import numpy as np
import tensorflow as tf

from efficientnet_ns.data.pipeline import Preprocessing
from efficientnet_ns.serving import export
from efficientnet_ns.serving.signatures import OutputSpec

CLASSES, SIZE = 5, 32


NAMES = ("ant", "bee", "cat", "dog", "eel")


OPTIONS = export.Options(OutputSpec(NAMES, top_k=3))


PREPROCESSING = Preprocessing(SIZE)


class Session:
    """A SavedModel in the C++ session loader; calls each signature by name."""

    def __init__(self, folder: str):
        self._session = tf.compat.v1.Session(graph=tf.Graph())
        with self._session.graph.as_default():
            loader = tf.compat.v1.saved_model.loader
            self.signatures = loader.load(self._session, ["serve"], folder).signature_def

    def __call__(self, name: str, **inputs) -> dict[str, np.ndarray]:
        signature = self.signatures[name]
        outputs = {key: info.name for key, info in signature.outputs.items()}
        feed = {signature.inputs[key].name: value for key, value in inputs.items()}
        return self._session.run(outputs, feed)


def noise(height: int = 40, width: int = 50, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, [height, width, 3], np.uint8)


def jpeg(seed: int = 0) -> bytes:
    return tf.io.encode_jpeg(noise(seed=seed)).numpy()


def expected(model: tf.keras.Model, images: list) -> np.ndarray:
    pixels = tf.stack([PREPROCESSING.evaluate(tf.constant(image)) for image in images])
    return tf.nn.softmax(model(pixels, training=False)).numpy()


def elsewhere(command: list[str], folder: Path) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=True
    )


def bomb(side: int = 30_000) -> bytes:
    """Returns a PNG of one color, compressed without holding all of its rows."""
    squeeze = zlib.compressobj(9)
    row = bytes(1 + side * 3)
    data = b"".join(squeeze.compress(row) for _ in range(side // 100)) + squeeze.flush()

    def chunk(kind: bytes, body: bytes) -> bytes:
        check_sum = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + check_sum

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def lying_files() -> dict[str, bytes]:
    frame = struct.pack(">BHHB", 8, 65500, 65500, 3) + bytes([1, 17, 0, 2, 17, 1, 3, 17, 1])
    bmp = b"BM" + bytes(8) + struct.pack("<IIiiHHI", 54, 40, 20_000, -20_000, 1, 24, 0) + bytes(24)
    gif = b"GIF89a" + struct.pack("<HH", 65000, 65000) + bytes(3)
    return {
        "bomb.png": bomb(),
        "huge.jpg": b"\xff\xd8\xff\xc0" + struct.pack(">H", len(frame) + 2) + frame + b"\xff\xd9",
        "huge.bmp": bmp,
        "huge.gif": gif + b"\x2c" + struct.pack("<HHHH", 0, 0, 65000, 65000) + bytes(20) + b";",
        "frame larger than its screen.gif": b"GIF89a"
        + struct.pack("<HH", 2, 2)
        + bytes(3)
        + b"\x2c"
        + struct.pack("<HHHH", 0, 0, 65000, 65000)
        + b"\x00\x02\x02\x4c\x01\x00;",
        "data missing.bmp": b"BM" + bytes(8) + struct.pack("<IIiiHHI", 54, 40, 90, 90, 1, 24, 0),
        "empty": b"",
        "text": b"not an image",
    }
