"""What a module needs to apply its vectors: operands of its parameters, and where their coefficients are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from alignvec import ops
from alignvec.coefficients import Coefficients
from alignvec.errors import AlignvecError
from alignvec.fused import Fused
from alignvec.kernels.operands import Operand, decode, dense


class Deltas:
    """The k vectors' deltas of one parameter, as operands of its matrix. Modules that share a parameter share them.

    parts, specs: the operands as operators take them. stack: of a parameter of one dimension [k, features], and the
    operands are its rows. transposed: the operands are those of the transposed parameter, as Conv1D multiplies.
    """

    stack: Tensor | None

    def __init__(self, operands: Sequence[Operand], *, stack: Tensor | None = None, transposed: bool = False) -> None:
        self.transposed = transposed
        self._take(operands, stack)

    def _take(self, operands: Sequence[Operand], stack: Tensor | None) -> None:
        self.stack = stack
        self.operands = list(operands) if stack is None else [dense(row[None]) for row in stack]
        self.specs = [operand.spec for operand in self.operands]
        self.parts = [part for operand in self.operands for part in operand.parts]
        _static(*self.parts, *(() if stack is None else (stack,)))

    def __deepcopy__(self, memo: dict[int, Any]) -> Deltas:
        # Vectors are immutable: copies of a model share them until one of the copies moves.
        twin = Deltas(self.operands, stack=self.stack, transposed=self.transposed)
        memo[id(self)] = twin
        return twin

    def matrix(self, parameter: Tensor) -> Tensor:
        """The parameter as the matrix that the operands belong to."""
        return (
            parameter.t() if self.transposed else parameter.reshape(-1, parameter.shape[-1] if parameter.dim() else 1)
        )

    def to(self, device: torch.device) -> None:
        if self.stack is not None:
            self._take((), self.stack.to(device))
        else:
            self._take([_moved(operand, device) for operand in self.operands], None)

    def follow(self, before: Tensor, after: Tensor) -> None:
        """Lossless deltas are steps on a weight's bits: where its dtype changed, they become dense."""
        if before.dtype != after.dtype and any(operand.kind == "lossless" for operand in self.operands):
            matrix = self.matrix(before)
            kept = [dense(decode(o, matrix).to(after.device)) if o.kind == "lossless" else o for o in self.operands]
            self._take(kept, None)


def _static(*tensors: Tensor) -> None:
    """Tell torch.compile what it knows of parameters: these keep their sizes, and graphs read them where they are."""
    for tensor in tensors:
        torch._dynamo.mark_static(tensor)
        torch._dynamo.mark_static_address(tensor)


def _moved(operand: Operand, device: torch.device) -> Operand:
    if operand.kind == "dense" and operand.parts[0].stride() == (0, 0):  # one zero in memory: a copy would be a matrix
        return dense(operand.parts[0][:1, :1].to(device).expand(operand.shape))
    return operand.to(device)


class Edit:
    """What one module needs to apply its vectors: the deltas of its parameters and where their coefficients are.

    columns: column of each present vector in the coefficient table, int32 [k].
    deltas: parameter name -> the vectors' deltas of it, in the order of `columns`.
    choices: execution, precision and backend of its operators.
    fused: the sibling layers that it is computed with, if there are any.
    """

    fused: Fused | None = None

    def __init__(
        self,
        coefficients: Coefficients,
        columns: Sequence[int],
        deltas: dict[str, Deltas],
        choices: tuple[str, str, str],
        device: torch.device,
    ) -> None:
        self.coefficients = coefficients
        self.columns = torch.tensor(columns, dtype=torch.int32)
        self.deltas = deltas
        self.choices = choices
        self.move(device)

    def move(self, device: torch.device) -> None:
        """Bring deltas and columns to `device`, and read that device's coefficient table. Dtypes stay."""
        self.device = device
        self.columns = self.columns.to(device)
        live = self.coefficients.live(device)
        self.table, self.rows = live.table, live.rows
        _static(self.columns, self.table, self.rows)
        for deltas in self.deltas.values():
            deltas.to(device)

    @property
    def backend(self) -> str:
        return self.choices[2]

    def stack(self, name: str) -> Tensor | None:
        """Deltas of a parameter of one dimension, [k, features]; None where no vector edits it."""
        deltas = self.deltas.get(name)
        return None if deltas is None else deltas.stack

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """weight: [out_features, in_features]."""
        if self.device != x.device:
            self.move(x.device)
        choices = self.choices
        if choices[0] == "materialise" and (torch.compiler.is_compiling() or self.coefficients.live_rows > 1):
            choices = ("combine", *choices[1:])  # one mix for all rows is what the other cannot do without
        deltas = self.deltas.get("weight")
        if deltas is None:  # only the bias is edited
            deltas = Deltas([dense(weight.new_zeros(1, 1).expand(weight.shape))] * len(self.columns))
        return ops.linear(
            x,
            weight,
            bias,
            deltas.specs,
            deltas.parts,
            self.stack("bias"),
            self.columns,
            self.table,
            self.rows,
            None,
            *choices,
        )

    def embedding(self, ids: Tensor, weight: Tensor) -> Tensor:
        if self.device != weight.device:
            self.move(weight.device)
        batch = self.coefficients.batch
        if ids.shape[0] == 1 and batch is not None:
            ids = ids.expand(batch, *ids.shape[1:])  # positions that all sequences share, under mixes that they do not
        elif batch is not None and ids.shape[0] != batch:
            raise AlignvecError(
                f"an embedding with vectors got indices {list(ids.shape)} in a batch of {batch}; it needs one row of "
                "indices per sequence, or one for all"
            )
        deltas = self.deltas["weight"]
        return ops.embedding(ids, weight, deltas.specs, deltas.parts, self.columns, self.table, self.rows, self.backend)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        if self.device != x.device:
            self.move(x.device)
        return ops.rms_norm(
            x, weight, self.stack("weight"), self.columns, self.table, self.rows, eps, offset, self.backend
        )

    def layer_norm(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        if self.device != x.device:
            self.move(x.device)
        stacks = (self.stack("weight"), self.stack("bias"))
        return ops.layer_norm(x, weight, bias, *stacks, self.columns, self.table, self.rows, eps, self.backend)

    def mixed(self, module: nn.Module, batch: int) -> dict[str, Tensor]:
        """Each edited parameter of `module` as float32 [batch, *shape], one mix for each of `batch` equal parts."""
        mixed = {}
        for name, deltas in self.deltas.items():
            parameter = module._parameters[name]
            assert parameter is not None
            if self.device != parameter.device:
                self.move(parameter.device)
            mixed[name] = ops.mix(parameter, deltas.specs, deltas.parts, self.columns, self.table, self.rows, batch)
        return mixed
