"""Memory: bytes for 1 to 30 mixes, vectors attached once against a merged copy a mix."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

import alignvec
from bench.record import Row
from bench.suite import models
from bench.suite.case import Case, Setting

MIXES = (1, 3, 10, 30)
FORMATS = ("dense", "lossless", "int8", "int4", "sign", "low-rank:rank=64")
VECTORS = 3


def cases(setting: Setting) -> list[Case]:
    own = [Case("memory", text, {"mixes": n, "k": VECTORS}, "B") for text in FORMATS for n in MIXES]
    return [Case("memory", "merged copies", {"mixes": n, "k": VECTORS}, "B") for n in MIXES] + own


def measure(setting: Setting, cases: Sequence[Case]) -> Iterator[Row]:
    """Bytes of model, vectors and coefficients together. Of merged copies one is made and counted for each mix."""
    model = models.build(setting)
    for name in dict.fromkeys(case.name for case in cases):
        own = [case for case in cases if case.name == name]
        if name == "merged copies":
            nbytes = _merged_copy(setting, model)
            yield from (case.row([nbytes * case.parameters["mixes"]]) for case in own)
            continue
        alignment = alignvec.attach(model, models.vectors(model, name, VECTORS), max_rows=max(MIXES))
        for case in own:
            alignment.set_rows(models.mixes(case.parameters["mixes"], VECTORS))
            yield case.row([_allocated(setting, model)])
        alignment.detach()


def _merged_copy(setting: Setting, model: nn.Module) -> int:
    before = _allocated(setting, model)
    twin = copy.deepcopy(model)
    return _allocated(setting, model, twin) - before


def _allocated(setting: Setting, *held: nn.Module) -> int:
    """Bytes that the GPU's allocator has given out; on a CPU those of the storages behind `held` and its vectors."""
    gc.collect()
    if setting.kind == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(setting.device)
    storages = [tensor.untyped_storage() for module in held for tensor in _tensors(module)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _tensors(module: nn.Module) -> Iterable[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
    if (alignment := getattr(module, "alignment", None)) is not None:
        yield from (part for _, _, deltas, columns in alignment._edited() for part in (*deltas.parts, columns))
        for device in alignment._coefficients.devices:
            for table in (alignment._coefficients.staged(device), alignment._coefficients.live(device)):
                yield from (table.table, table.rows)
