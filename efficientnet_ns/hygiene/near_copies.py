"""Finds exact and near copies among images of several sets, with out-of-core SQL over their marks.

Images with equal fingerprints form one *print*. Two prints are near if they differ in at most
`fingerprints.THRESHOLD` bits. The search uses bands: it compares prints that have the same bits in
a band. Evaluation images have 16 bands of 16 bits; training images, 12 overlapping bands of 24.
Thus, 100 million images are compared with 50,000 of an evaluation set, and with each other, in some
10^9 pairs each. If more than `_CROWD` training prints share a band, only equal ones are found.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from absl import logging

from efficientnet_ns.config.cpus import available_cpus
from efficientnet_ns.data import fingerprints
from efficientnet_ns.files import local_files, parquet_sql
from efficientnet_ns.files.progress import Progress

if TYPE_CHECKING:
    import duckdb

EVALUATION, LABELED, UNLABELED = range(3)  # In the order in which images are kept.
ROLES = ("evaluation", "labeled", "unlabeled")
# Kept are all evaluation images, labeled ones that are not copies of evaluation images, and
# unlabeled ones that are not copies.
EXCLUDED = f"(place.role = {UNLABELED} OR (place.role = {LABELED} AND origin.role = {EVALUATION}))"
_WORDS = fingerprints.COLUMNS[1:]
# Prints that differ in at most 15 bits (training images: 7) always share a band. With 16 bits, each
# of 10^8 training images would share one with 1,500 others by chance; with 24, with 6.
_EVALUATION_BANDS = [(word, shift, 16) for word in _WORDS for shift in (0, 16, 32, 48)]
_TRAINING_BANDS = [(word, shift, 24) for word in _WORDS for shift in (0, 20, 40)]
# Prints of one band are compared pairwise: half a million pairs for this many prints.
_CROWD = 1000
_AT_ONCE = 10_000  # Copies in memory.
BYTES_PER_ROW = 400  # In memory and temporary files; measured: 357 in files for 100 million.


class ImageSet(NamedTuple):
    """The images of some record files.

    Attributes:
      role: EVALUATION, LABELED or UNLABELED.
      name: name in the report.
      files: record files.
      marks: Parquet files with the marks: one per file, or the indexes of a labeling run.
      workers: workers of the labeling run whose indexes `marks` are; 0: `image_marks` wrote them.
    """

    role: int
    name: str
    files: Sequence[str]
    marks: Sequence[str]
    workers: int = 0


class Copy(NamedTuple):
    """An image, and the first image that it is a copy of.

    Attributes:
      role, file, record: of the copy.
      of_role, of_file, of_record: of the first image.
      distance: bits in which the fingerprints differ; -1: equal content.
    """

    role: int
    file: str
    record: int
    of_role: int
    of_file: str
    of_record: int
    distance: int


# `place` orders images by role, set, file and record, because DuckDB compares structs field by
# field. `queries` is created before the DELETE: crops are search terms, but never results.
_IMAGES = """
CREATE TABLE images AS {};
CREATE TABLE queries AS SELECT DISTINCT place, {words} FROM images WHERE place.role = 0 AND {structured};
DELETE FROM images WHERE crop > 0;
CREATE TABLE hashes AS SELECT hash, min(place) AS first FROM images GROUP BY hash HAVING count(*) > 1;
CREATE TABLE prints AS SELECT {words}, min(place) AS first FROM images WHERE {structured} GROUP BY ALL;
CREATE TABLE near (first STRUCT(role INT, file INT, record BIGINT),
  other STRUCT(role INT, file INT, record BIGINT), distance INT);
