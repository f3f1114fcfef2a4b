"""Output heads that a vector's base has no name for: in a base that ties them they are its embedding."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from alignvec.errors import AlignvecError
from alignvec.pairing import HEADS

if TYPE_CHECKING:
    from alignvec.names import LiveNames

OF_HEADS = tuple(name.removesuffix("weight") for name in HEADS)  # what the names of a head's parameters begin with


@dataclass(frozen=True)
class UnnamedHead:
    """A live head that is a parameter of its own, and that the vector's base, which has the embedding, lacks."""

    live: str
    embedding: str  # the vector's name for the embedding
    follows: bool  # it has the embedding's values, as in a copy that was untied
    bare: bool  # the base was saved as a backbone, so that it lacks its head whether that was tied or not


def unnamed_head(
    model: nn.Module,
    names: LiveNames,
    known: Collection[str],
    direct: Mapping[str, str],
    value: Callable[[str], Tensor],
) -> UnnamedHead | None:
    """The head of `model` that is in none of `direct`, the places of the `known` tensors of a base; None for others.

    value: reads a live parameter.
    """
    live = {id(parameter): name for name, parameter in model.named_parameters()}
    head, embedding = (live.get(id(_weight(names.root, kind))) for kind in ("output", "input"))
    stored = next((name for name, place in direct.items() if place == embedding), None)
    if head is None or stored is None or head in (embedding, *direct.values()):
        return None
    plain = next(plain for plain, name in names.plain.items() if name == embedding)
    several = len({name.partition(".")[0] for name in known}) > 1
    prefix = getattr(names.root, "base_model_prefix", "")
    bare = plain.endswith(f".{stored}") and (several or plain == f"{prefix}.{stored}")
    assert embedding is not None
    return UnnamedHead(head, stored, _equal(value(head), value(embedding)), bare)


def require_known(label: str, vector: Collection[str], head: UnnamedHead | None, there: str) -> None:
    """AlignvecError where the vector edits the embedding, and what that does to `head` cannot be known."""
    if head is None or head.embedding not in vector:
        return
    if not head.bare and not head.follows:
        raise own_head(label, there, head.live, head.embedding)
    if head.bare and head.follows:
        raise AlignvecError(
            f"vector {label!r} edits {head.embedding}, and its base, saved without a head, does not say whether "
            f"{head.live}, which has the same values in {there}, moves with it: attach it to a model that ties the two "
            "(tie_word_embeddings=True), or extract it from models with their heads"
        )


def own_head(label: str, there: str, head: str, embedding: str) -> AlignvecError:
    """The refusal of a head that has other values than the embedding, which a base without that head ties it to."""
    return AlignvecError(
        f"vector {label!r} was extracted from a different base, whose head is its embedding ({embedding}): {head} of "
        f"{there} has values of its own, which the vector has no delta for; use the base that ties the two"
    )


def _weight(root: Any, kind: str) -> Any:
    try:
        return getattr(getattr(root, f"get_{kind}_embeddings")(), "weight", None)
    except (AttributeError, NotImplementedError):
        return None


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    wide = torch.promote_types(one.dtype, other.dtype)
    return torch.equal(one.to(wide), other.to(one.device, wide))
