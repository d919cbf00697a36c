"""What a resume reads is not trusted: states that do not fit are refused in one line, or passed over for older ones."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.optimization import Adafactor

from harness.checkpoint import schema
from harness.checkpoint.find import find
from harness.checkpoint.flags import CheckpointConfig
from harness.checkpoint.layout import read, why_invalid
from harness.checkpoint.manifest import STATE_FILE, digest_of_manifest
from harness.distributed.optimizer_shards import check_state, optimizer_shard
from harness.distributed.zero import shards_of
from harness.errors import ConfigError
from harness.files import digest_of
from harness.training import rng
from tests.support.launching import SCRIPT, Ended, run
from tests.support.parity import TASK, TRAINING, as_flags, reset, run_harness, run_trainer

SAVING: dict[str, Any] = {**TRAINING, "max_steps": 6, "save_strategy": "steps", "save_steps": 2}
Change = Callable[[Any], Any]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ours")
    run_harness(folder, SAVING)
    shutil.rmtree(folder / "checkpoint-6")
    return folder


@pytest.fixture(scope="module")
def trainers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trainer")
    run_trainer(folder, SAVING)
    shutil.rmtree(folder / "checkpoint-6")
    return folder


def changed(checkpoint: Path, name: str, change: Change) -> None:
    """Change what a file holds, and let the manifest's digests fit, as somebody would who means harm."""
    file, manifest = checkpoint / name, checkpoint / STATE_FILE
    if file.suffix == ".json":
        content = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps(change(content)), encoding="utf-8")
    elif file.suffix in (".pt", ".pth"):
        torch.save(change(torch.load(file, weights_only=False)), file)  # our own, just written
    else:
        file.write_bytes(change(file.read_bytes()))
    if manifest.is_file():
        content = json.loads(manifest.read_text(encoding="utf-8"))
        for each, facts in content["files"].items():
            facts.update(size=(checkpoint / each).stat().st_size, sha256=digest_of(checkpoint / each))
        content["sha256"] = digest_of_manifest(content)
        manifest.write_text(json.dumps(content), encoding="utf-8")


def with_value(*path: Any) -> Change:
    """The last of the path takes the place of what the others lead to."""

    def change(tree: Any) -> Any:
        here, *more, value = path
        if not more:
            tree[here] = value
        else:
            tree[here] = with_value(*more, value)(tree[here])
        return tree

    return change


def resumed(folder: Path, how: str = "auto") -> tuple[str | None, str]:
    found = find(CheckpointConfig(output_dir=str(folder), resume_from_checkpoint=how), folder)
    return found.path and found.path.name, " ".join(found.passed_over)


class Crafted:
    """An array of numpy's whose type claims to hold objects: numpy would follow its numbers as addresses."""

    def __reduce__(self) -> Any:
        make, arguments, _ = np.array([1]).__reduce__()  # type: ignore[misc]
        return make, arguments, (1, (624,), _Flagged(), False, bytes(624 * 8))


class _Flagged:
    def __reduce__(self) -> Any:
        return np.dtype, ("u8", False, True), (3, "<", None, None, None, -1, -1, 63)


def with_words(words: Any) -> Change:
    def change(state: Any) -> Any:
        name, _, *rest = state["numpy"]
        return {**state, "numpy": (name, words, *rest)}

    return change


def at_position(position: int) -> Change:
    def change(state: Any) -> Any:
        name, words, _, *rest = state["numpy"]
        return {**state, "numpy": (name, words, position, *rest)}

    return change


