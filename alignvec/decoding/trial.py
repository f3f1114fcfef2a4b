"""Whether a decode step computes what the model's own forward does: found by running both on a few tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from alignvec.coefficients import Coefficients
from alignvec.decoding.cache import RowCache
from alignvec.decoding.prefill import lent

LENGTHS = (5, 3)  # tokens before the one that is tried, of two rows
_SLACK = {
    torch.float32: 1e-3,
    torch.float16: 3e-2,
    torch.bfloat16: 1e-1,
}  # of logits; another function is off by all of it


def tokens(model: Any) -> Tensor:
    """Two rows of token ids, [2, max(LENGTHS) + 1]."""
    generator = torch.Generator().manual_seed(0)
    size = min(model.get_input_embeddings().weight.shape[0], model.get_output_embeddings().weight.shape[0])
    ids = torch.randint(size, (len(LENGTHS), max(LENGTHS) + 1), generator=generator)
    return ids.to(model.get_input_embeddings().weight.device)


def prompt(model: Any, coefficients: Coefficients | None) -> DynamicCache:
    """Keys and values of the rows, as the model writes them."""
    cache = DynamicCache()
    with lent(coefficients, _mixes(coefficients)):
        model.base_model(input_ids=tokens(model)[:, :-1], past_key_values=cache, use_cache=True)
    return cache


def differs(
    model: Any,
    prompted: DynamicCache,
    build: Callable[[RowCache], Callable[[Tensor], Tensor]],
    coefficients: Coefficients | None,
) -> str | None:
    """None, or a sentence where the step that `build` makes for a cache computes other logits than the model."""
    cache = RowCache(prompted, len(LENGTHS), max(LENGTHS) + 3)
    ids = tokens(model)
    for row, length in enumerate(LENGTHS):
        cache.store(row, prompted, row, length)
    last = torch.stack([own[length] for own, length in zip(ids, LENGTHS, strict=True)])
    with lent(coefficients, _mixes(coefficients)):
        got = build(cache)(last).float()
        logits = model(input_ids=ids, use_cache=False).logits.float()
    wanted = torch.stack([own[length] for own, length in zip(logits, LENGTHS, strict=True)])
    wanted, got = wanted - wanted.mean(-1, keepdim=True), got - got.mean(-1, keepdim=True)
    error = float(((got - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max())
    if error <= _SLACK[cache.layers[0][0].dtype]:
        return None
    return f"its logits differ from those of the model's own forward by {error:.0%}"


def _mixes(coefficients: Coefficients | None) -> list[tuple[float, ...] | None]:
    if coefficients is None:
        return [None] * len(LENGTHS)
    count = len(coefficients.names)
    return [(1.0,) * count, (0.0,) * count]
