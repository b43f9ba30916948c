"""RandAugment (arXiv 1909.13719): ops drawn uniformly, all at one magnitude."""

from __future__ import annotations

import dataclasses
import re

import tensorflow as tf

from efficientnet_ns.data import augment, images, levels

# Constants of the original code at magnitude 10, in pixels.
CUTOUT_CONST, TRANSLATE_CONST = 40.0, 100.0
# In the order of the original code: a random draw selects an op by its place here.
RANDAUGMENT_OPS = (
    *("AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "Color", "Contrast"),
    *("Brightness", "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY", "SolarizeAdd"),
    "Cutout",
)


def _policy(
    magnitude: float, cutout_const: float, translate_const: float, use_cutout: bool, mode: str
) -> dict[str, tuple]:
    """Returns the ops to draw from, in order, with their (positive) arguments."""
    return {
        name: levels.op_args(name, magnitude, cutout_const, translate_const, mode)
        for name in RANDAUGMENT_OPS
        if use_cutout or name != "Cutout"
    }


def rand_augment(
    image: tf.Tensor,
    seed: tf.Tensor,
    *,
    num_layers: int,
    magnitude: float,
    cutout_const: float = CUTOUT_CONST,
    translate_const: float = TRANSLATE_CONST,
    use_cutout: bool = True,
    mode: str = "original",
) -> tf.Tensor:
    """Applies `num_layers` ops, each drawn uniformly from `RANDAUGMENT_OPS`.

    Args:
      image: uint8 [H, W, 3].
      seed: int32 or int64 [2]; equal seeds give equal results. Every other random op on the same
        image needs a different seed.
      num_layers: number of ops applied one after the other (N of RandAugment).
      magnitude: M of RandAugment; 10 is the nominal maximum, but published recipes use up to 27.
      cutout_const: half side of the Cutout square at magnitude 10, in pixels.
      translate_const: translation at magnitude 10, in pixels.
      use_cutout: whether to include Cutout in the ops (16 ops, otherwise 15).
      mode: "original" does not clip the arguments of `levels.LEVEL_TO_ARGS`. Posterize then keeps a
        single bit from magnitude 22.5 up, Solarize uses its threshold modulo 256, SolarizeAdd
        merges all dark pixels into white, and Translate and Cutout may gray the whole image.
        "clipped" limits Posterize to 1..8 bits, the Solarize threshold to 0..256 (256 inverts
        nothing), the SolarizeAdd addition to 128 (dark pixels stay distinct), and Translate and
        Cutout to their size at magnitude 10. Rotate, Shear and the four blending ops are the same in
        both modes.

    Returns:
      uint8 [H, W, 3], with the static shape of `image`.

    Raises:
      ValueError: If the mode is unknown.
    """
    policy = _policy(magnitude, cutout_const, translate_const, use_cutout, mode)
    if not num_layers:
        return image
    draws = images.uniform(seed, [num_layers, 4])  # op, sign, cutout row, cutout column
    chosen = tf.unstack(augment.random_index(draws[:, 0], len(policy)))
    # All layers share the graphs of the ops.
    branches = levels.Branches(list(policy.items()), mode, image)
    for index, layer in zip(chosen, tf.unstack(draws)):
        image = branches.run(index, image, layer)
    return image


_FORM = re.compile(
    r"randaugment\(N=(\d+), M=(\d+)(?:, mode=(\w+))?(, cutout=no)?(, reach=proportional)?\)"
)


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """A RandAugment policy; see `rand_augment`. Training uses the defaults of the flags.

    Attributes:
      num_layers: number of ops applied one after the other (N).
      magnitude: level of all ops (M).
      mode: "original" or "clipped".
      use_cutout: whether Cutout is one of the ops.
      proportional: whether Translate and Cutout cover the same fraction of the image as at 224
        pixels, not the same number of pixels. Small images are always scaled.
    """

    num_layers: int
    magnitude: int
    mode: str = "original"
    use_cutout: bool = True
    proportional: bool = False

    @classmethod
    def parse(cls, text: str) -> RandAugment:
        """Parses the `str` of a policy, such as `randaugment(N=2, M=27)`.

        Raises:
          ValueError: If `text` has another form, or the mode is unknown.
        """
        found = _FORM.fullmatch(text)
        if not found or (found[3] or "original") not in levels.MODES:
            raise ValueError(f"{text!r} is not of the form {cls.forms()}")
        mode, cutout, reach = found[3] or "original", found[4] is None, found[5] is not None
        return cls(int(found[1]), int(found[2]), mode, cutout, reach)

    @staticmethod
    def forms() -> str:
        """Forms that `parse` accepts, for help and error messages."""
        return "randaugment(N=2, M=27[, mode=clipped][, cutout=no][, reach=proportional])"

    def __str__(self) -> str:
        mode = "" if self.mode == "original" else f", mode={self.mode}"
        cutout = "" if self.use_cutout else ", cutout=no"
        reach = ", reach=proportional" if self.proportional else ""
        return f"randaugment(N={self.num_layers}, M={self.magnitude}{mode}{cutout}{reach})"

    def constants(self, size: int, small: bool) -> dict[str, float]:
        """Returns the Cutout and Translate constants, in pixels, for images of `size`."""
        # In proportion to the original code's constants at 32 pixels.
        reach = size // 8
        scale = size / 224 if self.proportional else 1.0
        return {
            "cutout_const": reach if small else CUTOUT_CONST * scale,
            "translate_const": reach if small else TRANSLATE_CONST * scale,
        }

    def apply(
        self,
        image: tf.Tensor,
        seed: tf.Tensor,
        *,
        cutout_const: float = CUTOUT_CONST,
        translate_const: float = TRANSLATE_CONST,
    ) -> tf.Tensor:
        """Augments one image, uint8 [H, W, 3] → uint8 [H, W, 3]."""
        return rand_augment(
            image,
            seed,
            cutout_const=cutout_const,
            translate_const=translate_const,
            num_layers=self.num_layers,
            magnitude=self.magnitude,
            mode=self.mode,
            use_cutout=self.use_cutout,
        )

    def describe(
        self, cutout_const: float = CUTOUT_CONST, translate_const: float = TRANSLATE_CONST
    ) -> str:
        """Describes the policy and its ops in one line; for arguments, see `levels.describe_op`."""
        policy = _policy(self.magnitude, cutout_const, translate_const, self.use_cutout, self.mode)
        ops = (levels.describe_op(name, args, self.mode) for name, args in policy.items())
        return f"{self}: {', '.join(ops)}"
