"""Small real images: coloured shapes in a folder a class, an image processor, the flags of a tiny ViT."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from PIL import Image, ImageDraw
from transformers import ViTImageProcessorPil
from transformers.utils import is_torchvision_available

from harness.config import release

needs_image_processor = pytest.mark.skipif(
    release("transformers") < (5, 20) and not is_torchvision_available(),
    reason="below 5.20 the AutoImageProcessor of transformers needs torchvision",
)
SHAPES = ("circle", "square", "triangle")
TINY_VIT = "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=32,patch_size=4"


def draw(shape: str, seed: int) -> Image.Image:
    """A shape of a colour, on a ground of another; 24 to 40 pixels a side."""
    dice = random.Random(f"{shape} {seed}")
    image = Image.new("RGB", (dice.randint(24, 40), dice.randint(24, 40)), (dice.randint(0, 90),) * 3)
    box = (4, 4, image.width - 5, image.height - 5)
    fill = tuple(dice.randint(128, 255) for _ in range(3))
    pen = ImageDraw.Draw(image)
    if shape == "circle":
        pen.ellipse(box, fill=fill)
    elif shape == "square":
        pen.rectangle(box, fill=fill)
    else:
        pen.polygon([(box[0], box[3]), (box[2], box[3]), (image.width // 2, box[1])], fill=fill)
    return image


def save_images(folder: Path, each: int, *, first: int = 0) -> Path:
    for shape in SHAPES:
        (folder / shape).mkdir(parents=True, exist_ok=True)
        for number in range(first, first + each):
            draw(shape, number).save(folder / shape / f"{number}.png")
    return folder


def save_image_processor(folder: Path, size: int = 16) -> Path:
    ViTImageProcessorPil(size={"height": size, "width": size}).save_pretrained(folder)
    return folder


def image_flags(folder: Path, each: int = 7) -> dict[str, str]:
    """A tiny ViT on shapes, and the folders that it needs."""
    return {
        "task": "image-classification",
        "model_type": "vit",
        "config_overrides": TINY_VIT,
        "image_processor_name": str(save_image_processor(folder / "processor")),
        "train_dir": str(save_images(folder / "train", each)),
        "validation_dir": str(save_images(folder / "validation", 3, first=100)),
    }
