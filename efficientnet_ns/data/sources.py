"""Where images come from before they are records: folders and archives, read where they are.

A source lists its entries, sorted by name, and reads any of them in any process. Nothing is
unpacked to disk, so names in an archive such as `../x` can do no harm.
"""

from __future__ import annotations

import contextlib
import lzma
import os
import posixpath
import tarfile
import unicodedata
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import tensorflow as tf
from absl import logging

from efficientnet_ns.data import records
from efficientnet_ns.data.encoded import Unusable

EXTENSIONS = frozenset(
    "avif bmp dib gif heic heif j2k jfif jp2 jpe jpeg jpg pbm pgm png pnm ppm tga tif tiff webp".split()
)
_SET_NAMES = frozenset({"train", "training", "val", "valid", "validation", "test", "dev", "extra"})


class Entry(NamedTuple):
    """One image of a source.

    Attributes:
      name: path within the source.
      label: class, from 0; -1 for none, or when the source learns it only when it reads.
      size: bytes as stored; 0 when unknown.
      place: what the source finds it by.
    """

    name: str
    label: int = -1
    size: int = 0
    place: object = None


class Loaded(NamedTuple):
    """What was read for an entry: encoded image bytes and its class, -1 for none."""

    image: bytes
    label: int


Reader = Callable[[Entry], Loaded]


class Folder:
    """A tree of image files."""

    def __init__(self, path: str):
        self.path = path

    def entries(self) -> tuple[list[Entry], list[str]]:
        """(all files, paths of all folders); both relative to the source."""
        if not tf.io.gfile.isdir(self.path):
            raise records.DataError(f"{self.path!r} is neither a folder nor an archive")
        found, folders = [], []
        for folder, file_names in _walk(self.path):
            inside = os.path.relpath(folder, self.path).replace(os.sep, "/")
            folders.append("" if inside == "." else inside)
            for name in file_names:
                size = 0 if "://" in folder else os.stat(os.path.join(folder, name)).st_size
                found.append(Entry(posixpath.join(folders[-1], name), size=size))
        return found, folders

    @contextlib.contextmanager
    def reader(self, entries: Sequence[Entry]) -> Iterator[Reader]:
        def read(entry: Entry) -> Loaded:
            with tf.io.gfile.GFile(os.path.join(self.path, entry.name), "rb") as f:
                return Loaded(f.read(), entry.label)

        yield read


def _walk(path: str) -> Iterator[tuple[str, list[str]]]:
    """(folder, names of files) of a tree; links are followed, circles are not."""
    if "://" in path:
        for folder, _, names in tf.io.gfile.walk(path):
            yield folder, names
        return
    seen = set()
    for folder, below, names in os.walk(path, followlinks=True):
        identity = os.stat(folder).st_dev, os.stat(folder).st_ino
        if identity in seen:
            below.clear()
            continue
        seen.add(identity)
        below.sort()  # Which of two names of one folder is the first must not vary.
        yield folder, [name for name in names if os.path.isfile(os.path.join(folder, name))]


class Zip:
    """A .zip archive; entries are read at their places."""

    def __init__(self, path: str):
        self.path = path

    def entries(self) -> tuple[list[Entry], list[str]]:
        with self._open() as archive:
            infos = archive.infolist()
        files = [
            Entry(info.filename, size=info.file_size, place=i)
            for i, info in enumerate(infos)
            if not info.is_dir()
        ]
        return files, [info.filename for info in infos if info.is_dir()]

    @contextlib.contextmanager
    def _open(self) -> Iterator[zipfile.ZipFile]:
        with tf.io.gfile.GFile(self.path, "rb") as f:
            try:
                archive = zipfile.ZipFile(f)
            except zipfile.BadZipFile as e:
                raise records.DataError(f"{self.path}: {e}: is the file whole?") from e
            with archive:
                yield archive

    @contextlib.contextmanager
    def reader(self, entries: Sequence[Entry]) -> Iterator[Reader]:
        with self._open() as archive:
            infos = archive.infolist()

            def read(entry: Entry) -> Loaded:
                try:
                    return Loaded(archive.read(infos[entry.place]), entry.label)
                # zlib's own error, NotImplementedError for other methods, RuntimeError if encrypted.
                except Exception as e:
                    raise Unusable(f"cannot be unpacked: {e}") from e

            yield read


