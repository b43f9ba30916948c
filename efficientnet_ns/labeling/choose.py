"""Which predictions are kept, and how often: exactly the top of each class, or by thresholds.

Both ways end in a `Rule` per class. An image has a key in its class, its confidence or a draw; from
the lowest key up a number of images get one copy more than the others. Two passes of histograms
find the key at which that number is reached, so that few images must be sorted and the index never.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from efficientnet_ns.config import ConfigError, SelectConfig
from efficientnet_ns.labeling.scan import Piece, Scan, Span, pieces
from efficientnet_ns.labeling.statistics import EDGES, Counts, at_least

# Which function `draws` is; to be raised when it becomes another one.
DRAWS = 2
_PART_BITS = 7
_PARTS = 1 << _PART_BITS  # Parts of a range of keys; more would not fit in the cache.
_DRAW_BITS = 63
_ROWS_RANKED_AT_ONCE = 8_000_000  # Bounds memory.
_PLAIN, _TOP, _DRAWN = 0, 1, 2


@dataclasses.dataclass
class Rules:
    """How each class is chosen; arrays are [classes].

    Attributes:
      seed: of the draws.
      highest: the greatest probability that is kept.
      least: float64, the least probability that is kept.
      kind: whether all images are alike, or which key decides.
      first, others: int32, copies of the images with the first keys, and of the rest.
      fraction: float64, the probability of one more copy.
      base: int64, bits of the probability whose key is 0.
      below: int64, images with a lower key are among the first.
      rows: positions of further ones among the first, by (shard, worker).
    """

    seed: int
    highest: float
    least: np.ndarray
    kind: np.ndarray
    first: np.ndarray
    others: np.ndarray
    fraction: np.ndarray
    base: np.ndarray
    below: np.ndarray
    rows: dict[tuple[int, int], np.ndarray]

    @classmethod
    def nothing(cls, config: SelectConfig) -> Rules:
        """No image is kept."""
        n = config.num_label_classes
        ints, longs = (lambda: np.zeros(n, np.int32)), (lambda: np.zeros(n, np.int64))
        least, highest = np.full(n, np.inf), float(config.max_prob)
        fraction = np.zeros(n)
        return cls(
            *(config.seed, highest, least, ints(), ints(), ints(), fraction, longs(), longs(), {})
        )


def _mix(x):
    """The output function of splitmix64 (Steele et al. 2014) on uint64 [N]."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def draws(seed: int, shard: int, worker: int, positions: np.ndarray) -> np.ndarray:
    """A draw per image, int64 [N] in [0, 2**63): mix(mix(mix(mix(seed) + shard) + worker) + position).

    Sums are modulo 2**64, mix is that of splitmix64, and the lowest bit is dropped.
    """
    state = _mix(np.array([seed % 2**64], np.uint64))
    for value in (shard, worker):
        state = _mix(state + np.uint64(value))
    return (_mix(state + positions.astype(np.uint64)) >> np.uint64(1)).astype(np.int64)


def _keys(rules: Rules, shard: int, piece: Piece, rows: np.ndarray) -> np.ndarray:
    """int64 [rows], of images of classes that are not plain."""
    labels = piece.labels[rows]
    keys = rules.base[labels] - piece.probs[rows].view(np.int32)
    drawn = np.flatnonzero(rules.kind[labels] == _DRAWN)
    keys[drawn] = draws(rules.seed, shard, piece.worker, piece.positions[rows[drawn]])
    return keys


# --- The original's thresholds --------------------------------------------------------------------


def thresholds(total: np.ndarray, config: SelectConfig) -> dict[int, tuple[float, int]]:
    """Class → (least confidence, images counted from there), by the original's rule.

    From the highest bin down, those below --max_prob: the first edge at which --num_image images
    are reached, else --min_threshold.

    Raises:
      ConfigError: no bin begins at --min_threshold and it is needed.
    """
    chosen = {}
    for label, counts in enumerate(total.tolist()):
        images = 0
        for edge, count in zip(reversed(EDGES), reversed(counts)):
            if not config.min_threshold <= edge < config.max_prob:
                continue
            images += count
            enough = config.use_top and not config.use_all and images >= config.num_image
            if enough or edge == config.min_threshold:
                chosen[label] = (edge, images)
                break
        else:
            raise ConfigError(
                f"--min_threshold={config.min_threshold}: --selection=threshold needs a multiple "
                f"of 0.01 below --max_prob={config.max_prob}, since class {label} has fewer than "
                f"{config.num_image} images"
            )
    return chosen


