"""Parameter groups, optimizer and schedule: the Trainer's."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)
from transformers.training_args import OptimizerNames

from harness.errors import ConfigError
from harness.model.flags import BY_METRIC, UNSUPPORTED_OPTIMIZERS, OptimConfig
from harness.model.optim import (
    OPTIMIZERS,
    SCHEDULERS,
    build_optimizer,
    build_scheduler,
    check_names,
    current_learning_rate,
    decay_parameter_names,
)


class WithNorms(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)
        self.layer_norm = torch.nn.LayerNorm(2)
        self.norm = torch.nn.Linear(2, 2)
        self.normal = torch.nn.Linear(2, 2)
        self.frozen = torch.nn.Linear(2, 2).requires_grad_(False)


def llama() -> torch.nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )


MODELS = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=1, n_positions=8)),
    "bert": lambda: BertForSequenceClassification(
        BertConfig(vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    ),
    "llama": llama,
    "own": WithNorms,
}


def trainers(model: torch.nn.Module, folder: Path, **arguments: Any) -> Trainer:
    args = TrainingArguments(output_dir=str(folder), use_cpu=True, report_to="none", **arguments)
    return Trainer(model=model, args=args)


@pytest.mark.parametrize("name", MODELS)
def test_decay_groups_are_the_trainers(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    trainer = trainers(model, tmp_path, weight_decay=0.1)
    assert decay_parameter_names(model) == set(trainer.get_decay_parameter_names(model))
    theirs, ours = trainer.create_optimizer(), build_optimizer(model, OptimConfig(weight_decay=0.1))
    assert type(theirs) is type(ours)
    for a, b in zip(theirs.param_groups, ours.param_groups, strict=True):
        assert [id(parameter) for parameter in a["params"]] == [id(parameter) for parameter in b["params"]]
        assert {key: value for key, value in a.items() if key != "params"} == {
            key: value for key, value in b.items() if key != "params"
        }
    assert [group["weight_decay"] for group in ours.param_groups] == [0.1, 0.0]
    assert all(ours.param_groups[i]["params"] for i in (0, 1))


INSTALLED = ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"]


@pytest.mark.parametrize("name", INSTALLED)
def test_optimizer_has_the_trainers_class_and_arguments(name: str, tmp_path: Path) -> None:
    values = {"optim": name, "learning_rate": 3e-3, "adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6}
    model = WithNorms()
    theirs = trainers(model, tmp_path, **values).create_optimizer()
    ours = build_optimizer(model, OptimConfig(**values))
    assert type(theirs) is type(ours)
    assert theirs.defaults == ours.defaults


def test_every_optimizer_of_transformers_is_taken_or_refused() -> None:
    assert {*OPTIMIZERS, *UNSUPPORTED_OPTIMIZERS} == {name.value for name in OptimizerNames}


@pytest.mark.parametrize("name", UNSUPPORTED_OPTIMIZERS)
def test_unsupported_optimizers_are_refused_with_what_to_use(name: str) -> None:
    with pytest.raises(ConfigError, match=f"--optim={name} is not supported: .*use "):
        OptimConfig(optim=name)


def test_remedies_name_optimizers_that_are_taken() -> None:
    for reason in UNSUPPORTED_OPTIMIZERS.values():
        for name in reason.rsplit("use ", 1)[1].split(" or "):
            assert name in OPTIMIZERS


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"optim": "galore_adamw", "optim_target_modules": ["layer"]}, "galore"),
        ({"optim": "grokadamw"}, "grokadamw"),
        ({"optim": "schedule_free_adamw"}, "schedule"),
    ],
)
def test_what_the_optimizer_lacks_is_said_with_its_name(values: dict[str, Any], says: str) -> None:
    config = OptimConfig(**values)
    with pytest.raises(ConfigError, match=f"(?is)--optim={config.optim}: .*{says}"):
        build_optimizer(WithNorms(), config)


@pytest.mark.parametrize("kind", sorted({*SCHEDULERS} - {*BY_METRIC}))
def test_plan_is_the_trainers(kind: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"warmup_steps": 3}
    if kind == "cosine_with_min_lr" or kind == "cosine_warmup_with_min_lr":
        options["lr_scheduler_kwargs"] = {"min_lr": 1e-5}
    if kind == "warmup_stable_decay":
        options["lr_scheduler_kwargs"] = {"num_decay_steps": 4}
    model = WithNorms()
    trainer = trainers(model, tmp_path, lr_scheduler_type=kind, optim="sgd", **options)
    theirs = trainer.create_scheduler(num_training_steps=12, optimizer=trainer.create_optimizer())
    config = OptimConfig(lr_scheduler_type=kind, optim="sgd", **options)
    optimizer = build_optimizer(model, config)
    ours = build_scheduler(optimizer, config, max_steps=12)
    rates = []
    for _ in range(12):
        rates.append(current_learning_rate(ours, optimizer, config))
        assert rates[-1] == theirs.get_last_lr()[0]
        for optim, scheduler in ((trainer.optimizer, theirs), (optimizer, ours)):
            optim.step()
            scheduler.step()
    assert len(set(rates)) > 1 or kind == "constant"


@pytest.mark.parametrize("warmup", [0, 0.05, 0.1, 0.5, 0.999, 1, 3, 7.0])
@pytest.mark.parametrize("max_steps", [1, 10, 33, 804])
def test_warmup_is_the_trainers(warmup: float, max_steps: int, tmp_path: Path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", warmup_steps=warmup)
    assert OptimConfig(warmup_steps=warmup).num_warmup_steps(max_steps) == args.get_warmup_steps(max_steps)


@pytest.mark.parametrize("kind", BY_METRIC)
def test_rate_of_a_schedule_by_metric_is_the_optimizers(kind: str) -> None:
    config = OptimConfig(lr_scheduler_type=kind, learning_rate=0.25, optim="sgd")
    optimizer = build_optimizer(WithNorms(), config)
    scheduler = build_scheduler(optimizer, config, max_steps=10)
    assert current_learning_rate(scheduler, optimizer, config) == 0.25


def test_arguments_that_the_schedule_lacks_are_refused() -> None:
    config = OptimConfig(lr_scheduler_type="linear", lr_scheduler_kwargs={"power": 2}, optim="sgd")
    with pytest.raises(ConfigError, match=r"--lr_scheduler_type=linear with --lr_scheduler_kwargs=.*power"):
        build_scheduler(build_optimizer(WithNorms(), config), config, max_steps=10)


@pytest.mark.parametrize(
    ("optim", "optim_args", "expected"),
    [
        ("adamw_torch", "amsgrad=true", {"amsgrad": True, "betas": (0.9, 0.999), "lr": 5e-5}),
        ("adamw_torch", "foreach=false,maximize=True", {"foreach": False, "maximize": True}),
        ("adamw_torch_fused", "amsgrad=True", {"amsgrad": True, "fused": True}),
        ("adafactor", "clip_threshold=0.5,decay_rate=-0.7", {"clip_threshold": 0.5, "decay_rate": -0.7}),
        ("adafactor", "scale_parameter=true", {"scale_parameter": True, "relative_step": False}),
        ("adafactor", "beta1=0.9", {"beta1": 0.9}),
        ("sgd", "momentum=0.9, nesterov=true", {"momentum": 0.9, "nesterov": True}),
        ("sgd", "maximize=true", {"maximize": True, "momentum": 0}),
        ("adagrad", "initial_accumulator_value=0.5,eps=1e-6", {"initial_accumulator_value": 0.5, "eps": 1e-6}),
        ("rmsprop", "capturable=false,alpha=0.5", {"capturable": False, "alpha": 0.5}),
    ],
)
def test_further_arguments_reach_the_optimizer(optim: str, optim_args: str, expected: dict[str, Any]) -> None:
    optimizer = build_optimizer(WithNorms(), OptimConfig(optim=optim, optim_args=optim_args))
    for group in optimizer.param_groups:
        assert {name: group[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("optim", "optim_args", "says"),
    [
        ("adamw_torch", "amsgard=true", "adamw_torch takes no amsgard; it takes: .*amsgrad"),
        ("adamw_torch_fused", "momentum=0.9", "takes no momentum"),
        ("adafactor", "rank=8", "takes no rank; it takes: .*clip_threshold"),
        ("sgd", "momentun=0.9", "takes no momentun; it takes: .*momentum"),
        ("adamw_torch", "lr=1", "for lr there is --learning_rate"),
        ("adamw_torch", "eps=1e-6", "for eps there is --adam_epsilon"),
        ("adafactor", "eps=1e-6", "for eps there is"),
        ("sgd", "weight_decay=0.1", "for weight_decay there is --weight_decay"),
        ("adamw_torch", "amsgrad=1", "amsgrad=1: give true or false"),
        ("adafactor", "clip_threshold=much", "clip_threshold=much"),
    ],
)
def test_further_arguments_that_would_do_nothing_are_refused(optim: str, optim_args: str, says: str) -> None:
    with pytest.raises(ConfigError, match=f"--optim_args={optim_args}: .*{says}|{says}"):
        build_optimizer(WithNorms(), OptimConfig(optim=optim, optim_args=optim_args))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"learning_rate": -1.0}, "--learning_rate=-1"),
        ({"learning_rate": math.nan}, "--learning_rate=nan"),
        ({"weight_decay": -0.1}, "--weight_decay=-0.1"),
        ({"warmup_steps": -1}, "--warmup_steps=-1"),
        ({"adam_beta1": 1.0}, "--adam_beta1=1"),
        ({"adam_beta2": -0.1}, "--adam_beta2=-0.1"),
        ({"adam_epsilon": -1.0}, "--adam_epsilon=-1"),
        ({"optim": "adam"}, "--optim=adam is not known.*Did you mean"),
        ({"lr_scheduler_type": "cosin"}, "--lr_scheduler_type=cosin is not known.*Did you mean cosine"),
        ({"optim_args": "momentum"}, "--optim_args=momentum: write key=value"),
        ({"optim_target_modules": ["x"]}, "--optim_target_modules is for galore"),
    ],
)
def test_impossible_values_are_refused(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check_names(OptimConfig(**values))


def stepped(name: str, **args: str) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A model and its optimizer, after two steps in fp16's way."""
    torch.manual_seed(0)
    model = WithNorms()
    optimizer = build_optimizer(model, OptimConfig(optim=name, **args))
    step(model, optimizer, count=2)
    return model, optimizer


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, *, count: int) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for _ in range(count):
        optimizer.zero_grad()
        scaler.scale(sum(parameter.square().sum() for parameter in model.parameters())).backward()
        scaler.step(optimizer)
        scaler.update()


