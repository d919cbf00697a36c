"""Numbers of all ranks come back as they were, by one gather and one transfer."""

from __future__ import annotations

import math

import pytest
import torch
from accelerate import Accelerator

from harness.distributed.transfer import gather_numbers, to_device


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def test_each_number_comes_back_to_the_bit(accelerator: Accelerator) -> None:
    values = {
        "host": 0.1,
        "count": 2**24 + 1,
        "single": torch.tensor(0.1),
        "double": torch.tensor(0.1, dtype=torch.float64),
        "half": torch.tensor([0.1], dtype=torch.bfloat16),
        "tokens": torch.tensor(2**62 + 1),
        "overflow": torch.tensor(True),
        "least": torch.tensor(-1e-45),
        "infinite": torch.tensor(-math.inf),
    }
    (found,) = gather_numbers(accelerator, {**values, "nan": torch.tensor(math.nan), "host_nan": math.nan})
    assert math.isnan(found.pop("nan"))
    assert math.isnan(found.pop("host_nan"))
    expected = {name: value.item() if isinstance(value, torch.Tensor) else value for name, value in values.items()}
    assert found == expected
    assert list(found) == list(values)
    assert math.copysign(1, gather_numbers(accelerator, {"zero": torch.tensor(-0.0)})[0]["zero"]) == -1


@pytest.mark.parametrize(("device", "waits"), [("cuda", False), ("mps", True)])
def test_only_a_copy_that_cuda_has_taken_is_not_waited_for(
    device: str, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Metal reads memory that is not pinned after the call has returned, when it may be another tensor's."""
    asked: list[object] = []
    copy = lambda tensor, place, non_blocking: asked.extend([len(tensor), place.type, not non_blocking])  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "to", copy)
    to_device(torch.zeros(3), torch.device(device))
    assert asked == [3, device, waits]