class Tar:
    """An uncompressed .tar archive, also one of .tar archives (as ImageNet's training images are).

    An archive inside the archive counts as a folder of its name.
    """

    def __init__(self, path: str):
        self.path = path

    def entries(self) -> tuple[list[Entry], list[str]]:
        files, folders = [], []
        with tf.io.gfile.GFile(self.path, "rb") as f:
            for member, folder, start in _members(f, self.path):
                name = posixpath.join(folder, member.name)
                if member.isdir():
                    folders.append(name)
                elif member.isreg():
                    files.append(Entry(name, size=member.size, place=start + member.offset_data))
        return files, folders

    @contextlib.contextmanager
    def reader(self, entries: Sequence[Entry]) -> Iterator[Reader]:
        with tf.io.gfile.GFile(self.path, "rb") as f:

            def read(entry: Entry) -> Loaded:
                f.seek(entry.place)
                return Loaded(f.read(entry.size), entry.label)

            yield read


class _Window:
    """The part of a file that begins at `start`, as a file for `tarfile` to look through."""

    def __init__(self, file, start: int):
        self._file, self._start = file, start
        self.seek(0)

    def seek(self, offset: int) -> int:
        try:
            self._file.seek(self._start + offset)
        except tf.errors.OutOfRangeError as e:
            raise tarfile.ReadError("unexpected end of data") from e
        return offset

    def tell(self) -> int:
        return self._file.tell() - self._start

    def read(self, size: int) -> bytes:
        return self._file.read(size)


def _members(f, path: str, folder: str = "", start: int = 0) -> Iterator[tuple]:
    """(member, folder, byte at which the archive that has it begins), of inner archives too."""
    try:
        with tarfile.open(fileobj=_Window(f, start), mode="r:") as archive:
            for member in _each(archive):
                stem, extension = posixpath.splitext(member.name)
                if member.isreg() and extension.lower() == ".tar":
                    inner = posixpath.join(folder, stem)
                    yield from _members(f, path, inner, start + member.offset_data)
                else:
                    yield member, folder, start
    except tarfile.TarError as e:
        raise records.DataError(f"{path}: {e}: is the file whole?") from e


