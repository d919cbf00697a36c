"""What W&B refuses for good is told as that, with what to change; what may pass stays an outage."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from wandb.errors import AuthenticationError, CommError, Error

from harness.errors import ConfigError
from harness.tracking import TrackingConfig, trackers
from harness.tracking.run.refusals import why_refused
from tests.support.faulty_training import Training
from tests.support.launching import finish
from tests.support.wandb.artifact_processes import environment
from tests.support.wandb_server import API_KEY, WandbServer

GIVEN = {"entity": "theirs", "project": "mine", "id": "abc"}
HINT = "\nConsider increasing the init_timeout setting:\n  wandb.init(settings=wandb.Settings(init_timeout=...))"
RESUME = "Failed to get resume status for run abc: "
KEY, PLACE = "run `wandb login --relogin`, or put WANDB_API_KEY right", "--wandb_entity=theirs (WANDB_ENTITY) must be"
ID = "give another --wandb_run_id (WANDB_RUN_ID) than abc, or none"
DELETED = "run a/b/abc was previously created and deleted; try a new run name"


# The texts are those of wandb 0.31.
@pytest.mark.parametrize(
    ("error", "said", "remedy"),
    [
        (CommError("permission denied"), "permission denied", PLACE),
        (CommError("entity theirs not found during upsertBucket"), "entity theirs not found", PLACE),
        (CommError("invalid tag 'x'. must be between 1 and 64 characters"), "invalid tag", "put right what it names"),
        (CommError("user is not logged in"), "user is not logged in", KEY),
        (CommError(f"Timed out while retrying: HTTP 409: {DELETED}{HINT}"), DELETED, ID),
        (CommError("<no message>"), "without a reason", "wandb login --relogin"),
        (CommError(f'{RESUME}returned error 401: {{"data":null,"errors":[{{"message":"no user"}}]}}'), "no user", KEY),
        (CommError(f'{RESUME}returned error 403: {{"data":null}}'), '{"data":null}', PLACE),
        (CommError(f'{RESUME}returned error 404: {{"data":null}}'), '{"data":null}', PLACE),
        (AuthenticationError("API key must be 40 characters long, yours was 5"), "yours was 5", KEY),
    ],
)
def test_a_refusal_says_what_was_refused_and_what_to_change(error: Exception, said: str, remedy: str) -> None:
    told = why_refused(error, GIVEN)
    assert told is not None
    assert told.startswith("W&B refuses the run (")
    assert said in told
    assert remedy in told
    assert "init_timeout" not in told


@pytest.mark.parametrize(
    "error",
    [
        *(CommError(f'Timed out while retrying: HTTP {code}: {{"error":"x"}}{HINT}') for code in (408, 429, 500, 503)),
        CommError(f'Timed out while retrying: Post "http://127.0.0.1:9/graphql": EOF{HINT}'),
        CommError(f"Timed out initializing run: POST http://x/graphql giving up: context deadline exceeded{HINT}"),
        CommError(f'{RESUME}context deadline exceeded\nwhile retrying: HTTP 500: {{"error":"x"}}'),
        CommError(f"{RESUME}POST http://x/graphql giving up after 1 attempt(s): context deadline exceeded"),
        CommError("Run initialization has timed out after 90.0 sec."),
        Error("Error initializing run: input: something went wrong"),
        ConnectionResetError("reset"),
    ],
)
def test_what_may_pass_is_an_outage(error: Exception) -> None:
    assert why_refused(error, GIVEN) is None


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"wandb_project": "a/b"}, "--wandb_project=a/b is refused by wandb: Invalid project name"),
        ({"project": "a#b"}, "--project=a#b is refused by wandb: Invalid project name"),
        ({"wandb_run_id": "a/b"}, "--wandb_run_id=a/b is refused by wandb: Run ID cannot contain"),
    ],
)
def test_names_that_wandb_refuses_are_refused_before_a_run_is_opened(flags: dict[str, str], named: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(named)):
        trackers(TrackingConfig(**flags), dir="out")


OPENED = """
import json, sys, urllib.request
from harness.errors import ConfigError
from harness.tracking import TrackingConfig
from harness.tracking.run.open import open_run

