"""
W&B shows the same of a training by harness as of one by transformers.Trainer with its WandbCallback.

The same trainings in real processes with the real client, against the test server and offline. All that W&B has of them
is equal, the clock's values aside, or in DIFFERENCES with the reason; the README has the same table.
"""

from __future__ import annotations

import copy
import datetime
import itertools
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb
from transformers import GPT2Config, TrainingArguments
from transformers.integrations.integration_utils import WandbLogModel

from harness.flags import GONE, OWNED_BY_LAUNCH_CONFIG, REFUSED, SECTIONS, parse
from harness.tracking import TrackingConfig
from harness.tracking.client import separate_randomness
from harness.tracking.recorded import run_config
from tests.support.forking import Forked, fork
from tests.support.inputs import save_gpt_tokenizer
from tests.support.launching import DDP, launcher
from tests.support.parity import AS_TRAINER, TRAINING, as_flags, without_ours
from tests.support.parity import CASES as SETTINGS
from tests.support.wandb import pair as wandb_pair
from tests.support.wandb import seen as wandb_seen
from tests.support.wandb.artifact_processes import environment
from tests.support.wandb.pair import Training
from tests.support.wandb.seen import Seen, Version
from tests.support.wandb_server import WandbServer

SECONDS = 200
KINDS, PARTS = ("samples", "tokens", "useful_tokens"), ("", "_per_device")
SPEED = {f"train/throughput/{kind}_per_second{part}" for kind in KINDS for part in PARTS} | {
    "train/throughput/data_wait_share"
}

BOTH: dict[str, Any] = {**TRAINING, **AS_TRAINER, "num_train_epochs": 2.0, "learning_rate": 1e-2, "logging_steps": 7}
# Histograms are due at step 100, whose row is that of step 120; the best evaluation is not the last.
LONG = {"num_train_epochs": 8.0, "logging_steps": 30}
SAVES = {"save_strategy": "steps", "save_steps": 15}
EVALUATES = {**SAVES, "eval_strategy": "steps", "eval_steps": 15}
LOG_MODEL, WATCH = ("false", "end", "checkpoint"), ("false", "gradients", "parameters", "all")


