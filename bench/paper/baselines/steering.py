"""Contrastive activation steering (CAA, arXiv 2312.06681): a direction added to the residual stream at one layer.

A domain's direction at a layer is the mean, over training questions, of the layer's output where it predicts a
response of the one level (expert) less that of the other (avoidance). It is added, times a strength, wherever a
response's tokens are predicted: at the prompt's last token and every token of the response. Directions are not
normalised further, so a strength of 1 moves the stream by the mean difference itself. The paper turns from about -2 to
2; what is of use depends on model and layer: on the shipped models up to 4. Strengths are rows of a batch, as mixes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignvec.errors import AlignvecError
from alignvec.evaluate import Question, Scores
from alignvec.evaluate.batches import Batch
from alignvec.evaluate.scorer import Scorer
from bench.paper.baselines.outcome import outcome, scores

Strengths = Mapping[str, float]  # by domain
Directions = Mapping[str, Tensor]  # a domain's direction at every layer, float32 [layers, hidden]


def directions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    towards: str = "expert",
    away: str = "avoidance",
) -> dict[str, Tensor]:
    """Every domain's direction at every layer, float32 [layers, hidden] on the CPU, from training questions.

    A response counts as the mean of its tokens, so that long ones weigh no more.
    """
    scorer = Scorer(model, tokenizer, questions)
    layers, made = layers_of(model), scorer.batches()
    states = torch.zeros(len(layers), scorer.responses, model.config.hidden_size)
    with torch.inference_mode(), contextlib.ExitStack() as stack:
        seen: list[Tensor] = []
        for layer in layers:
            stack.enter_context(_hooked(layer, seen.append))
        for batch in made:
            seen.clear()
            batch.logits(model)
            for layer_states, output in zip(states, seen, strict=True):
                picked = output[:, batch.first :].flatten(0, 1)[batch.sources.to(output.device)]
                layer_states.index_add_(0, batch.owners, picked.float().cpu())
    lengths = torch.tensor([len(response) for each in scorer.encoded for response in each.responses])
    states = (states / lengths[:, None]).view(len(layers), len(questions), len(scorer.levels), -1)
    change = states[:, :, scorer.levels.index(towards)] - states[:, :, scorer.levels.index(away)]
    return {
        domain: change[:, [i for i, question in enumerate(questions) if question.domain == domain]].mean(1)
        for domain in scorer.domains
    }


def choose_layer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    found: Directions,
    *,
    strength: float = 4.0,
    towards: str = "expert",
    away: str = "avoidance",
) -> int:
    """The layer where turning every domain's own direction up and down by ``strength`` moves its rates most.

    ``questions`` are training questions again, best ones that the directions have not seen. ``strength`` should be the
    largest that will be used: another layer may be best for weaker ones. What is compared: rate of
    ``towards`` less rate of ``away``, turned up less turned down, averaged over domains; of equals the first.
    """
    scorer = Scorer(model, tokenizer, questions)
    up, down = scorer.levels.index(towards), scorer.levels.index(away)
    settings = [{domain: sign * strength} for domain in scorer.domains for sign in (1, -1)]
    moved = []
    for layer in range(len(layers_of(model))):
        shares = steered(scorer, found, layer, settings).rates()
        lean = shares[:, :, up] - shares[:, :, down]
        moved.append(sum(float(lean[2 * i, i] - lean[2 * i + 1, i]) for i in range(len(scorer.domains))))
    return max(range(len(moved)), key=moved.__getitem__)


def rates(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    found: Directions,
    layer: int,
    settings: Sequence[Strengths],
    *,
    by: str = "mean",
    batch_tokens: int | None = None,
) -> dict[str, Any]:
    """Rates under steering at ``layer``; a setting gives domains' directions their strengths, which add up.

    Each setting takes a forward of its own, several of them as rows of one; answering takes no more forwards than the
    model alone.
    """
    scorer = Scorer(model, tokenizer, questions, batch_tokens=batch_tokens)
    made = steered(scorer, found, layer, settings)
    return outcome(settings, made, by, layer=layer, forwards_per_setting=1, forwards_per_token=1)


@torch.inference_mode()
def steered(
    scorer: Scorer, found: Directions, layer: int, settings: Sequence[Strengths], *, rows: int | None = None
) -> Scores:
    """Scores [settings, questions, levels]; ``rows``: settings in a forward, default as the scorer's budget has it.

    Raises AlignvecError for no settings, or a domain without a direction.
    """
    if not settings:
        raise AlignvecError("there are no settings: give at least one, {} for the model as it is")
    model = scorer.model
    longest = max(len(each.prompt) + sum(map(len, each.responses)) for each in scorer.encoded)
    rows = min(len(settings), rows or max(1, scorer.batch_tokens // longest))
    total = torch.zeros(len(settings), scorer.responses)
    shifts = torch.stack([_shift(found, layer, setting) for setting in settings]).to(model.device, model.dtype)
    made = scorer.batches(rows)
    for start in range(0, len(settings), rows):
        chosen = shifts[start : start + rows]
        for batch in made:
            here = _answering(batch).to(chosen)[None, :, :, None]  # [1, sequences, length, 1]
            change = (here * chosen[:, None, None, :]).flatten(0, 1)
            with _hooked(layers_of(model)[layer], lambda output, change=change: output + change):
                logits = batch.logits(model, len(chosen))
            total[start : start + rows] += batch.sums(logits, scorer.responses, len(chosen))
    return scores(scorer, total)


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The model's decoder layers, by its config's number of them."""
    count = model.config.num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise AlignvecError(f"{type(model).__name__} has no list of {count} layers to steer")


def _shift(found: Directions, layer: int, strengths: Strengths) -> Tensor:
    """What a setting adds to the stream, [hidden]."""
    if unknown := sorted(strengths.keys() - found.keys()):
        raise AlignvecError(f"there is no direction for {unknown[0]!r}, only for {', '.join(found)}")
    shift = torch.zeros_like(next(iter(found.values()))[layer])
    for domain, strength in strengths.items():
        shift += strength * found[domain][layer]
    return shift


def _answering(batch: Batch) -> Tensor:
    """Where the batch predicts tokens of responses, bool [sequences, length]."""
    sequences, length = batch.ids.shape
    flat = torch.zeros(sequences * (length - batch.first), dtype=torch.bool)
    flat[batch.sources] = True
    return nn.functional.pad(flat.view(sequences, -1), (batch.first, 0))


@contextlib.contextmanager
def _hooked(layer: nn.Module, see: Any) -> Iterator[None]:
    """``see`` gets the layer's output [rows, length, hidden]; what it returns, if not None, takes its place."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        inner = isinstance(output, tuple)
        changed = see(output[0] if inner else output)
        return None if changed is None else (changed, *output[1:]) if inner else changed

    handle = layer.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
