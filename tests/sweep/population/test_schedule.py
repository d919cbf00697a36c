"""The schedule of a population: decisions follow from seed, generation and objective values alone."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

import pytest

from harness.sweep.population.schedule import (
    Choices,
    Range,
    Rules,
    Segment,
    explored,
    first_generation,
    next_generation,
    ranking,
)

RULES = Rules(
    size=8,
    num_steps=20,
    perturbation_interval=6,
    quantile_fraction=0.25,
    resample_probability=0.25,
    perturbation_factors=(1.2, 0.8),
    spaces={
        "learning_rate": Range(low=1e-5, high=1e-2, log=True),
        "weight_decay": Choices(values=(0.0, 0.01, 0.1)),
    },
    is_minimized=True,
    seed=3,
)


def rules(**changed: Any) -> Rules:
    return dataclasses.replace(RULES, **changed)


def test_generations_end_at_the_interval_and_the_last_with_the_training() -> None:
    assert RULES.ends == (6, 12, 18, 20)
    assert rules(num_steps=18).ends == (6, 12, 18)
    assert rules(num_steps=5).ends == (5,)


@pytest.mark.parametrize(
    ("size", "fraction", "count"), [(8, 0.25, 2), (12, 0.2, 3), (3, 0.5, 1), (2, 0.5, 1), (4, 0, 0)]
)
def test_at_most_half_of_a_population_is_replaced(size: int, fraction: float, count: int) -> None:
    assert rules(size=size, quantile_fraction=fraction).num_in_quantile == count


def test_the_first_values_are_drawn_from_the_spaces_by_seed_and_member() -> None:
    first = first_generation(RULES)
    assert first == first_generation(RULES)
    assert first[:4] == first_generation(rules(size=4))  # of no other member's draws
    assert first != first_generation(rules(seed=4))
    assert {segment.parent for segment in first} == {None}
    assert all(1e-5 <= segment.values["learning_rate"] <= 1e-2 for segment in first)
    assert len({segment.values["learning_rate"] for segment in first}) == 8
    assert {segment.values["weight_decay"] for segment in first} <= {0.0, 0.01, 0.1}


def test_the_lowest_quantile_goes_on_from_the_highest_and_the_others_as_they_were() -> None:
    first = first_generation(RULES)
    objectives = [5.0, 1.0, 7.0, 3.0, 2.0, 8.0, 4.0, 6.0]
    second = next_generation(RULES, first, objectives)
    assert second == next_generation(RULES, first, objectives)
    replaced = {segment.member: segment.parent for segment in second if segment.is_replaced}
    assert set(replaced) == {2, 5}
    assert set(replaced.values()) <= {1, 4}
    for segment in second:
        assert (segment.generation, segment.from_step, segment.to_step) == (1, 6, 12)
        if not segment.is_replaced:
            assert segment.values == first[segment.member].values
    upwards = next_generation(rules(is_minimized=False), first, objectives)
    assert {segment.member for segment in upwards if segment.is_replaced} == {1, 4}


def test_what_is_no_number_is_worst_and_nobody_goes_on_from_it() -> None:
    objectives = [math.nan, 1.0, math.nan, 3.0, math.inf, 8.0, 4.0, 6.0]
    assert ranking(RULES, objectives)[-3:] == [0, 2, 4]
    assert ranking(rules(is_minimized=False), [1.0, math.nan, 2.0, -math.inf]) == [2, 0, 1, 3]
    first = first_generation(RULES)
    assert {each.member for each in next_generation(RULES, first, objectives) if each.is_replaced} == {2, 4}
    lost = next_generation(RULES, first, [math.nan] * 8)
    assert not [segment for segment in lost if segment.is_replaced]


def test_exploring_stays_in_the_spaces() -> None:
    random_ = random.Random(1)
    space = Range(low=0.5, high=1.0)
    assert {space.perturbed(0.9, (1.2, 0.8), random_) for _ in range(20)} == {1.0, 0.72}
    whole = Range(low=1, high=5, q=1)
    assert {whole.perturbed(5, (1.2, 0.8), random_) for _ in range(20)} == {4, 5}
    assert all(isinstance(whole.drawn(random_), int) for _ in range(5))
    choices = Choices(values=(1, 2, 3))
    assert {choices.perturbed(2, (), random_) for _ in range(20)} == {1, 3}
    assert {choices.perturbed(3, (), random_) for _ in range(20)} == {2, 3}


def test_values_are_changed_a_little_or_drawn_anew_by_the_probability() -> None:
    values = {"learning_rate": 1e-3, "weight_decay": 0.01}
    never = {explored(rules(resample_probability=0.0), values, random.Random(i))["learning_rate"] for i in range(50)}
    assert never == {0.0012, 0.0008}
    always = {explored(rules(resample_probability=1.0), values, random.Random(i))["learning_rate"] for i in range(50)}
    assert len(always) == 50


def test_a_segment_says_whether_it_is_a_copy() -> None:
    first = first_generation(RULES)[0]
    assert not first.is_replaced
    assert not dataclasses.replace(first, parent=0).is_replaced
    assert dataclasses.replace(first, parent=3).is_replaced
    assert isinstance(first, Segment)
