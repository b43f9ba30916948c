"""Finds images and classes among the files of a source and accounts for all other entries."""

from __future__ import annotations

import posixpath
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from absl import logging

from efficientnet_ns.files import name_lists
from efficientnet_ns.files.errors import DataError
from efficientnet_ns.ingest import image_sources
from efficientnet_ns.ingest.image_sources import Entry, LeftOut

# Words in the names of folders that contain a set, and the --image_set for it.
_SETS = {
    **dict.fromkeys(("train", "training", "trn"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "eval"), "validation"),
    **dict.fromkeys(("test", "testing", "tst"), "test"),
    **dict.fromkeys(("dev", "extra"), None),
}
# The first splits seg_train, SegTrain and train2017 into words; the second removes what may follow
# the word of a set, as in trainset and valimages.
_OWN_WORD = re.compile(r"(?<=[a-z])(?=[A-Z])|[^A-Za-z]+")
_OF_A_SET = re.compile(r"(\w+?)(?:sets?|data|images|imgs)?")


class Listing(NamedTuple):
    """The contents of a source; each entry is in exactly one of `entries`, `lost` and `ignored`.

    Attributes:
      entries: images that are readable as far as is known from the source, sorted by name.
      class_names: names of their classes; None if unlabeled.
      lost: images that are unreadable or belong to no class.
      ignored: number of other entries, by kind.
    """

    entries: Sequence[Entry]
    class_names: tuple[str, ...] | None
    lost: Sequence[LeftOut] = ()
    ignored: Counter = Counter()


class Advice(NamedTuple):
    """What messages advise if the folders of a source are not classes.

    Attributes:
      without_classes: what to do if there are no classes.
      another_folder: function of (folder in the source, its image set or None) that returns how to
        use this folder instead.
      accept_classes: what to do if the folders are the classes nevertheless; may be empty.
    """

    without_classes: str
    another_folder: Callable[[str, str | None], str]
    accept_classes: str = ""


def _subfolder(folder: str, image_set: str | None) -> str:
    return f"--subfolder={shlex.quote(folder)}" + (f" --image_set={image_set}" if image_set else "")


MAKE_RECORDS = Advice(
    without_classes="use --nolabeled for images without classes",
    another_folder=_subfolder,
    accept_classes="If they are the classes, add --accept_classes",
)


def list_images(
    source: image_sources.ListedSource,
    labeled: bool,
    class_names: Sequence[str] | None = None,
    *,
    names_from: str = "",
    subfolder: str = "",
    accept_classes: bool = False,
    advice: Advice = MAKE_RECORDS,
) -> Listing:
    """Lists the images of a folder or archive; with `labeled`, the topmost folders are classes.

    A single folder that contains everything in an archive is not a class. Folders without images
    are also classes, so that class indices do not change if images are added.

    Args:
      class_names: classes of an earlier set, in order; None for those found, sorted by name.
      names_from: the file or flag that lists `class_names`, for messages.
      subfolder: use only this folder of the source.
      accept_classes: whether to use the topmost folders as classes even if they do not look like
        classes.
      advice: what to do if they are not classes, for messages.

    Raises:
      DataError: If there are no images, or the folders cannot be or do not look like classes.
    """
    where = posixpath.join(source.path, subfolder) if subfolder else source.path
    prefix = image_sources.tidy(subfolder)
    contents = source.entries()
    found = _sorted_out(contents, prefix)
    if not found.images:
        raise DataError(_no_images(where, found))
    entries = [entry for _, entry in found.images]
    if not labeled:
        return Listing(entries, None, found.lost, found.ignored)
    names = [name for name, _ in found.images]
    relative = [_relative(prefix, folder) for folder in contents.folders]
    folders = [
        f"{folder}/" for folder in relative if folder and not image_sources.is_hidden(folder)
    ]
    depth = _wrapper_depth(source, names)
    classes = sorted({_class_of(name, depth) for name in [*folders, *names]} - {""})
    # Classes that another set already has are valid.
    if not (accept_classes or set(classes) <= set(class_names or ())):
        problem = _not_classes(names, depth, single_allowed=class_names is not None)
        if problem:
            better = [posixpath.join(prefix, folder) for folder in _better_folders(names)[:4]]
            raise DataError(f"the folders in {where!r} {problem}{_advised(advice, better)}")
    if not classes:
        raise DataError(
            f"the images in {where!r} are not in folders that could be classes: "
            f"{advice.without_classes}"
        )
    agreed = _agreed_names(where, classes, class_names, names_from)
    entries, loose = _with_labels(entries, [_class_of(name, depth) for name in names], agreed)
    _report_classes(where, agreed, entries)
    return Listing(entries, agreed, [*found.lost, *loose], found.ignored)


