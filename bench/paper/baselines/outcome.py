"""What a baseline gives: its rates as plain data, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from alignvec.evaluate import Scores
from alignvec.evaluate.scorer import Scorer


def scores(scorer: Scorer, total: Tensor) -> Scores:
    """Scores from log-probabilities [settings, responses], summed over tokens, in the scorer's order of responses."""
    lengths = torch.tensor([len(response) for question in scorer.encoded for response in question.responses])
    shape = (len(total), len(scorer.questions), len(scorer.levels))
    domains = tuple(question.domain for question in scorer.questions)
    return Scores(scorer.levels, domains, (total / lengths).view(shape), total.view(shape))


def outcome(settings: Sequence[Mapping[str, Any]], found: Scores, by: str, **cost: Any) -> dict[str, Any]:
    """``rates`` [settings, domains, levels] beside what the axes are, and the figures in ``cost``."""
    return {
        "settings": [dict(setting) for setting in settings],
        "domains": list(dict.fromkeys(found.domains)),
        "levels": list(found.levels),
        "by": by,
        "rates": found.rates(by).tolist(),
        **cost,
    }
