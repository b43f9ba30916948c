"""Published results on the robustness sets, in percent, for comparison with measured ones.

Sources:
  Xie et al. 2020 (arXiv 1911.04252), tables 3 to 5: EfficientNet-L2, Noisy Student L2 and the best
      earlier methods. The paper states a resolution only for ImageNet-C and -P, where the network
      before fine-tuning at 800 pixels gets resized images.
  timm (github.com/huggingface/pytorch-image-models), results/*.csv: the published weights
    `tf_efficientnet_*.ns_jft_in1k*` of each size, evaluated there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Set → (key of a result, its name in the table) in the paper's order.
_TOP1, _TOP5 = ("top1", "top-1"), ("top5", "top-5")
COLUMNS = {
    "imagenet-a": (_TOP1, _TOP5),
    "imagenet-r": (_TOP1, _TOP5),
    "imagenet-v2": (_TOP1, _TOP5),
    "imagenet-sketch": (_TOP1, _TOP5),
    "imagenet-real": (_TOP1,),
    "imagenet-c": (_TOP1, ("mce", "mCE")),
    "imagenet-p": (_TOP1, ("mfr", "mFR"), ("ut5d", "uT5D")),
}

BASELINE, STUDENT = "EfficientNet-L2", "Noisy Student L2"
# (method, resolution, results in the order of `COLUMNS`); None: not published.
PAPER: dict[str, tuple] = {
    "imagenet-a": (
        ("ResNeXt-101 WSL", None, 61.0, None),
        (BASELINE, None, 49.6, 78.6),
        (STUDENT, None, 83.7, 95.2),
    ),
    "imagenet-c": (
        ("ResNet-50", 224, 39.0, 76.7),
        ("ResNeXt-101 WSL", 224, None, 45.7),
        ("Patch Gaussian", 299, 52.3, 60.4),
        (BASELINE, 224, 62.6, 47.5),
        (STUDENT, 224, 76.5, 30.0),
        (BASELINE, 299, 66.6, 42.5),
        (STUDENT, 299, 77.8, 28.3),
    ),
    "imagenet-p": (
        ("ResNet-50", 224, None, 58.0),
        ("Low-pass-filter pooling", 224, None, 51.2),
        ("ResNeXt-101 WSL", 224, None, 27.8),
        (BASELINE, 224, 80.4, 27.2),
        (STUDENT, 224, 85.2, 14.2),
        (BASELINE, 299, 81.6, 23.7),
        (STUDENT, 299, 86.4, 12.2),
    ),
}

_TIMM_SETS = ("imagenet-real", "imagenet-v2", "imagenet-a", "imagenet-r", "imagenet-sketch")
# (model, resolution) → top-1 of `_TIMM_SETS`, then top-5 of ImageNet-A.
_TIMM = {
    ("efficientnet-b0", 224): (85.020, 67.740, 11.093, 46.067, 28.908, 39.907),
    ("efficientnet-b1", 240): (86.688, 70.720, 18.907, 50.797, 34.184, 51.680),
    ("efficientnet-b2", 260): (87.570, 72.310, 24.213, 53.497, 36.110, 57.547),
    ("efficientnet-b3", 300): (88.469, 73.810, 35.667, 57.400, 39.500, 67.760),
    ("efficientnet-b4", 380): (89.382, 75.530, 51.040, 61.107, 43.444, 79.067),
    ("efficientnet-b5", 456): (89.662, 76.670, 59.920, 62.883, 45.615, 84.280),
    ("efficientnet-b6", 528): (89.771, 77.160, 61.853, 65.463, 47.708, 85.027),
    ("efficientnet-b7", 600): (90.159, 77.940, 67.187, 67.023, 47.724, 88.533),
    ("efficientnet-l2", 475): (90.527, 80.520, 83.373, 76.350, 51.412, 95.480),
    ("efficientnet-l2", 800): (90.569, 80.130, 84.680, 74.590, 47.401, 96.053),
}


def timm(name: str, model: str, image_size: int) -> dict[str, float]:
    """Returns timm's results for published Noisy Student weights of this size, by key, or {}."""
    found = _TIMM.get((model, image_size))
    if found is None or name not in _TIMM_SETS:
        return {}
    results = {"top1": found[_TIMM_SETS.index(name)]}
    return {**results, "top5": found[-1]} if name == "imagenet-a" else results


def paper(name: str, method: str, image_size: int) -> dict[str, float]:
    """Returns the paper's results for a method, by key; ImageNet-C and -P at this size only."""
    keys = [key for key, _ in COLUMNS.get(name, ())]
    for published, resolution, *values in PAPER.get(name, ()):
        if published == method and resolution in (None, image_size):
            return {key: value for key, value in zip(keys, values) if value is not None}
    return {}


def table(name: str, result: Mapping[str, Any], model: str, image_size: int) -> list[dict]:
    """Returns the paper's table of a set, with the measured row last; in percent or None."""
    # None of the paper's tables contains a single part of ImageNet-C: top-1 only.
    columns = COLUMNS.get(name, COLUMNS["imagenet-real"])
    keys = [key for key, _ in columns]
    rows = [(m, size, dict(zip(keys, values))) for m, size, *values in PAPER.get(name, ())]
    if known := timm(name, model, image_size):
        student = f"Noisy Student {model.rpartition('-')[2].upper()} (timm)"
        rows.append((student, image_size, known))
    measured = {
        # uT5D is a distance between ranks, not a fraction.
        key: (1 if key == "ut5d" else 100) * result[key]
        for key in keys
        if result.get(key) is not None
    }
    rows.append((f"{model}, measured", image_size, measured))
    return [
        {"method": method, "resolution": size, **{n: _rounded(of, k) for k, n in columns}}
        for method, size, of in rows
    ]


def _rounded(values: Mapping[str, float | None], key: str) -> float | None:
    value = values.get(key)
    return None if value is None else round(value, 2 if key == "ut5d" else 1)
