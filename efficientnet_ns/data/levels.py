"""From levels to what an op does: arguments, random signs and places, one branch executed.

AutoAugment and RandAugment name ops with a level on a scale from 0 to 10; the published recipes go
up to 27. The original code never clips: the numbers in the paper come from what its 8-bit
arithmetic does out of range. That behavior is the default here (`mode="original"`);
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
    """Rounds to float32, in which the original carries the signed arguments."""
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

# mode="clipped": (args, cutout_const, translate_const) -> args in a range that keeps an image.
_CLIP_ARGS: dict[str, Callable[[tuple, float, float], tuple]] = {
    "Posterize": lambda args, _cutout, _translate: (min(max(args[0], 1), 8),),
    "Solarize": lambda args, _cutout, _translate: (min(max(args[0], 0), 256),),
    "SolarizeAdd": lambda args, _cutout, _translate: (min(args[0], 128),),
    "TranslateX": lambda args, _cutout, translate: (min(args[0], _f32(translate)),),
    "TranslateY": lambda args, _cutout, translate: (min(args[0], _f32(translate)),),
    "Cutout": lambda args, cutout, _translate: (min(args[0], int(cutout)),),
}

# A clipped threshold of 256 means "invert nothing", where the original wraps it to 0.
_CLIPPED_OPS = {"Solarize": augment.invert_from}


def op_args(
    name: str, level: float, cutout_const: float, translate_const: float, mode: str
) -> tuple:
    """The (positive) arguments of an op at a level.

    Args:
      mode: "original" passes the arguments of `LEVEL_TO_ARGS` on unclipped; "clipped" limits them
        to what keeps an image, see `randaugment.rand_augment`.

    Raises:
      ValueError: unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"augmentation mode {mode!r} is unknown; allowed: {', '.join(MODES)}")
    args = LEVEL_TO_ARGS[name](level, cutout_const, translate_const)
    if mode == "clipped" and name in _CLIP_ARGS:
        args = _CLIP_ARGS[name](args, cutout_const, translate_const)
    return args


def apply_op(name: str, args: tuple, mode: str, image: tf.Tensor, draws: tf.Tensor) -> tf.Tensor:
    """Applies an op, completing its arguments by random ones.

    Args:
      args, mode: of `op_args`.
      image: uint8 [H, W, 3].
      draws: float32 [4] in [0, 1). The first two are for the caller, who chose the op and the sign
        of its argument; the others give cutout row and cutout column.

    Returns:
      uint8 [H, W, 3].
    """
    if name == "Cutout":
        height, width = tf.unstack(tf.shape(image)[:2])
        args += (augment.random_index(draws[2], height), augment.random_index(draws[3], width))
    # Differs (7), on request only: levels above 10 are clipped.
    clipped = _CLIPPED_OPS if mode == "clipped" else {}
    return {"Identity": tf.identity, **augment.OPS, **clipped}[name](image, *args)


class Branches:
    """Ops for images of one shape, one of which is run."""

    def __init__(self, ops: Sequence[tuple[str, tuple]], mode: str, image: tf.Tensor):
        """Builds each op, and each that is signed with the negated argument as well.

        Args:
          ops: names and (positive) arguments, see `op_args`; "Identity" does nothing.
          mode: of `op_args`.
          image: an image of the shape and type of all that will come.
        """
        signed = [name in SIGNED_OPS for name, _ in ops]
        negated = [(name, (-args[0],)) for name, args in ops if name in SIGNED_OPS]
        self._functions = [
            functools.partial(apply_op, name, args, mode) for name, args in [*ops, *negated]
        ]
        positions = itertools.count(len(ops))
        # Number of the op with the negated argument; of an op without a sign, its own.
        self._negated = [next(positions) if s else number for number, s in enumerate(signed)]
        # Traced once per op, not once per layer of RandAugment.
        if not tf.executing_eagerly():
            specs = [tf.TensorSpec(image.shape, image.dtype), tf.TensorSpec([4])]
            self._graphs = [
                tf.function(f, autograph=False).get_concrete_function(*specs)
                for f in self._functions
            ]

    def run(self, index: tf.Tensor, image: tf.Tensor, draws: tf.Tensor) -> tf.Tensor:
        """Runs op number `index`, with the random parts that `draws`, float32 [4], give it."""
        index = tf.where(draws[1] < 0.5, tf.gather(self._negated, index), index)
        if tf.executing_eagerly():
            return self._functions[int(index)](image, draws)
        # tf.switch_case would copy all branches into the caller's graph, where passing over the
        # nodes of those not taken costs more than most ops.
        (result,) = tf.raw_ops.Case(
            branch_index=index,
            input=[image, draws],
            Tout=[image.dtype],
            branches=self._graphs,
            output_shapes=[image.shape],
        )
        return tf.ensure_shape(result, image.shape)


# What an argument out of range comes to in mode "original", for the log line.
_EFFECTIVE: dict[str, Callable[[int], int]] = {
    "Posterize": augment.kept_bits,
    "Solarize": lambda threshold: threshold % 256,
    "SolarizeAdd": lambda addition: min(addition, 255),
}


def describe_op(name: str, args: tuple, mode: str) -> str:
    """For logs; `Solarize(691→179)` means that 691 is the nominal value and 179 the effective one."""
    if not args:
        return name
    sign = "±" if name in SIGNED_OPS else ""
    effective = _EFFECTIVE.get(name, lambda arg: arg)(args[0])
    note = f"→{effective}" if mode == "original" and effective != args[0] else ""
    return f"{name}({sign}{round(args[0], 4)}{note})"
