"""Results of a study: mean and spread over seeds, differences, and the paper's figures."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from efficientnet_ns import report
from efficientnet_ns.files import atomic, json_files, text_table
from efficientnet_ns.loop.questions import Arm, Study
from efficientnet_ns.report import style

# Probability that a difference counts by chance.
_CHANCE = 0.05
_READINGS = {True: "as in the paper", False: "not as in the paper", None: "not stated in the paper"}


def mean_sd(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Returns mean and sample standard deviation (n - 1); None if there are too few values."""
    mean = float(np.mean(values)) if len(values) else None
    return mean, float(np.std(values, ddof=1)) if len(values) > 1 else None


def noise(differences: Sequence[float]) -> float | None:
    """Returns the least absolute mean difference that counts: half its 95 % interval (Student's t).

    Returns None for fewer than two differences.
    """
    from scipy import stats

    number = len(differences)
    if number < 2:
        return None
    quantile = stats.t.ppf(1 - _CHANCE / 2, number - 1)
    return float(quantile * np.std(differences, ddof=1) / np.sqrt(number))


def reading(differences: Sequence[float], expected: int | None) -> str:
    """Describes a difference to another arm in words.

    Args:
      differences: by seed.
      expected: sign of the paper's difference; see `Arm.expected`.
    """
    threshold = noise(differences)
    if threshold is None:
        return "one seed is not enough" if len(differences) else ""
    mean = float(np.mean(differences))
    if abs(mean) <= threshold:
        return "below the noise" + (", as in the paper" if expected == 0 else "")
    agrees = None if expected is None else bool(np.sign(mean) == expected)
    return f"{'better' if mean > 0 else 'worse'}: {_READINGS[agrees]}"


def summary(
    studies: Mapping[str, Study],
    seeds: Sequence[int],
    found: Mapping[tuple[int, str, str], Mapping[str, Any] | None],
) -> dict[str, Any]:
    """Returns the contents of `study.json`.

    Args:
      studies: by name.
      seeds: those that every arm was run with.
      found: (seed, study, arm) → `measured` (set → metrics), `seconds`, …; None: no result.

    Returns:
      `set` (the last one measured on, which is the test set if there is one), `seeds`, and
      `studies`: name → question, source, finding and `arms`: name → `top1` by seed (fractions, None
      without a result), `seconds` of its last training by seed, and the columns of `_row`.
    """
    measured_on = {list(result["measured"])[-1] for result in found.values() if result}
    overview: dict[str, Any] = {"set": ", ".join(measured_on), "seeds": list(seeds), "studies": {}}
    for name, study in studies.items():
        results = {arm: [found[seed, name, arm] for seed in seeds] for arm in study.arms}
        top1 = {arm: [_top1(result) for result in of] for arm, of in results.items()}
        first = next(iter(study.arms))
        overview["studies"][name] = {
            "question": study.question,
            "source": study.source,
            "finding": study.finding,
            "arms": {
                label: {
                    "changes": dict(arm.changes),
                    # Keys are strings, as JSON would make them.
                    "top1": dict(zip(map(str, seeds), top1[label])),
                    "seconds": [result and result["seconds"] for result in results[label]],
                    **_row(arm, top1[label], top1[arm.against or first], label == first),
                    "against": "" if label == first else arm.against or first,
                }
                for label, arm in study.arms.items()
            },
        }
    return overview


def _top1(result: Mapping[str, Any] | None) -> float | None:
    return None if result is None else list(result["measured"].values())[-1]["top1"]


def _row(
    arm: Arm,
    values: Sequence[float | None],
    others: Sequence[float | None],
    is_first: bool,
) -> dict[str, Any]:
    """Returns an arm's mean, sd and differences by seed, in percent; paper's figure; reading."""
    own = [100 * value for value in values if value is not None]
    pairs = [(v, o) for v, o in zip(values, others) if v is not None and o is not None]
    differences = [] if is_first else [100 * (v - o) for v, o in pairs]
    mean, sd = mean_sd(own)
    difference, spread = mean_sd(differences)
    return {
        "mean": mean,
        "sd": sd,
        "n": len(own),
        "difference": difference,
        "difference_sd": spread,
        "paper": arm.paper,
        "reading": reading(differences, arm.expected),
    }


