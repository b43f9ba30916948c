"""AutoAugment (arXiv 1805.09501): learned sub-policies of two ops, one drawn for each image.

All policies use levels from 0 to 10 as in the code that EfficientNet was trained with: Posterize
keeps 0.4 * level bits and Solarize inverts values from 25.6 * level, so both have more effect at
lower levels.
"""

from __future__ import annotations

import dataclasses
import re

import tensorflow as tf

from efficientnet_ns.data import augment, images, levels

TRANSLATE_CONST = 250.0  # Translation at level 10 in the original code, in pixels.
# policy → sub-policies → ops in order: (op, probability, level).
POLICIES: dict[str, tuple] = {
    # "v0", not the policy in the paper; the published EfficientNets were trained with it
    # (github.com/tensorflow/tpu, models/official/efficientnet/autoaugment.py).
    "imagenet": (
        (("Equalize", 0.8, 1), ("ShearY", 0.8, 4)),
        (("Color", 0.4, 9), ("Equalize", 0.6, 3)),
        (("Color", 0.4, 1), ("Rotate", 0.6, 8)),
        (("Solarize", 0.8, 3), ("Equalize", 0.4, 7)),
        (("Solarize", 0.4, 2), ("Solarize", 0.6, 2)),
        (("Color", 0.2, 0), ("Equalize", 0.8, 8)),
        (("Equalize", 0.4, 8), ("SolarizeAdd", 0.8, 3)),
        (("ShearX", 0.2, 9), ("Rotate", 0.6, 8)),
        (("Color", 0.6, 1), ("Equalize", 1.0, 2)),
        (("Invert", 0.4, 9), ("Rotate", 0.6, 0)),
        (("Equalize", 1.0, 9), ("ShearY", 0.6, 3)),
        (("Color", 0.4, 7), ("Equalize", 0.6, 0)),
        (("Posterize", 0.4, 6), ("AutoContrast", 0.4, 7)),
        (("Solarize", 0.6, 8), ("Color", 0.6, 9)),
        (("Solarize", 0.2, 4), ("Rotate", 0.8, 9)),
        (("Rotate", 1.0, 7), ("TranslateY", 0.8, 9)),
        (("ShearX", 0.0, 0), ("Solarize", 0.8, 4)),
        (("ShearY", 0.8, 0), ("Color", 0.6, 4)),
        (("Color", 1.0, 0), ("Rotate", 0.6, 2)),
        (("Equalize", 0.8, 4), ("Equalize", 0.0, 8)),
        (("Equalize", 1.0, 4), ("AutoContrast", 0.6, 2)),
        (("ShearY", 0.4, 7), ("SolarizeAdd", 0.6, 7)),
        (("Posterize", 0.8, 2), ("Solarize", 0.6, 10)),
        (("Solarize", 0.6, 8), ("Equalize", 0.6, 1)),
        (("Color", 0.8, 6), ("Rotate", 0.4, 5)),
    ),
    # Found on reduced SVHN; from the table in the paper's appendix.
    "svhn": (
        (("ShearX", 0.9, 4), ("Invert", 0.2, 3)),
        (("ShearY", 0.9, 8), ("Invert", 0.7, 5)),
        (("Equalize", 0.6, 5), ("Solarize", 0.6, 6)),
        (("Invert", 0.9, 3), ("Equalize", 0.6, 3)),
        (("Equalize", 0.6, 1), ("Rotate", 0.9, 3)),
        (("ShearX", 0.9, 4), ("AutoContrast", 0.8, 3)),
        (("ShearY", 0.9, 8), ("Invert", 0.4, 5)),
        (("ShearY", 0.9, 5), ("Solarize", 0.2, 6)),
        (("Invert", 0.9, 6), ("AutoContrast", 0.8, 1)),
        (("Equalize", 0.6, 3), ("Rotate", 0.9, 3)),
        (("ShearX", 0.9, 4), ("Solarize", 0.3, 3)),
        (("ShearY", 0.8, 8), ("Invert", 0.7, 4)),
        (("Equalize", 0.9, 5), ("TranslateY", 0.6, 6)),
        (("Invert", 0.9, 4), ("Equalize", 0.6, 7)),
        (("Contrast", 0.3, 3), ("Rotate", 0.8, 4)),
        (("Invert", 0.8, 5), ("TranslateY", 0.0, 2)),
        (("ShearY", 0.7, 6), ("Solarize", 0.4, 8)),
        (("Invert", 0.6, 4), ("Rotate", 0.8, 4)),
        (("ShearY", 0.3, 7), ("TranslateX", 0.9, 3)),
        (("ShearX", 0.1, 6), ("Invert", 0.6, 5)),
        (("Solarize", 0.7, 2), ("TranslateY", 0.6, 7)),
        (("ShearY", 0.8, 4), ("Invert", 0.8, 8)),
        (("ShearX", 0.7, 9), ("TranslateY", 0.8, 3)),
        (("ShearY", 0.8, 5), ("AutoContrast", 0.7, 3)),
        (("ShearX", 0.7, 2), ("Invert", 0.1, 5)),
    ),
    # Found on reduced CIFAR-10; from the table in the paper's appendix.
    "cifar10": (
        (("Invert", 0.1, 7), ("Contrast", 0.2, 6)),
        (("Rotate", 0.7, 2), ("TranslateX", 0.3, 9)),
        (("Sharpness", 0.8, 1), ("Sharpness", 0.9, 3)),
        (("ShearY", 0.5, 8), ("TranslateY", 0.7, 9)),
        (("AutoContrast", 0.5, 8), ("Equalize", 0.9, 2)),
        (("ShearY", 0.2, 7), ("Posterize", 0.3, 7)),
        (("Color", 0.4, 3), ("Brightness", 0.6, 7)),
        (("Sharpness", 0.3, 9), ("Brightness", 0.7, 9)),
        (("Equalize", 0.6, 5), ("Equalize", 0.5, 1)),
        (("Contrast", 0.6, 7), ("Sharpness", 0.6, 5)),
        (("Color", 0.7, 7), ("TranslateX", 0.5, 8)),
        (("Equalize", 0.3, 7), ("AutoContrast", 0.4, 8)),
        (("TranslateY", 0.4, 3), ("Sharpness", 0.2, 6)),
        (("Brightness", 0.9, 6), ("Color", 0.2, 8)),
        (("Solarize", 0.5, 2), ("Invert", 0.0, 3)),
        (("Equalize", 0.2, 0), ("AutoContrast", 0.6, 0)),
        (("Equalize", 0.2, 8), ("Equalize", 0.6, 4)),
        (("Color", 0.9, 9), ("Equalize", 0.6, 6)),
        (("AutoContrast", 0.8, 4), ("Solarize", 0.2, 8)),
        (("Brightness", 0.1, 3), ("Color", 0.7, 0)),
        (("Solarize", 0.4, 5), ("AutoContrast", 0.9, 3)),
        (("TranslateY", 0.9, 9), ("TranslateY", 0.7, 9)),
        (("AutoContrast", 0.9, 2), ("Solarize", 0.8, 3)),
        (("Equalize", 0.8, 8), ("Invert", 0.1, 3)),
        (("TranslateY", 0.7, 9), ("AutoContrast", 0.9, 1)),
    ),
}


