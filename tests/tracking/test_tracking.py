"""Runs with the real wandb client, each in a process of its own: wandb's state lasts as long."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.errors import ConfigError
from harness.flags import parse
from harness.tracking import TrackingConfig, WandbTracker, rewrite, run_config, store_configuration, trackers
from tests.support.launching import Ended, finish, torchrun
from tests.support.wandb.artifact_processes import environment
from tests.support.wandb.file import WandbFile, read_all

ROOT = Path(__file__).parents[2]
KEY = "0123456789abcdef0123456789abcdef01234567"
SECRET = "hf_averysecrettokenindeed"  # noqa: S105 - that is what is looked for
CLOCK = ("_timestamp", "_runtime", "_wandb", "_wandb.runtime")

LOGS = [
    (1, {"loss": 2.5, "grad_norm": 1.25, "learning_rate": 5e-5, "epoch": 0.1}),
    (2, {"loss": float("nan"), "grad_norm": float("inf"), "learning_rate": 4e-5, "epoch": 0.2}),
    (2, {"eval_loss": 2.25, "eval_accuracy": 0.5, "eval_runtime": 0.5, "epoch": 0.2}),
    (3, {"eval_en_loss": 2.0, "eval_a/b_loss": 1.0, "test_loss": 3.0, "epoch": 0.3}),
    (4, {"loss": 1.5, "num_input_tokens_seen": 128, "epoch": 0.4}),
    (
        4,
        {
            "train_runtime": 1.5,
            "train_samples_per_second": 10.0,
            "train_steps_per_second": 2.0,
            "train_loss": 2.0,
            "total_flos": 1e9,
            "epoch": 0.4,
        },
    ),
]

PAIR = f"""
import json, sys
from transformers import GPT2Config, GPT2LMHeadModel, TrainerControl, TrainerState, TrainingArguments

who, folder, logs = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=16, n_positions=8))
args = TrainingArguments(
    output_dir=folder, run_name="a run", use_cpu=True, report_to="none", hub_token={SECRET!r}
)
if who == "trainer":
    import wandb
    from transformers.integrations import WandbCallback

    callback, state = WandbCallback(), TrainerState(is_world_process_zero=True)
    callback.on_train_begin(args, state, TrainerControl(), model=model)
    for state.global_step, values in logs:
        callback.on_log(args, state, TrainerControl(), model=model, logs=values)
    wandb.finish()
else:
    from accelerate import Accelerator
    from harness.tracking import WandbTracker, run_config

    accelerator = Accelerator(cpu=True, log_with=WandbTracker(run_name="a run", dir=folder))
    given = {{**args.to_dict(), "hub_token": {SECRET!r}, "token": {SECRET!r}}}
    accelerator.init_trackers("ignored", config=run_config(model, given))
    for step, values in logs:
        accelerator.log(values, step=step)
    accelerator.end_training()
"""

OWN_LOOP = """
import sys
import torch
from accelerate import Accelerator
from harness.tracking import WandbTracker

accelerator = Accelerator(cpu=True, log_with=WandbTracker(run_name="mine", dir=sys.argv[1]))
accelerator.init_trackers("project", config={"learning_rate": 0.1, "hub_token": "SECRET"})
tracker = accelerator.get_tracker("wandb")
model = torch.nn.Linear(2, 1)
model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
for step in range(1, 4):
    loss = model(torch.ones(4, 2)).square().mean()
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    accelerator.log({"loss": loss.item()}, step=step)
accelerator.log({"own/text": "hello"})
print("RUN", accelerator.get_tracker("wandb", unwrap=True).id)
accelerator.end_training()
print("WHERE", tracker.describe())
""".replace("SECRET", SECRET)

ADOPTED = """
import sys
import wandb
from accelerate import Accelerator
from harness.tracking import WandbTracker

run = wandb.init(project="theirs", name="their name", dir=sys.argv[1])
accelerator = Accelerator(cpu=True, log_with=WandbTracker(run_name="ours", project="ours", dir=sys.argv[1]))
accelerator.init_trackers("ignored", config={"x": 1})
accelerator.log({"loss": 1.0}, step=1)
accelerator.end_training()
assert wandb.run is run
run.log({"after": 1})
run.finish()
"""

DEAD_CORE = """
import os, pathlib, signal, sys, time
from accelerate import Accelerator
from harness.tracking import WandbTracker

