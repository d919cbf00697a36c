"""Classification of images, as Transformers' run_image_classification."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any

import datasets
import torch
from torch.utils.data import Dataset
from transformers import AutoModelForImageClassification, default_data_collator
from transformers.utils import is_vision_available

from harness.config import choice
from harness.errors import ConfigError
from harness.tasks import Task
from harness.tasks.flags import TaskConfig
from harness.tasks.labels import SINGLE, Labels, coded_names, read_labels, use_labels
from harness.tasks.predictions import recognised
from harness.tasks.pretrained import head_of, load_config, load_image_processor, load_model
from harness.tasks.rows import load_splits
from harness.tasks.scores.classification import LABEL_METRICS, LabelScores
from harness.tasks.splits import Split, Splits

# The flags that have no meaning for images.
UNREAD = {
    **dict.fromkeys(("tokenizer_name", "text_column_names", "task_name", "block_size"), "is of texts"),
    **dict.fromkeys(("max_seq_length", "pad_to_max_length", "line_by_line", "do_regression"), "is of texts"),
    "streaming": "is not supported for images, which are read when they are needed as it is",
    "preprocessing_num_workers": "prepares rows ahead, images are prepared as they are drawn: --dataloader_num_workers",
    "overwrite_cache": "has nothing to do, as images are prepared when they are drawn",
}
# A random crop's share of the image's area, and its ratio of width to height, as torchvision's RandomResizedCrop.
AREA, RATIO, TRIALS = (0.08, 1.0), (3 / 4, 4 / 3), 10


class Images(Dataset):  # type: ignore[type-arg]
    """
    Images as a model takes them: {"pixel_values": (channels, height, width) of float, "labels": id}.

    With a `size`, (height, width), each is a random crop of it, mirrored or not, drawn anew from torch's global
    generator whenever the sample is read. Without labels there is no such key.
    """

    def __init__(
        self, rows: Any, column: str, labels: Sequence[int] | None, *, processor: Any, size: tuple[int, int] | None
    ) -> None:
        self.rows, self.column, self.labels = rows.select_columns([column]), column, labels
        self.processor, self.size = processor, size

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            image = self.rows[index][self.column].convert("RGB")
        # The file is no image, or a part of one, or the row has none.
        except (OSError, SyntaxError, ValueError, AttributeError) as error:
            raise ConfigError(f"{self._place(index)} can't be read: {error}; remove or mend it.") from error
        options: dict[str, Any] = {}
        if self.size is not None:
            image, options = self._drawn(image, self.size), {"do_resize": False}
        pixels = self.processor(image, return_tensors="pt", **options)["pixel_values"][0]
        return {"pixel_values": pixels, **({} if self.labels is None else {"labels": self.labels[index]})}

    def _place(self, index: int) -> str:
        """Return where an image is: its file if it has one."""
        raw = self.rows.cast_column(self.column, datasets.Image(decode=False))[index][self.column]
        path = (raw or {}).get("path")
        return f"Image {index} of the data" + (f" ({path})" if path else "")

    def _drawn(self, image: Any, size: tuple[int, int]) -> Any:
        left, top, width, height = random_box(image.width, image.height)
        box = (left, top, left + width, top + height)
        image = image.resize(size[::-1], resample=getattr(self.processor, "resample", None), box=box)
        if torch.rand(1).item() < 0.5:
            from PIL.ImageOps import mirror

            image = mirror(image)
        return image


def build(config: TaskConfig) -> Task:
    """
    Read labelled images, learn the labels from the training data and load or make the model.

    Raises ConfigError for input that the user can correct.
    """
    _check(config)
    splits = load_splits(config)
    train = splits.to_learn_labels("train_dir")
    labels_from = splits.label_column(config)
    images_from = _image_column(config, splits)
    processor = load_image_processor(config)
    size = _size_of(processor)
    model_config = load_config(config, None)
    is_fresh = config.model_name_or_path is None and config.config_name is None
    if is_fresh and hasattr(model_config, "image_size") and "image_size" not in (config.config_overrides or ""):
        model_config.image_size = size[0] if size[0] == size[1] else list(size)
    labels = read_labels(splits, labels_from, config.do_regression)
    if labels.kind != SINGLE:
        raise ConfigError(
            f"{train.source}: column {labels_from!r} holds no single label an image; name another one by "
            "--label_column_name."
        )
    labels = use_labels(labels, model_config, **head_of(config, model_config, AutoModelForImageClassification))
    metric = config.metric_name or "accuracy"
    choice("metric_name", metric, LABEL_METRICS)

    def images(split: Split) -> Split:
        drawn = size if split.name == "train" and not config.without_augmentation else None
        ids = None if split.name == "test" else _ids(labels, split)
        return replace(split, rows=Images(split.rows, images_from, ids, processor=processor, size=drawn))

    samples = splits.hold_out(config, shuffled=True).cut(config).map(images)
    return Task(
        model=load_model(config, AutoModelForImageClassification, model_config, None),
        train_dataset=samples.rows("train"),
        eval_dataset=samples.rows("validation"),
        test_dataset=samples.rows("test"),
        data_collator=default_data_collator,
        processing_class=processor,
        metrics=lambda: LabelScores([metric], len(labels.names)),
        describe_predictions=labels.describe,
        predict_samples=partial(recognised, collate=default_data_collator, labels=labels),
    )


def random_box(width: int, height: int) -> tuple[int, int, int, int]:
    """Draw a random part of an image of that size: left, top, width, height, with torchvision's order of draws."""
    low, high = (math.log(value) for value in RATIO)
    for _ in range(TRIALS):
        area = width * height * torch.empty(1).uniform_(*AREA).item()
        ratio = math.exp(torch.empty(1).uniform_(low, high).item())
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = int(torch.randint(0, height - h + 1, size=(1,)))
            left = int(torch.randint(0, width - w + 1, size=(1,)))
            return left, top, w, h
    # The fallback: the largest centred part within the allowed ratios.
    w = min(width, round(height * RATIO[1]))
    h = min(height, round(width / RATIO[0]))
    return (width - w) // 2, (height - h) // 2, w, h


