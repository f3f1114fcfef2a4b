"""Log-probabilities of stored responses, and the preference rates that they make."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alignvec.errors import AlignvecError
from alignvec.evaluate.questions import members_of


@dataclass(frozen=True)
class Scores:
    """What `Scorer` measured: log-probabilities in nats of every response, under every mix.

    ``mean`` (a token) and ``total`` (of the response, its end-of-text included) are float32 [mixes, questions, levels]
    on the CPU; ``domains`` has one entry a question.
    """

    levels: tuple[str, ...]
    domains: tuple[str, ...]
    mean: Tensor
    total: Tensor

    def choices(self, by: str = "mean") -> Tensor:
        """Index of the likeliest level of each question, int64 [mixes, questions].

        ``by``: "mean" log-probability a token, which the lengths of levels do not sway, or "sum".
        """
        if by not in ("mean", "sum"):
            raise AlignvecError(f'rates go by "mean" or "sum", not {by!r}')
        return (self.mean if by == "mean" else self.total).argmax(-1)

    def rates(self, by: str = "mean") -> Tensor:
        """Share of each domain's questions whose likeliest response is of each level, float64 [mixes, domains, levels].

        Domains are in order of appearance. arXiv 2410.19206 calls this preference accuracy.
        """
        return self._shares(self._hits(by), torch.ones(1, len(self.domains), dtype=torch.float64))[:, 0]

    def intervals(self, by: str = "mean", confidence: float = 0.95, samples: int = 1000, seed: int = 0) -> Tensor:
        """Percentile bootstrap of `rates` over each domain's questions, float64 [mixes, domains, levels, 2].

        Resampled questions are the same ones at every mix, so that differences between mixes may be read off, too.
        """
        if not 0 < confidence < 1 or samples < 1:
            raise AlignvecError(f"confidence must lie between 0 and 1, not {confidence}, and samples be at least 1")
        generator = torch.Generator().manual_seed(seed)
        weights = torch.zeros(samples, len(self.domains), dtype=torch.float64)
        for members in members_of(self.domains):
            drawn = members[torch.randint(len(members), (samples, len(members)), generator=generator)]
            weights.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
        shares = self._shares(self._hits(by), weights)
        ends = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
        return torch.quantile(shares, ends, dim=1).permute(1, 2, 3, 0)

    def _hits(self, by: str) -> Tensor:
        return torch.nn.functional.one_hot(self.choices(by), len(self.levels)).double()

    def _shares(self, hits: Tensor, weights: Tensor) -> Tensor:
        """Weighted shares by domain, [mixes, samples, domains, levels], of hits [mixes, questions, levels]."""
        shares = [
            torch.einsum("sq,mql->msl", weights[:, members] / len(members), hits[:, members])
            for members in members_of(self.domains)
        ]
        return torch.stack(shares, dim=2)
