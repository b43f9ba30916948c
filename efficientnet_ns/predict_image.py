"""Classify photos, or all photos in folders: `python -m efficientnet_ns.predict_image --model_dir=DIR photo.jpg …`."""

from __future__ import annotations

from efficientnet_ns import config
from efficientnet_ns.config import Config, PhotosConfig


def main(settings: Config, options: PhotosConfig, photos: list[str]) -> int:
    from efficientnet_ns.inference import photo_files

    return photo_files.print_predictions(settings, options, photos)


if __name__ == "__main__":
    config.run(main, Config, PhotosConfig, words=True)
