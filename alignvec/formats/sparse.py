"""sparse: a bitmap of the weights that are kept, and their values in the delta's dtype.

1/8 + density * (2 or 4) bytes a weight.

topk   the largest magnitudes of each tensor
dare   a random choice, divided by the density (arXiv 2311.03099): unbiased
ties   the largest magnitudes of the whole vector (the trim of TIES, arXiv 2306.01708), given their threshold
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from alignvec.errors import AlignvecError
from alignvec.formats import bits
from alignvec.formats.spec import Encoded, Option, Spec, blocks, matrix, span
from alignvec.formats.threshold import threshold

OPTIONS: dict[str, Option] = {"density": 0.1, "method": "topk", "seed": 0, "threshold": 0.0}
METHODS = ("topk", "dare", "ties")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def validate(spec: Spec) -> None:
    density, method, seed, least = (spec.options[key] for key in OPTIONS)
    if method not in METHODS:
        raise AlignvecError(f"format sparse: method={method} must be one of {', '.join(METHODS)}")
    if not 0 < float(density) <= 1:
        raise AlignvecError(f"format sparse: density={density} must be above 0 and at most 1")
    if int(seed) < 0 or not 0 <= float(least) < float("inf"):
        raise AlignvecError(f"format sparse: seed={seed} and threshold={least} cannot be negative or infinite")


def encode(spec: Spec, delta: Tensor, base: Tensor | None, aligned: Tensor | None, name: str) -> Encoded:
    """Zeros are never kept: leaving them out loses nothing."""
    (rows, cols), shape = matrix(tuple(delta.shape)), tuple(delta.shape)
    delta = delta.reshape(rows, cols)
    delta = delta if delta.dtype in DTYPES else delta.float()
    bitmap = torch.empty(rows, bits.row_bytes(cols, 1), dtype=torch.uint8, device=delta.device)
    values = []
    for block, kept in _kept(spec, delta, name):
        kept &= delta[block] != 0
        bitmap[block] = bits.pack(kept.view(torch.uint8), 1)
        values.append(delta[block][kept])
    kept_values = torch.cat(values)
    if spec.options["method"] == "dare":
        kept_values = (kept_values.float() / float(spec.options["density"])).to(delta.dtype)
        if not torch.isfinite(kept_values).all():
            raise AlignvecError(f"delta {name} divided by the density leaves the range of {delta.dtype}")
    return Encoded("sparse", shape, dict(spec.options), {"bitmap": bitmap, "values": kept_values})


def _kept(spec: Spec, delta: Tensor, name: str) -> Iterator[tuple[slice, Tensor]]:
    """Which weights are kept, bool [n, cols], some rows at a time."""
    density, method, seed, least = (spec.options[key] for key in OPTIONS)
    if method == "dare":
        digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        for block in blocks(*delta.shape):
            yield block, (torch.rand(delta[block].shape, generator=generator) < float(density)).to(delta.device)
    elif method == "ties":
        if not least:
            raise AlignvecError("format sparse: ties needs the threshold of the whole vector; see sparse.threshold")
        for block in blocks(*delta.shape):
            yield block, delta[block].float().abs() >= float(least)
    else:
        limit = threshold(lambda: (partial(delta.__getitem__, block) for block in blocks(*delta.shape)), float(density))
        ties = max(1, round(float(density) * delta.numel()))
        for block in blocks(*delta.shape):
            ties -= int((delta[block].float().abs() > limit).sum())
        for block in blocks(*delta.shape):
            magnitude = delta[block].float().abs()
            tied = (magnitude == limit).view(-1)
            chosen = tied & (tied.cumsum(0) <= ties)
            ties -= int(chosen.sum())
            yield block, (magnitude > limit) | chosen.view_as(magnitude)


def decode(encoded: Encoded, base: Tensor | None, rows: slice | None) -> Tensor:
    """The values where the bitmap has them and 0 elsewhere, float32 [n, cols]."""
    count, cols = matrix(encoded.shape)
    start, stop = span(rows, count)
    bitmap, values = encoded.parts["bitmap"], encoded.parts["values"]
    out = torch.zeros(stop - start, cols, dtype=torch.float32, device=values.device)
    place = bits.count(bitmap[:start])
    for block in blocks(stop - start, cols):
        kept = bits.unpack(bitmap[start + block.start : start + block.stop], 1, cols).bool()
        number = int(kept.sum())
        out[block][kept] = values[place : place + number].float()
        place += number
    return out


def layout(
    spec: Spec, shape: tuple[int, ...]
) -> dict[str, tuple[torch.dtype | tuple[torch.dtype, ...], tuple[int | None, ...]]]:
    rows, cols = matrix(shape)
    return {"bitmap": (torch.uint8, (rows, bits.row_bytes(cols, 1))), "values": (DTYPES, (None,))}


def check(encoded: Encoded) -> None:
    bitmap, values = encoded.parts["bitmap"], encoded.parts["values"]
    if bits.count(bitmap) != len(values):
        raise AlignvecError(f"sparse: the bitmap counts {bits.count(bitmap)} values, {len(values)} are stored")
    used = matrix(encoded.shape)[1] % 8
    if used and (bitmap[:, -1] >> used).any():
        raise AlignvecError("sparse: the bitmap has values beyond the last column")
