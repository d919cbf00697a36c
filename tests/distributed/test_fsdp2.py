"""FSDP2 on two processes, on the CPU if there is no accelerator: DDP's numbers, exact resumes, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from harness.checkpoint.layout import why_invalid
from harness.distributed.fsdp2 import prepare_fsdp
from harness.distributed.optimizer_shards import load_optimizer, optimizer_file, read_optimizer
from harness.errors import ConfigError
from harness.train import main
from tests.support.launching import DDP, FSDP2, FSDP2_OFFLOAD, needs_fsdp
from tests.support.parity import as_flags, history, reset, run_harness
from tests.support.two_processes import ARGUMENTS, finished, losses, rows, trained, weights

pytestmark = needs_fsdp
# The last steps are behind the best evaluation, whose weights are the final ones.
LONG: dict[str, Any] = {
    "max_steps": 101,
    "logging_steps": 1,
    "load_best_model_at_end": True,
    "eval_steps": 10,
    "report_to": "wandb",
    "wandb_mode": "offline",
    "wandb_watch": "all",
    "lr_scheduler_type": "constant",
}


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(DDP, tmp_path_factory.mktemp("ddp"), ddp_find_unused_parameters=False, **LONG)


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(FSDP2, tmp_path_factory.mktemp("fsdp"), **LONG)


@pytest.fixture(scope="module")
def resumed(fsdp: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In mid-epoch, of a run that was killed 81 steps before its end."""
    folder = tmp_path_factory.mktemp("resumed")
    shutil.copytree(fsdp / "checkpoint-20", folder / "run" / "checkpoint-20")
    shutil.copytree(fsdp / "checkpoint-10", folder / "run" / "checkpoint-10")
    return finished(FSDP2, folder, **{**LONG, "report_to": "none"}, resume_from_checkpoint="true")


