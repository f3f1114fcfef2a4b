"""auto: formats for tensors within a budget of bytes."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from alignvec import formats
from alignvec.errors import AlignvecError
from alignvec.formats import Spec, auto


def random_choices(tensors: int, seed: int) -> dict[str, list[auto.Choice]]:
    draw = random.Random(seed)
    return {
        f"t{i}": [(Spec(f"f{j}"), draw.randint(1, 30), draw.random() * 100) for j in range(4)] for i in range(tensors)
    }


def totals(choices: dict[str, list[auto.Choice]], taken: dict[str, Spec]) -> tuple[int, float]:
    picked = [next(choice for choice in choices[name] if choice[0] == spec) for name, spec in taken.items()]
    return sum(choice[1] for choice in picked), sum(choice[2] for choice in picked)


@pytest.mark.parametrize("seed", range(8))
def test_the_budget_is_kept_and_more_bytes_never_hurt(seed: int) -> None:
    choices = random_choices(5, seed)
    least = sum(min(choice[1] for choice in each) for each in choices.values())
    last = float("inf")
    for budget in range(least, 160):
        spent, error = totals(choices, auto.choose(choices, budget))
        assert spent <= budget
        last = min(last, error)
    assert last == pytest.approx(sum(min(choice[2] for choice in each) for each in choices.values()))


@pytest.mark.parametrize("seed", range(8))
def test_at_the_corners_of_what_is_possible_the_choice_is_the_best_of_all(seed: int) -> None:
    choices = random_choices(4, seed)
    every = sorted((sum(c[1] for c in cs), sum(c[2] for c in cs)) for cs in itertools.product(*choices.values()))
    corners = [every[0]]
    while corners[-1][1] > min(error for _, error in every):
        spent, error = corners[-1]
        _, *corner = min(((e - error) / (b - spent), b, e) for b, e in every if b > spent)
        corners.append((int(corner[0]), corner[1]))
    assert len(corners) > 3
    for spent, error in corners:
        assert totals(choices, auto.choose(choices, spent)) == (spent, pytest.approx(error))


def test_the_steepest_drop_comes_first() -> None:
    small, large = Spec("small"), Spec("large")
    choices = {"a": [(small, 10, 5.0), (large, 20, 0.0)], "b": [(small, 10, 50.0), (large, 20, 0.0)]}
    assert auto.choose(choices, 30) == {"a": small, "b": large}
    assert auto.choose(choices, 40) == {"a": large, "b": large}
    assert auto.choose(choices, 29) == {"a": small, "b": small}


def test_what_is_dearer_and_no_better_is_never_taken() -> None:
    good, dear, even = Spec("good"), Spec("dear"), Spec("even")
    assert auto.choose({"a": [(dear, 20, 3.0), (good, 10, 2.0), (even, 10, 2.0)]}, 100) == {"a": good}


def test_a_budget_below_the_smallest_says_what_the_least_is() -> None:
    with pytest.raises(AlignvecError, match="9 bytes are too few: the smallest formats of these tensors take 10"):
        auto.choose({"a": [(Spec("x"), 4, 1.0)], "b": [(Spec("x"), 6, 1.0), (Spec("y"), 7, 0.0)]}, 9)


def test_measured_choices_are_what_encoding_gives() -> None:
    base = torch.randn(64, 256).bfloat16()
    aligned = (base.float() + torch.randn(64, 256) * 0.01).bfloat16()
    delta = aligned.float() - base.float()
    assert [str(spec) for spec in auto.candidates(2)] == [str(formats.parse(text)) for text in auto.CANDIDATES]
    for spec in auto.candidates(2):
        encoded = formats.encode(spec, delta, base, "w")
        found = auto.measure(spec, delta, base, "w")
        assert found is not None
        assert found[:2] == (spec, encoded.nbytes)
        assert found[2] == pytest.approx(formats.squared_error(encoded, delta, base))


def test_lossless_is_measured_of_pairs_alone() -> None:
    base, spec = torch.randn(64, 256).bfloat16(), formats.parse("lossless")
    assert auto.measure(spec, torch.randn(64, 256) * 0.003, base, "w") is None
    assert auto.measure(spec, torch.randn(64, 256)) is None
    assert auto.candidates(1) == [formats.parse("dense")]
    with pytest.raises(AlignvecError, match="NaN"):
        auto.measure(formats.parse("dense"), torch.full((2, 3), torch.nan))


def test_a_format_that_leaves_the_numbers_range_is_no_choice() -> None:
    """The error of a rank of 4 among numbers up to float32's largest is infinite; dense is exact."""
    delta = torch.randn(32, 48).sign() * 3e38
    found = {str(spec): auto.measure(spec, delta) for spec in auto.candidates(2)}
    assert all(choice is None or math.isfinite(choice[2]) for choice in found.values())
    assert found["dense"] == (formats.parse("dense"), 32 * 48 * 4, 0.0)


def test_the_share_is_parsed() -> None:
    assert auto.fraction("auto:0.25") == 0.25
    assert auto.fraction("int4") is None
    for text in ("auto", "auto:", "auto:0", "auto:1.5", "auto:-1", "auto:nan", "auto:x"):
        with pytest.raises(AlignvecError, match="share of the dense bytes"):
            auto.fraction(text)
