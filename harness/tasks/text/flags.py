"""The flags of tasks on text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from harness.config import arg, at_least, section
from harness.errors import ConfigError

PACKING_WINDOW = 4096


@section("text")
@dataclass(frozen=True, kw_only=True)
class TextFlags:
    """Text as tokens, for all tasks on text."""

    text_column_names: str | None = arg(
        help="Columns that hold the text, separated by commas; two make pairs.", common=True
    )
    text_column_delimiter: str = arg(" ", "Put between the columns when more than two are joined.")
    max_seq_length: int | None = arg(help="Longest sequence after tokenisation; longer ones are cut.", common=True)
    pad_to_max_length: bool = arg(False, "Pad all samples to --max_seq_length instead of to the batch's longest.")
    do_regression: bool | None = arg(help="sequence-classification: the label is a number; default: by its type.")

    def __post_init__(self) -> None:
        at_least(1, max_seq_length=self.max_seq_length)


@section("language-models")
@dataclass(frozen=True, kw_only=True)
class LanguageModelFlags:
    """Text to continue, or with holes to fill."""

    block_size: int | None = arg(
        help="causal-lm: tokens a training sample; default: the model's maximum, up to 1024.", common=True
    )
    keep_linebreaks: bool = arg(True, "causal-lm: keep the line breaks of txt files.")
    mlm_probability: float = arg(0.15, "masked-lm: share of the tokens to mask.")
    line_by_line: bool = arg(False, "masked-lm: each line is a sample of its own.")
    append_eos: bool = arg(False, "causal-lm: end each text with the tokenizer's token that ends texts.")

    def __post_init__(self) -> None:
        at_least(2, block_size=self.block_size)  # in a block of one token there is no next one
        if not 0 < self.mlm_probability < 1:
            raise ConfigError(f"--mlm_probability={self.mlm_probability}: use a share between 0 and 1.")


@section("causal-lm")
@dataclass(frozen=True, kw_only=True)
class DocumentFlags:
    """Texts as documents of their own, each padded, or several packed into a row."""

    max_length: int | None = arg(
        help="Keep texts apart, instead of joined to blocks: at most N tokens a sample, longer texts in pieces; "
        "with --packing the tokens of a row.",
        common=True,
    )
    packing: bool = arg(
        False, "Fill rows of --max_length tokens with several texts, none of which sees another.", common=True
    )
    packing_window: int = arg(
        PACKING_WINDOW, "Texts that are looked at together to fill rows; a stream reads so many ahead."
    )

    def __post_init__(self) -> None:
        at_least(2, max_length=self.max_length)  # in a text of one token there is no next one
        at_least(1, packing_window=self.packing_window)
        if self.packing and self.max_length is None:
            raise ConfigError("--packing fills rows of --max_length tokens, and it is not given; give both.")
        if not self.packing and self.packing_window != PACKING_WINDOW:
            raise ConfigError(f"--packing_window={self.packing_window} does nothing without --packing; give both.")


@section("generation", on_resume="free")
@dataclass(frozen=True, kw_only=True)
class GenerationFlags:
    """What a model writes while it is trained; see --generate_steps and --generate_samples."""

    generate_steps: int | None = arg(
        help="causal-lm, seq2seq: every N steps show what the model writes for the prompts, here and in W&B."
    )
    generate_prompts: list[str] | None = arg(help="The prompts: texts to continue, or to read (seq2seq).")
    generate_prompts_file: str | None = arg(help="A txt file in their place, with a prompt in each line.")
    generate_max_new_tokens: int = arg(64, "Most tokens to write for a prompt.")
    generate_samples: int | None = arg(
        help="causal-lm: after each evaluation show N texts that are drawn from the model, here and in W&B; "
        "N for each prompt, if there are prompts."
    )
    generate_prompt_tokens: int = arg(
        0, "Of --generate_samples: begin with so many tokens of the evaluation data's first samples; 0: with none."
    )
    generate_temperature: float = arg(1.0, "Of --generate_samples: below 1 likely tokens are drawn more often.")
    generate_top_p: float = arg(1.0, "Of --generate_samples: draw from the likeliest tokens of so much probability.")

    def __post_init__(self) -> None:
        at_least(
            1,
            generate_steps=self.generate_steps,
            generate_max_new_tokens=self.generate_max_new_tokens,
            generate_samples=self.generate_samples,
        )
        at_least(0, generate_prompt_tokens=self.generate_prompt_tokens)
        at_least(0.01, generate_temperature=self.generate_temperature)
        if not 0 < self.generate_top_p <= 1:
            raise ConfigError(f"--generate_top_p={self.generate_top_p}: use a share above 0, at most 1.")
        self._check_prompts()
        if self.generate_samples is None:
            self._check_unread()

    def _check_prompts(self) -> None:
        given = [name for name in ("generate_prompts", "generate_prompts_file") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigError("--generate_prompts and --generate_prompts_file both give the prompts; give one of them.")
        if self.generate_steps is not None and not given:
            raise ConfigError(
                f"--generate_steps={self.generate_steps} needs prompts: give --generate_prompts or "
                "--generate_prompts_file."
            )
        if self.generate_steps is None and self.generate_samples is None and given:
            raise ConfigError(f"--{given[0]} does nothing without --generate_steps or --generate_samples; give both.")
        if self.generate_prompt_tokens and given:
            raise ConfigError(f"--generate_prompt_tokens and --{given[0]} both give the prompts; give one of them.")

    def _check_unread(self) -> None:
        """Refuse what only --generate_samples reads, where it is not given."""
        for name, default in (("prompt_tokens", 0), ("temperature", 1.0), ("top_p", 1.0)):
            if (value := getattr(self, f"generate_{name}")) != default:
                raise ConfigError(f"--generate_{name}={value} does nothing without --generate_samples; give both.")


@section("token-classification")
@dataclass(frozen=True, kw_only=True)
class TokenClassificationFlags:
    """A label for each word."""

    label_all_tokens: bool = arg(False, "Label all tokens of a word, not its first alone.")


@section("seq2seq")
@dataclass(frozen=True, kw_only=True)
class Seq2SeqFlags:
    """A text to write for each text to read."""

    summary_column: str | None = arg(help="Column of the text to write; default: summary.")
    source_prefix: str | None = arg(help="Put before each text to read, e.g. 'summarize: ' for T5.")
    max_source_length: int | None = arg(help="Most tokens of a text to read; default: up to 1024.")
    max_target_length: int | None = arg(help="Most tokens of a text to write; default: up to 128.")
    predict_with_generate: bool = arg(
        False,
        "Evaluate the texts that the model writes (ROUGE, BLEU); needs rouge-score and sacrebleu.",
        on_resume="free",
    )
    generation_max_length: int | None = arg(
        help="Most tokens of a text with --predict_with_generate; default: --max_target_length.", on_resume="free"
    )
    generation_num_beams: int | None = arg(
        help="Beams with --predict_with_generate; default: the model's.", on_resume="free"
    )

    def __post_init__(self) -> None:
        at_least(
            1,
            max_source_length=self.max_source_length,
            max_target_length=self.max_target_length,
            generation_max_length=self.generation_max_length,
            generation_num_beams=self.generation_num_beams,
        )


def prompts_of(config: GenerationFlags) -> list[str]:
    """Return the prompts of --generate_steps and --generate_samples, [] if none are given. Raises ConfigError."""
    path = config.generate_prompts_file
    if path is None and config.generate_prompts is None:
        return []
    if path is None:
        flag, prompts = "generate_prompts", list(config.generate_prompts or ())
    else:
        flag = f"generate_prompts_file={path}"
        try:
            prompts = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"--{flag} can't be read: {error}; give a txt file with a prompt in each line."
            ) from error
        prompts = [prompt for prompt in prompts if prompt.strip()]
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise ConfigError(f"--{flag}: {'there is no prompt' if not prompts else 'a prompt is empty'}; give some text.")
    return prompts
