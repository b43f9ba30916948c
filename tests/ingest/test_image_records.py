"""Records from folders and archives: classes, skipped files and reproducible bytes."""

from __future__ import annotations

import gzip
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
from pathlib import Path

import forks
import numpy as np
import pytest
import tensorflow as tf
from fakes import labeled_contents as contents
from fakes import make_records as run
from fakes import picture, write_folder, write_tar, write_zip
from fakes import picture_files as files
from PIL import Image

from efficientnet_ns.config import ConfigError
from efficientnet_ns.config.ingest import MakeConfig
from efficientnet_ns.data import image_conversion, images, tasks
from efficientnet_ns.files import manifests, shard_names, tfexamples, tfrecords
from efficientnet_ns.files.errors import DataError
from efficientnet_ns.ingest import data_source, image_records, image_sources

ROOT = Path(__file__).parents[2]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# Kinds of input.


@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "tar.gz", "tgz", "tar.xz"])
def test_every_kind_of_input_gives_the_same_records(tmp_path, kind):
    expected = files()
    if kind == "folder":
        source = write_folder(tmp_path / "in", expected)
    else:
        source = (write_zip if kind == "zip" else write_tar)(tmp_path / f"in.{kind}", expected)
    assert run(source, tmp_path / "out") == {"train": 15}
    got = contents(tmp_path / "out")
    labels = {name: i for i, name in enumerate(["ant", "bee", "cat"], start=1)}
    assert sorted(got) == sorted((labels[n.split("/")[0]], image) for n, image in expected.items())
    # The order is the seeded permutation of the sorted names, cut into two shards.
    order = np.random.default_rng(0).permutation(15)
    names = sorted(expected)
    assert [image for _, image in got] == [expected[names[i]] for i in order]
    assert json.loads((tmp_path / "out/counts.json").read_text()).keys() == {
        "train-00000-of-00002",
        "train-00001-of-00002",
    }
    task = tasks.get_task(str(tmp_path / "out/task.json"))
    assert task.class_names == ("ant", "bee", "cat") and task.num_classes == 3
    assert task.num_train_images == 15 and task.eval_set == "validation"
    assert not (tmp_path / "out/train-quarantine.json").exists()


def test_a_compressed_archive_is_decompressed_while_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    source = write_tar(tmp_path / "in.tgz", files())
    with image_sources.open_source(str(source)) as opened:
        (plain,) = (tmp_path / "scratch").rglob("*.tar")
        assert opened.path == str(source) and plain.read_bytes() == gzip.decompress(
            source.read_bytes()
        )
    assert not list((tmp_path / "scratch").iterdir())
    with pytest.raises(DataError, match="cannot decompress .*in.tgz to /dev/full: .*TMPDIR"):
        image_sources._decompress(str(source), gzip.open, "/dev/full")


