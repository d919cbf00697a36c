"""Loss, gradient and evaluation are those of the global batch, however it is split among micro-batches and ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.utils import is_deepspeed_available

from tests.support.launching import FSDP2, ROOT, needs_fsdp
from tests.training.layouts.table import (
    OTHERS,
    REVERSED,
    SIZES,
    Layout,
    difference,
    train_alone,
    train_on_two,
)
from tests.training.layouts.tasks import CASES

pytestmark = pytest.mark.timeout(900)
SHARDED = ["BERT, sequence classification", "GPT-2, causal-lm"]
ON_TWO = [layout for layout in OTHERS if layout.processes == 2]
of_all_data = pytest.mark.parametrize("data", SIZES)


def names(value: object) -> str:
    return value.name if isinstance(value, Layout) else str(value)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    train_alone(folder, list(CASES))
    train_on_two(folder, list(CASES))
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    train_alone(folder, SHARDED)
    return folder


def assert_the_same(folder: Path, case: str, data: str, layout: Layout, whole: Path) -> None:
    noise = difference(whole, case, data, REVERSED)
    found = difference(folder, case, data, layout, whole)
    assert found.within(CASES[case].bound, noise), f"{found}; with the samples of each batch reversed {noise}"


@pytest.mark.slow
@pytest.mark.parametrize("layout", OTHERS, ids=names)
@of_all_data
@pytest.mark.parametrize("case", CASES)
def test_a_layout_does_not_change_the_numbers(case: str, data: str, layout: Layout, trained: Path) -> None:
    assert_the_same(trained, case, data, layout, trained)


@pytest.mark.slow
@needs_fsdp
def test_a_layout_does_not_change_the_numbers_of_fsdp2(alone: Path, tmp_path: Path) -> None:
    train_on_two(tmp_path, SHARDED, FSDP2)
    for case in SHARDED:
        for data in SIZES:
            for layout in ON_TWO:
                assert_the_same(tmp_path, case, data, layout, alone)


@pytest.mark.deepspeed
@pytest.mark.skipif(not is_deepspeed_available(), reason="deepspeed is not installed")
@pytest.mark.parametrize("stage", [2, 3])
def test_a_layout_does_not_change_the_numbers_of_zero(stage: int, alone: Path, tmp_path: Path) -> None:
    train_on_two(tmp_path, SHARDED, ROOT / "launch_configs" / f"zero{stage}.yaml")
    for case in SHARDED:
        for data in SIZES:
            for layout in ON_TWO:
                assert_the_same(tmp_path, case, data, layout, alone)
