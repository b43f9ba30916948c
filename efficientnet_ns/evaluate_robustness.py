"""Evaluate robustness: on the paper's sets, or on your set, attacked and corrupted.

`python -m efficientnet_ns.evaluate_robustness --model_dir=DIR --imagenet_c=DIR … --report_dir=DIR`.
`python -m efficientnet_ns.evaluate_robustness --model_dir=DIR --corrupt=all --epsilons=2,4
--baseline=DIR --report_dir=DIR`.

Finished parts are kept in report_dir: run a stopped command again to continue.
"""

from __future__ import annotations

from efficientnet_ns import config
from efficientnet_ns.config import Config, CustomRobustnessConfig, RobustnessConfig


def main(settings: Config, own: CustomRobustnessConfig, sets: RobustnessConfig) -> None:
    from efficientnet_ns.evaluation import robustness_program

    print(robustness_program.evaluate_and_report(settings, own, sets), end="")


if __name__ == "__main__":
    config.run(main, Config, CustomRobustnessConfig, RobustnessConfig)