def going_on(folder: Path, checkpoint: Path, config: Path, **more: Any) -> Path:
    shutil.copytree(checkpoint, folder / "run" / checkpoint.name)
    values = {**LONG, "report_to": "none", "max_steps": 40, "load_best_model_at_end": False, **more}
    return finished(config, folder, **values, resume_from_checkpoint="true", allow_changed_arguments=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
class TestTwoProcesses:
    def test_the_numbers_and_histograms_are_ddps(self, ddp: Path, fsdp: Path) -> None:
        assert len(losses(fsdp)) == 101
        assert torch.allclose(losses(fsdp), losses(ddp), rtol=1e-6, atol=0)
        found, expected = rows(fsdp), rows(ddp)
        assert [set(row) for row in found] == [set(row) for row in expected]
        for ours, theirs in zip(found, expected, strict=True):
            for name in ("train/grad_norm", "eval/loss", "eval/accuracy", "train/total_flos"):
                assert ours.get(name, 0.0) == pytest.approx(theirs.get(name, 0.0), rel=1e-5), name
        (watched,) = [i for i, row in enumerate(expected) if "gradients/transformer.wte.weight" in row]
        names = [name for name in expected[watched] if name.startswith(("gradients/", "parameters/"))]
        assert len(names) > 40
        for name in names:
            ours, theirs = found[watched][name], expected[watched][name]
            assert ours["bins"] == pytest.approx(theirs["bins"], rel=1e-4, abs=1e-6), name
            moved = sum(abs(a - b) for a, b in zip(ours["values"], theirs["values"], strict=True)) / 2
            assert moved <= 0.01 * sum(theirs["values"]) + 1, name

    def test_a_checkpoint_has_whole_weights_and_each_ranks_part_of_the_optimizer(self, ddp: Path, fsdp: Path) -> None:
        checkpoint = fsdp / "checkpoint-20"
        assert why_invalid(checkpoint) is None
        listed = set(json.loads((checkpoint / "harness_state.json").read_text(encoding="utf-8"))["files"])
        assert {"model.safetensors", optimizer_file(0), optimizer_file(1), "scheduler.pt", "rng_state_1.pth"} <= listed
        assert "optimizer.pt" not in listed
        parts = [read_optimizer(checkpoint, ranks=(rank, 2), is_sharded=True)[0] for rank in (0, 1)]
        whole = torch.load(ddp / "checkpoint-20" / "optimizer.pt", weights_only=True)["state"]
        assert len(whole) > 20
        for index, state in whole.items():
            own = [part["state"][index]["exp_avg"] for part in parts]
            assert max(len(each["rows"]) for each in own) == -(-len(state["exp_avg"]) // 2), "each has its half"
            assert torch.allclose(torch.cat([each["rows"] for each in own]), state["exp_avg"], rtol=1e-3, atol=1e-6)

    def test_the_best_weights_are_the_final_ones_and_load(self, ddp: Path, fsdp: Path) -> None:
        state = json.loads((fsdp / "trainer_state.json").read_text(encoding="utf-8"))
        best = fsdp / Path(state["best_model_checkpoint"]).name
        assert weights(fsdp) == weights(best)
        assert weights(best) != weights(fsdp / "checkpoint-101")
        tokens = torch.arange(1, 33).reshape(2, 16)
        logits = [AutoModelForCausalLM.from_pretrained(folder)(tokens).logits for folder in (fsdp, best, ddp)]
        assert torch.equal(logits[0], logits[1])
        assert torch.allclose(logits[0], logits[2], rtol=1e-3, atol=1e-4)

    def test_a_resume_in_mid_epoch_is_exact(self, fsdp: Path, resumed: Path) -> None:
        assert history(resumed) == history(fsdp)
        assert weights(resumed) == weights(fsdp)
        for name in ("model.safetensors", optimizer_file(0), optimizer_file(1)):
            assert (resumed / "checkpoint-100" / name).read_bytes() == (fsdp / "checkpoint-100" / name).read_bytes()

    @pytest.mark.parametrize("config", [FSDP2_OFFLOAD, DDP], ids=lambda path: path.stem)
    def test_ddp_goes_on_from_fsdp_and_fsdp_from_ddp(self, config: Path, ddp: Path, fsdp: Path, tmp_path: Path) -> None:
        more = {"ddp_find_unused_parameters": False} if config == DDP else {}
        found = going_on(tmp_path, (fsdp if config == DDP else ddp) / "checkpoint-20", config, **more)
        assert len(losses(found)) == 40
        assert torch.allclose(losses(found), losses(ddp)[:40], rtol=1e-6, atol=0)

    def test_a_hundred_steps_in_bf16_are_those_of_one_process(self, tmp_path: Path) -> None:
        more = {"task_args": {"dropout": 0.0, "size": 128}, "max_steps": 100, "eval_strategy": "no"}
        more |= {"save_strategy": "no", "bf16": True, "gradient_accumulation_steps": 4}
        found = finished(FSDP2, tmp_path / "fsdp", **more)
        alone = {**ARGUMENTS, **more, "per_device_train_batch_size": 4, "expect_num_processes": 1}
        run_harness(tmp_path / "one", {name: value for name, value in alone.items() if name != "task"})
        assert len(losses(found)) == 100
        assert torch.allclose(losses(found), losses(tmp_path / "one"), rtol=2e-2, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("config", [FSDP2, FSDP2_OFFLOAD], ids=lambda path: path.stem)
def test_fp16_keeps_its_scaler(config: Path, tmp_path: Path) -> None:
    whole = finished(config, tmp_path / "whole", fp16=True)
    assert (whole / "checkpoint-10" / "scaler.pt").is_file()
    shutil.copytree(whole / "checkpoint-10", tmp_path / "again" / "run" / "checkpoint-10")
    again = finished(config, tmp_path / "again", fp16=True, resume_from_checkpoint="true")
    assert history(again) == history(whole)
    assert weights(again) == weights(whole)


def test_no_rank_holds_whole_weights_after_an_evaluation(tmp_path: Path) -> None:
    task = {"task": "tests.support.tasks.own_tasks:watching_shards", "task_args": None}
    run = finished(FSDP2, tmp_path, **task, max_steps=2, eval_on_start=True, logging_steps=1)
    assert [row["step"] for row in history(run) if "eval_loss" in row] == [0, 2]


REFUSED: dict[str, tuple[dict[str, str], list[str], str]] = {
    "version 1": ({"FSDP_VERSION": "1"}, [], "distributed_type: FSDP without fsdp_version: 2"),
    "its checkpointing": ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, [], "give --activation_checkpointing"),
    "parallelism": ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, [], "parallelism_config in the launch config"),
    "compiled": ({}, ["--torch_compile"], "--torch_compile is not supported with FSDP"),
    "compiled by the launch": ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, [], "dynamo_config in the launch config"),
    "without its launcher": ({}, [], "accelerate made it NO: nothing would be sharded"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_fsdp_can_not_do_is_refused(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reset()
    variables, more, message = REFUSED[what]
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", **variables}.items():
        monkeypatch.setenv(name, value)
    arguments = {"task": "tests.support.tasks.parity_task:build", "report_to": "none", "output_dir": tmp_path / "run"}
    assert main([*as_flags(arguments), *more]) == 2
    shown = capsys.readouterr().err
    assert shown.count("harness train: ") == 1
    assert message in shown
    assert not (tmp_path / "run").exists()


def test_a_launch_config_that_compiles_is_refused_with_its_line(tmp_path: Path) -> None:
    config = tmp_path / "launch.yaml"
    text = FSDP2.read_text(encoding="utf-8") + "dynamo_config:\n  dynamo_backend: INDUCTOR\n"
    config.write_text(text, encoding="utf-8")
    ended = trained(config, tmp_path, forked=False)
    line = f"change `dynamo_backend` in {config}, line {len(text.splitlines())}."
    assert ended.code != 0
    assert "dynamo_config in the launch config asks for torch.compile (INDUCTOR)" in ended.err
    assert line in ended.err


def test_an_older_torch_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    installed = tmp_path / "torch-2.6.0.dist-info" / "METADATA"
    installed.parent.mkdir()
    installed.write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.6.0\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}.items():
        monkeypatch.setenv(name, value)
    assert main(["--task", "tests.support.tasks.parity_task:build", f"--output_dir={tmp_path / 'run'}"]) == 2
    shown = capsys.readouterr().err
    assert "FSDP2 needs torch 2.9 or newer, and this is 2.6.0: update it" in shown
    assert not (tmp_path / "run").exists()


def cut(state: dict[str, Any], ranks: int) -> list[dict[str, Any]]:
    """A whole state dict of an optimizer as that many ranks would have saved it."""

    def part(value: Any, rank: int) -> Any:
        if not isinstance(value, torch.Tensor) or not value.dim():
            return value
        a_part = -(-len(value) // ranks)
        return {"rows": value[rank * a_part :][:a_part], "start": rank * a_part, "shape": list(value.shape)}

    return [
        {**state, "state": {i: {n: part(v, rank) for n, v in each.items()} for i, each in state["state"].items()}}
        for rank in range(ranks)
    ]


def stepped(*sizes: tuple[int, ...]) -> torch.optim.Optimizer:
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.ones(size)) for size in sizes]
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_shards_of_any_number_of_ranks_become_whole(ranks: int, tmp_path: Path) -> None:
    optimizer = stepped((5, 3), (1,), (7,))
    for rank, part in enumerate(cut(optimizer.state_dict(), ranks)):
        torch.save(part, tmp_path / optimizer_file(rank))
    fresh = torch.optim.AdamW(optimizer.param_groups[0]["params"], lr=0.2)
    load_optimizer(fresh, read_optimizer(tmp_path, ranks=(0, 1), is_sharded=False))
    assert fresh.param_groups[0]["lr"] == 0.1
    for found, expected in zip(fresh.state.values(), optimizer.state.values(), strict=True):
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_shard_that_is_missing_or_of_another_model_is_an_error() -> None:
    parts = cut(stepped((5, 3)).state_dict(), 2)
    with pytest.raises(ValueError, match="rows 0 to 5 are not in it"):
        load_optimizer(stepped((5, 3)), parts[:1])
    with pytest.raises(ValueError, match="more parameters"):
        load_optimizer(stepped((5, 3)), cut(stepped((5, 3), (2,)).state_dict(), 2))


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("executed"),))


def test_a_crafted_shard_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state": Payload()}, optimizer_file(0))
    with pytest.raises(ConfigError, match="can't be loaded safely"):
        read_optimizer(tmp_path, ranks=(0, 1), is_sharded=True)
    assert not Path("executed").exists()


def test_a_model_with_more_tied_weights_than_accelerate_knows_is_named() -> None:
    model = T5ForConditionalGeneration(T5Config(vocab_size=8, d_model=8, d_kv=8, d_ff=8, num_layers=1, num_heads=1))
    plugin = SimpleNamespace(cpu_ram_efficient_loading=False, transformer_cls_names_to_wrap=None)
    accelerator: Any = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))
    with pytest.raises(ConfigError, match=r"shard T5For.*shared.weight and .* are one weight: use .*zero3"):
        prepare_fsdp(accelerator, model)
