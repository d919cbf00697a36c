"""A `wandb:` path: to go on from on an empty machine, to start from; nothing that comes from there is trusted."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.checkpoint.layout import why_invalid
from harness.checkpoint.manifest import OWN_DIGEST, digest_of_manifest
from harness.errors import ConfigError
from harness.tracking.artifacts.download import check_manifest
from tests.faults.deaths import small_disk
from tests.support.faulty_training import SCRIPT, Training, committed, environment
from tests.support.forking import fork
from tests.support.inputs import save_gpt_tokenizer, text_flags, write_text
from tests.support.launching import Ended, finish
from tests.support.wandb.seen import _untimed
from tests.support.wandb_server import ArtifactRecord, RunRecord, WandbServer

pytestmark = pytest.mark.slow

ARGUMENTS: dict[str, Any] = {
    "wandb_run_id": None,
    "eval_strategy": "steps",
    "eval_steps": 10,
    "metric_for_best_model": "loss",
    "greater_is_better": "true",  # the first one is the best, and not the one that is gone on from
    "load_best_model_at_end": "true",
}
PACE = 0.1


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WandbServer]:
    with WandbServer(tmp_path_factory.mktemp("server")) as running:
        yield running


def begun(folder: Path, server: WandbServer, **more: Any) -> Training:
    times = folder.parent / "times"  # the same in each attempt: it is an argument of the task
    times.unlink(missing_ok=True)
    training = Training(folder, server, pace=PACE, task={"times": str(times)}, **{**ARGUMENTS, **more})
    training.times = times
    return training


def run_of(training: Training, server: WandbServer) -> RunRecord:
    found = json.loads((training.output_dir / "wandb_run.json").read_text(encoding="utf-8"))
    return server.run(found["run_id"])


@pytest.fixture(scope="module")
def whole(server: WandbServer, tmp_path_factory: pytest.TempPathFactory) -> Training:
    """The training that nothing happened to."""
    return begun(tmp_path_factory.mktemp("whole") / "run", server).ended()


@pytest.fixture(scope="module")
def model(server: WandbServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run `text`, whose model and checkpoints are in W&B."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer, text = save_gpt_tokenizer(folder / "tokenizer"), write_text(folder / "text.txt")
    flags = [*text_flags(tokenizer, text), "--wandb_run_id=text", "--wandb_log_model=checkpoint", "--save_steps=2"]
    assert harness(folder, server, *flags, "--max_steps=4", "--output_dir=out").code == 0
    return folder


def harness(folder: Path, server: WandbServer | None, *flags: str, **variables: str) -> Ended:
    """The command in a process of its own, in the folder."""
    folder.mkdir(exist_ok=True)
    variables = environment(folder, server, **{"WANDB_SILENT": "true", **variables})
    return finish([sys.executable, SCRIPT, *flags, "--use_cpu"], folder, variables)


@pytest.mark.parametrize("form", ["path", "bare"])
def test_an_empty_machine_ends_with_the_bits_of_the_uninterrupted_run(
    form: str, whole: Training, server: WandbServer, tmp_path: Path
) -> None:
    gone = begun(tmp_path / "gone", server)
    gone.reach(14)
    if form == "path":  # a preemption
        gone.process.terminate()
        gone.ended(85)
    else:  # a death: rows of before the checkpoint have not reached W&B
        server.fault("status", "file_stream", code=500)
        while not any(each.logged_by == run_of(gone, server).id and is_of_step(each, 20) for each in committed(server)):
            assert gone.process.poll() is None
            time.sleep(0.02)
        os.killpg(gone.process.pid, signal.SIGKILL)
        gone.process.wait()
        server.clear_faults()
    before = run_of(gone, server)
    shutil.rmtree(gone.output_dir)
    path = f"wandb:{before.entity}/{before.project}/checkpoint-{before.id}:latest"
    given = {"path": {"resume_from_checkpoint": path}, "bare": {"resume_from_checkpoint": "wandb:"}}[form]
    training = begun(tmp_path / "run", server, **given, wandb_run_id=before.id if form == "bare" else None).ended()
    step = int(training.out.partition(", step ")[2].split()[0])
    assert 12 <= step < 20 if form == "path" else step == 20
    assert form == "path" or "rows that W&B lacked are sent again" in training.err
    run, expected = run_of(training, server), run_of(whole, server)
    assert run.id == before.id
    assert [_untimed(row) for row in run.rows] == [_untimed(row) for row in expected.rows]
    assert _untimed(run.summary) == _untimed(expected.summary)
    for name in ("model.safetensors", "checkpoint-30/model.safetensors"):
        assert (training.output_dir / name).read_bytes() == (whole.output_dir / name).read_bytes(), name
    assert why_invalid(training.output_dir / "checkpoint-10") is None, "the best one came along"
    (used,) = [found for found in server.artifacts() if run.id in found.used_by]
    assert is_of_step(used, step)
    journal = (training.output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["_row"] for line in journal] == list(range(len(expected.rows)))
    assert not list(training.output_dir.glob("*.partial"))


def is_of_step(artifact: ArtifactRecord, step: int) -> bool:
    return f"checkpoint_global_step_{step}" in artifact.aliases


def downloads(server: WandbServer) -> list[str]:
    return [str(each["label"]) for each in server.requests() if str(each["label"]).startswith("get artifact/")]


def test_what_is_there_is_not_downloaded_again_and_the_newest_wins(
    model: Path, server: WandbServer, tmp_path: Path
) -> None:
    flags = ["--config", str(model / "out" / "harness_config.yaml"), "--output_dir=out", "--save_steps=1"]
    flags += ["--resume_from_checkpoint=wandb:checkpoint-text", "--wandb_log_model=false"]
    before = len(downloads(server))
    ended = harness(tmp_path, server, *flags, "--max_steps=6")
    assert (ended.code, "checkpoint-4, step 4 of 6" in ended.out) == (0, True), ended.err
    assert len(downloads(server)) > before
    before = len(downloads(server))
    ended = harness(tmp_path, server, *flags, "--max_steps=8")
    assert (ended.code, "checkpoint-6, step 6 of 8" in ended.out) == (0, True), ended.err
    older = [*flags[:-2], "--resume_from_checkpoint=wandb:checkpoint-text:v1", "--report_to=none"]
    ended = harness(tmp_path, server, *older, "--max_steps=6")
    assert (ended.code, "checkpoint-4, step 4 of 6" in ended.out) == (0, True), ended.err
    assert len(downloads(server)) == before


@pytest.mark.parametrize("how", ["cut", "changed"])
def test_a_file_that_does_not_arrive_whole_is_tried_again(
    how: str, model: Path, server: WandbServer, tmp_path: Path
) -> None:
    flags = ["--config", str(model / "out" / "harness_config.yaml"), "--output_dir=out", "--report_to=none"]
    flags += ["--resume_from_checkpoint=wandb:checkpoint-text:v0"]
    try:
        if how == "cut":
            server.fault("drop", "get artifact/(optimizer|model)", after_bytes=100, count=2)
        else:
            server.fault("drop", "get artifact/optimizer", after_bytes=100)
        ended = harness(tmp_path, server, *flags)
    finally:
        server.clear_faults()
    if how == "cut":
        assert (ended.code, "checkpoint-2, step 2 of 4" in ended.out) == (0, True), ended.err
        return
    assert ended.code == 2
    assert "could not be downloaded whole, optimizer.pt is missing or damaged after 5 attempts" in ended.err
    assert "Traceback" not in ended.err
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("where", ["between files", "in a file"])
def test_a_download_that_was_killed_leaves_nothing_that_counts(
    where: str, model: Path, server: WandbServer, tmp_path: Path
) -> None:
    flags = ["--config", str(model / "out" / "harness_config.yaml"), "--output_dir=out", "--report_to=none"]
    path = "--resume_from_checkpoint=wandb:checkpoint-text:v0"
    if where == "between files":
        server.fault("hang", "get artifact/optimizer", seconds=60)
    else:
        server.fault("throttle", "get artifact/model", bytes_per_second=10_000)
    whole = (model / "out" / "checkpoint-2" / "model.safetensors").stat().st_size
    with Path(os.devnull).open("w") as out:
        argv = [SCRIPT, *flags, path, "--use_cpu"]
        process = fork(argv, env=environment(tmp_path, server), cwd=tmp_path, out=out, err=out)
    try:
        end = time.monotonic() + 60
        while not list(tmp_path.glob("out/download.*.partial/model.safetensors")):
            assert time.monotonic() < end
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        server.clear_faults()
    (torn,) = tmp_path.glob("out/download.*.partial/model.safetensors")
    assert where == "between files" or torn.stat().st_size < whole
    assert not list(tmp_path.glob("out/checkpoint-*"))
    nothing = harness(tmp_path, server, *flags, "--resume_from_checkpoint=true")
    assert (nothing.code, "no whole checkpoint in out" in nothing.err) == (2, True), nothing.err
    ended = harness(tmp_path, server, *flags, path)
    assert (ended.code, "checkpoint-2, step 2 of 4" in ended.out) == (0, True), ended.err
    assert not list(tmp_path.glob("out/*.partial"))


def test_a_disk_that_is_too_small_is_said(model: Path, server: WandbServer, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("a small file system can't be mounted here")
    flags = ["--config", str(model / "out" / "harness_config.yaml"), "--report_to=none"]
    with small_disk(tmp_path / "disk", "100k"):
        ended = harness(
            tmp_path, server, *flags, "--output_dir=disk/out", "--resume_from_checkpoint=wandb:checkpoint-text"
        )
        left = list((tmp_path / "disk").iterdir())
    assert ended.code == 2
    assert "can't be written to" in ended.err
    assert "No space left" in ended.err
    assert left == []


def test_a_model_is_started_from_and_its_use_recorded(model: Path, server: WandbServer, tmp_path: Path) -> None:
    flags = [f"--train_file={model / 'text.txt'}", "--block_size=8", "--max_steps=3", "--logging_steps=1"]
    path = "wandb:checkpoint-text:v1"  # the optimizer's state stays there
    ended = harness(
        tmp_path, server, *flags, f"--model_name_or_path={path}", "--output_dir=out", "--wandb_run_id=tuned"
    )
    assert ended.code == 0, ended.err
    folder = tmp_path / "artifacts" / "checkpoint-text:v1"
    assert not {path.suffix for path in folder.iterdir()} - {".safetensors", ".json"}
    (used,) = [found for found in server.artifacts() if "tuned" in found.used_by]
    assert (used.collection, used.version) == ("checkpoint-text", "v1")
    written = yaml.safe_load((tmp_path / "out" / "harness_config.yaml").read_text(encoding="utf-8"))
    assert written["model_name_or_path"] == path == server.run("tuned").config["model_name_or_path"]
    local = [*flags, f"--model_name_or_path={model / 'out' / 'checkpoint-4'}", "--output_dir=local", "--report_to=none"]
    assert harness(tmp_path, server, *local).code == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "local")]
    assert weights[0] == weights[1]


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("executed",))


def logged(folder: Path, server: WandbServer, name: str) -> None:
    """The folder as an artifact, as anybody may log it."""
    code = (
        "import sys, wandb\n"
        "run = wandb.init(project='huggingface')\n"
        "artifact = wandb.Artifact(sys.argv[1], 'model', metadata={})\n"
        "artifact.add_dir(sys.argv[2])\n"
        "run.log_artifact(artifact).wait()\n"
    )
    subprocess.run(
        [sys.executable, "-c", code, name, str(folder)],
        env=environment(folder.parent, server),
        cwd=folder.parent,
        check=True,
        timeout=100,
        capture_output=True,
    )


def test_a_crafted_pickle_is_refused_and_not_run(model: Path, server: WandbServer, tmp_path: Path) -> None:
    crafted = tmp_path / "crafted"
    shutil.copytree(model / "out" / "checkpoint-4", crafted)
    (crafted / "optimizer.pt").write_bytes(pickle.dumps(Payload()))
    manifest = json.loads((crafted / "harness_state.json").read_text(encoding="utf-8"))
    data = (crafted / "optimizer.pt").read_bytes()
    manifest["files"]["optimizer.pt"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    del manifest["sha256"]  # of the manifest itself; one of a version before has none
    (crafted / "harness_state.json").write_text(json.dumps(manifest), encoding="utf-8")
    logged(crafted, server, "crafted")
    flags = ["--config", str(model / "out" / "harness_config.yaml"), "--output_dir=out", "--report_to=none"]
    ended = harness(tmp_path, server, *flags, "--resume_from_checkpoint=wandb:crafted")
    assert ended.code == 2
    assert "optimizer.pt can't be loaded safely" in ended.err
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "pytorch_model.bin").write_bytes(data)
    shutil.copy(model / "out" / "config.json", pickled)
    logged(pickled, server, "pickled")
    more = [f"--train_file={model / 'text.txt'}", "--model_name_or_path=wandb:pickled"]
    refused = harness(tmp_path, server, *more)
    assert refused.code == 2
    assert "holds no safetensors weights but config.json, pytorch_model.bin; pickled ones are not" in refused.err
    assert not list(tmp_path.rglob("executed"))


def test_only_what_a_resume_reads_is_taken_from_an_artifact(model: Path, server: WandbServer, tmp_path: Path) -> None:
    crafted = tmp_path / "crafted"
    shutil.copytree(model / "out" / "checkpoint-4", crafted)
    manifest = json.loads((crafted / "harness_state.json").read_text(encoding="utf-8"))
    foreign = ["evil.py", "pytorch_model.bin", "training_args.bin", "global_step9/mp_rank_00_model_states.pt"]
    foreign += ["global_step4/evil.py", "below/config.json", "evil.safetensors.py", "optimizer.pt.py"]
    for name in foreign:
        (crafted / name).parent.mkdir(exist_ok=True)
        (crafted / name).write_text("import os; os.mkdir('executed')", encoding="utf-8")
    # As of a model whose code was loaded from the Hub: its checkpoint has a copy, and lists it.
    code = (crafted / "evil.py").read_bytes()
    manifest["files"]["evil.py"] = {"size": len(code), "sha256": hashlib.sha256(code).hexdigest()}
    manifest[OWN_DIGEST] = digest_of_manifest(manifest)
    (crafted / "harness_state.json").write_text(json.dumps(manifest), encoding="utf-8")
    logged(crafted, server, "foreign")
    flags = ["--config", str(model / "out" / "harness_config.yaml"), "--output_dir=out", "--report_to=none"]
    flags += ["--resume_from_checkpoint=wandb:foreign", "--log_level=info"]
    ended = harness(tmp_path, server, *flags)
    assert (ended.code, "checkpoint-4, step 4 of 4" in ended.out) == (0, True), ended.err
    brought = tmp_path / "out" / "checkpoint-4"
    assert {path.name for path in brought.iterdir()} == {path.name for path in (model / "out/checkpoint-4").iterdir()}
    assert "a resume does not read below/config.json, evil.py, evil.safetensors.py and 5 more: left in W&B" in ended.err
    assert why_invalid(brought) is None
    before = len(downloads(server))
    assert harness(tmp_path, server, *flags).code == 0
    assert len(downloads(server)) == before, "what is there is not downloaded again"


WRONG: dict[str, tuple[list[str], dict[str, str], str]] = {
    "no such artifact": (["--resume_from_checkpoint=wandb:checkpoint-none"], {}, "W&B does not have it"),
    "no path": (["--resume_from_checkpoint=wandb:a/b/c/d"], {}, "write wandb:ENTITY/PROJECT/NAME:ALIAS"),
    "no run": (["--resume_from_checkpoint=wandb:"], {}, "which run? Give --wandb_run_id (WANDB_RUN_ID)"),
    "a run without checkpoints": (["--resume_from_checkpoint=wandb:"], {"WANDB_RUN_ID": "none"}, "W&B does not have"),
    "a model": (["--resume_from_checkpoint=wandb:model-text"], {}, "trainer_state.json is missing, so it is no check"),
    "no server": (
        ["--resume_from_checkpoint=wandb:checkpoint-text"],
        {"WANDB_BASE_URL": "http://127.0.0.1:9"},
        "can't be reached at http://127.0.0.1:9. Where there is no network",
    ),
    "no credentials": (["--model_name_or_path=wandb:model-text"], {"WANDB_API_KEY": ""}, "run `wandb login`"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_had_is_said_in_one_line(what: str, model: Path, server: WandbServer, tmp_path: Path) -> None:
    flags, variables, message = WRONG[what]
    ended = harness(tmp_path, server, f"--train_file={model / 'text.txt'}", "--output_dir=out", *flags, **variables)
    assert ended.code == 2, ended.err
    assert message in ended.err.splitlines()[-1]
    assert "Traceback" not in ended.err
    assert not list(tmp_path.glob("out/*"))


def test_a_manifest_that_points_elsewhere_is_refused(tmp_path: Path) -> None:
    import wandb

    (tmp_path / "file").write_text("1", encoding="utf-8")
    outside, reference = wandb.Artifact("outside", "model"), wandb.Artifact("reference", "model")
    entry = outside.add_file(str(tmp_path / "file"), name="file")
    outside.manifest.entries["../../file"] = entry  # as a server may say it; the client adds none
    reference.add_reference(f"file://{tmp_path / 'file'}")
    with pytest.raises(ConfigError, match="it names a file outside its folder"):
        check_manifest("resume_from_checkpoint", "wandb:outside", outside)
    with pytest.raises(ConfigError, match="it is not followed"):
        check_manifest("resume_from_checkpoint", "wandb:reference", reference)
