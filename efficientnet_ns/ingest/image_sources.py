"""Sources of images for records: folders and archives that are read in place.

A source lists its contents and reads any of its files in any process. Archives are never unpacked
to disk, so names such as `../x` are harmless.
"""

from __future__ import annotations

import bz2
import concurrent.futures
import contextlib
import errno
import gzip
import itertools
import lzma
import os
import posixpath
import shutil
import stat
import tarfile
import unicodedata
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import IO, Any, NamedTuple, Protocol, cast

import tensorflow as tf
from absl import logging

from efficientnet_ns.data.image_conversion import Unusable
from efficientnet_ns.files import atomic, local_files, object_stores, shard_names
from efficientnet_ns.files.errors import DataError

EXTENSIONS = frozenset(
    "avif bmp dib gif heic heif j2k jfif jp2 jpe jpeg jpg pbm pgm png pnm ppm tga tif tiff webp".split()
)
# Folders of operating systems, desktops and network disks; names with leading dots are also hidden.
_SYSTEM_FOLDERS = {
    *"@eadir @recently-snapshot @recycle @tmp #recycle #snapshot $recycle.bin __macosx".split(),
    *"__pycache__ found.000 lost+found recycler".split(),
    *("network trash folder", "system volume information", "temporary items"),
}
# Kinds of ignored entries.
HIDDEN = "hidden or system"
AGAIN = "folders read by another name"
RECORDS = "folders of records"


class Entry(NamedTuple):
    """One file of a source.

    Attributes:
      name: path within the source.
      label: class, from 0; -1 if there is none or it is known only after reading.
      size: stored size in bytes; 0 if unknown.
      place: source-specific location.
      version: detects a replacement of the same size: modification time or checksum; 0 if unknown.
    """

    name: str
    label: int = -1
    size: int = 0
    place: Any = None
    version: int = 0


class LeftOut(NamedTuple):
    """An entry of a source that does not become a record; names of folders end with `/`."""

    name: str
    reason: str


class Contents(NamedTuple):
    """The contents of a source.

    Attributes:
      entries: the files.
      folders: names of all folders, including empty ones.
      lost: unreadable entries: broken links, folders that cannot be listed, pipes …
      ignored: skipped entries, with their kinds as reasons.
    """

    entries: list[Entry]
    folders: list[str]
    lost: list[LeftOut]
    ignored: list[LeftOut]


class Loaded(NamedTuple):
    """Encoded image bytes of an entry and its class, -1 if there is none."""

    image: bytes
    label: int


Reader = Callable[[Entry], Loaded]


class Source(Protocol):
    """Images for records; pickled for the processes that write the records.

    Attributes:
      path: path of the folder or archive, for messages.
    """

    path: str

    def reader(self, entries: Sequence[Entry]) -> contextlib.AbstractContextManager[Reader]:
        """Yields a function that reads each of `entries`; files stay open until the block ends."""
        ...


class ListedSource(Source, Protocol):
    """A folder or an archive."""

    def entries(self) -> Contents:
        """Returns the contents in no particular order."""
        ...


# --- Names ----------------------------------------------------------------------------------------


