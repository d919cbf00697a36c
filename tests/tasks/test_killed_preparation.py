"""A kill while data is read, tokenised or grouped costs the work under way, and changes nothing of what follows."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.forking import fork
from tests.support.inputs import save_gpt_tokenizer, text_flags
from tests.support.launching import ROOT, SCRIPT
from tests.support.parity import history

SENTENCE = "the quick brown fox jumps over the lazy dog and runs away from it "
# What stands in the cache while a file is read, and while its rows are tokenised or cut to blocks.
READING, PREPARING = "harness/json-*/rows.arrow.*.partial", "**/tmp*"
MOMENTS = (READING, READING, PREPARING, PREPARING)


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in history(out) if "loss" in row]


@pytest.mark.slow
def test_a_kill_while_data_is_prepared_changes_nothing(tmp_path: Path) -> None:
    """Real kills, each of a training that finds what the killed ones before have left."""
    data, cache = tmp_path / "data.json", tmp_path / "cache"
    data.write_text("".join(json.dumps({"text": f"{i} {SENTENCE * 8}"}) + "\n" for i in range(20_000)))
    flags = text_flags(save_gpt_tokenizer(tmp_path / "tokenizer"), data)
    flags += ["--max_steps=2", "--logging_steps=1", "--report_to=none", "--use_cpu", "--save_strategy=no"]

    def started(out: str, cache: str) -> Any:
        given = [*flags, f"--output_dir={tmp_path / out}", f"--cache_dir={tmp_path / cache}"]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(tmp_path / cache)}
        with (tmp_path / f"{out}.log").open("w") as log:
            return fork([SCRIPT, *given], env=env, cwd=tmp_path, out=log, err=log)

    for number, moment in enumerate(MOMENTS):
        process, before, end = started(f"killed{number}", "cache"), set(cache.glob(moment)), time.monotonic() + 120
        while not set(cache.glob(moment)) - before:
            assert process.poll() is None, (tmp_path / f"killed{number}.log").read_text()
            assert time.monotonic() < end
            time.sleep(0.005)
        process.kill()
        process.wait()
    for name in ("cache", "fresh"):
        assert started(f"{name}-out", name).wait(200) == 0, (tmp_path / f"{name}-out.log").read_text()
    assert losses(tmp_path / "cache-out") == losses(tmp_path / "fresh-out")
    assert len(losses(tmp_path / "fresh-out")) == 2
    assert not list(cache.rglob("*.partial"))
