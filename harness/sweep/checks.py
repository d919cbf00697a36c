"""Hold a sweep against the training's flags, before any trial starts: they are known, and their values parse."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from harness.config import together
from harness.errors import ConfigError
from harness.flags import FLAGS, NOT_TAKEN, Reading, read
from harness.sweep.parameters import Parameter, Scalar, as_text
from harness.sweep.spec import Spec

# What the sweep itself gives to each trial.
OURS = {
    "output_dir": "each trial has its folder in that of the study (--folder)",
    "resume_from_checkpoint": "a trial that ended early is resumed by itself",
    "run_name": "it is the study's name and the trial's number",
    "wandb_run_group": "it is the study's name",
    "wandb_run_id": "each trial is a run of its own",
    "wandb_resume": "each trial is a run of its own",
    "wandb_fork": "each trial is a run of its own",
    "pruning_file": "the sweep gives it",
    "print_config": "see the trials with harness sweep --show",
}


def check_sweep(spec: Spec, flags: Sequence[str]) -> Reading:
    """Return what the first trial comes to. Raises one ConfigError for all that is wrong with file and flags."""
    together([partial(_check_parameter, each) for each in spec.parameters.values()])
    common = read(flags)
    together(partial(_check_common, common, spec, name) for name in common.values)
    readings = [read([*flags, *as_flags(point)]) for point in _points(spec)]
    for reading in readings:
        reading.checked()
        _check_metric(spec, reading)
    return readings[0]


def as_flags(values: Mapping[str, Scalar]) -> list[str]:
    """Return the flags of a trial's parameters."""
    return [f"--{name}={as_text(value)}" for name, value in values.items()]


def _points(spec: Spec) -> Iterator[dict[str, Scalar]]:
    """Yield enough points to see each value once: a grid's own, else each value beside the first of the others."""
    if spec.method == "grid":
        parts = [parameter.points() for parameter in spec.parameters.values()]
        if spec.num_points() <= 64:
            yield from (dict(zip(spec.parameters, point, strict=True)) for point in itertools.product(*parts))
            return
    first = {name: parameter.edges()[0] for name, parameter in spec.parameters.items()}
    yield first
    for name, parameter in spec.parameters.items():
        yield from ({**first, name: value} for value in parameter.edges()[1:])


def _check_parameter(parameter: Parameter) -> None:
    name = parameter.name
    if name in OURS:
        raise ConfigError(f"parameters.{name} can not be searched: {OURS[name]}.")
    if name not in FLAGS:
        read([f"--{name}=0"]).checked()  # says what is near, or what to use in its place
        raise ConfigError(f"parameters.{name} is no flag: {NOT_TAKEN.get(name, 'see harness train --help all')}.")
    flag = FLAGS[name]
    if parameter.is_range and flag.type not in (int, float):
        raise ConfigError(f"parameters.{name} is no number: give `values`.")
    if parameter.is_range and flag.type is int and (parameter.q is None or parameter.q != int(parameter.q)):
        raise ConfigError(f"parameters.{name} is an integer: use int_uniform, or q_uniform with a whole q.")
    together(partial(flag.value_of, as_text(value)) for value in parameter.edges())


def _check_common(common: Reading, spec: Spec, name: str) -> None:
    origin = common.origins.get(name, "")
    if name in spec.parameters and origin == "command line":
        raise ConfigError(f"--{name} is a parameter of the sweep: leave it out of the flags.")
    if name in OURS and common.values[name] not in ("", None):
        raise ConfigError(f"--{name} ({origin}) is for one run: {OURS[name]}. Leave it out.")


def _check_metric(spec: Spec, reading: Reading) -> None:
    config: Any = reading.config
    evaluates, of_evaluation = config.plan.eval_strategy != "no", spec.metric.name.startswith("eval/")
    if not config.run.trains:
        raise ConfigError("--do_eval and --do_predict alone train nothing: give --do_train too.")
    if of_evaluation and not (evaluates or config.run.do_eval):
        raise ConfigError(f"metric.name: {spec.metric.name} is of evaluations: give --eval_strategy steps or epoch.")
    if spec.early_terminate is not None and not (evaluates and of_evaluation):
        raise ConfigError("early_terminate goes by evaluations: give --eval_strategy steps or epoch, a metric eval/...")
