"""Export a trained model: `python -m efficientnet_ns.export_model --model_dir=… --export_dir=…`."""

from __future__ import annotations

from absl import flags

from efficientnet_ns import config as config_lib
from efficientnet_ns.config import Config, ConfigError


def export_model(config: Config, export_dir: str, version: int, *, ema: bool = True) -> str:
    """Exports the newest checkpoint of `model_dir` (or the one at `init_model_path`).

    Returns:
      The folder of the SavedModel.
    """
    from efficientnet_ns.experiment import Experiment
    from efficientnet_ns.models import weights
    from efficientnet_ns.serving import export

    path = config.train.init_model_path or config.train.model_dir
    if not path or not export_dir:
        raise ConfigError("--export_dir and --model_dir (or --init_model_path) are needed")
    experiment = Experiment.from_config(config)
    model = experiment.build_model()
    weights.load_weights(model, path, ema=ema)
    return export.export(model, experiment.preprocessing(), export_dir, version)


def main(argv: list[str]) -> None:
    config_lib.no_arguments(argv)
    settings = config_lib.from_flags(Config, flags.FLAGS)
    values = flags.FLAGS
    print(export_model(settings, values.export_dir, values.version, ema=values.ema))


def run() -> None:
    """The command line."""
    config_lib.define_flags(Config)
    flags.DEFINE_string("export_dir", "", "Folder in which the version's folder is made.")
    flags.DEFINE_integer("version", 1, "Number of the version; servers take the highest.")
    flags.DEFINE_bool("ema", True, "Export the moving-average weights, not the raw ones.")
    config_lib.run(main)


if __name__ == "__main__":
    run()
