"""Converts levels to op arguments, draws random signs and positions, and runs one op.

AutoAugment and RandAugment specify ops with a level on a scale from 0 to 10; the published recipes
use up to 27. The original code never clips, so the numbers in the paper include the out-of-range
behavior of its 8-bit arithmetic. That behavior is the default here (`mode="original"`);
`mode="clipped"` avoids it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

from efficientnet_ns.data import augment

MODES = ("original", "clipped")

# Ops whose argument is negated in half of the draws.
SIGNED_OPS = frozenset({"Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"})


# Magnitudes.


def _f32(value: float) -> float:
    """Rounds to float32, the type of signed arguments in the original code."""
    return float(np.float32(value))


def _no_args(magnitude: float, cutout_const: float, translate_const: float) -> tuple:
    return ()


def _enhance_args(magnitude: float, cutout_const: float, translate_const: float) -> tuple:
    return (magnitude / 10 * 1.8 + 0.1,)


def _shear_args(magnitude: float, cutout_const: float, translate_const: float) -> tuple:
    return (_f32(magnitude / 10 * 0.3),)


def _translate_args(magnitude: float, cutout_const: float, translate_const: float) -> tuple:
    return (_f32(magnitude / 10 * translate_const),)


# (magnitude, cutout_const, translate_const) -> arguments of the op; nothing is clipped.
LEVEL_TO_ARGS: dict[str, Callable[[float, float, float], tuple]] = {
    "AutoContrast": _no_args,
    "Equalize": _no_args,
    "Invert": _no_args,
    "Rotate": lambda m, _cutout, _translate: (_f32(m / 10 * 30.0),),
    "Posterize": lambda m, _cutout, _translate: (int(m / 10 * 4),),
    "Solarize": lambda m, _cutout, _translate: (int(m / 10 * 256),),
    "Color": _enhance_args,
    "Contrast": _enhance_args,
    "Brightness": _enhance_args,
    "Sharpness": _enhance_args,
    "ShearX": _shear_args,
    "ShearY": _shear_args,
    "TranslateX": _translate_args,
    "TranslateY": _translate_args,
    "SolarizeAdd": lambda m, _cutout, _translate: (int(m / 10 * 110),),
    "Cutout": lambda m, cutout, _translate: (int(m / 10 * cutout),),
}

# mode="clipped": (args, cutout_const, translate_const) -> args in a range that preserves an image.
_CLIP_ARGS: dict[str, Callable[[tuple, float, float], tuple]] = {
    "Posterize": lambda args, _cutout, _translate: (min(max(args[0], 1), 8),),
    "Solarize": lambda args, _cutout, _translate: (min(max(args[0], 0), 256),),
    "SolarizeAdd": lambda args, _cutout, _translate: (min(args[0], 128),),
    "TranslateX": lambda args, _cutout, translate: (min(args[0], _f32(translate)),),
    "TranslateY": lambda args, _cutout, translate: (min(args[0], _f32(translate)),),
    "Cutout": lambda args, cutout, _translate: (min(args[0], int(cutout)),),
}

# A clipped threshold of 256 means "invert nothing"; the original code wraps it to 0.
_CLIPPED_OPS = {"Solarize": augment.invert_from}


def op_args(
    name: str, level: float, cutout_const: float, translate_const: float, mode: str
) -> tuple:
    """Returns the (positive) arguments of an op at a level.

    Args:
      mode: "original" does not clip the arguments of `LEVEL_TO_ARGS`; "clipped" limits them to a
        range that preserves an image, see `randaugment.rand_augment`.

    Raises:
      ValueError: If the mode is unknown.
    """
    if mode not in MODES:
        raise ValueError(f"augmentation mode {mode!r} is unknown; allowed: {', '.join(MODES)}")
    args = LEVEL_TO_ARGS[name](level, cutout_const, translate_const)
    if mode == "clipped" and name in _CLIP_ARGS:
        args = _CLIP_ARGS[name](args, cutout_const, translate_const)
    return args


def apply_op(name: str, args: tuple, mode: str, image: tf.Tensor, draws: tf.Tensor) -> tf.Tensor:
    """Applies an op with its arguments and, for Cutout, a random center.

    Args:
      args, mode: see `op_args`.
      image: uint8 [H, W, 3].
      draws: float32 [4] in [0, 1). The caller chooses the op and the sign of its argument with the
        first two; the others determine the cutout row and column.

    Returns:
      uint8 [H, W, 3].
    """
    if name == "Cutout":
        height, width = tf.unstack(tf.shape(image)[:2])
        args += (augment.random_index(draws[2], height), augment.random_index(draws[3], width))
    # Differs (7) in docs/differences.md, only on request: levels above 10 are clipped.
    clipped = _CLIPPED_OPS if mode == "clipped" else {}
    return {"Identity": tf.identity, **augment.OPS, **clipped}[name](image, *args)


class Branches:
    """Ops for images of one shape; each call runs one of them."""

    def __init__(self, ops: Sequence[tuple[str, tuple]], mode: str, image: tf.Tensor):
        """Builds each op, and each signed op also with the negated argument.

        Args:
          ops: names and (positive) arguments, see `op_args`; "Identity" does nothing.
          mode: see `op_args`.
          image: an image with the shape and dtype of all images to augment.
        """
        signed = [name in SIGNED_OPS for name, _ in ops]
        negated = [(name, (-args[0],)) for name, args in ops if name in SIGNED_OPS]
        self._functions = [
            functools.partial(apply_op, name, args, mode) for name, args in [*ops, *negated]
        ]
        positions = itertools.count(len(ops))
        # Index of the op with the negated argument; an unsigned op has its own index.
        self._negated = [next(positions) if s else number for number, s in enumerate(signed)]
        # Traced once per op, not once per layer of RandAugment.
        if not tf.executing_eagerly():
            specs = [tf.TensorSpec(image.shape, image.dtype), tf.TensorSpec([4])]
            self._graphs = [
                tf.function(f, autograph=False).get_concrete_function(*specs)
                for f in self._functions
            ]

    def run(self, index: tf.Tensor, image: tf.Tensor, draws: tf.Tensor) -> tf.Tensor:
        """Runs op number `index` with the random values of `draws`, float32 [4]."""
        index = tf.where(draws[1] < 0.5, tf.gather(self._negated, index), index)
        if tf.executing_eagerly():
            return self._functions[int(index)](image, draws)
        # tf.switch_case would copy all branches into the caller's graph, where skipping the nodes
        # of the branches not taken costs more than most ops.
        (result,) = tf.raw_ops.Case(
            branch_index=index,
            input=[image, draws],
            Tout=[image.dtype],
            branches=self._graphs,
            output_shapes=[image.shape],
        )
        return tf.ensure_shape(result, image.shape)


# Effective value of an out-of-range argument in mode "original", for the log line.
_EFFECTIVE: dict[str, Callable[[int], int]] = {
    "Posterize": augment.kept_bits,
    "Solarize": lambda threshold: threshold % 256,
    "SolarizeAdd": lambda addition: min(addition, 255),
}


def describe_op(name: str, args: tuple, mode: str) -> str:
    """Describes an op for logs; in `Solarize(691→179)`, 691 is nominal and 179 effective."""
    if not args:
        return name
    sign = "±" if name in SIGNED_OPS else ""
    effective = _EFFECTIVE.get(name, lambda arg: arg)(args[0])
    note = f"→{effective}" if mode == "original" and effective != args[0] else ""
    return f"{name}({sign}{round(args[0], 4)}{note})"