@pytest.mark.parametrize("was", ["adamw_torch", "adamw_torch_fused"])
@pytest.mark.parametrize("now", ["adamw_torch", "adamw_torch_fused"])
def test_a_loaded_state_is_stepped_by_the_implementation_of_this_run(was: str, now: str) -> None:
    trained, saved = stepped(was)
    model, optimizer = stepped(now)
    model.load_state_dict(trained.state_dict())
    optimizer.load_state_dict(copy.deepcopy(saved.state_dict()))
    assert {group["fused"] for group in optimizer.param_groups} == {True if now == "adamw_torch_fused" else None}
    step(trained, saved, count=3)
    step(model, optimizer, count=3)
    for a, b in zip(trained.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0 if was == now else 1e-6, atol=0 if was == now else 1e-7)


def test_the_numbers_of_a_loaded_state_are_the_checkpoints() -> None:
    model = WithNorms()
    saved = build_optimizer(model, OptimConfig(weight_decay=0.1)).state_dict()
    for group in saved["param_groups"]:
        group |= {"lr": 0.5, "betas": (0.1, 0.2), "maximize": True, "differentiable": True}
    optimizer = build_optimizer(model, OptimConfig())
    optimizer.load_state_dict(saved)
    kept = [(group["lr"], group["betas"], group["maximize"], group["weight_decay"]) for group in optimizer.param_groups]
    assert kept == [(0.5, (0.1, 0.2), True, 0.1), (0.5, (0.1, 0.2), True, 0.0)]
    assert not any(group["differentiable"] for group in optimizer.param_groups)


def test_groups_that_do_not_match_are_still_an_error() -> None:
    _, optimizer = stepped("adamw_torch")
    saved = optimizer.state_dict()
    saved["param_groups"] = [*saved["param_groups"], saved["param_groups"][0]]
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(saved)
