"""Statistics, compared with the original, and exact top-K selection, compared with plain Python."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import shutil
import socket
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import tensorflow as tf
from fakes import load_outcome
from hypothesis import example, given, settings
from hypothesis import strategies as st
from unlabeled_sets import write_index

from efficientnet_ns.config import ConfigError, SelectConfig
from efficientnet_ns.files import (
    json_files,
    manifests,
    parquet_sql,
    shard_names,
    tfexamples,
    tfrecords,
)
from efficientnet_ns.files.errors import DataError
from efficientnet_ns.outcomes.outcome import Outcome
from efficientnet_ns.pseudo_labels import index, selection

CLASSES = 10


def config(folder: Path, **values) -> SelectConfig:
    """Returns settings of the goldens, with all folders below `folder`."""
    defaults = {
        "unlabel_data_dir": str(folder / "unlabeled"),
        "prediction_dir": str(folder / "predictions"),
        "prelim_stats_dir": str(folder / "statistics"),
        "output_dir": str(folder / "selected"),
        "file_prefix": "extra",
        "num_shards": 4,
        "num_label_classes": CLASSES,
        "min_threshold": 0.3,
        "num_image": 100,
    }
    return SelectConfig(**{**defaults, **values})


def draw_of(*numbers: int) -> int:
    """Returns the seeded draw of (seed, shard, worker, position): splitmix64 in Python integers."""
    state = 0
    for number in numbers:
        x = (state + number + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        state = x ^ (x >> 31)
    return state >> 1


def make_predictions(folder: Path, table: list[list[list[list[float]]]]) -> None:
    """Writes prediction records: probabilities by shard, worker and position."""
    (folder / "predictions").mkdir(parents=True)
    for shard, workers in enumerate(table):
        for worker, rows in enumerate(workers):
            name = shard_names.prediction_name(shard, len(table), worker)
            examples = tfexamples.prediction_examples(np.asarray(rows, np.float32))
            tfrecords.write(str(folder / "predictions" / name), examples)


def one_hot(label: int, prob: float) -> list[float]:
    """Returns probabilities with `prob` for `label`; the other classes share the rest."""
    row = np.full(CLASSES, (1 - prob) / (CLASSES - 1))
    row[label] = prob
    return row.tolist()


def read_selection(settings_: SelectConfig) -> dict[tuple[int, int, int], tuple[int, int]]:
    """Maps (shard, worker, position) to (label, copies), as written to disk."""
    table = pyarrow.parquet.read_table(f"{settings_.output_dir}/{selection.SELECTION}").to_pydict()
    keys = zip(table["shard"], table["worker"], table["position"])
    return dict(zip(keys, zip(table["label"], table["copies"])))


@pytest.fixture(scope="module")
def original(goldens, tmp_path_factory) -> SelectConfig:
    """The selection from the original's prediction records, which have no index."""
    folder = tmp_path_factory.mktemp("original")
    shutil.copytree(goldens / "filter_unlabel" / "predictions", folder / "predictions")
    result = config(folder)
    selection.select(result)
    return result


@pytest.fixture(scope="module")
def expected(goldens) -> dict:
    return json.loads((goldens / "filter_unlabel" / "expected.json").read_text())


def test_statistics_are_those_of_the_original(original, goldens):
    files = sorted((goldens / "filter_unlabel" / "prelim_stats").iterdir())
    assert len(files) == 6
    for path in files:
        ours = json.loads((Path(original.prelim_stats_dir) / path.name).read_text())
        assert ours == json.loads(path.read_text()), path.name


def test_index_is_built_from_the_predictions_of_the_original(original):
    for shard in range(original.num_shards):
        path = index.prediction_path(original, shard, 0)
        rows = [tfexamples.probabilities(record.payload) for record in tfrecords.read(path)]
        table = pyarrow.parquet.read_table(
            f"{original.prediction_dir}/{shard_names.index_name(shard, original.num_shards, 0)}"
        )
        assert table.column_names == ["shard", "worker", "position", "label", "prob"]
        columns = table.to_pydict()
        assert columns["shard"] == [shard] * 500
        assert columns["worker"] == [0] * 500
        assert columns["position"] == list(range(500))
        assert columns["label"] == [int(row.argmax()) for row in rows]
        assert columns["prob"] == [float(row.max()) for row in rows]


