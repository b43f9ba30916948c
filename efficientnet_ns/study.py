"""Repeat the paper's ablations on your task: named studies, several seeds, one table.

`python -m efficientnet_ns.study --flagfile=flags/run/study/quick.flags --work_dir=runs/study`

Every training, labeling and selection run has a folder in `--work_dir` whose name is a hash of its
settings, so work that arms and studies share is done once, and a killed study continues with
the same command. Results: `study.json`, `study.md`, `study.png`, `study.html`.
"""

from __future__ import annotations

from efficientnet_ns import config
from efficientnet_ns.config import Config, LoopConfig, StudyConfig


def main(settings: Config, loop: LoopConfig, options: StudyConfig) -> None:
    from efficientnet_ns.loop import study, study_results

    print(study_results.markdown(study.run_study(settings, loop, options)), end="")


if __name__ == "__main__":
    config.run(main, Config, LoopConfig, StudyConfig)