SMALL: dict[str, tuple[str, Change, str]] = {
    "a schedule that is a list": ("scheduler.pt", lambda _: [1, 2], "scheduler.pt holds a list instead of a mapping"),
    "an epoch of the schedule below 0": ("scheduler.pt", with_value("last_epoch", -1), "last_epoch is -1"),
    "generators that are garbage": ("rng_state.pth", lambda _: "garbage", "rng_state.pth holds"),
    "no torch file": ("rng_state.pth", lambda _: None, "rng_state.pth holds"),
    "a generator of Python's of another size": ("rng_state.pth", with_value("python", (3, (1, 2), None)), "generators"),
    "numpy's position behind its words": ("rng_state.pth", at_position(2**30), "Mersenne twister"),
    "too few words of numpy's": ("rng_state.pth", with_words(np.zeros(3, np.uint32)), "Mersenne twister"),
    "an array whose type claims to hold objects": ("rng_state.pth", with_words(Crafted()), "no plain array"),
    "a generator of torch's that is no bytes": ("rng_state.pth", with_value("cpu", torch.zeros(5056)), "row of bytes"),
    "a step below 0": ("trainer_state.json", with_value("global_step", -7), "global_step is -7"),
    "another step": ("trainer_state.json", with_value("global_step", 5), "is of step 5, the folder of step 4"),
    "a history of numbers": ("trainer_state.json", with_value("log_history", [1]), "log_history is a list, not a list"),
    "deep lists": ("trainer_state.json", lambda _: _deep(), "trainer_state.json"),
    "a best checkpoint that is a number": ("trainer_state.json", with_value("best_model_checkpoint", 3), "not a path"),
    "counters that are a text": (STATE_FILE, with_value("state", "x"), "state is 'x', not a mapping"),
    "a counter that is a text": (STATE_FILE, with_value("state", "total_loss", "x"), "total_loss is 'x'"),
    "a position that is a text": (STATE_FILE, with_value("data", "batches", "many"), "batches is 'many'"),
    "a place in the data below 0": (STATE_FILE, with_value("data", "epoch", -1), "epoch is -1"),
    "rows below 0": (STATE_FILE, with_value("tracking", "rows", -2), "rows is -2"),
    "losses of another kind": ("rng_state.pth", with_value("harness", "window", "sums", torch.zeros(3)), "two numbers"),
    "an optimizer that is a list": ("optimizer.pt", lambda _: [], "optimizer.pt holds no state of an optimizer"),
    "a file elsewhere in the manifest": (STATE_FILE, with_value("files", "../../etc/passwd", {"size": 1}), "not in"),
}


def _deep() -> Any:
    deep: list[Any] = []
    for _ in range(400):
        deep = [deep]
    return deep


@pytest.mark.parametrize("kind", SMALL)
def test_a_small_state_of_another_form_is_passed_over_by_auto(kind: str, trained: Path, tmp_path: Path) -> None:
    name, change, reason = SMALL[kind]
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    assert resumed(tmp_path) == ("checkpoint-4", "")
    if kind == "a file elsewhere in the manifest":
        manifest = tmp_path / "checkpoint-4" / STATE_FILE
        content = json.loads(manifest.read_text(encoding="utf-8"))
        content["files"]["../../etc/passwd"] = {"size": 1, "sha256": ""}
        content["sha256"] = digest_of_manifest(content)
        manifest.write_text(json.dumps(content), encoding="utf-8")
    else:
        changed(tmp_path / "checkpoint-4", name, change)
    path, passed_over = resumed(tmp_path)
    assert path == "checkpoint-2"
    assert reason in passed_over
    with pytest.raises(ConfigError) as raised:
        resumed(tmp_path, str(tmp_path / "checkpoint-4"))
    assert "\n" not in str(raised.value)


def trained_on(output_dir: Path, how: str) -> Ended:
    """Of a process of its own: what is crafted may crash it."""
    flags = {"task": TASK, **SAVING, "report_to": "none", "use_cpu": True, "output_dir": output_dir}
    return run([sys.executable, SCRIPT, *as_flags({**flags, "resume_from_checkpoint": how})])


