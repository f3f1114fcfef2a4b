"""How alike vectors are: cosines between them, overall, by layer and by kind of parameter."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from alignvec.statistics import LAYER, layer_of
from alignvec.surgery.streamed import Vectors, opened, total

PARAMETER = re.compile(r"\.?(weight|bias)$")
PREFIX = re.compile(r"^(model|transformer)\.")


@dataclass(frozen=True)
class Cosines:
    """Cosines of the angles between vectors, each float64 [k, k] in the order of ``names``; NaN for a zero vector.

    ``layers``: by layer, as ``alignvec.statistics.layer_of`` names them. ``kinds``: by what a parameter is in its
    layer, such as ``"self_attn.q_proj"`` or ``"embed_tokens"``.
    """

    names: tuple[str, ...]
    overall: Tensor
    layers: dict[int | str, Tensor]
    kinds: dict[str, Tensor]


def cosines(vectors: Vectors) -> Cosines:
    """The cosines of all pairs in one pass, sums in float64; a parameter that a vector lacks counts as zero.

    Raises AlignvecError for no vectors, or different bases or shapes.
    """
    found = opened(vectors)
    layers: dict[int | str, Tensor] = {}
    kinds: dict[str, Tensor] = {}
    overall = torch.zeros(len(found), len(found), dtype=torch.float64)
    for name in total(found):
        products = torch.zeros_like(overall)
        present = [i for i, vector in enumerate(found.values()) if name in vector]
        for pieces in zip(*(vector.chunks(name) for vector in found.values() if name in vector), strict=True):
            stacked = torch.stack([piece.double() for piece in pieces])
            products[torch.tensor(present)[:, None], torch.tensor(present)] += stacked @ stacked.T
        overall += products
        layer, kind = layer_of(name), kind_of(name)
        layers[layer] = layers.get(layer, 0) + products
        kinds[kind] = kinds.get(kind, 0) + products
    return Cosines(
        tuple(found),
        _cosines(overall),
        {key: _cosines(products) for key, products in layers.items()},
        {key: _cosines(products) for key, products in kinds.items()},
    )


def kind_of(name: str) -> str:
    """What a parameter is in its layer: `model.layers.3.self_attn.q_proj.weight` is a `self_attn.q_proj`."""
    match = LAYER.search(name)
    short = name[match.end() :] if match else PREFIX.sub("", name)
    return PARAMETER.sub("", short) or name


def _cosines(products: Tensor) -> Tensor:
    norms = products.diagonal().sqrt()
    return products / (norms[:, None] * norms)