accelerator = Accelerator(cpu=True, log_with=WandbTracker(dir=sys.argv[1]))
accelerator.init_trackers("project", config={"x": 1})
accelerator.log({"loss": 1.0}, step=1)
killed = 0
for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
    try:
        name, fields = stat.read_text().split("(", 1)[1].rsplit(")", 1)
    except OSError:
        continue
    if name == "wandb-core" and int(fields.split()[1]) == os.getpid():
        os.kill(int(stat.parent.name), signal.SIGKILL)
        killed += 1
assert killed == 1, killed
time.sleep(0.5)
for step in range(2, 5):
    accelerator.log({"loss": 1.0, "train_loss": 1.0}, step=step)
accelerator.end_training()
print("TRAINED")
"""

RANKS = """
import pathlib, sys
from accelerate import Accelerator
from harness.tracking import WandbTracker

tracker = WandbTracker(dir=sys.argv[1])
accelerator = Accelerator(cpu=True, log_with=tracker)
accelerator.init_trackers("project", config={"x": 1})
rank, world = accelerator.process_index, accelerator.num_processes
tracker.start()
tracker.store_init_configuration({"y": 1})
tracker.log({"loss": float(rank)}, step=rank)
silent = tracker.tracker is None and "wandb" not in sys.modules
pathlib.Path(sys.argv[1], f"rank-{rank}").write_text(f"{world} {silent} {bool(tracker.describe())}")
tracker.finish()
accelerator.end_training()
"""

TENSORBOARD = """
import sys
from pathlib import Path
import torch
from accelerate import Accelerator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from harness.tracking import TrackingConfig, rewrite, run_config, store_configuration, trackers

config = TrackingConfig(report_to=["tensorboard"], project="boards")
accelerator = Accelerator(cpu=True, log_with=trackers(config, dir=sys.argv[1]), project_dir=sys.argv[1])
accelerator.init_trackers(config.project)
values = run_config(torch.nn.Linear(2, 1), {"lr": 0.1, "nothing": None, "names": ["a"], "token": "SECRET"})
store_configuration(accelerator.trackers, values)
accelerator.log(rewrite({"loss": 2.0}), step=1)
accelerator.log(rewrite({"loss": 1.0}), step=2)
accelerator.end_training()
events = EventAccumulator(str(Path(sys.argv[1], "boards"))).Reload()
print([(event.step, event.value) for event in events.Scalars("train/loss")])
assert "wandb" not in sys.modules
""".replace("SECRET", SECRET)


def run(script: str, *argv: str, folder: Path, **variables: str) -> Ended:
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-c", script, *argv]
    ended = finish(command, folder, environment(folder, WANDB_SILENT="true", **variables))
    assert ended.code == 0, ended.err[-3000:]
    return ended


def without_clock(values: Mapping[str, Any]) -> dict[str, str]:
    # As text: NaN equals itself there.
    return {name: repr(value) for name, value in values.items() if name not in CLOCK}


def files_with(text: str, folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, WandbFile]:
    """The same logs through the Trainer's callback and through ours."""
    folders = {who: tmp_path_factory.mktemp(who) for who in ("trainer", "ours")}
    with ThreadPoolExecutor() as both:
        started = [
            both.submit(run, PAIR, who, str(folder), json.dumps(LOGS), folder=folder, WANDB_MODE="offline")
            for who, folder in folders.items()
        ]
        for future in started:
            future.result()
    return {who: read_all(folder)[0] for who, folder in folders.items()}


def test_offline_run_holds_the_rows_of_the_trainers_callback(pair: dict[str, WandbFile]) -> None:
    theirs, ours = (list(map(without_clock, pair[who].rows)) for who in ("trainer", "ours"))
    # The Trainer rewrites a name with a slash too when it starts with eval_: so do we.
    assert len(ours) == len(LOGS)
    assert ours == theirs


def test_offline_run_holds_the_summary_of_the_trainers_callback(pair: dict[str, WandbFile]) -> None:
    assert without_clock(pair["ours"].summary) == without_clock(pair["trainer"].summary)
    assert pair["ours"].summary["train_loss"] == 2.0


