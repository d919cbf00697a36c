"""Image classification: data from folders, augmentation drawn exactly again, the Trainer's numbers, what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, ConvNextImageProcessorPil
from transformers import pipeline as make_pipeline

from harness.errors import ConfigError
from harness.tasks import Task, TaskConfig
from harness.tasks.image.classification import build, random_box
from harness.train import main
from tests.support.images import SHAPES, draw, image_flags, needs_image_processor, save_images
from tests.support.parity import TRAINING, as_flags, assert_equal_runs, history, run_harness, run_trainer

pytestmark = needs_image_processor
TASK = "image-classification"


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return image_flags(tmp_path_factory.mktemp("images"))


def built(given: dict[str, str], **more: Any) -> Task:
    return build(TaskConfig(**{**given, **more}))


def test_folders_become_samples_and_classes(given: dict[str, str]) -> None:
    task = built(given)
    assert (len(task.train_dataset), len(task.eval_dataset), task.test_dataset) == (21, 9, None)
    assert task.model.config.id2label == dict(enumerate(SHAPES))
    assert task.model.config.image_size == 16
    assert [task.eval_dataset[i]["labels"] for i in range(9)] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    batch = task.data_collator([task.train_dataset[i] for i in range(4)])
    assert (batch["pixel_values"].shape, batch["pixel_values"].dtype) == ((4, 3, 16, 16), torch.float32)
    assert batch["labels"].dtype == torch.int64
    assert set(task.model(**batch)) >= {"loss", "logits"}


def test_evaluation_reads_each_image_as_the_processor_gives_it(given: dict[str, str]) -> None:
    task, state = built(given), torch.get_rng_state()
    image = Image.open(Path(given["validation_dir"]) / "circle" / "100.png")
    expected = task.processing_class(image, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(task.eval_dataset[0]["pixel_values"], expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_training_draws_another_part_of_an_image_each_time(given: dict[str, str]) -> None:
    drawing, plain = built(given).train_dataset, built(given, without_augmentation=True).train_dataset
    torch.manual_seed(1)
    first, second = (drawing[0]["pixel_values"] for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(drawing[0]["pixel_values"], first)
    assert not torch.equal(first, second)
    assert torch.equal(plain[0]["pixel_values"], plain[0]["pixel_values"])


def test_images_are_mirrored_half_of_the_time(given: dict[str, str], tmp_path: Path) -> None:
    """Of images this long the part is always the same, so there are two ways to see one."""
    folder = save_images(tmp_path / "train", 2)
    shades = Image.linear_gradient("L").rotate(90).crop((0, 0, 250, 5)).convert("RGB")
    shades.save(folder / "circle" / "0.png")
    data = built(given, train_dir=str(folder)).train_dataset
    torch.manual_seed(0)
    seen = [data[0]["pixel_values"] for _ in range(60)]
    same = [torch.equal(pixels, seen[0]) for pixels in seen]
    assert 15 < sum(same) < 45
    (other, *_), (first, *_) = (
        [p for p, is_same in zip(seen, same, strict=True) if is_same == kind] for kind in (0, 1)
    )
    assert torch.allclose(other.flip(-1), first, atol=1e-6)
    assert not torch.allclose(other, first, atol=0.01)


@pytest.mark.parametrize(("width", "height"), [(40, 30), (1, 1), (500, 10), (10, 500)])
def test_a_random_box_lies_in_the_image(width: int, height: int) -> None:
    torch.manual_seed(0)
    boxes = [random_box(width, height) for _ in range(300)]
    for left, top, w, h in boxes:
        assert 0 <= left <= left + w <= width
        assert 0 <= top <= top + h <= height
        assert w >= 1 <= h
    if (width, height) == (40, 30):
        areas = sorted(w * h / 1200 for _, _, w, h in boxes)
        assert 0.06 < areas[0] < 0.15
        assert areas[-1] > 0.9
        assert all(0.7 < w / h < 1.42 for _, _, w, h in boxes)
        assert len(set(boxes)) > 200


STEPS: dict[str, Any] = {**TRAINING, "num_train_epochs": 4, "eval_strategy": "epoch", "save_strategy": "steps"}
STEPS |= {"save_steps": 4, "learning_rate": 5e-3}


def test_the_numbers_are_the_trainers_and_a_resume_is_exact(given: dict[str, str], tmp_path: Path) -> None:
    """With augmentation; the checkpoint is in the middle of an epoch."""
    task_config = {name: value for name, value in given.items() if name != "task"}
    task_config["config_overrides"] += ",hidden_dropout_prob=0.1"
    run_trainer(tmp_path / "theirs", STEPS, task=TASK, task_config=task_config)
    run_harness(tmp_path / "ours", STEPS, task=TASK, task_config=task_config)
    assert_equal_runs(tmp_path / "theirs", tmp_path / "ours")
    scores = [entry["eval_accuracy"] for entry in history(tmp_path / "ours") if "eval_accuracy" in entry]
    assert len(scores) == 4
    assert any(0 < score < 1 for score in scores)
    resumed = {**STEPS, "resume_from_checkpoint": tmp_path / "ours" / "checkpoint-4"}
    run_harness(tmp_path / "again", resumed, task=TASK, task_config=task_config)
    assert_equal_runs(tmp_path / "ours", tmp_path / "again")
    # The same without augmentation has other losses: it does something.
    run_harness(tmp_path / "plain", STEPS, task=TASK, task_config={**task_config, "without_augmentation": True})
    plain, ours = (
        [entry["loss"] for entry in history(tmp_path / name) if "loss" in entry] for name in ("plain", "ours")
    )
    assert len(plain) == len(ours) == 12
    assert plain != ours


def test_a_model_that_has_learnt_is_kept_with_its_processor_and_predicts(given: dict[str, str], tmp_path: Path) -> None:
    rows = datasets.load_dataset("imagefolder", data_dir=save_images(tmp_path / "train", 20))["train"]
    held = datasets.load_dataset("imagefolder", data_dir=given["validation_dir"])["train"]
    rows, held = (part.rename_columns({"image": "picture", "label": "shape"}) for part in (rows, held))
    datasets.DatasetDict({"train": rows, "test": held, "dev": held}).save_to_disk(tmp_path / "data")
    flags = {**given, "dataset_name": tmp_path / "data", "label_column_name": "shape", "output_dir": tmp_path / "run"}
    del flags["train_dir"], flags["validation_dir"]
    flags |= {"max_steps": 60, "learning_rate": 1e-2, "per_device_train_batch_size": 20, "report_to": "none"}
    flags |= {"save_strategy": "no", "metric_name": "f1", "seed": 0}
    switches = ["--use_cpu", "--without_augmentation", "--do_train", "--do_eval", "--do_predict"]
    assert main([*as_flags(flags), *switches]) == 0
    results = json.loads((tmp_path / "run" / "all_results.json").read_text(encoding="utf-8"))
    assert results["eval_f1"] > 0.7
    lines = (tmp_path / "run" / "predict_results.txt").read_text(encoding="utf-8").splitlines()[1:]
    found = [line.split("\t")[1] for line in lines]
    assert sum(a == SHAPES[b] for a, b in zip(found, held["shape"], strict=True)) >= 6
    classify = make_pipeline(TASK, model=str(tmp_path / "run"))
    assert [classify(image)[0]["label"] for image in held["picture"]] == found


def test_predictions_to_look_at(given: dict[str, str]) -> None:
    task = built(given)
    shown = task.predict_samples(task.model.eval(), [task.eval_dataset[i] for i in range(9)])  # type: ignore[misc]
    assert shown.columns == ("inputs", "labels", "predictions", "probability")
    assert [row[1] for row in shown.rows] == [shape for shape in SHAPES for _ in range(3)]
    assert shown.class_names == SHAPES


def without_labels(folder: Path) -> dict[str, Any]:
    for path in (folder / "train").rglob("*.png"):
        path.rename(folder / "train" / f"{path.parent.name}{path.name}")
    for path in (folder / "train").iterdir():
        if path.is_dir():
            path.rmdir()
    return {}


def without_images(folder: Path) -> dict[str, Any]:
    (folder / "rows.csv").write_text("image,label\nA.png,a\nB.png,b\n", encoding="utf-8")
    return {"train_dir": None, "train_file": str(folder / "rows.csv")}


def of_size(processor: Any) -> Callable[[Path], dict[str, Any]]:
    def save(folder: Path) -> dict[str, Any]:
        processor.save_pretrained(folder / "other")
        return {"image_processor_name": str(folder / "other")}

    return save


WRONG: dict[str, tuple[Callable[[Path], dict[str, Any]], str]] = {
    "no such folder": (lambda folder: {"train_dir": str(folder / "none")}, "no such folder"),
    "no images": (lambda folder: {"train_dir": str(folder / "processor")}, "--train_dir="),
    "no class folders": (without_labels, "has no column `label`"),
    "no column of images": (without_images, "has no such column of images"),
    "another column": (lambda _: {"image_column_name": "photo"}, "with images: image"),
    "two sources": (lambda folder: {"train_file": str(folder / "x.csv")}, "both name the training data"),
    "two validations": (lambda _: {"validation_file": "x.csv"}, "both name the validation data"),
    "no processor": (lambda _: {"image_processor_name": None}, "give --image_processor_name"),
    "a folder without": (lambda folder: {"image_processor_name": str(folder)}, "its image processor can't be loaded"),
    "sizes that differ": (
        of_size(CLIPImageProcessorPil(size={"shortest_edge": 16}, do_center_crop=False)),
        "brings images to no common size",
    ),
    "text's tokenizer": (lambda _: {"tokenizer_name": "gpt2"}, "--tokenizer_name=gpt2 is of texts"),
    "text's length": (lambda _: {"max_seq_length": 9}, "--max_seq_length=9 is of texts"),
    "streaming": (lambda _: {"streaming": True}, "--streaming=True is not supported for images"),
    "preparing ahead": (lambda _: {"preprocessing_num_workers": 2}, "--dataloader_num_workers"),
    "an unknown score": (lambda _: {"metric_name": "mse"}, "--metric_name=mse"),
    "no such model": (lambda _: {"model_type": "vitt"}, "Did you mean vit"),
    "no classifier": (lambda _: {"model_type": "gpt2", "config_overrides": None}, "gpt2"),
    "no training data": (lambda _: {"train_dir": None}, "give --train_dir"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused(name: str, tmp_path: Path) -> None:
    change, message = WRONG[name]
    given = image_flags(tmp_path, 2)
    with pytest.raises(ConfigError) as caught:
        built(given, **change(tmp_path))
    assert message in str(caught.value)


def test_flags_of_images_are_refused_elsewhere(given: dict[str, str]) -> None:
    for name in ("train_dir", "validation_dir", "image_column_name", "image_processor_name"):
        with pytest.raises(ConfigError, match=f"--{name}=x is of --task image-classification"):
            TaskConfig(task="causal-lm", **{name: "x"})
    with pytest.raises(ConfigError, match="--without_augmentation=True is of --task image-classification"):
        TaskConfig(task="causal-lm", without_augmentation=True)


@pytest.mark.filterwarnings("ignore:Exception ignored in. <_io.FileIO:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("size", [60, -40, 4], ids=["no pixels", "truncated", "no image"])
def test_an_image_that_can_not_be_read_is_named(given: dict[str, str], tmp_path: Path, size: int) -> None:
    folder = save_images(tmp_path / "train", 3)
    broken = folder / "square" / "1.png"
    broken.write_bytes(broken.read_bytes()[:size])
    data = built(given, train_dir=str(folder)).train_dataset
    with pytest.raises(ConfigError, match=r"Image 4 of the data \(.*square/1.png\) can't be read"):
        [data[i] for i in range(len(data))]


def test_a_folder_with_one_of_the_classes_has_its_id(given: dict[str, str], tmp_path: Path) -> None:
    valid = save_images(tmp_path / "valid", 2)
    for shape in SHAPES[:2]:
        shutil.rmtree(valid / shape)
    task = built(given, validation_dir=str(valid))
    assert [sample["labels"] for sample in task.eval_dataset] == [2, 2]
    with pytest.raises(ConfigError, match="has no label but 'triangle'; a classifier needs two"):
        built(given, train_dir=str(valid))


def test_a_folder_is_not_taken_as_a_pattern(given: dict[str, str], tmp_path: Path) -> None:
    save_images(tmp_path / "data1", 5)
    assert len(built(given, train_dir=str(save_images(tmp_path / "data[1]", 2))).train_dataset) == 6


def test_processors_that_crop_give_their_size(given: dict[str, str], tmp_path: Path) -> None:
    ConvNextImageProcessorPil(size={"shortest_edge": 20}, crop_pct=0.875).save_pretrained(tmp_path / "convnext")
    more = {"image_processor_name": str(tmp_path / "convnext"), "model_type": "convnext", "config_overrides": None}
    task = built(given, **more)
    assert {tuple(sample["pixel_values"].shape) for sample in (task.train_dataset[0], task.eval_dataset[0])} == {
        (3, 20, 20)
    }


@pytest.mark.parametrize(("place", "where"), [(".", "beside"), ("circle/deeper", "below")])
def test_an_image_that_lies_in_no_class_is_refused(
    given: dict[str, str], tmp_path: Path, place: str, where: str
) -> None:
    """Its class would be the name of the folder that it lies in."""
    folder = save_images(tmp_path / "train", 2)
    (folder / place).mkdir(exist_ok=True)
    (folder / "circle" / "0.png").rename(folder / place / "stray.png")
    (folder / "circle" / "notes.txt").write_text("no image")
    with pytest.raises(ConfigError, match=rf"--train_dir=.*stray\.png lies {where} the folders of the classes"):
        built(given, train_dir=str(folder))


def described(folder: Path, rows: Any, *, metadata: str = "metadata.csv") -> Path:
    """Images that lie beside a file with a row for each, its name and its label."""
    (folder / metadata).parent.mkdir(parents=True, exist_ok=True)
    for number, (name, _) in enumerate(rows):
        draw(SHAPES[number % 3], number).save((folder / metadata).parent / name)
    lines = [json.dumps({"file_name": name, "label": label}) for name, label in rows]
    if metadata.endswith(".csv"):
        lines = ["file_name,label", *(f"{name},{label}" for name, label in rows)]
    (folder / metadata).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def names_of(task: Task, data: Any) -> list[str]:
    return [task.model.config.id2label[sample["labels"]] for sample in data]


def test_labels_of_a_csv_beside_the_images_are_texts_as_they_stand(given: dict[str, str], tmp_path: Path) -> None:
    labels = ["01", "1", "NA", "null", "true", "1"]
    train = described(tmp_path / "train", [(f"{at}.png", label) for at, label in enumerate(labels)])
    valid = described(tmp_path / "valid", [("b.png", "01"), ("a.png", "1")])
    task = built(given, train_dir=str(train), validation_dir=str(valid), without_augmentation=True)
    assert sorted(task.model.config.label2id) == ["01", "1", "NA", "null", "true"]
    assert names_of(task, task.train_dataset) == labels
    assert names_of(task, task.eval_dataset) == ["01", "1"]
    expected = task.processing_class(Image.open(train / "3.png"), return_tensors="pt")["pixel_values"][0]
    assert torch.equal(task.train_dataset[3]["pixel_values"], expected)


def test_numbers_of_a_csv_beside_the_images_are_classes_by_size(given: dict[str, str], tmp_path: Path) -> None:
    train = described(tmp_path / "train", [(f"{at}.png", label) for at, label in enumerate(["10", "9", "1", "10"])])
    task = built(given, train_dir=str(train), validation_dir=None, validation_split_percentage=25)
    assert task.model.config.id2label == {0: "1", 1: "9", 2: "10"}
    assert (len(task.train_dataset), len(task.eval_dataset)) == (3, 1)
    (train / "metadata.csv").write_text("file_name;label\n0.png;1.5\n1.png;2.5\n2.png;3.5\n3.png;1.5\n")
    with pytest.raises(ConfigError, match="holds no single label an image"):
        built(given, train_dir=str(train), csv_delimiter=";")


def test_labels_of_a_jsonl_beside_the_images_have_one_type(given: dict[str, str], tmp_path: Path) -> None:
    labels = ["2024-05-01", "01", "NA", "1"]
    train = described(
        tmp_path / "train", [(f"{at}.png", label) for at, label in enumerate(labels)], metadata="metadata.jsonl"
    )
    task = built(given, train_dir=str(train), validation_dir=None, validation_split_percentage=1)
    assert sorted(task.model.config.label2id) == sorted(labels)
    numbers = described(tmp_path / "ids", [("a.png", 1), ("b.png", 10), ("c.png", 9)], metadata="metadata.jsonl")
    task = built(given, train_dir=str(numbers), validation_dir=str(numbers))
    assert names_of(task, task.eval_dataset) == ["1", "10", "9"]
    assert task.model.config.id2label == {0: "1", 1: "9", 2: "10"}


def test_each_folder_below_may_describe_its_own_images(given: dict[str, str], tmp_path: Path) -> None:
    """Labels have one type over all of them, and names start where the row stands."""
    described(tmp_path / "train", [("a.png", 1), ("b.png", 2)], metadata="first/metadata.jsonl")
    train = described(tmp_path / "train", [("a.png", "x"), ("./c.png", "2")], metadata="second/metadata.jsonl")
    (train / ".ipynb_checkpoints").mkdir()
    (train / ".ipynb_checkpoints" / "metadata.csv").write_text("file_name,label\nnone.png,3\n")
    task = built(given, train_dir=str(train), validation_dir=str(train))
    assert names_of(task, task.eval_dataset) == ["1", "2", "x", "2"]
    expected = Image.open(train / "second" / "a.png").convert("RGB")
    assert task.eval_dataset.rows[2]["image"].convert("RGB").tobytes() == expected.tobytes()


def test_a_parquet_beside_the_images_keeps_its_types(given: dict[str, str], tmp_path: Path) -> None:
    train = described(tmp_path / "train", [(f"{at}.png", at) for at in range(3)])
    features = datasets.Features(
        {"photo_file_name": datasets.Value("string"), "label": datasets.ClassLabel(names="xyz")}
    )
    rows = {"photo_file_name": ["2.png", "1.png", "0.png"], "label": [2, 1, 0]}
    datasets.Dataset.from_dict(rows, features).to_parquet(train / "metadata.parquet")
    (train / "metadata.csv").unlink()
    task = built(given, train_dir=str(train), validation_dir=str(train), image_column_name="photo")
    assert task.model.config.id2label == dict(enumerate("xyz"))
    assert names_of(task, task.eval_dataset) == ["z", "y", "x"]


def rewritten(old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "metadata.csv"
        file.write_text(file.read_text().replace(old, new))

    return change


UNMATCHED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no row": (lambda f: draw("circle", 1).save(f / "x.PNG"), r"x\.PNG has no row in .*metadata\.csv"),
    "no row below": (
        lambda f: described(f / "more", [("x.png", "1")]).joinpath("metadata.csv").unlink(),
        r"more/x\.png",
    ),
    "no image": (rewritten("b.png", "x.png"), r"metadata\.csv, row 2: 'x\.png' is no file in"),
    "elsewhere": (rewritten("b.png", "../train/b.png"), r"row 2: '\.\./train/b\.png' is no file in"),
    "no name": (rewritten("b.png", ""), r"row 2: 'file_name' holds None"),
    "no column": (rewritten("file_name", "file"), r"has no column `file_name`.*; its columns: file, label"),
    "ragged": (rewritten("b.png,", "b.png,7,"), r"metadata\.csv, line 3: 3 cells"),
    "two formats": (lambda f: (f / "metadata.jsonl").touch(), r"csv and .*\.jsonl are of several formats"),
    "an archive": (lambda f: shutil.make_archive(str(f / "x"), "zip", f), r"x\.zip"),
    "in an archive": (
        lambda f: [shutil.make_archive(str(f / "x"), "zip", f), (f / "metadata.csv").unlink()],
        r"x\.zip.* metadata\.csv",
    ),
}


@pytest.mark.parametrize("name", UNMATCHED)
def test_no_image_and_no_row_is_left_out(given: dict[str, str], tmp_path: Path, name: str) -> None:
    change, message = UNMATCHED[name]
    train = described(tmp_path / "train", [("a.png", "x"), ("b.png", "y"), ("c.png", "x")])
    change(train)
    with pytest.raises(ConfigError, match=message) as caught:
        built(given, train_dir=str(train))
    assert "\n" not in str(caught.value)


def test_a_class_that_datasets_would_leave_out_is_refused(given: dict[str, str], tmp_path: Path) -> None:
    folder = save_images(tmp_path / "train", 2)
    (folder / "circle").rename(folder / "__circle")
    with pytest.raises(ConfigError, match=r"--train_dir=.*__circle"):
        built(given, train_dir=str(folder))