# --- Files ----------------------------------------------------------------------------------------


class _Found(NamedTuple):
    images: list[tuple[str, Entry]]
    lost: list[LeftOut]
    ignored: Counter


def _sorted_out(contents: image_sources.Contents, prefix: str) -> _Found:
    """Sorts the contents of a subfolder by use; image names are relative to it."""
    images, lost = [], []
    ignored: Counter[str] = Counter()
    last = {entry.name: entry for entry in contents.entries}
    for name, entry in _pairs(contents.entries, prefix):
        if entry is not last[entry.name]:
            # The last one wins, as when the archive is unpacked.
            ignored["replaced by a later one of the same name"] += 1
            logging.warning(
                "%s: using the last of several entries with this name",
                image_sources.readable(name),
            )
        elif kind := _kind(name):
            ignored[kind] += 1
        else:
            images.append((name, entry))
    for name, item in _pairs(contents.lost, prefix):
        kind = _kind(name)
        # A folder may have contained images, regardless of the extension of its name.
        if kind == image_sources.HIDDEN or kind and not item.name.endswith("/"):
            ignored[kind] += 1
        else:
            lost.append(LeftOut(image_sources.readable(item.name), item.reason))
    for name, item in _pairs(contents.ignored, prefix):
        ignored[image_sources.HIDDEN if image_sources.is_hidden(name) else item.reason] += 1
    # Tidy names may be equal, but the order must not depend on the disk.
    images.sort(key=lambda pair: (pair[0], pair[1].name))
    if lost:
        logging.warning("cannot read %d entries, for example %s: %s", len(lost), *min(lost))
    return _Found(images, sorted(lost), ignored)


def _pairs(items: Iterable, prefix: str) -> Iterable[tuple]:
    """Yields (tidy name relative to the folder `prefix`, item) for the items in it."""
    for item in items:
        if (name := _relative(prefix, item.name)) is not None:
            yield name, item


def _relative(prefix: str, name: str) -> str | None:
    """Returns the tidy `name` relative to the folder `prefix`; None if outside it."""
    name = image_sources.tidy(name)
    if not prefix or name == prefix:
        return name[len(prefix) :]
    return name[len(prefix) + 1 :] if name.startswith(f"{prefix}/") else None


def _kind(name: str) -> str | None:
    """Returns why a file is ignored; None for an image."""
    if image_sources.is_hidden(name):
        return image_sources.HIDDEN
    if image_sources.is_image(name):
        return None
    return posixpath.splitext(name)[1].lower() or "without extension"


_ARCHIVE_ENDS = {posixpath.splitext(f"name{end}")[1] for end in image_sources.ARCHIVES}


def _no_images(where: str, found: _Found) -> str:
    if not (found.lost or found.ignored):
        return f"there is nothing in {where!r}"
    message = f"no images in {where!r}: looked for {', '.join(sorted(image_sources.EXTENSIONS))}"
    if found.lost:
        name, reason = found.lost[0]
        message += f"; cannot read {len(found.lost)} entries, for example {name}: {reason}"
    message += f"; found {described(found.ignored)}" if found.ignored else ""
    if _ARCHIVE_ENDS & found.ignored.keys():
        message += (
            ". Archives in a folder are not opened: unpack them, pass one as --source, or pack .tar "
            "files into one .tar, in which each is read as a folder"
        )
    return message


def described(ignored: Counter, most: int = 8) -> str:
    """Formats numbers by kind, e.g. `3 .txt, 1 hidden …`."""
    parts = [f"{number} {kind}" for kind, number in ignored.most_common(most)]
    rest = sum(ignored.values()) - sum(number for _, number in ignored.most_common(most))
    return ", ".join(parts + ([f"{rest} others"] if rest else []))


# --- Classes --------------------------------------------------------------------------------------


def _wrapper_depth(source: image_sources.ListedSource, names: list[str]) -> int:
    """Returns 1 if all images of an archive are deep in one folder, which then is not a class."""
    if isinstance(source, image_sources.Folder):
        return 0
    tops = {name.split("/")[0] for name in names}
    return int(len(tops) == 1 and all(name.count("/") >= 2 for name in names))


def _class_of(name: str, depth: int) -> str:
    parts = name.split("/")
    return parts[depth] if len(parts) > depth + 1 else ""


