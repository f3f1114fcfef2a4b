"""The modules swapped in for those whose parameters a vector edits: thin, one call into `ops` each.

A swapped-in module is a *view* of the original: it shares the original's parameter, buffer and hook dictionaries, so
names in the state dict, tied weights, moves and dtype changes are those of the original, and putting the original back
is all that detaching takes.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Iterator
from types import FrameType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from alignvec.edit import Edit
from alignvec.pickling import NotPickled
from alignvec.roworder import forward_by_row
from alignvec.tracing import traced


class Aligned(NotPickled, nn.Module):
    """What all swapped-in modules have: an edit that follows the module's device, never its dtype.

    Our forwards take parameters from `_parameters`. Whoever reads `module.weight` in a step gets the mix.
    """

    edit: Edit
    original: Any  # the class of the module that this one is a view of
    apart = False  # whether other code than the module's own forward rarely reads its parameters' values

    def __getattr__(self, name: str) -> Any:
        if name != "edit" and name in self.edit.deltas and self._parameters.get(name) is not None:
            if "_hf_hook" in self.__dict__ and _moves_parameters(sys._getframe(1)):
                return self._parameters[name]
            return self.edit.read(self, name, self.apart)
        return super().__getattr__(name)

    def _apply(self, fn: Any, recurse: bool = True) -> Aligned:
        before = {name: p.detach() for name, p in self._parameters.items() if p is not None}
        super()._apply(fn, recurse)
        for name, deltas in self.edit.deltas.items():
            deltas.follow(before[name], self._parameters[name])  # type: ignore[arg-type]
        self.edit.settle(self)
        device = next((p.device for p in self._parameters.values() if p is not None), self.edit.device)
        if device != self.edit.device and device.type != "meta":
            self.edit.move(device)
        return self


class AlignedLinear(Aligned, nn.Linear):
    """`nn.Linear` plus weighted deltas: x [..., in_features] -> [..., out_features]."""

    apart = True

    def forward(self, input: Tensor) -> Tensor:
        fused = self.edit.fused
        if fused is not None and not traced():
            y = fused.take(self, input)
            if y is not None:
                return y
        parameters = self._parameters
        return self.edit.linear(input, parameters["weight"], parameters["bias"])  # type: ignore[arg-type]


class AlignedConv1D(Aligned, Conv1D):
    """GPT-2's `Conv1D`, a linear layer that stores its weight as [in_features, out_features]."""

    apart = True

    def forward(self, x: Tensor) -> Tensor:
        return self.edit.linear(x, own_parameter(self).t(), own_parameter(self, "bias"))


class AlignedEmbedding(Aligned, nn.Embedding):
    """`nn.Embedding` plus weighted rows of the deltas: ids [...] -> [..., embedding_dim]."""

    apart = True

    def forward(self, input: Tensor) -> Tensor:
        return self.edit.embedding(input, own_parameter(self))


class AlignedLayerNorm(Aligned, nn.LayerNorm):
    """`nn.LayerNorm` whose weight and bias differ for every row."""

    apart = True

    def forward(self, input: Tensor) -> Tensor:
        return self.edit.layer_norm(input, own_parameter(self), own_parameter(self, "bias"), self.eps)


class AlignedRMSNorm(Aligned, nn.RMSNorm):
    """`nn.RMSNorm` whose weight differs for every row."""

    apart = True

    def forward(self, x: Tensor) -> Tensor:
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        return self.edit.rms_norm(x, own_parameter(self), eps, 0.0)


class AlignedRootMeanSquare(Aligned):
    """A class of its own that computes `x / rms(x) (offset + weight)`, as most models' norms do."""

    form: tuple[float, float]  # eps and offset
    apart = True

    def forward(self, x: Tensor) -> Tensor:
        return self.edit.rms_norm(x, own_parameter(self), *self.form)


class AlignedNorm(Aligned):
    """Any elementwise-scaled norm, by its own forward: it sees its parameters as [batch, 1, ..., features]."""

    def forward(self, x: Tensor) -> Tensor:
        return self.edit.norm(self, x, self._by_itself)

    def _by_itself(self, x: Tensor, mixed: dict[str, Tensor]) -> Tensor:
        y: Tensor = self.original.forward(_Substituted(self, _broadcast(mixed, x)), x)
        return y.to(x.dtype)


class AlignedModule(Aligned):
    """Any other module that owns edited parameters: experts, routers, mixers with parameters of their own.

    Its own forward runs, and reads the mix where it reads a parameter; where rows differ, once for each of them.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return forward_by_row(self, args, kwargs)


class AlignedRecurrent(AlignedModule):
    """torch's recurrent layers, which keep their parameters in a list beside."""

    @property
    def _flat_weights(self) -> list[Tensor]:
        return [getattr(self, name) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, _: Any) -> None:
        return


class AlignedBlock(AlignedModule):
    """A module without edited parameters of its own that runs once for each row, since modules inside of it get their
    tokens in another order than the batch's."""


def _moves_parameters(caller: FrameType) -> bool:
    """Whether accelerate asks, which brings offloaded parameters and takes them away."""
    return str(caller.f_globals.get("__name__")).startswith("accelerate.")


def own_parameter(module: nn.Module, name: str = "weight") -> Any:
    """The parameter of the base, as it is, also in a step; None where the module has none of that name."""
    return module._parameters.get(name)


# Beginnings of the names of methods that compute nothing.
_NO_COMPUTATION = ("__", "_init", "init", "reset", "_reset", "tie", "_tie", "resize", "set_", "load", "save", "_load")


class _Substituted:
    """`module` seen with other parameters; every other attribute is the module's."""

    def __init__(self, module: nn.Module, parameters: dict[str, Tensor]) -> None:
        self.__dict__.update(parameters)
        self.__dict__["_module"] = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._module, name, value)


