"""What W&B decides of a sweep's run is left to it, and it is asked whether the run is to stop."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from harness.tracking.client import is_stopped
from harness.tracking.run.sweep import of_sweep, record, unlocked
from tests.support.wandb.serving import answering, serving

GIVEN = {
    "learning_rate": 0.1,
    "_wandb": {"t": 1},
    "seed": 1,
    "harness": {"sweep_parameters": ["learning_rate"]},
    "tags": ["a"],
}


@pytest.fixture
def under_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an agent starts a run for the second time."""
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({name: {"value": value} for name, value in GIVEN.items()}))
    for name, value in {"SWEEP_ID": "s", "RUN_ID": "r", "SWEEP_PARAM_PATH": str(file)}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)


@pytest.mark.usefixtures("under_agent")
def test_what_an_agent_has_given_stays_and_what_differs_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    values = {"learning_rate": 0.2, "seed": 2, "tags": ["a"], "harness": {}, "new": 3}
    with caplog.at_level(logging.WARNING):
        assert unlocked(values) == {"new": 3}
    assert caplog.messages == [
        "W&B goes on showing what the sweep's run had, though this training has another value: seed."
    ]
    assert record() == {"sweep_parameters": ["learning_rate"]}


@pytest.mark.usefixtures("under_agent")
def test_which_run_it_is_is_left_to_w_and_b() -> None:
    assert of_sweep({"project": "p", "entity": "e", "id": "i", "resume": "allow"}) == {"resume": "allow"}


def test_without_an_agent_all_is_as_it_was() -> None:
    assert unlocked(GIVEN) == GIVEN
    assert of_sweep({"project": "p"}) == {"project": "p"}
    assert record() == {}


def answer(run: Any, sweep: Any) -> dict[str, Any]:
    return {"data": {"project": {"run": run, "sweep": sweep}}}


GOES_ON, RUNNING = {"stopped": False, "shouldStop": None}, {"state": "RUNNING"}
ANSWERS = [
    (answer(GOES_ON, RUNNING), False),
    (answer({**GOES_ON, "stopped": True}, RUNNING), True),
    (answer({**GOES_ON, "shouldStop": True}, RUNNING), True),
    (answer(GOES_ON, {"state": "CANCELED"}), True),
    (answer(GOES_ON, None), False),
    (answer(None, RUNNING), False),
    ({"data": None, "errors": [{"message": "no"}]}, False),
    ([], False),
]


@pytest.mark.parametrize(("said", "expected"), ANSWERS, ids=lambda each: json.dumps(each)[:60])
def test_w_and_b_is_asked_whether_a_run_is_to_stop(said: Any, expected: bool) -> None:
    names = {"entity": "e", "project": "p", "run_id": "r", "sweep_id": "s", "api_key": "k" * 40}
    with serving(answering(said)) as url:
        assert is_stopped(SimpleNamespace(base_url=url, **names)) is expected
    assert not is_stopped(SimpleNamespace(base_url=url, **names)), "it is gone"