def test_selection_is_that_of_the_original_where_it_draws_nothing(original, expected):
    fixed = {int(c) for c, entry in expected["per_class"].items() if entry["deterministic"]}
    assert len(fixed) == 6
    ours: dict[int, dict[int, int]] = defaultdict(dict)
    for (shard, _, position), (label, copies) in read_selection(original).items():
        if label in fixed:
            ours[shard][position] = copies
    for entry in expected["shards"]:
        path = index.prediction_path(original, entry["shard"], 0)
        guesses = [tfexamples.label(record.payload) for record in tfrecords.read(path)]
        theirs = {int(i): n for i, n in entry["kept"].items() if guesses[int(i)] in fixed}
        assert ours[entry["shard"]] == theirs


def test_best_images_of_each_class(original, expected):
    """Selects the exact top of the original's candidates for each class."""
    result = selection.select(original)["classes"]
    for label, entry in expected["per_class"].items():
        lowest, images = result[label]
        assert images == min(entry["total_image"], original.num_image)
        assert lowest >= entry["threshold"]
    assert json.loads((Path(original.output_dir) / "threshold.json").read_text()) == result


def test_side_files(original):
    counts = selection.select(original)
    assert counts["available"] == 2000
    assert counts["records"] == 100 * CLASSES
    assert (
        counts["unique"]
        == len(read_selection(original))
        == sum(n for _, n in counts["classes"].values())
    )
    # The original's readers expect the misspelled key.
    side = json.loads((Path(original.output_dir) / "num_image_across_cat.json").read_text())
    assert side == {"num_image_acorss_cat": counts["unique"]}


def test_outcome_has_every_prediction_once(original):
    outcome = load_outcome(original)
    chosen = read_selection(original)
    places = list(zip(outcome["shard"].tolist(), outcome["record"].tolist()))
    assert places == [(shard, record) for shard in range(4) for record in range(500)]
    for (shard, record), copies in zip(places, outcome["copies"]):
        assert copies == chosen.get((shard, 0, record), (0, 0))[1]


def test_record_numbers_of_two_workers(tmp_path):
    """Worker w of 2 predicted records w, w + 2, …; the outcome is in record order."""
    probs = [0.31, 0.35, 0.41, 0.45, 0.51]
    workers = [[one_hot(1, p) for p in probs[worker::2]] for worker in (0, 1)]
    make_predictions(tmp_path, [workers])
    two = config(tmp_path, num_shards=1, num_image=2)
    selection.select(two)
    outcome = load_outcome(two)
    np.testing.assert_allclose(outcome["prob"], probs, rtol=1e-6)
    assert outcome["copies"].tolist() == [0, 0, 0, 1, 1]
    assert set(read_selection(two)) == {(0, 1, 1), (0, 0, 2)}


# --- Properties -----------------------------------------------------------------------------------


def reference_exact(rows, settings_: SelectConfig):
    """Returns the expected {class: {(shard, worker, position)}} and {class: sorted copies}."""
    classes = defaultdict(list)
    for shard, worker, position, label, prob in rows:
        if label >= 0 and settings_.min_threshold <= float(prob) <= settings_.max_prob:
            classes[label].append((-float(prob), shard, position, worker))
    kept, copies = {}, {}
    for label, candidates in classes.items():
        best = sorted(candidates)
        if not settings_.use_all:
            best = best[: settings_.num_image]
        if not best:
            continue
        kept[label] = {(shard, worker, position) for _, shard, position, worker in best}
        copies[label] = [1] * len(best)
        if settings_.upsample and not settings_.use_all:
            whole, rest = divmod(settings_.num_image, len(best))
            copies[label] = [whole] * (len(best) - rest) + [whole + 1] * rest
    return kept, copies


