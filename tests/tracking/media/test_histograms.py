"""Histograms: those of wandb.watch where it is right, those of the optimizer step where it isn't."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from harness.errors import ConfigError
from harness.tracking.media import histograms as module
from harness.tracking.media.graph import log_graph
from harness.tracking.media.histograms import Histogram, Selection, Watch
from tests.support.launching import needs_fsdp, run, torchrun
from tests.support.wandb.artifact_processes import environment
from tests.support.wandb.file import read_all
from tests.support.wandb.graphs import GraphRun
from tests.support.wandb.watch_pair import LOG_FREQ, NUM_STEPS, Odd, Rows, rows_of_wandb

ROW_LIMIT_BYTES = 10 * 2**20 - 100 * 2**10  # of wandb-core 0.31


def mlp(width: int = 16) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(width, 3))


def backward(model: nn.Module, *, scale: float = 1.0) -> None:
    inputs = torch.randn(12, 8, generator=torch.Generator().manual_seed(2))
    (model.eval()(inputs).square().sum() * scale).backward()


def observed(model: nn.Module, **options: Any) -> dict[str, Histogram]:
    selection = Selection(**{name: options.pop(name) for name in ("max_tensors", "patterns") if name in options})
    given = {"log": "all", "log_freq": 1, "is_main": True, "selection": selection, **options}
    return Watch(model, **given).observe()


def names(found: dict[str, Histogram], kind: str) -> list[str]:
    return [key.removeprefix(f"{kind}/") for key in found if key.startswith(f"{kind}/")]


# The plain case: one process, no accumulation, nothing compiled.


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Path]]]:
    """What runs in other processes, at the same time, each with a folder of its own."""

    def pair(folder: Path) -> Path:
        """The same steps through the real wandb.watch, offline, and through ours."""
        command = [sys.executable, "-m", "tests.support.wandb.watch_pair", str(folder)]
        ended = run(command, cwd=folder, **environment(folder, WANDB_SILENT="true", WANDB_MODE="offline"))
        assert ended.code == 0, ended.err[-3000:]
        return folder

    def ranks(folder: Path) -> Path:
        ended = run([*torchrun(2), "-m", "tests.support.wandb.watch_ranks", str(folder)])
        assert ended.code == 0, ended.err[-3000:]
        return folder / "found.json"

    with ThreadPoolExecutor() as both:
        yield {job.__name__: both.submit(job, tmp_path_factory.mktemp(job.__name__)) for job in (pair, ranks)}


@pytest.fixture(scope="module")
def pair(started: dict[str, Future[Path]]) -> Path:
    return started["pair"].result()


@pytest.fixture(scope="module")
def ranks(started: dict[str, Future[Path]]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(started["ranks"].result().read_text(encoding="utf-8"))
    assert found["world"] == 2
    return found


def test_histograms_are_those_of_wandb_watch_to_the_bit(pair: Path) -> None:
    theirs = rows_of_wandb(pair)
    ours: Rows = json.loads((pair / "ours.json").read_text(encoding="utf-8"))
    assert len(theirs) == NUM_STEPS
    assert [bool(row) for row in theirs] == [step % LOG_FREQ == 0 for step in range(1, NUM_STEPS + 1)]
    assert ours == theirs
    assert ours[1] != ours[3]


def test_every_kind_of_tensor_was_compared(pair: Path) -> None:
    row = rows_of_wandb(pair)[1]
    sizes = {name: parameter.numel() for name, parameter in Odd().named_parameters()}
    assert len(row["gradients/body.0.weight"]["values"]) == 64
    for key in ("gradients/v_constant", "parameters/v_constant", "parameters/v_scalar", "parameters/v_one_finite"):
        assert len(row[key]["values"]) == 1
    assert {f"parameters/v_{dtype}" for dtype in ("bfloat16", "float16", "float64")} <= set(row)
    assert max(row["parameters/v_negative"]["bins"]) < 0
    for key, finite in {"parameters/v_some_finite": 3, "gradients/g_some_finite": 4}.items():
        assert sum(row[key]["values"]) == finite
    for name in ("sparse", "sparse_positive", "sparse_full"):
        assert sum(row[f"gradients/{name}.weight"]["values"]) == sizes[f"{name}.weight"]
    assert row["gradients/sparse_positive.weight"]["bins"][0] == 0
    assert sizes["dense.weight"] > module.HOST_BLOCK
    absent = {"parameters/v_none_finite", "gradients/g_none_finite", "parameters/v_empty", "gradients/v_empty"}
    absent |= {"gradients/frozen.weight", "gradients/unused.weight", "parameters/tied.weight"}
    assert not absent & set(row)
    assert {"parameters/frozen.weight", "parameters/unused.weight", "parameters/dense.weight"} <= set(row)


def test_gradients_come_before_parameters_in_the_order_of_the_model() -> None:
    model = mlp()
    backward(model)
    inside = [name for name, _ in model.named_parameters()]
    assert list(observed(model)) == [f"{kind}/{name}" for kind in ("gradients", "parameters") for name in inside]
    assert list(observed(model, log="gradients")) == [f"gradients/{name}" for name in inside]
    assert list(observed(model, log="parameters")) == [f"parameters/{name}" for name in inside]


def test_steps_are_counted_from_one() -> None:
    watch = Watch(mlp(), log="all", log_freq=3, is_main=True)
    assert [step for step in range(1, 10) if watch.is_due(step)] == [3, 6, 9]


class Operations(TorchDispatchMode):
    """The names of all that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.__name__)
        return func(*args, **(kwargs or {}))


