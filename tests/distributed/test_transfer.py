"""Numbers of all ranks come back as they were, by one gather; sums over them are waited for where they are used."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from harness.distributed.transfer import Awaited, gather_numbers, known, then, to_device
from tests.support.launching import DDP, flags, launcher, run
from tests.support.parity import history


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


def awaited(value: Any, waits: list[str]) -> Awaited:
    made = torch.tensor(value)

    def obtain() -> torch.Tensor:
        waits.append("waited")
        return made

    return Awaited(obtain, dtype=made.dtype, device=made.device)


USES: dict[str, Callable[[torch.Tensor], Any]] = {
    "divisor": lambda n: torch.tensor(3.0) / n,
    "dividend": lambda n: n / 2,
    "moved": lambda n: n.to(torch.float64),
    "read": lambda n: (n.item(), n.tolist(), int(n), float(n), bool(n), n == 7),
    "numpy": lambda n: n.numpy().tolist(),
    "in a list": lambda n: torch.stack([n, torch.tensor(1)]),
    "by name": lambda n: torch.add(input=n, other=n),
    "shown": repr,
    "in place of another": lambda n: torch.zeros((), dtype=n.dtype).copy_(n),
    "of half precision": lambda n: torch.ones((), dtype=torch.bfloat16) / n,
    "of its own function": lambda n: Divided.apply(torch.ones(()), n),
    "compiled": lambda n: torch.compile(lambda x: x.sin() / n, backend="eager")(torch.ones(())),
}


class Divided(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, value: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
        return value / number


@pytest.mark.parametrize("use", USES)
def test_what_is_awaited_gives_what_its_value_gives(use: str) -> None:
    waits: list[str] = []
    found, expected = USES[use](awaited(7, waits)), USES[use](torch.tensor(7))
    if isinstance(expected, torch.Tensor):
        assert type(found) is torch.Tensor
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    else:
        assert found == expected
    assert waits == ["waited"], "once"


def test_the_gradient_of_a_division_is_that_of_the_value() -> None:
    one, other = (torch.tensor(3.0, requires_grad=True) for _ in range(2))
    (one / awaited(7, [])).backward()
    (other / torch.tensor(7)).backward()
    assert torch.equal(one.grad, other.grad)  # type: ignore[arg-type]


def test_what_is_known_of_it_before_is_not_waited_for() -> None:
    waits: list[str] = []
    number = awaited(7, waits)
    assert isinstance(number, torch.Tensor)
    assert (number.device.type, number.dtype, number.shape, number.ndim, number.dim(), number.numel()) == (
        "cpu", torch.int64, torch.Size([]), 0, 0, 1
    )  # fmt: skip
    assert not any((number.requires_grad, number.is_floating_point(), torch.is_floating_point(number)))
    half = then(number, lambda n: n / 2)
    assert half.dtype == torch.float32
    assert waits == []
    assert known(half) == 3.5
    assert known(half) == 3.5
    assert waits == ["waited"]
    assert then(8, lambda n: n / 2) == 4.0, "what is known is worked on at once"


@pytest.mark.slow
def test_a_rank_begins_its_forward_pass_before_the_others_have_counted_their_labels(tmp_path: Path) -> None:
    """The second rank draws a step's batch only once the first is in its forward pass: else both wait for ever."""
    task = {"task": "tests.support.measuring.late_rank:build", "task_args": json.dumps({"file": f"{tmp_path}/passes"})}
    short = {"per_device_train_batch_size": 2, "max_steps": 6, "logging_steps": 6, "save_strategy": "no"}
    command = ["-m", "harness", "train", *flags(tmp_path / "run", {**task, **short, "expect_num_processes": 2})]
    done = run([*launcher(DDP), *command], cwd=tmp_path)
    assert done.code == 0, done.err[-3000:]
    assert (tmp_path / "passes").read_text(encoding="utf-8") == "6"
    assert history(tmp_path / "run")[0]["step"] == 6