def readable(name: str) -> str:
    r"""Returns `name` as valid Unicode; bytes that are not UTF-8 become `\\xe9`."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def tidy(name: str) -> str:
    """Normalizes `name`: resolves `/x`, `./x` and `a/../x`; printable and in one Unicode form."""
    plain = posixpath.normpath("/" + name.replace("\\", "/")).lstrip("/")
    return unicodedata.normalize("NFC", readable(plain))


def is_image(name: str) -> bool:
    """Checks whether a name has the extension of an image."""
    return name.rpartition(".")[2].lower() in EXTENSIONS


def is_hidden(name: str) -> bool:
    """Checks whether a path contains a hidden name or a folder reserved by a system."""
    return any(part[:1] == "." or part.lower() in _SYSTEM_FOLDERS for part in name.split("/"))


def _maybe_folder(name: str) -> str:
    """Returns the name of a broken link as that of a folder unless it is an image name."""
    return name if is_image(name) else f"{name}/"


# --- Folders --------------------------------------------------------------------------------------


class Folder:
    """A tree of image files. Follows links, but reads no folder twice.

    Args:
      path: path of the folder.
      subfolder: root of the tree; names are nevertheless relative to `path`.
      output: a folder to skip if it is in the tree.
    """

    def __init__(self, path: str, subfolder: str = "", output: str = ""):
        self.path, self._output = path, output
        # Normalized from the root, so that `..` does not lead out of the folder.
        self._start = posixpath.normpath(f"/{subfolder}").lstrip("/")

    def entries(self) -> Contents:
        if not tf.io.gfile.isdir(self.path):
            raise DataError(
                f"{self.path!r} is neither a folder nor an archive that can be read: "
                f"{', '.join(ARCHIVES)}"
            )
        start = self._start
        if not tf.io.gfile.isdir(os.path.join(self.path, start)):
            start = ""  # The name on disk may have another Unicode form.
        walk = _walk_remote if "://" in self.path else _walk
        return walk(self.path, start, self._output)

    @contextlib.contextmanager
    def reader(self, entries: Sequence[Entry]) -> Iterator[Reader]:
        # TensorFlow rejects names that are not UTF-8, so local files are read without it.
        if "://" in self.path:
            with _reading_ahead(self.path, entries) as remote:
                yield remote
            return

        def read(entry: Entry) -> Loaded:
            try:
                with open(os.path.join(self.path, entry.name), "rb") as f:
                    return Loaded(f.read(), entry.label)
            except OSError as e:
                if e.errno not in _OF_THE_FILE:
                    raise
                raise Unusable(f"cannot be read: {e.strerror}") from e

        yield read


_AHEAD = 64  # Images requested before they are needed.


@contextlib.contextmanager
def _reading_ahead(path: str, entries: Sequence[Entry]) -> Iterator[Reader]:
    """Yields a reader that requests entries ahead because requests are slow; for ordered reads."""
    waiting: deque[tuple[Entry, concurrent.futures.Future]] = deque()
    left = iter(entries)

    def load(entry: Entry) -> bytes | None:
        return object_stores.read(os.path.join(path, entry.name))

    with concurrent.futures.ThreadPoolExecutor(_AHEAD // 2) as pool:

        def read(entry: Entry) -> Loaded:
            for following in itertools.islice(left, _AHEAD - len(waiting)):
                waiting.append((following, pool.submit(load, following)))
            expected = waiting and waiting[0][0] == entry
            content = waiting.popleft()[1].result() if expected else load(entry)
            if content is None:
                raise Unusable("cannot be read: it no longer exists")
            return Loaded(content, entry.label)

        yield read


# Errors that affect one file; others (too many open files, an unreachable server) abort the work.
_OF_THE_FILE = {
    *(errno.EACCES, errno.EIO, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG),
    *(errno.ENOENT, errno.ENOTDIR, errno.ENXIO, errno.EPERM),
}


def _walk(path: str, start: str, output: str) -> Contents:
    """Walks real folders before links, so that a folder is always read by the same name."""
    contents = Contents([], [], [], [])
    # The output may be inside the tree, and its records are not images. If it is the top itself,
    # the tree is still walked.
    ours = {_identity(output), _identity(os.path.join(output, "manifests"))} if output else set()
    ours -= {None, _identity(os.path.join(path, start))}
    seen, folders = set(ours), [start]
    links: deque[str] = deque()
    while folders or links:
        folder = folders.pop() if folders else links.popleft()
        identity = _identity(os.path.join(path, folder))
        if identity in seen:
            contents.ignored.append(LeftOut(f"{folder}/", RECORDS if identity in ours else AGAIN))
            continue
        seen |= {identity} - {None}
        try:
            with os.scandir(os.path.join(path, folder)) as found:
                below = sorted(found, key=lambda item: item.name)
        except OSError as e:
            contents.folders.append(folder)
            reason = f"the folder cannot be listed: {e.strerror}"
            contents.lost.append(LeftOut(f"{folder}/", reason))
            continue
        if folder != start and _holds_records(item.name for item in below):
            contents.ignored.append(LeftOut(f"{folder}/", RECORDS))
            continue
        contents.folders.append(folder)
        for item in below:
            name = posixpath.join(folder, item.name)
            if _sort_in(item, name, contents):
                (links if item.is_symlink() else folders).append(name)
    return contents


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _holds_records(names: Iterable[str]) -> bool:
    """Checks whether a folder contains record files and therefore is not a class."""
    names = list(names)
    shards = (shard_names.parse(name.removesuffix(".json")) for name in names)
    return any(shards) and not any(map(is_image, names))


def _sort_in(item: os.DirEntry, name: str, contents: Contents) -> bool:
    """Adds an item of a folder to the contents; returns whether it is a folder to walk."""
    try:
        # For a link, this is the status of its target; it fails for a broken link.
        status = item.stat()
    except OSError as e:
        lost = LeftOut(_maybe_folder(name), f"cannot be read: {e.strerror}")
        if item.is_symlink():
            target = readable(os.readlink(item.path))
            lost = lost._replace(reason=f"a link to {target}: {e.strerror}")
        contents.lost.append(lost)
        return False
    if stat.S_ISDIR(status.st_mode):
        if not is_hidden(item.name):
            return True
        contents.ignored.append(LeftOut(f"{name}/", HIDDEN))
    elif stat.S_ISREG(status.st_mode):
        contents.entries.append(Entry(name, size=status.st_size, version=status.st_mtime_ns))
    else:
        contents.lost.append(LeftOut(name, "not a file but a pipe, socket or device"))
    return False


def _walk_remote(path: str, start: str, output: str) -> Contents:
    contents = Contents([], [], [], [])
    top = os.path.join(path, start)
    ours = {os.path.join(output, "manifests"), output} - {top.rstrip("/")} if output else set()
    lost: list[str] = []
    for folder, below, names in _walked(top, lost):
        inside = os.path.relpath(folder, path).replace(os.sep, "/")
        inside = "" if inside == "." else inside
        if folder.rstrip("/") in ours:
            # Also excludes the folders below from the walk.
            below.clear()
            contents.ignored.append(LeftOut(f"{inside}/", RECORDS))
            continue
        contents.folders.append(inside)
        # Without sizes, because each would require a request.
        contents.entries.extend(Entry(posixpath.join(inside, name)) for name in names)
    contents.lost.extend(LeftOut("/", f"a folder cannot be listed: {reason}") for reason in lost)
    return contents


def _walked(top: str, lost: list[str]) -> Iterator[tuple[str, list[str], list[str]]]:
    """Walks the tree below a folder; adds reasons why folders cannot be listed to `lost`."""
    if object_stores.is_object_store(top):
        return object_stores.walk(top)
    return tf.io.gfile.walk(top, onerror=lambda e: lost.append(str(e)))


# --- Archives ---------------------------------------------------------------------------------------


class Zip:
    """A .zip archive; entries are read in place, and links within it are followed.

    Args:
      path: of the archive, for messages.
      local: the file to read if it is not `path`.
    """

    def __init__(self, path: str, local: str = ""):
        self.path, self._local = path, local or path

    def entries(self) -> Contents:
        contents = Contents([], [], [], [])
        links: dict[str, str | None] = {}
        with self._open() as archive:
            # By index, because several entries may have the same name.
            for i, info in enumerate(archive.infolist()):
                # The upper half contains the Unix mode, which marks links.
                mode = info.external_attr >> 16
                if info.is_dir():
                    contents.folders.append(info.filename)
                elif stat.S_ISLNK(mode):
                    links[info.filename] = _zip_target(archive, info)
                else:
                    entry = Entry(info.filename, size=info.file_size, place=i, version=info.CRC)
                    contents.entries.append(entry)
        _follow(contents, links)
        return contents

    @contextlib.contextmanager
    def _open(self) -> Iterator[zipfile.ZipFile]:
        with tf.io.gfile.GFile(self._local, "rb") as f:
            try:
                archive = zipfile.ZipFile(f)
            except (zipfile.BadZipFile, tf.errors.InvalidArgumentError) as e:
                # The latter is raised if zipfile seeks before the start of a short file.
                raise DataError(f"{self.path}: not a zip file, or truncated ({e})") from e
            except (UnicodeDecodeError, NotImplementedError) as e:
                raise DataError(
                    f"{self.path}: cannot read its list of names ({e}): pack the images again"
                ) from e
            with archive:
                yield archive

    @contextlib.contextmanager
    def reader(self, entries: Sequence[Entry]) -> Iterator[Reader]:
        with self._open() as archive:
            infos = archive.infolist()

            def read(entry: Entry) -> Loaded:
                try:
                    return Loaded(archive.read(infos[entry.place]), entry.label)
                # zlib.error, NotImplementedError for other methods, RuntimeError if encrypted.
                except Exception as e:
                    raise Unusable(f"cannot be unpacked: {e}") from e

            yield read


def _zip_target(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> str | None:
    """Returns the target of a link; None if it is outside the archive or unreadable."""
    try:
        return _from_link(info.filename, archive.read(info).decode("utf-8", "surrogateescape"))
    except Exception as e:  # As for images.
        logging.warning("cannot unpack the link %s: %s", readable(info.filename), e)
        return None


class Tar:
    """A .tar archive, which may contain .tar archives (as for ImageNet's training images).

    An inner archive is treated as a folder of its name. Links within it are followed.

    Args:
      path: of the archive, for messages.
      plain: the decompressed file to read if it is not `path`.
    """

    def __init__(self, path: str, plain: str = ""):
        self.path, self._plain = path, plain or path

    def entries(self) -> Contents:
        contents = Contents([], [], [], [])
        links: dict[str, str | None] = {}
        with tf.io.gfile.GFile(self._plain, "rb") as f:
            for folder, member, start in _members(_Window(f, 0), self.path):
                _sort_member_in(folder, member, start + member.offset_data, contents, links)
        _follow(contents, links)
        return contents

    @contextlib.contextmanager
    def reader(self, entries: Sequence[Entry]) -> Iterator[Reader]:
        with tf.io.gfile.GFile(self._plain, "rb") as f:

            def read(entry: Entry) -> Loaded:
                f.seek(entry.place)
                return Loaded(f.read(entry.size), entry.label)

            yield read


class _Window:
    """Part of a file, starting at byte `start`, as a file object for `tarfile`."""

    def __init__(self, file, start: int, size: int | None = None):
        self.file, self.start, self._size = file, start, size
        self.seek(0)

    def seek(self, offset: int) -> int:
        try:
            self.file.seek(self.start + offset)
        # TensorFlow does not seek beyond the end of a file, for which tarfile expects a ReadError.
        except tf.errors.OutOfRangeError as e:
            raise tarfile.ReadError("unexpected end of data") from e
        return offset

    def tell(self) -> int:
        return self.file.tell() - self.start

    def read(self, size: int) -> bytes:
        if self._size is not None:
            size = max(0, min(size, self._size - self.tell()))
        return self.file.read(size)


def _members(
    window: _Window, path: str, folder: str = ""
) -> Iterator[tuple[str, tarfile.TarInfo, int]]:
    """Yields (folder, member, first byte of its archive), including members of inner archives.

    Raises:
      DataError: If an archive is damaged.
    """
    for member in _each(window, path):
        name = _in_folder(folder, member)
        stem, extension = posixpath.splitext(name)
        if member.isreg() and extension.lower() == ".tar":
            inner = _Window(window.file, window.start + member.offset_data, member.size)
            yield from _members(inner, f"{path}, {readable(name)} in it", stem)
        else:
            yield folder, member, window.start


def _in_folder(folder: str, member: tarfile.TarInfo) -> str:
    return posixpath.join(folder, member.name.lstrip("/")) if folder else member.name


class _Archive(tarfile.TarFile):
    members: list[tarfile.TarInfo]  # Those read so far.


def _each(window: _Window, path: str) -> Iterator[tarfile.TarInfo]:
    """Yields the members of an archive and of archives appended to it.

    `tarfile` treats a damaged header as the end of an archive and stops after the first of several
    archives.
    """
    start: int | None = 0
    try:
        while start is not None:
            window.seek(start)
            with _Archive.open(fileobj=cast(IO[bytes], window), mode="r:") as archive:
                while (member := archive.next()) is not None:
                    archive.members.clear()  # Otherwise it keeps all of them.
                    yield member
                if start and archive.offset == start:
                    return  # The data after the end is not an archive.
                start = _behind_the_end(window, archive.offset, path)
    except (tarfile.TarError, EOFError, OSError) as e:
        raise DataError(f"{path}: {e}: the file may be truncated") from e


def _behind_the_end(window: _Window, end: int, path: str) -> int | None:
    """Returns the position of data after the zeros at the `end` of an archive; None if none."""
    window.seek(end)
    block = window.read(tarfile.BLOCKSIZE)
    if not block:
        logging.warning("%s has no end marker: the file may be truncated", path)
    elif block.strip(b"\0"):
        damage = "truncated header" if len(block) < tarfile.BLOCKSIZE else "bad checksum"
        raise tarfile.ReadError(f"{damage} at byte {end}")
    while block and not block.strip(b"\0"):
        block = window.read(tarfile.BLOCKSIZE)
    return window.tell() - len(block) if block else None


def _sort_member_in(
    folder: str,
    member: tarfile.TarInfo,
    place: int,
    contents: Contents,
    links: dict[str, str | None],
) -> None:
    """Adds a member with its content at `place` to the contents or the links (name → target)."""
    name = _in_folder(folder, member)
    if member.isdir():
        contents.folders.append(name)
    # The archive contains the file without its holes.
    elif member.issparse():
        contents.lost.append(LeftOut(name, "stored as a sparse file"))
    elif member.isreg():
        changed = int(member.mtime)
        contents.entries.append(Entry(name, size=member.size, place=place, version=changed))
    elif member.issym():
        links[name] = _from_link(name, member.linkname)
    elif member.islnk():  # A path from the root of the archive.
        links[name] = tidy(posixpath.join(folder, member.linkname.lstrip("/")))
    else:
        contents.lost.append(LeftOut(name, "not a file but a pipe, device or similar"))


def _from_link(name: str, target: str) -> str | None:
    """Returns the tidy target path of a symbolic link; None if it is outside the archive."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(name.lstrip("/")), target))
    return None if path.startswith(("/", "..")) else tidy(path)


def _follow(contents: Contents, links: Mapping[str, str | None]) -> None:
    """Adds the links of an archive (name → tidy target path) to its contents."""
    files, folders = {}, {""}
    # Only links require the tables.
    for entry in contents.entries if links else ():
        name = tidy(entry.name)
        files[name] = entry
        # Archives may lack entries for folders.
        while (name := posixpath.dirname(name)) not in folders:
            folders.add(name)
    folders.update(map(tidy, contents.folders))
    targets = {tidy(name): target for name, target in links.items()}
    for name, target in links.items():
        found = _resolved(target, targets)
        if found in files:
            contents.entries.append(files[found]._replace(name=name))
        elif found in folders:
            contents.ignored.append(LeftOut(f"{name}/", AGAIN))
        else:
            where = f"to {target}, which does not exist" if target else "out of the archive"
            contents.lost.append(LeftOut(_maybe_folder(name), f"a link {where}"))


def _resolved(path: str | None, targets: Mapping[str, str | None]) -> str | None:
    """Returns the path with all links followed; None for a cycle or outside the archive."""
    for _ in range(40):  # The limit of Linux.
        if path is None:
            return None
        parts = path.split("/")
        heads = ("/".join(parts[:n]) for n in range(1, len(parts) + 1))
        link = next((head for head in heads if head in targets), None)
        if link is None:
            return path
        target = targets[link]
        path = None if target is None else tidy(target + path[len(link) :])
    return None


# --- Kinds of sources -------------------------------------------------------------------------------

ARCHIVES: dict[str, type[Zip | Tar]] = {
    ".zip": Zip,
    **dict.fromkeys((".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz"), Tar),
}
# Unlike those of tarfile, these also read files compressed in several parts.
_UNPACK: dict[bytes, Callable] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
}
_TAR_MAGIC, _TAR_MAGIC_AT = b"ustar", 257