def by_thresholds(chosen: dict[int, tuple[float, int]], config: SelectConfig) -> Rules:
    """Copies = num_image / images: the whole part, and one more with the rest as probability."""
    rules = Rules.nothing(config)
    for label, (edge, images) in chosen.items():
        copies = 1.0 if config.use_all else config.num_image / images if images else 0.0
        if not config.upsample:
            copies = min(copies, 1.0)
        rules.least[label], rules.others[label] = edge, int(copies)
        rules.fraction[label] = copies - int(copies)
    return rules


# --- Exactly num_image per class ------------------------------------------------------------------


class _Range(NamedTuple):
    """Among which keys of a class the last of the first is; arrays [classes].

    Attributes:
      low, high: int64, the least key and the greatest, inclusive; none if low > high.
      places: int64, how many of the images between are among the first.
    """

    low: np.ndarray
    high: np.ndarray
    places: np.ndarray


def exactly(scan: Scan, counts: Counts, config: SelectConfig) -> Rules:
    """The num_image best of each class; classes with fewer are filled up by seeded copies."""
    # Differs (1): exactly the top images, and copies by a seed.
    rules, wanted = Rules.nothing(config), config.num_image
    n = len(rules.least)
    keys = _Range(np.zeros(n, np.int64), np.full(n, -1), np.zeros(n, np.int64))
    from_top = counts.eligible[:, ::-1].cumsum(1)[:, ::-1]
    for label, size in enumerate(counts.eligible.sum(1).tolist()):
        if not size or not (wanted or config.use_all):
            continue
        rules.least[label] = config.min_threshold
        if config.use_all or size == wanted or (size < wanted and not config.upsample):
            rules.others[label] = 1
        elif size > wanted and config.use_top:
            # The last bin from which on there are enough.
            k = int(np.flatnonzero(from_top[label] >= wanted)[-1])
            rules.kind[label], rules.first[label] = _TOP, 1
            low, rules.base[label] = _bits_of_bin(k)
            keys.high[label] = rules.base[label] - low
            keys.places[label] = wanted - (from_top[label, k] - counts.eligible[label, k])
        elif size > wanted or wanted % size:
            rules.kind[label], keys.high[label] = _DRAWN, 2**_DRAW_BITS - 1
            keys.places[label], rules.others[label] = wanted % size or wanted, wanted // size
            if size > wanted:
                keys.places[label], rules.others[label] = wanted, 0
            rules.first[label] = rules.others[label] + 1
        else:
            rules.others[label] = wanted // size
    if rules.kind.any():
        _rank(scan, rules, _narrowed(scan, rules, keys))
    return rules


def _bits_of_bin(k: int) -> tuple[int, int]:
    """Bits of the least and the greatest float32 in a bin."""
    edges = np.array([EDGES[k], EDGES[k + 1] if k < 100 else np.inf])
    least = edges.astype(np.float32)
    bits = least.view(np.int32).astype(np.int64) + (least.astype(np.float64) < edges)
    return int(bits[0]), int(bits[1]) - 1


def _between(rules: Rules, keys: _Range, shard: int, piece: Piece):
    """(rows, keys) of the images of a piece whose keys are in the range of their class."""
    floor, ceiling = rules.least.copy(), np.full(len(rules.least), rules.highest)
    top = rules.kind == _TOP
    for bound, key, narrower in ((floor, keys.high, np.maximum), (ceiling, keys.low, np.minimum)):
        bits = (rules.base - key)[top].astype(np.int32)
        bound[top] = narrower(bound[top], bits.view(np.float32))
    floor[rules.kind == _PLAIN] = np.inf
    floor, ceiling = at_least(floor), -at_least(-ceiling)
    probs, labels = piece.probs, piece.labels
    rows = np.flatnonzero((probs >= floor[labels]) & (probs <= ceiling[labels]))
    found, labels = _keys(rules, shard, piece, rows), labels[rows]
    inside = (found >= keys.low[labels]) & (found <= keys.high[labels])
    return rows[inside], found[inside]


def _narrowed(scan: Scan, rules: Rules, keys: _Range) -> _Range:
    """The part of each range, of up to 128, in which the last place is."""
    bits = [max(int(high).bit_length() - _PART_BITS, 0) for high in keys.high.clip(0)]
    shift, shape = np.array(bits, np.int64), (len(rules.kind), _PARTS)

    def group(shard: int, spans: Sequence[Span]) -> np.ndarray:
        table = np.zeros(shape, np.int64)
        for piece in pieces(spans):
            rows, found = _between(rules, keys, shard, piece)
            labels = piece.labels[rows]
            place = labels.astype(np.int64) * _PARTS + (found >> shift[labels])
            table += np.bincount(place, minlength=table.size).reshape(shape)
        return table

    table = sum(found for _, found in scan.each("looking for the last that is kept", group))
    upto = table.cumsum(1)
    part = (upto < keys.places[:, None]).sum(1).clip(0, _PARTS - 1)
    classes = np.arange(shape[0])
    low = part << shift
    high = np.where(rules.kind == _PLAIN, -1, low + (1 << shift) - 1)
    high = np.minimum(high, keys.high)
    return _Range(low, high, keys.places - (upto - table)[classes, part])


