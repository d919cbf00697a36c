"""Prepare a model for training, and compute its loss by the Trainer's rules."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import broadcast_object_list, send_to_device
from transformers import PreTrainedModel
from transformers.integrations.neftune import activate_neftune
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer_pt_utils import LabelSmoother
from transformers.trainer_utils import align_special_tokens, unwrap_peft_model
from transformers.utils import can_return_loss, find_labels

from harness.distributed.sharding import reshard
from harness.distributed.transfer import known, sum_over_ranks, then
from harness.errors import ConfigError
from harness.tasks import LossFunction
from harness.training.flags import ModelingConfig
from harness.training.weighing import (
    BATCHES,
    SAMPLES,
    SHIFTED_TOKENS,
    TOKENS,
    TRIES,
    Batch,
    Probe,
    Repeated,
    Targets,
    Weighing,
    are_tokens,
    untouched,
)

logger = logging.getLogger(__name__)

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


@dataclass(frozen=True, kw_only=True)
class Share:
    """
    What the loss of a micro-batch counts in its step.

    `num_items` is what the model divides by. Its loss is then multiplied by `times` and divided by `over`, or is 0
    where `counts` is false, so that the mean over the ranks of what all micro-batches give is the loss of the step. The
    micro-batch weighs `weight` of the `total` of the step, on all ranks. `targets` of its tokens have a label that
    counts; None where labels are not of tokens.
    """

    num_items: torch.Tensor | None = None
    times: int = 1
    over: torch.Tensor | float = 1
    counts: torch.Tensor | None = None
    weight: torch.Tensor | float = 1
    total: torch.Tensor | float = 1
    targets: torch.Tensor | None = None

    @property
    def part(self) -> torch.Tensor | float:
        """The weight of the micro-batch among all of the step, whose weights add up to 1."""
        total = self.total.clamp(min=1) if isinstance(self.total, torch.Tensor) else max(self.total, 1)
        part: torch.Tensor | float = self.weight / total
        return part


class Loss:
    """
    Computes the loss of a micro-batch as its share of the loss of a step.

    With --loss_scaling trainer it mirrors Trainer.compute_loss, Trainer._get_num_items_in_batch and the part of
    Trainer.training_step that scales. Otherwise loss and gradient are those of all samples of a step at once, however
    they are split: what the model does with num_items_in_batch is learned from the first batch (see Weighing).
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
        self.as_trainer = config.loss_scaling == "trainer"
        self.weighing: Weighing | None = None
        self._guess: Weighing | None = None
        self._tries = 0
        self._is_compiled: bool | None = None
        self._labels_tokens = False
        self.label_names: list[str] = config.label_names or find_labels(model.__class__)
        self.are_named = config.label_names is not None
        # A loss of an evaluation needs no labels, as CLIP's.
        self.needs_no_labels = not self.label_names and can_return_loss(model.__class__)
        accepts = getattr(model, "accepts_loss_kwargs", None)
        if accepts is None:
            parameters = inspect.signature(model.forward).parameters.values()
            accepts = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
        self.accepts_num_items = bool(accepts)
        # A causal loss shifts the labels itself, so the first position is never a target.
        causal = LOSS_MAPPING.get(getattr(model, "loss_type", None)) is ForCausalLMLoss
        shifts = causal and not getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        name = "labels" if "labels" in self.label_names or not self.label_names else self.label_names[0]
        self.targets = Targets(name=name, shifts=shifts)
        self.ignores_labels = isinstance(model, PreTrainedModel) and compute_loss_func is None
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

    @property
    def num_ranks(self) -> int:
        """The ranks over which a step's items are counted."""
        return self.accelerator.num_processes if self.across_devices else 1

    def shares(self, model: torch.nn.Module, window: Sequence[Batch]) -> list[Share]:
        """
        Collective: return the shares of a step's micro-batches; `model` is the wrapped one.

        Neither a host sync nor a wait for other ranks: what they hold is on its way while the forward pass begins.
        """
        if self.as_trainer:
            return self._trainers_shares(model, window)
        weighing = self.weighing or self.learn(model, window)
        takes, ranks = self.takes_num_items(window[0]), self.num_ranks
        counts = [self.targets.count(batch) for batch in window] if takes else []
        weights = [self.targets.weight(batch, weighing.by) for batch in window] if weighing.means else counts
        # Summed up together, so that the ranks meet once.
        total, count = self._over_ranks(model, [sum(weights), sum(counts)])
        of_all = then(total, lambda total: total * (self.accelerator.num_processes // ranks), torch.int64)
        counted = counts if takes else weights if weighing.by in (TOKENS, SHIFTED_TOKENS) else [None] * len(window)
        shares = []
        for batch, weight, tokens in zip(window, weights, counted, strict=True):
            # The mean over the ranks is the loss of the step, so each rank's part is as many times larger.
            share = _mean_share(weight, total, ranks) if weighing.means else _sum_share(batch, ranks)
            over = share.over if weighing.both else None
            items = then(count, partial(self._divisor, over=over, ranks=ranks)) if takes else None
            targets = self._targets_of(batch, tokens)
            shares.append(replace(share, num_items=items, weight=weight, total=of_all, targets=targets))
        return shares

    def _targets_of(self, batch: Batch, counted: torch.Tensor | int | None) -> torch.Tensor | None:
        """Return how many tokens have a label that counts, `counted` if known; None where labels are not of tokens."""
        if isinstance(batch, Repeated) or not are_tokens(batch.get(self.targets.name)):
            return None
        self._labels_tokens = True
        count = self.targets.count(batch) if counted is None else counted
        return count if isinstance(count, torch.Tensor) else None

    @property
    def labels_tokens(self) -> bool:
        """Whether labels are of tokens, as far as batches have shown it, those before a resume too."""
        return self._labels_tokens or (self.weighing is not None and self.weighing.by in (TOKENS, SHIFTED_TOKENS))

    def _divisor(self, count: torch.Tensor | int, *, over: torch.Tensor | float | None, ranks: int) -> torch.Tensor:
        """Return what a model divides by: the items on all ranks, where its loss is divided again the part of them."""
        items = torch.as_tensor(count, device=self.accelerator.device).clamp(min=1) / 1
        return items if over is None else items / (known(over) * ranks)

    def divide(self, share: Share, batch: Batch, parts: Sequence[Batch]) -> list[Share]:
        """Return the shares of the parts that a micro-batch is split into. Neither communication nor a host sync."""
        by = self.targets.candidates(batch)[0]
        weighing = self.weighing or self._guess or Weighing(sums=True, means=True, by=by)  # as `shares` has it
        if not weighing.means:
            return [replace(share, weight=self.targets.count(part)) for part in parts]
        found = []
        for part in parts:
            weight = self.targets.weight(part, weighing.by)
            own = _mean_share(weight, share.total, self.accelerator.num_processes)
            items = share.num_items
            if items is not None and weighing.both and not isinstance(batch, Repeated):
                of_batch = weight / torch.as_tensor(share.weight).clamp(min=1)
                items = then(items, partial(torch.mul, of_batch))
            found.append(replace(own, num_items=items, weight=weight, total=share.total))
        return found

    def _over_ranks(self, model: torch.nn.Module, numbers: list[torch.Tensor | int]) -> Sequence[torch.Tensor | int]:
        """Collective: return the sums of integer scalars over the ranks, which may be Awaited."""
        if self.num_ranks == 1:
            return numbers
        sums = sum_over_ranks(self.accelerator, numbers)
        if self._is_compiled is None:
            self._is_compiled = any(map(_is_compiled, model.modules()))
        return [known(each) for each in sums] if self._is_compiled else sums

    def _trainers_shares(self, model: torch.nn.Module, window: Sequence[Batch]) -> list[Share]:
        share = Share(total=len(window) * self.accelerator.num_processes)
        counts = [self.targets.count(batch) for batch in window] if self.takes_num_items(window[0]) else []
        if counts:
            (count,) = self._over_ranks(model, [sum(counts)])
            # A float, as the Trainer's division by the parallel sizes makes it.
            num_items = then(count, lambda count: torch.as_tensor(count, device=self.accelerator.device) / 1)
            share = replace(share, num_items=num_items, times=self.num_ranks)
        elif self.compute_loss_func is None:
            share = replace(share, over=len(window))
        counted: Sequence[torch.Tensor | int | None] = counts or [None] * len(window)
        return [replace(share, targets=self._targets_of(*each)) for each in zip(window, counted, strict=True)]

    def takes_num_items(self, batch: Batch) -> bool:
        """Whether the loss is given the number of items; else it is a mean over the micro-batch."""
        return "labels" in batch and (self.accepts_num_items or self.compute_loss_func is not None)

    def eval_weighing(self, model: torch.nn.Module, batch: Batch) -> Weighing:
        """
        Collective: return how the losses of an evaluation's batches are put together, learned from one if need be.

        Where nothing fits, as the Trainer does: by their items, or by their samples.
        """
        found = self.weighing or self.learn(model, [batch])
        if found.by != BATCHES:
            return found
        return replace(found, means=not found.sums, by=SAMPLES)

    def learn(self, model: torch.nn.Module, window: Sequence[Batch]) -> Weighing:
        """
        Collective: learn from a step how the losses of several micro-batches are put together; all is as it was after.

        At most five small forward passes. Where the samples of a step can't tell what weighs, those of the next ones
        are looked at, a few times. Says in one line where nothing fits, and micro-batches are averaged.
        """
        self._tries += 1
        few = self._of_first_rank(self.targets.choose(window))
        if few is None:
            by = self.targets.candidates(window[0])[0]
            return self._guess or Weighing(sums=True, means=True, by=by)  # which fits every loss
        bare = model if self.accelerator.distributed_type == DistributedType.DEEPSPEED else self._bare(model)
        with untouched(bare, self.accelerator.device) as redraw:

            def loss_of(part: Batch, num_items: int) -> float:
                redraw()
                items = torch.tensor(float(num_items), device=self.accelerator.device)
                return self.compute(bare, part, items if self.takes_num_items(part) else None)[0].float().mean().item()

            probe = Probe(
                loss_of=loss_of,
                targets=self.targets,
                ignores=self.ignores_labels,
                is_exact=self._is_exact(bare),
            )
            found = self._guess or probe.parts(few)
            weight, why = probe.weight(few) if found.means else (found.by, "")
        reshard(bare)
        if self.accelerator.num_processes > 1:  # their last bits may differ
            found, weight, why = broadcast_object_list([found, weight, why])
        self._guess = found if weight is None else replace(found, by=weight)
        if weight is not None or self._tries == TRIES:
            self.weighing = self._guess
        if why and self.accelerator.is_main_process:
            logger.warning("Loss and gradient depend on how a batch is split: %s; micro-batches are averaged.", why)
        return self._guess

    def _of_first_rank(self, few: Batch | None) -> Batch | None:
        # With other samples a rank might need another number of passes, and in a sharded model all take part in each.
        if self.accelerator.num_processes == 1:
            return few
        (sent,) = broadcast_object_list([send_to_device(few, "cpu")])
        received: Batch | None = send_to_device(sent, self.accelerator.device)
        return received

    def _bare(self, model: torch.nn.Module) -> torch.nn.Module:
        # Without the compiler, which would compile once more for each size of a probe's batch.
        bare: torch.nn.Module = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        return bare

    def _is_exact(self, model: torch.nn.Module) -> bool:
        is_single = {parameter.dtype for parameter in model.parameters()} <= {torch.float32, torch.float64}
        return is_single and self.accelerator.device.type == "cpu" and self.accelerator.mixed_precision == "no"

    def __call__(self, model: torch.nn.Module, batch: Batch, share: Share) -> tuple[torch.Tensor, Any]:
        """
        Return the scalar to call backward on, and the model's outputs.

        Raises ConfigError if there is no loss to train with.
        """
        loss, outputs = self.compute(model, batch, share.num_items)
        if share.times != 1:
            loss = loss * share.times
        if isinstance(share.over, torch.Tensor) or share.over != 1:
            loss = loss / share.over
        return loss if share.counts is None else torch.where(share.counts, loss, 0.0), outputs

    def compute(self, model: torch.nn.Module, batch: Batch, num_items: torch.Tensor | None) -> tuple[torch.Tensor, Any]:
        """Return the loss as the model or compute_loss_func gives it for a number of items, and the outputs."""
        inputs = dict(batch)
        own = self.compute_loss_func is not None or self.smoother is not None
        labels = inputs.pop("labels", None) if own else None
        if self.accepts_num_items and num_items is not None:
            inputs["num_items_in_batch"] = self._as_input(num_items)
        outputs = model(**inputs)
        if self.compute_loss_func is not None:
            loss = _scalar(self.compute_loss_func(outputs, labels, num_items), "compute_loss_func")
        elif self.smoother is not None and labels is not None:
            loss = self.smoother(outputs, labels, shift_labels=self.smooths_shifted, num_items_in_batch=num_items)
        else:
            loss = _loss_of(outputs, model)
        return loss, outputs

    def _as_input(self, num_items: torch.Tensor) -> torch.Tensor:
        # FSDP2 rounds inputs that are floats to 16 bits. Only a part of the items is no whole number.
        rounds = self.accelerator.mixed_precision != "no" and self.accelerator.is_fsdp2
        is_part = self.weighing is not None and self.weighing.both
        return num_items if is_part and not rounds else then(num_items, lambda items: items.round().long(), torch.int64)

    def state_dict(self) -> dict[str, Any]:
        """Return what was learned of the model: plain values."""
        return {} if self.weighing is None else asdict(self.weighing)

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned; nothing is learned again."""
        self.weighing = Weighing(**saved) if saved else None


def _is_compiled(module: torch.nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def _mean_share(weight: torch.Tensor | int, total: torch.Tensor | float, ranks: int) -> Share:
    """Return the share of a loss that is a mean, by its weight among `total` of these ranks."""
    if isinstance(weight, int):
        return Share(over=then(total, lambda total: total / ranks / weight)) if weight > 0 else Share(times=0)
    counts = weight > 0
    # Where nothing counts the mean is not a number, and neither would be its gradient.
    over = then(total, lambda total: torch.where(counts, total / ranks / weight, 1.0))
    return Share(over=over, counts=counts)


def _sum_share(batch: Batch, ranks: int) -> Share:
    """Return the share of a loss that is a sum over the items, divided by their number on all ranks."""
    return Share(times=0 if isinstance(batch, Repeated) else ranks)


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
