"""Two folders of pictures in, a good model out.

    python -m efficientnet_ns.noisy_student --labeled=photos --unlabeled=more_photos --work_dir=run

`photos` has one folder per class. A teacher learns from it and labels `more_photos`; noised students
learn from both. Every setting follows from the pictures and the machine by rule (--dry_run tells
which, and how long it takes); every flag overrides its rule. Killed, the same command continues.

With folders of records instead (--label_data_dir, --task_name, --unlabel_data_dir) every setting is
the flags'; prints one line of JSON per model.
"""

from __future__ import annotations

from efficientnet_ns import config
from efficientnet_ns.config import Config, LoopConfig, PicturesConfig


def main(pictures: PicturesConfig, settings: Config, loop: LoopConfig) -> None:
    from efficientnet_ns.loop import one_command

    one_command.run(pictures, settings, loop)


if __name__ == "__main__":
    config.run(main, PicturesConfig, Config, LoopConfig)