def test_other_ranks_give_and_compute_nothing() -> None:
    model = mlp()
    backward(model)
    with Operations() as computed:
        assert observed(model, is_main=False) == {}
    assert computed.names == set()
    with Operations() as computed:
        observed(model)
    assert "aminmax.default" in computed.names


# What an accelerator does; there is none here: the same functions, on tensors of the host and on fake ones.


def tensors() -> list[torch.Tensor]:
    torch.manual_seed(0)
    odd = [parameter.detach().flatten() for parameter in Odd().parameters() if parameter.dtype != torch.float64]
    return [*odd, torch.randn(5000), torch.full((3000,), 2.0), torch.arange(100), torch.zeros(0), torch.zeros(1024)]


@pytest.mark.parametrize("chunk", [2**11, 2**14, module.DEVICE_CHUNK])
def test_the_batched_arithmetic_is_that_of_the_host(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DEVICE_CHUNK", chunk)
    given = tensors()
    low, high = module._host_range(given, torch.float32)
    assert (low > high).sum() == 3  # an empty one twice, and one of NaN and infinity
    for expected, batched in zip((low, high), module._device_range(given, torch.float32), strict=True):
        assert torch.equal(expected, batched)
    host, device = module._host_counts(given, low, high), module._device_counts(given, low, high)
    # The last column counts what isn't finite; there the filling of the rows counts too.
    assert torch.equal(host[:, :-1], device[:, :-1])
    assert host[:, :-1].sum() == sum(int(tensor.isfinite().sum()) for tensor in given)


def test_nothing_waits_for_the_device_before_the_transfer() -> None:
    with FakeTensorMode():  # raises where the data would have to be known, and where devices are mixed
        model = nn.Module()
        for i, shape in enumerate([(3000, 2000), (5,), (2, 3), ()]):
            parameter = nn.Parameter(torch.empty(shape, device="meta", dtype=torch.bfloat16))
            parameter.grad = torch.empty(shape, device="meta", dtype=torch.bfloat16)
            model.register_parameter(f"p{i}", parameter)
        sources = list(Watch(model, log="all", log_freq=1, is_main=True)._sources(1.0))
        ranges, counts = module._table(sources)
        assert (ranges.shape, counts.shape, counts.device.type) == ((8, 2), (8, 66), "meta")
        with pytest.raises(DynamicOutputShapeException):
            ranges[ranges.isfinite()]


# Where wandb.watch is wrong.


def differences(row: dict[str, Any], whole: dict[str, Any]) -> dict[str, str]:
    """What can't be put down to rounding: edges by 1e-5 of the range, one value in 200 in a neighbouring bin."""
    different = {}
    for key, expected in whole.items():
        values, bins = row[key]["values"], row[key]["bins"]
        spread = expected["bins"][-1] - expected["bins"][0]
        near = all(abs(a - b) <= 1e-5 * max(spread, abs(b)) for a, b in zip(bins, expected["bins"], strict=True))
        below = zip(itertools.accumulate(values), itertools.accumulate(expected["values"]), strict=True)
        moved = max(abs(a - b) for a, b in below)
        if not near or sum(values) != sum(expected["values"]) or moved > 1 + sum(values) / 200:
            different[key] = f"edges near: {near}, moved: {moved}"
    return different


@needs_fsdp
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_ranks_with_accumulation_show_the_gradient_of_the_step(ranks: dict[str, Any], kind: str) -> None:
    (row,), (whole,), (micro,) = ranks[kind], ranks["whole"], ranks["micro"]
    assert list(row) == list(whole)
    assert "gradients/body.0.weight" in row
    assert differences(row, whole) == {}
    # wandb.watch shows the gradient of the last micro-batch of rank zero: the comparison can tell.
    assert "gradients/body.0.weight" in differences(micro, whole)


@needs_fsdp
def test_two_ranks_show_on_rank_zero_only(ranks: dict[str, Any]) -> None:
    assert ranks["others"] == [[0], [0]]  # keys in each row of rank one: under DDP, under FSDP


def test_accumulated_gradients_are_summed_up() -> None:
    model, once = mlp(), mlp()
    backward(once, scale=4)
    for _ in range(4):
        backward(model)
    assert observed(model) == observed(once)


def compiled_eagerly(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="aot_eager", fullgraph=True)  # type: ignore[return-value]


@pytest.mark.parametrize("where", ["whole", "in place", "a part"])
def test_a_compiled_model_shows_the_same_under_the_same_names(where: str) -> None:
    model, plain = mlp(), mlp()
    candidate = model
    if where == "whole":
        candidate = compiled_eagerly(model)
    elif where == "in place":
        model.compile(backend="aot_eager")
    else:
        model[0] = compiled_eagerly(model[0])  # type: ignore[index, operator]
        assert "0._orig_mod.weight" in dict(model.named_parameters())
    watch = Watch(candidate, log="all", log_freq=1, is_main=True)
    backward(candidate)
    backward(plain)
    assert list(watch.observe()) == list(observed(plain))
    assert watch.observe() == observed(plain)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own
def test_a_model_compiled_by_inductor_shows_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR", "")  # it would leave it behind
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)  # and its threads
    model, plain = torch.compile(mlp()), mlp()
    backward(model)  # type: ignore[arg-type]
    backward(plain)
    row, whole = (json.loads(json.dumps(observed(m), default=dataclasses.asdict)) for m in (model, plain))  # type: ignore[arg-type]
    assert list(row) == list(whole)
    assert differences(row, whole) == {}


