"""Counts kernels, moved bytes and host transfers of one update compiled by XLA, without running it.

XLA compiles for the CPU of this machine. Compilers for other devices fuse differently, but start
from the same operations, so the cost that a part of the update adds is comparable.
"""

from __future__ import annotations

import dataclasses
import math
import re

import tensorflow as tf

from efficientnet_ns.benchmarks import training
from efficientnet_ns.benchmarks.tables import Row
from efficientnet_ns.config import BenchmarkConfig

# Instructions that only name memory; all others in the entry computation are kernels.
_FREE = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element"}
_TRANSFERS = {"infeed", "outfeed", "send", "recv"}
# `  ROOT %name = f32[8,64]{1,0} add(%a, %b), …`; the type of a tuple is in parentheses.
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?(%[\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)")
_ARRAY = re.compile(r"([a-z]+\d*)\w*\[([\d,]*)\]")
_BYTES = {"pred": 1, "bf16": 2}


@dataclasses.dataclass(frozen=True)
class Counted:
    """Counts of an XLA executable.

    Attributes:
      kernels: number of instructions that compute or copy.
      megabytes: data that they read and write, each operand and result once per kernel.
      transfers: number of instructions that exchange data with the host during the step.
    """

    kernels: int
    megabytes: float
    transfers: int


def run(config: BenchmarkConfig) -> list[Row]:
    """Counts kernels, bytes and transfers of a plain update and of a student's complete update.

    Compiling takes minutes for large models.
    """
    what = f"{config.model_name} at {config.image_size}, batch {config.batch_size}"
    (plain_name, plain), (name, whole) = (
        (training.OWN_UPDATES[key], count(optimized_hlo(key, config))) for key in ("ours", "whole")
    )
    # uint8 pixels and one int32 label per image.
    images = config.batch_size * (3 * config.image_size**2 + 4)
    return [
        Row(f"{what}: {plain_name}", plain.kernels, "kernels"),
        Row(f"{what}: {name}", whole.kernels, "kernels", whole.kernels / plain.kernels, plain_name),
        Row(f"{what}: {plain_name}", plain.megabytes, "MB/step"),
        Row(
            f"{what}: {name}",
            whole.megabytes,
            "MB/step",
            whole.megabytes / plain.megabytes,
            plain_name,
        ),
        Row("exchanged with the host in mid-step", whole.transfers, "times"),
        Row("images and labels, from the host", images / 1e6, "MB/step"),
    ]


def optimized_hlo(key: str, config: BenchmarkConfig) -> str:
    """Returns XLA's text of an update of `training.OWN_UPDATES` after all optimizations."""
    compiled = tf.function(training.UPDATES[key](config), jit_compile=True)
    batch = training.random_batch(config)
    return compiled.experimental_get_compiler_ir(batch)(stage="optimized_hlo")


def count(hlo: str) -> Counted:
    """Counts the instructions of the entry computation of an HLO module in text form."""
    sizes: dict[str, float] = {}
    kernels, transfers, moved = 0, 0, 0.0
    # The text before the entry contains the bodies of fused kernels and loops.
    for line in hlo[hlo.index("\nENTRY") :].splitlines():
        found = _INSTRUCTION.match(line)
        if not found:
            continue
        name, result, op, operands = found.groups()
        sizes[name] = sum(_size(*array) for array in _ARRAY.findall(result))
        if op in _FREE:
            continue
        kernels += 1
        transfers += op in _TRANSFERS
        moved += sizes[name] + sum(sizes[x] for x in re.findall(r"%[\w.-]+", operands))
    return Counted(kernels, moved / 1e6, transfers)


def _size(dtype: str, shape: str) -> float:
    """Returns the bytes of an array: ("f32", "8,64") → 2048."""
    item = _BYTES.get(dtype) or int(re.sub(r"\D", "", dtype) or 0) / 8
    return item * math.prod(int(side) for side in shape.split(",") if side)