def _sub_policies(policy: str) -> tuple:
    if policy not in POLICIES:
        raise ValueError(
            f"AutoAugment policy {policy!r} is unknown; allowed: {', '.join(POLICIES)}"
        )
    return POLICIES[policy]


def auto_augment(
    image: tf.Tensor,
    seed: tf.Tensor,
    *,
    policy: str = "imagenet",
    translate_const: float = TRANSLATE_CONST,
    mode: str = "original",
) -> tf.Tensor:
    """Draws one sub-policy and applies each of its ops with its probability.

    Args:
      image: uint8 [H, W, 3].
      seed: int32 or int64 [2]; equal seeds give equal results. Every other random op on the same
        image needs a different seed.
      policy: name in `POLICIES`.
      translate_const: translation at level 10, in pixels.
      mode: "original" or "clipped"; see `randaugment.rand_augment`. No level is above 10, so the
        modes differ only in Solarize at level 10, which inverts everything or nothing.

    Returns:
      uint8 [H, W, 3], with the static shape of `image`.

    Raises:
      ValueError: If the policy or mode is unknown.
    """
    sub_policies = _sub_policies(policy)
    # Many sub-policies share an op at the same level, so each is built once.
    ops: dict[tuple, int] = {("Identity", ()): 0}

    def number(name: str, level: float) -> int:
        args = levels.op_args(name, level, 0.0, translate_const, mode)
        return ops.setdefault((name, args), len(ops))

    numbers = [[number(name, level) for name, _, level in sub] for sub in sub_policies]
    probabilities = [[probability for _, probability, _ in sub] for sub in sub_policies]
    depth = len(sub_policies[0])
    # The first row selects the sub-policy. Row of each op: whether to apply it, sign, two unused.
    draws = tf.unstack(images.uniform(seed, [1 + depth, 4]))
    chosen = augment.random_index(draws[0][0], len(sub_policies))
    number_of, probability_of = tf.constant(numbers)[chosen], tf.constant(probabilities)[chosen]
    branches = levels.Branches(list(ops), mode, image)
    for step, draw in enumerate(draws[1:]):
        index = tf.where(draw[0] < probability_of[step], number_of[step], 0)
        image = branches.run(index, image, draw)
    return image


