"""The layers of a model in W&B's summary: without a forward, in the model's own names, cheap however large it is."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from harness.tracking.media.graph import log_graph
from tests.support.wandb.graphs import GraphRun


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.act = nn.Linear(2, 4), nn.Linear(4, 2), nn.ReLU()


def experts(count: int) -> nn.Module:
    """A model of four modules an expert, which no two lines of its text share."""
    body = nn.Module()
    body.experts = nn.ModuleDict({f"e{i}": Expert() for i in range(count)})
    model = nn.Module()
    model.body, model.head = body, nn.Linear(2, 2)
    return model


def test_the_graph_needs_no_forward_and_no_hook(tmp_path: Path) -> None:
    model, run = mlp(), GraphRun(tmp_path)
    log_graph(run, model)
    assert run.shapes == {"0": None, "1": None, "2": None, "3": None}
    assert run.nodes[0]["parameters"] == [["weight", [16, 8]], ["bias", [16]]]
    assert not any(part._forward_hooks for part in model.modules())


def test_an_adopted_run_keeps_the_graph_of_its_owner(tmp_path: Path) -> None:
    run = GraphRun(tmp_path)
    run.summary["graph_0"] = {"_type": "graph-file", "path": "mine"}
    log_graph(run, mlp(), is_adopted=True)
    assert (run.summary["graph_0"]["path"], run.published) == ("mine", [])


def test_the_graph_has_the_names_of_the_model_without_its_wrappers(tmp_path: Path) -> None:
    body = nn.Module()
    body.first = torch.compile(nn.Sequential(nn.Linear(2, 2)), backend="eager")  # a part of the model
    model, run = nn.Module(), GraphRun(tmp_path)
    model.body = body
    log_graph(run, model)
    (node,) = run.nodes
    assert node["parameters"] == [["first.0.weight", [2, 2]], ["first.0.bias", [2]]]


def test_the_same_model_makes_the_same_file_in_another_attempt(tmp_path: Path) -> None:
    runs = [GraphRun(tmp_path / name) for name in "ab"]
    for run in runs:
        log_graph(run, mlp())
    assert runs[0].published == runs[1].published


def test_a_graph_of_too_many_modules_is_cut_with_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    small, large = GraphRun(tmp_path / "small"), GraphRun(tmp_path / "large")
    with torch.device("meta"):  # without values
        few, many = experts(250), experts(1300)
    log_graph(small, few)
    with caplog.at_level(logging.INFO, logger="harness"):
        log_graph(large, many)
    body, head = small.nodes
    assert len(body["parameters"]) == len(body["num_parameters"]) == 1000
    assert body["class_name"].count("Linear") == 500
    body, head = large.nodes
    assert (body["name"], body["class_name"], body["num_parameters"]) == ("body", "Module", [1300 * 22])
    assert "parameters" not in body
    assert (head["class_name"], head["num_parameters"]) == ("Linear", [6])
    assert "it has over 5000 modules" in caplog.text