"""
_OF_MARKS = """
SELECT {{'role': {role}, 'file': {first} + file, 'record': record}} AS place, crop, hash, {words}
FROM {view}
"""
# Inverts how W workers share a shard: record i is at position i // W of worker i mod W.
_OF_INDEX = """
SELECT {{'role': {role}, 'file': {first} + shard, 'record': position * {workers} + worker}} AS place,
0 AS crop, hash, {words} FROM {view} WHERE label >= 0
"""
# `<` selects each pair once, and keeps an image from being a copy of itself or of its own crops.
_COMPARE = """
INSERT INTO near
WITH a AS (SELECT {key} AS band, {first} AS place, {words} FROM {table_a}),
b AS (SELECT {key} AS band, first AS place, {words} FROM prints)
SELECT a.place, b.place, {distance} AS distance FROM a JOIN b USING (band)
WHERE a.place < b.place AND distance <= {threshold} {crowd}
"""
# Each image with the first that it is a copy of: by content, by fingerprint, or near. Origin comes
# before distance in arg_min, because the role of the first image decides what is excluded.
_COPIES = """
CREATE TABLE origins AS SELECT other AS later, arg_min(first, (first, distance)) AS origin,
arg_min(distance, (first, distance)) AS distance FROM near GROUP BY other;
CREATE TABLE copies AS
WITH found AS (
  SELECT place, hashes.first AS origin, -1 AS distance FROM images JOIN hashes USING (hash)
  UNION ALL SELECT place, prints.first, 0 FROM images JOIN prints USING ({columns})
  UNION ALL SELECT place, origins.origin, distance FROM images JOIN prints USING ({columns})
  JOIN origins ON prints.first = later)
