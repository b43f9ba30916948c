"""Human decisions: a sheet driven in a browser, and the effect on the selection."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from unlabeled_sets import png, selection_in, write_index, write_shards

from efficientnet_ns import report
from efficientnet_ns.config import FilterConfig, ReportConfig, SelectConfig
from efficientnet_ns.files import manifests, tfexamples, tfrecords
from efficientnet_ns.files.errors import DataError
from efficientnet_ns.loop import labeling
from efficientnet_ns.outcomes import outcome
from efficientnet_ns.pseudo_labels import index

IMAGES, CLASSES, WORKERS = 30, 3, 2
NAMES = ["ant", "bee", "</script><b>cat"]


@pytest.fixture
def folder(tmp_path, rng) -> Path:
    """One shard, predicted by two workers; image i has label i mod 3."""
    records = [tfexamples.unlabeled_example(png(rng)) for _ in range(IMAGES)]
    write_shards(tmp_path / "records", [records])
    (tmp_path / "predictions").mkdir()
    labels = np.arange(IMAGES) % CLASSES
    sure = rng.uniform(0.6, 0.9, IMAGES).astype(np.float32)
    probs = np.repeat((1 - sure[:, None]) / 2, CLASSES, 1)
    probs[np.arange(IMAGES), labels] = sure
    for worker in range(WORKERS):
        name = str(tmp_path / "predictions" / f"%s-00000-of-00001-{worker:05d}%s")
        own = slice(worker, None, WORKERS)
        examples = tfexamples.prediction_examples(probs[own].astype(np.float32))
        tfrecords.write(name % ("train-info", ""), examples)
        write_index(name % ("index", ".parquet"), 0, worker, labels[own], sure[own])
    return tmp_path


def decisions(folder: Path, changes: dict[int, int | None]) -> str:
    file = str(folder / "records" / "extra-00000-of-00001")
    rows = [{"file": file, "record": r, "label": label} for r, label in changes.items()]
    (folder / "review.json").write_text(json.dumps({"decisions": rows}))
    return str(folder / "review.json")


def selecting(folder: Path, **values) -> SelectConfig:
    return selection_in(
        folder,
        num_label_classes=CLASSES,
        min_threshold=0.5,
        **{"num_image": 6, **values},
    )


def test_decisions_are_honored(folder):
    """Rejected images are removed; corrected and confirmed ones come first, with certain labels."""
    changes = {0: None, 1: None, 4: 2, 7: 1, 9: 0}
    labeling.select_and_write(
        selecting(folder, reviewed=decisions(folder, changes)), FilterConfig()
    )
    rows = pyarrow.parquet.read_table(folder / "selected" / "selection.parquet").to_pylist()
    kept = {row["position"] * WORKERS + row["worker"]: row for row in rows}
    assert len(rows) == 6 * CLASSES and not {0, 1} & set(kept)
    for record, label in ((4, 2), (7, 1), (9, 0)):
        assert (kept[record]["label"], kept[record]["prob"]) == (label, 1)
    written = {}
    for record in tfrecords.read(str(folder / "selected/data/train-0-00000-of-00001")):
        image = tfexamples.image_bytes(record.payload)
        written[image] = (
            tfexamples.label(record.payload),
            tfexamples.probabilities(record.payload),
        )
    source = list(tfrecords.read(str(folder / "records" / "extra-00000-of-00001")))
    label, probs = written[tfexamples.image_bytes(source[4].payload)]
    assert label == 2 and probs.tolist() == [0, 0, 1]
    untouched = min(set(kept) - set(changes))
    label, probs = written[tfexamples.image_bytes(source[untouched].payload)]
    assert label == untouched % 3 and probs.max() == np.float32(kept[untouched]["prob"]) < 1


def test_a_review_and_a_list_together(folder):
    """The human decision takes precedence."""
    file = folder / "records" / "extra-00000-of-00001"
    (folder / "list.csv").write_text(f"file,record\n{file},3\n{file},6\n")
    config = selecting(
        folder, reviewed=decisions(folder, {3: 1}), exclude=str(folder / "list.csv"), use_all=True
    )
    assert labeling.select_and_write(config, FilterConfig())["unique"] == IMAGES - 1
    one = dataclasses.replace(config, file_prefix="extra", num_shards=1)
    ((records, labels),) = index.decisions(one).values()
    assert (records.tolist(), labels.tolist()) == ([3, 6], [1, -1])
    assert (records.dtype, labels.dtype) == (np.int64, np.int32)


def test_histogram_of_confidence_counts_reviewed_images_by_their_predictions(folder):
    config = selecting(folder, reviewed=decisions(folder, {4: 2, 7: 1, 9: 0}), num_shards=1)
    labeling.select_and_write(config, FilterConfig())
    bins = outcome.Outcome(config).confidence(20)
    assert bins["images"].min() >= 0 and bins["images"].sum() == IMAGES
    assert bins["images"][bins["kept"]].sum() == 6 * CLASSES
    assert bins["prob"].max() < 1  # In the selection, decided images have the probability 1.


def test_sheets_show_the_names_of_a_file(folder):
    (folder / "names").write_text("\n".join(NAMES))
    labeling.select_and_write(selecting(folder), FilterConfig())
    options = ReportConfig(review_images=2, label_next=3, class_names=str(folder / "names"))
    _, review, listed, _ = labeling.report(selecting(folder), options)
    assert '"bee"' in Path(review).read_text()
    with open(listed) as f:
        assert {row["label"] for row in csv.DictReader(f)} <= set(NAMES)


def test_reviewed_labels_are_kept_above_the_highest_probability(folder):
    """They have probability 1; predictions above --max_prob are still left out."""
    changes = dict.fromkeys(range(0, IMAGES, 3), 0)  # All images of class 0.
    for rule in ("exact", "threshold"):
        config = selecting(
            folder, reviewed=decisions(folder, changes), max_prob=0.75, selection=rule
        )
        config = dataclasses.replace(config, output_dir=str(folder / rule))
        labeling.select_and_write(config, FilterConfig())
        rows = pyarrow.parquet.read_table(folder / rule / "selection.parquet").to_pylist()
        certain = [row for row in rows if row["prob"] == 1]
        assert {row["label"] for row in certain} == {0} and certain
        assert {row["label"] for row in rows} == {0, 1, 2}
        assert all(row["prob"] <= 0.75 for row in rows if row not in certain)
        if rule == "exact":
            assert len(certain) == 6  # They are first, so they fill --num_image.


def test_confirmed_labels_come_before_more_predictions(folder):
    """They fill the class together with the most confident predictions below --max_prob."""
    changes = {0: 0, 3: 0}
    settings = {"max_prob": 0.75, "num_image": 3, "num_shards": 1}
    config = selecting(folder, reviewed=decisions(folder, changes), **settings)
    labeling.select_and_write(config, FilterConfig())
    rows = pyarrow.parquet.read_table(folder / "selected" / "selection.parquet").to_pylist()
    own = {
        row["position"] * WORKERS + row["worker"]: row["prob"] for row in rows if not row["label"]
    }
    assert len(own) == 3 and own.pop(0) == own.pop(3) == 1
    predicted = outcome.Outcome(config).pictures(
        kept=False, order="most", limit=IMAGES, shards=1, labels=[0]
    )
    ((_, prob),) = own.items()
    assert prob <= 0.75 and all(one.prob < prob or one.prob > 0.75 for one in predicted)


def test_later_reviews_take_precedence(folder):
    file = str(folder / "records" / "extra-00000-of-00001")
    (folder / "list.csv").write_text(f"file,record\n{file},1\n{file},3\n{file},6\n")
    first = Path(decisions(folder, {0: None, 3: 1, 4: 2})).rename(folder / "first.json")
    second = decisions(folder, {4: 0, 8: None})
    config = selecting(
        folder, reviewed=f"{first};{second}", exclude=str(folder / "list.csv"), use_all=True
    )
    labeling.select_and_write(config, FilterConfig())
    rows = pyarrow.parquet.read_table(folder / "selected" / "selection.parquet").to_pylist()
    kept = {row["position"] * WORKERS + row["worker"]: row for row in rows}
    assert set(range(IMAGES)) - set(kept) == {0, 1, 6, 8}
    assert {r: row["label"] for r, row in kept.items() if row["prob"] == 1} == {3: 1, 4: 0}
    written = list(tfrecords.read(str(folder / "selected/data/train-0-00000-of-00001")))
    labels = [one for one in written if tfexamples.probabilities(one.payload).max() == 1]
    assert sorted(tfexamples.label(one.payload) for one in labels) == [0, 1]
    # The selection belongs to both files.
    with pytest.raises(manifests.OutputConflict):
        labeling.select_and_write(dataclasses.replace(config, reviewed=second), FilterConfig())


def in_one_shard(folder: Path, reviewed: str) -> SelectConfig:
    return selecting(folder, reviewed=reviewed, file_prefix="extra", num_shards=1)


def test_every_file_must_be_about_the_set(folder):
    good = Path(decisions(folder, {0: None})).rename(folder / "good.json")
    for other, problem in (
        ("absent.json", "absent.json: the file does not exist"),
        ("moved.json", "moved.json has no decisions about the set"),
    ):
        moved = {"decisions": [{"file": "/elsewhere", "record": 0, "label": 1}]}
        (folder / "moved.json").write_text(json.dumps(moved))
        with pytest.raises(DataError, match=problem):
            index.decisions(in_one_shard(folder, f"{good};{folder / other}"))


@pytest.mark.parametrize("label", [3, -1, "ant", 1.5, True])
def test_labels_out_of_range_are_refused(folder, label):
    config = selecting(folder, reviewed=decisions(folder, {3: label}))
    with pytest.raises(DataError, match="decision 0: .* a label of 0..2 or null"):
        labeling.select_and_write(config, FilterConfig())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"file": 7}, "decision 1: expected a file"),
        ({"record": -5}, "decision 1: .* a record from 0"),
        ({"record": 2.0}, "decision 1: .* a record from 0"),
        ({"record": 10**30}, "decision 1: .* a record from 0"),
        (None, "review.json: expected a list of decisions, not int"),
    ],
)
def test_decisions_of_another_form_are_refused(folder, changed, message):
    path = Path(decisions(folder, {3: 1, 4: 1}))
    content = json.loads(path.read_text())
    if changed is None:
        content["decisions"] = 5
    else:
        content["decisions"][1].update(changed)
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        index.decisions(in_one_shard(folder, str(path)))


def test_sheet_of_a_run(folder):
    (folder / "names").write_text("\n".join(NAMES))
    labeling.select_and_write(selecting(folder), FilterConfig())
    path, review = labeling.report(selecting(folder), ReportConfig(review_images=2))
    assert Path(path).name == "report.html"
    page = Path(review).read_text()
    assert page.count("data:image/png") == 2 * CLASSES


def sheet(folder: Path, *, title: str = "Review", label: int = 0) -> str:
    image = report.ReviewImage(b"", "/extra-00000-of-00001", 3, label, 0.5)
    report.write_review(str(folder / "review.html"), [image], NAMES, title)
    content = (folder / "review.html").read_text()
    return json.loads(content.split('type="application/json">')[1].split("</script>")[0])["key"]


def test_decisions_are_stored_for_this_sheet_only(tmp_path):
    keys = [sheet(tmp_path), sheet(tmp_path, title="Label next"), sheet(tmp_path, label=1)]
    assert len(set(keys)) == 3 and sheet(tmp_path) == keys[0]


DRIVER = """
<script>
window.addEventListener("load", () => {
  const cards = [...document.querySelectorAll("figure")];
  const press = (card, text) =>
    [...card.querySelectorAll("button")].find((b) => b.textContent === text).click();
  press(cards[0], "Confirm");
  const chosen = cards[1].querySelector("select");
  const options = [chosen.length];
  chosen.dispatchEvent(new Event("pointerdown"));
  options.push(chosen.length);
  document.body.setAttribute("data-options", options);
  chosen.value = "2";
  chosen.dispatchEvent(new Event("change"));
  press(cards[2], "Reject");
  press(cards[3], "Reject");
  press(cards[3], "Reject");
  URL.createObjectURL = (blob) => {
    blob.text().then((text) => {
      document.body.setAttribute("data-saved", text);
    });
    return "#";
  };
  document.getElementById("save").click();
});
</script>
"""


# What a browser does that stores nothing, and one that has stored decisions.
NO_STORAGE = """
<script>
Object.defineProperty(window, "localStorage", { get() { throw new Error("denied"); } });
</script>
"""
STORED = """
<script>
const kept = { "KEY": "[[0,0],[1,2],[2,null]]" };
const storage = { getItem: (key) => kept[key] ?? null, setItem() {} };
Object.defineProperty(window, "localStorage", { get: () => storage });
window.addEventListener("load", () => {
  URL.createObjectURL = (blob) => {
    blob.text().then((text) => { document.body.setAttribute("data-saved", text); });
    return "#";
  };
  document.getElementById("save").click();
});
</script>
"""


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium")
@pytest.mark.parametrize("script", [DRIVER, NO_STORAGE + DRIVER, STORED])
def test_sheet_in_a_browser(folder, rng, script):
    """Confirms, corrects, rejects and undoes, or restores; `filter_unlabel` reads what is saved."""
    file = str(folder / "records" / "extra-00000-of-00001")
    images = [report.ReviewImage(png(rng, 32, 48), file, i, i % CLASSES, 0.5) for i in range(5)]
    path = folder / "review.html"
    report.write_review(str(path), images, NAMES)
    page = path.read_text()
    key = page.split('{"key": "')[1].split('"')[0]
    path.write_text(page.replace("<main>", script.replace("KEY", key) + "<main>"))
    browser = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={folder}/profile",
    ]
    done = subprocess.run(
        [*browser, "--virtual-time-budget=5000", "--dump-dom", f"file://{path}"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    states = [s.split('"')[1] for s in done.stdout.split("data-state=")[1:] if s[0] == '"']
    assert [s for s in states if s in ("confirmed", "corrected", "rejected")][-3:] == [
        "confirmed",
        "corrected",
        "rejected",
    ]
    if "data-options" in script:
        assert f'data-options="1,{CLASSES}"' in done.stdout
    saved = done.stdout.split('data-saved="')[1].split('"></')[0].split('">')[0]
    decided = json.loads(saved.replace("&quot;", '"').replace("&nbsp;", " "))["decisions"]
    assert [(d["record"], d["label"]) for d in decided] == [(0, 0), (1, 2), (2, None)]
    (folder / "review.json").write_text(json.dumps({"decisions": decided}))
    config = selecting(folder, reviewed=str(folder / "review.json"), use_all=True)
    assert labeling.select_and_write(config, FilterConfig())["unique"] == IMAGES - 1
