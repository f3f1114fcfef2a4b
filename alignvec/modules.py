"""The modules swapped in for those whose parameters a vector edits: thin, one call into `ops` each.

A swapped-in module is a *view* of the original: it shares the original's parameter, buffer and hook dictionaries, so
names in the state dict, tied weights, moves and dtype changes are those of the original, and putting the original back
is all that detaching takes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from alignvec import ops
from alignvec.coefficients import Coefficients
from alignvec.errors import AlignvecError


class Stack:
    """The deltas of one parameter, [k, *shape]. Modules that share a parameter share its stack, also when it moves."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __deepcopy__(self, memo: dict[int, Any]) -> Stack:
        # Vectors are immutable: copies of a model share them until one of the copies moves.
        return Stack(self.tensor)


class Edit:
    """What one module needs to apply its vectors: the deltas of its parameters and where their coefficients are.

    columns: column of each present vector in the coefficient table, int32 [k].
    stacks: parameter name -> deltas [k, *shape], in the order of `columns`.
    """

    def __init__(
        self,
        coefficients: Coefficients,
        columns: Sequence[int],
        stacks: dict[str, Stack],
        choices: tuple[str, str, str],
        device: torch.device,
    ) -> None:
        self.coefficients = coefficients
        self.columns = torch.tensor(columns, dtype=torch.int32)
        self.stacks = stacks
        self.choices = choices
        self.move(device)

    def move(self, device: torch.device) -> None:
        """Bring deltas and columns to `device`, and read that device's coefficient table. Dtypes stay."""
        self.device = device
        self.columns = self.columns.to(device)
        live = self.coefficients.live(device)
        self.table, self.rows = live.table, live.rows
        for stack in self.stacks.values():
            stack.tensor = stack.tensor.to(device)

    def delta(self, name: str) -> Tensor | None:
        stack = self.stacks.get(name)
        return None if stack is None else stack.tensor

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, deltas: Tensor | None) -> Tensor:
        if self.device != x.device:
            self.move(x.device)
        if deltas is None:  # only the bias is edited
            deltas = weight.new_zeros(1, 1, 1).expand(len(self.columns), *weight.shape)
        bias_deltas = self.delta("bias")
        return ops.linear(
            x, weight, bias, deltas, bias_deltas, self.columns, self.table, self.rows, None, *self.choices
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
        return ops.embedding(ids, weight, self.stacks["weight"].tensor, self.columns, self.table, self.rows)

    def mixed(self, module: nn.Module, batch: int) -> dict[str, Tensor]:
        """Each edited parameter of `module` as float32 [batch, *shape], one mix for each of `batch` equal parts."""
        mixed = {}
        for name, stack in self.stacks.items():
            parameter = module._parameters[name]
            assert parameter is not None
            if self.device != parameter.device:
                self.move(parameter.device)
            mixed[name] = ops.mix(parameter, stack.tensor, self.columns, self.table, self.rows, batch)
        return mixed


class Aligned(nn.Module):
    """What all swapped-in modules have: an edit that follows the module's device, never its dtype."""

    edit: Edit
    original: Any  # the class of the module that this one is a view of

    def _apply(self, fn: Any, recurse: bool = True) -> Aligned:
        super()._apply(fn, recurse)
        device = next(p.device for p in self._parameters.values() if p is not None)
        if device != self.edit.device and device.type != "meta":
            self.edit.move(device)
        return self


class AlignedLinear(Aligned, nn.Linear):
    """`nn.Linear` plus weighted deltas: x [..., in_features] -> [..., out_features]."""

    def forward(self, input: Tensor) -> Tensor:
        return self.edit.linear(input, self.weight, self.bias, self.edit.delta("weight"))


class AlignedConv1D(Aligned, Conv1D):
    """GPT-2's `Conv1D`, a linear layer that stores its weight as [in_features, out_features]."""

    def forward(self, x: Tensor) -> Tensor:
        deltas = self.edit.delta("weight")
        return self.edit.linear(x, self.weight.t(), self.bias, None if deltas is None else deltas.transpose(1, 2))


class AlignedEmbedding(Aligned, nn.Embedding):
    """`nn.Embedding` plus weighted rows of the deltas: ids [...] -> [..., embedding_dim]."""

    def forward(self, input: Tensor) -> Tensor:
        return self.edit.embedding(input, self.weight)


class AlignedLayerNorm(Aligned, nn.LayerNorm):
    """`nn.LayerNorm` whose weight and bias differ for every row; normalised and scaled in float32."""

    def forward(self, input: Tensor) -> Tensor:
        mixed = _broadcast(self.edit.mixed(self, input.shape[0]), input)
        y = F.layer_norm(input.float(), self.normalized_shape, None, None, self.eps)
        weight, bias = mixed.get("weight", self.weight), mixed.get("bias", self.bias)
        y = y if weight is None else y * weight
        y = y if bias is None else y + bias
        return y.to(input.dtype)


class AlignedRMSNorm(Aligned, nn.RMSNorm):
    """`nn.RMSNorm` whose weight differs for every row; normalised and scaled in float32."""

    def forward(self, x: Tensor) -> Tensor:
        (weight,) = _broadcast(self.edit.mixed(self, x.shape[0]), x).values()
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        return (F.rms_norm(x.float(), self.normalized_shape, None, eps) * weight).to(x.dtype)


class AlignedNorm(Aligned):
    """Any elementwise-scaled norm, by its own forward: it sees its parameters as [batch, 1, ..., features]."""

    def forward(self, x: Tensor) -> Tensor:
        mixed = _broadcast(self.edit.mixed(self, x.shape[0]), x)
        y = self.original.forward(_Substituted(self, mixed), x)
        return y.to(x.dtype)


class AlignedModule(Aligned):
    """Any other module that owns edited parameters, by its own forward, once per row of coefficients.

    The reference path for mixture-of-experts weights and routers: the mix is formed in float32 for each row, and each
    row's share of the batch-major inputs goes through the module's forward with it.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        coefficients = self.edit.coefficients
        rows = coefficients.rows if torch.compiler.is_compiling() else coefficients.live_rows
        mixed = self.edit.mixed(self, rows)
        if rows > 1 and any(child._parameters for child in self.modules() if child is not self):
            raise AlignvecError(
                f"{self.original.__name__} uses its own {', '.join(mixed)} around submodules and cannot give the rows "
                "of a batch different coefficients; use set() instead of set_rows()"
            )
        tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        dtype = next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.float32)
        parts = []
        for row, (row_args, row_kwargs) in enumerate(_split((args, kwargs), rows)):
            module = _Substituted(self, {name: value[row] for name, value in mixed.items()})
            parts.append(self.original.forward(module, *row_args, **row_kwargs))
        return _join(parts, dtype)


class _Substituted:
    """`module` seen with other parameters; every other attribute falls through to it."""

    def __init__(self, module: nn.Module, parameters: dict[str, Tensor]) -> None:
        self.__dict__.update(parameters)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _broadcast(mixed: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    """[batch, features] -> [batch, 1, ..., features], to meet x [batch, ..., features]."""
    return {name: w.view(w.shape[0], *(1,) * (x.dim() - w.dim()), *w.shape[1:]) for name, w in mixed.items()}


def _split(value: Any, rows: int) -> Iterator[Any]:
    """`value` with every tensor in it cut into `rows` equal parts along its first dimension, floats as float32."""

    def part(item: Any, row: int) -> Any:
        if isinstance(item, Tensor):
            size = item.shape[0] // rows
            item = item[row * size : (row + 1) * size] if rows > 1 else item
            return item.float() if item.is_floating_point() else item
        if isinstance(item, tuple | list):
            return type(item)(part(i, row) for i in item)
        if isinstance(item, dict):
            return {key: part(i, row) for key, i in item.items()}
        return item

    return (part(value, row) for row in range(rows))


def _join(parts: list[Any], dtype: torch.dtype) -> Any:
    first = parts[0]
    if isinstance(first, Tensor):
        joined = torch.cat(parts) if len(parts) > 1 else first
        return joined.to(dtype) if joined.is_floating_point() else joined
    if isinstance(first, tuple | list):
        return type(first)(_join(list(items), dtype) for items in zip(*parts, strict=True))
    return first


# torch's and transformers' classes with a forward of our own for each; all others go by their own forward.
_OWN_FORWARD: tuple[tuple[type[nn.Module], type[Aligned]], ...] = (
    (nn.Linear, AlignedLinear),
    (Conv1D, AlignedConv1D),
    (nn.Embedding, AlignedEmbedding),
    (nn.LayerNorm, AlignedLayerNorm),
    (nn.RMSNorm, AlignedRMSNorm),
)


def view(module: nn.Module, edit: Edit) -> Aligned:
    """A swapped-in view of `module` that applies `edit`; `module` itself is left as it is."""
    original: Any = type(module)
    cls = _aligned_class(original, all(stack.tensor.dim() == 2 for stack in edit.stacks.values()))
    aligned = cls.__new__(cls)
    aligned.__dict__.update(module.__dict__)
    aligned.edit = edit
    hook = aligned.__dict__.get("_hf_hook")
    if hook is not None:
        _carry_hook(aligned, hook)
    return aligned


@functools.cache
def _aligned_class(cls: Any, vectors_only: bool) -> type[Aligned]:
    """The class for a view of `cls`; it stays a subclass of `cls`, so isinstance checks go on as before.

    vectors_only: every edited parameter is one-dimensional.
    """
    for base, aligned in _OWN_FORWARD:
        if issubclass(cls, base) and (cls.forward is base.forward or _calls_super(cls.forward)):
            # A subclass that extends forward by super() finds ours where it found the base's.
            bases = (aligned,) if cls is base else (cls, aligned)
            return type(f"Aligned{cls.__name__}", bases, {"original": cls})
    kind = AlignedNorm if cls.__name__.endswith("Norm") and vectors_only else AlignedModule
    return type(f"Aligned{cls.__name__}", (kind, cls), {"original": cls})


def _calls_super(forward: Any) -> bool:
    code = getattr(forward, "__code__", None)
    return code is not None and "__class__" in code.co_freevars and "forward" in code.co_names


def _carry_hook(module: nn.Module, hook: Any) -> None:
    """Wrap the view's forward in the accelerate hook that the original's was wrapped in, without running its set-up."""
    from accelerate.hooks import ModelHook, add_hook_to_module

    for attribute in ("forward", "_old_forward", "_hf_hook"):
        module.__dict__.pop(attribute, None)
    add_hook_to_module(module, ModelHook())
    module._hf_hook = hook