def test_offline_run_holds_the_config_of_the_trainers_callback(pair: dict[str, WandbFile]) -> None:
    theirs, ours = (without_clock(pair[who].config) for who in ("trainer", "ours"))
    assert ours.pop("token") == "'<TOKEN>'"
    different = {name for name in {*theirs, *ours} if theirs.get(name) != ours.get(name)}
    assert different <= {"output_dir", "logging_dir"}
    assert pair["ours"].config["hub_token"] == "<HUB_TOKEN>"  # noqa: S105 - the mask
    assert pair["ours"].config["model/num_parameters"] > 0


def test_offline_run_has_the_axes_project_and_name_of_the_trainers_callback(
    pair: dict[str, WandbFile],
) -> None:
    theirs, ours = pair["trainer"], pair["ours"]
    assert ours.metrics == theirs.metrics
    assert ours.metrics
    assert (ours.project, ours.display_name, ours.exit_code) == (theirs.project, theirs.display_name, 0)
    assert (ours.project, ours.display_name) == ("huggingface", "a run")


def test_no_file_of_a_run_holds_a_token(pair: dict[str, WandbFile]) -> None:
    assert files_with("<HUB_TOKEN>", pair["ours"].path.parent)
    assert not files_with(SECRET, pair["ours"].path.parent.parent.parent)


