"""Precision that can't be had, and precision that became another one."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator

from harness.distributed.precision import check_fp8, check_precision, check_result
from harness.errors import ConfigError


@pytest.mark.parametrize(
    ("launched", "asked", "says"),
    [
        ("fp4", None, "mixed_precision: fp4 of the launch config is not known; use no, bf16, fp16, fp8: change"),
        ("fp16", "bf16", "--bf16 contradicts mixed_precision: fp16 of the launch config; leave --bf16 out, or change"),
        ("fp8", "bf16", "--bf16 contradicts mixed_precision: fp8"),
        ("fp16", None, "fp16 needs an accelerator; use bf16: change `mixed_precision` of the launch config"),
        ("fp8", None, "fp8 needs an accelerator; use bf16: change"),
        ("no", "fp16", "--fp16 needs an accelerator; use bf16"),
    ],
)
def test_a_precision_that_can_not_be_had_is_refused(launched: str, asked: str | None, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check_precision(launched, asked, on_cpu=True)


@pytest.mark.parametrize(("launched", "asked"), [("no", None), ("bf16", None), ("no", "bf16"), ("bf16", "bf16")])
def test_flags_and_launch_config_may_say_the_same(launched: str, asked: str | None) -> None:
    check_precision(launched, asked, on_cpu=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_fp8_needs_a_gpu_that_has_it() -> None:
    with pytest.raises(ConfigError, match="fp8 needs an Ada or Hopper GPU or newer; use bf16: change"):
        check_fp8("NO")


def test_a_precision_that_became_another_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    accelerator = Accelerator(cpu=True, mixed_precision="no")  # what is said in code wins, without a word
    with pytest.raises(ConfigError, match=r"mixed_precision: bf16 of the launch config was asked for, and .* with no:"):
        check_result(accelerator, "bf16", None)
    with pytest.raises(ConfigError, match="--bf16 was asked for, and accelerate trains with no:"):
        check_result(accelerator, "no", "bf16")
    check_result(accelerator, "no", None)