def reference_thresholds(rows, settings_: SelectConfig) -> dict[str, list]:
    """The original's rule: from the top, the first step with enough images."""
    result = {}
    for label in range(CLASSES):
        probs = np.array([float(row[4]) for row in rows if row[3] == label])
        steps = [k / 100 for k in range(101) if k / 100 >= settings_.min_threshold]
        steps = [step for step in steps if step < settings_.max_prob]
        # Images count up to the end of the last step, which is open if that step is 1.
        ceiling = (len(steps) + round(100 * settings_.min_threshold)) / 100
        counted = probs[probs < ceiling] if ceiling <= 1 else probs
        entry = [settings_.min_threshold, int((counted >= settings_.min_threshold).sum())]
        if settings_.use_top and not settings_.use_all:
            for step in reversed(steps):
                if (counted >= step).sum() >= settings_.num_image:
                    entry = [step, int((counted >= step).sum())]
                    break
        result[str(label)] = entry
    return result


# Few values, so that ties are common, and some exactly at or next to a threshold.
PROBS = [np.float32(p) for p in (0.0, 0.25, 0.29, 0.3, 0.5, 0.505, 0.75, 1.0, 1.0000001)]
PROBS += [
    np.nextafter(np.float32(0.3), np.float32(0)),
    np.nextafter(np.float32(0.5), np.float32(1)),
]


@st.composite
def indexes(draw):
    """Draws rows (shard, worker, position, label, prob) of up to 2 shards with 2 workers."""
    rows = []
    for shard in range(2):
        for worker in range(2):
            guesses = draw(
                st.lists(st.tuples(st.integers(-1, 3), st.sampled_from(PROBS)), max_size=8)
            )
            rows += [(shard, worker, i, label, prob) for i, (label, prob) in enumerate(guesses)]
    return rows


def write_indexes(folder: Path, rows) -> None:
    """Writes only the index; the prediction files are empty."""
    (folder / "predictions").mkdir()
    for shard in range(2):
        for worker in range(2):
            mine = [row for row in rows if row[:2] == (shard, worker)]
            labels, probs = (np.array([row[i] for row in mine]) for i in (3, 4))
            write_index(
                str(folder / "predictions" / shard_names.index_name(shard, 2, worker)),
                *(shard, worker, labels.astype(np.int32), probs.astype(np.float32)),
            )
            (folder / "predictions" / shard_names.prediction_name(shard, 2, worker)).touch()


def refused(settings_: SelectConfig) -> None:
    """Checks the error if nothing is kept or the bounds exclude each other."""
    crossed = settings_.min_threshold > settings_.max_prob
    with pytest.raises(ConfigError if crossed else DataError, match="--min_threshold"):
        selection.select(settings_)


TIE = [(0, 0, 0, 1, PROBS[4]), (0, 0, 1, 1, PROBS[4]), (0, 1, 0, 1, PROBS[4])]
SWITCHES = {
    "rows": indexes(),
    "num_image": st.integers(0, 9),
    "max_prob": st.sampled_from([2.0, 1.0, 0.75, 0.502]),
    "upsample": st.integers(0, 1),
    "use_all": st.booleans(),
    "seed": st.integers(0, 3),
}


@settings(max_examples=25, deadline=None)
@example(rows=TIE, num_image=2, threshold=0.0, max_prob=2.0, upsample=1, use_all=False, seed=0)
@given(threshold=st.sampled_from([0.0, 0.25, 0.3, float(np.float32(0.3)), 0.5, 1.0]), **SWITCHES)
def test_selection_is_exactly_the_top(rows, threshold, tmp_path_factory, **values):
    folder = tmp_path_factory.mktemp("property")
    write_indexes(folder, rows)
    settings_ = config(folder, num_shards=2, min_threshold=threshold, **values)
    kept, copies = reference_exact(rows, settings_)
    if not kept:
        refused(settings_)
        return
    result = selection.select(settings_)
    chosen = read_selection(settings_)
    assert list(chosen) == sorted(chosen)
    by_class: dict[int, dict] = defaultdict(dict)
    for key, (label, n) in chosen.items():
        by_class[label][key] = n
    assert {label: set(keys) for label, keys in by_class.items()} == kept
    assert {label: sorted(keys.values()) for label, keys in by_class.items()} == copies
    assert result["available"] == len(rows)
    assert result["records"] == sum(map(sum, copies.values()))
    # This hash alone decides which images of a class get one more copy.
    for label, keys in by_class.items():
        order = sorted(
            keys,
            key=lambda k: (draw_of(settings_.seed, *k), k[0], k[2], k[1]),
        )
        assert [keys[k] for k in order] == copies[label][::-1]


