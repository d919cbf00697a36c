"""The flags of a run's folder, what it keeps, and what it goes on from."""

from __future__ import annotations

from dataclasses import dataclass

from harness.agent import sweep_run
from harness.config import arg, section
from harness.errors import ConfigError
from harness.slurm import SlurmJob, slurm_job


@section("checkpoints", on_resume="unrelated")
@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Where a run is kept, and what it keeps."""

    output_dir: str | None = arg(
        help="Folder of the run; default: a fresh one under runs/, in a SLURM job runs/job-ID, under a W&B sweep agent "
        "runs/sweep-ID/RUN.",
        common=True,
    )
    save_total_limit: int | None = arg(
        help="Keep so many checkpoints: the newest, and the best one.", on_resume="free", common=True
    )
    save_only_model: bool = arg(False, "Save the weights alone: such a checkpoint can't be resumed.", on_resume="free")
    async_save: bool = arg(True, "Write checkpoints in the background, from copies in host memory.")
    resume_from_checkpoint: str | None = arg(
        help="A checkpoint's folder, or wandb:ENTITY/PROJECT/NAME:ALIAS (wandb: alone: the run's newest); true: the "
        "newest in --output_dir; auto: the newest, or a fresh start; false: no resume. Default: false, and auto for a "
        "requeued SLURM job and under a W&B sweep agent.",
        bare="true",
        common=True,
    )

    allow_changed_arguments: bool = arg(False, "Resume even if arguments that decide the numbers have changed.")
    change_on_resume: list[str] | None = arg(
        help="Names of flags that may have another value than the checkpoint's, which then holds from there on: "
        "learning_rate, weight_decay ...; a wrong name lists all."
    )

    def __post_init__(self) -> None:
        if self.save_total_limit is not None and self.save_total_limit < 1:
            raise ConfigError(
                f"--save_total_limit={self.save_total_limit} would delete the checkpoint just written; "
                "use 1 or more, or leave it out to keep all."
            )
        resume = self.resume_from_checkpoint
        if resume is not None and resume.lower() in ("true", "auto", "false"):
            object.__setattr__(self, "resume_from_checkpoint", resume.lower())
        if self.change_on_resume and not self.resumes:
            raise ConfigError(
                f"--change_on_resume {' '.join(self.change_on_resume)} does nothing without --resume_from_checkpoint; "
                "give both."
            )
        has_folder = sweep_run() is not None or _has_a_folder(slurm_job())
        needs_folder = self.resume_from_checkpoint in ("true", "auto") and not has_folder
        if needs_folder and self.output_dir is None:
            raise ConfigError(
                f"--resume_from_checkpoint={resume} looks in --output_dir, which is not given; "
                "give it, or a checkpoint's folder."
            )

    @property
    def resumes(self) -> bool:
        """Whether there is something to go on from, or may be."""
        return self.resume_from_checkpoint not in (None, "false")


def _has_a_folder(job: SlurmJob | None) -> bool:
    """Whether the job alone says where its run is kept: not where somebody types one command after the other."""
    return job is not None and job.is_batch
