"""Building blocks of the HTML report."""

from __future__ import annotations

import io
import os
import re
import socket
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from fakes import Document, plain_calibration_error
from PIL import Image

from efficientnet_ns import report
from efficientnet_ns.report import truth as truth_lib

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
HOSTILE = "<script>alert('$x_{$')</script>"  # A script in HTML, a broken formula in Matplotlib.


def encoded(kind: str, size: tuple[int, int] = (8, 8), color: str = "teal") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, kind)
    return buffer.getvalue()


def plot_sizes(document: Document) -> list[tuple[int, int]]:
    """Returns CSS sizes of the plots and checks that each is a PNG of twice that size."""
    sizes = []
    for attributes, (head, data) in zip(document.attributes("img"), document.images()):
        size = int(attributes["width"]), int(attributes["height"])
        assert head == "data:image/png;base64" and data.startswith(PNG_MAGIC)
        with Image.open(io.BytesIO(data)) as image:
            assert np.abs(np.subtract(image.size, np.multiply(size, 2))).max() <= 1
        sizes.append(size)
    return sizes


def ink(document: Document, index: int = 0) -> dict[str, int]:
    """Counts the opaque pixels of a plot by color (#rrggbb)."""
    with Image.open(io.BytesIO(document.images()[index][1])) as image:
        pixels = np.asarray(image.convert("RGBA")).reshape(-1, 4)
    colors = pixels[pixels[:, 3] == 255].view(">u4")
    found, counts = np.unique(colors, return_counts=True)
    return {f"#{color >> 8:06x}": n for color, n in zip(found.tolist(), counts.tolist())}


def legend_colors(document: Document) -> list[str]:
    styles = [attributes["style"] for attributes in document.attributes("i")]
    return [style.split()[-1] for style in styles]


# Tables.


def test_table_values_columns_and_alignment():
    rows = [
        {"name": "teacher", "images": np.int64(50000), "top-1": 0.81234567, "kept": True},
        {"images": 1281167, "name": "student", "top-1": np.float32(0.9), "later": 3.2e-5},
    ]
    text = report.table(rows)
    document = Document(text)
    head, first, second = document.tables[0]
    assert head == ["name", "images", "top-1", "kept", "later"]
    assert first == ["teacher", "50000", "0.8123", "yes", "–"]
    assert second == ["student", "1281167", "0.9000", "–", "3.200e-05"]
    aligned = [attributes.get("class") for attributes in document.attributes("td")]
    right = "number"
    assert aligned == [None, right, right, None, right, None, right, right, None, right]
    heads = [attributes.get("class") for attributes in document.attributes("th")]
    assert heads == [None, right, right, None, right]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0.000"),
        (350.0, "350.0"),
        (999.99, "1000"),
        (12345.678, "12345.7"),
        (-2.5, "-2.500"),
        (1.5e9, "1.500e+09"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
        (np.bool_(False), "no"),
        (7, "7"),
    ],
)
def test_table_number_format(value, shown):
    assert Document(report.table([{"x": value}])).rows() == [{"x": shown}]


def test_table_escapes_and_highlights_the_last_row_only():
    rows = [{HOSTILE: 'a"b'}, {HOSTILE: HOSTILE}]
    text = report.table(rows, highlight_last=True)
    assert "<script" not in text
    document = Document(text)
    assert document.rows() == [{HOSTILE: 'a"b'}, {HOSTILE: HOSTILE}]
    classes = [attributes.get("class") for attributes in document.attributes("tr")]
    assert classes == [None, None, "highlight"]
    assert "highlight" not in report.table(rows)


# Curves.


