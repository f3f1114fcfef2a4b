"""A mix written into the live weights: which tensors stand where, and what the rounding made of the coefficients."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from alignvec import ops
from alignvec.edit import Deltas
from alignvec.kernels.eager import take
from alignvec.kernels.operands import decode
from alignvec.rounding import RealisedCoefficients

SAMPLE = 1 << 24  # weights that realised coefficients are measured on

# A module with an edited parameter, the parameter's name there, the vectors' deltas of it and their columns [k].
Edited = tuple[nn.Module, str, Deltas, Tensor]
# The buffer of each parameter, kept from one mix to the next.
Buffers = dict[nn.Parameter, Tensor]


class Materialised:
    """The parameters that hold `mix`, and their base: beside it on the device, or in host memory."""

    def __init__(self, mix: tuple[float, ...], backend: str, keep: str, buffers: Buffers) -> None:
        self.mix = mix
        self.backend, self.keep, self.buffers = backend, keep, buffers
        self.bases: dict[nn.Parameter, tuple[Tensor, Deltas]] = {}
        self._versions: dict[nn.Parameter, int] = {}

    def write(self, edited: Sequence[Edited], mix: tuple[float, ...], measure: bool = True) -> list[float]:
        """Write `mix` over what the parameters hold; the realised coefficients by column, where they are measured."""
        self.mix = mix
        parameters = [module._parameters[name] for module, name, _, _ in edited]
        step = -(-sum(p.numel() for p in parameters if p is not None) // SAMPLE)
        realised = RealisedCoefficients(len(mix))
        tables: dict[torch.device, tuple[Tensor, Tensor]] = {}
        for module, name, deltas, columns in edited:
            parameter = module._parameters[name]
            assert parameter is not None
            device = parameter.device
            if device not in tables:
                tables[device] = (
                    torch.tensor([mix], dtype=torch.float32, device=device),
                    torch.ones(1, dtype=torch.int32, device=device),
                )
            base, out = self._tensors(parameter, deltas)
            matrix, mixed = deltas.matrix(base), deltas.matrix(out)
            ops.materialise(matrix, deltas.specs, deltas.parts, columns, *tables[device], mixed, self.backend)
            parameter.data = out
            increment_version(parameter)  # what autograd kept of forward passes before is refused
            self._versions[parameter] = parameter._version
            if measure:
                _sample(realised, matrix, mixed, deltas, columns, step)
        return realised.solve(mix) if measure else []

    def undo(self) -> None:
        """Give every parameter its base again, bit for bit."""
        if any(parameter._version != version for parameter, version in self._versions.items()):
            warnings.warn(
                "weights were changed while they held a mix: restoring the base takes that away", stacklevel=3
            )
        for parameter, (base, deltas) in self.bases.items():
            if (base.device, base.dtype) == (parameter.device, parameter.dtype):
                parameter.data = base
            else:  # it waited on the host, or the model has moved
                deltas.follow(base, parameter)
                parameter.data.copy_(base)
            increment_version(parameter)
        self.bases.clear()

    def _tensors(self, parameter: nn.Parameter, deltas: Deltas) -> tuple[Tensor, Tensor]:
        """The base on the parameter's device, and where the mix goes."""
        known, _ = self.bases.get(parameter, (None, deltas))
        if known is not None and known.data_ptr() != parameter.data_ptr():  # else `undo` was interrupted
            return known.to(parameter.device), parameter.data
        base = parameter.data
        on_host = self.keep == "host" and base.device.type != "cpu"
        self.bases[parameter] = (base.cpu() if on_host else base, deltas)
        out = self.buffers.get(parameter)
        if out is None or out.dtype != base.dtype or out.device != base.device:
            out = torch.empty(base.shape, dtype=base.dtype, device=base.device)
        if not on_host:
            self.buffers[parameter] = out
        return base, out


def _sample(
    realised: RealisedCoefficients, base: Tensor, mixed: Tensor, deltas: Deltas, columns: Tensor, step: int
) -> None:
    """Take one weight in `step` into account: output rows, and of few rows, inputs."""
    if not base.numel():
        return
    step_rows = min(step, base.shape[0])
    inputs = slice(None, None, step // step_rows)
    chosen = torch.arange(0, base.shape[0], step_rows, device=base.device)
    sampled = base[chosen]
    values = [decode(take(operand, chosen), sampled)[:, inputs] for operand in deltas.operands]
    edit = dict(zip(columns.tolist(), values, strict=True))
    realised.update(sampled[:, inputs], mixed[chosen][:, inputs], edit)
