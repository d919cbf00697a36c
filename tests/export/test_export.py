"""`harness export`: any checkpoint to a folder that `from_pretrained` loads, or a message."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import is_deepspeed_available
from safetensors.torch import load_file
from torch.distributed.checkpoint import save as save_distributed
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
)

from harness.__main__ import main
from harness.train import main as train
from tests.support.forking import fork
from tests.support.inputs import save_gpt_tokenizer, text_flags, write_text
from tests.support.launching import ROOT
from tests.support.parity import run_trainer

GPT2 = {"vocab_size": 90, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "bos_token_id": 0}
GPT2 |= {"eos_token_id": 0}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training of ours: its output_dir, with checkpoint-2."""
    folder = tmp_path_factory.mktemp("trained")
    flags = text_flags(save_gpt_tokenizer(folder / "tokenizer"), write_text(folder / "text.txt"))
    flags += ["--max_steps=2", "--save_steps=2", "--learning_rate=0.1", f"--output_dir={folder / 'run'}"]
    assert train([*flags, "--report_to=none", "--use_cpu"]) == 0
    return folder / "run"


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(24).view(2, 12)).logits
    return found


def exported(checkpoint: Path, out: Path, *flags: str) -> Path:
    assert main(["export", str(checkpoint), str(out), *flags]) == 0
    assert [path.name for path in out.parent.iterdir() if "partial" in path.name] == []
    return out


def saved(folder: Path, model: Any = None) -> Path:
    (model or GPT2LMHeadModel(GPT2Config(**GPT2))).save_pretrained(folder, save_original_format=False)
    return folder


