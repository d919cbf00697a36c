"""Where W&B has something else of a training by harness than of one by the Trainer, each row with its reason."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Difference:
    """A row of the README's table: where ours is not the Trainer's, and why that is better."""

    what: str
    trainer: str
    ours: str
    why: str

    def as_markdown(self) -> str:
        return f"| {self.what} | {self.trainer} | {self.ours} | {self.why} |"


DIFFERENCES = {
    "arguments": Difference(
        "config: arguments that are refused or belong to the launch config",
        "there",
        "not there; `harness` has the launch",
        "no column says what had no effect",
    ),
    "flags": Difference(
        "config: flags that `TrainingArguments` lacks, `harness`",
        "not there",
        "there",
        "data, model, tracking and versions of a run can be told",
    ),
    "do_eval": Difference(
        "config: `do_eval` with `--eval_strategy`",
        "always true",
        "as given",
        "it asks for one more evaluation at the end",
    ),
    "extras": Difference(
        "rows, summary, metadata: `eval/loss_per_token`, `eval/num_tokens`, `train/num_nonfinite_losses`, "
        "`train/num_skipped_steps`",
        "not there",
        "there, the third where there were any, the last with fp16",
        "a loss that no batch size changes; a filtered NaN and a skipped step are seen",
    ),
    "speed": Difference(
        "rows, summary, metadata: `train/throughput/...`, `train/memory/peak_gib`",
        "not there",
        "with each report, the latter on a GPU",
        "the speed of now, without evaluations and saves; `train_samples_per_second` is one number at the end",
    ),
    "counted": Difference(
        "histograms are due",
        "every so many forward calls (evaluation's too) and backward calls",
        "every so many optimizer steps",
        "a step has them; of gradients the accumulated and reduced ones",
    ),
    "second": Difference(
        "histograms of a second training in one process",
        "called `graph_1...`",
        "called as in the first",
        "their charts go on",
    ),
    "card": Difference(
        "the badge in the model card",
        "with `WANDB_LOG_MODEL`",
        "in every online run's",
        "a model leads to its run, uploaded or not",
    ),
    "graph": Difference(
        "the model's layers, the topology",
        "not there",
        "`graph_0` in the summary, whatever `WANDB_WATCH` is",
        "the W&B guide promises it; sizes of outputs with `WANDB_WATCH` alone",
    ),
    "code": Difference(
        "the script among the run's files",
        "with `WANDB_SAVE_CODE=true`",
        "unless `WANDB_SAVE_CODE=false`",
        "what ran can be read, not only its commit",
    ),
    "collections": Difference(
        "name of the checkpoints' artifact",
        "`model-NAME`",
        "`checkpoint-NAME`; `--wandb_artifact_names transformers`: `model-NAME`",
        "`latest` of each is what its name says: the guide's resume works",
    ),
    "best": Difference(
        "alias `best`",
        "not there",
        "on the best checkpoint",
        "it is found without its step",
    ),
    "files": Difference(
        "files of a model's or a checkpoint's artifact",
        "`training_args.bin`",
        "`harness_state.json` and `metrics.jsonl` in a checkpoint",
        "no pickle to trust; digests of every file, an exact resume",
    ),
    "adapter": Difference(
        "files of an adapter's artifact",
        "`README.md` is peft's",
        "the final model's is the run's card; `model_config.json`",
        "scores and run stand in it; the labels have names",
    ),
    "metadata": Difference(
        "an artifact's metadata and description",
        "the summary's numbers; none",
        "`run_id` and `saved_at` too; what it is",
        "a checkpoint knows its run and its age, whatever is uploaded later",
    ),
    "ranks": Difference(
        "files of a checkpoint of several processes",
        "`rng_state_1.pth` may be missing: it is being written",
        "all",
        "a training can go on from it",
    ),
    "random": Difference(
        "Python's random state, saved in checkpoints",
        "wandb's reports and retries move it, by the clock",
        "they have their own",
        "collators and a resume to the bit don't depend on the network",
    ),
    "offline": Difference(
        "offline, a checkpoint that was deleted since",
        "copied whole, uploaded",
        "not uploaded, unless it is the best or the latest",
        "the disk holds nothing twice",
    ),
    "names": Difference(
        "`run_name` with a space, `/`, `:` or a letter like `ü`, and an artifact",
        "the training dies",
        "the artifact is called `a-run`, the run `a run`",
        "a name is no reason to lose a training",
    ),
    "values": Difference(
        "`WANDB_LOG_MODEL`, `WANDB_WATCH` in capitals or quotes; an unknown value",
        "off, with a warning or without",
        "understood; refused",
        "a day later there is a model, or there was an error at once",
    ),
}