def test_learning_curves_plots_lines_and_last_values():
    runs = {
        "teacher": [{"step": 0, "loss": 3.0}, {"step": 100, "accuracy": 0.5}],
        HOSTILE: [{"step": s, "loss": 2.0 - s / 200, "accuracy": s / 400} for s in (0, 100, 200)],
    }
    text = report.learning_curves(runs, metrics=["accuracy", "loss", "absent"])
    assert "<script" not in text
    document = Document(text)
    assert document.text("figcaption") == "accuracy loss"
    alts = [attributes["alt"] for attributes in document.attributes("img")]
    assert alts == [
        f"accuracy: teacher 0.5000 at step 100; {HOSTILE} 0.5000 at step 200",
        f"loss: teacher 3.000 at step 0; {HOSTILE} 1.000 at step 200",
    ]
    assert len(plot_sizes(document)) == 2
    assert document.text("span") == f"teacher {HOSTILE}"
    # Both runs use the legend's colors, even the one with a single point.
    assert len(set(legend_colors(document))) == 2
    assert set(legend_colors(document)) <= ink(document, 0).keys()


def test_learning_curves_connects_over_missing_values_and_breaks_at_nan():
    def length(values):
        rows = [{"step": i} if v is None else {"step": i, "m": v} for i, v in enumerate(values)]
        document = Document(report.learning_curves({"run": rows}, metrics=["m"]))
        return ink(document)[legend_colors(document)[0]]

    straight = length([0.0, 1.0, 2.0, 3.0, 4.0])
    assert length([0.0, 1.0, None, 3.0, 4.0]) == pytest.approx(straight, rel=0.02)
    assert length([0.0, 1.0, float("nan"), 3.0, 4.0]) < 0.7 * straight


def test_learning_curves_tells_many_runs_apart():
    runs = {f"run {i}": [{"step": 1, "m": i}] for i in range(20)}
    document = Document(report.learning_curves(runs, metrics=["m"]))
    assert len({attributes["style"] for attributes in document.attributes("i")}) == 20


def test_learning_curves_needs_steps():
    with pytest.raises(ValueError, match="runs"):
        report.learning_curves({"run": [{"loss": 1.0}]}, metrics=["loss"])


# Selection.


def test_confidence_histogram_counts():
    probs = np.array([0.1, 0.3, 0.5, 0.7, 0.9, 1.0], np.float32)
    kept = [False, False, False, False, False, True]
    document = Document(report.confidence_histogram(probs, kept, threshold=0.7))
    caption = document.text("figcaption")
    # 0.7 as a float32 is below the float64 0.7, but counts as at the threshold.
    assert [int(number) for number in re.findall(r"\d+", caption)] == [6, 1, 5, 2]
    assert document.text("span") == "kept rejected threshold 0.7"
    assert plot_sizes(document) == [(640, 280)]
    assert set(legend_colors(document)[:2]) <= ink(document).keys()


def test_confidence_histogram_draws_only_what_is_there():
    everything = Document(report.confidence_histogram([0.5, 0.6], [1, 1], threshold=0.0))
    kept, rejected, _ = legend_colors(everything)
    assert kept in ink(everything) and rejected not in ink(everything)


def test_class_balance_numbers_and_names():
    names = ["cat", HOSTILE, "$dollar$"]
    text = report.class_balance([10, 4, 0], [5, 2, 0], [0, 3, 0], names)
    assert "<script" not in text
    document = Document(text)
    assert document.rows() == [
        {"class": "cat", "predicted": "10", "kept": "5", "copies": "0", "total": "5"},
        {"class": HOSTILE, "predicted": "4", "kept": "2", "copies": "3", "total": "5"},
        {"class": "$dollar$", "predicted": "0", "kept": "0", "copies": "0", "total": "0"},
    ]
    assert re.findall(r"\d+", document.text("figcaption")) == ["14", "3", "7", "3"]
    assert set(legend_colors(document)) <= ink(document).keys()


def test_class_balance_stacks_copies_on_the_kept_images():
    document = Document(report.class_balance([10], [4], [6], ["cat"]))
    before, kept, copies = (ink(document)[color] for color in legend_colors(document))
    assert kept / (kept + copies) == pytest.approx(0.4, abs=0.02)
    assert kept + copies == pytest.approx(before, rel=0.02)


@pytest.mark.parametrize(("classes", "last"), [(60, "extra copies"), (61, "kept with copies")])
def test_class_balance_switches_from_bars_to_curves(classes, last):
    counts = np.arange(classes)
    names = [f"class {i}" for i in range(classes)]
    document = Document(report.class_balance(counts, counts, counts, names))
    assert document.text("span") == f"predicted kept {last}"
    assert len(document.rows()) == classes
    assert len(plot_sizes(document)) == 1


