"""Every entry of a folder or archive is converted, listed in the quarantine or counted."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import re
import signal
import socket
import stat
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes import add_member as add
from fakes import labeled_contents as contents
from fakes import make_records as run
from fakes import picture, write_folder, write_tar, write_zip
from fakes import picture_files as files

from efficientnet_ns.config import ConfigError, processes
from efficientnet_ns.data import image_conversion, tasks
from efficientnet_ns.evaluation import robustness_sets
from efficientnet_ns.files import manifests, tfexamples
from efficientnet_ns.files.errors import DataError
from efficientnet_ns.ingest import image_records, image_sources, listing

ALL = {"max_bad_fraction": 1.0}


def quarantine(output: Path, prefix: str = "train") -> dict[str, str]:
    path = output / f"{prefix}-quarantine.json"
    items = json.loads(path.read_text()) if path.exists() else []
    return {item["path"]: item["reason"] for item in items}


def sums(caplog) -> dict[str, int]:
    """Parses the numbers of the summary line, including the ignored entries by kind."""
    (line,) = (r.getMessage() for r in caplog.records if " entries = " in r.getMessage())
    numbers = re.search(
        r"(?P<entries>\d+) entries = (?P<records>\d+) records \+ (?P<bad>\d+) in quarantine \+ "
        r"(?P<ignored>\d+) ignored(?: \((?P<kinds>[^)]*)\))?(?: \+ (?P<undrawn>\d+) beyond --limit)?$",
        line,
    ).groupdict()
    kinds = dict(reversed(k.split(" ", 1)) for k in (numbers.pop("kinds") or "").split(", ") if k)
    found = {name: int(number or 0) for name, number in numbers.items()}
    assert found["entries"] == sum(found[n] for n in ("records", "bad", "ignored", "undrawn"))
    assert found["ignored"] == sum(map(int, kinds.values()))
    return {**found, **{kind: int(number) for kind, number in kinds.items()}}


# Totals.


def odd_folder(tmp_path: Path) -> Path:
    """Creates 15 images, 3 links to images, a linked folder and entries that are not images."""
    folder = write_folder(
        tmp_path / "in",
        {
            **files(),
            "ant/cut.png": picture(1)[:60],
            "ant/empty.jpg": b"",
            "ant/UPPER.PNG": picture(50),
            "ant/notes.txt": b"",
            "ant/noextension": b"",
            "ant/Thumbs.db": b"",
            "ant/._00.jpg": b"fork",
            "ant/.hidden.png": picture(2),
            "ant/@eaDir/00.png/SYNOPHOTO_THUMB_M.jpg": picture(3),
            "bee/.thumbnails/x.png": picture(4),
            "@eaDir/x.jpg": picture(5),
            ".AppleDouble/x.jpg": picture(5),
            "__MACOSX/ant/x.jpg": picture(5),
            "$RECYCLE.BIN/x.jpg": picture(5),
            "lost+found/x.jpg": picture(5),
            "loose.png": picture(6),
            "records/train-00000-of-00001": b"",
        },
    )
    outside = write_folder(tmp_path / "outside", {"x.png": picture(7), "more/y.png": picture(8)})
    (folder / "bee/file.png").symlink_to(outside / "x.png")
    (folder / "bee/tree").symlink_to(outside)
    (folder / "bee/inside.png").symlink_to("../ant/00.png")
    os.link(folder / "bee/00.png", folder / "bee/hard.png")
    (folder / "bee/tree again").symlink_to(outside / "more")
    (folder / "cat/circle").symlink_to(folder)
    (folder / "aaa").symlink_to(folder / "ant")  # Sorts first but is read last.
    (folder / "cat/broken.png").symlink_to("nothing.png")
    (folder / "cat/broken").symlink_to("/nowhere/at/all")
    (folder / "cat/self.png").symlink_to("self.png")
    (folder / "cat/.#lock").symlink_to("user@host")
    os.mkfifo(folder / "cat/pipe.png")
    os.mkfifo(folder / "cat/pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(folder / "cat/socket.jpg"))
    (folder / "cat/folder.jpg").mkdir()
    (folder / "cat/folder.jpg/z.png").write_bytes(picture(9))
    with open(os.fsencode(folder / "cat") + b"/caf\xe9.png", "wb") as f:
        f.write(picture(10))
    with open(os.fsencode(folder / "cat") + b"/caf\xe8.png", "wb") as f:
        f.write(b"no image")
    return folder


def test_a_folder_with_everything_adds_up(tmp_path, caplog):
    with caplog.at_level("INFO"):
        run(odd_folder(tmp_path), tmp_path / "out", **ALL)
    found = sums(caplog)
    assert quarantine(tmp_path / "out") == {
        "ant/cut.png": quarantine(tmp_path / "out")["ant/cut.png"],
        "ant/empty.jpg": "the file is empty",
        "cat/broken.png": "a link to nothing.png: No such file or directory",
        "cat/broken/": "a link to /nowhere/at/all: No such file or directory",
        "cat/self.png": "a link to self.png: Too many levels of symbolic links",
        "cat/pipe.png": "not a file but a pipe, socket or device",
        "cat/socket.jpg": "not a file but a pipe, socket or device",
        "cat/caf\\xe8.png": quarantine(tmp_path / "out")["cat/caf\\xe8.png"],
        "loose.png": "in no class folder",
    }
    # The 3 are links to images, one of them hard; the 2 are in a linked folder.
    assert found["records"] == 15 + 1 + 3 + 2 + 1 + 1 == len(contents(tmp_path / "out"))
    assert found["bad"] == 9
    assert found[image_sources.HIDDEN] == 2 + 1 + 1 + 5 + 1
    assert found[image_sources.AGAIN] == 3 and found[image_sources.RECORDS] == 1
    assert found[".txt"] == found[".db"] == 1 and found["without extension"] == 2
    task = tasks.get_task(str(tmp_path / "out/task.json"))
    assert task.class_names == ("ant", "bee", "cat")


def member(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "tar in tar"])
def test_a_tar_with_everything_adds_up(tmp_path, caplog, kind):
    path = tmp_path / ("in.tar" if kind == "tar in tar" else f"in.{kind}")
    with tarfile.open(path, "w:gz" if kind == "tar.gz" else "w") as archive:
        for name, content in files().items():
            add(archive, name, content)
        add(archive, "ant/cut.png", picture(1)[:60])
        add(archive, "ant/notes.txt", b"")
        add(archive, "ant/caf\udce9.png", picture(10))
        add(archive, "@eaDir/x.jpg", picture(5))
        add(archive, "loose.png", picture(6))
        for item in [
            member("bee/hard.png", tarfile.LNKTYPE, "ant/00.png"),
            member("bee/soft.png", tarfile.SYMTYPE, "../ant/01.png"),
            member("bee/chain.png", tarfile.SYMTYPE, "soft.png"),
            member("bee/tree", tarfile.SYMTYPE, "../ant"),
            member("bee/through.png", tarfile.SYMTYPE, "tree/02.png"),
            member("bee/nothing.png", tarfile.LNKTYPE, "ant/none.png"),
            member("bee/outside.png", tarfile.SYMTYPE, "../../../../x.png"),
            member("bee/absolute.png", tarfile.SYMTYPE, "/ant/00.png"),
            member("bee/circle.png", tarfile.SYMTYPE, "circle.png"),
            member("bee/broken", tarfile.SYMTYPE, "none"),
            member("bee/pipe.png", tarfile.FIFOTYPE),
            member("bee/null", tarfile.CHRTYPE),
        ]:
            archive.addfile(item)
    if kind == "tar in tar":
        inner = path.read_bytes()
        write_tar(path, {"all/all.tar": inner})
    with caplog.at_level("INFO"):
        run(path, tmp_path / "out", **ALL, **({"subfolder": "all/all"} if "in" in kind else {}))
    found = sums(caplog)
    assert found["records"] == 15 + 1 + 4 == len(contents(tmp_path / "out"))
    bad = {path.removeprefix("all/all/"): why for path, why in quarantine(tmp_path / "out").items()}
    assert bad["bee/nothing.png"].endswith("ant/none.png, which does not exist")
    assert bad["bee/outside.png"] == bad["bee/absolute.png"] == "a link out of the archive"
    assert bad["bee/pipe.png"] == "not a file but a pipe, device or similar"
    assert bad.keys() >= {"bee/circle.png", "bee/broken/", "loose.png"} and len(bad) == 8
    # null, @eaDir/x.jpg, bee/tree, notes.txt
    assert found["ignored"] == 4 and found[image_sources.AGAIN] == 1
    images = [image for label, image in contents(tmp_path / "out") if label == 2]
    assert images.count(picture(0)) == 1 and images.count(picture(1)) == 2
    assert images.count(picture(2)) == 1


def test_a_zip_with_everything_adds_up(tmp_path, caplog):
    path = write_zip(
        tmp_path / "in.zip", {**files(), "ant/notes.txt": b"", "__MACOSX/x.jpg": b"", "l.png": b"x"}
    )
    with zipfile.ZipFile(path, "a") as archive:
        for name, target in [("bee/soft.png", "../ant/00.png"), ("bee/broken.png", "none.png")]:
            info = zipfile.ZipInfo(name)
            info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
            archive.writestr(info, target)
        archive.writestr("bee/secret.png", picture(70))
        archive.writestr("bee/method.png", picture(71))
        archive.writestr("empty/", b"")
    data = bytearray(path.read_bytes())
    for name, offset, value in [("bee/secret.png", 8, 1), ("bee/method.png", 10, 99)]:
        place = data.rindex(name.encode()) - 46  # The entry in the central directory.
        data[place + offset] |= value
    place = data.index(b"bee/secret.png") - 30
    data[place + 6] |= 1
    path.write_bytes(bytes(data))
    with caplog.at_level("INFO"):
        run(path, tmp_path / "out", **ALL)
    found, bad = sums(caplog), quarantine(tmp_path / "out")
    assert found["records"] == 16 and found["ignored"] == 2
    assert bad.keys() == {"l.png", "bee/broken.png", "bee/secret.png", "bee/method.png"}
    assert "encrypted" in bad["bee/secret.png"] and "not supported" in bad["bee/method.png"]
    assert tasks.get_task(str(tmp_path / "out/task.json")).class_names == (
        "ant",
        "bee",
        "cat",
        "empty",
    )


def test_what_is_not_drawn_adds_up_too(tmp_path, caplog):
    with caplog.at_level("INFO"):
        run(write_folder(tmp_path / "in", files()), tmp_path / "out", limit=4)
    assert sums(caplog)["undrawn"] == 11


def test_of_what_is_lost_as_much_counts_as_is_drawn(tmp_path):
    folder = write_folder(tmp_path / "in", files())
    for i in range(3):
        (folder / f"ant/broken {i}.png").symlink_to("nothing")
    with pytest.raises(DataError, match="3 of 18 images"):
        run(folder, tmp_path / "all", max_bad_fraction=0.1)
    assert run(folder, tmp_path / "two", limit=2, max_bad_fraction=0.1) == {"train": 2}
    assert len(quarantine(tmp_path / "two")) == 3
    with pytest.raises(DataError, match="2 of 12 images"):
        run(folder, tmp_path / "ten", limit=10, max_bad_fraction=0.1)


# Unreadable input.


def test_a_folder_whose_path_is_too_long(tmp_path):
    folder = write_folder(tmp_path / "in", files())
    name, depth, here = "d" * 250, 0, os.getcwd()
    os.chdir(folder / "bee")
    try:
        while depth < 20:
            os.mkdir(name)
            os.chdir(name)
            depth += 1
        Path("x.png").write_bytes(picture(1))
    finally:
        os.chdir(here)
    assert run(folder, tmp_path / "out", **ALL) == {"train": 15}
    ((path, reason),) = quarantine(tmp_path / "out").items()
    assert path.startswith(f"bee/{name}/") and path.endswith("/")
    assert reason == "cannot be read: File name too long"
    with pytest.raises(DataError, match="1 of 16 images of 'train' are unusable"):
        run(folder, tmp_path / "strict")


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Drops root privileges, because root may read everything."""
    user = os.geteuid()
    os.seteuid(user or 65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_folder_and_a_file_without_permission():
    with tempfile.TemporaryDirectory() as name:  # Other users cannot enter pytest's folders.
        os.chmod(name, 0o755)
        folder = write_folder(Path(name), {**files(), "bee/in/x.png": picture(1)})
        (folder / "bee/in").chmod(0)
        (folder / "ant/00.png").chmod(0)
        source = image_sources.Folder(name)
        try:
            with unprivileged():
                found = listing.list_images(source, labeled=True)
                closed = next(e for e in found.entries if e.name == "ant/00.png")
                with source.reader([closed]) as read:
                    with pytest.raises(
                        image_conversion.Unusable, match="cannot be read: Permission denied"
                    ):
                        read(closed)
        finally:
            (folder / "bee/in").chmod(0o700)
    reason = "the folder cannot be listed: Permission denied"
    assert found.lost == [image_sources.LeftOut("bee/in/", reason)]


def test_a_file_that_vanished_is_named_where_no_record_is_made(tmp_path):
    entry = image_sources.Entry("ant/x.png")
    images = robustness_sets.Images(image_sources.Folder(str(tmp_path)), [entry], [])
    with pytest.raises(DataError, match="ant/x.png cannot be read: No such file"):
        next(images.read("images"))


def test_too_many_that_cannot_be_read_stop_before_anything_is_written(tmp_path):
    folder = write_folder(tmp_path / "in", files())
    (folder / "cat/broken.png").symlink_to("nothing.png")
    with pytest.raises(DataError, match="1 of 16 .*cat/broken.png: a link to nothing.png"):
        run(folder, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["train-quarantine.json"]
    (folder / "cat/broken.png").unlink()
    run(folder, tmp_path / "out")
    assert not (tmp_path / "out/train-quarantine.json").exists(), "of the earlier attempt"


def test_nothing_that_can_be_read(tmp_path):
    (tmp_path / "in/ant").mkdir(parents=True)
    (tmp_path / "in/ant/a.png").symlink_to("b.png")
    (tmp_path / "in/ant/raw.cr2").touch()
    with pytest.raises(DataError, match="there is nothing in '.*/trian'"):
        run(tmp_path / "in", tmp_path / "out", subfolder="trian")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="--output_dir=.*file is a file"):
        run(tmp_path / "in", tmp_path / "file")
    with pytest.raises(DataError, match="cannot read 1 entries, for example ant/a.png: .*1 .cr2"):
        run(tmp_path / "in", tmp_path / "out")


# Damaged and unusual archives.


def test_a_damaged_header_is_not_the_end_of_a_tar(tmp_path):
    path = write_tar(tmp_path / "in.tar", files())
    data = bytearray(path.read_bytes())
    data[data.index(b"bee/01.png")] ^= 0xFF
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match=r"in.tar: bad checksum at byte \d+"):
        run(path, tmp_path / "out")


