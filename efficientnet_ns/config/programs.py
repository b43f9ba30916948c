"""Settings of programs for a single model: robustness, export, photos, conversion, benchmarks."""

from __future__ import annotations

import dataclasses

from efficientnet_ns.config.fields import Settings, setting


@dataclasses.dataclass(frozen=True)
class CustomRobustnessConfig(Settings):
    """Attacks and corruptions for any labeled set, given by task_name and label_data_dir."""

    epsilons: str = setting(
        "",
        "FGSM and PGD: maximum change of each pixel value, in 0..255; several joined with ',', e.g. "
        "2,4,8,16.",
    )
    pgd_steps: int = setting(10, "Gradient steps of PGD.", low=1)
    pgd_step_size: float | None = setting(
        None, "Size of each step, in pixel values; default: 2.5 epsilon / pgd_steps.", low=0
    )
    corrupt: str = setting(
        "",
        "Corruptions of ImageNet-C to apply, joined with ','; all: the 15 that its mean covers. "
        "Requires pip install 'efficientnet-ns[robustness]'.",
    )
    severities: str = setting("1,2,3,4,5", "Severities of the corruptions, joined with ','.")
    baseline: str = setting(
        "",
        "Weights of a baseline model to measure as well; errors are also reported relative to it.",
    )
    baseline_model_name: str = setting("", "Variant of the baseline; default: the same model.")
    image_set: str = setting(
        "",
        "Prefix of the records to evaluate on; default: the task's evaluation set. num_eval_images "
        "limits it to the first N.",
    )


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig(Settings):
    """What `benchmark.py` measures, and on what."""

    what: str | None = setting(
        None,
        "What to measure.",
        choices=("input", "predict", "select", "copies", "serving", "train", "scale", "compiled"),
    )
    data: str = setting(
        "",
        "Folder of images or of records (input, predict, copies); default: generated images (copies: none).",
    )
    model_name: str = setting("efficientnet-b0", "Variant to measure.")
    image_size: int = setting(224, "Image side in pixels.", low=8)
    batch_size: int = setting(16, "Images per step.", low=1)
    seconds: float = setting(10.0, "Duration of each measurement.", low=0.1)
    threads: int | None = setting(
        None, "CPU threads (input, train, predict, serving); default: all.", low=1
    )
    rows: int = setting(
        30_000_000, "Predictions to select from (select), or images to compare (copies).", low=1
    )
    classes: int = setting(1000, "Classes of the predictions (select).", low=1)
    hosts: int = setting(8, "Hosts that share each batch (scale).", low=1)
    files: int = setting(1024, "Record files of the set (scale).", low=1)
    records: int = setting(1_281_167, "Records of the set (scale).", low=1)
    record_bytes: int = setting(109_000, "Bytes of a record (scale).", low=17)
    json_file: str = setting("", "Also write the results to this file.")


@dataclasses.dataclass(frozen=True)
class ModeConfig(Settings):
    """What `main.py` does."""

    mode: str = setting(
        "train_and_eval",
        "What to do.",
        # Differs (5) in docs/differences.md: the default trains and evaluates.
        choices=("train", "eval", "train_and_eval", "predict"),
    )


# Values that a flag for weights accepts.
_WEIGHTS = "a path; published (those of --model_name in an installed package); or a variant's name"
_PLACES = "; or a folder of records, or tfds:<name>."