@pytest.fixture(scope="module")
def own_loop(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Somebody's own Accelerate loop, on a terminal where wandb would prompt, without credentials."""
    folder = tmp_path_factory.mktemp("own")
    controller, terminal = pty.openpty()
    try:
        result = subprocess.run(
            [sys.executable, "-c", OWN_LOOP, str(folder / "out")],
            env=environment(folder, WANDB_SILENT="true"),
            cwd=folder,
            stdin=terminal,
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
    finally:
        os.close(terminal)
        os.close(controller)
    return folder, Ended(result.returncode, result.stdout, result.stderr)


def test_an_own_accelerate_loop_gets_its_rows(own_loop: tuple[Path, Any]) -> None:
    (saved,) = read_all(own_loop[0])
    assert [row["train/global_step"] for row in saved.rows[:3]] == [1, 2, 3]
    assert [row["_step"] for row in saved.rows] == [0, 1, 2, 3]
    assert all(row["train/loss"] > 0 for row in saved.rows[:3])
    assert saved.rows[3]["own/text"] == "hello"
    assert (saved.display_name, saved.config["learning_rate"], saved.config["hub_token"]) == (
        *("mine", 0.1),
        "<HUB_TOKEN>",
    )
    assert not files_with(SECRET, own_loop[0])


def test_without_credentials_the_run_is_offline_and_one_line_says_so(own_loop: tuple[Path, Any]) -> None:
    folder, result = own_loop
    (saved,) = read_all(folder)
    directory = str(saved.path.parent.relative_to(folder))  # as one types it where the training was started
    assert directory.startswith("out/wandb/offline-run-")
    (line,) = [line for line in result.err.splitlines() if "credentials" in line]
    assert line == "No W&B credentials (`wandb login`): the run is kept offline."
    assert f"WHERE offline; upload it with `harness sync {directory}`" in result.out


def test_the_commands_that_the_line_names_exist_and_read_the_run(own_loop: tuple[Path, Any]) -> None:
    (saved,) = read_all(own_loop[0])
    leet = run(
        "import sys; from wandb.cli.cli import cli; cli(sys.argv[1:])",
        *("leet", "inspect", "--summary", str(saved.path.parent)),
        folder=own_loop[0],
    )
    assert "mine" in leet.out


class Refusing(BaseHTTPRequestHandler):
    """A server that is there, and takes no key."""

    def do_GET(self) -> None:
        self._answer(200)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(401)

    def _answer(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def refusing_server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def check_fallback(folder: Path, result: Ended, said: str = "W&B could not be reached") -> None:
    saved = [file for file in read_all(folder) if "offline-run" in str(file.path)]
    assert [len(file.rows) for file in saved] == [4]
    assert [line for line in result.err.splitlines() if "kept offline" in line] == [
        line for line in result.err.splitlines() if line.startswith(said)
    ]
    assert result.err.count(said) == 1
    assert not files_with(KEY, folder)


@pytest.mark.slow
def test_a_refused_key_leaves_an_offline_run_and_no_key_on_disk(refusing_server: str, tmp_path: Path) -> None:
    where = {"WANDB_BASE_URL": refusing_server, "WANDB_API_KEY": KEY}
    check_fallback(tmp_path, run(OWN_LOOP, str(tmp_path / "out"), folder=tmp_path, **where), "W&B refuses the run (")


@pytest.mark.slow
def test_a_malformed_key_leaves_an_offline_run(refusing_server: str, tmp_path: Path) -> None:
    where = {"WANDB_BASE_URL": refusing_server, "WANDB_API_KEY": "short"}
    check_fallback(tmp_path, run(OWN_LOOP, str(tmp_path / "out"), folder=tmp_path, **where), "W&B refuses the run (")


@pytest.mark.slow
def test_a_server_out_of_reach_leaves_an_offline_run(tmp_path: Path) -> None:
    where = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": KEY, "WANDB_INIT_TIMEOUT": "2"}
    check_fallback(tmp_path, run(OWN_LOOP, str(tmp_path / "out"), folder=tmp_path, **where))


def test_an_open_run_is_adopted_and_left_open(tmp_path: Path) -> None:
    run(ADOPTED, str(tmp_path), folder=tmp_path, WANDB_MODE="offline")
    (saved,) = read_all(tmp_path)
    assert (saved.project, saved.display_name, saved.config["x"]) == ("theirs", "their name", 1)
    assert [row.get("train/loss") for row in saved.rows] == [1.0, None]
    assert saved.rows[1]["after"] == 1


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_training_survives_the_death_of_wandbs_process(tmp_path: Path) -> None:
    result = run(DEAD_CORE, str(tmp_path), folder=tmp_path, WANDB_MODE="offline")
    assert "TRAINED" in result.out
    assert result.err.count("W&B failed, the training goes on") == 1


@pytest.mark.slow
def test_other_ranks_are_silent(tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(RANKS, encoding="utf-8")
    variables = environment(tmp_path, WANDB_SILENT="true", WANDB_MODE="offline", OMP_NUM_THREADS="1")
    ended = finish([*torchrun(2), str(script), str(tmp_path)], tmp_path, variables)
    assert ended.code == 0, ended.err[-3000:]
    assert (tmp_path / "rank-0").read_text() == "2 False True"
    assert (tmp_path / "rank-1").read_text() == "2 True False"
    (saved,) = read_all(tmp_path)
    assert [row["train/loss"] for row in saved.rows] == [0.0]


def test_tensorboard_gets_the_same_names(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    result = run(TENSORBOARD, str(tmp_path), folder=tmp_path)
    assert result.out.splitlines()[-1] == "[(1, 2.0), (2, 1.0)]"
    assert not files_with(SECRET, tmp_path)


def test_importing_the_package_does_not_import_wandb() -> None:
    code = "import sys, harness.tracking; sys.exit('wandb' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


@pytest.fixture
def no_wandb_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)


@pytest.mark.usefixtures("no_wandb_variables")
class TestTrackers:
    def test_wandb_is_the_default_with_the_name_of_the_run(self) -> None:
        (tracker,) = trackers(TrackingConfig(run_name="x"), dir="out")
        assert isinstance(tracker, WandbTracker)
        assert tracker.name == "wandb"

    def test_none_is_none(self) -> None:
        assert trackers(TrackingConfig(report_to=["none"]), dir="out") == []

    def test_all_stands_for_all_that_are_installed(self) -> None:
        pytest.importorskip("tensorboard")
        first, *others = trackers(TrackingConfig(report_to=["all"]), dir="out")
        assert isinstance(first, WandbTracker)
        assert "tensorboard" in others

    def test_several_are_given_on_the_command_line(self) -> None:
        pytest.importorskip("tensorboard")
        config = parse(["--report_to", "wandb", "tensorboard", "wandb"]).tracking
        assert config.tracker_names() == ["wandb", "tensorboard"]

    @pytest.mark.parametrize("value", ["true", "TRUE", "1", "yes", "On"])
    def test_wandb_disabled_drops_wandb_alone(self, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WANDB_DISABLED", value)
        monkeypatch.setenv("WANDB_WATCH", "all")  # of no consequence then
        assert trackers(TrackingConfig.from_environment(), dir="out") == []
        tracker = WandbTracker()
        tracker.start()
        tracker.log({"loss": 1.0}, step=1)
        assert tracker.tracker is None

    @pytest.mark.parametrize("value", ["", "false", "False", '"false"'])
    @pytest.mark.parametrize("name", ["WANDB_LOG_MODEL", "WANDB_WATCH"])
    def test_what_is_switched_off_is_accepted(self, name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(name, value)
        (tracker,) = trackers(TrackingConfig.from_environment(), dir="out")
        assert isinstance(tracker, WandbTracker)
        assert (tracker.config.wandb_log_model, tracker.config.wandb_watch) == ("false", "false")

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("WANDB_LOG_MODEL", "checkpoints", r"\(WANDB_LOG_MODEL\)=checkpoints .*false, end, checkpoint"),
            ("WANDB_LOG_MODEL", "true", r"\(WANDB_LOG_MODEL\)=true .*false, end, checkpoint"),
            ("WANDB_WATCH", "grads", r"\(WANDB_WATCH\)=grads .*false, gradients, parameters, all"),
            ("WANDB_MODE", "foo", r"\(WANDB_MODE\)=foo .*auto, online, offline, disabled"),
            ("WANDB_RESUME", "maybe", r"\(WANDB_RESUME\)=maybe .*allow, must, never, auto"),
            ("WANDB_RESUME", "must", r"needs --wandb_run_id \(WANDB_RUN_ID\)"),
            ("WANDB_SILENT", "", "^WANDB_SILENT= is .*unset it"),
            ("WANDB_DISABLED", "maybe", "^WANDB_DISABLED=maybe is .*unset it"),
            ("WANDB_PROJECT", "a/b", "^WANDB_PROJECT=a/b is .*unset it"),
        ],
    )
    def test_what_would_be_ignored_or_raise_later_is_refused(
        self, name: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(name, value)
        with pytest.raises(ConfigError, match=message):
            trackers(TrackingConfig.from_environment(), dir="out")

    def test_an_unknown_tracker_is_refused_with_the_known_ones(self) -> None:
        with pytest.raises(ConfigError, match=r"wandb_ is not known; use one of: none, all, .*tensorboard.*Did you"):
            trackers(TrackingConfig(report_to=["wandb_"]), dir="out")

    def test_a_tracker_that_is_not_installed_is_refused_with_the_remedy(self) -> None:
        with pytest.raises(ConfigError, match="pip install aim"):
            trackers(TrackingConfig(report_to=["aim"]), dir="out")

    def test_none_with_others_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="none stands alone"):
            TrackingConfig(report_to=["none", "wandb"])


def test_names_rewritten_twice_are_as_rewritten_once() -> None:
    names = {"loss": 1, "eval_loss": 2, "test_x_y": 3, "own/name": 4, "train_loss": 5}
    once = rewrite(names)
    assert once == {"train/loss": 1, "eval/loss": 2, "test/x_y": 3, "own/name": 4, "train_loss": 5}
    assert rewrite(once) == once


def test_configuration_is_plain_and_counts_the_parameters_of_any_model() -> None:
    model = torch.nn.Linear(3, 2)
    arguments = {
        "path": Path("a"),
        "dtype": torch.float32,
        "names": ("a",),
        "hub_token": None,
        "nested": {"x": 1},
    }
    values = run_config(model, arguments)
    assert values == {
        "path": "a",
        "dtype": "torch.float32",
        "names": ["a"],
        "hub_token": "<HUB_TOKEN>",
        "nested": {"x": 1},
        "model/num_parameters": 8,
    }
    json.dumps(values)


def test_other_trackers_get_scalars_without_secrets() -> None:
    from accelerate.tracking import GeneralTracker

    class Keeps(GeneralTracker):  # type: ignore[misc]
        name, requires_logging_directory, tracker = "keeps", False, None

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            self.values = values

    tracker = Keeps()
    store_configuration([tracker], {"a": 1, "b": None, "c": {"d": [1]}, "e": {"my_token": SECRET}, "api_key": SECRET})
    assert tracker.values == {
        "a": 1,
        "b": "null",
        "c": '{"d": [1]}',
        "e": '{"my_token": "<MY_TOKEN>"}',
        "api_key": "<API_KEY>",
    }
