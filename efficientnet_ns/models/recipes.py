"""The published models: how each was trained and its accuracy on ImageNet.

Sources:
  EfficientNet (arXiv 1905.11946): table 2 (parameters, multiply-adds), table 1 and section 5.2
    (resolutions, dropout 0.2 for B0 to 0.5 for B7).
  Noisy Student (arXiv 1911.04252): section 3.1 (epochs, ratio), table 2 and the table of models
    with and without iterative training (top-1), table 7 (L2).
  The published training scripts: ratio and RandAugment magnitude of each size; B0 and B1 are
    trained without RandAugment.
  TensorFlow's TPU repository, `models/official/efficientnet/lite`: Lite, whose published weights are
    trained on ImageNet only. Epochs, ratio and magnitude here are those of the B variant of the same
    width.
  The model index of timm: names, crop fractions and its results on ImageNet validation.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One published model.

    Attributes:
      params: number of trainable parameters with 1000 classes.
      multiply_adds: for one image at the test resolution, as published. Lite's include the scale,
        shift and activation of every value after a convolution.
      train_resolution, test_resolution: image side in pixels.
      crop_fraction: side of the evaluation crop relative to the image's shorter side, 0..1.
      dropout_rate: dropout rate of the head, 0..1.
      epochs: passes over the labeled images.
      unlabel_ratio: unlabeled images per labeled one in a batch.
      randaugment_magnitude: magnitude of the two RandAugment operations per image; None if
        RandAugment is not used.
      top1: ImageNet validation accuracy of Noisy Student with an L2 teacher, percent. None if only
        supervised weights are published.
      top1_supervised: ImageNet validation accuracy of a model trained on ImageNet only, percent.
      top5: like top1, but with the label in the five most probable classes, percent, or None.
      timm_top1: timm's result with its copy of the Noisy Student weights, percent, or None.
      tf1_checkpoint: name of the TensorFlow 1 archive, without `.tar.gz`.
      timm_name: name of the same weights in timm.
      keras_file: name of the Keras weights file, or None.
    """

    params: int
    multiply_adds: float
    train_resolution: int
    test_resolution: int
    crop_fraction: float
    dropout_rate: float
    epochs: int
    unlabel_ratio: int
    randaugment_magnitude: int | None
    top1: float | None
    top1_supervised: float
    top5: float | None
    timm_top1: float | None
    tf1_checkpoint: str
    timm_name: str
    keras_file: str | None


# The published schedules are multiples (--train_ratio) of 350 epochs: 109474 updates of 4096 images.
EPOCHS_OF_TRAIN_STEPS = 350

# The columns are the numeric fields of `Recipe`, in order, from `params` to `timm_top1`. L2 is trained
# at 475 pixels, then for 1.5 epochs at 800 on labeled images without augmentation. Its teachers are,
# in turn, B7, L2 (ratio 14) and L2 (14); the last student has ratio 28. The weights before the 1.5
# epochs (88.2 %) are also published: noisy_student_efficientnet-l2_475 and
# tf_efficientnet_l2.ns_jft_in1k_475. No paper gives L2's multiply-adds; `models.complexity` counts them.
_TABLE: dict[str, tuple] = {
    "b0": (5_288_548, 0.39e9, 224, 224, 0.875, 0.2, 700, 1, None, 78.8, 77.3, 94.5, 78.68),
    "b1": (7_794_184, 0.70e9, 240, 240, 0.882, 0.2, 700, 3, None, 81.5, 79.2, 95.8, 81.388),
    "b2": (9_109_994, 1.0e9, 260, 260, 0.890, 0.3, 700, 3, 6, 82.4, 80.0, 96.3, 82.412),
    "b3": (12_233_232, 1.8e9, 300, 300, 0.904, 0.3, 700, 3, 12, 84.1, 81.7, 96.9, 84.054),
    "b4": (19_341_616, 4.2e9, 380, 380, 0.922, 0.4, 700, 3, 15, 85.3, 83.2, 97.5, 85.156),
    "b5": (30_389_784, 9.9e9, 456, 456, 0.934, 0.4, 350, 3, 18, 86.1, 84.0, 97.8, 86.096),
    "b6": (43_040_704, 19e9, 528, 528, 0.942, 0.5, 350, 3, 24, 86.4, 84.5, 97.9, 86.476),
    "b7": (66_347_960, 37e9, 600, 600, 0.949, 0.5, 350, 3, 27, 86.9, 85.0, 98.1, 86.85),
    "l2": (480_309_308, 475.7e9, 475, 800, 0.960, 0.5, 350, 14, 27, 88.4, 85.5, 98.7, 88.36),
    "lite0": (4_652_008, 0.407e9, 224, 224, 0.875, 0.2, 700, 1, None, None, 75.1, None, None),
    "lite1": (5_416_680, 0.631e9, 240, 240, 0.882, 0.2, 700, 3, None, None, 76.7, None, None),
    "lite2": (6_092_072, 0.899e9, 260, 260, 0.890, 0.3, 700, 3, 6, None, 77.6, None, None),
    "lite3": (8_197_096, 1.44e9, 280, 280, 0.897, 0.3, 700, 3, 12, None, 79.8, None, None),
    "lite4": (13_006_568, 2.64e9, 300, 300, 0.904, 0.3, 700, 3, 15, None, 81.5, None, None),
}


def _recipe(short: str, values: tuple) -> Recipe:
    noisy_student = (
        f"noisy_student_efficientnet-{short}",
        f"tf_efficientnet_{short}.ns_jft_in1k",
        None if short == "l2" else f"efficientnet-{short}_noisy-student.h5",
    )
    supervised = (f"efficientnet-{short}", f"tf_efficientnet_{short}.in1k", None)
    recipe = Recipe(*(*values, *noisy_student))
    return recipe if recipe.top1 else Recipe(*(*values, *supervised))


RECIPES = {f"efficientnet-{short}": _recipe(short, values) for short, values in _TABLE.items()}
