"""Sweep files: W&B's format, and one line for everything that it does not mean here, before anything is started."""

from __future__ import annotations

import sys
from pathlib import Path
from random import Random
from typing import Any

import optuna
import pytest
import yaml

from harness.__main__ import main
from harness.errors import ConfigError
from harness.sweep.checks import check_sweep
from harness.sweep.command import TRAINING, command_of
from harness.sweep.driver import share_of
from harness.sweep.parameters import parameter_of
from harness.sweep.spec import Spec, read_spec, spec_of, sweep_files

LOSS = {"name": "eval/loss", "goal": "minimize"}
RATES = {"learning_rate": {"values": [0.1, 0.01]}}
GOOD: dict[str, Any] = {"method": "grid", "metric": LOSS, "parameters": RATES}
EVALUATES = ["--eval_strategy=steps", "--eval_steps=5"]


def spec(**changes: Any) -> Spec:
    return spec_of({**GOOD, **changes}, name="s")


def refusal(action: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        action()
    return str(caught.value)


def test_what_a_sweep_file_says() -> None:
    found = spec(
        method="bayes",
        run_cap=7,
        name="mine",
        project="p",
        early_terminate={"type": "hyperband", "max_iter": 27, "s": 2},
        metric={"name": "eval_accuracy", "goal": "maximize", "target": 0.9},
    )
    assert (found.method, found.run_cap, found.name, found.project) == ("bayes", 7, "mine", "p")
    assert (found.metric.name, found.metric.is_reached(0.95), found.metric.is_reached(0.5)) == (
        "eval/accuracy",
        True,
        False,
    )
    assert found.early_terminate is not None
    assert (found.early_terminate.low, found.early_terminate.high, found.early_terminate.eta) == (3, 27, 3)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "method": ({"method": "tpe"}, "method: tpe is not known; use one of: grid, random, bayes"),
    "no metric": ({"metric": None}, "metric: say which trial is the best"),
    "goal": ({"metric": {"name": "eval/loss", "goal": "min"}}, "metric.goal: min is not known"),
    "metric of no row": ({"metric": {"name": "accuracy"}}, "write eval/accuracy"),
    "no parameters": ({"parameters": {}}, "parameters: say what trials differ in"),
    "key": ({"parametres": RATES}, "parametres is no key of a sweep file. Did you mean parameters?"),
    "controller": ({"controller": {"type": "local"}}, "controller: the trials are chosen on this machine anyway"),
    "cap": ({"run_cap": 0}, "run_cap: 0 is no number from 1 on"),
    "bare value": ({"parameters": {"seed": 1}}, "parameters.seed: 1 stands alone"),
    "nested": ({"parameters": {"optimizer": {"parameters": RATES}}}, "nested parameters are no flags"),
    "unknown word": (
        {"parameters": {"seed": {"valeus": [1]}}},
        "parameters.seed.valeus is not known: did you mean values",
    ),
    "nothing": ({"parameters": {"seed": {"q": 1}}}, "parameters.seed says no value"),
    "normal": ({"parameters": {"seed": {"distribution": "normal"}}}, "normal is W&B's alone; use uniform"),
    "order": ({"parameters": {"seed": {"min": 5, "max": 5}}}, "min (5) is not less than max (5)"),
    "log of zero": (
        {"parameters": {"learning_rate": {"distribution": "log_uniform_values", "min": 0, "max": 1.0}}},
        "log_uniform_values is above 0, and min is 0",
    ),
    "exponents": (
        {"parameters": {"learning_rate": {"distribution": "log_uniform", "min": 1, "max": 1000}}},
        "min and max of log_uniform are exponents of e",
    ),
    "int_uniform": (
        {"parameters": {"seed": {"distribution": "int_uniform", "min": 0.5, "max": 2}}},
        "int_uniform is between integers",
    ),
    "q": ({"parameters": {"seed": {"min": 1, "max": 9, "q": 2}}}, "q does nothing with int_uniform; use q_uniform"),
    "number": ({"parameters": {"seed": {"min": "low", "max": 9}}}, "parameters.seed.min: 'low' is not a number"),
    "twice": ({"parameters": {"seed": {"values": [1, 1]}}}, "has a value twice"),
    "list": ({"parameters": {"seed": {"values": [[1]]}}}, "is no value of a flag"),
    "parts": (
        {"method": "random", "parameters": {"seed": {"values": [1, 2], "probabilities": [0.5, 0.6]}}},
        "are not parts of 1",
    ),
    "weighed grid": (
        {"parameters": {"seed": {"values": [1, 2], "probabilities": [0.5, 0.5]}}},
        "a grid has each value once",
    ),
    "weighed bayes": (
        {"method": "bayes", "parameters": {"seed": {"values": [1, 2], "probabilities": [0.5, 0.5]}}},
        "TPE learns by itself",
    ),
    "endless grid": ({"parameters": {"learning_rate": {"min": 0.1, "max": 0.2}}}, "method grid goes through `values`"),
    "huge grid": ({"parameters": {"seed": {"min": 1, "max": 5000}}}, "The grid has 5000 points"),
    "early_terminate": ({"early_terminate": {"type": "envelope"}}, "early_terminate.type: use hyperband or median"),
    "both": ({"early_terminate": {"type": "hyperband", "min_iter": 1, "max_iter": 9}}, "either min_iter, or max_iter"),
    "s": ({"early_terminate": {"type": "hyperband", "max_iter": 9, "s": 3}}, "is less than 1"),
    "eta": ({"early_terminate": {"type": "hyperband", "min_iter": 1, "eta": 1}}, "eta: 1 is no number from 2 on"),
    "program": ({"program": "mine.py"}, "program: mine.py is not run here"),
    "no args": ({"command": ["python", "-m", "harness", "train"]}, "it has no ${args}"),
    "other command": ({"command": ["python", "mine.py", "${args}"]}, "it starts no training"),
    "macro": ({"command": ["${env}", "-m", "harness", "train", "${args_json}"]}, "${args_json} is not taken"),
    "launcher": (
        {"command": ["no-such-launcher", "-m", "harness", "train", "${args}"]},
        "The launcher no-such-launcher is not on the PATH",
    ),
    "population": ({"population": {"size": 4}}, "only method population reads it"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_means_nothing_is_refused(name: str) -> None:
    changes, said = WRONG[name]
    assert said in refusal(lambda: spec(**changes))


def test_all_mistakes_of_a_file_are_said_at_once() -> None:
    said = refusal(lambda: spec(method="tpe", run_cap=0, parameters={"seed": {"values": []}}))
    assert all(part in said for part in ("3 mistakes", "method: tpe", "run_cap: 0", "parameters.seed.values"))


OF_FLAGS: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "misspelt": ({"learning_rat": {"value": 1}}, [], "learning_rate?"),
    "refused": ({"warmup_ratio": {"value": 0.1}}, [], "--warmup_steps takes a share"),
    "ours": ({"output_dir": {"values": ["a", "b"]}}, [], "output_dir can not be searched: each trial has its folder"),
    "value": ({"learning_rate": {"values": [0.1, "fast"]}}, [], "--learning_rate: invalid float value: 'fast'"),
    "checked value": ({"logging_strategy": {"values": ["steps", "bogus"]}}, [], "logging_strategy=bogus is not known"),
    "range of texts": ({"optim": {"min": 1, "max": 2}}, [], "optim is no number: give `values`"),
    "fractions": ({"seed": {"min": 1.5, "max": 2.5}}, [], "seed is an integer: use int_uniform"),
    "given twice": (RATES, ["--learning_rate=1"], "--learning_rate is a parameter of the sweep"),
    "folder": (RATES, ["--output_dir=x"], "--output_dir (command line) is for one run"),
    "unknown flag": (RATES, ["--no_such_flag=1"], "--no_such_flag is not a known flag"),
    "last of several": ({"learning_rate": {"value": 1}, "save_steps": {"values": [5, -5]}}, [], "save_steps=-5"),
}


@pytest.mark.parametrize("name", OF_FLAGS)
def test_parameters_are_flags_and_their_values_parse(name: str) -> None:
    parameters, flags, said = OF_FLAGS[name]
    assert said in refusal(lambda: check_sweep(spec(method="random", parameters=parameters), [*EVALUATES, *flags]))


def test_trials_have_to_be_evaluated() -> None:
    never = ["--eval_strategy=no", "--load_best_model_at_end=false"]
    assert "give --eval_strategy steps or epoch" in refusal(lambda: check_sweep(spec(), never))
    early = spec(early_terminate={"type": "median"}, metric={"name": "train/loss"})
    assert "early_terminate goes by evaluations" in refusal(lambda: check_sweep(early, EVALUATES))


@pytest.mark.parametrize("name", [name for name in sweep_files() if "population" not in name])
def test_a_shipped_sweep_is_one_and_no_recipe(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    check_sweep(read_spec(name), [])
    assert main(["train", "--config", name]) == 2
    assert f"is the file of a sweep: harness sweep {name}" in capsys.readouterr().err


def test_a_file_that_is_none_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torn, double, text = tmp_path / "torn.yaml", tmp_path / "double.yaml", tmp_path / "text.yaml"
    torn.write_text("method: [grid")
    double.write_text("method: grid\nmethod: bayes\n")
    text.write_text("grid")
    for path, said in ((torn, "is not valid YAML"), (double, "is given 2 times"), (text, "holds no mapping")):
        assert main(["sweep", str(path)]) == 2
        assert said in capsys.readouterr().err
    assert main(["sweep", "rte_gird"]) == 2
    assert "no shipped sweep of that name; sweeps: rte_bayes, rte_grid" in capsys.readouterr().err


def test_bad_options_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump({**GOOD, "method": "random"}))
    cases = {
        (): "give --count N, or run_cap",
        ("--count=0",): "--count=0: use 1 or more",
        ("--count=2", "--workers=0"): "--workers=0: use 1 or more",
        ("--count=2", "--study=a/b"): "leave slashes out",
        ("--count=2", "--launcher=gone x"): "The launcher gone is not on the PATH",
        ("--count=2", "--storage=nosuch://x"): "--storage=nosuch://x can't be opened",
    }
    for options, said in cases.items():
        assert main(["sweep", str(path), *options, "--", *EVALUATES]) == 2
        assert said in capsys.readouterr().err
    assert main(["sweep", "--show", "gone"]) == 2
    assert "runs/gone holds no study" in capsys.readouterr().err


def test_a_missing_optuna_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "optuna", None)
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(GOOD))
    assert main(["sweep", "s.yaml", "--", *EVALUATES]) == 2
    assert capsys.readouterr().err == "harness sweep: A sweep needs Optuna: pip install 'accelerate-harness[optuna]'.\n"
    assert not (tmp_path / "runs").exists()


