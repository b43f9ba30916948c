"""Write `report.html` for a labeling run, from its predictions and its selection."""

from __future__ import annotations

from efficientnet_ns import config
from efficientnet_ns.config import ReportConfig, SelectConfig


def main(selection: SelectConfig, options: ReportConfig) -> None:
    from efficientnet_ns.loop import labeling

    print(*labeling.report(selection, options), sep="\n")


if __name__ == "__main__":
    config.run(main, SelectConfig, ReportConfig)
