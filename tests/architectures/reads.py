"""Parameters that a plain model reads past their owner's forward, and those that an attached one leaves at the base."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

import alignvec
from tests.architectures.subject import Subject, logits

MOVED = 1e-4  # of the logits: a parameter that moves them less cannot be told from rounding
MISSED = 5e-2  # of what the parameter moves


class _Reads(TorchFunctionMode):
    """Notes every parameter that an operation takes while another module's forward, or none, is the innermost."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.found: set[str] = set()
        self.stack: list[nn.Module] = []
        self.names: dict[int, tuple[str, list[nn.Module]]] = {}
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    self.names.setdefault(id(parameter), (name, []))[1].append(module)
        self.hooks = [
            hook
            for module in model.modules()
            for hook in (
                module.register_forward_pre_hook(lambda m, _: self.stack.append(m)),
                module.register_forward_hook(lambda *_: self.stack.pop() and None),
            )
        ]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") not in ("__get__", "size", "dim", "__repr__", "is_floating_point"):
            for item in _tensors((args, kwargs or {})):
                if id(item) in self.names:
                    self._note(*self.names[id(item)])
        return func(*args, **(kwargs or {}))

    def _note(self, name: str, owners: list[nn.Module]) -> None:
        reader = self.stack[-1] if self.stack else None
        if reader not in owners:
            self.found.add(f"{type(reader).__name__} reads {type(owners[0]).__name__}.{name}")


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)


def read_past_forward(model: PreTrainedModel) -> list[str]:
    """`READER reads OWNER.parameter` for every read of a parameter outside of its owner's own forward."""
    model = copy.deepcopy(model)
    reads = _Reads(model)
    with reads:
        logits(model)
    return sorted(reads.found)


def missed_parameters(subject: Subject, rows: bool = False) -> list[str]:
    """Parameters, one of each class and name, whose delta does not reach the logits as it does when it is merged.

    rows: with two different rows of coefficients, of which the second is the base's.
    """
    base, before = subject.base, logits(subject.base)
    missed = []
    for name, label in _kinds(base).items():
        changed = copy.deepcopy(base)
        parameter = dict(changed.named_parameters())[name]
        with torch.no_grad():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4))
            parameter.add_(0.3 * (float(parameter.std(correction=0)) + 0.05) * noise)
        truth = logits(changed)
        if rows:
            truth = torch.cat([truth[:1], before[1:]])
        moved = float((truth - before).norm())
        if not moved > MOVED * float(before.norm()):
            continue
        try:
            model = copy.deepcopy(base)
            alignment = alignvec.attach(model, {"v": alignvec.extract(base, changed)})
            alignment.set_rows([{"v": 1.0}, {"v": 0.0}] if rows else [{"v": 1.0}])
            error = float((logits(model) - truth).norm()) / moved
        except Exception:
            continue  # the checks themselves say so
        if not error < MISSED:
            missed.append(label)
    return missed


def _kinds(model: PreTrainedModel) -> dict[str, str]:
    """The first parameter of each owner's class and name, by its full name, with a label that says both."""
    kinds: dict[str, str] = {}
    live = dict(model.named_parameters())
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            full = f"{path}.{name}" if path else name
            label = f"{type(module).__name__}.{name}"
            inner = path.rsplit(".", 1)[-1]
            label = (
                label
                if type(module).__module__.startswith("transformers.models")
                else f"{inner}.{name} ({type(module).__name__})"
            )
            if parameter is not None and full in live and label not in kinds.values():
                kinds[full] = label
    return kinds
