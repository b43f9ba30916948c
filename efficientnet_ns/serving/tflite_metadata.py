"""Metadata that TensorFlow Lite's tools read: image properties, normalization, labels.

A flatbuffer of the public schema `metadata_schema.fbs` (file identifier M001, version 1.1.0), stored
as the model's buffer `TFLITE_METADATA`. This module writes its few tables by field position, so that
exporting requires no extra package.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import flatbuffers
import numpy as np

NAME, IDENTIFIER = "TFLITE_METADATA", b"M001"
_MIN_PARSER_VERSION = "1.0.0"
_IMAGE_PROPERTIES, _NORMALIZATION, _AXIS_LABELS, _RGB = 2, 1, 2, 1  # Values of enums and unions.


@dataclasses.dataclass(frozen=True)
class Description:
    """Facts about an image classifier.

    Attributes:
      model: name of the model.
      kind: number type, e.g. float16.
      image_size: side of the input in pixels.
      pixels: human-readable description of the input.
      labels_file: name of the attached file with one class name per line.
    """

    model: str
    kind: str
    image_size: int
    pixels: str
    labels_file: str


class _Builder(flatbuffers.Builder):
    """Aligns vectors to 16 bytes, as the interpreter expects of the weights in a file."""

    def StartVector(self, size, count, alignment):  # noqa: N802 - overrides a method of the package
        return super().StartVector(size, count, max(alignment, 16))

    def table(self, fields: Mapping[int, int], scalars: Mapping[int, tuple] = {}) -> int:  # noqa: B006
        """Writes a table of field position → offset and field position → (type, value)."""
        # Flatbuffers cannot be built nested: everything that `fields` refer to is already written.
        self.StartObject(max([*fields, *scalars]) + 1)
        for slot, offset in fields.items():
            self.PrependUOffsetTRelativeSlot(slot, offset, 0)
        for slot, (prepend, value) in scalars.items():
            prepend(self, slot, value, 0)
        return self.EndObject()

    def tables(self, *offsets: int) -> int:
        self.StartVector(4, len(offsets), 4)
        for offset in reversed(offsets):
            self.PrependUOffsetTRelative(offset)
        return self.EndVector()

    def floats(self, *values: float) -> int:
        self.StartVector(4, len(values), 4)
        # Flatbuffers grow toward their beginning.
        for value in reversed(values):
            self.PrependFloat32(value)
        return self.EndVector()


_byte, _uint = flatbuffers.Builder.PrependUint8Slot, flatbuffers.Builder.PrependUint32Slot


def encode(described: Description) -> bytes:
    """Encodes a description as a flatbuffer.

    It states mean 0 and standard deviation 1, because the graph normalizes pixels itself and readers
    must not do so again.
    """
    b = _Builder(1024)
    # SubGraphMetadata: input_tensor_metadata, output_tensor_metadata.
    graph = b.table({2: b.tables(_input(b, described)), 3: b.tables(_output(b, described))})
    # ModelMetadata: name, description, subgraph_metadata, min_parser_version.
    fields = {
        0: b.CreateString(described.model),
        1: b.CreateString(f"EfficientNet classifier of images, {described.kind}"),
        3: b.tables(graph),
        7: b.CreateString(_MIN_PARSER_VERSION),
    }
    b.Finish(b.table(fields), IDENTIFIER)
    return bytes(b.Output())


def _input(b: _Builder, described: Description) -> int:
    side = (_uint, described.image_size)
    # ImageProperties: color_space, default_size.
    image = b.table({1: b.table({}, {0: side, 1: side})}, {0: (_byte, _RGB)})
    # A union has two fields: the type, and the table of that type.
    content = b.table({1: image}, {0: (_byte, _IMAGE_PROPERTIES)})
    # NormalizationOptions: mean, std.
    scaling = b.table({0: b.floats(0.0), 1: b.floats(1.0)})
    unit = b.table({1: scaling}, {0: (_byte, _NORMALIZATION)})
    # Stats: max, min.
    limits = b.table({0: b.floats(255.0), 1: b.floats(0.0)})
    # TensorMetadata: name, description, content, process_units, stats.
    return b.table(
        {
            0: b.CreateString("image"),
            1: b.CreateString(described.pixels),
            3: content,
            4: b.tables(unit),
            5: limits,
        }
    )


def _output(b: _Builder, described: Description) -> int:
    # AssociatedFile: name, description, type.
    labels = b.table(
        {0: b.CreateString(described.labels_file), 1: b.CreateString("class names, one per line")},
        {2: (_byte, _AXIS_LABELS)},
    )
    limits = b.table({0: b.floats(1.0), 1: b.floats(0.0)})
    # TensorMetadata: name, description, stats, associated_files.
    return b.table(
        {
            0: b.CreateString("probability"),
            1: b.CreateString("probability of each class"),
            5: limits,
            6: b.tables(labels),
        }
    )


def attach(content: bytes, metadata: bytes) -> bytes:
    """Returns the TFLite file `content` with this metadata, which replaces any existing metadata."""
    from tensorflow.lite.python import schema_py_generated as schema

    model = schema.ModelT.InitFromPackedBuf(content)
    stored = schema.BufferT()
    stored.data = np.frombuffer(metadata, np.uint8)
    entry = schema.MetadataT()
    # Refers to the buffer by its number; the buffer is appended next.
    entry.name, entry.buffer = NAME, len(model.buffers)
    model.buffers.append(stored)
    # Names that were read from a flatbuffer are bytes.
    others = [kept for kept in model.metadata or [] if kept.name != NAME.encode()]
    model.metadata = [*others, entry]
    b = _Builder(len(content) + len(metadata))
    b.Finish(model.Pack(b), b"TFL3")
    return bytes(b.Output())
