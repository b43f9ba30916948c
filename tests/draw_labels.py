"""Divides class folders into labeled, unlabeled and test pictures, to measure how well few labels work.

  python tests/draw_labels.py my_pictures runs/drawn --labels=40 --draw=0

`noisy_student` takes the three folders as --labeled, --unlabeled and --test.
Draws differ in their labeled pictures; all have the same test pictures. `truth.csv` has the classes
of the unlabeled pictures, on which settings can be chosen without the test pictures.
"""

from __future__ import annotations

import argparse
import csv
import random
import shutil
from pathlib import Path


def classes(source: Path) -> dict[str, list[Path]]:
    """Returns class → its pictures, sorted."""
    folders = sorted(path for path in source.iterdir() if path.is_dir())
    return {folder.name: sorted(filter(Path.is_file, folder.iterdir())) for folder in folders}


def divide(source: Path, output: Path, *, labels: int, test: float, draw: int) -> None:
    """Copies the pictures of `source` to `labeled/`, `unlabeled/` and `test/` in `output`.

    Args:
      labels: labeled pictures per class.
      test: fraction of each class that becomes test pictures.
      draw: selects which of the others are labeled.

    Raises:
      SystemExit: If `output` exists, or a class has too few pictures.
    """
    if output.exists():
        raise SystemExit(f"{output} exists: pass another folder")
    parts: dict[str, list[tuple[str, Path]]] = {"labeled": [], "unlabeled": [], "test": []}
    for name, pictures in classes(source).items():
        # Strings as seeds give the same order on every machine.
        random.Random(f"test {name}").shuffle(pictures)
        number = round(test * len(pictures))
        tested, others = pictures[:number], pictures[number:]
        if len(others) < labels:
            raise SystemExit(f"{name} has {len(others)} pictures without those of the test set")
        random.Random(f"{draw} {name}").shuffle(others)
        chosen = {"test": tested, "labeled": others[:labels], "unlabeled": others[labels:]}
        for part, paths in chosen.items():
            parts[part] += [(name, path) for path in paths]
    for part in ("labeled", "test"):
        for name, path in parts[part]:
            (output / part / name).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, output / part / name / path.name)
    unlabeled = parts["unlabeled"]
    random.Random(draw).shuffle(unlabeled)
    (output / "unlabeled").mkdir(parents=True)
    with (output / "truth.csv").open("w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["file", "label"])
        for number, (name, path) in enumerate(unlabeled):
            # Neither names nor order tell the class.
            anonymous = f"{number:06d}{path.suffix.lower()}"
            shutil.copyfile(path, output / "unlabeled" / anonymous)
            writer.writerow([anonymous, name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder with a folder of pictures per class")
    parser.add_argument("output", type=Path, help="folder to create")
    parser.add_argument("--labels", type=int, required=True, help="labeled pictures per class")
    parser.add_argument("--test", type=float, default=0.25, help="fraction of test pictures")
    parser.add_argument("--draw", type=int, default=0, help="number of the draw")
    options = parser.parse_args()
    divide(**vars(options))


if __name__ == "__main__":
    main()
