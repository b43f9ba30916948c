"""Human decisions: a sheet driven in a browser, and the effect on the selection."""

from __future__ import annotations

import csv
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
from efficientnet_ns.files import tfexamples, tfrecords
from efficientnet_ns.files.errors import DataError
from efficientnet_ns.loop import labeling
from efficientnet_ns.outcomes import outcome

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


@pytest.mark.parametrize("label", [3, -1, "ant"])
def test_labels_out_of_range_are_refused(folder, label):
    config = selecting(folder, reviewed=decisions(folder, {3: label}))
    with pytest.raises(DataError, match="decision 0: .* a label of 0..2 or null"):
        labeling.select_and_write(config, FilterConfig())


def test_sheet_of_a_run(folder):
    (folder / "names").write_text("\n".join(NAMES))
    labeling.select_and_write(selecting(folder), FilterConfig())
    path, review = labeling.report(selecting(folder), ReportConfig(review_images=2))
    assert Path(path).name == "report.html"
    page = Path(review).read_text()
    assert page.count("data:image/png") == 2 * CLASSES


DRIVER = """
<script>
window.addEventListener("load", () => {
  const cards = [...document.querySelectorAll("figure")];
  const press = (card, text) =>
    [...card.querySelectorAll("button")].find((b) => b.textContent === text).click();
  press(cards[0], "Confirm");
  const chosen = cards[1].querySelector("select");
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


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium")
def test_sheet_in_a_browser(folder, rng):
    """Confirms, corrects, rejects and undoes; `filter_unlabel` reads what is saved."""
    file = str(folder / "records" / "extra-00000-of-00001")
    images = [report.ReviewImage(png(rng, 32, 48), file, i, i % CLASSES, 0.5) for i in range(5)]
    path = folder / "review.html"
    report.write_review(str(path), images, NAMES)
    page = path.read_text().replace("</body>", DRIVER + "</body>")
    path.write_text(page)
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
    saved = done.stdout.split('data-saved="')[1].split('"></')[0].split('">')[0]
    decided = json.loads(saved.replace("&quot;", '"').replace("&nbsp;", " "))["decisions"]
    assert [(d["record"], d["label"]) for d in decided] == [(0, 0), (1, 2), (2, None)]
    (folder / "review.json").write_text(json.dumps({"decisions": decided}))
    config = selecting(folder, reviewed=str(folder / "review.json"), use_all=True)
    assert labeling.select_and_write(config, FilterConfig())["unique"] == IMAGES - 1