def _each(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (member := archive.next()) is not None:
        archive.members.clear()  # It would keep them all.
        yield member


class TarStream:
    """A compressed .tar archive. It can only be read from its start, once for every batch of
    shards; a .zip or an uncompressed .tar of the same images is faster."""

    # Bytes of images that one process holds from one pass over the archive.
    batch_bytes = 512 << 20

    def __init__(self, path: str):
        self.path = path

    def entries(self) -> tuple[list[Entry], list[str]]:
        files, folders = [], []
        for i, member, _ in self._members():
            if member.isdir():
                folders.append(member.name)
            elif member.isreg():
                files.append(Entry(member.name, size=member.size, place=i))
        return files, folders

    def _members(self) -> Iterator[tuple]:
        with tf.io.gfile.GFile(self.path, "rb") as f:
            try:
                with tarfile.open(fileobj=f, mode="r|*") as archive:
                    for i, member in enumerate(_each(archive)):
                        yield i, member, archive
            except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as e:
                raise records.DataError(f"{self.path}: {e}: is the file whole?") from e

    @contextlib.contextmanager
    def reader(self, entries: Sequence[Entry]) -> Iterator[Reader]:
        wanted = {entry.place for entry in entries}
        held = {}
        for i, member, archive in self._members():
            if i in wanted:
                held[i] = archive.extractfile(member).read()
                if len(held) == len(wanted):
                    break
        yield lambda entry: Loaded(held[entry.place], entry.label)


ARCHIVES = {
    ".zip": Zip,
    ".tar": Tar,
    ".tar.gz": TarStream,
    ".tgz": TarStream,
    ".tar.bz2": TarStream,
    ".tar.xz": TarStream,
}


def open_source(path: str) -> Folder | Zip | Tar | TarStream:
    """The source for a folder or archive that exists, by its name."""
    for extension, archive in ARCHIVES.items():
        if path.lower().endswith(extension) and not tf.io.gfile.isdir(path):
            return archive(path)
    return Folder(path)


# --- Images and classes among the files -----------------------------------------------------------


class Listing(NamedTuple):
    """Images of a source, sorted by name, and the names of their classes, None without labels."""

    entries: list[Entry]
    class_names: tuple[str, ...] | None


def list_images(
    source,
    labeled: bool,
    class_names: Sequence[str] | None = None,
    subfolder: str = "",
) -> Listing:
    """The images of a folder or archive; with `labeled`, their classes are the topmost folders.

    Files of other kinds and hidden ones are left out. One folder around everything in an archive is
    not a class. Folders without images are classes too, so that numbers stay when images are added.

    Args:
      class_names: the classes an earlier set has, in order; None: those found, sorted by name.
      subfolder: only what is in this folder of the source.

    Raises:
      records.DataError: no images, or folders that cannot be the classes.
    """
    files, folders = source.entries()
    pairs = [(tidy, e) for e in files if (tidy := _inside(e.name, subfolder)) is not None]
    images = sorted((pair for pair in pairs if _is_image(pair[0])), key=lambda pair: pair[0])
    _report_ignored(source.path, [tidy for tidy, _ in pairs if not _is_image(tidy)])
    where = posixpath.join(source.path, subfolder)
    if not images:
        raise records.DataError(
            f"no images in {where!r}: looked for {', '.join(sorted(EXTENSIONS))}"
        )
    if not labeled:
        return Listing([entry for _, entry in images], None)
    folders = [tidy for f in folders if (tidy := _inside(f, subfolder)) and not _is_hidden(tidy)]
    depth = _wrapper_depth(source, [tidy for tidy, _ in images])
    found = sorted(
        {_class_of(f + "/", depth) for f in folders} | {_class_of(t, depth) for t, _ in images}
    )
    found = [name for name in found if name]
    names = _agreed_names(where, found, class_names)
    numbers = {name: i for i, name in enumerate(names)}
    entries, loose = [], []
    for tidy, entry in images:
        name = _class_of(tidy, depth)
        if name:
            entries.append(entry._replace(label=numbers[name]))
        else:
            loose.append(tidy)
    _report_ignored(source.path, loose, "in no class folder")
    _report_classes(where, names, entries)
    return Listing(entries, names)


def _inside(name: str, subfolder: str) -> str | None:
    """`name` without odd parts (`/x`, `./x`, `a/../x`), relative to `subfolder`; None outside it."""
    tidy = posixpath.normpath("/" + name.replace("\\", "/")).lstrip("/")
    tidy = unicodedata.normalize("NFC", tidy)
    prefix = unicodedata.normalize("NFC", subfolder.strip("/"))
    if not prefix:
        return tidy
    return tidy[len(prefix) + 1 :] if tidy.startswith(prefix + "/") else None


def _is_hidden(tidy: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in tidy.split("/"))


def _is_image(tidy: str) -> bool:
    return tidy.rpartition(".")[2].lower() in EXTENSIONS and not _is_hidden(tidy)


def _wrapper_depth(source, names: list[str]) -> int:
    """1 when an archive has all its images deep in one folder, which then is not a class."""
    if isinstance(source, Folder):
        return 0
    tops = {name.split("/")[0] for name in names}
    return int(len(tops) == 1 and all(name.count("/") >= 2 for name in names))


def _class_of(tidy: str, depth: int) -> str:
    parts = tidy.split("/")
    return parts[depth] if len(parts) > depth + 1 else ""


def _agreed_names(where: str, found: list[str], known: Sequence[str] | None) -> tuple[str, ...]:
    if not found:
        raise records.DataError(
            f"the images in {where!r} are in no folders that could be their classes; "
            "--nolabeled writes them as unlabeled"
        )
    if all(name.lower() in _SET_NAMES for name in found):
        raise records.DataError(
            f"the folders in {where!r} are sets, not classes: {', '.join(found)}. Give one of them: "
            f"--subfolder={found[0]} --image_set={found[0]}"
        )
    if known is None:
        return tuple(found)
    new = [name for name in found if name not in known]
    if new:
        raise records.DataError(
            f"class {new[0]!r} in {where!r} is none of the {len(known)} classes that the other sets "
            "in the output folder have"
        )
    return tuple(known)


def _report_ignored(path: str, names: list[str], why: str = "not images by their names") -> None:
    if names:
        logging.warning("%s: %d files are %s: %s …", path, len(names), why, min(names))


def _report_classes(where: str, names: Sequence[str], entries: Sequence[Entry]) -> None:
    seen = Counter(entry.label for entry in entries)
    empty = [name for i, name in enumerate(names) if i not in seen]
    if empty:
        logging.warning("%s: %d classes have no images: %s …", where, len(empty), empty[0])
    by_case = Counter(name.lower() for name in names)
    alike = [name for name in names if by_case[name.lower()] > 1]
    if alike:
        logging.warning("%s: classes that differ only in case: %s", where, ", ".join(alike))