def test_an_archive_of_archives_has_a_class_per_archive(tmp_path):
    """ImageNet's training images are distributed in this form."""
    inner = {}
    for name in ("n02", "n01"):
        write_tar(tmp_path / f"{name}.tar", {f"{name}_{i}.JPEG": picture(i) for i in range(3)})
        inner[f"{name}.tar"] = (tmp_path / f"{name}.tar").read_bytes()
    run(write_tar(tmp_path / "all.tar", inner), tmp_path / "out")
    assert tasks.get_task(str(tmp_path / "out/task.json")).class_names == ("n01", "n02")
    assert sorted(label for label, _ in contents(tmp_path / "out")) == [1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_odd_names_in_archives(tmp_path, write):
    """Finds the classes and writes nothing but records in the output folder."""
    odd = {
        "../ant/1.png": picture(1),
        "/bee/2.png": picture(2),
        "./ant/deep/deeper/3.PNG": picture(3),
        "bee/../cat/4.png": picture(4),
        "ant/notes.txt": b"not an image",
        "__MACOSX/ant/._1.png": b"resource fork",
        "ant/.hidden.png": b"hidden",
        "loose.png": picture(5),
        "bee/ünï 漢字.png": picture(6),
    }
    path = write(tmp_path / ("in.zip" if write is write_zip else "in.tar"), odd)
    before = snapshot(tmp_path).keys()
    assert run(path, tmp_path / "out", max_bad_fraction=0.2) == {"train": 5}
    assert sorted(contents(tmp_path / "out")) == sorted(
        [(1, picture(1)), (2, picture(2)), (1, picture(3)), (3, picture(4)), (2, picture(6))]
    )
    new = snapshot(tmp_path).keys() - before
    assert all(name.startswith("out/") for name in new)
    assert not (tmp_path.parent / "ant").exists()
    (item,) = json.loads((tmp_path / "out/train-quarantine.json").read_text())
    assert item == {"path": "loose.png", "reason": "in no class folder"}


def test_one_folder_around_an_archive_is_no_class_and_a_subfolder_can_be_chosen(tmp_path):
    inside = {f"flowers/{name}": content for name, content in files().items()}
    run(write_zip(tmp_path / "a.zip", inside), tmp_path / "a")
    assert tasks.get_task(str(tmp_path / "a/task.json")).class_names == ("ant", "bee", "cat")
    sets = {f"{s}/{n}": c for s in ("train", "val") for n, c in files().items()}
    folder = write_folder(tmp_path / "sets", sets)
    with pytest.raises(DataError, match="sets, not classes.*--subfolder=train"):
        run(folder, tmp_path / "b")
    assert not (tmp_path / "b").exists()
    run(folder, tmp_path / "b", subfolder="train")
    run(folder, tmp_path / "b", subfolder="val", image_set="validation")
    assert len(contents(tmp_path / "b")) == len(contents(tmp_path / "b", "validation")) == 15


def test_unlabeled_images_of_any_tree(tmp_path):
    tree = {"a.png": picture(1), "x/y/b.png": picture(2), "x/c.gif": picture(3, image_format="GIF")}
    folder = write_folder(tmp_path / "in", tree)
    (folder / "x" / "circle").symlink_to(folder)
    for keep in (True, False):
        output = tmp_path / f"out{keep}"
        assert run(folder, output, labeled=False, keep_names=keep) == {"extra": 3}
        got = contents(output, "extra")
        assert sorted(got) == sorted((0, content) for content in tree.values())
        assert not (output / "task.json").exists()
        paths = shard_names.list_shards(str(output), "extra")
        records = [record.payload for path in paths for record in tfrecords.read(path)]
        names = {tfexamples.image_bytes(r): tfexamples.file_name(r) for r in records}
        assert names == {content: name if keep else "" for name, content in tree.items()}
        keys = tf.train.Example.FromString(records[0]).features.feature.keys()
        assert set(keys) == {"image/encoded", *(["image/filename"] if keep else [])}


# Classes.


def test_class_folders_of_every_kind(tmp_path, caplog):
    composed, decomposed = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    folder = write_folder(
        tmp_path / "in",
        {
            "Ant/1.png": picture(1),
            "ant/2.png": picture(2),
            f"{composed}/3.png": picture(3),
            f"{decomposed}/4.png": picture(4),
            "漢字/5.png": picture(5),
        },
    )
    (folder / "empty").mkdir()
    with caplog.at_level("WARNING"):
        run(folder, tmp_path / "out")
    task = tasks.get_task(str(tmp_path / "out/task.json"))
    assert task.class_names == ("Ant", "ant", "empty", composed, "漢字")
    labels = {image: label for label, image in contents(tmp_path / "out")}
    assert [labels[picture(i)] for i in range(1, 6)] == [1, 2, 4, 4, 5]
    assert "differ only in case: Ant, ant" in caplog.text
    assert "classes without images (1): empty" in caplog.text


def test_other_sets_keep_the_classes_of_the_first(tmp_path):
    run(write_folder(tmp_path / "in", files()), tmp_path / "out")
    few = write_folder(tmp_path / "few", {"cat/x.png": picture(7)})
    run(few, tmp_path / "out", image_set="dev", num_shards=1)
    assert contents(tmp_path / "out", "dev") == [(3, picture(7))]
    run(few, tmp_path / "out", image_set="test", num_shards=1)
    task = tasks.get_task(str(tmp_path / "out/task.json"))
    assert (task.eval_set, task.test_set, task.num_train_images) == ("dev", "test", 15)
    new = write_folder(tmp_path / "new", {"dog/x.png": picture(8)})
    told = (
        r"'dog'.* not one of the 3 classes .*\(.+, .+, .+\) listed in .*task.json: delete that file"
    )
    with pytest.raises(DataError, match=told):
        run(new, tmp_path / "out", image_set="validation", num_shards=1)


def test_no_set_is_added_to_one_whose_classes_are_unknown(tmp_path):
    """A stopped run may have written other classes than those of the next source."""
    folder = write_folder(tmp_path / "in", files())
    for number in range(2):
        (folder / f"cat/broken{number}.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="2 of 17 images of 'train' are unusable"):
        run(folder, tmp_path / "out")
    run(folder, tmp_path / "out", max_bad_fraction=0.2)
    (tmp_path / "out" / tasks.TASK_FILE).unlink()
    with pytest.raises(ConfigError, match=r"contains train-… without task.json.*finish it"):
        run(folder, tmp_path / "out", max_bad_fraction=0.2, image_set="test")
    run(folder, tmp_path / "out", max_bad_fraction=0.2)
    run(folder, tmp_path / "out", max_bad_fraction=0.2, image_set="test")


@pytest.mark.parametrize("fraction, accepted", [(0.01, True), (0.0, False)])
def test_one_broken_image_of_a_few_is_left_out(tmp_path, fraction, accepted):
    folder = write_folder(tmp_path / "in", files())
    (folder / "cat/broken.png").write_bytes(b"no image")
    if accepted:
        assert run(folder, tmp_path / "out", max_bad_fraction=fraction) == {"train": 15}
    else:
        with pytest.raises(DataError, match="1 of 16 images of 'train' are unusable"):
            run(folder, tmp_path / "out", max_bad_fraction=fraction)


def test_labels_of_imagenet_for_some_of_its_classes(tmp_path):
    folder = write_folder(
        tmp_path / "in", {"n01443537/a.png": picture(1), "n15075141/b.png": picture(2)}
    )
    run(folder, tmp_path / "out", image_set="validation", imagenet_labels=True)
    assert {label for label, _ in contents(tmp_path / "out", "validation")} == {2, 1000}
    assert tasks.get_task(tmp_path / "out" / "task.json").class_names == tasks.wnids()
    other = write_folder(
        tmp_path / "other", {"n01443537/a.png": picture(1), "goldfish/b.png": picture(2)}
    )
    with pytest.raises(
        DataError, match="--imagenet_labels: 'goldfish' in .* is not the WordNet id"
    ):
        run(other, tmp_path / "out2", imagenet_labels=True)
    run(other, tmp_path / "out3")
    with pytest.raises(ConfigError, match="--imagenet_labels: the sets in .* have other classes"):
        run(folder, tmp_path / "out3", imagenet_labels=True, image_set="validation")


def test_a_stratified_validation_set(tmp_path):
    folder = write_folder(tmp_path / "in", {**files(10), "rare/1.png": picture(999)})
    made = run(folder, tmp_path / "out", validation_fraction=0.2, validation_set="dev")
    assert made == {"train": 25, "dev": 6}
    train, dev = contents(tmp_path / "out"), contents(tmp_path / "out", "dev")
    assert np.bincount([label for label, _ in dev], minlength=5).tolist() == [0, 2, 2, 2, 0]
    assert len({image for _, image in train + dev}) == 31
    assert tasks.get_task(str(tmp_path / "out/task.json")).eval_set == "dev"
    run(folder, tmp_path / "other", validation_fraction=0.2, validation_set="dev", seed=1)
    assert set(contents(tmp_path / "other", "dev")) != set(dev)


def test_small_square_images_get_the_small_model(tmp_path):
    folder = write_folder(
        tmp_path / "in",
        {f"a/{i}.png": image_conversion.png(np.zeros([16, 16, 3], np.uint8) + i) for i in range(4)},
    )
    run(folder, tmp_path / "out", accept_classes=True)
    task = tasks.get_task(str(tmp_path / "out/task.json"))
    assert task.image_size == 16 and task.small_image


# Images.


def test_unreadable_images_are_listed_and_too_many_stop(tmp_path):
    good = picture(1, side=40, image_format="JPEG")
    bad = {
        "ant/cut.jpg": good[: len(good) // 2],
        "ant/empty.png": b"",
        "bee/text.png": b"this is no image",
        "bee/photo.heic": b"\0\0\0\x18ftypheic" + bytes(50),
    }
    folder = write_folder(tmp_path / "in", {**files(), **bad})
    with pytest.raises(DataError, match=r"of 19 images of 'train' are unusable.*is ant/|bee/"):
        run(folder, tmp_path / "out", max_bad_fraction=0.1)
    assert (tmp_path / "out/train-quarantine.json").exists()
    assert not (tmp_path / "out/task.json").exists()
    assert run(folder, tmp_path / "out", max_bad_fraction=0.25) == {"train": 15}
    listing = json.loads((tmp_path / "out/train-quarantine.json").read_text())
    assert [item["path"] for item in listing] == sorted(bad)
    assert all(item["reason"] for item in listing)
    assert sorted(image for _, image in contents(tmp_path / "out")) == sorted(files().values())
    # Only the check detects damaged images of known formats; other bad files fail without it.
    run(folder, tmp_path / "unchecked", max_bad_fraction=0.25, check=False)
    listing = json.loads((tmp_path / "unchecked/train-quarantine.json").read_text())
    assert "ant/cut.jpg" not in [item["path"] for item in listing] and len(listing) == 3


def test_a_damaged_member_of_a_zip_is_one_bad_image(tmp_path):
    path = write_zip(tmp_path / "in.zip", files())
    data = bytearray(path.read_bytes())
    place = data.index(b"bee/01.png") + len("bee/01.png") + 20
    data[place] ^= 0xFF
    path.write_bytes(bytes(data))
    assert run(path, tmp_path / "out", max_bad_fraction=0.1) == {"train": 14}
    (item,) = json.loads((tmp_path / "out/train-quarantine.json").read_text())
    assert item["path"] == "bee/01.png" and "cannot be unpacked" in item["reason"]


@pytest.mark.parametrize("kind", ["zip", "tar", "tgz"])
def test_a_truncated_archive_is_named(tmp_path, kind):
    path = (write_zip if kind == "zip" else write_tar)(tmp_path / f"in.{kind}", files())
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(DataError, match=f"in.{kind}"):
        run(path, tmp_path / "out")


def decoded(image: bytes) -> np.ndarray:
    return images.decode(tf.constant(image)).numpy()


@pytest.mark.parametrize(
    "image_format, kwargs, result",
    [
        ("TIFF", {}, b"\x89PNG"),
        ("PPM", {}, b"\x89PNG"),
        ("WEBP", {"lossless": True}, b"\x89PNG"),
        ("WEBP", {"quality": 90}, b"\xff\xd8\xff"),
    ],
)
def test_formats_tensorflow_cannot_decode(image_format, kwargs, result):
    raw = picture(3, side=24, image_format=image_format, **kwargs)
    for check in (True, False):
        image, shape = image_conversion.prepare(raw, image_conversion.Rules(check=check))
        assert image.startswith(result) and shape == (24, 26)
    expected = np.asarray(Image.open(io.BytesIO(raw)).convert("RGB"))
    difference = np.abs(decoded(image).astype(int) - expected)
    assert difference.max() == 0 if result == b"\x89PNG" else difference.mean() < 25


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "GIF", "BMP"])
def test_formats_tensorflow_decodes_pass_unchanged(image_format):
    raw = picture(3, image_format=image_format)
    assert image_conversion.prepare(raw, image_conversion.Rules()) == (raw, (12, 14))
    assert image_conversion.prepare(raw, image_conversion.Rules(check=False)) == (raw, None)


def test_sixteen_bit_tiff_keeps_its_high_byte():
    pixels = np.arange(0, 65536, 1024, np.uint16).reshape(8, 8)
    target = io.BytesIO()
    Image.fromarray(pixels).save(target, "TIFF")
    image, _ = image_conversion.prepare(target.getvalue(), image_conversion.Rules())
    np.testing.assert_array_equal(decoded(image)[..., 0], pixels >> 8)


def test_large_images_are_shrunk_and_small_ones_left(tmp_path):
    folder = write_folder(
        tmp_path / "in", {"a/large.png": picture(1, side=98), "a/small.png": picture(2, side=30)}
    )
    run(folder, tmp_path / "out", max_side=50, accept_classes=True)
    shapes = {decoded(image).shape for _, image in contents(tmp_path / "out")}
    assert shapes == {(49, 50, 3), (30, 32, 3)}
    assert picture(2, side=30) in [image for _, image in contents(tmp_path / "out")]


# Repeated, interrupted and parallel runs.


@pytest.mark.slow
def test_any_number_of_processes_writes_the_same_bytes(tmp_path):
    source = write_zip(tmp_path / "in.zip", {**files(), "ant/bad.png": b"\x89PNG\r\n\x1a\nno"})
    values = {"num_shards": 4, "max_bad_fraction": 0.1, "validation_fraction": 0.3}
    run(source, tmp_path / "one", **values)
    run(source, tmp_path / "two", num_workers=2, **values)
    one = snapshot(tmp_path / "one")
    assert "train-quarantine.json" in one and one == snapshot(tmp_path / "two")


def test_finished_shards_are_left_alone_and_other_settings_refused(tmp_path):
    folder = write_folder(tmp_path / "in", files())
    run(folder, tmp_path / "out")
    first = tmp_path / "out/train-00000-of-00002"
    os.utime(first, (1, 1))
    before = snapshot(tmp_path / "out")
    run(folder, tmp_path / "out")
    assert first.stat().st_mtime == 1 and snapshot(tmp_path / "out") == before
    with pytest.raises(manifests.OutputConflict, match="seed: 0 → 1"):
        run(folder, tmp_path / "out", seed=1)
    with pytest.raises(DataError, match="number of shards other than"):
        run(folder, tmp_path / "out", num_shards=3)
    (folder / "ant/00.png").write_bytes(picture(5, side=13))
    with pytest.raises(
        manifests.OutputConflict, match=r"images: .* changed since: (\d+) → \1, or other"
    ):
        run(folder, tmp_path / "out")


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_image_that_was_replaced_by_one_of_its_size_is_noticed(tmp_path, kind):
    names = [f"{name}/{i}.bmp" for name in ("ant", "bee") for i in range(2)]
    pictures = {name: picture(i, image_format="BMP") for i, name in enumerate(names)}
    source = write_folder(tmp_path / "in", pictures)

    def packed(second: int) -> Path:
        os.utime(source / names[0], (second, second))
        if kind == "folder":
            return source
        path = tmp_path / f"in.{kind}"
        if kind == "zip":
            return write_zip(path, {name: (source / name).read_bytes() for name in names})
        with tarfile.open(path, "w") as archive:
            for name in names:
                archive.add(source / name, name)
        return path

    run(packed(10), tmp_path / "out")
    assert run(packed(10), tmp_path / "out") == {"train": 4}
    (source / names[0]).write_bytes(picture(9, image_format="BMP"))
    with pytest.raises(manifests.OutputConflict, match="replaced or modified.*cp -p"):
        run(packed(20), tmp_path / "out")


def test_records_of_a_version_that_noted_no_times(tmp_path):
    source = write_folder(tmp_path / "in", files())
    made = run(source, tmp_path / "out")
    for path in (tmp_path / "out/manifests").iterdir():
        noted = json.loads(path.read_text())
        assert noted["config"].pop("versions")
        path.write_text(json.dumps(noted))
    before = snapshot(tmp_path / "out")
    assert run(source, tmp_path / "out") == made and snapshot(tmp_path / "out") == before


def test_manifest_of_another_set_that_is_damaged_is_named(tmp_path):
    source = write_folder(tmp_path / "in", files())
    run(source, tmp_path / "out")
    manifest = tmp_path / "out/manifests/train-00001-of-00002.json"
    for text in ("[]", "{", '{"config": 1, "sizes": {}, "counts": {}}'):
        manifest.write_text(text)
        with pytest.raises(manifests.OutputConflict, match=f"{manifest} is damaged.*Delete it"):
            run(source, tmp_path / "out", image_set="validation")


# Hangs in the eighth image, with two of five shards finished and one begun.
STUCK = """
import sys, time
from efficientnet_ns.config.ingest import MakeConfig
from efficientnet_ns.data import image_conversion
from efficientnet_ns.ingest import data_source

work, calls = image_conversion.prepare, []
def stuck(*args):
    calls.append(1)
    if len(calls) == 8:
        print("stuck", flush=True)
        time.sleep(1000)
    return work(*args)
image_conversion.prepare = stuck
data_source.make_records(MakeConfig(source=sys.argv[1], output_dir=sys.argv[2], num_shards=5, num_workers=1))
"""


def test_a_killed_process_is_continued(tmp_path):
    folder = write_folder(tmp_path / "in", files())
    run(folder, tmp_path / "straight", num_shards=5)
    command = [sys.executable, "-c", STUCK, str(folder), str(tmp_path / "out")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "stuck\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    found = snapshot(tmp_path / "out")
    whole = [name for name in found if name.startswith("train-")]
    assert sorted(whole) == ["train-00000-of-00005", "train-00001-of-00005"]
    assert any(name.startswith(".tmp-") for name in found)
    os.utime(tmp_path / "out" / whole[0], (1, 1))
    run(folder, tmp_path / "out", num_shards=5)
    assert (tmp_path / "out" / whole[0]).stat().st_mtime == 1
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "straight")


@pytest.mark.slow
def test_processes_do_not_outlive_a_killed_parent(tmp_path):
    folder = write_folder(
        tmp_path / "in", {f"{i % 2}/{i:03d}.png": picture(i, side=500) for i in range(60)}
    )
    arguments = [f"--source={folder}", f"--output_dir={tmp_path / 'out'}", "--num_shards=30"]
    command = [sys.executable, "-m", "efficientnet_ns.make_records", *arguments, "--num_workers=2"]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    while not list((tmp_path / "out").glob("train-*")) and process.poll() is None:
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    while True:  # Until no process of the session is left.
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
    assert subprocess.run(command, cwd=ROOT).returncode == 0
    run(folder, tmp_path / "straight", num_shards=30)
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "straight")


