"""Mixing logits: the next token's distribution is a product of powers of several models' distributions.

DeRa (arXiv 2402.02992) mixes a base and an aligned model, MOD (arXiv 2406.18853) any number:

    log p = log-softmax( l_base + sum_i c_i (l_i - l_base) )

a base's weight being 1 - sum c_i. Coefficients may be negative or exceed 1. Log-probabilities and logits give the same:
what a position's logits all share drops out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from alignvec.alignment import Alignment
from alignvec.errors import AlignvecError
from alignvec.evaluate import Question, Scores
from alignvec.evaluate.batches import Batch
from alignvec.evaluate.scorer import Scorer
from bench.paper.baselines.outcome import outcome, scores

Mix = Mapping[str, float]
PIECE = 1 << 24  # mixed logits held at a time


def rates(
    alignment: Alignment,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    settings: Sequence[Mix],
    *,
    by: str = "mean",
    batch_tokens: int | None = None,
) -> dict[str, Any]:
    """Rates under the mixed logits of the base and of each vector's aligned model, as plain data.

    See ``mixed`` for the coefficients. All settings share 1 + k forwards of the questions (``forwards``, and
    ``forwards_per_setting``); answering takes 1 + k forwards a token.
    """
    policies = 1 + len(alignment.names)
    found = mixed(Scorer(alignment, tokenizer, questions, batch_tokens=batch_tokens), settings)
    cost = {"forwards": policies, "forwards_per_setting": policies / len(settings), "forwards_per_token": policies}
    return outcome(settings, found, by, **cost)


@torch.inference_mode()
def mixed(scorer: Scorer, settings: Sequence[Mix]) -> Scores:
    """Scores [settings, questions, levels] under mixed logits, of a scorer with vectors attached.

    A setting gives each attached vector's model its coefficient; those left out get 0. Each policy's logits are
    computed once a batch, whatever the number of settings. Raises AlignvecError for no settings or an unknown name.
    """
    alignment = scorer.alignment
    if alignment is None:
        raise AlignvecError("mixing needs the aligned models as vectors: score an alignvec.attach() result")
    weights = policy_weights(alignment.names, settings)
    policies: list[Mix] = [{}, *({name: 1.0} for name in alignment.names)]
    total = torch.zeros(len(settings), scorer.responses)
    with alignment.using({}):
        for batch in scorer.batches():
            logits = []
            for policy in policies:
                alignment.set(policy)
                logits.append(batch.logits(scorer.model).flatten(0, 1)[batch.sources.to(scorer.model.device)])
            total.index_add_(1, batch.owners, log_probabilities(torch.stack(logits), batch, weights).cpu())
    return scores(scorer, total)


def policy_weights(names: Sequence[str], settings: Sequence[Mix]) -> Tensor:
    """float32 [settings, 1 + k]: what each policy's logits count for, the base's first; a row adds up to 1."""
    if not settings:
        raise AlignvecError("there are no settings: give at least one, {} for the base")
    for setting in settings:
        if unknown := sorted(setting.keys() - set(names)):
            raise AlignvecError(f"no model is called {unknown[0]!r}; there are {', '.join(names)}")
    turned = torch.tensor([[float(setting.get(name, 0.0)) for name in names] for setting in settings])
    return torch.cat([1 - turned.sum(1, keepdim=True), turned], dim=1)


def log_probabilities(logits: Tensor, batch: Batch, weights: Tensor) -> Tensor:
    """Log-probability of each target, float32 [settings, targets], out of logits [1 + k, targets, vocabulary]."""
    weights, targets = weights.to(logits.device), batch.targets.to(logits.device)
    found = []
    for piece, chosen in zip(
        logits.split(step := max(1, PIECE // (len(weights) * logits.shape[-1])), dim=1),
        targets.split(step),
        strict=True,
    ):
        mix = torch.einsum("sp,ptv->stv", weights, piece.float())
        picked = mix.gather(-1, chosen.expand(len(mix), -1)[..., None])[..., 0]
        found.append(picked - mix.logsumexp(-1))
    return torch.cat(found, dim=1)
