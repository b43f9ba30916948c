"""Train, evaluate or predict: `python -m efficientnet_ns.main --mode=train --flagfile=flags/…`.

Exit codes: 0 done; 2 a wrong flag or unusable data; 75 stopped by SIGTERM or Ctrl-C after saving:
start the same command again to continue.
"""

from __future__ import annotations

import json

from absl import flags, logging

from efficientnet_ns import config

MODES = ("train", "eval", "train_and_eval", "predict")


def main(argv: list[str]) -> None:
    config.no_arguments(argv)
    settings = config.from_flags(config.Config, flags.FLAGS)
    mode = flags.FLAGS.mode
    for argument in settings.legacy.without_effect():
        logging.warning("%s has no effect; see its help", argument)
    # TensorFlow is loaded here, after --help and wrong flags have been answered.
    if mode == "predict":
        from efficientnet_ns.pseudo_labels import predict

        result = predict.predict(settings)
    elif mode == "eval":
        from efficientnet_ns.training import train

        result = train.evaluate(settings)
    else:
        from efficientnet_ns.training import train

        # Differs (5): this mode, the default, trains and evaluates.
        result = train.train_and_evaluate(settings, evaluate=mode == "train_and_eval")
    print(json.dumps(result))


def run() -> None:
    """The command line."""
    flags.DEFINE_enum("mode", "train_and_eval", MODES, "What to do.")
    config.define_flags(config.Config)
    config.run(main)


if __name__ == "__main__":
    run()