@settings(max_examples=25, deadline=None)
@given(threshold=st.sampled_from([0.0, 0.25, 0.3, 0.5]), use_top=st.integers(0, 1), **SWITCHES)
def test_thresholds_are_those_of_the_rule(rows, threshold, tmp_path_factory, **values):
    folder = tmp_path_factory.mktemp("property")
    write_indexes(folder, rows)
    settings_ = config(
        folder, num_shards=2, min_threshold=threshold, selection="threshold", **values
    )
    thresholds = reference_thresholds(rows, settings_)
    expected = {}
    for shard, worker, position, label, prob in rows:
        least, images = thresholds.get(str(label), (3, 0))
        if not least <= float(prob) <= settings_.max_prob:
            continue
        wanted = 1 if settings_.use_all else settings_.num_image / images if images else 0
        wanted = wanted if settings_.upsample else min(wanted, 1)
        draw = draw_of(settings_.seed, shard, worker, position) / 2**63
        if copies := int(wanted) + (draw < wanted - int(wanted)):
            expected[shard, worker, position] = (label, copies)
    if not expected:
        refused(settings_)
        return
    selection.select(settings_)
    assert json.loads((Path(settings_.output_dir) / "threshold.json").read_text()) == thresholds
    side = json.loads((Path(settings_.output_dir) / "num_image_across_cat.json").read_text())
    across = sum(min(n, settings_.num_image) for _, n in thresholds.values())
    assert side == {"num_image_acorss_cat": across}
    assert read_selection(settings_) == expected


def test_random_part_of_classes_with_enough(tmp_path):
    """With --use_top=0, the seed, not the confidence, chooses num_image images per class."""
    make_predictions(tmp_path, [[[one_hot(1, p) for p in np.linspace(0.4, 0.9, 40)]]])
    chosen = []
    for seed in (0, 1):
        output = str(tmp_path / f"seed-{seed}")
        settings_ = config(
            tmp_path, num_shards=1, num_image=10, use_top=0, seed=seed, output_dir=output
        )
        selection.select(settings_)
        chosen.append(read_selection(settings_))
        assert [n for _, n in chosen[-1].values()] == [1] * 10
        assert {p for _, _, p in chosen[-1]} != set(range(30, 40))
    assert chosen[0] != chosen[1]


@pytest.fixture(scope="module")
def by_threshold(goldens, tmp_path_factory) -> SelectConfig:
    folder = tmp_path_factory.mktemp("threshold")
    shutil.copytree(goldens / "filter_unlabel" / "predictions", folder / "predictions")
    (folder / "info").mkdir()
    for shard in range(4):
        (folder / "info" / shard_names.info_name(shard, 4, 0)).write_text('{"image_num": 500}')
    result = config(folder, selection="threshold", task=0, info_dir=str(folder / "info"))
    selection.select(result)
    return result


