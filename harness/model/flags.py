"""The flags of optimizer, schedule and adapter."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.config import Json, arg, at_least, release, section
from harness.errors import ConfigError

# Names of `--optim` that need another loop than ours, with what to use.
UNSUPPORTED_OPTIMIZERS = {
    "adamw_torch_xla": "XLA devices are not supported; use adamw_torch",
    "adamw_torch_npu_fused": "use adamw_torch_fused",
    "adamw_anyprecision": "torchdistx is no longer maintained; use adamw_torch",
    "lomo": "it updates weights inside the backward pass; use galore_adamw or adafactor",
    "adalomo": "it updates weights inside the backward pass; use galore_adamw or adafactor",
    "galore_adamw_layerwise": "it updates weights inside the backward pass; use galore_adamw",
    "galore_adamw_8bit_layerwise": "it updates weights inside the backward pass; use galore_adamw_8bit",
    "galore_adafactor_layerwise": "it updates weights inside the backward pass; use galore_adafactor",
    "apollo_adamw_layerwise": "it updates weights inside the backward pass; use apollo_adamw",
}

# The Trainer's default, which hangs on torch's version: in older ones the fused optimizer is not on all devices.
DEFAULT_OPTIM = "adamw_torch_fused" if release("torch") >= (2, 8) else "adamw_torch"

# These are stepped with a metric after an evaluation, not after each update.
BY_METRIC = ("reduce_lr_on_plateau", "greedy")


@section("optimizer")
@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer and schedule."""

    optim: str = arg(
        DEFAULT_OPTIM,
        "As transformers calls it, e.g. adamw_torch, adafactor, sgd; a wrong name lists all.",
        common=True,
    )
    optim_args: str | None = arg(help="Further arguments of the optimizer: key=value,key=value.")
    optim_target_modules: list[str] | None = arg(
        help="Modules that GaLore or APOLLO project: names, patterns, or all-linear."
    )
    learning_rate: float = arg(5e-5, "Peak learning rate.", mutable=True, common=True)
    weight_decay: float = arg(0.0, "Weight decay, not on biases and norms.", mutable=True, common=True)
    adam_beta1: float = arg(0.9, "First beta of Adam-like optimizers.", mutable=True)
    adam_beta2: float = arg(0.999, "Second beta of Adam-like optimizers.", mutable=True)
    adam_epsilon: float = arg(1e-8, "Epsilon of Adam-like optimizers.", mutable=True)
    lr_scheduler_type: str = arg(
        "linear", "As transformers calls it, e.g. linear, cosine, constant; a wrong name lists all.", common=True
    )
    lr_scheduler_kwargs: Json | None = arg(help='JSON for the schedule: {"num_cycles": 2}.')
    warmup_steps: float = arg(0, "Steps of linear warmup; below 1: a share of all steps.", common=True)

    def __post_init__(self) -> None:
        if self.optim in UNSUPPORTED_OPTIMIZERS:
            raise ConfigError(f"--optim={self.optim} is not supported: {UNSUPPORTED_OPTIMIZERS[self.optim]}.")
        at_least(
            0,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            warmup_steps=self.warmup_steps,
            adam_epsilon=self.adam_epsilon,
        )
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"--{name}={getattr(self, name)}: use 0 to below 1.")
        for mapping in (self.optim_args or "").replace(" ", "").split(","):
            if mapping and mapping.count("=") != 1:
                raise ConfigError(f"--optim_args={self.optim_args}: write key=value,key=value.")
        if self.optim_target_modules is not None and not self.optim.startswith(("galore", "apollo")):
            raise ConfigError(f"--optim_target_modules is for galore_* and apollo_*, not for --optim {self.optim}.")

    def num_warmup_steps(self, max_steps: int) -> int:
        """Optimizer steps of warmup: the number itself, or a share of all steps rounded up."""
        return int(self.warmup_steps) if self.warmup_steps >= 1 else math.ceil(max_steps * self.warmup_steps)


LORA_R, LORA_ALPHA, LORA_DROPOUT = 16, 32, 0.05  # TRL's defaults


class PeftJson(Json):
    """A configuration of peft's, written as JSON or as the name of a file or folder that holds it."""

    def __init__(self, value: Any = ()) -> None:
        if isinstance(value, str) and not value.lstrip().startswith("{"):
            path = Path(value).expanduser()
            path = path / "adapter_config.json" if path.is_dir() else path
            try:
                value = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(f"{path} can't be read: {error}") from error
        try:
            super().__init__(value)
        except ValueError as error:
            raise ValueError(f"{error}; write a JSON object, or name a file of one") from error


@section("adapter")
@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Which adapter is trained, in TRL's names and with its defaults; None of them: the whole model is trained."""

    use_peft: bool | None = arg(
        help="Train a LoRA adapter. --lora_* and --peft_config turn it on too; false turns it off.", common=True
    )
    lora_r: int | None = arg(help=f"Rank of LoRA's matrices; default: {LORA_R}.", common=True)
    lora_alpha: int | None = arg(help=f"LoRA's scale, over its rank; default: {LORA_ALPHA}.")
    lora_dropout: float | None = arg(help=f"Dropout before LoRA's matrices; default: {LORA_DROPOUT}.")
    lora_target_modules: list[str] | None = arg(
        help="Modules that get a LoRA: names, a pattern, or all-linear; default: peft's for the architecture."
    )
    lora_modules_to_save: list[str] | None = arg(
        help="Modules that are trained and saved whole; a new classification head always is."
    )
    peft_config: PeftJson | None = arg(
        help='Any adapter of peft, as JSON ({"peft_type": "IA3"}) or a file; in place of --lora_*.'
    )
    save_merged_model: bool = arg(
        False,
        "At the end also write the whole model, with the adapter merged into it, to OUTPUT_DIR/merged.",
        on_resume="unrelated",
    )

    def __post_init__(self) -> None:
        at_least(1, lora_r=self.lora_r, lora_alpha=self.lora_alpha)
        if self.lora_dropout is not None and not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"--lora_dropout={self.lora_dropout}: use 0 to below 1.")
        if self.peft_config is None or not self.is_on:
            return
        if self._lora_flags:
            raise ConfigError(
                f"--peft_config and --{self._lora_flags[0]} both describe the adapter: give one of them, "
                'as in --peft_config \'{"peft_type": "LORA", "r": 8}\'.'
            )
        if "peft_type" not in self.peft_config:
            raise ConfigError("--peft_config has no peft_type; name one of peft's, e.g. LORA or IA3.")

    @property
    def _lora_flags(self) -> list[str]:
        return [
            name for name in self.__dataclass_fields__ if name.startswith("lora_") and getattr(self, name) is not None
        ]

    @property
    def is_on(self) -> bool:
        """Whether a new adapter is trained."""
        given = self.peft_config is not None or bool(self._lora_flags)
        return given if self.use_peft is None else self.use_peft
