"""What a sweep file says of a population: checked before anything starts, with all that is wrong at once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.errors import ConfigError
from harness.flags import MUTABLE
from harness.sweep.population.schedule import Choices, Range, Rules
from harness.sweep.population.state import rules_of_sweep
from harness.sweep.spec import read_spec
from harness.sweep.study import Sweep

RATES = {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2}
FLAGS = {"task": "tests.support.tasks.parity_task:build", "eval_strategy": "steps", "eval_steps": 2, "max_steps": 8}


def rules(
    folder: Path,
    parameters: Mapping[str, Any] | None = None,
    population: Mapping[str, Any] | None = None,
    *,
    goal: str = "minimize",
    more: Mapping[str, Any] | None = None,
    **flags: Any,
) -> Rules:
    content = {
        "method": "population",
        "metric": {"name": "eval/loss", "goal": goal},
        "parameters": parameters or {"learning_rate": RATES},
        "population": {"size": 4, "perturbation_interval": 4, **(population or {})},
        **(more or {}),
    }
    path = folder / "population.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    given = [f"--{name}={value}" for name, value in {**FLAGS, **flags}.items()]
    spec = read_spec(str(path))
    return rules_of_sweep(Sweep(spec=spec, name="study", folder=folder, storage="", count=0, seed=5, flags=given))


def test_a_sweep_file_becomes_rules(tmp_path: Path) -> None:
    parameters = {
        "learning_rate": RATES,
        "weight_decay": {"values": [0.0, 0.1]},
        "adam_beta1": {"min": 0.8, "max": 0.99},
        "warmup_steps": {"value": 2},
        "seed": {"value": 7},
    }
    found = rules(tmp_path, parameters, {"quantile_fraction": 0.5}, goal="maximize")
    assert (found.size, found.ends, found.seed, found.is_minimized) == (4, (4, 8), 5, False)
    assert (found.quantile_fraction, found.resample_probability) == (0.5, 0.25)
    assert found.perturbation_factors == (1.2, 0.8)
    assert found.spaces == {
        "learning_rate": Range(low=1e-4, high=1e-2, log=True),
        "weight_decay": Choices(values=(0.0, 0.1)),
        "adam_beta1": Range(low=0.8, high=0.99),
    }


def test_a_flag_that_can_not_change_in_the_middle_is_refused_with_those_that_can(tmp_path: Path) -> None:
    parameters = {"learning_rate": RATES, "seed": {"values": [1, 2]}, "lora_r": {"values": [4, 8]}}
    with pytest.raises(ConfigError) as refused:
        rules(tmp_path, parameters)
    assert len(refused.value.problems) == 2
    for problem, name in zip(refused.value.problems, ("lora_r", "seed"), strict=True):
        assert problem.startswith(f"parameters.{name}: members go on from each other's checkpoints")
        assert f"These can: {', '.join(MUTABLE)}; of any other give one `value`." in problem
    assert MUTABLE == ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm")


def test_a_population_without_anything_to_change_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="all have one value"):
        rules(tmp_path, {"learning_rate": {"value": 1e-3}})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"size": 1}, "population.size: 1; give the number of members, 2 or more."),
        ({"size": None}, "population.size: None; give"),
        ({"perturbation_interval": 0.5}, "population.perturbation_interval: 0.5; give optimizer steps, 1 or more."),
        ({"quantile_fraction": 0.6}, "population.quantile_fraction: give 0 to 0.5."),
        ({"resample_probability": True}, "population.resample_probability: give 0 to 1."),
        ({"perturbation_factors": []}, "population.perturbation_factors: give a list of numbers above 0"),
        ({"perturbation_factors": [1.2, -1]}, "population.perturbation_factors: give a list of numbers above 0"),
        (
            {"pertubation_interval": 4},
            "population.pertubation_interval is not known: did you mean perturbation_interval?",
        ),
    ],
)
def test_a_key_of_the_population_that_makes_no_sense_is_refused(
    given: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as refused:
        rules(tmp_path, None, given)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"max_steps": -1}, "A population is divided by steps: give --max_steps."),
        ({"max_steps": 4}, "--max_steps=4: nothing would be exchanged"),
        ({"eval_steps": 3}, "give --eval_strategy steps and an --eval_steps that 4 is a multiple of"),
        ({"eval_strategy": "epoch"}, "each exchange needs an evaluation at its step"),
        ({"eval_delay": 5}, "each exchange needs an evaluation at its step"),
        ({"save_strategy": "no"}, "--save_strategy=no: a population exchanges checkpoints"),
        (
            {"load_best_model_at_end": True, "save_steps": 2},
            "--load_best_model_at_end does not go with method: population",
        ),
        (
            {"early_stopping_patience": 3, "metric_for_best_model": "loss"},
            "all members train equally long; leave it out.",
        ),
        ({"stop_on_nonfinite": 2}, "--stop_on_nonfinite does not go with method: population"),
        ({"stop_at_step": 2}, "--stop_at_step is given by the population itself; leave it out."),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "the rate does not follow from the step"),
    ],
)
def test_flags_with_which_members_would_not_come_together_are_refused(
    flags: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as refused:
        rules(tmp_path, **flags)
    assert message in str(refused.value)


def test_keys_of_other_methods_are_refused(tmp_path: Path) -> None:
    more = {
        "run_cap": 3,
        "early_terminate": {"type": "median"},
        "metric": {"name": "eval/loss", "target": 1.0},
    }
    with pytest.raises(ConfigError) as refused:
        rules(tmp_path, more=more)
    assert [problem.partition(":")[0] for problem in refused.value.problems] == [
        *("early_terminate", "run_cap", "metric.target")
    ]


def test_the_shipped_population_is_a_valid_one() -> None:
    spec = read_spec("rte_population")
    sweep = Sweep(spec=spec, name="rte", folder=Path("runs/rte"), storage="", count=0)
    found = rules_of_sweep(sweep)
    assert (found.size, len(found.ends), found.is_minimized) == (8, 10, False)