@pytest.mark.parametrize(
    ("change", "begins", "reason"),
    [
        (lambda _: [1, 2], "--resume_from_checkpoint", "holds a list instead of a mapping"),
        (lambda state: {name: each for name, each in state.items() if name != "_last_lr"}, "", "has no _last_lr"),
    ],
)
def test_a_resume_says_it_in_one_line(change: Change, begins: str, reason: str, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    changed(tmp_path / "run" / "checkpoint-4", "scheduler.pt", change)
    flags = as_flags({"task": "tests.support.tasks.parity_task:build", **SAVING, "report_to": "none", "use_cpu": True})
    path = tmp_path / "run" / "checkpoint-4"
    ended = run(
        [sys.executable, SCRIPT, *flags, f"--output_dir={tmp_path / 'out'}", f"--resume_from_checkpoint={path}"]
    )
    assert ended.code == 2
    assert ended.err.splitlines()[-1].startswith(f"harness train: {begins}")
    assert f"scheduler.pt {reason}" in ended.err.splitlines()[-1]
    assert "Traceback" not in ended.err


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flipped(content: bytes) -> bytes:
    return content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 1]) + content[len(content) // 2 + 1 :]


# In the trainer_state.json a flipped bit may make another number, which no one can know.
@pytest.mark.parametrize(
    ("name", "change"),
    [
        *[(name, cut) for name in ("trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth")],
        *[(name, flipped) for name in ("optimizer.pt", "rng_state.pth")],
        ("model.safetensors", cut),
    ],
)
def test_a_torn_file_of_a_trainers_checkpoint_is_passed_over(
    name: str, change: Callable[[bytes], bytes], trainers: Path, tmp_path: Path
) -> None:
    shutil.copytree(trainers, tmp_path, dirs_exist_ok=True)
    assert resumed(tmp_path) == ("checkpoint-4", "")
    file = tmp_path / "checkpoint-4" / name
    file.write_bytes(change(file.read_bytes()))
    path, passed_over = resumed(tmp_path)
    assert path == "checkpoint-2"
    assert name in passed_over


def test_a_checkpoint_of_ours_without_its_manifest_is_no_trainers(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoint-4" / STATE_FILE).unlink()
    assert resumed(tmp_path) == ("checkpoint-2", f"checkpoint-4: {STATE_FILE} is missing, so it was never finished")


def test_a_bit_of_the_manifest_is_missed_too(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    manifest = tmp_path / "checkpoint-4" / STATE_FILE
    text = manifest.read_text(encoding="utf-8")
    assert '"batches": 4' in text
    manifest.write_text(text.replace('"batches": 4', '"batches": 5'), encoding="utf-8")
    assert resumed(tmp_path)[0] == "checkpoint-2"


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "gone.safetensors", 3, {"x": 1}])
def test_an_index_that_leads_out_of_the_folder_is_refused(
    name: Any, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained, tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoint-4"
    shutil.copy(checkpoint / "model.safetensors", tmp_path / "run" / "other.safetensors")
    weights = {"weight_map": {"lm_head.weight": name}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(weights), encoding="utf-8")
    assert resumed(tmp_path / "run")[0] == "checkpoint-2"
    reset()
    assert "model.safetensors.index.json names" in (why_invalid(checkpoint) or "")


@pytest.mark.parametrize("tag", ["../elsewhere", "/etc", "", "a/b", ".", "global_step4\0"])
def test_a_file_that_names_shards_elsewhere_is_refused(tag: str, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    checkpoint = tmp_path / "checkpoint-4"
    (checkpoint / "global_step4").mkdir(parents=True)
    assert shards_of(checkpoint) is None
    (checkpoint / "latest").write_text("global_step4\n", encoding="utf-8")
    assert shards_of(checkpoint) == checkpoint / "global_step4"
    (checkpoint / "latest").write_text(tag, encoding="utf-8")
    with pytest.raises(ConfigError, match="latest names"):
        shards_of(checkpoint)


# The optimizer


def stepped(make: Callable[[Any], torch.optim.Optimizer]) -> torch.optim.Optimizer:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 5), torch.nn.LayerNorm(5))
    optimizer = make([{"params": list(model[:2].parameters())}, {"params": list(model[2].parameters())}])
    for _ in range(2):
        model(torch.randn(8, 6)).square().sum().backward()
        optimizer.step()
    return optimizer


class Own(torch.optim.Optimizer):
    """Lion, written by somebody."""

    def __init__(self, groups: Any) -> None:
        super().__init__(groups, {"lr": 1e-3, "betas": (0.9, 0.99)})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                moment = state.setdefault("moment", torch.zeros_like(parameter))
                parameter.data.add_(moment.lerp(parameter.grad, 0.1).sign(), alpha=-group["lr"])
                moment.lerp_(parameter.grad, 0.01)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW, fused": lambda groups: torch.optim.AdamW(groups, lr=1e-3, fused=True),
    "AMSGrad": lambda groups: torch.optim.Adam(groups, lr=1e-3, amsgrad=True),
    "SGD": lambda groups: torch.optim.SGD(groups, lr=1e-3, momentum=0.9),
    "RMSprop": lambda groups: torch.optim.RMSprop(groups, lr=1e-3, momentum=0.9, centered=True),
    "Adagrad": lambda groups: torch.optim.Adagrad(groups, lr=1e-3),
    "Adamax": lambda groups: torch.optim.Adamax(groups, lr=1e-3),
    "NAdam": lambda groups: torch.optim.NAdam(groups, lr=1e-3),
    "RAdam": lambda groups: torch.optim.RAdam(groups, lr=1e-3),
    "Adadelta": lambda groups: torch.optim.Adadelta(groups, lr=1e-3),
    "ASGD": lambda groups: torch.optim.ASGD(groups, lr=1e-3),
    "Rprop": lambda groups: torch.optim.Rprop(groups, lr=1e-3),
    "Adafactor of torch": lambda groups: torch.optim.Adafactor(groups, lr=1e-3),
    "Adafactor": lambda groups: Adafactor(groups, lr=1e-3, relative_step=False, scale_parameter=False),
    "Adafactor with momentum": lambda groups: Adafactor(
        groups, lr=1e-3, beta1=0.9, relative_step=False, scale_parameter=False
    ),
    "one's own": Own,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_optimizer_takes_its_own_state_and_no_other(name: str) -> None:
    optimizer = stepped(OPTIMIZERS[name])
    state = optimizer.state_dict()
    check_state(optimizer, [state])
    check_state(optimizer, [{**state, "state": {}}])
    tensors = [
        (index, each)
        for index, values in state["state"].items()
        for each, value in values.items()
        if isinstance(value, torch.Tensor) and value.numel() > 3
    ]
    assert tensors
    for index, each in tensors:
        own = state["state"][index][each]
        wrong = [own.to_sparse(), own.to("meta"), torch.nn.Parameter(own)]
        if name != "one's own":
            wrong += [own.long(), own.bool(), own.to(torch.complex64), own.new_zeros(2, 2, 2), "x"]
        if name != "one's own" or index < 4:  # in the other group there is no matrix to tell by
            wrong += [torch.zeros(3), torch.zeros(()).expand(10**12), own.reshape(-1)[:0]]
        for value in wrong:
            values = {key: dict(each) for key, each in state["state"].items()}
            values[index][each] = value
            with pytest.raises(ValueError, match=f"{each} of parameter {index}"):
                check_state(optimizer, [{**state, "state": values}])


@pytest.mark.parametrize("name", ["AdamW, fused", "AMSGrad", "RMSprop", "Adafactor", "Adagrad"])
def test_a_state_that_lacks_a_part_is_refused(name: str) -> None:
    optimizer = stepped(OPTIMIZERS[name])
    state = optimizer.state_dict()
    for index, values in state["state"].items():
        for each in values.keys() - {"RMS"}:
            rest = {key: value for key, value in values.items() if key != each}
            with pytest.raises(ValueError, match=f"parameter {index} has no {each}"):
                check_state(optimizer, [{**state, "state": {**state["state"], index: rest}}])


@pytest.mark.parametrize("step", [-1, float("nan"), "x", None, torch.zeros(2), torch.tensor(-1.0), torch.tensor(1j)])
def test_a_count_of_steps_is_a_number(step: Any) -> None:
    optimizer = stepped(OPTIMIZERS["AdamW, fused"])
    state = optimizer.state_dict()
    state["state"][0]["step"] = step
    with pytest.raises(ValueError, match="step of parameter 0 is no number"):
        check_state(optimizer, [state])


GROUPS: dict[str, tuple[Change, str]] = {
    "one less": (lambda groups: groups[:1], "it has 1 groups of parameters, and there are 2"),
    "one more": (lambda groups: [*groups, groups[1]], "it has 3 groups"),
    "a parameter less": (with_value(0, "params", [0]), "has not the 4 of this run"),
    "a parameter twice": (with_value(1, "params", [4, 4]), "has not the 2 of this run"),
    "parameters of another kind": (with_value(0, "params", "01"), "has not the 4 of this run"),
    "a rate that is a text": (with_value(0, "lr", "x"), "lr of a group is a str instead of a float"),
    "a rate that is not finite": (with_value(0, "lr", float("nan")), "lr of a group is nan"),
    "no rate": (with_value(0, "lr", None), "lr of a group is a NoneType"),
    "three betas": (with_value(0, "betas", (0.9, 0.9, 0.9)), "betas of a group is a tuple instead of 2 values"),
    "a switch that is a list": (with_value(0, "amsgrad", []), "amsgrad of a group"),
    "no decay": (lambda groups: [{k: v for k, v in each.items() if k != "eps"} for each in groups], "has no eps"),
}


@pytest.mark.parametrize("kind", GROUPS)
def test_groups_are_those_of_the_optimizer(kind: str) -> None:
    change, reason = GROUPS[kind]
    optimizer = stepped(OPTIMIZERS["AdamW, fused"])
    state = optimizer.state_dict()
    with pytest.raises(ValueError, match=reason):
        check_state(optimizer, [{**state, "param_groups": change(state["param_groups"])}])


def test_a_step_of_ones_own_may_keep_what_it_likes() -> None:
    class Renamed(torch.optim.AdamW):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for parameter in group["params"]:
                    self.state[parameter].setdefault("first", torch.zeros(3))

    optimizer = stepped(Renamed)
    check_state(optimizer, [optimizer.state_dict()])


def test_rates_may_be_tensors_and_counts_of_operations_large() -> None:
    schema.check_schedule("scheduler.pt", {"last_epoch": 1, "_last_lr": [torch.tensor(0.1)]})
    schema.check_counters("trainer_state.json", {"global_step": 1, "total_flos": 10**24})
    schema.check_scaler("scaler.pt", {})


def in_shards(state: dict[str, Any]) -> list[dict[str, Any]]:
    def rows(value: Any, rank: int) -> Any:
        if not isinstance(value, torch.Tensor) or not value.dim():
            return value
        half = -(-len(value) // 2)
        return {"rows": value[rank * half :][:half], "start": rank * half, "shape": list(value.shape)}

    return [
        {**state, "state": {i: {k: rows(v, rank) for k, v in each.items()} for i, each in state["state"].items()}}
        for rank in (0, 1)
    ]


SHARDS: dict[str, Change] = {
    "another shape": with_value(0, "state", 0, "exp_avg", "shape", [3, 6]),
    "a shape that is huge": with_value(0, "state", 0, "exp_avg", "shape", [10**12, 6]),
    "rows twice": with_value(1, "state", 0, "exp_avg", "start", 0),
    "rows below 0": with_value(0, "state", 0, "exp_avg", "start", -1),
    "too few columns": with_value(0, "state", 0, "exp_avg", "rows", torch.zeros(3, 1)),
    "no rows": with_value(1, "state", 0, "exp_avg", "rows", None),
    "one part whole": with_value(1, "state", 0, "exp_avg", torch.zeros(5, 6)),
    "one part without it": lambda parts: [parts[0], {**parts[1], "state": {}}],
    "another group": lambda parts: [parts[0], {**parts[1], "param_groups": []}],
}


@pytest.mark.parametrize("kind", SHARDS)
def test_shards_of_fsdp_have_to_fit_together_and_the_parameter(kind: str) -> None:
    optimizer = stepped(OPTIMIZERS["AdamW, fused"])
    assert optimizer_shard(optimizer)["state"][0]["exp_avg"].shape == (5, 6)
    parts = in_shards(optimizer.state_dict())
    check_state(optimizer, parts)
    with pytest.raises(ValueError, match=r"parameter 0|groups"):
        check_state(optimizer, SHARDS[kind](parts))


def test_a_crafted_moment_ends_with_one_line_and_no_crash(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoint-4"
    changed(checkpoint, "optimizer.pt", with_value("state", 0, "exp_avg", torch.zeros(3)))
    ended = trained_on(tmp_path / "run", "auto")
    assert ended.code == 2
    assert "exp_avg of parameter 0 has the shape [3] instead of [256, 32]" in ended.err.splitlines()[-1]
    assert "Traceback" not in ended.err


def test_the_generators_of_numpy_come_back_as_they_were(trained: Path) -> None:
    saved = read(trained / "checkpoint-4", ranks=(0, 1)).rank_state
    reference = torch.load(trained / "checkpoint-4" / "rng_state.pth", weights_only=False)  # by numpy itself
    assert saved is not None
    assert saved["numpy"][1].dtype == np.uint32
    np.testing.assert_array_equal(saved["numpy"][1], reference["numpy"][1])
    assert (saved["numpy"][0], *saved["numpy"][2:]) == (reference["numpy"][0], *reference["numpy"][2:])
    with rng.kept():
        rng.restore_host(saved)
        drawn = np.random.random(3)
        rng.restore_host(reference)
        assert np.random.random(3).tolist() == drawn.tolist()
