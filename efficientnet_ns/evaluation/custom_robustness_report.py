"""Writes the results of `custom_robustness` as JSON, Markdown and HTML."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from efficientnet_ns import report
from efficientnet_ns.evaluation import robustness_metrics as metrics
from efficientnet_ns.evaluation.custom_robustness import BASELINE, MODEL, Found
from efficientnet_ns.files import atomic, json_files, text_table

_RELATIVE = "CE, relative to the baseline"


def relative_errors(errors: Mapping[str, Mapping[str, list[float]]]) -> dict[str, float | None]:
    """Computes the CE of each corruption: the model's summed error divided by the baseline's.

    As in mCE, but with the baseline instead of AlexNet. Errors are summed over the severities. None
    if the baseline makes no errors.

    Args:
      errors: corruption → model → error by severity.
    """
    return {
        name: sum(of[MODEL]) / sum(of[BASELINE]) if sum(of[BASELINE]) else None
        for name, of in errors.items()
    }


def mean_relative_error(errors: Mapping[str, Mapping[str, list[float]]]) -> float | None:
    """Returns the mean relative CE of the measured corruptions, without the extra four.

    Returns None if none of the 15 was measured or a CE is undefined.
    """
    relative = relative_errors(errors)
    measured = [relative[name] for name in metrics.ALEXNET_ERROR if name in relative]
    defined = [value for value in measured if value is not None]
    return float(np.mean(defined)) if measured and len(defined) == len(measured) else None


def corruption_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns errors in percent: a row for clean images, one per corruption and a mean."""
    errors, models = results["corruptions"], list(results["models"])
    clean = {f"{m} error": _percent(results["clean"][m]) for m in models}
    rows: list[dict[str, Any]] = [{"corruption": "none (clean)", **clean}]
    for name, of in errors.items():
        mean = {f"{m} error": _percent(np.mean(of[m])) for m in models}
        rows.append({"corruption": name, **mean})
    counted = [name for name in metrics.ALEXNET_ERROR if name in errors]
    note = ", without the extra ones" if len(errors) > len(counted) else ""
    last: dict[str, Any] = {"corruption": f"mean of {len(counted)}{note}"}
    for model in models if counted else []:
        last[f"{model} error"] = _percent(np.mean([errors[name][model] for name in counted]))
    if BASELINE in models:
        relative = relative_errors(errors)
        for entry in rows:
            # None in the row of clean images, for which CE is undefined.
            entry[_RELATIVE] = _percent(relative.get(entry["corruption"]))
        last[_RELATIVE] = _percent(mean_relative_error(errors))
    return [*rows, last] if counted else rows


def severity_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns errors in percent: one row per corruption and model, one column per severity."""
    return [
        {"corruption": name, "model": model, **dict(zip(severities, map(_percent, values)))}
        for name, of in results["corruptions"].items()
        for model, values in of.items()
        for severities in [[f"severity {s}" for s in results["severities"]]]
    ]


def attack_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns top-1 accuracy in percent: one row per ε."""
    return [
        {
            "epsilon": epsilon,
            **{
                f"{model} {attack}": _percent(found[model][key])
                for key, attack in (("clean", "clean"), ("fgsm", "FGSM"), ("pgd", "PGD"))
                for model in results["models"]
            },
        }
        for epsilon, found in results["attacks"].items()
    ]


def _percent(fraction: float | None) -> float | None:
    return None if fraction is None else round(100 * float(fraction), 1)


def tables(results: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Maps the titles of the measured tables to their rows."""
    found = {}
    if "attacks" in results:
        found["Top-1 under attack, percent (epsilon in pixel values of 255)"] = attack_rows(results)
    if "corruptions" in results:
        found["Error on corrupted images, percent"] = corruption_rows(results)
    return found


def markdown(results: Mapping[str, Any]) -> str:
    """Returns the tables in Markdown."""
    return "\n".join(
        f"{title}\n\n{text_table.markdown(rows)}" for title, rows in tables(results).items()
    )


def write(folder: str, found: Found) -> None:
    """Writes `own_set.json`, `own_set.md` and `own_set.html`."""
    results = dict(found.results)
    if "corruptions" in results and BASELINE in results["models"]:
        results["ce"] = relative_errors(results["corruptions"])
        results["mce"] = mean_relative_error(results["corruptions"])
    json_files.write_json(os.path.join(folder, "own_set.json"), results, indent=1)
    atomic.write(os.path.join(folder, "own_set.md"), markdown(results))
    sections = [report.Section(t, report.table(rows)) for t, rows in tables(results).items()]
    if "corruptions" in results:
        columns = len(results["severities"])
        size = max(112, min(224, results["image_size"]))
        sections += [
            report.Section("Error by severity, percent", report.table(severity_rows(results))),
            report.Section(
                "One image", report.image_grid(found.pictures, columns=columns, pixel_size=size)
            ),
        ]
    lines = [f"{name}: {path}" for name, path in results["models"].items()]
    about = f"{results['examples']} images of {results['set']} at {results['image_size']} pixels."
    report.write_page(
        os.path.join(folder, "own_set.html"),
        title="Attacks and corruptions",
        intro="\n\n".join([about, *lines]),
        sections=sections,
    )
