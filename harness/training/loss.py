"""The model side of a step: prepare a model for training, and its loss by the Trainer's rules."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel
from transformers.integrations.neftune import activate_neftune
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer_pt_utils import LabelSmoother
from transformers.trainer_utils import align_special_tokens, unwrap_peft_model
from transformers.utils import find_labels

from harness.config import Json, arg, at_least
from harness.errors import ConfigError
from harness.tasks import LossFunction

Batch = Mapping[str, Any]
# What Transformers takes, and what torch.utils.checkpoint does of plain values.
CHECKPOINTING = (
    *("use_reentrant", "every_n_layers", "offload", "preserve_rng_state"),
    *("determinism_check", "debug", "early_stop"),
)
HAVE_NO_KERNELS = ("cpu", "mps")


@dataclass(frozen=True, kw_only=True)
class ModelingConfig:
    """What is done to the model, and how its loss and gradients are treated."""

    activation_checkpointing: bool | None = arg(
        help="Compute activations again in the backward pass: less memory, more time.", nargs="?", const=True
    )
    activation_checkpointing_kwargs: Json | None = arg(help="JSON: use_reentrant, every_n_layers, offload, ...")
    gradient_checkpointing: bool | None = arg(
        help="The older name of --activation_checkpointing.", nargs="?", const=True
    )
    gradient_checkpointing_kwargs: Json | None = arg(help="The older name of --activation_checkpointing_kwargs.")
    use_liger_kernel: bool = arg(False, "Use Liger's kernels; needs liger-kernel.")
    liger_kernel_config: Json | None = arg(help='JSON for Liger: {"rope": true, "swiglu": false, ...}.')
    use_cache: bool = arg(False, "Let the model keep keys and values for generation while it trains.")
    neftune_noise_alpha: float | None = arg(help="Noise on the embeddings (NEFTune, arXiv 2310.05914), e.g. 5.")
    label_smoothing_factor: float = arg(0.0, "Label smoothing; 0 is off.")
    average_tokens_across_devices: bool = arg(True, "Divide the loss by the number of items on all devices.")
    max_grad_norm: float = arg(1.0, "Clip the norm of the gradients; 0 is off.")
    torch_empty_cache_steps: int | None = arg(help="Empty the device's cache every N steps.")

    def __post_init__(self) -> None:
        at_least(
            0,
            neftune_noise_alpha=self.neftune_noise_alpha,
            label_smoothing_factor=self.label_smoothing_factor,
            max_grad_norm=self.max_grad_norm,
        )
        at_least(1, torch_empty_cache_steps=self.torch_empty_cache_steps)
        self._check_kwargs()
        if self.label_smoothing_factor > 1:
            raise ConfigError(f"--label_smoothing_factor={self.label_smoothing_factor}: use 0 to 1.")

    def _check_kwargs(self) -> None:
        name = "activation" if self.activation_checkpointing_kwargs is not None else "gradient"
        given = self.checkpointing_kwargs
        flag = f"--{name}_checkpointing_kwargs={dict(given)}"
        if given and self.activation_checkpointing is None and self.gradient_checkpointing is None:
            raise ConfigError(f"{flag} does nothing without --{name}_checkpointing; give both.")
        if self.liger_kernel_config is not None and not self.use_liger_kernel:
            raise ConfigError("--liger_kernel_config does nothing without --use_liger_kernel; give both.")
        for key in given:
            if key not in CHECKPOINTING:
                raise ConfigError(f"{flag}: {key} is not known; use {', '.join(CHECKPOINTING)}.")
        every = given.get("every_n_layers", 1)
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ConfigError(f"{flag}: every_n_layers is a number of layers, 1 or more.")
        for key, value in given.items():
            if key not in ("every_n_layers", "determinism_check") and not isinstance(value, bool):
                raise ConfigError(f"{flag}: {key} is true or false.")

    @property
    def checkpointing_kwargs(self) -> dict[str, Any]:
        """What the checkpointing is given, under either name."""
        return dict(self.activation_checkpointing_kwargs or self.gradient_checkpointing_kwargs or {})

    @property
    def checkpoints_activations(self) -> bool:
        """Whether either name turns it on."""
        first = self.activation_checkpointing
        return bool(self.gradient_checkpointing if first is None else first)


def prepare_model(
    model: torch.nn.Module, config: ModelingConfig, processing_class: Any, accelerator: Accelerator
) -> None:
    """
    Set the model up for training, in the Trainer's order, before it is wrapped.

    Raises ConfigError where the model or an uninstalled package does not allow it.
    """
    if config.use_liger_kernel:
        _apply_liger(model, config, accelerator)
    if config.checkpoints_activations:
        _checkpoint_activations(model, config.checkpointing_kwargs, accelerator)
    base = unwrap_peft_model(model)
    if isinstance(base, PreTrainedModel):
        if hasattr(processing_class, "pad_token_id"):
            align_special_tokens(base, processing_class)
        base.config.use_cache = config.use_cache
    if config.neftune_noise_alpha is not None:
        activate_neftune(model, config.neftune_noise_alpha, accelerator)


def _checkpoint_activations(model: torch.nn.Module, kwargs: dict[str, Any], accelerator: Accelerator) -> None:
    offload = kwargs.pop("offload", False)
    if offload and accelerator.device.type == "cpu":
        raise ConfigError(
            "--activation_checkpointing_kwargs: offload moves activations from an accelerator to host memory, and on "
            "the CPU they are there; leave it out."
        )
    enable: Any = getattr(model, "activation_checkpointing_enable", None)
    refusal = f"--activation_checkpointing: {type(unwrap_peft_model(model)).__name__} does not offer it; leave it out."
    if enable is None:
        raise ConfigError(refusal)
    every_n_layers = kwargs.pop("every_n_layers", 1)
    try:
        enable(every_n_layers=every_n_layers, offload=offload, activation_checkpointing_kwargs=kwargs or None)
    except ValueError as error:
        raise ConfigError(refusal) from error


def _apply_liger(model: torch.nn.Module, config: ModelingConfig, accelerator: Accelerator) -> None:
    from transformers.integrations.liger import apply_liger_kernel

    if accelerator.device.type in HAVE_NO_KERNELS:
        raise ConfigError(
            f"--use_liger_kernel needs a GPU, and this trains on {accelerator.device.type}; leave it out."
        )
    try:
        apply_liger_kernel(model, config.liger_kernel_config)
    except ImportError as error:
        raise ConfigError("--use_liger_kernel needs a package: pip install liger-kernel.") from error


class Loss:
    """
    The loss of a micro-batch and the number of items it is divided by.

    Mirrors Trainer.compute_loss, Trainer._get_num_items_in_batch and the part of Trainer.training_step that scales.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        config: ModelingConfig,
        accelerator: Accelerator,
        compute_loss_func: LossFunction | None,
    ) -> None:
        self.accelerator = accelerator
        self.compute_loss_func = compute_loss_func
        # With an adapter the model under it knows the names and what its forward takes.
        model = unwrap_peft_model(model)
        self.across_devices = config.average_tokens_across_devices
        self.label_names: list[str] = find_labels(model.__class__)
        accepts = getattr(model, "accepts_loss_kwargs", None)
        if accepts is None:
            parameters = inspect.signature(model.forward).parameters.values()
            accepts = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
        self.accepts_num_items = bool(accepts)
        # A causal loss shifts the labels itself: the first position is never a target.
        causal = LOSS_MAPPING.get(getattr(model, "loss_type", None)) is ForCausalLMLoss
        self.shifts_labels = causal and not getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        self.smoother = LabelSmoother(config.label_smoothing_factor) if config.label_smoothing_factor else None
        self.smooths_shifted = type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        problem_type = getattr(getattr(model, "config", None), "problem_type", None)
        if self.smoother is not None and problem_type == "multi_label_classification":
            raise ConfigError("--label_smoothing_factor does not fit several labels a sample; leave it at 0.")

    def num_items(self, window: Sequence[Batch]) -> torch.Tensor | None:
        """
        Collective: the labels that count in a step, on all ranks together; a scalar on the device.

        None where neither the model nor compute_loss_func takes it: then the loss is a mean of means.
        """
        if "labels" not in window[0] or not (self.accepts_num_items or self.compute_loss_func):
            return None
        counts = [self._targets(batch).ne(-100).sum() for batch in window]
        total = torch.stack(counts).sum()
        if self.across_devices and self.accelerator.num_processes > 1:
            total = self.accelerator.gather(total.to(self.accelerator.device)).sum()
        return (
            total.to(self.accelerator.device) / 1
        )  # a float, as the Trainer's division by the parallel sizes makes it

    def _targets(self, batch: Batch) -> torch.Tensor:
        targets: torch.Tensor = batch["shift_labels"] if "shift_labels" in batch else batch["labels"]
        return targets[..., 1:] if self.shifts_labels and "shift_labels" not in batch else targets

    def __call__(
        self, model: torch.nn.Module, batch: Batch, num_items: torch.Tensor | None, *, micro_batches: int = 1
    ) -> tuple[torch.Tensor, Any]:
        """The scalar to call backward on, and the model's outputs. Raises ValueError if the model gives no loss."""
        inputs = dict(batch)
        own = self.compute_loss_func is not None or self.smoother is not None
        labels = inputs.pop("labels", None) if own else None
        if self.accepts_num_items and num_items is not None:
            inputs["num_items_in_batch"] = num_items
        outputs = model(**inputs)
        if self.compute_loss_func is not None:
            loss = self.compute_loss_func(outputs, labels, num_items)
        elif self.smoother is not None and labels is not None:
            loss = self.smoother(outputs, labels, shift_labels=self.smooths_shifted, num_items_in_batch=num_items)
        else:
            loss = _loss_of(outputs)
        scaled = num_items is not None and (self.accepts_num_items or self.compute_loss_func is not None)
        if scaled and self.across_devices and self.accelerator.num_processes > 1:
            loss = loss * self.accelerator.num_processes  # DDP averages the gradients over the ranks
        if not scaled and self.compute_loss_func is None:
            loss = loss / micro_batches
        return loss, outputs


def _loss_of(outputs: Any) -> torch.Tensor:
    if isinstance(outputs, Mapping):
        if "loss" not in outputs:
            raise ValueError(f"The model returned no loss, only: {', '.join(outputs)}. Does it get labels?")
        loss: torch.Tensor = outputs["loss"]
        return loss
    first: torch.Tensor = outputs[0]
    return first