def test_gradients_are_divided_by_the_scale_of_fp16() -> None:
    model, scaled = mlp(), mlp()
    backward(model)
    backward(scaled, scale=2.0**12)
    assert observed(scaled, log="gradients") != observed(model, log="gradients")
    watch = Watch(scaled, log="all", log_freq=1, is_main=True)
    assert watch.observe(grad_scale=2.0**12) == observed(model)


def test_counts_are_exact_where_float32_ends() -> None:
    model = nn.Module()
    model.register_parameter("p", nn.Parameter(torch.zeros(2**24 + 3, dtype=torch.bfloat16)))
    with torch.no_grad():
        model.p[0] = 1
    values = observed(model)["parameters/p"].values
    assert (values[0], values[-1]) == (2**24 + 2, 1)  # torch.histc stops at 2**24


def test_a_range_beyond_float32_is_left_out() -> None:
    model = mlp()
    with torch.no_grad():
        model[0].bias[:2] = torch.tensor([-3e38, 3e38])  # type: ignore[index, operator]
    assert names(observed(model), "parameters") == ["0.weight", "3.weight", "3.bias"]


# It must not disturb.


def train(*, watches: bool) -> tuple[dict[str, torch.Tensor], torch.Tensor, list[bool]]:
    model = mlp().bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    watch = Watch(model, log="all", log_freq=2, is_main=True)
    torch.manual_seed(3)
    same = []
    for step in range(1, 7):
        model(torch.randn(16, 8, dtype=torch.bfloat16)).square().mean().backward()
        if watches and watch.is_due(step):
            gradients = [parameter.grad for parameter in model.parameters()]
            before = [gradient.clone() for gradient in gradients if gradient is not None]
            assert watch.observe()
            after = [parameter.grad for parameter in model.parameters()]
            same += [
                a is b and a is not None and torch.equal(a, c) for a, b, c in zip(after, gradients, before, strict=True)
            ]
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict(), torch.get_rng_state(), same