def covering() -> Iterator[Training]:
    """Each value of log_model, watch, whether there is a run name, whether the best is loaded, with each other one."""
    for (i, log_model), (j, watch) in itertools.product(enumerate(LOG_MODEL), enumerate(WATCH)):
        is_named, loads_best = (i + j) % 2 == 1, (i + j // 2) % 2 == 1
        name = "-".join([log_model, watch, "named" if is_named else "unnamed", "best" if loads_best else "last"])
        arguments = {**BOTH, **(EVALUATES if loads_best else SAVES), "load_best_model_at_end": loads_best}
        if watch != "false":
            steps = {"save_steps": 40, **({"eval_steps": 40} if loads_best else {})}
            arguments |= {**LONG, **steps}
        if is_named:
            arguments["run_name"] = f"run-{name}"
        yield Training(name=name, arguments=arguments, variables={"WANDB_LOG_MODEL": log_model, "WANDB_WATCH": watch})


COVERING = list(covering())
OPENED = {
    "project": "mine",
    "name": "my-name",
    "tags": ["x", "y"],
    "group": "my group",
    "config": {"own": 1, "learning_rate": 5.0},
}
ADOPTED = Training(
    name="adopted",
    arguments={**BOTH, **EVALUATES, "run_name": "not-mine"},
    variables={"WANDB_LOG_MODEL": "end"},
    opened=OPENED,
)
OTHERS = [
    Training(
        name="transformers-names",
        arguments={**BOTH, **EVALUATES, "run_name": "presently"},
        variables={"WANDB_LOG_MODEL": "checkpoint"},
        flags={"wandb_artifact_names": "transformers"},
    ),
    Training(
        name="variables",
        arguments={**BOTH, "save_strategy": "epoch", "eval_strategy": "epoch", "logging_steps": 0.1},
        variables={
            "WANDB_NAME": "from-the-environment",
            "WANDB_RUN_GROUP": "a group",
            "WANDB_TAGS": "one,two",
            "WANDB_NOTES": "some notes",
            "WANDB_JOB_TYPE": "a type",
            "WANDB_LOG_MODEL": "checkpoint",
        },
    ),
    Training(
        name="named-like-its-folder",
        arguments={**BOTH, **SAVES, "run_name": "OUTPUT_DIR"},
        variables={"WANDB_LOG_MODEL": "end"},
    ),
    Training(
        name="accumulation",
        arguments={**BOTH, **LONG, "num_train_epochs": 15.0, "gradient_accumulation_steps": 2, "save_strategy": "no"},
        variables={"WANDB_WATCH": "all"},
    ),
    Training(
        name="diverging",
        arguments={**BOTH, **EVALUATES, "learning_rate": 1e30, "logging_steps": 1},
        variables={"WANDB_LOG_MODEL": "checkpoint"},
    ),
    Training(
        name="adapter",
        arguments={**BOTH, **EVALUATES, "run_name": "adapted", "load_best_model_at_end": True},
        variables={"WANDB_LOG_MODEL": "checkpoint"},
        adapter={"peft_type": "LORA", "r": 4, "target_modules": ["c_attn"]},
    ),
]
BEST_OF_ALL = COVERING[-1]
GROUPS: dict[str, list[Training]] = {
    "online": [BEST_OF_ALL, ADOPTED],
    "online, the rest": [*COVERING[:-1], *OTHERS],
    "offline": [
        Training(
            name="offline-checkpoint",
            arguments={**BOTH, **EVALUATES, "run_name": "off", "load_best_model_at_end": True, "save_total_limit": 1},
            variables={"WANDB_LOG_MODEL": "checkpoint"},
        ),
        Training(
            name="offline-deleted",
            arguments={**BOTH, **SAVES, "save_total_limit": 1},
            variables={"WANDB_LOG_MODEL": "checkpoint"},
        ),
        Training(
            name="offline-end", arguments={**BOTH, **LONG}, variables={"WANDB_LOG_MODEL": "end", "WANDB_WATCH": "all"}
        ),
        Training(**{**ADOPTED.__dict__, "name": "offline-adopted"}),
    ],
    "ddp": [
        Training(
            name="two-processes",
            arguments={**BOTH, **EVALUATES, "per_device_train_batch_size": 4, "ddp_find_unused_parameters": False},
            variables={"WANDB_LOG_MODEL": "checkpoint"},
        )
    ],
}
PLAIN = ("online",)


@dataclass(frozen=True)
class Pair:
    """The same training seen twice; `nth` counts those of its process that are watched."""

    training: Training
    theirs: Seen
    ours: Seen
    nth: int

    @property
    def watch(self) -> str:
        return self.training.variables.get("WANDB_WATCH", "false")

    @property
    def evaluates(self) -> bool:
        return "eval_strategy" in self.training.arguments


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Pair]]:
    """Runs a group of trainings by both at the same time, the first time it is asked for."""
    done: dict[str, Future[dict[str, Pair]]] = {}

    def run_group(group: str) -> dict[str, Pair]:
        if group not in done:
            done[group] = Future()
            try:
                done[group].set_result(run_both(tmp_path_factory.mktemp("group"), group))
            except Exception as error:  # not once more for each of its tests
                done[group].set_exception(error)
        return done[group].result()

    return run_group