@dataclasses.dataclass(frozen=True)
class RobustnessConfig(Settings):
    """The paper's robustness sets; each set given is measured."""

    weights: str = setting("", f"Weights of the model: {_WEIGHTS}; default: those in model_dir.")
    report_dir: str = setting("", "Folder of the results.")
    allow_missing: bool = setting(
        False, "Also measure sets with missing parts, without reporting their mean."
    )
    imagenet_a: str = setting("", f"ImageNet-A: <wnid>/*{_PLACES} Predicts only its 200 classes.")
    imagenet_r: str = setting("", f"ImageNet-R: <wnid>/*{_PLACES} Predicts only its 200 classes.")
    imagenet_v2: str = setting(
        "", f"ImageNet-V2, matched frequency: <class number>/* or <wnid>/*{_PLACES}"
    )
    imagenet_sketch: str = setting("", f"ImageNet-Sketch: <wnid>/*{_PLACES}")
    imagenet_c: str = setting(
        "",
        "ImageNet-C: <corruption>/<severity>/<wnid>/*; or tfds:imagenet2012_corrupted, with "
        "/<corruption>_<severity> for a single part.",
    )
    imagenet_p: str = setting(
        "", "ImageNet-P: <perturbation>/<wnid>/<clip>.mp4, .gif or /<a picture per frame>."
    )
    imagenet_val: str = setting(
        "", "ImageNet validation images, ILSVRC2012_val_*.JPEG, for --real_labels."
    )
    real_labels: str = setting("", "real.json, the ReaL labels of the validation images.")

    def places(self) -> dict[str, str]:
        """Returns flag → location of each set; "" for sets not given."""
        names = ["imagenet_a", "imagenet_r", "imagenet_v2", "imagenet_sketch"]
        names += ["imagenet_c", "imagenet_p", "imagenet_val", "real_labels"]
        return {name: getattr(self, name) for name in names}


@dataclasses.dataclass(frozen=True)
class ExportConfig(Settings):
    """What to export."""

    export_dir: str = setting("", "Folder for the version's folder or file.")
    version: int | None = setting(
        None, "Version number; servers load the highest one. Default: the next one.", low=1
    )
    ema: bool = setting(True, "Export the moving-average weights, not the raw ones.")
    format: str = setting("savedmodel", "File format.", choices=("savedmodel", "tflite", "onnx"))
    optimize_for: str = setting(
        "cpu",
        "cpu: batch norm folded, weights frozen; accelerator: folded; none: as trained. Not for TFLite, "
        "where batch norm is always folded.",
        choices=("cpu", "accelerator", "none"),
    )
    serving_dtype: str = setting(
        "float32", "Compute precision of the SavedModel.", choices=("float32", "bfloat16")
    )
    tflite_type: str = setting(
        "float32",
        "Number type of the TFLite file; int8 requires --calibration_data or --check_data.",
        choices=("float32", "float16", "dynamic", "int8"),
    )
    top_k: int = setting(5, "Number of classes in the top-K outputs.", low=1)
    check_data: str = setting(
        "",
        "Folder of images, class folders or records, or an archive of images, on which the export is "
        "compared with the model.",
    )
    check_images: int = setting(
        200, "Maximum number of images of --check_data, and of --calibration_data.", low=1
    )
    calibration_data: str = setting(
        "",
        "Images for calibrating int8, in the formats of --check_data: at least 100, similar to those "
        "that the model will see; default: those of --check_data.",
    )


@dataclasses.dataclass(frozen=True)
class PhotosConfig(Settings):
    """How `predict_image.py` classifies."""

    weights: str = setting("", f"Weights of the model: {_WEIGHTS}; default: those in model_dir.")
    top: int = setting(5, "Number of classes per photo.", low=1)
    json: bool = setting(False, "Print one JSON object per photo, one per line.")
    ema: bool = setting(True, "Use the moving-average weights, not the raw ones.")


@dataclasses.dataclass(frozen=True)
class ListConfig(Settings):
    """How `list_models.py` lists the models."""

    count: bool = setting(
        False, "Count parameters and multiply-adds from the graphs instead (takes a minute)."
    )
    json: bool = setting(False, "Print a JSON list of objects instead of the table.")


@dataclasses.dataclass(frozen=True)
class ConvertConfig(Settings):
    """What `convert_checkpoint.py` reads and writes."""

    source: str = setting(
        "", "Checkpoint, .h5, .keras, .safetensors or .pth file to read; or published."
    )
    model_dir: str = setting(
        "", "Instead of source: training folder, or work_dir of noisy_student."
    )
    target: str = setting("", "A .safetensors file or the prefix of a checkpoint to write.")
    ema: bool = setting(True, "Read the moving-average weights, not the raw ones.")