def test_threshold_mode_is_the_original(by_threshold, expected, goldens):
    """Thresholds, totals, candidates, and copies of classes without random draws."""
    output = Path(by_threshold.output_dir)
    for name in ("threshold.json", "num_image_across_cat.json"):
        theirs = json.loads((goldens / "filter_unlabel" / name).read_text())
        assert json.loads((output / name).read_text()) == theirs
    ours: dict[int, dict[int, tuple[int, int]]] = defaultdict(dict)
    for (shard, _, position), (label, copies) in read_selection(by_threshold).items():
        ours[shard][position] = (label, copies)
    classes = {int(c): entry for c, entry in expected["per_class"].items()}
    for entry in expected["shards"]:
        path = index.prediction_path(by_threshold, entry["shard"], 0)
        guesses = [tfexamples.label(record.payload) for record in tfrecords.read(path)]
        theirs = {int(i): (guesses[int(i)], n) for i, n in entry["kept"].items()}
        mine = ours[entry["shard"]]
        for label, rule in classes.items():
            my = {i: n for i, (c, n) in mine.items() if c == label}
            their = {i: n for i, (c, n) in theirs.items() if c == label}
            if rule["deterministic"]:
                assert my == their
            elif rule["include_copy"] > 1:
                # Every candidate is kept; only the extra copies are drawn.
                assert set(my) == set(their)
                assert len(my) == entry["candidates_per_label"][str(label)]
            assert set(my.values()) <= {int(rule["include_copy"]), int(rule["include_copy"]) + 1}


def test_info_that_does_not_fit(by_threshold, tmp_path):
    shutil.copytree(by_threshold.info_dir, tmp_path / "info")
    info = tmp_path / "info" / shard_names.info_name(2, 4, 0)
    other = dataclasses.replace(
        by_threshold, info_dir=str(tmp_path / "info"), output_dir=str(tmp_path / "out")
    )
    info.write_text('{"image_num": 499}')
    with pytest.raises(DataError, match="worker 0 predicted 500 records of shard 2, .* 499"):
        selection.select(other)
    info.unlink()
    with pytest.raises(DataError, match=f"{info} is missing"):
        selection.select(other)


def test_first_shards_alone(by_threshold, tmp_path, goldens):
    folder = {"prelim_stats_dir": str(tmp_path / "stats"), "output_dir": str(tmp_path / "out")}
    two = dataclasses.replace(by_threshold, only_use_num_shards=2, **folder)
    assert selection.select(two)["available"] == 1000
    assert {shard for shard, *_ in read_selection(two)} == {0, 1}
    stats = {path.name for path in (tmp_path / "stats").glob("prelim_stats_*")}
    assert stats == {"prelim_stats_00000_0.json", "prelim_stats_00001_0.json"}
    with pytest.raises(ConfigError, match="--only_use_num_shards=5"):
        selection.select(dataclasses.replace(two, only_use_num_shards=5))
    with pytest.raises(ConfigError, match="--shard_id=2 is not below the 2"):
        selection.select(dataclasses.replace(two, shard_id=2))


def test_tasks_have_statistics_of_their_workers(tmp_path):
    workers = [[one_hot(w, 0.6)] * (w + 1) for w in range(4)]
    make_predictions(tmp_path, [workers])
    settings_ = config(tmp_path, num_shards=1, num_image=3, total_replicas=2, task=1)
    result = selection.select(settings_)
    for task, counts in enumerate(({"0": 1, "1": 2}, {"2": 3, "3": 4})):
        path = Path(settings_.prelim_stats_dir) / f"prelim_stats_00000_{task}.json"
        table = json.loads(path.read_text())
        assert {c: sum(n for _, n in entries) for c, entries in table.items()} == counts
    assert selection.select(dataclasses.replace(settings_, task=0)) == result
    for values, message in (({"task": 2}, "--task=2"), ({"total_replicas": 3}, "--total_replicas")):
        with pytest.raises(ConfigError, match=message):
            selection.select(dataclasses.replace(settings_, **values))


def test_debug_is_one_worker_of_one_shard(tmp_path):
    rows = [one_hot(1, 0.6), one_hot(2, 0.7)]
    make_predictions(tmp_path, [[rows, rows], [rows, rows]])
    settings_ = config(tmp_path, num_shards=2, num_image=1, debug=1, shard_id=1)
    assert selection.select(settings_)["available"] == 2
    assert set(read_selection(settings_)) == {(1, 0, 0), (1, 0, 1)}


def test_threshold_mode_needs_a_step(small):
    odd = dataclasses.replace(small, selection="threshold", min_threshold=0.305)
    with pytest.raises(ConfigError, match="--min_threshold=0.305.*multiple of 0.01"):
        selection.select(odd)


