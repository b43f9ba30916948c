"""Compares the report of a labeling run with a plain reading of the same files."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import forks
import numpy as np
import pytest
from fakes import Document, load_outcome, plain_calibration_error
from PIL import Image

from efficientnet_ns import report
from efficientnet_ns.config import ConfigError, ReportConfig, SelectConfig, mark_given
from efficientnet_ns.files import tfexamples, tfrecords
from efficientnet_ns.files.errors import DataError
from efficientnet_ns.outcomes import labeling_report, outcome
from efficientnet_ns.outcomes.outcome import Outcome
from efficientnet_ns.pseudo_labels import index
from efficientnet_ns.pseudo_labels.selection import select

ROOT = Path(__file__).parents[2]
SHARDS, WORKERS, CLASSES, IMAGES = 3, 2, 5, 41
THRESHOLD, NUM_IMAGE = 0.5, 9


def picture(number: int) -> bytes:
    """Returns a PNG whose pixels encode the number of the image."""
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2), (number % 256, number // 256, 7)).save(buffer, "PNG")
    return buffer.getvalue()


class Run(NamedTuple):
    """A labeled and selected set; arrays cover all images, ordered by shard and record."""

    config: SelectConfig
    label: np.ndarray
    prob: np.ndarray
    kept: np.ndarray
    copies: np.ndarray
    truth: np.ndarray


def predict(config: SelectConfig, probs: np.ndarray, workers: int) -> None:
    for shard in range(SHARDS):
        for worker in range(workers):
            rows = probs[shard, worker::workers]
            path = index.prediction_path(config, shard, worker)
            tfrecords.write(path, tfexamples.prediction_examples(np.asarray(rows, np.float32)))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """Class 4 is never predicted; image 3 of shard 1 could not be labeled."""
    folder = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(5)
    probs = rng.dirichlet([0.6] * CLASSES, (SHARDS, IMAGES)).astype(np.float32)
    probs[..., 4] = 0
    probs[1, 3] = 0
    config = SelectConfig(
        unlabel_data_dir=str(folder),
        prediction_dir=str(folder / "predictions"),
        prelim_stats_dir=str(folder / "stats"),
        output_dir=str(folder / "out"),
        num_shards=SHARDS,
        num_label_classes=CLASSES,
        min_threshold=THRESHOLD,
        num_image=NUM_IMAGE,
    )
    (folder / "predictions").mkdir()
    predict(config, probs, WORKERS)
    truth = rng.integers(-1, CLASSES, (SHARDS, IMAGES))
    for shard in range(SHARDS):
        images = [picture(100 * shard + i) for i in range(IMAGES)]
        tfrecords.write(
            index.input_path(config, shard),
            [tfexamples.labeled_example(image, int(t)) for image, t in zip(images, truth[shard])],
        )
    select(config)
    outcome = load_outcome(config)
    columns = {name: np.asarray(outcome[name]) for name in ("label", "prob", "copies")}
    return Run(config, columns["label"], columns["prob"], columns["copies"] > 0,
               columns["copies"], truth.ravel())  # fmt: skip


def section(run: Run, title: str, truth=None, **options) -> Document:
    sections = labeling_report.sections(run.config, ReportConfig(**options), truth=truth)
    return Document(dict(sections)[title])


def test_sections_with_and_without_what_is_not_always_there(run):
    titles = [title for title, _ in labeling_report.sections(run.config)]
    assert titles == [
        "summary",
        "confidence of the pseudo labels",
        "confidence by class",
        "class balance before and after",
        "worst and best covered classes",
        "most confident images kept",
        "least confident images kept",
        "images rejected",
        "pictures by class",
        "records in quarantine",
    ]
    options = ReportConfig(truth=outcome.RECORDS, previous_prediction_dir=run.config.prediction_dir)
    more = {title for title, _ in labeling_report.sections(run.config, options)} - set(titles)
    assert more == {"pseudo labels against the hidden truth", "agreement with the round before"}


def test_summary(run):
    shown = section(run, "summary")
    confident = (run.prob >= THRESHOLD) & (run.label >= 0)
    assert [int(row["images"]) for row in shown.rows()] == [
        SHARDS * IMAGES,
        1,
        confident.sum(),
        run.kept.sum(),
        run.copies.sum(),
    ]
    assert "1 of 5 classes have no image kept: 4" in shown.text("p")


def test_confidence_counts_every_labeled_image_once(run):
    columns = Outcome(run.config).confidence(40)
    for kept in (True, False):
        probs = run.prob[(run.kept == kept) & (run.label >= 0)]
        inside = columns["kept"] == kept
        found, _ = np.histogram(columns["prob"], 40, (0, 1), weights=columns["images"] * inside)
        assert found.tolist() == np.histogram(probs, 40, (0, 1))[0].tolist()
        above = inside & (columns["prob"] >= THRESHOLD)
        assert columns["images"][above].sum() == (probs >= THRESHOLD).sum()


def test_classes(run):
    columns = Outcome(run.config).classes()
    for label in range(CLASSES):
        own = run.label == label
        assert columns["predicted"][label] == own.sum()
        assert columns["confident"][label] == (own & (run.prob >= THRESHOLD)).sum()
        assert columns["kept"][label] == (own & run.kept).sum()
        assert columns["records"][label] == run.copies[own].sum()
        if own.any():
            low, median, high = columns["quantiles"][label]
            expected = np.quantile(run.prob[own], [0.1, 0.5, 0.9])
            assert [low, median, high] == pytest.approx(expected.tolist(), abs=0.05)
            assert columns["lowest"][label] == run.prob[own & run.kept].min()
        else:
            assert np.isnan(columns["quantiles"][label]).all()


def test_coverage_is_in_order(run):
    shown = section(run, "worst and best covered classes", report_classes=2)
    confident = [((run.label == c) & (run.prob >= THRESHOLD)).sum() for c in range(CLASSES - 1)]
    worst, best = ([row["class"] for row in shown.rows(i)] for i in (0, 1))
    assert worst == [str(c) for c in np.argsort(confident, kind="stable")[:2]]
    assert confident[int(best[0])] == max(confident)


@pytest.mark.parametrize("source", ["lists", "records", "csv"])
def test_truth(run, source, tmp_path):
    by_shard = run.truth.reshape(SHARDS, IMAGES)
    truth = {
        "lists": by_shard.tolist(),
        "records": outcome.RECORDS,
        "csv": str(tmp_path / "t.csv"),
    }
    lines = [f"{s},{r},{by_shard[s, r]}" for s in range(SHARDS) for r in range(IMAGES)]
    (tmp_path / "t.csv").write_text("\n".join(["shard,record,label", *reversed(lines)]))
    shown = section(run, "pseudo labels against the hidden truth", truth=truth[source])
    labeled = run.label >= 0
    for row, group in zip(shown.rows(0), (labeled, run.kept, labeled & ~run.kept)):
        known = group & (run.truth >= 0)
        assert int(row["images"]) == group.sum()
        assert int(row["of known class"]) == known.sum()
        assert int(row["correct"]) == (run.truth == run.label)[known].sum()
        assert int(row["out of distribution"]) == (group & ~known & labeled).sum()
    known = labeled & (run.truth >= 0)
    error = plain_calibration_error(
        (run.truth == run.label)[known].tolist(), run.prob[known].tolist(), 15
    )
    assert f"error {error:.4f} (15 bins, {known.sum()} images)" in shown.text("figcaption")
    right = (run.kept & (run.truth == run.label)).sum()
    assert f"{right} of {(run.kept & (run.truth >= 0)).sum()} images" in shown.text("figcaption")


def test_truth_of_one_shard_keeps_its_number(run):
    one = dataclasses.replace(run.config, debug=1, shard_id=1)
    table = outcome.read_truth(one, outcome.RECORDS).to_pydict()
    assert table["shard"] == [1] * IMAGES and table["record"] == list(range(IMAGES))
    assert table["label"] == run.truth.reshape(SHARDS, IMAGES)[1].tolist()


def test_agreement_of_rounds_with_other_numbers_of_workers(run, tmp_path):
    rng = np.random.default_rng(9)
    probs = rng.dirichlet([0.6] * CLASSES, (SHARDS, IMAGES)).astype(np.float32)
    before = probs.argmax(-1).ravel()
    predict(dataclasses.replace(run.config, prediction_dir=str(tmp_path)), probs, 3)
    shown = section(run, "agreement with the round before", previous_prediction_dir=str(tmp_path))
    labeled = run.label >= 0
    same = before == run.label
    assert f"{(same & labeled).sum()} of {labeled.sum()} labels are equal" in shown.text(
        "figcaption"
    )
    kept, rejected = shown.rows(0)
    for row, group in ((kept, run.kept), (rejected, labeled & ~run.kept)):
        assert int(row["labeled in both rounds"]) == group.sum()
        assert int(row["equal labels"]) == (same & group).sum()
    pairs = Counter(zip(before[labeled & ~same].tolist(), run.label[labeled & ~same].tolist()))
    top = [(int(r["before"]), int(r["now"]), int(r["images"])) for r in shown.rows(1)]
    assert [n for *_, n in top] == [n for _, n in pairs.most_common(10)]
    assert all(pairs[a, b] == n for a, b, n in top)


def numbers(shown: Document) -> list[int]:
    """Returns the numbers of the shown images across all shards."""
    result = []
    for _, data in shown.images():
        red, green, _ = Image.open(io.BytesIO(data)).getpixel((0, 0))
        shard, record = divmod(red + 256 * green, 100)
        result.append(shard * IMAGES + record)
    return result


def by_prob(run: Run, mask: np.ndarray, sign: int) -> list[int]:
    return sorted(np.flatnonzero(mask).tolist(), key=lambda i: (sign * run.prob[i], i))


def test_pictures_are_the_extreme_ones(run):
    labeled = run.label >= 0
    for title, mask, sign in (
        ("most confident images kept", run.kept, -1),
        ("least confident images kept", run.kept, 1),
        ("images rejected", labeled & ~run.kept, -1),
    ):
        shown = section(run, title)
        expected = by_prob(run, mask, sign)[:36]
        assert numbers(shown) == expected
        captions = [f"{run.label[i]} {run.prob[i]:.2f}" for i in expected]
        assert shown.text("figcaption") == " ".join(captions)


def test_pictures_by_class(run):
    shown = section(run, "pictures by class")
    confident = [((run.label == c) & (run.prob >= THRESHOLD)).sum() for c in range(CLASSES - 1)]
    order = np.argsort(confident, kind="stable")
    expected = []
    for label in order:
        own = run.label == label
        expected += by_prob(run, own & run.kept, -1)[:8]
        expected += by_prob(run, own & run.kept, 1)[:8]
        expected += by_prob(run, own & ~run.kept, -1)[:8]
    assert numbers(shown) == expected
    assert re.findall(r"(\d+): \d+ images kept", shown.text("summary")) == [str(c) for c in order]


def test_pictures_of_some_shards_and_classes(run):
    shown = section(run, "pictures by class", report_shards=1, report_classes=1)
    assert "Pictures are taken from 1 of 3 shards." in shown.text("p")
    assert max(numbers(shown)) < IMAGES
    assert len(shown.attributes("details")) == 3
    everything = section(run, "images rejected", report_shards=1)
    assert max(numbers(everything)) < IMAGES


def test_large_pictures_are_made_small_and_damaged_ones_show_a_placeholder(run, tmp_path, rng):
    config = dataclasses.replace(run.config, unlabel_data_dir=str(tmp_path), num_shards=1)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (300, 600, 3), np.uint8)).save(buffer, "JPEG")
    images = [buffer.getvalue(), b"\xff\xd8\xff" + rng.bytes(9000), picture(3)]
    tfrecords.write(index.input_path(config, 0), map(tfexamples.unlabeled_example, images))
    found = outcome.read_images(config, [(0, 2), (0, 0), (0, 1), (0, 7)])
    found = {place: report.thumbnail(image, 112) for place, image in found.items()}
    assert found[0, 2] == picture(3) and found[0, 1] == found[0, 7] == b""
    assert Image.open(io.BytesIO(found[0, 0])).size == (112, 56)


def test_quarantine(run, tmp_path):
    config = dataclasses.replace(
        run.config, prediction_dir=str(tmp_path), total_label_replicas=WORKERS
    )
    listed = {(0, 1): {"4": "damaged payload at byte 80"}, (2, 0): {"0": "x", "10": "x"}}
    for shard in range(SHARDS):
        for worker in range(WORKERS):
            path = index.prediction_path(config, shard, worker)
            Path(path).touch()
            counts = {"sizes": {}, "counts": {"quarantine": listed.get((shard, worker), {})},
                      "config": {"total_replicas": WORKERS}}  # fmt: skip
            Path(f"{path}.manifest.json").write_text(json.dumps(counts))
    Path(index.prediction_path(config, 1, 1) + ".manifest.json").unlink()
    found = outcome.read_quarantine(config, limit=2)
    assert found.reasons == {"damaged payload": 1, "x": 2}
    assert found.files == {"train-00000-of-00003": 1, "train-00002-of-00003": 2}
    assert found.unknown == [index.prediction_path(config, 1, 1) + ".manifest.json"]
    # Record 9 of the shard is the second worker's fifth.
    assert found.examples == [
        ("train-00000-of-00003", 9, "damaged payload at byte 80"),
        ("train-00002-of-00003", 0, "x"),
    ]


@pytest.mark.slow
def test_command(run, tmp_path):
    """The report is a single, self-contained file."""
    names = tmp_path / "names.txt"
    names.write_text("ant\nbee\ncat\n<dog>\nelk\n")
    flags = {
        **{
            name: getattr(run.config, name)
            for name in ("unlabel_data_dir", "prediction_dir", "output_dir")
        },
        "num_shards": SHARDS,
        "num_label_classes": CLASSES,
        "min_threshold": THRESHOLD,
        "class_names": names,
        "truth": "records",
        "previous_prediction_dir": run.config.prediction_dir,
    }
    arguments = [f"--{name}={value}" for name, value in flags.items()]
    done = forks.python("-m", "efficientnet_ns.labeling_report", *arguments)
    assert done.returncode == 0, done.stderr
    path = Path(run.config.output_dir) / "report.html"
    assert done.stdout.strip() == str(path)
    text = path.read_text(encoding="utf-8")
    shown = Document(text)
    assert len(shown.attributes("section")) == 12
    assert "<dog>" in shown.text("summary") and "<dog>" not in text
    for _, attributes in shown.elements:
        assert attributes.get("src", "data:").startswith("data:")


def test_settings_of_another_selection_are_refused(run):
    other = dataclasses.replace(run.config, num_image=NUM_IMAGE + 1, min_threshold=0.9)
    with pytest.raises(ConfigError, match=r"min_threshold: .* → 0.9, num_image: "):
        labeling_report.sections(other)


def test_a_default_that_is_given_is_no_other_setting_by_chance(run):
    """`--num_image=1300` is refused like any other number, although it is the default."""
    other = dataclasses.replace(run.config, num_image=SelectConfig().num_image)
    labeling_report.sections(other)
    mark_given(other, ["num_image"])
    with pytest.raises(ConfigError, match=rf"num_image: {NUM_IMAGE} → 1300\)"):
        labeling_report.sections(other)


def test_what_does_not_fit_is_named(run, tmp_path):
    with pytest.raises(ConfigError, match="2 class names for 5 classes"):
        labeling_report.sections(run.config, class_names=["a", "b"])
    (tmp_path / "t.csv").write_text("shard,record\n0,0\n")
    with pytest.raises(DataError, match="no column 'label'"):
        outcome.read_truth(run.config, str(tmp_path / "t.csv"))
    nowhere = dataclasses.replace(run.config, output_dir=str(tmp_path))
    with pytest.raises(DataError, match=r"selection\.parquet is missing"):
        labeling_report.sections(nowhere)
    unlabeled = dataclasses.replace(run.config, unlabel_data_dir=str(tmp_path), num_shards=1)
    tfrecords.write(index.input_path(unlabeled, 0), [tfexamples.unlabeled_example(b"x")])
    with pytest.raises(DataError, match="there is no truth to compare with"):
        outcome.read_truth(unlabeled, outcome.RECORDS)
