"""The published models: how each was trained, and what it reached on ImageNet.

Sources:
  EfficientNet (arXiv 1905.11946): table 2 (parameters, multiply-adds), table 1 and section 5.2
    (resolutions, dropout 0.2 for B0 to 0.5 for B7).
  Noisy Student (arXiv 1911.04252): section 3.1 (epochs, ratio), table 2 and the table of models
    with and without iterative training (top-1), table 7 (L2).
  The published training scripts: ratio and RandAugment magnitude of each size; B0 and B1 are
    trained without RandAugment.
  The model index of timm: names, crop fractions; its results on ImageNet validation.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One published model.

    Attributes:
      params: trainable parameters with 1000 classes.
      multiply_adds: of one image at the test resolution, as the paper rounds them.
      train_resolution, test_resolution: image side in pixels.
      crop_fraction: part of the image's shorter side that the evaluation crop covers, 0..1.
      dropout_rate: of the head, 0..1.
      epochs: passes over the labeled images.
      unlabel_ratio: unlabeled images per labeled one in a batch.
      randaugment_magnitude: level of RandAugment, two operations per image; None: not used.
      top1: ImageNet validation accuracy of Noisy Student with an L2 teacher, percent.
      top1_supervised: the same of the model trained on ImageNet alone, percent.
      top5: as top1, among the first five answers, percent.
      timm_top1: what timm measured with its copy of the Noisy Student weights, percent.
      tf1_checkpoint: name of the TensorFlow 1 archive, without `.tar.gz`.
      timm_name: name of the same weights in timm.
      keras_file: name of the Keras weights file; None: there is none.
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
    top1: float
    top1_supervised: float
    top5: float
    timm_top1: float
    tf1_checkpoint: str
    timm_name: str
    keras_file: str | None


# The published schedules are multiples (--train_ratio) of one of 350 epochs: 109474 updates of 4096.
EPOCHS_OF_TRAIN_STEPS = 350

RECIPES: dict[str, Recipe] = {
    "efficientnet-b0": Recipe(
        params=5_288_548,
        multiply_adds=0.39e9,
        train_resolution=224,
        test_resolution=224,
        crop_fraction=0.875,
        dropout_rate=0.2,
        epochs=700,
        unlabel_ratio=1,
        randaugment_magnitude=None,
        top1=78.8,
        top1_supervised=77.3,
        top5=94.5,
        timm_top1=78.68,
        tf1_checkpoint="noisy_student_efficientnet-b0",
        timm_name="tf_efficientnet_b0.ns_jft_in1k",
        keras_file="efficientnet-b0_noisy-student.h5",
    ),
    "efficientnet-b1": Recipe(
        params=7_794_184,
        multiply_adds=0.70e9,
        train_resolution=240,
        test_resolution=240,
        crop_fraction=0.882,
        dropout_rate=0.2,
        epochs=700,
        unlabel_ratio=3,
        randaugment_magnitude=None,
        top1=81.5,
        top1_supervised=79.2,
        top5=95.8,
        timm_top1=81.388,
        tf1_checkpoint="noisy_student_efficientnet-b1",
        timm_name="tf_efficientnet_b1.ns_jft_in1k",
        keras_file="efficientnet-b1_noisy-student.h5",
    ),
    "efficientnet-b2": Recipe(
        params=9_109_994,
        multiply_adds=1.0e9,
        train_resolution=260,
        test_resolution=260,
        crop_fraction=0.890,
        dropout_rate=0.3,
        epochs=700,
        unlabel_ratio=3,
        randaugment_magnitude=6,
        top1=82.4,
        top1_supervised=80.0,
        top5=96.3,
        timm_top1=82.412,
        tf1_checkpoint="noisy_student_efficientnet-b2",
        timm_name="tf_efficientnet_b2.ns_jft_in1k",
        keras_file="efficientnet-b2_noisy-student.h5",
    ),
    "efficientnet-b3": Recipe(
        params=12_233_232,
        multiply_adds=1.8e9,
        train_resolution=300,
        test_resolution=300,
        crop_fraction=0.904,
        dropout_rate=0.3,
        epochs=700,
        unlabel_ratio=3,
        randaugment_magnitude=12,
        top1=84.1,
        top1_supervised=81.7,
        top5=96.9,
        timm_top1=84.054,
        tf1_checkpoint="noisy_student_efficientnet-b3",
        timm_name="tf_efficientnet_b3.ns_jft_in1k",
        keras_file="efficientnet-b3_noisy-student.h5",
    ),
    "efficientnet-b4": Recipe(
        params=19_341_616,
        multiply_adds=4.2e9,
        train_resolution=380,
        test_resolution=380,
        crop_fraction=0.922,
        dropout_rate=0.4,
        epochs=700,
        unlabel_ratio=3,
        randaugment_magnitude=15,
        top1=85.3,
        top1_supervised=83.2,
        top5=97.5,
        timm_top1=85.156,
        tf1_checkpoint="noisy_student_efficientnet-b4",
        timm_name="tf_efficientnet_b4.ns_jft_in1k",
        keras_file="efficientnet-b4_noisy-student.h5",
    ),
    "efficientnet-b5": Recipe(
        params=30_389_784,
        multiply_adds=9.9e9,
        train_resolution=456,
        test_resolution=456,
        crop_fraction=0.934,
        dropout_rate=0.4,
        epochs=350,
        unlabel_ratio=3,
        randaugment_magnitude=18,
        top1=86.1,
        top1_supervised=84.0,
        top5=97.8,
        timm_top1=86.096,
        tf1_checkpoint="noisy_student_efficientnet-b5",
        timm_name="tf_efficientnet_b5.ns_jft_in1k",
        keras_file="efficientnet-b5_noisy-student.h5",
    ),
    "efficientnet-b6": Recipe(
        params=43_040_704,
        multiply_adds=19e9,
        train_resolution=528,
        test_resolution=528,
        crop_fraction=0.942,
        dropout_rate=0.5,
        epochs=350,
        unlabel_ratio=3,
        randaugment_magnitude=24,
        top1=86.4,
        top1_supervised=84.5,
        top5=97.9,
        timm_top1=86.476,
        tf1_checkpoint="noisy_student_efficientnet-b6",
        timm_name="tf_efficientnet_b6.ns_jft_in1k",
        keras_file="efficientnet-b6_noisy-student.h5",
    ),
    "efficientnet-b7": Recipe(
        params=66_347_960,
        multiply_adds=37e9,
        train_resolution=600,
        test_resolution=600,
        crop_fraction=0.949,
        dropout_rate=0.5,
        epochs=350,
        unlabel_ratio=3,
        randaugment_magnitude=27,
        top1=86.9,
        top1_supervised=85.0,
        top5=98.1,
        timm_top1=86.85,
        tf1_checkpoint="noisy_student_efficientnet-b7",
        timm_name="tf_efficientnet_b7.ns_jft_in1k",
        keras_file="efficientnet-b7_noisy-student.h5",
    ),
    # Trained at 475 pixels, then 1.5 epochs at 800 on labeled images without augmentation. The
    # teachers in turn are B7, L2 (ratio 14), L2 (14); the last student has ratio 28. The weights
    # before the 1.5 epochs (88.2 %) are published too: noisy_student_efficientnet-l2_475,
    # tf_efficientnet_l2.ns_jft_in1k_475.
    "efficientnet-l2": Recipe(
        params=480_309_308,
        # Not in the paper: counted by `models.complexity`.
        multiply_adds=475.7e9,
        train_resolution=475,
        test_resolution=800,
        crop_fraction=0.960,
        dropout_rate=0.5,
        epochs=350,
        unlabel_ratio=14,
        randaugment_magnitude=27,
        top1=88.4,
        top1_supervised=85.5,
        top5=98.7,
        timm_top1=88.36,
        tf1_checkpoint="noisy_student_efficientnet-l2",
        timm_name="tf_efficientnet_l2.ns_jft_in1k",
        keras_file=None,
    ),
}
