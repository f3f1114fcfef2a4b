"""Targets: what they score, when they are reached, what their constraints allow, and which texts are none."""

from __future__ import annotations

import math

import pytest
import torch

from alignvec.errors import AlignvecError
from alignvec.search import Target, all_targets, evaluations_to_reach
from alignvec.search.result import order, trace
from tests.search.landscapes import LEVELS, NAMES

RATES = torch.tensor(
    [[[0.1, 0.2, 0.7], [0.5, 0.3, 0.2], [0.4, 0.4, 0.2]], [[0.0, 0.0, 1.0], [0.3, 0.5, 0.2], [0.6, 0.2, 0.2]]],
    dtype=torch.float64,
)


def test_the_score_is_the_mean_of_the_wanted_rates() -> None:
    target = Target.parse("medical=expert, legal=avoidance,financial=generic", NAMES, LEVELS)
    assert target.score(RATES).tolist() == pytest.approx([1.6 / 3, 1.5 / 3])
    assert target.wanted_rates(RATES).shape == (2, 3)
    part = Target.parse("medical=expert", NAMES, LEVELS)
    assert part.score(RATES).tolist() == [0.7, 1.0]
    assert float(part.score(RATES[0])) == 0.7
    assert str(target) == "medical=expert,legal=avoidance,financial=generic"


def test_reached_needs_every_wanted_level_ahead_of_the_others() -> None:
    def reached(text: str) -> list[bool]:
        return Target.parse(text, NAMES, LEVELS).reached(RATES).tolist()

    assert reached("medical=expert,legal=avoidance") == [True, False]
    assert reached("financial=avoidance") == [False, True]  # a tie is not ahead
    assert reached("medical=expert,legal=avoidance<=0.4") == [False, True]


def test_constraints_are_kept_at_their_bound() -> None:
    target = Target.parse("medical=expert", NAMES, LEVELS, ["legal=avoidance<=0.3", "financial=avoidance>=0.5"])
    assert target.violations(RATES).flatten().tolist() == pytest.approx([0.2, 0.1, 0.0, -0.1])
    assert target.feasible(RATES).tolist() == [False, True]
    assert str(target) == "medical=expert,legal=avoidance<=0.3,financial=avoidance>=0.5"
    assert Target.parse(str(target), NAMES, LEVELS) == target


def test_all_targets() -> None:
    targets = all_targets(NAMES, LEVELS)
    assert len(set(targets)) == 27
    assert str(targets[1]) == "medical=avoidance,legal=avoidance,financial=generic"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not ''"),
        ("medical", "takes DOMAIN=LEVEL"),
        ("medical=expert=generic", "takes DOMAIN=LEVEL"),
        ("tax=expert", "no domain is named 'tax'"),
        ("medical=best", "no level is named 'best'"),
        ("medical=expert,medical=generic", "twice"),
        ("medical=expert<=0.5", "wants nothing"),
        ("medical=expert,legal=generic<=1.5", "between 0 and 1"),
        ("medical=expert,legal=generic<=much", "between 0 and 1"),
    ],
)
def test_what_is_no_target(text: str, message: str) -> None:
    with pytest.raises(AlignvecError, match=message):
        Target.parse(text, NAMES, LEVELS)


def test_an_option_for_constraints_takes_no_wanted_level() -> None:
    with pytest.raises(AlignvecError, match="is no constraint"):
        Target.parse("medical=expert", NAMES, LEVELS, ["legal=generic"])


def test_ties_go_to_the_smaller_norm_and_broken_constraints_last() -> None:
    coefficients = torch.tensor([[1.0, 0.0], [0.5, 0.0], [-0.5, 0.0], [0.1, 0.1]], dtype=torch.float64)
    rates = torch.tensor([[[0.2, 0.8]], [[0.2, 0.8]], [[0.2, 0.8]], [[0.3, 0.7]]], dtype=torch.float64)
    target = Target.parse("a=high", ["a"], ["low", "high"])
    assert order(target, coefficients, rates) == [2, 1, 0, 3]
    constrained = Target.parse("a=high,a=low>=0.3", ["a"], ["low", "high"])
    assert order(constrained, coefficients, rates)[0] == 3
    assert trace(target, rates.flip(0)) == [0.7, 0.8, 0.8, 0.8]
    curve = trace(constrained, rates)
    assert all(math.isnan(score) for score in curve[:3])
    assert curve[3] == 0.7
    assert evaluations_to_reach(curve, 0.72) == 4
    assert evaluations_to_reach(curve, 0.73) is None
