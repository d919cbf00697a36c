"""Draw cases from the seed: their configurations, and how and when each of their attempts is killed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

FOLDER_VARIABLE = "HARNESS_FAULTS"
CLOCK_FILE = "clock"  # by how many seconds the clock of the training is wrong
STEPS, SAVE_STEPS, STEP_SECONDS, EVALUATION_SECONDS = 60, 5, 0.05, 0.15
KILLS_PER_CASE = (3, 5)
# A run that is extended has been finished at this step before.
FIRST_END = STEPS // 2
RUN_NAME = "a-name-of-its-own"
# Bytes: a dozen checkpoints and W&B's files have room until something fills it.
SMALL_DISK = "16m"

PACKED = {"packing": True, "max_length": 64, "packing_window": 16}

# Kinds of death and how often they are drawn.
ANYWHERE = {
    "kill_all": 3.0,  # SIGKILL to all processes at once, wandb-core too
    "kill_rank": 3.0,  # SIGKILL to one rank; of one process to the script alone
    "term": 1.5,  # SIGTERM, as a scheduler sends it
    "usr1": 1.0,  # SIGUSR1 to the ranks
    "interrupt": 1.5,  # Ctrl-C: SIGINT to all that a terminal reaches
    "interrupt_twice": 0.7,  # and once more, within a second or two
    "hangup": 1.0,  # a terminal that is closed: SIGHUP to the same
    "closed_stdout": 1.0,  # who reads the standard output has ended
    "clock": 1.0,  # the clock is set while it trains; all later attempts have the new time
    "stop": 1.0,  # SIGSTOP to all for seconds, then SIGKILL
    "read_only": 1.0,  # the folder of the run can't be changed any more
    "power_cut": 2.0,  # SIGKILL to all, and what was not synced is cut or zeroed
    "torn_newest": 1.5,  # SIGKILL to all, and a file of the newest checkpoint is damaged
}
WITH_TWO_PROCESSES = {"stop_rank": 0.4}  # SIGSTOP to one rank until the other gives up, then SIGKILL
ON_SMALL_DISK = {"disk_full": 3.0}
WITH_TRACKING = {
    "core_alone": 1.0,  # SIGKILL to wandb-core, the training goes on
    "core_then_script": 1.0,
    "script_then_core": 1.0,
}
# Moments and how often they are drawn; a drawn part of what each lasts passes before the death.
MOMENTS = {
    "step": 3.0,  # between two steps, or in one
    "save": 3.0,  # checkpoint-N.partial is there
    "commit": 1.5,  # checkpoint-N has just appeared
    "evaluation": 1.0,
    "startup": 1.0,  # between the start of the process and the built model
    "opening": 1.5,  # between the built model and the first step: the checkpoint is read, W&B's run is opened
    "closing": 1.0,  # after the last batch
}
WITH_UPLOADS = {"upload": 2.0}  # a file of an artifact is on its way
# They need what a start-up does not have yet.
NOT_AT_THE_START = (
    *("read_only", "disk_full", "core_alone", "core_then_script", "script_then_core", "stop_rank", "clock"),
)


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """
    What is trained, and how it is tracked; `uploads` are artifacts of each checkpoint.

    `launch` is the launch config of several processes, without its ending. One that `extends` is first finished at
    FIRST_END; its learning rate is constant, so that a run that was never finished there has the same numbers. `data`
    is "samples", "packed" ones in rows, or a packed "stream".
    """

    who: str
    processes: int
    tracking: str
    uploads: bool = False
    launch: str = "ddp"
    extends: bool = False
    data: str = "samples"

    @property
    def label(self) -> str:
        launch = f"-{self.launch}" if self.launch != "ddp" else ""
        uploads = "-uploads" if self.uploads else ""
        extended = "-extended" if self.extends else ""
        data = f"-{self.data}" if self.data != "samples" else ""
        return f"{self.who}-{self.processes}{launch}-{self.tracking}{uploads}{extended}{data}"

    @property
    def ends(self) -> tuple[int, ...]:
        """The steps at which it is finished, one after the other."""
        return (FIRST_END, STEPS) if self.extends else (STEPS,)

    @property
    def arguments(self) -> dict[str, Any]:
        """Flags of ours, arguments of the Trainer."""
        return {
            "learning_rate": 2e-3,
            "per_device_train_batch_size": 8 // self.processes,
            "per_device_eval_batch_size": 8 // self.processes,
            "max_steps": STEPS,
            "logging_steps": 2,
            "eval_strategy": "steps",
            "eval_steps": 10,
            "save_strategy": "steps",
            "save_steps": SAVE_STEPS,
            "save_total_limit": 3,
            "metric_for_best_model": "loss",
            "greater_is_better": False,
            "seed": 42,
            "ddp_find_unused_parameters": False,
            "ddp_timeout": 30,
            "lr_scheduler_type": "constant" if self.extends else "linear",
            **({} if self.data == "samples" else PACKED),
        }


@dataclass(frozen=True, kw_only=True)
class Kill:
    """How and when an attempt is killed: in the first `moment` from `step` on, after `part` of it; `seed`: details."""

    kind: str
    moment: str
    step: int
    part: float
    seed: int


@dataclass(frozen=True, kw_only=True)
class Case:
    seed: int
    index: int
    configuration: Configuration
    on_small_disk: bool
    kills: tuple[Kill, ...]
    in_containers: bool = False  # each attempt in a namespace of process numbers of its own, under one host name
    is_renamed: bool = False  # it is given a name once, and not again

    @property
    def name(self) -> str:
        return f"{self.seed}-{self.index}-{self.configuration.label}"


def configurations(
    *, processes: int | None, tracking: str | None, trainer: bool, launch: str = "ddp", packing: bool = False
) -> list[Configuration]:
    """Those that the command line asks for; what it leaves open is shared out."""
    return [
        Configuration(
            who="trainer" if trainer else "ours",
            processes=number,
            tracking=each,
            uploads=uploads,
            launch=launch,
            extends=extends,
            data=data,
        )
        for extends in ((False,) if trainer else (False, True))
        for each in ([tracking] if tracking else ["none", "offline", "online"])
        for uploads in ((False, True) if each == "online" and not extends else (False,))
        for number in ([processes] if processes else [1, 2])
        for data in (("packed", "stream") if packing else ("samples",))
    ]


def draw_case(seed: int, index: int, among: list[Configuration]) -> Case:
    """The case of that number: the same for the same seed, whatever ran before it."""
    configuration = among[index % len(among)]
    # What the others do under the same seed is the same but for what they have not got.
    rng = random.Random(f"{seed}/{index}/{configuration.processes}/{configuration.tracking}/{configuration.uploads}")
    on_small_disk, in_containers, is_renamed = rng.random() < 0.3, rng.random() < 0.2, rng.random() < 0.4
    kinds = {**ANYWHERE}
    if configuration.processes > 1:
        kinds |= WITH_TWO_PROCESSES
    if on_small_disk:
        kinds |= ON_SMALL_DISK
    if configuration.tracking != "none":
        kinds |= WITH_TRACKING
    number = rng.randint(*KILLS_PER_CASE)
    # Later attempts die at later steps, so that each one gets there; the first steps are left to start-ups.
    steps = sorted(rng.randint(1, STEPS - SAVE_STEPS) for _ in range(number))
    return Case(
        seed=seed,
        index=index,
        configuration=configuration,
        on_small_disk=on_small_disk,
        in_containers=in_containers and configuration.who == "ours",
        is_renamed=is_renamed and configuration.who == "ours" and configuration.tracking != "none",
        kills=tuple(
            _draw_kill(rng, kinds, step, configuration, is_last=i == number - 1) for i, step in enumerate(steps)
        ),
    )


def _draw_kill(
    rng: random.Random, kinds: dict[str, float], step: int, configuration: Configuration, *, is_last: bool
) -> Kill:
    kind = _weighted(rng, kinds)
    moments = {**MOMENTS, **(WITH_UPLOADS if configuration.uploads else {})}
    if kind in NOT_AT_THE_START:
        moments = {name: weight for name, weight in moments.items() if name not in ("startup", "opening")}
    if not is_last:  # an attempt that gets there leaves nothing to the next ones
        del moments["closing"]
    return Kill(kind=kind, moment=_weighted(rng, moments), step=step, part=rng.random(), seed=rng.randrange(2**32))


def _weighted(rng: random.Random, weights: dict[str, float]) -> str:
    return rng.choices(list(weights), list(weights.values()))[0]