# Split sizes, shard counts and refused input.


def test_split_takes_a_part_of_each_class():
    entries = [
        image_sources.Entry(str(i), label) for i, label in enumerate([0] * 10 + [1] * 3 + [2])
    ]
    rest, chosen = image_records.split(entries, 0.1)
    assert [e.label for e in chosen] == [0, 1] and len(rest) == 12
    assert sorted(e.name for e in rest + chosen) == sorted(e.name for e in entries)
    assert image_records.split(entries[:2], 0.99)[0], "a class is never all validation"


@pytest.mark.parametrize("images, shards", [(1, 1), (1024, 1), (1025, 2), (10**8, 1024)])
def test_default_number_of_shards(images, shards):
    assert image_records.default_num_shards(images) == shards


@pytest.mark.parametrize(
    "values, message",
    [
        ({"source": ""}, "--source and --output_dir"),
        ({"num_shards": 16}, "--num_shards=16 is more than 15"),
        ({"validation_fraction": 1.0}, "--validation_fraction=1.0 must be below 1"),
        ({"validation_fraction": 0.5, "labeled": False}, "requires labeled images"),
        ({"imagenet_labels": True, "labeled": False}, "--imagenet_labels requires labeled images"),
    ],
)
def test_settings_that_cannot_work(tmp_path, values, message):
    folder = write_folder(tmp_path / "in", files())
    settings = {"source": str(folder), "output_dir": str(tmp_path / "out"), "num_workers": 1}
    with pytest.raises(ConfigError, match=message):
        data_source.make_records(MakeConfig(**{**settings, **values}))
    assert not (tmp_path / "out").exists()


def test_sources_that_are_none(tmp_path):
    for name in ("absent", "absent.zip"):
        with pytest.raises(ConfigError, match=f"--source=.*{name} does not exist"):
            run(tmp_path / name, tmp_path / "out")
    (tmp_path / "text.txt").touch()
    with pytest.raises(DataError, match="neither a folder nor an archive"):
        run(tmp_path / "text.txt", tmp_path / "out")
    with pytest.raises(DataError, match="no images in"):
        run(write_folder(tmp_path / "in", {"a/readme.txt": b""}), tmp_path / "out")
    with pytest.raises(DataError, match="not in folders.*--nolabeled"):
        run(write_folder(tmp_path / "flat", {"a.png": picture(1)}), tmp_path / "out")


def test_command_line(tmp_path):
    folder = write_folder(tmp_path / "in", files())
    arguments = [f"--source={folder}", f"--output_dir={tmp_path / 'out'}", "--limit=4"]
    answer = forks.python("-m", "efficientnet_ns.make_records", *arguments)
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout) == {"train": 4}
    assert len(contents(tmp_path / "out")) == 4
