"""Compilation, checkpointing, adapters, noise and attention together: the same losses, or a refusal by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from harness.config import release
from harness.train import main
from tests.support.inputs import save_gpt, write_text
from tests.support.parity import history, reset

CHOICES: dict[str, list[str]] = {
    "reentrant": ["--activation_checkpointing", '--activation_checkpointing_kwargs={"use_reentrant": true}'],
    "not reentrant": ["--activation_checkpointing", '--activation_checkpointing_kwargs={"use_reentrant": false}'],
    "every second layer": ["--gradient_checkpointing", '--gradient_checkpointing_kwargs={"every_n_layers": 2}'],
    "offload": ["--activation_checkpointing", '--activation_checkpointing_kwargs={"offload": true}'],
    "LoRA": ["--lora_r=2", "--lora_dropout=0"],
    "NEFTune": ["--neftune_noise_alpha=5"],
    "eager": ["--attn_implementation=eager"],
    "sdpa": ["--attn_implementation=sdpa"],
    "flex": ["--attn_implementation=flex_attention"],
    "flash": ["--attn_implementation=flash_attention_2"],
    "compiled": ["--torch_compile_backend=eager"],
    "Liger": ["--use_liger_kernel"],
}
# An older transformers has no choice of layers.
CHOOSES_LAYERS = release("transformers") >= (5, 23)
CHECKPOINTING = ("", "reentrant", "not reentrant", *(("every second layer",) if CHOOSES_LAYERS else ()))
# All but compiled ones, which take seconds, in all ways.
TRAINED = [
    tuple(filter(None, (attention, adapter, noise, checkpointing)))
    for attention in ("eager", "sdpa")
    for adapter in ("", "LoRA")
    for noise in ("", "NEFTune")
    for checkpointing in CHECKPOINTING
]
COMPILED = [
    ("compiled", "sdpa", "LoRA", "reentrant"),
    ("compiled", "eager", "LoRA", "NEFTune", "not reentrant"),
    ("compiled", "sdpa", "NEFTune", "every second layer" if CHOOSES_LAYERS else "reentrant"),
]
REFUSED = {
    ("offload",): "on the CPU they are there; leave it out",
    ("offload", "LoRA", "compiled"): "on the CPU they are there; leave it out",
    ("flex", "LoRA"): "does not support",
    ("flash", "not reentrant"): "the package for FlashAttention2",
    ("Liger", "LoRA"): "--use_liger_kernel needs a GPU",
}
if not CHOOSES_LAYERS:
    REFUSED["every second layer",] = "every_n_layers and offload need transformers 5.23 or newer"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_text(folder / "text.txt")
    torch.manual_seed(0)
    return save_gpt(folder / "model", n_layer=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


def train(base: Path, folder: Path, *flags: str) -> int:
    reset()
    common = [f"--model_name_or_path={base}", f"--train_file={base.parent / 'text.txt'}", "--block_size=8"]
    common += ["--max_steps=2", "--logging_steps=1", "--learning_rate=0.01", "--save_strategy=no", "--report_to=none"]
    return main([*common, *flags, f"--output_dir={folder}", "--use_cpu", "--disable_tqdm"])


def losses(base: Path, folder: Path, names: tuple[str, ...]) -> list[float]:
    assert train(base, folder, *(flag for name in names for flag in CHOICES[name])) == 0
    return [entry["loss"] for entry in history(folder) if "loss" in entry]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo's own
def test_what_goes_together_has_the_losses_of_the_plain_training(base: Path, tmp_path: Path) -> None:
    # An adapter and noise are another training; all the rest is the same one, computed otherwise.
    plain = {
        key: losses(base, tmp_path / "-".join(["plain", *key]), key)
        for key in ((), ("LoRA",), ("NEFTune",), ("LoRA", "NEFTune"))
    }
    assert len({tuple(values) for values in plain.values()}) == 4
    assert all(len(values) == 2 and 0 < values[1] < 6 and values[0] != values[1] for values in plain.values())
    for names in TRAINED + COMPILED:
        key = tuple(name for name in names if name in ("LoRA", "NEFTune"))
        found = losses(base, tmp_path / "-".join(names), names)
        assert found == pytest.approx(plain[key], rel=1e-5), names
    torch.compiler.reset()


@pytest.mark.parametrize("names", REFUSED, ids=", ".join)
def test_what_does_not_go_together_is_refused_by_name(
    names: tuple[str, ...], base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(base, tmp_path / "run", *(flag for name in names for flag in CHOICES[name])) == 2
    assert REFUSED[names] in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (['--activation_checkpointing_kwargs={"offload": true}'], "does nothing without --activation_checkpointing"),
        (["--gradient_checkpointing", '--gradient_checkpointing_kwargs={"every_n": 2}'], "every_n is not known; use"),
        (["--activation_checkpointing", '--activation_checkpointing_kwargs={"every_n_layers": 0}'], "1 or more"),
        (["--activation_checkpointing", '--activation_checkpointing_kwargs={"offload": "yes"}'], "is true or false"),
        (['--liger_kernel_config={"rope": true}'], "does nothing without --use_liger_kernel"),
        (["--activation_checkpointing", "--task=tests.support.tasks.odd_tasks:no_checkpointing"], "does not offer it"),
    ],
)
def test_checkpointing_that_can_not_be_had_is_refused(
    flags: list[str], message: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(base, tmp_path / "run", *flags) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(not CHOOSES_LAYERS, reason="transformers below 5.23 has no choice of layers")
def test_every_second_layer_is_every_second_layer(base: Path, tmp_path: Path) -> None:
    """Of two layers the first is computed twice, the second once."""
    from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

    calls: list[int] = []

    def seen(module: torch.nn.Module, _: object) -> None:
        # Before it runs: the second time it is left when what the backward needs is there.
        if isinstance(module, GPT2MLP) and module.training:
            calls.append(1)

    hook = torch.nn.modules.module.register_module_forward_pre_hook(seen)
    try:
        counts = []
        for names in ((), ("not reentrant",), ("every second layer",)):
            calls.clear()
            losses(base, tmp_path / "-".join(("run", *names)), names)
            counts.append(len(calls))
    finally:
        hook.remove()
    assert counts == [4, 8, 6], "two steps of two layers"
