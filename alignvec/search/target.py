"""What a search is after: a level wanted in each domain, under constraints."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alignvec.errors import AlignvecError

TERM = re.compile(r"(?P<domain>[^=<>]+)=(?P<level>[^=<>]+)(?:(?P<sign>[<>])=(?P<bound>[^=<>]+))?")


@dataclass(frozen=True)
class Constraint:
    """The rate of a level in a domain that must not be passed: `medical=expert>=0.9`, `legal=avoidance<=0.1`."""

    domain: str
    level: str
    sign: str  # "<" or ">", each with the bound itself allowed
    bound: float

    def __str__(self) -> str:
        return f"{self.domain}={self.level}{self.sign}={self.bound:g}"


@dataclass(frozen=True)
class Target:
    """A wanted level by domain; domains that are not named are free.

    `domains` and `levels` are those of the rates [..., domains, levels] that are judged, `wanted` has
    (domain, level) pairs.
    """

    domains: tuple[str, ...]
    levels: tuple[str, ...]
    wanted: tuple[tuple[str, str], ...]
    constraints: tuple[Constraint, ...] = ()

    @classmethod
    def parse(cls, text: str, domains: Sequence[str], levels: Sequence[str], constraints: Sequence[str] = ()) -> Target:
        """`"medical=expert,legal=avoidance"`, with constraints among the terms (`"legal=avoidance<=0.1"`) or apart.

        Raises AlignvecError for a term that is neither, a domain or level that does not exist, a domain wanted twice,
        a bound outside [0, 1], and a text that wants nothing.
        """
        wanted: dict[str, str] = {}
        bounds: list[Constraint] = []
        terms = [(term.strip(), False) for term in text.split(",")]
        terms += [(term.strip(), True) for part in constraints for term in part.split(",")]
        for term, constrains in terms:
            found = TERM.fullmatch(term)
            if found is None:
                raise AlignvecError(
                    f"a target takes DOMAIN=LEVEL, or DOMAIN=LEVEL>=SHARE as a constraint, not {term!r}"
                )
            domain, level = found["domain"].strip(), found["level"].strip()
            if domain not in domains:
                raise AlignvecError(f"{term!r}: no domain is named {domain!r}; there are {', '.join(domains)}")
            if level not in levels:
                raise AlignvecError(f"{term!r}: no level is named {level!r}; there are {', '.join(levels)}")
            if found["sign"]:
                bounds.append(Constraint(domain, level, found["sign"], _share(term, found["bound"])))
            elif constrains:
                raise AlignvecError(f"{term!r} is no constraint: write {domain}={level}>=0.9, or <=")
            elif domain in wanted:
                raise AlignvecError(f"the target names the domain {domain!r} twice")
            else:
                wanted[domain] = level
        if not wanted:
            raise AlignvecError("the target wants nothing: name a level, as in medical=expert")
        return cls(tuple(domains), tuple(levels), tuple(wanted.items()), tuple(bounds))

    def __str__(self) -> str:
        return ",".join([f"{domain}={level}" for domain, level in self.wanted] + [str(c) for c in self.constraints])

    def wanted_rates(self, rates: Tensor) -> Tensor:
        """The rate of the wanted level in each domain of the target: [..., wanted] of rates [..., domains, levels]."""
        return torch.stack([self._rate(rates, domain, level) for domain, level in self.wanted], dim=-1)

    def score(self, rates: Tensor) -> Tensor:
        """Mean of the wanted levels' rates over the target's domains: [...] of rates [..., domains, levels]."""
        return self.wanted_rates(rates).mean(-1)

    def reached(self, rates: Tensor) -> Tensor:
        """Whether every wanted level is more frequent in its domain than each other one, and no constraint is broken.

        bool [...] of rates [..., domains, levels]; a tie does not count as reached.
        """
        reached = self.feasible(rates)
        for domain, level in self.wanted:
            others = [self._rate(rates, domain, other) for other in self.levels if other != level]
            reached = reached & (self._rate(rates, domain, level) > torch.stack(others, -1).amax(-1))
        return reached

    def violations(self, rates: Tensor) -> Tensor:
        """How far each constraint is broken, <= 0 if it is kept: [..., constraints] of rates [..., domains, levels]."""
        broken = [
            (self._rate(rates, c.domain, c.level) - c.bound) * (1 if c.sign == "<" else -1) for c in self.constraints
        ]
        return torch.stack(broken, -1) if broken else rates.new_zeros((*rates.shape[:-2], 0))

    def feasible(self, rates: Tensor) -> Tensor:
        """Whether all constraints are kept: bool [...] of rates [..., domains, levels]."""
        return (self.violations(rates) <= 1e-9).all(-1)

    def _rate(self, rates: Tensor, domain: str, level: str) -> Tensor:
        return rates[..., self.domains.index(domain), self.levels.index(level)]


def all_targets(domains: Sequence[str], levels: Sequence[str], constraints: Sequence[str] = ()) -> list[Target]:
    """Every way to want a level in each domain, the last domain's changing first: 27 for three domains and levels."""
    texts = [
        ",".join(f"{domain}={level}" for domain, level in zip(domains, chosen, strict=True))
        for chosen in itertools.product(levels, repeat=len(domains))
    ]
    return [Target.parse(text, domains, levels, constraints) for text in texts]


def _share(term: str, text: str) -> float:
    try:
        bound = float(text)
    except ValueError:
        bound = -1.0
    if not 0 <= bound <= 1:
        raise AlignvecError(f"{term!r}: a constraint's bound is a share between 0 and 1, not {text.strip()!r}")
    return bound
