"""The flags of tasks on images."""

from __future__ import annotations

from dataclasses import dataclass

from harness.config import arg, section


@section("image-classification")
@dataclass(frozen=True, kw_only=True)
class ImageClassificationFlags:
    """A label for each image."""

    train_dir: str | None = arg(help="Folder with training images, a subfolder a class.", path="folder")
    validation_dir: str | None = arg(help="Folder with validation images, likewise.", path="folder")
    image_column_name: str | None = arg(help="Column of the images; default: image.")
    image_processor_name: str | None = arg(
        help="Image processor on the Hub or folder; defaults to the model's.", path="model"
    )
    without_augmentation: bool = arg(False, "Train on the images as they are, not on random crops and mirror images.")
