"""Shuffled copies are complete, spread out, and reproducible from the seed."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict

import numpy as np
import pytest

from efficientnet_ns.pseudo_labels import shuffled_copies


def payload(image: int) -> bytes:
    return b"%d" % image * (1 + image % 7)


def shuffled(copies: np.ndarray, seed: int = 0, shard: int = 0) -> list[bytes]:
    with shuffled_copies.Spool() as spool:
        for image in range(len(copies)):
            spool.append(payload(image))
        return list(spool.shuffled(seed, shard, np.arange(len(copies)), copies))


@pytest.fixture
def copies(rng) -> np.ndarray:
    """Many images once, some often, one very often."""
    return np.concatenate([np.ones(3000, int), rng.integers(2, 30, 100), [700]])[::-1].copy()


@pytest.fixture(params=[128 << 20, 2000])
def bucket(request, monkeypatch) -> None:
    """One bucket or several."""
    monkeypatch.setattr(shuffled_copies, "_BUCKET_BYTES", request.param)


def test_every_copy_comes_out_once(copies, bucket):
    expected = {payload(i): n for i, n in enumerate(copies.tolist())}
    assert Counter(shuffled(copies)) == expected


def test_seed_and_shard_matter(copies):
    first = shuffled(copies)
    assert first == shuffled(copies)
    assert first != shuffled(copies, seed=1) != shuffled(copies, shard=1) != first


def test_copies_are_never_neighbors(copies, bucket):
    result = shuffled(copies)
    assert not any(a == b for a, b in zip(result, result[1:]))


def test_copies_are_spread_over_the_whole_file(copies, bucket):
    result = shuffled(copies)
    found = defaultdict(list)
    for at, value in enumerate(result):
        found[value].append(at)
    for image, n in enumerate(copies.tolist()):
        gaps = np.diff(found[payload(image)])
        # Random positions would put two of 30 copies within a thousandth of the file.
        if 5 <= n < 100:
            assert gaps.min() > 0.35 * len(result) / n
            assert gaps.max() < 1.7 * len(result) / n


def test_single_images_are_in_random_order():
    with shuffled_copies.Spool() as spool:
        for image in range(4000):
            spool.append(b"%d" % image)
        items = spool.shuffled(3, 0, np.arange(4000), np.ones(4000, int))
        order = np.array([int(item) for item in items])
    assert sorted(order) == list(range(4000))
    assert abs(np.corrcoef(order, np.arange(4000))[0, 1]) < 0.05
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.05


@pytest.mark.parametrize(
    "bucket_bytes, digest", [(64 << 20, "acddf447c72d17e6"), (2000, "82a919587ea13423")]
)
def test_order_is_that_of_689ed74(monkeypatch, bucket_bytes, digest):
    """One image has so many copies that some are adjacent, in one bucket and in hundreds."""
    monkeypatch.setattr(shuffled_copies, "_BUCKET_BYTES", bucket_bytes)
    result = shuffled(np.array([1500, *[1] * 2500]), seed=5, shard=2)
    assert hashlib.sha256(b"".join(result)).hexdigest()[:16] == digest


def test_one_image_alone_and_nothing():
    assert shuffled(np.array([4])) == [payload(0)] * 4
    assert shuffled(np.array([], int)) == []


def test_an_image_that_is_nearly_everything():
    """Nine other images cannot separate thirty copies, but each must separate some."""
    result = shuffled(np.array([30, *[1] * 9]))
    together = sum(a == b for a, b in zip(result, result[1:]))
    assert len(result) == 39
    assert 29 - 9 <= together <= 29 - 9 + 2


def test_few_images_are_parted_as_far_as_possible(rng):
    """One image has more than half of the copies, so every other copy separates two of them."""
    for seed in range(30):
        copies = rng.integers(1, 5, 6)
        copies[0] = copies[1:].sum() + rng.integers(2, 9)
        result = shuffled(copies, seed)
        together = sum(a == b for a, b in zip(result, result[1:]))
        least = copies[0] - 1 - copies[1:].sum()
        assert least <= together <= least + 2