def test_a_checkpoint_becomes_a_model_with_its_tokenizer_and_nothing_else(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = exported(trained / "checkpoint-2", tmp_path / "out", "--max_shard_size=9KB")
    assert capsys.readouterr().out.startswith(f"{out}: ")
    names = {path.name for path in out.iterdir()}
    shards = {name for name in names if name.startswith("model-")}
    kept = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert names == {*shards, *kept, "model.safetensors.index.json"}
    index = json.loads((out / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert len(shards) > 2
    assert set(index["weight_map"].values()) == shards
    own = load_file(trained / "checkpoint-2" / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in own.values())
    assert torch.equal(logits(out), logits(trained / "checkpoint-2"))
    assert len(AutoTokenizer.from_pretrained(out)) == len(AutoTokenizer.from_pretrained(trained / "checkpoint-2"))


def test_shards_a_final_model_and_another_type(trained: Path, tmp_path: Path) -> None:
    sharded = exported(trained, tmp_path / "sharded", "--max_shard_size=9KB")
    half = exported(sharded, tmp_path / "half", "--dtype=bfloat16")
    assert {path.name for path in half.iterdir() if path.name.startswith("model")} == {"model.safetensors"}
    expected = AutoModelForCausalLM.from_pretrained(trained).to(torch.bfloat16).state_dict()
    found = AutoModelForCausalLM.from_pretrained(half)
    assert found.dtype == torch.bfloat16
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.state_dict().items())


def test_a_trainers_checkpoint_and_one_of_the_model_alone(trained: Path, tmp_path: Path) -> None:
    run_trainer(tmp_path / "theirs", {"max_steps": 1, "save_steps": 1, "save_strategy": "steps"})
    checkpoint = tmp_path / "theirs" / "checkpoint-1"
    assert torch.equal(logits(exported(checkpoint, tmp_path / "a")), logits(checkpoint))
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"):
        (checkpoint / name).unlink()
    assert torch.equal(logits(exported(checkpoint, tmp_path / "b")), logits(checkpoint))


def test_weights_have_the_names_of_the_hub(tmp_path: Path) -> None:
    size = {"hidden_size": 16, "intermediate_size": 32, "num_local_experts": 4, "vocab_size": 64}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = MixtralForCausalLM(MixtralConfig(**size, **heads))
    out = exported(saved(tmp_path / "own", model), tmp_path / "out", "--max_shard_size=20KB")
    model.save_pretrained(tmp_path / "hub", save_original_format=True)
    names = json.loads((out / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
    expected = load_file(tmp_path / "hub" / "model.safetensors")
    assert set(names) == set(expected) != set(load_file(tmp_path / "own" / "model.safetensors"))
    found: dict[str, torch.Tensor] = {}
    for file in set(names.values()):
        found |= load_file(out / file)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert torch.equal(logits(out), logits(tmp_path / "own"))
    assert torch.equal(logits(exported(out, tmp_path / "again")), logits(out))


def without(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).unlink()


def changed_config(**values: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").write_text(json.dumps(config | values), encoding="utf-8")

    return change


def cut(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9])


def an_adapter(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}', encoding="utf-8")


def of_fsdp(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_distributed({"model": weights}, checkpoint_id=folder / "pytorch_model_fsdp_0")


def without_a_shard(folder: Path) -> None:
    weights = {"transformer.wte.weight": "model-00001-of-00002.safetensors"}
    text = json.dumps({"weight_map": weights})
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


DAMAGE = {
    "no weights": (without("model.safetensors"), "holds no weights"),
    "no config": (without("config.json"), "holds no config.json"),
    "cut": (cut, "model.safetensors can't be read"),
    "a missing shard": (without_a_shard, "model-00001-of-00002.safetensors"),
    "an unknown model type": (changed_config(model_type="gpt9"), "config.json can't be read"),
    "an unknown architecture": (changed_config(architectures=["Gpt9"]), "names the architecture Gpt9"),
    "another size": (changed_config(n_embd=32), "of another shape (the first: "),
    "another depth": (changed_config(n_layer=3), "12 missing"),
    "an adapter of no model": (an_adapter, "does not name the model that its adapter belongs to"),
    "FSDP's shards": (of_fsdp, "accelerate merge-weights"),
}


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")  # by an old torch's own save
@pytest.mark.filterwarnings("ignore:torch.distributed is:UserWarning")  # torch's, for a save without a process group
@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_no_checkpoint_is_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, message = DAMAGE[name]
    damage(saved(tmp_path / "checkpoint"))
    assert_refused([tmp_path / "checkpoint", tmp_path / "out"], message, capsys)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint"}


def assert_refused(argv: list[Any], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", *(str(value) for value in argv)]) == 2
    shown = capsys.readouterr().err.splitlines()
    (line,) = [line for line in shown if line.startswith("harness export: ")]
    assert message in line
    assert shown[-1] == line


def test_a_damaged_checkpoint_names_the_file(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = trained / "checkpoint-2" / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        assert_refused([trained / "checkpoint-2", tmp_path / "out"], "model.safetensors is damaged", capsys)
    finally:
        file.write_bytes(whole)


def test_wrong_arguments_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, full = saved(tmp_path / "checkpoint"), saved(tmp_path / "full")
    assert_refused([tmp_path / "none", tmp_path / "out"], "no such folder", capsys)
    assert_refused([checkpoint, full], "exists and is not empty", capsys)
    assert_refused([checkpoint, tmp_path / "out", "--max_shard_size=5GiB"], "--max_shard_size=5GiB", capsys)
    (tmp_path / "empty").mkdir()
    exported(checkpoint, tmp_path / "empty")


def test_too_little_space_is_said_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, full = saved(tmp_path / "checkpoint"), shutil.disk_usage(tmp_path)._replace(free=30_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    assert_refused([checkpoint, tmp_path / "out"], "bytes are needed and 30,000 free", capsys)
    exported(checkpoint, tmp_path / "half", "--dtype=float16")


@pytest.mark.slow
def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    """As a command, whose files may not grow: as on a disk that fills meanwhile."""
    checkpoint = saved(tmp_path / "checkpoint")
    line = f"ulimit -f 4; exec {sys.executable} -m harness export {checkpoint} {tmp_path / 'out'} --max_shard_size=8KB"
    ended = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False, cwd=ROOT)
    assert ended.returncode == 2, ended.stderr
    assert "can't be written" in ended.stderr.splitlines()[-1]
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint"}


def test_what_a_killed_export_has_left_goes_with_the_next_one(tmp_path: Path) -> None:
    """Killed in the middle of its shards, twice; an export to the same place that is running is left alone."""
    checkpoint, out = saved(tmp_path / "checkpoint"), tmp_path / "out"
    slow = "import sys, time; import harness.export.folder as folder; save = folder.save_file\n"
    slow += "folder.save_file = lambda *given: (save(*given), time.sleep(100))\n"
    slow += "from harness.__main__ import main; main(sys.argv[1:])"
    argv = ["-c", slow, "export", str(checkpoint), str(out), "--max_shard_size=8KB"]
    with (tmp_path / "log").open("w") as log:
        for _ in range(2):
            process = fork(argv, env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=tmp_path, out=log, err=log)
            end = time.monotonic() + 60
            while not list(tmp_path.glob(f"out.{process.pid}.partial/*.safetensors")):
                assert process.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < end
                time.sleep(0.02)
            process.kill()
            process.wait()
            assert [path.name for path in tmp_path.glob("*.partial")] == [f"out.{process.pid}.partial"]
            assert not out.exists()
        process = fork(argv, env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=tmp_path, out=log, err=log)
        while not list(tmp_path.glob(f"out.{process.pid}.partial/*.safetensors")):
            time.sleep(0.02)
    try:
        assert main(["export", str(checkpoint), str(out)]) == 0
        assert [path.name for path in tmp_path.glob("*.partial")] == [f"out.{process.pid}.partial"]
    finally:
        process.kill()
        process.wait()
    assert torch.equal(logits(out), logits(checkpoint))


PEAK = """
import sys
from harness.__main__ import main
from tests.benchmarks.evaluation import peak
peaks = []
for checkpoint, out in ((sys.argv[1], sys.argv[2]), (sys.argv[3], sys.argv[4])):
    assert main(["export", checkpoint, out, "--max_shard_size=16MB"]) == 0
    peaks.append(peak())
print(peaks[1] - peaks[0])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_shard_at_a_time_is_in_memory(tmp_path: Path) -> None:
    """As python -m does it: what a model of 170 MB in shards of 16 MB takes, beyond a small one."""
    small = saved(tmp_path / "small")
    big = saved(tmp_path / "big", GPT2LMHeadModel(GPT2Config(**GPT2 | {"n_embd": 512, "n_layer": 13})))
    assert (big / "model.safetensors").stat().st_size > 160e6
    command = [sys.executable, "-c", PEAK, str(small), str(tmp_path / "a"), str(big), str(tmp_path / "b")]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    grown = int(ended.stdout.splitlines()[-1])
    assert 0 < grown < 1.3 * 16e6


@pytest.mark.deepspeed
@pytest.mark.timeout(300)
@pytest.mark.skipif(not is_deepspeed_available(), reason="deepspeed is not installed")
def test_deepspeeds_shards_of_each_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "0")  # deepspeed sets it when it is imported
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    script = ROOT / "tests" / "support" / "zero_shards.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", str(script), str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert ended.returncode == 0, ended.stderr[-3000:]
    frozen, values = "transformer.wpe.weight", []
    for stage in (1, 2, 3):
        checkpoint = tmp_path / f"zero{stage}" / "checkpoint-2"
        out = exported(checkpoint, tmp_path / f"out{stage}", "--max_shard_size=8KB")
        assert len(list(out.glob("model-*.safetensors"))) > 1
        found = AutoModelForCausalLM.from_pretrained(out).state_dict()
        assert {tensor.dtype for tensor in found.values()} == {torch.float32}
        # Theirs unpickles what is in the files: here it is our own.
        expected = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint))
        assert set(found) - set(expected) == ({frozen} if stage == 1 else set())  # a gap in theirs
        assert all(torch.equal(found[name], tensor.float()) for name, tensor in expected.items())
        values.append(found[frozen])
    assert torch.equal(values[0], values[1])
    assert torch.equal(values[0], values[2])
    next(checkpoint.glob("global_step2/*rank_1*optim_states.pt")).unlink()
    assert_refused([checkpoint, tmp_path / "out"], "the shards of 1 processes, but 2 saved it", capsys)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is:UserWarning")
def test_fsdps_remedy_works(tmp_path: Path) -> None:
    """What the message says, in a shell."""
    checkpoint = saved(tmp_path / "checkpoint")
    expected = logits(checkpoint)
    of_fsdp(checkpoint)
    command = ["accelerate", "merge-weights", str(checkpoint / "pytorch_model_fsdp_0"), str(checkpoint)]
    subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert torch.equal(logits(exported(checkpoint, tmp_path / "out")), expected)
