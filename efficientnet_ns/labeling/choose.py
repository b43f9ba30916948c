"""Which predictions are kept, and how often: exactly the top of each class, or by thresholds.

Both ways end in two tables. `plain` has for a class the least probability from which on all of its
images are kept, with their copies; `ranked` has single images, those among which a place in an
order decides. So the index itself is never sorted.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from efficientnet_ns.config import ConfigError, SelectConfig
from efficientnet_ns.labeling.scan import Scan, double
from efficientnet_ns.labeling.statistics import EDGES, Counts

_FINER = 256  # Parts of a bin.
_ROWS_RANKED_AT_ONCE = 8_000_000  # Bounds memory.


def _hash(config: SelectConfig) -> str:
    """SQL of an image's place in the seeded order."""
    # md5 rather than DuckDB's hash(), which may change between its versions.
    return f"md5(concat_ws(',', {config.seed}, shard, worker, position))"


def _create(db, name: str, columns: str, rows: Iterable[tuple]) -> None:
    db.execute(f"CREATE TABLE {name} ({columns})")
    rows = list(rows)
    if rows:
        values = ", ".join(f"({', '.join(map(_number, row))})" for row in rows)
        db.execute(f"INSERT INTO {name} VALUES {values}")


def _number(value) -> str:
    return double(value) if isinstance(value, float) else str(value)


def _plain(db, rows: Iterable[tuple[int, float, int, float]]) -> None:
    """(label, least probability, whole copies, probability of one more)."""
    _create(db, "plain", "label INTEGER, least DOUBLE, whole INTEGER, fraction DOUBLE", rows)


_RANKED = "shard INTEGER, worker INTEGER, position BIGINT, label INTEGER, prob FLOAT"


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


def by_thresholds(db, chosen: dict[int, tuple[float, int]], config: SelectConfig) -> None:
    """Copies = num_image / images: the whole part, and one more with the rest as probability."""
    rows = []
    for label, (edge, images) in chosen.items():
        copies = 1.0 if config.use_all else config.num_image / images if images else 0.0
        if not config.upsample:
            copies = min(copies, 1.0)
        rows.append((label, edge, int(copies), copies - int(copies)))
    _plain(db, rows)
    db.execute(f"CREATE TABLE ranked ({_RANKED}, copies INTEGER)")


# --- Exactly num_image per class ------------------------------------------------------------------