# Images.


def test_image_grid_inlines_the_original_bytes():
    tiny, photo = encoded("PNG"), encoded("JPEG", (300, 200))
    items = [(tiny, "tiny"), (photo, HOSTILE), (b"GIF89a", "unknown"), (b"", "empty")]
    text = report.image_grid(items, columns=3, pixel_size=40)
    assert "<script" not in text
    document = Document(text)
    assert document.images() == [
        ("data:image/png;base64", tiny),
        ("data:image/jpeg;base64", photo),
    ]
    assert document.text("figcaption") == f"tiny {HOSTILE} unknown empty"
    classes = [attributes.get("class") for attributes in document.attributes("img")]
    assert classes == ["pixelated", None]
    divisions = [attributes.get("class") for attributes in document.attributes("div")]
    assert divisions.count("placeholder") == 2
    grid = next(a for a in document.attributes("div") if a.get("class") == "grid")
    assert "repeat(3, minmax(40px, 60px))" in grid["style"]


def test_image_grid_survives_a_damaged_header():
    document = Document(report.image_grid([(PNG_MAGIC + b"garbage", "damaged")]))
    assert document.images() == [("data:image/png;base64", PNG_MAGIC + b"garbage")]


@pytest.mark.parametrize("name", ["columns", "pixel_size"])
def test_image_grid_rejects_sizes_below_one(name):
    with pytest.raises(ValueError, match=name):
        report.image_grid([(encoded("PNG"), "")], **{name: 0})


# Quality of pseudo-labels.


def test_confusion_counts():
    truth = [0, 0, 0, 1, 1, 2, -1, -1, -1]
    predicted = [0, 1, 1, 1, 0, 2, 2, 2, 2]
    text = report.confusion(truth, predicted, ["cat", HOSTILE, "dog"])
    assert "<script" not in text
    document = Document(text)
    assert document.rows() == [
        {"truth": "cat", "predicted": HOSTILE, "images": "2"},
        {"truth": HOSTILE, "predicted": "cat", "images": "1"},
    ]
    assert re.findall(r"\d+", document.text("figcaption")) == ["3", "6"]
    assert len(plot_sizes(document)) == 1


def test_confusion_of_many_classes_lists_the_worst():
    rng = np.random.default_rng(0)
    truth, predicted = rng.integers(0, 100, (2, 5000))
    document = Document(report.confusion(truth, predicted, [str(i) for i in range(100)]))
    pairs = Counter((str(t), str(p)) for t, p in zip(truth, predicted) if t != p)
    shown = [int(row["images"]) for row in document.rows()]
    assert shown == [count for _, count in pairs.most_common(10)]
    assert shown == [pairs[row["truth"], row["predicted"]] for row in document.rows()]


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_calibration_error_equals_the_definition(bins):
    rng = np.random.default_rng(bins)
    # Includes all bin edges and both ends.
    probs = np.concatenate([rng.random(300), np.arange(bins + 1) / bins])
    correct = rng.random(len(probs)) < probs**2
    expected = plain_calibration_error(correct.tolist(), probs.tolist(), bins)
    assert report.Calibration.tally(probs, correct, bins=bins).error == pytest.approx(
        expected, abs=1e-12
    )


def test_calibration_error_by_hand():
    def error(correct, probs, **options) -> float:
        return report.Calibration.tally(probs, correct, bins=2, **options).error

    # Bins of width 0.5: (0.2, 0.4) with accuracy 0.5 and (0.8, 0.9) with accuracy 1.
    assert error([1, 0, 1, 1], [0.2, 0.4, 0.8, 0.9]) == pytest.approx(0.5 * 0.2 + 0.5 * 0.15)
    assert error([True, True], [1.0, 1.0]) == 0.0
    # An edge belongs to the lower bin.
    assert error([1, 0], [0.5, 0.9]) == pytest.approx((0.5 + 0.9) / 2)
    assert error([1, 0], [0.5, 0.9], images=[3, 1]) == pytest.approx((3 * 0.5 + 0.9) / 4)
    assert np.isnan(error([], []))