@contextlib.contextmanager
def open_source(path: str, subfolder: str = "", output: str = "") -> Iterator[ListedSource]:
    """Yields the source for an existing folder or archive; see `Folder` for the other arguments.

    The kind of an archive is determined from its content, else from its name. A compressed .tar is
    decompressed to a file in TMPDIR for the duration of the block, because it does not allow random
    access. An archive on an object store is copied there, because a store sends megabytes for every
    image and every header.
    """
    # Reads neither folders nor pipes.
    is_file = os.path.isfile(path) or not (os.path.exists(path) or tf.io.gfile.isdir(path))
    start = b""
    if is_file:
        with tf.io.gfile.GFile(path, "rb") as f:
            start = f.read(_TAR_MAGIC_AT + len(_TAR_MAGIC))
    unpack = [opener for magic, opener in _UNPACK.items() if start.startswith(magic)]
    named = [kind for end, kind in ARCHIVES.items() if path.lower().endswith(end)]
    # The second is the start of an archive without entries.
    if start.startswith((b"PK\3\4", b"PK\5\6")):
        with local_files.local_copies([path]) as local:
            yield Zip(path, local[path])
    elif unpack:
        with atomic.scratch_folder("tar") as folder:
            plain = os.path.join(folder, "plain.tar")
            _decompress(path, unpack[0], plain)
            yield Tar(path, plain)
    # Pre-POSIX tar files have no magic number, so the name decides.
    elif start.endswith(_TAR_MAGIC) or (named and not tf.io.gfile.isdir(path)):
        kind = Tar if start.endswith(_TAR_MAGIC) else named[0]
        with local_files.local_copies([path]) as local:
            yield kind(path, local[path])
    else:
        yield Folder(path, subfolder, output)


def _decompress(path: str, unpack: Callable, target: str) -> None:
    logging.info("decompressing %s to %s", path, target)
    try:
        with tf.io.gfile.GFile(path, "rb") as f, unpack(f) as plain, open(target, "wb") as out:
            shutil.copyfileobj(plain, out, 1 << 20)
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as e:
        if getattr(e, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(
                f"cannot decompress {path} to {target}: the disk is full. Set TMPDIR to a folder with more "
                "space, or decompress the file yourself"
            ) from e
        raise DataError(f"{path}: {e}: the file may be truncated") from e
