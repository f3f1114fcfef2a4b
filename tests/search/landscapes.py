"""A landscape such as real vectors make, in closed form: level rates of simulated questions over three coefficients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NAMES = ("medical", "legal", "financial")
LEVELS = ("avoidance", "generic", "expert")
QUESTIONS = 40


class Simulated:
    """An evaluator that counts its calls. Logits are quadratic in the coefficients; each question adds its own.

    A domain's own vector moves it from avoidance to expert; the others move it too, by up to `interference` of that.
    """

    def __init__(
        self, seed: int = 0, questions: int = QUESTIONS, interference: float = 0.35, pull: float = 3.0
    ) -> None:
        draw = torch.Generator().manual_seed(seed)
        own = torch.eye(3, dtype=torch.float64)
        pulls = torch.tensor([-pull, 0.0, pull], dtype=torch.float64)  # of a level, along the vectors
        strength = own + (1 - own) * interference * (2 * torch.rand(3, 3, generator=draw, dtype=torch.float64) - 1)
        self.linear = strength[:, None, :] * pulls[None, :, None]  # [domains, levels, names]
        bend = torch.rand(3, 3, 3, generator=draw, dtype=torch.float64) - 0.5
        self.quadratic = 0.5 * bend - torch.tensor([0.0, 1.0, 0.0])[None, :, None] * own[:, None, :]
        self.offset = torch.tensor([-1.0, 1.2, 0.0], dtype=torch.float64) + 0.3 * torch.randn(
            3, 3, generator=draw, dtype=torch.float64
        )
        self.noise = 0.9 * torch.randn(3, questions, 3, generator=draw, dtype=torch.float64)
        self.mixes = self.calls = 0

    def __call__(self, mixes: Sequence[dict[str, float]]) -> Tensor:
        self.calls, self.mixes = self.calls + 1, self.mixes + len(mixes)
        c = torch.tensor([[mix[name] for name in NAMES] for mix in mixes], dtype=torch.float64)
        logits = torch.einsum("dln,mn->mdl", self.linear, c) + torch.einsum("dln,mn->mdl", self.quadratic, c**2)
        choices = (logits + self.offset)[:, :, None, :].add(self.noise).argmax(-1)  # [mixes, domains, questions]
        return torch.nn.functional.one_hot(choices, len(LEVELS)).double().mean(2)