def end(process: Forked | subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def begin_repository(folder: Path) -> Path:
    """A user's project: a folder under git with the training script, which W&B records."""
    folder.mkdir()
    script = Path(shutil.copy(wandb_pair.__file__, folder))
    author = ("-c", "user.name=a", "-c", "user.email=a@b")
    for command in (["init", "--quiet"], ["add", script.name], [*author, "commit", "--quiet", "--message=x"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return script


def run_both(folder: Path, group: str) -> dict[str, Pair]:
    trainings = GROUPS[group]
    variables = {"PAIR_TOKENIZER": str(save_gpt_tokenizer(folder / "tokenizer")), "OMP_NUM_THREADS": "1"}
    with ExitStack() as stack:
        server = stack.enter_context(WandbServer(folder / "server")) if group != "offline" else None
        variables |= {"WANDB_MODE": "offline"} if server is None else server.environment()
        started = {}
        for who in ("trainer", "ours"):
            script = begin_repository(folder / who)
            command = launcher(DDP)[1:] if group == "ddp" else []
            out, err = (stack.enter_context((folder / who / name).open("w")) for name in ("out", "err"))
            started[who] = fork(
                [*command, str(script), who, str(folder / who), wandb_pair.as_json(trainings)],
                env=environment(folder / who, WANDB_SILENT="true", **variables),
                cwd=folder / who,
                out=out,
                err=err,
            )
            stack.callback(end, started[who])
        for who, process in started.items():
            assert process.wait(SECONDS) == 0, (folder / who / "err").read_text()[-3000:]
        if server is not None:
            assert server.unknown() == []
            assert len(server.runs()) == 2 * len(trainings), "one run a training, whatever the number of processes"

        def seen(training: Training, who: str) -> Seen:
            output_dir = folder / who / training.name
            project = f"{training.name if training.opened is None else training.opened['project']}-{who}"
            if server is None:
                return wandb_seen.offline(output_dir, project)
            return wandb_seen.online(server, output_dir, project)

        watched = [training.name for training in trainings if training.variables.get("WANDB_WATCH", "false") != "false"]
        return {
            each.name: Pair(
                each,
                seen(each, "trainer"),
                seen(each, "ours"),
                nth=watched.index(each.name) if each.name in watched else 0,
            )
            for each in trainings
        }


@pytest.fixture(
    params=[
        pytest.param((group, training.name), id=training.name, marks=[] if group in PLAIN else [pytest.mark.slow])
        for group, trainings in GROUPS.items()
        for training in trainings
    ]
)
def pair(request: pytest.FixtureRequest, ran: Callable[[str], dict[str, Pair]]) -> Pair:
    group, name = request.param
    return copy.deepcopy(ran(group)[name])


def test_each_pair_of_values_is_among_the_cases() -> None:
    values = [
        (
            training.variables["WANDB_LOG_MODEL"],
            training.variables["WANDB_WATCH"],
            "run_name" in training.arguments,
            training.arguments["load_best_model_at_end"],
        )
        for training in COVERING
    ]
    for i, j in itertools.combinations(range(4), 2):
        every = itertools.product({value[i] for value in values}, {value[j] for value in values})
        assert {(value[i], value[j]) for value in values} == set(every)


# What differs, taken out of both after a look at it.


def without_extras(values: dict[str, Any], *, evaluated: bool, diverged: bool) -> dict[str, Any]:
    values = dict(values)
    if evaluated:
        loss, count = values.pop("eval/loss_per_token"), values.pop("eval/num_tokens")
        assert diverged or 0 < loss < 10
        assert count > 100
    if diverged:
        assert values.pop("train/num_nonfinite_losses", 1) >= 1
    measured = {name for name in values if name.startswith(("train/throughput/", "train/memory/"))}
    assert measured == (SPEED if "train/loss" in values else set()), "with each report, and in nothing else"
    return {name: value for name, value in values.items() if name not in measured}


def level_extras(pair: Pair) -> None:
    diverged = pair.training.name == "diverging"
    for i, row in enumerate(pair.ours.rows):
        pair.ours.rows[i] = without_extras(row, evaluated="eval/loss" in row, diverged=diverged)
    pair.ours.summary = without_extras(pair.ours.summary, evaluated=pair.evaluates, diverged=diverged)


def level_histograms(pair: Pair) -> None:
    """Of evaluations and of accumulated gradients another call is the hundredth."""
    for values in (*pair.theirs.rows, pair.theirs.summary):
        for key in [key for key in values if key.startswith(("gradients/", "parameters/"))]:
            kind, _, name = key.partition("/")
            prefix = f"graph_{pair.nth}" if pair.nth else ""
            assert name.startswith(prefix)
            values[f"{kind}/{name.removeprefix(prefix)}"] = values.pop(key)
    accumulates = "gradient_accumulation_steps" in pair.training.arguments
    kinds = ["gradients/"] if accumulates else []
    kinds += ["parameters/"] if accumulates or (pair.evaluates and pair.watch in ("parameters", "all")) else []
    for kind in kinds:
        where: dict[str, list[int]] = {}
        for who, seen in (("trainer", pair.theirs), ("ours", pair.ours)):
            having = [row for row in seen.rows if any(key.startswith(kind) for key in row)]
            where[who] = [row["train/global_step"] for row in having]
            for values in (*having, seen.summary):
                for key in [key for key in values if key.startswith(kind)]:
                    del values[key]
        assert where["ours"] == [120], kind
        assert where["trainer"] == ([60, 120] if accumulates else [120]), kind


def level_graph(pair: Pair) -> None:
    assert pair.ours.summary.pop("graph_0")["_type"] == "graph-file"


def level_adapter(pair: Pair) -> None:
    """Peft's card is in each version; in that of the final model ours is the run's card, completed by peft."""
    for seen in (pair.theirs, pair.ours):
        for version in itertools.chain(*seen.collections.values()):
            if "adapter_config.json" in version.files and "trainer_state.json" not in version.files:
                assert version.files.pop("README.md")


def level_artifacts(pair: Pair) -> None:
    level_adapter(pair)
    for versions in pair.ours.collections.values():
        for version in versions:
            level_version(version, pair)
    for versions in pair.theirs.collections.values():
        for version in versions:
            if "initial_model" not in version.metadata:
                assert version.files.pop("training_args.bin") == "OWN"
    level_best(pair)
    if "wandb_artifact_names" not in pair.training.flags:
        split_collections(pair.theirs)
    if pair.training.name == "offline-deleted":
        assert len(pair.theirs.collections["checkpoint-RUN"]) == 2
        del pair.theirs.collections["checkpoint-RUN"][0]
    if pair.training.name == "two-processes":
        for seen in (pair.ours, pair.theirs):  # it is written while the Trainer takes the folder
            found = [version.files.pop("rng_state_1.pth", None) for version in seen.collections["checkpoint-RUN"]]
            assert seen is pair.theirs or all(found)


def level_version(version: Version, pair: Pair) -> None:
    assert version.metadata.pop("run_id") == pair.ours.run_id
    is_initial = "initial_model" in version.metadata
    assert is_initial or version.metadata.pop("saved_at") > 1.7e9
    if "adapter_config.json" in version.files:
        assert version.files.pop("model_config.json")
    if not is_initial and "model_architecture.txt" not in version.files:
        assert version.files.pop("harness_state.json") == "OWN"
        assert version.files.pop("metrics.jsonl") == "OWN"
        for name in [name for name in version.files if name.startswith("rng_state")]:
            assert version.files[name].pop("harness")
    diverged, evaluated = pair.training.name == "diverging", "eval/loss_per_token" in version.metadata
    version.metadata = without_extras(version.metadata, evaluated=evaluated, diverged=diverged)


def level_best(pair: Pair) -> None:
    """The last checkpoint's state says which was the best one."""
    states = {}
    for versions in pair.theirs.collections.values():
        states |= {
            state["global_step"]: state["best_global_step"]
            for version in versions
            if (state := version.files.get("trainer_state.json"))
        }
    best = states[max(states)] if states else None
    of_ours = [version for versions in pair.ours.collections.values() for version in versions]
    marked = [version for version in of_ours if "best" in version.aliases]
    assert len(marked) == (best is not None)
    for version in marked:
        assert f"checkpoint_global_step_{best}" in version.aliases
        version.aliases.remove("best")


def split_collections(seen: Seen) -> None:
    """The checkpoints into a collection of their own, in which the newest is `latest`."""
    for name, versions in list(seen.collections.items()):
        checkpoints = [version for version in versions if "trainer_state.json" in version.files]
        if checkpoints:
            assert not any("latest" in version.aliases for version in checkpoints)
            checkpoints[-1].aliases.add("latest")
            seen.collections[name.replace("model-", "checkpoint-", 1)] = checkpoints
            seen.collections[name] = [version for version in versions if version not in checkpoints]


# The comparisons.


def test_name_tags_and_end_are_the_trainers(pair: Pair) -> None:
    assert pair.ours.about == pair.theirs.about
    assert pair.ours.about["exit_code"] == 0
    name = OPENED["name"] if pair.training.opened else pair.training.arguments.get("run_name")
    name = f"FOLDER/{pair.training.name}" if name == "OUTPUT_DIR" else name
    assert pair.ours.about["name"] == (name or pair.training.variables.get("WANDB_NAME", pair.ours.about["name"]))


def test_axes_are_the_trainers(pair: Pair) -> None:
    assert pair.ours.axes == pair.theirs.axes
    assert "train/global_step" in str(pair.ours.axes)


def check_config(theirs: dict[str, Any], ours: dict[str, Any], *, evaluates: bool) -> None:
    missing = {*theirs} - {*ours}
    assert missing == {field.name for field in fields(TrainingArguments)} & {*OWNED_BY_LAUNCH_CONFIG, *REFUSED, *GONE}
    flags = {field.name for section in SECTIONS for field in fields(section)}
    own = flags - {field.name for field in fields(TrainingArguments)} - {*GPT2Config().to_dict()}
    assert {*ours} - {*theirs} - {"harness"} == own - {*theirs}
    assert ("peft_config" in theirs) == isinstance(ours["peft_config"], dict)
    assert (theirs["do_eval"], ours["do_eval"]) == (evaluates, False)
    common = {*theirs} - missing - {"do_eval"}
    assert {name: ours[name] for name in common} == {name: theirs[name] for name in common}


def test_config_is_the_trainers(pair: Pair) -> None:
    if pair.training.opened is not None:
        assert pair.ours.config.pop("own") == pair.theirs.config.pop("own") == 1
    assert {*pair.ours.config["harness"]} == {"launch", "software"}
    if pair.training.name == "two-processes":
        assert pair.ours.config["harness"]["launch"]["WORLD_SIZE"] == "2"
    check_config(pair.theirs.config, pair.ours.config, evaluates=pair.evaluates)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("name", [*SETTINGS, "aliases of checkpointing", "debug"])
def test_config_of_other_settings_is_the_trainers(name: str) -> None:
    own = {
        "aliases of checkpointing": {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"offload": True},
        },
        "debug": {"debug": "underflow_overflow"},
    }
    settings = {**BOTH, **{**SETTINGS, **own}[name]}
    config = GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=16, n_positions=8, bos_token_id=0, eos_token_id=0)
    model = wandb_pair.parity_task.GPT2LMHeadModel(config)
    options = {"use_cpu": True, "report_to": "wandb", "disable_tqdm": True, **without_ours(settings)}
    arguments = TrainingArguments(output_dir="out", **options)
    flags = as_flags({"task": wandb_pair.TASK, "output_dir": "out", "report_to": "wandb", **settings})
    ours = run_config(model, parse([*flags, "--use_cpu", "--disable_tqdm"]).flat())
    theirs = run_config(model, arguments.to_dict())  # in JSON's types
    assert theirs == {**theirs, **arguments.to_dict(), "id2label": theirs["id2label"]}
    check_config(theirs, ours, evaluates=settings.get("eval_strategy", "no") != "no")


def test_rows_are_the_trainers(pair: Pair) -> None:
    kinds = {"gradients": ["gradients"], "parameters": ["parameters"], "all": ["gradients", "parameters"]}
    for kind in kinds.get(pair.watch, []):
        watched = [row for row in pair.ours.rows if any(key.startswith(f"{kind}/transformer.h.1.") for key in row)]
        assert [row["train/global_step"] for row in watched] == [120]
    level_extras(pair)
    level_histograms(pair)
    level_graph(pair)
    for i, (theirs, ours) in enumerate(zip(pair.theirs.rows, pair.ours.rows, strict=False)):
        assert ours == theirs, f"row {i}"
    assert len(pair.ours.rows) == len(pair.theirs.rows)
    assert len(pair.ours.rows) > 4
    assert pair.ours.summary == pair.theirs.summary


def test_artifacts_are_the_trainers(pair: Pair) -> None:
    level_artifacts(pair)
    assert {*pair.ours.collections} == {*pair.theirs.collections}
    for name, theirs in pair.theirs.collections.items():
        ours = pair.ours.collections[name]
        assert [version.aliases for version in ours] == [version.aliases for version in theirs], name
        for a, b in zip(theirs, ours, strict=True):
            assert vars(b) == vars(a), name
    log_model = pair.training.variables.get("WANDB_LOG_MODEL", "false")
    assert len(pair.ours.collections) == {"false": 0, "end": 1, "checkpoint": 2}[log_model] - bool(pair.training.flags)


def test_files_are_the_trainers(pair: Pair) -> None:
    if pair.ours.files:
        pair.ours.files.remove("media/graph/graph_0_summary")
    if pair.training.opened is None and pair.ours.files:
        pair.ours.files.remove("code/pair.py")
    assert pair.ours.files == pair.theirs.files


def test_the_model_card_is_the_trainers_and_leads_to_the_run(pair: Pair) -> None:
    (_, theirs), (head, ours) = (card.split("\n# ", 1) for card in (pair.theirs.card, pair.ours.card))
    assert head.count("](http") == ("recorded" in pair.ours.about)
    assert pair.ours.run_id in head or "recorded" not in pair.ours.about
    theirs = theirs.replace("OptimizerNames.ADAMW_TORCH_FUSED", "adamw_torch_fused")
    theirs = theirs.replace("is a fine-tuned version of [](https://huggingface.co/)", "was trained from scratch")
    theirs = theirs.replace("multi-GPU", "multi-CPU")  # here it was
    assert ours.splitlines()[1:] == theirs.splitlines()[1:]


def test_what_wandb_does_by_the_clock_does_not_move_the_trainings_random_state(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from opentelemetry.exporter.otlp.common import http
    from wandb.sdk.lib import retry

    for module in (http, retry):
        monkeypatch.setattr(module, "random", random)  # and as it was, afterwards

    def is_moved() -> list[bool]:
        found = []
        waits = retry.ExponentialBackoff(datetime.timedelta(0), datetime.timedelta(0))
        for draw in (
            lambda: http._OTLPHTTPClient._compute_backoff(SimpleNamespace(_jitter=0.2), 0),
            lambda: waits.next_sleep_or_reraise(Exception()),
        ):
            before = random.getstate()
            draw()
            found.append(random.getstate() != before)
        return found

    assert is_moved() == [True, True], "no longer: the remedy can go"
    separate_randomness()
    assert is_moved() == [False, False]


# What stops or does nothing under the Trainer.


def test_a_name_that_no_artifact_may_have_ends_the_trainers_training() -> None:
    # Ours: test_artifacts.py
    with pytest.raises(ValueError, match="Artifact name may only contain"):
        wandb.Artifact(name="model-a run", type="model")


@pytest.mark.parametrize(("value", "meant"), [("CHECKPOINT", "checkpoint"), ('"end"', "end")])
def test_a_value_that_turns_the_trainers_off_is_understood(value: str, meant: str) -> None:
    assert WandbLogModel(value) is WandbLogModel.FALSE
    assert TrackingConfig(report_to=["wandb"], wandb_log_model=value).wandb_log_model == meant
