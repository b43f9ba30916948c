"""Prepares programs for object stores: checks access to paths and cleans up after uploads.

Without the check, a misspelled bucket or a missing permission causes a late, obscure TensorFlow error.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping

from efficientnet_ns.config.fields import ConfigError

# Flags whose folders are written by every program that has them.
_WRITTEN = frozenset(
    "output_dir info_dir prelim_stats_dir export_dir work_dir report_dir report_path".split()
)
PERMISSIONS = (
    "storage.objects.get and storage.objects.list to read, storage.objects.create and "
    "storage.objects.delete to write; the role roles/storage.objectUser includes them"
)


@contextlib.contextmanager
def prepared(paths: Mapping[str, str]) -> Iterator[None]:
    """Checks every bucket once and keeps TensorFlow's uploads in a scratch folder during the block.

    Otherwise, a killed process would leave them, e.g. a whole checkpoint, in TMPDIR. A scratch folder is
    removed by the next start.

    Args:
      paths: path → flag.

    Raises:
      ConfigError: If a bucket does not exist, or access to it is denied.
    """
    remote = {path: flag for path, flag in paths.items() if path.startswith("gs://")}
    if not remote:
        yield
        return
    from efficientnet_ns.files import atomic  # Imports TensorFlow, which the program also needs.

    _check(remote)
    before = os.environ.get("TMPDIR")
    with atomic.scratch_folder("uploads") as folder:
        # Affects only TensorFlow: Python's `tempfile` has already cached its folder.
        os.environ["TMPDIR"] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ["TMPDIR"]
            else:
                os.environ["TMPDIR"] = before


def _check(paths: Mapping[str, str]) -> None:
    from efficientnet_ns.files import object_stores

    seen: set[tuple[str, bool]] = set()
    for path, flag in paths.items():
        bucket, written = path.split("/")[2], flag in _WRITTEN
        if (bucket, written) in seen:
            continue
        seen.add((bucket, written))
        try:
            object_stores.probe(path, write=written)
        except object_stores.NoBucket as e:
            raise ConfigError(
                f"--{flag}={path}: there is no bucket gs://{bucket}. Check its name, or create it"
            ) from e
        except object_stores.NotAllowed as e:
            raise ConfigError(
                f"--{flag}={path}: this account may not {e} there. On gs://{bucket} it needs {PERMISSIONS}"
            ) from e
