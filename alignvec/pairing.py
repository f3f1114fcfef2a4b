"""The two sides of an extraction, matched tensor by tensor: what is shared, what differs in shape or dtype."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from alignvec.checkpoint import TensorInfo
from alignvec.errors import AlignvecError
from alignvec.fingerprint import dtype_name, summary
from alignvec.sources import LiveSource, Source

EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
HEADS = ("lm_head.weight", "embed_out.weight")


@dataclass(frozen=True)
class Plan:
    """What extraction does with the tensors of two sides that fit together."""

    stored: dict[str, TensorInfo]  # floating tensors to subtract: the delta's dtype and shape, widest dtype first
    integers: list[str]  # tensors that have to be equal
    bits: bool = False  # a zero that changed its sign counts as a difference
    left_out: frozenset[str] = frozenset()  # tensors of which no delta is wanted


def match(left: Source, right: Source, dtype: torch.dtype | None) -> Plan:
    """Match the two sides by name; AlignvecError names what does not match."""
    ours, theirs = _unshared(left, right)
    if lines := [f"{name} is missing in {right.label}" for name in ours if name not in theirs] + [
        f"{name} is missing in {left.label}" for name in theirs if name not in ours
    ]:
        raise AlignvecError(f"{left.label} and {right.label} hold different tensors: {summary(lines)}")
    lines = [
        f"{name} is {list(info.shape)} in {left.label} and {list(theirs[name].shape)} in {right.label}"
        for name, info in ours.items()
        if info.shape != theirs[name].shape
    ]
    if lines:
        advice = ""
        if any(line.split(" is ")[0].endswith(EMBEDDINGS + HEADS) for line in lines):
            advice = " (was the vocabulary resized? resize the base's embeddings alike and save it before extracting)"
        raise AlignvecError(f"shapes differ: {summary(lines)}{advice}")
    floating = {name: info for name, info in ours.items() if info.dtype.is_floating_point}
    lines = [
        f"{name} is {dtype_name(info.dtype)} in {left.label} and {dtype_name(theirs[name].dtype)} in {right.label}"
        for name, info in ours.items()
        if info.dtype != theirs[name].dtype
        and (dtype is None or info.dtype.is_floating_point != theirs[name].dtype.is_floating_point)
    ]
    if lines:
        raise AlignvecError(f"dtypes differ: {summary(lines)}; pass dtype= to say how the vector is to be kept")
    stored = {name: TensorInfo(dtype or info.dtype, info.shape) for name, info in floating.items()}
    stored = dict(sorted(stored.items(), key=lambda item: -item[1].dtype.itemsize))
    return Plan(stored, [name for name in ours if name not in floating])


def _unshared(left: Source, right: Source) -> tuple[dict[str, TensorInfo], dict[str, TensorInfo]]:
    """Both sides' tensors without what they share with another one: a stored copy of a tied head, a model's buffers."""
    ours, theirs = dict(left.tensors), dict(right.tensors)
    for one, other, tensors in ((left, right, theirs), (right, left, ours)):
        if isinstance(one, LiveSource) and not isinstance(other, LiveSource):
            for name in one.buffers & tensors.keys():
                del tensors[name]
    for head in HEADS:
        holders = [side for side, tensors in ((left, ours), (right, theirs)) if head in tensors]
        tied = [side for side in holders if tied_to(side, head) is not None]
        if len(holders) == 1 and not tied:
            other = right if holders[0] is left else left
            raise AlignvecError(
                f"{head} is stored in {holders[0].label} with values of its own, while {other.label} lacks it (tied to "
                "its embedding): save both models with the same tie_word_embeddings"
            )
        if len(tied) == len(holders) and (len(holders) == 1 or not any(_untied(side.config) for side in holders)):
            ours.pop(head, None)
            theirs.pop(head, None)
    return ours, theirs


def tied_to(source: Source, head: str) -> str | None:
    """The embedding that the tensor ``head`` is an exact copy of, if there is one."""
    info = source.tensors.get(head)
    candidates = [
        name
        for name, other in source.tensors.items()
        if info is not None and name.endswith(EMBEDDINGS) and (other.shape, other.dtype) == (info.shape, info.dtype)
    ]
    for name in candidates:
        if all(torch.equal(*pair) for pair in zip(source.chunks(name), source.chunks(head), strict=True)):
            return name
    return None


def _untied(config: Any) -> bool:
    value = (
        config.get("tie_word_embeddings") if isinstance(config, dict) else getattr(config, "tie_word_embeddings", None)
    )
    return value is False
