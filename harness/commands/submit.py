"""
`harness submit [OPTIONS] --config recipe ...`: check a training on the login node and submit it to SLURM.

Flags that it does not know are passed to the training. It refuses what would fail after hours in the queue, prints the
sbatch line, runs it, and says how to follow the job. Exit codes: 0 submitted (or would be), 1 sbatch failed, 2 refused.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from harness.commands import Parser
from harness.errors import ConfigError, HarnessError
from harness.masking import masked, masked_words

if TYPE_CHECKING:
    from harness.flags import Config

ROOT = Path(__file__).parents[2]
SCRIPTS = "slurm"
# sbatch's forms: MIN, MIN:SEC, H:MIN:SEC, D-H, D-H:MIN, D-H:MIN:SEC.
TIME = re.compile(r"\d+|\d+:\d\d|\d+:\d\d:\d\d|\d+-\d+(:\d\d){0,2}")
ARRAY = re.compile(r"\d+(-\d+(:\d+)?)?(,\d+(-\d+(:\d+)?)?)*(%\d+)?")
OFFLINE = {"WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True, kw_only=True)
class Request:
    """The resources to request from SLURM, and the flags of the training."""

    nodes: int = 1
    gpus_per_node: int | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    array: str | None = None
    launch_config: Path | None = None
    sbatch: list[str] = field(default_factory=list)
    no_internet: bool = False
    arguments: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.nodes < 1:
            raise ConfigError(f"--nodes={self.nodes}: use 1 or more.")
        if self.gpus_per_node is not None and self.gpus_per_node < 0:
            raise ConfigError(f"--gpus-per-node={self.gpus_per_node}: use 0 (train on the CPU) or more.")
        if self.time is not None and not TIME.fullmatch(self.time):
            raise ConfigError(
                f"--time={self.time}: write it as 12:00:00 (hours), 2-12:00:00 (with days) or 90 (minutes)."
            )
        if self.array is not None and not ARRAY.fullmatch(self.array):
            raise ConfigError(f"--array={self.array}: write it as 0-7, 0,2,5 or 0-7%2 (two at a time).")
        if self.array is not None and self.nodes > 1:
            raise ConfigError(f"--array with --nodes={self.nodes}: each task of a sweep is on one node; leave one out.")

    @property
    def num_processes(self) -> int:
        """The number of processes of the whole job, as slurm/cluster.sh starts them: one a GPU, or one a node."""
        return self.nodes * max(self.num_gpus, 1)

    @property
    def num_gpus(self) -> int:
        """The number of GPUs a node: as requested, else as in the script."""
        if self.gpus_per_node is not None:
            return self.gpus_per_node
        found = re.search(r"^#SBATCH --gpus-per-node=(\d+)", self.script.read_text(encoding="utf-8"), re.MULTILINE)
        return int(found[1]) if found else 0

    @property
    def script(self) -> Path:
        """The batch script to submit."""
        name = "array" if self.array is not None else "multi_node" if self.nodes > 1 else "single_node"
        return ROOT / SCRIPTS / f"{name}.sbatch"

    @property
    def launch(self) -> Path:
        """The launch config: as requested, else the script's default."""
        if self.launch_config is not None:
            return self.launch_config.expanduser().absolute()
        return ROOT / "launch_configs" / ("ddp.yaml" if self.num_processes > 1 else "single.yaml")

    def command(self) -> list[str]:
        """The sbatch command line."""
        options = [f"--nodes={self.nodes}"]
        for name in ("gpus_per_node", "time", "partition", "account", "array"):
            if (value := getattr(self, name)) is not None:
                options.append(f"--{name.replace('_', '-')}={value}")
        return ["sbatch", *options, *self.sbatch, str(_from_here(self.script)), *self.arguments]

    def variables(self) -> dict[str, str]:
        """The variables that the job gets in addition to the environment of this shell."""
        found = {} if Path.cwd() == ROOT else {"HARNESS_DIR": str(ROOT)}
        if self.launch_config is not None:
            found["LAUNCH_CONFIG"] = str(self.launch)
        return found | (OFFLINE if self.no_internet else {})


def run(argv: Sequence[str]) -> int:
    """Submit what a command line asks for; returns the exit code. Raises HarnessError."""
    given, arguments = parser().parse_known_args(argv)
    values = {name: value for name, value in vars(given).items() if name != "dry_run"}
    return submit(Request(**values, arguments=arguments), is_dry=given.dry_run)