SELECT place, arg_min(origin, (origin, distance)) AS origin, arg_min(distance, (origin, distance)) AS
distance FROM found WHERE origin < place GROUP BY place;
"""


def _key(word: str, shift: int, bits: int) -> str:
    return f"(({word} >> {shift}) & {(1 << bits) - 1})"


def _crowd(word: str, shift: int) -> str:
    """Returns the name of the table of the values that too many prints have in a band."""
    return f"crowd_{word}_{shift}"


class Search:
    """Finds the copies among the images of several sets.

    Args:
      sets: the sets; those of one role may be in any order.
      near: whether to also find near copies.

    Attributes:
      crowded: number of images that are in a crowd in every band, so that only those with equal
        fingerprints are found to be their copies (evaluation images excepted).

    Raises:
      OSError: If TMPDIR has too little space for near copies.
    """

    def __init__(self, sets: Sequence[ImageSet], *, near: bool = True):
        self._files = [(one.role, path) for one in sets for path in one.files]
        self._db = self._load(sets, near)
        self.crowded = 0
        if near:
            self.crowded = self._count_crowded()
            self._compare("queries", "place", _EVALUATION_BANDS)
            self._compare("prints", "first", _TRAINING_BANDS)
        self._db.execute(_COPIES.format(columns=", ".join(_WORDS)))

    def _load(self, sets: Sequence[ImageSet], near: bool) -> duckdb.DuckDBPyConnection:
        tables: dict[str, Sequence[str]] = {}
        selects, words, first = [], ", ".join(_WORDS), 0
        for number, one in enumerate(sets):
            view = f"marks_{number}"
            tables[view] = one.marks
            # A row of an index names its shard; rows of `image_marks` do not.
            template = _OF_INDEX if one.workers else _OF_MARKS
            values = {"role": one.role, "words": words, "first": first, "workers": one.workers}
            selects.append(template.format(view=view, **values))
            first += len(one.files)
        numbered = [name for name, one in zip(tables, sets) if not one.workers]
        db = parquet_sql.connect(available_cpus(), numbered=numbered, **tables)
        if near:
            counts = " UNION ALL ".join(f"SELECT count(*) FROM {view}" for view in tables)
            rows = sum(count for (count,) in db.execute(counts).fetchall())
            if BYTES_PER_ROW * rows > parquet_sql.MEMORY_BYTES:
                local_files.require_bytes(BYTES_PER_ROW * rows, f"comparing {rows} fingerprints")
        # Images without structure have only zero bits; if `near` is False, no image has structure.
        structured = " OR ".join(f"{word} != 0" for word in _WORDS) if near else "false"
        db.execute(
            _IMAGES.format(" UNION ALL ".join(selects), words=words, structured=f"({structured})")
        )
        return db

    def _compare(self, table: str, first: str, bands: Sequence[tuple[str, int, int]]) -> None:
        differ = " + ".join(f"bit_count(xor(a.{word}, b.{word}))::INT" for word in _WORDS)
        with Progress(len(bands), f"comparing {table}", "bands") as progress:
            for word, shift, bits in bands:
                self._db.execute(
                    _COMPARE.format(
                        key=_key(word, shift, bits),
                        first=first,
                        table_a=table,
                        words=", ".join(_WORDS),
                        distance=differ,
                        threshold=fingerprints.THRESHOLD,
                        # Evaluation images are few enough to be compared with crowds as well.
                        crowd=f"AND band NOT IN (FROM {_crowd(word, shift)})"
                        if table == "prints"
                        else "",
                    )
                )
                progress.update(1)

    def _count_crowded(self) -> int:
        """Finds the crowds of each band; returns the images that are in a crowd in every band."""
        for word, shift, bits in _TRAINING_BANDS:
            self._db.execute(
                f"CREATE TABLE {_crowd(word, shift)} AS SELECT {_key(word, shift, bits)} AS band "
                f"FROM prints GROUP BY band HAVING count(*) > {_CROWD}"
            )
        everywhere = " AND ".join(
            f"{_key(word, shift, bits)} IN (FROM {_crowd(word, shift)})"
            for word, shift, bits in _TRAINING_BANDS
        )
        columns = ", ".join(_WORDS)
        number = self._db.execute(
            f"SELECT count(*) FROM images WHERE ({columns}) IN (SELECT ({columns}) FROM prints WHERE {everywhere})"
        ).fetchall()[0][0]
        if number:
            logging.warning(
                "%d images are similar to more than %d others in every band; among training images, only "
                "exact fingerprint matches of them are found",
                *(number, _CROWD),
            )
        return number

    def totals(self) -> dict[tuple[int, int, bool], tuple[int, int]]:
        """Returns {(role, role of the first image, equal content): (copies, excluded copies)}."""
        rows = self._db.execute(
            "SELECT place.role, origin.role, distance < 0, count(*), "
            f"count_if({EXCLUDED})::BIGINT FROM copies GROUP BY ALL ORDER BY ALL"
        ).fetchall()
        return {(a, b, same): (copies, out) for a, b, same, copies, out in rows}

    def copies(self, where: str = "true", limit: int | None = None) -> Iterator[Copy]:
        """Yields the copies by role of the first image and of the copy, the most different first.

        Args:
          where: SQL condition on `place`, `origin` and `distance`; `EXCLUDED` is one.
          limit: maximum number; None: all.
        """
        end = "" if limit is None else f"LIMIT {limit}"
        # A cursor, because another query would end the one that is being read.
        found = self._db.cursor().execute(
            "SELECT place.role, place.file, place.record, origin.role, origin.file, origin.record, distance "
            f"FROM copies WHERE {where} ORDER BY origin.role, place.role, distance DESC, place {end}"
        )
        while rows := found.fetchmany(_AT_ONCE):
            for role, f, record, of_role, of, of_record, distance in rows:
                copied = (role, self._files[f][1], record)
                yield Copy(*copied, of_role, self._files[of][1], of_record, distance)

    def named(self) -> dict[str, set[int]]:
        """Returns file → records of the evaluation and labeled images that are or have copies."""
        found: dict[str, set[int]] = {}
        sides = (
            f"SELECT {side}.file, {side}.record FROM copies WHERE {side}.role < {UNLABELED}"
            for side in ("place", "origin")
        )
        for file, record in self._db.execute(" UNION ".join(sides)).fetchall():
            found.setdefault(self._files[file][1], set()).add(record)
        return found