def _not_classes(names: Sequence[str], depth: int, *, single_allowed: bool) -> str:
    """Returns why the folders with the images `names` do not look like classes, or "".

    Args:
      single_allowed: whether a single class is valid.
    """
    # Class → levels from it down to its nearest image; 1 if directly in it.
    heights: dict[str, int] = {}
    for name in names:
        if top := _class_of(name, depth):
            below = name.count("/") - depth
            heights[top] = min(below, heights.get(top, below))
    of_sets = sorted(top for top in heights if _set_in(top) is not None)
    deep = sorted(top for top, height in heights.items() if height > 1)
    # At least half of the names are sets; among several folders, a single `test` may be a class.
    if 2 * len(of_sets) >= len(heights) and len(of_sets) > (len(heights) > 1):
        return f"are sets, not classes: {', '.join(of_sets)}"
    if deep:
        return f"do not look like classes: all images of {deep[0]!r} are in folders below it"
    if len(heights) == 1 and not single_allowed:
        return f"form only one class, {min(heights)!r}"
    return ""


def _advised(advice: Advice, better: Sequence[str]) -> str:
    """Returns the end of a message: the `better` folders, or what to do without classes."""
    options = [advice.another_folder(folder, _image_set(folder)) for folder in better]
    text = (
        f". Pass one of them: {', or '.join(options)}" if options else f"; {advice.without_classes}"
    )
    return f"{text}. {advice.accept_classes}" if advice.accept_classes else text


def _set_in(name: str) -> str | None:
    """Returns the word in a folder's name that denotes a set, e.g. `train` in seg_train."""
    for word in _OWN_WORD.split(name):
        found = _OF_A_SET.fullmatch(word.lower() or "-")
        if found and found[1] in _SETS:
            return found[1]
    return None


def _better_folders(names: list[str]) -> list[str]:
    """Returns the folders whose subfolders contain the images, the best suggestion first.

    The training set is first, because it defines the classes, followed by those with most images.
    """
    # Folder → its subfolders with images directly in them, and their numbers of images.
    below: dict[str, Counter] = {}
    for name in names:
        folder = posixpath.dirname(name)
        below.setdefault(posixpath.dirname(folder), Counter())[folder] += 1
    below.pop("", None)
    # A folder with one subfolder would result in only one class.
    several = {folder: found for folder, found in below.items() if len(found) > 1}
    images = {folder: sum(found.values()) for folder, found in several.items()}
    return sorted(
        images, key=lambda folder: (_image_set(folder) != "train", -images[folder], folder)
    )


def _image_set(folder: str) -> str | None:
    words = (_set_in(part) for part in reversed(folder.split("/")))
    word = next(filter(None, words), None)
    return word and (_SETS[word] or word)


def _agreed_names(
    where: str, found: list[str], known: Sequence[str] | None, names_from: str
) -> tuple[str, ...]:
    if known is None:
        return tuple(found)
    new = [name for name in found if name not in known]
    if new:
        if names_from.startswith("--"):
            raise DataError(
                f"{names_from}: {new[0]!r} in {where!r} is not the WordNet id of a class of ImageNet, "
                "such as n01440764: remove the flag, or rename the folder"
            )
        if not names_from:
            raise DataError(
                f"class {new[0]!r} in {where!r} is not one of the {len(known)} known classes: "
                f"{name_lists.shortened(known)}"
            )
        raise DataError(
            f"class {new[0]!r} in {where!r} is not one of the {len(known)} classes of the sets in the "
            f"output folder ({name_lists.shortened(known)}) listed in "
            f"{names_from}: delete that file if none of these sets is left, or choose another folder"
        )
    return tuple(known)


def _with_labels(
    entries: Sequence[Entry], classes: Sequence[str], names: Sequence[str]
) -> tuple[list[Entry], list[LeftOut]]:
    """Returns the entries with labels, and those whose class is none of `names`."""
    numbers = {name: i for i, name in enumerate(names)}
    labels = [numbers.get(name) for name in classes]
    loose = [
        LeftOut(image_sources.readable(entry.name), "in no class folder")
        for entry, label in zip(entries, labels)
        if label is None
    ]
    return [e._replace(label=n) for e, n in zip(entries, labels) if n is not None], loose


def _report_classes(where: str, names: Sequence[str], entries: Sequence[Entry]) -> None:
    seen = Counter(entry.label for entry in entries)
    empty = [name for i, name in enumerate(names) if i not in seen]
    if empty:
        shown = name_lists.shortened(empty)
        logging.warning("%s: classes without images (%d): %s", where, len(empty), shown)
    by_case = Counter(name.lower() for name in names)
    alike = [name for name in names if by_case[name.lower()] > 1]
    if alike:
        logging.warning("%s: classes that differ only in case: %s", where, ", ".join(alike))
