"""Prepare a model for training, and compute its loss by the Trainer's rules."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
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

from harness.errors import ConfigError
from harness.tasks import LossFunction
from harness.training.flags import ModelingConfig

Batch = Mapping[str, Any]
HAVE_NO_KERNELS = ("cpu", "mps")


def prepare_model(
    model: torch.nn.Module, config: ModelingConfig, processing_class: Any, accelerator: Accelerator
) -> None:
    """
    Set up the model for training, in the Trainer's order, before it is wrapped.

    Raises ConfigError where the model or a package that is not installed prevents it.
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
    every_n_layers = kwargs.pop("every_n_layers", 1)
    enable: Any = getattr(model, "activation_checkpointing_enable", None)
    older: Any = getattr(model, "gradient_checkpointing_enable", None)  # its only name before transformers 5.23
    if enable is not None:
        layers = {"every_n_layers": every_n_layers, "offload": offload}
        enable = partial(enable, activation_checkpointing_kwargs=kwargs or None, **layers)
    elif older is not None:
        if offload or every_n_layers != 1:
            raise ConfigError(
                "--activation_checkpointing_kwargs: every_n_layers and offload need transformers 5.23 or newer: "
                "update it, or leave them out."
            )
        enable = partial(older, gradient_checkpointing_kwargs=kwargs or None)
    refusal = f"--activation_checkpointing: {type(unwrap_peft_model(model)).__name__} does not offer it; leave it out."
    if enable is None:
        raise ConfigError(refusal)
    try:
        enable()
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


def _smoother(factor: float) -> Any:
    if "num_items_in_batch" not in inspect.signature(LabelSmoother.__call__).parameters:
        raise ConfigError("--label_smoothing_factor needs transformers 5.15 or newer: update it, or leave it out.")
    return LabelSmoother(factor)


