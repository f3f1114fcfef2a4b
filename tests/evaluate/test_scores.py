"""Rates and intervals from scores."""

import pytest
import torch

from alignvec import AlignvecError
from alignvec.evaluate import Scores


def scores() -> Scores:
    """Two mixes, five questions of two domains that alternate, three levels."""
    mean = torch.tensor([[[3.0, 2, 1], [1, 3, 2], [3, 1, 2], [1, 2, 3], [1, 3, 2]]])
    return Scores(("low", "mid", "high"), ("b", "a", "b", "a", "b"), torch.cat([mean, -mean]), torch.cat([-mean, mean]))


def test_rates_are_shares_by_domain_in_order_of_appearance() -> None:
    rates = scores().rates()
    torch.testing.assert_close(rates[0, 0], torch.tensor([2 / 3, 1 / 3, 0], dtype=torch.float64))
    torch.testing.assert_close(rates[0, 1], torch.tensor([0, 0.5, 0.5], dtype=torch.float64))
    torch.testing.assert_close(scores().rates("sum")[1], rates[0])
    with pytest.raises(AlignvecError, match='"mean" or "sum"'):
        scores().rates("max")


def test_intervals_hold_the_rates_and_narrow_with_more_questions() -> None:
    generator = torch.Generator().manual_seed(1)
    widths = []
    for count in (20, 500):
        mean = torch.randn(1, count, 2, generator=generator)
        made = Scores(("no", "yes"), ("d",) * count, mean, mean)
        low, high = made.intervals(samples=400).unbind(-1)
        assert ((low <= made.rates()) & (made.rates() <= high)).all()
        widths.append(float((high - low).max()))
        rate = made.rates()[0, 0, 0]
        normal = 2 * 1.96 * float((rate * (1 - rate) / count).sqrt())
        assert widths[-1] == pytest.approx(normal, rel=0.2)
    assert widths[1] < widths[0] / 3


def test_intervals_of_equal_mixes_are_equal_and_certain_rates_have_none() -> None:
    made = scores()
    twice = Scores(made.levels, made.domains, made.mean[[0, 0]], made.total[[0, 0]]).intervals(samples=50)
    torch.testing.assert_close(twice[0], twice[1])
    certain = Scores(("no", "yes"), ("d", "d"), torch.tensor([[[0.0, 1], [0, 1]]]), torch.zeros(1, 2, 2))
    torch.testing.assert_close(certain.intervals()[0, 0, 1], torch.ones(2, dtype=torch.float64))
    with pytest.raises(AlignvecError, match="confidence"):
        made.intervals(confidence=1.5)
