"""Train a good model from two folders of pictures.

    python -m efficientnet_ns.noisy_student --labeled=photos --unlabeled=more_photos --work_dir=run

`photos` has one folder per class. A teacher is trained on it and labels `more_photos`; noised students
are trained on both. Rules derive every setting from the pictures and the machine (--dry_run shows the
settings and the estimated time). Each flag that you pass overrides its rule; the defaults below apply
only to folders of records. If killed, the same command continues.

With folders of records instead (--label_data_dir, --task_name, --unlabel_data_dir), all settings come
from the flags, and the output is one line of JSON per model.
"""

from __future__ import annotations

from efficientnet_ns import config
from efficientnet_ns.config import Config, LoopConfig, PicturesConfig


def main(pictures: PicturesConfig, settings: Config, loop: LoopConfig) -> None:
    from efficientnet_ns.loop import one_command

    one_command.run(pictures, settings, loop)


if __name__ == "__main__":
    config.run(main, PicturesConfig, Config, LoopConfig)