def test_worst_confusions():
    truth, predicted = [0, 0, 1, 1, 2, 2, -1, 1], [0, 1, 1, 0, 2, 1, 0, 0]
    pairs = report.Confusion.tally(truth, predicted, [5, 2, 1, 6, 9, 1, 8, 1])
    assert list(zip(*pairs)) == [
        (-1, 0, 8), (0, 0, 5), (0, 1, 2), (1, 0, 7), (1, 1, 1), (2, 1, 1), (2, 2, 9)
    ]  # fmt: skip
    assert pairs.worst(20) == [(1, 0, 7), (0, 1, 2), (2, 1, 1)]
    assert pairs.worst(1) == [(1, 0, 7)]
    assert report.Confusion.tally([], []).worst(5) == []


def test_confusion_of_thousands_of_classes():
    """Memory does not grow with the square of the number of classes."""
    names = [str(i) for i in range(60_000)]
    truth, predicted = [59_999, 59_999, -1, 0], [59_998, 3, 59_999, 0]
    tracemalloc.start()
    document = Document(report.confusion(truth, predicted, names))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 400e6, "The matrix alone would take 29 GB."
    assert "covers 60 x 60 classes" in document.text("figcaption")
    assert [row["predicted"] for row in document.rows()] == ["3", "59998"]
    counts, together = truth_lib._cells(report.Confusion.tally(truth, predicted), 60_000)
    assert counts.shape == (1001, 1000) and together == 60
    assert {(r, c): counts[r, c] for r, c in np.argwhere(counts).tolist()} == {
        (0, 0): 1, (999, 0): 1, (999, 999): 1, (1000, 999): 1
    }  # fmt: skip


# Empty and invalid input.


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(lambda: report.table([]), id="table"),
        pytest.param(lambda: report.table([{}]), id="table of no columns"),
        pytest.param(lambda: report.learning_curves({}, metrics=["m"]), id="no runs"),
        pytest.param(lambda: report.learning_curves({"r": []}, metrics=["m"]), id="no rows"),
        pytest.param(
            lambda: report.learning_curves({"r": [{"step": 1}]}, metrics=[]), id="no metrics"
        ),
        pytest.param(lambda: report.confidence_histogram([], [], threshold=0.5), id="histogram"),
        pytest.param(lambda: report.class_balance([], [], [], []), id="balance"),
        pytest.param(lambda: report.image_grid([]), id="grid"),
        pytest.param(lambda: report.confusion([], [], ["cat"]), id="confusion"),
    ],
)
def test_empty_input_says_so(text):
    html = text()
    assert html == report.NOTHING
    assert "Nothing to show" in Document(html).text("p")


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("kept", lambda: report.confidence_histogram([0.5, 0.6], [True], threshold=0.5)),
        ("kept", lambda: report.confidence_histogram([0.5, 0.6], [5, 7], threshold=0.5)),
        ("probs", lambda: report.confidence_histogram([[0.5, 0.5]], [True], threshold=0.5)),
        ("probs", lambda: report.confidence_histogram([float("nan")], [True], threshold=0.5)),
        ("probs", lambda: report.confidence_histogram([1.5], [True], threshold=0.5)),
        ("threshold", lambda: report.confidence_histogram([0.5], [True], threshold=30)),
        ("before", lambda: report.class_balance([1], [1, 2], [1, 2], ["a", "b"])),
        ("unique", lambda: report.class_balance([1, 2], [1], [1, 2], ["a", "b"])),
        ("copies", lambda: report.class_balance([1, 2], [1, 2], [-1, 2], ["a", "b"])),
        ("copies", lambda: report.class_balance([1], [1], [0.5], ["a"])),
        ("predicted", lambda: report.confusion([0, 1], [0], ["a", "b"])),
        ("predicted", lambda: report.confusion([0], [2], ["a", "b"])),
        ("predicted", lambda: report.confusion([0], [-1], ["a", "b"])),
        ("truth", lambda: report.confusion([2], [0], ["a", "b"])),
        ("truth", lambda: report.confusion([-2], [0], ["a", "b"])),
    ],
)
def test_wrong_input_is_named(name, call):
    with pytest.raises(ValueError, match=f"^{name} "):
        call()