def drawn(given: dict[str, Any], number: int = 40) -> list[Any]:
    parameter = parameter_of("p", given)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    return [parameter.suggest(study.ask()) for _ in range(number)]


def test_ranges_are_wandbs() -> None:
    assert {type(value) for value in drawn({"min": 1, "max": 3})} == {int}
    assert set(drawn({"min": 1, "max": 3})) == {1, 2, 3}
    assert set(drawn({"distribution": "q_uniform", "min": 8, "max": 32, "q": 8})) == {8, 16, 24, 32}
    assert set(drawn({"distribution": "q_uniform", "min": 0, "max": 0.3, "q": 0.1})) == {0.0, 0.1, 0.2, 0.3}
    small = drawn({"distribution": "log_uniform_values", "min": "1e-5", "max": 1e-1})
    assert min(small) < 1e-4
    assert max(small) > 1e-2
    assert all(1.0 <= value <= 2.71829 for value in drawn({"distribution": "log_uniform", "min": 0, "max": 1}))
    assert set(drawn({"distribution": "q_log_uniform_values", "min": 1, "max": 4})) == {1, 2, 3, 4}
    assert set(drawn({"value": True})) == {True}
    weighed = parameter_of("p", {"values": ["a", "b"], "probabilities": [0.0, 1.0]})
    assert {weighed.draw(Random(seed)) for seed in range(20)} == {"b"}
    assert parameter_of("p", {"min": 1, "max": 3}).points() == (1, 2, 3)


def test_the_command_of_a_sweep_file_is_wandbs() -> None:
    assert command_of({}).words(["--a=1"])[1:] == [*TRAINING, "--a=1"]
    given = ["${env}", "python", "-m", "accelerate.commands.launch", "-m", "harness", "train", "--seed=1", "${args}"]
    command = command_of({"command": given})
    assert command.flags == ("--seed=1",)
    assert command.words(["--a=1"]) == [
        "/usr/bin/env",
        "python",
        "-m",
        "accelerate.commands.launch",
        *TRAINING,
        "--a=1",
    ]
    script = command_of(
        {"program": "harness/train.py", "command": ["${env}", "${interpreter}", "${program}", "${args}"]}
    )
    assert script.words(["--a=1"])[-4:] == [*TRAINING, "--a=1"]


def test_workers_share_the_cards() -> None:
    assert [share_of(["0", "1", "2", "3"], i, 2) for i in range(2)] == [["0", "1"], ["2", "3"]]
    assert [share_of(["a"], i, 2) for i in range(2)] == [["a"], ["a"]]
    assert share_of([], 0, 2) == []