@pytest.mark.slow
def test_indexes_are_built_by_processes(small, monkeypatch, tmp_path):
    index.index_files(small)
    built = sorted(Path(small.prediction_dir).glob("index-*"))
    content = [path.read_bytes() for path in built]
    for path in built:
        path.unlink()
    monkeypatch.setattr(index, "_BYTES_PER_PROCESS", 1)
    index.index_files(small)
    assert [path.read_bytes() for path in built] == content


def test_seed_decides_only_who_gets_the_extra_copy(goldens, tmp_path):
    shutil.copytree(goldens / "filter_unlabel" / "predictions", tmp_path / "predictions")
    outcomes = []
    for seed in (0, 0, 1):
        folder = tmp_path / f"run-{len(outcomes)}"
        settings_ = config(tmp_path, seed=seed, num_image=150, output_dir=str(folder))
        selection.select(settings_)
        outcomes.append(read_selection(settings_))
    first, again, other = outcomes
    assert first == again
    assert {key: label for key, (label, _) in first.items()} == {
        key: label for key, (label, _) in other.items()
    }
    per_class = [
        {
            label: Counter(copies for guess, copies in outcome.values() if guess == label)
            for label in range(CLASSES)
        }
        for outcome in (first, other)
    ]
    assert per_class[0] == per_class[1]
    assert first != other


def test_statistics_of_every_bin_edge(tmp_path):
    """Probabilities at k / 100 and just below, in float64 bins."""
    probs = np.float32([k / 100 for k in range(12, 101)])
    probs = np.concatenate([probs, np.nextafter(probs, np.float32(0))])
    make_predictions(tmp_path, [[[one_hot(3, float(p)) for p in probs]]])
    settings_ = config(tmp_path, num_shards=1, only_get_stats=1)
    assert selection.select(settings_) == {"available": len(probs)}
    table = json.loads((Path(settings_.prelim_stats_dir) / "prelim_stats_00000_0.json").read_text())
    edges = [k / 100 for k in range(101)]
    bins = np.searchsorted(edges, probs.astype(np.float64), side="right") - 1
    assert table == {"3": [[t, int(n)] for t, n in zip(edges, np.bincount(bins, minlength=101))]}
    assert not Path(settings_.output_dir).exists()


# --- Refusals -------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path) -> SelectConfig:
    """Two shards by one worker, with a few records."""
    rows = [one_hot(label, 0.6) for label in (0, 1, 1, 2)]
    make_predictions(tmp_path, [[rows], [rows]])
    return config(tmp_path, num_shards=2, num_image=3)


def test_missing_prediction_file_is_named(small):
    missing = index.prediction_path(small, 1, 0)
    Path(missing).unlink()
    with pytest.raises(DataError, match=missing):
        selection.select(small)
    assert not Path(small.output_dir).exists()


def test_missing_prediction_of_a_second_worker_is_named(small):
    source = Path(index.prediction_path(small, 0, 0))
    shutil.copy(source, index.prediction_path(small, 0, 1))
    with pytest.raises(DataError, match=index.prediction_path(small, 1, 1)):
        selection.select(small)


def test_wrong_number_of_classes(small):
    with pytest.raises(DataError, match="10 classes, but --num_label_classes=2"):
        selection.select(dataclasses.replace(small, num_label_classes=2))


def test_damaged_predictions_are_named(small):
    path = Path(index.prediction_path(small, 1, 0))
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(DataError, match=f"{path}, record 3: truncated"):
        selection.select(small)
    assert not list(path.parent.glob("*00001-of-00002-00000.parquet"))


def test_unreadable_images_are_never_selected(tmp_path):
    rows = [one_hot(1, 0.9), [0.0] * CLASSES, one_hot(1, 0.8)]
    make_predictions(tmp_path, [[rows]])
    settings_ = config(tmp_path, num_shards=1, min_threshold=0.0, num_image=3)
    result = selection.select(settings_)
    assert result["available"] == 3
    assert set(read_selection(settings_)) == {(0, 0, 0), (0, 0, 2)}
    assert result["classes"] == {"1": [pytest.approx(0.8), 2]}