def _broadcast(mixed: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    """[batch, features] -> [batch, 1, ..., features], to meet x [batch, ..., features]."""
    return {name: w.view(w.shape[0], *(1,) * (x.dim() - w.dim()), *w.shape[1:]) for name, w in mixed.items()}


# torch's and transformers' classes with a forward of our own for each; all others go by their own forward.
_OWN_FORWARD: tuple[tuple[type[nn.Module], type[Aligned]], ...] = (
    (nn.Linear, AlignedLinear),
    (Conv1D, AlignedConv1D),
    (nn.Embedding, AlignedEmbedding),
    (nn.LayerNorm, AlignedLayerNorm),
    (nn.RMSNorm, AlignedRMSNorm),
)


# Attributes that a module and its view have each for itself.
_OWN = ("edit", "form", "forward", "_old_forward", "_hf_hook", "_compiled_call_impl", "_flat_weights")


def view(module: nn.Module, edit: Edit) -> Aligned:
    """A swapped-in view of `module` that applies `edit`; `module` itself is left as it is."""
    original: Any = type(module)
    vectors_only = all(deltas.stack is not None for deltas in edit.deltas.values())
    kind: Any = AlignedModule if edit.deltas else AlignedBlock
    form = None
    if isinstance(module, nn.RNNBase):
        kind = AlignedRecurrent
    elif edit.deltas and original.__name__.endswith("Norm") and vectors_only:
        form = root_mean_square(module)
        if form is not None:
            kind = AlignedRootMeanSquare
        elif _broadcasts(module, edit.deltas):
            kind = AlignedNorm
    cls = _aligned_class(original, kind, vectors_only)
    aligned = cls.__new__(cls)
    aligned.__dict__.update({k: v for k, v in module.__dict__.items() if k not in _OWN})
    aligned.edit = edit
    below = any(child._parameters for child in module.modules() if child is not module)
    edit.widens = issubclass(cls, AlignedModule) and bool(edit.deltas) and not below
    if isinstance(aligned, AlignedRootMeanSquare):
        assert form is not None
        aligned.form = form
    carry_hook(module, aligned)
    edit.settle(aligned)
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
    members: dict[str, Any] = {"original": cls}
    if issubclass(kind, AlignedModule):
        members |= {name: _in_step(method) for name, method in _methods(cls)}
    return type(f"Aligned{cls.__name__}", (kind, cls), members)


def _methods(cls: type) -> Iterator[tuple[str, Any]]:
    """The methods that a model's own code gives a module beside its forward, the most derived of each name."""
    seen = {"forward"}
    for base in cls.__mro__:
        if base.__module__.startswith(("torch.", "transformers.modeling_", "transformers.generation", "builtins")):
            continue
        for name, value in vars(base).items():
            if name not in seen and isinstance(value, FunctionType) and not name.startswith(_NO_COMPUTATION):
                yield name, value
            seen.add(name)


def _in_step(method: Any) -> Any:
    """A method that computes under one mix also where it is called outside of a step (features of images, say)."""

    @functools.wraps(method)
    def run(self: Aligned, *args: Any, **kwargs: Any) -> Any:
        coefficients = self.edit.coefficients
        if traced() or coefficients.step is not None:
            return method(self, *args, **kwargs)
        with coefficients.call(None):
            return method(self, *args, **kwargs)

    return run


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


def _broadcasts(module: Any, names: Iterable[str]) -> bool:
    """Whether the module's forward takes x alone and scales it elementwise by its parameters, so that these may have a
    leading dimension for the batch: found by trying it."""
    parameters = {name: module._parameters[name] for name in names}
    size = next(iter(parameters.values())).shape[-1] if all(p.dim() == 1 for p in parameters.values()) else 0
    generator = torch.Generator().manual_seed(0)
    mixed = {name: torch.randn(2, *p.shape, generator=generator) for name, p in parameters.items()}
    x = torch.randn(2, 3, max(size, 1), generator=generator)
    others = {name: p for name, p in module._parameters.items() if p is not None and name not in parameters}
    plain = {name: p.detach().float().cpu() for name, p in others.items() if not p.is_meta}
    try:
        with torch.no_grad(), torch.device("cpu"):
            together = type(module).forward(_Substituted(module, plain | _broadcast(mixed, x)), x)
            rows = [plain | {name: w[row] for name, w in mixed.items()} for row in range(2)]
            apart = [type(module).forward(_Substituted(module, own), x[r, None]) for r, own in enumerate(rows)]
        return torch.allclose(together, torch.cat(apart), 1e-5, 1e-6)
    except Exception:  # whatever it is, it is no such norm
        return False


def _calls_super(forward: Any) -> bool:
    code = getattr(forward, "__code__", None)
    return code is not None and "__class__" in code.co_freevars and "forward" in code.co_names


def carry(source: nn.Module, target: nn.Module) -> None:
    """What happened to the one of a module and its view that the model held: state that its forward keeps, its training
    flag, accelerate's hook."""
    for name, value in source.__dict__.items():
        if name not in _OWN:
            target.__dict__[name] = value
    carry_hook(source, target)


def carry_hook(source: nn.Module, target: nn.Module) -> None:
    """Give `target` the accelerate hook that `source` has, or none, without running its set-up again."""
    hook = source.__dict__.get("_hf_hook")
    if hook is None and "_hf_hook" not in target.__dict__:
        return
    for attribute in ("forward", "_old_forward", "_hf_hook"):
        target.__dict__.pop(attribute, None)
    if hook is not None:
        from accelerate.hooks import ModelHook, add_hook_to_module

        add_hook_to_module(target, ModelHook())
        target._hf_hook = hook