class Loss:
    """
    Computes the loss of a micro-batch, and the number of items that it is divided by.

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
        # With an adapter, label names and the forward's arguments are those of the base model.
        model = unwrap_peft_model(model)
        self.across_devices = config.average_tokens_across_devices
        self.label_names: list[str] = config.label_names or find_labels(model.__class__)
        self.are_named = config.label_names is not None
        accepts = getattr(model, "accepts_loss_kwargs", None)
        if accepts is None:
            parameters = inspect.signature(model.forward).parameters.values()
            accepts = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
        self.accepts_num_items = bool(accepts)
        # A causal loss shifts the labels itself, so the first position is never a target.
        causal = LOSS_MAPPING.get(getattr(model, "loss_type", None)) is ForCausalLMLoss
        self.shifts_labels = causal and not getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        self.smoother = _smoother(config.label_smoothing_factor) if config.label_smoothing_factor else None
        self.smooths_shifted = type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        problem_type = getattr(getattr(model, "config", None), "problem_type", None)
        if self.smoother is not None and problem_type == "multi_label_classification":
            raise ConfigError("--label_smoothing_factor does not fit several labels a sample; leave it at 0.")

    def check_labels(self, batch: Batch) -> None:
        """Raise ConfigError for a batch of an evaluation that lacks labels which --label_names names."""
        if self.are_named:
            lacking = [name for name in self.label_names if batch.get(name) is None]
            raise ConfigError(
                f"--label_names={' '.join(self.label_names)}: the batches of an evaluation have no "
                f"{' and no '.join(lacking)}, only: {', '.join(batch)}; name keys that the collator makes."
            )

    def num_items(self, window: Sequence[Batch]) -> torch.Tensor | None:
        """
        Collective: return the number of labels that count in a step, over all ranks; a scalar on the device.

        None where neither the model nor compute_loss_func takes it: then the loss is a mean of means.
        """
        if "labels" not in window[0] or not (self.accepts_num_items or self.compute_loss_func):
            return None
        counts = [self._targets(batch).ne(-100).sum() for batch in window]
        total = torch.stack(counts).sum()
        if self.across_devices and self.accelerator.num_processes > 1:
            total = self.accelerator.gather(total.to(self.accelerator.device)).sum()
        # A float, as the Trainer's division by the parallel sizes makes it.
        return total.to(self.accelerator.device) / 1

    def _targets(self, batch: Batch) -> torch.Tensor:
        targets: torch.Tensor = batch["shift_labels"] if "shift_labels" in batch else batch["labels"]
        return targets[..., 1:] if self.shifts_labels and "shift_labels" not in batch else targets

    def __call__(
        self, model: torch.nn.Module, batch: Batch, num_items: torch.Tensor | None, *, micro_batches: int = 1
    ) -> tuple[torch.Tensor, Any]:
        """
        Return the scalar to call backward on, and the model's outputs.

        Raises ConfigError if there is no loss to train with.
        """
        inputs = dict(batch)
        own = self.compute_loss_func is not None or self.smoother is not None
        labels = inputs.pop("labels", None) if own else None
        if self.accepts_num_items and num_items is not None:
            inputs["num_items_in_batch"] = num_items.long()  # FSDP2 rounds inputs that are floats to 16 bits
        outputs = model(**inputs)
        if self.compute_loss_func is not None:
            loss = _scalar(self.compute_loss_func(outputs, labels, num_items), "compute_loss_func")
        elif self.smoother is not None and labels is not None:
            loss = self.smoother(outputs, labels, shift_labels=self.smooths_shifted, num_items_in_batch=num_items)
        else:
            loss = _loss_of(outputs, model)
        scaled = num_items is not None and (self.accepts_num_items or self.compute_loss_func is not None)
        if scaled and self.across_devices and self.accelerator.num_processes > 1:
            loss = loss * self.accelerator.num_processes  # DDP averages the gradients over the ranks
        if not scaled and self.compute_loss_func is None:
            loss = loss / micro_batches
        return loss, outputs


def _loss_of(outputs: Any, model: torch.nn.Module) -> torch.Tensor:
    """Return the loss of a model's outputs. Raises ConfigError if there is none, or none to train with."""
    name = type(getattr(model, "module", getattr(model, "_orig_mod", model))).__name__
    if isinstance(outputs, Mapping):
        if "loss" not in outputs:
            raise ConfigError(
                f'{name} returned no "loss", only: {", ".join(outputs)}. Does it get labels? If they are called '
                "otherwise, it must compute its loss with them, or the task's compute_loss_func must."
            )
        return _scalar(outputs["loss"], f'"loss" of {name}')
    if outputs is None or isinstance(outputs, torch.Tensor | str) or not hasattr(outputs, "__getitem__"):
        given = "None" if outputs is None else f"a {type(outputs).__name__}"
    elif len(outputs) > 0 and outputs[0] is not None:
        return _scalar(outputs[0], f"first output of {name}")
    else:
        given = f"a {type(outputs).__name__} without a loss"
    raise ConfigError(
        f'{name} returned {given}; return a mapping with "loss" (or a tuple that starts with it), or give the task a '
        "compute_loss_func."
    )


def _scalar(loss: Any, source: str) -> torch.Tensor:
    """Return a loss as a scalar. Raises ConfigError for what backward can't be called on; no host sync."""
    remedy = "a loss is one number, a tensor that depends on the weights"
    if not isinstance(loss, torch.Tensor):
        raise ConfigError(f"{source} is {'None' if loss is None else type(loss).__name__}; {remedy}.")
    if not loss.is_floating_point():
        raise ConfigError(f"{source} is of {loss.dtype}; {remedy} and has a fraction.")
    if not torch.is_grad_enabled():  # an evaluation takes the mean of several
        return loss
    if loss.numel() != 1:
        raise ConfigError(f"{source} has the shape {tuple(loss.shape)}; {remedy}: take its mean.")
    if not loss.requires_grad:
        raise ConfigError(f"{source} has no gradient: nothing that is trained goes into it; {remedy}.")
    return loss.reshape(())