def _rank(scan: Scan, rules: Rules, keys: _Range) -> None:
    """Finds the images of the last part that are among the first, and completes the rules."""

    def gather(shard: int, spans: Sequence[Span]) -> np.ndarray:
        found = [np.zeros(0, _CANDIDATE)]
        for piece in pieces(spans):
            rows, key = _between(rules, keys, shard, piece)
            columns = np.zeros(len(rows), _CANDIDATE)
            columns["label"], columns["key"] = piece.labels[rows], key
            columns["shard"], columns["worker"] = shard, piece.worker
            columns["position"] = piece.positions[rows]
            found.append(columns)
        return np.concatenate(found)

    waiting, size = [], 0
    for _, found in scan.each("gathering what is to be ranked", gather):
        waiting.append(found)
        size += len(found)
        if size > _ROWS_RANKED_AT_ONCE:
            waiting, size = [_first(waiting, keys.places)], 0
    best = _first(waiting, keys.places)
    rules.below[:] = np.where(rules.kind == _PLAIN, 0, keys.low)
    best = best[np.lexsort((best["position"], best["worker"], best["shard"]))]
    owner = best["shard"].astype(np.int64) << 32 | best["worker"]
    names, starts = np.unique(owner, return_index=True)
    for name, group in zip(names.tolist(), np.split(best["position"], starts[1:])):
        rules.rows[name >> 32, name & 0xFFFFFFFF] = group


_CANDIDATE = np.dtype(
    [("key", "i8"), ("position", "i8"), ("label", "i4"), ("shard", "i4"), ("worker", "i4")]
)


def _first(tables: Iterable[np.ndarray], places: np.ndarray) -> np.ndarray:
    """The first images of each class; equal keys go by the lower (shard, position, worker)."""
    table = np.concatenate(list(tables))
    order = ("worker", "position", "shard", "key", "label")
    table = table[np.lexsort([table[name] for name in order])]
    starts = np.searchsorted(table["label"], np.arange(len(places)))
    place = np.arange(len(table)) - starts[table["label"]]
    return table[place < places[table["label"]]]


# --- The outcome ----------------------------------------------------------------------------------

COLUMNS = {
    "shard": np.int32,
    "worker": np.int32,
    "position": np.int64,
    "label": np.int32,
    "prob": np.float32,
    "copies": np.int32,
}


def kept(shard: int, spans: Sequence[Span], rules: Rules) -> list[dict[str, np.ndarray]]:
    """The chosen rows of a part of a shard, `COLUMNS`, by worker and position, in pieces."""
    return [_kept(rules, shard, piece) for piece in pieces(spans)]


def _kept(rules: Rules, shard: int, piece: Piece) -> dict[str, np.ndarray]:
    probs, labels = piece.probs, piece.labels
    fit = (probs >= at_least(rules.least)[labels]) & (
        probs <= -at_least(np.array([-rules.highest]))
    )
    rows = np.flatnonzero(fit)
    labels = labels[rows]
    copies = rules.others[labels]
    ranked = np.flatnonzero(rules.kind[labels])
    keys = _keys(rules, shard, piece, rows[ranked])
    before = ranked[keys < rules.below[labels[ranked]]]
    copies[before] = rules.first[labels[before]]
    positions = piece.positions[rows]
    further = rules.rows.get((shard, piece.worker), np.zeros(0, np.int64))
    end = piece.start + piece.size
    further = further[slice(*np.searchsorted(further, (piece.start, end)))]
    place = np.searchsorted(positions, further)
    copies[place] = rules.first[labels[place]]
    split = np.flatnonzero(rules.fraction[labels] > 0)
    if len(split):
        draw = draws(rules.seed, shard, piece.worker, positions[split]) / 2.0**_DRAW_BITS
        copies[split] += draw < rules.fraction[labels[split]]
    some = np.flatnonzero(copies)
    owner = {"shard": shard, "worker": piece.worker}
    constant = {k: np.full(len(some), v, np.int32) for k, v in owner.items()}
    return {
        **constant,
        "position": positions[some],
        "label": labels[some],
        "prob": probs[rows[some]],
        "copies": copies[some],
    }
