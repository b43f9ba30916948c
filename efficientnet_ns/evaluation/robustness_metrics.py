"""Computes mCE, mFR and accuracy on subsets of the classes, as their authors define them.

Sources:
  Hendrycks and Dietterich 2019 (arXiv 1903.12261): CE, mCE, FP, FR, mFR, uT5D. AlexNet's values are
    keyed by name, because the order of the corruptions differs between publications.
  Hendrycks et al. 2021 (arXiv 1907.07174): ImageNet-A, predictions restricted to its 200 classes.
  Beyer et al. 2020 (arXiv 2006.07159): ReaL labels, a set of correct classes per image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

SEVERITIES = ("1", "2", "3", "4", "5")

# Top-1 error of AlexNet, averaged over the five severities (github.com/google-research/augmix,
# imagenet.py).
ALEXNET_ERROR = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
# Not in the mean; intended for tuning (github.com/clovaai/assembled-cnn, mce/eval_robustness.py).
ALEXNET_ERROR_EXTRA = {
    "speckle_noise": 0.8454,
    "gaussian_blur": 0.7871,
    "spatter": 0.7175,
    "saturate": 0.6583,
}
# Probability that AlexNet's prediction flips between frames (the same file).
ALEXNET_FLIPS = {
    "gaussian_noise": 0.23653,
    "shot_noise": 0.30062,
    "motion_blur": 0.09297,
    "zoom_blur": 0.05942,
    "snow": 0.11928,
    "brightness": 0.04889,
    "translate": 0.11007,
    "rotate": 0.13104,
    "tilt": 0.07050,
    "scale": 0.23531,
}
ALEXNET_FLIPS_EXTRA = {
    "spatter": 0.05053,
    "speckle_noise": 0.18649,
    "gaussian_blur": 0.02775,
    "shear": 0.10658,
}
# Their frames are independent noise samples, so each is compared with the clean first frame.
NOISE_SEQUENCES = frozenset({"gaussian_noise", "shot_noise", "speckle_noise"})
# Stronger noise in ImageNet-P that no mean includes, e.g. `gaussian_noise_2`.
HARDER_SEQUENCES = frozenset(f"{name}_{level}" for name in NOISE_SEQUENCES for level in (2, 3))


def corruption_errors(errors: Mapping[str, float]) -> dict[str, float]:
    """Computes the CE of each corruption: its error divided by AlexNet's.

    Args:
      errors: corruption → top-1 error, 0..1, averaged over the five severities.

    Raises:
      ValueError: If AlexNet's error on a corruption is unknown.
    """
    known = {**ALEXNET_ERROR, **ALEXNET_ERROR_EXTRA}
    _refuse_unknown(errors, known, "corruption")
    return {name: error / known[name] for name, error in errors.items()}


def mean_corruption_error(errors: Mapping[str, float]) -> float:
    """Computes mCE, the mean CE of the 15 corruptions; ignores the extra four.

    Raises:
      ValueError: If one of the 15 is missing.
    """
    _refuse_missing(errors, ALEXNET_ERROR, "mCE")
    relative = corruption_errors(errors)
    return float(np.mean([relative[name] for name in ALEXNET_ERROR]))


def flips(predicted: np.ndarray, perturbation: str) -> float:
    """Computes FP, the fraction of frames predicted differently from their reference frame.

    Args:
      predicted: top-1 classes of the frames of sequences, int [N, T], T ≥ 2.
      perturbation: its name determines the reference: the first frame for noise sequences, else the
        previous frame.

    Raises:
      ValueError: If `predicted` has another shape.
    """
    predicted = np.asarray(predicted)
    if predicted.ndim != 2 or predicted.shape[1] < 2:
        raise ValueError(f"predicted has shape {predicted.shape}; expected [N, T], T at least 2")
    return float(np.mean(predicted[:, 1:] != _reference(predicted, perturbation)))


def _reference(predicted: np.ndarray, perturbation: str) -> np.ndarray:
    """Returns the reference predictions of all frames after the first."""
    return predicted[:, :1] if perturbation in NOISE_SEQUENCES else predicted[:, :-1]


def top5_distance(predicted: np.ndarray, perturbation: str) -> float:
    """Computes uT5D, the mean distance by which the five best classes of a frame move.

    A frame's distance is the total number of ranks that the five move, where all ranks below the
    fifth count as one. mT5D, which divides by AlexNet's distances, is not computed, because those
    distances are not included here.

    Args:
      predicted: the five best classes of each frame, best first, int [N, T, 5], T ≥ 2.
      perturbation: determines the reference frame; see `flips`.

    Raises:
      ValueError: If `predicted` has another shape.
    """
    predicted = np.asarray(predicted)
    if predicted.ndim != 3 or predicted.shape[1] < 2 or predicted.shape[2] != 5:
        raise ValueError(f"predicted has shape {predicted.shape}; expected [N, T, 5], T at least 2")
    before = _reference(predicted, perturbation)
    # [N, T - 1, 5, 5]: whether class i of the reference is class j of the frame.
    same = before[..., :, np.newaxis] == predicted[:, 1:, np.newaxis, :]
    # argmax finds the only match; a class that left the five has rank 5, however far it fell.
    place = np.where(same.any(-1), same.argmax(-1), 5)
    return float(np.mean(np.abs(place - np.arange(5)).sum(-1)))


def mean_flip_rate(probabilities: Mapping[str, float]) -> float:
    """Computes mFR, the mean over the ten perturbations of FP divided by AlexNet's.

    Args:
      probabilities: perturbation → FP, 0..1.

    Raises:
      ValueError: If a perturbation is unknown or one of the ten is missing.
    """
    _refuse_unknown(probabilities, {**ALEXNET_FLIPS, **ALEXNET_FLIPS_EXTRA}, "perturbation")
    _refuse_missing(probabilities, ALEXNET_FLIPS, "mFR")
    return float(np.mean([probabilities[n] / alexnet for n, alexnet in ALEXNET_FLIPS.items()]))


def best(probs: np.ndarray, k: int = 5, classes: Sequence[int] | None = None) -> np.ndarray:
    """Returns the k best classes of each row, best first, int32 [N, k]; -1 in rows with NaN.

    Args:
      probs: probabilities, float [N, C]. Ties go to the lower class.
      k: number of classes.
      classes: the classes that may be predicted; None for all.
    """
    probs = np.asarray(probs)
    if classes is not None:
        # -inf ranks excluded classes even below allowed ones of probability 0.
        allowed = np.full(probs.shape[1], -np.inf)
        allowed[np.asarray(classes)] = 0
        probs = probs + allowed
        k = min(k, len(set(classes)))
    # np.argpartition does not define the order of ties.
    found = np.argsort(-probs, axis=1, kind="stable")[:, :k].astype(np.int32)
    found[np.isnan(probs).any(1)] = -1
    return found


def real_accuracy(predicted: np.ndarray, right: Sequence[Sequence[int]]) -> tuple[float, int]:
    """Returns (fraction of images predicted as one of their correct classes, number of images).

    Args:
      predicted: top-1 classes, int [N].
      right: the correct classes of each image; images without labels are ignored.

    Raises:
      ValueError: If the lengths differ or no image has a label.
    """
    if len(predicted) != len(right):
        raise ValueError(f"{len(predicted)} predictions for {len(right)} lists of labels")
    counted = [int(p) in classes for p, classes in zip(predicted, right) if classes]
    if not counted:
        raise ValueError("no image has a label")
    return float(np.mean(counted)), len(counted)


def _refuse_unknown(values, known, kind: str) -> None:
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"unknown {kind} {', '.join(unknown)}; known: {', '.join(known)}")


def _refuse_missing(values, needed, what: str) -> None:
    missing = [name for name in needed if name not in values]
    if missing:
        raise ValueError(f"{what} needs all {len(needed)} parts; missing: {', '.join(missing)}")
