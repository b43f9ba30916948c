"""The shuffle of copies: nothing lost, spread, and the same however it is cut."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest

from efficientnet_ns.labeling import shuffle


def payload(image: int) -> bytes:
    return b"%d" % image * (1 + image % 7)


def shuffled(copies: np.ndarray, seed: int = 0, shard: int = 0, run: int = 10**6) -> list[bytes]:
    with shuffle.Shuffle(int(copies.sum())) as spool:
        for first in range(0, len(copies), run):
            image = np.arange(first, min(first + run, len(copies)))
            part = copies[image]
            place = shuffle.places(seed, shard, image, part)
            spool.add([payload(i) for i in image.tolist()], image, part, place)
        return [bytes(view) for view in spool.sorted()]


@pytest.fixture
def copies(rng) -> np.ndarray:
    """Many images once, some often, one very often."""
    return np.concatenate([np.ones(3000, int), rng.integers(2, 30, 100), [700]])[::-1].copy()


@pytest.fixture(params=[128 << 20, 2000])
def bucket(request, monkeypatch) -> None:
    """One bucket, and several."""
    monkeypatch.setattr(shuffle, "_BUCKET_BYTES", request.param)


def test_every_copy_comes_out_once(copies, bucket):
    expected = {payload(i): n for i, n in enumerate(copies.tolist())}
    assert Counter(shuffled(copies)) == expected


def test_how_the_input_is_cut_does_not_matter(copies):
    assert shuffled(copies) == shuffled(copies, run=17)


def test_seed_and_shard_matter(copies):
    first = shuffled(copies)
    assert first == shuffled(copies)
    assert first != shuffled(copies, seed=1) != shuffled(copies, shard=1) != first


def test_copies_are_never_neighbours(copies, bucket):
    result = shuffled(copies)
    assert not any(a == b for a, b in zip(result, result[1:]))


def test_copies_are_spread_over_the_whole_file(copies, bucket):
    result = shuffled(copies)
    found = defaultdict(list)
    for at, value in enumerate(result):
        found[value].append(at)
    for image, n in enumerate(copies.tolist()):
        gaps = np.diff(found[payload(image)])
        # Random places would bring two of 30 copies as close as a thousandth of the file.
        if 5 <= n < 100:
            assert gaps.min() > 0.35 * len(result) / n
            assert gaps.max() < 1.7 * len(result) / n


def test_single_images_are_in_random_order():
    order = np.array([int(value) for value in shuffled_numbers(4000)])
    assert sorted(order) == list(range(4000))
    assert abs(np.corrcoef(order, np.arange(4000))[0, 1]) < 0.05
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.05


def shuffled_numbers(n: int) -> list[bytes]:
    image, copies = np.arange(n), np.ones(n, int)
    with shuffle.Shuffle(n) as spool:
        values = [b"%04d" % i for i in image]
        spool.add(values, image, copies, shuffle.places(3, 0, image, copies))
        return [bytes(view) for view in spool.sorted()]


def test_one_image_alone_and_nothing():
    assert shuffled(np.array([4])) == [payload(0)] * 4
    assert shuffled(np.array([], int)) == []


def test_an_image_that_is_nearly_everything():
    """Nine others cannot part thirty copies, but they all must part some."""
    result = shuffled(np.array([30, *[1] * 9]))
    together = sum(a == b for a, b in zip(result, result[1:]))
    assert len(result) == 39
    assert 29 - 9 <= together <= 29 - 9 + 2


def test_swaps_only_ever_part(rng):
    for _ in range(300):
        image = rng.integers(0, 4, 12)
        order = shuffle._apart(image, np.arange(12), -1)
        assert sorted(order) == list(range(12))
        before = sum(image[1:] == image[:-1])
        after = image[order]
        assert sum(after[1:] == after[:-1]) <= before
