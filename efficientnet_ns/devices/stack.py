"""Prepares the import of TensorFlow: which Keras it uses, its log, how it reads object stores."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_LEGACY = "TF_USE_LEGACY_KERAS"
_NATIVE_LOG = re.compile(
    # TensorFlow's infos, warnings and errors, and the line that precedes them.
    rb"WARNING: All log messages before absl::InitializeLog|[IWE]\d{4} \d\d:\d\d:"
    # The interpreter of TensorFlow Lite.
    rb"|INFO: (Created TensorFlow Lite|Initialized TensorFlow Lite)"
    # The quantizer.
    rb"|fully_quantize: \d"
    # The converter's table in TensorFlow 2.15: "- arith.constant:   35 occurrences  (f32: 34, i32: 1)".
    rb"|Summary on the non-converted ops|-{20,}$| \* (Accepted dialects|Non-Converted Ops|\d+ )"
    rb"|(- [\w.]+: +\d+ occurrences +|  )\(\w+: \d+.*\)$|$"
)
# TensorFlow reads these on import. File sizes are not cached, because other machines rewrite leases
# and notes. Readers request and buffer 8 MB at a time instead of 64, most of which small files and
# seeks would waste.
_OBJECT_STORES = {"GCS_STAT_CACHE_MAX_AGE": "0", "GCS_READ_CACHE_BLOCK_SIZE_MB": "8"}
# The file descriptor belongs to the whole process, so threads take turns.
_STDERR = threading.RLock()


def prepare() -> None:
    """Makes `tf.keras` Keras 2, and makes TensorFlow's import respect TF_CPP_MIN_LOG_LEVEL=3.

    Also sets how TensorFlow reads `gs://`, unless the environment does.

    TensorFlow 2.15 contains only Keras 2. Later releases import it from the package
    tf_keras if TF_USE_LEGACY_KERAS is set.

    Raises:
      ImportError: If Keras 3 is selected, or `tf.keras` has already been used and is Keras 3.
    """
    if importlib.util.find_spec("tf_keras") is not None:
        if os.environ.setdefault(_LEGACY, "1") not in ("1", "true", "True"):
            raise ImportError(
                f"efficientnet_ns needs Keras 2, but {_LEGACY}={os.environ[_LEGACY]} selects Keras 3:"
                " set it to 1 or unset it"
            )
        if _keras_3_is_used():
            raise ImportError(
                "efficientnet_ns needs Keras 2, but this program has already used tf.keras, which "
                f"is Keras 3: import efficientnet_ns first, or set {_LEGACY}=1"
            )
    else:
        # With it, TensorFlow 2.15 looks for tf_keras and does not load its own Keras 2.
        os.environ.pop(_LEGACY, None)
    for name, value in _OBJECT_STORES.items():
        os.environ.setdefault(name, value)
    if "tensorflow" not in sys.modules:
        sys.meta_path.insert(0, _QuietImport())


def _keras_3_is_used() -> bool:
    keras = vars(sys.modules.get("tensorflow", os)).get("keras")
    # TensorFlow decides at the first use, and even reading an attribute counts as one.
    if keras is None or vars(keras).get("_tfll_initialized") is False:
        return False
    return getattr(keras, "__version__", "2").startswith("3")  # tf_keras has no version here.


class _QuietImport(importlib.abc.MetaPathFinder):
    """Finds TensorFlow as Python does, and hides the log of its first import.

    Releases after 2.15 write some lines before they read TF_CPP_MIN_LOG_LEVEL.
    """

    def find_spec(self, name, path=None, target=None):
        if name != "tensorflow":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_quietly(module) -> None:
                # Needed for one import only.
                sys.meta_path.remove(self)
                if os.environ.get("TF_CPP_MIN_LOG_LEVEL") == "3":
                    with without_native_log():
                        load(module)
                else:
                    load(module)

            spec.loader.exec_module = load_quietly
        return spec


@contextmanager
def without_native_log() -> Iterator[None]:
    """Hides what TensorFlow's C++ code writes to file descriptor 2; other lines appear at the end."""
    with _STDERR, tempfile.TemporaryFile() as written:
        stderr = os.dup(2)
        os.dup2(written.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            # Line by line, because Python and other libraries also wrote to it.
            written.seek(0)
            for line in written:
                if not _NATIVE_LOG.match(line):
                    os.write(2, line)
