"""What is hidden in messages and records, and what is not."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.checkpoint.arguments import compare, recorded
from harness.errors import ConfigError, exit_code_of
from harness.flags import FLAGS, parse
from harness.masking import agree, is_masked, masked, masked_words, signs
from harness.tracking.flags import TrackingConfig, check_environment
from harness.train import main
from tests.support.launching import run

HEX = "0123456789abcdef0123456789abcdef01234567"  # a commit, a digest, or a key of W&B
HF = "hf_" + "Ab3" * 11
WANDB = "wandb_v1_" + "aB3_" * 19 + "x"
CANARY = "c4nary-of-this-test"


@pytest.fixture(autouse=True)
def nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signs, "_remembered", set())


HIDDEN = {
    "a token of the Hub": (f"could not open {HF} at all", "could not open <SECRET> at all"),
    "a key of W&B with its version": (f"{WANDB}.", "<SECRET>."),
    "a key of a W&B server": (f"local-{HEX}", "<SECRET>"),
    "sk-": ("with sk-ant-api03-Ab3Ab3Ab3Ab3Ab3", "with <SECRET>"),
    "AWS": ("AKIAIOSFODNN7EXAMPLE", "<SECRET>"),
    "GitHub": ("ghp_" + "a1" * 18 + " github_pat_" + "a1" * 12, "<SECRET> <SECRET>"),
    "a bearer": ("Authorization: Bearer abcdef1234567890 is refused", "Authorization: Bearer <SECRET> is refused"),
    "a JSON web token": ("eyJhbGciOiJI.eyJzdWIiOiIx.c2lnbmF0dXJl", "<SECRET>"),
    "a private key": ("a\n-----BEGIN RSA PRIVATE KEY-----\nx\n-----END RSA PRIVATE KEY-----\nb", "a\n<SECRET>\nb"),
    "a private key cut short": ("-----BEGIN PRIVATE KEY-----\nabc", "<SECRET>"),
    "a password in an address": ("at http://me:pw@host:80/a?b=c", "at http://<SECRET>@host:80/a?b=c"),
    "a password with a slash": ("http://me:p/w@host/a", "http://<SECRET>@host/a"),
    "a token in the place of a user": ("https://abc@github.com/a.git", "https://<SECRET>@github.com/a.git"),
    "an address of another kind": (
        "redis://:pw@host mysql://me:pw@host",
        "redis://<SECRET>@host mysql://<SECRET>@host",
    ),
    "a signed address": ("https://h/x?a=1&X-Amz-Signature=ab&b=2", "https://h/x?a=1&X-Amz-Signature=<SECRET>&b=2"),
    "a variable": (f"WANDB_API_KEY={HEX} is refused", "WANDB_API_KEY=<SECRET> is refused"),
    "arguments of an optimizer": ("momentum=0.9,api_key=abc,lr=1", "momentum=0.9,api_key=<SECRET>,lr=1"),
    "JSON": ('got {"api_key": "abc", "size": 3}', 'got {"api_key": "<SECRET>", "size": 3}'),
    "JSON in JSON": (r'"{\"password\": \"a b\", \"n\": 1}"', r'"{\"password\": \"<SECRET>\", \"n\": 1}"'),
    "Python": ("{'db_password': 'a b', 'n': 1}", "{'db_password': '<SECRET>', 'n': 1}"),
    "small letters and capitals": ('{"x": {"accessToken": "abc"}}', '{"x": {"accessToken": "<ACCESSTOKEN>"}}'),
    "a line of YAML": (f"  api_key: {HEX}", "  api_key: <SECRET>"),
    "a command": ("train --token ab12cd34 --seed 1", "train --token <SECRET> --seed 1"),
    "a key that looks like one": (f"wandb_key={HEX}", "wandb_key=<SECRET>"),
}


@pytest.mark.parametrize("case", HIDDEN)
def test_a_secret_in_a_text_is_hidden(case: str) -> None:
    text, expected = HIDDEN[case]
    assert masked(text) == expected
    assert masked(masked(text)) == expected


SHOWN = [
    f"models--gpt2/snapshots/{HEX}/config.json",
    f"commit {HEX}, sha256:{HEX}{HEX[:24]}, run_id={HEX[:8]}",
    "use `hf auth login`, or --token for downloads",
    "needs credentials, and there are none: run `wandb login`, set WANDB_API_KEY, or use offline",
    "pad_token=[PAD] eos_token=<eos> bos_token: <s>",
    '{"pad_token": "[PAD]", "mask_token": "<mask>", "use_auth_token": true, "token": null}',
    "--per_device_train_batch_size=8 --num_tokens 12345678 tokens=123456789",
    "key: value, sort_key=name, the primary_key=id",
    "https://huggingface.co:443/a@main git@github.com:a/b.git ssh://git@host/a.git",
    "hf_internal_testing task-risk-assessment-of-2024 a bearer of news",
    "s3://bucket/a/b?versionId=3",
]


@pytest.mark.parametrize("text", SHOWN)
def test_what_only_looks_like_a_secret_is_shown(text: str) -> None:
    assert masked(text) == text


def test_values_are_hidden_by_their_names_at_every_depth() -> None:
    values = {
        "service": {"api_key": "abc", "Api-Key": "def", "pin": 1, "logins": [{"password": 12345}, {"secret": "x"}]},
        "credentials": {"user": "me", "pass": "x"},
        "headers": {"Authorization": "Bearer abc"},
        "key": "text",
        "other": {"key": HEX},
        "sha": HEX[::-1],
        "n": (1, 2.5, None, True),
        "token": None,
    }
    before = json.dumps(values)
    assert masked(values) == {
        "service": {
            "api_key": "<API_KEY>",
            "Api-Key": "<API-KEY>",
            "pin": 1,
            "logins": [{"password": "<PASSWORD>"}, {"secret": "<SECRET>"}],
        },
        "credentials": {"user": "<CREDENTIALS>", "pass": "<CREDENTIALS>"},
        "headers": {"Authorization": "<AUTHORIZATION>"},
        "key": "text",
        "other": {"key": "<KEY>"},
        "sha": HEX[::-1],
        "n": (1, 2.5, None, True),
        "token": None,
    }
    assert json.dumps(values) == before  # the training goes on with them


def test_a_command_line_is_hidden_word_by_word() -> None:
    words = [
        "--token",
        "ab",
        "--hf-token=ab",
        '--task_args={"password": "x", "n": 1}',
        "--optim_args=secret=ab",
        "--lr=1",
    ]
    hidden = ["--token", "<SECRET>", "--hf-token=<SECRET>", '--task_args={"password": "<PASSWORD>", "n": 1}']
    assert masked_words(words) == [*hidden, "--optim_args=secret=<SECRET>", "--lr=1"]


def test_what_the_environment_holds_is_hidden_wherever_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SERVICE_TOKEN", "correct-horse/7 battery")
    monkeypatch.setenv("PROXY_URL", "http://me:pa%20ss-w0rd@proxy:1")
    monkeypatch.setenv("OTHER_SECRET", "word")
    monkeypatch.setenv("TOKEN_FILE", "/etc/hostname")
    monkeypatch.setenv("SOME_TOKEN", str(Path.cwd()))
    text = "correct-horse/7 battery correct-horse%2F7%20battery pa ss-w0rd, not a word of /etc/hostname"
    assert masked(text) == "<SECRET> <SECRET> <SECRET>, not a word of /etc/hostname"
    assert masked(str(Path.cwd())) == str(Path.cwd())


@pytest.mark.parametrize("depth", [300, 900, 100_000])
def test_lists_in_lists_are_hidden_by_their_words(depth: int) -> None:
    assert masked("[" * depth + '{"api_key": "abcdefgh12345678"}' + "]" * depth).count("abcdefgh12345678") == 0


def test_what_a_flag_has_called_a_secret_is_hidden_in_all_that_follows() -> None:
    parse([f'--task_args={{"password": "{CANARY}"}}', "--task=a:b", "--token=another-c4nary"])
    assert masked(f"can't log in with {CANARY} or another-c4nary") == "can't log in with <SECRET> or <SECRET>"


def test_no_message_of_a_command_holds_a_secret() -> None:
    said: list[str] = []

    def refuse() -> int:
        raise ConfigError(f"--a={HF}: no.", f"http://me:{CANARY}@host: no.")

    assert exit_code_of(refuse, lambda _, message: said.append(message)) == 2
    assert said == ["2 mistakes:\n- --a=<SECRET>: no.\n- http://<SECRET>@host: no."]


REFUSED = {
    "a key with a newline": ("WANDB_API_KEY", f"{CANARY}\n"),
    "a key with spaces": ("WANDB_API_KEY", f" {CANARY}"),
    "an address": ("WANDB_BASE_URL", f"me:{CANARY}@host"),
    "an address with a password": ("WANDB_BASE_URL", f"ftp://me:{CANARY}@host"),
    "a number": ("WANDB_INIT_TIMEOUT", HF),
}


@pytest.mark.parametrize("case", REFUSED)
def test_no_variable_that_wandb_refuses_is_quoted_with_its_secret(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, value = REFUSED[case]
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=rf"^{name}.* is refused by wandb: .*Put it right") as caught:
        check_environment()
    assert not [secret for secret in (CANARY, HF) if secret in masked(str(caught.value))]
    assert HF not in str(caught.value)


def test_broken_yaml_is_not_quoted(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(f"seed: 1\ntoken: {CANARY}: x: [\n")
    with pytest.raises(ConfigError, match=r"own.yaml is not valid YAML: line 2, column") as caught:
        parse([f"--config={path}"])
    assert CANARY not in str(caught.value)


def test_what_is_only_shown_in_wandb_is_masked_in_the_flags() -> None:
    config = TrackingConfig(run_name=f"run-{HF}", wandb_tags=["a", HF], wandb_notes=f"token={CANARY}")
    assert config.init_kwargs()["name"] == "run-<SECRET>"
    assert (config.wandb_tags, config.wandb_notes) == (["a", "<SECRET>"], "token=<SECRET>")


FLAGS_WITH_SECRETS = [
    "--task=a:b",
    f'--task_args={{"api_key": "{CANARY}", "at": "https://me:{CANARY}@host/a", "n": 1}}',
    f"--optim_args=secret={CANARY}",
    f"--dataset_name=https://{CANARY}@host/a",
]


def test_the_configuration_is_printed_without_secrets_and_refused_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*FLAGS_WITH_SECRETS, "--print_config"]) == 0
    printed = capsys.readouterr().out
    assert CANARY not in printed
    assert yaml.safe_load(printed)["task_args"] == {"api_key": "<API_KEY>", "at": "https://<SECRET>@host/a", "n": 1}
    path = tmp_path / "printed.yaml"
    path.write_text(printed)
    with pytest.raises(ConfigError, match=r"--task_args \(--config .*printed.yaml\) holds what stands for a secret"):
        parse([f"--config={path}"])
    assert parse([f"--config={path}", *FLAGS_WITH_SECRETS[1:]]).task.task_args["api_key"] == CANARY


def arguments(*flags: str) -> dict[str, Any]:
    return recorded(parse(flags).flat(), mixed_precision="no", device="cpu", num_processes=1, total_steps=20)


def test_a_resume_takes_secrets_for_equal_and_nothing_else() -> None:
    saved = arguments(*FLAGS_WITH_SECRETS)
    assert CANARY not in json.dumps(saved)
    rotated = arguments(*[flag.replace(CANARY, "r0tated-since-then") for flag in FLAGS_WITH_SECRETS])
    assert compare(saved, rotated, FLAGS).told == ()
    other = arguments(*[flag.replace('"n": 1', '"n": 2') for flag in FLAGS_WITH_SECRETS])
    assert [told.split()[0] for told in compare(saved, other, FLAGS).refused] == ["task_args"]


def test_a_resume_from_a_checkpoint_of_the_version_before() -> None:
    """It has masked less, and more."""
    before = arguments(*FLAGS_WITH_SECRETS)
    before["optim_args"] = f"secret={CANARY}"
    before["task_args"] = {"api_key": "<API_KEY>", "at": f"https://me:{CANARY}@host/a", "n": 1}
    assert compare(before, arguments(*FLAGS_WITH_SECRETS), FLAGS).told == ()
    special = arguments("--task=a:b", '--task_args={"pad_token": "[PAD]"}')
    assert compare(special | {"task_args": {"pad_token": "<PAD_TOKEN>"}}, special, FLAGS).told == ()


def test_a_secret_that_only_one_of_two_environments_knows_is_no_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", CANARY)
    saved = arguments("--task=a:b", f"--optim_args=a={CANARY},b=1")
    assert saved["optim_args"] == "a=<SECRET>,b=1"
    monkeypatch.delenv("MY_TOKEN")
    assert compare(saved, arguments("--task=a:b", f"--optim_args=a={CANARY},b=1"), FLAGS).told == ()
    assert compare(saved, arguments("--task=a:b", f"--optim_args=a={CANARY},b=2"), FLAGS).refused
    assert agree({"a": ["x<SECRET>y"]}, {"a": ["x1y"]})
    assert not agree({"a": ["x<SECRET>y"]}, {"a": ["x1z"]})
    assert not is_masked({"a": ["<image>", "[PAD]"], "n": 1})


def test_a_traceback_that_nobody_catches_holds_no_secret() -> None:
    code = (
        "from harness.masking import tracebacks_masked\n"
        "token = 'x' * 9\n"
        "with tracebacks_masked():\n"
        "    try:\n"
        f"        raise OSError('http://me:' + '{CANARY}'[:] + '@host')\n"
        "    except OSError as error:\n"
        "        raise ValueError(f'token={token}') from error\n"
    )
    ended = run([sys.executable, "-c", code], forked=False)
    assert ended.code == 1
    assert "OSError: http://<SECRET>@host" in ended.err
    assert ended.err.splitlines()[-1] == "ValueError: token=<SECRET>"


LONG = {
    "letters": "ab" * 50_000 + " token",
    "names": "token" * 20_000,
    "quotes": 'token: "' * 3_000,
    "addresses": "://a:b" * 10_000 + " token",
    "schemes": "a.b" * 30_000 + "://" * 10_000,
    "pairs": "a:key=" * 10_000,
    "dashes": "-" * 50_000 + " token",
    "backslashes": "\\" * 50_000 + '"token": ',
    "spaces": "basic token" + " " * 50_000,
}


@pytest.mark.parametrize("case", LONG)
def test_a_long_text_takes_no_time(case: str) -> None:
    began = time.process_time()
    masked(LONG[case])
    assert time.process_time() - began < 5
