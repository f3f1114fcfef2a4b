"""Ways to write a mix into second copies of all weights of a model: in one pass, by torch, and from files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from alignvec import Alignment, AlignmentVector, ops
from bench import opponents
from bench.timing import Call


class Remerge:
    """Re-merges of `mix`, one coefficient a vector, for vectors that are attached; the base stays as it is."""

    def __init__(self, alignment: Alignment, mix: Mapping[str, float]) -> None:
        self.model = alignment.model
        self.factors = [mix[name] for name in alignment.names]
        self.outs: dict[nn.Parameter, Tensor] = {}  # where the mix of each parameter goes
        self._edited = []
        for module, name, deltas, columns in alignment._edited():
            parameter = module._parameters[name]
            assert parameter is not None
            out = self.outs[parameter] = torch.zeros_like(parameter)
            self._edited.append((deltas.matrix(parameter.data), deltas.matrix(out), deltas, columns))
        device = next(self.model.parameters()).device
        self._table = torch.tensor([self.factors], device=device)
        self._rows = torch.ones(1, dtype=torch.int32, device=device)

    def one_pass(self) -> None:
        """alignvec's: each weight and each delta is read once, in any format."""
        for base, out, deltas, columns in self._edited:
            ops.materialise(base, deltas.specs, deltas.parts, columns, self._table, self._rows, out, "auto")

    def by_torch(self) -> dict[str, Call]:
        """What users write, for dense vectors, by name."""
        parts = [(base, out, [o.parts[0] for o in deltas.operands]) for base, out, deltas, _ in self._edited]
        compiled, live = opponents.compiled_mix(), self._table[0]

        def each(write: Callable[..., None]) -> None:
            for base, out, own in parts:
                write(out, base, self.factors, own)

        def by_compiler() -> None:
            for base, out, own in parts:
                compiled(out, base, live, *own)

        return {
            opponents.EXPRESSION: partial(each, opponents.expression),
            opponents.CHAIN: partial(each, opponents.in_place),
            opponents.COMPILED: by_compiler,
        }

    def load(self, merged: Path) -> None:
        """A checkpoint with the mix in it, onto the device."""
        self.from_files(merged, ())

    def from_files(self, base: Path, vectors: tuple[Path, ...]) -> None:
        """Base and dense vectors, added up tensor by tensor on the device."""
        device = str(self._table.device)
        with ExitStack() as stack:
            first, *others = (stack.enter_context(safe_open(path, "pt", device)) for path in (base, *vectors))
            for name, parameter in self.model.named_parameters():
                out = self.outs[parameter].copy_(first.get_tensor(name))
                for file, factor in zip(others, self.factors, strict=False):
                    out.add_(file.get_tensor(name), alpha=factor)


def store(folder: Path, model: nn.Module, vectors: Mapping[str, AlignmentVector]) -> tuple[Path, ...]:
    """The model's parameters as `base.safetensors`, and each dense vector's deltas; the files, the base's first."""
    files = {"base": {name: value.data for name, value in model.named_parameters()}}
    files |= {label: dict(vector.items()) for label, vector in vectors.items()}
    for label, tensors in files.items():
        save_file({name: value.cpu() for name, value in tensors.items()}, folder / f"{label}.safetensors")
    return tuple(folder / f"{label}.safetensors" for label in files)
