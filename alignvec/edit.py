"""What a module needs to apply its vectors: operands of its parameters, and where their coefficients are."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from alignvec import ops
from alignvec.coefficients import Coefficients
from alignvec.errors import AlignvecError, RowsError
from alignvec.foreign import ByRow, Mix, Unformed
from alignvec.fused import Fused
from alignvec.kernels.operands import Operand, decode, dense, matrix_shape
from alignvec.tracing import traced

if TYPE_CHECKING:
    from alignvec.roworder import Order
    from alignvec.steps import Step


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

    @property
    def lossless(self) -> bool:
        """Whether some of the deltas are steps on the parameter's bits."""
        return any(operand.kind == "lossless" for operand in self.operands)

    def __deepcopy__(self, memo: dict[int, Any]) -> Deltas:
        # Vectors are immutable: copies of a model share them until one of the copies moves.
        twin = Deltas(self.operands, stack=self.stack, transposed=self.transposed)
        memo[id(self)] = twin
        return twin

    def matrix(self, parameter: Tensor) -> Tensor:
        """The parameter as the matrix that the operands belong to."""
        return parameter.t() if self.transposed else parameter.reshape(matrix_shape(parameter))

    def to(self, device: torch.device) -> None:
        if self.stack is not None:
            self._take((), self.stack.to(device))
        else:
            self._take([_moved(operand, device) for operand in self.operands], None)

    def follow(self, before: Tensor, after: Tensor) -> None:
        """Lossless deltas are steps on a weight's bits: where its dtype changed, they become dense."""
        if before.dtype != after.dtype and self.lossless:
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
    path: the module's name in the model, for refusals.
    fused: the sibling layers that it is computed with, if there are any.
    order: how the module's inputs lie in a batch; None where nobody has tried.
    rowwise: the module runs once for each row, since modules inside of it get their tokens in another order.
    unplaced: whether a trial of rows did not find that the inputs are in the order of the batch: compiled graphs, which
    cannot take them by row, then refuse rows.
    widens: the module's own forward runs in float32, on parameters in float32.
    results: dtypes of what that forward gives, by place, once it has been called.
    entered: whether a trace of torch.compile is in that forward.
    """

    def __init__(
        self,
        coefficients: Coefficients,
        columns: Sequence[int],
        deltas: dict[str, Deltas],
        choices: tuple[str, str, str],
        device: torch.device,
        path: str = "",
    ) -> None:
        self.coefficients = coefficients
        self.vectors = tuple(columns)
        self.columns = torch.tensor(columns, dtype=torch.int32)
        self.deltas = deltas
        self.choices = choices
        self.path = path
        self.fused: Fused | None = None
        self.order: Order | None = None
        self.results: dict[str, torch.dtype] | None = None
        self._bits: dict[str, tuple[Tensor, torch.dtype, int]] = {}
        self.rowwise = self.unplaced = self.widens = self.entered = False
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

    def __deepcopy__(self, memo: dict[int, Any]) -> Edit:
        twin = Edit.__new__(Edit)
        memo[id(self)] = twin
        twin.__dict__.update({k: copy.deepcopy(v, memo) for k, v in self.__dict__.items() if k != "_bits"})
        copies = {name: copy.deepcopy(parameter, memo) for name, (parameter, _, _) in self._bits.items()}
        twin._bits = {name: (own, own.dtype, own._version) for name, own in copies.items()}
        return twin

    def settle(self, module: nn.Module) -> None:
        """Note the parameters as they are: lossless deltas are steps on their bits, and hold for no others."""
        self.results = None
        self._bits = {
            name: (parameter, parameter.dtype, parameter._version)
            for name, deltas in self.deltas.items()
            if (parameter := module._parameters[name]) is not None and deltas.lossless and not parameter.is_inference()
        }

    def _require_bits(self, name: str, parameter: Tensor) -> None:
        noted, dtype, version = self._bits.get(name, (None, None, 0))
        if noted is parameter and (parameter.dtype, parameter._version) != (dtype, version):
            raise AlignvecError(
                f"{self.path}.{name} changed after attach, and its lossless delta is steps on the bits that it had; "
                "call alignment.detach() and attach again, with vectors of this base or in another format"
            )

    @property
    def backend(self) -> str:
        return self.choices[2]

    def stack(self, name: str) -> Tensor | None:
        """Deltas of a parameter of one dimension, [k, features]; None where no vector edits it."""
        deltas = self.deltas.get(name)
        return None if deltas is None else deltas.stack

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """weight: [out_features, in_features]."""
        if self._bits:
            self._require_bits("weight", weight)
        if (place := self._place(x)) is None:
            return self._apart(x, lambda part: self.linear(part, weight, bias))
        x, table, rows = place
        choices = self.choices
        if choices[0] == "materialise" and (traced() or not self.coefficients.one_mix):
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
            table,
            rows,
            None,
            *choices,
        )

    def embedding(self, ids: Tensor, weight: Tensor) -> Tensor:
        self._follow(weight)
        if self._bits:
            self._require_bits("weight", weight)
        if (place := self._place(ids)) is None:
            return self._apart(ids, lambda part: self.embedding(part, weight))
        ids, table, rows = place
        deltas = self.deltas["weight"]
        if weight.shape != deltas.operands[0].shape:
            raise AlignvecError(
                f"{self.path} has {weight.shape[0]} embeddings by now and its vectors {deltas.operands[0].shape[0]}; "
                "call alignment.detach(), resize the model, and attach vectors of that vocabulary"
            )
        return ops.embedding(ids, weight, deltas.specs, deltas.parts, self.columns, table, rows, self.backend)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        if (place := self._place(x)) is None:
            return self._apart(x, lambda part: self.rms_norm(part, weight, eps, offset))
        x, table, rows = place
        return ops.rms_norm(x, weight, self.stack("weight"), self.columns, table, rows, eps, offset, self.backend)

    def layer_norm(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        if (place := self._place(x)) is None:
            return self._apart(x, lambda part: self.layer_norm(part, weight, bias, eps))
        x, table, rows = place
        stacks = (self.stack("weight"), self.stack("bias"))
        return ops.layer_norm(x, weight, bias, *stacks, self.columns, table, rows, eps, self.backend)

    def norm(self, module: nn.Module, x: Tensor, forward: Callable[[Tensor, dict[str, Tensor]], Tensor]) -> Tensor:
        """`forward(x, mixed)` with each sequence's parameters, float32 [batch, features]: x [batch, ..., features]."""
        if (place := self._place(x)) is None:
            return self._apart(x, lambda part: self.norm(module, part, forward))
        x, table, rows = place
        return forward(x, self._all_mixed(module, x.shape[0], table, rows))

    def mixed(self, module: nn.Module, step: Step) -> dict[str, Tensor]:
        """Each edited parameter of `module` under the one mix of a step, in float32."""
        for parameter in module._parameters.values():
            if parameter is not None:
                self._follow(parameter)
        return {name: value[0] for name, value in self._all_mixed(module, 1, *step.on(self.device)).items()}

    def read(self, module: nn.Module, name: str, apart: bool) -> Tensor:
        """An edited parameter as code outside of our operators reads it: the mix of the step that this thread is in.

        apart: such code rarely wants its values; they are formed when it does.
        """
        parameter = module._parameters[name]
        assert parameter is not None
        self._follow(parameter)
        coefficients = self.coefficients
        if traced():
            self._publish_traced()
            if coefficients.thread.traced_row is None and coefficients.rows > 1:
                if not apart:
                    self.refuse_reader(name)
                return torch.full_like(parameter, float("nan"))  # of use for its dtype and shape alone
            exact = self._mixed(parameter, name, 1, *coefficients.traced(self.device))[0]
            return exact if self.widens else exact.to(parameter.dtype)
        step = coefficients.step
        if step is None:
            return parameter
        given = step.given.get(id(module))
        if given is not None and name in given:
            return given[name]

        def form() -> Tensor:
            if step.calls is not None:
                step.calls.append((self, None))
            if not step.alike(self.vectors):
                return step.value((id(self), name), lambda: self._by_row(parameter, name, step))
            own = step if step.rows == 1 else step.row(0)
            return step.value((id(self), name), lambda: Mix.of(self._only(parameter, name, own), parameter.dtype))

        return Unformed.of(parameter, form) if apart else form()

    def takes_rows(self, step: Step, x: Tensor) -> bool:
        """Whether x lies in the order of the batch, as much of it for every sequence."""
        return self.order is not None and self.order.batch_major and _divides(x, step.batch or step.rows)

    def refuse_reader(self, name: str) -> NoReturn:
        raise RowsError(
            f"the model's own code computes with {self.path}.{name} and with tensors that do not tell which row they "
            "belong to, so it cannot have different coefficients for the rows of a batch"
        )

    def refuse_rows(self) -> NoReturn:
        why = "was not reached when rows were tried on text alone, so it is not known which row its inputs belong to"
        if self.order is not None:
            why = "gets its inputs in an order other than that of the sequences of the batch"
        raise RowsError(f"{self.path} {why}, and cannot have different coefficients for the rows of a batch")

    def _follow(self, tensor: Tensor) -> None:
        if self.device != tensor.device and tensor.device.type != "meta":
            self.move(tensor.device)

    def _place(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """x as operators take it, the table and its number of rows; None where the call has to be made `_apart`.

        x whose leading size is 1 belongs to all sequences (positions, say): where their mixes differ it is repeated.
        """
        if isinstance(x, Unformed):
            x = x.form()
        if isinstance(x, Mix):
            x = x.as_subclass(Tensor)
        if x.is_floating_point():
            self._follow(x)
        if traced():
            return self._traced_place(x)
        step = self.coefficients.step
        if step is None or isinstance(x, ByRow):
            return None
        if step.calls is not None:
            step.calls.append((self, (x,)))
        if step.rows == 1:
            return x, *step.on(self.device)
        if step.alike(self.vectors):
            return x, *step.row(0).on(self.device)
        if not step.alone:
            if self.order is None or not (self.order.batch_major or self.order.shared):
                self.refuse_rows()
            if self.order.shared:
                return None
        batch = step.batch or step.rows
        if x.shape[0] == 1:
            x = x.expand(batch, *x.shape[1:])
        elif not _divides(x, batch):
            raise RowsError(
                f"{self.path} got an input {list(x.shape)} in a batch of {batch} whose rows have different "
                "coefficients, and needs as much of it for every sequence"
            )
        return x, *step.on(self.device)

    def _apart(self, x: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
        """The call in a step of its own, or, of what is not laid out by sequence, once for each row."""
        coefficients = self.coefficients
        step = coefficients.step
        if step is None:
            with coefficients.call(x.shape[0] if x.dim() else None) as own:
                own.alone = True
                return call(x)
        results = []
        for row, part in enumerate(x.parts if isinstance(x, ByRow) else [x] * step.rows):
            with coefficients.within(step.row(row) if step.rows > 1 else step):
                results.append(call(part))
        return ByRow.of(results, step.batch or step.rows, self.refuse_rows)

    def _traced_place(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        coefficients = self.coefficients
        self._publish_traced()
        batch = coefficients.thread.traced_batch
        if batch is None and x.shape[0] == 1 and coefficients.step is not None:
            batch = coefficients.step.batch
        if batch is not None and coefficients.thread.traced_row is None and x.shape[0] != batch:
            if x.shape[0] == 1 and (not x.is_floating_point() or coefficients.rows > 1):
                x = x.expand(batch, *x.shape[1:])
            elif coefficients.rows > 1 and x.shape[0] % batch:
                self.refuse_rows()
        if self.unplaced and coefficients.rows > 1 and coefficients.thread.traced_row is None:
            self.refuse_rows()
        return x, *coefficients.traced(self.device)

    def _publish_traced(self) -> None:
        """In a graph that is compiled of a module alone the step begins with it."""
        coefficients = self.coefficients
        if coefficients.step is None and coefficients.thread.traced_depth == 0:
            publish_traced(coefficients)

    def _all_mixed(self, module: nn.Module, batch: int, table: Tensor, rows: Tensor) -> dict[str, Tensor]:
        parameters = {name: module._parameters[name] for name in self.deltas}
        return {name: self._mixed(p, name, batch, table, rows) for name, p in parameters.items() if p is not None}

    def _by_row(self, parameter: Tensor, name: str, step: Step) -> Tensor:
        parts = [Mix.of(self._only(parameter, name, step.row(r)), parameter.dtype) for r in range(step.rows)]
        return ByRow.of(parts, step.batch or step.rows, lambda: self.refuse_reader(name))

    def _only(self, parameter: Tensor, name: str, step: Step) -> Tensor:
        return self._mixed(parameter, name, 1, *step.on(self.device))[0]

    def _mixed(self, parameter: Tensor, name: str, batch: int, table: Tensor, rows: Tensor) -> Tensor:
        if self._bits and not traced():
            self._require_bits(name, parameter)
        deltas = self.deltas[name]
        return ops.mix(parameter, deltas.specs, deltas.parts, self.columns, table, rows, batch)


def _divides(x: Tensor, batch: int) -> bool:
    """Whether x has as much for each sequence: [batch, ...], flattened, or [samples, choices, ...] of batch choices."""
    tokens = math.prod(x.shape[:-1]) if x.is_floating_point() else x.numel()
    return x.shape[0] % batch == 0 or (batch % x.shape[0] == 0 and tokens % batch == 0)


def publish_traced(coefficients: Coefficients) -> None:
    """The beginning of a step in a graph that is being compiled: the copy is one of its operators."""
    for device in coefficients.devices:
        staged, live = coefficients.staged(device), coefficients.live(device)
        ops.publish(staged.table, staged.rows, live.table, live.rows)