_FORM = re.compile(r"autoaugment\((\w+)(?:, mode=(\w+))?\)")


@dataclasses.dataclass(frozen=True)
class AutoAugment:
    """An AutoAugment policy; see `auto_augment`."""

    policy: str = "imagenet"
    mode: str = "original"

    @classmethod
    def parse(cls, text: str) -> AutoAugment:
        """Parses the `str` of a policy, such as `autoaugment(svhn)`.

        Raises:
          ValueError: If `text` has another form, or the policy or mode is unknown.
        """
        found = _FORM.fullmatch(text)
        if not found or found[1] not in POLICIES or (found[2] or "original") not in levels.MODES:
            raise ValueError(f"{text!r} is not of the form {cls.forms()}")
        return cls(found[1], found[2] or "original")

    @staticmethod
    def forms() -> str:
        """Forms that `parse` accepts, for help and error messages."""
        return f"autoaugment({'|'.join(POLICIES)}[, mode=clipped])"

    def __str__(self) -> str:
        mode = "" if self.mode == "original" else f", mode={self.mode}"
        return f"autoaugment({self.policy}{mode})"

    def constants(self, size: int, small: bool) -> dict[str, float]:
        """Returns the Translate distance at level 10, in pixels, for images of `size`."""
        # The published search on CIFAR-10 and SVHN used 10 pixels at size 32.
        return {"translate_const": size * 10 / 32 if small else TRANSLATE_CONST}

    def apply(
        self, image: tf.Tensor, seed: tf.Tensor, *, translate_const: float = TRANSLATE_CONST
    ) -> tf.Tensor:
        """Augments one image, uint8 [H, W, 3] → uint8 [H, W, 3]."""
        return auto_augment(
            image, seed, translate_const=translate_const, **dataclasses.asdict(self)
        )

    def describe(self, translate_const: float = TRANSLATE_CONST) -> str:
        """Describes the policy in one line: `0.8 Equalize + 0.8 ShearY(±0.12) | …`."""

        def describe(name: str, probability: float, level: float) -> str:
            args = levels.op_args(name, level, 0.0, translate_const, self.mode)
            return f"{probability} {levels.describe_op(name, args, self.mode)}"

        sub_policies = (
            " + ".join(describe(*op) for op in sub) for sub in _sub_policies(self.policy)
        )
        return f"{self}: {' | '.join(sub_policies)}"