def test_watching_changes_no_bit_of_the_training() -> None:
    without, with_it = train(watches=False), train(watches=True)
    assert all(torch.equal(without[0][name], with_it[0][name]) for name in without[0])
    assert torch.equal(without[1], with_it[1])
    assert with_it[2] == [True] * 12
    untrained = mlp().bfloat16().state_dict()
    assert not any(torch.equal(untrained[name], with_it[0][name]) for name in untrained)


def test_no_layout_of_a_tensor_costs_a_copy() -> None:
    image = torch.randn(4, 3, 5, 6)
    for tensor in (image, image.to(memory_format=torch.channels_last), image.permute(2, 0, 3, 1)):
        values = module._source("key", tensor, 1.0).values
        assert (values.data_ptr(), values.shape) == (tensor.data_ptr(), (360,))


def test_watching_keeps_a_sparse_gradient_as_it_is() -> None:
    embedding = nn.Embedding(10, 3, sparse=True)
    embedding(torch.tensor([1, 1, 7])).sum().backward()
    gradient = embedding.weight.grad
    assert gradient is not None
    assert not gradient.is_coalesced()
    (drawn,) = observed(embedding, log="gradients").values()
    assert sum(drawn.values) == 30
    assert embedding.weight.grad is gradient
    assert not gradient.is_coalesced()


# Which tensors.


def many(count: int) -> nn.Module:
    model = nn.Module()
    for i in range(count):
        model.register_parameter(f"p{i}", nn.Parameter(torch.zeros(1)))
    return model


def warnings_of(caplog: pytest.LogCaptureFixture, build: Callable[[], object]) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="harness"):
        build()
    return [record.getMessage() for record in caplog.records]


def test_more_tensors_than_wanted_are_thinned_out_evenly_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    found: list[dict[str, Histogram]] = []
    said = warnings_of(caplog, lambda: found.append(observed(many(10), max_tensors=4)))
    assert names(found[0], "parameters") == ["p0", "p3", "p6", "p9"]
    (line,) = said
    assert "4 of 10 parameters" in line
    assert "--wandb_watch_max_tensors" in line
    assert "--wandb_watch_patterns" in line
    assert names(observed(many(10), max_tensors=1), "parameters") == ["p0"]
    assert warnings_of(caplog, lambda: observed(many(10), max_tensors=10)) == []
    assert warnings_of(caplog, lambda: observed(many(10), max_tensors=4, is_main=False)) == []


def test_frozen_parameters_take_no_place_among_gradients() -> None:
    model = mlp()
    model[0].requires_grad_(False)  # type: ignore[index, operator]
    backward(model)
    assert names(observed(model, log="gradients", max_tensors=2), "gradients") == ["3.weight", "3.bias"]


@pytest.mark.parametrize("max_tensors", [None, 5000])
def test_a_row_stays_below_the_limit_of_wandb(max_tensors: int | None, caplog: pytest.LogCaptureFixture) -> None:
    model = many(2000)
    for i, parameter in enumerate(model.parameters()):  # small negative numbers are the longest
        parameter.data = -torch.rand(100, generator=torch.Generator().manual_seed(i)) * 1e-5 - 1e-6
        parameter.grad = parameter.data
    found: list[dict[str, Histogram]] = []
    said = warnings_of(caplog, lambda: found.append(observed(model, max_tensors=max_tensors)))
    assert len(found[0]) == 3000
    assert "1500 of 2000" in said[0]
    texts = [json.dumps(dataclasses.asdict(histogram)) for histogram in found[0].values()]
    longest = max(map(len, texts)) + len('"_type": "histogram", ') + 64 * len("0000000")  # larger counts
    assert 3000 * (longest + 150) < ROW_LIMIT_BYTES  # a key of 150 characters