def control(method, body):
    url = f"{sys.argv[1]}/_control/faults"
    urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), method=method)).close()

for number, fault in enumerate(json.loads(sys.argv[2])):
    control("POST", {"kind": "status", "match": "graphql UpsertBucket", **fault})
    for mode in ("auto", "online"):
        config = TrackingConfig(wandb_mode=mode, wandb_project="mine", wandb_entity="tester", wandb_run_id=f"{number}")
        try:
            run = open_run(config, config.init_kwargs(), stop=print)
        except ConfigError as error:
            print(mode, "error", error)
        else:
            print(mode, "offline" if run.offline else "online")
            run.finish()
    control("DELETE", {})
"""


@pytest.mark.slow
def test_a_status_that_will_not_pass_is_refused_online_and_kept_offline_else(tmp_path: Path) -> None:
    refused = {401: "user is not logged in", 404: "entity tester not found", 409: DELETED, 422: "name is too long"}
    faults = [{"code": code, "message": message} for code, message in refused.items()]
    faults.append({"code": 500, "message": "permission denied"})
    with WandbServer(tmp_path / "server") as server:
        variables = environment(tmp_path, server, WANDB_SILENT="true", WANDB_INIT_TIMEOUT="2")
        command = [sys.executable, "-c", OPENED, server.url, json.dumps(faults)]
        ended = finish(command, tmp_path, variables)
    assert ended.code == 0, ended.err[-3000:]
    shown, told = ended.out.splitlines(), [line for line in ended.err.splitlines() if "kept offline" in line]
    assert len(shown) == 2 * len(faults)
    for number, message in enumerate(refused.values()):
        assert shown[2 * number] == "auto offline"
        assert shown[2 * number + 1].startswith(f"online error W&B refuses the run ({message}")
        assert told[number].startswith(f"W&B refuses the run ({message}")
    assert shown[-2:] == ["auto offline", "online offline"]
    assert [line.partition(" (")[0] for line in told[len(refused) :]] == ["W&B could not be reached"] * 2
    assert API_KEY not in ended.out + ended.err


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["auto", "online"])
def test_a_refusal_ends_a_training_that_must_be_online_before_its_first_step(mode: str, tmp_path: Path) -> None:
    with WandbServer(tmp_path / "server") as server:
        server.fault("status", "graphql UpsertBucket", code=403, message="permission denied")
        training = Training(tmp_path / "run", server, wandb_mode=mode, max_steps=2, save_strategy="no")
        training.ended(2 if mode == "online" else 0)
    (line,) = [line for line in training.err.splitlines() if "W&B refuses the run (permission denied); " in line]
    assert "--wandb_entity=(your own) (WANDB_ENTITY) must be you or a team of yours" in line
    assert "could not be reached" not in training.err
    if mode == "online":
        assert line.startswith("harness train: ")
        assert not (training.output_dir / "metrics.jsonl").exists()
    else:
        assert line.endswith("the run is kept offline.")
        assert training.report[0].startswith("offline; ")


@pytest.mark.slow
def test_a_resumed_run_that_is_refused_keeps_its_rows_unless_it_must_be_online(tmp_path: Path) -> None:
    folder, more = tmp_path / "run", {"wandb_log_model": None, "resume_from_checkpoint": "auto", "save_steps": 2}
    with WandbServer(tmp_path / "server") as server:
        Training(folder, server, max_steps=2, **more).ended()
        server.fault("status", "graphql (RunResumeStatus|UpsertBucket)", code=401, message="user is not logged in")
        refused = Training(folder, server, max_steps=4, **more).ended().err
        demanded = Training(folder, server, max_steps=6, wandb_mode="online", **more).ended(2).err
        without = Training(folder, None, max_steps=6, **more).ended().err
    stays = ": the run is online and stays so; its rows wait on this disk"
    assert f"or put WANDB_API_KEY right{stays}" in refused
    assert "harness train: W&B refuses the run (user is not logged in)" in demanded
    assert f"No W&B credentials (`wandb login`){stays}" in without, "nobody has given --wandb_mode online"
    lines = (folder / "out" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[-1])["train/global_step"] == 6
