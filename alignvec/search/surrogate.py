"""The whole landscape from a few mixes: log-probabilities are smooth in the coefficients, only the rates have steps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from alignvec.errors import AlignvecError
from alignvec.evaluate.scores import Scores

Score = Callable[[Sequence[dict[str, float]]], Scores]
PIECE = 512  # mixes predicted at a time: mixes x questions x levels float64 values


@dataclass(frozen=True)
class Surrogate:
    """Scores at the nodes of a tensor grid, and the polynomial through them.

    ``names``: of the vectors. ``axis``: the nodes' coefficients, the same for each vector. ``measured``: scores at all
    combinations of them, the last name's running fastest.
    """

    names: tuple[str, ...]
    axis: tuple[float, ...]
    measured: Scores

    def scores(self, mixes: Sequence[Mapping[str, float]]) -> Scores:
        """Predicted log-probabilities. Raises AlignvecError for unknown names and mixes outside of the nodes."""
        low, high = self.axis[-1], self.axis[0]
        for mix in mixes:
            if unknown := set(mix) - set(self.names):
                raise AlignvecError(f"{sorted(unknown)[0]!r} is none of the predicted names {', '.join(self.names)}")
            if not all(low <= value <= high for value in mix.values()):
                raise AlignvecError(f"the mix {dict(mix)} lies outside of {low:g} to {high:g}, where it was measured")
        weights = [self._weights([mix.get(name, 0.0) for mix in mixes]) for name in self.names]
        mean, total = (self._predict(values, weights) for values in (self.measured.mean, self.measured.total))
        return replace(self.measured, mean=mean, total=total)

    def rates(self, mixes: Sequence[Mapping[str, float]], by: str = "mean") -> Tensor:
        """Predicted rates [mixes, domains, levels], as `Landscape` measures them."""
        pieces = [mixes[start : start + PIECE] for start in range(0, len(mixes), PIECE)]
        return torch.cat([self.scores(piece).rates(by) for piece in pieces])

    def _weights(self, coefficients: Sequence[float]) -> Tensor:
        """Lagrange's basis polynomials at the coefficients, float64 [mixes, nodes]."""
        at = torch.tensor(coefficients, dtype=torch.float64)[:, None, None]
        nodes = torch.tensor(self.axis, dtype=torch.float64)
        own = torch.eye(len(nodes), dtype=torch.bool)
        factors = (at - nodes) / (nodes[:, None] - nodes).masked_fill(own, 1.0)
        return factors.masked_fill(own, 1.0).prod(-1)

    def _predict(self, values: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """[mixes, questions, levels] from values at the nodes: one axis after the other."""
        grid = values.double().view(*[len(self.axis)] * len(weights), -1)
        found = torch.einsum("mn,n...->m...", weights[0], grid)
        for weight in weights[1:]:
            found = torch.einsum("mn,mn...->m...", weight, found)
        return found.view(-1, *values.shape[1:]).float()


def surrogate(
    score: Score, names: Sequence[str], nodes: int = 5, low: float = -1.0, high: float = 1.0, *, most: int = 4096
) -> Surrogate:
    """Measure `nodes` coefficients a vector, in every combination, and predict all others: 125 mixes for three vectors.

    Nodes are Chebyshev's points of the second kind, which polynomials through them take kindly. How good it is shows in
    a few mixes measured besides: see `Surrogate.rates`.

    Args:
        score: an `alignvec.evaluate.Scorer`, or any callable that gives the scores of mixes.
        names: of the vectors, all of which `score` knows.

    Raises AlignvecError for less than two nodes, no names, bounds that are not finite and increasing, or more than
    `most` combinations.
    """
    if nodes < 2 or not names:
        raise AlignvecError(f"a surrogate needs names and at least 2 nodes, not {len(names)} names and {nodes} nodes")
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise AlignvecError(f"the lower coefficient {low} must be below the upper one {high}")
    if nodes ** len(names) > most:
        raise AlignvecError(f"{nodes} nodes for each of {len(names)} vectors are more than {most} mixes: take fewer")
    middle, half = (high + low) / 2, (high - low) / 2
    axis = tuple(middle + half * math.cos(math.pi * i / (nodes - 1)) for i in range(nodes))
    mixes = [dict(zip(names, values, strict=True)) for values in itertools.product(axis, repeat=len(names))]
    return Surrogate(tuple(names), axis, score(mixes))