def exactly(scan: Scan, counts: Counts, config: SelectConfig) -> None:
    """The num_image best of each class; classes with fewer are filled up by seeded copies."""
    # Differs (1): exactly the top images, and copies by a seed.
    wanted, lowest = config.num_image, config.min_threshold
    plain: list[tuple[int, float, int, float]] = []
    # label, least and greatest probability, whether by the seeded order, how many get the copies,
    # the copies, the copies of the others.
    to_rank: list[tuple[int, float, float, bool, int, int, int]] = []
    cut: list[int] = []
    everything = (lowest, config.max_prob, True)
    for label, size in enumerate(counts.eligible.sum(1).tolist()):
        if not size or not (wanted or config.use_all):
            continue
        if config.use_all or size == wanted or (size < wanted and not config.upsample):
            plain.append((label, lowest, 1, 0.0))
        elif size > wanted and config.use_top:
            cut.append(label)
        elif size > wanted:
            to_rank.append((label, *everything, wanted, 1, 0))
        elif wanted % size:
            to_rank.append((label, *everything, wanted % size, wanted // size + 1, wanted // size))
        else:
            plain.append((label, lowest, wanted // size, 0.0))
    for label, first, last, places in _boundaries(scan, counts, config, cut):
        plain.append((label, float(np.nextafter(last, np.inf)), 1, 0.0))
        to_rank.append((label, first, last, False, places, 1, 0))
    _plain(scan.db, plain)
    _rank(scan, to_rank, config)


def _boundaries(scan: Scan, counts: Counts, config: SelectConfig, labels: list[int]):
    """Yields (label, first, last, places): what is above `last` is kept, below `first` is not.

    `places` of those between, a 256th of a bin or less, are kept.
    """
    from_top = counts.eligible[:, ::-1].cumsum(1)[:, ::-1]
    # The last bin from which on there are enough.
    bins = {c: int(np.flatnonzero(from_top[c] >= config.num_image)[-1]) for c in labels}
    if not bins:
        return
    ends = [*EDGES[1:], float("inf")]
    rows = ((c, max(EDGES[k], config.min_threshold), EDGES[k], ends[k]) for c, k in bins.items())
    _create(scan.db, "bins", "label INTEGER, low DOUBLE, edge DOUBLE, high DOUBLE", rows)

    def group(cursor, shard: int, rows: str):
        return cursor.execute(
            f"""
            SELECT label, least(floor((prob::DOUBLE - edge) * {100 * _FINER}), {_FINER - 1})::INTEGER
                     AS part, count(*) AS n, min(prob)::DOUBLE AS low, max(prob)::DOUBLE AS high
            FROM {rows} JOIN bins USING (label)
            WHERE prob::DOUBLE >= bins.low AND prob::DOUBLE < bins.high
              AND prob::DOUBLE <= {double(config.max_prob)}
            GROUP BY ALL
            """
        ).fetchnumpy()

    shape = (len(counts.total), _FINER)
    number, low, high = np.zeros(shape, np.int64), np.full(shape, np.inf), np.full(shape, -np.inf)
    for _, found in scan.each("looking for the last that is kept", group):
        place = found["label"], found["part"]
        number[place] += found["n"]
        low[place] = np.minimum(low[place], found["low"])
        high[place] = np.maximum(high[place], found["high"])
    above = number[:, ::-1].cumsum(1)[:, ::-1] - number
    for label, k in bins.items():
        places = config.num_image - (from_top[label, k] - counts.eligible[label, k])
        part = int(np.flatnonzero(above[label] + number[label] >= places)[-1])
        yield (
            label,
            float(low[label, part]),
            float(high[label, part]),
            int(places - above[label, part]),
        )


def _rank(scan: Scan, to_rank: list[tuple], config: SelectConfig) -> None:
    """Creates the table `ranked`: images that get their copies by their place in an order."""
    columns = (
        "label INTEGER, low DOUBLE, high DOUBLE, seeded BOOLEAN, places BIGINT, copies INTEGER, "
        "others INTEGER"
    )
    _create(scan.db, "to_rank", columns, to_rank)
    scan.db.execute(f"CREATE TABLE candidates ({_RANKED}, draw UBIGINT)")
    scan.db.execute(f"CREATE TABLE ranked ({_RANKED}, copies INTEGER)")
    if not to_rank:
        return

    def gather(cursor, shard: int, rows: str) -> None:
        cursor.execute(
            f"""
            INSERT INTO candidates
            SELECT shard, worker, position, label, prob,
                   CASE WHEN seeded THEN ('0x' || left({_hash(config)}, 16))::UBIGINT ELSE 0 END
            FROM {rows} JOIN to_rank USING (label)
            WHERE prob::DOUBLE >= low AND prob::DOUBLE <= high
            """
        )

    for _ in scan.each("gathering what is to be ranked", gather):
        pass
    for first, last in _ranges(scan.db):
        # Ties in confidence go to the lower (shard, position, worker).
        scan.db.execute(
            f"""
            INSERT INTO ranked
            SELECT shard, worker, position, label, prob,
                   CASE WHEN place <= places THEN copies ELSE others END AS n
            FROM (SELECT *, row_number() OVER (
                      PARTITION BY label ORDER BY draw, prob DESC, shard, position, worker) AS place
                  FROM candidates WHERE label BETWEEN {first} AND {last})
                 JOIN to_rank USING (label)
            WHERE n > 0
            """
        )
    scan.db.execute("DROP TABLE candidates")


def _ranges(db) -> list[tuple[int, int]]:
    """Splits the classes of `candidates` into ranges that fit in memory."""
    ranges: list[list[int]] = []
    for label, size in db.execute(
        "SELECT label, count(*) FROM candidates GROUP BY label ORDER BY label"
    ).fetchall():
        if ranges and ranges[-1][2] + size <= _ROWS_RANKED_AT_ONCE:
            ranges[-1][1:] = [label, ranges[-1][2] + size]
        else:
            ranges.append([label, label, size])
    return [(first, last) for first, last, _ in ranges]


# --- The outcome ----------------------------------------------------------------------------------


def kept(cursor, shard: int, rows: str, config: SelectConfig):
    """The chosen rows of a shard, an Arrow table with `copies`, by worker and position."""
    draw = f"('0x' || left({_hash(config)}, 13))::BIGINT / {double(2**52)}"
    return cursor.execute(
        f"""
        SELECT * FROM (
            SELECT shard, worker, position, label, prob,
                   whole + CASE WHEN fraction > 0 THEN ({draw} < fraction)::INTEGER ELSE 0 END
                     AS copies
            FROM {rows} JOIN plain USING (label)
            WHERE prob::DOUBLE >= least AND prob::DOUBLE <= {double(config.max_prob)}
            UNION ALL SELECT * FROM ranked WHERE shard = {shard}
        ) WHERE copies > 0 ORDER BY worker, position
        """
    ).fetch_arrow_table()
