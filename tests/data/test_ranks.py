"""Data shared by ranks: who reads what, what is filled up, and that no score counts a sample twice."""

from __future__ import annotations

import json
from typing import Any

import pytest
from accelerate import Accelerator

from tests.support.data_ranks import CASES, found_on
from tests.support.launching import run, torchrun

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    ended = run([*torchrun(2), "-m", "tests.support.data_ranks", str(folder)])
    assert ended.code == 0, ended.err[-3000:]
    found = [json.loads((folder / f"rank-{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]
    assert [each["world"] for each in found] == [2, 2]
    return found


def test_ranks_train_on_every_sample_once_and_evaluate_as_one_process_does(ranks: list[dict[str, Any]]) -> None:
    alone = found_on(Accelerator(cpu=True))
    assert alone["world"] == 1
    assert len(alone["trained"]) == len(CASES) == len(ranks[0]["trained"])
    for case, (kind, size, batch_size, drop_last, workers) in zip(alone["trained"], CASES, strict=True):
        for epoch in (0, 1):
            first, second = (rank["trained"][case][epoch] for rank in ranks)
            read = [sample for pair in zip(first, second, strict=True) for batch in pair for sample in batch]
            if workers:
                assert sorted(read) == list(range(size)), case
                continue
            order = [sample for batch in alone["trained"][case][epoch] for sample in batch]
            whole = size - size % (2 * batch_size) if drop_last else size
            assert read == order[:whole], case
        if drop_last and kind != "stream":  # as in the Trainer the last round is not evaluated
            scored = (rank["evaluated"][case]["labels"] for rank in ranks)
            assert {len(labels) for labels in scored} == {size - size % (2 * batch_size)}, case
            continue
        expected = alone["evaluated"][case]
        for rank in ranks:
            found = rank["evaluated"][case]
            if workers:
                assert sorted(found["labels"]) == sorted(expected["labels"]), case
            else:
                assert found["labels"] == expected["labels"], case
            assert found["accuracy"] == expected["accuracy"], case
            assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6), case
            assert found["eval/num_tokens"] == expected["eval/num_tokens"], case
            assert found["eval/loss_per_token"] == pytest.approx(expected["eval/loss_per_token"], rel=1e-6), case