def test_a_tar_that_was_cut_between_two_members(tmp_path, caplog):
    path = write_tar(tmp_path / "in.tar", files())
    path.write_bytes(path.read_bytes()[: path.read_bytes().index(b"cat/00.png")])
    with caplog.at_level("WARNING"):
        run(path, tmp_path / "out")
    assert "in.tar has no end marker: the file may be truncated" in caplog.text


@pytest.mark.parametrize("kind", ["tar", "tar.gz"])
def test_joined_archives_are_read_to_the_last(tmp_path, kind):
    every = list(files().items())
    parts = [write_tar(tmp_path / f"{i}.{kind}", dict(every[i::2])).read_bytes() for i in (0, 1)]
    path = tmp_path / f"in.{kind}"
    path.write_bytes(b"".join(parts))
    assert run(path, tmp_path / "out") == {"train": 15}
    assert sorted(image for _, image in contents(tmp_path / "out")) == sorted(files().values())


def test_an_archive_compressed_in_parts(tmp_path):
    plain = write_tar(tmp_path / "plain.tar", files()).read_bytes()
    parts = [gzip.compress(plain[i : i + 5000]) for i in range(0, len(plain), 5000)]
    (tmp_path / "in.tar").write_bytes(b"".join(parts))  # The name does not reveal the compression.
    assert run(tmp_path / "in.tar", tmp_path / "out") == {"train": 15}