def test_nothing_above_the_threshold(tmp_path):
    make_predictions(tmp_path, [[[one_hot(1, 0.4)]]])
    with pytest.raises(DataError, match="none of 1 predictions .*--min_threshold=0.5"):
        selection.select(config(tmp_path, num_shards=1, min_threshold=0.5))
    # Nothing is recorded as done, so the corrected command succeeds.
    result = selection.select(config(tmp_path, num_shards=1, min_threshold=0.3))
    assert result["unique"] == 1


@pytest.mark.parametrize(
    "values, message",
    [
        ({"min_threshold": 1.5}, "--min_threshold=1.5 is too large"),
        ({"min_threshold": float("nan")}, "--min_threshold=nan"),
        ({"min_threshold": 0.9, "max_prob": 0.8}, "--min_threshold=0.9 is above --max_prob=0.8"),
        ({"max_prob": -1.0}, "--max_prob=-1.0 is too small"),
    ],
)
def test_thresholds_that_keep_nothing_are_refused(tmp_path, values, message):
    with pytest.raises(ConfigError, match=message):
        selection.select(config(tmp_path, **values))
    assert not list(tmp_path.iterdir())


def test_finished_selection_is_not_made_again(small, monkeypatch):
    first = selection.select(small)
    path = Path(small.output_dir) / selection.SELECTION
    before = path.stat().st_mtime_ns
    # Left by a process killed while another one finished; no real process has this ID.
    left = path.with_name(f".tmp-{socket.gethostname()}-{2**22 + 1}-{selection.SELECTION}")
    left.write_bytes(b"half")
    monkeypatch.setattr(index, "IndexScan", lambda *_: pytest.fail("selected again"))
    assert selection.select(small) == first
    assert path.stat().st_mtime_ns == before
    assert not left.exists()


@pytest.mark.parametrize("field, value", [("num_image", 4), ("min_threshold", 0.5), ("seed", 1)])
def test_other_settings_are_refused(small, field, value):
    selection.select(small)
    with pytest.raises(manifests.OutputConflict, match=f"{field}: .*{value}"):
        selection.select(dataclasses.replace(small, **{field: value}))


@pytest.mark.parametrize("claimed", [-1, 1, 3])
def test_number_of_workers_is_that_of_the_prediction(tmp_path, claimed):
    rows = [one_hot(0, 0.6)]
    make_predictions(tmp_path, [[rows, rows]])
    settings = config(tmp_path, num_shards=1, num_image=3, total_label_replicas=claimed)
    manifest = index.prediction_path(settings, 0, 0) + ".manifest.json"
    noted = {"config": {"total_replicas": 2}, "sizes": {}, "counts": {}}
    json_files.write_json(manifest, noted)
    if claimed == -1:
        assert index.count_workers(settings) == 2
        Path(index.prediction_path(settings, 0, 1)).unlink()
        with pytest.raises(DataError, match="is missing"):
            index.count_workers(settings)
    else:
        with pytest.raises(DataError, match=f"--total_label_replicas={claimed}"):
            index.count_workers(settings)


def test_damaged_manifest_of_a_prediction_is_named(tmp_path):
    make_predictions(tmp_path, [[[one_hot(0, 0.6)]]])
    settings = config(tmp_path, num_shards=1, num_image=3)
    manifest = Path(index.prediction_path(settings, 0, 0) + ".manifest.json")
    for text in ("[]", '{"config": '):
        manifest.write_text(text)
        with pytest.raises(manifests.OutputConflict, match=f"{manifest} is damaged.*Delete it"):
            selection.select(settings)


def test_another_definition_of_the_draws_is_refused(small, monkeypatch):
    selection.select(small)
    monkeypatch.setattr(selection, "DRAWS", selection.DRAWS + 1)
    with pytest.raises(manifests.OutputConflict, match="draws: "):
        selection.select(small)


