"""What a sweep file says of a population: its keys, their defaults, and whether the training can be divided so."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from harness.config import together
from harness.errors import ConfigError
from harness.flags import FLAGS, MUTABLE, Config
from harness.model.flags import BY_METRIC
from harness.sweep.parameters import Parameter
from harness.sweep.population.schedule import Choices, Range, Rules, Space

# The defaults are Ray Tune's, but for the interval, which has none there that would suit a training.
DEFAULTS: dict[str, Any] = {
    "size": None,
    "perturbation_interval": None,
    "quantile_fraction": 0.25,
    "resample_probability": 0.25,
    "perturbation_factors": [1.2, 0.8],
}
# What the schedule of the population gives itself, and what would end a member, or change its weights, without it.
OWN_FLAGS = ("stop_at_step", "change_on_resume")
NOT_IN_A_POPULATION = {
    "load_best_model_at_end": "the best member is known by the study",
    "early_stopping_patience": "all members train equally long",
    "save_only_model": "a member goes on from checkpoints",
    "stop_on_nonfinite": "a member whose objective is no number is replaced",
}


def check_population(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `population:` says, with the defaults. Raises one ConfigError for all that is wrong."""
    for key in given:
        if key not in DEFAULTS:
            near = difflib.get_close_matches(str(key), DEFAULTS, n=1)
            hint = f": did you mean {near[0]}?" if near else f"; there are: {', '.join(DEFAULTS)}."
            raise ConfigError(f"population.{key} is not known{hint}")
    values = {**DEFAULTS, **given}
    factors = values["perturbation_factors"]
    are_factors = isinstance(factors, list) and factors and all(_number(each, 0.0, math.inf) for each in factors)
    checks: list[tuple[bool, str]] = [
        (_is_count(values["size"], 2), f"size: {values['size']}; give the number of members, 2 or more"),
        (
            _is_count(values["perturbation_interval"], 1),
            f"perturbation_interval: {values['perturbation_interval']}; give optimizer steps, 1 or more",
        ),
        (_number(values["quantile_fraction"], 0.0, 0.5), "quantile_fraction: give 0 to 0.5"),
        (_number(values["resample_probability"], 0.0, 1.0), "resample_probability: give 0 to 1"),
        (bool(are_factors), "perturbation_factors: give a list of numbers above 0, as in [1.2, 0.8]"),
    ]
    together(_refusal(f"population.{message}.") for is_right, message in checks if not is_right)
    return values


def rules_of(
    given: Mapping[str, Any], parameters: Sequence[Parameter], config: Config, *, is_minimized: bool, seed: int
) -> Rules:
    """
    Return the rules of a population, whose keys are `given`, and whose members are trained with the flags of `config`.

    Raises one ConfigError for parameters that can't change in the middle of a training, and for flags with which not
    all members would come to every end of a generation with an evaluation and a checkpoint.
    """
    population = check_population(given)
    together(
        [*_checks_of_parameters(parameters, config), *_checks_of_flags(config, population["perturbation_interval"])]
    )
    changing = {parameter.name: space_of(parameter) for parameter in parameters if not is_constant(parameter)}
    return Rules(
        size=population["size"],
        num_steps=config.plan.max_steps,
        perturbation_interval=population["perturbation_interval"],
        quantile_fraction=float(population["quantile_fraction"]),
        resample_probability=float(population["resample_probability"]),
        perturbation_factors=tuple(float(each) for each in population["perturbation_factors"]),
        spaces=changing,
        is_minimized=is_minimized,
        seed=seed,
    )


def is_constant(parameter: Parameter) -> bool:
    """Whether a parameter is a flag that all members have."""
    return len(parameter.values) == 1


def space_of(parameter: Parameter) -> Space:
    """Return the values that a parameter may have."""
    if not parameter.is_range:
        return Choices(values=parameter.values, probabilities=parameter.probabilities)
    return Range(low=parameter.low, high=parameter.high, log=parameter.is_log, q=parameter.q)


def _checks_of_parameters(parameters: Sequence[Parameter], config: Config) -> list[Callable[[], None]]:
    problems, changing = [], [parameter for parameter in parameters if not is_constant(parameter)]
    if not changing:
        problems.append("parameters: all have one value; a population needs one that members differ in.")
    for parameter in changing:
        if parameter.name not in MUTABLE:
            problems.append(
                f"parameters.{parameter.name}: members go on from each other's checkpoints, and this flag can't change "
                f"in the middle of a training. These can: {', '.join(MUTABLE)}; of any other give one `value`."
            )
    if any(parameter.name == "learning_rate" for parameter in changing) and (
        config.optim.lr_scheduler_type in BY_METRIC
    ):
        problems.append(
            f"parameters.learning_rate: with --lr_scheduler_type={config.optim.lr_scheduler_type} the rate does not "
            "follow from the step; use another schedule."
        )
    return [_refusal(problem) for problem in problems]


def _checks_of_flags(config: Config, interval: int) -> list[Callable[[], None]]:
    plan, flat, problems = config.plan, config.flat(), []
    if plan.max_steps <= 0:
        problems.append("A population is divided by steps: give --max_steps.")
    elif interval >= plan.max_steps:
        problems.append(
            f"population.perturbation_interval: {interval}, and --max_steps={plan.max_steps}: nothing would be "
            "exchanged; use a smaller interval."
        )
    steps = plan.logging_steps if plan.eval_steps is None else plan.eval_steps
    eval_steps = max(math.ceil(plan.max_steps * steps), 1) if steps < 1 else int(steps)
    if plan.eval_strategy != "steps" or interval % eval_steps or plan.eval_delay > interval:
        problems.append(
            f"population.perturbation_interval: {interval}; each exchange needs an evaluation at its step: give "
            f"--eval_strategy steps and an --eval_steps that {interval} is a multiple of."
        )
    if plan.save_strategy in ("no", "best"):
        problems.append(
            f"--save_strategy={plan.save_strategy}: a population exchanges checkpoints; give steps or epoch."
        )
    problems += [
        f"--{name} does not go with method: population: {why}; leave it out."
        for name, why in NOT_IN_A_POPULATION.items()
        if flat[name] != FLAGS[name].default
    ]
    problems += [
        f"--{name} is given by the population itself; leave it out."
        for name in OWN_FLAGS
        if flat[name] != FLAGS[name].default
    ]
    return [_refusal(problem) for problem in problems]


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _number(value: Any, least: float, most: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most


def _refusal(problem: str) -> Callable[[], None]:
    def refuse() -> None:
        raise ConfigError(problem)

    return refuse