def _check(config: TaskConfig) -> None:
    if not is_vision_available():
        raise ConfigError("--task=image-classification needs Pillow: pip install 'accelerate-harness[vision]'.")
    for flag in (flag for flag in fields(config) if flag.name in UNREAD):
        value = getattr(config, flag.name)
        if value != flag.default:
            raise ConfigError(
                f"--{flag.name}={value} {UNREAD[flag.name]}; leave it out with --task image-classification."
            )


def _image_column(config: TaskConfig, splits: Splits) -> str:
    train = splits["train"]
    features = train.rows.features or {}
    found = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    column = config.image_column_name or ("image" if "image" in found or len(found) != 1 else found[0])
    if column not in found:
        raise ConfigError(
            f"--image_column_name={column}: {train.source} has no such column of images; its columns: "
            f"{', '.join(train.columns)}; with images: {', '.join(found) or 'none'}."
        )
    for split in splits.known:
        split.require_columns("image_column_name", column)
    return column


def _ids(labels: Labels, split: Split) -> list[int]:
    return labels.encode(split.rows[labels.column], coded_names(split.rows, labels.column), split.source)


def _size_of(processor: Any) -> tuple[int, int]:
    """
    Return the height and width that a processor resizes every image to.

    Raises ConfigError if there is no such size.
    """
    from PIL import Image

    make: Callable[[tuple[int, int]], Any] = partial(Image.new, "RGB")
    sizes = {
        tuple(processor(make(size), return_tensors="pt")["pixel_values"].shape[-2:]) for size in ((64, 96), (96, 64))
    }
    if len(sizes) > 1:
        raise ConfigError(
            f"The image processor {type(processor).__name__} brings images to no common size ({processor.size}), so "
            "they make no batch; give one with do_center_crop, or a height and width, by --image_processor_name."
        )
    height, width = sizes.pop()
    return height, width