def test_a_damaged_archive_in_an_archive_is_named(tmp_path):
    inner = write_tar(tmp_path / "a.tar", {"1.png": picture(1), "2.png": picture(2)}).read_bytes()
    path = write_tar(tmp_path / "in.tar", {"a.tar": inner, "b.tar": inner[:1700], "c.tar": inner})
    with pytest.raises(DataError, match="in.tar, b.tar in it: truncated header"):
        run(path, tmp_path / "out")


@pytest.mark.parametrize("kind", ["zip", "tar", "tgz"])
@pytest.mark.parametrize("content", [b"", b"<html>404", b"<html>404" * 1000])
def test_what_is_no_archive_in_spite_of_its_name(tmp_path, kind, content):
    path = tmp_path / f"in.{kind}"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"in.{kind}: .*truncated"):
        run(path, tmp_path / "out")


def test_junk_behind_the_end_is_ignored(tmp_path):
    path = write_tar(tmp_path / "in.tar", files())
    path.write_bytes(path.read_bytes() + b"junk" * 1000)
    assert run(path, tmp_path / "out") == {"train": 15}


# Names.


def test_class_folders_whose_names_are_not_utf8(tmp_path):
    folder = write_folder(tmp_path / "in", files())
    os.rename(folder / "cat", os.fsencode(folder) + b"/caf\xe9")
    assert run(folder, tmp_path / "out") == {"train": 15}
    task = tasks.get_task(str(tmp_path / "out/task.json"))
    assert task.class_names == ("ant", "bee", "caf\\xe9")
    assert sorted(contents(tmp_path / "out")) == sorted(
        (1 + i // 5, image) for i, image in enumerate(files().values())
    )
    with pytest.raises(ConfigError, match=r"--source=.*/caf\\xe9 is not UTF-8"):
        run(Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9")), tmp_path / "out")


def test_a_subfolder_in_another_unicode_form(tmp_path):
    folder = write_folder(tmp_path / "in", {f"e\u0301t/{n}": c for n, c in files().items()})
    assert run(folder, tmp_path / "out", subfolder="\u00e9t/") == {"train": 15}


# Folders that are not classes.


@pytest.mark.parametrize(
    "tree, message",
    [
        (
            ("seg_train/seg_train/sea", "seg_train/seg_train/street", "seg_test/seg_test/sea"),
            "are sets, not classes: seg_test, seg_train. Pass one of them: "
            "--subfolder=seg_train/seg_train --image_set=train. If",
        ),
        (
            ("Train/0", "Train/1", "Test", "Meta"),
            "are sets, not classes: Test, Train. Pass one of them: "
            "--subfolder=Train --image_set=train",
        ),
        (
            ("PetImages/Cat", "PetImages/Dog"),
            "all images of 'PetImages' are in folders below it. Pass one of them: "
            "--subfolder=PetImages. If",
        ),
        (("cats", "dogs/small", "dogs/large"), "all images of 'dogs' are in folders below it"),
        (("images",), "form only one class, 'images'; use --nolabeled"),
        (("trainset/a", "trainset/b", "valid2017/a"), "--subfolder=trainset --image_set=train"),
        (("data/val/a", "data/val/b"), "--subfolder=data/val --image_set=validation"),
    ],
)
@pytest.mark.parametrize("subfolder", ["", "around/it"])
def test_folders_one_level_off(tmp_path, tree, message, subfolder):
    paths = [f"{subfolder}/{folder}/{i}.png".lstrip("/") for folder in tree for i in range(2)]
    folder = write_folder(tmp_path / "in", dict.fromkeys(paths, picture(1)))
    if subfolder:
        message = message.replace("--subfolder=", f"--subfolder={subfolder}/")
    with pytest.raises(DataError, match=message):
        run(folder, tmp_path / "out", subfolder=subfolder)
    assert not (tmp_path / "out").exists()
    accepted = listing.list_images(
        image_sources.Folder(str(folder), subfolder),
        True,
        subfolder=subfolder,
        accept_classes=True,
    )
    assert accepted.class_names == tuple(sorted({name.split("/")[0] for name in tree}))


@pytest.mark.parametrize(
    "tree", [("train", "plane", "bus"), ("pregnancy test", "cat"), ("a", "b/deep", "b"), ("1", "2")]
)
def test_folders_that_are_classes(tmp_path, tree):
    paths = {f"{folder}/{i}.png": picture(1) for folder in tree for i in range(2)}
    found = listing.list_images(
        image_sources.Folder(str(write_folder(tmp_path / "in", paths))), labeled=True
    )
    assert found.class_names == tuple(sorted({name.split("/")[0] for name in tree}))


def test_the_folder_that_the_message_gives_is_right(tmp_path):
    folder = write_folder(
        tmp_path / "in", {f"d/{s}/{n}": c for s in ("train", "test") for n, c in files().items()}
    )
    with pytest.raises(DataError) as error:
        run(folder, tmp_path / "out")
    given = re.findall(r"--subfolder=(\S+) --image_set=(\w+)", str(error.value))
    assert dict(given) == {"d/train": "train", "d/test": "test"}
    for subfolder, image_set in sorted(given, reverse=True):
        run(folder, tmp_path / "out", subfolder=subfolder, image_set=image_set)
    assert tasks.get_task(str(tmp_path / "out/task.json")).test_set == "test"


# Output folders and sets that share a folder.


@pytest.mark.parametrize("where", ["records", "cat/records", "."])
def test_an_output_folder_inside_the_source(tmp_path, where):
    folder = write_folder(tmp_path / "in", files())
    for _ in range(2):
        assert run(folder, folder / where) == {"train": 15}
    assert run(folder, tmp_path / "other") == {"train": 15}
    assert tasks.get_task(str(tmp_path / "other/task.json")).class_names == ("ant", "bee", "cat")


def test_a_set_is_not_cut_from_itself(tmp_path):
    folder = write_folder(tmp_path / "in", files())
    for name in ("validation", "dev"):
        values = {"validation_fraction": 0.2, "validation_set": name, "image_set": name}
        with pytest.raises(ConfigError, match=f"the set '{name}' from itself"):
            run(folder, tmp_path / "out", **values)
    assert not (tmp_path / "out").exists()


def test_labeled_and_unlabeled_sets_in_one_folder(tmp_path, caplog):
    folder = write_folder(tmp_path / "in", files())
    run(folder, tmp_path / "out", validation_fraction=0.2)
    for prefix in ("test", "dev"):
        with pytest.raises(
            ConfigError, match=r"contains labeled sets \(train, validation\).*extra"
        ):
            run(folder, tmp_path / "out", labeled=False, image_set=prefix)
    with pytest.raises(manifests.OutputConflict, match="labeled: True → False"):
        run(folder, tmp_path / "out", labeled=False, image_set="train", num_shards=2)
    with caplog.at_level("INFO"):
        assert run(folder, tmp_path / "out", labeled=False) == {"extra": 15}
    assert "to label these images, add --file_prefix=extra" in caplog.text
    assert run(folder, tmp_path / "out", image_set="test") == {"test": 15}
    run(folder, tmp_path / "unlabeled", labeled=False, image_set="train")
    with pytest.raises(ConfigError, match="contains unlabeled images as train-"):
        run(folder, tmp_path / "unlabeled", image_set="validation")


# Processes.


def deadly(image: bytes, label: int) -> bytes:
    """Returns a record, except for one image that kills the process, as if out of memory."""
    if image == picture(103) and not os.path.exists(os.environ["ALIVE"]):
        os.kill(os.getpid(), signal.SIGKILL)
    return tfexamples.labeled_example(image, label)


@pytest.mark.slow
def test_a_killed_worker_is_explained_and_the_work_continued(tmp_path, monkeypatch):
    monkeypatch.setenv("ALIVE", str(tmp_path / "alive"))
    source = image_sources.Folder(str(write_folder(tmp_path / "in", files())))
    one = image_records.ImageSet(
        str(tmp_path / "out"), "train", listing.list_images(source, True).entries, 5, deadly, {}, 3
    )
    rules = image_conversion.Rules()
    with pytest.raises(
        processes.ProcessDied, match="one of 2 processes was killed.*same command again"
    ):
        image_records.make_sets(source, [one], rules, num_workers=2)
    whole = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("train-*")}
    (tmp_path / "alive").touch()
    (made,) = image_records.make_sets(source, [one], rules, num_workers=1)
    assert made.records == 15 and not list((tmp_path / "out").glob(".tmp-*"))
    assert all((tmp_path / "out" / n).stat().st_mtime_ns == t for n, t in whole.items())


@pytest.mark.parametrize(
    ("kind", "name"),
    [("zip", "photos"), ("zip", "photos.tar.gz"), ("tar", "photos.zip"), ("tar.gz", "download")],
)
def test_an_archive_is_known_by_its_content(kind, name, tmp_path):
    write = write_zip if kind == "zip" else write_tar
    archive = write(tmp_path / f"in.{kind}", files())
    run(write_folder(tmp_path / "folder", files()), tmp_path / "expected")
    archive = archive.rename(tmp_path / name)
    run(archive, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_a_file_that_is_no_archive_lists_the_readable_kinds(tmp_path):
    (tmp_path / "photos.rar").write_bytes(b"Rar!\x1a\x07")
    with pytest.raises(DataError, match=r"neither a folder nor an archive .*\.zip, \.tar"):
        run(tmp_path / "photos.rar", tmp_path / "out")


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_the_last_entry_of_a_name_counts(kind, tmp_path, caplog):
    path = tmp_path / f"in.{kind}"
    versions = [("cat/a.png", picture(1)), ("dog/a.png", picture(2)), ("cat/a.png", picture(3))]
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
            for name, content in versions:
                archive.writestr(name, content)
    else:
        with tarfile.open(path, "w") as archive:
            for name, content in versions:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    run(path, tmp_path / "out", num_shards=1)
    assert sorted(contents(tmp_path / "out")) == [(1, picture(3)), (2, picture(2))]
    assert "cat/a.png: using the last of several entries with this name" in caplog.text


def test_a_folder_of_archives_is_told_how_to_be_read(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("cat", "dog"):
        write_zip(folder / f"{name}.zip", {"a.png": picture(1)})
    with pytest.raises(DataError, match="2 .zip. Archives in a folder are not opened"):
        run(folder, tmp_path / "out")