@pytest.mark.parametrize("mode", ["exact", "threshold"])
def test_a_large_shard_is_read_in_parts(tmp_path, monkeypatch, rng, mode):
    """Shards of one file or two, read in parts of at most 50 rows, give the same bytes."""
    table = [
        [
            [one_hot(*x) for x in zip(rng.integers(0, 3, n), rng.choice([0.5, 0.61, 0.7], n))]
            for n in sizes
        ]
        for sizes in ((300, 40), (1, 70))
    ]
    folders = {name: tmp_path / name for name in ("whole", "parts")}
    found = {}
    for name, folder in folders.items():
        make_predictions(folder, table)
        if name == "parts":
            monkeypatch.setattr(index, "_GROUP", 16)
            monkeypatch.setattr(index, "_ROWS_PER_PART", 50)
        settings_ = config(folder, num_shards=2, num_image=60, selection=mode)
        result = selection.select(dataclasses.replace(settings_, total_label_replicas=2))
        statistics_ = {
            p.name: p.read_bytes()
            for p in (folder / "statistics").glob("*.json")
            if "manifest" not in p.name
        }
        found[name] = (result, read_selection(settings_), statistics_)
    paths = [str(p) for p in sorted((folders["parts"] / "predictions").glob("index-00000*"))]
    scan = index.IndexScan({0: paths})
    sizes = [sum(part) for _, part in scan.each("rows", lambda chunks: [c.size for c in chunks])]
    assert max(sizes) <= 50 and sum(sizes) == 340
    assert found["parts"] == found["whole"]


def test_database_is_bounded_and_spills(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    abandoned = tmp_path / f".tmp-{socket.gethostname()}-{2**22 + 1}-efficientnet_ns-duckdb-1"
    abandoned.mkdir()
    with parquet_sql.database(2) as db:
        assert not abandoned.exists()
        ((limit, folder),) = db.execute(
            "SELECT current_setting('memory_limit'), current_setting('temp_directory')"
        ).fetchall()
        assert limit == "1.8 GiB" and folder.startswith(str(tmp_path))
        db.execute("SET memory_limit = '64MB'")
        db.execute("SET threads = 1")
        db.execute("CREATE TABLE numbers AS SELECT hash(range) AS x FROM range(20_000_000)")
        assert os.listdir(folder)
        assert db.execute("SELECT count(*) FROM numbers").fetchone() == (20_000_000,)
    assert not os.path.exists(folder)


def test_side_files_are_made_again(small):
    first = selection.select(small)
    for path in (
        f"{small.output_dir}/threshold.json",
        f"{small.prelim_stats_dir}/total_counts_sum.json",
    ):
        content = Path(path).read_bytes()
        Path(path).unlink()
        assert selection.select(small) == first
        assert Path(path).read_bytes() == content


def test_other_file_systems(small, tmp_path, monkeypatch):
    """Uses TensorFlow's in-memory file system in place of cloud storage."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    selection.select(small)
    remote = dataclasses.replace(
        small,
        prediction_dir="ram://test/predictions",
        prelim_stats_dir="ram://test/statistics",
        output_dir="ram://test/out",
    )
    tf.io.gfile.makedirs(remote.prediction_dir)
    for shard in range(2):
        name = os.path.basename(index.prediction_path(small, shard, 0))
        tf.io.gfile.copy(f"{small.prediction_dir}/{name}", f"{remote.prediction_dir}/{name}")
    selection.select(remote)
    local_copy = os.path.join(small.output_dir, "remote.parquet")
    tf.io.gfile.copy(f"{remote.output_dir}/{selection.SELECTION}", local_copy)
    expected = pyarrow.parquet.read_table(f"{small.output_dir}/{selection.SELECTION}")
    assert pyarrow.parquet.read_table(local_copy) == expected
    outcome, here = load_outcome(remote), load_outcome(small)
    assert all((outcome[key] == here[key]).all() for key in here)
    report = Outcome(remote)
    assert report.totals() == Outcome(small).totals()
    assert list(tmp_path.glob(".tmp-*-copies-*"))
    del report
    gc.collect()
    assert not list(tmp_path.glob(".tmp-*"))
