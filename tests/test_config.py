"""The parser: command line and YAML to frozen sections."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.config import RECIPES_DIR, Json, arg, build_sections, flags_of, read_argv, read_yaml, recipe_names, section
from harness.errors import ConfigError
from harness.flags import FLAGS, NOT_CONFIGURATION, Config, parse
from harness.train import main
from harness.training.flags import DEBUG_DEFAULTS


@section("small")
@dataclass(frozen=True, kw_only=True)
class Small:
    """A section with a field of each kind."""

    rate: float = arg(0.5, "At most 100 % of it (%d, %s).")
    count: int = arg(3, "A number.")
    limit: int | None = arg(help="A number or nothing.")
    share: float | None = arg(help="A number or nothing.")
    name: str | None = arg(help="Text.")
    names: list[str] = arg(["a"], "Texts.")
    shuffle: bool = arg(True, "A switch that is on.")
    cache: bool = arg(False, "A switch that is off.")
    tristate: bool | None = arg(help="Neither, unless it is given.")
    options: Json | None = arg(help="A dictionary.")


def small(*argv: str, base: Mapping[str, Any] | None = None) -> Small:
    given, problems = read_argv(argv, flags_of(Small), {"gone": "use --count"})
    if problems:
        raise ConfigError(*problems)
    (found,) = build_sections([Small], {**(base or {}), **given})
    assert isinstance(found, Small)
    return found


def from_yaml(text: str, folder: Path, *argv: str) -> Small:
    path = folder / "small.yaml"
    path.write_text(text, encoding="utf-8")
    values, problems = read_yaml(str(path), flags_of(Small), refused={})
    if problems:
        raise ConfigError(*problems)
    return small(*argv, base=values)


def sections_of(config: Config) -> list[Any]:
    return [getattr(config, field.name) for field in dataclasses.fields(config)]


def test_every_section_is_frozen_and_keyword_only() -> None:
    for each in sections_of(parse([])):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(each, dataclasses.fields(each)[0].name, None)
        with pytest.raises(TypeError):
            type(each)(None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        parse([]).run = None  # type: ignore[assignment, misc]


def test_sections_stay_as_they_are_after_parsing() -> None:
    before = {field.name: field.type for field in dataclasses.fields(Small)}
    small("--limit", "2")
    assert {field.name: field.type for field in dataclasses.fields(Small)} == before


def test_no_two_sections_share_a_flag() -> None:
    names = [field.name for section in sections_of(parse([])) for field in dataclasses.fields(section)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("rate: 1e-3", "rate", 1e-3),
        ("rate: 5", "rate", 5.0),
        ("share: 1e-1", "share", 0.1),
        ("count: 7", "count", 7),
        ("limit: null", "limit", None),
        ("count: null", "count", 3),
        ("limit: 4", "limit", 4),
        ("names: [b, c]", "names", ["b", "c"]),
        ("names: [b]", "names", ["b"]),
        ("shuffle: false", "shuffle", False),
        ("cache: true", "cache", True),
        ("tristate: false", "tristate", False),
        ("tristate: true", "tristate", True),
        (
            "options: {power: 2, names: [x], deep: {a: true}}",
            "options",
            {"power": 2, "names": ["x"], "deep": {"a": True}},
        ),
        ("name: 'two words, 100 % = all'", "name", "two words, 100 % = all"),
        ("name: '--count'", "name", "--count"),
        ("name: '12'", "name", "12"),
        ("name: ''", "name", ""),
    ],
)
def test_yaml_gives_the_field_its_type(text: str, name: str, value: Any, tmp_path: Path) -> None:
    found = getattr(from_yaml(text, tmp_path), name)
    assert found == value
    assert type(found) is type(value) or isinstance(found, type(value))


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--rate", "1e-3"], "rate", 1e-3),
        (["--rate=-1"], "rate", -1.0),
        (["--rate", "-1"], "rate", -1.0),
        (["--names", "b", "c"], "names", ["b", "c"]),
        (["--no_shuffle"], "shuffle", False),
        (["--no-shuffle"], "shuffle", False),
        (["--shuffle", "false"], "shuffle", False),
        (["--cache"], "cache", True),
        (["--cache", "True"], "cache", True),
        (["--tristate"], "tristate", True),
        (["--tristate", "false"], "tristate", False),
        (["--options", '{"power": 2}'], "options", {"power": 2}),
        (["--options={}"], "options", {}),
    ],
)
def test_command_line_gives_the_field_its_type(argv: list[str], name: str, value: Any) -> None:
    assert getattr(small(*argv), name) == value


@pytest.mark.parametrize("argv", [["--coun", "3"], ["--opt", "{}"], ["--no_shuf"]])
def test_abbreviations_are_refused(argv: list[str]) -> None:
    with pytest.raises(ConfigError, match="is not a known flag"):
        small(*argv)


@pytest.mark.parametrize(
    "argv",
    [
        ["--count", "3", "--count", "4"],
        ["--count=3", "--count", "3"],
        ["--shuffle", "--no_shuffle"],
        ["--names", "a", "--names", "b"],
    ],
)
def test_repeated_flags_are_refused(argv: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"--\w+ is given 2 times; give it once"):
        small(*argv)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--count", "three"], "count.*invalid int value.*three"),
        (["--count", "1.5"], "count.*1.5"),
        (["--count"], "count.*expected one argument"),
        (["--options", "[1]"], "options"),
        (["--options", "{power: 2}"], "options"),
        (["--cache", "perhaps"], "perhaps"),
        (["stray"], "stray belongs to no flag"),
        (["--count", "3", "4"], "4 belongs to no flag"),
        (["--cuont", "3"], "--cuont.*Did you mean count"),
        (["--gone", "3"], "--gone is not supported: use --count"),
    ],
)
def test_malformed_command_lines_are_refused(argv: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        small(*argv)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("count: 3\ncount: 4\n", "`count` is given 2 times"),
        ("options: {a: 1, a: 2}\n", "`a` is given 2 times"),
        ("cuont: 3\n", "small.yaml: cuont is not a known flag.*Did you mean count"),
        ("count: three\n", "count.*three"),
        ("- count\n", "holds no mapping"),
        ("", "holds no mapping"),
        ("count: [1\n", "not valid YAML"),
        ("count: 1.5\n", "count.*1.5"),
    ],
)
def test_malformed_yaml_is_refused(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        from_yaml(text, tmp_path)


def test_yaml_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00count")
    values, (problem,) = read_yaml(str(path), flags_of(Small), refused={})
    assert "not valid YAML" in problem
    assert values == {}


def test_command_line_wins_over_yaml(tmp_path: Path) -> None:
    text = "count: 7\nnames: [b, c]\nshuffle: false\noptions: {a: 1}\nrate: 0.25\n"
    found = from_yaml(text, tmp_path, "--count", "8", "--names", "d", "--shuffle", "--options", '{"b": 2}')
    assert (found.count, found.names, found.shuffle, found.options) == (8, ["d"], True, {"b": 2})
    assert found.rate == 0.25


def test_negated_flag_wins_over_yaml(tmp_path: Path) -> None:
    assert not from_yaml("shuffle: true\n", tmp_path, "--no_shuffle").shuffle


def test_names_given_as_flags_are_told() -> None:
    assert read_argv(["--count", "3"], flags_of(Small), {}) == ({"count": "3"}, [])
    assert small("--count", "3", base={"rate": 1, "limit": None}) == Small(count=3, rate=1.0)


@pytest.mark.parametrize("recipe", recipe_names())
def test_shipped_recipe_is_found_by_its_name(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    values = yaml.safe_load((RECIPES_DIR / f"{recipe}.yaml").read_text(encoding="utf-8"))
    flat = parse(["--config", recipe]).flat()
    for name, value in values.items():
        assert flat[name] == (float(value) if isinstance(flat[name], float) else value), name


def test_a_file_goes_before_the_recipe_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("cola").write_text("seed: 5\n", encoding="utf-8")
    assert parse(["--config", "cola"]).topology.seed == 5


ELABORATE = [
    "--train_file=data 100 %.txt",
    "--learning_rate=3e-4",
    "--lr_scheduler_kwargs={\"num_cycles\": 2}",
    "--report_to",
    "none",
    "--tf32=false",
    "--dataloader_pin_memory=false",
    "--save_steps=0.25",
    "--task_args={\"deep\": {\"list\": [1, null, \"x\"]}}",
    "--optim=galore_adamw",
    "--optim_target_modules",
    "attn",
    "mlp",
    "--save_total_limit=2",
    "--include_num_input_tokens_seen",
    "--run_name=Überlauf: yes",
    "--metric_for_best_model=loss",
    "--greater_is_better=false",
]  # fmt: skip


@pytest.mark.parametrize(
    "argv", [[], ["--config=cola"], ["--debug"], ELABORATE], ids=["quickstart", "recipe", "debug", "elaborate"]
)
def test_printed_config_is_the_same_configuration_again(
    argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "printed.yaml"
    for what in ([], ["all"]):
        assert main([*argv, "--print_config", *what]) == 0
        path.write_text(capsys.readouterr().out, encoding="utf-8")
        expected, found = parse(argv).flat(), parse(["--config", str(path)]).flat()
        assert found.pop("config") == str(path)
        del expected["config"]
        assert found == expected
    assert len(yaml.safe_load(path.read_text(encoding="utf-8"))) == len(FLAGS) - len(NOT_CONFIGURATION)


def test_printed_config_says_what_differs_and_where_it_is_from(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "birds")
    path = tmp_path / "own.yaml"
    path.write_text("seed: 5\nlearning_rate: 1e-3\nmax_steps: 7\nrun_name: null\n", encoding="utf-8")
    assert main(["--config", str(path), "--debug", "--learning_rate=2e-3", "--bf16=false", "--print_config"]) == 0
    parts = capsys.readouterr().out.split("\n\n")
    shown = {part.splitlines()[0]: yaml.safe_load(part) for part in parts}
    assert shown[f"# --config {path}"] == {"seed": 5}
    assert shown["# --debug"] == {k: v for k, v in DEBUG_DEFAULTS.items() if FLAGS[k].default != v}
    assert shown["# variable WANDB_PROJECT"] == {"wandb_project": "birds"}
    assert shown["# command line"] == {"learning_rate": 2e-3, "debug": "on"}
    others = {name for name in shown if "WANDB" not in name}
    assert others == {f"# --config {path}", "# --debug", "# command line"}


def test_printed_defaults_are_a_configuration_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    assert main(["--task=causal-lm", "--print_config"]) == 0
    path = tmp_path / "printed.yaml"
    path.write_text(capsys.readouterr().out, encoding="utf-8")
    assert yaml.safe_load(path.read_text(encoding="utf-8")) == {}
    assert parse(["--config", str(path)]).task == parse(["--task=causal-lm"]).task


def test_no_token_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--token=hf_secret", "--print_config"]) == 0
    assert "hf_secret" not in capsys.readouterr().out
    assert "hf_secret" not in str(parse(["--token=hf_secret"]).flat())