def submit(request: Request, *, is_dry: bool) -> int:
    """Check, print and submit a request; returns the exit code. Raises ConfigError."""
    environment = {**os.environ, **request.variables()}
    config, notes = check(request, environment)
    for note in notes:
        print(f"checked: {masked(note)}")
    line = [f"{name}={shlex.quote(value)}" for name, value in request.variables().items()]
    print(" ".join([*line, shlex.join(masked_words(request.command()))]), flush=True)
    if is_dry:
        print("Not submitted (--dry-run).")
        return 0
    if shutil.which("sbatch") is None:
        raise ConfigError("sbatch is not here: run this on the cluster's login node, or give --dry-run.")
    done = subprocess.run(  # noqa: S603 - what was printed
        [*request.command()[:1], "--parsable", *request.command()[1:]],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise HarnessError(f"sbatch refuses the job: {done.stderr.strip() or f'exit code {done.returncode}'}")
    _tell(request, config, done.stdout.strip().split(";")[0], environment)
    return 0


def check(request: Request, environment: Mapping[str, str]) -> tuple[Config, list[str]]:
    """Return the training's configuration and the results of the checks. Raises ConfigError for what would fail."""
    if not request.script.is_file():
        raise ConfigError(f"{request.script}: no such file. harness submit needs a checkout: pip install -e . in one.")
    from harness.commands.checks import check_cache, check_disk, check_launch_config, check_tracking
    from harness.execute import check_names
    from harness.flags import read

    config = read(request.arguments).checked()
    check_names(config)
    if not config.checkpoint.resumes:
        config.check_weights()
    is_offline = environment.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")
    notes = [
        check_launch_config(request.launch, num_processes=request.num_processes, uses_gpus=request.num_gpus > 0),
        check_cache(config.task, is_offline=is_offline),
        check_disk(config, _output_dir(request, "JOB")),
        check_tracking(config.tracking, has_internet=not request.no_internet, mode=environment.get("WANDB_MODE")),
    ]
    return config, notes


def _output_dir(request: Request, job: str) -> Path:
    # slurm/cluster.sh reads it from the command line only, not from a recipe.
    found = ""
    for before, argument in zip(["", *request.arguments], request.arguments, strict=False):
        if before == "--output_dir":
            found = argument
        elif argument.startswith("--output_dir="):
            found = argument.partition("=")[2]
    return Path(found).expanduser() if found else Path("runs") / f"job-{job}"


def _tell(request: Request, config: Config, job: str, environment: Mapping[str, str]) -> None:
    log = f"slurm-{job}_0.out" if request.array is not None else f"slurm-{job}.out"
    folder = _output_dir(request, f"{job}_0" if request.array is not None else job)
    print(f"Submitted job {job}.")
    print(f"  in the queue:  squeue --me --jobs={job}")
    print(f"  its output:    tail -F {log}")
    print(f"  its folder:    {folder}{' (task 0)' if request.array is not None else ''}")
    if config.tracking.uses_wandb and environment.get("WANDB_MODE", config.tracking.wandb_mode) != "online":
        parent = shlex.quote(str(folder.parent))
        print(f"  offline runs to W&B, from here once it has begun:  harness sync {parent} --until-finished")
    print(f"  end it:        scancel {job}", flush=True)


def _from_here(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def parser() -> Parser:
    """Return the command's parser, without the training's flags."""
    own = Parser(
        "submit",
        usage="%(prog)s [OPTIONS] FLAGS OF harness train, e.g. --config recipe --output_dir runs/first",
        description="Check a training, put it into SLURM's queue by the scripts in slurm/, say how to follow it.",
    )
    add = own.add_argument
    add("--nodes", type=int, default=1, help="Nodes of the job. Default: 1.")
    add("--gpus-per-node", type=int, help="GPUs of each, a process on each; 0: CPU. Default: the script's.")
    add("--time", help="Time limit of an attempt, 12:00:00; the job goes on in the next. Default: the script's.")
    add("--partition", help="Partition. Default: SBATCH_PARTITION or the cluster's.")
    add("--account", help="Account. Default: SBATCH_ACCOUNT or the cluster's.")
    add("--array", help="A sweep: 0-7, each task on one node; see slurm/README.md.")
    add(
        "--launch-config", type=Path, help="File in launch_configs/. Default: ddp.yaml, or single.yaml for one process."
    )
    add("--sbatch", action="append", default=[], metavar="OPTION", help="Further option: --sbatch=--qos=high. Repeats.")
    add(
        "--no-internet", action="store_true", help="The nodes have none: W&B and Hub offline, all looked for in caches."
    )
    add("--dry-run", action="store_true", help="Check and print, don't submit.")
    return own
