"""Model, tokenizer and task fit each other: configs with overrides, positions, vocabularies, what a model sees."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    GPT2Config,
    LEDConfig,
    Qwen2Config,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
)

from harness.errors import ConfigError
from harness.tasks import Task, TaskConfig
from harness.tasks.pretrained import load_config, load_model, load_tokenizer, longest_sequence, with_overrides
from harness.tasks.text import causal_lm, masked_lm
from harness.tasks.text.causal_lm import check_causal
from harness.train import main
from tests.support.inputs import (
    TINY_BERT,
    TINY_GPT,
    label_flags,
    labelled,
    save_bert_tokenizer,
    save_gpt_tokenizer,
    text_flags,
    write_rows,
    write_text,
)

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 99}
QUIET = ["--report_to=none", "--logging_steps=1", "--max_steps=2", "--save_strategy=no", "--disable_tqdm=true"]


@pytest.fixture(scope="module")
def gpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_gpt_tokenizer(tmp_path_factory.mktemp("gpt"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert_tokenizer(tmp_path_factory.mktemp("bert"))


class TestOverrides:
    """What follows from an override is computed from it, and what was said otherwise stays."""

    @pytest.mark.parametrize(
        ("config", "overrides", "expected"),
        [
            (Qwen2Config(), "num_hidden_layers=2", {"layer_types": ["full_attention"] * 2}),
            (T5Config(), "num_layers=2", {"num_decoder_layers": 2}),
            (T5Config(num_decoder_layers=4), "num_layers=2", {"num_decoder_layers": 4, "num_layers": 2}),
            (AutoConfig.for_model("mistral"), "hidden_size=64,num_attention_heads=4", {"head_dim": 16}),
            (AutoConfig.for_model("mistral", head_dim=80), "hidden_size=64,num_attention_heads=4", {"head_dim": 80}),
            (AutoConfig.for_model("mistral"), "head_dim=24", {"head_dim": 24, "hidden_size": 4096}),
            (GPT2Config(n_layer=3, pad_token_id=7), "hidden_size=64", {"n_embd": 64, "n_layer": 3, "pad_token_id": 7}),
            (GPT2Config(id2label={0: "a", 1: "b", 2: "c"}), "n_embd=64", {"id2label": {0: "a", 1: "b", 2: "c"}}),
            (BertConfig(), "hidden_dropout_prob=0,is_decoder=yes", {"hidden_dropout_prob": 0.0, "is_decoder": True}),
            (GPT2Config(), "n_inner=64", {"n_inner": 64}),  # None until then
        ],
    )
    def test_a_config_is_built_with_them(self, config: Any, overrides: str, expected: dict[str, Any]) -> None:
        made = with_overrides(config, overrides)
        assert {name: getattr(made, name) for name in expected} == expected
        assert type(made) is type(config)

    def test_a_config_of_a_folder_is_rebuilt_too(self, gpt: Path, tmp_path: Path) -> None:
        Qwen2Config(**SMALL | {"num_hidden_layers": 6, "num_key_value_heads": 2}).save_pretrained(tmp_path)
        assert len(json.loads((tmp_path / "config.json").read_text())["layer_types"]) == 6
        config = TaskConfig(config_name=str(tmp_path), tokenizer_name=str(gpt), config_overrides="num_hidden_layers=2")
        made = load_config(config, load_tokenizer(config))
        assert (len(made.layer_types), made.name_or_path) == (2, str(tmp_path))
        made.save_pretrained(tmp_path / "again")  # which checks the layers' types

    def test_a_new_model_is_trained_and_saved(self, gpt: Path, tmp_path: Path) -> None:
        overrides = (
            "num_hidden_layers=2,hidden_size=32,num_attention_heads=2,num_key_value_heads=2,intermediate_size=32"
        )
        flags = [flag for flag in text_flags(gpt, write_text(tmp_path / "t.txt")) if "model_type" not in flag]
        flags = [flag for flag in flags if "config_overrides" not in flag]
        flags += ["--model_type=qwen2", f"--config_overrides={overrides}", f"--output_dir={tmp_path / 'out'}"]
        assert main([*flags, *QUIET]) == 0
        saved = json.loads((tmp_path / "out" / "config.json").read_text())
        assert (saved["num_hidden_layers"], len(saved["layer_types"])) == (2, 2)

    @pytest.mark.parametrize(
        ("overrides", "expected"),
        [
            ("layers=2", "layers is not known"),
            ("num_hidden_layers=two", "num_hidden_layers=two is no whole number"),
            ("use_cache=maybe", "neither true nor false"),
            ("layer_types=x", "layer_types is a list"),
            ("num_hidden_layers", "write name=value pairs of the qwen2 config"),
        ],
    )
    def test_those_that_do_not_fit_are_refused(self, overrides: str, expected: str) -> None:
        with pytest.raises(ConfigError, match=expected):
            with_overrides(Qwen2Config(), overrides)


class Unlimited:
    model_max_length = int(1e30)


class TestLengths:
    @pytest.mark.parametrize(
        ("config", "longest"),
        [
            (RobertaConfig(max_position_embeddings=514, pad_token_id=1), 512),
            (RobertaConfig(max_position_embeddings=34, pad_token_id=0), 33),
            (AutoConfig.for_model("camembert", max_position_embeddings=514), 512),
            (AutoConfig.for_model("mpnet", max_position_embeddings=514), 512),
            (AutoConfig.for_model("m2m_100", max_position_embeddings=100), 100),  # sines, for any position
            (BertConfig(max_position_embeddings=512), 512),
            (AutoConfig.for_model("bart", max_position_embeddings=100), 100),  # has two rows more
            (LEDConfig(max_encoder_position_embeddings=64, max_decoder_position_embeddings=32), 32),
            (
                EncoderDecoderConfig.from_encoder_decoder_configs(
                    BertConfig(max_position_embeddings=64), BertConfig(max_position_embeddings=32)
                ),
                32,
            ),
            (T5Config(), int(1e30)),
        ],
        ids=lambda value: getattr(value, "model_type", None),
    )
    def test_the_longest_sequence_is_what_the_positions_take(self, config: Any, longest: int) -> None:
        assert longest_sequence(Unlimited(), config) == longest

    def test_roberta_takes_exactly_that_many_tokens(self) -> None:
        config = RobertaConfig(**SMALL, max_position_embeddings=34, pad_token_id=1)
        model, longest = RobertaForMaskedLM(config), longest_sequence(Unlimited(), config)
        model(input_ids=torch.full((1, longest), 5))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, longest + 1), 5))

    def test_a_length_beyond_is_refused(self, bert: Path, tmp_path: Path) -> None:
        given = {"model_type": "roberta", "config_overrides": TINY_BERT, "tokenizer_name": str(bert)}
        given |= {"train_file": str(write_text(tmp_path / "t.txt")), "max_seq_length": 64}
        with pytest.raises(ConfigError, match="--max_seq_length=64 is more than the model's maximum; use 63 or less"):
            masked_lm.build(TaskConfig(**given))


class TestVocabularies:
    def with_gap(self, gpt: Path, folder: Path) -> Path:
        """A tokenizer whose last token has an id far above the number of tokens."""
        for file in gpt.iterdir():
            content = json.loads(file.read_text())
            if file.name == "tokenizer.json":
                content["model"]["vocab"]["Ġgap"] = 450
            (folder / file.name).write_text(json.dumps(content))
        return folder

    def test_embeddings_have_a_row_for_the_largest_id(self, gpt: Path, tmp_path: Path) -> None:
        folder = self.with_gap(gpt, tmp_path)
        config = TaskConfig(model_type="gpt2", tokenizer_name=str(folder), config_overrides=TINY_GPT)
        tokenizer = load_tokenizer(config)
        assert (len(tokenizer) < 451, max(tokenizer.get_vocab().values())) == (True, 450)
        model = load_model(config, AutoModelForCausalLM, load_config(config, tokenizer), tokenizer)
        assert model.get_input_embeddings().num_embeddings == 451
        assert model(input_ids=torch.tensor([[450]])).logits.shape[-1] == 451

    def test_a_pretrained_model_grows_to_it(self, gpt: Path, tmp_path: Path) -> None:
        AutoModelForCausalLM.from_config(GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2)).save_pretrained(
            tmp_path / "model"
        )
        (tmp_path / "tokenizer").mkdir()
        folder = self.with_gap(gpt, tmp_path / "tokenizer")
        config = TaskConfig(model_name_or_path=str(tmp_path / "model"), tokenizer_name=str(folder))
        tokenizer = load_tokenizer(config)
        model = load_model(config, AutoModelForCausalLM, load_config(config, tokenizer), tokenizer)
        assert len(model.get_output_embeddings().weight) == 451

    @pytest.mark.parametrize("sizes", [(200, 10), (10, 200)], ids=["the decoder's", "the encoder's"])
    def test_a_vocabulary_that_is_too_small_is_refused(
        self, bert: Path, tmp_path: Path, sizes: tuple[int, int], capsys: pytest.CaptureFixture[str]
    ) -> None:
        parts = [BertConfig(**SMALL | {"vocab_size": size}) for size in sizes]
        config = EncoderDecoderConfig.from_encoder_decoder_configs(*parts)
        config.decoder_start_token_id = config.pad_token_id = 0
        EncoderDecoderModel(config).save_pretrained(tmp_path / "model")
        rows = write_rows(tmp_path / "t.csv", [{"text": "the old cat", "summary": "the hill"}] * 4)
        flags = ["--task=seq2seq", f"--model_name_or_path={tmp_path / 'model'}", f"--tokenizer_name={bert}"]
        assert main([*flags, f"--train_file={rows}", f"--output_dir={tmp_path / 'out'}", *QUIET]) == 2
        assert "a vocabulary of the model" in capsys.readouterr().err


CAUSAL = {
    "bert as a decoder": ("bert", SMALL | {"is_decoder": True}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 99}),
    "llama": ("llama", SMALL),
    "gemma3": ("gemma3_text", SMALL | {"head_dim": 16, "num_key_value_heads": 1}),
    "mixtral": ("mixtral", SMALL | {"num_key_value_heads": 2}),
    "mamba": ("mamba", SMALL),
    "rwkv": ("rwkv", {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 99}),
}
SEEING = {
    "bert": ("bert", SMALL),
    "roberta": ("roberta", SMALL),
    "electra": ("electra", SMALL),
    "xlnet": ("xlnet", {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64, "vocab_size": 99}),
}


ASKED: list[Any] = []  # the models that the task below was asked about


def counted(config: TaskConfig) -> Task:
    return dataclasses.replace(causal_lm.build(config), check=ASKED.append)


class TestSight:
    """A model that sees what it is to predict is refused as a causal language model."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
    @pytest.mark.parametrize("name", [*CAUSAL, *SEEING])
    def test_the_probe_tells_them_apart(self, name: str, dtype: torch.dtype) -> None:
        kind, options = (CAUSAL | SEEING)[name]
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options)).to(dtype)
        if name in CAUSAL:
            check_causal(model, range(5, 60))
            return
        with pytest.raises(ConfigError, match=f"A {kind} model sees the tokens after the one that it is to predict"):
            check_causal(model, range(5, 60))

    def test_it_leaves_the_model_and_the_generators_as_they_are(self) -> None:
        model = AutoModelForCausalLM.from_config(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=99))
        model.transformer.h[0].eval()
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        modes = [module.training for module in model.modules()]
        values = {name: value.clone() for name, value in [*model.named_parameters(), *model.named_buffers()]}
        state, hooks = torch.get_rng_state(), [len(module._forward_hooks) for module in model.modules()]
        check_causal(model, range(5, 60))
        assert torch.equal(torch.get_rng_state(), state)
        assert [module.training for module in model.modules()] == modes
        assert [len(module._forward_hooks) for module in model.modules()] == hooks
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            assert torch.equal(value, values[name])
        assert all(bool((parameter.grad == 1).all()) for parameter in model.parameters())

    def test_bert_is_refused_before_the_first_step_and_taken_as_a_decoder(
        self, bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        flags = [flag for flag in text_flags(bert, write_text(tmp_path / "t.txt")) if "config_overrides" not in flag]
        flags = [flag.replace("gpt2", "bert") for flag in flags]
        run = [*flags, f"--output_dir={tmp_path / 'out'}", *QUIET]
        assert main([*run, f"--config_overrides={TINY_BERT}"]) == 2
        assert "A bert model sees the tokens" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
        assert main([*run, f"--config_overrides={TINY_BERT},is_decoder=true"]) == 0

    def test_a_resume_is_not_asked_again(self, gpt: Path, tmp_path: Path) -> None:
        run = [*text_flags(gpt, write_text(tmp_path / "t.txt")), f"--output_dir={tmp_path / 'out'}", *QUIET]
        run = [flag for flag in run if flag not in ("--max_steps=2", "--save_strategy=no", "--task=causal-lm")]
        run += [f"--task={__name__}:counted", "--save_steps=1"]
        ASKED.clear()
        assert main([*run, "--max_steps=2"]) == 0
        assert len(ASKED) == 1
        assert main([*run, "--max_steps=3", "--resume_from_checkpoint=true"]) == 0
        assert len(ASKED) == 1


class TestFlagsThatDoNotFitTheData:
    def scores(self, path: Path) -> Path:
        return write_rows(path, [{**row, "label": str(at / 2)} for at, row in enumerate(labelled())])

    def test_label_smoothing_of_numbers_is_refused(
        self, bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        flags = [*label_flags(bert, self.scores(tmp_path / "t.csv")), f"--output_dir={tmp_path / 'out'}", *QUIET]
        assert main([*flags, "--label_smoothing_factor=0.1"]) == 2
        assert "--label_smoothing_factor=0.1 is of one label out of many" in capsys.readouterr().err
        assert main(flags) == 0

    def test_dropping_the_only_batch_of_an_evaluation_is_refused(
        self, bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        valid = write_rows(tmp_path / "v.csv", labelled()[:3])
        flags = [*label_flags(bert, write_rows(tmp_path / "t.csv", labelled())), f"--validation_file={valid}"]
        flags += [f"--output_dir={tmp_path / 'out'}", *QUIET, "--dataloader_drop_last", "--eval_strategy=steps"]
        flags += ["--metric_for_best_model=accuracy", "--eval_steps=1"]
        assert main([*flags, "--per_device_eval_batch_size=4"]) == 2
        shown = capsys.readouterr().err
        assert "--dataloader_drop_last leaves no batch of the evaluation data: 3 samples, and a round takes 4" in shown
        assert main([*flags, "--per_device_eval_batch_size=3"]) == 0
