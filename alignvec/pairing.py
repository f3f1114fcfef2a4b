"""The two sides of an extraction, matched tensor by tensor: what is shared, what differs in shape or dtype."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from alignvec.checkpoint import TensorInfo
from alignvec.errors import AlignvecError
from alignvec.fingerprint import dtype_name, summary
from alignvec.sources import LiveSource, Source, StoredSource
from alignvec.unloaded import Unloaded, quantisation
from alignvec.wrappers import is_adapter

EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
HEADS = ("lm_head.weight", "embed_out.weight")


@dataclass(frozen=True)
class Plan:
    """What extraction does with the tensors of two sides that fit together."""

    stored: dict[str, TensorInfo]  # floating tensors to subtract: the delta's dtype and shape, widest dtype first
    integers: list[str]  # tensors that have to be equal
    bits: bool = False  # a zero that changed its sign counts as a difference
    alone: list[str] = field(default_factory=list)  # floating tensors of the base that its model does not load
    left_out: frozenset[str] = frozenset()  # tensors of which no delta is wanted


def alike(left: Source, right: Source) -> Source:
    """`right` by the names of `left`, where the two differ in what all names begin with: a bare backbone, a wrapper."""
    assert isinstance(right, (LiveSource, StoredSource))
    ours = [name for name in left.tensors if name not in right.tensors]
    theirs = [name for name in right.tensors if name not in left.tensors]
    for here, there in ((ours, theirs), (theirs, ours)):
        if not here or not there:
            continue
        longest = max(there, key=len)
        for prefix in [name.removesuffix(longest) for name in here if name.endswith(f".{longest}")]:
            names = {f"{prefix}{name}": name for name in there}
            if sum(name in names for name in here) * 2 > len(there):
                beside = [*right.buffers, *right.computed] if isinstance(right, LiveSource) else []
                if here is theirs:
                    return right.renamed(names | {name: name.removeprefix(prefix) for name in beside})
                return right.renamed({b: a for a, b in names.items()} | {name: f"{prefix}{name}" for name in beside})
    return right


def match(left: Source, right: Source, dtype: torch.dtype | None) -> Plan:
    """Match the two sides by name; AlignvecError names what does not match."""
    ours, theirs, alone = _shared(left, right)
    lines = [
        f"{name} is {list(info.shape)} in {left.label} and {list(theirs[name].shape)} in {right.label}"
        for name, info in ours.items()
        if info.shape != theirs[name].shape
    ]
    if lines:
        _require_unquantised(left, right, lines)
        advice = ""
        if any(line.split(" is ")[0].endswith(EMBEDDINGS + HEADS) for line in lines):
            advice = " (was the vocabulary resized? resize the base's embeddings alike and save it before extracting)"
        raise AlignvecError(f"shapes differ: {summary(lines)}{advice or _save_first(left, right)}")
    floating = {name: info for name, info in ours.items() if info.dtype.is_floating_point}
    lines = [
        f"{name} is {dtype_name(info.dtype)} in {left.label} and {dtype_name(theirs[name].dtype)} in {right.label}"
        for name, info in ours.items()
        if info.dtype != theirs[name].dtype and not (name in floating and theirs[name].dtype.is_floating_point)
    ]
    if lines:
        _require_unquantised(left, right, lines)
        raise AlignvecError(
            f"dtypes differ: {summary(lines)}; a difference is of floating-point tensors, and others have to be equal"
        )
    lines = [
        f"{name} is {dtype_name(info.dtype)} in {left.label} and {dtype_name(theirs[name].dtype)} in {right.label}"
        for name, info in floating.items()
        if info.dtype != theirs[name].dtype and dtype is None
    ]
    if lines:
        raise AlignvecError(f"dtypes differ: {summary(lines)}; pass dtype= to say how the vector is to be kept")
    stored = {name: TensorInfo(dtype or info.dtype, info.shape) for name, info in floating.items()}
    stored = dict(sorted(stored.items(), key=lambda item: -item[1].dtype.itemsize))
    return Plan(stored, [name for name in ours if name not in floating], alone=alone)


def _shared(left: Source, right: Source) -> tuple[dict[str, TensorInfo], dict[str, TensorInfo], list[str]]:
    """Both sides' tensors that are to be compared, the same names in each; and those that the base alone may have."""
    _settle_buffers(left, right)
    unloaded = Unloaded(left.config or right.config)
    ours, theirs = dict(left.tensors), dict(right.tensors)
    alone = []
    for mine, others in ((ours, theirs), (theirs, ours)):
        for name in [name for name in mine if name not in others and unloaded(name, mine[name].shape)]:
            if mine is ours and mine[name].dtype.is_floating_point:
                alone.append(name)
            del mine[name]
    if lines := [f"{name} is missing in {right.label}" for name in ours if name not in theirs and name not in HEADS] + [
        f"{name} is missing in {left.label}" for name in theirs if name not in ours and name not in HEADS
    ]:
        _require_unquantised(left, right, lines)
        for side, other in ((left, theirs), (right, ours)):
            if adapter := next((name for name in side.tensors if is_adapter(name) and name not in other), None):
                raise AlignvecError(
                    f"{side.label} has a PEFT adapter that is not merged into its weights ({adapter}): merge a copy "
                    "(merge_and_unload), or read the adapter itself with from_peft"
                )
        advice = _save_first(left, right)
        raise AlignvecError(f"{left.label} and {right.label} hold different tensors: {summary(lines)}{advice}")
    _drop_copied_heads(left, right, ours, theirs)
    return ours, theirs, alone


