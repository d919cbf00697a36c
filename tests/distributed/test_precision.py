"""Precision that can't be had, and precision that became another one."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from harness.distributed.precision import check_fp8, check_precision, check_result, set_tf32, tf32_kept
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


@pytest.mark.parametrize(
    ("launched", "asked", "says"),
    [
        ("no", "bf16", "--bf16 needs an Ampere GPU or newer; use --fp16"),
        ("bf16", "bf16", "--bf16 needs an Ampere GPU or newer; use --fp16"),
        ("bf16", None, "bf16 needs an Ampere GPU or newer; use fp16: change `mixed_precision` of the launch config"),
    ],
)
def test_bf16_that_a_gpu_only_emulates_is_refused(
    monkeypatch: pytest.MonkeyPatch, launched: str, asked: str | None, says: str
) -> None:
    major = 7
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(major=major))
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda _: pytest.fail("it opens the device"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(ConfigError, match=says):
        check_precision(launched, asked, on_cpu=False)
    check_precision(launched, asked, on_cpu=True)
    major = 8
    check_precision(launched, asked, on_cpu=False)
    major = 7
    monkeypatch.setattr(torch.version, "hip", "6.4")  # every GPU of AMD's that torch runs on
    check_precision(launched, asked, on_cpu=False)


# TF32's switches can be set and read without a card.
BACKENDS: Any = torch.backends
IS_NEW = hasattr(torch.backends, "fp32_precision")  # from torch 2.9
needs_both = pytest.mark.skipif(not IS_NEW, reason="this torch has one way to choose TF32")
CUDA = torch.device("cuda", 0)


@pytest.fixture
def ampere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU that has TF32, and the switches as they were, afterwards."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    yield
    if IS_NEW:
        BACKENDS.fp32_precision = "none"
    BACKENDS.cuda.matmul.allow_tf32, BACKENDS.cudnn.allow_tf32 = False, True


def switches() -> tuple[bool, bool]:
    """What torch reads, by both ways, which must agree."""
    matmul, convolutions = BACKENDS.cuda.matmul.allow_tf32, BACKENDS.cudnn.allow_tf32
    assert torch.get_float32_matmul_precision() == ("high" if matmul else "highest")
    if IS_NEW:
        assert (BACKENDS.cuda.matmul.fp32_precision == "tf32") == matmul
        assert {BACKENDS.cudnn.conv.fp32_precision == "tf32", BACKENDS.cudnn.rnn.fp32_precision == "tf32"} == {
            convolutions
        }
    return matmul, convolutions


@pytest.mark.usefixtures("ampere")
@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("compiles", [True, False])
def test_tf32_is_as_asked_also_after_accelerate_has_turned_it_on_to_compile(wanted: bool, compiles: bool) -> None:
    BACKENDS.cuda.matmul.allow_tf32 = compiles  # what Accelerator does on a GPU with a dynamo plugin
    set_tf32(wanted, by_default=compiles, device=CUDA)
    assert switches() == (wanted, wanted)


@needs_both
@pytest.mark.usefixtures("ampere")
@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("before", ["tf32", "ieee"])
def test_tf32_can_be_read_by_both_ways_after_a_trainer_has_mixed_them(wanted: bool, before: str) -> None:
    BACKENDS.fp32_precision = before  # what transformers' enable_tf32 does
    if before == "tf32":
        with pytest.raises(RuntimeError, match="mix of the legacy and new APIs"):
            torch.get_float32_matmul_precision()  # as torch.compile does with max-autotune
    set_tf32(wanted, by_default=True, device=CUDA)
    assert switches() == (wanted, wanted)


@pytest.mark.usefixtures("ampere")
def test_without_a_flag_tf32_is_on_where_it_compiles_and_else_as_it_was() -> None:
    set_tf32(None, by_default=False, device=CUDA)
    assert switches() == (False, True)
    set_tf32(None, by_default=True, device=CUDA)
    assert switches() == (True, True)


@pytest.mark.usefixtures("ampere")
@pytest.mark.parametrize("wanted", [True, False])
def test_a_later_run_in_this_process_does_not_inherit_tf32(wanted: bool) -> None:
    for _ in range(3):
        with tf32_kept():
            set_tf32(wanted, by_default=False, device=CUDA)
            assert switches() == (wanted, wanted)
        assert switches() == (False, True)


def test_tf32_needs_a_gpu_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    before = switches()
    for device in (CUDA, torch.device("cpu")):
        with pytest.raises(ConfigError, match="--tf32 needs an Ampere GPU or newer; leave it out"):
            set_tf32(True, by_default=False, device=device)
        set_tf32(False, by_default=True, device=device)
    assert switches() == before
