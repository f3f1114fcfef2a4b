"""sparse: a bitmap of the weights that are kept, and their values in the delta's dtype.

1/8 + density * (2 or 4) bytes a weight.

topk   the largest magnitudes of each tensor
dare   a random choice, divided by the density (arXiv 2311.03099): unbiased
ties   the largest magnitudes of the whole vector (the trim of TIES, arXiv 2306.01708), given their threshold
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain, islice
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from alignvec.errors import AlignvecError
from alignvec.formats import bits
from alignvec.formats.spec import Encoded, Option, Spec, blocks, matrix, span
from alignvec.formats.threshold import kth
from alignvec.formats.threshold import threshold as threshold
from alignvec.sources import in_order

OPTIONS: dict[str, Option] = {"density": 0.1, "method": "topk", "seed": 0, "threshold": 0.0}
METHODS = ("topk", "dare", "ties")
T = TypeVar("T")
PART = 1 << 17  # weights encoded at a time, so few that intermediates stay in cache
_Chosen: TypeAlias = tuple[Tensor, Tensor]  # the bitmap of some rows, and the values that it keeps
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
    parts, values = list(blocks(rows, cols, PART)), []
    for block, (packed, kept) in zip(parts, _worked(_choices(spec, delta, parts, name)), strict=True):
        bitmap[block] = packed
        values.append(kept)
    kept_values = torch.cat(values)
    if spec.options["method"] == "dare":
        kept_values = (kept_values.float() / float(spec.options["density"])).to(delta.dtype)
        if not torch.isfinite(kept_values).all():
            raise AlignvecError(f"delta {name} divided by the density leaves the range of {delta.dtype}")
    return Encoded("sparse", shape, dict(spec.options), {"bitmap": bitmap, "values": kept_values})


def _choices(spec: Spec, delta: Tensor, parts: list[slice], name: str) -> Iterator[Callable[[int], _Chosen]]:
    """A job for each range of rows that finds the weights that are kept."""
    density, method, seed, least = (spec.options[key] for key in OPTIONS)
    if method == "dare":
        digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        for part in parts:  # numbers are drawn in their order
            yield partial(_drawn, delta[part], torch.rand(delta[part].shape, generator=generator), float(density))
    elif method == "ties":
        if not least:
            raise AlignvecError("format sparse: ties needs the threshold of the whole vector; see sparse.threshold")
        for part in parts:
            yield partial(_reaching, delta[part], float(least), None)
    else:
        limit, ties = kth(lambda: (partial(delta.__getitem__, part) for part in parts), float(density))
        for part, tied in zip(parts, list(_worked(partial(_tied, delta[part], limit) for part in parts)), strict=True):
            yield partial(_reaching, delta[part], limit, None if tied <= ties else ties)
            ties = max(0, ties - tied)


def _drawn(delta: Tensor, numbers: Tensor, density: float, slot: int) -> _Chosen:
    return _chosen(delta, (numbers < density).to(delta.device))


def _reaching(delta: Tensor, limit: float, ties: int | None, slot: int) -> _Chosen:
    """What has a magnitude of at least `limit`; of those that have it exactly the first `ties` (None: all)."""
    magnitude = delta.float().abs()
    kept = magnitude >= limit
    if ties is not None:
        tied = (magnitude == limit).view(-1)
        kept.view(-1)[tied & (tied.cumsum(0) > ties)] = False
    return _chosen(delta, kept)


def _tied(delta: Tensor, limit: float, slot: int) -> int:
    return int((delta.float().abs() == limit).count_nonzero())


def _chosen(delta: Tensor, kept: Tensor) -> _Chosen:
    kept &= delta != 0
    return bits.pack(kept.view(torch.uint8), 1), delta[kept]


def _worked(jobs: Iterable[Callable[[int], T]]) -> Iterator[T]:
    """The jobs' results in order; a job that has others behind it is done by threads."""
    first = list(islice(jobs := iter(jobs), 2))
    return in_order(chain(first, jobs)) if len(first) > 1 else (job(0) for job in first)


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