def _settle_buffers(left: Source, right: Source) -> None:
    """Compare a live model's buffers with what the other side has for them.

    Those that are computed, not loaded, and those that are equal are left out of both sides. One that differs is a
    tensor like any other.
    """
    sides = (left, right)
    live = [side for side in sides if isinstance(side, LiveSource)]
    for name in {name for side in live for name in side.computed}:
        for side in sides:
            side.tensors.pop(name, None)
    for name in {name: None for side in live for name in side.buffers}:
        ours, theirs = (side.tensors.get(name) or getattr(side, "buffers", {}).get(name) for side in sides)
        if ours is not None and theirs is not None and not _equal(left, right, name, ours, theirs):
            left.tensors[name], right.tensors[name] = ours, theirs
            continue
        for side in sides:
            side.tensors.pop(name, None)


def _equal(left: Source, right: Source, name: str, ours: TensorInfo, theirs: TensorInfo) -> bool:
    if ours.shape != theirs.shape:
        return False
    one, other = (side.read(name, 0, ours.numel) for side in (left, right))
    wide = torch.promote_types(one.dtype, other.dtype)
    return torch.equal(one.to(wide), other.to(wide))


def _drop_copied_heads(left: Source, right: Source, ours: dict[str, TensorInfo], theirs: dict[str, TensorInfo]) -> None:
    """Leave out a stored copy of the embedding that a model has for its tied head."""
    for head in HEADS:
        holders = [side for side, tensors in ((left, ours), (right, theirs)) if head in tensors]
        tied = [side for side in holders if tied_to(side, head) is not None]
        if len(holders) == 1 and not tied:
            other = right if holders[0] is left else left
            raise AlignvecError(
                f"{head} is stored in {holders[0].label} with values of its own, while {other.label} lacks it (tied to "
                "its embedding, or saved as a bare backbone): save both models whole, with the same tie_word_embeddings"
            )
        if len(tied) == len(holders) and (len(holders) == 1 or not any(_untied(side.config) for side in holders)):
            ours.pop(head, None)
            theirs.pop(head, None)


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


def _save_first(left: Source, right: Source) -> str:
    """Advice for a checkpoint and a live model, which transformers may hold in another layout than it stores."""
    live = [side.label for side in (left, right) if isinstance(side, LiveSource)]
    return f"; save {live[0]} (save_pretrained) and extract from the two checkpoints" if len(live) == 1 else ""


def require_equal(left: Source, right: Source, differing: list[str]) -> None:
    """AlignvecError for integer tensors that differ."""
    if differing:
        _require_unquantised(left, right, differing)
        raise AlignvecError(f"integer tensors differ, which no vector can hold: {summary(differing)}")


def _require_unquantised(left: Source, right: Source, lines: list[str]) -> None:
    for side in (left, right):
        if method := quantisation(side.config):
            raise AlignvecError(
                f"{side.label} is quantised ({method}), and a vector is a difference of floating-point weights "
                f"({summary(lines)}): extract from unquantised models"
            )


def _untied(config: Any) -> bool:
    value = config.get("tie_word_embeddings") if isinstance(config, Mapping) else None
    return (getattr(config, "tie_word_embeddings", None) if value is None else value) is False
