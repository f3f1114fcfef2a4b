"""How alike vectors are: cosines between them, overall, by layer and by kind of parameter."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from alignvec.deltas import STEP
from alignvec.numbers import float64_sum
from alignvec.sources import in_order
from alignvec.statistics import LAYER, layer_of
from alignvec.surgery.pieces import PART
from alignvec.surgery.streamed import Vectors, opened, total
from alignvec.vector import AlignmentVector

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

    Raises AlignvecError for no vectors, different bases or shapes, and products that overflow.
    """
    found = opened(vectors)
    layers: dict[int | str, Tensor] = {}
    kinds: dict[str, Tensor] = {}
    overall = torch.zeros(len(found), len(found), dtype=torch.float64)
    for name in (whole := total(found)):
        products = torch.zeros_like(overall)
        present = [i for i, vector in enumerate(found.values()) if name in vector]
        numel, own = whole.tensors[name].numel, [vector for vector in found.values() if name in vector]
        jobs = (partial(_products, own, name, start, min(start + STEP, numel)) for start in range(0, numel, STEP))
        with contextlib.closing(in_order(jobs)) as results:
            for part in results:
                products[torch.tensor(present)[:, None], torch.tensor(present)] += part
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


def _products(vectors: list[AlignmentVector], name: str, start: int, stop: int, slot: int) -> Tensor:
    """The inner products of a stretch of the vectors, float64 [k, k]."""
    pieces = [vector.read(name, start, stop) for vector in vectors]
    products = torch.zeros(len(pieces), len(pieces), dtype=torch.float64)
    for first in range(0, stop - start, PART):
        stacked = torch.stack([piece[first : first + PART].double() for piece in pieces])
        products += stacked @ stacked.T
    return products


def kind_of(name: str) -> str:
    """What a parameter is in its layer: `model.layers.3.self_attn.q_proj.weight` is a `self_attn.q_proj`."""
    match = LAYER.search(name)
    short = name[match.end() :] if match else PREFIX.sub("", name)
    return PARAMETER.sub("", short) or name


def _cosines(products: Tensor) -> Tensor:
    float64_sum(float(products.abs().amax()), "the cosines of the vectors")
    norms = products.diagonal().sqrt()
    return products / norms[:, None] / norms
