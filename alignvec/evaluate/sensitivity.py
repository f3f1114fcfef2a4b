"""How much turning one vector moves the rates of every domain."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from alignvec.errors import AlignvecError


def sensitivity(
    measure: Callable[[list[Mapping[str, float]]], Any], names: Sequence[str], *, coefficient: float = 0.5
) -> Tensor:
    """Change of the rates per unit of coefficient when each vector is turned alone, float64 [vectors, domains, levels].

    Central differences about the base, (rates(+c) - rates(-c)) / 2c, of all vectors in one call of ``measure``, which
    takes mixes and gives rates [mixes, domains, levels] (an array or a tensor). At one level, as ``result[:, :, 2]``,
    that is the matrix of vectors by domains: what lies off its diagonal is what a domain feels of the others' vectors.
    Rates are shares of questions and move in steps: a small ``coefficient`` needs many questions.

    Raises AlignvecError for no names, a name given twice, a coefficient that is not above 0, or rates of another shape.
    """
    if not names or len(set(names)) < len(names):
        raise AlignvecError("sensitivity needs the names of the vectors, each once")
    if not 0 < coefficient < math.inf:
        raise AlignvecError(f"coefficient={coefficient} must be above 0: vectors are turned by it in both directions")
    mixes: list[Mapping[str, float]] = [{name: sign * coefficient} for name in names for sign in (1, -1)]
    rates = torch.as_tensor(measure(mixes), dtype=torch.float64)
    if rates.dim() != 3 or len(rates) != len(mixes):
        raise AlignvecError(
            f"measure gave rates of shape {list(rates.shape)} for {len(mixes)} mixes; it must give "
            "[mixes, domains, levels]"
        )
    return (rates[0::2] - rates[1::2]) / (2 * coefficient)
