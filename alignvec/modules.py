"""The modules swapped in for those whose parameters a vector edits: thin, one call into `ops` each.

A swapped-in module is a *view* of the original: it shares the original's parameter, buffer and hook dictionaries, so
names in the state dict, tied weights, moves and dtype changes are those of the original, and putting the original back
is all that detaching takes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from alignvec.edit import Edit
from alignvec.errors import AlignvecError


class Aligned(nn.Module):
    """What all swapped-in modules have: an edit that follows the module's device, never its dtype."""

    edit: Edit
    original: Any  # the class of the module that this one is a view of

    def _apply(self, fn: Any, recurse: bool = True) -> Aligned:
        before = {name: p.detach() for name, p in self._parameters.items() if p is not None}
        super()._apply(fn, recurse)
        for name, deltas in self.edit.deltas.items():
            deltas.follow(before[name], self._parameters[name])  # type: ignore[arg-type]
        device = next(p.device for p in self._parameters.values() if p is not None)
        if device != self.edit.device and device.type != "meta":
            self.edit.move(device)
        return self


class AlignedLinear(Aligned, nn.Linear):
    """`nn.Linear` plus weighted deltas: x [..., in_features] -> [..., out_features]."""

    def forward(self, input: Tensor) -> Tensor:
        fused = self.edit.fused
        if fused is not None and not torch.compiler.is_compiling():
            y = fused.take(self, input)
            if y is not None:
                return y
        return self.edit.linear(input, self.weight, self.bias)


class AlignedConv1D(Aligned, Conv1D):
    """GPT-2's `Conv1D`, a linear layer that stores its weight as [in_features, out_features]."""

    def forward(self, x: Tensor) -> Tensor:
        return self.edit.linear(x, self.weight.t(), self.bias)


class AlignedEmbedding(Aligned, nn.Embedding):
    """`nn.Embedding` plus weighted rows of the deltas: ids [...] -> [..., embedding_dim]."""

    def forward(self, input: Tensor) -> Tensor:
        return self.edit.embedding(input, self.weight)


class AlignedLayerNorm(Aligned, nn.LayerNorm):
    """`nn.LayerNorm` whose weight and bias differ for every row."""

    def forward(self, input: Tensor) -> Tensor:
        return self.edit.layer_norm(input, self.weight, self.bias, self.eps)


class AlignedRMSNorm(Aligned, nn.RMSNorm):
    """`nn.RMSNorm` whose weight differs for every row."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight is not None
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        return self.edit.rms_norm(x, self.weight, eps, 0.0)


class AlignedRootMeanSquare(Aligned):
    """A class of its own that computes `x / rms(x) (offset + weight)`, as most models' norms do."""

    weight: Tensor
    form: tuple[float, float]  # eps and offset

    def forward(self, x: Tensor) -> Tensor:
        return self.edit.rms_norm(x, self.weight, *self.form)


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
    vectors_only = all(deltas.stack is not None for deltas in edit.deltas.values())
    kind: Any = AlignedModule
    form = None
    if original.__name__.endswith("Norm") and vectors_only:
        form = root_mean_square(module)
        kind = AlignedNorm if form is None else AlignedRootMeanSquare
    cls = _aligned_class(original, kind, vectors_only)
    aligned = cls.__new__(cls)
    aligned.__dict__.update(module.__dict__)
    aligned.edit = edit
    if isinstance(aligned, AlignedRootMeanSquare):
        assert form is not None
        aligned.form = form
    hook = aligned.__dict__.get("_hf_hook")
    if hook is not None:
        _carry_hook(aligned, hook)
    return aligned


@functools.cache
def _aligned_class(cls: Any, kind: type[Aligned], vectors_only: bool) -> type[Aligned]:
    """The class for a view of `cls`; it stays a subclass of `cls`, so isinstance checks go on as before.

    kind: for classes that are not one of those with a forward of our own. vectors_only: every edited parameter is
    one-dimensional, which norms' forwards are for.
    """
    for base, aligned in _OWN_FORWARD:
        if base in (nn.LayerNorm, nn.RMSNorm) and not vectors_only:
            continue
        if issubclass(cls, base) and (cls.forward is base.forward or _calls_super(cls.forward)):
            # A subclass that extends forward by super() finds ours where it found the base's.
            bases = (aligned,) if cls is base else (cls, aligned)
            return type(f"Aligned{cls.__name__}", bases, {"original": cls})
    return type(f"Aligned{cls.__name__}", (kind, cls), {"original": cls})


def root_mean_square(module: Any) -> tuple[float, float] | None:
    """eps and offset where `module` computes `x / rms(x) (offset + weight)`, else None: found by trying it.

    Models have classes of their own for this norm, alike but for their names and the offset of 1 that some add.
    """
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    parameters = [name for name, p in module._parameters.items() if p is not None]
    if not isinstance(eps, float) or parameters != ["weight"] or module.weight.dim() != 1:
        return None
    size = module.weight.shape[0]
    weight = torch.linspace(0.5, 1.5, size, device="cpu")
    x = torch.linspace(-2.0, 3.0, size, device="cpu") * torch.tensor([[1.0], [eps**0.5]], device="cpu")
    try:
        with torch.no_grad():
            got = type(module).forward(_Substituted(module, {"weight": weight}), x)
    except Exception:  # whatever it is, it is no such norm: it runs by its own forward
        return None
    unit = F.rms_norm(x, (size,), None, eps)
    return next((((eps, o)) for o in (0.0, 1.0) if torch.allclose(got, unit * (o + weight), 1e-5, 1e-6)), None)


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