def test_patterns_choose_parameters_by_name() -> None:
    model = mlp()
    assert names(observed(model, patterns=["3.*"]), "parameters") == ["3.weight", "3.bias"]
    assert names(observed(model, patterns=["*.bias", "0.weight"]), "parameters") == ["0.weight", "0.bias", "3.bias"]
    assert names(observed(model, patterns=["*.bias", "none"]), "parameters") == ["0.bias", "3.bias"]


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"patterns": ["attention.*", "0.Weight"]}, "--wandb_watch_patterns=attention.* 0.Weight"),
        ({"max_tensors": 0}, "--wandb_watch_max_tensors=0"),
        ({"log": "grads"}, "--wandb_watch=grads"),
    ],
)
@pytest.mark.parametrize("is_main", [True, False])
def test_what_cannot_be_watched_is_refused_on_every_rank(options: dict[str, Any], flag: str, is_main: bool) -> None:
    with pytest.raises(ConfigError) as refused:
        observed(mlp(), **options, is_main=is_main)
    assert flag in str(refused.value)


# The layers.


def graph_file(folder: Path) -> list[dict[str, Any]]:
    """The nodes of the graph that the run below `folder` recorded."""
    (found,) = read_all(folder)
    path = found.path.parent / "files" / found.summary["graph_0"]["path"]
    nodes: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["nodes"]
    return [{key: value for key, value in node.items() if key != "id"} for node in nodes]


def test_the_graph_is_that_of_wandb_watch(pair: Path) -> None:
    theirs, ours = graph_file(pair / "graph-theirs"), graph_file(pair / "graph-ours")
    assert [node["name"] for node in theirs] == ["blocks.0.0", "blocks.0.1", "blocks.1", "heads.a", "last"]
    assert ours == theirs


@needs_fsdp
def test_the_graph_of_a_model_that_ranks_share_is_that_of_the_model(ranks: dict[str, Any]) -> None:
    graphs = ranks["graphs"]
    assert [node["name"] for node in graphs["whole"]] == ["embed", "body.0", "body.1", "body.2"]
    assert graphs["ddp"] == graphs["fsdp"] == graphs["whole"]


def hooks(model: nn.Module) -> int:
    return sum(len(part._forward_hooks) for part in model.modules())


def test_the_graph_is_recorded_once_and_leaves_no_hook(tmp_path: Path) -> None:
    model, run = nn.Sequential(mlp(), nn.Identity(), nn.Linear(3, 2)), GraphRun(tmp_path)
    log_graph(run, model, with_shapes=True)
    assert (hooks(model), run.summary) == (7, {})
    model(torch.zeros(5, 8))
    assert run.shapes["2"] == [[5, 2]]
    assert hooks(model) == 0
    model(torch.zeros(6, 8))
    assert len(run.published) == 1


def test_the_graph_has_the_layers_that_are_never_called(tmp_path: Path) -> None:
    model, run = Odd(), GraphRun(tmp_path)
    log_graph(run, model, with_shapes=True)
    model(torch.zeros(2, 3, dtype=torch.int64))
    found = run.shapes
    assert list(found)[-2:] == ["frozen", "unused"]
    assert found["unused"] is None
    assert found["body.0"] == [[2, 3, 16]]
    assert hooks(model) == 0


@pytest.mark.parametrize("in_place", [True, False])
def test_a_compiled_model_gets_its_graph_at_once_and_no_hook(in_place: bool, tmp_path: Path) -> None:
    model, run = mlp(), GraphRun(tmp_path)
    candidate = model if in_place else compiled_eagerly(model)
    if in_place:
        model.compile(backend="eager")
    log_graph(run, candidate, with_shapes=True)
    assert run.shapes == {"0": None, "1": None, "2": None, "3": None}
    assert hooks(candidate) == 0


def test_a_model_that_is_compiled_afterwards_still_compiles_whole_and_once(tmp_path: Path) -> None:
    model, run = mlp(), GraphRun(tmp_path)
    log_graph(run, model, with_shapes=True)
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    # fullgraph: it raises if a hook breaks the graph up
    candidate: Any = torch.compile(model, backend=backend, fullgraph=True)
    for _ in range(3):
        backward(candidate)
    assert len(graphs) == 1


class Unspeakable(nn.Linear):
    def __repr__(self) -> str:
        raise RuntimeError("no words")


def test_a_graph_that_fails_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, run = nn.Sequential(Unspeakable(8, 2)), GraphRun(tmp_path)

    def forward() -> None:
        log_graph(run, model, with_shapes=True)
        assert model(torch.zeros(1, 8)).shape == (1, 2)

    (line,) = warnings_of(caplog, forward)
    assert "RuntimeError: no words" in line
    assert (hooks(model), run.summary) == (0, {})