def table(overview: Mapping[str, Any], name: str) -> list[dict[str, str]]:
    """Returns the rows of a study, as strings."""
    measure = f"{overview['set']} top-1, %"
    rows = []
    for label, arm in overview["studies"][name]["arms"].items():
        first = next(iter(overview["studies"][name]["arms"]))
        versus = "" if arm["against"] in ("", first) else f" (to {arm['against']!r})"
        rows.append(
            {
                "arm": label,
                measure: f"{with_spread(arm['mean'], arm['sd'])} (n={arm['n']})",
                "difference": with_spread(arm["difference"], arm["difference_sd"], "+") + versus,
                "reading": arm["reading"] or "–",
                "paper": arm["paper"] or "–",
            }
        )
    return rows


def with_spread(mean: float | None, sd: float | None, sign: str = "") -> str:
    """Formats `mean ± sd`; omits the spread if it is None."""
    if mean is None:
        return "–"
    return f"{mean:{sign}.1f}" + ("" if sd is None else f" ± {sd:.1f}")


_LEGEND = (
    "Mean ± standard deviation over n seeds; differences are between runs of one seed, to the first "
    "arm unless stated. Below the noise: the 95 % interval of the mean difference (Student's t) "
    "includes 0. The paper's figures are ImageNet top-1."
)


def markdown(overview: Mapping[str, Any]) -> str:
    """Formats all studies as Markdown tables."""
    parts = [f"{_LEGEND}\n"]
    for name, study in overview["studies"].items():
        head = f"**{name}** {study['question']} The paper ({study['source']}): {study['finding']}"
        parts.append(f"{head}\n\n{text_table.markdown(table(overview, name))}")
    return "\n".join(parts)


def write(folder: str, overview: Mapping[str, Any]) -> None:
    """Writes `study.json`, `.md`, `.png` and `.html`."""
    path = {kind: os.path.join(folder, f"study.{kind}") for kind in ("json", "md", "png", "html")}
    json_files.write_json(path["json"], overview, indent=1)
    atomic.write(path["md"], markdown(overview))
    figure = plot(overview)
    with atomic.atomic_path(path["png"]) as temporary, tf.io.gfile.GFile(temporary, "wb") as f:
        figure.savefig(f, format="png", dpi=150, facecolor="white")
    sections = [
        report.Section(
            f"{name}: {study['question']}",
            report.paragraph(f"The paper ({study['source']}): {study['finding']}")
            + report.table(table(overview, name)),
        )
        for name, study in overview["studies"].items()
    ]
    drawn = style.figure(style.image(figure, "Top-1 by arm"), "Mean ± sd; a point per seed.")
    report.write_page(
        path["html"],
        title="The paper's ablations",
        intro=_LEGEND,
        sections=[*sections, report.Section("Plot", drawn)],
    )


def plot(overview: Mapping[str, Any]):
    """Draws a matplotlib figure: a panel per study, a line per arm, a point per seed, mean ± sd."""
    from matplotlib.figure import Figure

    studies = overview["studies"]
    heights = [len(study["arms"]) + 1 for study in studies.values()]
    # Not pyplot, which keeps its figures until they are closed.
    figure = Figure(figsize=(style.PAGE_WIDTH / 100, 0.32 * sum(heights) + 0.6), dpi=100)
    figure.set_layout_engine("constrained")
    panels = figure.subplots(
        len(studies), 1, squeeze=False, sharex=True, gridspec_kw={"height_ratios": heights}
    )[:, 0]
    for axes, (name, study) in zip(panels, studies.items()):
        for place, arm in enumerate(study["arms"].values()):
            points = [100 * value for value in arm["top1"].values() if value is not None]
            axes.plot(points, [place] * len(points), "o", color=style.COPIES, markersize=4)
            if points:
                color = style.MARK if place else style.KEPT
                axes.errorbar(arm["mean"], place, xerr=arm["sd"], fmt="D", color=color, capsize=3)
        axes.set_yticks(range(len(study["arms"])), list(study["arms"]), **style.PLAIN_TEXT)
        # From the top down, as in the tables.
        axes.set_ylim(len(study["arms"]) - 0.5, -0.5)
        axes.set_title(name, loc="left", fontsize=9, color=style.INK)
        axes.tick_params(colors=style.INK, labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", color=style.INK, alpha=0.2)
    label = f"{overview['set']} top-1, %"
    panels[-1].set_xlabel(label, color=style.INK, fontsize=9, **style.PLAIN_TEXT)
    return figure
