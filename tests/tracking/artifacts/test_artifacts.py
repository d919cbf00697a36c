"""WANDB_LOG_MODEL with the real client against a server on this machine, faults included."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness.errors import DeliveryError
from harness.tracking.artifacts.staging import STAGING_FOLDER, stage, waiting
from harness.tracking.artifacts.upload import deliver
from tests.support.wandb.artifact_processes import command, ended, start
from tests.support.wandb_server import WandbServer

pytestmark = pytest.mark.slow

SCRIPT = ("-m", "tests.support.wandb.artifact_scenarios")
PLAIN = (
    *("whole_way", "no_copy", "names_of_transformers", "end_only", "refused_once", "refused_always"),
    *("changed_on_the_disk", "limited", "offline"),
)
SLOW = ("cut_and_500", "set_aside", "keep", "slow_uploads", "resumed", "bad_registry", "unexpected_kinds")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WandbServer]:
    with WandbServer(tmp_path_factory.mktemp("wandb") / "server") as started:
        yield started


@dataclass
class Played:
    """What the scenarios told, and the folder they ran in."""

    results: dict[str, Any]
    folder: Path

    def __getitem__(self, name: str) -> Any:
        result = self.results[name]
        assert "error" not in result, result.get("error")
        return result


def play(names: tuple[str, ...], folder: Path, server: WandbServer) -> Played:
    """All these scenarios, one after the other in one process."""
    print(ended(start(*SCRIPT, *names, folder=folder, server=server)))
    return Played(json.loads((folder / "results.json").read_text(encoding="utf-8")), folder)


@pytest.fixture(scope="module")
def played(server: WandbServer, tmp_path_factory: pytest.TempPathFactory) -> Played:
    return play(PLAIN, tmp_path_factory.mktemp("played"), server)


@pytest.fixture(scope="module")
def played_slow(server: WandbServer, tmp_path_factory: pytest.TempPathFactory) -> Played:
    return play(SLOW, tmp_path_factory.mktemp("played_slow"), server)


def aliases(server: WandbServer, collection: str) -> dict[str, set[str]]:
    return {
        str(found.version): set(found.aliases) for found in server.artifacts(collection) if found.state == "COMMITTED"
    }


def test_artifacts_have_the_names_aliases_and_contents_promised(played: Played, server: WandbServer) -> None:
    result = played["whole_way"]
    assert result["pending"] == []
    assert result["command"] is None
    assert result["left"] == ["config.json", "model.safetensors"]
    assert sorted(result["committed"]) == [
        *("checkpoint-a-b-c:v0", "checkpoint-a-b-c:v1", "checkpoint-a-b-c:v2", "model-a-b-c:v0", "model-a-b-c:v1"),
    ]
    assert aliases(server, "checkpoint-a-b-c") == {
        "v0": {"epoch_33.33", "checkpoint_global_step_100"},
        "v1": {"epoch_66.67", "checkpoint_global_step_200", "best"},
        "v2": {"epoch_100.0", "checkpoint_global_step_300", "latest"},
    }
    assert aliases(server, "model-a-b-c") == {"v0": {"base_model"}, "v1": {"final_model", "latest"}}
    first = server.artifacts("checkpoint-a-b-c")[0]
    assert (first.type, first.logged_by) == ("model", "whole")
    assert {name: path.read_bytes() for name, path in first.contents.items()} == {
        "model.safetensors": b"whole 100 " + bytes(1000),
        "sub/deep/state.bin": b"deep whole 100",
        "empty": b"",
    }
    base, model = server.artifacts("model-a-b-c")
    assert set(base.files) == {"model_architecture.txt"}
    assert set(model.files) == {"model_architecture.txt", "model.safetensors", "config.json"}
    assert model.contents["model.safetensors"].read_text() == "final whole model.safetensors"
    assert model.contents["model_architecture.txt"].read_text() == "Model()"


def test_metadata_is_what_was_given_and_json(played: Played, server: WandbServer) -> None:
    first = server.artifacts("checkpoint-a-b-c")[0].metadata
    assert first.pop("saved_at") == pytest.approx(time.time(), abs=600)
    assert first == {
        "train/loss": 0.5,
        "eval/loss": "Infinity",
        "x": "NaN",
        "model/num_parameters": 7,
        "run_id": "whole",
    }
    base = server.artifacts("model-a-b-c")[0].metadata
    assert base == {"initial_model": True, "model_config": {"a": "NaN"}, "run_id": "whole"}


def test_a_name_that_wandb_refuses_is_changed_and_one_line_says_so(played: Played, server: WandbServer) -> None:
    (line,) = [line for line in played["whole_way"]["messages"] if "letters, digits" in line]
    assert "...-a-b-c" in line


def test_the_final_model_is_linked_to_the_registry(played: Played, server: WandbServer) -> None:
    assert played["whole_way"]["pending"] == []
    (link,) = [link for link in server.links() if link.target.endswith("/MyModel")]
    assert link.target == "test-org/wandb-registry-model/MyModel"
    assert (link.source, set(link.aliases)) == ("tester/p/model-a-b-c:v1", {"final_model", "latest"})


def test_nothing_is_copied_on_the_disk(played: Played) -> None:
    result = played["no_copy"]
    assert result["grown_bytes"] < 1_000_000, "of a checkpoint of 5 MB"
    assert result["links"] == [1, 2]
    assert result["after"] == 1, "the link is gone when W&B has it, the checkpoint is not"
    assert len(result["committed"]) == 1
    assert played["whole_way"]["copies"] == []


def test_transformers_names_put_all_into_one_collection(played: Played, server: WandbServer) -> None:
    assert played["names_of_transformers"]["pending"] == []
    assert aliases(server, "model-tnames") == {
        "v0": {"base_model"},
        "v1": {"epoch_0.33", "checkpoint_global_step_1"},
        "v2": {"final_model", "latest"},
    }


def test_end_uploads_no_checkpoint(played: Played, server: WandbServer) -> None:
    result = played["end_only"]
    assert result["committed"] == ["model-endonly:v0"]
    assert server.artifacts("checkpoint-endonly") == []


def test_a_refused_upload_is_tried_again_in_its_place(played: Played, server: WandbServer) -> None:
    assert played["refused_once"]["pending"] == []
    assert aliases(server, "checkpoint-refused") == {
        "v0": {"epoch_0.33", "checkpoint_global_step_1"},
        "v1": {"epoch_0.67", "checkpoint_global_step_2", "best", "latest"},
    }


def test_a_cut_connection_and_a_sick_server_delay_it_only(played_slow: Played, server: WandbServer) -> None:
    assert played_slow["cut_and_500"]["pending"] == []
    (found,) = [each for each in server.artifacts("checkpoint-cut") if each.state == "COMMITTED"]
    assert found.contents["model.safetensors"].read_bytes() == b"cut 1 " + bytes(300_000)
    assert any(each.get("fault") and each["label"] == "put artifact/model.safetensors" for each in server.requests())


def test_one_that_comes_late_takes_no_alias_from_a_newer_one(played_slow: Played, server: WandbServer) -> None:
    result = played_slow["set_aside"]
    assert result["pending"] == []
    assert len(result["committed"]) == 4
    assert sum("could not be uploaded" in line for line in result["messages"]) == 1
    steps = {
        next(alias for alias in found if "global_step" in alias).rpartition("_")[2]: (version, found)
        for version, found in aliases(server, "checkpoint-aside").items()
    }
    assert steps["1"][0] > steps["2"][0], "the first came later"
    assert {step: found & {"best", "latest"} for step, (_, found) in steps.items()} == {
        "1": set(),
        "2": set(),
        "3": {"best"},
        "4": {"latest"},
    }


def test_keep_checkpoints_deletes_only_this_runs_unnamed_versions(played_slow: Played, server: WandbServer) -> None:
    assert played_slow["keep"]["pending"] == []
    kept = {
        tuple(found.contents["model.safetensors"].read_bytes().split()[:2])
        for found in server.artifacts("checkpoint-shared")
        if found.state == "COMMITTED"
    }
    # The two newest, the best, the one that the user named, and the other run's.
    assert kept == {(b"other", b"1"), *((b"keeper", step) for step in (b"1", b"3", b"6", b"7"))}


def test_a_resumed_run_leaves_latest_to_the_final_model(played_slow: Played, server: WandbServer) -> None:
    assert played_slow["resumed"]["committed"] == ["model-again:v0"], "the same content stays one version"
    assert aliases(server, "model-again") == {"v0": {"base_model"}, "v1": {"final_model", "latest"}}


def test_a_link_that_fails_is_reported_with_a_command(played_slow: Played, server: WandbServer) -> None:
    result = played_slow["bad_registry"]
    assert result["committed"] == ["model-badreg:v0"]
    ((name, _, reason),) = result["pending"]
    assert name == "model-badreg:v0"
    assert "not linked to wandb-registry-nowhere/M" in reason
    assert result["command"] == (
        "harness link tester/p/model-badreg:v0 --registry wandb-registry-nowhere/M --alias final_model"
    )


def test_the_command_links_later(played_slow: Played, server: WandbServer, tmp_path: Path) -> None:
    line = played_slow["bad_registry"]["command"]
    failed = command(line, tmp_path, server)
    assert (failed.returncode, failed.stderr.count("\n")) == (1, 1), failed.stderr
    done = command(line.replace("wandb-registry-nowhere/M", "Later"), tmp_path, server)
    assert done.returncode == 0, done.stderr
    (link,) = [link for link in server.links() if link.target.endswith("/Later")]
    assert (link.source, set(link.aliases)) == ("tester/p/model-badreg:v0", {"final_model", "latest"})


def test_what_wandb_refuses_for_good_stays_staged(played: Played, server: WandbServer) -> None:
    result = played["refused_always"]
    assert result["committed"] == []
    ((_, _, reason),) = result["pending"]
    assert "CommitArtifact" in reason or "commitArtifact" in reason
    assert waiting(played.folder / "stuck" / STAGING_FOLDER)
    assert result["command"] == f"harness sync {played.folder / 'stuck'}"


def test_what_arrived_otherwise_than_sent_is_not_called_delivered(tmp_path: Path) -> None:
    given = {"entity": "e", "project": "p", "run_id": "r", "saved_at": 1.0, "metadata": {}, "description": ""}
    staged = stage(tmp_path, links={}, texts={"a": "text"}, name="model-x", aliases=["final_model"], **given)
    arrived = SimpleNamespace(digest="another", manifest=SimpleNamespace(digest=lambda: "another"))
    api = SimpleNamespace(artifact=lambda name: arrived if name == "e/p/model-x:v0" else None)
    sent = SimpleNamespace(qualified_name="e/p/model-x:v0", name="model-x:v0")
    with pytest.raises(DeliveryError, match="model-x:v0 differs from what was sent"):
        deliver(staged, api=lambda: api, log=lambda *_: sent, may_be_late=False)
    assert waiting(tmp_path) == [staged]


def test_what_was_changed_after_staging_is_not_uploaded(played: Played, server: WandbServer) -> None:
    result = played["changed_on_the_disk"]
    assert result["committed"] == ["checkpoint-changed:v0"]
    ((_, _, reason),) = result["pending"]
    assert "model.safetensors was changed after it was staged" in reason
    assert len([each for each in server.artifacts("checkpoint-changed") if each.state == "COMMITTED"]) == 1


def test_slow_uploads_stall_nothing_and_come_in_order(played_slow: Played, server: WandbServer) -> None:
    result = played_slow["slow_uploads"]
    assert sorted(result["took"])[-2] < 0.05, "one may be hit by something else on this machine"
    assert result["pending"] == []
    assert sum("slower than saves" in line for line in result["messages"]) == 1
    found = aliases(server, "checkpoint-slow")
    assert [f"checkpoint_global_step_{step}" in found[f"v{step - 1}"] for step in range(1, 9)] == [True] * 8
    assert [version for version in found if "best" in found[version]] == ["v4"]
    assert [version for version in found if "latest" in found[version]] == ["v7"]


def test_whatever_wandb_raises_reaches_the_report_only(played_slow: Played) -> None:
    result = played_slow["unexpected_kinds"]
    assert result["committed"] == []
    refused, absent = result["pending"]
    assert "already exists with type 'dataset'" in refused[2]
    assert "could not be staged" in absent[2]
    assert sum("could not be staged" in line for line in result["messages"]) == 1


def test_a_limit_ends_the_waiting_and_the_next_attempt_delivers(played: Played, server: WandbServer) -> None:
    first = played["limited"]["first"]
    assert first["seconds"] < 3, "the server hangs"
    assert {reason for _, _, reason in first["pending"]} == {"not confirmed for 1 s"}
    assert first["command"] == f"harness sync {played.folder / 'limited'}"
    assert played["limited"]["pending"] == []
    found = aliases(server, "checkpoint-limited")
    steps = [alias for version in sorted(found) for alias in found[version] if "global_step" in alias]
    assert steps == [f"checkpoint_global_step_{step}" for step in (1, 2, 3)]
    assert {version for version, names in found.items() if names & {"best", "latest"}} == {"v1", "v2"}
    assert not (played.folder / "limited" / STAGING_FOLDER).exists()


def test_offline_the_newest_and_the_best_wait_for_wandb_sync(played: Played) -> None:
    result = played["offline"]
    assert (result["committed"], result["pending"]) == ([], [])
    assert sorted(result["staged"]) == ["checkpoint-offline"] * 2 + ["model-offline"] * 2
    assert result["command"].startswith("harness sync wandb/offline-run-")
    staged = waiting(played.folder / "offline" / STAGING_FOLDER)
    assert [each.aliases[1] for each in staged if each.name == "checkpoint-offline"] == [
        *("checkpoint_global_step_2", "checkpoint_global_step_4"),
    ]


def test_wandb_sync_delivers_what_an_offline_run_staged(played: Played, server: WandbServer) -> None:
    folder, result = played.folder, played["offline"]
    wandb_folder, output_dir = result["command"].split()[2:]
    assert output_dir == str(folder / "offline")
    for line in (f"wandb sync {wandb_folder}", result["command"]):
        done = command(line, folder, server)  # the second verifies, and removes what was staged
        assert done.returncode == 0, done.stderr
        assert aliases(server, "checkpoint-offline") == {
            "v0": {"epoch_0.67", "checkpoint_global_step_2", "best"},
            "v1": {"epoch_1.33", "checkpoint_global_step_4", "latest"},
        }
        assert aliases(server, "model-offline") == {"v0": {"base_model"}, "v1": {"final_model", "latest"}}
    assert len(server.run("offline").rows) == 1  # which `wandb sync` alone may lose, see `sync_without_rows`
    assert not (folder / "offline" / STAGING_FOLDER).exists()


def test_the_command_delivers_without_opening_the_run(played: Played, server: WandbServer) -> None:
    before = server.run("stuck")
    done = command(played["refused_always"]["command"], played.folder, server)
    assert (done.returncode, done.stderr) == (0, "")
    assert aliases(server, "checkpoint-stuck") == {"v0": {"epoch_0.33", "checkpoint_global_step_1", "latest"}}
    assert not (played.folder / "stuck" / STAGING_FOLDER).exists()
    after = server.run("stuck")
    assert (after.state, after.exit_code, after.rows) == (before.state, before.exit_code, before.rows)


def test_a_killed_run_delivers_what_was_staged_when_it_is_resumed(server: WandbServer, tmp_path: Path) -> None:
    process = start(*SCRIPT, "killed_first", folder=tmp_path, server=server)
    end = time.monotonic() + 60
    while len(list(tmp_path.glob(f"killed/{STAGING_FOLDER}/*/artifact.json"))) < 2:
        assert time.monotonic() < end
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.kill()
    process.communicate()
    server.clear_faults()
    result = play(("killed_second",), tmp_path, server)["killed_second"]
    assert result["pending"] == []
    assert aliases(server, "checkpoint-killed") == {
        "v0": {"epoch_0.33", "checkpoint_global_step_1"},
        "v1": {"epoch_0.67", "checkpoint_global_step_2", "best"},
        "v2": {"epoch_1.0", "checkpoint_global_step_3", "latest"},
    }


def test_the_server_knows_every_request(played: Played, server: WandbServer) -> None:
    assert played.results
    assert server.unknown() == []