# The page.


def sections(count: int) -> list[report.Section]:
    return [report.Section(f"Part {i} {HOSTILE}", f"<p>Body {i}</p>") for i in range(count)]


def test_page_is_complete_and_self_contained(tmp_path):
    path = tmp_path / "new" / "report.html"
    parts = [
        report.Section("Curves", report.learning_curves({"r": [{"step": 1, "m": 2}]}, metrics="m")),
        report.Section("Images", report.image_grid([(encoded("PNG"), "käse")])),
        report.Section("Table", report.table([{"a": 1}], highlight_last=True)),
        report.Section("Nothing", ""),
    ]
    report.write_page(path, title=HOSTILE, intro=f"p < 0.3 {HOSTILE}\n\nNext", sections=parts)
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>")
    assert not re.search(r"https?://", text) and "<script" not in text
    document = Document(text)
    assert document.text("title") == document.text("h1") == HOSTILE
    assert document.text("h2") == "Curves Images Table Nothing"
    assert document.text("p").startswith(f"p < 0.3 {HOSTILE} Next")
    assert "käse" in document.text("figcaption")
    # Everything a browser could load is embedded in the file or an anchor in it.
    for _, attributes in document.elements:
        assert attributes.get("src", "data:").startswith("data:")
        assert attributes.get("href", "#").startswith("#")
    assert "url(" not in text and "@import" not in text
    assert "prefers-color-scheme: dark" in text and "tabular-nums" in text


@pytest.mark.parametrize(("count", "has_contents"), [(0, False), (3, False), (4, True)])
def test_contents_lead_to_every_section(tmp_path, count, has_contents):
    path = tmp_path / "report.html"
    report.write_page(path, title="T", intro="", sections=sections(count))
    document = Document(path.read_text(encoding="utf-8"))
    identifiers = [attributes["id"] for attributes in document.attributes("section")]
    assert len(set(identifiers)) == count
    targets = [attributes["href"] for attributes in document.attributes("a")]
    assert targets == ([f"#{identifier}" for identifier in identifiers] if has_contents else [])


def test_write_replaces_the_old_page_and_leaves_no_other_file(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    report.write_page(path, title="New", intro="", sections=[])
    assert Document(path.read_text(encoding="utf-8")).text("h1") == "New"
    assert os.listdir(tmp_path) == ["report.html"]


def test_failed_write_keeps_the_old_page(tmp_path, monkeypatch):
    import tensorflow as tf

    path = tmp_path / "report.html"
    path.write_text("old")
    renamed = []

    def fail(source, target, overwrite=False):
        renamed.append((source, target, overwrite))
        assert "</html>" in Path(source).read_text(encoding="utf-8")
        raise OSError("disk gone")

    monkeypatch.setattr(tf.io.gfile, "rename", fail)
    with pytest.raises(OSError, match="disk gone"):
        report.write_page(str(path), title="New", intro="", sections=[])
    ((source, *rest),) = renamed
    assert os.path.dirname(source) == str(tmp_path) and rest == [str(path), True]
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["report.html"]


def test_what_a_killed_writer_left_is_removed(tmp_path):
    killed = subprocess.Popen(["true"])
    killed.wait()
    leftover = f".tmp-{socket.gethostname()}-{killed.pid}-report.html"
    (tmp_path / leftover).write_text("half a page")
    report.write_page(tmp_path / "report.html", title="T", intro="", sections=[])
    assert os.listdir(tmp_path) == ["report.html"]


def test_write_to_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report.write_page("report.html", title="T", intro="", sections=[])
    assert os.listdir(tmp_path) == ["report.html"]


def test_import_is_cheap_and_plots_leave_pyplot_alone():
    code = (
        "import sys\n"
        "from efficientnet_ns import report\n"
        "assert not {'matplotlib', 'tensorflow', 'PIL'} & set(sys.modules)\n"
        "report.confidence_histogram([0.5], [True], threshold=0.5)\n"
        "assert not {'matplotlib.pyplot', 'tensorflow'} & set(sys.modules)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
