"""The surrogate: exact for what polynomials hold, near for what is smooth, refused elsewhere."""

from collections.abc import Mapping, Sequence

import pytest
import torch

from alignvec import AlignvecError
from alignvec.evaluate import Scores
from alignvec.search.surrogate import surrogate

NAMES = ("a", "b", "c")
DOMAINS = ("one", "two") * 40


def smooth(mixes: Sequence[Mapping[str, float]], order: int = 2) -> Scores:
    """Log-probabilities that are polynomials of the coefficients, with a little of the tanh for order 0."""
    generator = torch.Generator().manual_seed(4)
    slopes = torch.randn(3, len(DOMAINS) * 3, generator=generator, dtype=torch.float64)
    start = torch.randn(len(DOMAINS) * 3, generator=generator, dtype=torch.float64)
    values = torch.tensor([[mix.get(name, 0.0) for name in NAMES] for mix in mixes], dtype=torch.float64) @ slopes
    mean = start + (0.8 * torch.tanh(values) if order == 0 else values - 0.2 * values**order)
    mean = mean.view(len(mixes), len(DOMAINS), 3).float()
    return Scores(("low", "mid", "high"), DOMAINS, mean, 7 * mean)


def drawn(count: int) -> list[dict[str, float]]:
    return [dict(zip(NAMES, row.tolist(), strict=True)) for row in torch.rand(count, 3) * 2 - 1]


def test_polynomials_up_to_the_nodes_order_are_exact() -> None:
    mixes = [*drawn(20), {}, {"b": 1.0}]
    made = surrogate(smooth, NAMES, nodes=3)
    assert len(made.measured.mean) == 27
    torch.testing.assert_close(made.scores(mixes).mean, smooth(mixes).mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(made.scores(mixes).total, smooth(mixes).total, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(made.rates(mixes * 30), smooth(mixes * 30).rates())
    cubic = surrogate(lambda mixes: smooth(mixes, order=3), NAMES, nodes=3).scores(mixes)
    assert not torch.allclose(cubic.mean, smooth(mixes, order=3).mean, atol=1e-2)


def test_more_nodes_come_nearer_to_what_is_smooth() -> None:
    mixes, errors = drawn(50), []
    for nodes in (3, 5, 7):
        predicted = surrogate(lambda mixes: smooth(mixes, order=0), NAMES, nodes).rates(mixes)
        errors.append(float((predicted - smooth(mixes, order=0).rates()).abs().mean()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.01


def test_refusals() -> None:
    made = surrogate(smooth, NAMES, nodes=2, low=-0.5, high=1.0)
    with pytest.raises(AlignvecError, match="'d' is none of"):
        made.scores([{"d": 0.1}])
    with pytest.raises(AlignvecError, match=r"outside of -0\.5 to 1"):
        made.scores([{"a": -0.6}])
    with pytest.raises(AlignvecError, match="at least 2 nodes"):
        surrogate(smooth, NAMES, nodes=1)
    with pytest.raises(AlignvecError, match="take fewer"):
        surrogate(smooth, NAMES, nodes=21)
    with pytest.raises(AlignvecError, match="must be below"):
        surrogate(smooth, NAMES, low=1.0, high=1.0)
